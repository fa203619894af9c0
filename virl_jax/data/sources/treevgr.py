"""TreeVGR-RL-37k: parquet files with boxes.

    *.parquet    images: [{bytes, path}], problem (or question), answer,
                 target_instances: [{bbox: [x1, y1, x2, y2], ...}]

Boxes are corners in pixels.  TreeBench is read too: its column of the same name is a text with a list of boxes.
"""

from __future__ import annotations

from collections.abc import Iterator
import functools
import json

from virl_jax.data.sources import fields
from virl_jax.data.sources import records
from virl_jax.data.sources import stream

NAME = "treevgr"
SPLITS = ("train", "val", "test")
LICENCE = ""
WANTED = "*.parquet (images, problem, answer, target_instances)"
_COLUMNS = ("answer", "target_instances")


def files(root: str, split: str) -> list[str]:
  """The parquet files of a split; see `stream.splits`.

  Raises:
    ValueError: there are none.
  """
  return stream.splits(root, split, "parquet", "TreeVGR's rows")


def read(root: str, split: str) -> Iterator[records.Raw | records.Reject]:
  """The rows.

  Raises:
    ValueError: there are no files, or one has another schema.
  """
  for path in files(root, split):
    yield from fields.raws(stream.rows(path, _COLUMNS), functools.partial(_record, root, path, split))


def _record(root, path, split, row, where):
  question, options = fields.question(row.get("problem") or row.get("question"))
  image = fields.picture(row.get("images") if row.get("images") is not None else row.get("image"))
  boxes = row["target_instances"]
  name = next((row[key] for key in ("id", "index", "qid") if row.get(key) is not None), None)
  return records.Raw(
      uid=where if name is None else str(name), image=fields.beside(root, path, image), question=question,
      answers=fields.answer(row["answer"], options), options=options,
      boxes=fields.box_lists(json.loads(boxes) if isinstance(boxes, str) else boxes), kind=NAME, source=NAME,
      split=split, licence=LICENCE)
