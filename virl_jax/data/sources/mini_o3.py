"""VisualProbe, as Mini-o3 trains on it: a JSON list.

    *.json    [{images: [PATH], problem: "<image>...", solution, doc_id, data_source}]

Images are relative to the folder of the file.  There are no boxes.  Its publishers have no other layout; what others
have made into parquet is read as `hf_parquet` or, in verl's schema, as `deepeyes`.
"""

from __future__ import annotations

from collections.abc import Iterator
import functools
import os

from virl_jax.data.sources import fields
from virl_jax.data.sources import records
from virl_jax.data.sources import stream

NAME = "mini_o3"
SPLITS = ("train", "val", "test")
LICENCE = ""
WANTED = "*.json, lists of {images, problem, solution}"
_FIELDS = ("images", "problem", "solution")


def files(root: str, split: str) -> list[str]:
  """The JSON files of a split; see `stream.splits`.

  Raises:
    ValueError: there are none.
  """
  return stream.splits(root, split, "json", "VisualProbe's lists")


def read(root: str, split: str) -> Iterator[records.Raw | records.Reject]:
  """The records.

  Raises:
    ValueError: there are no files, or one is of another kind or ends early.
  """
  for path in files(root, split):
    yield from fields.raws(stream.listed(path, _FIELDS), functools.partial(_record, root, path, split, set()))


def _record(root, path, split, ids, item, where):
  question, options = fields.question(item["problem"])
  name, family = item.get("doc_id"), fields.texts(item.get("data_source"))
  # doc_id is 0 where none was given.
  uid = where if name in (None, 0, "0") or name in ids else f"{os.path.basename(path)}/{name}"
  ids.add(name)
  return records.Raw(
      uid=uid, image=fields.beside(root, path, fields.picture(item["images"])), question=question,
      answers=fields.answer(item["solution"], options), options=options,
      kind=f"mini_o3_{family[0]}" if family else NAME, source=NAME, split=split, licence=LICENCE)
