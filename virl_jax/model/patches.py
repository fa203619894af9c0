"""Patch geometry on the host: how a picture becomes patches, and where they go in the vision tower's input."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from virl_jax import types

# Normalisation of Qwen2.5-VL's image processor (CLIP's constants).
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
# Images of at most so many merged cells are not cut into attention windows; see `bucket`.
ONE_PIECE_CELLS = 64


@dataclasses.dataclass(frozen=True)
class Grid:
  """Patch geometry, as in the vision tower's configuration.

  Attributes:
    patch: side of a patch, pixels.
    temporal: frames that a patch spans; a still image is repeated.
    merge: patches merged into one token, along each side.
    window: side of an attention window, in merged cells.
  """

  patch: int = 14
  temporal: int = 2
  merge: int = 2
  window: int = 4

  @property
  def values(self) -> int:
    """C, the values of a patch."""
    return 3 * self.temporal * self.patch ** 2

  @property
  def bytes(self) -> int:
    """C of a still image's patches as `patchify` makes them: of one frame, because all are equal."""
    return 3 * self.patch ** 2

  @property
  def factor(self) -> int:
    """Sides of shown images are multiples of this, pixels."""
    return self.patch * self.merge


def patchify(pixels_HW3: np.ndarray, grid: Grid) -> np.ndarray:
  """Patches in merge-block order, as bytes of one frame: an eighth of the float32 values that the vision tower takes.

  Args:
    pixels_HW3: uint8[height, width, 3], sides multiples of `grid.factor`.
    grid: patch geometry.

  Returns:
    uint8[P, 3 * patch * patch] in (colour, y, x) order; the merge * merge patches of one merged cell are neighbours,
    cells run row by row.
  """
  m, p = grid.merge, grid.patch
  x = pixels_HW3.transpose(2, 0, 1)
  rows, cols = x.shape[1] // (m * p), x.shape[2] // (m * p)
  x = x.reshape(3, rows, m, p, cols, m, p).transpose(1, 4, 2, 5, 0, 3, 6)
  return np.ascontiguousarray(x.reshape(rows * cols * m * m, -1))


def levels() -> np.ndarray:
  """float32[256, 3]: the normalised value of each byte in each colour.

  Source: Qwen2.5-VL's image processor, and its rounding: float64, to float32 before the mean is subtracted.
  """
  return ((np.arange(256) * (1.0 / 255.0)).astype(np.float32)[:, None] - MEAN) / STD


def normalised(patches_PC: np.ndarray, grid: Grid) -> np.ndarray:
  """float32[P, C], as the reference's image processor makes them: (colour, frame, y, x), a still image twice.

  Args:
    patches_PC: bytes, as `patchify` makes them.
    grid: patch geometry.
  """
  x = patches_PC.reshape(len(patches_PC), 3, 1, -1)
  x = np.take_along_axis(levels().T[None, :, None], x.astype(np.intp), axis=3)
  return np.repeat(x, grid.temporal, axis=2).reshape(len(x), -1)


def merged_hw(image: types.ImageInput, grid: Grid) -> tuple[int, int]:
  """Rows and columns of merged vision tokens."""
  return image.grid_hw[0] // grid.merge, image.grid_hw[1] // grid.merge


def vision_tokens(image: types.ImageInput, grid: Grid) -> int:
  """Merged vision tokens of an image."""
  rows, cols = merged_hw(image, grid)
  return rows * cols


def shown_wh(image: types.ImageInput, grid: Grid) -> tuple[int, int]:
  """Width and height of the image as shown, pixels."""
  return image.grid_hw[1] * grid.patch, image.grid_hw[0] * grid.patch


def _window_slots(grid_hw: tuple[int, int], grid: Grid) -> tuple[np.ndarray, np.ndarray]:
  """Window and place within it, int[cells] each, of every merged cell, row by row."""
  rows, cols = grid_hw[0] // grid.merge, grid_hw[1] // grid.merge
  r, c = np.divmod(np.arange(rows * cols), cols)
  side = grid.window
  across = -(-cols // side)
  window = (r // side) * across + c // side
  width = np.minimum(side, cols - c // side * side)  # ragged at the right edge
  return window, (r % side) * width + c % side


def layout(images: list[types.ImageInput | None], grid: Grid, count: int | None = None, least: tuple[int, int] = (1, 1),
           like: types.ImageInput | None = None) -> tuple[types.ImageBatch, list[np.ndarray]]:
  """Lays images out for the vision tower, padded to a bucket.

  Args:
    images: of any sizes; the list may be empty.  None keeps a place empty.
    grid: patch geometry.
    count: pad with empty images up to this many; None for as many as there are, at least one.
    least: an `extent` that the bucket has to hold as well.
    like: an image whose kind of patches (see `types.ImageInput`) an empty batch has; None for bytes.

  Returns:
    The batch (numpy leaves), and for each image int32[M]: the indices of its merged tokens, row by row, in the vision
    tower's flattened output.  `bucket` says how large the batch is.

  Raises:
    ValueError: if there are more images than `count`.
  """
  count = max(1, len(images)) if count is None else count
  if len(images) > count:
    raise ValueError(f"images must be at most count={count} images. Received: {len(images)}")
  n_windows, n_cells = bucket(np.maximum(least, extent(images, grid)).tolist(), grid)
  per_cell = grid.merge ** 2
  shape = count, n_windows, n_cells * per_cell
  like = next((im for im in (*images, like) if im is not None), None)
  like = np.zeros((0, grid.bytes), np.uint8) if like is None else like.patches_PC
  batch = types.ImageBatch(
      patches_IWQC=np.zeros((*shape, like.shape[1]), like.dtype),
      window_IWQ=np.full(shape, -1, np.int32),
      rowcol_IWQ2=np.zeros((*shape, 2), np.int32))
  index = []
  for i, im in enumerate(images):
    if im is None:
      index.append(np.zeros(0, np.int32))
      continue
    window, slot = _window_slots(im.grid_hw, grid)
    place = (window, slot) if n_windows > 1 else (np.zeros_like(window), np.arange(len(window)))
    cols = im.grid_hw[1] // grid.merge
    w = np.repeat(place[0], per_cell)
    q = (place[1][:, None] * per_cell + np.arange(per_cell)).ravel()
    cell, sub = np.divmod(np.arange(len(im.patches_PC)), per_cell)
    row = cell // cols * grid.merge + sub // grid.merge
    col = cell % cols * grid.merge + sub % grid.merge
    batch.patches_IWQC[i, w, q] = im.patches_PC
    batch.window_IWQ[i, w, q] = np.repeat(window, per_cell)
    batch.rowcol_IWQ2[i, w, q] = np.stack([row, col], -1)
    index.append(((i * n_windows + place[0]) * n_cells + place[1]).astype(np.int32))
  return batch, index


def extent(images: list[types.ImageInput | None], grid: Grid) -> tuple[int, int]:
  """The most attention windows, and the most merged cells, that any of the images has; at least one each."""
  sizes = [merged_hw(im, grid) for im in images if im is not None]
  across = lambda cells: -(-cells // grid.window)
  return (max((across(r) * across(c) for r, c in sizes), default=1), max((r * c for r, c in sizes), default=1))


def bucket(most: tuple[int, int], grid: Grid) -> tuple[int, int]:
  """The size that images are padded to: windows, and merged cells in each.

  Small images are in one piece (windows = 1), rounded up to n^2 or n(n + 1) cells, at least 4, whatever their
  aspect; a mask keeps their windows apart.  Large ones, and small ones that fill their windows, are cut by
  window, so that attention costs only what is in a window.  The number of windows is a power of two; above 32, where
  empty windows cost most, also a quarter, half or three quarters of the way to the next.

  Args:
    most: windows and cells, as `extent` gives them.
    grid: patch geometry.
  """
  windows, cells = most
  octave = max(windows - 1, 1).bit_length()
  step = 1 << max(0, octave - 3) if octave > 5 else 1 << octave
  cut = -(-windows // step) * step if windows > 1 else 2, grid.window ** 2
  if cells > ONE_PIECE_CELLS or cut[0] * cut[1] <= cells:
    return cut
  side = max(2, math.isqrt(cells - 1) + 1)
  return 1, side * (side - 1 if side > 2 and side * (side - 1) >= cells else side)
