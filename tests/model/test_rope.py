"""Positions worked out by hand, and what a rotation must and must not change."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax.model import rope

PAD, TXT = 5, 1  # the image placeholder, and any text token


def test_text_alone_counts_up():
  pos, end = rope.positions([TXT] * 4, PAD, [])
  assert pos.tolist() == [[0, 1, 2, 3]] * 3 and end == 4
  pos, end = rope.positions([], PAD, [])
  assert pos.shape == (3, 0) and end == 0


def test_one_image_spreads_over_rows_and_columns():
  #        text text  image of 2 x 3          text
  ids = [TXT, TXT] + [PAD] * 6 + [TXT]
  pos, end = rope.positions(ids, PAD, [(2, 3)])
  assert pos.tolist() == [[0, 1, 2, 2, 2, 2, 2, 2, 5],
                          [0, 1, 2, 2, 2, 3, 3, 3, 5],
                          [0, 1, 2, 3, 4, 2, 3, 4, 5]]
  assert end == 6 and pos.dtype == np.int32


def test_two_images_and_a_tall_one():
  ids = [TXT] + [PAD] * 2 + [TXT, TXT] + [PAD] * 6 + [TXT]
  pos, end = rope.positions(ids, PAD, [(1, 2), (3, 2)])
  assert pos.tolist() == [[0, 1, 1, 3, 4, 5, 5, 5, 5, 5, 5, 8],
                          [0, 1, 1, 3, 4, 5, 5, 6, 6, 7, 7, 8],
                          [0, 1, 2, 3, 4, 5, 6, 5, 6, 5, 6, 8]]
  assert end == 9


def test_images_side_by_side_are_told_apart_by_their_grids():
  pos, end = rope.positions([PAD] * 3, PAD, [(1, 1), (1, 2)])
  assert pos.tolist() == [[0, 1, 1], [0, 1, 1], [0, 1, 2]] and end == 3


@hypothesis.given(st.lists(st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(1, 4))), max_size=8),
                  st.integers(0, 8))
def test_a_stretch_in_two_pieces_is_the_whole_stretch(parts, cut):
  join = lambda ps: [t for p in ps for t in ([TXT] if p is None else [PAD] * (p[0] * p[1]))]
  grids = lambda ps: [p for p in ps if p is not None]
  whole, end = rope.positions(join(parts), PAD, grids(parts))
  a, middle = rope.positions(join(parts[:cut]), PAD, grids(parts[:cut]))
  b, last = rope.positions(join(parts[cut:]), PAD, grids(parts[cut:]), start=middle)
  np.testing.assert_array_equal(np.concatenate([a, b], 1), whole)
  assert last == end and (end == 0 or end == whole.max() + 1)


@pytest.mark.parametrize("ids, grids, message", [
    ([TXT, PAD], [(1, 2)], "2 image placeholders.*Received: 1"),
    ([PAD] * 3, [], "0 image placeholders.*Received: 3"),
    ([PAD] * 2 + [TXT] + [PAD] * 2, [(2, 2)], r"4 image placeholders in a row for grid \(2, 2\) at token 0"),
    ([PAD, TXT, PAD, PAD, PAD], [(1, 2), (1, 2)], "2 image placeholders in a row.*token 0")])
def test_placeholders_that_do_not_fit_the_images(ids, grids, message):
  with pytest.raises(ValueError, match=message):
    rope.positions(ids, PAD, grids)


mrope = jax.jit(rope.mrope, static_argnums=(1, 2, 3))
rotate = jax.jit(rope.rotate)


def slow_1d(x_TNH, pos_T, theta):
  """Textbook rotary embedding in float64, one pair of channels at a time."""
  T, N, H = x_TNH.shape
  out = np.empty((T, N, H))
  for t in range(T):
    for i in range(H // 2):
      angle = pos_T[t] * theta ** (-2 * i / H)
      a, b = x_TNH[t, :, i].astype(float), x_TNH[t, :, i + H // 2].astype(float)
      out[t, :, i] = a * np.cos(angle) - b * np.sin(angle)
      out[t, :, i + H // 2] = a * np.sin(angle) + b * np.cos(angle)
  return out


def test_equal_axes_are_plain_rotary_positions():
  rng = np.random.default_rng(0)
  pos_T = np.array([0, 1, 2, 7, 30])
  x = rng.normal(size=(1, 5, 2, 16)).astype(np.float32)
  cos, sin = mrope(np.broadcast_to(pos_T.astype(np.int32), (1, 3, 5)), 16, (2, 3, 3), 100.0)
  assert cos.shape == sin.shape == (1, 5, 16) and cos.dtype == jnp.float32
  np.testing.assert_allclose(rotate(x, cos, sin)[0], slow_1d(x[0], pos_T, 100.0), atol=1e-5)


def test_each_section_follows_its_own_axis():
  pos = np.array([[[3], [5], [9]]], np.int32)  # time 3, height 5, width 9
  cos, _ = mrope(pos, 16, (2, 3, 3), 100.0)
  axis = np.array([3, 3, 5, 5, 5, 9, 9, 9])
  angle = axis * 100.0 ** (-np.arange(8) / 8)
  np.testing.assert_allclose(cos[0, 0], np.cos(np.concatenate([angle, angle])), atol=1e-6)


def test_vision_rotary_is_rows_then_columns():
  cos, sin = jax.jit(rope.vision_rope, static_argnums=1)(np.array([[2, 7]], np.int32), 8)
  angle = np.array([2.0, 0.02, 7.0, 0.07])
  np.testing.assert_allclose(cos[0], np.cos(np.concatenate([angle, angle])), atol=1e-6)
  np.testing.assert_allclose(sin[0], np.sin(np.concatenate([angle, angle])), atol=1e-6)


def test_rotation_keeps_norms_and_depends_on_differences_only():
  rng = np.random.default_rng(1)
  q, k = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

  def product(pos_q, pos_k):
    turn = lambda x, pos: rotate(x, *mrope(np.array(pos, np.int32).reshape(1, 3, 1), 16, (2, 3, 3), 100.0))
    return float((turn(q, pos_q) * turn(k, pos_k)).sum()), float((turn(q, pos_q) ** 2).sum())

  near, norm = product((4, 6, 8), (1, 5, 2))
  far, _ = product((24, 36, 48), (21, 35, 42))
  np.testing.assert_allclose([far, norm], [near, float((q ** 2).sum())], rtol=1e-4)
  for other in ((5, 6, 8), (4, 7, 8), (4, 6, 9)):
    assert abs(product(other, (1, 5, 2))[0] - near) > 1e-3


def test_half_precision_is_rotated_in_float32():
  x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 1, 1, 16)
  cos, sin = mrope(np.full((1, 3, 1), 1000, np.int32), 16, (2, 3, 3), 1e4)
  half = rotate(x.astype(jnp.bfloat16), cos, sin)
  assert half.dtype == jnp.bfloat16
  whole = np.asarray(rotate(x.astype(jnp.bfloat16).astype(np.float32), cos, sin))
  np.testing.assert_array_equal(half, whole.astype(jnp.bfloat16))


def test_sections_must_fit_the_head():
  with pytest.raises(ValueError, match=r"sections must add up to head_size / 2 = 8.*\(2, 3, 4\)"):
    rope.mrope(jnp.zeros((1, 3, 1), jnp.int32), 16, (2, 3, 4), 1e4)
