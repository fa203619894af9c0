"""Tasks of a step, with their pictures decoded; what can't be used is counted, and others stand in for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import concurrent.futures
import dataclasses
import itertools

import numpy as np

from virl_jax import types
from virl_jax.data import images
from virl_jax.data import order
from virl_jax.run import hosts


@dataclasses.dataclass(frozen=True)
class Drawn:
  """What was drawn.

  Attributes:
    tasks: as many as were wanted, pictures decoded; of other processes' tasks (see `hosts`) the picture is None.
    skipped: why each task that this process looked at was passed over.
    passed_over: how many were, over all processes.
  """

  tasks: list[types.Task]
  skipped: list[str]
  passed_over: int


# Whether a task, its picture decoded, can be asked: raises ValueError if not.  See `turns.check`.
Fits = Callable[[types.Task], None]


def _look(source, index: int, max_pixels: int, fits: Fits) -> types.Task | str:
  """A task with its picture decoded, or why it can't be used."""
  task = source.task(int(index))
  try:
    task = dataclasses.replace(task, image=images.decode(task.image, max_pixels))
    fits(task)
    return task
  except ValueError as e:
    return f"{task.uid}: {e}"


def _good(source, indices: Iterator[int], wanted: int, look: Callable[[int], types.Task | str], what: str,
          again: bool, seen: dict[int, types.Task | str] | None = None) -> Drawn:
  """Tasks of the first `wanted` of `indices`; further ones stand in for those that can't be used.

  Each process looks at its own pictures, and they agree on which can't be used.

  Args:
    source: has `task(index)`.
    indices: which, in order, and then what may stand in.
    wanted: how many.
    look: see `_look`.
    what: the source is, for the error.
    again: where too few can be used, whether they come round again.
    seen: what was looked at before, by place.
  """
  which: dict[int, int] = dict(enumerate(itertools.islice(indices, wanted)))  # by place
  found, skipped, passed_over, due = dict(seen or {}), [], 0, list(which)
  while due:
    found |= {place: look(which[place]) for place in due if hosts.mine(place) and place not in found}
    bad = hosts.agree([isinstance(found.get(place), str) for place in due])
    due = [place for place, is_bad in zip(due, bad) if is_bad]
    skipped += [found.pop(place) for place in due if place in found]
    passed_over += len(due)
    for place in due:
      which[place] = next(indices, None)
    which = {place: index for place, index in which.items() if index is not None}
    due = [place for place in due if place in which]
  if not which:
    raise ValueError(f"{what} must have tasks that can be used. Received: "
                     + (f"{passed_over} that can't, first {skipped[0] if skipped else 'on another process'}"
                        if passed_over else "no tasks"))
  tasks, places = [], [*which]
  for number in range(wanted if again else len(places)):
    place = places[number % len(places)]
    if not hosts.mine(number):
      tasks.append(dataclasses.replace(source.task(int(which[place])), image=None))
    else:
      tasks.append(found[place] if place in found else look(which[place]))
  return Drawn(tasks, skipped, passed_over)


def train(source, seed: int, step: int, wanted: int, max_pixels: int, fits: Fits = lambda task: None, attempt: int = 0,
          seen: dict[int, types.Task | str] | None = None) -> Drawn:
  """The prompts of one training step, or of a further try of it: a pure function of (source, seed, step, attempt).

  Args:
    source: has `len` and `task(index)`.
    seed: of the order.
    step: which.
    wanted: how many prompts.
    max_pixels: see `images.decode`.
    fits: see `Fits`.
    attempt: see `order.batch_indices`.
    seen: what `ahead` gave for the same, if it was asked.

  Raises:
    ValueError: if the source is empty, or a whole epoch of it can't be used.
  """
  n = len(source)
  if not n:
    raise ValueError("the training source must not be empty")
  due = order.batch_indices(seed, step, n, wanted, attempt)
  # Stand-ins for tasks that can't be used: the rest of the set, from the far side, in a fixed order.
  spare = ((int(due[-1]) + n // 2 + i) % n for i in range(n))
  # Where fewer can be used than are wanted they come round again, so that the batch keeps its shape.
  return _good(source, itertools.chain(due, spare), wanted, lambda index: _look(source, index, max_pixels, fits),
               "the training source", True, seen)


def ahead(source, seed: int, step: int, wanted: int, max_pixels: int, fits: Fits = lambda task: None
          ) -> dict[int, types.Task | str]:
  """This process's own pictures of a step, decoded before it is their turn; arguments as `train` takes them."""
  due = order.batch_indices(seed, step, len(source), wanted)
  return {place: _look(source, index, max_pixels, fits) for place, index in enumerate(due) if hosts.mine(place)}


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
  # In the source's order, as it would be if all were wanted, but for stand-ins.
  indices = itertools.chain(np.sort(drawn[:wanted]), drawn[wanted:])
  return _good(source, indices, wanted, lambda index: _look(source, index, max_pixels, fits), "the evaluation source",
               False)


class Feed:
  """The prompts of each training step; those of the next are decoded while one trains.

  Args:
    source, seed, wanted, max_pixels, fits: see `train`.

  Attributes:
    skipped: how many tasks have been passed over so far.
  """

  def __init__(self, source, seed: int, wanted: int, max_pixels: int, fits: Fits = lambda task: None):
    self._source, self._seed, self._how = source, seed, (wanted, max_pixels, fits)
    self._pool = concurrent.futures.ThreadPoolExecutor(1)
    self._ahead: dict[int, concurrent.futures.Future] = {}
    self.skipped = 0

  def batch(self, step: int) -> list[types.Task]:
    """The step's own prompts: a pure function of (source, seed, step)."""
    looking = self._ahead.pop(step, None)
    seen = looking.result() if looking else None
    self._ahead = {step + 1: self._pool.submit(ahead, self._source, self._seed, step + 1, *self._how)}
    return self._take(train(self._source, self._seed, step, *self._how, seen=seen))

  def further(self, step: int, attempt: int) -> list[types.Task]:
    """Prompts for a further try of a step: each try walks through the data in an order of its own."""
    return self._take(train(self._source, self._seed, step, *self._how, attempt=attempt))

  def _take(self, drawn: Drawn) -> list[types.Task]:
    report(drawn)
    self.skipped += drawn.passed_over
    return drawn.tasks

  def close(self) -> None:
    """Nothing more is wanted."""
    self._pool.shutdown(cancel_futures=True)


def report(drawn: Drawn) -> None:
  """Says which tasks were passed over and why."""
  for why in drawn.skipped:
    print(f"skipped {why}", flush=True)
