"""How a loop of steps ends: whatever ends it, the last finished step is saved and everything is closed."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import threading

import jax

from virl_jax.learner import checkpoint
from virl_jax.run import hosts
from virl_jax.run import signals


class Kept:
  """The state after the last finished step.  Leaving the context saves it, unless it is saved already, and closes.

      with ending.Kept(checkpoints, start, state) as kept:
        for step in range(start, steps):
          ...                      # a signal, or an exception, saves `state` as it was when the step began
          with kept.changing():    # a signal waits until the step is finished; an exception saves nothing more
            state = update(state)
            kept.finished(step + 1, state)

  An update donates the state that it is given, so that there is none to save between the first and the last of a step.
  With several processes the state is saved where all of them leave together: at the end, or where they agreed to stop
  (`hosts.agree`).  An exception may be one process's alone: then nothing more is saved.

  Args:
    checkpoints: where the state is saved, if a save is due or at the end; closed with this.
    step: how many steps are finished.
    state: the state after them.
    close: closes what else is open, last of all.
  """

  def __init__(self, checkpoints: checkpoint.Checkpoints, step: int, state, close: Callable[[], None] = lambda: None):
    self._checkpoints, self._also = checkpoints, close
    self._held, self._closed = (step, state, None), False
    self._changing = threading.Lock()
    self._signals = signals.closing(self._stop)

  def __enter__(self) -> Kept:
    self._signals.__enter__()
    return self

  def __exit__(self, kind, *_) -> None:
    alike = jax.process_count() == 1 or kind is None or issubclass(kind, (signals.Stopped, SystemExit))
    try:
      with self._changing:
        self._close(alike)
      if kind is not None and issubclass(kind, signals.Stopped):
        hosts.say(self._said())
    except Exception as e:
      if kind is None:
        raise
      signals.wait()
      print(f"nothing more was saved: {type(e).__name__}: {e}", flush=True)  # what ended the loop is raised instead
    finally:
      self._signals.__exit__(None, None, None)

  @contextlib.contextmanager
  def changing(self):
    """A `with` block around a step's updates, in which there is no state to save until `finished` is called."""
    signals.wait()  # or this thread might get the lock back before the one that closes
    with self._changing:
      self._held = None
      yield

  def finished(self, step: int, state, last: bool = False, score: float | None = None) -> None:
    """Notes that so many steps are finished, with this state; saves it with its score if a save is due, or `last`."""
    self._checkpoints.maybe_save(step, state, last, score)
    self._held = (step, state, score)

  def _close(self, save: bool = True) -> None:
    if self._closed:
      return
    self._closed = True
    if self._held and self._held[0] and save:
      step, state, score = self._held
      self._checkpoints.maybe_save(step, state, last=True, score=score)
    self._checkpoints.close()
    self._also()

  def _stop(self) -> str:
    """What a signal does; the lock is never released, so that no other step begins."""
    self._changing.acquire()
    self._close()
    return self._said()

  def _said(self) -> str:
    saved = self._checkpoints.latest()
    return f"step {saved} is saved, the same command goes on from there" if saved else "no step was finished yet"
