"""The tiny run of two processes, in all kinds of trouble, restarted by a loop each time: what is lost, how it ends.

    python benchmarks/chaos.py                                   # all of it: an hour and a half on an idle machine
    python benchmarks/chaos.py --kills=2 --terms=1 --damages=1 --disks=1 --coordinators=1 --steps=12

Findings are kept, run by run: the same command goes on from there.

At random moments a random process gets SIGKILL, or SIGTERM; the coordinator is killed; both are killed and the newest
checkpoint is damaged (cut short, bytes inverted, its manifest deleted); the disk runs full (the workdir's, a small
tmpfs, which needs root).  Then both are started again with the same command, until the run is done, and the next run
begins, until all troubles have happened.

It checks that SIGTERM loses no finished step and ends both with 0; that nothing else loses more steps than there are
between checkpoints (damage: one checkpoint more); that no process outlives the other for long; and that the parameters
of every run, and its metrics except times, are in the end bit for bit those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import timing  # of this folder

from virl_jax.run import log as log_lib

ROOT = pathlib.Path(__file__).parents[1]
SMALL = ("--config.rollout.prompts=4", "--config.rollout.group_size=4", "--config.eval.tasks=8", "--config.mesh.fsdp=2",
         # Few programs, because each start compiles them again.
         "--config.rollout.max_rounds=2", "--config.engine.slots=8", "--config.pack.joined_share=0.5",
         "--config.pack.crops_share=1.0",
         "--config.data.needle.train_size=64", "--config.data.needle.test_size=16", "--config.log.tensorboard=False",
         "--config.log.gallery_every=0", "--join_timeout_s=60")
KINDS = ("kill", "term", "damage", "disk", "coordinator")
DAMAGES = ("cut short", "inverted", "no manifest")
TIMES = log_lib.MEASURED
STEP = re.compile(r"^step +(\d+)/", re.MULTILINE)
# The flags of tests/conftest.py, for the same reasons.
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
  FLAGS.append("--xla_cpu_use_fusion_emitters=false")
DISK_BYTES = 800 * 2 ** 20
LONELY_S = 100.0  # how long a process may outlive the other
DIGEST = """
import hashlib, sys, jax, numpy as np
from virl_jax.run import load
digest = hashlib.blake2b(digest_size=16)
for leaf in jax.tree.leaves(load.trained(sys.argv[1]).params):
  digest.update(np.asarray(leaf).tobytes())
print(digest.hexdigest())
"""


class Life:
  """Two processes of the run, from their start to the end of both; their output goes to WORKDIR.log.

  Args:
    workdir: of the run.
    args: the command line's.
    env: environment of the processes.
  """

  def __init__(self, workdir: pathlib.Path, args, env: dict[str, str]):
    self.workdir, self._log = workdir, pathlib.Path(f"{workdir}.log")
    self._from = self._log.stat().st_size if self._log.exists() else 0
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      port = s.getsockname()[1]
    command = [sys.executable, "-m", "virl_jax.train", "--config=configs/tiny.py", f"--workdir={workdir}", *SMALL,
               f"--config.steps={args.steps}", f"--config.checkpoint.every={args.every}",
               f"--coordinator=127.0.0.1:{port}", f"--num_processes={args.processes}"]
    with open(self._log, "a") as log:
      self.processes = [subprocess.Popen([*command, f"--process_id={i}"], cwd=ROOT, env=env, stdout=log,
                                         stderr=subprocess.STDOUT) for i in range(args.processes)]

  def running(self) -> bool:
    return all(p.poll() is None for p in self.processes)

  def wait(self) -> tuple[list[int], float]:
    """Exit statuses, and the seconds from the first end to the last."""
    while self.running():
      time.sleep(0.02)
    began = time.monotonic()
    while any(p.poll() is None for p in self.processes) and time.monotonic() - began < LONELY_S:
      time.sleep(0.02)
    hung = any(p.poll() is None for p in self.processes)
    for p in self.processes:
      p.kill()
    return [p.wait() for p in self.processes], LONELY_S + 1 if hung else time.monotonic() - began

  def said(self) -> str:
    with open(self._log, errors="replace") as log:
      log.seek(self._from)
      return log.read()


def steps_of(workdir: pathlib.Path) -> list[dict]:
  """The whole lines of metrics.jsonl that are steps, without times."""
  file = workdir / "metrics.jsonl"
  lines = map(json.loads, file.read_bytes().split(b"\n")[:-1] if file.exists() else [])
  return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines if "step" in line]


def saved(workdir: pathlib.Path) -> list[int]:
  folder = workdir / "checkpoints"
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def digest(workdir: pathlib.Path, env: dict[str, str]) -> str:
  """A hash of the last checkpoint's parameters."""
  return subprocess.run([sys.executable, "-c", DIGEST, str(workdir)], cwd=ROOT, env=env, check=True,
                        capture_output=True, text=True).stdout.strip().rpartition("\n")[2]


def differences(parameters: str, steps: list[dict], others: str, other_steps: list[dict]) -> list[str]:
  """The first few differences between two runs."""
  found = [] if parameters == others else ["parameters"]
  if len(steps) != len(other_steps):
    found.append(f"{len(steps)} and {len(other_steps)} steps")
  for a, b in zip(steps, other_steps):
    found += [f"step {a['step']}: {k} {a.get(k)} and {b.get(k)}" for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
  return found[:8]


def damage(folder: pathlib.Path, how: str) -> None:
  """Damages a checkpoint in one of `DAMAGES`' ways."""
  files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  if how == "no manifest":
    for file in files:
      if "manifest" in file.name or file.name == "_METADATA":
        file.unlink()
    return
  content = files[-1].read_bytes()
  half = len(content) // 2
  files[-1].write_bytes(content[:half] if how == "cut short" else
                        content[:half] + bytes(255 - b for b in content[half:half + 64]) + content[half + 64:])


def fill(workdir: pathlib.Path) -> pathlib.Path:
  """Fills the workdir's disk; returns the file that does."""
  filler = workdir.parent / "filler"
  try:
    with open(filler, "wb", buffering=0) as out:
      while True:
        out.write(bytes(2 ** 16))
  except OSError:
    return filler


def trouble(life: Life, kind: str, rng: random.Random) -> tuple[str, pathlib.Path | None]:
  """Makes trouble; returns what it was, and the file that fills the disk, or None."""
  some = rng.randrange(len(life.processes))
  if kind == "kill":
    life.processes[some].kill()
    return f"SIGKILL to process {some}", None
  if kind == "coordinator":
    life.processes[0].kill()
    return "SIGKILL to the coordinator", None
  if kind == "term":
    life.processes[some].send_signal(signal.SIGTERM)
    return f"SIGTERM to process {some}", None
  if kind == "disk":
    return "disk full", fill(life.workdir)
  for p in life.processes:
    p.kill()
  return "SIGKILL to both, damage", None


def event(workdir: pathlib.Path, kind: str, number: int, args, env, rng: random.Random, startup_s: float
          ) -> dict | None:
  """Starts the run, makes trouble, and returns what happened; None if the run was done before."""
  life = Life(workdir, args, env)
  # From early in the start to some steps after it: the first moments have little to lose.
  moment_s = rng.uniform(0.3, 1.0) * (startup_s + args.span_s) if kind in ("kill", "term", "coordinator") else None
  began = time.monotonic()
  while life.running():
    if moment_s is not None and time.monotonic() - began > moment_s:
      break
    # There must be a checkpoint to damage, one to fall back on, and a step of this start, to see where it began.
    if moment_s is None and begins_at(life.said()) is not None and STEP.search(life.said()) and len(saved(workdir)) > 1:
      break
    time.sleep(0.02 if moment_s is not None else 0.2)
  if not life.running():
    codes, _ = life.wait()
    if not any(codes) and "report: " in life.said():
      return None
    raise SystemExit(f"error: a run ended by itself with {codes}:\n{life.said()[-3000:]}")
  moment_s = time.monotonic() - began
  what, filler = trouble(life, kind, rng)
  codes, lonely_s = life.wait()
  said = life.said()
  if kind == "term" and "report: " in said:
    return None  # it was about to end
  steps, whole = len(steps_of(workdir)), saved(workdir)
  if kind == "damage":
    what = f"{DAMAGES[number % len(DAMAGES)]}: checkpoint {whole[-1]}"
    damage(workdir / "checkpoints" / str(whole[-1]), DAMAGES[number % len(DAMAGES)])
  if filler is not None:
    filler.unlink(missing_ok=True)
  return {"kind": kind, "what": what, "moment_s": moment_s, "codes": codes, "lonely_s": lonely_s, "steps": steps,
          "saved": whole, "stepped": bool(STEP.search(said)),
          "lines": [line for line in said.splitlines() if line.startswith(("error:", "stopped by"))]}


def begins_at(said: str) -> int | None:
  """The step that a start goes on from, by its output; None if it has not got that far."""
  resumed = re.search(r"going on from step (\d+)", said)
  first = STEP.search(said)
  return int(resumed[1]) if resumed else int(first[1]) - 1 if first else None


def check(found: dict, after: str, begins: int, args) -> dict:
  """Adds what was lost, by the next start that got as far as a step, and what is wrong."""
  # A start that ended before its first step had nothing to lose: its log has steps that an earlier one lost.
  lost = found["steps"] - begins if found["stepped"] else 0
  most = {"term": 0, "damage": 2 * args.every}.get(found["kind"], args.every)
  wrong = []
  if lost > most:
    wrong.append(f"lost {lost}")
  if found["lonely_s"] > LONELY_S:
    wrong.append("hung")
  if found["kind"] == "term" and any(found["codes"]):
    wrong.append("status")
  if found["kind"] == "damage" and "is damaged" not in after and "does not fit" not in after:
    wrong.append("not named")
  if found["kind"] == "disk" and (found["saved"] and begins < found["saved"][-1]):
    wrong.append("last good checkpoint")
  return found | {"lost": lost, "resumed": begins, "wrong": wrong}


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for kind, count in zip(KINDS, (30, 10, 5, 3, 1)):
    p.add_argument(f"--{kind}s", type=int, default=count)
  p.add_argument("--processes", type=int, default=2)
  p.add_argument("--steps", type=int, default=40, help="of a run; another begins when one is done")
  p.add_argument("--every", type=int, default=3, help="steps between checkpoints")
  p.add_argument("--span_s", type=float, default=30.0, help="how long after the first step trouble may come")
  p.add_argument("--seed", type=int, default=0, help="draws kinds and moments")
  p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs") / "chaos", help="programs are kept there")
  args = p.parse_args()
  out = args.out.resolve()
  out.mkdir(parents=True, exist_ok=True)
  env = os.environ | {"VIRL_JAX_CACHE": str(out / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                      "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONUNBUFFERED": "1",
                      "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # compiling costs more than running does
                      "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()}
  rng = random.Random(args.seed)
  todo = [(kind, i) for kind in KINDS for i in range(getattr(args, f"{kind}s"))]
  rng.shuffle(todo)
  runs = pathlib.Path(tempfile.mkdtemp(prefix="runs_", dir=out))
  disk = any(kind == "disk" for kind, _ in todo)
  if disk:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "chaos", str(runs)], check=True)
  try:
    _run(runs, todo, rng, args, env)
  finally:
    if disk:
      subprocess.run(["umount", "--lazy", str(runs)], check=True)


def _run(runs: pathlib.Path, todo: list, rng: random.Random, args, env) -> None:
  startup_s = 0.0
  for i in range(2):  # the first compiles
    life, began = Life(runs / f"whole_{i}", args, env), time.monotonic()
    while life.running() and not steps_of(runs / f"whole_{i}"):
      time.sleep(0.05)
    startup_s = time.monotonic() - began
    codes, _ = life.wait()
    if any(codes):
      raise SystemExit(f"error: the undisturbed run failed with {codes}:\n{life.said()[-3000:]}")
  wanted = digest(runs / "whole_0", env), steps_of(runs / "whole_0")
  if (digest(runs / "whole_1", env), steps_of(runs / "whole_1")) != wanted:
    raise SystemExit("error: two undisturbed runs differ")
  print(f"undisturbed: first step after {startup_s:.0f} s; parameters {wanted[0]}", flush=True)
  kept = args.out / "found.jsonl"
  found = [e for line in kept.read_text().splitlines() for e in json.loads(line)["events"]] if kept.exists() else []
  ends = [json.loads(line)["same"] for line in kept.read_text().splitlines()] if kept.exists() else []
  for done in found:
    todo.remove((done["kind"], done["number"]))
  n = len(ends)
  while todo:
    workdir, open_, closed = runs / f"run_{n}", [], []
    n += 1
    running = True
    while running:
      got = event(workdir, *todo[-1], args, env, rng, startup_s) if todo else None
      running = got is not None
      if running:
        open_.append(got | {"number": todo.pop()[1], "at": pathlib.Path(f"{workdir}.log").stat().st_size})
      else:
        life = Life(workdir, args, env)  # to the end, if the run is not done
        codes, _ = life.wait()
      # Once a start has said what it goes on from, the troubles before it can be judged.
      for one in [*open_]:
        after = after_of(workdir, one)
        if (begins := begins_at(after)) is None and (running or "report: " not in after):
          continue
        open_.remove(one)
        closed.append(check(one, after, one["steps"] if begins is None else begins, args))
        print(f"[{len(found) + len(closed)}] {closed[-1]}", flush=True)
    differs = [] if any(codes) else differences(wanted[0], wanted[1], digest(workdir, env), steps_of(workdir))
    same = not any(codes) and not open_ and not differs
    found, ends = found + closed, [*ends, same]
    with open(kept, "a") as file:
      file.write(json.dumps({"same": same, "events": closed}) + "\n")
    print(f"run {n} ended with {codes}, {'as' if same else 'NOT as'} the undisturbed one; {differs}", flush=True)
    shutil.rmtree(workdir)  # the disk is small
  rows = [[kind, len(these := [f for f in found if f["kind"] == kind]), sum(f["lost"] for f in these),
           max((f["lost"] for f in these), default=0), f"{max((f['lonely_s'] for f in these), default=0):.0f}",
           sum(bool(f["wrong"]) for f in these)] for kind in KINDS]
  header = ["trouble", "times", "steps done again", "at most", "other ended after s, at most", "wrong"]
  print("\n" + timing.table(header, rows))
  wrong = sum(bool(f["wrong"]) for f in found) + ends.count(False)
  print(f"\n{len(found)} times in trouble, {len(ends)} runs of {args.steps} steps, a checkpoint every {args.every}; "
        f"{ends.count(True)} ended with the undisturbed run's parameters and metrics")
  print(timing.last_line({"rows": rows, "every": args.every, "runs": len(ends), "same": ends.count(True),
                          "wrong": wrong}, ("orbax-checkpoint",)))
  if wrong:
    raise SystemExit(f"error: {wrong} things were not as they should be")


def after_of(workdir: pathlib.Path, last: dict) -> str:
  """The output since some trouble, of the start after it and of later ones."""
  with open(f"{workdir}.log", errors="replace") as log:
    log.seek(last["at"])
    return log.read()


if __name__ == "__main__":
  main()
