"""What Ctrl-C, SIGTERM and a terminal that goes away do to a command: it closes what is open, says so, and ends.

The main thread may be compiling, or waiting for a device, for minutes in which no Python runs in it; and raised in the
middle of a save or of an update, an exception does harm.  So the main thread is left alone: another thread receives the
signal, closes what is open, and ends the process: with 130 for Ctrl-C, 129 for a lost terminal, and 0 for SIGTERM, with
which schedulers take back a machine.  What the main thread was doing ends as if the process had been killed, which
everything here survives; what is registered with `closing` is done first.  Another Ctrl-C ends the process at once;
another SIGTERM does not, because schedulers send several.

Where several processes train together, none may save or leave by itself: there, after `note`, a signal is only
remembered, and `hosts.agree` ends all of them at the same place.

Signals belong to the whole process, hence the state of this module.  Without `install` it does nothing: in a notebook
or another program, Ctrl-C is Python's `KeyboardInterrupt`, and the caller decides what it does.
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
_PATIENCE_S = 3.0  # until a line says that the process is still closing

_heard, _turn = threading.Event(), threading.Lock()
_numbers: list[int] = []  # the signals that `install` took
_noted: list[int] | None = None  # signals that were only remembered; None if they end this process
_closing: list[Callable[[], str | None]] = []


def install() -> None:
  """Makes these signals end this process as above; called first in a command, before imports that take seconds.

  Signals that this process was started to ignore, as by `nohup` or a shell's `&`, stay ignored.
  """
  hears, tells = socket.socketpair()
  tells.setblocking(False)
  numbers = _numbers[:] = [number for number in _CODES if signal.getsignal(number) != signal.SIG_IGN]
  # Python's own handler, in C, writes a signal's number to this socket, whatever the main thread is doing.
  signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
  _hear(numbers)
  os.register_at_fork(after_in_child=lambda: _forget(numbers))
  atexit.register(_leave, numbers)
  threading.Thread(target=_listen, args=(hears, tells), name="signals", daemon=True).start()


@contextlib.contextmanager
def closing(close: Callable[[], str | None]):
  """A `with` block in which a signal calls `close` before the process ends.

  Args:
    close: called in another thread, while this one goes on; what it returns is printed in the last line.
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
  """From now on a signal is only remembered, for `noted`; another Ctrl-C still ends the process at once.

  Call it in the main thread, after JAX has joined other processes, which may replace the handler of SIGTERM.  Without
  `install` nothing changes.
  """
  global _noted
  wait()
  _hear(_numbers)
  with _turn:
    _noted = []


def retake() -> None:
  """Makes signals end this process again as after `install`, where JAX has taken SIGTERM when it joined processes.

  Call it in the main thread.  Without `install` nothing changes.
  """
  wait()
  _hear(_numbers)


def noted() -> int:
  """The number of the first signal that was remembered; 0 for none."""
  return _noted[0] if _noted else 0


class Stopped(BaseException):
  """All processes have agreed to stop here: the step in progress is abandoned, and finished steps are saved.

  Attributes:
    number: the signal that one of them has received.
  """

  def __init__(self, number: int):
    super().__init__(f"stopped by {signal.Signals(number).name}")
    self.number = number

  @property
  def code(self) -> int:
    """The process's exit status."""
    return _CODES[signal.Signals(self.number)]


def wait() -> None:
  """Never returns if a signal has come: the process is about to end, and later errors are only consequences."""
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
    if number not in _CODES:  # a signal that another handler of this process takes
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
  """Called when the command ends by itself: a signal that came before still ends the process, later ones are ignored.

  Python drops its handlers some time before the process is gone, and a signal would kill it then.
  """
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
  with contextlib.suppress(OSError, ValueError):  # standard output may be closed
    print(line, flush=True)


def _end(code: int) -> None:
  for child in multiprocessing.active_children():  # they would wait for this process for ever
    child.kill()
  # Releases what children shared, even if the same signal has ended them: or multiprocessing's tracker warns of a leak.
  multiprocessing.util._run_finalizers(0)
  os._exit(code)
