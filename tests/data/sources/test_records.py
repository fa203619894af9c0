"""From what a reader yields to a task: repairs worked out by hand, reasons, and counts."""

import dataclasses
import json
import math
import re

from hypothesis import given
from hypothesis import strategies as st
import pytest

from virl_jax import types
from virl_jax.data.sources import records

PICTURE = records.Picture((100, 50), "ab" * 16)
RAW = records.Raw("q1", "a.jpg", "what is it?", ("cat",), ((10, 10, 20, 20),), kind="k", source="s", split="train",
                  licence="CC0")


def settle(**fields):
  return records.settle(dataclasses.replace(RAW, **fields), PICTURE)


@pytest.mark.parametrize("frame, box, kept, outcome", [
    ("corners", (0, 0, 100, 50), (0, 0, 100, 50), "ok"),
    ("corners", (-3, 10, 20, 60), (0, 10, 20, 50), "clipped"),
    ("corners", (90.5, 49, 100.01, 50), (90.5, 49, 100, 50), "clipped"),
    ("corners", (10, 50, 20, 60), None, "unusable"),     # wholly below: clipping alone would leave an empty box
    ("corners", (10, 1409, 20, 2512), None, "unusable"),  # and here an inverted one
    ("corners", (20, 10, 10, 20), None, "unusable"),
    ("corners", (10, 10, 10, 20), None, "unusable"),
    ("corners", (10, 10, math.nan, 20), None, "unusable"),
    ("corners", (10, 10, 20), None, "unusable"),
    ("corners", "1234", None, "unusable"),
    ("corners", ("1", "2", "3.5", "4"), (1, 2, 3.5, 4), "ok"),  # digits of a table
    ("corners", None, None, "unusable"),
    ("xywh", (10, 10, 20, 5), (10, 10, 30, 15), "ok"),
    ("xywh", (-1, -1, 20, 7), (0, 0, 19, 6), "clipped"),
    ("xywh", (10, 10, 0, 5), None, "unusable"),
    ("unit", (0.25, 0.5, 0.5, 1.0), (25, 25, 50, 50), "ok"),
    ("unit", (0.25, 0.5, 0.5, 1.2), (25, 25, 50, 50), "clipped")])
def test_boxes_by_hand(frame, box, kept, outcome):
  task, repairs = settle(boxes=(box,), frame=frame)
  assert task.boxes == (() if kept is None else (types.Box(*kept),)) and repairs == {outcome: 1}


def test_several_boxes_are_kept_apart():
  task, repairs = settle(boxes=((1, 1, 5, 5), (2, 2, 6, 6), (0, 60, 5, 70), (99, 0, 120, 5)))
  assert task.boxes == ((1, 1, 5, 5), (2, 2, 6, 6), (99, 0, 100, 5))
  assert repairs == {"ok": 2, "clipped": 1, "unusable": 1}


@given(st.lists(st.tuples(*[st.floats(-150, 250)] * 4), max_size=5), st.sampled_from(["corners", "xywh", "unit"]))
def test_what_is_kept_lies_within_the_image(boxes, frame):
  task, repairs = settle(boxes=tuple(boxes), frame=frame)
  assert sum(repairs.values()) == len(boxes) and len(task.boxes) == len(boxes) - repairs.get("unusable", 0)
  assert all(0 <= x1 < x2 <= 100 and 0 <= y1 < y2 <= 50 for x1, y1, x2, y2 in task.boxes)


def test_a_record_becomes_a_task():
  task, _ = settle(options=("dog", "cat"))
  assert task == types.Task("q1", "a.jpg", "what is it?", ("cat",), (types.Box(10, 10, 20, 20),), ("dog", "cat"), "k",
                            "exact", "s", "train", "CC0", task.provenance)
  assert len(task.provenance) == 32


def test_provenance_is_of_the_content_and_of_nothing_else():
  same = settle()[0].provenance
  for fields in ({"uid": "other"}, {"image": "b.jpg"}, {"source": "t"}, {"split": "val"}, {"kind": "j"},
                 {"boxes": ((10.0, 10, 20, 20),)}, {"boxes": ((10, 10, 10, 10),), "frame": "xywh"}):
    assert settle(**fields)[0].provenance == same, fields
  others = [settle(**fields)[0].provenance for fields in (
      {"question": "what?"}, {"answers": ("dog",)}, {"answers": ("cat", "cat")}, {"boxes": ()},
      {"options": ("cat", "dog")})]
  others.append(records.settle(RAW, records.Picture((100, 50), "cd" * 16))[0].provenance)
  assert len({same, *others}) == 7


@pytest.mark.parametrize("fields, reason, detail", [
    ({"question": " "}, "no question", "question: ' '"),
    ({"question": None}, "no question", "None"),
    ({"question": "\ud800"}, "no question", "ud800"),
    ({"answers": ("",)}, "bad answers", r"answers: \(''"),
    ({"answers": (3,)}, "bad answers", "3"),
    ({"match": "vqa", "answers": ("cat",)}, "answers that nobody can give", "by the rule vqa: .'cat'"),  # one person
    ({"match": "nonsense"}, "unknown rule", "match must be one of exact.*'nonsense'"),
    ({"options": ()}, "bad options", "1 to 26"),
    ({"options": ("cat", "")}, "bad options", "''"),
    ({"options": ("dog", "cow")}, "no answer among the options", "'cat'"),
    ({"answers": (), "boxes": ()}, "neither answers nor usable boxes", "boxes: "),
    ({"answers": (), "boxes": ((0, 60, 5, 70),)}, "neither answers nor usable boxes", "70"),
    ({"size_px": (50, 50)}, "image of another shape", "50 x 50 pixels, its image has 100 x 50"),
    ({"size_px": (0, 50)}, "image of another shape", "0 x 50")])
def test_what_can_not_be_used_is_named(fields, reason, detail):
  reject, _ = settle(**fields)
  assert isinstance(reject, records.Reject) and (reject.where, reject.reason) == ("q1", reason)
  assert re.search(detail, reject.detail), reject.detail


def test_boxes_for_another_size_of_the_same_picture_are_scaled():
  assert settle(size_px=(200, 100))[0].boxes == ((5, 5, 10, 10),)
  assert settle(size_px=(200, 100), boxes=((10, 10, 20, 20),), frame="xywh")[0].boxes == ((5, 5, 15, 15),)
  assert settle(size_px=(1000, 501))[0].boxes[0] == pytest.approx((1, 1, 2, 2), rel=0.01)  # rounded when it was resized
  assert settle(size_px=(50, 50), boxes=((0.1, 0.1, 0.2, 0.2),), frame="unit")[0].boxes == ((10, 5, 20, 10),)
  assert settle(size_px=(50, 50), boxes=())[0].boxes == ()  # nothing depends on it


def test_a_record_that_loses_its_boxes_stays_and_is_counted():
  counts = records.Counts()
  task, repairs = settle(boxes=((0, 60, 5, 70),))
  counts.add(task, repairs, {"from the answer": 1})
  counts.add(*settle())
  counts.add(*settle(boxes=((0, 0, 200, 20), (1, 1, 2, 2)), kind="j"))
  counts.add(*settle(boxes=()))
  counts.add(records.Reject("line 3", "broken line"))
  assert counts.to_dict() == {
      "records": 5, "tasks": 4, "boxes": {"ok": 2, "clipped": 1, "unusable": 1}, "rejects": {"broken line": 1},
      "notes": {"from the answer": 1, "tasks that lost all their boxes": 1},
      "kinds": {"j": {"clipped": 1, "ok": 1, "tasks": 1}, "k": {"ok": 1, "tasks": 3, "unusable": 1}}}


def test_counts_add_up_and_survive_json():
  parts = [records.Counts() for _ in range(3)]
  for i, part in enumerate(parts):
    part.add(*settle(kind=f"k{i % 2}"))
    part.add(records.Reject("x", "broken line" if i else "bad image"))
  whole = records.Counts()
  for part in parts:
    whole.merge(records.Counts.from_dict(json.loads(json.dumps(part.to_dict()))))
  assert whole.to_dict() == {
      "records": 6, "tasks": 3, "boxes": {"ok": 3, "clipped": 0, "unusable": 0},
      "rejects": {"bad image": 1, "broken line": 2}, "notes": {},
      "kinds": {"k0": {"ok": 2, "tasks": 2}, "k1": {"ok": 1, "tasks": 1}}}
