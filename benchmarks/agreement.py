"""Scores predictions of known models, and compares with figures that others published or the official script gave.

    python benchmarks/agreement.py --data=REALDATA/native

The folder has `predictions/` (files of others' answers) and `expected.json` (their figures); neither is part of the
project.  Exits with 1 if a figure differs by more than rounding explains.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

from virl_jax import evaluate

# Each has a name, predictions, benchmark, the benchmark's own file or None, where our figure is, and where theirs is
# and in what unit.
CASES = (
    *((f"POPE, LLaVA-1.5-13B, F1, {split}", "pope_llava15_13b/answers.jsonl", "pope", "pope_llava15_13b/gt",
       ("splits", f"coco/{split}", "F1"), (f"pope_llava15_13b/{split}", "F1"), 1)
      for split in ("random", "popular", "adversarial")),
    ("TextVQA, LLaVA-1.5-13B, accuracy", "textvqa_llava15_13b/answers.jsonl", "textvqa",
     "textvqa_gt/textvqa_0.5.1_val_answers.jsonl", ("accuracy",), ("textvqa_llava15_13b", "official_accuracy_pct"),
     100),
    ("DocVQA, Qwen2-VL-7B, ANLS", "docvqa_qwen2_vl_7b_instruct/results.json", "docvqa", None, ("ANLS",),
     ("docvqa_qwen2_vl_7b_instruct", "official_ANLS"), 1),
    ("V* attributes, DeepEyes, accuracy", "vstar_deepeyes/result_direct_attributes_deepeyes_acc.jsonl", "vstar", None,
     ("direct_attributes",), ("vstar_deepeyes/direct_attributes", "accuracy_pct"), 100),
    *((f"V*, LLaVA-1.5 ({name}), accuracy", f"vstar_llava15_options/vstar_{name}.jsonl", "vstar", None,
       ("overall",), (f"vstar_llava15_options/vstar_{name}.jsonl", "overall_pct"), 100)
      for name in ("crop", "448_448", "pooling_336_336")),
    *((f"HR-Bench 4K, LLaVA-1.5, {kind}", "hrbench4k_llava15/hr_4k_baseline.jsonl", "hrbench4k", None, (kind,),
       ("hrbench4k_llava15/hr_4k_baseline.jsonl", kind), 100) for kind in ("single", "cross", "pooled")),
)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", required=True, type=pathlib.Path)
  args = parser.parse_args()
  theirs, root = json.loads((args.data / "expected.json").read_text())["predictions"], args.data / "predictions"
  rows, done = [], {}
  for what, predictions, benchmark, data, at, there, unit in CASES:
    if predictions not in done:
      done[predictions], _ = evaluate.score(str(root / predictions), benchmark, data and str(root / data))
    ours, n = done[predictions]["figures"], done[predictions]["n"]
    for key in at:
      n = ours.get("n", n)
      ours = ours[key]
    known = theirs[there[0]][there[1]] / unit
    rows.append({"what": what, "n": n, "ours": ours, "theirs": known,
                 "agrees": abs(ours - known) < 1e-9})
  print("| | rows | ours | theirs |\n|---|---|---|---|")
  for row in rows:
    mark = "" if row["agrees"] else " (!)"
    print(f"| {row['what']} | {row['n']:,} | {row['ours']:.6f} | {row['theirs']:.6f}{mark} |")
  print(json.dumps({"command": " ".join(sys.argv), "rows": rows}))
  return not all(row["agrees"] for row in rows)


if __name__ == "__main__":
  sys.exit(main())
