"""What the rollout's cache costs, before it is allocated.

The layout is dense: [L, B, K, S, H], B decode slots of S tokens each.  Memory follows the slots, not the
trajectories, which queue for them; a group's prompt is prefilled once and copied inside the cache; attention
reads filled blocks only, so that the unfilled part of a row costs memory but no time.  docs/rollout.md argues
this against pages.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from virl_jax.model import sharding
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.model.qwen2_5 import text
from virl_jax.rollout import pack

_SPARE = 0.9  # of a device's memory; what is left is for activations


@dataclasses.dataclass(frozen=True)
class Plan:
  """Bytes and rows.

  Attributes:
    bytes_token: keys and values of a token, all layers, on all devices that share a row.
    tokens_row: S.
    slots: B, rows on all devices.
    trajectories: that take turns in them.
    devices_rows: over how many devices rows are split.
    devices_heads: over how many devices the heads of a row are split.
    free_bytes: of a device, now; None where the backend does not say.
  """

  bytes_token: int
  tokens_row: int
  slots: int
  trajectories: int
  devices_rows: int
  devices_heads: int
  free_bytes: int | None = None

  @property
  def bytes_row(self) -> int:
    """Of one row, on one device."""
    return self.bytes_token * self.tokens_row // self.devices_heads

  @property
  def bytes_device(self) -> int:
    """Of all rows that a device holds."""
    return self.slots // self.devices_rows * self.bytes_row

  @property
  def slots_that_fit(self) -> int | None:
    """On all devices; None where the backend does not say how much memory it has."""
    if self.free_bytes is None:
      return None
    return max(0, int(_SPARE * self.free_bytes) // self.bytes_row) * self.devices_rows

  def __str__(self):
    gib = lambda n: f"{n / 2 ** 30:.2f} GiB" if n >= 2 ** 28 else f"{n / 2 ** 20:.2f} MiB"
    line = (f"cache: {self.slots} slots for {self.trajectories} trajectories, {self.tokens_row:,} tokens each at "
            f"{self.bytes_token:,} bytes: {gib(self.bytes_row)} a row, {gib(self.bytes_device)} a device")
    fit = self.slots_that_fit
    if fit is None:
      return line
    line += f"; {fit} slots fit"
    if fit < self.slots:
      line += f". That is too few: set config.rollout.slots={max(fit, self.devices_rows)} or lower max_total_tokens"
    return line


def cache(model: qwen.Config, max_total_tokens: int, slots: int, trajectories: int, mesh: jax.sharding.Mesh,
          free_bytes: int | None = None) -> Plan:
  """The plan of a rollout.

  Args:
    model: for layers, heads and dtype.
    max_total_tokens: of a trajectory.
    slots: wanted on all devices; 0 for as many as trajectories.
    trajectories: of a step.
    mesh: where rows and heads go.
    free_bytes: see `Plan`.
  """
  t, shards = model.text, sharding.row_shards(mesh)
  tokens = pack.up(max_total_tokens, text.CACHE_BLOCK)
  heads = mesh.shape["tensor"] if t.kv_heads % mesh.shape["tensor"] == 0 else 1
  return Plan(2 * t.layers * t.kv_heads * t.head_size * jnp.dtype(model.compute_dtype).itemsize, tokens,
              pack.up(slots or trajectories, shards), trajectories, shards, heads, free_bytes)


def free_bytes() -> int | None:
  """Memory that the fullest device of this process has left, or None where it does not say."""
  found = [d.memory_stats() for d in jax.local_devices()]
  if not all(found) or not all("bytes_limit" in f for f in found):
    return None
  return min(f["bytes_limit"] - f["bytes_in_use"] for f in found)
