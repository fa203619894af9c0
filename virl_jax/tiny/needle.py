"""The needle task: marks that only a good zoom can read.

A picture holds a few coloured objects; each carries a mark made of fine texture with no mean contrast.
The policy is shown the picture at a third of its size, where every mark averages out to the object's
own colour; a crop of the object shows it.  The question names one or two objects by colour and shape, or is about all.

Families, easiest first (a policy of two million parameters learns the first two in minutes):
    pattern       which texture covers the object
    dot           which colour the fine dots on the object have
    digit         which digit is woven into the object's texture (hours, not minutes)
    pair_FAMILY   whether two objects carry the same mark; needs two zooms
    count_FAMILY  how many of the objects carry a mark; needs as many zooms as there are objects

`draw` is a pure function of its arguments.  `source.load` stores a set of drawings as array_record through
tensorflow-datasets, once, and reads tasks back; from there on a needle picture is an image file like any
photograph.  Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from virl_jax import checks
from virl_jax import types

# Channels stay within [64, 191], so that every texture can be balanced to no mean contrast.
COLOURS = {
    "red": (191, 64, 64), "green": (70, 165, 75), "blue": (70, 90, 191), "yellow": (191, 185, 64),
    "purple": (140, 64, 185), "orange": (191, 122, 64), "cyan": (64, 180, 191), "pink": (191, 115, 165),
}
SHAPES = ("tile", "disc")
PATTERNS = ("rows", "columns", "checks", "rising", "falling", "plain")
DOTS = {"white": (255, 255, 255), "black": (0, 0, 0), "red": (255, 0, 0), "green": (0, 200, 0),
        "blue": (0, 0, 255), "yellow": (255, 255, 0)}
DIGITS = tuple("0123456789")
MARKS = {"pattern": PATTERNS, "dot": tuple(DOTS), "digit": DIGITS}
FAMILIES = tuple(prefix + m for prefix in ("", "pair_", "count_") for m in MARKS)
_CONTRAST = {"pattern": 45, "digit": 34}   # standard deviation around the object's colour, levels
_PERIOD = 3        # of every texture, pixels: with no mean contrast, resizing to a third leaves nothing of it
_BLOTCH = 6.0      # standard deviation of blotches on digits' surfaces, levels: they hide what resizing leaves of edges
_LIGHT = 70        # how much the wall's red grows to the right, and its blue downwards, levels
_NOISE = 5.0       # standard deviation of the pixel noise, levels
VERSION = 3       # to be raised when `draw` changes: stored sets are named by it


@dataclasses.dataclass(frozen=True)
class Config:
  """What is drawn; see `config.py`, section `data.needle`.

  With `guessable` above 0, that share of the train split can be answered without a zoom: an object's mark follows
  from its colour.  Other splits never have such pictures.
  """

  families: tuple[str, ...] = ("pattern", "pair_pattern")
  objects: tuple[int, int] = (2, 4)
  side_px: int = 252
  train_size: int = 2048
  test_size: int = 512
  seed: int = 0
  guessable: float = 0.0

  def __post_init__(self):
    pair = lambda v: isinstance(v, (tuple, list)) and len(v) == 2 and all(type(n) is int for n in v)
    checks.section(vars(self), "data.needle", families=checks.some_of(FAMILIES, 1),
                   objects=(pair, "the fewest and the most objects, two whole numbers"), side_px=checks.whole(84),
                   train_size=checks.whole(1), test_size=checks.whole(1), seed=checks.whole(0, 2 ** 32 - 1),
                   guessable=checks.real(0, 1, wanted="a share in [0, 1]"))
    object.__setattr__(self, "families", tuple(self.families))
    object.__setattr__(self, "objects", tuple(self.objects))
    low, high = self.objects
    checks.need(1 <= low <= high <= len(COLOURS), "data.needle.objects", f"1 <= fewest <= most <= {len(COLOURS)}",
                self.objects)
    checks.need(low >= 2 or not any(f.startswith("pair_") for f in self.families), "data.needle.objects",
                "2 or more for pair families", self.objects)


@dataclasses.dataclass(frozen=True)
class Thing:
  """One object of a picture."""

  colour: str
  shape: str
  mark: str
  box: types.Box

  @property
  def name(self) -> str:
    return f"{self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked about a picture.

  Attributes:
    text: in words.
    targets: the objects that have to be looked at, in the order in which to do so.
    counted: the mark whose objects are to be counted; None for other questions.
  """

  text: str
  targets: tuple[Thing, ...]
  counted: str | None = None

  def answer(self, marks: Sequence[str]) -> str:
    """The answer that follows from the marks that were read on the targets."""
    if self.counted is not None:
      return str(list(marks).count(self.counted))
    return marks[0] if len(marks) == 1 else "yes" if marks[0] == marks[1] else "no"

  @property
  def truth(self) -> str:
    """The right answer."""
    return self.answer([t.mark for t in self.targets])


@dataclasses.dataclass(frozen=True)
class Scene:
  """A picture and what is in it.

  Attributes:
    pixels: uint8[side, side, 3], or None once they have been encoded.
    things: the objects.
    mark: the kind of mark that they carry, a key of `MARKS`.
  """

  pixels: np.ndarray
  things: tuple[Thing, ...]
  mark: str


def _texture(mark: str, kind: str, colour: np.ndarray, h: int, w: int, rng: np.random.Generator) -> np.ndarray:
  """float32[h, w, 3]: an object's surface; its mean is the object's colour, whatever the mark."""
  period = _PERIOD
  half = period // 2
  y, x = np.mgrid[:h, :w] + rng.integers(0, period, 2)[:, None, None]
  rows, columns, rising = y % period < half, x % period < half, (x + y) % period < half
  share = half / period
  surface = np.broadcast_to(colour, (h, w, 3)).astype(np.float32)
  if kind == "pattern":
    on = {"rows": rows, "columns": columns, "checks": rows ^ columns, "rising": rising,
          "falling": (x - y) % period < half}.get(mark)
    if on is None:
      return surface
    share = 2 * share * (1 - share) if mark == "checks" else share
    return surface + _CONTRAST[kind] * _balanced(on, share)[..., None]
  if kind == "dot":
    # Not quite black and white, so that noise is not cut off on one side.
    step = np.clip(np.asarray(DOTS[mark], np.float32), 15, 240) - colour
    share = share ** 2  # dots take the whole step, and all else makes up for it: no mean contrast
    return surface + np.where((rows & columns)[..., None], step, -step * share / (1 - share))
  # The glyph is made of whole cells of the texture, so that its edges have no mean contrast either.
  middle = [np.clip(v - v % period + half - v[0, 0], 0, n - 1) for v, n in ((y, h), (x, w))]
  surface += _CONTRAST[kind] * (_balanced(rising, share) * _glyph(mark, h, w)[tuple(middle)])[..., None]
  blotches = rng.normal(0, _BLOTCH, (-(-h // period), -(-w // period), 3)).astype(np.float32)
  return surface + blotches.repeat(period, 0).repeat(period, 1)[:h, :w]


def _balanced(on: np.ndarray, share: float) -> np.ndarray:
  """`on`, of which `share` is True, as numbers with mean 0 and standard deviation 1."""
  return (on - share) / np.sqrt(share * (1 - share))


@functools.cache
def _glyph(digit: str, h: int, w: int) -> np.ndarray:
  """bool[h, w]: a digit that fills most of the height."""
  canvas = Image.new("L", (w, h))
  font = ImageFont.load_default(size=round(0.8 * min(h, w)))
  ImageDraw.Draw(canvas).text((w / 2, h / 2), digit, fill=255, font=font, anchor="mm", stroke_width=1)
  return np.asarray(canvas) > 127


def _background(side: int, rng: np.random.Generator) -> np.ndarray:
  """float32[side, side, 3]: a dull wall, warm light from the right and cold light from below, grey clutter.

  The light always comes from there: it tells places apart for a vision tower that has no learned positions and
  only two million parameters to make up for that.
  """
  grey, tint = rng.uniform(115, 140), rng.uniform(-8, 8, 3).astype(np.float32)
  y, x = np.mgrid[:side, :side].astype(np.float32) / side - 0.5
  picture = np.float32(grey) + tint + _LIGHT * np.stack([x, np.zeros_like(x), y], -1)
  clutter = Image.new("L", (side, side), 128)
  pen = ImageDraw.Draw(clutter)
  for _ in range(rng.integers(0, 5)):
    a, b = rng.integers(0, side, 2), rng.integers(0, side, 2)
    shade = int(rng.integers(100, 157))
    if rng.random() < 0.5:
      pen.line([tuple(a), tuple(b)], fill=shade, width=int(rng.integers(2, 7)))
    else:
      pen.ellipse([*np.minimum(a, b), *np.maximum(a, b)], fill=shade)
  return picture + (np.asarray(clutter, np.float32) - 128)[..., None]


def _place(n: int, side: int, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
  """n boxes (x, y, w, h) in pixels, each somewhere in its own ninth of the picture."""
  cell = side // 3
  low, high = side // 6, round(side / 3.8)
  placed = []
  for at in rng.permutation(9)[:n]:
    row, column = divmod(int(at), 3)
    w, h = (int(v) for v in rng.integers(low, high + 1, 2))
    x = column * cell + int(rng.integers(0, cell - w + 1))
    y = row * cell + int(rng.integers(0, cell - h + 1))
    placed.append((x, y, w, h))
  return placed


def draw_scene(rng: np.random.Generator, mark: str, n_objects: int, side_px: int = 252, guessable: bool = False
               ) -> Scene:
  """Draws one picture.

  Args:
    rng: source of everything random.
    mark: a key of `MARKS`.
    n_objects: how many objects; all of different colours.
    side_px: side of the picture.
    guessable: whether an object's mark follows from its colour.
  """
  picture = _background(side_px, rng)
  colours = rng.permutation(list(COLOURS))[:n_objects]
  # Marks repeat often enough that "the same?" is a fair question.
  pool = rng.choice(MARKS[mark], size=max(2, n_objects), replace=True)
  things = []
  for colour, (x, y, w, h) in zip(colours, _place(n_objects, side_px, rng)):
    shape, sign = str(rng.choice(SHAPES)), str(rng.choice(pool))
    if guessable:
      sign = mark_of(str(colour), mark)
    base = np.clip(np.asarray(COLOURS[colour], np.float32) + rng.uniform(-8, 8, 3), 64, 191)
    surface = _texture(sign, mark, base, h, w, rng)
    where = np.ones((h, w), bool)
    if shape == "disc":
      v, u = (np.mgrid[:h, :w] + 0.5) / np.array([h, w])[:, None, None] * 2 - 1
      where = u * u + v * v <= 1
    patch = picture[y:y + h, x:x + w]
    patch[where] = surface[where]
    things.append(Thing(str(colour), shape, sign, types.Box(x, y, x + w, y + h)))
  picture += _NOISE * rng.standard_normal(picture.shape, np.float32)
  return Scene(np.rint(picture).clip(0, 255).astype(np.uint8), tuple(things), mark)


def mark_of(colour: str, mark: str) -> str:
  """The mark that goes with a colour on guessable pictures."""
  return MARKS[mark][list(COLOURS).index(colour) % len(MARKS[mark])]


def guess(question: Question, mark: str) -> str:
  """The answer that colours alone suggest: right on every guessable picture."""
  return question.answer([mark_of(t.colour, mark) for t in question.targets])


QUESTIONS = {"pattern": "Which pattern is on the {}?", "dot": "Which colour are the dots on the {}?",
              "digit": "Which digit is on the {}?"}
NOUNS = {"pattern": "pattern", "dot": "dot colour", "digit": "digit"}


def ask_one(scene: Scene, index: int) -> Question:
  """Which mark an object carries."""
  thing = scene.things[index]
  return Question(QUESTIONS[scene.mark].format(thing.name), (thing,))


def ask_pair(scene: Scene, i: int, j: int) -> Question:
  """Whether two objects carry the same mark."""
  a, b = scene.things[i], scene.things[j]
  return Question(f"Do the {a.name} and the {b.name} carry the same {NOUNS[scene.mark]}?", (a, b))


def ask_count(scene: Scene, rng: np.random.Generator) -> Question:
  """How many of the objects carry a mark that at least one carries; all counts that occur are equally likely.

  The question names no object to begin with, so the targets are in the order of `COLOURS`.
  """
  things = tuple(sorted(scene.things, key=lambda t: list(COLOURS).index(t.colour)))
  carried, by_number = [t.mark for t in things], {}
  for mark in sorted(set(carried)):
    by_number.setdefault(carried.count(mark), []).append(mark)
  counted = str(rng.choice(by_number[int(rng.choice(sorted(by_number)))]))
  return Question(f"How many carry the {NOUNS[scene.mark]} {counted}?", things, counted)


def encode(pixels: np.ndarray) -> bytes:
  """The picture as a JPEG file, fine enough for its textures."""
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, "JPEG", quality=92, subsampling=0)
  return out.getvalue()


def rng_for(seed: int, stream: str, index: int) -> np.random.Generator:
  """The generator of one picture: a pure function of its arguments."""
  return np.random.default_rng([seed, int.from_bytes(stream.encode()[:8], "big"), index])


def draw(seed: int, stream: str, index: int, cfg: Config) -> tuple[types.Task, Scene]:
  """Picture number `index` of a stream, with one question about it.

  Args:
    seed: of the set.
    stream: "train", "test" or any other name; streams are independent.
    index: which picture.
    cfg: what to draw.

  Returns:
    The task, and the scene behind it (for demonstrations and tests).
  """
  rng = rng_for(seed, stream, index)
  # From a separate generator, so that the other pictures are the same, whatever the share.
  guessable = stream == "train" and rng_for(seed, "guess", index).random() < cfg.guessable
  family = cfg.families[index % len(cfg.families)]
  kind, _, mark = family.rpartition("_")
  scene = draw_scene(rng, mark, int(rng.integers(cfg.objects[0], cfg.objects[1] + 1)), cfg.side_px, guessable)
  if kind == "pair":
    question = ask_pair(scene, *choose_pair(scene, rng))
  elif kind == "count":
    question = ask_count(scene, rng)
  else:
    question = ask_one(scene, int(rng.integers(len(scene.things))))
  return types.Task(f"{stream}_{index:06d}", encode(scene.pixels), question.text, (question.truth,),
                    tuple(t.box for t in question.targets), None, family), scene


def choose_pair(scene: Scene, rng: np.random.Generator) -> tuple[int, int]:
  """Two objects, equally often with the same mark and with different ones, where the picture allows it."""
  n = len(scene.things)
  pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
  same = [p for p in pairs if scene.things[p[0]].mark == scene.things[p[1]].mark]
  other = [p for p in pairs if p not in same]
  pool = same if same and (not other or rng.random() < 0.5) else other
  return pool[int(rng.integers(len(pool)))]
