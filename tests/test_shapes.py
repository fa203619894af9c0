"""Sizes that arrays are padded to, by hand."""

from virl_jax import shapes


def test_up():
  assert [shapes.up(n, 4) for n in (0, 1, 4, 5)] == [4, 4, 4, 8]


def test_sizes():
  assert shapes.row_sizes(64, 4.0) == (4, 16, 64) and shapes.row_sizes(1, 4.0) == (1,)
  assert shapes.row_sizes(6, 4.0) == (1, 2, 6) and shapes.row_sizes(8, 2.0) == (1, 2, 4, 8)
  assert shapes.token_sizes(1)[:3] == (16, 32, 64) and shapes.token_sizes(2)[:4] == (16, 24, 32, 48)
  assert shapes.least(17, (16, 24, 32)) == 24 and shapes.least(1, (16,)) == 16
