"""What counts as the same answer, what must not, and hostile input."""

import json
import pathlib
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from virl_jax import types
from virl_jax.data import answers

REAL = pathlib.Path(__file__).parents[2].parent / "shared" / "realdata" / "native"
OPTIONS = ("dog", "cat", "parking meter")


@pytest.mark.parametrize("text, expected", [
    ("Cat", "cat"), ("  a\tred \n car. ", "red car"), ("The the cat", "cat"), ("\u201cA cat!\u201d", "cat"),
    ("\uff23\uff21\uff34", "cat"), ("caf\u0065\u0301", "caf\u00e9"), ("stra\u00dfe", "strasse"),
    ("**cat**", "cat"), ("`cat`", "cat"), ("\u200bcat\ufeff", "cat"), ("the \"cat\"", "cat"),
    ("another", "another"), ("theatre", "theatre"), ("an", "an"), ("A", "a"), ("a b", "a b"), ("?!", "?!"),
    ("C++", "c++"), ("$5", "$5"), ("(-.5)", "-.5"), ("...5", "5"), ("\u22123", "-3"), ("item -5", "item -5"),
    ("", ""), (" \n", "")])
def test_normalize(text, expected):
  assert answers.normalize(text) == expected


@pytest.mark.parametrize("answer, accepted", [
    ("bird", ("bird",)), ("A Bird.", ("cow", "bird")), ("3", ("3.0",)), ("1000", ("1,000",)),
    ("three", ("3",)), ("12", ("Twelve",)), ("zero", ("0",)), ("-3", ("\u22123.0",)), (".5", ("0.50",)),
    ("+4", ("4",)), ("007", ("7",)), ("1,234,567.50", ("1234567.5",)), ("Yes.", ("yes",)), ("nan", ("NaN",)),
    ("?", ("?",)), ("don\u2019t know", ("don't know",)), ("\u2018cat\u2019", ("cat",)),
    ("well\u2010known", ("well-known",)),
    ("well\u2011known", ("well\u2013known",)), ("$1,000", ("$1000",)), ("1,000 km", ("1000 km",)),
    ("about 1,234,567 people", ("about 1234567 people",)), ("\uff11\uff10", ("10",)),
    ("\uff11,\uff10\uff10\uff10 km", ("1000 km",)),
    ("$5.00", ("$5",)), ("-$5", ("$-5.0",)), ("50 %", ("50%",)), ("50.0%", ("50\uff05",)), ("c#", ("C#",)),
    ("20 \u2103", ("20\u00b0C",)), ("5\u00bd", ("5 1/2",)), ("6\u2032", ("6'",)), ("5\u2033", ("5''",)),
    ("'6'", ("6",)), ("*cat*", ("cat",)), ("***cat***", ("cat",)),
    ("__cat__", ("cat",)), ("a **red** car", ("a red car",)), ("* cat", ("cat",)), ("2*3*4", ("2*3*4",)),
    ("## Cat", ("cat",)), ("- cat", ("cat",)), ("\u2014cat\u2014", ("cat",))])
def test_free_answers_that_match(answer, accepted):
  assert answers.matches(answer, accepted)


@pytest.mark.parametrize("answer, accepted", [
    (None, ("cat",)), ("", ("",)), (" ", ("cat", " ")), ("cat", ()), ("cats", ("cat",)),
    ("cat and dog", ("cat",)), ("the answer is cat", ("cat",)), ("a b", ("b",)), ("?", ("!",)), ("$", ("5",)),
    ("3", ("-3",)), (".5", ("5",)), ("31", ("3.1",)), ("10", ("1,0",)), ("1,00", ("100",)),
    ("1e3", ("1000",)), ("inf", ("infinity",)), ("thirteen", ("13",)), ("3 4", ("34",)),
    ("C#", ("C",)), ("C", ("C#",)), ("50%", ("50",)), ("50", ("50%",)), ("50%", ("$50",)), ("\u20135", ("5",)),
    ("5", ("\u20105",)), ("#1", ("1",)), ("O-", ("O",)), ("O", ("O\u2212",)), ("A*", ("A",)),
    ("2*3*4", ("234",)), ("a_b_c", ("abc",)), ("*B", ("B",)), ("6'", ("6",)),
    ("6'", ('6"',)), ("10\u00b2", ("102",)), ("5\u00bd", ("51/2",)), ("-x", ("x",)), ("3.10 beta", ("3.1 beta",)),
    ("1,00 km", ("100 km",)), ("12,3456 km", ("123456 km",)), ("\u2030", ("%",)),
    ("5" * 100, ("5" * 99 + "6",)), ("10", ("10" + "0" * 30,))])
def test_free_answers_that_do_not_match(answer, accepted):
  assert not answers.matches(answer, accepted)


@pytest.mark.parametrize("accepted", [("cat",), ("B",), ("(b)",), ("horse", "a Cat.")])
@pytest.mark.parametrize("answer", [
    "**B)** cat", "**B.** The cat", "**B**: cat", "*B) cat*", "B) **cat**", "- B", "## B", "__B__",
    "B", "(B)", "B.", "b", "[B]", "**B**", "B)", " B:\n", "\uff22", "B) cat", "(B) The cat.", "B. cat",
    "b: CAT", "cat", "A cat"])
def test_answers_that_name_the_right_option(answer, accepted):
  assert answers.matches(answer, accepted, OPTIONS)


@pytest.mark.parametrize("accepted", [("cat",), ("B",), ("(b)",), ("horse", "a Cat.")])
@pytest.mark.parametrize("answer", [
    "A", "(C)", "D", "Z.", "2", "dog", "A dog", "A cat is there", "A dog is there", "I see a cat", "Because",
    "B) dog", "A) cat", "B or C", "A B", "A, B", "B, C", "AB", "A. dog B. cat", "", None])
def test_answers_that_name_another_option_or_none(answer, accepted):
  assert not answers.matches(answer, accepted, OPTIONS)


def test_a_letter_means_the_option_and_not_the_word():
  assert not answers.matches("A dog is there", ("dog",), OPTIONS)
  assert not answers.matches("A", ("B",), OPTIONS)
  assert answers.matches("parking meter", ("C",), OPTIONS)
  assert answers.matches("E. coli", ("E. coli",), ("E. coli", "yeast"))
  assert answers.matches("two", ("2",), ("2", "3")) and answers.matches("A", ("two",), ("2", "3"))


def test_options_that_are_letters_themselves():
  options = ("B", "A", "C")  # which letter is painted on the door?
  assert answers.matches("A", ("B",), options)  # accepted answers are first taken for texts, a policy's for a letter
  assert not answers.matches("B", ("B",), options)
  assert not answers.matches("A B", ("B",), options)


def test_equal_options_are_equally_right():
  assert [answers.matches(letter, ("cat",), ("cat", "dog", "cat")) for letter in "ABC"] == [True, False, True]


@pytest.mark.parametrize("options", [
    ("C", "C#", "F"), ("cat", "Cat", "CAT"), ("mW", "MW", "kW"), ("5", "-5", "5.0"), ("50", "50%", "50.0"),
    ("a dog", "the dog", "dog."), ("O", "O-", "O+"), ("6", "6'", '6"'), ("3", "three", "3.0"),
    ("10\u00b2", "102", "10"), ("don't", "don\u2019t", "do"), ("x", "-x", "\u2212x"), ("$5", "5", "$5.00")])
def test_options_that_normal_forms_confuse_are_told_apart(options):
  """The accepted text is one option, and only that option's letter, text, or both are right."""
  for i, accepted in enumerate(options):
    assert answers.right((accepted,), options) == {i}
    for j, text in enumerate(options):
      letter = "ABC"[j]
      assert answers.matches(letter, (accepted,), options) == (i == j), (accepted, letter)
      assert answers.matches(f"{letter}) {text}", (accepted,), options) == (i == j), (accepted, letter, text)
      if text.lower() not in "abc":  # a letter means the option with that letter
        assert answers.matches(f" {text} ", (accepted,), options) == (i == j), (accepted, text)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.lists(st.text("aAbB1,.#%'-\u2019 \u00b2*($", min_size=1, max_size=4).filter(str.strip), min_size=1,
                           max_size=5))
def test_each_option_s_own_text_names_it_and_no_other(options):
  for i, text in enumerate(options):
    found = answers.right((text,), tuple(options))
    assert i in found and {" ".join(options[j].split()) for j in found} == {" ".join(text.split())}


def test_a_text_that_several_options_may_be_is_none_of_them():
  assert answers.right(("CAT",), ("cat", "Cat")) == answers.right(("cat.",), ("Cat", "CAT")) == set()
  assert not answers.matches("CAT", ("cat",), ("cat", "Cat"))
  assert answers.matches("A) CAT", ("cat",), ("cat", "Cat")), "the letter says which"
  assert not answers.matches("A) Cat", ("cat",), ("cat", "Cat")), "letter and text disagree"
  assert answers.right(("CAT",), ("cat", "dog")) == {0}
  assert answers.right(("B", "horse"), ("cat", "dog")) == {1}
  assert answers.right(("C",), ("cat", "dog")) == answers.right((), ("cat", "dog")) == set()


def test_an_answer_that_is_no_option_is_never_right():
  assert not answers.matches("cow", ("cow",), OPTIONS)
  assert not answers.matches("B", (), OPTIONS)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.text(max_size=40), st.text(max_size=40))
def test_matching_is_symmetric_and_reflexive(a, b):
  assert answers.matches(a, (b,)) == answers.matches(b, (a,))
  assert answers.matches(a, (a,)) == bool(answers.normalize(a))


@pytest.mark.parametrize("unit", [
    "a", "!", "a ", "the \"", "\ud800", "\u0301\u0323", "1", "1,111", "(", "\ufdfa", "a)", " \t", "\0", "-.",
    "B) "])
def test_hostile_text_is_only_wrong_and_soon_done(unit):
  text = "a" + unit * (100_000 // len(unit))
  started = time.perf_counter()
  assert not answers.matches(text, ("cat", "1"))
  assert not answers.matches(text, ("cat",), OPTIONS)
  assert answers.matches(text, (text,))
  assert time.perf_counter() - started < 3.0  # composing the marks alone would take ten


def test_trajectories_are_graded_by_the_rule_that_their_task_names(monkeypatch):
  def played(answer, **task):
    return types.Trajectory(types.Task("t", b"", "?", ("red",), **task), 0, np.zeros(1, np.int32), answer=answer)

  monkeypatch.setitem(answers.RULES, "shouted", lambda answer, accepted, options: answer == accepted[0].upper())
  found = [played("Red."), played("blue"), played(None), played("A", options=("red", "blue")),
           played("RED", match="shouted"), played("red", match="shouted")]
  assert all(t.correct is None for t in found), "nobody has looked yet"
  answers.grade(found)
  assert [t.correct for t in found] == [True, False, False, True, True, False]
  with pytest.raises(ValueError, match="task t: match must be one of exact, options, .*, shouted. Received: 'fuzzy'"):
    answers.grade([played("x", match="fuzzy")])


def test_a_rule_that_gives_a_score_says_how_much_the_answer_is_worth():
  def played(answer, accepted, match):
    return types.Trajectory(types.Task("t", b"", "?", accepted, match=match), 0, np.zeros(1, np.int32), answer=answer)

  people = ("red",) * 2 + ("blue",) * 8
  found = [played("red", people, "vqa"), played("blue", people, "vqa"), played("colour", ("color",), "anls"),
           played("red", ("red, blue, green",), "list"), played("Red.", ("red",), "exact"), played(None, people, "vqa")]
  assert all(t.score is None for t in found)
  answers.grade(found)
  assert [t.score for t in found] == [pytest.approx(0.6), 1.0, pytest.approx(5 / 6), pytest.approx(1 / 3), 1.0, 0.0]
  assert [t.correct for t in found] == [True, True, True, False, True, False], "from RIGHT on"
  assert [t.worth for t in found] == [t.score for t in found]
  by_hand = types.Trajectory(found[0].task, 0, np.zeros(1, np.int32), correct=True)
  assert by_hand.worth == 1.0, "where nobody gave a score"


@pytest.mark.parametrize("match", ["anls:0.5", "exact:", "number:", "number:two", "number:-1", "number:nan", ""])
def test_rules_that_there_are_not(match):
  with pytest.raises(ValueError, match="match must be one of|tolerance must be such as"):
    answers.grade([types.Trajectory(types.Task("t", b"", "?", ("1",), match=match), 0, np.zeros(1, np.int32))])


def test_what_can_be_had_of_a_task():
  assert answers.attainable("exact", ("cat",)) == 1.0 and answers.attainable("exact", ()) == 0.0
  assert answers.attainable("options", ("cow",), OPTIONS) == answers.attainable("options", ("cat",)) == 0.0
  assert answers.attainable("yes_no", ("perhaps",)) == answers.attainable("number", ("many",)) == 0.0
  for match in ("exact", "options"):
    assert answers.attainable(match, ("B",), ("B", "A", "C")) == 1.0, "a text that looks like another's letter"
  assert answers.attainable("vqa", ("one person's",)) == 0.0, "of one person, none of the others said so"
  assert answers.attainable("vqa", ("red",) * 3 + ("blue",) * 7) == 1.0
  assert answers.attainable("vqa", ("red",) * 10) == answers.attainable("number:1%", ("3 km",)) == 1.0


def test_blanks_are_not_paid():
  """The challenge's own script pays for them: it divides by the raw length."""
  assert answers.rule("anls")("x" + " " * 1000, ("cat",)) == 0.0 and answers.rule("anls")(" cat ", ("cat",)) == 1.0


def test_a_judge_is_asked_about_what_the_rule_refuses_and_takes_nothing_away():
  people = ("red",) * 1 + ("blue",) * 9
  said = [("exact", ("red",), "red"), ("exact", ("red",), "crimson"), ("vqa", people, "red"), ("exact", ("a",), "b"),
          ("exact", ("red",), "blue")]
  found = [types.Trajectory(types.Task("t", b"", "?", accepted, match=match), i, np.zeros(1, np.int32), answer=answer)
           for i, (match, accepted, answer) in enumerate(said)]
  asked = []
  answers.grade(found, lambda wrong: asked.extend(wrong) or [1.0, 0.0, None, 0.25])
  assert [t.index for t in asked] == [1, 2, 3, 4]
  assert [(t.score, t.correct) for t in found] == [
      (1.0, True), (1.0, True), (pytest.approx(0.3), False), (0.0, False), (0.25, False)]
  calls = []
  answers.grade(found[:1], lambda wrong: calls.append(wrong) or [])
  answers.grade([], lambda wrong: calls.append(wrong) or [])
  assert calls == [[], []], "processes judge together, with nothing of their own too"


@pytest.mark.skipif(not REAL.exists(), reason=f"no real records at {REAL}")
def test_options_of_real_records_are_told_apart():
  """V* records have the right option first, and name it by its text; each option matches itself and no other."""
  records = json.loads((REAL / "vstar" / "annotation_vstar.json").read_text())
  assert len(records) == 96
  for record in records:
    options = tuple(record["options"])
    assert [answers.right((text,), options) for text in options] == [{i} for i in range(len(options))], options
