"""Trajectories as JSON, pictures included, so that a page can show them long after the run."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
import io
import json
import math
import typing

import numpy as np
from PIL import Image

from virl_jax.run import files

if typing.TYPE_CHECKING:
  from virl_jax import types

IMAGE_SIDE_PX = 640     # longer pictures are shrunk to this: enough for a page
CROP_SIDE_PX = 224
_LOSSLESS_SIDE_PX = 300  # small pictures stay lossless, so that fine textures stay crisp
_JPEG_QUALITY = 85
_DIGITS = 4              # of each token's numbers: more than colours can show


def entry(traj: types.Trajectory, image: Image.Image, ious: Sequence[float] | None,
          classes: Sequence[str] | None, modulators: Sequence[float] | None, advantage: float | None,
          reward: float | None, reward_parts: dict[str, float] | None,
          decode: Callable[[Sequence[int]], str] | None = None,
          by_token: Mapping[str, np.ndarray] | None = None) -> dict:
  """Makes one trajectory into a JSON-able dict.

  Args:
    traj: what the policy did.
    image: the original picture, decoded; crops are cut from it.
    ious: for each visual action, its best IoU with a ground-truth box; None if not known.
    classes: for each visual action "correct", "redundant" or "erroneous"; None if not known.
    modulators: for each visual action, what its advantage was multiplied by; None if not known.
    advantage: of the whole trajectory; None outside training.
    reward: total; None outside training.
    reward_parts: the terms of the reward by name, or None.
    decode: text of token ids; None leaves single tokens out.
    by_token: what training made of each token, by name, each float32[T] over `traj.ids`: "advantage", "modulator" and
      "trainer", the trainer's own log-probability in nats; or None.

  Returns:
    uid, rollout, kind, source, question, options, answers, answer, correct, stop, width, height, boxes_gt,
    boxes, reward, reward_parts, advantage, image (data URI) and turns; each turn has role, text, action (its name or
    None), box (the region that the action was about), box_shown (as written), error, iou, class, modulator, advantage
    and crop (data URI or None).  Boxes are pixels of the original picture.  A turn of the assistant's also has ids, as
    sampled, and learned, whether it is trained on; one that was sampled has "tokens" where `decode` is given: text, the
    text of each; logp, nats as sampled; and advantage, modulator and gap (the trainer's log-probability less the
    sampler's) where `by_token` has them: numbers, or one number if all are the same.

  Raises:
    ValueError: a sequence does not have one element for each visual action.
  """
  actions = len(traj.regions)
  for name, values in (("ious", ious), ("classes", classes), ("modulators", modulators)):
    if values is not None and len(values) != actions:
      raise ValueError(f"{name} must have one element for each of the {actions} visual actions. "
                       f"Received: {len(values)}")
  image = image.convert("RGB")
  turns, k, first = [], 0, len(traj.prompt_ids)
  for at, turn in enumerate(traj.turns):
    shown = {"role": turn.role, "text": turn.text, "action": turn.action, "box": _floats(turn.region),
             "box_shown": _floats(turn.written), "error": turn.error,
             "iou": None, "class": None, "modulator": None, "advantage": None, "crop": None}
    if turn.role == "assistant":
      shown |= {"ids": [int(i) for i in turn.ids], "learned": turn.logp is not None}
    if turn.region is not None:
      shown["iou"] = None if ious is None else _number(ious[k])
      shown["class"] = None if classes is None else str(classes[k])
      shown["modulator"] = None if modulators is None else _number(modulators[k])
      back = traj.turns[at + 1] if at + 1 < len(traj.turns) else None
      told = back is not None and back.role == "tool" and back.image_index is None  # in words alone
      shown["crop"] = None if told else crop(image, turn.region)
      k += 1
    if turn.role == "assistant" and advantage is not None:
      shown["advantage"] = _number(advantage * (1.0 if shown["modulator"] is None else shown["modulator"]))
    if decode is not None and turn.logp is not None:
      part = slice(first, first + len(turn.ids))
      shown["tokens"] = _tokens(turn, decode, {name: values[part] for name, values in (by_token or {}).items()})
    first += len(turn.ids)
    turns.append(shown)
  task = traj.task
  return {
      "uid": task.uid, "rollout": int(traj.index), "kind": task.kind, "source": task.source,
      "question": task.question,
      "options": None if task.options is None else list(task.options), "answers": list(task.answers),
      "answer": traj.answer, "correct": bool(traj.correct),
      "stop": None if traj.stop is None else str(traj.stop.value),
      "width": image.width, "height": image.height,
      "boxes_gt": [_floats(box) for box in task.boxes], "boxes": [_floats(box) for box in traj.regions],
      "reward": _number(reward), "advantage": _number(advantage),
      "reward_parts": None if reward_parts is None else {k: _number(v) for k, v in reward_parts.items()},
      "image": data_uri(image, IMAGE_SIDE_PX), "turns": turns}


def data_uri(image: Image.Image, max_side_px: int, lossless: bool = True) -> str:
  """Encodes a picture into a data URI, shrunk (never enlarged) to a longest side in pixels.

  Args:
    image: decoded.
    max_side_px: pixels of the longest side.
    lossless: whether small ones are kept as they are, which takes several times the room.
  """
  scale = max_side_px / max(image.size)
  if scale < 1:
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  if lossless and max(image.size) <= _LOSSLESS_SIDE_PX:
    image.convert("RGB").save(buffer, "PNG", optimize=True)
    mime = "image/png"
  else:
    image.convert("RGB").save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    mime = "image/jpeg"
  return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def save(path: str, entries: list[dict]) -> None:
  """Writes entries, one JSON object a line, replacing the file whole."""
  file = files.path(path)
  files.make(file.parent)
  files.write_text(file, "".join(json.dumps(item, allow_nan=False) + "\n" for item in entries))


def load(path: str) -> list[dict]:
  """Reads what `save` wrote.

  Raises:
    ValueError: a line is not JSON.
  """
  entries = []
  for number, raw in enumerate(io.StringIO(files.read_text(files.path(path))), start=1):
    try:
      entries.append(json.loads(raw))
    except ValueError as e:
      raise ValueError(f"{path}, line {number}, must be JSON. Received: {raw[:80]!r}") from e
  return entries


def _tokens(turn: types.Turn, decode: Callable[[Sequence[int]], str], found: dict[str, np.ndarray]) -> dict:
  logp = np.asarray(turn.logp, np.float64)
  shown = {"text": _pieces(turn.ids, decode), "logp": _short(logp)}
  shown |= {name: _short(found[name]) for name in ("advantage", "modulator") if name in found}
  return shown | ({"gap": _short(found["trainer"] - logp)} if "trainer" in found else {})


def _pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
  """The text of each id; that of several which only together make a character stands with the first of them."""
  pieces, at = [], 0
  while at < len(ids):
    n = 1
    text = decode(ids[at:at + 1])
    while "\ufffd" in text and n < 4 and at + n < len(ids):  # no character has more than four bytes
      n += 1
      text = decode(ids[at:at + n])
    if "\ufffd" in text:  # it is none, however many follow
      n, text = 1, "\ufffd"
    pieces += [text, *[""] * (n - 1)]
    at += n
  return pieces


def _short(values: Sequence[float]) -> list[float | None] | float | None:
  found = [None if v is None else round(v, _DIGITS) for v in map(_number, np.asarray(values, np.float64))]
  return found[0] if found and all(v == found[0] for v in found) else found


def crop(image: Image.Image, box: Sequence[float]) -> str | None:
  """The data URI of what lies in a box, or None where it holds no pixel of the picture."""
  if not all(math.isfinite(v) for v in box):
    return None
  left, top = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
  right, bottom = min(image.width, math.ceil(box[2])), min(image.height, math.ceil(box[3]))
  if left >= right or top >= bottom:
    return None
  return data_uri(image.crop((left, top, right, bottom)), CROP_SIDE_PX)


def _floats(values) -> list[float | None] | None:
  return None if values is None else [_number(v) for v in values]


def _number(value) -> float | None:
  """A plain float; None for what strict JSON can't hold."""
  return None if value is None or not math.isfinite(value) else float(value)
