"""Scores that benchmarks have defined, written from their descriptions: ANLS and the VQA accuracy of TextVQA."""

from __future__ import annotations

import collections
import functools
import re

ANLS_LEAST = 0.5  # a lower similarity counts as none; exactly this one counts

_PEOPLE = 3  # how many of the others must have said so for a full score
_DIGITS = dict(zip("none zero one two three four five six seven eight nine ten".split(), map(str, [0, *range(11)])))
_ARTICLES = ("a", "an", "the")
# Words that are written with an apostrophe; where one is left out, it is put back.
_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll "
    "somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's "
    "there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll "
    "you're you've").split()
_PUNCTUATION = ";/[]\"{}()=+\\_-><@`!"
_FULL_STOP = re.compile(r"\.(?!\d)")


def _left_out() -> dict[str, str]:
  """The words of `_APOSTROPHES`, by their spelling with one apostrophe left out, or all of them."""
  found = {}
  for word in _APOSTROPHES:
    places = [i for i, c in enumerate(word) if c == "'"]
    for i in places:
      found[word[:i] + word[i + 1:]] = word
    if len(places) == 1 or word.startswith("y'all"):
      found.setdefault(word.replace("'", ""), word)
  return found


_SPELT_OUT = _left_out()


def anls(answer: str | None, answers: tuple[str, ...], options: tuple[str, ...] | None = None) -> float:
  """1 less the normalised edit distance to the nearest accepted answer; 0 below one half.

  Case and repeated blanks do not count in the distance.  It is divided by the length of the longer of the two strings
  as they came, blanks and all, which is what the challenge's own script does: trailing blanks make a wrong answer
  look better.

  Args:
    answer: what was answered; None is an empty answer.
    answers: the accepted answers.
    options: ignored.

  Returns:
    In [0, 1].

  Source: Biten et al. 2019 (ANLS, threshold 0.5), as the Robust Reading Competition scores DocVQA and InfographicsVQA.
  """
  del options
  best = max((_similarity(answer or "", accepted) for accepted in answers), default=0.0)
  return best if best >= ANLS_LEAST else 0.0


def anls_of_words(answer: str | None, answers: tuple[str, ...], options: tuple[str, ...] | None = None) -> float:
  """`anls` of an answer without repeated blanks, for rewards: a thousand blanks alone would make anything right."""
  return anls(" ".join((answer or "").split()), answers, options)


def vqa(answer: str | None, answers: tuple[str, ...], options: tuple[str, ...] | None = None) -> float:
  """The mean, over the people left out in turn, of min(1, how many of the others said so / 3).

  Args:
    answer: what was answered, or None.
    answers: what people said, ten of them in the set; each counts as often as it is listed.
    options: ignored.

  Returns:
    In [0, 1].  With fewer than four answers none can get 1, and with a single one all get 0: nobody else is left.

  Source: Antol et al. 2015 (VQA), eq. in section 4, averaged over leave-one-out sets as the VQA and TextVQA
  challenges score; the normalisation is that of their servers, see `vqa_normal`.
  """
  del options
  if answer is None or not answers:
    return 0.0
  said = collections.Counter(map(vqa_normal, answers))[vqa_normal(answer)]
  n = len(answers)
  return (said * min(1.0, (said - 1) / _PEOPLE) + (n - said) * min(1.0, said / _PEOPLE)) / n if said else 0.0


@functools.lru_cache(1 << 14)  # ten people say much the same
def vqa_normal(text: str) -> str:
  """The form in which the VQA challenges compare answers.

  Lower case without commas and question marks, and with "'s" apart from its word; a punctuation mark is dropped
  everywhere if it is beside a blank anywhere, and else becomes a blank; full stops are dropped except before a digit;
  number words up to ten become digits, articles are dropped, and missing apostrophes put back.

  Args:
    text: any answer.
  """
  text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
  text = text.replace("\n", " ").replace("\t", " ").strip()
  out = text
  for mark in _PUNCTUATION:
    out = out.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
  words = _FULL_STOP.sub("", out).split()
  words = [_DIGITS.get(word, word) for word in words]
  return " ".join(_SPELT_OUT.get(word, word) for word in words if word not in _ARTICLES)


def _similarity(answer: str, accepted: str) -> float:
  longest = max(len(answer), len(accepted))
  if not longest:
    return 1.0
  a, b = (" ".join(text.lower().split()) for text in (answer, accepted))
  # The distance is at least the difference in length: texts that cannot count are not compared, however long they are.
  if abs(len(a) - len(b)) > (1 - ANLS_LEAST) * longest:
    return 0.0
  return 1 - _distance(a, b) / longest


def _distance(a: str, b: str) -> int:
  """Levenshtein's: insertions, deletions and replacements."""
  row = list(range(len(b) + 1))
  for i, char in enumerate(a, start=1):
    before, row[0] = row[0], i
    for j, other in enumerate(b, start=1):
      before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (char != other))
  return row[-1]
