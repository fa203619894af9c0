"""Images on the host: decoding, cropping, resizing, patches, window layout, and the two frames.

Two frames of coordinates exist.  A `Box` is always in pixels of the original image.  The policy reads
and writes boxes in pixels of the image that it was shown (resized so that its sides are multiples of
28), which is Qwen2.5-VL's convention.  `to_shown` and `to_original` are the only conversions.
"""

from __future__ import annotations

import dataclasses
import io
import math
import warnings

import numpy as np
from PIL import Image, ImageOps

from virl_jax import checks
from virl_jax import types

# Normalisation of Qwen2.5-VL's image processor (CLIP's constants).
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
# Images of at most so many merged cells are not cut into attention windows; see `bucket`.
ONE_PIECE_CELLS = 64


@dataclasses.dataclass(frozen=True)
class Config:
  """Pixel limits; see `config.py`, section `image`."""

  min_pixels: int = 3136
  max_pixels: int = 1003520
  crop_min_pixels: int = 3136
  crop_max_pixels: int = 1003520
  crop_min_side_px: int = 8
  crop_max_aspect: float = 100.0
  crop_expand: bool = False
  decode_max_pixels: int = 178956970

  def __post_init__(self):
    count = checks.whole(1)
    checks.section(vars(self), "image", min_pixels=count, max_pixels=count, crop_min_pixels=count,
                   crop_max_pixels=count, crop_min_side_px=count, crop_max_aspect=checks.real(1),
                   crop_expand=checks.flag, decode_max_pixels=count)
    for low, high in (("min_pixels", "max_pixels"), ("crop_min_pixels", "crop_max_pixels")):
      least, most = getattr(self, low), getattr(self, high)
      checks.need(28 * 28 <= least <= most, f"image.{low}", f"at least 784 and at most image.{high} = {most}", least)


@dataclasses.dataclass(frozen=True)
class Grid:
  """Patch geometry, read off the vision tower's configuration.

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
  def factor(self) -> int:
    """Sides of shown images are multiples of this, pixels."""
    return self.patch * self.merge


def decode(image: bytes | str | Image.Image, max_pixels: int = Config.decode_max_pixels) -> Image.Image:
  """Decodes an image file to RGB, upright, transparency on white.

  Args:
    image: the file's bytes, its path, or a picture already decoded, which is returned as it is.
    max_pixels: refuse anything larger before its pixels are read.

  Returns:
    A PIL image of mode RGB.

  Raises:
    ValueError: if the file is absent, is no image, is cut off, or is too large.
  """
  if isinstance(image, Image.Image):
    return image
  name = image if isinstance(image, str) else f"{len(image)} bytes"
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)
      with Image.open(image if isinstance(image, str) else io.BytesIO(image)) as im:
        if im.width * im.height > max_pixels:
          raise ValueError(f"at most {max_pixels} pixels are decoded, it has {im.width} x {im.height}")
        im.load()
        im = ImageOps.exif_transpose(im)
        if im.mode.startswith("I;16"):
          im = Image.fromarray((np.asarray(im) >> 8).astype(np.uint8))
        if "A" in im.getbands() or "transparency" in im.info:
          im = im.convert("RGBA")
          im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        return im.convert("RGB")
  except Exception as e:  # a decoder may raise anything on a damaged file: AVIF's raises RuntimeError
    raise ValueError(f"image must be a decodable file. Received: {name} ({e})") from e


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
  """The shown size: sides multiples of `factor`, area within limits, aspect nearly kept.

  Args:
    height: original height, pixels.
    width: original width, pixels.
    factor: what the sides become multiples of, pixels.
    min_pixels: smallest area.
    max_pixels: largest area.

  Returns:
    (height, width) in pixels.  A very long image keeps at least one `factor` on its short side and gives
    up on its long side until the area fits.

  Raises:
    ValueError: if a side is not positive.

  Source: Qwen2-VL's published rule (round to the factor; scale by the square root of the area ratio).
  """
  if height < 1 or width < 1:
    raise ValueError(f"height and width must be positive. Received: {height} x {width}")
  h, w = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
  if h * w > max_pixels:
    beta = math.sqrt(height * width / max_pixels)
    h = max(factor, math.floor(height / beta / factor) * factor)
    w = max(factor, math.floor(width / beta / factor) * factor)
    longest = max(factor, max_pixels // factor // factor * factor)
    h, w = min(h, longest), min(w, longest)
  elif h * w < min_pixels:
    beta = math.sqrt(min_pixels / (height * width))
    h = math.ceil(height * beta / factor) * factor
    w = math.ceil(width * beta / factor) * factor
  return h, w


def prepare(image: Image.Image, region: types.Box | None, min_pixels: int, max_pixels: int, grid: Grid
            ) -> types.ImageInput:
  """Crops, resizes, normalises and cuts into patches.

  Args:
    image: the original, RGB.
    region: what to show, in original pixels; None for everything.  Rounded outwards to whole pixels.
    min_pixels: smallest shown area.
    max_pixels: largest shown area.
    grid: patch geometry.

  Returns:
    The vision tower's input; its `region` is the whole pixels that were cut.
  """
  if region is None:
    region = types.Box(0, 0, image.width, image.height)
  else:
    x1, y1 = max(0, math.floor(region.x1)), max(0, math.floor(region.y1))
    x2, y2 = min(image.width, math.ceil(region.x2)), min(image.height, math.ceil(region.y2))
    region = types.Box(x1, y1, max(x2, x1 + 1), max(y2, y1 + 1))
    image = image.crop(region)
  h, w = smart_resize(image.height, image.width, grid.factor, min_pixels, max_pixels)
  pixels = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC), np.uint8)
  return types.ImageInput(patchify(pixels, grid), (h // grid.patch, w // grid.patch), region)


def patchify(pixels_HW3: np.ndarray, grid: Grid) -> np.ndarray:
  """Normalised patches in merge-block order.

  Args:
    pixels_HW3: uint8[height, width, 3], sides multiples of `grid.factor`.
    grid: patch geometry.

  Returns:
    float32[P, C] with C = 3 * temporal * patch * patch in (colour, frame, y, x) order; the merge * merge
    patches of one merged cell are neighbours, cells run row by row.
  """
  # Through float64, rounded to float32 before the mean goes off: the reference's order of rounding.
  x = (pixels_HW3.astype(np.float64) * (1.0 / 255.0)).astype(np.float32)
  x = ((x - MEAN) / STD).transpose(2, 0, 1)
  m, p = grid.merge, grid.patch
  rows, cols = x.shape[1] // (m * p), x.shape[2] // (m * p)
  x = x.reshape(3, rows, m, p, cols, m, p).transpose(1, 4, 2, 5, 0, 3, 6)
  x = x.reshape(rows * cols * m * m, 3, 1, p * p)
  return np.ascontiguousarray(np.repeat(x, grid.temporal, axis=2).reshape(rows * cols * m * m, -1))


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


def to_shown(box: types.Box, region: types.Box, shown: tuple[int, int]) -> tuple[float, float, float, float]:
  """A box of the original in the frame of a shown image.

  Args:
    box: original pixels.
    region: the part of the original that is shown.
    shown: width and height as shown, pixels.
  """
  sx, sy = shown[0] / (region.x2 - region.x1), shown[1] / (region.y2 - region.y1)
  return ((box.x1 - region.x1) * sx, (box.y1 - region.y1) * sy,
          (box.x2 - region.x1) * sx, (box.y2 - region.y1) * sy)


def to_original(box: tuple[float, float, float, float], region: types.Box, shown: tuple[int, int]) -> types.Box:
  """The inverse of `to_shown`."""
  sx, sy = (region.x2 - region.x1) / shown[0], (region.y2 - region.y1) / shown[1]
  return types.Box(region.x1 + box[0] * sx, region.y1 + box[1] * sy,
                   region.x1 + box[2] * sx, region.y1 + box[3] * sy)


def _window_slots(grid_hw: tuple[int, int], grid: Grid) -> tuple[np.ndarray, np.ndarray]:
  """Window and place within it, int[cells] each, of every merged cell, row by row."""
  rows, cols = grid_hw[0] // grid.merge, grid_hw[1] // grid.merge
  r, c = np.divmod(np.arange(rows * cols), cols)
  side = grid.window
  across = -(-cols // side)
  window = (r // side) * across + c // side
  width = np.minimum(side, cols - c // side * side)  # ragged at the right edge
  return window, (r % side) * width + c % side


def layout(images: list[types.ImageInput | None], grid: Grid, count: int | None = None, least: tuple[int, int] = (1, 1)
           ) -> tuple[types.ImageBatch, list[np.ndarray]]:
  """Lays images out for the vision tower, padded to a bucket.

  Args:
    images: of any sizes; may be none.  None keeps a place empty.
    grid: patch geometry.
    count: pad with empty images up to this many; None for as many as there are, at least one.
    least: an `extent` that the bucket is to hold, beside the images.

  Returns:
    The batch (numpy leaves), and for each image int32[M]: where its merged tokens, row by row, stand in
    the vision tower's output put flat.  `bucket` says how large the batch is.

  Raises:
    ValueError: if there are more images than `count`.
  """
  count = max(1, len(images)) if count is None else count
  if len(images) > count:
    raise ValueError(f"images must be at most count={count} images. Received: {len(images)}")
  n_windows, n_cells = bucket(np.maximum(least, extent(images, grid)).tolist(), grid)
  per_cell = grid.merge ** 2
  shape = count, n_windows, n_cells * per_cell
  batch = types.ImageBatch(
      patches_IWQC=np.zeros((*shape, grid.values), np.float32),
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
  """What images are padded to: windows, and merged cells in each.

  Small images lie in one piece (windows = 1), rounded up to n^2 or n(n + 1) cells, at least 4, whatever their
  aspect; a mask keeps their windows apart.  Large ones, and small ones that fill their windows, are cut by
  window, so that attention costs only what is in a window: a power of two of whole windows.

  Args:
    most: windows and cells, as `extent` gives them.
    grid: patch geometry.
  """
  windows, cells = most
  cut = 1 << max(windows - 1, 1).bit_length(), grid.window ** 2
  if cells > ONE_PIECE_CELLS or cut[0] * cut[1] <= cells:
    return cut
  side = max(2, math.isqrt(cells - 1) + 1)
  return 1, side * (side - 1 if side > 2 and side * (side - 1) >= cells else side)
