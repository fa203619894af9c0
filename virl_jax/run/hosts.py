"""Several processes, each with devices of its own: whose rows are whose, and how arrays get on the mesh and back.

With one process all of it is what `jax.device_put` and `jax.device_get` do.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh
import numpy as np

from virl_jax import types
from virl_jax.model import sharding


def place(tree, mesh: Mesh, axis: int = 0):
  """Puts host arrays on the mesh, an axis split over data and fsdp.

  Arrays whose axis does not divide are kept whole on every device.
  """
  split, whole, n = sharding.rows(mesh, axis), sharding.replicated(mesh), sharding.row_shards(mesh)
  return jax.tree.map(lambda a: jax.device_put(a, split if np.ndim(a) > axis and a.shape[axis] % n == 0 else whole),
                      tree)


def place_batch(batch: types.Batch, mesh: Mesh) -> types.Batch:
  """A host batch on the mesh: trajectories split over data and fsdp, and so are rows and images within a microbatch."""
  return place(batch.replace(rows=None), mesh).replace(rows=place(batch.rows, mesh, 1))


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


def place_rows(tree, mesh: Mesh):
  """Puts host arrays that hold only this process's rows on the mesh, leading axis split over data and fsdp."""
  split = sharding.rows(mesh)
  if jax.process_count() == 1:
    return jax.device_put(tree, split)
  return jax.tree.map(lambda a: jax.make_array_from_process_local_data(split, np.asarray(a)), tree)


def fetch_rows(tree):
  """The inverse of `place_rows`: numpy arrays of this process's rows."""
  if jax.process_count() == 1:
    return jax.device_get(tree)

  def one(a):
    first = {s.index[0].start or 0: s.data for s in a.addressable_shards}  # replicas hold the same
    return np.concatenate([np.asarray(first[i]) for i in sorted(first)])

  return jax.tree.map(one, tree)


def agree(values: np.ndarray) -> np.ndarray:
  """The largest of each value over all processes; all of them call this, in the same order."""
  if jax.process_count() == 1:
    return values
  from jax.experimental import multihost_utils
  return np.max(multihost_utils.process_allgather(values), axis=0)
