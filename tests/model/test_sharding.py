"""Meshes over the present devices, and what is split over which axis."""

import types

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from virl_jax.model import params as params_lib
from virl_jax.model import sharding
from virl_jax.model.qwen2_5 import model as qwen


def shape(mesh):
  return tuple(mesh.shape[a] for a in ("data", "fsdp", "tensor"))


def test_minus_one_takes_what_is_left():
  assert shape(sharding.make()) == (8, 1, 1)
  assert shape(sharding.make(-1, 2, 2)) == (2, 2, 2)
  assert shape(sharding.make(1, -1, 4)) == (1, 2, 4)
  assert shape(sharding.make(2, 4, -1)) == (2, 4, 1)
  assert shape(sharding.make(1, 1, 1, devices=jax.devices()[:1])) == (1, 1, 1)
  assert sorted(d.id for d in sharding.make(2, 2, 2).devices.flat) == list(range(8))


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (16, 1, 1), (-1, -1, 1), (0, 1, 8), (-1, 0, 1), (-2, 2, 2),
                                   (-1, 16, 1), (2, 2, 1)])
def test_sizes_that_do_not_fit_the_devices(sizes):
  with pytest.raises(ValueError, match=f"multiply to the 8 devices.*Received: {sizes[0]} x {sizes[1]} x {sizes[2]}"):
    sharding.make(*sizes)


def test_parameters_are_split_by_their_axes():
  mesh = sharding.make(2, 2, 2)
  shardings = sharding.param_shardings(qwen.specs(qwen.SIZES["7b"]), mesh)
  block = shardings["text"]["blocks"]
  assert block["q_w"].spec == P(None, "fsdp", "tensor", None)
  assert block["o_w"].spec == P(None, "tensor", None, "fsdp")
  assert block["gate_w"].spec == P(None, "fsdp", "tensor") and block["norm1"].spec == P(None, None)
  assert shardings["text"]["embed"].spec == P("tensor", "fsdp")
  assert shardings["vision"]["blocks"]["qkv_w"].spec == P(None, "fsdp", None, "tensor", None)


def test_a_dimension_that_does_not_divide_stays_whole():
  mesh = sharding.make(1, 1, 8)
  block = sharding.param_shardings(qwen.specs(qwen.SIZES["7b"]), mesh)["text"]["blocks"]
  assert block["k_w"].spec == P(None, "fsdp", None, None)  # 4 key heads on 8 devices
  assert block["q_w"].spec == P(None, "fsdp", None, None)  # 28 query heads
  assert block["gate_w"].spec == P(None, "fsdp", "tensor")
  odd = {"a": params_lib.ParamSpec((6, 16), ("mlp", "heads"), "ones", "a", (6, 16))}
  assert sharding.param_shardings(odd, mesh)["a"].spec == P(None, "tensor")
  both = {"a": params_lib.ParamSpec((16, 16), ("mlp", "heads"), "ones", "a", (16, 16))}
  assert sharding.param_shardings(both, mesh)["a"].spec == P("tensor", None)  # an axis splits one dimension only


def test_sharded_parameters_hold_what_they_held(small):
  for sizes in ((8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)):
    mesh = sharding.make(*sizes)
    shardings = sharding.param_shardings(qwen.specs(small.cfg), mesh)
    placed = jax.device_put(small.params, shardings)
    jax.tree.map(np.testing.assert_array_equal, placed, small.params)
  largest = placed["text"]["blocks"]["gate_w"]  # [2, 24, 40] on 2 x 2 x 2
  assert {s.data.shape for s in largest.addressable_shards} == {(2, 12, 20)}


class Device(types.SimpleNamespace):
  """A device of a platform, with some memories."""

  def addressable_memories(self):
    return [types.SimpleNamespace(kind=kind) for kind in self.kinds]


@pytest.mark.parametrize("platform, kinds, has", [
    ("cpu", ("device", "pinned_host", "unpinned_host"), True), ("cpu", ("unpinned_host",), False), ("cpu", (), False),
    ("gpu", (), True),  # a device that is only compiled for
    ("gpu", ("device",), False), ("tpu", ("device", "pinned_host"), True), ("tpu", (), False)])
def test_where_arrays_can_wait_on_the_host(platform, kinds, has):
  devices = np.array([Device(platform=platform, kinds=("nothing",), process_index=1),
                      Device(platform=platform, kinds=kinds, process_index=0)])
  mesh = types.SimpleNamespace(devices=devices)
  assert sharding.host_memory(mesh) == has
  if not has:
    where = types.SimpleNamespace(mesh=mesh)
    with pytest.raises(ValueError, match=f"a {platform} device must have pinned host memory.*Received: "
                                         f"{', '.join(kinds) or 'none'}"):
      sharding.in_host(where)


def test_on_the_host_lies_what_lay_on_the_device():
  mesh = sharding.make(2, 2, 2)
  where = jax.sharding.NamedSharding(mesh, P("fsdp", "tensor"))
  there = sharding.in_host(where)
  assert there.memory_kind == "pinned_host" and there.spec == where.spec and there.mesh == mesh
  x = jax.device_put(np.arange(16.0).reshape(4, 4), there)
  np.testing.assert_array_equal(x, np.arange(16.0).reshape(4, 4))
  assert x.sharding.memory_kind == "pinned_host" and x.addressable_shards[0].data.shape == (2, 2)


def test_a_stand_in_s_host_is_not_its_device():
  """JAX finds programs and shapes by their shardings: the two must never be taken for one another."""
  where = jax.sharding.NamedSharding(sharding.make(2, 2, 2), P("fsdp"))
  there, again = (sharding._StandInHost(where.mesh, where.spec) for _ in range(2))
  assert there.memory_kind == "pinned_host" and there == again and hash(there) == hash(again)
  assert there != where and where != there and len({there, again, where}) == 2
