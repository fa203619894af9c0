"""Tasks from a file of JSON lines: any images, questions and boxes of your own.

One object a line:

    image     path of the image, relative to the records file, or absolute
    question  text
    answers   list of accepted answers; empty if the task is only to find the box
    boxes     optional list of [x1, y1, x2, y2], pixels of the upright image (as viewers show it: turned
              according to its EXIF orientation, if it has one); may be empty
    options   optional list of the texts of options A, B, C ...; one of the answers must be among them, by its text
              or its letter
    id, task  optional: the record's name, and the family that metrics are split by
    match     optional: the rule by which its answer is judged (see `data.answers`); "exact" if there is none

    width, height  optional, numbers or their digits; only compared with the image's own size, which counts

Optional fields may also be null.  Other fields are ignored.  Boxes that reach over the edge are clipped
to the image.  A record that can't be used, or that no answer can be right for, is skipped and counted by
reason; the counts are part of `describe()`, and so is the number of records that state another size than
their image has, because their boxes may be in another frame.  Images are not decoded here: only their
headers are read.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import os

import numpy as np
import PIL.Image

from virl_jax import types
from virl_jax.data import answers as answers_lib
from virl_jax.data import images
from virl_jax.data.sources import records
from virl_jax.data.sources import sets

SPLITS = ("train", "test", "all")
_MOST_OPTIONS = 26  # as many as there are letters


@dataclasses.dataclass(frozen=True)
class Source:
  """One side of the split.

  Attributes:
    path: the records file.
    split: "train", "test" or "all".
    tasks: the tasks of that side, in the order of the file.
    n_records: usable records of both sides.
    n_images: image files of this side.
    skipped: reason -> number of records of the file that could not be used.
    n_other_size: usable records of the file whose width or height is not the image's.
    digest: see `fingerprint`.
    rejects: line number, from 1, and reason of each record that could not be used; with several files, "NAME line N".
    names: of the files, without their extensions.
    set_N: the number of each task's file, in `names`.
  """

  path: str
  split: str
  tasks: tuple[types.Task, ...]
  n_records: int
  n_images: int
  skipped: dict[str, int]
  n_other_size: int
  digest: str = ""
  rejects: tuple[tuple[int | str, str], ...] = ()
  names: tuple[str, ...] = ()
  set_N: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, int))

  def __len__(self) -> int:
    return len(self.tasks)

  def task(self, index: int) -> types.Task:
    """The task with that number, from 0."""
    return self.tasks[index]

  def fingerprint(self) -> str:
    """A hash that is the same for the same data, wherever it is, and for both splits: of each byte of the records file,
    and of the path from there and the size in bytes of each usable image, but not of what is in the images."""
    return self.digest

  def describe(self) -> str:
    """One line for the log."""
    return (f"jsonl {self.path}: {self.split} split has {len(self.tasks)} of {self.n_records} records, on "
            f"{self.n_images} images; skipped {_counts(self.skipped)}"
            + (f"; {self.n_other_size} state another size than their image" if self.n_other_size else ""))


def load(path: str, split: str, eval_fraction: float, seed: int) -> Source:
  """Reads a records file, or several as one, and takes one side of its split.

  All records of one image are on the same side.  Which side depends on the seed, on the images'
  paths relative to the records file and on how many records each has, not on the file's order.

  Args:
    path: the records file, or several with commas between them; they are read in the order of their names.
    split: "train", "test", or "all" for both sides.
    eval_fraction: share of the records on the test side, in (0, 1); met as nearly as whole images
      allow, and neither side is empty.
    seed: draws the split.

  Returns:
    The source.

  Raises:
    ValueError: an argument is out of range, a file can't be read, no record can be used, there is
      only one image, which can't be split, or two files have the same name.
  """
  path = os.fspath(path)
  if split not in SPLITS:
    raise ValueError(f"split must be one of {', '.join(SPLITS)}. Received: {split!r}")
  if not 0.0 < eval_fraction < 1.0:
    raise ValueError(f"eval_fraction must be between 0 and 1. Received: {eval_fraction!r}")
  name_of = lambda file: os.path.splitext(os.path.basename(file))[0]
  files = sorted(sets.paths(path), key=lambda file: (name_of(file), file))
  names = tuple(map(name_of, files))
  if len(set(names)) < len(names):
    raise ValueError(f"files of records must have different names. Received: {path}")
  tasks, set_N, rejects, n_other_size, uids, skipped, digests = [], [], [], 0, set(), collections.Counter(), []
  folder_of: dict[str, str] = {}  # by image: the folder of the first file which has it
  for number, file in enumerate(files):
    some, bad, n_other = _read(file, uids)
    its = collections.Counter(reason for _, reason in bad)
    if not some:
      raise ValueError(f"path must be a file with at least one usable record. "
                       f"Received: {file}, with {_counts(its) if its else 'no record at all'}")
    tasks += some
    set_N += [number] * len(some)
    rejects += bad if len(files) == 1 else [(f"{names[number]} line {line}", reason) for line, reason in bad]
    n_other_size += n_other
    skipped += its
    digests.append(_digest(file, some))
    folder_of = {task.image: os.path.realpath(os.path.dirname(file)) for task in some} | folder_of
  n_records = len(tasks)
  digest = digests[0]
  if len(files) > 1:
    digest = f"jsonl-{hashlib.blake2b(repr(digests).encode(), digest_size=16).hexdigest()}"
  if split != "all":
    held_out = _held_out(path, tasks, folder_of, eval_fraction, seed)
    rows = [i for i, task in enumerate(tasks) if (task.image in held_out) == (split == "test")]
    tasks, set_N = [tasks[i] for i in rows], [set_N[i] for i in rows]
  return Source(path=path, split=split, tasks=tuple(tasks), n_records=n_records,
                n_images=len({task.image for task in tasks}), skipped=dict(sorted(skipped.items())),
                n_other_size=n_other_size, digest=digest, rejects=tuple(rejects), names=names,
                set_N=np.array(set_N, int))


class _Unusable(Exception):
  """Why a record is skipped."""


def _read(path, uids):
  """The usable tasks of a file, line and reason of each unusable record, and how many tasks state another size.

  Args:
    path: of the file.
    uids: those in use; the file's are added.
  """
  tasks, rejects, n_other_size, sizes = [], [], 0, {}
  for number, line in _lines(path):
    try:
      record = _record(line)
      image = os.path.realpath(os.path.join(os.path.dirname(path), record["image"]))
      if image not in sizes:
        sizes[image] = _size_px(image)
      boxes = tuple(_box(value, sizes[image]) for value in record.get("boxes") or ())
    except _Unusable as reason:
      rejects.append((number, str(reason)))
      continue
    uid = f"line {number}" if record.get("id") is None else str(record["id"])
    while uid in uids:  # a task's uid must be unique; a file's ids may not be
      uid = f"{uid} (line {number})"
    uids.add(uid)
    stated = tuple(_number(record.get(side)) or own for side, own in zip(("width", "height"), sizes[image]))
    n_other_size += stated != sizes[image]
    tasks.append(types.Task(
        uid=uid, image=image, question=record["question"], answers=tuple(record["answers"]), boxes=boxes,
        options=tuple(record.get("options") or ()) or None, kind=record.get("task") or "jsonl",
        match=record.get("match") or "exact"))
  return tasks, rejects, n_other_size


def _lines(path):
  """The lines of a file that aren't blank, with their numbers, from 1."""
  try:
    with open(path, "rb") as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          yield number, line
  except (OSError, ValueError) as error:
    raise ValueError(f"path must be a readable file of JSON lines. Received: {path!r} ({error})") from error


def _record(line):
  """A line's object, its fields checked as far as that goes without the image."""
  try:
    record = json.loads(line.decode("utf-8-sig"))
  except (ValueError, RecursionError) as error:
    raise _Unusable("not JSON") from error
  if not isinstance(record, dict):
    raise _Unusable("not a JSON object")
  for field in ("image", "question", "answers"):
    if field not in record:
      raise _Unusable(f"no {field}")
  for field, check in _CHECKS.items():
    if not check(record.get(field)):
      raise _Unusable(f"bad {field}")
  if not record["answers"] and not record.get("boxes"):
    raise _Unusable("neither answers nor boxes")
  if len(record.get("options") or ()) > _MOST_OPTIONS:
    raise _Unusable(f"more than {_MOST_OPTIONS} options")
  if record["answers"] and record.get("options") and not answers_lib.right(record["answers"], record["options"]):
    raise _Unusable("no answer among the options")
  if record.get("match") and record["answers"]:
    options = tuple(record.get("options") or ()) or None
    try:
      best = answers_lib.attainable(record["match"], tuple(record["answers"]), options)
    except ValueError as error:
      raise _Unusable("no such match") from error
    if not best:
      raise _Unusable("no answer that its match can take")
  return record


def _size_px(path):
  """Width and height of the upright image, from the file's header."""
  if not os.path.isfile(path):  # also keeps away from pipes, which would block
    raise _Unusable("no image file")
  try:
    return images.upright_size(path)
  except ValueError as error:
    too_large = isinstance(error.__cause__, PIL.Image.DecompressionBombError)
    raise _Unusable("image too large" if too_large else "no readable image") from error


def _box(value, size_px):
  """A box, clipped to the image."""
  if not (isinstance(value, list) and len(value) == 4 and all(_is_finite(v) for v in value)):
    raise _Unusable("box is not 4 finite numbers")
  x1, y1, x2, y2 = map(float, value)
  if x1 >= x2 or y1 >= y2:
    raise _Unusable("box is empty or reversed")
  box = types.Box(max(x1, 0.0), max(y1, 0.0), min(x2, float(size_px[0])), min(y2, float(size_px[1])))
  if box.x1 >= box.x2 or box.y1 >= box.y2:
    raise _Unusable("box is outside the image")
  return box


def _digest(path, tasks):
  """A hash of the records file, and of its images' paths and sizes."""
  folder = os.path.realpath(os.path.dirname(path))
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
  for image in sorted({task.image for task in tasks}):
    name = f"{os.path.relpath(image, folder)}\0{os.path.getsize(image)}\0"
    digest.update(name.encode("utf-8", "surrogateescape"))
  return f"jsonl-{digest.hexdigest()}"


def _held_out(path, tasks, folder_of, eval_fraction, seed):
  """The images of the test side: so many of a shuffled list that their records are nearest to the fraction."""
  counts = collections.Counter(task.image for task in tasks)
  if len(counts) < 2:
    raise ValueError("path must have usable records on at least 2 images for a train and a test split. "
                     f"Received: {path}, with 1 image")

  def rank(image):
    name = os.path.relpath(image, folder_of[image])  # so that the folder can move without changing the split
    return hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "surrogateescape"), digest_size=16).digest()

  ranked = sorted(counts, key=rank)
  held = np.cumsum([counts[image] for image in ranked[:-1]])
  return set(ranked[:1 + int(np.argmin(np.abs(held - eval_fraction * len(tasks))))])


def _is_list(value):
  return isinstance(value, list)


def _is_texts(value):
  return _is_list(value) and all(records.is_text(item) for item in value)


_CHECKS = {
    "image": records.is_text,
    "question": records.is_text,
    "answers": _is_texts,
    "boxes": lambda value: value is None or _is_list(value),
    "options": lambda value: value is None or _is_texts(value),
    "task": lambda value: value is None or records.is_text(value),
    "match": lambda value: value is None or records.is_text(value),
    "id": lambda value: value is None or isinstance(value, int) or records.is_text(value),
}


def _is_finite(value):
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return False
  try:
    return math.isfinite(value)
  except OverflowError:  # an integer that no float can hold
    return False


def _number(value):
  """A number that may be written in digits, as tables do; anything else is returned as it is."""
  try:
    return float(value) if isinstance(value, str) else value
  except ValueError:
    return value


def _counts(skipped):
  if not skipped:
    return "none"
  reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
  return f"{sum(skipped.values())} ({reasons})"
