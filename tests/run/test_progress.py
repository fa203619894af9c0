"""Bars in a terminal, and nothing of them elsewhere."""

import os
import pty
import subprocess
import sys
import termios

import pytest

from virl_jax.run import progress

SCRIPT = """
from virl_jax.run import progress
progress._DELAY_S = progress._EVERY_S = 0
for i in progress.over(range(3), 3, "drawing", "picture", {shown}):
  if i == 1:
    progress.say("a line")
    progress.note("a note")
with progress.bar(2_000_000, "loading", "parameter", {shown}) as it:
  it.update(1_500_000)
with progress.bar(None, "reading", "record", {shown}) as it:
  it.update(3000)
"""


def in_a_terminal(shown=True):
  """What a terminal is sent."""
  ours, theirs = pty.openpty()
  termios.tcsetwinsize(theirs, (24, 100))
  process = subprocess.Popen([sys.executable, "-c", SCRIPT.format(shown=shown)], stdout=theirs, stderr=theirs)
  os.close(theirs)
  said = b""
  while True:
    try:
      more = os.read(ours, 4096)
    except OSError:  # the other end is closed
      break
    if not more:
      break
    said += more
  os.close(ours)
  assert not process.wait()
  return said.decode()


def test_a_terminal_has_bars_that_make_way_for_lines():
  said = in_a_terminal()
  assert "drawing:" in said and "/3 [" in said and "picture" in said and "1.50M/2.00M" in said
  assert "reading: 3.00k record" in said
  for line in ("a line", "a note"):
    assert not said.partition(line)[0].rpartition("\r")[2].strip(), "the line begins where the bar was"
  assert not said.rpartition("\r")[2].strip(), "a bar goes when it is done"


def test_other_processes_have_none():
  assert in_a_terminal(shown=False).split() == "a line a note".split()


def test_a_pipe_has_lines_alone():
  done = subprocess.run([sys.executable, "-c", SCRIPT.format(shown=True)], capture_output=True, text=True, check=True)
  assert (done.stdout, done.stderr) == ("a line\n", "a note\n")


def test_the_items_come_through():
  assert list(progress.over("abc", 3, "w", "u")) == ["a", "b", "c"]
  with pytest.raises(ZeroDivisionError):
    list(progress.over((1 // n for n in (1, 0)), 2, "w", "u"))
