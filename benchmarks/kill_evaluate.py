"""Whether evaluations that are killed at random moments and restarted, or made by two processes, give the same files.

    python benchmarks/kill_evaluate.py --kills=7 --out=runs/kill_evaluate

The tiny base is asked needle questions, with zooms and without.  All files must be those of an undisturbed evaluation,
byte for byte: predictions, scores, results, pages, pictures.  SIGKILL goes to the only process, or to one of two, and
then the other must end by itself; at a random moment between shortly before the first predictions are written and the
end.  Files that differ are named, and the script fails.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

import timing  # of this folder

ROOT = pathlib.Path(__file__).parents[1]
_PATIENCE_S = 900


def start(out: pathlib.Path, processes: int, args, env: dict[str, str]) -> list[subprocess.Popen]:
  """Starts the evaluation, whose processes write to OUT.N.log; they have two devices in all, however many they are."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "virl_jax.evaluate", "--model=@tiny", "--config=configs/tiny.py",
             "--benchmark=needle", "--data=-", f"--out={out}", "--zoom=both", f"--limit={args.tasks}",
             f"--slots={args.slots}", f"--temperature={args.temperature}", f"--samples={args.samples}"]
  started = []
  for i in range(processes):
    who = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={i}"]
    with open(f"{out}.{i}.log", "a") as log:
      started.append(subprocess.Popen(command + who * (processes > 1), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                      env=env | {"JAX_NUM_CPU_DEVICES": str(2 // processes)}))
  return started


def wait(running: list[subprocess.Popen]) -> list[int]:
  """The exit statuses of processes, once all have ended."""
  try:
    return [process.wait(_PATIENCE_S) for process in running]
  finally:
    for process in running:
      process.kill()


def whole(out: pathlib.Path, processes: int, args, env: dict[str, str]) -> tuple[float, float]:
  """Runs an undisturbed evaluation; returns the seconds until its first predictions are written, and until its end."""
  began, first_s = time.perf_counter(), None
  running = start(out, processes, args, env)
  while first_s is None and running[0].poll() is None:
    time.sleep(0.1)
    if predictions(out):
      first_s = time.perf_counter() - began
  if any(wait(running)):
    raise SystemExit(f"error: the undisturbed evaluation failed:\n{pathlib.Path(f'{out}.0.log').read_text()}")
  return first_s, time.perf_counter() - began


def content(out: pathlib.Path) -> dict[str, bytes]:
  """The files of an evaluation, by path, without the name of its folder in them."""
  return {str(path.relative_to(out)): path.read_bytes().replace(str(out).encode(), b"OUT")
          for path in sorted(out.rglob("*")) if path.is_file() and path.suffix != ".part"}  # a picture not yet whole


def differ(a: dict[str, bytes], b: dict[str, bytes]) -> list[str]:
  """The names of the files that differ."""
  return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def predictions(out: pathlib.Path) -> int:
  """How many predictions there are, whole lines only."""
  return sum(path.read_bytes().count(b"\n") for path in out.rglob("predictions.jsonl"))


def until_killed(out: pathlib.Path, processes: int, moment_s: float, args, env: dict[str, str]) -> dict | None:
  """Starts an evaluation and kills a process at this moment; None if it had ended before."""
  running = start(out, processes, args, env)
  victim = running[-1]
  try:
    victim.wait(moment_s)
    if any(wait(running)):
      raise SystemExit(f"error: it ended by itself:\n{pathlib.Path(f'{out}.0.log').read_text()}")
    return None
  except subprocess.TimeoutExpired:
    victim.send_signal(signal.SIGKILL)
  began = time.perf_counter()
  statuses = wait(running)
  return {"processes": processes, "moment_s": moment_s, "statuses": statuses, "kept": predictions(out),
          "ended_s": time.perf_counter() - began}


def killed(out: pathlib.Path, processes: int, kills: int, seconds: tuple[float, float], rng: random.Random, args, env
           ) -> list[dict]:
  """An evaluation that is killed this often before it ends, each time at a random moment."""
  found, (first_s, end_s) = [], seconds
  while len(found) < kills:
    one = until_killed(out, processes, rng.uniform(0.9 * first_s, end_s), args, env)
    if one is None:  # it was done before the kill
      break
    found.append(one)
    print(f"  {one}", flush=True)
  if found and any(wait(start(out, processes, args, env))):
    raise SystemExit(f"error: it did not go on:\n{pathlib.Path(f'{out}.0.log').read_text()}")
  return found


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--kills", type=int, default=7, help="of one process")
  p.add_argument("--kills_of_two", type=int, default=3, help="of one of two processes")
  p.add_argument("--tasks", type=int, default=64)
  p.add_argument("--slots", type=int, default=8)
  p.add_argument("--samples", type=int, default=2)
  p.add_argument("--temperature", type=float, default=1.0)
  p.add_argument("--seed", type=int, default=0, help="draws the moments")
  p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs") / "kill_evaluate",
                 help="programs are kept there")
  args = p.parse_args()
  out = args.out.resolve()
  out.mkdir(parents=True, exist_ok=True)
  runs = pathlib.Path(tempfile.mkdtemp(prefix="runs_", dir=out))
  env = os.environ | {"JAX_PLATFORMS": "cpu", "VIRL_JAX_CACHE": str(out / "cache"),
                      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  rng, found, wrong, seconds, wanted = random.Random(args.seed), [], [], {}, {}
  for processes, kills in ((1, args.kills), (2, args.kills_of_two)):
    folder = runs / f"whole_{processes}"
    if processes == 1:
      whole(runs / "compiles", 1, args, env)  # programs are kept; those of two processes are not
    seconds[processes] = whole(folder, processes, args, env)
    wanted[processes] = content(folder)
    print(f"undisturbed, {processes} process{'es' * (processes > 1)}: {seconds[processes][1]:.0f} s, "
          f"{predictions(folder)} predictions, the first after {seconds[processes][0]:.0f} s", flush=True)
    done, number = 0, 0
    while done < kills:
      number += 1
      folder = runs / f"killed_{processes}_{number}"
      some = killed(folder, processes, kills - done, seconds[processes], rng, args, env)
      done += len(some)
      odd = differ(content(folder), wanted[processes]) if some else []
      wrong += [f"{folder.name}: {name}" for name in odd]
      found += some
      if not some:  # it was faster than the undisturbed one
        seconds[processes] = tuple(0.85 * s for s in seconds[processes])
  apart = differ({k: v for k, v in wanted[1].items() if not k.endswith("meta.json")},
                 {k: v for k, v in wanted[2].items() if not k.endswith("meta.json")})
  wrong += [f"two processes: {name}" for name in apart]
  rows = [[f["processes"], f"{f['moment_s']:.1f}", " ".join(map(str, f["statuses"])), f["kept"], f"{f['ended_s']:.1f}"]
          for f in found]
  print("\n" + timing.table(["processes", "killed after s", "statuses", "predictions then", "all ended after s"], rows))
  print(f"\n{len(found)} kills; files that differ from an undisturbed evaluation's: {', '.join(wrong) or 'none'}")
  print(timing.last_line({"undisturbed_s": seconds, "kills": found, "wrong": wrong,
                          "files": len(wanted[1]), "tasks": args.tasks, "samples": args.samples}))
  if wrong:
    raise SystemExit(1)


if __name__ == "__main__":
  main()
