"""Any Hugging Face dataset in parquet files, with the pictures inside or beside them.

    *.parquet    image: {bytes, path}, or images: a list of one; question (or problem); answer or answers; optionally
                 options or choices, boxes or bboxes or bbox (corners in pixels), id

Columns may have any of these names; others are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
import functools

from virl_jax.data.sources import fields
from virl_jax.data.sources import records
from virl_jax.data.sources import stream

NAME = "hf_parquet"
SPLITS = ("train", "val", "test")
LICENCE = ""
WANTED = "*.parquet (image or images, question or problem, answer or answers)"
_NAMES = {"image": ("image", "images"), "question": ("question", "problem", "query"),
          "answers": ("answers", "answer", "solution", "label"), "options": ("options", "choices"),
          "boxes": ("boxes", "bboxes", "bboxs", "bbox"), "id": ("id", "question_id", "uid", "qid")}


def files(root: str, split: str) -> list[str]:
  """The parquet files of a split; see `stream.splits`.

  Raises:
    ValueError: there are none.
  """
  return stream.splits(root, split, "parquet", "a dataset's rows")


def read(root: str, split: str) -> Iterator[records.Raw | records.Reject]:
  """The rows.

  Raises:
    ValueError: there are no files, or one lacks a column of pictures, questions or answers.
  """
  for path in files(root, split):
    yield from fields.raws(_named(stream.rows(path, ()), path), functools.partial(_record, root, path, split))


def _record(root, path, split, got, where):
  question, options = fields.question(got["question"])
  if got.get("options"):
    options = fields.texts(got["options"])
  return records.Raw(
      uid=where if got.get("id") in (None, "") else str(got["id"]),
      image=fields.beside(root, path, fields.picture(got["image"])), question=question,
      answers=fields.answer(_label(got["answers"], options), options), options=options or None,
      boxes=fields.box_lists(got.get("boxes")), kind=NAME, source=NAME, split=split, licence=LICENCE)


def _named(rows, path):
  """Where each row is, and the row by field instead of by column."""
  names = None
  for where, row in rows:
    names = names or _names(row, path)
    yield where, {field: row[name] for field, name in names.items()}


def _names(row, path):
  """The column of each field that the row has."""
  found = {field: next((name for name in names if name in row), None) for field, names in _NAMES.items()}
  for field in ("image", "question", "answers"):
    if found[field] is None:
      raise ValueError(f"{path} must have a column {' or '.join(_NAMES[field])}. Received: {', '.join(row)}")
  return {field: name for field, name in found.items() if name}


def _label(value, options):
  """The answer; a whole number becomes the option of that index, from 0, if there are options."""
  if options and isinstance(value, int) and not isinstance(value, bool) and str(value) not in options:
    if not 0 <= value < len(options):
      raise fields.Unusable("no answer among the options",
                            f"an index below {len(options)} is wanted. Received: {value}")
    return options[value]
  return value
