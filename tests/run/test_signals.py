"""What signals do to a command: what is open is closed, one line, no traceback, the agreed status."""

import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# A shell makes what it starts with `&` ignore Ctrl-C, and these processes would inherit that.
BEGIN = """
import os, signal, sys, time
from virl_jax.run import signals
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signals.install()
"""
DO = """
def close():
  print("closing", flush=True)
  {close}
  return "all is saved"

try:
  with signals.closing(lambda: None), signals.closing(close):
    print("ready", flush=True)
    {body}
    signals.wait()
finally:
  print("the main thread went on", flush=True)
"""

CHILD = """
import multiprocessing
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
"""


def start(text):
  # Unbuffered: `communicate` does not return what a buffer holds after a `readline`.
  process = subprocess.Popen([sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             bufsize=0)
  while b"ready" not in (line := process.stdout.readline()):
    assert line, process.wait()
  return process


def end(process, *numbers):
  for number in numbers:
    process.send_signal(number)
  out, _ = process.communicate(timeout=30)
  return process.returncode, out.decode().splitlines()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("body", [
    "time.sleep(60)",
    "signals._heard.wait(); raise OSError('it was closed under its hands')",
    "__import__('ctypes').PyDLL(None).usleep(500_000); time.sleep(60)"])  # holds on to the interpreter
def test_it_closes_says_so_and_ends(number, status, body):
  got = end(start(BEGIN + DO.format(close="", body=body)), number)
  assert got == (status, ["closing", f"stopped by {number.name}; all is saved"])


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_where_nothing_is_open_it_just_ends(number, status):
  got = end(start(BEGIN + "print('ready', flush=True)\ntime.sleep(60)"), number)
  assert got == (status, [f"stopped by {number.name}"])


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_another_ctrl_c_ends_it_at_once(first):
  process = start(BEGIN + DO.format(close="time.sleep(60)", body="time.sleep(60)"))
  process.send_signal(first)
  assert process.stdout.readline() == b"closing\n"
  assert end(process, signal.SIGINT) == (130, [])


def test_another_sigterm_does_not():
  process = start(BEGIN + DO.format(close="time.sleep(1)", body="time.sleep(60)"))
  process.send_signal(signal.SIGTERM)
  assert process.stdout.readline() == b"closing\n"
  assert end(process, signal.SIGTERM) == (0, ["stopped by SIGTERM; all is saved"])


def test_it_says_that_it_takes_time():
  text = BEGIN + "signals._PATIENCE_S = 0.2\n" + DO.format(close="time.sleep(1)", body="time.sleep(60)")
  code, lines = end(start(text), signal.SIGTERM)
  assert (code, lines[1:]) == (0, ["finishing what can't be cut off; another Ctrl-C ends it at once",
                                   "stopped by SIGTERM; all is saved"])


def test_it_ends_though_nobody_listens():
  text = "with signals.closing(lambda: time.sleep(0.5)):\n  print('ready', flush=True)\n  time.sleep(60)"
  process = start(BEGIN + text)
  process.stdout.close()
  process.send_signal(signal.SIGHUP)
  assert process.wait(30) == 129


def test_what_can_not_be_closed_is_an_error():
  text = BEGIN + DO.format(close="raise OSError('no space left\\nat all')", body="time.sleep(60)")
  assert end(start(text), signal.SIGTERM) == (1, ["closing", "stopped by SIGTERM; error: OSError: no space left"])


def test_children_end_with_it():
  process = start(BEGIN + CHILD + "print('ready', flush=True)\ntime.sleep(60)")
  assert end(process, signal.SIGTERM) == (0, ["stopped by SIGTERM"])  # the child has the pipe as well: both have ended


def test_what_a_child_hears_is_not_for_its_parent():
  text = BEGIN + CHILD + ("time.sleep(0.5)\nchild.terminate()\nchild.join()\nprint('ready', flush=True)\n"
                          "time.sleep(0.5)\nprint('went on')")
  assert end(start(text)) == (0, ["went on"])


def test_what_it_was_told_to_ignore_is_ignored():
  text = BEGIN.replace("signal.default_int_handler", "signal.SIG_IGN")
  text += "print('ready', flush=True)\ntime.sleep(1)\nprint('went on')"
  assert end(start(text), signal.SIGINT) == (0, ["went on"])


def test_without_install_ctrl_c_is_python_s():
  """A notebook's "interrupt the kernel" is a KeyboardInterrupt, and `closing` calls nothing."""
  text = BEGIN.replace("signals.install()", "") + DO.format(close="", body="time.sleep(60)")
  code, lines = end(start(text), signal.SIGINT)
  assert code in (1, 130, -signal.SIGINT) and "closing" not in lines
  assert lines[0] == "the main thread went on" and lines[-1] == "KeyboardInterrupt"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_has_ended_has_ended(number):
  """Python drops its handlers before it clears modules: a signal then has killed a run that was finished."""
  process = start(BEGIN + f"""
class Late:
  def __del__(self, kill=os.kill, me=os.getpid(), number={int(number)}, sleep=time.sleep, write=os.write):
    write(1, b"late\\n")
    kill(me, number)
    sleep(0.2)
late = Late()
print("ready", flush=True)
""")
  assert end(process) == (0, ["late"])
