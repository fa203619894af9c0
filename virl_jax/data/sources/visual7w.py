"""Visual7W (github.com/yukezhu/visual7w-toolkit): telling questions with four answers, pointing ones with four boxes.

    dataset_v7w_telling.json     images: image_id, filename, split, qa_pairs: qa_id, question, type, answer,
                                 multiple_choices (three wrong ones)
    v7w_telling_answers.json     boxes: qa_id, name, x, y, width, height; several for a question (in the folder itself,
                                 or in dataset_v7w_grounding_annotations/)
    dataset_v7w_pointing.json    boxes: box_id, name, x, y, width, height; images as above, answers are box ids
    images/v7w_ID.jpg

Either question file will do.  The options of a telling question are shuffled, by `fields.shuffled`.  A pointing
question asks for its answer's box.
"""

from __future__ import annotations

from collections.abc import Iterator

from virl_jax.data.sources import fields
from virl_jax.data.sources import records
from virl_jax.data.sources import stream

NAME = "visual7w"
SPLITS = ("train", "val", "test")
LICENCE = ""
WANTED = "dataset_v7w_telling.json with v7w_telling_answers.json, or dataset_v7w_pointing.json, or all; images/"
_TELLING, _BOXES, _POINTING = "dataset_v7w_telling.json", "v7w_telling_answers.json", "dataset_v7w_pointing.json"
_PAIR = ("qa_id", "question", "answer")


def files(root: str, split: str) -> list[str]:
  """The annotation files, of all splits.

  Raises:
    ValueError: there are no questions.
  """
  found = _find(root, _TELLING) + _find(root, _BOXES) + _find(root, _POINTING)
  if not _find(root, _TELLING) and not _find(root, _POINTING):
    stream.files(root, (_TELLING, _POINTING), "Visual7W's questions")
  return found


def read(root: str, split: str) -> Iterator[records.Raw | records.Reject]:
  """The records of a split; all boxes of a file are kept in memory, about 200 bytes each.

  Raises:
    ValueError: there are no files, one has nothing of that split, is of another kind or ends early.
  """
  files(root, split)
  folder = stream.folder(root, ("images", "visual7w_images"))
  for path in _find(root, _TELLING):
    boxes = {}
    for answers in _find(root, _BOXES):
      for _, box in stream.listed(answers, ("qa_id", "x", "y", "width", "height"), "boxes"):
        if not isinstance(box, records.Reject):
          boxes.setdefault(box["qa_id"], []).append(_xywh(box))
    for where, image, pair in _pairs(path, split):
      yield pair if isinstance(pair, records.Reject) else _telling(where, image, pair, boxes, folder, split)
  for path in _find(root, _POINTING):
    boxes = {box["box_id"]: _xywh(box) for _, box in stream.listed(
        path, ("box_id", "x", "y", "width", "height"), "boxes") if isinstance(box, dict)}
    for where, image, pair in _pairs(path, split):
      yield pair if isinstance(pair, records.Reject) else _pointing(where, image, pair, boxes, folder, split)


def _find(root, name):
  try:
    return stream.files(root, (name, f"*/{name}"), "")[:1]
  except ValueError:
    return []


def _pairs(path, split):
  """Where each question-answer pair is, its image's file name, and the pair or a reject."""
  found = set()
  for where, image in stream.listed(path, ("filename", "split", "qa_pairs"), "images"):
    if isinstance(image, records.Reject):
      yield where, "", image
      continue
    found.add(str(image["split"]))
    if image["split"] != split:
      continue
    for place, pair in enumerate(image["qa_pairs"]):
      here = f"{where}.{place}"
      if not isinstance(pair, dict) or not all(field in pair for field in _PAIR):
        yield here, "", records.Reject(here, "fields are missing",
                                       f"wanted: {', '.join(_PAIR)}. Received: {pair!r}"[:300])
      else:
        yield here, str(image["filename"]), pair
  if split not in found:
    raise ValueError(f"{path} must have images of the split {split!r}. Received: {', '.join(sorted(found))}")


def _telling(where, image, pair, boxes, folder, split):
  try:
    uid = f"telling/{pair['qa_id']}"
    answer, wrong = fields.text(pair["answer"]), fields.texts(pair.get("multiple_choices"))
    own = boxes.get(pair["qa_id"])
    return _raw(uid, image, pair, "telling", folder, split, answers=(answer,),
                options=fields.shuffled(answer, wrong, uid) if wrong else None, boxes=tuple(own or ()),
                notes={"telling questions with boxes" if own else "telling questions without boxes": 1})
  except fields.Unusable as error:
    return fields.reject(where, error)


def _pointing(where, image, pair, boxes, folder, split):
  try:
    box = boxes.get(pair["answer"])
    if box is None:
      raise fields.Unusable("no such box", f"answer: {pair['answer']!r} is the id of no box")
    return _raw(f"pointing/{pair['qa_id']}", image, pair, "pointing", folder, split, boxes=(box,))
  except fields.Unusable as error:
    return fields.reject(where, error)


def _raw(uid, image, pair, family, folder, split, **more):
  word = pair.get("type")
  return records.Raw(
      uid=uid, image=f"{folder}/{image}", question=fields.text(pair["question"]), frame=records.XYWH,
      kind=f"visual7w_{word}" if family == "telling" and isinstance(word, str) and word else f"visual7w_{family}",
      source=NAME, split=split, licence=LICENCE, **more)


def _xywh(box):
  return (box["x"], box["y"], box["width"], box["height"])
