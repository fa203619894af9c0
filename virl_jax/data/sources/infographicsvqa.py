"""InfographicsVQA (rrc.cvc.uab.es, task 3): questions about infographics; boxes come from Visual-CoT.

    infographicsVQA_SPLIT_v1.0.json    data: questionId, question, image_local_name ("37313.jpeg"), answers
    infographicsvqa_images/            the pictures; or images/
"""

from __future__ import annotations

from collections.abc import Iterator

from virl_jax.data.sources import docvqa
from virl_jax.data.sources import fields
from virl_jax.data.sources import records
from virl_jax.data.sources import stream
from virl_jax.data.sources import visual_cot

NAME = "infographicsvqa"
SPLITS = ("train", "val", "test")
LICENCE = ""
WANTED = ("infographicsVQA_SPLIT_v1.0.json (or _withQT), infographicsvqa_images/ or images/; boxes: a folder of "
          "Visual-CoT")
MATCH = "anls"  # how its benchmark counts
_FIELDS = ("questionId", "question", "image_local_name")


def files(root: str, split: str, boxes_from: str = "") -> list[str]:
  """The annotation files of a split; with `boxes_from`, Visual-CoT's raw folder, also all of its files.

  Raises:
    ValueError: there are none.
  """
  found = stream.files(root, tuple(f"{folder}info*VQA_{split}_v1.0{mark}.json" for folder in ("", "*/")
                                   for mark in ("_withQT", "")), f"InfographicsVQA's {split} questions")
  return found[:1] + (visual_cot.all_files(boxes_from) if boxes_from else [])


def read(root: str, split: str, boxes_from: str = "") -> Iterator[records.Raw | records.Reject]:
  """The records of a split; arguments as for `textvqa.read`.

  Raises:
    ValueError: there are no files, or one is of another kind or ends early.
  """
  folder = stream.folder(root, ("infographicsvqa_images", "images", "infographicVQA_images"))
  yield from docvqa.read_rrc(files(root, split)[0], split, boxes_from, NAME, _FIELDS, MATCH,
                             lambda item: f"{folder}/{fields.text(item['image_local_name'])}")
