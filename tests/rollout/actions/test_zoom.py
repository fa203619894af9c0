"""What a zoom's box means on the original picture, and what is cut for it; calls are parsed in test_prompt.py."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from virl_jax import types
from virl_jax.data import images
from virl_jax.rollout.actions import zoom

LIMITS = images.Config()
WHOLE, SHOWN = types.Box(0, 0, 840, 420), (84, 42)  # a tenth


@pytest.mark.parametrize("box, found", [
    ((10, 10, 20, 20), types.Box(100, 100, 200, 200)),
    ((-5, -1000, 20, 20), types.Box(0, 0, 200, 200)),
    ((80.5, 40, 1e6, 1e6), types.Box(805, 400, 840, 420)),
    ((-1e6, -1e6, 1e6, 1e6), WHOLE),
    ((0, 0, 60, 0.8), types.Box(0, 0, 600, 8)),
    ((20, 10, 10, 20), "x1 < x2"), ((10, 20, 20, 10), "y1 < y2"), ((10, 10, 10, 20), "x1 < x2"),
    ((84, 0, 90, 10), "outside the image of 84 x 42"), ((0, 42, 10, 50), "outside"), ((-9, -9, -1, -1), "outside"),
    ((10, 10, 10.7, 20), "too small"), ((83.9, 10, 90, 20), "too small"), ((0, 0, 60, 0.79), "too small")])
def test_zooms(box, found):
  got = zoom.check(box, WHOLE, SHOWN, LIMITS)
  if isinstance(found, str):
    assert isinstance(got, str) and found in got
  else:
    np.testing.assert_allclose(got, found)


def test_long_thin_zooms_are_refused():
  limits = images.Config(crop_max_aspect=10.0)
  assert zoom.check((0, 0, 50, 5), WHOLE, SHOWN, limits) == types.Box(0, 0, 500, 50)
  for box in ((0, 0, 51, 5), (0, 0, 2, 42)):
    assert zoom.check(box, WHOLE, SHOWN, limits) == "bbox_2d is too long and thin"


def test_a_zoom_into_a_part_is_clamped_to_that_part():
  region = types.Box(100, 100, 140, 140)
  assert zoom.check((-9, 0, 28, 99), region, (56, 56), LIMITS) == types.Box(100, 100, 120, 140)


@hypothesis.given(st.tuples(st.integers(1, 400), st.integers(1, 400)), st.tuples(*[st.floats(0, 1)] * 4),
                  st.integers(1, 50), st.sampled_from([1.0, 2.0, 100.0]))
def test_expanded_regions(picture_wh, corners, min_side, aspect):
  (x1, x2), (y1, y2) = sorted(corners[:2]), sorted(corners[2:])
  w, h = picture_wh
  box = types.Box(x1 * w, y1 * h, x2 * w, y2 * h)
  hypothesis.assume(min(box.x2 - box.x1, box.y2 - box.y1) >= 1e-3)  # `zoom.check` makes sure of this
  cfg = images.Config(crop_min_side_px=min_side, crop_max_aspect=aspect)
  got = zoom.expand(box, picture_wh, cfg)
  assert 0 <= got.x1 <= box.x1 and box.x2 <= got.x2 <= w and 0 <= got.y1 <= box.y1 and box.y2 <= got.y2 <= h
  gw, gh, near = got.x2 - got.x1, got.y2 - got.y1, 1e-6
  assert gw >= min(min_side, w) - near and gh >= min(min_side, h) - near
  if min(w, h) >= max(gw, gh):  # the picture is large enough
    assert max(gw, gh) <= aspect * min(gw, gh) * (1 + near) + near
  bw, bh = box.x2 - box.x1, box.y2 - box.y1
  if min(bw, bh) >= min_side and max(bw, bh) <= aspect * min(bw, bh):
    assert np.allclose(got, box)
