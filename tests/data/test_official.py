"""Scores that benchmarks have defined, against slow readings of their definitions."""

import time

import hypothesis
import hypothesis.strategies as st
import pytest

from virl_jax.data import answers
from virl_jax.data import official


@pytest.mark.parametrize("answer, accepted, score", [
    ("cat", ("cat",), 1), ("CAT", ("cat",), 1), ("cats", ("cat",), 3 / 4), ("bat", ("cat", "bad"), 2 / 3),
    ("ab", ("ac",), 1 / 2),  # exactly one half counts
    ("abc", ("axy",), 0), ("", ("",), 1), ("", ("a",), 0), (None, ("a",), 0), ("a", (), 0),
    ("new  york", ("new york",), 1), ("$3,700", ("3,700", "$3,700"), 1),
    # Blanks do not count in the distance, and do in the length: 1 - 1/8 rather than 1 - 1/4.
    ("cats    ", ("cat",), 7 / 8)])
def test_anls(answer, accepted, score):
  assert official.anls(answer, accepted) == pytest.approx(score)


def test_blanks_win_nothing_as_a_reward():
  padded = "x" + " " * 1000
  assert official.anls(padded, ("cat",)) > 0.99, "the challenge's script takes it"
  assert answers.rule("anls")(padded, ("cat",)) == 0.0
  assert answers.rule("anls")(" Cat  s ", ("cats",)) == pytest.approx(4 / 5)


def _edits(a, b):
  """The edit distance, by the recursion that defines it."""
  table = {}
  for i in range(len(a) + 1):
    for j in range(len(b) + 1):
      table[i, j] = max(i, j) if not i or not j else min(
          table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
  return table[len(a), len(b)]


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.text("abAB  ", max_size=9), st.lists(st.text("abAB  ", max_size=9), min_size=1, max_size=3))
def test_anls_is_what_its_definition_says(answer, accepted):
  def score(one):
    longest = max(len(answer), len(one))
    a, b = (" ".join(t.strip().lower().split()) for t in (answer, one))
    return 1 - (_edits(a, b) / longest if longest else 0.0)
  best = max(map(score, accepted))
  assert official.anls(answer, tuple(accepted)) == pytest.approx(best if best >= 0.5 else 0.0)


@pytest.mark.parametrize("said, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_what_people_said(said, score):
  """If one in ten says so, nine of the leave-one-out sets have it once, and count 1/3; the tenth does not have it."""
  assert official.vqa("red", ("Red.",) * said + ("blue",) * (10 - said)) == pytest.approx(score)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.sampled_from("abc"), st.lists(st.sampled_from("abcd"), min_size=1, max_size=22))
def test_vqa_is_the_mean_over_leaving_one_out(answer, people):
  """Also with other numbers than ten: the first release has 6 to 22 answers."""
  each = [min(1.0, sum(other == answer for other in people[:i] + people[i + 1:]) / 3) for i in range(len(people))]
  assert official.vqa(answer, tuple(people)) == pytest.approx(sum(each) / len(each) if answer in people else 0.0)


@pytest.mark.parametrize("text, normal", [
    ("The Cat", "cat"), (" bowmore ", "bowmore"), ("two dogs", "2 dogs"), ("none", "0"), ("10,000", "10000"),
    ("dont", "don't"), ("don't", "don't"), ("couldntve", "couldntve"), ("couldnt've", "couldn't've"),
    ("What's up?", "what 's up"), ("3-4", "3 4"), ("a-b c", "b c"), ("well- known", "well known"),
    ("Hello, World!", "hello world"), ("3.5.", "3.5"), ("e.g. this", "eg this"), ("a\nb", "b"), ("$5.00", "$5.00"),
    ("yes; no", "yes no"), ("yes;no", "yes no"), ("(x)", "x"), ("", "")])
def test_vqa_s_normal_form(text, normal):
  assert official.vqa_normal(text) == normal


def test_long_answers_take_no_time():
  began = time.perf_counter()
  assert official.anls("a b" * 10**6, ("cat",)) == official.vqa("?-" * 10**6, ("cat",) * 10) == 0.0
  assert time.perf_counter() - began < 3.0
