"""Rules and the band: each reason by itself, and what does not depend on the order of tasks."""

import dataclasses
import random

import pytest

from tests.data.curation.test_facts import photo
from virl_jax.data.curation import band
from virl_jax.data.curation import facts
from virl_jax.data.curation import rules


def fact(number: int = 0, picture: int | None = None, **fields) -> facts.Facts:
  picture = number if picture is None else picture
  return facts.Facts(**{
      "provenance": f"{number:032x}", "uid": f"u{number}", "source": "s", "kind": "k", "question": f"what is {number}?",
      "image": picture, "answer_type": "text", "question_type": "what", "answer_chars": 3, "attainable": True,
      "n_boxes": 1, "coverage": 0.1, "least_box_px": 500.0, "look": facts.look(photo(picture, (64, 48)))} | fields)


@pytest.mark.parametrize("fields, reason", [
    ({}, None), ({"problem": "cut off", "look": None}, "unusable picture"), ({"n_boxes": 0}, "no box"),
    ({"n_boxes": 9}, "too many boxes"), ({"box_problem": "has no area"}, "box that cannot be zoomed into"),
    ({"least_box_px": 35.0}, "box too small as shown"), ({"coverage": 0.01}, "boxes cover too little"),
    ({"coverage": 0.31}, "boxes cover too much"), ({"coverage": 0.3}, None),
    ({"coverage": 1.0}, "boxes cover too much"),
    ({"answer_type": "none"}, "kind of answer"), ({"answer_chars": 81}, "answer too long"),
    ({"question": "x" * 601}, "question too long"), ({"attainable": False}, "answer that its rule refuses")])
def test_each_rule(fields, reason):
  found = rules.alone(fact(**fields), rules.Config(least_coverage=0.02))
  assert (found and found.reason) == reason
  assert found is None or reason in rules.ALONE


def test_tasks_without_boxes_can_be_kept():
  assert rules.alone(fact(n_boxes=0, coverage=0.0, least_box_px=0.0), rules.Config(need_boxes=False)) is None


def test_the_whole_picture_can_be_kept():
  keep = rules.Config(keep_whole=True)
  assert rules.alone(fact(coverage=0.95), keep) is None and keep.is_whole(fact(coverage=0.95))
  assert rules.alone(fact(coverage=0.6), keep).reason == "boxes cover too much", "neither small nor whole"
  assert not rules.Config().is_whole(fact(coverage=1.0))


def together(tasks, benchmarks=(), seed=0, **cfg):
  """Reasons by uid."""
  found = rules.together(tasks, benchmarks, rules.Config(**cfg), seed)
  return {tasks[i].uid: drop.reason for i, drop in found.items()}


def test_near_duplicates_need_picture_and_question():
  base = fact(0, question="What colour is the small cat on the left side of the red mat there?")
  same = fact(1, 0, question="what COLOUR is the small cat on the left side of the red mat there")
  other_picture = fact(2, 2, question=base.question)
  other_question = fact(3, 0, question="What colour is the dog?")
  again = fact(4, 4, question=base.question, look=facts.look(photo(0, (50, 40))))
  found = together([base, same, other_picture, other_question, again])
  assert set(found.values()) == {"near-duplicate"} and len(found) == 2 and set(found) < {"u0", "u1", "u4"}
  assert together([base, same], question_similarity=1.0) == together([base, same]) != {}


def test_what_stays_does_not_depend_on_the_order():
  tasks = [fact(i, i % 5, question=f"what is {i // 10}?") for i in range(40)]
  want = together(tasks, caps=("s=7",), per_picture=2)
  assert set(want.values()) == {"near-duplicate", "too many on one picture", "over its source's cap"}
  for seed in range(3):
    mixed = random.Random(seed).sample(tasks, len(tasks))
    assert together(mixed, caps=("s=7",), per_picture=2) == want
  assert together(tasks, caps=("s=7",), per_picture=2, seed=1) != want


def test_caps_are_per_source():
  tasks = [fact(i, source="a" if i % 2 else "b=c") for i in range(10)]
  found = together(tasks, caps=("b=c=2", "a=4", "other=0"))
  kept = [t.source for t in tasks if t.uid not in found]
  assert sorted(kept) == ["a"] * 4 + ["b=c"] * 2


def test_no_task_is_on_a_benchmarks_picture():
  tasks = [fact(i) for i in range(6)] + [fact(6, 2, question="something else?")]
  leaks = [(name, facts.look(photo(*which))) for name, *which in (
      ("vstar", 2, (100, 80)), ("pope", 99), ("pope", 99, (90, 70)), ("pope", 4))]  # one of them twice
  found = rules.together(tasks, leaks, rules.Config(), 0)
  assert {tasks[i].uid: drop.detail for i, drop in found.items()} == {"u2": "vstar", "u6": "vstar", "u4": "pope"}
  assert {drop.reason for drop in found.values()} == {"on a benchmark's picture"}


def test_nothing_is_nothing():
  assert rules.together([], [], rules.Config(), 0) == {}


@pytest.mark.parametrize("with_zoom, without, reason", [
    ([1, 0, 1, 0], [0, 0], None), ([1, 0, 1, 0], [1, 0], None), ([1, 0, 1, 0], [1, 1], "solved without zooming"),
    ([0] * 4, [0, 0], "never solved"), ([1] * 4, [0, 0], "always solved"), ([0.4] * 4, [], "never solved"),
    ([0.5, 0, 0, 0], [], None), ([1] + [0] * 19, [], "too hard"), ([0] + [1] * 19, [], "too easy"),
    ([], [1, 1], "solved without zooming"), ([], [0, 0], None), ([], [], None), ([1] * 4, [1] * 4,
                                                                              "solved without zooming")])
def test_the_band(with_zoom, without, reason):
  found = band.judge(with_zoom, without, band.Config())
  assert (found and found.reason) == reason and (found is None or reason in band.REASONS)


def test_a_whole_picture_may_be_solved_without_zooming():
  assert band.judge([1, 0], [1, 1], band.Config(), whole=True) is None
  assert band.judge([0, 0], [1, 1], band.Config(), whole=True).reason == "never solved"


def test_the_band_can_be_left_open():
  everything = band.Config(most_without=1.0, least_pass=0.0, most_pass=1.0)
  assert band.judge([0, 0], [1], everything) is None and band.judge([1, 1], [1], everything) is None


@pytest.mark.parametrize("wrong", [{"least_coverage": 0.5}, {"caps": ("gqa",)}, {"caps": ("=3",)}, {"answer_types": ()},
                                   {"answer_types": ("words",)}, {"hash_distance": 17}])
def test_thresholds_are_checked(wrong):
  with pytest.raises(ValueError, match=f"config.curate.rules.{next(iter(wrong))} must be"):
    rules.Config(**wrong)
  with pytest.raises(ValueError, match="config.curate.filter.least_pass must be at most"):
    dataclasses.replace(band.Config(), least_pass=0.95)
