"""Answers that pick one of a few: an option, or yes and no.

Benchmarks let a policy write more than the letter, so these rules read on where `exact` refuses: "B. The cat is red" is
option B, whatever option B says.  They never search: a letter or a word counts only where the answer begins, so that
"A dog is there" is not option A, and no answer is ever guessed.
"""

from __future__ import annotations

import re

from virl_jax.data import exact

# What a letter may be wrapped in, and what marks it as one: "(B)", "**B** cat", "B. cat", "B: cat".
_WRAPPED = re.compile(r"[\s(\[{*_`\"'$]*([A-Za-z])(.*)", re.DOTALL)
_MARKED = re.compile(r"\s*[).:\]}*_`\"]|\s*\n|,\s")
# "A and B", "B, C": more than one letter counts as none.
_SEVERAL = re.compile(r"(?:[)\]]?\s*(?:[,/&]|and\b|or\b)\s*(?:and\b|or\b)?\s*[(\[]?|\s+)[a-z](?![\w'])", re.IGNORECASE)
_WORDS = "AIai"  # letters that are also words
_SPOKEN = re.compile(r"\A\W*(?:(?:so|thus|therefore|hence),? )?(?:the |my )?(?:(?:correct|right|best|final) )?"
                     r"(?:answer|option|choice)(?: is|:)?:?\s+(?:option |choice )?(?=\S)", re.IGNORECASE)
_WORD = re.compile(r"[a-z']+")


def letter(answer: str, options: tuple[str, ...]) -> int | None:
  """The option whose letter an answer begins with.

  Args:
    answer: what was answered.
    options: the texts of options A, B, C ....

  Returns:
    Its index; None if the answer does not begin with a separate letter, names several, or there is no such option.
  """
  found = _WRAPPED.match(_SPOKEN.sub("", answer.strip()))
  if not found:
    return None
  said, rest = found.groups()
  index = ord(said.upper()) - ord("A")
  if index >= len(options) or _SEVERAL.match(rest):
    return None
  alone = not re.search(r"\w", rest)
  marked = _MARKED.match(rest) and (said.isupper() or rest[0] in ").:]}")
  # "B the cat" is a letter, "A cat" is not, unless that is option A.
  spaced = rest[:1].isspace() and said.isupper() and (said not in _WORDS or exact.same(rest, options[index]))
  return index if alone or marked or spaced else None


def option(answer: str | None, answers: tuple[str, ...], options: tuple[str, ...] | None = None) -> float:
  """Whether an answer names a right option: by the letter that it begins with, or else by the text of one.

  Where letter and text disagree the letter counts, as in the usual scripts; judges of other kinds may differ.

  Args:
    answer: what was answered, or None.
    answers: the right options, by text or letter.
    options: the texts of options A, B, C ....

  Returns:
    1 or 0; 0 also if there are no options.

  Source: ours, after the letter rules of V*, HR-Bench and MME-RealWorld, without their search for letters in prose.
  """
  if not isinstance(answer, str) or not options:
    return 0.0
  right = exact.right(answers, options)
  index = letter(answer, options)
  if index is not None:
    return float(index in right)
  return float(any(exact.matches(text, answers, options) for text in (answer, _SPOKEN.sub("", answer.strip()))))


def yes_no(answer: str | None, answers: tuple[str, ...], options: tuple[str, ...] | None = None) -> float:
  """Whether an answer begins with the right one of yes and no, and does not say the other one too.

  Args:
    answer: what was answered, or None.
    answers: "yes" or "no", in any case; repeats make no difference.
    options: texts of options, which letters may stand for; or None.

  Returns:
    1 or 0; 0 also if the accepted answers are neither, or both.

  Source: ours; POPE's own rule, which takes everything but a no for a yes, is in `eval.benchmarks.pope`.
  """
  if options:
    return option(answer, answers, options)
  wanted = {_polarity(text) for text in answers}
  return float(isinstance(answer, str) and len(wanted) == 1 and None not in wanted and _polarity(answer) in wanted)


def _polarity(text: str) -> str | None:
  words = _WORD.findall(exact.normalize(text))
  said = {"yes", "no"} & set(words)
  return words[0] if len(said) == 1 and words[0] in said else None
