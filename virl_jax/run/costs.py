"""What programs cost, counted by hand: the compiler counts what is in a loop once."""

from __future__ import annotations

import dataclasses
import math

from virl_jax.model import family
from virl_jax.model import tuning
from virl_jax.run import topologies


@dataclasses.dataclass(frozen=True)
class Work:
  """What a program does on all devices together.

  Attributes:
    tokens: that go through the decoder.
    context: that each of them sees, on average.
    head_tokens: that logits are computed for.
    patches: that go through the vision tower, padding too.
    of_image: patches of an image, which its full layers see; the others see a window, or all of it if that is less.
    passes: forward passes' worth of it: 1, or 3 with gradients, or 4 with those and recomputation.
    vision_passes: the same of the vision tower.
    bytes_device: that a device reads of its own memory: weights and cache.
  """

  tokens: float
  context: float = 0.0
  head_tokens: float = 0.0
  patches: float = 0.0
  of_image: float = 0.0
  passes: float = 1.0
  vision_passes: float = 1.0
  bytes_device: float = 0.0


def flops(model: family.Config, work: Work) -> float:
  """Floating-point operations of matrix products, a multiplication and an addition each.

  Args:
    model: shapes.
    work: how much of it.

  Source: counted by hand from `qwen2_5.text` and `qwen2_5.vision`; checked against the compiler's count of a model of
  one layer (tests/run/test_costs.py).
  """
  t, v = model.text, model.vision
  layer = t.hidden * t.head_size * (2 * t.heads + 2 * t.kv_heads) + 3 * t.hidden * t.intermediate
  seen = 2 * t.heads * t.head_size * work.context
  text = 2 * t.layers * (layer + seen) * work.tokens + 2 * t.hidden * t.vocab * work.head_tokens
  block = 4 * v.hidden ** 2 + 3 * v.hidden * v.intermediate
  window = min((v.grid.window * v.merge) ** 2, work.of_image)
  full = len(v.full_blocks)
  attention = 2 * v.hidden * (full * work.of_image + (v.depth - full) * window)
  wide = v.hidden * v.merge ** 2
  merger = (wide * wide + wide * v.out) / v.merge ** 2
  vision = 2 * (v.grid.values * v.hidden + v.depth * block + attention + merger) * work.patches
  return text * work.passes + vision * work.vision_passes


def update_passes(tuned: tuning.Config) -> tuple[float, float]:
  """Forward passes' worth of products that an update makes of a token, and of a patch, with nothing computed twice.

  Forward it is one.  Backward, it is one for what came in, and one for weights that are trained; adapters' own products
  count for nothing, and a tower that is frozen has no backward pass.

  Args:
    tuned: which parameters are trained.
  """
  text = 3.0 - (tuned.rank > 0)
  return text, 1.0 if tuned.freeze_vision else text


def seconds(chip: topologies.Chip, count: int, operations: float, bytes_device: float, received: float) -> float:
  """The least time that a program can take: products, its own memory, or what comes over the links, whichever is
  slowest.

  Args:
    chip: of each device.
    count: devices.
    operations: of all of them.
    bytes_device: that each reads of its own memory.
    received: bytes that each gets from others.

  Returns:
    Seconds; NaN for chips whose speeds are not known.
  """
  parts = operations / count / chip.flops, bytes_device / chip.bandwidth, received / chip.link
  return math.nan if any(map(math.isnan, parts)) else max(parts)
