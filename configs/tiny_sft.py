"""The tiny protocol by example: configs/tiny.py, learning from demonstrations instead of reward.

    python benchmarks/sft.py --out=runs/sft --only=data
    python -m virl_jax.sft --config=configs/tiny_sft.py --data=runs/sft/finding.jsonl --workdir=runs/tiny_sft

The first command writes demonstrations of the needle task; without --only it runs all the stages that lead from
nothing to a policy that speaks the protocol (docs/sft.md).  All numbers here are ours, chosen for two CPU cores.
"""

import pathlib
import runpy


def get_config():
  c = runpy.run_path(str(pathlib.Path(__file__).with_name("tiny.py")))["get_config"]()
  c.steps = 300
  c.sft.batch = 32
  c.pack.joined_share = 0.25       # eight rows: one program serves nearly all batches
  c.sft.only_right = False         # a demonstrator that guesses still shows how to look
  c.optim.learning_rate = 1e-3
  c.optim.warmup_steps = 20
  c.checkpoint.every = 50
  c.log.gallery_every = 100
  return c
