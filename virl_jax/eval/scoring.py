"""Scores predictions by a benchmark's official rule, and by a judge model where that rule leaves room for one."""

from __future__ import annotations

import dataclasses

from virl_jax.data import judge_model
from virl_jax.eval import predictions
from virl_jax.eval.benchmarks import rows as rows_lib
from virl_jax.eval.benchmarks import table

# Benchmarks whose own rule leaves nothing to a judge.
_WITHOUT_JUDGE = ("pope", "textvqa", "docvqa", "infographicsvqa")


def named(benchmark: str):
  """The benchmark of that name.

  Raises:
    ValueError: there is none.
  """
  if benchmark not in table.BENCHMARKS:
    raise ValueError(f"--benchmark must be one of {', '.join(table.BENCHMARKS)}. Received: {benchmark or 'nothing'}")
  return table.BENCHMARKS[benchmark]


def usable(path: str, benchmark: str, how: rows_lib.How) -> rows_lib.Loaded:
  """A benchmark's tasks.

  Args:
    path: its file or folder.
    benchmark: a key of `table.BENCHMARKS`.
    how: how it is read.

  Raises:
    ValueError: there are none that can be used; says why.
  """
  loaded = named(benchmark).load(path, how)
  if not loaded.tasks:
    raise ValueError(f"{path} must have rows of {benchmark} that can be used. Received: {loaded.describe()}")
  return loaded


def scored(benchmark: str, read: predictions.Read, judge: judge_model.Judge | None) -> dict:
  """What predictions are worth, by the benchmark's rule or, where it does not accept them, by a judge.

  Args:
    benchmark: a key of `table.BENCHMARKS`.
    read: the benchmark's tasks, and predictions for them.
    judge: None for none.

  Returns:
    What the benchmark's `score` gives; with "samples" and "majority" if tasks have several samples, and "judge" if one
    was asked.

  Raises:
    ValueError: there is no such benchmark, or it leaves nothing to a judge.
    judge_model.Unreachable: the judge gives no reply.
  """
  if judge is None:
    return _figures(benchmark, read.loaded, read.predictions)
  judgeable(benchmark)
  asked_before, unclear_before = judge.asked, judge.unclear
  result = _figures(benchmark, read.loaded, _judged(read.loaded, read.predictions, judge))
  return result | {"judge": {
      "model": judge.model, "prompt": judge_model.PROMPT_VERSION, "asked": judge.asked - asked_before,
      "unclear": judge.unclear - unclear_before}}


def _figures(benchmark: str, loaded: rows_lib.Loaded, found: rows_lib.Predictions) -> dict:
  """The benchmark's figures: over all samples (Avg@k) and, where tasks have several samples, of their majority."""
  it = named(benchmark)
  result = it.score(loaded, found) | {"benchmark": benchmark}
  sizes = [len(samples) for samples in found.values()]
  if max(sizes, default=0) < 2:
    return result
  voted = it.score(loaded, rows_lib.majority(loaded, found, getattr(it, "says", rows_lib.says)))
  return result | {"samples": {"least": min(sizes), "most": max(sizes)},
                   "majority": {key: voted[key] for key in ("score", "figures", "intervals")}}


def judgeable(benchmark: str) -> None:
  """Checks that a benchmark's rule leaves room for a judge.

  Raises:
    ValueError: it does not.
  """
  if benchmark in _WITHOUT_JUDGE:
    raise ValueError(f"--judge must be left out for {benchmark}: it is scored by a rule of its own")


def _judged(loaded: rows_lib.Loaded, found: rows_lib.Predictions, judge: judge_model.Judge) -> rows_lib.Predictions:
  """Predictions with the verdicts of a judge."""
  pairs = [(task, i, p) for task in loaded.tasks if task.answers for i, p in enumerate(found.get(task.uid, ()))]
  verdicts = judge.verdicts([judge_model.Asked(task.question, task.answers, p.text, task.options)
                             for task, _, p in pairs])
  out = {uid: list(samples) for uid, samples in found.items()}
  for (task, i, p), verdict in zip(pairs, verdicts):
    out[task.uid][i] = dataclasses.replace(p, verdict=verdict)
  return out
