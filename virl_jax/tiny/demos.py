"""Demonstrations of the zoom protocol on needle pictures, from careful to clumsy.  Source: ours.

A demonstrator knows where the objects are.  It zooms into what the question names, says what it reads in
the crop, and answers.  With `noise` it zooms as a poor policy does: too loosely, off centre, at times into
the wrong object; if it cannot read a mark, it calls it unclear, may try once more, and then guesses.  With `p_direct`
it answers some questions without looking, as the colours suggest.  To count, it looks at every object once, in order
of colour, and says each time what it reads, how many it has counted, and which colour is next.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from virl_jax import types
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.model import patches
from virl_jax.rollout.actions import zoom
from virl_jax.tiny import needle

# A mark is readable if a crop holds at least _COVERAGE of the object, with at least _SCALE shown pixels for each pixel
# of the picture.
_COVERAGE = 0.6
# What is learned: all turns; all but clumsy zooms; no zooms, only the answers, which say what crops show.
LEARN = ("all", "careful", "reading")
_UNCLEAR = "unclear"
_SCALE = 0.9


@dataclasses.dataclass(frozen=True)
class Config:
  """How clumsy the demonstrations are.

  Attributes:
    p_wrong: chance that a noisy zoom goes to another object or nowhere.
    loose: each side of a noisy box moves out by up to this share of the object's side.
    shift: standard deviation of a noisy box's centre, share of the object's side.
    jitter: standard deviation of each side of a careful box, share of the object's side.
    p_retry: chance to zoom once more on a mark that was unclear.
    p_direct: chance to answer at once, without a zoom, with `needle.guess`.
    p_count: chance that a lesson's question is how many objects carry a mark.
  """

  p_wrong: float = 0.2
  loose: float = 0.6
  shift: float = 0.15
  jitter: float = 0.01
  p_retry: float = 0.6
  p_direct: float = 0.0
  p_count: float = 0.0


@dataclasses.dataclass(frozen=True)
class Voice:
  """What turns words into tokens: shared by every demonstration."""

  codec: prompt.Codec
  prompt: prompt.Config
  image: images.Config
  grid: patches.Grid


def _careful_box(target: types.Box, rng, cfg: Config) -> types.Box:
  w, h = target.x2 - target.x1, target.y2 - target.y1
  return types.Box(*(np.asarray(target) + rng.normal(0, cfg.jitter, 4) * [w, h, w, h]))


def _clumsy_box(target: types.Box, others: list[types.Box], side: int, rng, cfg: Config) -> types.Box:
  if rng.random() < cfg.p_wrong:
    if others and rng.random() < 0.7:
      target = others[int(rng.integers(len(others)))]
    else:
      x, y = rng.uniform(0, 0.7 * side, 2)
      target = types.Box(x, y, x + 0.2 * side, y + 0.2 * side)
  w, h = target.x2 - target.x1, target.y2 - target.y1
  dx, dy = rng.normal(0, cfg.shift, 2) * [w, h]
  out = rng.uniform(0, cfg.loose, 4) * [-w, -h, w, h]
  return types.Box(*(np.asarray(target) + [dx, dy, dx, dy] + out))


def _integer_box(box: types.Box, region: types.Box, shown: tuple[int, int]) -> tuple[int, int, int, int]:
  """The box as a policy writes it: whole pixels of the shown image, inside it, at least 4 wide."""
  x1, y1, x2, y2 = (round(v) for v in images.to_shown(box, region, shown))
  x1, y1 = min(max(x1, 0), shown[0] - 4), min(max(y1, 0), shown[1] - 4)
  return x1, y1, max(min(x2, shown[0]), x1 + 4), max(min(y2, shown[1]), y1 + 4)


def _readable(crop: types.ImageInput, target: types.Box, grid: patches.Grid) -> bool:
  r = crop.region
  overlap = (max(0.0, min(r.x2, target.x2) - max(r.x1, target.x1))
             * max(0.0, min(r.y2, target.y2) - max(r.y1, target.y1)))
  covered = overlap / ((target.x2 - target.x1) * (target.y2 - target.y1))
  w, h = patches.shown_wh(crop, grid)
  return covered >= _COVERAGE and min(w / (r.x2 - r.x1), h / (r.y2 - r.y1)) >= _SCALE


def _thought(question: needle.Question, read: list[str], ahead: needle.Thing | None) -> str:
  """The words about the last crop; if objects are counted, also the number so far and the next one's colour."""
  words = read[-1:]
  if question.counted is not None:
    words += [question.answer(read)] * bool(read) + ([ahead.colour] if ahead else [])
  return " ".join(words)


def demonstrate(scene: needle.Scene, question: needle.Question, image, shown: types.ImageInput, noise: float,
                learn: str, rng, voice: Voice, cfg: Config) -> types.Trajectory:
  """One demonstration.

  Args:
    scene: the picture's objects.
    question: what is asked.
    image: the picture, PIL.
    shown: the picture as the policy is shown it.
    noise: chance that a zoom is clumsy.
    learn: what is trained on, one of `LEARN`; the rest is only context.
    rng: source of everything random.
    voice: tokens.
    cfg: how clumsy.

  Returns:
    A trajectory; turns that are to be learned have zero log-probabilities, the others None.
  """
  grid, codec = voice.grid, voice.codec
  targets, answer, counts = question.targets, question.truth, question.counted is not None
  task = types.Task("demo", b"", question.text, (answer,), tuple(t.box for t in targets), None, scene.mark)
  traj = types.Trajectory(task, 0, codec.encode(prompt.render(question.text, None, voice.prompt),
                                                (patches.vision_tokens(shown, grid),)), images=[shown])
  size = patches.shown_wh(shown, grid)

  def say(text, box=None, learned=True):
    ids = codec.encode(text + prompt.END)
    traj.turns.append(types.Turn("assistant", ids, np.zeros(len(ids), np.float32) if learned else None, text,
                                 zoom.NAME if box else None, box))

  if cfg.p_direct and rng.random() < cfg.p_direct:
    answer, targets = needle.guess(question, scene.mark), ()
  read, said = [], []  # the mark that was read for each target in the end, and for each crop
  for target in targets:
    others = [t.box for t in scene.things if t is not target]
    for _ in range(2 if learn == "all" and not counts else 1):
      clumsy = rng.random() < noise
      box = (_clumsy_box(target.box, others, image.width, rng, cfg) if clumsy
             else _careful_box(target.box, rng, cfg))
      written = _integer_box(box, shown.region, size)
      actual = images.to_original(written, shown.region, size)
      say(prompt.call_text(zoom.call(written), _thought(question, said, target)), actual,
          learn == "all" or (learn == "careful" and not clumsy))
      crop = images.prepare(image, actual, voice.image.crop_min_pixels, voice.image.crop_max_pixels, grid)
      traj.images.append(crop)
      ids = codec.encode(prompt.tool_turn(), (patches.vision_tokens(crop, grid),))
      traj.turns.append(types.Turn("tool", ids, image_index=len(traj.images) - 1))
      clear = _readable(crop, target.box, grid)
      said.append(target.mark if clear else _UNCLEAR)
      if clear or rng.random() >= cfg.p_retry:
        break
    read.append(said[-1])
  if _UNCLEAR in read and counts:
    answer = question.answer(read)
  elif _UNCLEAR in read:
    answer = str(rng.choice(needle.MARKS[scene.mark] if len(targets) == 1 else ("yes", "no")))
  say(prompt.answer_text(answer, _thought(question, said, None)))
  traj.stop, traj.answer, traj.correct = types.StopReason.ANSWERED, answer, answer == question.truth
  return traj


@dataclasses.dataclass(frozen=True)
class Picture:
  """A drawn scene, ready to be shown.

  Attributes:
    scene: what is in it, without its pixels.
    image: the picture, PIL.
    shown: the picture as the policy is shown it.
  """

  scene: needle.Scene
  image: Image.Image
  shown: types.ImageInput


def picture(rng: np.random.Generator, marks: tuple[str, ...], objects: tuple[int, int], side_px: int, voice: Voice
            ) -> Picture:
  """Draws a picture for a lesson.

  Args:
    rng: source of everything random.
    marks: kinds of marks to draw, keys of `needle.MARKS`.
    objects: fewest and most objects.
    side_px: of the picture.
    voice: for the pixel limits.
  """
  scene = needle.draw_scene(rng, str(rng.choice(marks)), int(rng.integers(objects[0], objects[1] + 1)), side_px)
  image = images.decode(needle.encode(scene.pixels))
  scene = dataclasses.replace(scene, pixels=None)  # thousands of pictures are kept
  return Picture(scene, image, images.prepare(image, None, voice.image.min_pixels, voice.image.max_pixels, voice.grid))


def lesson(seen: Picture, rng: np.random.Generator, questions: int, noise: float, learn: str, voice: Voice,
           cfg: Config, turns: int | None = None) -> list[types.Trajectory]:
  """Several demonstrations on one picture: its objects asked about in turn, every third a comparison, some a count.

  Args:
    seen: the picture.
    rng: source of everything random.
    questions: how many demonstrations.
    noise, learn: see `demonstrate`.
    voice: tokens.
    cfg: how clumsy.
    turns: how many turns of each are kept; None for all.
  """
  scene, out = seen.scene, []
  order = rng.permutation(len(scene.things))
  for q in range(questions):
    if cfg.p_count and rng.random() < cfg.p_count:
      asked = needle.ask_count(scene, rng)
    elif len(scene.things) > 1 and q % 3 == 2:
      asked = needle.ask_pair(scene, *needle.choose_pair(scene, rng))
    else:
      asked = needle.ask_one(scene, int(order[q % len(order)]))
    demo = demonstrate(scene, asked, seen.image, seen.shown, noise, learn, rng, voice, cfg)
    if turns is not None:
      del demo.turns[turns:]
      del demo.images[1 + sum(t.image_index is not None for t in demo.turns):]
    out.append(demo)
  return out
