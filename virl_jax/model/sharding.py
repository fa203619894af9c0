"""The device mesh, and what each logical axis maps to on it."""

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
