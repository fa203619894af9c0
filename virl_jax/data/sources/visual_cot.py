"""Visual-CoT (github.com/deepcs233/Visual-CoT): twelve sets of questions, each with the box that answers it.

Both of its layouts are read:

    metadata/SET_cot_SPLIT.jsonl (or viscot_dataset/)      question, answer, image, width, height, bboxs, dataset, split
    viscot_363k.json (train)                               image: [PATH, "PATH###[x1, y1, x2, y2]"], conversations
    viscot_benchmark/benchmark/SET.json (val)              the same; and benchmark_det/SET.jsonl with sizes and floats

The boxes of the last two layouts are whole numbers, which for some sets are floats cut off: if a metadata file has the
same set, it is read instead, and if benchmark_det has the same item with a box that cuts off to this one, that box is
taken.  Boxes are corners in pixels of the original image; the normalised box in the conversation, of the image padded
to a square, is not used.  Images are in images/cot/SET/, cot/SET/, cot_image_data/SET/ or images/SET/; textcap's are
with textvqa's.
"""

from __future__ import annotations

from collections.abc import Iterator
import itertools
import json
import os
import re

from virl_jax.data.sources import fields
from virl_jax.data.sources import records
from virl_jax.data.sources import stream

NAME = "visual_cot"
SPLITS = ("train", "val", "test")
LICENCE = ""  # each of the twelve sets has its own
WANTED = ("metadata/*_cot_SPLIT.jsonl or viscot_363k.json (train), viscot_benchmark/benchmark/*.json (val), and "
          "images/cot/ or cot/")
_FOLDERS = {"textcap": "textvqa", "visual7w": "v7w"}  # of sets whose images are not in a folder of their name
_SETS = {"v7w": "visual7w"}  # as `dataset` names them
_LINE = ("question", "answer", "image", "width", "height", "bboxs", "dataset")
_ITEM = ("dataset", "image", "conversations")
_ASK = re.compile(r"\s*Please provide the bounding box coordinate of the region that can help you answer the question "
                  r"better\.?\s*\Z")


def files(root: str, split: str) -> list[str]:
  """The annotation files of a split.

  Raises:
    ValueError: there are none.
  """
  found = _files(root, split)
  return [path for paths in found for path in paths] if any(found) else stream.files(
      root, _patterns(split), f"Visual-CoT's {split} annotations")


def read(root: str, split: str) -> Iterator[records.Raw | records.Reject]:
  """The records of a split, in the files' order; see the module.

  Raises:
    ValueError: there are no files, or one is of another kind.
  """
  lines, items = _files(root, split)
  files(root, split)
  prefix = stream.folder(root, ("images/cot", "cot", "cot_image_data", "images"))
  named = {_set_of(path) for path in lines}
  for path in lines:
    for where, line in stream.objects(stream.lines(path), path, _LINE):
      yield line if isinstance(line, records.Reject) else from_line(line, where, split, prefix)
  for path in items:
    detected = _detected(path)
    for where, item in stream.listed(path, _ITEM):
      if isinstance(item, records.Reject):
        yield item
      elif _SETS.get(item["dataset"], item["dataset"]) not in named:
        yield _from_item(item, where, split, prefix, detected)


def from_line(line: dict, where: str, split: str, prefix: str, name: str = NAME) -> records.Raw | records.Reject:
  """A metadata line as a record.

  Args:
    line: the object.
    where: its file and line.
    split: the split that is wanted; lines of another one are rejected.
    prefix: the folder with a folder of images for each set, relative to the raw folder.
    name: of the source that the record is for.
  """
  try:
    if line.get("split", split) != split:
      return records.Reject(where, "another split", f"wanted: {split}. Received: {line['split']!r}")
    kind = fields.text(line["dataset"])
    answers = dict.fromkeys((*fields.texts(line["answer"]), *fields.texts(line.get("possible_answers"))))
    return records.Raw(
        uid=where, image="/".join(filter(None, (prefix, _FOLDERS.get(kind, kind), fields.text(line["image"])))),
        question=fields.text(line["question"]), answers=tuple(answers), boxes=fields.box_lists(line["bboxs"]),
        kind=_SETS.get(kind, kind), source=name, split=split, licence=LICENCE, size_px=_size(line))
  except fields.Unusable as error:
    return fields.reject(where, error)


def all_files(root: str) -> list[str]:
  """The annotation files of all splits.

  Raises:
    ValueError: there are none.
  """
  found = [path for split in SPLITS for paths in _files(root, split) for path in paths]
  return found or files(root, "train")


def boxes_by_question(root: str, name: str) -> dict[tuple[str, str], tuple[tuple, tuple | None]]:
  """The boxes of one of its sets, for a source that has none: (image, question) -> boxes, and the size they are for.

  All splits are read: Visual-CoT's need not be the source's.

  Args:
    root: Visual-CoT's raw folder.
    name: of the set, such as "textvqa".

  Returns:
    By `join_key` of image and question: the boxes, corners in pixels, and the width and height of the image that they
    are for, or None.

  Raises:
    ValueError: nothing of that set is there.
  """
  found = {}
  all_files(root)
  splits = [split for split in SPLITS if any(_files(root, split))]
  for raw in itertools.chain.from_iterable(read(root, split) for split in splits):
    if isinstance(raw, records.Raw) and raw.kind == name and raw.boxes:
      boxes, _ = found.get(key := join_key(raw.image, raw.question), ((), None))
      found[key] = (tuple(dict.fromkeys(boxes + raw.boxes)), raw.size_px)
  if not found:
    raise ValueError(f"--boxes_from must be a folder of Visual-CoT with boxes of {name}. Received: {root}, with none, "
                     f"in the splits {', '.join(splits)}")
  return found


def join_key(image: str, question: str) -> tuple[str, str]:
  """What records of other sources are joined by: the image's name without folder and extension, and the question in
  lower case."""
  return os.path.splitext(os.path.basename(image))[0], " ".join(question.lower().split())


def _patterns(split):
  return (f"metadata/*_cot_{split}.jsonl", *(["viscot_363k.json"] if split == "train" else []),
          *(["viscot_benchmark/benchmark/*.json"] if split == "val" else []))


def _files(root, split):
  """The metadata files, and the files of items (the last two layouts)."""
  found = ([], [])
  for folder in ("metadata", "viscot_dataset", "."):
    try:
      found[0].extend(stream.files(root, (f"{folder}/*_cot_{split}.jsonl",), ""))
      break
    except ValueError:
      continue
  for pattern in {"train": ("viscot_363k.json",), "val": ("viscot_benchmark/benchmark/*.json", "benchmark/*.json")
                  }.get(split, ()):
    try:
      found[1].extend(stream.files(root, (pattern,), ""))
      break
    except ValueError:
      continue
  return found


def _set_of(path):
  return os.path.basename(path).partition("_cot_")[0]


def _detected(path):
  """benchmark_det's items of the same set, by question id."""
  beside = os.path.join(os.path.dirname(path) + "_det", os.path.basename(path)[:-len(".json")] + ".jsonl")
  if not os.path.isfile(beside):
    return {}
  return {item["question_id"]: item for _, item in stream.lines(beside)
          if isinstance(item, dict) and {"question_id", "bbox", "width", "height"} <= set(item)}


def _from_item(item, where, split, prefix, detected):
  try:
    if item.get("split", split) != split:
      return records.Reject(where, "another split", f"wanted: {split}. Received: {item['split']!r}")
    kind = fields.text(item["dataset"])
    image, box = _image_and_box(item["image"])
    notes, size = {}, None
    better = detected.get(item.get("question_id"))
    if better is not None and len(better["bbox"]) == 4 and [int(side) for side in better["bbox"]] == list(box):
      box, size = better["bbox"], _size(better)
      notes["boxes from benchmark_det"] = 1
    said = [fields.text(turn["value"]) for turn in item["conversations"] if isinstance(turn, dict) and "value" in turn]
    if len(said) < 4:
      raise fields.Unusable("fields are missing", f"four turns are wanted. Received: {len(said)}")
    asked = _ASK.sub("", fields.question(said[0])[0])
    return records.Raw(
        uid=f"{kind}/{item.get('question_id', where)}", image="/".join(filter(None, (
            prefix, image.removeprefix("cot/")))), question=asked, answers=fields.texts(said[3]), boxes=(tuple(box),),
        kind=_SETS.get(kind, kind), source=NAME, split=split, licence=LICENCE, size_px=size, notes=notes)
  except (fields.Unusable, TypeError, ValueError) as error:
    return fields.reject(where, error)


def _image_and_box(pair):
  if not isinstance(pair, list) or len(pair) != 2 or "###" not in str(pair[1]):
    raise fields.Unusable("no box in the item",
                          f"image: [PATH, 'PATH###[x1, y1, x2, y2]'] is wanted. Received: {pair!r}")
  return fields.text(pair[0]), json.loads(pair[1].rpartition("###")[2])


def _size(line):
  try:
    return float(line["width"]), float(line["height"])
  except (TypeError, ValueError, KeyError):
    return None
