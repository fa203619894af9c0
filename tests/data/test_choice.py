"""Answers that pick an option, or say yes or no."""

import hypothesis
import hypothesis.strategies as st
import pytest

from virl_jax.data import answers
from virl_jax.data import choice

OPTIONS = ("dog", "cat", "parking meter", "house")


@pytest.mark.parametrize("answer, named", [
    ("B", "B"), ("(B)", "B"), ("B.", "B"), ("b", "B"), ("b)", "B"), ("(b) x", "B"), ("c) x", "C"), ("**B** cat", "B"),
    ("**B.** cat", "B"), ("{B}", "B"), ("$B$", "B"), ("`B`", "B"), (" B\nbecause it is", "B"), ("B: the cat", "B"),
    ("B cat", "B"), ("B The dog is there", "B"), ("B, the cat", "B"), ("A. whatever it says", "A"), ("A dog", "A"),
    ("The answer is B.", "B"), ("So the correct answer is: (C) parking", "C"), ("Answer: D", "D"), ("option B", "B"),
    ("My final answer is option D", "D"),
    # Without a separate letter the text counts, and only if it is that of an option.
    ("cat", "B"), ("A cat.", "B"), ("The answer is a cat", "B"), ("The dog", "A"), ("Parking meter", "C"),
    ("A dog is there", ""), ("I see B", ""), ("Because", ""), ("A, B", ""), ("A and B", ""), ("B or C", ""),
    ("B/C", ""), ("A B", ""), ("(A) and (B)", ""), ("a, b and c", ""), ("AB", ""), ("E", ""), ("E.", ""), ("I.", ""),
    ("None of the options provided (A, B, C, D) match", ""), ("A-frame", ""), ("B's", ""), ("2", ""), ("", ""),
    ("cats", ""), ("a dog and a cat", "")])
def test_which_option_an_answer_names(answer, named):
  right = [choice.option(answer, (text,), OPTIONS) for text in OPTIONS]
  assert right == [float("ABCD"[i] == named) for i in range(4)], right


def test_where_letter_and_text_disagree_the_letter_counts_and_the_strict_rule_takes_neither():
  said = "B. parking meter"
  assert choice.option(said, ("cat",), OPTIONS) == 1.0
  assert not choice.option(said, ("parking meter",), OPTIONS)
  assert not answers.matches(said, ("cat",), OPTIONS) and not answers.matches(said, ("parking meter",), OPTIONS)


def test_without_options_nothing_can_be_picked():
  assert choice.option("A", ("A",)) == choice.option(None, ("cat",), OPTIONS) == 0.0


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.text("ABCabc .,:()*\n'andor", max_size=12))
def test_no_answer_names_two_options(answer):
  assert sum(choice.option(answer, (text,), OPTIONS) for text in OPTIONS) <= 1


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.text(max_size=30))
def test_whatever_the_strict_rule_takes_is_taken_here_unless_a_letter_says_otherwise(answer):
  for text in OPTIONS:
    if answers.matches(answer, (text,), OPTIONS):
      assert choice.option(answer, (text,), OPTIONS) == 1.0


@pytest.mark.parametrize("answer, said", [
    ("yes", "yes"), ("Yes.", "yes"), ("YES, there is a dog", "yes"), ("**No**", "no"), ("No, there is none", "no"),
    ("no", "no"), ("\u201cYes\u201d", "yes"), ("There is no dog", None), ("Yes and no", None), ("No, yes", None),
    ("Not sure", None), ("none", None), ("yesterday", None), ("", None), (None, None)])
def test_yes_and_no(answer, said):
  assert [choice.yes_no(answer, (word,)) for word in ("yes", "No")] == [float(said == "yes"), float(said == "no")]


def test_yes_and_no_of_tasks_that_want_neither_or_both():
  assert choice.yes_no("yes", ("red",)) == choice.yes_no("yes", ("yes", "no")) == choice.yes_no("yes", ()) == 0.0
  assert choice.yes_no("yes", ("yes", "Yes.")) == 1.0
  assert choice.yes_no("B", ("no",), ("yes", "no")) == 1.0


def test_options_whose_texts_look_like_something_else():
  options = ("option 3", "answer: 7", "B", "A house")
  assert [choice.option(text, (text,), options) for text in options] == [1.0, 1.0, 0.0, 1.0], "a letter comes first"
  assert choice.option("C", ("B",), options) == choice.option("B", ("answer: 7",), options) == 1.0
