"""What curation knows of a task: facts, read once, for rules and reports.  A pure function of task and picture.

    answer types     option     one of given options
                     yes_no     yes or no
                     number     a number, with or without a unit
                     text       anything else
                     none       no answer: only a box is asked for
    question types   how a question begins, one of `_OPENERS`; "is", "are", "does" and so on are "yes/no"; or "other"

A picture is recognised by two things: a hash of 64 bits (which of its lowest frequencies are above their median), which
finds near-duplicates, and a thumbnail, which confirms them: flat drawings and pages of text share hashes but differ in
their thumbnails.  Source: the perceptual hash of DCT coefficients is common knowledge; its use here is ours.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
import dataclasses
import math
import re
import unicodedata

import numpy as np
from PIL import Image

from virl_jax import types
from virl_jax.data import answers as answers_lib
from virl_jax.data import images

VERSION = 1        # raised when a fact is computed in another way, so that older ones are not used
THUMB_PX = 16      # side of the thumbnail
_HASHED_PX = 32    # side of what is hashed
_LOW = 8           # frequencies in each direction
ANSWER_TYPES = ("option", "yes_no", "number", "text", "none")
_OPENERS = ("what", "which", "how many", "how", "who", "where", "when", "why")
_YES_NO = ("is", "are", "was", "were", "do", "does", "did", "can", "could", "has", "have", "will", "would")
_NUMBER = re.compile(r"[-+$€£]?\d[\d,.:/]*\s*[%\w°]{0,6}\.?")
_TURN = np.cos(np.pi / _HASHED_PX * (np.arange(_HASHED_PX) + 0.5) * np.arange(_LOW)[:, None])


@dataclasses.dataclass(frozen=True)
class Look:
  """What a picture is recognised by.

  Attributes:
    size_px: width and height, upright.
    hash: of 64 bits.
    thumb: its thumbnail's RGB bytes, row by row.
  """

  size_px: tuple[int, int]
  hash: int
  thumb: bytes


@dataclasses.dataclass(frozen=True)
class Facts:
  """The facts of a task.

  Attributes:
    provenance, uid, source, kind, question: as the task has them.
    image: hash of the image file, as the set's index has it.
    answer_type, question_type: see the module.
    answer_chars: length of the shortest accepted answer; 0 if there is none.
    attainable: whether an accepted answer scores above 0 by the task's own rule, or none is asked for.
    n_boxes: how many rationale boxes.
    coverage: share of the picture that the boxes cover together, in [0, 1].
    least_box_px: area of the smallest box in the picture as shown, in pixels; 0 if there is none.
    box_problem: why a box cannot be zoomed into; "" if all can.
    problem: why the picture cannot be used; "" if it can.
    look: the picture; None if it cannot be used.
  """

  provenance: str
  uid: str
  source: str
  kind: str
  question: str
  image: int
  answer_type: str
  question_type: str
  answer_chars: int
  attainable: bool
  n_boxes: int
  coverage: float = 0.0
  least_box_px: float = 0.0
  box_problem: str = ""
  problem: str = ""
  look: Look | None = None

  def to_json(self) -> dict:
    """For a line of JSON."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    if self.look is not None:
      fields["look"] = [*self.look.size_px, self.look.hash, base64.b64encode(self.look.thumb).decode()]
    return fields

  @classmethod
  def from_json(cls, fields: dict) -> Facts:
    """The inverse of `to_json`."""
    w, h, bits, thumb = fields["look"] or (0, 0, 0, "")
    return cls(**fields | {"look": fields["look"] and Look((w, h), bits, base64.b64decode(thumb))})


def look(picture: Image.Image) -> Look:
  """What a decoded picture is recognised by."""
  grey = np.asarray(picture.convert("L").resize((_HASHED_PX, _HASHED_PX), Image.Resampling.BOX), np.float64)
  low = (_TURN @ grey @ _TURN.T).ravel()
  bits = low > np.median(low[1:])
  thumb = picture.resize((THUMB_PX, THUMB_PX), Image.Resampling.BOX)
  return Look(picture.size, int(np.packbits(bits).view(">u8")[0]), np.asarray(thumb, np.uint8).tobytes())


def of(task: types.Task, image: int, cfg: images.Config, factor: int) -> Facts:
  """The facts of a task.

  Args:
    task: its image as bytes or path.
    image: hash of the image file.
    cfg: how pictures are shown, and which boxes can be zoomed into.
    factor: what a shown picture's sides are multiples of, pixels.
  """
  told = Facts(
      provenance=task.provenance, uid=task.uid, source=task.source, kind=task.kind, question=task.question, image=image,
      answer_type=answer_type(task), question_type=question_type(task.question),
      answer_chars=min(map(len, task.answers), default=0), n_boxes=len(task.boxes),
      attainable=not task.answers or answers_lib.attainable(task.match, task.answers, task.options) > 0)
  try:
    seen = look(images.decode(task.image, cfg.decode_max_pixels))
  except ValueError as e:
    return dataclasses.replace(told, problem=str(e).partition(" object at")[0])
  w, h = seen.size_px
  shown_h, shown_w = images.smart_resize(h, w, factor, cfg.min_pixels, cfg.max_pixels)
  scale = shown_h * shown_w / (h * w)
  return dataclasses.replace(
      told, look=seen, coverage=coverage(task.boxes, seen.size_px), box_problem=_box_problem(task.boxes, w, h, cfg),
      least_box_px=min((scale * (b.x2 - b.x1) * (b.y2 - b.y1) for b in task.boxes), default=0.0))


def coverage(boxes: Sequence[types.Box], size_px: tuple[int, int]) -> float:
  """Share of a picture that boxes cover together, in [0, 1]; where boxes overlap counts once."""
  w, h = size_px
  clipped = [(max(b.x1, 0.0), max(b.y1, 0.0), min(b.x2, float(w)), min(b.y2, float(h))) for b in boxes]
  xs = sorted({x for x1, _, x2, _ in clipped for x in (x1, x2)})
  covered = 0.0
  for left, right in zip(xs, xs[1:]):
    top = -math.inf
    for y1, y2 in sorted((y1, y2) for x1, y1, x2, y2 in clipped if x1 <= left and right <= x2 and y1 < y2):
      covered += (right - left) * max(0.0, y2 - max(y1, top))
      top = max(top, y2)
  return covered / (w * h)


def answer_type(task: types.Task) -> str:
  """What kind of answer it asks for, one of `ANSWER_TYPES`."""
  if not task.answers:
    return "none"
  if task.options:
    return "option"
  plain = [answers_lib.normalize(answer) for answer in task.answers]
  if all(answer in ("yes", "no") for answer in plain):
    return "yes_no"
  return "number" if all(_NUMBER.fullmatch(answer.strip()) for answer in task.answers) else "text"


def question_type(question: str) -> str:
  """How a question begins."""
  found = " ".join(words(question)[:2])
  for opener in _OPENERS:
    if found == opener or found.startswith(opener + " "):
      return opener
  return "yes/no" if found.partition(" ")[0] in _YES_NO else "other"


def words(text: str) -> list[str]:
  """The words of a text in lower case, without what is between them."""
  return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def near(looks: Sequence[Look], distance: int, difference: float) -> Iterable[tuple[int, int]]:
  """Pairs of near-duplicate pictures, by number.

  Two hashes that differ in at most `distance` bits agree in one of distance + 1 stretches of bits: only such hashes are
  compared.

  Args:
    looks: the pictures, one look for each.
    distance: most bits in which the hashes may differ.
    difference: most levels of 255 by which the thumbnails may differ on average.

  Yields:
    (first, second), first < second; a pair may come more than once.
  """
  if len(looks) < 2:
    return
  hash_N = np.array([it.hash for it in looks], np.uint64)
  thumb_NP = np.array([np.frombuffer(it.thumb, np.uint8) for it in looks]).astype(np.int16)
  edges = np.linspace(0, 64, distance + 2).round().astype(int)
  for low, high in zip(edges, edges[1:]):
    mask = np.uint64((1 << int(high)) - (1 << int(low)))
    order_N = np.argsort(hash_N & mask, kind="stable")
    starts = np.flatnonzero(np.diff(hash_N[order_N] & mask)) + 1
    for bucket in np.split(order_N, starts):
      for at in range(len(bucket) - 1):
        mine, others = bucket[at], bucket[at + 1:]
        close = others[np.bitwise_count(hash_N[others] ^ hash_N[mine]) <= distance]
        if len(close):
          apart = np.abs(thumb_NP[close] - thumb_NP[mine]).mean(axis=1)
          for other in close[apart <= difference]:
            yield min(int(mine), int(other)), max(int(mine), int(other))


def _box_problem(boxes, w, h, cfg) -> str:
  """What keeps a box from being zoomed into."""
  for x1, y1, x2, y2 in boxes:
    if not all(map(math.isfinite, (x1, y1, x2, y2))) or not (x1 < x2 and y1 < y2):
      return "has no area"
    if x1 < -1 or y1 < -1 or x2 > w + 1 or y2 > h + 1:
      return f"lies outside the picture of {w} x {h}"
    if cfg.crop_expand:
      continue
    short, long = sorted((x2 - x1, y2 - y1))
    if short < cfg.crop_min_side_px:
      return f"has a side of {short:g} px, and image.crop_min_side_px is {cfg.crop_min_side_px}"
    if long > cfg.crop_max_aspect * short:
      return f"is {long / short:.0f} times as long as wide, and image.crop_max_aspect is {cfg.crop_max_aspect:g}"
  return ""
