"""The queue of questions for one policy: one is answered at a time, first come, first served."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import queue
import sys
import threading
import traceback
from typing import Any

from virl_jax import types

_END = object()


class Full(Exception):
  """The queue is full."""


class Gone(Exception):
  """The asker has left: raised by `tell`, so that the policy stops."""


@dataclasses.dataclass(frozen=True)
class Place:
  """How many questions are ahead."""

  ahead: int


@dataclasses.dataclass(frozen=True)
class Failed:
  """The question could not be answered.

  Attributes:
    error: why, in words for the asker.
  """

  error: str


class _Job:
  """A question, what has happened to it so far, and whether the asker has left."""

  def __init__(self, task: types.Task):
    self.task, self.events, self.left = task, queue.SimpleQueue(), threading.Event()
    self._ahead: int | None = None

  def tell(self, event: Any) -> None:
    if self.left.is_set():
      raise Gone
    self.events.put(event)

  def place(self, ahead: int) -> None:
    if ahead != self._ahead:
      self._ahead = ahead
      self.events.put(Place(ahead))


class Desk:
  """A thread that answers questions, and a queue of them.

  Args:
    answer: called with a task and `tell`, in a separate thread, for one task at a time; calls `tell(event)` with
      whatever happens.  A ValueError's message goes to the asker; any other error is printed, and the next question is
      answered.
    most: most questions that are waiting or being answered.
    beat_s: after how long without an event the asker gets None.
  """

  def __init__(self, answer: Callable[[types.Task, Callable[[Any], None]], Any], most: int = 16, beat_s: float = 2.0):
    self._answer, self._most, self._beat_s = answer, most, beat_s
    self._waiting: collections.deque[_Job] = collections.deque()
    self._busy = False
    self._changed = threading.Condition()
    threading.Thread(target=self._work, name="desk", daemon=True).start()

  @contextlib.contextmanager
  def ask(self, task: types.Task) -> Iterator[Iterator[Any]]:
    """Joins the queue; leaving this context early leaves the queue, or stops the policy.

    Yields:
      An iterator of what happens: `Place` whenever it changes, what `answer` tells, perhaps `Failed` at last; None if
      nothing has happened for `beat_s`.

    Raises:
      Full: the queue is full.
    """
    job = _Job(task)
    with self._changed:
      if len(self._waiting) + self._busy >= self._most:
        raise Full(f"{self._most} questions are waiting already; try again later")
      self._waiting.append(job)
      self._places()
      self._changed.notify()
    try:
      yield self._events(job)
    finally:
      job.left.set()
      with self._changed:
        if job in self._waiting:
          self._waiting.remove(job)
          self._places()

  def _events(self, job: _Job) -> Iterator[Any]:
    while True:
      try:
        event = job.events.get(timeout=self._beat_s)
      except queue.Empty:
        event = None
      if event is _END:
        return
      yield event

  def _places(self) -> None:
    for ahead, job in enumerate(self._waiting):
      job.place(ahead + self._busy)

  def _work(self) -> None:
    while True:
      with self._changed:
        self._busy = False
        self._changed.wait_for(lambda: self._waiting)
        job, self._busy = self._waiting.popleft(), True
        job.place(0)
        self._places()
      try:
        self._answer(job.task, job.tell)
      except Gone:
        pass
      except ValueError as e:
        job.events.put(Failed(str(e)))
      except Exception as e:  # one question must not end the service for all others
        traceback.print_exc(file=sys.stderr)
        job.events.put(Failed(f"the policy failed: {type(e).__name__}"))
      job.events.put(_END)
