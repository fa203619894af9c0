"""Evaluation metrics with bootstrap intervals, and the paired comparison of two policies.

Each metric is a ratio of two sums over tasks:

    acc_ans              scores of answers       / tasks with accepted answers (1 or 0 by most rules)
    acc_rat              actions with IoU >= h0  / actions                      (tasks with boxes)
    hit_rate             tasks with such an action / tasks with boxes
    rationale_count      actions                 / tasks
    mean_iou             sum of IoUs             / actions                      (tasks with boxes)
    mean_best_iou        sum of best IoUs        / tasks with boxes (0 for a task without actions)
    invalid_action_rate  refused actions         / actions, refused ones included
    overlong_rate        tasks that ran out of tokens / tasks

A metric whose denominator is 0 is None.  Intervals are 95% percentile bootstrap intervals over
tasks: a task is drawn with all of its actions, because actions of one task are not independent.

Our reading: the paper names the first four and the mean IoU; which tasks each is taken over is ours.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
import dataclasses

import numpy as np

METRICS = ("acc_ans", "acc_rat", "hit_rate", "rationale_count", "mean_iou", "mean_best_iou",
           "invalid_action_rate", "overlong_rate")
_BY_KIND = ("acc_ans", "acc_rat", "hit_rate", "rationale_count")
_COMPARED = ("acc_ans", "acc_rat")
_DRAWS_AT_ONCE = 2**22  # bounds memory, not results


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The outcome of one task.

  Attributes:
    uid: the task's.
    correct: the answer was right.
    ious: for each visual action, its best IoU with a ground-truth box, in [0, 1].
    invalid_actions: how many calls were refused.
    has_boxes: the task has ground-truth boxes.
    overlong: the trajectory ran out of tokens.
    kind: the task's family.
    answerable: the task has accepted answers.
    answer: what was answered, or None.
    score: what the task's rule gives for the answer, in [0, 1]; None: 1 if `correct`, else 0.
  """

  uid: str
  correct: bool
  ious: tuple[float, ...]
  invalid_actions: int
  has_boxes: bool
  overlong: bool
  kind: str
  answerable: bool
  answer: str | None = None
  score: float | None = None


def summary(outcomes: list[Outcome], h0: float, bootstrap: int = 2000, seed: int = 0,
            drawn_with: Sequence[str] | None = None) -> dict:
  """All metrics with their intervals, and the main ones by kind of task.

  Args:
    outcomes: one for each task; may be empty.
    h0: IoU in [0, 1] that makes a visual action correct.
    bootstrap: resamples, 1 or more.
    seed: of the resampling.
    drawn_with: for each outcome, the name of its cluster, which is drawn as one, such as that of its task if there are
      several samples; None: each by itself.

  Returns:
    {"n": int, METRIC: {"value", "low", "high"}, ..., "by_kind": {kind: {"n", METRIC: value, ...}}},
    ready for JSON; None for what is not defined.

  Raises:
    ValueError: an argument is out of range.

  Source: ours; the intervals are Efron's percentile bootstrap.
  """
  _check(h0, bootstrap)
  top_NK, bottom_NK = terms(outcomes, h0)
  values_K = ratio(top_NK.sum(0), bottom_NK.sum(0))
  samples_SK = ratio(*_resample_together(drawn_with, bootstrap, seed, top_NK, bottom_NK))
  result = {"n": len(outcomes)}
  result.update({name: interval(values_K[k], samples_SK[:, k]) for k, name in enumerate(METRICS)})
  kinds = np.array([outcome.kind for outcome in outcomes], dtype=object)
  result["by_kind"] = {}
  for kind in sorted(set(kinds)):
    rows_N = kinds == kind
    values = dict(zip(METRICS, ratio(top_NK[rows_N].sum(0), bottom_NK[rows_N].sum(0))))
    result["by_kind"][kind] = {"n": int(rows_N.sum())} | {name: _number(values[name]) for name in _BY_KIND}
  return result


def difference(before: list[Outcome], after: list[Outcome], h0: float, bootstrap: int = 2000,
               seed: int = 0, drawn_with: Sequence[str] | None = None) -> dict:
  """After minus before on the same tasks, with paired intervals.

  The same tasks are drawn for both sides of each resample, so what makes a task hard for both
  cancels out: the interval is narrower than two separate ones suggest.

  Args:
    before: one outcome for each task.
    after: the outcomes of the same tasks, by `uid`, in any order.
    h0: IoU in [0, 1] that makes a visual action correct.
    bootstrap: resamples, 1 or more.
    seed: of the resampling.
    drawn_with: as for `summary`, in the order of `before`.

  Returns:
    {"n": int, "acc_ans": {"value", "low", "high"}, "acc_rat": {...}}; None for what is not defined on
    one of the sides.

  Raises:
    ValueError: an argument is out of range, or the outcomes are not of the same tasks.

  Source: ours; the intervals are Efron's percentile bootstrap, paired.
  """
  _check(h0, bootstrap)
  after = paired(before, after)
  both = *terms(before, h0), *terms(after, h0)
  old_top_K, old_bottom_K, new_top_K, new_bottom_K = (term_NK.sum(0) for term_NK in both)
  values_K = ratio(new_top_K, new_bottom_K) - ratio(old_top_K, old_bottom_K)
  old_top_SK, old_bottom_SK, new_top_SK, new_bottom_SK = _resample_together(drawn_with, bootstrap, seed, *both)
  samples_SK = ratio(new_top_SK, new_bottom_SK) - ratio(old_top_SK, old_bottom_SK)
  return {"n": len(before)} | {
      name: interval(values_K[k], samples_SK[:, k]) for k, name in enumerate(METRICS) if name in _COMPARED}


def mean(values: Sequence[float], bootstrap: int = 2000, seed: int = 0) -> dict:
  """The mean of one number a task, with its interval.

  Args:
    values: a number for each task; differences of two policies on the same tasks make a paired interval.
    bootstrap: resamples, 1 or more.
    seed: of the resampling.

  Returns:
    {"n", "value", "low", "high"}; the last three are None if there are no values.

  Source: ours; the interval is Efron's percentile bootstrap.
  """
  _check(0.0, bootstrap)
  values_N1 = np.asarray(values, np.float64).reshape(-1, 1)
  n = len(values_N1)
  samples_SK, = resample(n, bootstrap, seed, values_N1)
  value = values_N1.mean() if n else np.nan
  return {"n": n} | interval(value, samples_SK[:, 0] / n if n else np.full(1, np.nan))


def sign_test(better: int, worse: int) -> float:
  """How likely a split at least this uneven is, if both sides are equally likely: exact, two-sided.

  For tasks that only one of two policies gets right, this is McNemar's exact test.

  Args:
    better: tasks that got better.
    worse: tasks that got worse.

  Returns:
    The p-value, in [0, 1]; 1 if both are 0.

  Raises:
    ValueError: a count is negative.

  Source: McNemar 1947; the binomial's tails in whole numbers.
  """
  n = better + worse
  if n < 0 or min(better, worse) < 0:
    raise ValueError(f"better and worse must be counts. Received: {better} and {worse}")
  tail, term = 0, 1  # term is n over i
  for i in range(min(better, worse) + 1):
    tail += term
    term = term * (n - i) // (i + 1)
  return min(1.0, 2 * tail / 2 ** n)


def paired(before: list[Outcome], after: list[Outcome]) -> list[Outcome]:
  """The outcomes of `after` in the order of `before`'s tasks.

  Raises:
    ValueError: the two are not about the same tasks, or have several outcomes of one.
  """
  found = {new.uid: new for new in after}
  for name, outcomes in (("before", before), ("after", after)):
    if len({o.uid for o in outcomes}) != len(outcomes):
      twice = next(uid for uid, n in collections.Counter(o.uid for o in outcomes).items() if n > 1)
      raise ValueError(f"{name} must have one outcome a task. Received: several of task {twice!r}")
  lone = sorted({o.uid for o in before} ^ set(found))
  if lone:
    raise ValueError("before and after must be about the same tasks. Received: "
                     f"{len(before)} and {len(after)} outcomes, of which {len(lone)} have no counterpart, such as "
                     f"that of task {lone[0]!r}")
  for old in before:
    new = found[old.uid]
    if (old.kind, old.has_boxes, old.answerable) != (new.kind, new.has_boxes, new.answerable):
      raise ValueError(f"before and after must be about the same tasks. Received: for {old.uid!r} {old} and {new}")
  return [found[old.uid] for old in before]


def format_table(before_summary: dict, after_summary: dict, diff: dict) -> str:
  """A table of two summaries and their difference, for the terminal.

  Args:
    before_summary: from `summary`.
    after_summary: from `summary`.
    diff: from `difference`.

  Returns:
    Lines of plain ASCII, without a newline at the end.

  Source: ours.
  """
  rows = [(f"n = {diff['n']}, 95% intervals", "before", "after", "change")]
  for name in METRICS:
    old, new = before_summary[name], after_summary[name]
    if name in diff:
      change = _with_interval(diff[name], signed=True)
    else:
      defined = old["value"] is not None and new["value"] is not None
      change = f"{new['value'] - old['value']:+.3f}" if defined else "-"
    rows.append((name, _with_interval(old), _with_interval(new), change))
  tables = [rows]
  kinds = sorted(set(before_summary["by_kind"]) & set(after_summary["by_kind"]))
  if len(kinds) > 1:
    rows = [("kind", "n", *_BY_KIND)]
    for kind in kinds:
      old, new = before_summary["by_kind"][kind], after_summary["by_kind"][kind]
      changes = (f"{_plain(old[name])} > {_plain(new[name])}" for name in _BY_KIND)
      rows.append((kind, str(new["n"]), *changes))
    tables.append(rows)
  return "\n\n".join(map(_aligned, tables))


def _check(h0, bootstrap):
  if not 0.0 <= h0 <= 1.0:
    raise ValueError(f"h0 must be an IoU in [0, 1]. Received: {h0!r}")
  if bootstrap < 1:
    raise ValueError(f"bootstrap must be at least 1. Received: {bootstrap!r}")


def terms(outcomes: list[Outcome], h0: float) -> tuple[np.ndarray, np.ndarray]:
  """What each task adds to the numerator and the denominator of each metric.

  Args:
    outcomes: one for each of N tasks.
    h0: IoU in [0, 1] that makes a visual action correct.

  Returns:
    float64[N, K] each, K in the order of `METRICS`.

  Source: ours.
  """
  top_NK, bottom_NK = np.zeros((2, len(outcomes), len(METRICS)))
  for row, o in enumerate(outcomes):
    ious = np.asarray(o.ious, np.float32) if o.has_boxes else np.zeros(0, np.float32)
    hits = int((ious >= np.float32(h0)).sum())  # float32 as in the reward, so that the two agree on ties
    parts = {
        "acc_ans": (o.answerable * (o.correct if o.score is None else o.score), o.answerable),
        "acc_rat": (hits, len(ious)),
        "hit_rate": (hits > 0, o.has_boxes),
        "rationale_count": (len(o.ious), 1),
        "mean_iou": (ious.sum(), len(ious)),
        "mean_best_iou": (ious.max(initial=0.0), o.has_boxes),
        "invalid_action_rate": (o.invalid_actions, len(o.ious) + o.invalid_actions),
        "overlong_rate": (o.overlong, 1),
    }
    top_NK[row], bottom_NK[row] = zip(*(parts[name] for name in METRICS))
  return top_NK, bottom_NK


def resample(n: int, bootstrap: int, seed: int, *terms: np.ndarray) -> list[np.ndarray]:
  """The sums over each resample of n tasks.

  Args:
    n: how many tasks; a resample has as many, drawn with replacement.
    bootstrap: how many resamples, S.
    seed: of the drawing.
    *terms: float64[N, K] each, what each task adds to K sums.

  Returns:
    float64[S, K] for each of the terms, all from the same resamples.
  """
  if n == 0:
    return [np.zeros((bootstrap, term_NK.shape[1])) for term_NK in terms]
  rng = np.random.default_rng(seed)
  sums, step = [], max(1, _DRAWS_AT_ONCE // n)
  for start in range(0, bootstrap, step):
    size = min(step, bootstrap - start)
    drawn_SN = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
    times_SN = np.bincount(drawn_SN.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)
    sums.append([times_SN @ term_NK for term_NK in terms])
  return [np.concatenate(parts) for parts in zip(*sums)]


def _resample_together(drawn_with, bootstrap, seed, *terms):
  """`resample`, over clusters; see `summary`."""
  if drawn_with is None:
    return resample(len(terms[0]), bootstrap, seed, *terms)
  number = {name: i for i, name in enumerate(dict.fromkeys(drawn_with))}
  at_N = [number[name] for name in drawn_with]
  sums = [np.zeros((len(number), term_NK.shape[1])) for term_NK in terms]
  for sum_CK, term_NK in zip(sums, terms):
    np.add.at(sum_CK, at_N, term_NK)
  return resample(len(number), bootstrap, seed, *sums)


def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
  """float64 of their shape, the first divided by the second; NaN where the second is not above 0."""
  return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)


def interval(value: float, samples_S: np.ndarray) -> dict:
  """{"value", "low", "high"}: a figure, and the 2.5th and 97.5th percentiles of its resamples; None for NaN.

  Args:
    value: the figure; NaN if it is not defined.
    samples_S: float64[S]; those that are NaN are left out.
  """
  samples_S = samples_S[~np.isnan(samples_S)]
  known = len(samples_S) > 0 and not np.isnan(value)
  low, high = np.percentile(samples_S, (2.5, 97.5)) if known else (np.nan, np.nan)
  return {"value": _number(value), "low": _number(low), "high": _number(high)}


def _number(value):
  return None if np.isnan(value) else float(value)


def _plain(value, sign=""):
  return "-" if value is None else f"{value:{sign}.3f}"


def _with_interval(interval, signed=False):
  if interval["value"] is None:
    return "-"
  sign = "+" if signed else ""
  low, high = (_plain(interval[side], sign) for side in ("low", "high"))
  return f"{_plain(interval['value'], sign)} [{low}, {high}]"


def _aligned(rows):
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  rows = rows[:1] + [tuple("-" * width for width in widths)] + rows[1:]
  return "\n".join(
      "  ".join([row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])])
      for row in rows)
