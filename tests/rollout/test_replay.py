"""Scripts replayed: the same trajectories as rollouts, boxes in the policy's frame, and scripts that can't be one."""

import dataclasses

import jax
import numpy as np
from PIL import Image
import pytest

from virl_jax import types
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.data.recorded import script
from virl_jax.model import sharding
from virl_jax.rollout import replay
from virl_jax.rollout import turns
from virl_jax.rollout.actions import zoom

# Shown at a third of its size.
TASK = types.Task("t", Image.new("RGB", (252, 252), "grey"), "Which pattern?", ("rows",), (types.Box(0, 0, 60, 60),))


@pytest.fixture(scope="module")
def policy(tiny):
  codec = prompt.Codec(tiny.tokenizer, tiny.cfg.image_token, tiny.cfg.eos, tiny.cfg.text.vocab)
  image = images.Config(max_pixels=84 * 84, crop_min_pixels=1568, crop_max_pixels=3136)
  return turns.Policy(tiny.cfg, codec, prompt.Config("You help.", False, False), image,
                      turns.Config(3, 48, 400, 1.0), sharding.make(devices=jax.devices()[:1]))


def change(policy, **sections):
  return dataclasses.replace(policy, **{k: dataclasses.replace(getattr(policy, k), **v) for k, v in sections.items()})


def play(policy, *said):
  return replay.replay(policy, script.Script(TASK, said))


ANSWER = script.Answer("", "rows")


@pytest.mark.parametrize("box, frame", [
    ((30, 36, 120, 144), "original"), ((10, 12, 40, 48), "shown"),
    ((30 / 252, 36 / 252, 120 / 252, 144 / 252), "share"), ((119.05, 142.86, 476.19, 571.43), "thousandths")])
def test_boxes_come_into_the_frame_that_the_policy_speaks(policy, box, frame):
  traj = play(policy, script.Look("hm", box, frame), ANSWER)
  said, told, last = traj.turns
  assert said.written == (10, 12, 40, 48) and said.region == types.Box(30, 36, 120, 144)
  assert policy.codec.decode(said.ids) == prompt.call_text(zoom.call((10, 12, 40, 48)), "hm") + prompt.END
  assert told.logp is None and told.image_index == 1 and traj.images[1].region == said.region
  assert (traj.stop, traj.answer, traj.correct) == (types.StopReason.ANSWERED, "rows", True)
  assert [t.logp is not None for t in traj.turns] == [True, False, True] and not np.concatenate(
      [said.logp, last.logp]).any()


def test_a_box_of_a_crop_is_one_of_the_original(policy):
  """The right half of the crop of (60, 60, 180, 120), as a box of the picture, or of the crop if that is allowed."""
  looks = script.Look("", (60, 60, 180, 120), "original"), script.Look("", (0.5, 0, 1.5, 1), "share", 1)
  (*_, told), (*_, of_crop) = (
      [t for t in play(p, *looks, ANSWER).turns if t.region is not None]
      for p in (policy, change(policy, prompt={"zoom_into_crops": True})))
  assert told.region == types.Box(120, 60, 180, 120) and told.written == (40, 20, 60, 40) and told.of_image == 0
  assert of_crop.region == types.Box(120, 60, 180, 120) and of_crop.of_image == 1


def test_what_reaches_over_the_edge_is_cut_and_what_is_thin_has_a_pixel(policy):
  assert play(policy, script.Look("", (-30, 30, 90, 500), "original"), ANSWER).turns[0].written == (0, 10, 30, 84)
  small = change(policy, image={"crop_min_side_px": 1})
  assert play(small, script.Look("", (100, 100, 101, 101), "original"), ANSWER).turns[0].written == (33, 33, 34, 34)


def test_sampled_ids_are_kept_and_others_are_made_of_the_text(policy):
  text = prompt.answer_text("rows", "rows") + prompt.END
  ids = policy.codec.encode(text)
  # The same text in other tokens: a sampler may have written it letter by letter.
  slow = np.concatenate([policy.codec.encode(letter) for letter in text.removesuffix(prompt.END)] + [ids[-1:]])
  assert len(slow) > len(ids) and policy.codec.decode(slow) == text
  for given, wanted in ((slow, slow), (None, ids), (ids[:-1], ids), ([10 ** 6], ids), (ids[::-1], ids)):
    given = None if given is None else tuple(int(i) for i in given)
    assert play(policy, script.Verbatim(text, given)).turns[0].ids.tolist() == wanted.tolist()
  looked_at = script.Verbatim(prompt.call_text(zoom.call((10, 12, 40, 48))), None, False)
  traj = play(policy, looked_at, script.Verbatim(text))
  assert [t.logp is not None for t in traj.turns] == [False, False, True]


FAR = script.Look("", (300, 0, 400, 100), "original")
NEAR = script.Look("", (0, 0, 100, 100), "original")


@pytest.mark.parametrize("said, change_of, reason", [
    ((FAR, ANSWER), {}, "its box is empty, or outside its image"),
    ((script.Look("", (0.5, 0.5, 0.2, 0.9), "share"), ANSWER), {}, "its box is empty, or outside its image"),
    ((script.Look("", (0, 0, 1, 1), "share", 1), ANSWER), {}, "its box names an unknown image"),
    ((script.Look("", (0, 0, 3, 3), "original"), ANSWER), {}, "its call can't be carried out"),
    ((NEAR,), {}, "no answer"), ((ANSWER, ANSWER), {}, "it goes on after its answer"),
    ((NEAR, NEAR, NEAR, NEAR, ANSWER), {}, "more zooms than rollout.max_rounds"),
    ((script.Answer("word " * 60, "rows"),), {}, "too long"),
    ((script.Answer("<|image_pad|>", "rows"), ), {}, None),
    ((script.Verbatim("<|image_pad|><answer>rows</answer>"),), {}, "a turn holds an image's placeholder"),
    ((script.Verbatim("Hm."),), {}, "a turn neither calls nor answers"),
    ((NEAR, ANSWER), {"rollout": {"max_turn_tokens": 28, "max_total_tokens": 58}}, "too long"),
    ((ANSWER,), {"rollout": {"max_total_tokens": 60}}, "its prompt is too long")])
def test_what_cannot_be_a_rollout_cannot_be_learned(policy, said, change_of, reason):
  policy = change(policy, **change_of)
  if reason is None:
    assert play(policy, *said).answer == "rows", "what is only written like a placeholder is none"
    return
  with pytest.raises(script.Unusable) as refused:
    play(policy, *said)
  assert refused.value.reason == reason


def test_an_image_that_cannot_be_read(policy, tmp_path):
  (tmp_path / "a.png").write_bytes(b"no picture")
  task = dataclasses.replace(TASK, image=str(tmp_path / "a.png"))
  with pytest.raises(script.Unusable) as refused:
    replay.replay(policy, script.Script(task, (ANSWER,)))
  assert refused.value.reason == "no readable image" and "a.png" in refused.value.detail
