"""Pixel-Reasoner's RL data: JSON, or the parquet files of its release.

    *.json or *.parquet    question, image: PATH or [PATH ...], is_video, answer: text or [text], qid
    images/                the pictures; or the folder of the file

Videos are rejected.  There are no boxes.
"""

from __future__ import annotations

from collections.abc import Iterator
import functools
import os

from virl_jax.data.sources import fields
from virl_jax.data.sources import records
from virl_jax.data.sources import stream

NAME = "pixel_reasoner"
SPLITS = ("train", "val", "test")
LICENCE = ""
WANTED = "*.json, lists or lines of {question, image, answer}, or *.parquet; images/"
_FIELDS = ("question", "image")


def files(root: str, split: str) -> list[str]:
  """The files of a split; see `stream.splits`.

  Raises:
    ValueError: there are none.
  """
  return stream.splits(root, split, "parquet json jsonl", "Pixel-Reasoner's records")


def read(root: str, split: str) -> Iterator[records.Raw | records.Reject]:
  """The records.

  Raises:
    ValueError: there are no files, or one is of another kind or ends early.
  """
  for path in files(root, split):
    base = fields.beside(root, path, "")
    folder = stream.folder(root, (os.path.join(base, "images"), base or "."))
    yield from fields.raws(stream.any_objects(path, _FIELDS), functools.partial(_record, folder, split))


def _record(folder, split, item, where):
  if item.get("is_video"):
    raise fields.Unusable("a video", f"one image is wanted. Received: {str(item['image'])[:100]}")
  question, options = fields.question(item["question"])
  image = fields.picture(item["image"])
  if isinstance(image, str) and not os.path.isabs(image):
    image = os.path.normpath(os.path.join(folder, image))
  answers = next((item[name] for name in ("answer", "ground_truth", "solution") if item.get(name)), None)
  name = item.get("qid")
  return records.Raw(
      uid=where if name in (None, "") else str(name), image=image, question=question,
      answers=fields.answer(answers, options), options=options, kind=NAME, source=NAME, split=split, licence=LICENCE)
