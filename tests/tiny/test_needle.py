"""The needle task: reproducible, honest about its boxes, and unreadable unless one zooms."""

import collections
import dataclasses
import re
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from virl_jax import config
from virl_jax.data import images
from virl_jax.model import patches
from virl_jax.run import caches
from virl_jax.tiny import needle
from virl_jax.tiny import source

GRID = patches.Grid()
ALL = needle.Config(families=needle.FAMILIES, objects=(2, 4))


def test_a_picture_is_a_function_of_seed_stream_and_index():
  task, scene = needle.draw(3, "train", 17, ALL)
  for i in (5, 16, 18):
    needle.draw(3, "train", i, ALL)  # other pictures don't matter, nor does their order
  again, _ = needle.draw(3, "train", 17, ALL)
  assert again == task and task.uid == "train_000017"
  for other in (needle.draw(4, "train", 17, ALL), needle.draw(3, "test", 17, ALL), needle.draw(3, "train", 23, ALL)):
    assert other[0].image != task.image and not np.array_equal(other[1].pixels, scene.pixels)


def test_pictures_are_what_their_tasks_say():
  seen = collections.Counter()
  for i in range(60):
    task, scene = needle.draw(0, "test", i, ALL)
    family = needle.FAMILIES[i % len(needle.FAMILIES)]
    assert task.kind == family and scene.mark == family.rpartition("_")[2]
    assert scene.pixels.shape == (252, 252, 3) and scene.pixels.dtype == np.uint8
    assert 2 <= len(scene.things) <= 4
    colours = [t.colour for t in scene.things]
    assert len(set(colours)) == len(colours)
    for k, thing in enumerate(scene.things):
      b = thing.box
      assert 0 <= b.x1 < b.x2 <= 252 and 0 <= b.y1 < b.y2 <= 252
      assert 252 / 6 <= min(b.x2 - b.x1, b.y2 - b.y1) and max(b.x2 - b.x1, b.y2 - b.y1) <= 252 / 3.7
      assert thing.mark in needle.MARKS[scene.mark]
      # The middle of the box has the colour that the question will name, and no other object is near.
      middle = scene.pixels[int(b.y1) + 12:int(b.y2) - 12, int(b.x1) + 12:int(b.x2) - 12].mean((0, 1))
      near = min(needle.COLOURS, key=lambda c: np.abs(middle - needle.COLOURS[c]).sum())
      assert near == thing.colour, (thing, middle)
      for other in scene.things[:k]:
        o = other.box
        assert b.x2 <= o.x1 or o.x2 <= b.x1 or b.y2 <= o.y1 or o.y2 <= b.y1
    # The question names exactly the objects of the rationale boxes, or is about all.
    kind = family.rpartition("_")[0]
    named = [t for t in scene.things if kind == "count" or t.name in task.question]
    assert len(named) == {"": 1, "pair": 2, "count": len(scene.things)}[kind]
    assert set(task.boxes) == {t.box for t in named} and len(task.boxes) == len(named)
    want = named[0].mark if kind == "" else ("yes" if named[0].mark == named[1].mark else "no")
    if kind == "count":
      counted = re.match(r"How many carry the (?:pattern|dot colour|digit) (\w+)[?]", task.question)[1]
      want = str([t.mark for t in named].count(counted))
    assert task.answers == (want,)
    seen[family, want] += 1
    # The file holds the picture.
    decoded = np.asarray(images.decode(task.image), int)
    assert np.abs(decoded - scene.pixels).mean() < 4
  assert len(seen) > 12


def test_pair_answers_are_balanced_and_marks_are_even():
  rng, pairs, marks = np.random.default_rng(0), collections.Counter(), collections.Counter()
  for _ in range(400):
    # A scene drawn without its picture.
    things = [needle.Thing("red", "tile", str(m), (0, 0, 1, 1))
              for m in rng.choice(rng.choice(needle.PATTERNS, 3), 3)]
    scene = needle.Scene(None, tuple(things), "pattern")
    i, j = needle.choose_pair(scene, rng)
    assert i != j
    pairs[needle.ask_pair(scene, i, j).truth] += 1
  assert 0.35 < pairs["yes"] / 400 < 0.65
  pairs.clear()
  cfg = needle.Config(families=("pair_pattern", "pattern"), side_px=84)
  for i in range(600):
    task, scene = needle.draw(1, "train", i, cfg)
    if i % 2 == 0:
      pairs[task.answers[0]] += 1
    marks.update(t.mark for t in scene.things)
  assert 0.35 < pairs["yes"] / 300 < 0.65
  total = sum(marks.values())
  assert all(abs(marks[p] / total - 1 / 6) < 0.05 for p in needle.PATTERNS)


def test_questions_name_every_object_by_turns():
  scene = needle.draw_scene(np.random.default_rng(1), "dot", 4)
  for i, thing in enumerate(scene.things):
    question = needle.ask_one(scene, i)
    assert question.text == f"Which colour are the dots on the {thing.name}?" and question.truth == thing.mark
    assert question.targets == (thing,)


def test_counts_are_of_every_number_and_of_all_objects():
  rng, numbers = np.random.default_rng(0), collections.Counter()
  for _ in range(400):
    things = [needle.Thing(str(c), "tile", str(rng.choice(needle.PATTERNS[:4])), (0, 0, 1, 1))
              for c in rng.permutation(list(needle.COLOURS))[:5]]
    question = needle.ask_count(needle.Scene(None, tuple(things), "pattern"), rng)
    assert question.text == f"How many carry the pattern {question.counted}?"
    assert [t.colour for t in question.targets] == [c for c in needle.COLOURS if c in {t.colour for t in things}]
    assert set(question.targets) == set(things)
    numbers[question.truth] += 1
  assert set(numbers) >= set("123") and "0" not in numbers and max(numbers.values()) < 240
  assert question.answer(["unclear"] * 5) == "0" and question.answer([question.counted, "unclear"]) == "1"


@pytest.mark.parametrize("objects", [1, 8])
@pytest.mark.parametrize("side", [84, 252])
def test_crowded_and_small_pictures_can_be_drawn(objects, side):
  for seed in range(3):
    scene = needle.draw_scene(np.random.default_rng(seed), "digit", objects, side)
    assert len(scene.things) == objects and scene.pixels.shape == (side, side, 3)


@pytest.mark.parametrize("kwargs, message", [
    ({"families": ("pattern", "stripes")}, r"families must be one or more names out of.*\('pattern', 'stripes'\)"),
    ({"families": ()}, r"families must be one or more names out of.*Received: \(\)"),
    ({"objects": (3, 2)}, r"objects must be 1 <= fewest <= most <= 8.*\(3, 2\)"),
    ({"objects": (0, 2)}, "objects must be"), ({"objects": (2, 9)}, "objects must be"),
    ({"objects": (1, 2), "families": ("pair_dot",)}, r"objects must be 2 or more for pair families.*\(1, 2\)"),
    ({"test_size": 0}, "test_size must be at least 1, a whole number. Received: 0"),
    ({"side_px": 83}, "side_px must be at least 84, a whole number. Received: 83")])
def test_bad_configurations_are_named(kwargs, message):
  with pytest.raises(ValueError, match="data.needle." + message):
    needle.Config(**kwargs)


def test_defaults_are_the_configuration_s():
  assert needle.Config(**config.default().data.needle) == needle.Config()


# --- stored sets ------------------------------------------------------------------------------------

def test_guessable_pictures_are_in_the_train_split_alone():
  cfg = dataclasses.replace(FEW_PATTERNS, guessable=0.5)
  told = lambda stream, i, cfg: [needle.mark_of(t.colour, "pattern") == t.mark for t in
                                 needle.draw(0, stream, i, cfg)[1].things]
  guessed = [all(told("train", i, cfg)) for i in range(40)]
  assert 10 <= sum(guessed) <= 30
  assert sum(all(told("test", i, cfg)) for i in range(40)) <= 8
  for i in (guessed.index(False), guessed.index(True)):
    plain, drawn = needle.draw(0, "train", i, FEW_PATTERNS)[0], needle.draw(0, "train", i, cfg)[0]
    assert (plain.image == drawn.image) == (not guessed[i])  # the others are as they were
  with pytest.raises(ValueError, match="guessable must be a share"):
    needle.Config(guessable=1.5)


FEW_PATTERNS = needle.Config(families=("pattern",), side_px=84)
FEW = needle.Config(families=("pattern", "pair_dot"), train_size=5, test_size=3, seed=9)


def test_a_stored_set_is_what_was_drawn(tmp_path):
  train, test = (source.load(str(tmp_path), split, FEW) for split in ("train", "test"))
  assert (len(train), len(test)) == (5, 3) and train.describe() == "needle: 5 train pictures"
  for tasks, split in ((train, "train"), (test, "test")):
    for i in (2, 0, 1):
      assert tasks.task(i) == needle.draw(9, split, i, FEW)[0]
  assert train.task(4).uid == "train_000004"

  # Another configuration has its own folder, and reading again draws nothing.
  other = source.load(str(tmp_path), "test", needle.Config(families=("pattern",), train_size=2, test_size=2, seed=9))
  assert len(other) == 2 and len(source.load(str(tmp_path), "train", FEW)) == 5
  folders = sorted(p.name for p in tmp_path.iterdir())
  assert len(folders) == 2 and all(re.fullmatch("needle-[0-9a-f]{12}", f) for f in folders)
  stamp = lambda: {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*array_record*")}
  before = stamp()
  assert before and source.load(str(tmp_path), "test", FEW).task(1) == test.task(1) and stamp() == before


def test_runs_that_start_together_draw_the_same_set(tmp_path, monkeypatch):
  """Another run finishes drawing while this one draws, and an earlier one was interrupted."""
  from virl_jax.tiny import store
  draw, calls = store.Needle.download_and_prepare, []

  def slow(builder, *args, **kwargs):
    calls.append(builder)
    draw(builder, *args, **kwargs)
    if len(calls) == 1:
      assert len(source.load(str(tmp_path), "train", FEW)) == 5

  with monkeypatch.context() as m:
    def cut_off(builder):
      draw(builder)
      raise KeyboardInterrupt
    m.setattr(store.Needle, "download_and_prepare", cut_off)
    with pytest.raises(KeyboardInterrupt):
      source.load(str(tmp_path), "train", FEW)
  monkeypatch.setattr(store.Needle, "download_and_prepare", slow)
  tasks = source.load(str(tmp_path), "test", FEW)
  assert len(calls) == 2 and tasks.task(1) == needle.draw(9, "test", 1, FEW)[0]
  folder, = tmp_path.iterdir()
  assert [p.name for p in folder.iterdir()] == ["needle"]  # what the others drew is gone


def test_a_set_that_another_draws_meanwhile_is_read(tmp_path, monkeypatch):
  """Another run draws it between our looking for it and our reading it."""
  from virl_jax.tiny import store
  real, looked = store.Needle, []

  def builder(cfg, folder):
    made = real(cfg, folder)
    if not looked:
      looked.append(folder)
      source.load(str(tmp_path), "test", FEW)
    return made

  monkeypatch.setattr(store, "Needle", builder)
  assert len(source.load(str(tmp_path), "train", FEW)) == FEW.train_size and looked


def test_sets_go_to_the_cache_unless_told_otherwise(tmp_path, monkeypatch):
  monkeypatch.setenv("VIRL_JAX_CACHE", str(tmp_path / "cache"))
  assert len(source.load("", "test", FEW)) == 3
  assert [p.name[:7] for p in (tmp_path / "cache").iterdir()] == ["needle-"]
  monkeypatch.delenv("VIRL_JAX_CACHE")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  assert caches.folder() == tmp_path / "home" / ".cache" / "virl_jax"


def test_splits_must_exist(tmp_path):
  with pytest.raises(ValueError, match="'train' or 'test' with a size above 0. Received: 'validation'"):
    source.load(str(tmp_path), "validation", needle.Config(test_size=3))
  assert not list(tmp_path.iterdir())


def test_tensorflow_is_not_needed(tmp_path):
  """Neither drawing, storing nor reading imports it."""
  program = f"""
import sys
from virl_jax.tiny import needle, source
tasks = source.load({str(tmp_path)!r}, "test", needle.Config(train_size=2, test_size=2))
print(tasks.task(1).uid, "tensorflow" in sys.modules)
"""
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert done.stdout.split()[-2:] == ["test_000001", "False"]


# --- the probe --------------------------------------------------------------------------------------


def pixels_of(image: images.types.ImageInput) -> np.ndarray:
  """float[height, width, 3]: what the vision tower gets, as levels."""
  rows, cols = patches.merged_hw(image, GRID)
  x = image.patches_PC.reshape(rows, cols, 2, 2, 3, 14, 14).transpose(0, 2, 5, 1, 3, 6, 4)
  return x.reshape(28 * rows, 28 * cols, 3).astype(float)


def middle_of(pixels, box):
  """The middle of an object, clear of its edges."""
  cx, cy, w, h = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, 0.3 * (box[2] - box[0]), 0.3 * (box[3] - box[1])
  return pixels[int(cy - h):int(np.ceil(cy + h)) + 1, int(cx - w):int(np.ceil(cx + w)) + 1]


def texture(pixels):
  """Features of a texture: mean absolute differences in four directions, spread, skew, quantiles."""
  h, w, _ = pixels.shape
  out = []
  for lag in (1, 2):
    for dy, dx in ((0, lag), (lag, 0), (lag, lag), (lag, -lag)):
      here, there = pixels[dy:, max(dx, 0):w + min(dx, 0)], pixels[:h - dy, max(-dx, 0):w - max(dx, 0)]
      out.append(np.abs(here - there).mean((0, 1)))
  mean, std = pixels.mean((0, 1)), pixels.std((0, 1))
  quantiles = np.percentile(pixels, (2, 10, 25, 50, 75, 90, 98), axis=(0, 1)) - mean
  return np.concatenate([*out, *quantiles, ((pixels - mean) ** 3).mean((0, 1)) / (std + 1) ** 3, std, mean])


def where_fine(pixels):
  """float[196]: a map, 14 x 14, of how much neighbours differ in both diagonal directions."""
  grey = pixels.mean(-1)
  fine = np.abs(np.diff(grey[1:], axis=1) - np.diff(grey[:-1], axis=1)).clip(0, 127)
  return np.asarray(Image.fromarray(fine.astype(np.float32)).resize((14, 14), Image.Resampling.BOX)).ravel()


def held_out_accuracy(x, y, n_train):
  """The accuracy of ridge regression on one-hot targets, with the best of several penalties: generous to the probe."""
  x = (x - x[:n_train].mean(0)) / (x[:n_train].std(0) + 1e-6)
  x = np.concatenate([x, np.ones((len(x), 1))], 1)
  gram, cross = x[:n_train].T @ x[:n_train], x[:n_train].T @ np.eye(y.max() + 1)[y[:n_train]]
  guesses = [x[n_train:] @ np.linalg.solve(gram + penalty * np.eye(len(gram)), cross) for penalty in (0.1, 10, 1000)]
  return max(float((g.argmax(1) == y[n_train:]).mean()) for g in guesses)


@pytest.fixture(scope="module", params=["pattern", "dot", "digit"])
def probe(request):
  """Accuracies of probes that get the object's true box, on the shown image and on the true crop."""
  mark, n = request.param, 1000
  rng, raw, shown_texture, crop_texture, labels = np.random.default_rng(5), [], [], [], []
  while len(labels) < n:
    scene = needle.draw_scene(rng, mark, 4)
    image = images.decode(needle.encode(scene.pixels))
    shown = pixels_of(images.prepare(image, None, 3136, 84 * 84, GRID))
    assert shown.shape == (84, 84, 3)
    for thing in scene.things:
      box = [v / 3 for v in thing.box]
      x1, y1, x2, y2 = map(round, box)
      patch = Image.fromarray(np.rint(shown[y1:y2, x1:x2]).clip(0, 255).astype(np.uint8))
      raw.append(np.asarray(patch.resize((14, 14), Image.Resampling.BICUBIC), float).ravel())
      shown_texture.append([*texture(middle_of(shown, box)), *where_fine(shown[y1:y2, x1:x2])])
      crop = pixels_of(images.prepare(image, thing.box, 2 * 784, 6 * 784, GRID))
      assert crop.shape == (56, 56, 3)
      crop_texture.append([*texture(middle_of(crop, (0, 0, 56, 56))), *where_fine(crop)])
      labels.append(needle.MARKS[mark].index(thing.mark))
  raw, shown_texture, crop_texture, y = map(np.asarray, (raw, shown_texture, crop_texture, labels))
  score = lambda x: held_out_accuracy(x, y, 600)
  return mark, 1 / len(needle.MARKS[mark]), {
      "pixels": score(raw), "texture": score(shown_texture),
      "both": score(np.concatenate([raw, shown_texture], 1)), "crop": score(crop_texture)}


def test_marks_cannot_be_read_without_zooming(probe):
  mark, chance, found = probe
  for what in ("pixels", "texture", "both"):
    assert found[what] < chance + 0.12, (mark, found)


def test_marks_can_be_read_in_a_good_crop(probe):
  mark, chance, found = probe
  # A digit is stretched to its object's shape, which a linear probe cannot undo, but it still sees the digit.
  assert found["crop"] > (0.9 if mark != "digit" else 3 * chance), (mark, found)
