"""Scores predictions on public benchmarks, by the rules that these are known by.

    python -m virl_jax.evaluate --score=PREDICTIONS --benchmark=pope --data=POPE/output/coco [--out=DIR]
    python -m virl_jax.evaluate --score=result_direct_attributes.jsonl --benchmark=vstar

No model is needed.  Which benchmarks and which files of predictions there are, and what rule each is scored by, is in
docs/evaluation.md.  --data is the benchmark's own file or folder; it may be left out where the predictions hold their
questions and references themselves.  Pictures are not looked at.

It prints the figures, what could not be used and why, and last a line of JSON.  With --out, DIR/NAME/results.json has
the same, and DIR/NAME/rows.jsonl what each prediction was worth.

--judge=http://HOST:PORT/v1 --judge_model=NAME has a language model judge free answers that are not literally the
reference (V*, VisualProbe, records); verdicts are kept in DIR/verdicts.jsonl.
"""

from __future__ import annotations

if __name__ == "__main__":
  from virl_jax.run import signals
  signals.install()

import dataclasses
import json
import os

from absl import app
from absl import flags

from virl_jax.data import judge_model
from virl_jax.eval import predictions
from virl_jax.eval.benchmarks import rows as rows_lib
from virl_jax.eval.benchmarks import table
from virl_jax.run import files
from virl_jax.run import setup

# Those whose own rule is none that a judge could stand in for.
_WITHOUT_JUDGE = ("pope", "textvqa", "docvqa", "infographicsvqa")


def score(path: str, benchmark: str, data: str | None = None, judge: judge_model.Judge | None = None
          ) -> tuple[dict, predictions.Read]:
  """Scores a file of predictions.

  Args:
    path: of the file; see `eval.predictions` for its layouts.
    benchmark: a key of `table.BENCHMARKS`.
    data: the benchmark's own file or folder; None where the predictions hold questions and references.
    judge: whom to ask about answers that the rule does not take; None for nobody.

  Returns:
    What the benchmark's `score` gives, under the name that was asked for; and what was read.

  Raises:
    ValueError: there is no such benchmark, or a file is of no use.
    judge_model.Unreachable: the judge gives no reply.
  """
  module = named(benchmark)
  loaded = None
  if data is not None:
    loaded = module.load(data, rows_lib.How(need_images=False, seed=None))
    if not loaded.tasks:
      raise ValueError(f"{data} must have rows of {benchmark} that can be used. Received: {loaded.describe()}")
  read = predictions.read(path, benchmark, loaded)
  found = read.predictions
  if judge is not None:
    if benchmark in _WITHOUT_JUDGE:
      raise ValueError(f"--judge must be left out for {benchmark}: it is scored by a rule of its own")
    found = _judged(read.loaded, found, judge)
  return module.score(read.loaded, found) | {"benchmark": benchmark}, read


def named(benchmark: str):
  """The benchmark of that name.

  Raises:
    ValueError: there is none.
  """
  if benchmark not in table.BENCHMARKS:
    raise ValueError(f"--benchmark must be one of {', '.join(table.BENCHMARKS)}. Received: {benchmark or 'nothing'}")
  return table.BENCHMARKS[benchmark]


def _judged(loaded: rows_lib.Loaded, found: rows_lib.Predictions, judge: judge_model.Judge) -> rows_lib.Predictions:
  """Predictions with the verdicts of a judge."""
  pairs = [(task, i, p) for task in loaded.tasks if task.answers for i, p in enumerate(found.get(task.uid, ()))]
  verdicts = judge.verdicts([judge_model.Asked(task.question, task.answers, p.text, task.options)
                             for task, _, p in pairs])
  out = {uid: list(samples) for uid, samples in found.items()}
  for (task, i, p), verdict in zip(pairs, verdicts):
    out[task.uid][i] = dataclasses.replace(p, verdict=verdict)
  return out


def _write(out: str, result: dict, read: predictions.Read) -> None:
  """The result, and what each prediction was worth."""
  folder = files.path(out) / result["benchmark"]
  files.make(folder)
  rows = "".join(json.dumps(row) + "\n" for row in result["rows"])
  files.write_text(folder / "rows.jsonl", rows)
  named_ = {"layout": read.layout, "strange_predictions": list(read.strange),
            "rejected_rows": [dataclasses.asdict(r) for r in read.loaded.rejects],
            "rejected_predictions": [dataclasses.asdict(r) for r in read.rejects]}
  files.write_text(folder / "results.json", json.dumps(_bare(result) | named_, indent=1) + "\n")


def _bare(result: dict) -> dict:
  return {key: value for key, value in result.items() if key != "rows"}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines what the command line takes; not on import, for other commands have flags of the same names."""
  text = lambda name, words: flags.DEFINE_string(name, None, words, flag_values=values)
  text("score", "File of predictions to score.")
  text("benchmark", f"Which benchmark: {', '.join(table.BENCHMARKS)}.")
  text("data", "The benchmark's own file or folder.")
  text("out", "Folder for results; none by default.")
  text("judge", "Address of an OpenAI-compatible endpoint, http://HOST:PORT/v1, that judges free answers.")
  text("judge_model", "What the endpoint calls the model.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  args = flags.FLAGS
  if not args.score or not args.benchmark:
    raise app.UsageError("--score=PREDICTIONS and --benchmark=NAME are needed")
  if (args.judge is None) != (args.judge_model is None):
    raise app.UsageError("--judge and --judge_model go together")
  with setup.told():
    judge = None
    if args.judge:
      if args.out:
        os.makedirs(args.out, exist_ok=True)
      cache = os.path.join(args.out, "verdicts.jsonl") if args.out else ""
      judge = judge_model.Judge(judge_model.Config(args.judge, args.judge_model, cache))
    result, read = score(args.score, args.benchmark, args.data, judge)
    if judge is not None:
      result["judge"] = {"model": args.judge_model, "prompt": judge_model.PROMPT_VERSION, "asked": judge.asked,
                         "unclear": judge.unclear}
    if args.out:
      _write(args.out, result, read)
    print(rows_lib.table(result))
    for what, found in (("rows", read.loaded.describe() if read.loaded.rejects else ""),
                        ("predictions for no row", ", ".join(read.strange[:3]) + (
                            f" and {len(read.strange) - 3} more" if len(read.strange) > 3 else "")),
                        ("predictions that cannot be used", "; ".join(f"row {r.row}: {r.cause}" for r in
                                                                      read.rejects[:3]))):
      if found:
        print(f"  {what}: {found}")
    print(json.dumps(_bare(result)))


if __name__ == "__main__":
  define_flags()
  app.run(main)
