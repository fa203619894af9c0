"""The order in which training walks through its tasks, as a pure function of (seed, step)."""

from __future__ import annotations

import numpy as np


def batch_indices(seed: int, step: int, n_items: int, batch: int) -> np.ndarray:
  """Which items step number `step` takes.

  Every epoch is a fresh permutation of all items, walked in order; a batch that reaches the end of
  one goes on in the next.  So each item is seen once an epoch, and a resumed run needs no state.

  Args:
    seed: of the run, 0 or more.
    step: 0 or more.
    n_items: how many items there are, 1 or more.
    batch: how many are taken a step, 1 or more; may exceed n_items.

  Returns:
    int64[batch], each in [0, n_items).

  Raises:
    ValueError: an argument is out of range.

  Source: ours.
  """
  arguments = (("seed", seed, 0), ("step", step, 0), ("n_items", n_items, 1), ("batch", batch, 1))
  for name, value, least in arguments:
    if value < least:
      raise ValueError(f"{name} must be at least {least}. Received: {value}")
  first, last = step * batch, (step + 1) * batch  # half-open, counted from the start of training
  pieces = []
  for epoch in range(first // n_items, (last - 1) // n_items + 1):
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    start = epoch * n_items
    pieces.append(rng.permutation(n_items)[max(first - start, 0):last - start])
  return np.concatenate(pieces).astype(np.int64)
