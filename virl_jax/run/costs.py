"""What programs cost, counted by hand, because the compiler counts the body of a loop once."""

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
    tokens: tokens that go through the decoder.
    context: tokens that each of them sees, on average.
    head_tokens: tokens that logits are computed for.
    patches: patches that go through the vision tower, padding included.
    of_image: patches of an image, which blocks with full attention see; the others see a window, or the image if that
      is smaller.
    passes: the cost in forward passes: 1, or 3 with gradients, or 4 with gradients and recomputation.
    vision_passes: `passes` of the vision tower.
    bytes_device: bytes that a device reads of its own memory: weights and cache.
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
  """Matrix products of an update for a token, and for a patch, in forward passes, with nothing computed twice.

  One is the forward pass.  Backward, one is for the gradients of inputs, and one for those of trained weights.
  Adapters' own products are not counted, and a frozen vision tower has no backward pass.

  Args:
    tuned: which parameters are trained.
  """
  text = 3.0 - (tuned.rank > 0)
  return text, 1.0 if tuned.freeze_vision else text


def seconds(chip: topologies.Chip, count: int, operations: float, bytes_device: float, received: float) -> float:
  """The least time that a program can take: the slowest of its products, its memory and its links.

  Args:
    chip: of each device.
    count: devices.
    operations: floating-point operations of all devices together.
    bytes_device: bytes that each device reads of its own memory.
    received: bytes that each device receives from others.

  Returns:
    Seconds; NaN for chips whose speeds are not known.
  """
  parts = operations / count / chip.flops, bytes_device / chip.bandwidth, received / chip.link
  return math.nan if any(map(math.isnan, parts)) else max(parts)
