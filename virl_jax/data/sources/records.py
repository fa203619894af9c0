"""What a reader of raw downloads yields, and how it becomes a task: the contract between sources and all that follows.

A reader yields `Raw` records, or `Reject`s for what it can't read.  `settle` is a pure function of a raw record and
its picture's real size: it repairs the boxes and gives a task, or a `Reject` that says why there is none.  `Counts`
adds up what became of the records.  Boxes are clipped to the image, those with nothing left are dropped, and several
are never merged.  A record that loses all its boxes stays, if it has answers, and is counted.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
import dataclasses
import hashlib
import json
import math

from virl_jax import types
from virl_jax.data import answers as answers_lib

CORNERS, XYWH, UNIT = "corners", "xywh", "unit"  # how a box is written: x1 y1 x2 y2 in pixels, x y w h, corners in 0-1
OK, CLIPPED, UNUSABLE = "ok", "clipped", "unusable"  # what a box turns out to be
_MOST_OPTIONS = 26    # as many as there are letters
_SAME_SHAPE = 0.01    # width and height scaled alike up to this share, rounding apart: the same picture in another size


@dataclasses.dataclass(frozen=True, slots=True)
class Raw:
  """A record as its publisher wrote it, under our names; nothing is repaired yet.

  Attributes:
    uid: the publisher's own id, or one made from the file and the line; unique within its source and split.
    image: the encoded file's bytes, or the path of the image, relative to the raw folder.
    question: without options.
    answers: all that the publisher gives, with repeats, as some rules count them; empty if only a box is asked for.
    boxes: four numbers each, as `frame` says.
    frame: "corners" (x1, y1, x2, y2) or "xywh" (x, y, width, height), in pixels of an image of `size_px`; or "unit":
      corners as shares of the image's sides.
    options: texts of the options A, B, C ..., or None.
    match: the rule by which an answer is right, a key of `data.answers.RULES`.
    kind: the family that metrics are split by.
    source, split, licence: see `types.Task`.
    size_px: width and height that the record states for its image, or None.
    notes: what else the reader counts: note -> how many.
  """

  uid: str
  image: bytes | str
  question: str
  answers: tuple[str, ...] = ()
  boxes: tuple[tuple[float, ...], ...] = ()
  frame: str = CORNERS
  options: tuple[str, ...] | None = None
  match: str = "exact"
  kind: str = ""
  source: str = ""
  split: str = ""
  licence: str = ""
  size_px: tuple[float, float] | None = None
  notes: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Reject:
  """A record that did not become a task.

  Attributes:
    where: its id, or its file and line.
    reason: a few fixed words, by which rejects are counted.
    detail: what was wanted and what came.
  """

  where: str
  reason: str
  detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Picture:
  """What is known of a record's image file.

  Attributes:
    size_px: width and height of the upright image.
    digest: hash of the file's bytes, hexadecimal; see `digest`.
  """

  size_px: tuple[int, int]
  digest: str = ""


@dataclasses.dataclass
class Counts:
  """What became of the records of one source.

  Attributes:
    records: how many were read, rejected ones too.
    tasks: how many tasks were made.
    boxes: "ok", "clipped", "unusable" -> how many boxes of records that became tasks; unusable ones are dropped.
    rejects: reason -> how many records.
    notes: what else is worth counting -> how many.
    kinds: kind -> {"tasks", "ok", "clipped", "unusable"}, of tasks.
  """

  records: int = 0
  tasks: int = 0
  boxes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  rejects: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  notes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  kinds: dict[str, collections.Counter] = dataclasses.field(default_factory=dict)

  def add(self, outcome: types.Task | Reject, repairs: Mapping[str, int] | None = None,
          notes: Mapping[str, int] | None = None) -> None:
    """Counts one record.

    Args:
      outcome: what became of it.
      repairs: its boxes by what they turned out to be, as `settle` gives them.
      notes: as the record has them.
    """
    self.records += 1
    if isinstance(outcome, Reject):
      self.rejects[outcome.reason] += 1
      return
    self.tasks += 1
    self.boxes.update(repairs or {})
    self.notes.update(notes or {})
    kind = self.kinds.setdefault(outcome.kind, collections.Counter())
    kind["tasks"] += 1
    kind.update(repairs or {})
    if repairs and not outcome.boxes:
      self.notes["tasks that lost all their boxes"] += 1

  def merge(self, other: Counts) -> None:
    """Adds the counts of another part of the same source."""
    self.records += other.records
    self.tasks += other.tasks
    for mine, its in ((self.boxes, other.boxes), (self.rejects, other.rejects), (self.notes, other.notes)):
      mine.update(its)
    for kind, counts in other.kinds.items():
      self.kinds.setdefault(kind, collections.Counter()).update(counts)

  def to_dict(self) -> dict:
    """For JSON, in a fixed order."""
    whole = lambda counts: dict(sorted(counts.items()))
    return {"records": self.records, "tasks": self.tasks,
            "boxes": {name: self.boxes[name] for name in (OK, CLIPPED, UNUSABLE)}, "rejects": whole(self.rejects),
            "notes": whole(self.notes), "kinds": {kind: whole(self.kinds[kind]) for kind in sorted(self.kinds)}}

  @classmethod
  def from_dict(cls, fields: Mapping) -> Counts:
    """The inverse of `to_dict`."""
    count = collections.Counter
    return cls(fields["records"], fields["tasks"], count(fields["boxes"]), count(fields["rejects"]),
               count(fields["notes"]), {kind: count(counts) for kind, counts in fields["kinds"].items()})


def digest(data: bytes) -> str:
  """Hash of an image file's bytes: 32 hexadecimal digits."""
  return hashlib.blake2b(data, digest_size=16).hexdigest()


def provenance(image_digest: str, question: str, answers: Iterable[str], options: Iterable[str] | None,
               boxes: Iterable[types.Box], match: str) -> str:
  """A hash of what a task is made of, 32 hexadecimal digits; see `types.Task.provenance`."""
  content = [image_digest, question, list(answers), None if options is None else list(options),
             [[float(side) for side in box] for box in boxes], match]
  return digest(json.dumps(content, ensure_ascii=True, separators=(",", ":")).encode())


def repair(boxes: Iterable[Iterable[float]], frame: str, stated_px: tuple[float, float], size_px: tuple[float, float]
           ) -> tuple[tuple[types.Box, ...], dict[str, int]]:
  """The usable boxes of a record, in pixels of the image.

  Args:
    boxes: as the record has them.
    frame: "corners", "xywh" or "unit"; see `Raw`.
    stated_px: width and height of the image that the boxes are written for.
    size_px: width and height that the image has.

  Returns:
    The usable boxes, clipped to the image, in their order; and how many were "ok" (within the image), "clipped" (with
    some area left) and "unusable" (without area, outside the image, or not four finite numbers).
  """
  width, height = size_px
  scale_x, scale_y = (width, height) if frame == UNIT else (width / stated_px[0], height / stated_px[1])
  kept, counts = [], {}
  for box in boxes:
    outcome, fitted = UNUSABLE, None
    numbers = _four(box)
    if numbers is not None:
      x1, y1, x2, y2 = numbers
      if frame == XYWH:
        x2, y2 = x1 + x2, y1 + y2
      if scale_x != 1 or scale_y != 1:
        x1, y1, x2, y2 = x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y
      if x1 < x2 and y1 < y2:
        fitted = types.Box(max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        if fitted == (x1, y1, x2, y2):
          outcome = OK
        elif fitted.x1 < fitted.x2 and fitted.y1 < fitted.y2:
          outcome = CLIPPED
    counts[outcome] = counts.get(outcome, 0) + 1
    if outcome != UNUSABLE:
      kept.append(fitted)
  return tuple(kept), counts


def settle(raw: Raw, picture: Picture) -> tuple[types.Task | Reject, dict[str, int]]:
  """A raw record as a task.

  If the record states another size than its picture has, but the same shape, the boxes are scaled to the picture.

  Args:
    raw: the record.
    picture: its image's real size and hash.

  Returns:
    The task, or why there is none; and its boxes by what they turned out to be, see `repair`.  The task's image is the
    record's own: its path relative to the raw folder, or the bytes.
  """
  reason = _unusable(raw)
  if reason:
    return Reject(raw.uid, *reason), {}
  stated = picture.size_px
  if raw.size_px is not None and raw.frame != UNIT and raw.boxes and tuple(raw.size_px) != tuple(picture.size_px):
    stated = raw.size_px
    if not _same_shape(stated, picture.size_px):
      return Reject(raw.uid, "image of another shape", "its boxes are for {:g} x {:g} pixels, its image has {} x {}"
                    .format(*stated, *picture.size_px)), {}
  boxes, repairs = repair(raw.boxes, raw.frame, stated, picture.size_px)
  if not raw.answers and not boxes:
    return Reject(raw.uid, "neither answers nor usable boxes", f"boxes: {list(raw.boxes)[:3]}"), repairs
  return types.Task(
      uid=raw.uid, image=raw.image, question=raw.question, answers=raw.answers, boxes=boxes, options=raw.options,
      kind=raw.kind, match=raw.match, source=raw.source, split=raw.split, licence=raw.licence,
      provenance=provenance(picture.digest, raw.question, raw.answers, raw.options, boxes, raw.match)), repairs


def is_text(value: object) -> bool:
  """Whether a value is a string that is not blank and that tokenizers take."""
  if not isinstance(value, str) or not value.strip() or "\0" in value:
    return False
  try:
    value.encode("utf-8")  # JSON can spell lone surrogates, which no tokenizer takes
  except UnicodeEncodeError:
    return False
  return True


def _unusable(raw):
  """Reason and detail, if the record can't become a task, whatever its picture; else None."""
  if not is_text(raw.question):
    return "no question", f"question: {raw.question!r}"
  if not all(is_text(answer) for answer in raw.answers):
    return "bad answers", f"answers: {raw.answers!r}"
  try:
    answers_lib.rule(raw.match)
  except ValueError as e:
    return "unknown rule", str(e)
  if raw.options is not None:
    if not 0 < len(raw.options) <= _MOST_OPTIONS or not all(is_text(option) for option in raw.options):
      return "bad options", f"1 to {_MOST_OPTIONS} texts are wanted. Received: {raw.options!r}"
    if raw.answers and not answers_lib.right(raw.answers, raw.options):
      return "no answer among the options", f"answers: {raw.answers!r}, options: {raw.options!r}"
  elif raw.answers and not answers_lib.attainable(raw.match, raw.answers):
    return "answers that nobody can give", f"by the rule {raw.match}: {raw.answers!r}"
  return None


def _four(box):
  """Four finite numbers, or None."""
  try:
    numbers = () if isinstance(box, str) else tuple(float(side) for side in box)
  except (TypeError, ValueError, OverflowError):
    return None
  return numbers if len(numbers) == 4 and all(map(math.isfinite, numbers)) else None


def _same_shape(stated, size):
  """Whether two sizes, in pixels, can be of the same picture."""
  if not (stated[0] > 0 and stated[1] > 0):
    return False
  x, y = size[0] / stated[0], size[1] / stated[1]
  slack = _SAME_SHAPE + 1 / min(*size, *stated)
  return abs(x / y - 1) <= slack
