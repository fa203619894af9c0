"""Tasks of a step, with their pictures decoded; those that can't be used are counted and replaced by others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import contextlib
import dataclasses

import numpy as np

from virl_jax import types
from virl_jax.data import images
from virl_jax.data import order
from virl_jax.run import hosts
from virl_jax.run import progress

_SLOW_S = 10.0  # a picture that is waited for so long is named


@dataclasses.dataclass(frozen=True)
class Drawn:
  """What was drawn.

  Attributes:
    tasks: as many as were wanted (`held_out`: or fewer), pictures decoded; those of other processes (see `hosts`) have
      None for a picture.
    skipped: why each task that this process looked at was passed over.
    passed_over: how many tasks were passed over, on all processes.
    slow: how many pictures this process waited for longer than a picture should take.
  """

  tasks: list[types.Task]
  skipped: list[str]
  passed_over: int
  slow: int = 0


# Whether a task, its picture decoded, can be asked: raises ValueError if not.  See `turns.check`.
Fits = Callable[[types.Task], None]


@dataclasses.dataclass
class _Begun:
  """A picture that is being decoded: the task's number, its name as soon as it is known, and its result."""

  index: int
  name: str
  future: concurrent.futures.Future | None = None


class Looks:
  """Pictures of a source being decoded, in threads, so that a slow one does not delay the others.

  Args:
    source: has `task(index)`.
    max_pixels: see `images.decode`.
    fits: see `Fits`.
    threads: how many.

  Attributes:
    slow: how many pictures have been waited for longer than a picture should take.
  """

  def __init__(self, source, max_pixels: int, fits: Fits = lambda task: None, threads: int = 1):
    self._source, self._max_pixels, self._fits = source, max_pixels, fits
    self._pool = concurrent.futures.ThreadPoolExecutor(threads)
    self.slow = 0

  def begin(self, which: Mapping[int, int]) -> dict[int, _Begun]:
    """Starts to decode tasks, given as index by place, in that order; returns them by place, for `take`."""
    found = {place: _Begun(index, f"task {index} of the source") for place, index in which.items()}
    for one in found.values():
      one.future = self._pool.submit(self._look, one)
    return found

  def take(self, begun: Mapping[int, _Begun]) -> dict[int, types.Task | str]:
    """Waits for what `begin` returned, here or of another `Looks`: by place, each task or why it can't be used."""
    return {place: self._wait(one) for place, one in begun.items()}

  def _look(self, one: _Begun) -> types.Task | str:
    task = self._source.task(one.index)
    one.name = task.uid
    try:
      task = dataclasses.replace(task, image=images.decode(task.image, self._max_pixels))
      self._fits(task)
      return task
    except ValueError as e:
      return f"{task.uid}: {e}"

  def _wait(self, one: _Begun) -> types.Task | str:
    try:
      return one.future.result(_SLOW_S)
    except TimeoutError:
      if one.future.done():  # the TimeoutError is the picture's own
        raise
      self.slow += 1
      print(f"waiting for a picture, for {_SLOW_S:g} s so far: that of {one.name}", flush=True)
      return one.future.result()

  def close(self) -> None:
    """Stops the threads."""
    self._pool.shutdown(cancel_futures=True)


def _good(source, due: Sequence[int], instead: Callable[[int], Iterator[int]], looks: Looks, what: str, again: bool,
          begun: Mapping[int, _Begun] | None = None) -> Drawn:
  """The tasks `due`; others stand in for those that can't be used.

  Each process looks at its own pictures, and they agree on which can't be used.

  Args:
    source: has `task(index)`.
    due: the tasks' numbers.
    instead: gives, for one of these, the numbers of tasks that may stand in for it.
    looks: decodes their pictures.
    what: names the source in the error.
    again: whether tasks are repeated where too few can be used.
    begun: those of `due` that are being decoded already, by place.
  """
  which = {place: int(index) for place, index in enumerate(due)}
  begun, found, skipped, passed_over, slow, waiting = dict(begun or {}), {}, [], 0, looks.slow, list(which)
  while waiting:
    mine = {place: which[place] for place in waiting if hosts.mine(place)}
    begun |= looks.begin({place: index for place, index in mine.items() if place not in begun})
    found |= looks.take(begun)
    begun = {}
    bad = hosts.agree([isinstance(found.get(place), str) for place in waiting])
    waiting = [place for place, is_bad in zip(waiting, bad) if is_bad]
    skipped += [found.pop(place) for place in waiting if place in found]
    passed_over += len(waiting)
    for place in waiting:
      which[place] = next(instead(int(due[place])), None)
    which = {place: index for place, index in which.items() if index is not None}
    waiting = [place for place in waiting if place in which]
  if not which:
    raise ValueError(f"{what} must have tasks that can be used. Received: "
                     + (f"{passed_over} that can't, first {skipped[0] if skipped else 'on another process'}"
                        if passed_over else "no tasks"))
  tasks, places = [], [*which]
  for number in range(len(due) if again else len(places)):
    place = places[number % len(places)]
    if not hosts.mine(number):
      tasks.append(dataclasses.replace(source.task(which[place]), image=None))
    elif place in found:
      tasks.append(found[place])
    else:  # so far only another process has decoded it
      tasks += looks.take(looks.begin({place: which[place]})).values()
  return Drawn(tasks, skipped, passed_over, looks.slow - slow)


def _due(source, seed: int, step: int, wanted: int, attempt: int = 0) -> np.ndarray:
  """Which tasks a step takes: by the source's plan, if it has one."""
  if not len(source):
    raise ValueError("the training source must not be empty")
  plan = getattr(source, "plan", None)
  if plan is None:
    return order.batch_indices(seed, step, len(source), wanted, attempt)
  return plan.due(seed, step, wanted, attempt)


def train(source, seed: int, step: int, wanted: int, max_pixels: int, fits: Fits = lambda task: None, attempt: int = 0,
          threads: int = 1) -> Drawn:
  """The prompts of one training step, or of a further try of it: a pure function of (source, seed, step, attempt).

  Args:
    source: has `len` and `task(index)`, and may have a `plan`, a `mixture.Plan`.
    seed: of the order.
    step: its number, from 0.
    wanted: how many prompts.
    max_pixels: see `images.decode`.
    fits: see `Fits`.
    attempt: see `order.batch_indices`.
    threads: how many decode pictures.

  Raises:
    ValueError: if the source is empty, or a whole epoch of it can't be used.
  """
  with contextlib.closing(Looks(source, max_pixels, fits, threads)) as looks:
    return _train(source, seed, step, wanted, attempt, looks)


def _train(source, seed, step, wanted, attempt, looks, begun=None) -> Drawn:
  n, due = len(source), _due(source, seed, step, wanted, attempt)
  plan = getattr(source, "plan", None)
  if plan is None:
    # Stand-ins for tasks that can't be used: the rest of the set, from the far side, in a fixed order.
    spare = ((int(due[-1]) + n // 2 + i) % n for i in range(n))
    instead = lambda index: spare
  else:
    instead = plan.stand_ins()
  # Where fewer can be used than are wanted, they are repeated, so that the batch keeps its shape.
  return _good(source, due, instead, looks, "the training source", True, begun)


def held_out(source, wanted: int, max_pixels: int, seed: int = 0, fits: Fits = lambda task: None, threads: int = 1
             ) -> Drawn:
  """Tasks of a held-out split that can be used, drawn from all of it: files are often sorted by where records are from.

  Args:
    source: has `len` and `task(index)`.
    wanted: how many; all if there are no more.
    max_pixels: see `images.decode`.
    seed: of the draw.
    fits: see `Fits`.
    threads: how many decode pictures.

  Raises:
    ValueError: none can be used.
  """
  drawn = np.random.default_rng(seed).permutation(len(source))
  rest = map(int, drawn[wanted:])
  with contextlib.closing(Looks(source, max_pixels, fits, threads)) as looks:
    # In the source's order, as if all were wanted, except for stand-ins.
    return _good(source, np.sort(drawn[:wanted]), lambda index: rest, looks, "the evaluation source", False)


class Feed:
  """The prompts of each training step; those of the next step are decoded while one trains.

  Args:
    source, seed, wanted, max_pixels, fits, threads: see `train`.

  Attributes:
    skipped: how many tasks have been passed over so far.
    slow: how many pictures this process had to wait for so far, see `Drawn`.
  """

  def __init__(self, source, seed: int, wanted: int, max_pixels: int, fits: Fits = lambda task: None,
               threads: int = 1):
    self._source, self._seed, self._wanted = source, seed, wanted
    # Two, so that what a step needs now does not queue behind the whole of the next step.
    self._now, self._next = (Looks(source, max_pixels, fits, threads) for _ in range(2))
    self._ahead: dict[int, dict[int, _Begun]] = {}
    self.skipped = self.slow = 0

  def batch(self, step: int) -> list[types.Task]:
    """The step's own prompts: a pure function of (source, seed, step)."""
    begun = self._ahead.pop(step, None)
    for other in self._ahead.values():
      for one in other.values():
        one.future.cancel()
    begun = begun or self._begin(step, self._now)
    self._ahead = {step + 1: self._begin(step + 1, self._next)}
    return self._take(_train(self._source, self._seed, step, self._wanted, 0, self._now, begun))

  def further(self, step: int, attempt: int) -> list[types.Task]:
    """Prompts for a further try of a step: each try walks through the data in its own order."""
    return self._take(_train(self._source, self._seed, step, self._wanted, attempt, self._now))

  def _begin(self, step: int, looks: Looks) -> dict[int, _Begun]:
    """This process's own pictures of a step, being decoded."""
    due = _due(self._source, self._seed, step, self._wanted)
    return looks.begin({place: int(index) for place, index in enumerate(due) if hosts.mine(place)})

  def _take(self, drawn: Drawn) -> list[types.Task]:
    report(drawn)
    self.skipped += drawn.passed_over
    self.slow += drawn.slow
    return drawn.tasks

  def close(self) -> None:
    """Stops the threads."""
    self._now.close()
    self._next.close()


def report(drawn: Drawn) -> None:
  """Says which tasks were passed over and why."""
  for why in drawn.skipped:
    progress.say(f"skipped {why}")
