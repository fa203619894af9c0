"""Records of your own, as `sources/jsonl.py` describes them, a line at a time.

    *.jsonl    image, question, answers; optionally boxes, options, id, task, match, source, split, licence

Images are relative to the folder of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
import functools
import os

from virl_jax.data.sources import fields
from virl_jax.data.sources import records
from virl_jax.data.sources import stream

NAME = "jsonl"
SPLITS = ("train", "val", "test")
LICENCE = ""
WANTED = "*.jsonl, or the path of one: lines of {image, question, answers, boxes ...}"
_FIELDS = ("image", "question", "answers")


def files(root: str, split: str) -> list[str]:
  """The files of a split, see `stream.splits`; or `root`, if it is a file.

  Raises:
    ValueError: there are none.
  """
  return [root] if os.path.isfile(root) else stream.splits(root, split, "jsonl", "records")


def read(root: str, split: str) -> Iterator[records.Raw | records.Reject]:
  """The records.

  Raises:
    ValueError: there are no files, or one is of another kind.
  """
  for path in files(root, split):
    folder = os.path.dirname(path) if os.path.isfile(root) else root
    yield from fields.raws(stream.objects(stream.lines(path), path, _FIELDS),
                           functools.partial(_record, folder, path, split))


def _record(folder, path, split, item, where):
  word = lambda name, default: item[name] if records.is_text(item.get(name)) else default
  name = item.get("id")
  return records.Raw(
      uid=where if name is None else str(name), image=fields.beside(folder, path, fields.picture(item["image"])),
      question=fields.text(item["question"]), answers=fields.texts(item["answers"]),
      boxes=fields.box_lists(item.get("boxes")), options=fields.texts(item.get("options")) or None,
      match=word("match", "exact"), kind=word("task", NAME), source=word("source", NAME), split=word("split", split),
      licence=word("licence", LICENCE))
