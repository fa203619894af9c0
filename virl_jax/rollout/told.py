"""Reports one trajectory while it is sampled: its words, where the policy looks, what comes back.

`Protocol`, for the engine's argument of that name, does what `turns` does and also reports it; it does not change what
is sampled.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import numpy as np
from PIL import Image

from virl_jax import types
from virl_jax.data import prompt as prompt_lib
from virl_jax.model import patches
from virl_jax.rollout import row as row_lib
from virl_jax.rollout import turns


@dataclasses.dataclass(frozen=True)
class Began:
  """The question is about to be asked.

  Attributes:
    picture: the original, decoded.
    shown: its width and height in pixels, as the policy is shown it.
  """

  picture: Image.Image
  shown: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Said:
  """Some more words of a turn, without the token that ends it.

  Attributes:
    turn: its number, from 0.
    text: what has not been reported yet.
  """

  turn: int
  text: str


@dataclasses.dataclass(frozen=True)
class Looked:
  """A visual action was carried out.

  Attributes:
    turn: the number of the turn that took it, from 0.
    action: its name.
    region: what it was about, in pixels of the original, or None.
    crop: the part of the original that came back, or None.
    cut: where that part is in the original, whole pixels, or None; it may be larger than `region`.
    shown: the crop's width and height in pixels, as the policy is shown it, or None.
    text: what came back in words, with any notice.
  """

  turn: int
  action: str
  region: types.Box | None
  crop: Image.Image | None
  cut: types.Box | None
  shown: tuple[int, int] | None
  text: str


@dataclasses.dataclass(frozen=True)
class Refused:
  """A call was refused.

  Attributes:
    turn: the number of the turn that made it, from 0.
    error: what was wrong with it.
  """

  turn: int
  error: str


@dataclasses.dataclass(frozen=True)
class Ended:
  """The trajectory is over.

  Attributes:
    stop: why.
    answer: the text inside the answer tag, or None.
    error: what was wrong with the last turn, or None.
  """

  stop: types.StopReason
  answer: str | None
  error: str | None


class Protocol:
  """`turns` for a rollout of one trajectory, which reports what happens.

  Args:
    tell: called with each of the above as it happens, one after the other, in the engine's threads.  An exception that
      it raises ends the rollout.
  """

  left = staticmethod(turns.left)

  def __init__(self, tell: Callable[[Began | Said | Looked | Refused | Ended], None]):
    self._tell = tell
    self._told = 0  # characters of the turn that is being written

  def begin(self, policy: turns.Policy, task: types.Task) -> row_lib.Prompt:
    """See `turns.begin`."""
    prompt = turns.begin(policy, task)
    self._tell(Began(prompt.picture, patches.shown_wh(prompt.reply.image, policy.model.vision.grid)))
    return prompt

  def hear(self, policy: turns.Policy, row: row_lib.Row, ids: np.ndarray, logp: np.ndarray) -> bool:
    """See `turns.hear`."""
    over = turns.hear(policy, row, ids, logp)
    said = np.concatenate(row.ids)
    if len(said) and said[-1] in policy.codec.eos:
      said = said[:-1]
    text = policy.codec.decode(said)
    if not over:  # the last character may not be complete yet
      text = text.rstrip("\ufffd")
    if len(text) > self._told:
      self._tell(Said(row.turn, text[self._told:]))
      self._told = len(text)
    return over

  def read(self, policy: turns.Policy, row: row_lib.Row) -> row_lib.Reply | None:
    """See `turns.read`."""
    number, self._told = row.turn, 0
    reply, traj = turns.read(policy, row), row.traj
    if reply is None:
      self._tell(Ended(traj.stop, traj.answer, traj.turns[-1].error))
      return None
    said, told = traj.turns[-2:]
    if said.error is not None:
      self._tell(Refused(number, said.error))
      return reply
    crop = cut = shown = None
    if told.image_index is not None:
      image = traj.images[told.image_index]
      cut, shown = image.region, patches.shown_wh(image, policy.model.vision.grid)
      crop = row.picture.crop(cut)
    self._tell(Looked(number, said.action, said.region, crop, cut, shown, _words(told.text)))
    return reply


def _words(text: str) -> str:
  """The words of a tool turn, without its picture."""
  inside = text.partition("<tool_response>")[2].partition("</tool_response>")[0]
  return inside.replace(prompt_lib.IMAGE, "").strip()
