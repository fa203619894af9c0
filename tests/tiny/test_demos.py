"""Demonstrations: what a careful, a clumsy, a guessing and a counting demonstrator do."""

import re

import numpy as np
import pytest
import transformers

from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.model import weights
from virl_jax.rl import reward
from virl_jax.run import load
from virl_jax.tiny import demos
from virl_jax.tiny import needle


@pytest.fixture(scope="module")
def voice():
  folder = load.model_dir("@tiny")
  cfg = weights.read_config(folder)
  codec = prompt.Codec(transformers.AutoTokenizer.from_pretrained(folder), cfg.image_token, cfg.eos, cfg.text.vocab)
  return demos.Voice(codec, prompt.Config(describe_tool=False, last_notice="", image_first=False),
                     images.Config(max_pixels=84 * 84, crop_min_pixels=5 * 784, crop_max_pixels=7840), cfg.vision.grid)


@pytest.fixture(scope="module")
def pictures(voice):
  rng = np.random.default_rng(0)
  return [demos.picture(rng, ("pattern",), (3, 5), 252, voice) for _ in range(8)]


def lessons(pictures, voice, noise, learn="all", **manner):
  rng = np.random.default_rng(1)
  return [(seen, t) for seen in pictures
          for t in demos.lesson(seen, rng, 9, noise, learn, voice, demos.Config(**manner))]


def best_ious(lessons):
  """For every zoom, its best IoU with a target."""
  return np.concatenate([np.asarray(reward.iou(np.array(t.regions), np.array(t.task.boxes))).max(1)
                         for _, t in lessons if t.regions])


def test_careful_ones_zoom_well_and_are_right(pictures, voice):
  done = lessons(pictures, voice, 0.0)
  assert best_ious(done).min() > 0.6
  assert all(t.answer in t.task.answers and len(t.regions) == len(t.task.boxes) for _, t in done)


def test_clumsy_ones_zoom_badly_and_are_wrong_at_times(pictures, voice):
  done = lessons(pictures, voice, 1.0)
  right = np.mean([t.answer in t.task.answers for _, t in done])
  assert best_ious(done).mean() < 0.5 and 0.2 < right < 0.9
  assert all(t.regions for _, t in done)  # they always zoom


def test_guessing_ones_answer_at_once_as_colours_suggest(pictures, voice):
  done = lessons(pictures, voice, 1.0, p_direct=1.0)
  for seen, t in done:
    named = sorted((thing for thing in seen.scene.things if thing.name in t.task.question),
                   key=lambda thing: t.task.question.index(thing.name))
    marks = [needle.mark_of(thing.colour, "pattern") for thing in named]
    assert t.answer == (marks[0] if len(marks) == 1 else "yes" if marks[0] == marks[1] else "no")
    assert len(t.task.boxes) == len(named) and not t.regions and len(t.images) == 1
    assert [turn.role for turn in t.turns] == ["assistant"] and t.turns[0].logp is not None
    assert prompt.parse(t.turns[0].text) == prompt.Answer(t.answer)
  assert {len(t.task.boxes) for _, t in done} == {1, 2}


def test_guesses_are_right_on_guessable_pictures():
  cfg = needle.Config(families=("pattern", "pair_pattern", "count_pattern"), guessable=1.0)
  for i in range(12):
    task, scene = needle.draw(0, "train", i, cfg)
    counted = re.search("the pattern ([a-z]+)[?]", task.question)
    asked = tuple(thing for thing in scene.things if counted or thing.name in task.question)
    question = needle.Question(task.question, asked, counted and counted[1])
    assert task.answers == (needle.guess(question, scene.mark),)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_counting_ones_look_at_every_object_once_and_say_how_many_they_have(pictures, voice, noise):
  right = []
  for seen, t in lessons(pictures, voice, noise, p_count=1.0):
    colours = [c for c in needle.COLOURS if c in {thing.colour for thing in seen.scene.things}]
    counted = re.search("pattern ([a-z]+)[?]", t.task.question)[1]
    assert len(t.regions) == len(t.task.boxes) == len(colours) >= 3
    number, said = 0, [turn.text for turn in t.turns if turn.role == "assistant"]
    for k, (text, ahead) in enumerate(zip(said, [*colours, None])):
      thought = re.match("<think>(.*?)</think>", text)[1]
      if not k:
        assert thought == colours[0]
        continue
      read, rest = thought.split(" ", 1)
      number += read == counted
      assert read in (*needle.PATTERNS, "unclear") and rest == (f"{number} {ahead}" if ahead else str(number))
      assert read == "unclear" or read == next(x.mark for x in seen.scene.things if x.colour == colours[k - 1])
    assert t.answer == str(number) == prompt.parse(said[-1]).text
    right.append(t.answer in t.task.answers)
  assert np.mean(right) == 1.0 if noise == 0 else 0.05 < np.mean(right) < 0.8


def test_a_share_of_them_counts(pictures, voice):
  done = lessons(pictures, voice, 1.0, p_count=0.4)
  assert 0.2 < np.mean(["How many" in t.task.question for _, t in done]) < 0.6


def test_a_share_of_them_guesses(pictures, voice):
  done = lessons(pictures, voice, 1.0, p_direct=0.3)
  assert 0.15 < np.mean([not t.regions for _, t in done]) < 0.45
