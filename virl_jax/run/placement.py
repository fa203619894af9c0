"""Host arrays onto a mesh that several processes share, and back: each process has rows of its own.

Rows of an array lie on the devices of the process that made them, and XLA moves what has to move.  With one process all
of it is what `jax.device_put` and `jax.device_get` do.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh
import numpy as np

from virl_jax import types
from virl_jax.model import sharding


def row_lanes(mesh: Mesh) -> range:
  """Which of the parts that rows are split into belong to this process.

  Raises:
    ValueError: if a part belongs to several processes, or this process's parts are not neighbours.
  """
  parts = mesh.devices.reshape(sharding.row_shards(mesh), -1)
  owners = [{d.process_index for d in part} for part in parts]
  mine = [i for i, own in enumerate(owners) if jax.process_index() in own]
  if any(len(owners[i]) > 1 for i in mine) or mine != list(range(mine[0], mine[-1] + 1)):
    raise ValueError("each part of the rows must lie in one process, and a process's parts side by side: keep mesh "
                     f"tensor within the {jax.local_device_count()} devices of a process. Received: {owners}")
  return range(mine[0], mine[-1] + 1)


def place(tree, mesh: Mesh, axis: int = 0):
  """Puts host arrays on the mesh, an axis split over data and fsdp; each process gives its own part of that.

  Arrays whose axis does not divide are kept whole on every device; with several processes, all must give the same.
  """
  split, whole, n = sharding.rows(mesh, axis), sharding.replicated(mesh), sharding.row_shards(mesh)
  n = n // jax.process_count()
  put = lambda a: _put(a, split if np.ndim(a) > axis and np.shape(a)[axis] % n == 0 else whole)
  return jax.tree.map(put, tree)


def _put(a, where: jax.sharding.NamedSharding) -> jax.Array:
  if jax.process_count() == 1:
    return jax.device_put(a, where)
  return jax.make_array_from_process_local_data(where, np.asarray(a))


def place_batch(batch: types.Batch, mesh: Mesh) -> types.Batch:
  """A host batch on the mesh: trajectories split over data and fsdp, and so are rows and images within a microbatch."""
  order_B = batch.order_B
  if order_B is not None:
    order_B = order_B + np.int32(jax.process_index() * len(order_B))
  return place(batch.replace(rows=None, order_B=order_B), mesh).replace(rows=place(batch.rows, mesh, 1))


def place_rows(tree, mesh: Mesh):
  """Puts host arrays that hold only this process's rows on the mesh, leading axis split over data and fsdp."""
  return jax.tree.map(lambda a: _put(a, sharding.rows(mesh)), tree)


def fetch_rows(tree, axis: int = 0):
  """This process's rows, its part of an axis, as numpy arrays; its devices must hold them."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(lambda a: _rows(a, axis), tree)


def _rows(a: jax.Array, axis: int) -> np.ndarray:
  each = a.shape[axis] // jax.process_count()
  first = jax.process_index() * each
  found = np.empty((*a.shape[:axis], each, *a.shape[axis + 1:]), a.dtype)
  for shard in a.addressable_shards:
    begin, end, _ = shard.index[axis].indices(a.shape[axis])
    start, stop = max(begin, first), min(end, first + each)
    if start < stop:
      at, of = list(shard.index), [slice(None)] * a.ndim
      at[axis], of[axis] = slice(start - first, stop - first), slice(start - begin, stop - begin)
      found[tuple(at)] = np.asarray(shard.data)[tuple(of)]
  return found
