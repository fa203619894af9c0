"""GQA (cs.stanford.edu/people/dorarad/gqa): questions about scene graphs, whose objects have boxes.

    SPLIT_balanced_questions.json, or SPLIT_all_questions.json, or the files of SPLIT_all_questions/
    SPLIT_sceneGraphs.json    image id -> {width, height, objects: {id: {x, y, w, h, name, ...}}}
    images/ID.jpg

A question's annotations name objects for words of the answer, of the question and of the full answer.  The rationale
boxes are those of the answer's objects or, if it has none (as for "yes"), of the full answer's and the question's, each
once.  Without scene graphs, as for testdev, there are no boxes.
"""

from __future__ import annotations

from collections.abc import Iterator
import json

from virl_jax.data.sources import fields
from virl_jax.data.sources import records
from virl_jax.data.sources import stream

NAME = "gqa"
SPLITS = ("train", "val", "testdev")
LICENCE = "CC BY 4.0"
WANTED = "SPLIT_balanced_questions.json (or SPLIT_all_questions), SPLIT_sceneGraphs.json, images/"
PARTS = ("answer", "fullAnswer", "question")
_FIELDS = ("question", "imageId", "answer", "annotations")


def files(root: str, split: str) -> list[str]:
  """The annotation files of a split: the questions, then the scene graphs, if there are any.

  Raises:
    ValueError: there are no questions.
  """
  return _questions(root, split) + _graphs(root, split)


def read(root: str, split: str) -> Iterator[records.Raw | records.Reject]:
  """The records of a split; the boxes of its scene graphs are kept in memory, about 60 bytes an object.

  Raises:
    ValueError: there are no files, or one is of another kind or ends early.
  """
  questions = _questions(root, split)
  graphs = {}
  for path in _graphs(root, split):
    graphs |= _boxes_by_image(path)
  folder = stream.folder(root, ("images", "allImages/images", "allImages"))
  for path in questions:
    for uid, question in stream.objects(stream.items(path), path, _FIELDS):
      yield question if isinstance(question, records.Reject) else _record(uid, question, graphs, folder, split)


def span(key: str) -> tuple[int, int]:
  """Which words a key of the annotations means, half-open: "4" is (4, 5), "6:8" is (6, 8).

  Raises:
    ValueError: it is no such key.
  """
  first, colon, end = key.partition(":")
  found = (int(first), int(end) if colon else int(first) + 1)
  if not 0 <= found[0] < found[1]:
    raise ValueError(f"a key must be a word's number or a range of them. Received: {key!r}")
  return found


def _questions(root, split):
  return stream.files(root, tuple(f"{folder}{name}" for name in (
      f"{split}_balanced_questions.json", f"{split}_all_questions.json", f"{split}_all_questions/*.json")
      for folder in ("", "questions*/")), f"GQA's {split} questions")


def _graphs(root, split):
  try:
    return stream.files(root, (f"{split}_sceneGraphs.json", f"*/{split}_sceneGraphs.json"), "")
  except ValueError:
    return []


def _boxes_by_image(path):
  """The size of each image and, packed as JSON to save memory, the boxes of its objects."""
  found = {}
  for name, graph in stream.objects(stream.items(path), path, ("width", "height", "objects")):
    if not isinstance(graph, records.Reject):
      boxes = {key: [item.get(side) for side in ("x", "y", "w", "h")] for key, item in graph["objects"].items()}
      found[name] = ((graph["width"], graph["height"]), json.dumps(boxes, separators=(",", ":")).encode())
  return found


def _record(uid, question, graphs, folder, split):
  try:
    image = fields.text(question["imageId"])
    size, packed = graphs.get(image, (None, b"{}"))
    boxes, notes = _rationale(question, json.loads(packed))
    if size is None:
      notes["images without a scene graph"] = 1
    types_ = question.get("types")
    structural = types_.get("structural") if isinstance(types_, dict) else None
    return records.Raw(
        uid=uid, image=f"{folder}/{image}.jpg", question=fields.text(question["question"]),
        answers=fields.texts(question["answer"]), boxes=boxes, frame=records.XYWH,
        kind=f"gqa_{structural}" if structural else NAME, source=NAME, split=split, licence=LICENCE, size_px=size,
        notes=notes)
  except fields.Unusable as error:
    return fields.reject(uid, error)


def _rationale(question, objects):
  """Boxes of the objects that the annotations name, and counts of what they name."""
  notes, found = {}, {}
  annotations = question["annotations"] if isinstance(question["annotations"], dict) else {}
  for part in PARTS:
    named = annotations.get(part)
    words = len(str(question.get(part) or "").split())
    found[part] = {}
    for key, name in (named.items() if isinstance(named, dict) else ()):
      name = str(name).strip()
      box = objects.get(name)
      _count(notes, f"{part} objects {'found' if box else 'not in a scene graph'}")
      try:
        _, end = span(key)
        if ":" in key:
          _count(notes, "objects of several words")
        if end > words:
          _count(notes, "annotations beyond the words")
      except ValueError:
        _count(notes, "annotations of no word")
      if box:
        found[part][name] = tuple(box)
  chosen = found["answer"] or found["fullAnswer"] | found["question"]
  if chosen:
    _count(notes, f"rationales from the {'answer' if found['answer'] else 'question'}")
  return tuple(chosen.values()), notes


def _count(notes, name):
  notes[name] = notes.get(name, 0) + 1
