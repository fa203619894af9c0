"""The device mesh, what each logical axis maps to on it, and placing of batches."""

from __future__ import annotations

import contextlib
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from virl_jax.model import params as params_lib

AXES = ("data", "fsdp", "tensor")
# Parameters: logical axis -> mesh axis.  Axes not named here are not split.
RULES = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
# Rows of batches, and images, are split over both of these.
ROWS = ("data", "fsdp")


def make(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """A (data, fsdp, tensor) mesh over all devices.

  Args:
    data, fsdp, tensor: devices along each axis; one of them may be -1, "what is left".
    devices: which; all of them by default.

  Raises:
    ValueError: if the sizes don't multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor]
  if sizes.count(-1) == 1:
    rest = math.prod(s for s in sizes if s != -1)
    sizes[sizes.index(-1)] = len(devices) // rest if rest > 0 else 0
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    raise ValueError(f"mesh data x fsdp x tensor must multiply to the {len(devices)} devices there are. "
                     f"Received: {data} x {fsdp} x {tensor}")
  return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def platform(device: jax.Device) -> str:
  """What a model on this device is compiled for, in its configuration's words; "cpu" stands for what is not known."""
  return {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu"}.get(device.platform, "cpu")


def param_shardings(specs: dict, mesh: Mesh) -> dict:
  """A sharding for each parameter, by `RULES`; a dimension that does not divide stays whole."""
  def one(spec: params_lib.ParamSpec):
    names = []
    for size, axis in zip(spec.shape, spec.axes):
      name = RULES.get(axis)
      names.append(name if name and size % mesh.shape[name] == 0 and name not in names else None)
    return NamedSharding(mesh, PartitionSpec(*names))

  return params_lib.map_specs(one, specs)


def context(mesh: Mesh | None):
  """A `with` block, within which kernels that the partitioner can't look into are told of the mesh."""
  return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def row_shards(mesh: Mesh) -> int:
  """Over how many devices rows are split."""
  return math.prod(mesh.shape[a] for a in ROWS)


def rows(mesh: Mesh) -> NamedSharding:
  """Leading axis split over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(ROWS))


def cache(mesh: Mesh, kv_heads: int) -> NamedSharding:
  """A [L, B, K, S, H] key/value cache: rows over data and fsdp, heads over tensor where they divide."""
  return NamedSharding(mesh, PartitionSpec(None, ROWS, "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None))


def place(tree, mesh: Mesh):
  """Puts host arrays on the mesh, leading axis split over data and fsdp.

  Arrays whose leading axis does not divide are kept whole on every device.
  """
  split, whole, n = rows(mesh), replicated(mesh), row_shards(mesh)
  return jax.tree.map(lambda a: jax.device_put(a, split if np.ndim(a) and a.shape[0] % n == 0 else whole), tree)


def row_lanes(mesh: Mesh) -> range:
  """Which of the parts that rows are split into belong to this process.

  Raises:
    ValueError: if a part belongs to several processes, or this process's parts are not neighbours.
  """
  parts = mesh.devices.reshape(row_shards(mesh), -1)
  owners = [{d.process_index for d in part} for part in parts]
  mine = [i for i, own in enumerate(owners) if jax.process_index() in own]
  if any(len(owners[i]) > 1 for i in mine) or mine != list(range(mine[0], mine[-1] + 1)):
    raise ValueError("each part of the rows must lie in one process, and a process's parts side by side: keep mesh "
                     f"tensor within the {jax.local_device_count()} devices of a process. Received: {owners}")
  return range(mine[0], mine[-1] + 1)


def place_rows(tree, mesh: Mesh):
  """Puts host arrays that hold only this process's rows on the mesh, leading axis split over data and fsdp."""
  split = rows(mesh)
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
