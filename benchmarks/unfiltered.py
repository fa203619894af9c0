"""Makes the sets for the arms of unfiltered and curated data: needle pictures, many of which need no zoom.

    python benchmarks/unfiltered.py --base=runs/guesser --out=runs/sets

    OUT/unfiltered  all tasks, built by `curate build`: of twenty, nine can be answered without a zoom, as colours
                    suggest; two have a wrong answer; one has a box that is most of the picture; one is a copy of
                    another, saved again; seven are good
    OUT/curated     what `curate` keeps of these, with BASE as its policy
    OUT/held_out    other pictures, all of which need a zoom

Finished sets are kept: the same command goes on.  benchmarks/reproduce.py calls this for the arms that need it.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys

import curation  # of this folder

from virl_jax.data.curation import build
from virl_jax.data.curation import parts
from virl_jax.tiny import needle

ROOT = pathlib.Path(__file__).parents[1]
SIZE, HELD_OUT = 1400, 256
# The arms' base answers three times in ten without a zoom, and otherwise calls for one, which with zooming off is no
# answer: it is right without a zoom in at most three of ten.  The threshold is half of that, which needs more samples.
WITHOUT_ZOOM, MOST_WITHOUT = 16, 0.15
# The groups of twenty tasks, in turn.
GROUPS = 9 * ("guessable",) + 7 * ("good",) + 2 * ("wrong",) + ("huge", "again")


def records(folder: pathlib.Path, size: int) -> None:
  """Writes pictures and records.jsonl, of all groups, in random order."""
  plain = needle.Config()
  guessable = needle.Config(guessable=1.0)
  rng, lines, good = random.Random(0), [], []
  for i in range(size):
    group = GROUPS[i % len(GROUPS)]
    if group == "again":
      task, side_px = rng.choice(good), rng.choice((200, 230, 252))
      image, scale = curation.again(task.image, side_px, 75), side_px / plain.side_px
    else:
      task, _ = needle.draw(0, "train", i, guessable if group == "guessable" else plain)
      image, scale = task.image, 1
    boxes = [[v * scale for v in box] for box in task.boxes]
    if group == "huge":
      boxes = [[0, rng.randrange(60), plain.side_px, plain.side_px]]
    answer = task.answers[0]
    if group == "wrong":
      others = {"yes": ["no"], "no": ["yes"]}.get(answer) or [p for p in needle.PATTERNS if p != answer]
      answer = rng.choice(others)
    if group == "good":
      good.append(task)
    lines.append(record(folder, f"{group}_{i:05d}", image, task, [answer], boxes))
  rng.shuffle(lines)
  (folder / "records.jsonl").write_text("".join(lines))


def record(folder: pathlib.Path, uid: str, image: bytes, task, answers: list[str], boxes: list) -> str:
  """Writes a picture; returns its line of records.jsonl."""
  (folder / f"{uid}.jpg").write_bytes(image)
  return json.dumps({"id": uid, "image": f"{uid}.jpg", "question": task.question, "answers": answers, "boxes": boxes,
                     "task": task.kind}) + "\n"


def held_out(folder: pathlib.Path, size: int) -> None:
  """Writes pictures and records.jsonl of needle's test split."""
  tasks = [needle.draw(0, "test", i, needle.Config())[0] for i in range(size)]
  (folder / "records.jsonl").write_text("".join(
      record(folder, task.uid, task.image, task, list(task.answers), [list(b) for b in task.boxes]) for task in tasks))


def built(raw: pathlib.Path, out: pathlib.Path, write, size: int) -> None:
  """Builds a set of the records that `write` writes."""
  if not (raw / "records.jsonl").exists():
    raw.mkdir(parents=True, exist_ok=True)
    write(raw, size)
  build.run(parts.Job("jsonl", str(raw), "train", str(out), embed=True), 1)


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--base", required=True, help="the policy that curation asks: a folder that model.path takes")
  p.add_argument("--out", type=pathlib.Path, required=True)
  p.add_argument("--size", type=int, default=SIZE)
  p.add_argument("--held_out", type=int, default=HELD_OUT)
  args = p.parse_args()
  out = args.out.resolve()
  built(out / "raw", out / "unfiltered", records, args.size)
  built(out / "raw_held_out", out / "held_out", held_out, args.held_out)
  base = args.base if args.base.startswith("@") else os.path.abspath(args.base)
  config = out / "config.py"
  config.write_text(f"import runpy\n\ndef get_config():\n  c = runpy.run_path({str(ROOT / 'configs' / 'tiny.py')!r})"
                    f"['get_config']()\n  c.model.path = {base!r}\n"
                    f"  c.curate.policy.without_zoom = {WITHOUT_ZOOM}\n"
                    f"  c.curate.filter.most_without = {MOST_WITHOUT}\n  return c\n")
  if not (out / "curated" / "report.html").exists():
    subprocess.run(curation.curate(out / "unfiltered", out / "curated", config), cwd=ROOT, check=True)
  print(json.dumps({"counts": json.loads((out / "curated" / "counts.json").read_text()),
                    "fates": curation.fates(out / "curated", lambda uid: uid.rpartition("_")[0])}))


if __name__ == "__main__":
  sys.exit(main())
