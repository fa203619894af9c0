"""A judge within a run: what it is asked, that it is asked once, and what a run does if its endpoint dies."""

import re
import threading

import pytest

from tests import lockstep
from tests.data.test_judge_model import Server
from virl_jax import types
from virl_jax.data import answers
from virl_jax.data import judge_model
from virl_jax.run import files
from virl_jax.run import verdicts


@pytest.fixture
def server():
  it = Server()
  yield it
  it.close()


def told(*said, match="exact", options=None, accepted=("red",)):
  task = types.Task("t", b"", "What colour?", accepted, options=options, match=match)
  return [types.Trajectory(task, i, None, answer=answer) for i, answer in enumerate(said)]


def judge(server, folder, **more):
  cfg = judge_model.Config("judge", server.url, **{"timeout_s": 0.5, "wait_s": 0.01, "in_flight": 2} | more)
  return verdicts.judge(cfg, files.path(str(folder)))


def test_none_unless_it_is_named(tmp_path):
  assert verdicts.judge(judge_model.Config(), files.path(str(tmp_path))) is None


def test_a_step_is_judged_and_the_verdicts_stay(server, place):
  found = told("red", "crimson", "blue", None, "crimson")
  it = judge(server, place)
  answers.grade(found, it)
  assert [(t.score, t.correct) for t in found] == [
      (1.0, True), (1.0, True), (0.0, False), (0.0, False), (1.0, True)] and len(server.bodies) == 2
  assert it.metrics() == {"judge/answers": 3.0, "judge/right": 2.0, "judge/unclear": 0.0}
  assert files.names(files.path(place) / "verdicts") == ["000000.jsonl"]
  again = judge(server, place)
  answers.grade(found, again)
  assert len(server.bodies) == 2 and again.metrics() == it.metrics(), "the same, and nobody is asked"
  answers.grade(told("scarlet", "crimson"), again)
  assert len(server.bodies) == 3 and files.names(files.path(place) / "verdicts") == ["000000.jsonl", "000001.jsonl"]


def test_what_is_not_judged(server, tmp_path):
  """Tasks of other rules, with options, and without answers."""
  it = judge(server, tmp_path)
  for found in (told("crimson", match="anls"), told("crimson", options=("red", "blue")), told("crimson", accepted=())):
    assert it(found) == [None] and it.metrics()["judge/answers"] == 0
  assert not server.bodies and not (tmp_path / "verdicts").exists()
  more = judge(server, tmp_path, rules=("anls", "number"))
  assert more(told("crimson", match="anls") + told("4", match="number:2%", accepted=("3",)) + told("crimson")) == [
      1.0, 0.0, None]


def test_a_reply_that_says_neither_is_no_verdict_and_stays_so(server, tmp_path):
  server.faults = ["mumble"]
  for _ in range(2):
    it = judge(server, tmp_path)
    assert it(told("crimson")) == [0.0] and it.metrics()["judge/unclear"] == 1.0
  assert len(server.bodies) == 1


def test_an_endpoint_that_dies_is_waited_for(server, tmp_path, capsys):
  server.faults = [None] + [500] * 9
  it = judge(server, tmp_path, in_flight=1)
  assert it(told("blue", "crimson", "scarlet")) == [0.0, 1.0, 1.0]
  said = capsys.readouterr().out.splitlines()
  waits = r"the judge has given no verdict for \d+ s \(judge.url .*500 busy.*\): waiting"
  assert len(said) >= 2 and all(re.fullmatch(waits, line) for line in said)
  assert len(files.names(files.path(str(tmp_path)) / "verdicts")) == 2, "what came before it died was kept at once"


def test_patience_ends_and_nothing_is_wrong(server, tmp_path, monkeypatch):
  server.faults = [500] * 10 ** 6
  found = told("crimson")
  with pytest.raises(judge_model.Unreachable, match=r"no verdict for \d+ s .*500.*Nothing was counted as wrong"):
    answers.grade(found, judge(server, tmp_path, patience_s=0.1))
  assert found[0].correct is None and not (tmp_path / "verdicts").exists()

  def one(number):
    with pytest.raises(SystemExit, match="Nothing was counted as wrong"):
      judge(server, tmp_path, patience_s=0.1)(told("crimson") if number else [])

  lockstep.Lockstep(monkeypatch, 2).run(one)
  monkeypatch.undo()
  server.faults = [404]
  with pytest.raises(ValueError, match="judge.url must be an endpoint that takes chat completions of 'judge'"):
    judge(server, tmp_path)(told("crimson"))


def test_one_process_asks_for_all(server, tmp_path, monkeypatch):
  """Each process has its own trajectories, one has none; an answer that occurs several times is asked about once."""
  parts, asking = [told("crimson", "blue"), [], told("blue", "red", "scarlet")], set()
  chat = judge_model.endpoint.chat
  monkeypatch.setattr(judge_model.endpoint, "chat", lambda *a: asking.add(threading.get_ident()) or chat(*a))

  def one(number):
    it = judge(server, tmp_path, in_flight=1)
    answers.grade(parts[number], it)
    return [t.score for t in parts[number]], it.metrics()

  scores, metrics = zip(*lockstep.Lockstep(monkeypatch, 3).run(one))
  assert scores == ([1.0, 0.0], [], [0.0, 1.0, 1.0]) and len(server.bodies) == 3 and len(asking) == 1
  assert metrics == ({"judge/answers": 4.0, "judge/right": 2.0, "judge/unclear": 0.0},) * 3
