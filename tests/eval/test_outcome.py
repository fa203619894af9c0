"""Metrics worked out by hand, intervals against a slow bootstrap, and figures that are not defined."""

import dataclasses
import json
import time

import numpy as np
import pytest

from virl_jax.eval import outcome

BASE = outcome.Outcome(uid="t", correct=False, ious=(), invalid_actions=0, has_boxes=True, overlong=False, kind="x",
                       answerable=True)


def one(**changes):
  return dataclasses.replace(BASE, **changes)


def named(outcomes):
  """The same outcomes, for tasks 0, 1, 2 ..."""
  return [dataclasses.replace(o, uid=str(i)) for i, o in enumerate(outcomes)]


def random_outcomes(n, skill, seed=0):
  """Random outcomes; the same seed gives the same tasks, whatever the skill."""
  rng = np.random.default_rng(seed)
  hard = rng.random(n)
  ious = [tuple(np.round(rng.random(int(rng.integers(0, 4))) * skill * 1.2, 2)) for _ in range(n)]
  return [one(uid=str(i), correct=bool(hard[i] < skill), ious=ious[i], invalid_actions=int(rng.integers(0, 2)),
              kind="ab"[i % 2]) for i in range(n)]


HAND = [
    one(correct=True, ious=(0.5, 0.2), invalid_actions=1, kind="a"),
    one(correct=False, ious=(0.4, 0.9, 0.0), overlong=True, kind="a"),
    one(correct=True, ious=(), kind="b"),
    one(correct=True, ious=(0.0, 0.0), has_boxes=False, kind="b"),   # its zooms can't be judged
    one(correct=True, ious=(0.1,), answerable=False, kind="b"),      # only to find the box
]


def test_goldens():
  result = outcome.summary(HAND, h0=0.4, bootstrap=50)
  values = {name: result[name]["value"] for name in outcome.METRICS}
  assert result["n"] == 5
  assert values == pytest.approx({
      "acc_ans": 3 / 4, "acc_rat": 3 / 6, "hit_rate": 2 / 4, "rationale_count": 8 / 5, "mean_iou": 2.1 / 6,
      "mean_best_iou": (0.5 + 0.9 + 0.0 + 0.1) / 4, "invalid_action_rate": 1 / 9, "overlong_rate": 1 / 5})
  assert result["by_kind"] == {
      "a": {"n": 2, "acc_ans": 0.5, "acc_rat": 0.6, "hit_rate": 1.0, "rationale_count": 2.5},
      "b": {"n": 3, "acc_ans": 1.0, "acc_rat": 0.0, "hit_rate": 0.0, "rationale_count": 1.0}}


@pytest.mark.parametrize("h0", [0.2, 0.3, 0.4, 0.5, 0.7])
def test_an_iou_at_the_threshold_counts_as_in_the_reward(h0):
  exact = float(np.float32(h0))  # what a float32 kernel returns; for 0.7 it is below h0
  assert outcome.summary([one(ious=(exact,))], h0, bootstrap=1)["acc_rat"]["value"] == 1.0


def test_what_is_not_defined_is_none_and_json():
  nothing = {"value": None, "low": None, "high": None}
  empty = outcome.summary([], 0.4)
  assert empty["n"] == 0 and empty["by_kind"] == {}
  assert all(empty[name] == nothing for name in outcome.METRICS)
  result = outcome.summary([one(answerable=False), one(answerable=False)], 0.4)
  assert result["acc_ans"] == result["acc_rat"] == result["mean_iou"] == nothing
  assert result["by_kind"]["x"]["acc_rat"] is None
  assert result["hit_rate"] == {"value": 0.0, "low": 0.0, "high": 0.0}
  assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_one_task_has_an_interval_of_no_width():
  result = outcome.summary([one(correct=True, ious=(0.5, 0.0))], 0.4)
  assert result["acc_rat"] == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_intervals_agree_with_a_slow_bootstrap():
  outcomes = random_outcomes(60, 0.6)
  result = outcome.summary(outcomes, 0.4, bootstrap=4000, seed=1)
  rng, slow = np.random.default_rng(7), []
  for _ in range(4000):
    drawn = [outcomes[i] for i in rng.integers(60, size=60)]
    ious = np.array([iou for o in drawn for iou in o.ious])
    slow.append((np.mean([o.correct for o in drawn]), (ious >= 0.4).mean(), ious.mean()))
  for k, name in enumerate(("acc_ans", "acc_rat", "mean_iou")):
    low, high = np.percentile([row[k] for row in slow], (2.5, 97.5))
    assert result[name]["low"] == pytest.approx(low, abs=0.02)
    assert result[name]["high"] == pytest.approx(high, abs=0.02)
    assert result[name]["low"] < result[name]["value"] < result[name]["high"]


def test_tasks_are_resampled_whole():
  """Ten zooms of one task are not ten tasks: the interval is as wide as with one zoom each."""
  few = [one(ious=(float(i % 2),)) for i in range(40)]
  many = [one(ious=(float(i % 2),) * 10) for i in range(40)]
  assert outcome.summary(few, 0.4)["acc_rat"] == outcome.summary(many, 0.4)["acc_rat"]


def test_intervals_cover():
  """About 95% of the intervals hold the true value."""
  rng, covered = np.random.default_rng(0), 0
  for _ in range(200):
    sample = [one(correct=bool(c)) for c in rng.random(100) < 0.5]
    interval = outcome.summary(sample, 0.4, bootstrap=300)["acc_ans"]
    covered += interval["low"] <= 0.5 <= interval["high"]
  assert 180 <= covered <= 199


def test_seeded_and_independent_of_chunks(monkeypatch):
  outcomes = random_outcomes(50, 0.6)
  whole = outcome.summary(outcomes, 0.4, seed=3)
  assert outcome.summary(outcomes, 0.4, seed=3) == whole
  assert outcome.summary(outcomes, 0.4, seed=4) != whole
  monkeypatch.setattr(outcome, "_DRAWS_AT_ONCE", 170)
  assert outcome.summary(outcomes, 0.4, seed=3) == whole


def test_difference_golden():
  before = named([one(ious=(0.0, 0.5)), one(correct=True), one(), one()])
  after = named([one(ious=(0.5,), correct=True), one(correct=True), one(ious=(0.9,)), one(correct=True)])
  result = outcome.difference(before, after, 0.4)
  assert result["n"] == 4
  assert result["acc_ans"]["value"] == pytest.approx(0.5)
  assert result["acc_rat"]["value"] == pytest.approx(0.5)
  assert set(result) == {"n", "acc_ans", "acc_rat"}


def test_difference_is_paired():
  before, after = (
      [dataclasses.replace(o, kind="x") for o in random_outcomes(200, skill)] for skill in (0.5, 0.55))
  paired = outcome.difference(before, after, 0.4)["acc_ans"]
  order = np.random.default_rng(0).permutation(200)
  assert outcome.difference(before, [after[i] for i in order], 0.4)["acc_ans"] == paired, "by name, not by place"
  renamed = [dataclasses.replace(after[i], uid=str(n)) for n, i in enumerate(order)]
  unpaired = outcome.difference(before, renamed, 0.4)["acc_ans"]
  assert paired["high"] - paired["low"] < 0.6 * (unpaired["high"] - unpaired["low"])
  same = outcome.difference(before, before, 0.4)
  assert same["acc_ans"] == same["acc_rat"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_difference_without_actions_on_one_side_is_none():
  result = outcome.difference([one()], [one(ious=(0.5,))], 0.4)
  assert result["acc_rat"] == {"value": None, "low": None, "high": None}
  assert outcome.difference([], [], 0.4)["acc_ans"]["value"] is None


def test_fast_enough():
  outcomes = random_outcomes(512, 0.6)
  started = time.perf_counter()
  outcome.summary(outcomes, 0.4, bootstrap=2000)
  assert time.perf_counter() - started < 1.0


def test_table():
  before, after = random_outcomes(40, 0.3), random_outcomes(40, 0.8)
  table = outcome.format_table(outcome.summary(before, 0.4), outcome.summary(after, 0.4),
                               outcome.difference(before, after, 0.4))
  lines = table.split("\n")
  assert lines[0].split() == ["n", "=", "40,", "95%", "intervals", "before", "after", "change"]
  blank = lines.index("")
  assert [line.split()[0] for line in lines[2:blank]] == list(outcome.METRICS)
  assert len({len(line) for line in lines[:blank]}) == len({len(line) for line in lines[blank + 1:]}) == 1
  row = next(line for line in lines if line.startswith("acc_ans"))
  value = outcome.difference(before, after, 0.4)["acc_ans"]["value"]
  assert f"{value:+.3f} [" in row
  assert table.isascii() and not table.endswith("\n")


def test_table_of_nothing():
  empty = outcome.summary([], 0.4)
  table = outcome.format_table(empty, empty, outcome.difference([], [], 0.4))
  assert table.count(" -") >= 3 * len(outcome.METRICS)
  assert "None" not in table and "nan" not in table


def test_bad_input_is_named():
  two = named([BASE, BASE])
  with pytest.raises(ValueError, match="same tasks.*2 and 1 outcomes, of which 1 .*task '1'"):
    outcome.difference(two, two[:1], 0.4)
  with pytest.raises(ValueError, match="same tasks.*2 have no counterpart, such as that of task '1'"):
    outcome.difference(two, [two[0], one(uid="2")], 0.4)
  with pytest.raises(ValueError, match="same tasks.*for '1'.*kind='x'.*kind='y'"):
    outcome.difference(two, [two[0], one(uid="1", kind="y")], 0.4)
  with pytest.raises(ValueError, match="after must have one outcome a task.*several of task '0'"):
    outcome.difference(two, [two[0], two[0]], 0.4)
  with pytest.raises(ValueError, match="h0 .*1.5"):
    outcome.summary([BASE], 1.5)
  with pytest.raises(ValueError, match="bootstrap .*0"):
    outcome.summary([BASE], 0.4, bootstrap=0)


def test_answers_that_are_partly_right_count_as_what_they_are_worth():
  some = [one(uid="a", correct=True, score=0.6), one(uid="b", correct=False, score=0.3), one(uid="c", correct=True),
          one(uid="d", correct=True, score=1.0, answerable=False)]
  assert outcome.summary(some, 0.4, 10)["acc_ans"]["value"] == pytest.approx((0.6 + 0.3 + 1.0) / 3)


def test_samples_of_a_task_are_drawn_together():
  """Eight samples that all say the same count as one."""
  make = lambda i, k: outcome.Outcome(f"t{i} {k}", i % 2 == 0, (0.9,) if i % 3 else (), 0, True, False, "k", True)
  once = [make(i, 0) for i in range(40)]
  often = [make(i, k) for i in range(40) for k in range(8)]
  of = [o.uid.partition(" ")[0] for o in often]
  alone, together = outcome.summary(once, 0.5), outcome.summary(often, 0.5, drawn_with=of)
  for name in ("acc_ans", "acc_rat", "rationale_count"):
    assert together[name] == pytest.approx(alone[name])
  narrow = outcome.summary(often, 0.5)["acc_ans"]
  assert narrow["high"] - narrow["low"] < 0.5 * (alone["acc_ans"]["high"] - alone["acc_ans"]["low"])
  none = [dataclasses.replace(o, correct=False) for o in often]
  gap = outcome.difference(none, often, 0.5, drawn_with=of)["acc_ans"]
  assert gap == pytest.approx(alone["acc_ans"])
