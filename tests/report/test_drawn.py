"""A trajectory as a picture: its boxes where they are, and nothing that text could do to it."""

import numpy as np
from PIL import Image
import pytest

from virl_jax import types
from virl_jax.report import drawn
from virl_jax.report import gallery

IDS = np.zeros(1, np.int32)


def entry(side=(100, 80), classes=("correct", None), **task):
  task = {"uid": "u", "image": b"", "question": "Which?", "answers": ("B",),
          "boxes": (types.Box(50, 40, 90, 70),)} | task
  turns = [types.Turn("assistant", IDS, text="x", action="image_zoom_in_tool", region=types.Box(*box))
           for box in ((10, 20, 40, 60), (60, 10, 80, 30))]
  traj = types.Trajectory(types.Task(**task), 0, IDS, turns, [], types.StopReason.ANSWERED, "A", False)
  return gallery.entry(traj, Image.new("RGB", side, "black"), None, classes, None, None, None, None)


def test_boxes_are_where_they_are_and_have_their_class():
  seen = np.asarray(drawn.picture(entry()))
  assert seen.shape[1] == 320 and seen.shape[0] > 256, "enlarged, with words below"
  at = lambda x, y: "#" + seen[round(y * 3.2), round(x * 3.2)].tobytes().hex()
  assert at(25, 20.4) == drawn._COLOURS["correct"] and at(70, 10.3) == drawn._PLAIN and at(70, 40.4) == drawn._TRUTH
  assert at(25, 40) == at(5, 5) == "#000000"


def test_any_text_is_drawn_and_bounded():
  hostile = "<script>\x1b\u202e\ud800\u4e2d" + "x" * 10_000 + "\n" * 50
  big = drawn.picture(entry(question=hostile, answers=(), side=(640, 300)))
  small = drawn.picture(entry(side=(640, 300)))
  assert big.width == small.width == 640 and 300 < small.height < big.height < 300 + 9 * 14 + 6


def test_a_trajectory_without_boxes_or_answer():
  task = types.Task("u", b"", "Which?")
  traj = types.Trajectory(task, 0, IDS, [types.Turn("assistant", IDS, text="x")], [], types.StopReason.OVERLONG)
  item = gallery.entry(traj, Image.new("RGB", (9, 3)), None, None, None, None, None, None)
  assert drawn._caption(item) == ["Which?", "no answer: overlong"] and drawn.picture(item).width == 320


def test_pictures_beside_each_other():
  red, blue = Image.new("RGB", (10, 20), "red"), Image.new("L", (40, 40), 255)
  out = np.asarray(drawn.beside(red, blue, height_px=40))
  assert out.shape == (40, 20 + 12 + 40, 3), "each of its own shape, and a gap"
  assert (out[:, :20] == (255, 0, 0)).all() and (out[:, 20:] == 255).all()
  with pytest.raises(ValueError, match="beside needs a picture"):
    drawn.beside()
