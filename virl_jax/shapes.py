"""Bucket arithmetic: the few sizes that arrays are padded to, so that few programs are compiled.

Images have a rule of their own, `model.patches.bucket`.
"""

from __future__ import annotations

import math


def up(n: int, multiple: int) -> int:
  """The least multiple that is at least n and above 0."""
  return max(1, -(-n // multiple)) * multiple


def least(n: int, sizes: tuple[int, ...]) -> int:
  """The least of the sizes that is at least n; the largest if none is."""
  return min((s for s in sizes if s >= n), default=max(sizes))


def row_sizes(largest: int, ratio: float) -> tuple[int, ...]:
  """Buckets of rows: `largest`, divided by the ratio until a sixteenth is left or, if the ratio is below 4, one row."""
  low = largest / 16 if ratio >= 4 else 1
  sizes, n = {largest, math.ceil(low)}, float(largest)
  while n / ratio >= low:
    n /= ratio
    sizes.add(math.ceil(n))
  return tuple(sorted(sizes))


def counts(largest: int) -> tuple[int, ...]:
  """Buckets of a count: every number up to 8, then each octave in four steps, and `largest` itself."""
  sizes = {*range(1, 9), *((1 << octave) * (4 + i) // 4 for octave in range(3, 24) for i in range(4))}
  return tuple(sorted({n for n in sizes if n < largest} | {largest}))


def token_sizes(steps: int) -> tuple[int, ...]:
  """Buckets of a tool turn's tokens, from 16 up: powers of two, each octave in `steps` steps."""
  return tuple((1 << octave) * (steps + i) // steps for octave in range(4, 24) for i in range(steps))
