"""Numbers with units, and lists."""

import time

import hypothesis
import hypothesis.strategies as st
import pytest

from virl_jax.data import answers
from virl_jax.data import quantity


@pytest.mark.parametrize("answer, accepted", [
    ("1.5 km", "1500 m"), ("1500 meters", "1.5km"), ("three", "3"), ("3 dogs", "3"), ("3 percent", "3%"),
    ("50 per cent", "50%"), ("$5.00", "5 dollars"), ("-$5", "$-5"), ("\u22125", "-5"), ("12 inches", "1 ft"),
    ("6'", "6 feet"), ("5 lb", "5 pounds"), ("20 \u2103", "20 degrees celsius"), ("1,234", "1234"),
    ("2.5 million", "2,500,000"), ("$5 million", "5000000 dollars"), (".5", "0.50"), ("90 min", "1.5 hours"),
    ("250 ml", "0.25 liters"), ("50 cents", "$0.5"), ("3 KM", "3 km"), ("5 apples", "5 apples"), ("Twelve", "12")])
def test_the_same_quantity(answer, accepted):
  assert quantity.number(answer, (accepted,)) == 1.0


@pytest.mark.parametrize("answer, accepted", [
    ("3 million", "3"), ("3%", "3"), ("3", "3%"), ("3 km", "3"), ("3", "3 km"), ("3 km", "3 kg"),
    ("5 apples", "5 pears"),
    ("3 or 4", "3"), ("3 4", "3"), ("about 3", "3"), ("-3", "3"), ("3", "4"), ("nan", "nan"), ("infinity", "infinity"),
    ("", "3"), (None, "3"), ("many", "3"), ("1,00", "100"), ("1e3", "1000"), ("$5", "5 euros"), ("20 \u2103", "20 F"),
    ("3" * 80, "3" * 80)])
def test_other_quantities(answer, accepted):
  assert quantity.number(answer, (accepted,)) == 0.0


@pytest.mark.parametrize("match, answer, right", [
    ("number:2%", "102", True), ("number:2%", "98 ", True), ("number:2%", "102.1", False), ("number:2%", "-100", False),
    ("number:0.5", "100.5", True), ("number:0.5", "99.4", False), ("number:0", "100", True),
    ("number:0", "100.1", False), ("number", "100.0", True)])
def test_what_may_be_off(match, answer, right):
  assert answers.rule(match)(answer, ("100",)) == float(right)
  assert answers.rule(match)(answer + " km", ("100 km",)) == float(right)


def test_a_tolerance_is_in_the_unit_of_the_accepted_answer():
  assert answers.rule("number:0.5")("1400 m", ("1 km",)) == 1.0
  assert answers.rule("number:0.5")("1600 m", ("1 km",)) == 0.0
  assert answers.rule("number:10%")("-95", ("-100", "7")) == 1.0, "of the size, and of any of several"


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(st.decimals(-10**6, 10**6, places=3), st.sampled_from(["m", "kg", "%", "$", ""]))
def test_a_number_is_itself_and_no_other(value, unit):
  assert quantity.number(f"{value} {unit}", (f"{value}{unit}",)) == 1.0
  assert quantity.number(f"{value + 1} {unit}", (f"{value}{unit}",)) == 0.0


@pytest.mark.parametrize("answer, accepted, score", [
    ("red, green and blue", "blue, red, green", 1), ("red; green\nblue", "red, green, & blue", 1),
    ("- red\n- green", "red, green", 1), ("1. red\n2. green", "green and red", 1), ("1,000, 2,000", "2000; 1000", 1),
    ("red", "red, green", 1 / 2), ("red, green, blue, pink", "red, green, blue", 3 / 4),
    ("a cat, dogs", "cat; dog", 1 / 2),
    ("red, red", "red, green", 1 / 2), ("red, red", "red", 1 / 2), ("salt and pepper", "salt", 1 / 2),
    ("red green", "red, green", 0), ("", "red", 0), (None, "red", 0), (", ,", "red", 0)])
def test_lists(answer, accepted, score):
  assert quantity.items(answer, (accepted,)) == pytest.approx(score)


def test_the_best_of_several_lists_counts():
  assert quantity.items("a1, b2", ("c3", "a1, b2, d4", "a1")) == pytest.approx(2 / 3)


def test_naming_everything_wins_nothing_and_takes_no_time():
  began = time.perf_counter()
  assert quantity.items(", ".join(f"w{i}" for i in range(20000)), ("w1, w2",)) == 0.0
  assert quantity.number("1" * 10**6, ("1",)) == quantity.number(" " * 10**6 + "$" * 10**5, ("1",)) == 0.0
  assert time.perf_counter() - began < 3.0
