"""What a recorded conversation says, free of any protocol: a task, and turn by turn what the assistant did.

`rollout.replay` has it said in ours.  Observations are not kept: what a zoom shows is for our own zoom to say.
"""

from __future__ import annotations

import dataclasses

from virl_jax import types

# How the numbers of a box are to be read, as shares of the image that they are of, with its size as shown to our policy
# and as cut from the original, pixels.
FRAMES = ("original", "shown", "share", "thousandths")


class Unusable(ValueError):
  """Why a recorded conversation can't be learned from.

  Attributes:
    reason: in a few words, the same for all of a kind.
    detail: what came, or "".
  """

  def __init__(self, reason: str, detail: object = ""):
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason, self.detail = reason, str(detail)


@dataclasses.dataclass(frozen=True)
class Verbatim:
  """A turn in our own protocol, word for word.

  Attributes:
    text: the turn, with or without its end.
    ids: as sampled, or None; they count if they are this text by the tokenizer at hand.
    learned: whether it is trained on; if not, it is only looked at.
  """

  text: str
  ids: tuple[int, ...] | None = None
  learned: bool = True


@dataclasses.dataclass(frozen=True)
class Look:
  """A turn that zooms.

  Attributes:
    thought: what is said before.
    box: four numbers, x1, y1, x2, y2.
    frame: how they are to be read, one of `FRAMES`.
    of: which image they are of: 0 the first, k the k-th that came back.
  """

  thought: str
  box: tuple[float, float, float, float]
  frame: str
  of: int = 0


@dataclasses.dataclass(frozen=True)
class Answer:
  """A turn that answers."""

  thought: str
  text: str


@dataclasses.dataclass(frozen=True)
class Script:
  """A conversation.

  Attributes:
    task: what is asked.  Its image is a path or bytes; "" where it has to be looked up by the task's uid.
    said: what the assistant did, turn by turn.
    reward: what it earned in all, or None.
    correct: whether its answer was right, or None if that is not known.
    folder: where its file lies, if its image has to be looked up.
  """

  task: types.Task
  said: tuple[Verbatim | Look | Answer, ...]
  reward: float | None = None
  correct: bool | None = None
  folder: str = ""
