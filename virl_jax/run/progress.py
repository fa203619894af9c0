"""Bars for people who watch a terminal.  Where standard error is a file or a pipe, as in a pod, there are none: what is
printed as lines is enough there, and the same in both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import sys

import tqdm

_DELAY_S = 2.0     # what is done sooner shows no bar
_EVERY_S = 0.5


def bar(total: int | None, words: str, unit: str, shown: bool = True) -> tqdm.tqdm:
  """A bar with the time that is left, which goes when it is closed.

  Args:
    total: how many there are to do, None if that is not known; from a million on they are counted in units of SI.
    words: what is done.
    unit: of what is counted, in the singular.
    shown: False for none, such as on all processes but the first.

  Returns:
    A context manager, with `update(count)` for what has been done since the last call; 0 moves the clock.
  """
  return tqdm.tqdm(total=total, desc=words, unit=f" {unit}", unit_scale=total is None or total >= 10 ** 6, leave=False,
                   disable=None if shown else True, delay=_DELAY_S, mininterval=_EVERY_S, miniters=0,
                   dynamic_ncols=True, file=sys.stderr)


def over(items: Iterable, total: int, words: str, unit: str, shown: bool = True) -> Iterator:
  """The items, with a bar that moves as each is done; see `bar`."""
  with bar(total, words, unit, shown) as it:
    for item in items:
      yield item
      it.update(1)


def note(line: object) -> None:
  """Prints a line on standard error, above the bars: what goes on, where standard output has what comes of it."""
  with tqdm.tqdm.external_write_mode(file=sys.stderr):
    print(line, file=sys.stderr, flush=True)


def say(line: object) -> None:
  """Prints a line, above the bars that there are."""
  with tqdm.tqdm.external_write_mode(file=sys.stdout):
    print(line, flush=True)
