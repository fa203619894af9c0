"""ViRL on Qwen2.5-VL-32B-Instruct, all of it trained.  Planned only: compiled, and never run.

    python -m virl_jax.plan --config=configs/v32b.py --topology=h200:16

Only what differs from configs/v7b.py is here; that file's labels say where its numbers are from, [ours] is chosen here.
docs/scaling.md has what it takes, as compiled.
"""

import pathlib
import runpy


def get_config():
  c = runpy.run_path(str(pathlib.Path(__file__).with_name("v7b.py")))["get_config"]()
  c.model.path = "weights/Qwen2.5-VL-32B-Instruct"
  c.rollout.tensor = 4                  # of 40 query heads and 8 key/value heads [ours]
  return c
