"""Watches over the steps of a run: names one that takes far longer than the others, and ends a run that is stuck.

Each phase of a step and each round of a rollout calls `hosts.beat`.  A thread checks now and then; after too long
without a beat it writes the stacks of all threads to a file and ends the process, so that its launcher can start it
again.  The main thread can't do that: it may wait for a device, or for another process, for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import faulthandler
import os
import platform
import statistics
import sys
import tempfile
import threading
import time

from etils import epath

from virl_jax import checks
from virl_jax.run import files
from virl_jax.run import hosts

STUCK = 75  # exit status of a process that was stuck: EX_TEMPFAIL of sysexits.h
_UPLOAD_S = 20.0  # most time for writing the stacks to a bucket
_LIKE = 20  # steps that a step is compared with
_LEAST_LIKE = 5  # fewest of them
_LEAST_EXCESS_S = 5.0  # a step is reported only if it took so much longer than those


@dataclasses.dataclass(frozen=True)
class Config:
  """See `config.py`, section `watch`."""

  stuck_s: float = 3600.0
  slow_ratio: float = 3.0

  def __post_init__(self):
    checks.section(vars(self), "watch", stuck_s=checks.real(0), slow_ratio=checks.real(0))


@contextlib.contextmanager
def over(folder: epath.Path, cfg: Config):
  """A `with` block in which a process without progress for `cfg.stuck_s` ends with a line and status `STUCK`.

  `stuck_s` = 0 turns this off.

  Args:
    folder: where the threads' stacks are written.
    cfg: how long, in seconds.
  """
  if not cfg.stuck_s:
    yield
    return
  hosts.beat("start")
  done = threading.Event()
  thread = threading.Thread(target=_watch, args=(folder, cfg.stuck_s, done), name="watch", daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def _watch(folder: epath.Path, stuck_s: float, done: threading.Event) -> None:
  while not done.wait(min(10.0, stuck_s / 4)):
    where, since = hosts.last_beat()
    if time.monotonic() - since > stuck_s:
      _end(folder, where, stuck_s)


def _end(folder: epath.Path, where: str, stuck_s: float) -> None:
  number = hosts.number()
  file = folder / f"stuck_{number}.txt"
  try:
    _write_stacks(file)
  except OSError as e:
    file = f"nowhere ({e})"
  message = (f"process {number} on {platform.node()} has not got on for {stuck_s:g} s, after: {where}. Where all of "
             f"its threads are stands in {file}. The same command goes on from the last checkpoint; if it takes so "
             "long, give a larger --config.watch.stuck_s")
  print(f"error: {message}", file=sys.stderr, flush=True)
  hosts.fail(message)
  os._exit(STUCK)


def _write_stacks(file: epath.Path) -> None:
  """Writes the stacks of all threads; to a bucket, which may be what they wait for, within `_UPLOAD_S`."""
  if files.is_local(file):
    with open(file, "w") as out:
      faulthandler.dump_traceback(out, all_threads=True)
    return
  with tempfile.TemporaryFile() as out:
    faulthandler.dump_traceback(out, all_threads=True)
    out.seek(0)
    stacks = out.read()
  failed: list[OSError] = [OSError(f"{file} can't be written within {_UPLOAD_S:g} s")]

  def upload():
    try:
      files.write_bytes(file, stacks)
      failed.clear()
    except OSError as e:
      failed[:] = [e]

  thread = threading.Thread(target=upload, daemon=True)
  thread.start()
  thread.join(_UPLOAD_S)
  if failed:
    sys.stderr.write(stacks.decode(errors="replace"))
    raise failed[0]


def slow(history: Sequence[Mapping], laps: Sequence[tuple[str, Mapping[str, float]]], cfg: Config) -> str | None:
  """A warning about the last step, if it took far longer than others like it.

  Steps that compile anything are neither compared nor compared with.

  Args:
    history: lines of the log, the last step's included.
    laps: of each process, the machine that it runs on, and for how many seconds it waited for others in each phase of
      that step (see `hosts.waited`).
    cfg: how much longer: `slow_ratio` times the median; 0 never warns.

  Returns:
    A line, or None.
  """
  compiled = [b.get("compile/count", 0) != a.get("compile/count", 0) for a, b in zip(history, history[1:])]
  *like, last = [line for line, odd in zip(history[1:], compiled) if not odd][-_LIKE - 1:] or [None]
  if not cfg.slow_ratio or last is None or last is not history[-1] or len(like) < _LEAST_LIKE:
    return None
  phases = [name for name in last if name.startswith("time/") and name.endswith("_s") and name != "time/compile_s"
            and not name.startswith("time/rollout_tokens")]
  usual = {name: statistics.median(line.get(name, 0.0) for line in like) for name in phases}
  took, due = sum(last[name] for name in phases), sum(usual.values())
  if took < cfg.slow_ratio * due or took - due < _LEAST_EXCESS_S:
    return None
  worst = max(phases, key=lambda name: last[name] - usual[name])
  excess = last[worst] - usual[worst]
  name = worst.removeprefix("time/").removesuffix("_s")
  said = (f"slow: step {last['step'] + 1} took {took:.1f} s, others like it {due:.1f}; most of it in {name}, "
          f"{last[worst]:.1f} s in place of {usual[worst]:.1f}")
  waits = [waited.get(name, 0.0) for _, waited in laps]
  if len(laps) > 1 and max(waits) - min(waits) > excess / 2:
    slowest = waits.index(min(waits))
    said += f"; the others waited for process {slowest} on {laps[slowest][0]}"
  return said
