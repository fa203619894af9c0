"""The last stage: which tasks need zooming, and are neither hopeless nor always solved, by a policy's answers.

Source: the paper filters by reasoning (it drops tasks that are solved without zooming) and by difficulty.  We know no
published thresholds: these are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

from virl_jax import checks
from virl_jax.data import answers as answers_lib
from virl_jax.data.curation import rules

REASONS = ("solved without zooming", "never solved", "too hard", "always solved", "too easy")


@dataclasses.dataclass(frozen=True)
class Config:
  """Thresholds; see `config.py`, section `curate.filter`."""

  most_without: float = 0.5
  least_pass: float = 0.1
  most_pass: float = 0.9

  def __post_init__(self):
    share = checks.real(0, 1, wanted="a share in [0, 1]")
    checks.section(vars(self), "curate.filter", most_without=share, least_pass=share, most_pass=share)
    checks.need(self.least_pass <= self.most_pass, "curate.filter.least_pass",
                f"at most config.curate.filter.most_pass = {self.most_pass}", self.least_pass)


def rate(scores: Sequence[float]) -> float | None:
  """Share of samples that are right, by `answers.RIGHT`; None if there are no samples."""
  return sum(score >= answers_lib.RIGHT for score in scores) / len(scores) if scores else None


def judge(with_zoom: Sequence[float], without: Sequence[float], cfg: Config, whole: bool = False) -> rules.Drop | None:
  """Why a task is dropped; None if it stays.

  Args:
    with_zoom: scores of its samples with zooming, each in [0, 1]; from none, nothing is concluded.
    without: the same with zooming off.
    cfg: thresholds.
    whole: whether its rationale box is the whole picture and such tasks are kept: it may be solved without zooming.
  """
  looked, blind = rate(with_zoom), rate(without)
  if blind is not None and blind > cfg.most_without and not whole:
    return rules.Drop("solved without zooming", f"{blind:.2f} right, at most {cfg.most_without:g}")
  if looked is None:
    return None
  if looked < cfg.least_pass:
    return rules.Drop("too hard" if looked else "never solved", f"{looked:.2f} right, at least {cfg.least_pass:g}")
  if looked > cfg.most_pass:
    return rules.Drop("too easy" if looked < 1 else "always solved", f"{looked:.2f} right, at most {cfg.most_pass:g}")
  return None
