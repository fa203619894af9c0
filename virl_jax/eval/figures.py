"""Figures that are ratios of sums over predictions, or means of these: their values, and the intervals of all at once.

    accuracy        scores / predictions
    F1              2 TP / (2 TP + FP + FN)
    HR-Bench        the mean over cycles of (scores / predictions of the cycle)
    a difference    a figure of one policy less that of another, on the same tasks

An interval is a 95% percentile bootstrap interval over clusters, which are drawn as one: tasks, with all of their
samples, or what a benchmark names: images, questions.  All figures share each resample, so that an image that is hard
in one split is hard in the others, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np

from virl_jax.eval import outcome


@dataclasses.dataclass(frozen=True, eq=False)
class Ratio:
  """One sum divided by another, with what each prediction adds to both.

  Attributes:
    uids: of each prediction's task.
    top_N, bottom_N: float64[N], what each prediction adds to numerator and denominator.
  """

  uids: tuple[str, ...]
  top_N: np.ndarray
  bottom_N: np.ndarray

  @property
  def value(self) -> float | None:
    """The figure; None if the denominator is 0."""
    bottom = self.bottom_N.sum()
    return float(self.top_N.sum() / bottom) if bottom > 0 else None


@dataclasses.dataclass(frozen=True, eq=False)
class Mean:
  """The mean of figures; those without a value are left out."""

  parts: tuple[Ratio | Mean, ...]

  @property
  def value(self) -> float | None:
    """The figure; None if no part has a value."""
    known = [part.value for part in self.parts if part.value is not None]
    return float(np.mean(known)) if known else None


@dataclasses.dataclass(frozen=True, eq=False)
class Difference:
  """The first figure less the second, over the same resamples, so that the interval is a paired one."""

  first: Ratio | Mean
  second: Ratio | Mean

  @property
  def value(self) -> float | None:
    """The difference; None if one of the two has no value."""
    values_2 = [self.first.value, self.second.value]
    return None if None in values_2 else values_2[0] - values_2[1]


Figure = Ratio | Mean | Difference


def ratio(rows: Sequence[dict], top: Callable[[dict], float], bottom: Callable[[dict], float] = lambda row: 1.0
          ) -> Ratio:
  """A figure of predictions.

  Args:
    rows: as `eval.benchmarks.rows.scored` gives them.
    top, bottom: what a prediction adds to the numerator and to the denominator.
  """
  sums_2N = [np.array([of(row) for row in rows], np.float64) for of in (top, bottom)]
  return Ratio(tuple(row["uid"] for row in rows), *sums_2N)


def values(tree: dict) -> dict:
  """Nested figures as numbers, ready for JSON; anything else stays as it is."""
  return {key: values(it) if isinstance(it, dict) else it.value if isinstance(it, Figure) else it
          for key, it in tree.items()}


def flat(tree: dict, prefix: str = "") -> dict:
  """The leaves of nested figures, by names such as "splits: coco/random: F1"."""
  found = {}
  for key, it in tree.items():
    found |= flat(it, f"{prefix}{key}: ") if isinstance(it, dict) else {f"{prefix}{key}": it}
  return found


def intervals(tree: dict, drawn_with: Callable[[str], str] = lambda uid: uid, bootstrap: int = 2000, seed: int = 0
              ) -> dict:
  """The intervals of nested figures.

  Args:
    tree: nested figures; anything else in it is left out.
    drawn_with: gives the name of a task's cluster, from its uid.
    bootstrap: resamples, 1 or more.
    seed: of the resampling.

  Returns:
    [low, high] for each figure, nested like these; None for a figure without a value.

  Source: ours; Efron's percentile bootstrap, over clusters.
  """
  ratios: dict[int, Ratio] = {}
  _collect(tree, ratios)
  clusters = {uid: drawn_with(uid) for each in ratios.values() for uid in each.uids}
  number = {name: i for i, name in enumerate(dict.fromkeys(clusters.values()))}
  sums_2CK = np.zeros((2, len(number), len(ratios)))
  for k, each in enumerate(ratios.values()):
    at_N = np.array([number[clusters[uid]] for uid in each.uids], np.int64)
    for part, sum_N in enumerate((each.top_N, each.bottom_N)):
      sums_2CK[part, :, k] = np.bincount(at_N, sum_N, len(number)) if len(at_N) else 0.0
  top_SK, bottom_SK = outcome.resample(len(number), bootstrap, seed, *sums_2CK)
  sampled = dict(zip(ratios, outcome.ratio(top_SK, bottom_SK).T))
  return _intervals(tree, sampled)


def _collect(tree: dict, found: dict[int, Ratio]) -> None:
  for it in tree.values():
    if isinstance(it, dict):
      _collect(it, found)
    elif isinstance(it, Ratio):
      found[id(it)] = it
    elif isinstance(it, Mean):
      _collect(dict(enumerate(it.parts)), found)
    elif isinstance(it, Difference):
      _collect({"first": it.first, "second": it.second}, found)


def _samples(it: Figure, sampled: dict[int, np.ndarray]) -> np.ndarray:
  """float64[S], the figure of each resample; NaN where its denominator is 0."""
  if isinstance(it, Ratio):
    return sampled[id(it)]
  if isinstance(it, Difference):
    return _samples(it.first, sampled) - _samples(it.second, sampled)
  parts_PS = np.array([_samples(part, sampled) for part in it.parts])
  known_PS = ~np.isnan(parts_PS)
  return outcome.ratio(np.where(known_PS, parts_PS, 0.0).sum(0), known_PS.sum(0).astype(np.float64))


def _intervals(tree: dict, sampled: dict[int, np.ndarray]) -> dict:
  found = {}
  for key, it in tree.items():
    if isinstance(it, dict):
      found[key] = _intervals(it, sampled)
    elif isinstance(it, Figure):
      ends = None
      if it.value is not None:
        told = outcome.interval(it.value, _samples(it, sampled))
        ends = [told["low"], told["high"]]
      found[key] = ends
  return found
