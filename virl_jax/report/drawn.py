"""One trajectory of `report.gallery` as a picture, for dashboards that show no pages: boxes, question and answer."""

from __future__ import annotations

import base64
import io
import textwrap

from PIL import Image, ImageDraw

# As page.css has them.
_COLOURS = {"correct": "#2b8fe6", "redundant": "#f2a900", "erroneous": "#e8542c"}
_PLAIN, _TRUTH = "#8b93a0", "#12b886"
_SIDE_PX = 320       # smaller pictures are enlarged to it
_LINE_CHARS, _LINES = 52, 4
_LINE_PX = 14
_GAP_PX = 12
_SMOOTH = Image.Resampling.LANCZOS


def picture(item: dict) -> Image.Image:
  """Draws an entry.

  Args:
    item: what `gallery.entry` returns.

  Returns:
    RGB: the picture with the ground truth in green and the policy's boxes in their classes' colours, numbered; below it
    question and answer, with question marks for characters that the font lacks.
  """
  seen = Image.open(io.BytesIO(base64.b64decode(item["image"].partition(",")[2]))).convert("RGB")
  scale = max(1.0, _SIDE_PX / max(seen.size))
  seen = seen.resize([round(side * scale) for side in seen.size], Image.Resampling.NEAREST)
  lines = _caption(item)
  out = Image.new("RGB", (max(seen.width, _SIDE_PX), seen.height + _LINE_PX * len(lines) + 6), "white")
  out.paste(seen)
  pen = ImageDraw.Draw(out)
  at = lambda box: [v * seen.size[i % 2] / (item["width"], item["height"])[i % 2] for i, v in enumerate(box)]
  for box in item["boxes_gt"]:
    if None not in box:
      pen.rectangle(at(box), outline=_TRUTH, width=3)
  number = 0
  for turn in item["turns"]:
    if turn["box"] is not None:
      number += 1
      if None not in turn["box"]:
        colour = _COLOURS.get(turn["class"], _PLAIN)
        x1, y1, x2, y2 = at(turn["box"])
        pen.rectangle((x1, y1, x2, y2), outline=colour, width=2)
        pen.rectangle((x1, y1, x1 + 12, y1 + 12), fill=colour)
        pen.text((x1 + 3, y1), str(number), fill="white")
  for i, line in enumerate(lines):
    pen.text((4, seen.height + 2 + _LINE_PX * i), line, fill="black")
  return out


def beside(*pictures: Image.Image, height_px: int = 252) -> Image.Image:
  """Pictures in a row, on white, with the same height; enlarged pixel by pixel if they become at least twice as large.

  Raises:
    ValueError: there are none.
  """
  if not pictures:
    raise ValueError("beside needs a picture. Received: none")
  sized = [each.convert("RGB").resize((max(1, round(each.width * height_px / each.height)), height_px),
                                      _SMOOTH if 2 * each.height > height_px else Image.Resampling.NEAREST)
           for each in pictures]
  out = Image.new("RGB", (sum(each.width + _GAP_PX for each in sized) - _GAP_PX, height_px), "white")
  left = 0
  for each in sized:
    out.paste(each, (left, 0))
    left += each.width + _GAP_PX
  return out


def _caption(item: dict) -> list[str]:
  """Question and answer in a few lines of plain characters."""
  verdict = f" ({'right' if item['correct'] else 'wrong'})" if item["answers"] else ""
  answer = f"no answer: {item['stop']}" if item["answer"] is None else f"answer: {item['answer']}"
  found = []
  for text, most in ((item["question"], _LINES), (answer + verdict, _LINES)):
    plain = "".join(c if " " <= c <= "~" else "?" for c in " ".join(text.split()))
    found += textwrap.wrap(plain, _LINE_CHARS, max_lines=most, placeholder=" ...")
  return found
