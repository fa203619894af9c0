"""The reports of a trajectory are true, and listening to them changes nothing."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.asking import played
from tests.rollout import test_engine
from virl_jax import types
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.model import patches
from virl_jax.model import sharding
from virl_jax.rollout import engine
from virl_jax.rollout import told
from virl_jax.rollout.actions import zoom


@pytest.fixture(scope="module")
def policy():
  return played.policy()


def task(**how):
  return types.Task("t", images.decode(played.picture()), "Which?", **how)


def listen(policy, *said, **how):
  events = []
  return played.Played(policy, said, **how)(task(), events.append), events


@pytest.mark.parametrize("pieces", [1, 2, 7, 60])
def test_the_words_of_each_turn_are_told_once(policy, pieces):
  traj, events = listen(policy, *played.TURNS, pieces=pieces)
  said = [t for t in traj.turns if t.role == "assistant"]
  assert len(said) == 4
  for number, turn in enumerate(said):
    told_text = "".join(e.text for e in events if isinstance(e, told.Said) and e.turn == number)
    assert told_text == turn.text.removesuffix(prompt.END), "a character of several tokens too"


def test_in_which_order_what_is_told(policy):
  traj, events = listen(policy, *played.TURNS, pieces=1)
  assert [type(e).__name__ for e in events] == [
      "Began", "Said", "Looked", "Said", "Refused", "Said", "Looked", "Said", "Ended"]
  began, looked, refused, ended = events[0], events[2], events[4], events[-1]
  assert began.picture.size == (252, 168) and began.shown == (84, 56)
  shown = traj.images[1]
  assert looked.action == zoom.NAME and looked.region == types.Box(30, 36, 120, 144) == traj.regions[0]
  assert looked.cut == shown.region and looked.crop.size == (90, 108)
  assert looked.shown == patches.shown_wh(shown, policy.model.vision.grid) and looked.text == ""
  assert refused == told.Refused(1, "bbox_2d must have x1 < x2 and y1 < y2") and traj.turns[2].error == refused.error
  assert ended == told.Ended(types.StopReason.ANSWERED, traj.answer, None)


def test_the_notice_with_the_last_look_is_told(policy):
  policy = dataclasses.replace(policy, rollout=dataclasses.replace(policy.rollout, max_rounds=1))
  _, events = listen(policy, played.CALL, played.CALL, pieces=1)
  assert events[2].text == policy.prompt.last_notice
  assert events[-1] == told.Ended(types.StopReason.OUT_OF_ROUNDS, None, None)


def test_how_a_bad_turn_ends(policy):
  _, events = listen(policy, "nothing of use", pieces=1)
  assert events[-1] == told.Ended(types.StopReason.MALFORMED, None, "a turn must hold a tool call or an answer")


def test_the_engine_samples_the_same_and_stops_when_nobody_listens():
  policy, params = test_engine.load(sharding.make(devices=jax.devices()[:1]), slots=1, segment_tokens=8)
  tasks, key, events = test_engine.draw_tasks(1), jax.random.key(0), []
  want, stats = engine.run(policy, params, tasks, key, temperature=0.0)
  got, _ = engine.run(policy, params, tasks, key, temperature=0.0, protocol=told.Protocol(events.append))
  np.testing.assert_array_equal(want[0].ids, got[0].ids)
  assert [e.region for e in events if isinstance(e, told.Looked)] == want[0].regions
  assert isinstance(events[-1], told.Ended) and sum(isinstance(e, told.Said) for e in events) >= 3 > 0 < stats.steps

  class Gone(Exception):
    pass

  for kind in (told.Began, told.Said, told.Looked, told.Ended):  # raised in different threads

    def tell(event, kind=kind):
      if isinstance(event, kind):
        raise Gone

    with pytest.raises(Gone):
      engine.run(policy, params, tasks, key, temperature=0.0, protocol=told.Protocol(tell))
