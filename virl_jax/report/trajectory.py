"""One trajectory of `report.gallery`, made ready for the page's script: plain data, no markup."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import re

CLASSES = ("correct", "redundant", "erroneous")
_ZOOM = "image_zoom_in_tool"  # the action that need not be named
_TINY_CROP_PX = 96            # smaller crops are enlarged on the page, pixel by pixel
_CRISP_SIDE_PX = 300          # so are pictures up to this size
_LONGEST_TEXT = 12000         # characters shown of one turn
_LONGEST_ANSWER = 300

_SPECIAL = re.compile(r"(<\|[A-Za-z0-9_/]{1,40}\|>|</?(?:think|answer|tool_call|tool_response|tools)>)")
_REPEATED = re.compile(r"(<\|(?:image|video)_pad\|>)\1+")


def view(item: dict, keep: Callable[[str | None], int | None]) -> dict:
  """What viewer.js needs to draw one entry.

  Args:
    item: what `gallery.entry` returns.  A turn may also have "action", the name of the visual action that it
      carried out; a turn without it that has a box is a zoom.
    keep: a picture's data URI -> its number among the page's pictures, or None if it is no picture.

  Returns:
    uid, rollout, kind, source, question, options, answers, answer, reward, advantage, score, width and height; and
    outcome ("right", "wrong", or "no answer known"); stop in words, "" if not known; change (between two evaluations);
    best, the best IoU of all actions, 0 without actions, None if not known; classes, those that occur; parts, the
    reward's terms as pairs; picture, its number, and left_out, why it has none; crisp (whether it is shown pixel by
    pixel); drawn, the policy's boxes, each a place (x, y, width, height in pixels of the original picture), kind,
    title, number, and the number's left and top in percent and how many other numbers are to its left; truth, the
    places of the ground truth; and turns, each with role, text (pieces, of which every second is a special token),
    number (counted from 1 over those that have a box, else None), kind, call ("zoom 1"), other_action (its name if it
    is no zoom), class, iou, modulator, advantage, error, tokens, crop (a picture's number), tiny and notes.
  """
  width, height = int(item["width"]), int(item["height"])
  turns, drawn, number = [], [], 0
  rows: list[list[float]] = []  # of numbers that are side by side: left %, top %, how many
  for turn in item["turns"]:
    box = turn["box"]
    number += box is not None
    shown = _turn(turn, None if box is None else number, keep)
    turns.append(shown)
    if box is not None and None not in box:
      left, top, beside = _corner(box, width, height, rows)
      drawn.append({**_place(box), "number": number, "kind": shown["kind"], "left": f"{left:.2f}", "top": f"{top:.2f}",
                    "beside": beside, "title": shown["call"] + (f": {turn['class']}" if turn["class"] else "")})
  known = ("uid", "kind", "question", "options")
  ious = [_measured(turn["iou"]) for turn in item["turns"] if turn["box"] is not None]
  graded = bool(item["boxes_gt"]) and None not in ious
  return {name: item[name] for name in known} | {
      "rollout": item.get("rollout", 0), "source": item.get("source") or "",
      **{name: _measured(item.get(name)) for name in ("reward", "advantage", "score")},
      "answers": [cut(str(answer)) for answer in item["answers"]],
      "answer": None if item["answer"] is None else cut(str(item["answer"])),
      "outcome": "no answer known" if not item["answers"] else "right" if item["correct"] else "wrong",
      "stop": str("unfinished" if item["stop"] is None else item["stop"]).replace("_", " "),
      "change": item.get("change") or "",
      "best": max(ious, default=0.0) if graded else None,
      "classes": sorted({turn["class"] for turn in item["turns"] if turn["class"] in CLASSES}),
      "parts": [[name, _measured(value)] for name, value in (item["reward_parts"] or {}).items()],
      "width": width, "height": height, "crisp": max(width, height) <= _CRISP_SIDE_PX,
      "picture": keep(item["image"]), "left_out": item.get("left_out") or "", "drawn": drawn,
      "truth": [_place(box) for box in item["boxes_gt"] if None not in box], "turns": turns}


def cut(text: str) -> str:
  """An answer, cut off if it is too long for a few lines."""
  return text if len(text) <= _LONGEST_ANSWER else text[:_LONGEST_ANSWER] + " …"


def transcript(text: str) -> list[str]:
  """A turn's text in pieces, of which every second is a special token, which the style dims."""
  text = _REPEATED.sub(lambda m: f"{m[1]}×{len(m[0]) // len(m[1])}", text.strip("\n"))
  more = len(text) - _LONGEST_TEXT
  pieces = _SPECIAL.split(text[:_LONGEST_TEXT])
  return pieces + [f" … {more} more characters"] * (more > 0)


def _turn(turn: dict, number: int | None, keep: Callable[[str | None], int | None]) -> dict:
  box, action = turn["box"], turn.get("action")
  other = None if action == _ZOOM else action
  notes = []
  if box is not None:
    notes.append(f"box {_numbers(box)} px of the original")
  if turn["box_shown"] is not None:
    notes.append(f"written as {_numbers(turn['box_shown'])}")
  if turn["error"] is not None:
    notes.append(f"told: {turn['error']}")
  measured = box is not None and None not in box
  tokens = turn.get("tokens")
  return {name: turn[name] for name in ("role", "class", "error")} | {
      name: _measured(turn[name]) for name in ("iou", "modulator", "advantage")} | {
      "text": transcript(turn["text"]), "tokens": None if tokens is None else _tokens(tokens), "number": number,
      "kind": turn["class"] if turn["class"] in CLASSES else "plain",
      "call": (other or "zoom") + ("" if number is None else f" {number}"), "other_action": other,
      "crop": keep(turn.get("crop")), "notes": notes,
      "tiny": measured and max(box[2] - box[0], box[3] - box[1]) < _TINY_CROP_PX}


def _tokens(found: dict) -> dict:
  """The text of each token, and its numbers, one for all or a list."""
  return {"text": [str(text) for text in found["text"]]} | {
      name: [_measured(v) for v in found[name]] if isinstance(found[name], list) else _measured(found[name])
      for name in ("logp", "advantage", "modulator", "gap") if name in found}


def _measured(value: object) -> float | None:
  """A number as it is; None for anything else that a file may hold in its place."""
  return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _place(box: Sequence[float]) -> dict[str, str]:
  x1, y1, x2, y2 = box
  return {"x": f"{x1:g}", "y": f"{y1:g}", "width": f"{max(0.0, x2 - x1):g}", "height": f"{max(0.0, y2 - y1):g}"}


def _corner(box, width, height, rows):
  """Where a box's number goes: its upper left corner, in percent, and how many numbers are there already."""
  left, top = (min(max(100.0 * v / whole, 0.0), 100.0) for v, whole in ((box[0], width), (box[1], height)))
  for row in rows:
    if abs(left - row[0]) < 6 and abs(top - row[1]) < 6:
      row[2] += 1
      return row[0], row[1], int(row[2]) - 1
  rows.append([left, top, 1])
  return left, top, 0


def _numbers(values: Sequence[float]) -> str:
  return "(" + ", ".join("–" if v is None else f"{v:g}" for v in values) + ")"
