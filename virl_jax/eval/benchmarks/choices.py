"""Questions with lettered options, as the tables and texts of several benchmarks have them."""

from __future__ import annotations

import re

from virl_jax.data import tables
from virl_jax.eval.benchmarks import rows as rows_lib

# "A. cat", "(A) cat", "A) cat", at the start of a line.
_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]*(.*?)[ \t]*$", re.MULTILINE)


def block(text: str) -> tuple[str, ...]:
  """The options of a text that has one on each line: "A. cat\\nB. dog\\n".

  Raises:
    Unusable: its letters are not A, B, C ..., at least two, each with a text.
  """
  found = _LINE.findall(text)
  if len(found) < 2 or "".join(letter for letter, _ in found) != rows_lib.LETTERS[:len(found)] or not all(
      option for _, option in found):
    raise tables.Unusable("options are missing")
  return tuple(tables.utf8(option, "options") for _, option in found)


def asked(text: str) -> tuple[str, tuple[str, ...]]:
  """Question and options of a prompt that has both: the lines before the first option, and the options.

  Raises:
    Unusable: see `block`.
  """
  options = block(text)
  return text[:_LINE.search(text).start()].strip(), options
