"""The arms of the experiments, and what is made of their results: verdicts, intervals, the page."""

import ast
import dataclasses
import functools
import importlib.util
import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

from virl_jax.run import setup
from virl_jax.tiny import needle

ROOT = pathlib.Path(__file__).parents[1]


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[path.stem] = module  # dataclasses need to find their module
  spec.loader.exec_module(module)
  return module


arms, results = load(ROOT / "configs/ablations/arms.py"), load(ROOT / "benchmarks/results.py")
reproduce = load(ROOT / "benchmarks/reproduce.py")


@pytest.mark.parametrize("arm", arms.ARMS)
def test_every_arm_is_a_configuration_and_differs_in_what_it_says(arm):
  c, full = arms.get_config(arm), arms.get_config("full")
  setup.sections(c)
  flat = lambda c: {k: v for k, v in c.to_dict().items() if not isinstance(v, dict)} | {
      f"{s}.{k}": v for s, section in c.to_dict().items() if isinstance(section, dict) for k, v in section.items()}
  differ = {k for k, v in flat(c).items() if v != flat(full)[k]}
  assert differ <= {".".join(k.split(".")[:2]) for k in arms.ARMS[arm]}  # a grid passes through the default
  assert differ or arm == "full"


def test_the_sets_of_unfiltered_data_are_spoiled_as_they_say(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  unfiltered = load(ROOT / "benchmarks/unfiltered.py")
  unfiltered.records(tmp_path, 40)
  lines = list(map(json.loads, (tmp_path / "records.jsonl").read_text().splitlines()))
  of = lambda group: [line for line in lines if line["id"].startswith(group)]
  assert [len(of(group)) for group in ("guessable", "good", "wrong", "huge", "again")] == [18, 14, 4, 2, 2]
  truth = lambda line: needle.draw(0, "train", int(line["id"][-5:]), needle.Config(guessable=float(
      line["id"].startswith("guessable"))))
  for line in lines:
    task, scene = truth(line) if "again" not in line["id"] else (None, None)
    if task is not None:
      assert (line["answers"] == list(task.answers)) == (not line["id"].startswith("wrong")), line["id"]
      assert (line["boxes"] == [list(box) for box in task.boxes]) == (not line["id"].startswith("huge")), line["id"]
    if line["id"].startswith("guessable"):
      assert all(thing.mark == needle.mark_of(thing.colour, "pattern") for thing in scene.things)
  good = {line["question"]: line for line in of("good")}
  for line in of("again"):  # the same objects, in a smaller picture
    side_px = Image.open(tmp_path / line["image"]).width
    np.testing.assert_allclose(line["boxes"], np.array(good[line["question"]]["boxes"]) * side_px / 252)
    assert line["answers"] == good[line["question"]]["answers"]


def test_an_unknown_arm_is_named():
  with pytest.raises(ValueError, match="must be one of full, fidelity.*Received: 'fulll'"):
    arms.get_config("fulll")


def test_every_arm_is_shown_and_every_claim_is_about_arms():
  assert {name for section in results.SECTIONS for name in section.arms} == set(arms.ARMS)
  assert {c.more for c in results.CLAIMS} | {c.less for c in results.CLAIMS} <= set(arms.ARMS)


@pytest.mark.parametrize("value, low, high, margin, expected", [
    (0.12, 0.05, 0.2, 0.09, "seen here"), (0.08, 0.05, 0.2, 0.09, "not seen here"),
    (0.12, -0.01, 0.2, 0.09, "not seen here"), (0.01, 0.001, 0.02, 0.0, "seen here"),
    (-0.1, -0.2, -0.01, 0.0, "opposite"), (-0.1, -0.2, 0.01, 0.0, "not seen here"),
    (float("nan"), float("nan"), float("nan"), 0.0, "not seen here")])
def test_verdicts(value, low, high, margin, expected):
  assert results.verdict(value, low, high, margin) == expected


def outcome(correct, ious, boxes=True):
  return {"correct": correct, "ious": list(ious), "invalid_actions": 0, "has_boxes": boxes, "overlong": False,
          "kind": "pattern", "answerable": True}


@pytest.fixture
def runs(tmp_path):
  """Two arms, two seeds, 40 tasks: full is right on three in four and hits with all zooms, the other arm seldom."""
  rng = np.random.default_rng(0)
  for arm, share, iou in (("full", 0.75, 0.8), ("outcome_only", 0.25, 0.1), ("rho_0.0", 0.5, 0.5)):
    for seed in range(2):
      folder = tmp_path / arm / f"seed_{seed}"
      folder.mkdir(parents=True)
      made = [outcome(bool(rng.random() < share), [iou]) for _ in range(40)]
      base = [outcome(False, [])] * 40 if arm != "rho_0.0" else [outcome(True, [0.5])] * 40
      (folder / "eval_before.json").write_text(json.dumps({"outcomes": base}))
      if (arm, seed) != ("rho_0.0", 1):  # this one has not ended
        (folder / "eval_after.json").write_text(json.dumps({"outcomes": made}))
      lines = [{"step": s, "acc_ans": s / 10, "acc_rat": 0.5, "rationale_count": 1.0} for s in range(8)]
      (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return tmp_path


def test_from_workdirs_to_the_page(runs, tmp_path, monkeypatch):
  monkeypatch.setattr(results, "BOOTSTRAP", 300)
  found = results.read(runs, tuple(arms.ARMS), 2)
  assert set(found) == {"full", "outcome_only"}  # only what has ended in all seeds
  f = results.figures(found)
  seeds = [np.mean([o["correct"] for o in json.loads((runs / "full" / f"seed_{s}" / "eval_after.json").read_text())[
      "outcomes"]]) for s in range(2)]
  assert f["full"]["acc_ans"]["seeds"] == pytest.approx(seeds)
  assert f["full"]["acc_ans"]["value"] == pytest.approx(np.mean(seeds))
  assert f["full"]["acc_ans"]["low"] < np.mean(seeds) < f["full"]["acc_ans"]["high"]
  assert f["full"]["acc_rat"] == {"value": 1.0, "low": 1.0, "high": 1.0, "seeds": [1.0, 1.0]}
  assert set(f["before"]) == {"full"}  # the base's figures are from the first arm of each section
  before = f["before"]["full"]
  assert before["rationale_count"]["value"] == 0.0 and np.isnan(before["acc_rat"]["value"])
  assert [(c["metric"], c["more"], c["less"]) for c in f["claims"]] == [
      ("acc_rat", "full", "outcome_only"), ("acc_ans", "full", "outcome_only")]
  assert [c["verdict"] for c in f["claims"]] == ["seen here"] * 2
  section, = f["differences"].values()
  assert section["against"] == "full" and set(section["arms"]) == {"outcome_only"}
  apart = section["arms"]["outcome_only"]["acc_rat"]
  assert apart == {"value": -1.0, "low": -1.0, "high": -1.0}
  # An arm that began with another policy is not compared.
  found["outcome_only"].before[:] = 1.0
  assert results.figures(found)["differences"]["The method, and what is left of it"]["arms"] == {}
  assert results.apart(found, "outcome_only", "full")["acc_rat"] == apart  # but by who asks for it
  with pytest.raises(ValueError, match="about the same held-out tasks"):
    results.apart(found | {"full": dataclasses.replace(found["full"], uids=())}, "outcome_only", "full")
  page = results.markdown("results", found, f, "python benchmarks/reproduce.py", 12.0, 2)
  for said in ("| *seen here* |", "| outcome_only | ", "2 arms, 2 seeds each, 40 held-out tasks each"):
    assert said in page
  assert page.count("| before | 0.000 [0.000, 0.000] (0.000 0.000) | - | 0.000 ") == 1  # no zoom, none right
  assert "rho" not in page  # a section of one arm says nothing


def test_how_often_longer_budgets_were_used():
  found = [results.outcome.Outcome(uid="t", **outcome(True, [0.5] * n)) for n in (0, 3, 4, 7)]
  terms = results.outcome.terms(found, 0.4)
  assert [results.beyond(np.array(terms)[:, None], n) for n in (0, 3, 6)] == [0.75, 0.5, 0.25]


def test_what_is_said_of_longer_budgets():
  terms = lambda *zooms: np.array(results.outcome.terms(
      [results.outcome.Outcome(uid="t", **outcome(True, [0.5] * n)) for n in zooms], 0.4))[:, None]
  arm = lambda *zooms: results.Arm(terms(*zooms), terms(1, 1), ())
  short = results._rounds({"a": arm(1, 4)}, ("a",), "one or two")
  assert "tasks need one or two: before, 0.0 % with more than 3" in short
  assert "a 50.0 % with more than 3 and 0.0 % with more than 6. No rounds beyond six are used" in short
  long = results._rounds({"a": arm(1, 4), "b": arm(7, 8)}, ("a", "b"), "seven")
  assert long.endswith("b 100.0 % with more than 3 and 100.0 % with more than 6.")


def test_curves_are_means_of_what_there_is():
  got = results._smooth(np.array([[1.0, 2.0, np.nan, np.nan, 4.0]]), 2)
  np.testing.assert_array_equal(got, [[1.5, 2.0, np.nan, 4.0]])


def test_pictures(runs, tmp_path, monkeypatch):
  pytest.importorskip("matplotlib")
  monkeypatch.setattr(results, "BOOTSTRAP", 100)
  found = results.read(runs, tuple(arms.ARMS), 2)
  results.forest(results.figures(found), tmp_path / "forest.png")
  results.picture(found, tmp_path / "curves.png")
  assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("forest", "curves"))
  results.forest({"differences": {}}, tmp_path / "none.png")
  assert not (tmp_path / "none.png").exists()


def test_pictures_are_asked_for_before_the_runs(monkeypatch, capsys):
  monkeypatch.setattr(reproduce.importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(sys, "argv", ["reproduce.py", "--quick"])
  with pytest.raises(SystemExit):
    reproduce.main()
  assert "pip install -e '.[benchmarks]'" in capsys.readouterr().err


def test_an_arm_of_another_page_is_refused(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["reproduce.py", "--page=results", "--arms=full,count_mean"])
  with pytest.raises(SystemExit):
    reproduce.main()
  said = capsys.readouterr().err
  assert "--arms must be some of full, fidelity," in said and said.strip().endswith("Received: count_mean")


def test_alarms_are_told_with_their_seeds_and_first_step():
  calm = [{"step": s, "acc_ans": 0.9, "rationale_count": 1.0} for s in range(20)]
  collapsed = calm[:10] + [{"step": s, "acc_ans": 0.9, "rationale_count": 0.0} for s in range(10, 30)]
  arm = lambda *curves: results.Arm(np.zeros(0), np.zeros(0), curves)
  assert results.alarms(arm(calm)) == "none"
  said = results.alarms(arm(calm, collapsed))
  assert said == "visual_thinking_collapse (seeds 1/2, from step 17)"  # eight steps without a zoom, the window


def test_nothing_has_ended(tmp_path):
  assert results.read(tmp_path, ("full",), 1) == {}
  assert "0 arms" in results.markdown("results", {}, results.figures({}), "x", 0.0, 1)


@pytest.mark.parametrize("name", arms.BASES)
def test_a_base_is_a_configuration_and_made_once(name, tmp_path):
  c = arms.get_config("full")
  for flag in arms.BASES[name]:
    key, value = flag.removeprefix("--config.").split("=")
    *sections, last = key.split(".")
    section = functools.reduce(lambda node, k: node[k], sections, c)
    section[last] = ast.literal_eval(value) if not isinstance(section[last], str) else value
  setup.sections(c)
  assert {a["model.path"] for a in arms.ARMS.values() if "model.path" in a} == set(arms.BASES)
  (tmp_path / "base").mkdir()
  (tmp_path / "base" / "RECIPE.json").write_text("{}")
  reproduce.make_base(tmp_path / "base", arms.BASES[name])
  with pytest.raises(SystemExit, match="not made, see .*other.log"):
    reproduce.make_base(tmp_path / "other", ("--config.warmstart.nothing=1",))


CALLS = """
import pathlib, signal, sys
sys.path.insert(0, "benchmarks")
import reproduce
from virl_jax.run import signals

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
signals.install()
child = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved', flush=True)));"
child += "print('up', flush=True); time.sleep(60)"
with signals.closing(reproduce.end_all):
  while True:
    reproduce.call([sys.executable, "-c", child], pathlib.Path(sys.argv[1]))
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_runs_end_with_it_and_no_other_begins(tmp_path, number, status):
  log = tmp_path / "log"
  process = subprocess.Popen([sys.executable, "-c", CALLS, log], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
  while not log.exists() or log.read_text() != "up\n":
    assert process.poll() is None
    time.sleep(0.02)
  process.send_signal(number)
  out, _ = process.communicate(timeout=60)
  assert (process.returncode, out) == (status, f"stopped by {number.name}; give the same command again to go on\n")
  assert log.read_text() == "up\nsaved\n"


def test_a_run_that_was_stopped_has_not_ended(tmp_path, monkeypatch):
  """A run that SIGTERM ended has status 0, and no evaluation."""
  monkeypatch.setattr(reproduce, "call", lambda *_: 0)
  shares = reproduce.share_cores(1)
  assert not reproduce.run("full", 0, tmp_path, (), reproduce.Progress(1, 1), shares)
  with pytest.raises(SystemExit, match="the base was not made"):
    reproduce.make_base(tmp_path / "base", ())


def test_minutes_add_up_over_calls(tmp_path):
  path = tmp_path / "out" / "minutes.json"
  first = reproduce.Clock(path, every_s=1000)
  first.began -= 120
  first.keep()
  again = reproduce.Clock(path, every_s=1000)
  again.began -= 60
  assert 3.0 <= again.minutes() < 3.1
