"""A step that is slow is named, with its phase and host; a process that is stuck ends."""

import pathlib
import subprocess
import sys

import pytest

from virl_jax.run import watch

ROOT = pathlib.Path(__file__).parents[2]
CFG = watch.Config()


def line(step, rollout_s=20.0, update_s=10.0, compiled=3):
  return {"step": step, "time/rollout_s": rollout_s, "time/update_s": update_s, "time/compile_s": 9.0,
          "time/rollout_tokens_s": 1e6, "time/rollout_idle_share": 0.5, "compile/count": compiled}


def history(*last, like=6):
  return [line(0, 200.0, 90.0), *(line(i + 1) for i in range(like)), *last]


def test_a_slow_step_is_named_with_its_phase():
  said = watch.slow(history(line(7, 90.0, 11.0)), [("here", {})], CFG)
  assert said == "slow: step 8 took 101.0 s, others like it 30.0; most of it in rollout, 90.0 s in place of 20.0"
  said = watch.slow(history(line(7, 21.0, 150.0)), [("here", {})], CFG)
  assert "most of it in update, 150.0 s in place of 10.0" in said


@pytest.mark.parametrize("last, like", [
    (line(7, 40.0, 11.0), 6),               # not three times as long
    (line(7, 400.0, compiled=4), 6),        # it compiled something
    (line(3, 400.0), 2)])                   # too few steps to compare it with
def test_what_is_not_out_of_the_way_is_not_named(last, like):
  assert watch.slow(history(last, like=like), [("here", {})], CFG) is None


def test_short_steps_may_vary():
  short = [line(i, 0.2, 0.1) for i in range(8)]
  assert watch.slow([*short, line(8, 2.0, 0.1)], [("here", {})], CFG) is None
  assert watch.slow(history(line(7, 900.0)), [("here", {})], watch.Config(slow_ratio=0.0)) is None
  assert watch.slow([], [("here", {})], CFG) is None


def test_the_host_that_kept_others_waiting_is_named():
  laps = [("a", {"rollout": 66.0}), ("b", {"rollout": 1.0}), ("c", {"rollout": 64.0})]
  assert watch.slow(history(line(7, 90.0)), laps, CFG).endswith("; the others waited for process 1 on b")
  even = [("a", {"rollout": 3.0}), ("b", {"rollout": 1.0})]  # all hosts were slow
  assert "waited" not in watch.slow(history(line(7, 90.0)), even, CFG)


PROGRAM = """
import pathlib, sys, threading, time
from virl_jax.run import hosts, watch

def where_it_hangs():
  time.sleep(60)

with watch.over(pathlib.Path(sys.argv[1]), watch.Config(stuck_s=float(sys.argv[2]))):
  for _ in range(8):
    hosts.beat("rollout")
    time.sleep(0.1)
  print("got on", flush=True)
  if len(sys.argv) > 3:
    where_it_hangs()
print("done", flush=True)
"""


def run(folder, *args):
  return subprocess.run([sys.executable, "-c", PROGRAM, str(folder), *args], cwd=ROOT, capture_output=True, text=True,
                        timeout=50)


def test_a_process_that_is_stuck_says_where_and_ends(tmp_path):
  done = run(tmp_path, "0.6", "hang")
  assert done.returncode == watch.STUCK and done.stdout == "got on\n"
  said = done.stderr.strip()
  assert "has not got on for 0.6 s, after: rollout. Where all of its threads are stands in" in said
  assert "--config.watch.stuck_s" in said and "\n" not in said
  assert "where_it_hangs" in (tmp_path / "stuck_0.txt").read_text()


@pytest.mark.parametrize("stuck_s", ["0.6", "0"])
def test_a_process_that_gets_on_is_left_alone(tmp_path, stuck_s):
  done = run(tmp_path, stuck_s)
  assert done.returncode == 0 and done.stdout == "got on\ndone\n" and not list(tmp_path.iterdir())
