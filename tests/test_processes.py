"""Several processes train as one: the same numbers, one workdir, and they stop, fail and go on together."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import recorded
from virl_jax.run import log as log_lib

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ("--config.rollout.prompts=4", "--config.rollout.group_size=4", "--config.data.needle.train_size=32",
         "--config.data.needle.test_size=8", "--config.pack.joined_share=0.5", "--config.pack.crops_share=1.0",
         "--config.rollout.max_rounds=2", "--config.engine.slots=8", "--config.eval.tasks=6",
         "--config.log.tensorboard=False", "--config.ppo.minibatches=2", "--config.log.gallery_every=1",
         "--config.mesh.fsdp=2", "--config.checkpoint.every=2")
# Metrics that depend on how rows are split over devices, but not on what is computed.
OF_THE_LAYOUT = (*log_lib.MEASURED, "tokens/padding_share", "rollout/slot_use", "rollout/weights_gib")


@pytest.fixture(scope="module")
def env(tmp_path_factory):
  return dict(os.environ, JAX_PLATFORMS="cpu", VIRL_JAX_CACHE=str(tmp_path_factory.mktemp("cache")),
              PYTHONUNBUFFERED="1")


class Run:
  """The processes of a run, and the output of each."""

  def __init__(self, env, workdir, processes, devices, *more, port=None, only=None, each=None,
               command="train"):
    if port is None:
      with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    self.logs = [pathlib.Path(f"{workdir}_{time.monotonic_ns()}.{i}.log") for i in range(processes)]
    self.processes = []
    for i, log in enumerate(self.logs):
      if only is not None and i not in only:
        continue
      who = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={i}"]
      words = [sys.executable, "-m", f"virl_jax.{command}", "--config=configs/tiny.py", f"--workdir={workdir}", *SMALL,
               *more, *(who if processes > 1 else ()), *(each(i) if each else ())]
      with open(log, "w") as out:
        self.processes.append(subprocess.Popen(words, cwd=ROOT, env=dict(env, JAX_NUM_CPU_DEVICES=str(devices)),
                                               stdout=out, stderr=subprocess.STDOUT))

  def said(self, i=0):
    return self.logs[i].read_text()

  def wait(self, timeout_s=900):
    """Their statuses, when all have ended."""
    try:
      return [p.wait(timeout_s) for p in self.processes]
    except subprocess.TimeoutExpired:
      raise AssertionError("\n".join(log.read_text()[-3000:] for log in self.logs if log.exists())) from None
    finally:
      self.kill()

  def kill(self):
    for p in self.processes:
      p.kill()

  def done(self):
    codes = self.wait()
    assert not any(codes), "\n".join(log.read_text()[-3000:] for log in self.logs)

  def until(self, text, i=0, timeout_s=600):
    ends = time.monotonic() + timeout_s
    while text not in self.said(i):
      if time.monotonic() > ends or self.processes[i].poll() is not None:
        self.kill()
        raise AssertionError(f"{text!r} was not said:\n{self.said(i)[-3000:]}")
      time.sleep(0.05)


def steps(workdir):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [line for line in lines if "step" in line]


def texts(file):
  entries = map(json.loads, file.read_text().splitlines())
  return [(e["uid"], e["rollout"], e["stop"], [turn.get("text") for turn in e["turns"]]) for e in entries]


def same_numbers(a, b, n):
  """Metrics to 1e-5, answers and texts exactly."""
  mine, theirs = steps(a), steps(b)
  assert [line["step"] for line in mine] == [line["step"] for line in theirs] == list(range(n))
  for x, y in zip(mine, theirs):
    for name in x.keys() | y.keys():
      if not name.startswith(OF_THE_LAYOUT):
        np.testing.assert_allclose(x[name], y[name], rtol=1e-5, atol=1e-5, err_msg=f"step {x['step']} {name}")
  assert any(line["optim/grad_norm"] > 1e-3 for line in mine)
  files = sorted(p.name for p in (a / "rollouts").iterdir())
  assert files == sorted(p.name for p in (b / "rollouts").iterdir()) and len(files) == 2 + n - 1
  for name in files:
    assert texts(a / "rollouts" / name) == texts(b / "rollouts" / name)
  for name in ("eval_before.json", "eval_after.json"):
    outcomes = [json.loads((folder / name).read_text())["outcomes"] for folder in (a, b)]
    assert len(outcomes[0]) == 6 and [o["uid"] for o in outcomes[0]] == [o["uid"] for o in outcomes[1]]
    assert [o["answer"] for o in outcomes[0]] == [o["answer"] for o in outcomes[1]]


def whole(env, folder, processes, devices, n, *more):
  workdir = folder / f"run_{processes}x{devices}"
  run = Run(env, workdir, processes, devices, f"--config.steps={n}", *more)
  run.done()
  return workdir, run


@pytest.fixture(scope="module")
def straight(env, tmp_path_factory):
  """Four steps of one process with two devices."""
  return whole(env, tmp_path_factory.mktemp("straight"), 1, 2, 4)[0]


@pytest.mark.long
def test_any_layout_gives_the_same_numbers(env, tmp_path):
  """2 processes x 4 devices = 1 process x 8 devices = 1 device, five steps of two updates."""
  alone, _ = whole(env, tmp_path, 1, 1, 5, "--config.mesh.fsdp=1")
  for processes, devices in ((1, 8), (2, 4)):
    workdir, run = whole(env, tmp_path, processes, devices, 5)
    same_numbers(alone, workdir, 5)
  assert "report: " in run.said(0) and (workdir / "report.html").is_file() and (workdir / "config.json").is_file()
  assert "step 1/5" in run.said(0) and "step 1/5" not in run.said(1), "one of them speaks"


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_processes(env, straight, tmp_path):
  workdir = tmp_path / "changing"
  for n, (processes, devices) in zip((1, 2, 4), ((2, 1), (1, 2), (2, 2))):
    Run(env, workdir, processes, devices, f"--config.steps={n}").done()
  mine, theirs = steps(workdir), steps(straight)
  assert len(mine) == len(theirs) == 4
  for x, y in zip(mine, theirs):
    for name in ("reward/total", "loss/policy", "optim/grad_norm", "tokens/generated", "acc_rat"):
      np.testing.assert_allclose(x[name], y[name], rtol=1e-4, atol=1e-5, err_msg=f"step {x['step']} {name}")


@pytest.mark.slow
def test_a_signal_to_one_saves_all_at_the_same_step(env, straight, tmp_path):
  workdir = tmp_path / "stopped"
  how = ("--config.steps=4", "--config.checkpoint.every=0")
  run = Run(env, workdir, 2, 1, *how)
  run.until("step 1/4")
  run.processes[1].send_signal(signal.SIGTERM)
  assert run.wait(300) == [0, 0], run.said(0)[-3000:]
  saved = re.search(r"step (\d+) is saved, the same command goes on from there", run.said(0))
  assert saved and int(saved[1]) >= 1 and "stopped by SIGTERM" in run.said(0)
  assert len(steps(workdir)) == int(saved[1]), "no finished step is lost"
  again = Run(env, workdir, 2, 1, *how)
  again.done()
  assert f"going on from step {saved[1]}" in again.said(0)
  same_numbers(straight, workdir, 4)


@pytest.mark.long
def test_two_processes_write_one_bucket_and_go_on(env, bucket, tmp_path):
  env = dict(os.environ, **{name: env[name] for name in ("JAX_PLATFORMS", "VIRL_JAX_CACHE", "PYTHONUNBUFFERED")})
  for last in (2, 3):
    run = Run(env, tmp_path / f"until_{last}", 2, 1, "--workdir=gs://my-bucket/runs/two", f"--config.steps={last}")
    run.done()
    left = bucket.files("runs/two")
    lines = map(json.loads, left["metrics.jsonl"].splitlines())
    assert [line["step"] for line in lines if "step" in line] == list(range(last))
    assert f"checkpoints/{last}/commit_success.txt" in left and f"checkpoints/{last}/checksums.json" in left
    assert ".lock" not in left and {"eval_after.json", "report.html"} <= left.keys()
  assert "going on from step 2" in run.said()


@pytest.mark.slow
def test_when_one_is_killed_none_hangs(env, tmp_path):
  run = Run(env, tmp_path / "killed", 2, 1, "--config.steps=400")
  run.until("1/400  reward")
  run.processes[1].kill()
  began = time.monotonic()
  codes = run.wait(120)
  assert codes[0] != 0 and codes[1] == -signal.SIGKILL and time.monotonic() - began < 90


def test_what_they_were_given_must_be_alike(env, tmp_path):
  """The process that knows reports it, and none waits for the others for ever."""
  workdir = tmp_path / "odd"
  run = Run(env, workdir, 2, 1, each=lambda i: [f"--config.seed={i}"])
  assert run.wait(120) == [1, 1]
  assert "error: process 1" in run.said(1) and "Traceback" not in run.said(0) + run.said(1)
  assert "must have the same configuration (seed). Received: 1 on process 1, 0 on process 0" in run.said(1)
  assert "process 1 has failed, and so all stop" in run.said(0) and not workdir.exists()


def test_a_workdir_in_use_is_refused_to_all(env, tmp_path):
  from virl_jax import config as config_lib
  from virl_jax.run import workdir as workdir_lib
  workdir = tmp_path / "used"
  with workdir_lib.claim(str(workdir), config_lib.default()):
    (workdir / "config.json").unlink()
    run = Run(env, workdir, 2, 1)
    assert run.wait(120) == [1, 1]
  assert "is in use by process" in run.said(0) and "process 0 has failed" in run.said(1)


def test_prompts_must_be_shared_out_evenly(env, tmp_path):
  run = Run(env, tmp_path / "odd", 2, 1, "--config.rollout.prompts=6", "--config.ppo.minibatches=2")
  assert run.wait(120) == [1, 1]
  assert "config.rollout.prompts must be a multiple of config.ppo.minibatches = 2 times the 2 processes" in run.said(0)


@pytest.mark.parametrize("only", [[1], [0]])
def test_who_waits_in_vain_says_for_whom(env, tmp_path, only):
  """For a coordinator that does not answer, or for a process that never comes."""
  run = Run(env, tmp_path / "missing", 2, 1, "--join_timeout_s=3", port=1 if only == [1] else None, only=only)
  (code,) = run.wait(120)
  said = run.said(only[0])
  assert code == 1 and "processes must find each other within 3 s, by the coordinator at 127.0.0.1:" in said, said


@pytest.mark.parametrize("more, said", [
    (["--coordinator=host:1"], "--coordinator, --num_processes and --process_id must be given together. Missing: "
                             "--num_processes, --process_id"),
    (["--coordinator=host", "--num_processes=2", "--process_id=0"], "--coordinator must be HOST:PORT. Received: host"),
    (["--coordinator=h:1", "--num_processes=2", "--process_id=2"],
     "--process_id must be at least 0 and below --num_processes=2. Received: 2")])
def test_flags_that_make_no_sense(env, tmp_path, more, said):
  run = Run(env, tmp_path / "x", 1, 1, *more)
  assert run.wait(120) == [1] and f"error: {said}" in run.said()


@pytest.mark.slow
def test_examples_are_shared_out_and_teach_the_same(env, tmp_path):
  """One demonstration can't be used, which only one of two processes sees; the others last for three steps."""
  data = pathlib.Path(recorded.write(tmp_path / "data", 25))
  lines = [json.loads(text) for text in data.read_text().splitlines()]
  recorded.save(data, [recorded.line(i, f"{i}.png", (90, 90, 95, 95)) if i == 5 else line
                       for i, line in enumerate(lines)])
  found = []
  for processes, devices in ((1, 4), (2, 2)):
    workdir = tmp_path / f"{processes}x{devices}"
    run = Run(env, workdir, processes, devices, "--config.steps=3", f"--data={data}", "--config.sft.batch=8",
              "--config.eval.tasks=0", "--config.log.gallery_every=2", "--config.pack.joined_share=1.0", command="sft")
    run.done()
    assert "left out: demos.jsonl:6: its call can't be carried out" in run.said()
    found.append((workdir, run))
  mine, theirs = (steps(workdir) for workdir, _ in found)
  assert [line["step"] for line in mine] == [0, 1, 2]
  for x, y in zip(mine, theirs, strict=True):
    for name in x.keys() | y.keys():
      if not name.startswith(OF_THE_LAYOUT):
        np.testing.assert_allclose(x[name], y[name], rtol=1e-5, atol=1e-5, err_msg=f"step {x['step']} {name}")
  assert len({texts(workdir / "rollouts" / "step_000002.jsonl").__repr__() for workdir, _ in found}) == 1
