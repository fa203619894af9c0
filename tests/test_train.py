"""Whole runs of the entry point, small."""

import hashlib
import json
import os
import pathlib
import random
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

from tests.data import test_judge_model as judging
from virl_jax import config as config_lib
from virl_jax import export
from virl_jax import train
from virl_jax.learner import checkpoint
from virl_jax.model import tuning
from virl_jax.model import weights
from virl_jax.run import goodput
from virl_jax.run import load
from virl_jax.run import log
from virl_jax.run import loop
from virl_jax.run import setup
from virl_jax.run import sources
from virl_jax.run import workdir as workdir_lib

ROOT = pathlib.Path(__file__).parents[1]
PHOTOS = ROOT.parent / "shared" / "realdata" / "records.jsonl"
SMALL = ("--config.rollout.prompts=4", "--config.rollout.group_size=4", "--config.eval.tasks=8",
         "--config.rollout.max_rounds=2", "--config.engine.slots=8",
         "--config.pack.joined_share=0.5", "--config.pack.crops_share=1.0",  # few programs
         "--config.data.needle.train_size=32", "--config.data.needle.test_size=8", "--config.checkpoint.every=1",
         "--config.log.gallery_every=2", "--config.log.tensorboard=False")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  """A folder for runs, and the environment that they share (drawn pictures; compiled programs: see conftest)."""
  folder = tmp_path_factory.mktemp("runs")
  env = dict(os.environ, JAX_PLATFORMS="cpu", VIRL_JAX_CACHE=str(folder / "cache"), PYTHONUNBUFFERED="1")
  return folder, env


def _start(places, workdir, *more, config="configs/tiny.py"):
  return subprocess.Popen([sys.executable, "-m", "virl_jax.train", f"--config={config}", f"--workdir={workdir}", *more],
                          cwd=ROOT, env=places[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _lines(workdir):
  file = pathlib.Path(workdir) / "metrics.jsonl"
  return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _steps(workdir):
  return [line for line in _lines(workdir) if "step" in line]


def _timeless(lines):
  return [{k: v for k, v in line.items() if not k.startswith(log.MEASURED)} for line in lines]


@pytest.fixture(scope="module")
def six_steps(places):
  """An uninterrupted run of six steps."""
  workdir = places[0] / "whole"
  run = _start(places, workdir, *SMALL, "--config.steps=6")
  out, _ = run.communicate(timeout=600)
  assert run.returncode == 0, out
  return workdir, out


def test_a_run_leaves_what_it_should(six_steps):
  workdir, out = six_steps
  header, *lines = _lines(workdir)
  assert header["config"] == json.loads((workdir / "config.json").read_text()) and header["versions"]["jax"]
  assert [line["step"] for line in lines] == list(range(6))
  wanted = {"reward/total", "reward/answer", "reward/fidelity", "acc_ans", "acc_rat", "rationale_count", "hit_rate",
            "mean_iou", "loss/policy", "loss/kl", "ppo/clip_frac", "ppo/ratio_max", "rollout/logp_gap_max",
            "time/rollout_s", "time/update_s", "tokens/generated", "tokens/total", "patches/total", "speed/tokens_s",
            "speed/tokens_s_device", "speed/goodput"}
  assert wanted <= lines[0].keys()
  assert not {"speed/mfu", "memory/device_peak_gib"} & lines[0].keys(), "a CPU has no peak, and tells of no memory"
  for line in lines:
    assert line["tokens/total"] > line["tokens/generated"] and line["patches/total"] > line["patches/of_image"] > 0
  for name in ("config.json", "eval_before.json", "eval_after.json", "report.html", "rollouts/before.jsonl",
               "rollouts/step_000002.jsonl", "rollouts/after.jsonl", "wallclock.jsonl"):
    assert (workdir / name).is_file(), name
  assert "acc_rat" in out and "95% intervals" in out and "left" in out and "\ngoodput " in out
  assert "Where the time went" in (workdir / "report.html").read_text()
  after = json.loads((workdir / "eval_after.json").read_text())
  assert after["n"] == 8 and {"value", "low", "high"} <= after["difference"]["acc_rat"].keys()


def test_sampler_and_trainer_agree(six_steps):
  assert max(line["rollout/logp_gap_max"] for line in _steps(six_steps[0])) < 1e-4


def test_few_compilations_after_the_first_step(six_steps):
  counts = [line["compile/count"] for line in _steps(six_steps[0])]
  assert counts[0] > 0 and counts[-1] - counts[0] <= 12, counts


@pytest.mark.slow
def test_killed_and_started_again_ends_the_same(places, six_steps):
  workdir = places[0] / "killed"
  at = random.randint(1, 4)
  run = _start(places, workdir, *SMALL, "--config.steps=6")
  give_up = time.monotonic() + 600
  while len(_steps(workdir)) <= at and run.poll() is None and time.monotonic() < give_up:
    time.sleep(0.02)
  run.send_signal(signal.SIGKILL)
  run.communicate()
  assert run.returncode == -signal.SIGKILL, "it was still running"
  again = _start(places, workdir, *SMALL, "--config.steps=6")
  out, _ = again.communicate(timeout=600)
  assert again.returncode == 0, out
  assert "going on from step" in out, f"killed after step {at}"
  assert _timeless(_lines(workdir)) == _timeless(_lines(six_steps[0])), f"killed after step {at}"
  events = goodput.read(str(workdir / "wallclock.jsonl"))
  starts = [i for i, event in enumerate(events) if event["spent"] == "stopped"]
  assert len(starts) == 2, "the second start has not forgotten the first"
  done = [[event["step"] for event in part if event["spent"] == "step"] for part in
          (events[:starts[1]], events[starts[1]:])]
  resumed = next(event["resumed"] for event in events[starts[1]:] if "resumed" in event)
  assert len(done[0]) > at and done == [list(range(len(done[0]))), list(range(resumed, 6))], f"killed after step {at}"
  assert goodput.split(events)["stopped"] > 0
  ours, theirs = (json.loads((w / "eval_after.json").read_text()) for w in (workdir, six_steps[0]))
  assert ours == theirs, f"killed after step {at}"


FAULTY = """
import sys
from virl_jax.run import signals
from virl_jax.run import sources
signals.install()
from absl import app
from virl_jax import train
from virl_jax.learner import checkpoint
from virl_jax.rollout import dynamic

run, calls = dynamic.run, []

def fails(*args):
  calls.append(args)
  if len(calls) == 3:
    raise OSError("the disk is on fire\\nand so on, for pages")
  return run(*args)

dynamic.run = fails
train.define_flags()
app.run(train.main)
"""


@pytest.mark.slow
def test_a_judge_is_asked_once_and_a_run_that_goes_on_is_told_the_same(places):
  """Whatever the judge says later: the verdicts that a killed run was given are in its workdir."""
  def speak(yes):
    return lambda body: yes(hashlib.blake2b(body["messages"][0]["content"].encode()).digest()[0])

  workdirs = [places[0] / "judged", places[0] / "judged_and_killed"]
  options = [*(o for o in SMALL if "checkpoint" not in o), "--config.checkpoint.every=2", "--config.steps=4",
             "--config.judge.model=judge"]
  server = judging.Server(speak(lambda byte: "yes" if byte % 2 else "no"))
  try:
    run = _start(places, workdirs[0], *options, f"--config.judge.url={server.url}")
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0, out
    run = _start(places, workdirs[1], *options, f"--config.judge.url={server.url}")
    while len(_steps(workdirs[1])) < 4 and run.poll() is None:
      time.sleep(0.01)
    run.kill()  # after the last step, before its checkpoint or the evaluation
    run.communicate()
  finally:
    server.close()
  kept = sorted((workdirs[1] / "verdicts").iterdir())
  lines = [line for file in kept for line in file.read_text().splitlines()]
  keys = {json.loads(line)["key"] for line in lines}
  assert len(keys) == len(lines) > 10
  server = judging.Server(speak(lambda byte: "no"))  # another judge, at another address
  try:
    run = _start(places, workdirs[1], *options, f"--config.judge.url={server.url}")
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0 and "going on from step" in out, out
  finally:
    server.close()
  assert _timeless(_steps(workdirs[0])) == _timeless(_steps(workdirs[1]))
  judged = [(line["judge/answers"], line["judge/right"]) for line in _steps(workdirs[0])]
  assert all(n > right > 0 for n, right in judged)
  again = [json.loads(line)["key"] for file in sorted((workdirs[1] / "verdicts").iterdir()) if file not in kept
           for line in file.read_text().splitlines()]
  assert not keys & set(again), "nothing is asked about twice"


@pytest.mark.slow
def test_whatever_ends_it_the_finished_steps_are_saved(places, six_steps):
  """An error in the loop, then SIGTERM, with no checkpoint due: the run ends as if neither had happened."""
  workdir = places[0] / "ended"
  options = [*(o for o in SMALL if "checkpoint" not in o), "--config.checkpoint.every=0", "--config.steps=6"]
  run = subprocess.run([sys.executable, "-c", FAULTY, "--config=configs/tiny.py", f"--workdir={workdir}", *options],
                       cwd=ROOT, env=places[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  assert run.returncode == 1 and "Traceback" not in run.stdout, run.stdout
  assert run.stdout.splitlines()[-1] == "error: OSError: the disk is on fire (VIRL_JAX_DEBUG=1 shows where)"
  assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["2"]
  run = _start(places, workdir, *options)
  lines = []
  for line in run.stdout:
    lines.append(line)
    if line.startswith("step 4/6"):
      run.send_signal(signal.SIGTERM)
  assert run.wait(60) == 0 and "going on from step 2\n" in lines
  step = int(lines[-1].removeprefix("stopped by SIGTERM; step ").removesuffix(
      " is saved, the same command goes on from there\n"))
  assert step >= 4 and len(_steps(workdir)) == step, "what was written down is saved"
  out, _ = _start(places, workdir, *options).communicate(timeout=600)
  assert f"going on from step {step}\n" in out
  assert _timeless(_steps(workdir)) == _timeless(_steps(six_steps[0]))


@pytest.mark.slow
def test_an_alarm_can_end_a_run_and_the_run_can_go_on(places):
  workdir = places[0] / "stopped"
  alarming = ("--config.steps=3", "--config.eval.tasks=0", "--config.checkpoint.every=50", "--config.monitor.window=1",
              "--config.monitor.entropy_nats=9.0")
  small = [option for option in SMALL if "eval.tasks" not in option and "checkpoint" not in option]
  for attempt in range(2):  # the second finds that the alarm has ended the run
    run = _start(places, workdir, *small, *alarming, "--config.monitor.stop=('entropy_collapse',)")
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0, out
    assert "stopped by entropy_collapse, which began at step 1." in out
    assert out.count("alarm: entropy_collapse") == 1 - attempt
    assert len(_steps(workdir)) == 1 and "entropy collapse</b> from step 0" in (workdir / "report.html").read_text()
  run = _start(places, workdir, *small, *alarming, "--config.monitor.stop=()")
  out, _ = run.communicate(timeout=600)
  assert run.returncode == 0, out
  assert "going on from step 1" in out and "stopped by" not in out and "alarm: " not in out, "it has begun before"
  header, *lines = _lines(workdir)
  assert [line["step"] for line in lines] == [0, 1, 2]
  assert header["config"]["monitor"]["stop"] == [] and header["earlier"][0]["until"] == 1


POISONED = """
from absl import app
import jax.numpy as jnp
from virl_jax import train
from virl_jax.learner import checkpoint
from virl_jax.learner import step as step_lib

threshold, score, at = train._threshold, step_lib.score, []

def noted(p, step):
  at.append(step)
  return threshold(p, step)

def poisoned(*args):  # at the second step, one trajectory of the first minibatch
  (first, metrics), *others = score(*args)
  if at[-1] == 1:
    first = first.replace(advantage_BT=first.advantage_BT.at[0].set(jnp.nan))
  return [(first, metrics), *others]

train._threshold, step_lib.score = noted, poisoned
train.define_flags()
app.run(train.main)
"""


@pytest.mark.slow
def test_a_bad_batch_passes_by_and_the_run_can_be_resumed(places):
  """Resumed after the bad batch or before it: the same lines to the last bit."""
  small = [option for option in SMALL if "eval.tasks" not in option]
  options = (*small, "--config.eval.tasks=0", "--config.ppo.minibatches=2", "--config.optim.skip_above=50.0",
             "--config.optim.skip_window=2")
  found = []
  for name, stops in (("bad_whole", (3,)), ("bad_resumed", (1, 2, 3))):
    workdir = places[0] / name
    for steps in stops:
      run = subprocess.run([sys.executable, "-c", POISONED, "--config=configs/tiny.py", f"--workdir={workdir}",
                            *options, f"--config.steps={steps}"], cwd=ROOT, env=places[1], stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)
      assert run.returncode == 0, run.stdout
      at = f"{workdir}/bad_batches/step_000001"
      said = f"skipped: 1 of 2 updates, 1 not finite (loss/policy, loss/total, optim/grad_norm); see {at}\n"
      assert (said in run.stdout) == (len(stops) == 1 or steps == 2), run.stdout  # where the step was done
    lines = _timeless(_steps(workdir))
    assert [line["optim/skipped"] for line in lines] == [0, 1, 0] and "nan" not in lines[1].values()
    assert [line.get("optim/limit", 0) > 0 for line in lines] == [False, True, True]
    assert sorted(os.listdir(at)) == ["minibatch_0.npz", "step.json", "trajectories.jsonl"]
    assert np.isnan(np.load(f"{at}/minibatch_0.npz")["advantage_BT"][0]).all()
    assert '"when":"Skipped, step 1"' in (workdir / "report.html").read_text()
    found.append((lines, json.loads((workdir / "bad_batches/step_000001/step.json").read_text())["updates"]))
  assert found[0] == found[1]


@pytest.mark.slow
def test_a_run_goes_on_with_changes_on_purpose(places):
  workdir = places[0] / "changed"
  for steps, rate, more in ((1, 2e-4, ()), (2, 1e-4, ()), (2, 1e-4, ("--resume-with-changes",))):
    small = [option for option in SMALL if "eval.tasks" not in option]
    run = _start(places, workdir, *small, "--config.eval.tasks=0", f"--config.steps={steps}",
                 f"--config.optim.learning_rate={rate}", *more)
    out, _ = run.communicate(timeout=600)
    refused = steps == 2 and not more
    assert run.returncode == refused, out
    assert ("optim.learning_rate: 0.0002 there, 0.0001 now); use another --workdir, or --resume" in out) == refused
  assert "config.optim.learning_rate changes from 0.0002 to 0.0001" in out and "going on from step 1" in out
  header, *lines = _lines(workdir)
  assert [line["step"] for line in lines] == [0, 1]
  assert header["changed"] == {"optim.learning_rate": [2e-4, 1e-4]}
  assert header["earlier"][0]["until"] == 1 and header["earlier"][0]["config"]["optim"]["learning_rate"] == 2e-4


@pytest.mark.slow
def test_the_rivals_train_and_go_on(places):
  """A critic, CISPO, and an adaptive KL in the reward: their state is in the checkpoint."""
  rivals = ("--config.advantage.kind=gae", "--config.credit.scope=call", "--config.loss.kind=cispo",
            "--config.loss.kl_coef=0.05", "--config.loss.kl_in_reward=True", "--config.loss.kl_estimator=k1",
            "--config.loss.kl_target=0.001",
            "--config.loss.kl_horizon=100.0", "--config.eval.tasks=0")
  small = [option for option in SMALL if "eval.tasks" not in option]
  for steps in (1, 2):
    run = _start(places, places[0] / "rivals", *small, *rivals, "--config.log.gallery_every=0",
                 f"--config.steps={steps}")
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0, out
    assert ("going on from step 1" in out) == (steps == 2)
  first, second = _steps(places[0] / "rivals")
  assert first["critic/loss"] > 0 and first["critic/explained"] == pytest.approx(0, abs=0.3), "it knew nothing"
  assert first["loss/kl_coef"] == pytest.approx(0.05)
  # All below the target: the coefficient falls by at most a fifth of 4 * 4 trajectories over a horizon of 100.
  assert first["loss/kl"] < 0.0008 and second["loss/kl_coef"] == pytest.approx(0.05 * (1 - 0.2 * 16 / 100))


@pytest.mark.slow
def test_adapters_train_go_on_and_come_out(places, tmp_path):
  """Only adapters are saved; a resumed run is the same run; both forms of export hold the policy."""
  lora = (*SMALL, "--config.lora.rank=4", "--config.optim.learning_rate=2e-3", "--config.loss.kl_coef=0.01")
  whole, halves = places[0] / "lora", places[0] / "lora_in_two"
  for workdir, steps in ((whole, 3), (halves, 2), (halves, 3)):
    run = _start(places, workdir, *lora, f"--config.steps={steps}")
    out, _ = run.communicate(timeout=600)
    assert run.returncode == 0, out
  assert "going on from step 2" in out
  lines = _timeless(_steps(whole))
  assert [line["step"] for line in lines] == [0, 1, 2] and _timeless(_steps(halves)) == lines
  assert max(line["rollout/logp_gap_max"] for line in lines) < 1e-4 and lines[-1]["loss/kl"] > 0
  assert sum(f.stat().st_size for f in (whole / "checkpoints" / "3").rglob("*")) < 2e6  # the whole state: 25e6
  policy = load.trained(str(whole))
  assert policy.params["text"]["blocks"]["q_w"].b.any() and policy.model.tuning.rank == 4
  assert export.export(str(whole), str(tmp_path / "hf"), None, "float32", str(tmp_path / "adapters")) == 3
  _, merged = weights.load_hf(tmp_path / "hf")
  for name in ("q_w", "down_w"):
    w = policy.params["text"]["blocks"][name]
    np.testing.assert_array_equal(merged["text"]["blocks"][name][1], tuning.merged(w, 1))
  assert json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["r"] == 4
  with pytest.raises(ValueError, match="lora.rank: 4 there, 8 now .the checkpoints hold adapters of that kind"):
    c = workdir_lib.config(whole)
    c.lora.rank = 8
    train.train(c, str(whole), True)


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_a_disk(places, six_steps, bucket, tmp_path):
  """Stopped, started again and exported, with real clients of a bucket that can neither append nor rename."""
  workdir, places = "gs://my-bucket/runs/tiny", (places[0], dict(os.environ, **{
      name: places[1][name] for name in ("JAX_PLATFORMS", "VIRL_JAX_CACHE", "PYTHONUNBUFFERED")}))
  lines = lambda: [json.loads(line) for line in bucket.files("runs/tiny").get("metrics.jsonl", b"").splitlines()]
  run = _start(places, workdir, *SMALL, "--config.steps=6")
  while len(lines()) < 3 and run.poll() is None:
    time.sleep(0.02)
  assert bucket.files("runs/tiny")[".lock"].startswith(f"process {run.pid} on ".encode())
  run.send_signal(signal.SIGTERM)
  out, _ = run.communicate(timeout=600)
  assert run.returncode == 0 and "the same command goes on from there" in out, out
  assert ".lock" not in bucket.files("runs/tiny")
  run = _start(places, workdir, *SMALL, "--config.steps=6")
  out, _ = run.communicate(timeout=600)
  assert run.returncode == 0 and "going on from step" in out and f"report: {workdir}/report.html" in out, out
  assert _timeless(lines()) == _timeless(_lines(six_steps[0]))
  left = bucket.files("runs/tiny")
  assert json.loads(left["eval_after.json"]) == json.loads((six_steps[0] / "eval_after.json").read_text())
  on_disk = {f.relative_to(six_steps[0]).as_posix() for f in six_steps[0].rglob("*") if f.is_file()} - {".lock"}
  of_the_run = lambda names: {name for name in names if not name.startswith("checkpoints/")}
  assert of_the_run(left) == of_the_run(on_disk)
  steps = lambda names: {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
  assert steps(left) == steps(on_disk)
  assert export.export(workdir, str(tmp_path / "hf"), None, "float32") == 6
  export.export(str(six_steps[0]), str(tmp_path / "same"), None, "float32")
  for file in (tmp_path / "same").iterdir():
    assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes(), file.name
  with pytest.raises(ValueError, match="an HF folder must be written to a disk"):
    export.export(workdir, "gs://my-bucket/hf")


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.exists(), reason="the real photographs (shared/realdata) are not here")
def test_real_photographs_run_through(places):
  workdir = places[0] / "photos"
  run = _start(places, workdir, "--config.data.source=jsonl", f"--config.data.path={PHOTOS}", "--config.steps=2",
               "--config.rollout.prompts=8", "--config.rollout.group_size=2", "--config.eval.tasks=8",
               "--config.rollout.max_total_tokens=512")
  out, _ = run.communicate(timeout=600)
  assert run.returncode == 0, out
  assert len(_steps(workdir)) == 2 and (workdir / "report.html").stat().st_size > 10_000


def _fails(places, workdir, *more, config="configs/tiny.py"):
  run = _start(places, workdir, *more, config=config)
  out, _ = run.communicate(timeout=120)
  assert run.returncode != 0
  return out


def test_v7b_without_weights_says_what_to_do(places, tmp_path):
  out = _fails(places, tmp_path / "w", config="configs/v7b.py")
  assert "hf download Qwen/Qwen2.5-VL-7B-Instruct" in out and "Traceback" not in out
  assert not (tmp_path / "w").exists(), "nothing is left behind"


def test_an_unknown_key_is_named(places, tmp_path):
  assert "learning_rat" in _fails(places, tmp_path / "w", "--config.optim.learning_rat=1e-3")


def test_another_runs_workdir_is_refused_and_kept(six_steps):
  workdir, _ = six_steps
  c = config_lib.default()
  before = {f: f.read_bytes() for f in workdir.iterdir() if f.is_file()}
  with pytest.raises(ValueError, match="another configuration"):
    workdir_lib.claim(str(workdir), c)
  assert before == {f: f.read_bytes() for f in workdir.iterdir() if f.is_file()}


def test_a_run_from_before_the_monitors_is_its_configuration_s(tmp_path):
  c = config_lib.default()
  workdir_lib.claim(str(tmp_path), c)
  found = json.loads((tmp_path / "config.json").read_text())
  del found["monitor"]
  (tmp_path / "config.json").write_text(json.dumps(found))
  c.monitor.window = 3
  workdir_lib.claim(str(tmp_path), c)
  assert json.loads((tmp_path / "config.json").read_text())["monitor"]["window"] == 3
  c.reward.h0 = 0.3
  with pytest.raises(ValueError, match="reward.h0: 0.4 there, 0.3 now"):
    workdir_lib.claim(str(tmp_path), c)


def test_an_empty_data_set_is_named(tmp_path):
  (tmp_path / "none.jsonl").write_text("")
  c = config_lib.default()
  c.model.path, c.data.source, c.data.path = "@tiny", "jsonl", str(tmp_path / "none.jsonl")
  with pytest.raises(ValueError, match="at least one usable record"):
    train.train(c, str(tmp_path / "w"))


def _photos(folder, long=()):
  """Twelve records with a grey picture each, some with long questions."""
  lines = []
  for i in range(12):
    PIL.Image.new("RGB", (120, 90), (20 * i, 90, 90)).save(folder / f"{i}.png")
    lines.append({"image": f"{i}.png", "question": "What is it? " * (200 if f"photo {i}" in long else 1),
                  "answers": ["a wall"], "boxes": [], "id": f"photo {i}"})
  (folder / "records.jsonl").write_text("\n".join(map(json.dumps, lines)))
  return str(folder / "records.jsonl")


def test_what_does_not_fit_is_asked_neither_in_training_nor_before(tmp_path, monkeypatch, capsys):
  c = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]()
  c.data.source, c.data.path, c.data.eval_fraction = "jsonl", _photos(tmp_path), 0.5
  c.rollout.prompts, c.rollout.group_size, c.eval.tasks = 8, 2, 6
  sides = [{t.uid for t in sources.load(c, split).tasks} for split in ("test", "train")]
  long = {min(side) for side in sides}  # one on each side; what is asked moves no picture to the other
  _photos(tmp_path, long)
  asked = []

  def stop(policy, params, tasks, *_):
    asked.append({t.uid for t in tasks})
    raise KeyboardInterrupt

  monkeypatch.setattr(loop, "evaluate", lambda c, p, params, tasks, *_: asked.append({t.uid for t in tasks}))
  monkeypatch.setattr(train.dynamic, "run", stop)
  with pytest.raises(KeyboardInterrupt):
    train.train(c, str(tmp_path / "w"))
  assert asked == [side - long for side in sides]
  said = capsys.readouterr().out
  for uid in long:
    assert f"skipped {uid}: its prompt must leave room for a turn: at most 224 tokens" in said
  # A process that goes on continues the count.
  feeds, feed = [], train.batches.Feed
  monkeypatch.setattr(train.batches, "Feed", lambda *args: feeds.append(feed(*args)) or feeds[-1])
  monkeypatch.setattr(checkpoint.Checkpoints, "resume", lambda self, state: (1, state))
  with open(tmp_path / "w" / "metrics.jsonl", "a") as log:
    log.write('{"step": 0, "data/skipped": 70}\n')
  with pytest.raises(KeyboardInterrupt):
    train.train(c, str(tmp_path / "w"))
  assert 70 < feeds[0].skipped < 140


def test_an_evaluation_that_was_cut_short_is_named(tmp_path):
  file = tmp_path / "eval_before.json"
  for text in ('{"outcomes": [{"uid": ', "[]", '{"outcomes": [{"uid": "a"}]}', '{"n": 3}'):
    file.write_text(text)
    with pytest.raises(ValueError, match=f"^{file} must be an evaluation as a run writes it.*delete it, and the base"):
      loop.of_these(file, [])


def test_truncated_weights_are_named(tmp_path):
  base = pathlib.Path(load.model_dir("@tiny"))
  broken = tmp_path / "broken"
  broken.mkdir()
  for f in base.iterdir():
    (broken / f.name).write_bytes(f.read_bytes()[:-1000] if f.suffix == ".safetensors" else f.read_bytes())
  c = config_lib.default()
  c.model.path = str(broken)
  c.data.needle.train_size, c.data.needle.test_size = 4, 2
  with pytest.raises(ValueError, match="truncated or corrupt"):
    train.train(c, str(tmp_path / "w"))


@pytest.mark.parametrize("key, value", [("rollout.temperature", 0.0), ("reward.h0", 1.5), ("ppo.minibatches", 3),
                                        ("rollout.group_size", 1), ("model.dtype", "float8")])
def test_bad_values_are_named(key, value):
  c = config_lib.default()
  section, name = key.split(".")
  c[section][name] = value
  with pytest.raises(ValueError, match=f"config.{key}"):
    setup.sections(c)
