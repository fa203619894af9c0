"""The tiny run, ended by signals at random moments and started again: what is lost, what is printed, how it ends.

    python benchmarks/kill.py --moments=10

Each time a fresh run gets SIGINT, SIGTERM or SIGKILL at some moment between its start and its end, and is then started
again with the same command.  It checks that no more steps are done twice than there are between checkpoints, and after
SIGTERM none; that no traceback is printed; that the exit status is as documented; and that metrics and the last
evaluation are those of an undisturbed run.  What is wrong is listed, and the script fails.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import timing  # of this folder

from virl_jax.run import log as log_lib

ROOT = pathlib.Path(__file__).parents[1]
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 0, signal.SIGKILL: -signal.SIGKILL}
SMALL = ("--config.rollout.prompts=8", "--config.rollout.group_size=4", "--config.eval.tasks=16",
         "--config.data.needle.train_size=64", "--config.data.needle.test_size=16", "--config.log.tensorboard=False")


def start(workdir: pathlib.Path, steps: int, every: int, env: dict[str, str]) -> subprocess.Popen:
  """Starts the run, which writes to WORKDIR.log."""
  command = [sys.executable, "-m", "virl_jax.train", "--config=configs/tiny.py", f"--workdir={workdir}", *SMALL,
             f"--config.steps={steps}", f"--config.checkpoint.every={every}"]
  with open(f"{workdir}.log", "a") as log:
    # Children of a shell's `&` ignore Ctrl-C, and so would theirs.
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def log_of(workdir: pathlib.Path) -> str:
  return pathlib.Path(f"{workdir}.log").read_text()


def outcome(workdir: pathlib.Path) -> tuple[list[dict], dict]:
  """A run's steps, without times, and its last evaluation."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  timeless = lambda line: {k: v for k, v in line.items() if not k.startswith(log_lib.MEASURED)}
  return [timeless(line) for line in lines if "step" in line], json.loads((workdir / "eval_after.json").read_text())


def written(workdir: pathlib.Path) -> int:
  """How many steps the log has, whole lines only."""
  file = workdir / "metrics.jsonl"
  return sum(b'"step": ' in line for line in file.read_bytes().split(b"\n")[:-1]) if file.exists() else 0


def whole(workdir: pathlib.Path, args, env: dict[str, str]) -> float:
  """An undisturbed run; returns its seconds."""
  began = time.perf_counter()
  if start(workdir, args.steps, args.every, env).wait():
    raise SystemExit(f"error: the undisturbed run failed:\n{log_of(workdir)}")
  return time.perf_counter() - began


def one(workdir: pathlib.Path, number: signal.Signals, moment_s: float, wanted, args, env: dict[str, str]
        ) -> dict | None:
  """A run that is ended at a moment and started again; None if it had ended before, or was about to."""
  process = start(workdir, args.steps, args.every, env)
  try:
    process.wait(moment_s)
    return None
  except subprocess.TimeoutExpired:
    process.send_signal(number)
  began = time.perf_counter()
  status = process.wait()
  closing_s, said, steps = time.perf_counter() - began, log_of(workdir), written(workdir)
  if not status and said.rstrip().rpartition("\n")[2].startswith("report: "):
    return None
  again = start(workdir, args.steps, args.every, env).wait()
  after = log_of(workdir)[len(said):]
  resumed = re.search(r"going on from step (\d+)", after)
  lost = steps - (int(resumed[1]) if resumed else 0)
  last = (said.strip().splitlines() or [""])[-1]
  wrong = [what for what, ok in (
      ("status", status == STATUS[number]), ("traceback", "Traceback" not in said + after),
      ("said", number == signal.SIGKILL or last.startswith(f"stopped by {number.name}")),
      ("lost", lost <= (0 if number == signal.SIGTERM else args.every)),
      ("end", again == 0 and outcome(workdir) == wanted)) if not ok]
  return {"signal": number.name, "moment_s": moment_s, "status": status, "closing_s": closing_s, "steps": steps,
          "lost": lost, "wrong": wrong, "said": last}


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--moments", type=int, default=10, help="of each signal")
  p.add_argument("--steps", type=int, default=8)
  p.add_argument("--every", type=int, default=3, help="steps between checkpoints")
  p.add_argument("--seed", type=int, default=0, help="draws the moments")
  p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs") / "kill", help="programs are kept there")
  args = p.parse_args()
  out = args.out.resolve()
  out.mkdir(parents=True, exist_ok=True)
  runs = pathlib.Path(tempfile.mkdtemp(prefix="runs_", dir=out))
  # The first run compiles programs and draws pictures for all; the second says how long a run then takes.
  cache = {"VIRL_JAX_CACHE": str(out / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  env = os.environ | cache
  seconds = [whole(runs / f"whole_{i}", args, env) for i in range(2)][-1]
  wanted = outcome(runs / "whole_0")
  if wanted != outcome(runs / "whole_1"):
    raise SystemExit("error: two undisturbed runs differ")
  print(f"undisturbed: {seconds:.1f} s, {args.steps} steps, a checkpoint every {args.every}", flush=True)
  rng, found = random.Random(args.seed), []
  for i in range(args.moments):
    for number in STATUS:
      got, share = None, rng.random()
      while got is None:  # a run that is faster than the others may have ended before the signal
        workdir = runs / f"{number.name}_{i}_{share:.3f}"
        got = one(workdir, number, share * seconds, wanted, args, env)
        share *= 0.9
      found.append(got)
      print(f"[{len(found)}/{args.moments * len(STATUS)}] {got}", flush=True)
  rows = [[f["signal"], f"{f['moment_s']:.1f}", f["status"], f"{f['closing_s']:.2f}", f["steps"], f["lost"],
           ", ".join(f["wrong"]) or "-", f["said"][:80]] for f in found]
  header = ["signal", "after s", "status", "closing s", "steps", "done twice", "wrong", "last line"]
  print("\n" + timing.table(header, rows))
  wrong = sum(bool(f["wrong"]) for f in found)
  most = {n.name: max((f["lost"] for f in found if f["signal"] == n.name), default=0) for n in STATUS}
  print(f"\n{len(found)} runs ended, {wrong} not as they should; steps done twice at most: {most}")
  print(timing.last_line({"undisturbed_s": seconds, "every": args.every, "most_lost": most, "wrong": wrong,
                          "runs": found}, ("orbax-checkpoint",)))
  if wrong:
    raise SystemExit(f"error: {wrong} of {len(found)} runs did not end as they should, see {runs}")


if __name__ == "__main__":
  main()
