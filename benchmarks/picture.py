"""Draws the picture of README and of the site: a task that one evaluation got wrong and another right.

    python -m virl_jax.evaluate --model=@tiny --config=configs/tiny.py --benchmark=needle --data=- --out=EVAL/base
    python -m virl_jax.evaluate --model=runs/tiny --benchmark=needle --data=- --out=EVAL/trained
    python benchmarks/picture.py EVAL/base/needle EVAL/trained/needle --uid=test_000007 --out=docs/picture.png

Everything in it comes from `shown.jsonl` in the evaluations' folders, and from the pictures that this file names.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import textwrap

from PIL import Image, ImageDraw, ImageFont

_SIDE, _CROP, _GAP = 300, 200, 18  # pixels: sides of the picture and of a crop, space between them
_INK, _PAPER, _TRUTH, _ZOOMS = "#202124", "#ffffff", "#0b8043", ("#d93025", "#1a73e8", "#f29900")


def kept(folder: pathlib.Path) -> dict[str, dict]:
  """What an evaluation shows of each task, by uid.

  Args:
    folder: of a benchmark, as `evaluate` has written it.

  Raises:
    ValueError: it is no such folder.
  """
  path = folder / "shown.jsonl"
  if not path.is_file():
    raise ValueError(f"both must be folders that evaluate has written, with shown.jsonl. Received: {folder}")
  return {entry["uid"]: entry for entry in map(json.loads, path.read_text().splitlines())}


def flipped(before: dict[str, dict], after: dict[str, dict]) -> list[str]:
  """The tasks that were wrong before and are right after, with zooms both times; those with the best zooms first.

  Args:
    before, after: what `kept` gave.
  """
  best = lambda entry: min((turn["iou"] or 0.0 for turn in entry["turns"] if turn["box"]), default=0.0)
  gained = [uid for uid in before.keys() & after.keys()
            if not before[uid]["correct"] and after[uid]["correct"] and before[uid]["boxes"] and after[uid]["boxes"]]
  return sorted(gained, key=lambda uid: (-best(after[uid]), uid))


def draw(entries: list[tuple[str, dict]]) -> Image.Image:
  """A row for each trajectory: the picture with its boxes, what each zoom showed, and the answer.

  Args:
    entries: labels, and predictions for the same task, as `report.benchmark.entries` gives them.
  """
  small, large = (ImageFont.load_default(size) for size in (17, 21))
  crops = max(sum(bool(turn["box"]) for turn in entry["turns"]) for _, entry in entries)
  width = _GAP + _SIDE + (_GAP + _CROP) * max(crops, 1) + _GAP
  row = 34 + _SIDE + _GAP
  sheet = Image.new("RGB", (width, 52 + row * len(entries)), _PAPER)
  pen = ImageDraw.Draw(sheet)
  pen.text((_GAP, 16), entries[0][1]["question"], _INK, large)
  for number, (label, entry) in enumerate(entries):
    top = 52 + number * row
    verdict = "right" if entry["correct"] else "wrong"
    pen.text((_GAP, top + 4), f"{label}: answers \"{entry['answer'] or 'nothing'}\", {verdict}", _INK, small)
    original = Image.open(entry["file"]).convert("RGB")
    scale = _SIDE / max(original.size)
    picture = original.resize([round(side * scale) for side in original.size], Image.Resampling.NEAREST)
    marks = ImageDraw.Draw(picture)
    for box in entry["boxes_gt"]:
      marks.rectangle([v * scale for v in box], outline=_TRUTH, width=4)
    looks = [turn for turn in entry["turns"] if turn["box"]]
    for k, turn in enumerate(looks):
      colour = _ZOOMS[k % len(_ZOOMS)]
      marks.rectangle([v * scale for v in turn["box"]], outline=colour, width=3)
      left, down = 2 * _GAP + _SIDE + k * (_CROP + _GAP), top + 34
      x1, y1, x2, y2 = turn["box"]
      crop = original.crop((math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)))
      crop = crop.resize([round(side * _CROP / max(crop.size)) for side in crop.size], Image.Resampling.NEAREST)
      sheet.paste(crop, (left, down))
      pen.rectangle([left, down, left + crop.width - 1, down + crop.height - 1], outline=colour, width=3)
      overlap = "" if turn["iou"] is None else f", IoU {turn['iou']:.2f}"
      pen.text((left, down + crop.height + 6), f"zoom {k + 1}{overlap}", _INK, small)
    sheet.paste(picture, (_GAP, top + 34))
    if number == 0:
      note = "Green: what the question is about. Other colours: where the policy looked, and what it was shown."
      for at, line in enumerate(textwrap.wrap(note, (width - _SIDE - 2 * _GAP) // 9)):
        pen.text((2 * _GAP + _SIDE, top + 34 + _CROP + 34 + 22 * at), line, _INK, small)
  return sheet


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("folders", type=pathlib.Path, nargs=2, help="of the same benchmark: before, after")
  p.add_argument("--uid", help="of the task; without it, the flipped one whose looks are best afterwards")
  p.add_argument("--labels", type=lambda s: s.split(","), default=["before RL", "after RL"])
  p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs") / "picture.png")
  args = p.parse_args()
  before, after = map(kept, args.folders)
  gained = flipped(before, after)
  uid = args.uid or next(iter(gained), None)
  if uid not in before or uid not in after:
    raise ValueError(f"--uid must be a task of both. Received: {uid}; flipped are {', '.join(gained) or 'none'}")
  draw([(label, side[uid]) for label, side in zip(args.labels, (before, after))]).quantize(128).save(
      args.out, optimize=True)
  print(f"{len(gained)} of {len(after)} tasks were wrong and are right; this is {uid}")
  print(f"{args.out}: {args.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
  main()
