"""Images on the host: decoding, cropping, resizing, and the two frames.

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
from virl_jax.model import patches


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


def prepare(image: Image.Image, region: types.Box | None, min_pixels: int, max_pixels: int, grid: patches.Grid
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
  return types.ImageInput(patches.patchify(pixels, grid), (h // grid.patch, w // grid.patch), region)


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
