"""Files of every kind, the pixels of the reference implementation, and the two frames."""

import io
import math
import struct
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
import pytest

from virl_jax import config
from virl_jax import types
from virl_jax.data import images
from virl_jax.model import patches

GRID = patches.Grid()
LIMITS = images.Config()


def file_of(image, fmt="PNG", **kwargs):
  out = io.BytesIO()
  image.save(out, fmt, **kwargs)
  return out.getvalue()


def noise(h, w, seed=0):
  return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


# --- decoding ---------------------------------------------------------------------------------------


def test_plain_files_come_back_pixel_for_pixel(tmp_path):
  picture = noise(20, 31)
  (tmp_path / "a.png").write_bytes(file_of(picture))
  for image in (file_of(picture), file_of(picture, "BMP"), str(tmp_path / "a.png")):
    found = images.decode(image)
    assert found.mode == "RGB" and found.size == (31, 20)
    np.testing.assert_array_equal(found, picture)


def test_photographs_are_turned_upright():
  # Stored: red on the left, blue on the right.
  pixels = np.zeros((8, 16, 3), np.uint8)
  pixels[:, :8], pixels[:, 8:] = (255, 0, 0), (0, 0, 255)
  stored = Image.fromarray(pixels)
  for orientation, size, red in ((1, (16, 8), (0, 4)), (3, (16, 8), (15, 4)), (6, (8, 16), (4, 0)),
                                 (8, (8, 16), (4, 15))):
    exif = stored.getexif()
    exif[0x0112] = orientation
    found = images.decode(file_of(stored, "PNG", exif=exif))
    assert found.size == size and found.getpixel(red) == (255, 0, 0), orientation


def chunk(kind, data):
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(chunks, behind, image):
  """A PNG with further chunks, before or after its pixels."""
  file = file_of(image)
  at = file.rindex(b"IEND") - 4 if behind else file.index(b"IDAT") - 4
  return file[:at] + chunks + file[at:]


def turned_files(orientation):
  """One picture, in every way that a file can say how it is turned."""
  image, exif = noise(20, 40).resize((80, 40)), Image.Exif()
  exif[ExifTags.Base.Orientation] = orientation
  block = exif.tobytes()
  xmp = (b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation)
  hidden = xmp.replace(b'="%d"/>' % orientation, b">%d</rdf:Description>" % orientation).replace(
      b"<rdf:Description tiff:Orientation>", b"<rdf:Description><tiff:Orientation>")
  raw = b"\nexif\n%8d\n%s\n" % (len(block), block.hex().encode())
  two = io.BytesIO()
  image.save(two, "MPO", save_all=True, append_images=[image], exif=exif)
  for fmt in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
    yield f"EXIF in {fmt}", file_of(image, fmt, exif=exif)
  for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits") if orientation in range(1, 9) else ():  # libtiff refuses
    yield f"tag in {how}", file_of(image, "TIFF", tiffinfo={274: orientation}, compression=how)
  yield "MPO", two.getvalue()
  for fmt in ("JPEG", "WEBP", "AVIF"):
    yield f"XMP in {fmt}", file_of(image, fmt, xmp=xmp)
  yield "XMP in TIFF", file_of(image, "TIFF", tiffinfo={700: xmp})
  for behind in (False, True):
    where = "behind" if behind else "before"
    yield f"eXIf {where}", png_with(chunk(b"eXIf", block.removeprefix(b"Exif\0\0")), behind, image)
    for name, text in (("attribute", xmp), ("element", hidden)):
      itxt = b"XML:com.adobe.xmp\0\0\0\0\0" + text
      yield f"XMP {name} in iTXt {where}", png_with(chunk(b"iTXt", itxt), behind, image)
    for kind, body in ((b"tEXt", raw), (b"zTXt", b"\0" + zlib.compress(raw))):
      data = b"Raw profile type exif\0" + body
      chunks = chunk(b"tEXt", b"date:create\0x") + chunk(kind, data)
      yield f"raw profile in {kind} {where}", png_with(chunks, behind, image)
  yield "no word of it", file_of(image)
  yield "no word of it behind", png_with(chunk(b"tEXt", b"date:create\0x"), True, image)


@pytest.mark.parametrize("orientation", range(10))
def test_size_and_turn_are_told_as_pillow_tells_them_of_the_loaded_image(orientation, tmp_path):
  path, swapped = tmp_path / "image", []
  for name, file in turned_files(orientation):
    with Image.open(io.BytesIO(file)) as im:
      im.load()
      want = ImageOps.exif_transpose(im).convert("RGB")
    path.write_bytes(file)
    assert images.upright_size(str(path)) == want.size, name
    np.testing.assert_array_equal(images.decode(file), want, err_msg=name)
    swapped.append(want.size == (40, 80))
  assert sum(swapped) == (len(swapped) - 2 if 5 <= orientation <= 8 else 0)


def test_what_is_too_large_is_refused_before_its_pixels_are_looked_behind(monkeypatch):
  file = png_with(chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0\0\0\0\0"), True, noise(20, 30))
  assert images.decode(file).size == (30, 20)
  monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("its pixels were read"))
  with pytest.raises(ValueError, match="at most 599 pixels are decoded, it has 30 x 20"):
    images.decode(file, max_pixels=599)


def test_the_size_is_read_without_the_pixels(tmp_path):
  (tmp_path / "cut.png").write_bytes(file_of(noise(300, 400))[:500])
  assert images.upright_size(str(tmp_path / "cut.png")) == (400, 300)
  for bad in ("absent.png", "cut.txt"):
    (tmp_path / "cut.txt").write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"image must be a readable file. Received: .*{bad}"):
      images.upright_size(str(tmp_path / bad))


WHITE, RED, PINK = (255, 255, 255), (200, 0, 0), (227, 127, 127)  # pink: red at half opacity on white


def transparency_cases():
  half = Image.new("RGBA", (4, 1), (200, 0, 0, 128))
  half.putpixel((0, 0), (0, 0, 0, 0))
  half.putpixel((1, 0), (200, 0, 0, 255))
  palette = Image.new("P", (4, 1), 1)
  palette.putpalette([9, 9, 9, 200, 0, 0])
  palette.putpixel((0, 0), 0)
  grey = Image.new("LA", (4, 1), (100, 255))
  grey.putpixel((0, 0), (0, 0))
  keyed = Image.new("RGB", (4, 1), RED)
  keyed.putpixel((0, 0), (1, 2, 3))
  return {
      "RGBA": (file_of(half), [WHITE, RED, PINK, PINK]),
      "palette": (file_of(palette, transparency=0), [WHITE, RED, RED, RED]),
      "palette GIF": (file_of(palette, "GIF", transparency=0), [WHITE, RED, RED, RED]),
      "grey": (file_of(grey), [WHITE] + [(100,) * 3] * 3),
      "one colour is transparent": (file_of(keyed, transparency=(1, 2, 3)), [WHITE, RED, RED, RED]),
  }


@pytest.mark.parametrize("kind", transparency_cases())
def test_transparency_lies_on_white(kind):
  file, want = transparency_cases()[kind]
  found = images.decode(file)
  assert found.mode == "RGB"
  np.testing.assert_allclose(np.asarray(found)[0].astype(int), want, atol=1)


def test_other_modes():
  ramp = np.arange(0, 250, 10, dtype=np.uint8)[None]
  three = np.repeat(ramp[..., None], 3, -1)
  np.testing.assert_array_equal(images.decode(file_of(Image.fromarray(ramp))), three)
  for fmt in ("PNG", "TIFF"):
    deep = Image.fromarray(ramp.astype(np.uint16) * 256 + 77)
    assert deep.mode == "I;16"
    np.testing.assert_array_equal(images.decode(file_of(deep, fmt)), three, err_msg=fmt)
  bits = Image.fromarray(ramp > 100)
  np.testing.assert_array_equal(np.asarray(images.decode(file_of(bits)))[0, :, 0] > 0, ramp[0] > 100)
  cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))  # red ink
  found = np.asarray(images.decode(file_of(cmyk, "JPEG")))[2, 2]
  assert found[0] > 200 and found[1] < 60 and found[2] < 60


DEEP = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
SHALLOW = [0, 0, 1, 128, 255]


def tiff_of(samples, bits, photometric=1, sample_format=1):
  """A little-endian TIFF of one strip; `samples` as stored."""
  h, w = samples.shape
  data = samples.tobytes() if bits > 12 else bytes.fromhex("".join(f"{v:03x}" for v in samples.ravel()))
  tags = [(256, w), (257, h), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, h),
          (279, len(data)), (339, sample_format)]
  entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
  return (b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4))


def deep_cases():
  pgm = lambda most, values, kind=b"P5": kind + b" 5 1 %d\n" % most + values
  keyed = file_of(Image.fromarray(DEEP))
  at = keyed.index(b"IDAT") - 4
  return {
      "PNG": (file_of(Image.fromarray(DEEP)), SHALLOW),
      "PNG with a transparent grey": (keyed[:at] + chunk(b"tRNS", b"\x80\x00") + keyed[at:], [0, 0, 1, 255, 255]),
      "PGM": (pgm(65535, DEEP.astype(">u2").tobytes()), SHALLOW),
      "PGM of 10 bits": (pgm(1023, np.array([0, 3, 4, 512, 1023], ">u2").tobytes()), [0, 0, 1, 128, 255]),
      "PGM in words": (pgm(65535, b"0 255 256 32768 65535\n", b"P2"), SHALLOW),
      "TIFF": (tiff_of(DEEP.astype("<u2"), 16), SHALLOW),
      "TIFF of Pillow's": (file_of(Image.fromarray(DEEP), "TIFF"), SHALLOW),
      "TIFF, big-endian": (file_of(Image.frombytes("I;16B", (5, 1), DEEP.astype(">u2").tobytes()), "TIFF"), SHALLOW),
      "TIFF, deflated": (file_of(Image.fromarray(DEEP), "TIFF", compression="tiff_adobe_deflate"), SHALLOW),
      "TIFF where 0 is white": (tiff_of(DEEP.astype("<u2"), 16, photometric=0), [255 - v for v in SHALLOW]),
      "TIFF of 12 bits": (tiff_of(np.array([[0, 15, 16, 2048, 4095, 0]]), 12), [0, 0, 1, 128, 255, 0]),
      "JPEG 2000": (file_of(Image.fromarray(DEEP), "JPEG2000"), SHALLOW),
  }


@pytest.mark.parametrize("kind", deep_cases())
def test_deep_grey_is_scaled(kind):
  file, want = deep_cases()[kind]
  found = images.decode(file)
  assert found.mode == "RGB"
  np.testing.assert_array_equal(np.asarray(found), np.repeat(np.array(want)[None, :, None], 3, -1))


@pytest.mark.parametrize("kind", ["int32", "uint32", "int16", "float32", "PFM"])
def test_deep_grey_whose_white_nobody_knows_is_refused(kind, tmp_path):
  ramp = np.array([[0, 1, 200, 255, 256, 70000]])
  file = {"int32": lambda: tiff_of(ramp.astype("<i4"), 32, sample_format=2),
          "uint32": lambda: tiff_of(ramp.astype("<u4"), 32),
          "int16": lambda: tiff_of(ramp.astype("<i2"), 16, sample_format=2),
          "float32": lambda: tiff_of(ramp.astype("<f4"), 32, sample_format=3),
          "PFM": lambda: b"Pf 6 1 -1.0\n" + ramp.astype("<f4").tobytes()}[kind]()
  with Image.open(io.BytesIO(file)) as im:
    assert im.mode in ("I", "F") and im.size == (6, 1)
  with pytest.raises(ValueError, match="has no known white in (TIFF|PPM); store it in 8 or 16 bits"):
    images.decode(file)
  (tmp_path / "grey").write_bytes(file)
  with pytest.raises(ValueError, match="has no known white"):
    images.upright_size(str(tmp_path / "grey"))


def test_deep_grey_is_turned_too():
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6
  for fmt in ("PNG", "TIFF"):
    found = images.decode(file_of(Image.fromarray(DEEP), fmt, exif=exif))
    assert found.size == (1, 5) and [found.getpixel((0, y))[0] for y in range(5)] == SHALLOW, fmt


def test_the_first_frame_of_an_animation_counts():
  file = file_of(Image.new("RGB", (5, 5), RED), "GIF", save_all=True, append_images=[Image.new("RGB", (5, 5))])
  assert images.decode(file).getpixel((2, 2)) == RED


def huge_png(side):
  """A valid header that promises side x side pixels, and nothing after it."""
  chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
          + chunk(b"IDAT", zlib.compress(b"\0" * 1000)))


@pytest.mark.parametrize("image, message", [
    (b"", "0 bytes"), (b"not an image at all", "19 bytes"), (b"\x89PNG\r\n\x1a\n", "8 bytes"),
    (file_of(noise(40, 40))[:900], "900 bytes"), (file_of(noise(40, 40), "JPEG")[:600], "600 bytes"),
    (huge_png(5000), "at most 1000000 pixels are decoded, it has 5000 x 5000"),
    (huge_png(100_000), "bomb"), (file_of(noise(1001, 1000)), "1000 x 1001"),
    ("no/such/file.png", "no/such/file.png"), (".", r"Received: \. ")])
def test_what_is_no_picture_is_named(image, message):
  with pytest.raises(ValueError, match=f"^image must be a decodable file.*{message}"):
    images.decode(image, 1_000_000)


@hypothesis.given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "AVIF"]),
                  st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6), st.floats(0.5, 1))
def test_damaged_files_give_a_picture_or_a_value_error(fmt, edits, keep):
  if fmt == "AVIF" and ".avif" not in Image.registered_extensions():
    fmt = "PNG"
  file = bytearray(file_of(noise(16, 16), fmt))
  for where, byte in edits:
    file[int(where * where * (len(file) - 1))] = byte  # squared: most changes are in the header
  try:
    assert images.decode(bytes(file[:math.ceil(keep * len(file))]), 10_000).mode == "RGB"
  except ValueError as e:
    assert "image must be a decodable file" in str(e)


# --- resizing and pixels ----------------------------------------------------------------------------


sides = st.integers(1, 5000)
FACTOR = 28


@hypothesis.given(sides, sides, st.sampled_from([(3136, 7056), (1568, 3136), (3136, 1003520), (784, 784)]))
def test_shown_sizes_keep_to_the_limits(h, w, limits):
  low, high = limits
  found = images.smart_resize(h, w, FACTOR, low, high)
  assert all(v % FACTOR == 0 and v >= FACTOR for v in found)
  area = found[0] * found[1]
  rounded = [max(FACTOR, round(v / FACTOR) * FACTOR) for v in (h, w)]
  if rounded[0] * rounded[1] > high:
    assert area <= high
    scale = math.sqrt(high / (h * w))
    longest = high // FACTOR // FACTOR * FACTOR
    assert all(f + FACTOR >= min(v * scale, longest) - 1e-6 for f, v in zip(found, (h, w)))
  elif rounded[0] * rounded[1] >= low:
    assert found == tuple(rounded)
  else:
    assert area >= low
  # If the picture is turned, so is the result.
  assert images.smart_resize(w, h, FACTOR, low, high) == found[::-1]
  # A long side never ends up shorter than the short one.
  assert (found[0] - found[1]) * (h - w) >= 0


@hypothesis.given(st.integers(15, 3000), st.integers(15, 3000),
                  st.sampled_from([(3136, 1003520), (3136, 12845056), (3136, 7056)]))
def test_shown_sizes_are_the_reference_s(h, w, limits):
  reference = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
  hypothesis.assume(max(h, w) <= 200 * min(h, w))
  want = reference.smart_resize(h, w, FACTOR, *limits)
  if want[0] * want[1] <= limits[1]:  # the reference overshoots on long thin pictures
    assert images.smart_resize(h, w, FACTOR, *limits) == want


@pytest.mark.parametrize("h, w, limits, want", [
    (100, 100, (3136, 1003520), (112, 112)), (42, 42, (3136, 1003520), (56, 56)),  # 1.5 rounds to the even 2
    (70, 70, (3136, 1003520), (56, 56)),  # and so does 2.5
    (1, 1, (3136, 1003520), (56, 56)), (252, 252, (3136, 7056), (84, 84)), (4000, 3000, (3136, 1003520), (1148, 840)),
    (8, 200, (1568, 3136), (28, 112)), (10_000, 10, (3136, 7056), (252, 28))])
def test_shown_sizes_by_hand(h, w, limits, want):
  assert images.smart_resize(h, w, FACTOR, *limits) == want


@pytest.mark.parametrize("h, w", [(0, 5), (5, -1)])
def test_sides_must_be_positive(h, w):
  with pytest.raises(ValueError, match=f"must be positive. Received: {h} x {w}"):
    images.smart_resize(h, w, FACTOR, 3136, 7056)


@pytest.mark.parametrize("h, w, limits", [
    (84, 84, (3136, 7056)), (252, 252, (3136, 7056)), (123, 301, (3136, 1003520)), (20, 40, (3136, 1003520)),
    (400, 60, (3136, 12845056)), (57, 99, (1568, 3136)), (60, 500, (3136, 7056))])
def test_pixels_are_the_reference_s(h, w, limits):
  module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
  picture = noise(h, w, h)
  reference = module.Qwen2VLImageProcessorPil(min_pixels=limits[0], max_pixels=limits[1])
  want = reference(images=[picture], return_tensors="np")
  found = images.prepare(picture, None, *limits, GRID)
  assert [1, *found.grid_hw] == want["image_grid_thw"][0].tolist()
  np.testing.assert_array_equal(patches.normalised(found.patches_PC, GRID), want["pixel_values"])


def test_crops_are_cut_from_the_original_and_rounded_outwards():
  picture = noise(100, 200)
  found = images.prepare(picture, types.Box(10.2, 20.9, 66.1, 76.0), 3136, 1003520, GRID)
  assert found.region == types.Box(10, 20, 67, 76)
  want = images.prepare(picture.crop((10, 20, 67, 76)), None, 3136, 1003520, GRID)
  np.testing.assert_array_equal(found.patches_PC, want.patches_PC)
  for region in (types.Box(-5, -5, 300, 300), None):
    assert images.prepare(picture, region, 3136, 1003520, GRID).region == types.Box(0, 0, 200, 100)
  assert images.prepare(picture, types.Box(199.5, 99.9, 200, 100), 3136, 7056, GRID).region == (199, 99, 200, 100)
  assert patches.merged_hw(found, GRID) == (2, 2) and patches.shown_wh(found, GRID) == (56, 56)


# --- frames -----------------------------------------------------------------------------------------


@st.composite
def frames(draw):
  number = st.floats(-1e4, 1e4, allow_nan=False)
  x, y, w, h = draw(number), draw(number), draw(st.floats(1, 1e4)), draw(st.floats(1, 1e4))
  shown = (28 * draw(st.integers(1, 100)), 28 * draw(st.integers(1, 100)))
  return types.Box(x, y, x + w, y + h), shown, types.Box(*draw(st.tuples(number, number, number, number)))


@hypothesis.given(frames())
def test_there_and_back_is_the_same_box(case):
  region, shown, box = case
  there = images.to_shown(box, region, shown)
  size = max(map(abs, (*region, *box, 1.0)))
  np.testing.assert_allclose(images.to_original(there, region, shown), box, atol=1e-9 * size)
  np.testing.assert_allclose(images.to_shown(region, region, shown), (0, 0, *shown), atol=1e-9 * size * max(shown))


def test_frames_by_hand():
  region, shown = types.Box(100, 50, 300, 100), (400, 200)  # twice as large across, four times down
  assert images.to_shown(types.Box(150, 60, 200, 75), region, shown) == (100, 40, 200, 100)
  assert images.to_original((100, 40, 200, 100), region, shown) == types.Box(150, 60, 200, 75)


def test_defaults_are_the_configuration_s():
  assert images.Config(**config.default().image) == LIMITS
