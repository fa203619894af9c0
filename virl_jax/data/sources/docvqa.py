"""DocVQA (rrc.cvc.uab.es, task 1): questions about scanned pages, each with several spellings of the answer.

    SPLIT_v1.0.json or SPLIT_v1.0_withQT.json    data: questionId, question, image ("documents/NAME.png"), answers
    documents/ or spdocvqa_images/               the pages

It has no boxes; they can be joined from Visual-CoT by image and question.
"""

from __future__ import annotations

from collections.abc import Iterator

from virl_jax.data.sources import fields
from virl_jax.data.sources import records
from virl_jax.data.sources import stream
from virl_jax.data.sources import textvqa
from virl_jax.data.sources import visual_cot

NAME = "docvqa"
SPLITS = ("train", "val", "test")
LICENCE = ""
WANTED = "SPLIT_v1.0.json (or _withQT), documents/ or spdocvqa_images/; boxes: a folder of Visual-CoT"
MATCH = "anls"  # how its benchmark counts
_FIELDS = ("questionId", "question", "image")


def files(root: str, split: str, boxes_from: str = "") -> list[str]:
  """The annotation files of a split; with `boxes_from`, Visual-CoT's raw folder, also all of its files.

  Raises:
    ValueError: there are none.
  """
  found = stream.files(root, (f"{split}_v1.0_withQT.json", f"{split}_v1.0.json", f"*/{split}_v1.0_withQT.json",
                              f"*/{split}_v1.0.json"), f"DocVQA's {split} questions")
  return found[:1] + (visual_cot.all_files(boxes_from) if boxes_from else [])


def read(root: str, split: str, boxes_from: str = "") -> Iterator[records.Raw | records.Reject]:
  """The records of a split; arguments as for `textvqa.read`.

  Raises:
    ValueError: there are no files, or one is of another kind or ends early.
  """
  folder = stream.folder(root, ("documents", "spdocvqa_images"))
  yield from read_rrc(files(root, split)[0], split, boxes_from, NAME, _FIELDS, MATCH,
                      lambda item: f"{folder}/{fields.text(item['image']).removeprefix('documents/')}")


def read_rrc(path: str, split: str, boxes_from: str, name: str, wanted: tuple[str, ...], match: str, image
             ) -> Iterator[records.Raw | records.Reject]:
  """The records of a file in the layout of DocVQA and InfographicsVQA.

  Args:
    path: of the file.
    split: its name; records of another one are rejected.
    boxes_from: Visual-CoT's raw folder; "" for no boxes.
    name: of the source.
    wanted: the fields that are needed.
    match: the rule for answers.
    image: item -> path of its image, relative to the raw folder.
  """
  boxes = visual_cot.boxes_by_question(boxes_from, name) if boxes_from else None
  def record(item, _where):
    if item.get("data_split", split) != split:
      raise fields.Unusable("another split", f"wanted: {split}. Received: {item['data_split']!r}")
    asked, file = fields.text(item["question"]), image(item)
    joined, size, notes = textvqa.join(boxes, file, asked)
    kinds = fields.texts(item.get("question_types"))
    return records.Raw(
        uid=fields.text(item["questionId"]), image=file, question=asked, answers=fields.texts(item.get("answers")),
        boxes=joined, match=match, kind=f"{name}_{kinds[0]}" if kinds else name, source=name, split=split,
        licence=LICENCE, size_px=size, notes=notes)

  yield from fields.raws(stream.listed(path, wanted, "data"), record)
