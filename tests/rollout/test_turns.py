"""What a turn leads to: zooms, answers, errors, budgets."""

import dataclasses
import threading

import jax
import numpy as np
from PIL import Image
import pytest

from virl_jax import types
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.model import patches
from virl_jax.model import sharding
from virl_jax.rollout import turns
from virl_jax.rollout.actions import zoom

TASK = types.Task("t", Image.new("RGB", (252, 252), "grey"), "Which pattern?", ("rows",), (types.Box(0, 0, 60, 60),))


@pytest.fixture(scope="module")
def policy(tiny):
  codec = prompt.Codec(tiny.tokenizer, tiny.cfg.image_token, tiny.cfg.eos, tiny.cfg.text.vocab)
  image = images.Config(max_pixels=84 * 84, crop_min_pixels=1568, crop_max_pixels=3136)
  return turns.Policy(tiny.cfg, codec, prompt.Config("You help.", False, False), image,
                      turns.Config(3, 32, 256, 1.0), sharding.make(devices=jax.devices()[:1]))


def change(policy, **sections):
  """The policy with fields of its sections changed."""
  return dataclasses.replace(policy, **{k: dataclasses.replace(getattr(policy, k), **v) for k, v in sections.items()})


def begin(policy, task=TASK):
  row = turns.begin(policy, task).row(0)
  row.next_pos = row.filled  # tokens and positions are the same here
  return row


def say(policy, row, text, end=prompt.END):
  ids = policy.codec.encode(text + end)
  over = turns.hear(policy, row, ids, np.zeros(len(ids), np.float32))
  return turns.read(policy, row) if over or not end else None


CALL = prompt.call_text(zoom.call((10, 12, 40, 48)))


def test_an_answer_ends_it(policy):
  row = begin(policy)
  assert say(policy, row, prompt.answer_text("rows")) is None
  assert row.traj.stop == types.StopReason.ANSWERED and row.traj.answer == "rows"
  assert row.traj.correct is None, "judging is not rolling out"


def test_a_zoom_brings_a_crop(policy):
  row = begin(policy)
  before = row.filled
  reply = say(policy, row, CALL)
  said = row.traj.turns[0].ids
  assert row.traj.stop is None and row.turn == 1 and reply.ids[0] == policy.codec.end
  assert reply.start == before + len(said) - 1, "all but the end of turn is in the cache"
  assert reply.pos_XT[:, 0].tolist() == [before + len(said) - 1] * 3
  assert row.traj.regions == [types.Box(30, 36, 120, 144)], "shown at a third of the size"
  assert (reply.ids == policy.model.image_token).sum() == patches.vision_tokens(reply.image, policy.model.vision.grid)


@pytest.mark.parametrize("thought", ["", "<think>the left one, \u00e9\u4e2d\U0001f600</think>",
                                     '<think>"bbox_2d": [10, 10, 40, 40], I think</think>'])
def test_which_tokens_hold_the_call_and_the_box(policy, thought):
  row = begin(policy)
  say(policy, row, thought + prompt.call_text(zoom.call((10, 10, 40, 40))))
  said, codec = row.traj.turns[0], policy.codec
  (a, b), (c, d) = said.spans["call"], said.spans["box"]
  assert 0 <= a < c < d < b <= len(said.ids) and (a == 0) == (not thought)
  call, numbers = codec.decode(said.ids[a:b]), codec.decode(said.ids[c:d])
  assert call.startswith("<tool_call>") and call.endswith("</tool_call>")
  # A token may reach over either end, but there are no more tokens than needed.
  assert "[10, 10, 40, 40]" in numbers
  assert "[10, 10, 40, 40]" not in codec.decode(said.ids[c + 1:d])
  assert "[10, 10, 40, 40]" not in codec.decode(said.ids[c:d - 1])


def test_a_bad_box_is_told(policy):
  row = begin(policy)
  reply = say(policy, row, prompt.call_text(zoom.call((40, 12, 10, 48))))
  assert row.traj.stop is None and reply.image is None and not row.traj.regions
  assert "x1 < x2" in row.traj.turns[0].error and "Error: bbox_2d" in row.traj.turns[1].text
  row = begin(policy)
  assert "one tool call a turn" in (say(policy, row, CALL + CALL) and row.traj.turns[0].error)


def test_what_is_no_call_is_no_refused_call(policy):
  row = begin(policy)
  say(policy, row, CALL)
  assert row.traj.refused == 0 and row.traj.turns[0].called and not row.traj.turns[1].called
  say(policy, row, prompt.call_text(zoom.call((40, 12, 10, 48))))
  assert row.traj.refused == 1
  say(policy, row, "hm")  # malformed, but no call
  assert row.traj.turns[-1].error and row.traj.refused == 1 and row.traj.stop == types.StopReason.MALFORMED
  row = begin(policy)
  say(policy, row, "<tool_call>{not json}</tool_call>")
  assert row.traj.refused == 1
  row = begin(policy)
  say(policy, row, prompt.answer_text("rows"))
  assert row.traj.refused == 0 and not row.traj.turns[0].called


def test_ends_without_an_answer(policy):
  row = begin(policy)
  assert say(policy, row, "hm") is None and row.traj.stop == types.StopReason.MALFORMED
  row = begin(policy)
  assert say(policy, row, prompt.answer_text("rows"), end="") is None
  assert row.traj.stop == types.StopReason.OVERLONG
  row = begin(policy)
  row.turn = policy.rollout.max_rounds
  assert say(policy, row, CALL) is None
  assert row.traj.stop == types.StopReason.OUT_OF_ROUNDS and not row.traj.regions


def test_token_budgets(policy):
  row = begin(policy)
  assert turns.left(policy, row) == 32
  row.ids = [np.zeros(30, np.int32)]
  assert turns.left(policy, row) == 2
  row.ids, row.filled = [], 250
  assert turns.left(policy, row) == 6, "what is left of the whole"
  tight = change(policy, rollout={"max_total_tokens": 50})
  row = begin(policy)
  assert say(tight, row, CALL) is None and row.traj.stop == types.StopReason.OVERLONG and not row.traj.regions
  # A reply always leaves room for a token.
  for total in range(45, 80):
    p = change(policy, rollout={"max_total_tokens": total})
    row = begin(policy)
    reply = say(p, row, CALL)
    if reply is not None:
      row.filled = reply.start + len(reply.ids)
      assert turns.left(p, row) >= 1


def test_image_budgets(policy):
  two = change(policy, rollout={"max_images": 2})
  row = begin(two)
  assert say(two, row, CALL) is not None
  assert say(two, row, CALL) is None and row.traj.stop == types.StopReason.OVERLONG and len(row.traj.regions) == 1
  row = begin(policy)
  grid = policy.model.vision.grid
  shown = patches.vision_tokens(row.traj.images[0], grid)
  crop = patches.vision_tokens(say(policy, row, CALL).image, grid)
  exact = change(policy, rollout={"max_vision_tokens": shown + crop})
  row = begin(exact)
  assert say(exact, row, CALL) is not None
  assert say(exact, row, CALL) is None and row.traj.stop == types.StopReason.OVERLONG
  with pytest.raises(ValueError, match="must fit rollout.max_vision_tokens"):
    turns.begin(change(policy, rollout={"max_vision_tokens": shown - 1}), TASK)


def pictured(size, **task):
  return dataclasses.replace(TASK, image=Image.new("RGB", size, "grey"), **task)


@pytest.mark.parametrize("task, said", [
    (TASK, None), (pictured((3000, 5)), None), (pictured((1, 1)), None), (pictured((1, 20000)), None),
    (pictured((500, 400), question="Which one? " * 100), "its prompt must leave room for a turn: at most 224 tokens"),
    (pictured((84, 84), options=("a", "b " * 400)), "its prompt must leave room for a turn")])
def test_what_can_not_be_asked_is_known_before(policy, task, said):
  """`check` refuses exactly what `begin` refuses, with the same tokens, but without the pixels."""
  asked = []
  for found in (turns.check, turns.begin):
    try:
      found(policy, task)
      asked.append(None)
    except ValueError as e:
      asked.append(str(e).removeprefix("task t: "))
  assert asked[0] == asked[1] and (asked[0] is None if said is None else asked[0].startswith(said))
  exact = len(turns.begin(change(policy, rollout={"max_total_tokens": 4096}), task).reply.ids)
  for tokens, fits in ((exact, True), (exact - 1, False)):
    tight = change(policy, rollout={"max_total_tokens": tokens + 32})
    try:
      turns.check(tight, task)
      assert fits
    except ValueError:
      assert not fits


def test_an_image_beyond_its_budget_is_known_before(policy):
  shown = patches.vision_tokens(begin(policy).traj.images[0], policy.model.vision.grid)
  turns.check(change(policy, rollout={"max_vision_tokens": shown}), TASK)
  with pytest.raises(ValueError, match=f"^its image must fit rollout.max_vision_tokens = {shown - 1}; lower image.max"):
    turns.check(change(policy, rollout={"max_vision_tokens": shown - 1}), TASK)


def test_the_last_permitted_turn_is_told(policy):
  def told(**rollout):
    p = change(policy, prompt={"last_notice": "Answer now."}, rollout=rollout)
    row, found = begin(p), []
    while (reply := say(p, row, CALL)) is not None:
      found.append("Answer now." in p.codec.decode(reply.ids))
      row.filled = 0  # the budget of tokens must not matter here
    return found

  assert told() == [False, False, True]
  assert told(max_images=3) == [False, True]
  row, grid = begin(policy), policy.model.vision.grid
  spent = patches.vision_tokens(row.traj.images[0], grid) + patches.vision_tokens(say(policy, row, CALL).image, grid)
  assert told(max_vision_tokens=spent + 1) == [True]


def test_any_of_the_configured_ids_ends_a_turn(policy):
  """One that is not the chat template's stays, as sampled, and the template's own follows it."""
  codec, other = policy.codec, "<|endoftext|>"
  assert not turns.hear(policy, begin(policy), codec.encode(CALL + other), np.zeros(99, np.float32)), "not one of them"
  both = (codec.tokenizer.convert_tokens_to_ids(other), codec.end)
  more = prompt.Codec(codec.tokenizer, codec.image_token, both, policy.model.text.vocab)
  p = dataclasses.replace(policy, codec=more)
  replies = {}
  for end in (other, prompt.END):
    row = begin(p)
    before, reply = row.filled, say(p, row, CALL, end)
    said, told = row.traj.turns
    assert row.traj.stop is None and len(row.traj.regions) == 1
    assert said.text.endswith(end) and len(said.logp) == len(said.ids)
    assert reply.ids[0] == said.ids[-1] and reply.start == before + len(said.ids) - 1
    np.testing.assert_array_equal(reply.ids[1:], told.ids)
    replies[end] = reply.ids
    row = begin(p)
    assert say(p, row, prompt.answer_text("rows"), end) is None
    assert row.traj.stop == types.StopReason.ANSWERED and row.traj.answer == "rows"
  np.testing.assert_array_equal(replies[other][1:], replies[prompt.END])


def test_stop_strings_end_a_turn_and_drop_what_follows(policy):
  p = change(policy, rollout={"stop_strings": ("</tool_call>", "</answer>")})
  row = begin(p)
  before = row.filled
  ids = p.codec.encode(CALL + " and more")
  half = len(ids) // 2
  assert not turns.hear(p, row, ids[:half], np.zeros(half, np.float32))
  assert turns.hear(p, row, ids[half:], np.zeros(len(ids) - half, np.float32))
  reply = turns.read(p, row)
  said = row.traj.turns[0]
  assert said.text == CALL and len(said.logp) == len(said.ids)
  assert reply.start == before + len(said.ids), "all of it is in the cache"
  assert reply.ids[0] == p.codec.end, "the end of turn that the policy did not write"
  assert row.traj.turns[1].ids[0] == p.codec.end and row.traj.turns[1].logp is None, "carries no loss"
  row = begin(p)
  assert say(p, row, prompt.answer_text("rows") + "x", end="") is None
  assert row.traj.stop == types.StopReason.ANSWERED


def test_crops_can_be_zoomed_into(policy):
  call = CALL.replace('"arguments": {', '"arguments": {"target_image": 1, ')
  row = begin(policy)
  say(policy, row, CALL)
  say(policy, row, call)
  assert "only the first image" in row.traj.turns[2].error
  deep = change(policy, prompt={"zoom_into_crops": True})
  row = begin(deep)
  assert say(deep, row, call) is not None
  assert "below 1" in row.traj.turns[0].error
  say(deep, row, CALL)
  first = row.traj.images[1]
  say(deep, row, call.replace("[10, 12, 40, 48]", "[0, 0, 28, 28]"))
  assert row.traj.turns[4].of_image == 1
  w, h = patches.shown_wh(first, deep.model.vision.grid)
  want = images.to_original((0, 0, 28, 28), first.region, (w, h))
  assert row.traj.regions[1] == want, "in the original's pixels, for the reward"
  assert "target_image" in prompt.render("?", None, prompt.Config(zoom_into_crops=True))
  assert "target_image" not in prompt.render("?", None, prompt.Config())


def test_small_boxes_are_grown_or_refused(policy):
  tiny_call = prompt.call_text(zoom.call((10, 12, 12, 14)))
  limits = {"crop_min_side_px": 30}
  row = begin(policy)
  assert say(change(policy, image=limits), row, tiny_call).image is None and "too small" in row.traj.turns[0].error
  row = begin(policy)
  assert say(change(policy, image=limits | {"crop_expand": True}), row, tiny_call).image is not None
  assert row.traj.regions == [types.Box(30, 36, 36, 42)], "the reward judges what was asked for"
  assert row.traj.images[1].region == types.Box(18, 24, 48, 54)


def test_a_box_of_next_to_nothing_is_refused(policy):
  row = begin(policy)
  say(change(policy, image={"crop_expand": True}), row, prompt.call_text(zoom.call((1, 1, 1.0000000001, 40))))
  assert "too small" in row.traj.turns[0].error


def test_prompts_need_room(policy):
  tight = change(policy, rollout={"max_total_tokens": 64})
  with pytest.raises(ValueError, match="leave room for a turn"):
    turns.begin(tight, dataclasses.replace(TASK, question="why " * 40))
  with pytest.raises(ValueError, match="image must be a decodable file"):
    turns.begin(policy, dataclasses.replace(TASK, image=b"no"))


def test_threads_can_read_at_once(policy):
  wrong = []

  def work():
    try:
      for _ in range(30):
        assert say(policy, begin(policy), CALL) is not None
    except BaseException as e:
      wrong.append(e)

  threads = [threading.Thread(target=work) for _ in range(4)]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  assert not wrong
