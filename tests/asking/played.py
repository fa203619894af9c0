"""A policy that says given turns, a few tokens at a time: a whole rollout, except for the model."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.model import weights
from virl_jax.rollout import told
from virl_jax.rollout import turns
from virl_jax.rollout.actions import zoom
from virl_jax.run import load

CALL = prompt.call_text(zoom.call((10, 12, 40, 48)), "there")
HOSTILE = '<script>document.title="owned"</script><img src=x onerror=\'document.title="owned"\'>\x1b[2J\u202e&lt;'
TURNS = (CALL, prompt.call_text(zoom.call((50, 50, 50, 60))), prompt.call_text(zoom.call((60, 20, 80, 70)), HOSTILE),
         prompt.answer_text(f"rows {HOSTILE}", "\u00e9\u4e2d\U0001f600"))


def policy() -> turns.Policy:
  """A policy that is shown pictures of at most 84 x 84 px, with the tiny base's tokenizer."""
  folder = load.model_dir("@tiny")
  cfg = weights.read_config(folder)
  image = images.Config(max_pixels=84 * 84, crop_min_pixels=1568, crop_max_pixels=3136)
  return turns.Policy(cfg, load.codec(folder, cfg), prompt.Config("You help.", False, False), image,
                      turns.Config(4, 400, 3000, 1.0), None)


class Played:
  """An `ask.Asked` that says these turns.

  Attributes:
    pause: called before each piece of a turn.
    asked: the tasks so far.
  """

  def __init__(self, policy, said=TURNS, pieces=5, pause=lambda: None):
    self.policy, self.said, self.pieces, self.pause, self.asked = policy, said, pieces, pause, []

  def __call__(self, task, tell):
    self.asked.append(task)
    protocol = told.Protocol(tell)
    row = protocol.begin(self.policy, task).row(0)
    for text in self.said:
      ids = self.policy.codec.encode(text + prompt.END)
      for part in np.array_split(ids, min(self.pieces, len(ids))):
        self.pause()
        over = protocol.hear(self.policy, row, part, np.zeros(len(part), np.float32))
      reply = protocol.read(self.policy, row) if over else None
      if reply is None:
        break
      row.filled, row.next_pos = reply.start + len(reply.ids), reply.next_pos
    return row.traj


def picture(kind="PNG", size=(252, 168), colour="grey", **how) -> bytes:
  """A picture's file."""
  out = io.BytesIO()
  Image.new("RGB", size, colour).save(out, kind, **how)
  return out.getvalue()
