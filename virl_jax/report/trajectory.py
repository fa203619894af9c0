"""One trajectory of `report.gallery`, made ready for the page's template: plain data, no markup."""

from __future__ import annotations

from collections.abc import Sequence

CLASSES = ("correct", "redundant", "erroneous")
_ZOOM = "image_zoom_in_tool"  # the action that goes without saying
_TINY_CROP_PX = 96            # smaller crops are enlarged on the page, pixel by pixel
_CRISP_SIDE_PX = 300          # so are pictures up to this size


def view(item: dict) -> dict:
  """What the template needs to draw one entry.

  Args:
    item: what `gallery.entry` returns.  A turn may also have "action", the name of the visual action that it
      carried out; a turn without it that has a box is a zoom.

  Returns:
    The entry with: crisp (whether the picture is shown pixel by pixel); drawn, the policy's boxes, each a place (x, y,
    width, height in pixels of the original picture), kind, title, number, and left and top in per cent and how many
    numbers stand beside it; truth, the places of the ground truth; and turns, each with number (counted from 1 over
    those that have a box, else None), kind, call ("zoom 1"), other_action (its name if it is no zoom), tiny, notes.
  """
  width, height = int(item["width"]), int(item["height"])
  turns, drawn, number = [], [], 0
  rows: list[list[float]] = []  # of numbers that stand side by side: left %, top %, how many
  for turn in item["turns"]:
    box = turn["box"]
    number += box is not None
    shown = _turn(turn, None if box is None else number)
    turns.append(shown)
    if box is not None and None not in box:
      left, top, beside = _corner(box, width, height, rows)
      drawn.append({**_place(box), "number": number, "kind": shown["kind"], "left": f"{left:.2f}", "top": f"{top:.2f}",
                    "beside": beside, "title": f"{shown['call']}: {turn['class'] or 'not graded'}"})
  return {**item, "width": width, "height": height, "crisp": max(width, height) <= _CRISP_SIDE_PX, "drawn": drawn,
          "truth": [_place(box) for box in item["boxes_gt"] if None not in box], "turns": turns}


def _turn(turn: dict, number: int | None) -> dict:
  box, action, crop = turn["box"], turn.get("action"), turn.get("crop")
  other = None if action == _ZOOM else action
  notes = []
  if box is not None:
    notes.append(f"box {_numbers(box)} px of the original")
  if turn["box_shown"] is not None:
    notes.append(f"written as {_numbers(turn['box_shown'])}")
  if turn["error"] is not None:
    notes.append(f"told: {turn['error']}")
  measured = box is not None and None not in box
  return {**turn, "number": number, "kind": turn["class"] if turn["class"] in CLASSES else "plain",
          "call": (other or "zoom") + ("" if number is None else f" {number}"), "other_action": other, "crop": crop,
          "tiny": measured and max(box[2] - box[0], box[3] - box[1]) < _TINY_CROP_PX, "notes": notes}


def _place(box: Sequence[float]) -> dict[str, str]:
  x1, y1, x2, y2 = box
  return {"x": f"{x1:g}", "y": f"{y1:g}", "width": f"{max(0.0, x2 - x1):g}", "height": f"{max(0.0, y2 - y1):g}"}


def _corner(box, width, height, rows):
  """Where a box's number goes: its upper left corner, in line with numbers already there."""
  left, top = (min(max(100.0 * v / whole, 0.0), 100.0) for v, whole in ((box[0], width), (box[1], height)))
  for row in rows:
    if abs(left - row[0]) < 6 and abs(top - row[1]) < 6:
      row[2] += 1
      return row[0], row[1], int(row[2]) - 1
  rows.append([left, top, 1])
  return left, top, 0


def _numbers(values: Sequence[float]) -> str:
  return "(" + ", ".join("–" if v is None else f"{v:g}" for v in values) + ")"
