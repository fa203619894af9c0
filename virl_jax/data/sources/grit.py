"""GRIT: phrases of captions with boxes (Kosmos-2, GRIT-20M), and the questions of another set of that name.

    coyo_*_snappy.parquet, *.parquet or *.jsonl, either schema:
        key, caption, width, height, noun_chunks, ref_exps: [start, end, x1, y1, x2, y2, score], characters of the
            caption, corners as shares of the image; images/KEY.jpg, or images/KEY[:5]/KEY.jpg, as img2dataset has them
        question, answer, image, width, height, bboxs, dataset (a metadata line of Visual-CoT); images/DATASET/

Each phrase becomes a task that asks where it is, with all its boxes; a noun chunk and a referring expression about the
same thing are two tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
import itertools
import os

from virl_jax.data.sources import fields
from virl_jax.data.sources import records
from virl_jax.data.sources import stream
from virl_jax.data.sources import visual_cot

NAME = "grit"
SPLITS = ("train",)
LICENCE = ""
WANTED = "*.parquet or *.jsonl, images/"
KINDS = ("noun_chunks", "ref_exps")
_CAPTION, _LINE = ("key", "caption", "width", "height", *KINDS), ("question", "answer", "image", "bboxs")


def files(root: str, split: str) -> list[str]:
  """The annotation files.

  Raises:
    ValueError: there are none, or the split is not "train".
  """
  if split not in SPLITS:
    raise ValueError(f"split must be 'train': GRIT has no other. Received: {split!r}")
  return stream.files(root, ("*.parquet", "*.jsonl", "*/*.parquet", "*/*.jsonl"), "GRIT's captions or questions")


def read(root: str, split: str) -> Iterator[records.Raw | records.Reject]:
  """The records.

  Raises:
    ValueError: there are no files, or one is of another kind.
  """
  folder = stream.folder(root, ("images", "."))
  for path in files(root, split):
    found = stream.rows(path, ()) if path.endswith(".parquet") else stream.lines(path)
    found, is_line = _look(found)
    for where, item in stream.objects(found, path, _LINE if is_line else _CAPTION):
      if isinstance(item, records.Reject):
        yield item
      elif is_line:
        yield visual_cot.from_line({"dataset": "", **item}, where, split, folder, NAME)
      else:
        yield from _phrases(item, where, root, folder, split)


def _look(found):
  """The same objects, and whether one of the first is a line of questions."""
  first = list(itertools.islice(found, 8))
  is_line = any(isinstance(item, dict) and "bboxs" in item for _, item in first)
  return itertools.chain(first, found), is_line


def _phrases(item, where, root, folder, split):
  try:
    key, caption = fields.text(item["key"]), item["caption"]
    if not isinstance(caption, str):
      raise fields.Unusable("no caption", f"text is wanted. Received: {caption!r}")
  except fields.Unusable as error:
    yield fields.reject(where, error)
    return
  places = [os.path.normpath(path) for path in (f"{folder}/{key}.jpg", f"{folder}/{key[:5]}/{key}.jpg")]
  image = next((path for path in places if os.path.isfile(os.path.join(root, path))), places[0])
  for kind in KINDS:
    boxes = {}  # by phrase: a phrase may have several
    for entry in item[kind] or ():
      try:
        start, end = int(entry[0]), int(entry[1])
        phrase = caption[start:end].strip() if 0 <= start < end <= len(caption) else ""
      except (TypeError, ValueError, IndexError):
        phrase = ""
      if not phrase:
        yield records.Reject(f"{where} {kind}", "no phrase", f"two places in a caption of {len(caption)} characters "
                             f"are wanted. Received: {entry!r}"[:200])
      else:
        boxes.setdefault(phrase, []).append(tuple(entry[2:6]))
    for phrase, own in boxes.items():
      yield records.Raw(
          uid=f"{key}/{kind}/{phrase}", image=image, question=f"Where in the picture is this: {phrase}?",
          boxes=tuple(own), frame=records.UNIT, kind=f"grit_{kind}", source=NAME, split=split, licence=LICENCE)
