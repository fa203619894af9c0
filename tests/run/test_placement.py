"""Host arrays on the mesh and back; with two processes in tests/run/test_hosts.py."""

import dataclasses

import jax
from jax.sharding import PartitionSpec as P
import numpy as np

from virl_jax import types
from virl_jax.model import sharding
from virl_jax.run import placement


def test_rows_are_split_over_data_and_fsdp():
  mesh = sharding.make(2, 2, 2)
  assert sharding.row_shards(mesh) == 4
  tree = {"rows": np.arange(24.0).reshape(8, 3), "odd": np.arange(6), "scalar": np.float32(3), "none": None}
  placed = placement.place(tree, mesh)
  assert placed["rows"].sharding == sharding.rows(mesh) and placed["rows"].sharding.spec == P(("data", "fsdp"))
  assert {s.data.shape for s in placed["rows"].addressable_shards} == {(2, 3)}
  assert placed["odd"].sharding.is_fully_replicated and placed["scalar"].sharding == sharding.replicated(mesh)
  jax.tree.map(np.testing.assert_array_equal, placed, tree)


def test_a_batch_is_split_by_trajectories_and_its_microbatches_by_rows():
  mesh = sharding.make(1, 4, 2)
  fields = {f.name: np.zeros((8, 2)) for f in dataclasses.fields(types.Batch)}
  images = (types.ImageBatch(np.zeros((3, 4, 1, 4, 3), np.uint8), np.zeros((3, 4, 1, 4)), np.zeros((3, 4, 1, 4, 2))),)
  rows = types.Rows(np.zeros((3, 4, 16)), np.zeros((3, 4, 1)), images)
  placed = placement.place_batch(types.Batch(**fields | {"rows": rows, "order_B": None}), mesh)
  assert placed.tokens_BT.sharding.spec == P(("data", "fsdp"))
  for leaf in jax.tree.leaves(placed.rows):
    assert leaf.sharding.spec == P(None, ("data", "fsdp")) and leaf.addressable_shards[0].data.shape[:2] == (3, 1)


def test_what_is_put_on_the_mesh_comes_back_in_order():
  mesh = sharding.make(2, 2, 2)
  rows = {"a": np.arange(24.0).reshape(8, 3), "b": np.arange(8)}
  placed = placement.place_rows(rows, mesh)
  assert placed["a"].sharding == sharding.rows(mesh)
  jax.tree.map(np.testing.assert_array_equal, placement.fetch_rows(placed), rows)
  assert placement.row_lanes(mesh) == range(4)
