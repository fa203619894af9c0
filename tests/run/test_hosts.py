"""Arrays on the mesh and back; two processes together are tested in rollout/test_engine.py."""

import jax
from jax.sharding import PartitionSpec as P
import numpy as np

from virl_jax.model import sharding
from virl_jax.run import hosts


def test_rows_are_split_over_data_and_fsdp():
  mesh = sharding.make(2, 2, 2)
  assert sharding.row_shards(mesh) == 4
  tree = {"rows": np.arange(24.0).reshape(8, 3), "odd": np.arange(6), "scalar": np.float32(3), "none": None}
  placed = hosts.place(tree, mesh)
  assert placed["rows"].sharding == sharding.rows(mesh) and placed["rows"].sharding.spec == P(("data", "fsdp"))
  assert {s.data.shape for s in placed["rows"].addressable_shards} == {(2, 3)}
  assert placed["odd"].sharding.is_fully_replicated and placed["scalar"].sharding == sharding.replicated(mesh)
  jax.tree.map(np.testing.assert_array_equal, placed, tree)


def test_what_is_put_on_the_mesh_comes_back_in_order():
  mesh = sharding.make(2, 2, 2)
  rows = {"a": np.arange(24.0).reshape(8, 3), "b": np.arange(8)}
  placed = hosts.place_rows(rows, mesh)
  assert placed["a"].sharding == sharding.rows(mesh)
  jax.tree.map(np.testing.assert_array_equal, hosts.fetch_rows(placed), rows)
  assert hosts.row_lanes(mesh) == range(4) and hosts.agree(np.array([3, 1])).tolist() == [3, 1]
