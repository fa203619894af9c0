"""Tasks of a step, with their pictures decoded; what does not decode is counted and passed over."""

from __future__ import annotations

import dataclasses
import itertools

from virl_jax import types
from virl_jax.data import images
from virl_jax.data import order


@dataclasses.dataclass(frozen=True)
class Drawn:
  """What was drawn.

  Attributes:
    tasks: as many as were wanted, pictures decoded.
    skipped: why each task that was passed over was passed over.
  """

  tasks: list[types.Task]
  skipped: list[str]


def _good(source, indices, wanted: int, max_pixels: int, what: str) -> Drawn:
  """The first `wanted` tasks of `indices` that decode, or all that do."""
  tasks, skipped = [], []
  for index in indices:
    if len(tasks) == wanted:
      break
    task = source.task(int(index))
    try:
      tasks.append(dataclasses.replace(task, image=images.decode(task.image, max_pixels)))
    except ValueError as e:
      skipped.append(f"{task.uid}: {e}")
  if not tasks:
    raise ValueError(f"{what} must have tasks whose pictures decode. Received: "
                     + (f"{len(skipped)} that don't, first {skipped[0]}" if skipped else "no tasks"))
  return Drawn(tasks, skipped)


def train(source, seed: int, step: int, wanted: int, max_pixels: int) -> Drawn:
  """The prompts of one training step: a pure function of (source, seed, step).

  Args:
    source: has `len` and `task(index)`.
    seed: of the order.
    step: which.
    wanted: how many prompts.
    max_pixels: see `images.decode`.

  Raises:
    ValueError: if the source is empty, or a whole epoch of it does not decode.
  """
  n = len(source)
  if not n:
    raise ValueError("the training source must not be empty")
  due = order.batch_indices(seed, step, n, wanted)
  # Stand-ins for pictures that don't decode: the rest of the set, from the far side, in a fixed order.
  spare = ((int(due[-1]) + n // 2 + i) % n for i in range(n))
  drawn = _good(source, itertools.chain(due, spare), wanted, max_pixels, "the training source")
  # Fewer good tasks than prompts: they come round again, so that the batch keeps its shape.
  tasks = list(itertools.islice(itertools.cycle(drawn.tasks), wanted))
  return Drawn(tasks, drawn.skipped)


def held_out(source, wanted: int, max_pixels: int) -> Drawn:
  """The first tasks of a held-out split that decode, `wanted` of them or as many as there are."""
  return _good(source, range(len(source)), wanted, max_pixels, "the evaluation source")
