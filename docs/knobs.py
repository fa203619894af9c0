"""Writes configuration.md: every knob of virl_jax/config.py, in the words of its comments.

    python docs/knobs.py
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pathlib
import re

from virl_jax import config as config_lib

PAGE = pathlib.Path(__file__).with_name("configuration.md")
_COMMENT = re.compile(r"\s*#\s*(.*)")
_SOURCE = re.compile(r"\s*\[([^\[\]]*)\]$")

_HEAD = """# Configuration

<!-- Made by `python docs/knobs.py` from virl_jax/config.py; change it there. -->

A configuration is a file such as `configs/tiny.py`, which starts from the defaults below and overrides some of them. A
command overrides more: `--config.rollout.prompts=32`, `--config.reward.mode=coverage`; several values are a Python
tuple in quotes, `--config.monitor.stop="('entropy_collapse',)"`. A knob that does not exist ends the
command with the nearest name; a value that cannot work ends it with what was wanted.

*May change*: whether a run that goes on in the same workdir may be given another value. Where it says no, a workdir
with another value is refused, unless `--resume-with-changes` says that it is meant. `train` reads neither `sft` nor
`warmstart`; the commands of these names compare their own sections.

*From*: `published` is the paper (ViRL, arXiv 2511.23031), `ours` was chosen here, a name is that project's value. The
paper's learning rate, batch, group size, KL, clip and modulators are not published in what we have.
"""


@dataclasses.dataclass
class Knob:
  """A knob, as config.py has it.

  Attributes:
    key: dotted.
    words: what it is, its unit among it.
    source: what stands in brackets behind; empty if nothing does.
    note: of the comment lines before it that hold for it and those that follow it, up to a blank line.
    apart: whether a blank line or a note sets it off from the one before.
  """
  key: str
  words: str
  source: str
  note: str
  apart: bool


def knobs() -> tuple[dict[str, str], list[Knob]]:
  """What config.py says of each section, and of each knob in its order.

  Raises:
    ValueError: where a line defines several knobs, which leaves each without words of its own.
  """
  lines, first = inspect.getsourcelines(config_lib._knobs)
  body = ast.parse("".join(lines)).body[0].body
  paths, sections, found, end = {"c": ""}, {"": ""}, [], 1
  for node in body:
    if not isinstance(node, ast.Assign):
      continue
    between = lines[end:node.lineno - 1]
    note = " ".join(filter(None, map(_comment, between)))
    end = node.end_lineno
    text = [_trailing(line) for line in lines[node.lineno - 1:end]]
    while end < len(lines) and _deep(lines[end]):  # comments that go on below
      text.append(_comment(lines[end]))
      end += 1
    words = " ".join(filter(None, text))
    targets = [t for t in node.targets if isinstance(t, ast.Attribute)]
    if any(isinstance(t, ast.Tuple) for t in node.targets):
      raise ValueError(f"config.py:{first + node.lineno - 1} must define one knob, with words of its own")
    for target in targets:
      key = f"{paths[target.value.id]}.{target.attr}".lstrip(".")
      if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "ConfigDict":
        sections[key] = words
        paths |= {t.id: key for t in node.targets if isinstance(t, ast.Name)}
      else:
        source = _SOURCE.search(words)
        found.append(Knob(key, _SOURCE.sub("", words), source.group(1) if source else "", note, bool(between)))
  return sections, found


def page() -> str:
  """The page, as Markdown."""
  sections, found = knobs()
  values, free = config_lib.flat(config_lib.default().to_dict()), config_lib.free_keys()
  out, section = [_HEAD], None
  for knob in found:
    at = knob.key.rpartition(".")[0]
    if at != section:
      section = at
      out.append(f"\n## {at or 'The run'}\n")
      if sections[at]:
        out.append(f"\n{_sentence(sections[at])}\n")
    if knob.note:
      out.append(f"\n{_sentence(knob.note)}\n")
    if knob.apart or out[-1][:1] != "|":
      out.append("\n| knob | default | what it is | from | may change |\n|---|---|---|---|---|\n")
    value = repr(values[knob.key]).replace("|", "\\|")
    out.append(f"| `{knob.key}` | `{value}` | {_cell(knob.words)} | {_cell(knob.source)} "
               f"| {'yes' if knob.key in free else 'no'} |\n")
  return "".join(out)


def _deep(line: str) -> bool:
  """Whether a line is the rest of the comment before it: one that begins beyond any code."""
  return line.lstrip().startswith("#") and len(line) - len(line.lstrip()) > 20


def _comment(line: str) -> str:
  found = _COMMENT.fullmatch(line.rstrip("\n"))
  return found.group(1).strip() if found else ""


def _trailing(line: str) -> str:
  """The comment behind a line's code; no value of a default holds two blanks and a hash."""
  return line.partition("  # ")[2].strip()


def _cell(words: str) -> str:
  words = re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", words)
  return re.sub(r"\b(\w+/\w+\.py)", r"`\1`", words).replace("|", "\\|")


def _sentence(words: str) -> str:
  words = _cell(words[:1].upper() + words[1:])
  return words if words.endswith((".", ":")) else words + "."


if __name__ == "__main__":
  PAGE.write_text(page())
  print(f"{len(knobs()[1])} knobs in {PAGE}")
