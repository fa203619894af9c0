"""A whole ViRL run on a laptop's CPU: the needle task, from the tiny base of two million parameters.

    python -m virl_jax.train --config=configs/tiny.py --workdir=runs/tiny

The picture (252 px) is shown at 84 px, where no mark can be read; a crop comes back at about 84 px too, and the
tighter the zoom, the clearer an object's mark in it.  All numbers here are ours, chosen for two CPU cores.
"""

from virl_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.steps = 40
  c.model.path = "@tiny"
  c.data.needle.families = ("pattern", "pair_pattern")
  c.data.needle.train_size = 1024
  c.data.needle.test_size = 256
  c.image.max_pixels = 84 * 84
  c.image.crop_min_pixels = 5 * 28 * 28    # crops are about 84 px a side, whatever their size was
  c.image.crop_max_pixels = 10 * 28 * 28
  c.prompt.describe_tool = False   # the tiny base learned the tool by example
  c.prompt.last_notice = ""        # and has never seen the default notice
  c.prompt.image_first = False     # so that image tokens see what is asked
  c.rollout.prompts = 16
  c.rollout.group_size = 8
  c.rollout.max_rounds = 3
  c.rollout.max_turn_tokens = 32
  c.rollout.max_total_tokens = 256
  c.pack.join_rows = True          # an eighth of the tokens is padding, without it half
  c.pack.pad_tokens = 128          # rows of 512 tokens
  c.pack.joined_share = 1 / 32     # a multiple of 4 rows
  # With the default weights the policy stops zooming twice, even where two objects are to be compared: its second
  # zooms are poor at first, and it is blamed for them before it learns that the answer needs them.
  c.reward.w_answer = 2.0
  c.reward.w_fidelity = 0.5
  c.optim.learning_rate = 2e-4
  c.optim.warmup_steps = 5
  c.optim.b2 = 0.98
  c.eval.tasks = 256
  c.checkpoint.every = 20
  c.log.gallery_every = 25
  return c
