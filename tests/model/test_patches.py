"""Patches in their order, the window layout, and the buckets."""

import numpy as np
import pytest

from virl_jax import types
from virl_jax.model import patches

GRID = patches.Grid()


def test_patches_come_cell_by_cell():
  """Each pixel's value is its own place; the values of patches must be those of the right places."""
  y, x = np.mgrid[:56, :84]
  pixels = np.stack([y, x, np.full_like(y, 7)], -1).astype(np.uint8)
  cut = patches.patchify(pixels, GRID)
  assert cut.dtype == np.uint8 and cut.shape == (24, GRID.bytes)
  found = patches.normalised(cut, GRID).reshape(-1, 3, 2, 14, 14)
  assert len(found) == 4 * 6
  back = np.rint((found * patches.STD[:, None, None, None] + patches.MEAN[:, None, None, None]) * 255)
  np.testing.assert_array_equal(back[:, :, 0], back[:, :, 1])  # a still image, twice
  for p in range(24):
    cell, sub = divmod(p, 4)
    top, left = (cell // 3 * 2 + sub // 2) * 14, (cell % 3 * 2 + sub % 2) * 14
    np.testing.assert_array_equal(back[p, :, 0], pixels[top:top + 14, left:left + 14].transpose(2, 0, 1))


def numbered(rows, cols, start, grid):
  """An image of rows x cols merged cells whose patches carry their own numbers, from `start` on."""
  count = rows * cols * grid.merge ** 2
  numbers = np.repeat(np.arange(start, start + count, dtype=np.float32)[:, None], grid.values, 1)
  return types.ImageInput(numbers, (rows * grid.merge, cols * grid.merge), types.Box(0, 0, 1, 1))


@pytest.mark.parametrize("grid", [patches.Grid(2, 1, 2, 4), patches.Grid(2, 1, 2, 2), patches.Grid(2, 1, 1, 3)])
@pytest.mark.parametrize("sizes", [[(1, 1)], [(4, 4)], [(3, 5), (6, 9)], [(1, 7), (9, 2), (2, 2)],
                                   [(9, 8), (1, 70), (3, 2)]])
def test_every_token_is_made_of_its_own_patches(grid, sizes):
  start, pictures = 1, []
  for rows, cols in sizes:
    pictures.append(numbered(rows, cols, start, grid))
    start += len(pictures[-1].patches_PC)
  batch, index = patches.layout(pictures, grid, len(sizes) + 2)
  I, W, Q = batch.mask_IWQ.shape
  per = grid.merge ** 2
  slots = batch.patches_IWQC[..., 0].reshape(-1, per)  # a merged token reads `per` neighbouring slots
  place = batch.rowcol_IWQ2.reshape(-1, per, 2)
  windows = batch.window_IWQ.reshape(-1, per)
  full = sizes == [(4, 4)] and grid.window == 2  # four windows with nothing to spare
  assert (W > 1) == (full or any(rows * cols > patches.ONE_PIECE_CELLS for rows, cols in sizes))
  first = 1
  for i, ((rows, cols), at) in enumerate(zip(sizes, index)):
    assert at.dtype == np.int32 and at.shape == (rows * cols,)
    np.testing.assert_array_equal(slots[at], first + np.arange(rows * cols * per).reshape(-1, per))
    for m, slot in enumerate(at):
      r, c = divmod(m, cols)
      want = [(r * grid.merge + a, c * grid.merge + b) for a in range(grid.merge) for b in range(grid.merge)]
      np.testing.assert_array_equal(place[slot], want)
      # Its window is that of its row and column; if the picture is cut, the slot is in that window.
      window = r // grid.window * -(-cols // grid.window) + c // grid.window
      assert (windows[slot] == window).all()
      assert slot // (Q // per) == i * W + (window if W > 1 else 0)
    first += rows * cols * per
  np.testing.assert_array_equal(batch.mask_IWQ, batch.patches_IWQC[..., 0] > 0)
  assert batch.mask_IWQ.sum() == start - 1 and I == len(sizes) + 2
  assert not batch.mask_IWQ[len(sizes):].any()


def test_buckets_come_in_few_sizes():
  shape = lambda *sizes: patches.layout([numbered(r, c, 1, GRID) for r, c in sizes], GRID)[0].mask_IWQ.shape
  assert shape((1, 1)) == shape((2, 2)) == shape((1, 2)) == (1, 1, 16)
  assert shape((1, 5)) == (1, 1, 24) and shape((3, 3)) == (1, 1, 36) and shape((4, 4)) == (1, 1, 64)
  assert shape((5, 4)) == (1, 1, 80) and shape((7, 4)) == (1, 1, 120) and shape((1, 9)) == (1, 1, 36)
  assert shape((7, 9)) == (1, 1, 256)
  # Larger ones are cut by window, and those that fill their windows.
  assert shape((8, 8)) == (1, 4, 64) and shape((3, 4), (8, 8)) == (2, 4, 64) and shape((8, 4)) == (1, 2, 64)
  assert shape((1, 16), (8, 8)) == (2, 4, 64)
  assert shape((9, 9)) == (1, 16, 64) and shape((9, 9), (1, 1)) == (2, 16, 64) and shape((13, 5)) == (1, 8, 64)
  assert shape((1, 65)) == (1, 32, 64)
  every = {shape((r, c)) for r in range(1, 65) for c in range(1, 64 // r + 1)}
  pieces = {n * n for n in range(2, 9)} | {n * (n + 1) for n in range(2, 8)}
  assert every == {(1, 1, 4 * cells) for cells in pieces} | {(1, 2, 64), (1, 4, 64)}


def test_a_bucket_for_a_picture_that_is_elsewhere():
  small = numbered(1, 9, 1, GRID)
  for least, shape in (((1, 1), (1, 36)), ((1, 20), (1, 80)), ((4, 16), (1, 64)), ((16, 81), (16, 64)),
                       ((1, 81), (4, 64))):
    batch, (index,) = patches.layout([small], GRID, least=least)
    assert batch.mask_IWQ.shape[1:] == shape
    np.testing.assert_array_equal(batch.patches_IWQC.reshape(-1, 4, GRID.values)[index, 0, 0], np.arange(1, 37, 4))


def test_no_images():
  empty, index = patches.layout([], GRID, 3)
  assert empty.mask_IWQ.shape == (3, 1, 16) and not empty.mask_IWQ.any() and index == []
  assert patches.layout([], GRID)[0].mask_IWQ.shape[0] == 1


def test_more_images_than_room():
  with pytest.raises(ValueError, match="at most count=1 images. Received: 2"):
    patches.layout([numbered(1, 1, 1, GRID)] * 2, GRID, 1)
