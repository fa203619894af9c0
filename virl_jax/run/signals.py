"""What Ctrl-C, SIGTERM and a terminal that goes away do to a command: it closes what is open, says so, and ends.

The main thread may be compiling, or waiting for a device, for minutes in which no Python runs in it; and raised in the
middle of a save or of an update, an exception does harm.  So it is left alone: another thread receives the signal,
closes what is open, and ends the process: with 130 for Ctrl-C, 129 for a lost terminal, and 0 for SIGTERM, with which
schedulers take back a machine.  What the main thread was doing ends as if the process had been killed, which everything
here survives; what a `closing` does comes first.  Another Ctrl-C ends the process at once; another SIGTERM does not,
for schedulers send several.

Where several processes train together, none may save or leave by itself: there, `note` has a signal only be
remembered, and `hosts.agree` ends all of them at the same place.

Signals belong to the whole process, hence the state of this module.  Without `install` it does nothing: where a
notebook or another program calls, Ctrl-C is Python's `KeyboardInterrupt`, and who called decides.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
import contextlib
import multiprocessing
import multiprocessing.util
import os
import signal
import socket
import threading

_CODES = {signal.SIGINT: 130, signal.SIGTERM: 0, signal.SIGHUP: 129}
_PATIENCE_S = 3.0  # then it is said that the process is still closing

_heard, _turn = threading.Event(), threading.Lock()
_numbers: list[int] = []  # what this process hears
_noted: list[int] | None = None  # signals that were only remembered; None if they end this process
_closing: list[Callable[[], str | None]] = []


def install() -> None:
  """Has these signals end this process as above; a command's first act, before imports that take seconds.

  What this process was started to ignore, as `nohup` and a shell's `&` have it, is ignored still.
  """
  hears, tells = socket.socketpair()
  tells.setblocking(False)
  numbers = _numbers[:] = [number for number in _CODES if signal.getsignal(number) != signal.SIG_IGN]
  # Python's own handler in C writes the number there when the signal comes, whatever the main thread does.
  signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
  _hear(numbers)
  os.register_at_fork(after_in_child=lambda: _forget(numbers))
  atexit.register(_leave, numbers)
  threading.Thread(target=_listen, args=(hears, tells), name="signals", daemon=True).start()


@contextlib.contextmanager
def closing(close: Callable[[], str | None]):
  """Within it, a signal has `close` called before the process ends.

  Args:
    close: called in another thread, while this one goes on; what it returns is said in the line.
  """
  wait()
  _closing.append(close)
  try:
    yield
  finally:
    with _turn:
      if not _heard.is_set():
        _closing.remove(close)
    wait()


def _hear(numbers: list[int]) -> None:
  for number in numbers:
    signal.signal(number, lambda *_: None)


def note() -> None:
  """From now on a signal does nothing but be remembered, for `noted`; another Ctrl-C still ends the process at once.

  Without `install` nothing changes.  In the main thread, after JAX has joined others: it may have taken SIGTERM.
  """
  global _noted
  wait()
  _hear(_numbers)
  with _turn:
    _noted = []


def retake() -> None:
  """A signal ends this process again as `install` has it, where JAX, joining others, has taken SIGTERM.  In the main
  thread; without `install` nothing changes."""
  wait()
  _hear(_numbers)


def noted() -> int:
  """The number of the first signal that was remembered; 0 for none."""
  return _noted[0] if _noted else 0


class Stopped(BaseException):
  """All processes have agreed to stop here: the step in progress unwinds, and finished steps are saved.

  Attributes:
    number: the signal that one of them has got.
  """

  def __init__(self, number: int):
    super().__init__(f"stopped by {signal.Signals(number).name}")
    self.number = number

  @property
  def code(self) -> int:
    """The process's exit status."""
    return _CODES[signal.Signals(self.number)]


def wait() -> None:
  """Never returns if a signal has come: the process is about to end, and later errors are consequences."""
  if _heard.is_set():
    threading.Event().wait()


def _listen(hears: socket.socket, _: socket.socket) -> None:
  while True:
    try:
      number = hears.recv(1)[0]
    except TimeoutError:
      _say("finishing what can't be cut off; another Ctrl-C ends it at once")
      hears.settimeout(None)
      continue
    if number not in _CODES:  # of another handler of this process
      continue
    if _heard.is_set() or _noted:
      if number == signal.SIGINT:
        _end(130)
      continue
    with _turn:
      if _noted is not None:
        _noted.append(number)
        continue
      _heard.set()
    threading.Thread(target=_close, args=(number,), name="closing", daemon=True).start()
    hears.settimeout(_PATIENCE_S)


def _leave(numbers: list[int]) -> None:
  """The command has ended by itself.  What was heard before goes first; what comes from now on is ignored: Python gives
  up its handlers some time before the process is gone, and then it would kill."""
  for number in numbers:
    signal.signal(number, signal.SIG_IGN)
  wait()


def _forget(numbers: list[int]) -> None:
  """Signals to a forked child are not for this process."""
  signal.set_wakeup_fd(-1)
  for number in numbers:
    signal.signal(number, signal.SIG_DFL)


def _close(number: int) -> None:
  code, said = _CODES[number], []
  for close in reversed(_closing):
    try:
      said.append(close())
    except BaseException as e:
      code = 1
      said.append(f"error: {type(e).__name__}: {str(e).partition(chr(10))[0]}")
  _say("; ".join([f"stopped by {signal.Signals(number).name}", *filter(None, said)]))
  _end(code)


def _say(line: str) -> None:
  with contextlib.suppress(OSError, ValueError):  # whoever listened may be gone
    print(line, flush=True)


def _end(code: int) -> None:
  for child in multiprocessing.active_children():  # they would wait for this process for ever
    child.kill()
  # Gives back what they shared, if there were any, be they gone by the same signal: or its tracker warns of a leak.
  multiprocessing.util._run_finalizers(0)
  os._exit(code)
