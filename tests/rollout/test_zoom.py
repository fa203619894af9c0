"""The zoom loop, with the tiny base that ships."""

import dataclasses

import jax
import numpy as np
import pytest

from virl_jax import config as config_lib
from virl_jax import mesh as mesh_lib
from virl_jax import setup_run
from virl_jax import types
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.data.sources import needle
from virl_jax.learner import step as step_lib
from virl_jax.model import weights
from virl_jax.rollout import pack
from virl_jax.rollout import zoom


@pytest.fixture(scope="module")
def base():
  """A policy of one device, its parameters, and a padding rule."""
  c = config_lib.default()
  folder = setup_run.model_dir("@tiny")
  cfg, params = weights.load_hf(folder)
  import transformers
  codec = prompt.Codec(transformers.AutoTokenizer.from_pretrained(folder), cfg.image_token, cfg.eos)
  image = images.Config(max_pixels=84 * 84, crop_min_pixels=1568, crop_max_pixels=3136)
  policy = zoom.Policy(cfg, codec, prompt.Config(c.prompt.system, False, False), image,
                       zoom.Config(3, 32, 256, 1.0, 32), mesh_lib.make(devices=jax.devices()[:1]))
  return policy, params, pack.Config(cfg.vision.grid, cfg.image_token, 3, 32, 8)


def _tasks(n, family="pattern"):
  cfg = needle.Config(families=(family,))
  return [needle.draw(5, "zoom", i, cfg)[0] for i in range(n)]


def test_trajectories_are_whole(base):
  policy, params, _ = base
  tasks = _tasks(4, "pair_pattern")
  got = zoom.rollout(policy, params, tasks, jax.random.key(0), group_size=2)
  assert [t.uid for t in got] == list(range(8))
  assert [t.task.uid for t in got] == [t.uid for t in tasks for _ in range(2)]
  assert any(t.boxes for t in got), "the base zooms"
  for t in got:
    assert isinstance(t.stop, types.StopReason)
    assert len(t.images) == 1 + len(t.boxes)
    placeholders = [int(np.prod(images.merged_hw(im, policy.model.vision.grid))) for im in t.images]
    assert (t.ids == policy.model.image_token).sum() == sum(placeholders)
    assert [turn.role for turn in t.turns][::2] == ["assistant"] * len(t.turns[::2])
    for turn in t.turns:
      if turn.role == "assistant":
        assert len(turn.ids) == len(turn.logp) and not np.isin(turn.ids, policy.model.banned).any()
        assert (turn.logp <= 0).all()
      else:
        assert turn.logp is None
    for im, box in zip(t.images[1:], t.boxes):
      assert im.region.x1 <= box.x1 and box.x2 <= im.region.x2, "the crop holds the box"


def test_sampled_logps_are_the_learners(base):
  policy, params, padding = base
  got = zoom.rollout(policy, params, _tasks(4), jax.random.key(1), group_size=2, temperature=0.7)
  batch = jax.tree.map(jax.numpy.asarray, pack.pack(got, padding))
  logp, _ = step_lib.logp_entropy(params, step_lib.Config(policy.model, 2, temperature=0.7), batch)
  mask = np.asarray(batch.sampled_BT)
  np.testing.assert_allclose(np.asarray(logp)[mask], batch.logp_sampler_BT[mask], atol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours(base):
  policy, params, _ = base
  tasks = _tasks(4)
  key = jax.random.key(2)
  together = zoom.rollout(policy, params, tasks, key)
  other = zoom.rollout(policy, params, [tasks[0], *_tasks(3, "pair_pattern")], key)
  np.testing.assert_array_equal(together[0].ids, other[0].ids)
  assert any(not np.array_equal(a.ids, b.ids) for a, b in zip(together[1:], other[1:]))


def test_the_step_key_changes_samples_and_greedy_ignores_it(base):
  policy, params, _ = base
  tasks = _tasks(4)
  a, b = (zoom.rollout(policy, params, tasks, jax.random.key(k)) for k in (3, 4))
  assert any(not np.array_equal(x.ids, y.ids) for x, y in zip(a, b))
  a, b = (zoom.rollout(policy, params, tasks, jax.random.key(k), temperature=0.0) for k in (3, 4))
  assert all(np.array_equal(x.ids, y.ids) for x, y in zip(a, b))


def _row(policy, task):
  row = zoom._prompt(policy, task)
  row.traj = dataclasses.replace(row.traj, uid=0)
  return row


def _say(policy, row, text, turn=0, end=True):
  ids = policy.codec.encode(text + (prompt.END if end else ""))
  return zoom._take_turn(policy, row, ids, np.zeros(len(ids), np.float32), turn)


def test_turns_are_read_as_the_protocol_says(base):
  policy = base[0]
  task = _tasks(1)[0]
  row = _row(policy, task)
  assert _say(policy, row, prompt.answer_text(task.answers[0])) is None
  assert row.traj.stop == types.StopReason.ANSWERED and row.traj.correct

  row = _row(policy, task)
  ids, crops = _say(policy, row, prompt.call_text((10, 12, 40, 48)))
  assert row.traj.stop is None and len(crops) == 1 and ids[0] == policy.codec.eos
  assert row.traj.boxes == [types.Box(30, 36, 120, 144)], "shown at a third of the size"

  row = _row(policy, task)
  ids, crops = _say(policy, row, prompt.call_text((40, 12, 10, 48)))
  assert row.traj.stop is None and not crops and not row.traj.boxes
  assert "x1 < x2" in row.traj.turns[0].error and "Error: bbox_2d" in row.traj.turns[1].text

  row = _row(policy, task)
  assert _say(policy, row, prompt.call_text((10, 12, 40, 48)), turn=policy.rollout.max_rounds) is None
  assert row.traj.stop == types.StopReason.OUT_OF_ROUNDS and not row.traj.boxes

  row = _row(policy, task)
  assert _say(policy, row, "hm") is None and row.traj.stop == types.StopReason.MALFORMED

  row = _row(policy, task)
  assert _say(policy, row, prompt.answer_text("rows"), end=False) is None
  assert row.traj.stop == types.StopReason.OVERLONG

  short = dataclasses.replace(policy, rollout=dataclasses.replace(policy.rollout, max_total_tokens=90))
  row = _row(short, task)
  assert _say(short, row, prompt.call_text((10, 12, 40, 48))) is None
  assert row.traj.stop == types.StopReason.OVERLONG


def test_errors_name_the_thing(base):
  policy, params, _ = base
  with pytest.raises(ValueError, match="tasks must not be empty"):
    zoom.rollout(policy, params, [], jax.random.key(0))
  with pytest.raises(ValueError, match="image must be a decodable file"):
    zoom.rollout(policy, params, [dataclasses.replace(_tasks(1)[0], image=b"no")], jax.random.key(0))
  tight = dataclasses.replace(policy, rollout=dataclasses.replace(policy.rollout, max_total_tokens=64))
  with pytest.raises(ValueError, match="leave room for a turn"):
    zoom.rollout(tight, params, [dataclasses.replace(_tasks(1)[0], question="why " * 40)], jax.random.key(0))
