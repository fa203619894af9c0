"""Progress bars for people who watch a terminal.

There are none where standard error is a file or a pipe, as in a pod; the lines that are printed are the same in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
import sys
from typing import TextIO

import tqdm

_DELAY_S = 2.0     # work that is done sooner shows no bar
_EVERY_S = 0.5     # between two updates of a bar


def bar(total: int | None, words: str, unit: str, shown: bool = True) -> tqdm.tqdm:
  """A bar with the time that is left; it disappears when it is closed.

  Args:
    total: how many there are to do, None if that is not known; from a million on, counts have SI prefixes.
    words: what is being done.
    unit: what is counted, in the singular.
    shown: False for no bar, such as on all processes but the first.

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


def few(names: Sequence[str]) -> str:
  """The first three names, for a line, and how many more there are."""
  return "; ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def note(line: object) -> None:
  """Prints a line on standard error, above the bars: what goes on, where standard output has what comes of it."""
  _print(line, sys.stderr)


def say(line: object) -> None:
  """Prints a line, above any bars."""
  _print(line, sys.stdout)


def _print(line: object, file: TextIO) -> None:
  with tqdm.tqdm.external_write_mode(file=file):
    print(line, file=file, flush=True)
