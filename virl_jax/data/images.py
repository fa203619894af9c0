"""Images on the host: decoding, cropping, resizing, and the two frames.

There are two frames of coordinates.  A `Box` is always in pixels of the original image.  The policy reads
and writes boxes in pixels of the image that it was shown (resized so that its sides are multiples of
28), which is Qwen2.5-VL's convention.  `to_shown` and `to_original` are the only conversions.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import io
import math
import struct
import warnings

import numpy as np
from PIL import ExifTags, Image

from virl_jax import checks
from virl_jax import types
from virl_jax.model import patches

# How an image is turned upright, by its EXIF orientation.  From 5 on, width and height are swapped.
_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}
_PNG_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # names of texts that may hold an orientation
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC = 256, 257, 258, 262  # TIFF tags


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
    ValueError: if the file is absent, is no image, is cut off, is too large, or has more than 8 bits of grey and it is
      unknown which value is white.
  """
  if isinstance(image, Image.Image):
    return image
  name = image if isinstance(image, str) else f"{len(image)} bytes"
  try:
    with _opened(image) as im:
      if im.width * im.height > max_pixels:
        raise ValueError(f"at most {max_pixels} pixels are decoded, it has {im.width} x {im.height}")
      _, turn = _upright(im)
      im.load()
      turned = im.format == "TIFF"  # Pillow turns these as it loads them
      im = _shallow(im)
      im = im if turn is None or turned else im.transpose(turn)
      if "A" in im.getbands() or "transparency" in im.info:
        im = im.convert("RGBA")
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
      return im.convert("RGB")
  except Exception as e:  # a decoder may raise anything on a damaged file: AVIF's raises RuntimeError
    raise ValueError(f"image must be a decodable file. Received: {name} ({e})") from e


def upright_size(image: bytes | str) -> tuple[int, int]:
  """Width and height, in pixels, of the picture that `decode` gives for a file, from the file's header.

  Args:
    image: the file's path, or its bytes.

  Raises:
    ValueError: if the file is absent, is no image, is too large for Pillow to open, or has more than 8 bits of grey and
      it is unknown which value is white.
  """
  try:
    with _opened(image) as im:
      _grey_bits(im)
      return _upright(im)[0]
  except Exception as e:
    name = image if isinstance(image, str) else f"{len(image)} bytes"
    raise ValueError(f"image must be a readable file. Received: {name} ({e})") from e


@contextlib.contextmanager
def _opened(image: bytes | str) -> Iterator[Image.Image]:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    with Image.open(image if isinstance(image, str) else io.BytesIO(image)) as im:
      yield im


def _upright(im: Image.Image) -> tuple[tuple[int, int], Image.Transpose | None]:
  """Width and height of the upright image of a file that was just opened, and how its pixels are turned to it.

  Pillow's `ImageOps.exif_transpose` does the same for an image that is loaded.
  """
  if im.format == "PNG" and _behind_pixels(im):
    im.load()
  # PNG's own method would always load the image.
  orientation = Image.Image.getexif(im).get(ExifTags.Base.Orientation)
  turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
  # A TIFF's size is already upright if a tag gives the orientation, but not if XMP does.
  size = (im.tag_v2[_WIDTH], im.tag_v2[_HEIGHT]) if im.format == "TIFF" else im.size
  return size[::-1] if turn is not None and orientation >= 5 else size, turn


def _behind_pixels(im: Image.Image) -> bool:
  """Whether a PNG has an orientation, or what may hold one, after its pixels, where Pillow sees it only on loading."""
  file, before, pixels, found = im.fp, im.fp.tell(), False, False
  file.seek(8)
  while len(head := file.read(8)) == 8:
    at, (length, kind) = file.tell(), struct.unpack(">I4s", head)
    if kind == b"IEND" or pixels and kind == b"fcTL" and im.is_animated:
      break
    pixels |= kind == b"IDAT"
    if pixels and (kind == b"eXIf" or kind in (b"tEXt", b"zTXt", b"iTXt") and length and
                   file.read(min(length, 80)).startswith(_PNG_ORIENTATION)):
      found = True
      break
    file.seek(at + length + 4)
  file.seek(before)
  return found


def _grey_bits(im: Image.Image) -> int | None:
  """How many bits the white of a deep grey image (more than 8 bits) has; None for any other image.

  Raises:
    ValueError: it is unknown which of its values is white.
  """
  if im.mode not in ("I", "F") and not im.mode.startswith("I;"):
    return None
  if im.mode == "F" or im.format not in ("PNG", "PPM", "TIFF", "JPEG2000") or im.format == "TIFF" and im.mode == "I":
    raise ValueError(f"grey of mode {im.mode} has no known white in {im.format}; store it in 8 or 16 bits")
  return im.tag_v2[_BITS][0] if im.format == "TIFF" else 16


def _shallow(im: Image.Image) -> Image.Image:
  """A loaded image of deep grey in 8 bits; any other as it is."""
  bits = _grey_bits(im)
  if bits is None:
    return im
  grey = np.asarray(im)
  pixels = (grey >> (bits - 8)).astype(np.uint8)
  if im.format == "TIFF" and im.tag_v2.get(_PHOTOMETRIC) == 0:  # white is 0, which Pillow handles for 8 bits only
    pixels = 255 - pixels
  out = Image.fromarray(pixels)
  if "transparency" in im.info:
    out.putalpha(Image.fromarray(np.where(grey == im.info["transparency"], 0, 255).astype(np.uint8)))
  return out


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
  """The shown size: sides multiples of `factor`, area within limits, aspect nearly kept.

  Args:
    height: original height, pixels.
    width: original width, pixels.
    factor: what the sides become multiples of, pixels.
    min_pixels: smallest area.
    max_pixels: largest area.

  Returns:
    (height, width) in pixels.  A very long image keeps at least one `factor` on its short side, and its
    long side is shortened until the area fits.

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
  """Crops, resizes and cuts into patches.

  Args:
    image: the original, RGB.
    region: what to show, in original pixels; None for everything.  Rounded outwards to whole pixels.
    min_pixels: smallest shown area.
    max_pixels: largest shown area.
    grid: patch geometry.

  Returns:
    The vision tower's input; its `region` is what was cut out, in whole pixels.
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
