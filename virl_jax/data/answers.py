"""Judge-free answer matching: is this text one of the accepted answers?

A reward must not be won by accident, so a text is compared as a whole and never searched: "A dog is
there" is neither option A nor "dog", and "A B" is neither option A nor option B.
"""

from __future__ import annotations

from collections.abc import Sequence
import decimal
import re
import unicodedata

from virl_jax import types

# Canonical ordering takes quadratic time on runs of combining marks; no real answer is this long.
_COMPOSE_MAX_CHARS = 2000
_NUMBER_MAX_CHARS = 64

_ARTICLES = re.compile(r"(?:(?:an?|the) )+(?=\S\S)")  # two characters: "a b" may be two letters
_DASHES = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-"})
# Punctuation, separators, control and format characters; symbols such as $ and + mean something.
_DROPPABLE = frozenset(("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Zs", "Zl", "Zp", "Cc", "Cf"))
_LETTER_AND_TEXT = re.compile(r"([a-z])[).:\]](.+)", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?", re.ASCII)
_NUMBER_HEAD = re.compile(r"(?<![.\d])[-+]?\.?\Z")  # the "-." of "(-.5)", and nothing of "...5"
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
          "twelve")


def normalize(text: str) -> str:
  """The form in which texts are compared.

  Compatibility forms are unified (NFKC) and case is folded; punctuation and spaces at the ends,
  repeated spaces and leading articles are dropped, but nothing is if too little would be left: "a",
  "?" and "a b" stay as they are.

  Args:
    text: any string.

  Returns:
    The normal form; empty only for blank text.

  Source: ours, after the usual normalisations in scoring VQA and SQuAD.
  """
  text = _tidy(text)
  articles = _ARTICLES.match(text)
  return _strip(text[articles.end():]) if articles else text


def matches(answer: str | None, answers: tuple[str, ...], options: tuple[str, ...] | None = None) -> bool:
  """Whether an answer is right.

  Without options: the normal forms are equal, or both are the same number ("1,000" and "1000.0",
  "three" and "3").  With options: the answer names an option, by its letter ("B", "(b)", "B."), by
  its text, or by both ("B) cat"), and that option is one of the accepted ones.

  Args:
    answer: what the policy answered; None if it gave no answer.
    answers: the accepted answers; with options, their texts or, where no option has that text,
      their letters.
    options: the texts of options A, B, C ..., or None for a free answer.

  Returns:
    True if it matches; False also if there are no accepted answers, or none is among the options.

  Source: ours.
  """
  if not isinstance(answer, str):
    return False
  if not options:
    return any(_same(answer, accepted) for accepted in answers)
  right = set()
  for accepted in answers:
    right |= _by_text(accepted, options) or _by_letter(accepted, options)
  # The letter goes first here: it is what a policy that was shown letters means by "B".
  return not right.isdisjoint(_by_letter(answer, options) or _by_text(answer, options))


# How an answer is matched, by the name that a task has for it: (answer, accepted answers, options) -> bool.
RULES = {"exact": matches}


def grade(trajectories: Sequence[types.Trajectory]) -> None:
  """Says of each trajectory whether its answer is right, by its task's rule; one that gave none is wrong.

  Args:
    trajectories: as a rollout gives them; their `correct` is set.

  Raises:
    ValueError: a task names a rule that there is not.
  """
  for traj in trajectories:
    task = traj.task
    if task.match not in RULES:
      raise ValueError(f"task {task.uid}: match must be one of {', '.join(RULES)}. Received: {task.match!r}")
    traj.correct = bool(RULES[task.match](traj.answer, task.answers, task.options))


def _by_text(text, options):
  """The options, by index, that have this text."""
  return {index for index, option in enumerate(options) if _same(text, option)}


def _by_letter(text, options):
  """The option whose letter this is, alone or before the option's own text."""
  text = _tidy(text)
  lettered = _LETTER_AND_TEXT.fullmatch(text)
  letter, rest = lettered.groups() if lettered else (text, None)
  if len(letter) != 1 or not "a" <= letter <= "z":
    return set()
  index = ord(letter) - ord("a")
  return {index} if index < len(options) and (rest is None or _same(rest, options[index])) else set()


def _same(a, b):
  a, b = normalize(a), normalize(b)
  if a == b:
    return bool(a)
  value = _number(a)
  return value is not None and value == _number(b)


def _number(text):
  """The exact value of a normal form, or None if it isn't a plain number."""
  if text in _WORDS:
    return decimal.Decimal(_WORDS.index(text))
  if len(text) > _NUMBER_MAX_CHARS or not _NUMBER.fullmatch(text) or not any(c.isdigit() for c in text):
    return None
  return decimal.Decimal(text.replace(",", ""))


def _tidy(text):
  if len(text) <= _COMPOSE_MAX_CHARS:
    text = unicodedata.normalize("NFKC", text)
  return _strip(" ".join(text.casefold().translate(_DASHES).split()))


def _strip(text):
  """Drops punctuation and invisible characters at the ends, but not the sign or point of a number."""
  start, end = 0, len(text)
  while start < end and _droppable(text[start]):
    start += 1
  while end > start and _droppable(text[end - 1]):
    end -= 1
  if start == end:
    return text
  if text[start].isdecimal():
    head = _NUMBER_HEAD.search(text[max(0, start - 3):start])
    start -= len(head[0]) if head else 0
  return text[start:end]


def _droppable(char):
  return char == "`" or unicodedata.category(char) in _DROPPABLE
