"""Tasks of a step, with their pictures decoded; what can't be used is counted and passed over."""

from __future__ import annotations

from collections.abc import Callable
import concurrent.futures
import dataclasses
import itertools

import numpy as np

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


# Whether a task, its picture decoded, can be asked: raises ValueError if not.  See `turns.check`.
Fits = Callable[[types.Task], None]


def _good(source, indices, wanted: int, max_pixels: int, what: str, fits: Fits) -> Drawn:
  """The first `wanted` tasks of `indices` that can be used, or all that can."""
  tasks, skipped = [], []
  for index in indices:
    if len(tasks) == wanted:
      break
    task = source.task(int(index))
    try:
      task = dataclasses.replace(task, image=images.decode(task.image, max_pixels))
      fits(task)
      tasks.append(task)
    except ValueError as e:
      skipped.append(f"{task.uid}: {e}")
  if not tasks:
    raise ValueError(f"{what} must have tasks that can be used. Received: "
                     + (f"{len(skipped)} that can't, first {skipped[0]}" if skipped else "no tasks"))
  return Drawn(tasks, skipped)


def train(source, seed: int, step: int, wanted: int, max_pixels: int, fits: Fits = lambda task: None, attempt: int = 0
          ) -> Drawn:
  """The prompts of one training step, or of a further try of it: a pure function of (source, seed, step, attempt).

  Args:
    source: has `len` and `task(index)`.
    seed: of the order.
    step: which.
    wanted: how many prompts.
    max_pixels: see `images.decode`.
    fits: see `Fits`.
    attempt: see `order.batch_indices`.

  Raises:
    ValueError: if the source is empty, or a whole epoch of it can't be used.
  """
  n = len(source)
  if not n:
    raise ValueError("the training source must not be empty")
  due = order.batch_indices(seed, step, n, wanted, attempt)
  # Stand-ins for tasks that can't be used: the rest of the set, from the far side, in a fixed order.
  spare = ((int(due[-1]) + n // 2 + i) % n for i in range(n))
  drawn = _good(source, itertools.chain(due, spare), wanted, max_pixels, "the training source", fits)
  # Fewer good tasks than prompts: they come round again, so that the batch keeps its shape.
  tasks = list(itertools.islice(itertools.cycle(drawn.tasks), wanted))
  return Drawn(tasks, drawn.skipped)


def held_out(source, wanted: int, max_pixels: int, seed: int = 0, fits: Fits = lambda task: None) -> Drawn:
  """Tasks of a held-out split that can be used, drawn from all of it: files are often sorted by where records are from.

  Args:
    source: has `len` and `task(index)`.
    wanted: how many; all if there are no more.
    max_pixels: see `images.decode`.
    seed: draws them.
    fits: see `Fits`.
  """
  drawn = np.random.default_rng(seed).permutation(len(source))
  # In the source's order, as it would be if all were wanted; stand-ins for what can't be used come after.
  indices = itertools.chain(np.sort(drawn[:wanted]), drawn[wanted:])
  return _good(source, indices, wanted, max_pixels, "the evaluation source", fits)


class Feed:
  """The prompts of each training step; those of the next are decoded while one trains.

  Args:
    source, seed, wanted, max_pixels, fits: see `train`.

  Attributes:
    skipped: how many tasks have been passed over so far.
  """

  def __init__(self, source, seed: int, wanted: int, max_pixels: int, fits: Fits = lambda task: None):
    self._source, self._seed, self._wanted, self._max_pixels, self._fits = source, seed, wanted, max_pixels, fits
    self._pool = concurrent.futures.ThreadPoolExecutor(1)
    self._ahead: dict[int, concurrent.futures.Future] = {}
    self.skipped = 0

  def batch(self, step: int) -> list[types.Task]:
    """The step's own prompts: a pure function of (source, seed, step)."""
    drawn = (self._ahead.pop(step, None) or self._draw(step)).result()
    self._ahead = {step + 1: self._draw(step + 1)}
    self.skipped += report(drawn)
    return drawn.tasks

  def further(self, step: int, attempt: int) -> list[types.Task]:
    """Prompts for a further try of a step: each try walks through the data in an order of its own."""
    drawn = self._draw(step, attempt).result()
    self.skipped += report(drawn)
    return drawn.tasks

  def _draw(self, step: int, attempt: int = 0) -> concurrent.futures.Future:
    return self._pool.submit(train, self._source, self._seed, step, self._wanted, self._max_pixels, self._fits, attempt)

  def close(self) -> None:
    """Nothing more is wanted."""
    self._pool.shutdown(cancel_futures=True)


def report(drawn: Drawn) -> int:
  """Says which tasks were passed over and why; returns how many."""
  for why in drawn.skipped:
    print(f"skipped {why}", flush=True)
  return len(drawn.skipped)
