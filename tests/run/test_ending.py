"""However a loop ends, the last finished step is saved, no half step is, and everything is closed."""

import pathlib
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest

from virl_jax.learner import checkpoint
from virl_jax.run import ending

ROOT = pathlib.Path(__file__).parents[2]


def loop(folder, fails=None, every=10, steps=5, start=0):
  """A loop of steps, of which one may fail; returns what was closed."""
  closed, state = [], {"w": jnp.float32(start)}
  saves = checkpoint.Checkpoints(folder, every, 3)
  with ending.Kept(saves, start, state, lambda: closed.append(True)) as kept:
    for step in range(start, steps):
      if fails == ("before", step):
        raise OSError("while the state is whole")
      with kept.changing():
        state = {"w": state["w"] + 1}
        if fails == ("within", step):
          raise KeyboardInterrupt
        kept.finished(step + 1, state, last=step + 1 == steps)
  assert closed == [True]


def saved(folder):
  saves = checkpoint.Checkpoints(folder, 10, 3)
  found = {step: int(saves.restore(step, {"w": jnp.float32(0)})["w"]) for step in saves.steps()}
  saves.close()
  return found


def test_a_loop_that_runs_through_saves_the_last_step(tmp_path):
  loop(tmp_path, every=2)
  assert saved(tmp_path) == {2: 2, 4: 4, 5: 5}


def test_an_error_saves_the_last_finished_step(tmp_path):
  with pytest.raises(OSError, match="while the state is whole"):
    loop(tmp_path, ("before", 3))
  assert saved(tmp_path) == {3: 3}
  loop(tmp_path, start=3)
  assert saved(tmp_path) == {3: 3, 5: 5}


def test_an_error_within_a_step_saves_no_half_of_it(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    loop(tmp_path, ("within", 3), every=2)
  assert saved(tmp_path) == {2: 2}, "what was being written was finished"


def test_nothing_is_saved_before_the_first_step(tmp_path):
  with pytest.raises(OSError):
    loop(tmp_path, ("before", 0))
  assert saved(tmp_path) == {}


def test_what_ended_the_loop_is_what_is_raised(tmp_path, monkeypatch, capsys):
  save = checkpoint.Checkpoints.maybe_save

  def full(self, step, state, last=False, score=None):
    if last:
      raise OSError("no space left")
    return save(self, step, state)

  monkeypatch.setattr(checkpoint.Checkpoints, "maybe_save", full)
  with pytest.raises(OSError, match="while the state is whole"):
    loop(tmp_path, ("before", 2))
  assert "nothing more was saved: OSError: no space left" in capsys.readouterr().out


LOOP = """
import signal, sys, time
from virl_jax.run import signals
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
signals.install()
import jax.numpy as jnp
from virl_jax.learner import checkpoint
from virl_jax.run import ending

saves = checkpoint.Checkpoints(sys.argv[1], 100, 3)
state = {"w": jnp.float32(0)}
with ending.Kept(saves, 0, state) as kept:
  for step in range(100):
    if sys.argv[2] == f"before {step}":
      print("now", flush=True)
      time.sleep(60)
    with kept.changing():
      state["w"].delete()  # as an update does that donates
      if sys.argv[2] == f"within {step}":
        print("now", flush=True)
        time.sleep(1)
      state = {"w": jnp.float32(step + 1)}
      kept.finished(step + 1, state)
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
@pytest.mark.parametrize("when, step", [("before 0", 0), ("before 7", 7), ("within 7", 8)])
def test_a_signal_loses_nothing(tmp_path, number, status, when, step):
  process = subprocess.Popen([sys.executable, "-c", LOOP, tmp_path, when], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
  while process.stdout.readline() != "now\n":
    assert process.poll() is None
  process.send_signal(number)
  out, _ = process.communicate(timeout=60)
  told = f"step {step} is saved, the same command goes on from there" if step else "no step was finished yet"
  assert (process.returncode, out) == (status, f"stopped by {number.name}; {told}\n")
  assert saved(tmp_path) == ({step: step} if step else {})
