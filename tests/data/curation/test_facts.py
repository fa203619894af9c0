"""Facts of tasks: coverage against counting pixels, near-duplicates against a slow loop, kinds of answers."""

import io
import json

import numpy as np
from PIL import Image
import pytest

from virl_jax import types
from virl_jax.data import images
from virl_jax.data.curation import facts


def photo(seed: int, size=(320, 240)) -> Image.Image:
  """A picture with structure, different for each seed."""
  rough = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
  return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)


def saved(picture: Image.Image, kind="PNG", **how) -> bytes:
  out = io.BytesIO()
  picture.save(out, kind, **how)
  return out.getvalue()


def task(**fields) -> types.Task:
  return types.Task(**{"uid": "t", "image": saved(photo(0)), "question": "What is it?", "answers": ("red",),
                       "boxes": (types.Box(10, 10, 60, 50),), "source": "s", "provenance": "0" * 32} | fields)


@pytest.mark.parametrize("boxes", [
    [], [(0, 0, 40, 30)], [(0, 0, 10, 10), (10, 0, 20, 10)], [(0, 0, 10, 10), (5, 5, 15, 15)],
    [(0, 0, 10, 10)] * 3, [(-9, -9, 5, 5), (35, 25, 99, 99)], [(1, 1, 30, 20), (5, 0, 9, 30), (2, 2, 3, 3)]])
def test_coverage_counts_each_pixel_once(boxes):
  seen = np.zeros((30, 40), bool)
  for x1, y1, x2, y2 in boxes:
    seen[max(y1, 0):y2, max(x1, 0):x2] = True
  assert facts.coverage([types.Box(*box) for box in boxes], (40, 30)) == pytest.approx(seen.mean())


def test_coverage_of_random_boxes():
  rng = np.random.default_rng(0)
  for _ in range(50):
    corners = [(*np.minimum(a, b), *np.maximum(a, b)) for a, b in rng.integers(0, 31, (rng.integers(1, 7), 2, 2))]
    seen = np.zeros((30, 30), bool)
    for x1, y1, x2, y2 in corners:
      seen[y1:y2, x1:x2] = True
    assert facts.coverage([types.Box(*map(float, c)) for c in corners], (30, 30)) == pytest.approx(seen.mean())


@pytest.mark.parametrize("change", [
    lambda p: p.resize((200, 150)), lambda p: Image.open(io.BytesIO(saved(p, "JPEG", quality=30))).convert("RGB"),
    lambda p: p.crop((2, 2, 318, 238)), lambda p: Image.fromarray(np.asarray(p) // 2 + 62)],
    ids=["smaller", "compressed", "trimmed", "greyer"])
def test_a_picture_saved_again_is_near(change):
  looks = [facts.look(photo(seed)) for seed in range(40)] + [facts.look(change(photo(3)))]
  near = set(facts.near(looks, 10, 40.0))
  assert (3, 40) in near and len(near) == 1, "and to nothing else"


def test_near_is_what_a_slow_loop_finds():
  rng = np.random.default_rng(1)
  looks = []
  for _ in range(60):  # clusters of hashes that differ in a few bits
    bits, thumb = int(rng.integers(0, 2 ** 63)), rng.integers(0, 255, 768).astype(np.uint8)
    for _ in range(4):
      turned = bits
      for bit in rng.integers(0, 64, rng.integers(0, 7)):
        turned ^= 1 << int(bit)
      looks.append(facts.Look((1, 1), turned, np.clip(thumb + rng.integers(0, 9), 0, 255).astype(np.uint8).tobytes()))
  apart = lambda a, b: np.abs(np.frombuffer(a.thumb, np.uint8).astype(int) - np.frombuffer(b.thumb, np.uint8)).mean()
  for distance, difference in ((0, 255.0), (3, 255.0), (6, 4.0), (8, 0.0)):
    want = {(i, j) for i in range(len(looks)) for j in range(i + 1, len(looks))
            if (looks[i].hash ^ looks[j].hash).bit_count() <= distance and apart(looks[i], looks[j]) <= difference}
    assert want and set(facts.near(looks, distance, difference)) == want


@pytest.mark.parametrize("fields, kind", [
    ({"answers": ()}, "none"), ({"answers": ("B",), "options": ("a", "b")}, "option"),
    ({"answers": ("Yes",)}, "yes_no"),
    ({"answers": ("no.", "No")}, "yes_no"), ({"answers": ("12",)}, "number"), ({"answers": ("1,200 km",)}, "number"),
    ({"answers": ("$5.30", "5.3")}, "number"), ({"answers": ("7%",)}, "number"),
    ({"answers": ("12", "twelve")}, "text"),
    ({"answers": ("red",)}, "text"), ({"answers": ("yes", "red")}, "text")])
def test_answer_types(fields, kind):
  assert facts.answer_type(task(**fields)) == kind


@pytest.mark.parametrize("question, kind", [
    ("What is it?", "what"), ("HOW MANY are there", "how many"), ("How old is he?", "how"), ("Is it red?", "yes/no"),
    ("  Does it?", "yes/no"), ("Name it.", "other"), ("", "other"), ("Whatever", "other"), ("“Which” one?", "which")])
def test_question_types(question, kind):
  assert facts.question_type(question) == kind


def test_facts_of_a_task_as_json_and_back():
  boxes = (types.Box(0, 0, 160, 120), types.Box(160, 120, 200, 140))
  it = facts.of(task(boxes=boxes, answers=("dark red", "red")), 2 ** 64 - 1, images.Config(max_pixels=56 * 56), 28)
  assert it.look.size_px == (320, 240) and it.answer_chars == 3 and it.attainable and not it.problem
  assert it.coverage == pytest.approx((160 * 120 + 40 * 20) / (320 * 240))
  h, w = images.smart_resize(240, 320, 28, 3136, 56 * 56)
  assert it.least_box_px == pytest.approx(40 * 20 * h * w / (320 * 240))
  assert facts.Facts.from_json(json.loads(json.dumps(it.to_json()))) == it


def test_a_picture_that_is_none():
  it = facts.of(task(image=b"no picture"), 0, images.Config(), 28)
  assert "decodable file" in it.problem and it.look is None and " object at" not in it.problem
  assert facts.Facts.from_json(json.loads(json.dumps(it.to_json()))) == it


@pytest.mark.parametrize("box, said", [
    ((5, 5, 5, 50), "no area"), ((300, 5, 400, 50), "lies outside the picture of 320 x 240"),
    ((0, 0, 4, 90), "side of 4 px"), ((0, 0, 320, 9), "36 times as long"), ((float("nan"), 0, 9, 90), "no area"),
    ((0, 0, 320.5, 240.5), "")])
def test_boxes_that_cannot_be_zoomed_into(box, said):
  cfg = images.Config(crop_max_aspect=30.0)
  found = facts.of(task(boxes=(types.Box(0, 0, 30, 30), types.Box(*box))), 0, cfg, 28).box_problem
  assert said in found and bool(found) == bool(said)
