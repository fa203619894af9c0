"""Histories that show each failure, and histories that come near it but don't."""

import dataclasses
import math
import random
import re

import pytest

from virl_jax import config
from virl_jax.eval import monitors
from virl_jax.run import log

CFG = monitors.Config()
N, PAST = CFG.window, CFG.past
WELL = {"acc_ans": 0.6, "rationale_count": 1.5, "acc_rat": 0.5, "reward/fidelity": 0.3, "box/log_area_ratio": 0.4,
        "loss/entropy": 0.5, "rollout/logp_gap_mean": 1e-6, "rollout/logp_gap_max": 1e-4}
SICK = {
    "visual_thinking_collapse": {"rationale_count": 0.02},
    "invocation_explosion": {"rationale_count": 4.0, "acc_ans": 0.4},
    "superficial_grounding": {"rationale_count": 3.0, "acc_rat": 0.1, "reward/fidelity": -0.8},
    "box_size_hacking": {"box/log_area_ratio": -1.6, "reward/fidelity": 0.6},
    "entropy_collapse": {"loss/entropy": 0.05},
    "sampler_drift": {"rollout/logp_gap_mean": 0.2},
}
LOOKED_AT = [(name, key) for name, keys in {
    "visual_thinking_collapse": "acc_ans rationale_count", "invocation_explosion": "acc_ans rationale_count",
    "superficial_grounding": "rationale_count acc_rat", "box_size_hacking": "box/log_area_ratio reward/fidelity",
    "entropy_collapse": "loss/entropy", "sampler_drift": "rollout/logp_gap_mean"}.items() for key in keys.split()]


def lines(*stretches):
  """A history from stretches of (how many steps, what differs from a healthy run)."""
  values = [{**WELL, **change} for count, change in stretches for _ in range(count)]
  return [{"step": step, **v} for step, v in enumerate(values)]


def sick(name, count=N):
  return lines((60, {}), (count, SICK[name]))


def noisy(history, sigma, seed):
  rng = random.Random(seed)
  return [{k: v if k == "step" else v + rng.gauss(0, sigma) for k, v in line.items()} for line in history]


def names(alarms):
  return [alarm.name for alarm in alarms]


def test_the_configuration_has_the_same_names_and_defaults():
  assert tuple(m.__name__ for m in monitors.MONITORS) == tuple(SICK)
  assert monitors.Config(**config.default().monitor) == CFG


@pytest.mark.parametrize("name", SICK)
def test_what_is_wrong_is_named_and_nothing_else(name):
  alarm, = monitors.check(sick(name), CFG)
  assert (alarm.name, alarm.step) == (name, 59 + N)
  for seed in range(10):
    assert names(monitors.check(noisy(sick(name), 0.01, seed), CFG)) == [name]


@pytest.mark.parametrize("name, figures", [
    ("visual_thinking_collapse", "60% 0.02 8"), ("invocation_explosion", "1.50 4.00 60% 40% 16 8"),
    ("superficial_grounding", "3.00 10% 8"), ("box_size_hacking", "0.33 1.3 +0.30 +0.60 8"),
    ("entropy_collapse", "0.05 0.5 8"), ("sampler_drift", "0.2 8 0.05")])
def test_a_message_is_one_sentence_with_the_figures_and_what_to_do(name, figures):
  message = monitors.check(sick(name), CFG)[0].message
  assert set(figures.split()) <= set(re.findall(r"[+-]?\d+(?:\.\d+)?%?", message))
  assert ". " not in message and "\n" not in message and not message.endswith(".")
  knobs = re.findall(r"config\.(\w+)\.(\w+)", message)
  assert knobs and all(knob in config.default()[section] for section, knob in knobs)


def test_a_run_that_is_well_gives_no_alarm():
  for seed in range(10):
    assert monitors.all_begun(noisy(lines((60, {})), 0.03, seed), CFG) == []


@pytest.mark.parametrize("change", [
    {"box/log_area_ratio": 1.6, "reward/fidelity": 0.35},  # large boxes that do not pay
    {"box/log_area_ratio": 0.95, "reward/fidelity": 0.6},  # boxes that pay, not large enough
    {"box/log_area_ratio": 0.0, "reward/fidelity": 0.9},   # boxes that pay because they fit
    {"rationale_count": 0.02, "acc_ans": 0.45},            # no longer zooms, and answers badly
    {"rationale_count": 0.15, "acc_ans": 0.9},             # seldom zooms
    {"rationale_count": 4.0, "acc_ans": 0.55},             # zooms more, at little cost
    {"rationale_count": 4.0, "acc_ans": 0.9},              # zooms more, and it helps
    {"rationale_count": 2.1, "acc_ans": 0.4},              # zooms a little more
    {"rationale_count": 1.5, "acc_ans": 0.2},              # answers worse, and zooms as before
    {"rationale_count": 1.9, "acc_rat": 0.0},              # misses, but does not zoom much
    {"rationale_count": 3.0, "acc_rat": 0.25},             # zooms much, and hits sometimes
    {"rationale_count": 3.0, "acc_rat": 0.0, "reward/fidelity": 0.0},  # tasks without boxes: nothing is judged
    {"loss/entropy": 0.12},
    {"rollout/logp_gap_mean": 0.04, "rollout/logp_gap_max": 4.0}])
def test_near_misses(change):
  assert monitors.check(lines((60, {}), (N, change)), CFG) == []


def test_what_a_run_began_with_is_no_change():
  large = {"box/log_area_ratio": 1.6}
  assert monitors.check(lines((60, large), (N, {**large, "reward/fidelity": 0.9})), CFG) == []
  assert monitors.check(lines((60, {"loss/entropy": 0.03})), CFG) == []
  many = {"rationale_count": 4.0}
  assert monitors.check(lines((60, many), (N, {**many, "acc_ans": 0.4})), CFG) == []


def test_most_of_the_steps_must_have_judged_zooms():
  misses = {"rationale_count": 3.0, "acc_rat": 0.0, "reward/fidelity": -1.0}
  nothing = {**misses, "reward/fidelity": 0.0}
  for judged, found in ((N // 2, ["superficial_grounding"]), (N // 2 - 1, [])):
    assert names(monitors.check(lines((60, {}), (N - judged, nothing), (judged, misses)), CFG)) == found


def test_both_sides_count():
  for size in (-1.6, 1.6):
    change = {"box/log_area_ratio": size, "reward/fidelity": 0.6}
    assert names(monitors.check(lines((60, {}), (N, change)), CFG)) == ["box_size_hacking"]
  for key, gap in (("mean", 0.06), ("max", 6.0)):
    alarm, = monitors.check(lines((N, {f"rollout/logp_gap_{key}": gap})), CFG)
    assert alarm.name == "sampler_drift" and f"rollout/logp_gap_{key} is {gap:g} nats" in alarm.message
  alarm, = monitors.check(lines((N, {"loss/entropy": 0.015})), CFG)  # low by itself, with nothing to compare
  assert alarm.name == "entropy_collapse" and "at first" not in alarm.message


@pytest.mark.parametrize("name, change", [
    ("visual_thinking_collapse", {"collapse_acc_ans": 0.61}), ("visual_thinking_collapse", {"collapse_zooms": 0.01}),
    ("invocation_explosion", {"explosion_ratio": 2.7}), ("invocation_explosion", {"explosion_zooms": 2.6}),
    ("invocation_explosion", {"explosion_acc_drop": 0.21}), ("invocation_explosion", {"past": 61}),
    ("superficial_grounding", {"superficial_zooms": 3.1}), ("superficial_grounding", {"superficial_acc_rat": 0.09}),
    ("box_size_hacking", {"hacking_log2": 1.7}), ("box_size_hacking", {"hacking_growth": 1.3}),
    ("box_size_hacking", {"hacking_fidelity_rise": 0.31}), ("entropy_collapse", {"entropy_share": 0.09}),
    ("sampler_drift", {"drift_mean_nats": 0.21}), *[(name, {"window": 100}) for name in SICK]])
def test_every_threshold_counts(name, change):
  assert monitors.check(sick(name), dataclasses.replace(CFG, **change)) == []


def test_absolute_thresholds_count():
  assert monitors.check(lines((N, {"loss/entropy": 0.015})), dataclasses.replace(CFG, entropy_nats=0.01)) == []
  gap = lines((N, {"rollout/logp_gap_max": 6.0}))
  assert monitors.check(gap, dataclasses.replace(CFG, drift_max_nats=6.1)) == []


@pytest.mark.parametrize("name", SICK)
def test_too_short_a_history_gives_no_alarm(name):
  needed = {"invocation_explosion": N + PAST, "box_size_hacking": 2 * N, "entropy_collapse": 2 * N}.get(name, N)
  history = lines((needed - N, {}), (N, SICK[name]))
  assert names(monitors.check(history, CFG)) == [name]
  for missing in (1, needed - 1, needed):
    assert monitors.check(history[missing:], CFG) == []


def test_one_wild_step_gives_no_alarm():
  wild = {"rationale_count": 6.0, "acc_ans": 0.0, "acc_rat": 0.0, "reward/fidelity": 1.0, "box/log_area_ratio": -10.0,
          "loss/entropy": 0.0, "rollout/logp_gap_mean": 40.0, "rollout/logp_gap_max": 40.0}
  assert monitors.all_begun(lines((60, {}), (1, wild), (60, {})), CFG) == []
  blind = {"rationale_count": 0.0, "acc_ans": 1.0}
  assert monitors.all_begun(lines((60, {}), (1, blind), (60, {})), CFG) == []


@pytest.mark.parametrize("name", SICK)
def test_an_alarm_begins_once_and_ends_with_its_cause(name):
  alarms = monitors.all_begun(sick(name, 50), CFG)
  assert names(alarms) == [name] and 60 < alarms[0].step < 60 + N
  back = lines((60, {}), (N, SICK[name]), (3 * N, {}))
  assert monitors.all_begun(back, CFG) == alarms and monitors.check(back, CFG) == []
  again = lines((60, {}), (N, SICK[name]), (3 * N, {}), (N, SICK[name]))
  assert names(monitors.all_begun(again, CFG)) == [name, name]


@pytest.mark.parametrize("value", ["missing", None, math.nan, math.inf, True, "0.5"])
@pytest.mark.parametrize("name, key", LOOKED_AT)
def test_what_is_no_number_gives_no_alarm_and_no_exception(name, key, value):
  def without(line):
    return {k: v if k != key else value for k, v in line.items() if k != key or value != "missing"}
  assert name not in names(monitors.check([without(line) for line in sick(name)], CFG))
  # Missing in a few of the steps it does not matter, missing in most of them it does.
  history = sick(name)
  assert names(monitors.check([*history[:-3], *map(without, history[-3:])], CFG)) == [name]
  assert names(monitors.check([*history[:-5], *map(without, history[-5:])], CFG)) == []


@pytest.mark.parametrize("history", [[], [{}], 100 * [{}], 100 * [{"step": None, "note": "x"}], [{"step": 0}]])
def test_histories_without_numbers(history):
  assert monitors.check(history, CFG) == monitors.all_begun(history, CFG) == []


def test_extreme_numbers_are_no_exception():
  for size in (1e300, -1e300):
    wild = {**dict.fromkeys(WELL, 1e300), "box/log_area_ratio": size}
    assert "box_size_hacking" in names(monitors.check(lines((60, {}), (N, wild)), CFG))


def test_a_line_without_a_step_is_counted():
  history = [{k: v for k, v in line.items() if k != "step"} for line in sick("entropy_collapse")]
  assert monitors.check(history, CFG)[0].step == 59 + N


def test_a_resumed_run_gives_the_same_alarms(tmp_path):
  history = lines((30, {}), (12, SICK["entropy_collapse"]), (20, {}), (12, SICK["superficial_grounding"]))
  whole = monitors.all_begun(history, CFG)
  assert names(whole) == ["entropy_collapse", "superficial_grounding"]
  path = str(tmp_path / "metrics.jsonl")
  for start in (0, 31, whole[0].step, whole[0].step + 1, 40):  # killed, and started from an earlier step
    metrics_log = log.MetricsLog(path, start, {"config": {}})
    seen = log.read(path)
    alarms = monitors.all_begun(seen, CFG)
    for line in history[start:]:
      seen.append(metrics_log.write(line["step"], line))
      alarms += monitors.begun(seen, CFG)
    assert alarms == whole == monitors.all_begun(log.read(path), CFG)


def test_only_named_monitors_stop_a_run():
  alarms = monitors.all_begun(lines((30, {}), (12, SICK["entropy_collapse"]), (20, {}), (12, SICK["sampler_drift"])),
                              CFG)
  assert names(alarms) == ["entropy_collapse", "sampler_drift"]
  assert monitors.stopping(alarms, CFG) is None and monitors.stopping([], CFG) is None
  assert monitors.stopping(alarms, monitors.Config(stop=("box_size_hacking", "sampler_drift"))) == alarms[1]
  assert monitors.stopping(alarms, monitors.Config(stop=("sampler_drift", "entropy_collapse"))) == alarms[0]
