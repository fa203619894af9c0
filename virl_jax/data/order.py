"""The order in which training walks through its tasks, as a pure function of (seed, step, try)."""

from __future__ import annotations

import numpy as np

_WORD = 2 ** 32  # a seed sequence splits larger numbers, so that (2^32, 0) would be (0, 1)


def batch_indices(seed: int, step: int, n_items: int, batch: int, attempt: int = 0) -> np.ndarray:
  """Which items step number `step` takes.

  Every epoch is a fresh permutation of all items, walked in order; a batch that reaches the end of
  one goes on in the next.  So each item is seen once an epoch, and a resumed run needs no state.

  Args:
    seed: of the run, 0 to 2^32 - 1.
    step: 0 or more.
    n_items: how many items there are, 1 or more.
    batch: how many are taken a step, 1 or more; may exceed n_items.
    attempt: 0 for the step's own items; each further try of a step walks through all items in its own order.

  Returns:
    int64[batch], each in [0, n_items).

  Raises:
    ValueError: an argument is out of range.

  Source: ours.
  """
  check(seed, step, n_items, batch, attempt)
  return walk(seed, step * batch, (step + 1) * batch, n_items, attempt)


def walk(seed: int, first: int, last: int, n_items: int, attempt: int = 0, stream: int = 0) -> np.ndarray:
  """Which items are taken from place `first` up to but not including `last`, counted from the start of training.

  Args:
    seed, n_items, attempt: see `batch_indices`.
    first, last: 0 or more.
    stream: which of several walks of the same seed; each has its own order.

  Returns:
    int64[last - first], each in [0, n_items); empty if `last` is not above `first`.
  """
  pieces = [np.zeros(0, np.int64)]
  for epoch in range(first // n_items, (last - 1) // n_items + 1):
    start = epoch * n_items
    pieces.append(generator(seed, epoch, attempt, stream).permutation(n_items)[max(first - start, 0):last - start])
  return np.concatenate(pieces).astype(np.int64)


def generator(seed: int, number: int, attempt: int, stream: int) -> np.random.Generator:
  """The random numbers of an epoch or a step; each argument is below 2^32."""
  return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number, attempt, stream])))


def check(seed: int, step: int, n_items: int, batch: int, attempt: int) -> None:
  """Raises ValueError unless all are in the range that `batch_indices` says."""
  arguments = (("seed", seed, 0), ("step", step, 0), ("n_items", n_items, 1), ("batch", batch, 1),
               ("attempt", attempt, 0))
  for name, value, least in arguments:
    if value < least:
      raise ValueError(f"{name} must be at least {least}. Received: {value}")
  if seed >= _WORD:
    raise ValueError(f"seed must be below 2^32. Received: {seed}")
