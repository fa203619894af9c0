"""Trajectories become JSON that holds everything that a page shows."""

import base64
import io
import json
import math

import numpy as np
from PIL import Image
import pytest

from virl_jax import types
from virl_jax.report import gallery

_IDS = np.zeros(1, np.int32)


def _picture(width, height):
  """A picture whose red grows to the right and green downwards, by one for each pixel."""
  ramp = np.zeros((height, width, 3), np.uint8)
  ramp[..., 0] = np.arange(width) % 256
  ramp[..., 1] = np.arange(height)[:, None] % 256
  return Image.fromarray(ramp)


def _trajectory(boxes=((10, 20, 40, 60),)):
  turns = []
  for box in (types.Box(*box) for box in boxes):
    turns.append(types.Turn("assistant", _IDS, text="<tool_call>", region=box, written=tuple(box)))
    turns.append(types.Turn("tool", _IDS, text="<tool_response>", image_index=1))
  turns.append(types.Turn("assistant", _IDS, text="<answer>B</answer>", error="late"))
  task = types.Task("needle/1", b"", "Which?", ("B",), (types.Box(1, 2, 3, 4),), ("x", "y"), "pattern")
  return types.Trajectory(task, 7, _IDS, turns, [], types.StopReason.ANSWERED, "B", True)


def _decode(uri):
  head, data = uri.split(",", 1)
  return head, Image.open(io.BytesIO(base64.b64decode(data)))


def _entry(traj=None, image=None, ious=(0.5,), classes=("correct",), modulators=(1.5,), advantage=2.0,
           reward=1.0, parts=None):
  return gallery.entry(traj or _trajectory(), image or _picture(100, 80), ious, classes, modulators,
                       advantage, reward, parts)


def test_entry_holds_the_trajectory():
  item = _entry(parts={"answer": np.float32(1.0)})
  json.dumps(item, allow_nan=False)
  assert (item["uid"], item["rollout"], item["kind"], item["stop"]) == ("needle/1", 7, "pattern", "answered")
  assert (item["answer"], item["answers"], item["options"], item["correct"]) == ("B", ["B"], ["x", "y"], True)
  assert (item["width"], item["height"]) == (100, 80)
  assert item["boxes_gt"] == [[1, 2, 3, 4]] and item["boxes"] == [[10, 20, 40, 60]]
  assert (item["reward"], item["reward_parts"]) == (1.0, {"answer": 1.0})
  zoom, told, last = item["turns"]
  assert (zoom["iou"], zoom["class"], zoom["modulator"], zoom["advantage"]) == (0.5, "correct", 1.5, 3.0)
  assert (told["iou"], told["advantage"], told["crop"]) == (None, None, None)
  assert (last["advantage"], last["error"], last["class"]) == (2.0, "late", None)


def test_values_go_to_their_own_actions():
  item = _entry(_trajectory([(0, 0, 10, 10), (20, 20, 30, 30)]), ious=(0.1, 0.9),
                classes=("erroneous", "correct"), modulators=(0.5, 1.5))
  zooms = [turn for turn in item["turns"] if turn["box"]]
  assert [(z["box"][0], z["iou"], z["class"], z["advantage"]) for z in zooms] == [
      (0, 0.1, "erroneous", 1.0), (20, 0.9, "correct", 3.0)]


def test_crop_is_cut_from_the_original_pixels():
  _, crop = _decode(_entry(image=_picture(252, 200))["turns"][0]["crop"])
  assert crop.size == (30, 40)
  assert crop.getpixel((0, 0)) == (10, 20, 0) and crop.getpixel((29, 39)) == (39, 59, 0)


@pytest.mark.parametrize(("box", "size"), [
    ((-20, -10, 5, 6), (5, 6)), ((90.2, 70.5, 400, 400), (10, 10)), ((99.9, 0, 100, 1), (1, 1))])
def test_crop_stays_inside_the_picture(box, size):
  _, crop = _decode(_entry(_trajectory([box]))["turns"][0]["crop"])
  assert crop.size == size


@pytest.mark.parametrize("box", [(5, 5, 5, 5), (200, 200, 300, 300), (9, 9, 3, 3), (math.nan, 0, 5, 5)])
def test_a_box_without_pixels_has_no_crop(box):
  item = _entry(_trajectory([box]))
  assert item["turns"][0]["crop"] is None
  json.dumps(item, allow_nan=False)


def test_small_pictures_stay_lossless_and_large_ones_shrink():
  image = _picture(252, 200)
  head, small = _decode(_entry(image=image)["image"])
  assert head == "data:image/png;base64" and small.tobytes() == image.tobytes()
  head, large = _decode(_entry(image=_picture(2000, 1000))["image"])
  assert head == "data:image/jpeg;base64" and large.size == (640, 320)
  _, slightly = _decode(_entry(image=_picture(700, 350))["image"])
  assert slightly.size == (640, 320)
  item = _entry(_trajectory([(0, 0, 900, 450)]), _picture(2000, 1000))
  _, crop = _decode(item["turns"][0]["crop"])
  assert crop.size == (224, 112)
  _, thin = _decode(_entry(image=_picture(4000, 2))["image"])
  assert thin.size == (640, 1)


def test_outside_training_nothing_is_graded():
  item = gallery.entry(_trajectory(), _picture(30, 30).convert("L"), None, None, None, None, None, None)
  assert all(turn[k] is None for turn in item["turns"] for k in ("iou", "class", "modulator", "advantage"))
  assert item["reward"] is None and item["reward_parts"] is None


def test_tokens_have_their_own_numbers():
  """Only in the policy's turns, at their places after the prompt; if all tokens of a turn share a number, it is one."""
  letters = "é".encode()  # a character of two tokens
  pieces = [b"a", letters[:1], letters[1:], b"\xff", b"z"]
  decode = lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace")
  said = types.Turn("assistant", np.arange(5), np.float32([-1, -2, -3, -4, -5]) / 3, "a")
  traj = _trajectory()
  traj.prompt_ids, traj.turns = np.zeros(3, np.int32), [types.Turn("tool", np.zeros(2, np.int32)), said]
  at = np.arange(10, dtype=np.float32)
  trainer = np.concatenate([np.zeros(9), [np.nan]])
  told, said = gallery.entry(traj, _picture(30, 30), [], [], [], 1.0, 1.0, None, decode, {
      "advantage": at, "modulator": np.ones(10), "trainer": trainer})["turns"]
  assert "tokens" not in told
  assert said["tokens"] == {
      "text": ["a", "é", "", "\ufffd", "z"], "logp": [-0.3333, -0.6667, -1.0, -1.3333, -1.6667],
      "advantage": [5, 6, 7, 8, 9], "modulator": 1.0, "gap": [0.3333, 0.6667, 1.0, 1.3333, None]}
  assert "tokens" not in _entry()["turns"][0], "without a codec there are none"


@pytest.mark.parametrize("name", ["ious", "classes", "modulators"])
def test_lengths_must_agree(name):
  with pytest.raises(ValueError, match=f"{name} must have one element for each of the 1 visual actions.*2"):
    _entry(**{name: (0.5, 0.5)})


def test_save_and_load(tmp_path):
  path = str(tmp_path / "rollouts" / "step_000020.jsonl")
  item = _entry(reward=math.nan)
  item["question"] = "line\nbreak \ud800 é \u2028"
  gallery.save(path, [item, item])
  assert gallery.load(path) == [item, item]
  assert [p.name for p in (tmp_path / "rollouts").iterdir()] == ["step_000020.jsonl"]
  gallery.save(path, [])
  assert gallery.load(path) == []


def test_load_names_a_damaged_line(tmp_path):
  path = tmp_path / "before.jsonl"
  path.write_text('{}\n{"a\n')
  with pytest.raises(ValueError, match="line 2"):
    gallery.load(str(path))
