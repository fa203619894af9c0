"""Memory: how much a rollout's cache takes, and whether the C library returns freed memory to the system."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import sys

import jax

from virl_jax import shapes
from virl_jax.model import cache as cache_lib
from virl_jax.model import family
from virl_jax.model import sharding

_SPARE = 0.9  # of a device's memory; what is left is for activations
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # malloc.h of the GNU C library


def keep_when_on_cpu() -> bool:
  """On a CPU, makes freed memory stay with the process.  Call it before anything computes.

  This saves a third of a step's time there: XLA allocates the temporary memory of a program at each run, and malloc by
  default gets gigabytes from the kernel each time, page by page, and returns them.  Nothing changes where an
  accelerator may compute, or without the GNU C library.

  Returns:
    Whether anything was changed.

  Source: mallopt(3).
  """
  platforms = os.environ.get("JAX_PLATFORMS", "")
  accelerated = bool(importlib.metadata.entry_points(group="jax_plugins")) or importlib.util.find_spec("libtpu")
  if not platforms.startswith("cpu") and (platforms or accelerated):
    return False
  if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "gnu_get_libc_version"):
    return False
  # One arena, because only the first can grow in place; and no allocations by mmap, which are always returned.
  return all([library.mallopt(_ARENA_MAX, 1), library.mallopt(_MMAP_MAX, 0), library.mallopt(_TRIM_THRESHOLD, -1)])


@dataclasses.dataclass(frozen=True)
class CacheSize:
  """Bytes and rows of a rollout's cache, before it is allocated.

  The layout is dense: [L, B, K, S, H], B decode slots of S tokens each.  Memory depends on the slots, not on the
  trajectories, which queue for them; a group's prompt is prefilled once and copied inside the cache; attention
  reads filled blocks only, so that the unfilled part of a row costs memory but no time.  docs/rollout.md says why
  this and not pages.

  Attributes:
    bytes_token: keys and values of a token, all layers, on all devices that share a row.
    tokens_row: S.
    slots: B, rows on all devices.
    trajectories: how many use the slots, one after the other.
    devices_rows: over how many devices rows are split.
    devices_heads: over how many devices the heads of a row are split.
    free_bytes: free memory of a device now; None where the backend does not say.
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
    """Bytes of one row, on one device."""
    return self.bytes_token * self.tokens_row // self.devices_heads

  @property
  def bytes_device(self) -> int:
    """Bytes of all rows that a device holds."""
    return self.slots // self.devices_rows * self.bytes_row

  @property
  def slots_that_fit(self) -> int | None:
    """How many slots fit on all devices; None where the backend does not say how much memory it has."""
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
      line += f". That is too few: set config.engine.slots={max(fit, self.devices_rows)} or lower max_total_tokens"
    return line


def cache_size(model: family.Config, max_total_tokens: int, slots: int, trajectories: int, mesh: jax.sharding.Mesh,
               free_bytes: int | None = None) -> CacheSize:
  """What a rollout's cache takes.

  Args:
    model: for layers, heads and dtype.
    max_total_tokens: of a trajectory.
    slots: wanted on all devices; 0 for as many as trajectories.
    trajectories: of a step.
    mesh: the devices that rows and heads are split over.
    free_bytes: see `CacheSize`.
  """
  shards, tokens = sharding.row_shards(mesh), shapes.up(max_total_tokens, cache_lib.BLOCK)
  row = jax.eval_shape(lambda: family.of(model).new_cache(model, 1, tokens))
  kv_heads, stacks = row.k_LBKSH.shape[2], (row.k_LBKSH, row.v_LBKSH)
  bytes_token = sum(a.size * a.dtype.itemsize for a in stacks) // tokens
  heads = mesh.shape["tensor"] if kv_heads % mesh.shape["tensor"] == 0 else 1
  return CacheSize(bytes_token, tokens, shapes.up(slots or trajectories, shards), trajectories, shards, heads,
                   free_bytes)


def device_gib(tree) -> float:
  """GiB that arrays take of the device that holds most of them."""
  each: dict = {}
  for leaf in jax.tree.leaves(tree):
    for device in leaf.sharding.device_set:
      size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      each[device] = each.get(device, 0) + size
  return max(each.values(), default=0) / 2 ** 30


def limit_gib(devices) -> float | None:
  """GiB that the smallest of some devices has for programs, or None where one does not say."""
  found = _stats(devices)
  return found and min(f["bytes_limit"] for f in found) / 2 ** 30


def free_bytes() -> int | None:
  """Bytes that the fullest device of this process has left, or None where one does not say."""
  found = _stats(jax.local_devices())
  return found and min(f["bytes_limit"] - f["bytes_in_use"] for f in found)


def peak_gib(devices) -> float | None:
  """The most GiB that one of some devices has held since this process began, or None where one does not say."""
  found = _stats(devices)
  if not found or not all("peak_bytes_in_use" in f for f in found):
    return None
  return max(f["peak_bytes_in_use"] for f in found) / 2 ** 30


def _stats(devices) -> list[dict] | None:
  """What each of some devices says of its memory; None if one says nothing."""
  found = [d.memory_stats() for d in devices]
  return found if all(f and "bytes_limit" in f for f in found) else None
