"""The picture of README and of the site: one held-out task, before a run and after it, out of its workdir.

    python benchmarks/picture.py --workdir=runs/tiny --uid=test_000007 --out=docs/picture.png

Of what `train` and `sft` keep of their evaluations (`rollouts/before.jsonl`, `after.jsonl`); the figure is as they say.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import pathlib
import textwrap

from PIL import Image, ImageDraw, ImageFont

_SIDE, _CROP, _GAP = 300, 200, 18  # pixels: of the picture, of a crop, between them
_INK, _PAPER, _TRUTH, _ZOOMS = "#202124", "#ffffff", "#0b8043", ("#d93025", "#1a73e8", "#f29900")


def kept(workdir: pathlib.Path, when: str, uid: str) -> dict:
  """The trajectory of a task that an evaluation left.

  Args:
    workdir: of a run.
    when: before or after.
    uid: the task's.

  Raises:
    ValueError: there is none.
  """
  path = workdir / "rollouts" / f"{when}.jsonl"
  if not path.is_file():
    raise ValueError(f"--workdir must be a run's folder with rollouts/{when}.jsonl. Received: {workdir}")
  entries = [json.loads(line) for line in path.read_text().splitlines()]
  for entry in entries:
    if entry["uid"] == uid:
      return entry
  raise ValueError(f"--uid must be one of {', '.join(e['uid'] for e in entries)}. Received: {uid}")


def draw(entries: list[tuple[str, dict]]) -> Image.Image:
  """A row for each trajectory: the picture with its boxes, what each zoom showed, and the answer.

  Args:
    entries: a label and a trajectory each, of the same task, as `report.gallery` keeps them.
  """
  small, large = (ImageFont.load_default(size) for size in (17, 21))
  crops = max(sum(bool(turn["crop"]) for turn in entry["turns"]) for _, entry in entries)
  width = _GAP + _SIDE + (_GAP + _CROP) * max(crops, 1) + _GAP
  row = 34 + _SIDE + _GAP
  sheet = Image.new("RGB", (width, 52 + row * len(entries)), _PAPER)
  pen = ImageDraw.Draw(sheet)
  pen.text((_GAP, 16), entries[0][1]["question"], _INK, large)
  for number, (label, entry) in enumerate(entries):
    top = 52 + number * row
    verdict = "right" if entry["correct"] else "wrong"
    pen.text((_GAP, top + 4), f"{label}: answers \"{entry['answer'] or 'nothing'}\", {verdict}", _INK, small)
    picture = _image(entry["image"])
    scale = _SIDE / max(picture.size)
    picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.NEAREST)
    marks, scale = ImageDraw.Draw(picture), picture.width / entry["width"]
    for box in entry["boxes_gt"]:
      marks.rectangle([v * scale for v in box], outline=_TRUTH, width=4)
    looks = [turn for turn in entry["turns"] if turn["crop"]]
    for k, turn in enumerate(looks):
      colour = _ZOOMS[k % len(_ZOOMS)]
      marks.rectangle([v * scale for v in turn["box"]], outline=colour, width=3)
      left, down = 2 * _GAP + _SIDE + k * (_CROP + _GAP), top + 34
      crop = _image(turn["crop"])
      crop = crop.resize([round(side * _CROP / max(crop.size)) for side in crop.size], Image.Resampling.NEAREST)
      sheet.paste(crop, (left, down))
      pen.rectangle([left, down, left + crop.width - 1, down + crop.height - 1], outline=colour, width=3)
      overlap = "" if turn["iou"] is None else f", IoU {turn['iou']:.2f}"
      pen.text((left, down + crop.height + 6), f"zoom {k + 1}{overlap}", _INK, small)
    sheet.paste(picture, (_GAP, top + 34))
    if number == 0:
      note = "Green: what the question is about. Other colours: where the policy looked, and what it was shown."
      for at, line in enumerate(textwrap.wrap(note, 46)):
        pen.text((2 * _GAP + _SIDE, top + 34 + _CROP + 34 + 22 * at), line, _INK, small)
  return sheet


def _image(uri: str) -> Image.Image:
  return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--workdir", type=pathlib.Path, required=True)
  p.add_argument("--uid", default="test_000007", help="of a task that the evaluations kept")
  p.add_argument("--labels", type=lambda s: s.split(","), default=["before", "after"])
  p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs") / "picture.png")
  args = p.parse_args()
  entries = [(label, kept(args.workdir, when, args.uid)) for label, when in zip(args.labels, ("before", "after"))]
  draw(entries).quantize(128).save(args.out, optimize=True)
  print(f"{args.out}: {args.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
  main()
