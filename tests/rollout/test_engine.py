"""The engine with the tiny base, zooming."""

import dataclasses
import os
import pathlib
import pickle
import random
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from virl_jax import config as config_lib
from virl_jax import types
from virl_jax.data import answers
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.learner import microbatch
from virl_jax.learner import state as state_lib
from virl_jax.model import patches
from virl_jax.model import sharding
from virl_jax.model import weights
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.rollout import engine
from virl_jax.rollout import pack
from virl_jax.rollout import slots
from virl_jax.rollout import turns
from virl_jax.run import load as load_lib
from virl_jax.tiny import needle


def load(mesh, **how):
  """A policy on a mesh, and its parameters."""
  c = config_lib.default()
  folder = load_lib.model_dir("@tiny")
  cfg = weights.read_config(folder)
  _, params = weights.load_hf(folder, "float32", sharding.param_shardings(qwen.specs(cfg), mesh))
  import transformers
  codec = prompt.Codec(transformers.AutoTokenizer.from_pretrained(folder), cfg.image_token, cfg.eos, cfg.text.vocab)
  image = images.Config(max_pixels=84 * 84, crop_min_pixels=1568, crop_max_pixels=3136)
  wording = prompt.Config(c.prompt.system, False, False, last_notice="")
  return turns.Policy(cfg, codec, wording, image, turns.Config(3, 32, 256, 1.0), mesh,
                      slots.Config(pad_tokens=32, **how)), params


@pytest.fixture(scope="module")
def base():
  """A policy on one device, its parameters, and how to pad."""
  policy, params = load(sharding.make(devices=jax.devices()[:1]))
  return policy, params, pack.Config(policy.model.vision.grid, policy.model.image_token, 3, 32, 8)


def draw_tasks(n, family="pattern"):
  cfg = needle.Config(families=(family,))
  return [needle.draw(5, "zoom", i, cfg)[0] for i in range(n)]


def test_trajectories_are_whole(base):
  policy, params, _ = base
  tasks = draw_tasks(4, "pair_pattern")
  got = engine.rollout(policy, params, tasks, jax.random.key(0), group_size=2)
  assert [t.index for t in got] == list(range(8))
  assert [t.task.uid for t in got] == [t.uid for t in tasks for _ in range(2)]
  assert any(t.regions for t in got), "the base zooms"
  for t in got:
    assert isinstance(t.stop, types.StopReason)
    assert len(t.images) == 1 + len(t.regions)
    placeholders = [int(np.prod(patches.merged_hw(im, policy.model.vision.grid))) for im in t.images]
    assert (t.ids == policy.model.image_token).sum() == sum(placeholders)
    assert [turn.role for turn in t.turns][::2] == ["assistant"] * len(t.turns[::2])
    for turn in t.turns:
      if turn.role == "assistant":
        assert len(turn.ids) == len(turn.logp) and not np.isin(turn.ids, policy.model.banned).any()
        assert (turn.logp <= 0).all()
      else:
        assert turn.logp is None
    for im, box in zip(t.images[1:], t.regions):
      assert im.region.x1 <= box.x1 and box.x2 <= im.region.x2, "the crop holds the box"


def test_sampled_logps_are_the_learners(base):
  policy, params, padding = base
  got = engine.rollout(policy, params, draw_tasks(4), jax.random.key(1), group_size=2, temperature=0.7)
  answers.grade(got)
  batch = jax.tree.map(jax.numpy.asarray, pack.pack(got, padding))
  logp, _, _ = microbatch.outputs(params, state_lib.Config(policy.model, 2, temperature=0.7), batch)
  mask = np.asarray(batch.sampled_BT)
  np.testing.assert_allclose(np.asarray(logp)[mask], batch.logp_sampler_BT[mask], atol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours(base):
  policy, params, _ = base
  tasks = draw_tasks(4)
  key = jax.random.key(2)
  together = engine.rollout(policy, params, tasks, key)
  other = engine.rollout(policy, params, [tasks[0], *draw_tasks(3, "pair_pattern")], key)
  np.testing.assert_array_equal(together[0].ids, other[0].ids)
  assert any(not np.array_equal(a.ids, b.ids) for a, b in zip(together[1:], other[1:]))


def test_with_seeds_of_their_own_samples_do_not_depend_on_the_company(base):
  policy, params, _ = base
  tasks, key = draw_tasks(4), jax.random.key(2)
  some = engine.run(policy, params, tasks, key, seeds=[7, 2 ** 31 - 1, 9, 11])[0]
  others = engine.run(policy, params, [tasks[2], tasks[1], tasks[0], tasks[3]], key, seeds=[9, 2 ** 31 - 1, 8, 11])[0]
  assert [t.index for t in others] == [0, 1, 2, 3]
  for a, b in ((2, 0), (1, 1), (3, 3)):
    np.testing.assert_array_equal(some[a].ids, others[b].ids)
  assert not np.array_equal(some[0].ids, others[2].ids)


def test_the_step_key_changes_samples_and_greedy_ignores_it(base):
  policy, params, _ = base
  tasks = draw_tasks(4)
  a, b = (engine.rollout(policy, params, tasks, jax.random.key(k)) for k in (3, 4))
  assert any(not np.array_equal(x.ids, y.ids) for x, y in zip(a, b))
  a, b = (engine.rollout(policy, params, tasks, jax.random.key(k), temperature=0.0) for k in (3, 4))
  assert all(np.array_equal(x.ids, y.ids) for x, y in zip(a, b))


@pytest.mark.slow
def test_slots_do_not_matter(base):
  policy, params, _ = base
  tasks = draw_tasks(6) + draw_tasks(3, "pair_pattern")
  run = lambda **kw: engine.rollout(dataclasses.replace(policy, engine=dataclasses.replace(policy.engine, **kw)),
                                  params, tasks, jax.random.key(6), group_size=3)
  want = run(slots=64)
  for kw in ({"slots": 4}, {"slots": 16, "segment_tokens": 5}, {"slots": 1, "threads": 1}):
    for a, b in zip(want, run(**kw), strict=True):
      assert a.index == b.index and a.stop == b.stop
      np.testing.assert_array_equal(a.ids, b.ids, str((kw, a.index)))


def test_a_rollout_can_be_repeated_bit_for_bit(base):
  """However fast the threads are: otherwise a resumed run would not end like an uninterrupted one."""
  policy, params, _ = base
  policy = dataclasses.replace(policy, engine=dataclasses.replace(policy.engine, slots=6, segment_tokens=4))
  rng = random.Random(0)

  class Slow:
    begin, left, hear = turns.begin, turns.left, turns.hear

    @staticmethod
    def read(policy, row):
      time.sleep(rng.random() / 20)
      return turns.read(policy, row)

  runs = [engine.run(policy, params, draw_tasks(4), jax.random.key(9), 3, protocol=p) for p in (turns, Slow, Slow)]
  for got, stats in runs[1:]:
    assert (stats.steps, stats.appends, stats.slot_steps) == tuple(
        getattr(runs[0][1], k) for k in ("steps", "appends", "slot_steps"))
    for a, b in zip(runs[0][0], got, strict=True):
      for x, y in zip(a.turns, b.turns, strict=True):
        assert x.ids.tobytes() == y.ids.tobytes() and (x.logp is None or x.logp.tobytes() == y.logp.tobytes())


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
  """Each with its own rows and pictures, in lock-step, on a mesh of 2 x 2; together they sample what one does."""
  def run(processes):
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      port = s.getsockname()[1]
    files = [tmp_path / f"{processes}_{i}.pickle" for i in range(processes)]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    ps = [subprocess.Popen([sys.executable, "-m", "tests.rollout.lockstep", str(i), str(processes), str(port), str(f)],
                           cwd=pathlib.Path(__file__).parents[2], env=env, stderr=subprocess.PIPE)
          for i, f in enumerate(files)]
    try:
      for p in ps:
        _, err = p.communicate(timeout=400)
        assert p.returncode == 0, err.decode()[-3000:]
    finally:
      for p in ps:
        p.kill()
    return [pickle.loads(f.read_bytes()) for f in files]

  (whole,), halves = run(1), run(2)
  assert all(halves), "both had rows"
  assert [u for u, *_ in whole] == list(range(15))
  for a, b in zip(whole, sorted(halves[0] + halves[1], key=lambda t: t[0]), strict=True):
    assert a[0] == b[0] and a[2:] == b[2:]
    np.testing.assert_array_equal(a[1], b[1])


def test_errors_name_the_thing(base):
  policy, params, _ = base
  with pytest.raises(ValueError, match="tasks must not be empty"):
    engine.rollout(policy, params, [], jax.random.key(0))
  with pytest.raises(ValueError, match="image must be a decodable file"):
    engine.rollout(policy, params, [dataclasses.replace(draw_tasks(1)[0], image=b"no")], jax.random.key(0))
  tight = dataclasses.replace(policy, rollout=dataclasses.replace(policy.rollout, max_total_tokens=64))
  with pytest.raises(ValueError, match="leave room for a turn"):
    engine.rollout(tight, params, [dataclasses.replace(draw_tasks(1)[0], question="why " * 40)], jax.random.key(0))
