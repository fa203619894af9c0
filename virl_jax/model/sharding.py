"""The device mesh, and what each logical axis maps to on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
# Axes of activations, by the names that `constrain` and `locally` take.
_PLACES = {"rows": ROWS, "fsdp": ("fsdp",), "tensor": ("tensor",)}


def make(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
  """A (data, fsdp, tensor) mesh over all devices.

  Args:
    data, fsdp, tensor: devices along each axis; one of them may be -1, for all that are left.
    devices: which; all of them by default, those of a process side by side.

  Raises:
    ValueError: the product of the sizes is not the number of devices.
  """
  if devices is None:
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  sizes = [data, fsdp, tensor]
  if sizes.count(-1) == 1:
    rest = math.prod(s for s in sizes if s != -1)
    sizes[sizes.index(-1)] = len(devices) // rest if rest > 0 else 0
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    raise ValueError(f"mesh data x fsdp x tensor must multiply to the {len(devices)} devices there are. "
                     f"Received: {data} x {fsdp} x {tensor}")
  return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def replicas(mesh: Mesh, tensor: int) -> Mesh:
  """The same devices in the same order, each `tensor` of them a whole model, so that rollouts move no weights."""
  return Mesh(mesh.devices.reshape(-1, 1, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def platform(device: jax.Device) -> str:
  """The `Config.platform` of a model on this device; "cpu" for unknown devices."""
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
  """A `with` block in which `constrain` and `locally` know the mesh; without effect for None or one local device.

  A single device that is not here, and is only compiled for, does get a mesh: newer versions of JAX take from it what a
  kernel is compiled for.
  """
  if mesh is None or mesh.size == 1 and mesh.devices.flat[0] in jax.devices():
    return contextlib.nullcontext()
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _known():
  """The abstract mesh of `context`; None outside of it, and within `locally`, where each device is on its own."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.are_all_axes_manual else mesh


def shards(name: str) -> int:
  """Over how many devices "rows", "fsdp" or "tensor" splits what it names, within `context`; 1 outside."""
  mesh = _known()
  return 1 if mesh is None else math.prod(mesh.shape[a] for a in _PLACES[name])


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Says how an activation is split; left alone, the partitioner may put all of it on every device.

  Args:
    x: any array.
    names: for each of its first dimensions "rows", "fsdp", "tensor", or None for whole; the rest are whole.  A
      dimension that does not divide stays whole.

  Returns:
    x, which is unconstrained outside `context` and within `locally`.
  """
  mesh = _known()
  if mesh is None:
    return x
  fits = [name if name and size % shards(name) == 0 else None for name, size in zip(names, x.shape)]
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _spec(fits)))


def locally(fn: Callable, names: Sequence[tuple], out_names: tuple | list[tuple], *arrays: jax.Array):
  """fn(*arrays), on each device with its own part of them: for what the partitioner can't or should not split.

  Args:
    fn: sees local shapes.
    names: for each array, how its dimensions are split, as `constrain` takes it.  A name splits no array if one of the
      dimensions that it is given for does not divide.
    out_names: the same for the result, or a list of such for several results.
    arrays: fn's arguments.

  Returns:
    What fn returns.  Outside `context`, or in another `locally`, fn(*arrays).
  """
  if _known() is None:
    return fn(*arrays)
  odd = {name for which, a in zip(names, arrays) for name, size in zip(which, a.shape)
         if name and size % shards(name)}
  spec = lambda which: _spec([None if name in odd else name for name in which])
  out_specs = list(map(spec, out_names)) if isinstance(out_names, list) else spec(out_names)
  return jax.shard_map(fn, in_specs=tuple(map(spec, names)), out_specs=out_specs, check_vma=False)(*arrays)


def _spec(names: Sequence[str | None]) -> PartitionSpec:
  return PartitionSpec(*(_PLACES[name] if name else None for name in names))


class _StandInHost(NamedSharding):
  """A sharding in pinned host memory, for GPUs that are not here and are only compiled for.

  Such a device lists no memories, and JAX drops their names from its shardings, but its compiler knows them: this
  class keeps the name.  No array can be placed with it.
  """

  memory_kind = property(lambda self: "pinned_host")

  def __eq__(self, other):
    return type(other) is type(self) and super().__eq__(other)

  def __hash__(self):
    return hash(("pinned_host", super().__hash__()))


def host_memory(mesh: Mesh) -> bool:
  """Whether programs for these devices, here or only compiled for, can leave arrays in pinned memory of the host."""
  kinds = _memories(mesh)
  return "pinned_host" in kinds or not kinds and platform(mesh.devices.flat[0]) == "gpu"


def in_host(where: NamedSharding) -> NamedSharding:
  """The same sharding, in pinned memory of each device's host.

  Raises:
    ValueError: the platform has no such memory.
  """
  if not host_memory(where.mesh):
    raise ValueError(f"a {where.mesh.devices.flat[0].platform} device must have pinned host memory for what is "
                     f"offloaded. Received: {', '.join(_memories(where.mesh)) or 'none'}")
  return where.with_memory_kind("pinned_host") if _memories(where.mesh) else _StandInHost(where.mesh, where.spec)


def _memories(mesh: Mesh) -> list[str]:
  """The kinds of memory of a device of this process; other processes' devices don't list theirs."""
  mine = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
  return [memory.kind for memory in (mine or list(mesh.devices.flat))[0].addressable_memories()]


def replicated(mesh: Mesh) -> NamedSharding:
  """Whole on every device."""
  return NamedSharding(mesh, PartitionSpec())


def row_shards(mesh: Mesh) -> int:
  """Over how many devices rows are split."""
  return math.prod(mesh.shape[a] for a in ROWS)


def rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """An axis, the first by default, split over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS))


def cache(mesh: Mesh, kv_heads: int) -> NamedSharding:
  """A [L, B, K, S, H] key/value cache: rows over data and fsdp, heads over tensor where they divide."""
  return NamedSharding(mesh, PartitionSpec(None, ROWS, "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None))
