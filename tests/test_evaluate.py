"""The command: scoring others' predictions without a model, and asking a policy."""

import dataclasses
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

from absl import app
from absl import flags
import numpy as np
import pytest

from configs import tiny
from tests.data.test_judge_model import Server
from tests.eval.test_benchmarks import picture
from tests.eval.test_benchmarks import pope_file
from tests.eval.test_benchmarks import vstar_json
from virl_jax import config
from virl_jax import evaluate
from virl_jax import types
from virl_jax.data import answers
from virl_jax.data import endpoint
from virl_jax.data import images
from virl_jax.data import judge_model
from virl_jax.data import prompt
from virl_jax.eval import asked
from virl_jax.eval import harness
from virl_jax.eval.benchmarks import rows as rows_lib
from virl_jax.rl import reward
from virl_jax.rollout import remote
from virl_jax.rollout import turns
from virl_jax.run import load
from virl_jax.tiny import needle

ROOT = pathlib.Path(__file__).parents[1]


def command(*args, cwd=ROOT):
  return subprocess.run([sys.executable, "-m", "virl_jax.evaluate", *map(str, args)], cwd=cwd, capture_output=True,
                        text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})


@pytest.fixture
def pope(tmp_path):
  data = pope_file(tmp_path / "pope" / "coco_pope_random.json", [("cup", "yes"), ("dog", "no"), ("cat", "maybe")])
  path = tmp_path / "p.jsonl"
  path.write_text("".join(json.dumps({"uid": f"coco/random/{i}", "answer": text}) + "\n"
                          for i, text in ((1, "Yes"), (2, "Yes"), (9, "No"))))
  return data, path


def test_scores_are_printed_and_written(tmp_path, pope):
  data, path = pope
  done = command(f"--score={path}", "--benchmark=pope", f"--data={data}", f"--out={tmp_path / 'out'}")
  assert done.returncode == 0, done.stderr
  *told, last = done.stdout.splitlines()
  result = json.loads(last)
  assert result["figures"]["splits"]["coco/random"]["F1"] == pytest.approx(2 / 3) and "rows" not in result
  assert result["evaluated"] == {"rows": 3, "rejected": 1, "without_answers": 0, "without_prediction": 0,
                                 "share": 2 / 3}
  assert "  2 of 3 rows evaluated (66.67 %): 1 rejected" in told
  assert any("1 cannot: label is neither yes nor no: row 3 (coco_pope_random.json 3)" in line for line in told)
  assert "  predictions for no row: coco/random/9" in told
  written = json.loads((tmp_path / "out" / "pope" / "results.json").read_text())
  assert written.items() >= result.items() and written["strange_predictions"] == ["coco/random/9"]
  rows = [json.loads(line) for line in (tmp_path / "out" / "pope" / "rows.jsonl").read_text().splitlines()]
  assert [(r["uid"], r["score"]) for r in rows] == [("coco/random/1", 1.0), ("coco/random/2", 0.0)]


def here(monkeypatch, *args):
  """Runs the command in this process."""
  values = flags.FlagValues()
  evaluate.define_flags(values)
  monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, args)])
  left = values(sys.argv)
  monkeypatch.setattr(flags, "FLAGS", values)
  evaluate.main(left)


@pytest.mark.parametrize("args, said", [
    (("--benchmark=mmbench", "--score={path}"), "error: --benchmark must be one of vstar, .*Received: mmbench"),
    (("--benchmark=pope", "--score={path}"), r"error: .* must come with the benchmark's own files \(--data\)"),
    (("--benchmark=pope", "--score=nothing.jsonl", "--data={data}"), "error: nothing.jsonl must be a file that can be"),
    (("--benchmark=pope", "--score={path}", "--data={path}"), "error: .* must have rows of pope that can be used"),
    (("--benchmark=pope,vstar", "--score={path}", "--data={data}"), "error: --score must be of one benchmark"),
    (("--benchmark=pope", "--model=@tiny", "--data={data},x", "--out=o"), "error: --data must have a path for each"),
    (("--benchmark=pope", "--model=@tiny", "--data={data}", "--out=o", "--samples=2"), "samples must be 1 at temper"),
    (("--benchmark=pope", "--model=@tiny", "--data={data}", "--out=o"), "that can be used. Received: 0 of 3 rows"),
    (("--benchmark=pope", "--score={path}", "--data={data}", "--judge=http://h/v1", "--judge_model=m"),
     "error: --judge must be left out for pope")])
def test_a_slip_is_a_line(pope, monkeypatch, args, said):
  data, path = pope
  with pytest.raises(SystemExit, match=said):
    here(monkeypatch, *(a.format(data=data, path=path) for a in args))


@pytest.mark.parametrize("args, said", [
    (("--benchmark=pope",), "either --score=PREDICTIONS, --model=DIR or --endpoint"),
    (("--score=x",), "--benchmark=NAME and"),
    (("--score=x", "--model=y", "--benchmark=pope"), "either --score"),
    (("--compare", "a"), "--compare needs two folders"),
    (("--compare", "a", "b", "--benchmark=pope"), "--compare needs two folders"),
    (("--model=y", "--benchmark=pope"), "--model and --endpoint need --data and --out"),
    (("--endpoint=http://h/v1", "--benchmark=pope"), "--model and --endpoint need --data and --out"),
    (("--endpoint=http://h/v1", "--score=x", "--benchmark=pope"), "either --score"),
    (("--model=y", "--benchmark=pope", "--served_model=m"), "--served_model is what --endpoint calls"),
    (("--score=x", "--benchmark=vstar", "--judge=http://h/v1"), "--judge and --judge_model go together")])
def test_how_it_is_used(monkeypatch, args, said):
  with pytest.raises(app.UsageError, match=said):
    here(monkeypatch, *args)


def test_a_judge_decides_what_the_rule_refuses(tmp_path):
  server = Server()
  try:
    data = tmp_path / "v.json"
    data.write_text(json.dumps([{"problem": f"q{i}", "solution": "red", "images": "a.png"} for i in range(3)]))
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"uid": f"row {i + 1}", "answer": text}) + "\n"
                            for i, text in enumerate(("crimson", "blue", "Red."))))
    judge = judge_model.with_file(judge_model.Config("judge", server.url), str(tmp_path / "verdicts.jsonl"))
    plain, _ = evaluate.score(str(path), "visualprobe", str(data))
    judged, _ = evaluate.score(str(path), "visualprobe", str(data), judge)
    assert [r["score"] for r in plain["rows"]] == [0, 0, 1] and [r["score"] for r in judged["rows"]] == [1, 0, 1]
    assert len(server.bodies) == 2, "what is literally right is not asked"
    assert judged["judge"] == {"model": "judge", "prompt": judge_model.PROMPT_VERSION, "asked": 2, "unclear": 0}
    assert "judge" not in plain
  finally:
    server.close()


def test_a_dead_judge_is_an_error_and_no_wrong_answer(tmp_path):
  path = tmp_path / "d.jsonl"
  path.write_text(json.dumps({"input_image": "direct_attributes/a.jpg", "test_type": "direct_attributes",
                              "question": "?", "options": ["x", "y"], "output": 1}) + "\n")
  judge = judge_model.Judge(judge_model.Config("m", "http://127.0.0.1:9/v1", tries=1))
  with pytest.raises(judge_model.Unreachable):
    evaluate.score(str(path), "vstar", None, judge)


def test_every_way_of_asking(tmp_path, monkeypatch):
  """A policy that always says A, on V*, whose right option is A unless options are shuffled; and on POPE."""
  for i in range(6):
    vstar_json(tmp_path / "vstar" / "direct_attributes" / f"x{i}.json")
    (tmp_path / "vstar" / "direct_attributes" / f"x{i}.jpg").write_bytes(picture())
  pope_file(tmp_path / "pope" / "coco_pope_random.json", [("cup", "yes"), ("dog", "no")])
  (tmp_path / "pope" / "a.png").write_bytes(picture())
  asked_of = []

  def run(policy, params, tasks, key, slots, temperature, cfg):
    asked_of.append((len(tasks), len(policy.actions), policy.prompt.describe_tool))
    made = [types.Trajectory(t, i, np.zeros(1, np.int32), [], [], types.StopReason.ANSWERED, "A")
            for i, t in enumerate(tasks)]
    answers.grade(made)
    return [harness.Judged(t, (), ()) for t in made]

  c = config.default()
  policy = turns.Policy(None, None, prompt.Config(), images.Config(), turns.Config(), None)
  loaded = load.Loaded(None, {}, {}, "")
  monkeypatch.setattr(load.Loaded, "params", {})
  monkeypatch.setattr(evaluate.setup, "of_policy", lambda model, given: (c, loaded, pieces_of(policy)))
  monkeypatch.setattr(evaluate.sample, "weights", lambda *args: {})
  monkeypatch.setattr(turns, "check", lambda policy, task: None)
  monkeypatch.setattr(harness, "run", run)
  cfg = asked.Config(slots=4)
  found = evaluate.evaluate("m", ["vstar", "pope"], [str(tmp_path / "vstar"), str(tmp_path / "pope")],
                            str(tmp_path / "out"), cfg, zooms="both", options="both", tables=("vlmevalkit",))
  told = [(r["benchmark"], r["zoom"], r["options_seed"]) for r in found]
  assert told == [("vstar", True, 0), ("vstar", False, 0), ("vstar", True, None), ("vstar", False, None),
                  ("pope", True, 0), ("pope", False, 0)], "nothing of POPE is shuffled"
  assert found[2]["score"] == found[3]["score"] == 1.0 > found[0]["score"] == found[1]["score"]
  assert {(actions, described) for _, actions, described in asked_of} == {(1, True), (0, False)}
  assert found[3]["zooming_gap"]["acc_ans"]["value"] == 0.0 and "zooming_gap" not in found[2]
  names = sorted(p.name for p in (tmp_path / "out").iterdir())
  assert names == ["pope", "pope_without_zoom", "vstar", "vstar_native_options", "vstar_native_options_without_zoom",
                   "vstar_without_zoom"]
  assert all((tmp_path / "out" / name / "vlmevalkit.tsv").exists() for name in names)
  page = lambda name: (tmp_path / "out" / name / "report.html").read_text()
  assert all("What zooming is worth" in page(name) and '"picture":0' in page(name) for name in names)
  found = evaluate.compared(str(tmp_path / "out" / "vstar"), str(tmp_path / "out" / "vstar_native_options"),
                            str(tmp_path / "flips"))
  assert found[0]["gained"] == round(6 * (1 - found_score(tmp_path, "vstar"))) > 0 == found[0]["lost"]
  assert found[0]["differ"] == {"options_seed": [0, None]}
  assert json.loads((tmp_path / "flips" / "comparison.json").read_text()) == found[0]
  assert '"change":"gained"' in (tmp_path / "flips" / "comparison.html").read_text()


def found_score(folder, name):
  return json.loads((folder / "out" / name / "results.json").read_text())["score"]


def test_two_files_of_predictions_are_compared(tmp_path, pope, monkeypatch, capsys):
  data, path = pope
  other = tmp_path / "q.jsonl"
  other.write_text(path.read_text().replace('"Yes"', '"No"'))
  for name, file in (("a", path), ("b", other)):
    here(monkeypatch, f"--score={file}", "--benchmark=pope", f"--data={data}", f"--out={tmp_path / name}")
  page = (tmp_path / "a" / "pope" / "report.html").read_text()
  assert "predictions for no row: 1" in page and "label is neither yes nor no" in page
  capsys.readouterr()
  here(monkeypatch, "--compare", tmp_path / "a", tmp_path / "b", f"--out={tmp_path / 'c'}")
  *told, last = capsys.readouterr().out.splitlines()
  assert "  1 gained, 1 lost: p = 1 (McNemar's exact test, two-sided)" in told
  assert json.loads(last)["n"] == 2 and (tmp_path / "c" / "pope" / "comparison.html").exists()
  with pytest.raises(SystemExit, match="error: .*nothing must be a folder that evaluate has written"):
    here(monkeypatch, "--compare", tmp_path / "a", tmp_path / "nothing")


def pieces_of(policy):
  """The parts of `setup.Pieces` that the command uses."""
  return SimpleNamespace(policy=policy, step=SimpleNamespace(reward=reward.Config()))


def looks(body):
  """A zoom, and then an answer that depends on the question; both depend on the seed if they are sampled."""
  drawn = body["seed"] % 5 if body["temperature"] else 0
  said = [m["content"] for m in body["messages"] if m["role"] == "assistant"]
  if not said and "image_zoom" in str(body["messages"][0]):
    box = [10 + drawn, 10, 60, 60]
    return prompt.call_text({"name": "image_zoom_in_tool", "arguments": {"bbox_2d": box}}, "where?")
  return prompt.answer_text(needle.PATTERNS[(len(str(body["messages"][1])) + drawn) % 6])


@functools.cache
def drawn():
  """The first needle tasks: drawing all of them each time would take longer than asking."""
  cfg = needle.Config()
  return [needle.draw(cfg.seed, "test", i, cfg)[0] for i in range(12)]


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setattr(evaluate.table.BENCHMARKS["needle"], "load", lambda path, how: rows_lib.Loaded(tuple(
      dataclasses.replace(task, image=rows_lib.keep(task.image, how.store)) for task in drawn())))
  it = Server(looks)
  yield it
  it.close()


def by_endpoint(server, out, cfg=asked.Config(slots=4), timeout_s=5.0, patience_s=60.0, **more):
  c = tiny.get_config()
  c.prompt.describe_tool, c.rollout.max_total_tokens = True, 2048
  c.endpoint.update(wait_s=0.01, in_flight=3, timeout_s=timeout_s, patience_s=patience_s)
  how = rows_lib.How(store=str(out / "images"))
  return evaluate.evaluate(None, ["needle"], ["-"], str(out), cfg, c, how, 10, url=server.url, **more)


def files_of(folder):
  return {str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"OUT")
          for path in sorted(folder.rglob("*"))
          if path.is_file() and path.name != "meta.json" and path.parent.name != "images"}


def test_an_endpoint_is_asked(tmp_path, server):
  both = by_endpoint(server, tmp_path / "a", zooms="both", served="m")
  assert [r["model"] for r in both] == ["endpoint: m"] * 2 and [r["zoom"] for r in both] == [True, False]
  assert {body["model"] for body in server.bodies} == {"m"}
  assert [r["summary"]["rationale_count"]["value"] for r in both] == [1.0, 0.0] and both[0]["n"] == 10
  said = [json.loads(line) for line in (tmp_path / "a" / "needle" / "predictions.jsonl").read_text().splitlines()]
  assert all(e["boxes"] and e["classes"] and e["text"].count("<answer>") == 1 for e in said)
  meta = json.loads((tmp_path / "a" / "needle" / "meta.json").read_text())
  assert meta["endpoint"] == server.url and server.url not in json.dumps(meta["fixed"]), "it may come back elsewhere"


def test_no_fault_of_an_endpoint_is_an_answer(tmp_path, server):
  cfg = asked.Config(slots=4, samples=2, temperature=1.0)
  by_endpoint(server, tmp_path / "whole", cfg)
  server.faults = ["drop", 429, 500, "cut", "slow", "empty", 503]
  by_endpoint(server, tmp_path / "faults", cfg, timeout_s=0.5)
  assert not server.faults and files_of(tmp_path / "faults") == files_of(tmp_path / "whole")


def test_an_endpoint_that_dies_leaves_what_it_said(tmp_path, server, capsys):
  by_endpoint(server, tmp_path / "whole")
  all_, server.faults = len(server.bodies), [None] * 11 + [500] * 10 ** 4
  server.bodies.clear()
  with pytest.raises(endpoint.Unreachable, match="no reply to . questions .needle: test_0+.: 500 busy.*same command"):
    by_endpoint(server, tmp_path / "out", patience_s=0.3)
  result = json.loads((tmp_path / "out" / "needle" / "results.json").read_text())
  assert 4 <= result["n"] < 10 and result["n"] + len(result["lost"]) in (8, 10) and "500 busy" in str(result["lost"])
  assert result["evaluated"]["without_prediction"] == 10 - result["n"] and result["summary"]["n"] == result["n"]
  assert f"the endpoint gave no reply, {len(result['lost'])} predictions: test_0000" in capsys.readouterr().out
  page = (tmp_path / "out" / "needle" / "report.html").read_text()
  assert f"tasks that the endpoint gave no reply to: {len(result['lost'])}" in page
  rows, read = evaluate.score(str(tmp_path / "out" / "needle" / "predictions.jsonl"), "needle", "-")
  assert rows["n"] == result["n"] and {r.cause for r in read.rejects} == {"lost: 500 busy"}
  server.faults = []
  server.bodies.clear()
  by_endpoint(server, tmp_path / "out")
  assert files_of(tmp_path / "out") == files_of(tmp_path / "whole") and len(server.bodies) < all_


def test_one_request_that_fails_for_ever_costs_no_other(tmp_path, server):
  """It is soon put aside, named, and asked again by the same command; in the end the result shows nothing of it."""
  by_endpoint(server, tmp_path / "whole")
  bad = json.loads((tmp_path / "whole" / "needle" / "predictions.jsonl").read_text().splitlines()[2])["uid"]
  server.bad_seed = seed = remote.seed(remote.seed(0, bad, 0), 0)
  with pytest.raises(endpoint.Unreachable, match=f"no reply to 1 questions .needle: {bad}: 500 [^,]*, . times"):
    by_endpoint(server, tmp_path / "out", patience_s=600.0)
  assert 8 <= sum(body["seed"] == seed for body in server.bodies) < 20
  found = [json.loads(line) for line in (tmp_path / "out" / "needle" / "predictions.jsonl").read_text().splitlines()]
  assert len(found) == 10 and [e["uid"] for e in found if "lost" in e] == [bad]
  server.bad_seed = None
  server.bodies.clear()
  by_endpoint(server, tmp_path / "out")
  assert len(server.bodies) <= 4, "nobody else is asked again"
  assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_an_endpoint_that_takes_nothing_is_an_error(tmp_path, server):
  server.faults = [404] * 100
  with pytest.raises(endpoint.Unreachable, match="no reply to 4 questions .*404 from http"):
    by_endpoint(server, tmp_path / "out")
  assert not (tmp_path / "out" / "needle" / "results.json").exists()


def start(out, *args, processes=1, devices=1):
  """Starts the command in its own processes, for the tiny base unless an endpoint is given."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  who = lambda i: () if processes == 1 else (
      f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={i}")
  return [subprocess.Popen(
      [sys.executable, "-m", "virl_jax.evaluate", "--model=@tiny", f"--config={ROOT / 'configs' / 'tiny.py'}",
       "--benchmark=needle", "--data=-", f"--out={out}", "--slots=4", *args, *who(i)], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}) for i in range(processes)]


def ended(runs):
  said = [run.communicate(timeout=600)[0] for run in runs]
  assert [run.returncode for run in runs] == [0] * len(runs), "\n".join(text[-3000:] for text in said)
  return said


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_predictions(tmp_path, server):
  """In its own process each time; benchmarks/kill_evaluate.py does so ten times, with our own engine."""
  by_endpoint(server, tmp_path / "whole")
  how = (f"--endpoint={server.url}", "--limit=10", "--config.prompt.describe_tool=True",
         "--config.rollout.max_total_tokens=2048", "--config.endpoint.in_flight=1")
  server.bodies.clear()
  (run,) = start(tmp_path / "out", *how)
  while len(server.bodies) < 13:  # a chunk has eight requests
    assert run.poll() is None, run.communicate()[0]
    time.sleep(0.01)
  run.kill()
  run.communicate()
  assert not (tmp_path / "out" / "needle" / "results.json").exists()
  (said,) = ended(start(tmp_path / "out", *how))
  assert "has 4 predictions; going on" in said
  assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_ask_an_endpoint_as_one_does(tmp_path, server):
  by_endpoint(server, tmp_path / "one")
  all_ = len(server.bodies)
  ended(start(tmp_path / "two", f"--endpoint={server.url}", "--limit=10", "--config.prompt.describe_tool=True",
              "--config.rollout.max_total_tokens=2048", processes=2))
  assert files_of(tmp_path / "two") == files_of(tmp_path / "one") and len(server.bodies) == 2 * all_


@pytest.mark.slow
def test_two_processes_say_what_one_says(tmp_path):
  """With the same devices, sampled: the raw text of every sample is the same, and so is all that follows from it."""
  how = ("--limit=10", "--samples=2", "--temperature=1", "--zoom=both")
  ended(start(tmp_path / "one", *how, devices=2))
  said = ended(start(tmp_path / "two", *how, processes=2))
  assert "predictions" in said[0] and "predictions" not in said[1], "one of them speaks"
  one, two = (files_of(tmp_path / name) for name in ("one", "two"))
  assert one.keys() == two.keys() and len(one) == 10
  for name in one:
    assert one[name] == two[name], name


@pytest.mark.slow
def test_the_same_words_are_the_same_predictions(tmp_path, monkeypatch):
  """An endpoint says, turn by turn, what the engine has said about the same picture and question."""
  c, cfg, said, run = tiny.get_config(), asked.Config(slots=8), {}, harness.run

  def spy(policy, params, tasks, *more):
    judged = run(policy, params, tasks, *more)
    for j in judged:
      t = j.trajectory
      shown = remote.picture(images.decode(t.task.image), t.images[0], policy.model.vision.grid)
      said[t.task.question, remote._uri(shown)] = [turn for turn in t.turns if turn.role == "assistant"]
    return judged

  def speak(body):
    picture_, question = sorted(body["messages"][1]["content"], key=lambda part: part["type"])
    before = sum(m["role"] == "assistant" for m in body["messages"])
    turn = said[question["text"], picture_["image_url"]["url"]][before]
    return turn.text.removesuffix(prompt.END), "stop" if turn.text.endswith(prompt.END) else "length"

  monkeypatch.setattr(harness, "run", spy)
  ours, = evaluate.evaluate("@tiny", ["needle"], ["-"], str(tmp_path / "ours"), cfg, c, limit=12)
  server = Server(speak)
  try:
    theirs, = evaluate.evaluate("@tiny", ["needle"], ["-"], str(tmp_path / "theirs"), cfg, c, limit=12, url=server.url)
  finally:
    server.close()
  assert ours["summary"] == theirs["summary"] and ours["summary"]["rationale_count"]["value"] > 0
  lines = [(tmp_path / name / "needle" / "predictions.jsonl").read_text() for name in ("ours", "theirs")]
  assert lines[0] == lines[1]


@pytest.mark.slow
def test_a_policy_s_own(tmp_path):
  """The tiny base on needle, which reads no data; what it writes lets another run go on."""
  c = tiny.get_config()
  cfg, out = asked.Config(slots=8), str(tmp_path / "out")
  ask = lambda out, **more: evaluate.evaluate("@tiny", ["needle"], ["-"], out, cfg, c, limit=12, **more)
  result, without = ask(out, zooms="both")
  assert result["n"] == 12 and result["evaluated"]["share"] == 1.0 and result["limit"] == 12
  assert result["score"] == pytest.approx(result["summary"]["acc_ans"]["value"]), "the benchmark's rule is the task's"
  assert result["summary"]["rationale_count"]["value"] > 0
  file = tmp_path / "out" / "needle" / "predictions.jsonl"
  whole = file.read_bytes()
  file.write_bytes(whole[:len(whole) * 3 // 4])
  assert ask(out) == [result] and file.read_bytes() == whole
  again, read = evaluate.score(str(file), "needle", "-")
  assert again["score"] == result["score"] and read.layout == "ours"
  assert again["evaluated"]["without_prediction"] == 500
  assert (result["zoom"], without["zoom"]) == (True, False)
  assert without["summary"]["rationale_count"]["value"] == 0 and without["zooming_gap"]["n"] == 12
  assert without["zooming_gap"]["acc_ans"]["value"] == pytest.approx(result["score"] - without["score"])
  assert (tmp_path / "out" / "needle_without_zoom" / "results.json").exists()
