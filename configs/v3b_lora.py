"""ViRL on Qwen2.5-VL-3B-Instruct with low-rank adapters: one GPU of 24 GB, or one TPU v6e.

    hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir=weights/Qwen2.5-VL-3B-Instruct
    python -m virl_jax.plan --config=configs/v3b_lora.py --topology=rtx4090:1
    python -m virl_jax.train --config=configs/v3b_lora.py --config.data.path=RECORDS.jsonl --workdir=runs/v3b_lora

Only what differs from configs/v7b_lora.py and configs/v7b.py is here; their labels say where their numbers are from,
[ours] is chosen here.  Never run end to end by us.  docs/scaling.md has what it takes, as compiled.
"""

import pathlib
import runpy


def get_config():
  c = runpy.run_path(str(pathlib.Path(__file__).with_name("v7b_lora.py")))["get_config"]()
  c.model.path = "weights/Qwen2.5-VL-3B-Instruct"
  c.model.patches_together = 16384      # [ours]
  c.image.max_pixels = 1003520          # 1,280 vision tokens [transformers' class default]
  c.image.crop_max_pixels = 501760      # 640 vision tokens [ours]
  c.rollout.max_total_tokens = 8192     # [ours]
  c.rollout.prompts = 16                # 128 trajectories a step [ours]
  c.engine.slots = 16                   # 0.28 GiB each [ours]
  c.pack.pad_tokens = 2048              # all rows are 8,192 wide [ours]
  c.learner.microbatch_tokens = 8192    # [ours]
  return c
