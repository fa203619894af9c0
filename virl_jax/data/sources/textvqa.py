"""TextVQA (textvqa.org): questions about text in photographs, ten answers each; boxes come from Visual-CoT.

    TextVQA_0.5.1_SPLIT.json            data: question_id, question, image_id, image_width, image_height, answers
    TextVQA_with_url_SPLIT_v0.1.json    the first release: image, question, 6 to 22 answers, no ids
    train_images/ID.jpg                 images of train and val; test_images/ of test

Boxes are joined by image and question, never by question id: files that LLaVA made have the image's id there.  All
answers are kept, with repeats and noise: the official rule counts them.
"""

from __future__ import annotations

from collections.abc import Iterator
import os

from virl_jax.data.sources import fields
from virl_jax.data.sources import records
from virl_jax.data.sources import stream
from virl_jax.data.sources import visual_cot

NAME = "textvqa"
SPLITS = ("train", "val", "test")
LICENCE = "CC BY 4.0"
WANTED = "TextVQA_0.5.1_SPLIT.json, train_images/; boxes: a folder of Visual-CoT"
MATCH = "vqa"  # how its benchmark counts


def files(root: str, split: str, boxes_from: str = "") -> list[str]:
  """The annotation files of a split; with `boxes_from`, Visual-CoT's raw folder, also all of its files.

  Raises:
    ValueError: there are none.
  """
  found = stream.files(root, (f"TextVQA_0.5.1_{split}.json", f"*/TextVQA_0.5.1_{split}.json",
                              f"TextVQA_with_url_{split}_v0.1.json"), f"TextVQA's {split} questions")
  return found[:1] + (visual_cot.all_files(boxes_from) if boxes_from else [])


def read(root: str, split: str, boxes_from: str = "") -> Iterator[records.Raw | records.Reject]:
  """The records of a split.

  Args:
    root: the raw folder.
    split: one of `SPLITS`.
    boxes_from: Visual-CoT's raw folder; "" for no boxes.

  Raises:
    ValueError: there are no files, or one is of another kind or ends early.
  """
  path = files(root, split)[0]
  boxes = visual_cot.boxes_by_question(boxes_from, NAME) if boxes_from else None
  is_old = "_with_url_" in os.path.basename(path)
  folder = stream.folder(root, ("test_images", "train_images") if split == "test" else (
      "train_images", "train_val_images/train_images", "images"))
  wanted = ("question", "image") if is_old else ("question", "image_id")
  yield from fields.raws(stream.listed(path, wanted, "data"),
                         lambda item, where: _record(item, where, split, boxes, folder))


def _record(item, where, split, boxes, folder):
  if item.get("set_name", split) != split:
    return records.Reject(where, "another split", f"wanted: {split}. Received: {item['set_name']!r}")
  name = fields.text(item["image_id"]) if "image_id" in item else os.path.splitext(os.path.basename(
      fields.text(item["image"])))[0]
  uid = item.get("question_id")
  asked = fields.text(item["question"])
  joined, size, notes = join(boxes, name, asked)
  if size is None and isinstance(item.get("image_width"), int) and isinstance(item.get("image_height"), int):
    size = (item["image_width"], item["image_height"])
  return records.Raw(
      uid=str(uid) if isinstance(uid, int) else where, image=f"{folder}/{name}.jpg", question=asked,
      answers=fields.texts(item.get("answers")), boxes=joined, match=MATCH, kind=NAME, source=NAME, split=split,
      licence=LICENCE, size_px=size, notes=notes)


def join(boxes: dict | None, image: str, question: str) -> tuple[tuple, tuple | None, dict[str, int]]:
  """A record's boxes in Visual-CoT, the size in pixels that they are for, and what is to be counted.

  Args:
    boxes: see `visual_cot.boxes_by_question`; None if there is no Visual-CoT.
    image: the image's name or path.
    question: the question.
  """
  if boxes is None:
    return (), None, {}
  found, size = boxes.get(visual_cot.join_key(image, question), ((), None))
  return found, size, {"joined with Visual-CoT" if found else "not in Visual-CoT": 1}
