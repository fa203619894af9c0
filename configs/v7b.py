"""ViRL on Qwen2.5-VL-7B-Instruct.

    hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir=weights/Qwen2.5-VL-7B-Instruct
    python -m virl_jax.plan --config=configs/v7b.py --topology=h100:8
    python -m virl_jax.train --config=configs/v7b.py --config.data.path=RECORDS.jsonl --workdir=runs/v7b

RECORDS.jsonl holds one object a line: image, question, answers, boxes (pixels of the image file), options.
A set of raw downloads (docs/data.md), curated (docs/curation.md), is --config.data.source=set --config.data.path=DIR.
Shapes come from the checkpoint's own config.json.  Every number below says where it is from:
    [published]  ViRL, arXiv 2511.23031, or Qwen2.5-VL's released configuration
    [NAME]       that project's published setting
    [ours]       chosen here; the paper's value is not published in what we have
Never run end to end by us: no machine we have holds it.  State for full fine-tuning with float32 masters and
AdamW is about 114 GiB before activations.  Compiled, it fits on 8 x H100 and 16 x TPU v5p as it is, and with
    --config.model.patches_together=32768 --config.rollout.tensor=2    on 16 x TPU v6e
    --config.model.patches_together=16384 --config.rollout.tensor=4    on 64 x TPU v5e
docs/scaling.md says what it takes there.
"""

from virl_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.steps = 80                          # [DeepEyes: 80 steps]

  c.model.path = "weights/Qwen2.5-VL-7B-Instruct"
  c.model.dtype = "float32"             # masters: at lr 1e-6 bf16 weights barely move [ours]
  c.model.compute_dtype = "bfloat16"    # [published: Qwen2.5-VL's released dtype]
  c.model.remat = True                  # whole layers, or 8k-token rows don't fit [ours]

  c.data.source = "jsonl"
  c.data.path = "data/virl_8k.jsonl"    # about 8k records after three-stage filtering [published]
  c.data.eval_fraction = 0.05           # [ours]

  c.image.min_pixels = 3136             # [published: preprocessor_config.json]
  c.image.max_pixels = 2007040          # 2,560 vision tokens; peers use 2M-12.8M [ours, in their range]
  c.image.crop_min_pixels = 40000       # small crops are enlarged [Mini-o3: 40k..2M]
  c.image.crop_max_pixels = 1003520     # 1,280 vision tokens [ours]
  c.image.crop_min_side_px = 30         # [DeepEyes: above 30]
  c.image.crop_max_aspect = 100.0       # [DeepEyes]

  c.prompt.system = "You are a helpful assistant."  # [published: Qwen2.5-VL]
  c.prompt.describe_tool = True         # Hermes style tool schema [published: Qwen2.5]
  c.prompt.image_first = True           # [published: Qwen2.5-VL]
  c.prompt.instruction = ("Think first inside <think></think>. Then either call the tool to look closer, or give "
                          "the final answer inside <answer></answer>.")  # [ours, after DeepEyes' format]

  c.rollout.prompts = 256               # prompts a step [DeepEyes]
  c.rollout.group_size = 8              # [Mini-o3, DeepEyes: 8-16]
  c.rollout.max_rounds = 6              # [published]
  c.rollout.max_turn_tokens = 1024      # [ours]
  c.rollout.max_total_tokens = 16384    # prompt 8,192 + response 8,192 [ours; DeepEyes: 8,192 + 20,480]
  c.engine.slots = 64                   # of 2,048 trajectories; 0.875 GiB each, 7 GiB a device on eight [ours]
  c.rollout.temperature = 1.0           # [DeepEyes, Mini-o3]
  c.rollout.mask_overlong = True        # [ours, after Mini-o3's masking of over-turn rollouts]
  c.rollout.mask_out_of_rounds = True   # [Mini-o3: masking over-turn rollouts]
  c.engine.pad_tokens = 2048            # of prompts [ours]
  c.pack.pad_tokens = 4096              # so that all rows are 16,384 wide, and one program serves all batches [ours]
  c.pack.join_rows = True               # several trajectories a row [ours]
  c.learner.microbatch_tokens = 16384   # a row a device [ours]

  c.reward.h0 = 0.4                     # [ours, inside the published sweep 0.2-0.5]
  c.reward.lam = 0.5                    # [ours]
  c.reward.rho = 0.5                    # [ours]
  c.reward.w_answer = 1.0               # [ours]
  c.reward.w_format = 0.2               # [DeepEyes]
  c.reward.w_fidelity = 0.5             # [ours]
  c.reward.no_action = -1.0             # [ours]

  c.credit.h_good = 1.5                 # [ours]
  c.credit.h_redundant = 0.75           # [ours]
  c.credit.h_bad = 0.5                  # [ours]

  c.advantage.normalize_std = True      # [GRPO]
  c.loss.clip_low = 0.2                 # [PPO]
  c.loss.clip_high = 0.28               # [DAPO]
  c.loss.kl_coef = 0.0                  # [DeepEyes]
  c.loss.entropy_coef = 0.0             # [DeepEyes]
  c.ppo.minibatches = 4                 # [ours]
  c.ppo.epochs = 1                      # [DeepEyes]

  c.optim.learning_rate = 1e-6          # [DeepEyes, Pixel-Reasoner]
  c.optim.warmup_steps = 10             # [ours]
  c.optim.b1, c.optim.b2 = 0.9, 0.999   # [AdamW]
  c.optim.weight_decay = 0.01           # [verl's default]
  c.optim.clip_norm = 1.0               # [DeepEyes]

  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 1  # all devices share the state; 28/4 heads allow tensor 2, 4 [ours]
  c.checkpoint.every = 8                # [DeepEyes: 8]
  c.checkpoint.keep = 2                 # [ours]
  c.eval.tasks = 256                    # [ours]
  c.eval.temperature = 0.0              # greedy [ours]
  return c
