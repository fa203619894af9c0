"""ViRL on Qwen2.5-VL-3B-Instruct, all of it trained: four GPUs of 40 GB, or eight of 80.

    hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir=weights/Qwen2.5-VL-3B-Instruct
    python -m virl_jax.plan --config=configs/v3b.py --topology=a100-40:4
    python -m virl_jax.train --config=configs/v3b.py --config.data.path=RECORDS.jsonl --workdir=runs/v3b

Only what differs from configs/v7b.py is here; that file's labels say where its numbers are from, [ours] is chosen here.
Never run end to end by us: no machine we have holds it.  docs/scaling.md has what it takes, as compiled.
"""

import pathlib
import runpy


def get_config():
  c = runpy.run_path(str(pathlib.Path(__file__).with_name("v7b.py")))["get_config"]()
  c.model.path = "weights/Qwen2.5-VL-3B-Instruct"
  c.model.patches_together = 32768      # or an update does not fit in 40 GB [ours]
  c.engine.slots = 64                   # 0.56 GiB each [ours]
  c.rollout.prompts = 64                # 512 trajectories a step [ours]
  c.ppo.minibatches = 2                 # [ours]
  return c
