"""Hostile turns through the parser and the frame mapping: nothing raises; turns a second.

    python benchmarks/parse.py                    # one million turns
    python benchmarks/parse.py --count=50000 --seed=3

Turns are made from well-formed calls by cutting, doubling and inserting: malformed numbers, digits of other scripts,
control characters, lone surrogates, nested and unclosed brackets, tags within strings, and texts of 20,000 characters
and more.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import time

import timing  # of this folder

from virl_jax import types
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.rollout.actions import zoom

NUMBERS = ["NaN", "Infinity", "-Infinity", "1e308", "-1e308", "1e999", "-5", "0", "-0", "1", "17", "83.5", "1e-320",
           "true", "null", '"7"', "[1]", "{}", "٣", "４２", "१२", "0x10", "1_000", "9" * 400, "-", "+3", ".5", "5."]
PIECES = ["<tool_call>", "</tool_call>", "<answer>", "</answer>", "<think>", "</think>", "<|im_end|>", "<|image_pad|>",
          "<|vision_start|>", "{", "}", "[", "]", '"', "\\", ",", ":", "\x00", "\ud800", "\ufffd", "\U0001f600", "\n",
          " ", '"bbox_2d"', '"name"', '"arguments"', '"target_image"', zoom.NAME, "__import__('os')",
          "\\u0000", "\u202e"]
CFG = images.Config(crop_expand=True)


def turn(rng: random.Random) -> str:
  """One hostile turn."""
  kind = rng.random()
  if kind < 0.00002:
    return rng.choice(["[", "{", '{"a":', "<tool_call>", "9", "<answer>"]) * 20_000
  if kind < 0.1:
    return "".join(rng.choices(PIECES + NUMBERS, k=rng.randrange(30)))
  if kind < 0.2:
    return "".join(map(chr, (rng.randrange(0x110000) for _ in range(rng.randrange(40)))))
  number = lambda: f"{rng.uniform(-20, 120):.{rng.randrange(4)}f}" if rng.random() < 0.9 else rng.choice(NUMBERS)
  box = "[" + ", ".join(number() for _ in range(rng.choice([3, 4, 4, 4, 4, 4, 4, 5]))) + "]"
  arguments = [f'"bbox_2d": {box}']
  if rng.random() < 0.3:
    arguments.append(f'"target_image": {rng.choice(NUMBERS)}')
  if rng.random() < 0.1:
    arguments.append(rng.choice(arguments))
  rng.shuffle(arguments)
  name = zoom.NAME if rng.random() < 0.9 else rng.choice(PIECES)
  text = f'<tool_call>{{"name": {json.dumps(name)}, "arguments": {{{", ".join(arguments)}}}}}</tool_call>'
  for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 4])):
    at, end = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
    text = rng.choice([text[:at] + text[end:], text[:end] + text[at:],
                       text[:at] + rng.choice(PIECES + NUMBERS) + text[at:]])
  return text


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--count", type=int, default=1_000_000)
  p.add_argument("--seed", type=int, default=0)
  args = p.parse_args()
  rng, outcomes, seconds, longest, boxes = random.Random(args.seed), collections.Counter(), 0.0, 0.0, 0
  region, shown = types.Box(100, 50, 612, 434), (84, 56)
  for start in range(0, args.count, 10_000):
    texts = [turn(rng) for _ in range(min(10_000, args.count - start))]
    for text in texts:
      began = time.perf_counter()
      found = prompt.parse(text)
      took = time.perf_counter() - began
      seconds, longest = seconds + took, max(longest, took)
      if isinstance(found, prompt.ParseFailure):
        assert 0 < len(found.message) < 80, found
        outcomes[found.message] += 1
        continue
      outcomes[type(found).__name__] += 1
      if isinstance(found, zoom.Zoom):
        box = zoom.check(found.box, region, shown, CFG)
        if not isinstance(box, str):
          boxes += 1
          cut = zoom.expand(box, (1000, 700), CFG)
          assert region.x1 <= box.x1 <= box.x2 <= region.x2 and region.y1 <= box.y1 <= box.y2 <= region.y2, (text, box)
          assert 0 <= cut.x1 <= box.x1 and box.y2 <= cut.y2 <= 700, (text, cut)
    if (start // 10_000) % 10 == 9:
      print(f"  {start + len(texts):,} turns, {(start + len(texts)) / seconds:,.0f} a second", flush=True)
  print("\n" + timing.table(["what came of it", "turns"], outcomes.most_common()) + "\n")
  print(f"{args.count:,} turns without an exception; {args.count / seconds:,.0f} a second, the slowest "
        f"{longest * 1e3:.1f} ms; {boxes:,} boxes mapped")
  print(timing.last_line({"count": args.count, "seed": args.seed, "turns_s": args.count / seconds,
                          "slowest_ms": longest * 1e3, "boxes": boxes, "outcomes": dict(outcomes)}))


if __name__ == "__main__":
  main()
