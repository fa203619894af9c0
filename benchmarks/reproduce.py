"""The experiments of docs/results*.md: arms of configs/ablations/arms.py, several seeds each, and their results.

    python benchmarks/reproduce.py --quick                   # three arms, one seed, few steps: does it all work?
    python benchmarks/reproduce.py                           # everything
    python benchmarks/reproduce.py --page=results_rounds     # the arms of one page
    python benchmarks/reproduce.py --arms=full,outcome_only --seeds=3 --out=runs/reproduce

Runs are subprocesses of virl_jax.train, `--jobs` at a time, each in OUT/ARM/seed_S.  Give the same command again, and
finished runs are kept, and interrupted ones go on from their checkpoints.  At the end a page, two pictures and a JSON
file are written into OUT for each of `results.PAGES`; `--docs` puts pages and pictures into docs/.

A run of the arms on the page results_rounds takes up to 15 GB of memory: give --jobs=1 if there is no room for two.
Runs that the system has killed are printed as FAILED; the same command tries them again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import pathlib
import queue
import runpy
import shutil
import subprocess
import sys
import threading
import time

import results  # of this folder

from virl_jax.run import signals

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "ablations" / "arms.py"
QUICK_ARMS = ("full", "fidelity", "outcome_only")
# The tiny base needs some steps to show anything; these are too few to say anything about the method.
QUICK = ("--config.steps=6", "--config.eval.tasks=64", "--config.rollout.prompts=8", "--config.log.tensorboard=False")

_RUNNING: set[subprocess.Popen] = set()  # for `end_all`, which signals call


def call(command: list[str], log_path: pathlib.Path, cores: set[int] | None = None) -> int:
  """Runs a command, whose output is appended to a file; returns its status.  Ctrl-C reaches it through `end_all`."""
  signals.wait()
  with open(log_path, "a") as log:
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
  _RUNNING.add(process)
  if cores:  # long before JAX counts them
    os.sched_setaffinity(process.pid, cores)
  code = process.wait()
  _RUNNING.discard(process)
  return code


def end_all() -> str:
  """Ends the runs, which save what they have; the same command goes on with them."""
  while running := list(_RUNNING):
    for process in running:
      process.terminate()
    for process in running:
      process.wait()
    _RUNNING.difference_update(running)
  return "give the same command again to go on"


def settings() -> tuple[dict[str, dict], dict[str, tuple[str, ...]]]:
  """The arms, and the options that make the bases that some of them start from."""
  found = runpy.run_path(str(CONFIG))
  return found["ARMS"], found["BASES"]


def make_base(folder: pathlib.Path, how: tuple[str, ...]) -> None:
  """Makes a base that arms start from, unless it is there."""
  _make("the base", folder, folder / "RECIPE.json", ["-m", "virl_jax.warmstart", "--config=configs/tiny.py", *how])


def make_sets(folder: pathlib.Path, base: pathlib.Path) -> None:
  """Makes the sets that arms train on, unless they are there."""
  _make("the folder of sets", folder, folder / "curated" / "report.html",
        [str(ROOT / "benchmarks" / "unfiltered.py"), f"--base={base}"])


def _make(what: str, folder: pathlib.Path, last: pathlib.Path, command: list[str]) -> None:
  """Runs a Python command that fills a folder, unless the file that it writes last is there."""
  if last.exists():
    return
  print(f"{what}, in {folder}", flush=True)
  folder.parent.mkdir(parents=True, exist_ok=True)
  log_path = folder.with_suffix(".log")
  if call([sys.executable, *command, f"--out={folder}"], log_path) or not last.exists():  # ended by SIGTERM, it says 0
    raise SystemExit(f"error: {what} was not made, see {log_path}; give the same command again to go on")


class Progress:
  """Prints which runs have ended, and how long the rest will take."""

  def __init__(self, total: int, jobs: int):
    self.total, self.jobs, self.ended, self.seconds, self.began = total, jobs, 0, [], time.perf_counter()
    self.lock = threading.Lock()

  def end(self, name: str, seconds: float, kept: bool, ok: bool):
    with self.lock:
      self.ended += 1
      if not kept:
        self.seconds.append(seconds)
      left = self.total - self.ended
      each = sum(self.seconds) / len(self.seconds) if self.seconds else 0.0
      eta = f", about {left * each / min(self.jobs, max(left, 1)) / 60:.0f} min to go" if left and each else ""
      how = "kept" if kept else f"{seconds / 60:.1f} min" if ok else "FAILED"
      print(f"[{self.ended}/{self.total}] {name}: {how}{eta}", flush=True)


class Clock:
  """Minutes over all calls with the same folder, written to a file every few seconds, so that killed calls count."""

  def __init__(self, path: pathlib.Path, every_s: float = 10.0):
    self.path, self.began = path, time.perf_counter()
    self.before = json.loads(path.read_text())["minutes"] if path.exists() else 0.0
    path.parent.mkdir(parents=True, exist_ok=True)

    def tick():
      while True:
        time.sleep(every_s)
        self.keep()

    threading.Thread(target=tick, daemon=True).start()

  def minutes(self) -> float:
    return self.before + (time.perf_counter() - self.began) / 60

  def keep(self):
    new = self.path.with_suffix(".new")
    new.write_text(json.dumps({"minutes": self.minutes()}) + "\n")
    os.replace(new, self.path)


def share_cores(jobs: int) -> queue.Queue:
  """A set of cores for each job, or None if there are too few: runs that share a core slow each other down."""
  shares, cores = queue.Queue(), sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  for job in range(jobs):
    shares.put(set(cores[job::jobs]) if len(cores) >= jobs else None)
  return shares


def run(arm: str, seed: int, out: pathlib.Path, more: tuple[str, ...], progress: Progress, shares: queue.Queue) -> bool:
  """Runs an arm with a seed to its end; returns whether it got there."""
  workdir, began = out / arm / f"seed_{seed}", time.perf_counter()
  if (workdir / "eval_after.json").exists():
    progress.end(f"{arm}, seed {seed}", 0.0, True, True)
    return True
  workdir.mkdir(parents=True, exist_ok=True)
  command = [sys.executable, "-m", "virl_jax.train", f"--config={CONFIG}:{arm}", f"--config.seed={seed}",
             f"--workdir={workdir}", *more]
  cores = shares.get()
  ok = call(command, workdir / "train.log", cores) == 0 and (workdir / "eval_after.json").exists()
  shares.put(cores)
  progress.end(f"{arm}, seed {seed}", time.perf_counter() - began, False, ok)
  return ok


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--quick", action="store_true")
  p.add_argument("--page", choices=tuple(results.PAGES), default=None, help="only this page and its arms")
  p.add_argument("--arms", type=lambda s: tuple(s.split(",")), default=None)
  p.add_argument("--seeds", type=int, default=None, help="how many, from 0; 3 by default, 1 if quick")
  p.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at a time")
  p.add_argument("--out", type=pathlib.Path, default=None)
  p.add_argument("--docs", action="store_true", help="write the pages and their pictures into docs/ too")
  args = p.parse_args()
  known, bases = settings()
  pages = {args.page: results.PAGES[args.page]} if args.page else results.PAGES
  on = {page: {name for section in pages[page].sections for name in section.arms} for page in pages}
  there = [arm for arm in known if any(arm in names for names in on.values())]
  arms = args.arms or (QUICK_ARMS if args.quick else tuple(there))
  if unknown := [a for a in arms if a not in there]:
    p.error(f"--arms must be some of {', '.join(there)}. Received: {', '.join(unknown)}")
  if not importlib.util.find_spec("matplotlib"):  # to be said now, not when all runs have ended
    p.error("the pictures need matplotlib: pip install -e '.[benchmarks]'")
  if args.docs and args.quick:
    p.error("--docs wants a whole run: --quick says nothing about the method")
  seeds = args.seeds or (1 if args.quick else 3)
  # Absolute, because the runs have another working directory.
  out = (args.out or pathlib.Path("runs") / ("reproduce_quick" if args.quick else "reproduce")).resolve()
  clock, progress = Clock(out / "minutes.json"), Progress(len(arms) * seeds, args.jobs)
  print(f"{len(arms)} arms x {seeds} seeds in {out}, {args.jobs} at a time", flush=True)
  quick = QUICK if args.quick else ()
  base = {arm: out / pathlib.Path(known[arm]["model.path"]).name for arm in arms if "model.path" in known[arm]}
  for folder, how in {base[arm]: bases[known[arm]["model.path"]] for arm in base}.items():
    make_base(folder, how)
  on_sets = {arm for arm in arms if "data.eval_path" in known[arm]}
  for path in {base[arm] for arm in on_sets}:
    make_sets(out / "sets", path)
  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    # Seed by seed: after a third of the time there is a run of each arm.
    todo = [(arm, seed) for seed in range(seeds) for arm in arms]
    shares = share_cores(args.jobs)
    here = lambda arm, key: f"--config.{key}={out / 'sets' / pathlib.Path(known[arm][key]).name}"
    more = lambda arm: quick + ((f"--config.model.path={base[arm]}",) if arm in base else ()) + (
        (here(arm, "data.path"), here(arm, "data.eval_path")) if arm in on_sets else ())
    good = list(pool.map(lambda t: run(*t, out, more(t[0]), progress, shares), todo))
  failed = [f"{arm}/seed_{seed}" for (arm, seed), ok in zip(todo, good) if not ok]
  minutes, figures = clock.minutes(), {}
  command = " ".join(["python", "benchmarks/reproduce.py", *sys.argv[1:]])
  for page in pages:
    found = results.read(out, tuple(arm for arm in arms if arm in on[page]), seeds)
    if not found:
      continue
    figures[page] = results.figures(found)
    text = results.markdown(page, found, figures[page], command, minutes, args.jobs)
    (out / f"{page}.md").write_text(text)
    results.picture(found, out / f"{page}.png")
    results.forest(figures[page], out / f"{page}_differences.png")
    (out / f"{page}.json").write_text(json.dumps(figures[page], indent=1) + "\n")
    if args.docs and not failed:
      for name in (f"{page}.md", f"{page}.png", f"{page}_differences.png"):
        shutil.copy(out / name, ROOT / "docs" / name)
    print("\n" + text)
  print(json.dumps({"command": " ".join(["python", *sys.argv]), "cores": os.cpu_count(), "minutes": minutes,
                    "failed": failed, "figures": figures}))
  if failed:
    raise SystemExit(f"error: {len(failed)} runs failed, see train.log in their folders: {', '.join(failed)}; "
                     "give the same command again to go on with them")


if __name__ == "__main__":
  signals.install()
  with signals.closing(end_all):
    main()
