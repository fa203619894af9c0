"""Our sources as Grain's random-access data sources, for pipelines of your own.

    import grain
    source = sources.load(config, "train")
    grain.MapDataset.source(grain_source.Tasks(source)).shuffle(0).map(...)          # tasks, in Grain's order
    grain.MapDataset.source(grain_source.Steps(source, config.seed, prompts, steps))  # batches, in our order

Training does not need it: see `batches`.  Grain is not imported here: it needs only `__len__` and `__getitem__`.
"""

from __future__ import annotations

import dataclasses

from virl_jax import types
from virl_jax.data import batches
from virl_jax.data import images


class Tasks:
  """Each task of a source, its picture decoded.

  Args:
    source: has `len` and `task(index)`.
    max_pixels: see `images.decode`.
  """

  def __init__(self, source, max_pixels: int = images.Config.decode_max_pixels):
    self._source, self._max_pixels = source, max_pixels

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> types.Task:
    """The task with that number.

    Raises:
      ValueError: its picture can't be decoded; the error names the task.
    """
    task = self._source.task(int(index))
    try:
      return dataclasses.replace(task, image=images.decode(task.image, self._max_pixels))
    except ValueError as e:
      raise ValueError(f"{task.uid}: {e}") from e


class Steps:
  """The prompts of each step as training takes them, this process's pictures decoded, and broken tasks replaced.

  Args:
    source, seed, wanted, max_pixels: see `batches.train`.
    steps: how many there are.
  """

  def __init__(self, source, seed: int, wanted: int, steps: int, max_pixels: int = images.Config.decode_max_pixels):
    self._how, self._steps = (source, seed, wanted, max_pixels), steps

  def __len__(self) -> int:
    return self._steps

  def __getitem__(self, step: int) -> list[types.Task]:
    """The prompts of a step; several processes must all ask for the same steps in the same order, one at a time."""
    source, seed, wanted, max_pixels = self._how
    return batches.train(source, seed, int(step), wanted, max_pixels).tasks
