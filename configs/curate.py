"""From built sets to tasks that need looking, with Qwen2.5-VL-7B-Instruct as the policy that is asked.

    python -m virl_jax.curate build --source=gqa,visual_cot --data=RAW/gqa,RAW/visual_cot --out=SETS
    python -m virl_jax.curate --config=configs/curate.py --data=SETS --out=data/curated
    python -m virl_jax.train --config=configs/v7b.py --config.data.source=set --config.data.path=data/curated \
      --workdir=runs/v7b

A server can run the policy: --endpoint=http://HOST:8000/v1 --config.endpoint.model=NAME; then only the tokenizer and
the shapes of model.path are read.  Without a policy, rules only:
    --config.curate.policy.with_zoom=0 --config.curate.policy.without_zoom=0

Prompts, pictures and budgets are those of training (configs/v7b.py).  The paper filters about 200k samples to about 8k
in these stages; its thresholds are not published in what we have: all numbers are ours.  Never run end to end by us on
such a policy: no machine we have holds it.
"""

from virl_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.model.path = "weights/Qwen2.5-VL-7B-Instruct"
  c.model.dtype = "bfloat16"            # as released: nothing is trained here
  c.model.compute_dtype = "bfloat16"

  # As in configs/v7b.py, so that a task is as hard here as it will be there.
  c.image.max_pixels = 2007040
  c.image.crop_min_pixels = 40000
  c.image.crop_max_pixels = 1003520
  c.image.crop_min_side_px = 30
  c.prompt.instruction = ("Think first inside <think></think>. Then either call the tool to look closer, or give "
                          "the final answer inside <answer></answer>.")
  c.rollout.max_rounds = 6
  c.rollout.max_turn_tokens = 1024
  c.rollout.max_total_tokens = 16384
  c.engine.slots = 64
  c.engine.pad_tokens = 2048

  # None of these pictures may be trained on: "NAME=PATH", or "NAME=PATH=IMAGES".
  c.curate.benchmarks = ()
  c.curate.rules.most_coverage = 0.3    # larger boxes need no zoom
  c.curate.policy.with_zoom = 8         # as many as in a training step's group
  c.curate.policy.without_zoom = 4
  c.curate.filter.most_without = 0.5    # right in more than half of the blind samples: no need to look
  c.curate.filter.least_pass = 0.1      # with the next: 1 to 7 right of 8
  c.curate.filter.most_pass = 0.9
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 1
  return c
