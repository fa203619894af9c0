"""Asking a benchmark's questions, stopping, and going on; rollouts are played here."""

import json
import pathlib
import random

import jax
import numpy as np
import pytest

from tests.eval.test_benchmarks import picture
from virl_jax import types
from virl_jax.data import images
from virl_jax.eval import asked
from virl_jax.eval import harness
from virl_jax.eval import outcome
from virl_jax.rl import reward
from virl_jax.rollout import turns
from virl_jax.run import files

META = {"fixed": {"model": "m"}, "versions": {"jax": "x"}}


class Policy:
  image = images.Config()


@pytest.fixture
def played(monkeypatch):
  """Plays answers that depend on all that they may depend on; gives the tasks that were asked."""
  log = []

  def run(policy, params, tasks, key, slots, temperature, cfg):
    assert 0 < len(tasks) <= slots
    log.append([t.uid for t in tasks])
    found = []
    for i, task in enumerate(tasks):
      drawn = int(jax.random.bits(jax.random.fold_in(key, i))) if temperature else 0
      said = types.Turn("assistant", np.arange(3), text=f"<answer>{task.uid} {drawn}</answer>", action="zoom",
                        region=types.Box(0, 0, 2, 2))
      found.append(harness.Judged(types.Trajectory(
          task, i, np.zeros(1, np.int32), [said], [], types.StopReason.ANSWERED, f"{task.uid} {drawn}", False, 0.25),
          (0.5,), ("correct",)))
    return found

  def check(policy, task):
    assert task.image.size == (40, 30), "the picture is decoded"
    if task.question == "too long":
      raise ValueError("its prompt must leave room for a turn")

  monkeypatch.setattr(harness, "run", run)
  monkeypatch.setattr(turns, "check", check)
  return log


def tasks(n, **odd):
  return [types.Task(f"t{i}", odd.get(f"t{i}", {}).get("image", picture()), odd.get(f"t{i}", {}).get("question", "?"),
                     ("x",), (types.Box(0, 0, 4, 4),), ("x", "y"), "kind") for i in range(n)]


def ask(folder, these, meta=META, **cfg):
  cfg = asked.Config(**{"slots": 3} | cfg)
  return asked.ask(Policy(), asked.by_engine({}, cfg, reward.Config()), these, pathlib.Path(folder), cfg, meta)


def test_what_is_written(tmp_path, played):
  found = ask(tmp_path, tasks(5, t1={"image": b"no picture"}, t3={"question": "too long"}))
  lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
  assert lines == found and [e["uid"] for e in found] == ["t0", "t1", "t2", "t3", "t4"]
  assert played == [["t0", "t2"], ["t4"]]
  assert "decodable file" in found[1]["skipped"] and found[3]["skipped"] == "its prompt must leave room for a turn"
  assert found[0] == {
      "uid": "t0", "sample": 0, "answer": "t0 0", "text": "<answer>t0 0</answer>", "options": ["x", "y"],
      "boxes": [[0, 0, 2, 2]], "ious": [0.5], "classes": ["correct"], "refused": 0, "stop": "answered",
      "correct": False, "score": 0.25, "seed": 0, "tokens": 3}
  meta = json.loads((tmp_path / "meta.json").read_text())
  assert meta["versions"] == {"jax": "x"} and meta["fixed"]["n"] == 5 and meta["fixed"]["temperature"] == 0.0


def test_a_chunk_of_which_nothing_can_be_asked(tmp_path, played):
  found = ask(tmp_path, tasks(4, **{f"t{i}": {"image": b"x"} for i in range(3)}))
  assert played == [["t3"]] and [("skipped" in e) for e in found] == [True, True, True, False]


@pytest.mark.parametrize("cfg", [{}, {"temperature": 1.0, "samples": 3, "seed": 7}], ids=["greedy", "sampled"])
def test_stopped_anywhere_it_ends_as_if_it_had_not_been(tmp_path, played, cfg):
  these = tasks(8, t5={"question": "too long"})
  ask(tmp_path / "whole", these, **cfg)
  whole = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
  assert len(set(whole.splitlines())) == 8 * cfg.get("samples", 1)
  rng = random.Random(0)
  for i in range(10):
    folder = tmp_path / f"cut{i}"
    folder.mkdir()
    (folder / "meta.json").write_bytes((tmp_path / "whole" / "meta.json").read_bytes())
    (folder / "predictions.jsonl").write_bytes(whole[:rng.randrange(len(whole))])
    ask(folder, these, **cfg)
    assert (folder / "predictions.jsonl").read_bytes() == whole
  played.clear()
  assert len(ask(tmp_path / "whole", these, **cfg)) == 8 * cfg.get("samples", 1)
  assert not played, "nothing is left to ask"


def test_on_a_disk_and_in_a_bucket(place, played):
  folder, these, cfg = files.path(place) / "vstar", tasks(5), asked.Config(slots=2)
  again = lambda: asked.ask(Policy(), asked.by_engine({}, cfg, reward.Config()), these, folder, cfg, META)
  whole = again()
  data = files.read_bytes(folder / "predictions.jsonl")
  files.write_bytes(folder / "predictions.jsonl", data[:len(data) // 2])
  assert again() == whole
  assert files.read_bytes(folder / "predictions.jsonl") == data


def test_what_was_written_is_not_asked_again(tmp_path, played):
  ask(tmp_path, tasks(8))
  file = tmp_path / "predictions.jsonl"
  file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:7]))
  played.clear()
  ask(tmp_path, tasks(8))
  assert played == [["t6", "t7"]]


@pytest.mark.parametrize("change, said", [
    ({"seed": 1}, "seed .0 there, 1 now"), ({"temperature": 0.5}, "temperature"), ({"slots": 4}, "slots"),
    ({"these": tasks(4)}, "n .3 there, 4 now.*tasks"), ({"these": tasks(3, t0={"question": "other"})}, "tasks"),
    ({"meta": {"fixed": {"model": "other"}}}, "model .'m' there, 'other' now")])
def test_other_predictions_are_not_gone_on_with(tmp_path, played, change, said):
  ask(tmp_path, tasks(3))
  with pytest.raises(ValueError, match=f"must be for what is asked now; use another --out. .*{said}"):
    ask(tmp_path, **{"these": tasks(3)} | change)
  (tmp_path / "meta.json").unlink()
  with pytest.raises(ValueError, match="must have a meta.json beside"):
    ask(tmp_path, tasks(3))


def test_versions_are_told_and_may_change(tmp_path, played):
  ask(tmp_path, tasks(3))
  assert len(ask(tmp_path, tasks(3), META | {"versions": {"jax": "y"}})) == 3


class Loses:
  """Answers as the played engine does, but gives no reply to some tasks.

  Attributes:
    lost: their uids, which can be changed.
    asked: the chunks that came, as lists of uids.
  """

  def __init__(self, lost, cfg):
    self.lost, self.asked, self._speaks = set(lost), [], asked.by_engine({}, cfg, reward.Config())

  def __call__(self, policy, these, chunk, sample):
    self.asked.append([t.uid for t in these])
    return [(i, "500 busy" if j.trajectory.task.uid in self.lost else j)
            for i, j in self._speaks(policy, these, chunk, sample)]


def test_what_is_lost_is_no_prediction_and_is_asked_for_again(tmp_path, played):
  these, cfg = tasks(8, t3={"question": "too long"}), asked.Config(slots=3)
  ask(tmp_path / "whole", these)
  speaks = Loses({"t1", "t4"}, cfg)
  again = lambda: asked.ask(Policy(), speaks, these, tmp_path / "cut", cfg, META)
  found = again()
  assert found[1] == {"uid": "t1", "sample": 0, "answer": None, "lost": "500 busy"} and len(found) == 8
  assert asked.unsaid(found) == {
      "skipped": [{"uid": "t3", "sample": 0, "why": "its prompt must leave room for a turn"}],
      "lost": [{"uid": uid, "sample": 0, "why": "500 busy"} for uid in ("t1", "t4")]}
  assert [o.uid for o in asked.outcomes(found, these)] == ["t0", "t2", "t5", "t6", "t7"]
  speaks.asked.clear()
  speaks.lost = {"t1"}
  assert [e["uid"] for e in again() if "lost" in e] == ["t1"]
  assert speaks.asked == [["t1"], ["t4"]], "one that stays lost does not keep others from being asked"
  speaks.lost = set()
  again()
  wanted = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
  assert (tmp_path / "cut" / "predictions.jsonl").read_bytes() == wanted


def test_where_nothing_comes_the_rest_is_not_asked(tmp_path, played):
  these, cfg = tasks(9), asked.Config(slots=3)
  speaks = Loses({"t3", "t4", "t5"}, cfg)
  found = asked.ask(Policy(), speaks, these, tmp_path, cfg, META)
  assert len(found) == 6 and len(speaks.asked) == 2 and sum("lost" in e for e in found) == 3
  speaks.lost = {"t5"}
  assert len(asked.ask(Policy(), speaks, these, tmp_path, cfg, META)) == 9
  assert speaks.asked[2:] == [["t3", "t4", "t5"], ["t6", "t7", "t8"]]


def test_outcomes(tmp_path, played):
  these = tasks(4, t1={"question": "too long"})
  found = asked.outcomes(ask(tmp_path, these, temperature=1.0, samples=2), these)
  assert [o.uid for o in found] == ["t0", "t2", "t3", "t0 1", "t2 1", "t3 1"]
  summary = outcome.summary(found, 0.4, 10)
  assert summary["acc_ans"]["value"] == 0.25 and summary["acc_rat"]["value"] == 1.0 and summary["n"] == 6


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"slots": 0}, {"temperature": -1.0}, {"samples": 2},
                                   {"temperature": float("nan")}])
def test_settings_are_checked(wrong):
  with pytest.raises(ValueError, match="must be"):
    asked.Config(**wrong)
