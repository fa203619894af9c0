"""Reads the commands out of README and docs/, as they stand there; for the tests and for benchmarks/newcomer.py.

A block of code may follow a line `<!-- runs: OPTIONS -->`: a short form of it is run by the tests.  Where OPTIONS have
`@tests`, the tests alone can run it, with small files that they write: it is no part of a newcomer's path.
"""

from __future__ import annotations

from collections.abc import Iterator
import pathlib
import re
import shlex

_OPTIONAL = re.compile(r"\[(--[^\]]*)\]")


def blocks(path: pathlib.Path) -> list[tuple[int, str | None, str | None, str]]:
  """The blocks of code of a page.

  Args:
    path: of a Markdown file.

  Returns:
    Of each: the line it begins at, its language (None if it is indented), the OPTIONS of the marker before it (None
    without one), and its text.
  """
  found, marker, lines = [], None, path.read_text().splitlines()
  at = 0
  while at < len(lines):
    fence = re.match(r"(\s*)```(\w*)", lines[at])
    indented = lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip())
    start = at
    if fence:
      at += 1
      while not lines[at].strip().startswith("```"):
        at += 1
      found.append((start + 2, fence.group(2), marker, "\n".join(lines[start + 1:at])))
    elif indented:
      while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
        at += 1
      at -= 1
      found.append((start + 1, None, marker, "\n".join(line[4:] for line in lines[start:at + 1]).rstrip()))
    if lines[at].strip():
      marked = re.fullmatch(r"<!-- runs: ?(.*?) ?-->", lines[at].strip())
      marker = marked.group(1) if marked else None
    at += 1
  return found


def commands(text: str, with_optional: bool = True) -> Iterator[list[str]]:
  """The words of each command of a block.

  Args:
    text: of a block.
    with_optional: whether options in brackets, [--like=this], are taken.

  Raises:
    ValueError: a quotation has no end.
  """
  line = ""
  for more in _OPTIONAL.sub(r"\1" if with_optional else "", text.replace("\\\n", " ")).splitlines():
    line += more
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
      found, line = list(lexer), ""
    except ValueError:  # a quotation that goes on in the next line
      line += "\n"
      continue
    words = []
    for word in found:
      if set(word) <= set("&|;"):
        yield words
        words = []
      else:
        words.append(word)
    if words:
      yield words
  if line:
    raise ValueError(f"a block of commands must end each quotation. Received: {line}")


def shortened(words: list[str], marker: str) -> list[str]:
  """A command with its marker's OPTIONS: those of the form OLD->NEW replace text, and ours takes the others, too."""
  options = [option for option in shlex.split(marker) if option != "@tests"]
  for old, _, new in (option.partition("->") for option in options if "->" in option):
    words = [word.replace(old, new) for word in words]
  is_ours = words[:2] == ["python", "-m"] and words[2].startswith("virl_jax.")
  return words + [option for option in options if "->" not in option] * is_ours
