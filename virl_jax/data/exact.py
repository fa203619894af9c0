"""Judge-free answer matching: is this text one of the accepted answers?

A reward must not be won by accident, so a text is compared as a whole and never searched: "A dog is
there" is neither option A nor "dog", and "A B" is neither option A nor option B.
"""

from __future__ import annotations

import decimal
import re
import unicodedata

# Canonical ordering takes quadratic time on runs of combining marks; no real answer is this long.
_COMPOSE_MAX_CHARS = 2000
_NUMBER_MAX_CHARS = 64

_ARTICLES = re.compile(r"(?:(?:an?|the) )+(?=\S\S)")  # two characters: "a b" may be two letters
# Characters that are typed in several ways and mean the same.
_ALIKE = str.maketrans({
    **dict.fromkeys("\N{MINUS SIGN}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FIGURE DASH}\N{EN DASH}\N{EM DASH}"
                    "\N{HORIZONTAL BAR}", "-"),
    **dict.fromkeys("\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}\N{MODIFIER LETTER APOSTROPHE}"
                    "\N{SINGLE HIGH-REVERSED-9 QUOTATION MARK}\N{PRIME}", "'"),
    **dict.fromkeys("\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}\N{DOUBLE PRIME}", '"'),
    "\N{FRACTION SLASH}": "/"})
_FULL_WIDTH = {c + 0xfee0: c for c in range(ord("!"), ord("~") + 1)}
# NFKC would make "102" of ten squared, and "51/2" of five and a half.
_RAISED = re.compile("(?<=\\d)([\u00b2\u00b3\u00b9\u2070\u2074-\u2079\u207b]+)")
_VULGAR = re.compile("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e])")
# Punctuation, separators, control and format characters; symbols such as $ and + mean something.
_DROPPABLE = frozenset(("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Zs", "Zl", "Zp", "Cc", "Cf"))
# And so do these, though Unicode calls them punctuation: "C#" is not "C", nor "50%" "50".
_MEANT = frozenset("#%\u2030@&/\\*_\u00a7\u2020\u2021")
# Markdown: a heading or an item of a list, and what is emphasised, as in "**B.** cat".
_ITEM = re.compile(r"\A(?:#+|\*) ")
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,3}|_{1,3})(?=[^\s*_])([^*_]{1,200})(?<=\S)\1(?!\w)")
_LETTER_AND_TEXT = re.compile(r"([a-z])[).:\]]\s*(.+)", re.DOTALL | re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", re.ASCII)
_UNIT_GAP = re.compile("(?<=[0-9]) (?=[%\u2030\u00b0])|(?<=[$\u00a3\u20ac\u00a5]) (?=[-+.]?[0-9])")
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?", re.ASCII)
_QUANTITY = re.compile("(?P<sign>[-+]?)(?P<before>[$\u00a3\u20ac\u00a5]?)(?P<number>[-+]?[0-9,.]+)"
                       "(?P<after>[%\u2030\u00b0]?)", re.ASCII)
_NUMBER_HEAD = re.compile(r"(?<![.\d])[-+]?\.?\Z")  # the "-." of "(-.5)", and nothing of "...5"
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
          "twelve")


def normalize(text: str) -> str:
  """The form in which texts are compared.

  Compatibility forms, dashes and quotation marks are unified (NFKC, and what it leaves apart) and case is folded;
  punctuation and spaces at the ends, repeated spaces, leading articles and the commas of "1,000" are dropped, unless
  too little would be left: "a", "?" and "a b" stay as they are.  Marks that change the meaning stay: those of "C#",
  "50%", "-5", "O-" and "6'".

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

  Without options: the normal forms are equal, or both are the same number with the same sign of a unit ("1,000" and
  "1000.0", "three" and "3", "$5" and "$5.00").  With options: the answer names an option, by its letter ("B", "(b)",
  "B."), by its text, or by both ("B) cat"), and that option is one of the accepted ones.  A text names the options that
  it equals letter for letter; or else the only option with the same normal form, if there is just one.

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
    return any(same(answer, accepted) for accepted in answers)
  # The letter goes first here: it is what a policy that was shown letters means by "B".
  return not right(answers, options).isdisjoint(_by_letter(answer, options) or _by_text(answer, options))


def right(answers: tuple[str, ...], options: tuple[str, ...]) -> set[int]:
  """The options, by index, that are accepted; empty if no accepted answer is among them: then no answer can be right.

  Args:
    answers: the accepted answers: texts of options or, where no option has that text, letters.
    options: the texts of options A, B, C ....
  """
  return set().union(*(_by_text(text, options) or _by_letter(text, options) for text in answers))


def _by_text(text, options):
  """The options, by index, that this text names."""
  return _exactly(text, options) or _uniquely(text, options)


def _exactly(text, options):
  """The options that are this text, up to spaces and how its characters are composed."""
  text = _plain(text)
  return {index for index, option in enumerate(options) if _plain(option) == text} if text else set()


def _uniquely(text, options):
  """The option with this text's normal form, if there is just one."""
  found = {index for index, option in enumerate(options) if same(text, option)}
  return found if len(found) == 1 else set()


def _by_letter(text, options):
  """The option whose letter this is, alone or before the option's own text."""
  text = _strip(_unmarked(_plain(text.translate(_FULL_WIDTH))))
  lettered = _LETTER_AND_TEXT.fullmatch(text)
  letter, rest = lettered.groups() if lettered else (text, None)
  letter = letter.lower()
  if len(letter) != 1 or not "a" <= letter <= "z" or ord(letter) - ord("a") >= len(options):
    return set()
  index = ord(letter) - ord("a")
  if rest is not None and index not in (_exactly(rest, options) or {index}):
    return set()  # the text is that of another option
  return {index} if rest is None or same(rest, options[index]) else set()


def same(a: str, b: str) -> bool:
  """Whether two texts have the same normal form, or are the same number with the same sign of a unit."""
  a, b = normalize(a), normalize(b)
  if a == b:
    return bool(a)
  value = _number(a)
  return value is not None and value == _number(b)


def _number(text):
  """The exact value of a normal form and its unit's sign, or None if it isn't a plain number."""
  if text in _WORDS:
    return decimal.Decimal(_WORDS.index(text)), "", ""
  found = _QUANTITY.fullmatch(text) if len(text) <= _NUMBER_MAX_CHARS else None
  if not found:
    return None
  number = found["sign"] + found["number"]
  if not _NUMBER.fullmatch(number) or not any(c.isdigit() for c in number):
    return None
  return decimal.Decimal(number.replace(",", "")), found["before"], found["after"]


def _plain(text):
  """A text without invisible differences: spaces at the ends or repeated, and how its characters are composed."""
  if len(text) <= _COMPOSE_MAX_CHARS:
    text = unicodedata.normalize("NFC", text)
  return " ".join(text.split())


def _unmarked(text):
  """A text without Markdown's marks."""
  return _EMPHASIS.sub(r"\2", _ITEM.sub("", text))


def _tidy(text):
  text = text.translate(_ALIKE)
  if len(text) <= _COMPOSE_MAX_CHARS:
    text = unicodedata.normalize("NFKC", _VULGAR.sub(" ", _RAISED.sub(r"^\1", text))).translate(_ALIKE)
  text = _strip(_unmarked(" ".join(text.casefold().split()).replace("''", '"')))
  return _UNIT_GAP.sub("", _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text))


def _strip(text):
  """Drops punctuation and invisible characters at the ends, but no mark that belongs to its neighbour."""
  start, end = 0, len(text)
  while start < end and _droppable(text[start]):
    start += 1
  while end > start and _droppable(text[end - 1]):
    end -= 1
  if start == end:
    return text
  head, tail = text[:start], text[end:]
  if tail[:1] in ("'", '"') and text[end - 1].isdecimal() and tail[0] not in head:
    end += 1  # feet, inches, minutes
  elif tail[:1] == "-" and "-" not in head:
    end += 1  # "O-", "A-"
  if text[start].isdecimal():
    number_head = _NUMBER_HEAD.search(text[max(0, start - 3):start])
    start -= len(number_head[0]) if number_head else 0
  elif head[-1:] == "-" and head[-2:-1] != "-" and "-" not in tail:
    start -= 1  # "-x", but "- cat" is an item of a list
  return text[start:end]


def _droppable(char):
  return char == "`" or char not in _MEANT and unicodedata.category(char) in _DROPPABLE
