"""What a recorded conversation says, free of any protocol: a task, and turn by turn what the assistant did.

`rollout.replay` turns it into our protocol.  Observations are not kept: our own zoom makes them again.
"""

from __future__ import annotations

import dataclasses

from virl_jax import types

# What the numbers of a box are: pixels of its image as cut from the original, pixels of it as shown to our policy,
# shares of its sides, or thousandths of them.
FRAMES = ("original", "shown", "share", "thousandths")


class Unusable(ValueError):
  """Why a recorded conversation can't be learned from.

  Attributes:
    reason: in a few words, the same for all records with the same fault.
    detail: what came, or "".
  """

  def __init__(self, reason: str, detail: object = ""):
    super().__init__(f"{reason}: {detail}" if detail else reason)
    self.reason, self.detail = reason, str(detail)


@dataclasses.dataclass(frozen=True)
class Verbatim:
  """A turn in our own protocol, word for word.

  Attributes:
    text: the turn, with or without its end-of-turn token.
    ids: as sampled, or None; they are used if they are this text by the tokenizer at hand.
    learned: whether it is trained on; if not, it is only context.
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
    of: which image the box is in: 0 is the first image, k the k-th that came back.
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
    reward: its total reward, or None if that is not known.
    correct: whether its answer was right, or None if that is not known.
    folder: that of its file, if its image has to be looked up; else "".
  """

  task: types.Task
  said: tuple[Verbatim | Look | Answer, ...]
  reward: float | None = None
  correct: bool | None = None
  folder: str = ""
