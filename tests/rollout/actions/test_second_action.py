"""A second visual action, defined in this file: rolled out, scored, trained on and drawn beside the zoom."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rollout import test_engine
from virl_jax import types
from virl_jax.data import answers
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.learner import pooled
from virl_jax.learner import state as state_lib
from virl_jax.learner import step as step_lib
from virl_jax.model import patches
from virl_jax.model import sharding
from virl_jax.report import gallery
from virl_jax.report import html
from virl_jax.report import trajectory
from virl_jax.rl import credit
from virl_jax.rollout import engine
from virl_jax.rollout import pack
from virl_jax.rollout import turns
from virl_jax.rollout.actions import table
from virl_jax.rollout.actions import zoom

# --- the action: tells the mean colour of a region in words ------------------------------------------------------

NAME = "mean_colour_tool"


@dataclasses.dataclass(frozen=True)
class Asked:
  box: tuple[float, ...]
  chars: tuple[int, int]
  name: str = NAME


def schema(cfg):
  return {"type": "function", "function": {"name": NAME, "parameters": zoom.schema(cfg)["function"]["parameters"]}}


def parse(arguments, text, chars):
  asked = zoom.parse(arguments, text, chars)
  return asked if isinstance(asked, str) else Asked(asked.box, chars)


def carry_out(policy, row, asked):
  shown, grid = row.traj.images[0], policy.model.vision.grid
  region = zoom.check(asked.box, shown.region, patches.shown_wh(shown, grid), policy.image)
  if isinstance(region, str):
    return region
  rgb = np.asarray(row.picture.crop(tuple(map(round, region)))).mean((0, 1)).astype(int).tolist()
  return types.Observation(text=f"rgb {rgb}", region=region, written=asked.box, chars={"call": asked.chars})


# --- a policy that takes both -------------------------------------------------------------------------------------


class Dialect(prompt.Codec):
  """The tiny base knows only one tool: here a call that follows a thought is given the other one's name."""

  def decode(self, ids):
    text = super().decode(ids)
    return text.replace(zoom.NAME, NAME) if text.startswith("<think>") else text


@pytest.fixture(scope="module")
def played():
  """A policy with both actions, its parameters, and what it did on questions about two objects."""
  policy, params = test_engine.load(sharding.make(devices=jax.devices()[:1]))
  codec = Dialect(policy.codec.tokenizer, policy.codec.image_token, policy.codec.eos, 10 ** 6)
  policy = dataclasses.replace(policy, codec=codec, actions={**table.ACTIONS, NAME: sys.modules[__name__]})
  found = engine.rollout(policy, params, test_engine.draw_tasks(4, "pair_pattern"), jax.random.key(3), group_size=4)
  answers.grade(found)
  return policy, params, found


def took(found, name):
  """Each turn that took an action, with the turn that came back."""
  return [(t, turn, back) for t in found for turn, back in zip(t.turns, t.turns[1:]) if turn.action == name]


def test_both_are_carried_out(played):
  policy, _, found = played
  assert len(took(found, zoom.NAME)) >= 8 and len(took(found, NAME)) >= 4
  for t, turn, back in took(found, zoom.NAME):
    assert t.images[back.image_index].region.x1 <= turn.region.x1 and prompt.IMAGE[:10] in back.text
  for _, turn, back in took(found, NAME):
    assert back.image_index is None and "rgb [" in back.text and "image_pad" not in back.text
    call = policy.codec.decode(turn.ids[slice(*turn.spans["call"])])
    assert call.startswith("<tool_call>") and call.endswith("</tool_call>") and turn.region is not None
  assert all(len(t.images) == 1 + sum(turn.action == zoom.NAME for turn in t.turns) for t in found)


def test_both_stand_in_the_system_turn_and_a_third_is_refused(played):
  policy = played[0]
  text = prompt.render("Which?", None, prompt.Config(), policy.actions)
  assert f'"{zoom.NAME}"' in text and f'"{NAME}"' in text
  call = prompt.call_text({"name": "third", "arguments": {}})
  assert prompt.parse(call, policy.actions).message == f"the tools are {zoom.NAME}, {NAME}"
  assert prompt.parse(call).message == f"the only tool is {zoom.NAME}"


@pytest.mark.parametrize("scope", credit.SCOPES)
def test_both_are_scored_and_trained_on(played, scope):
  policy, params, found = played
  cfg = state_lib.Config(policy.model, 4, credit=credit.Config(scope=scope), single_update=True)
  padding = pack.Config(policy.model.vision.grid, policy.model.image_token, 3, 32, 8, scope=scope)
  batch = jax.tree.map(jnp.asarray, pack.pack(found, padding))
  for b, t in enumerate(found):
    assert batch.box_mask_BR[b].sum() == len(t.regions) == sum(turn.action is not None for turn in t.turns)
    credited = np.asarray(batch.action_BT[b] >= 0)
    if scope != "turn" and t.regions:
      assert 0 < credited.sum() < sum(len(turn.ids) for turn in t.turns if turn.action)
  state = state_lib.init(jax.tree.map(jnp.copy, params), cfg.optim)
  scored, metrics = step_lib.score_step(state, None, batch, cfg)
  line = pooled.merge([metrics])
  assert line["rationale_count"] == np.mean([len(t.regions) for t in found]) and line["mean_iou"] > 0
  assert (np.asarray(scored.class_BR) != credit.NONE).sum() == sum(len(t.regions) for t in found)
  if scope == "turn":  # the update is the same program for every scope
    state, metrics = step_lib.update_step(state, scored, cfg)
    assert np.isfinite(pooled.merge([metrics])["loss/total"]) and int(state.update) == 1


def test_both_are_drawn(played):
  _, _, found = played
  t = next(t for t in found if {turn.action for turn in t.turns} >= {zoom.NAME, NAME})
  k = len(t.regions)
  item = gallery.entry(t, images.decode(t.task.image), [0.5] * k, ["correct"] * k, [1.0] * k, 1.0, 1.0, None)
  page = html.render(html.Run("both", kept=[("x", [item])]))
  assert NAME in page and "rgb [" in page
  shown = trajectory.view(item, lambda uri: uri)
  zooms = sum(turn.action == zoom.NAME for turn in t.turns)
  assert len(shown["drawn"]) == k and sum(turn["crop"] is not None for turn in shown["turns"]) == zooms


def test_an_action_about_no_region_is_not_judged(played):
  policy = played[0]
  asked = turns.begin(policy, test_engine.draw_tasks(1)[0]).row(0)
  away = dataclasses.replace(policy, actions={zoom.NAME: zoom, NAME: NoRegion})
  ids = policy.codec.encode("<think>hm</think>" + prompt.call_text(zoom.call((1, 1, 40, 40))) + prompt.END)
  assert turns.hear(away, asked, ids, np.zeros(len(ids), np.float32))
  reply = turns.read(away, asked)
  assert reply.image is None and asked.traj.turns[0].action == NAME and not asked.traj.regions


class NoRegion:
  """An action about nothing in particular."""

  NAME, schema, parse = NAME, schema, staticmethod(parse)

  @staticmethod
  def carry_out(policy, row, asked):
    return types.Observation(text="<|im_end|> nothing")
