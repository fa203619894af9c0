"""The engine by itself, playing scripts on an untrained model: no work is done twice, few shapes, independent rows."""

import dataclasses

import jax
import numpy as np
import pytest

from virl_jax import types
from virl_jax.model import head
from virl_jax.model import sharding
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.rollout import chunks
from virl_jax.rollout import engine
from virl_jax.rollout import row as row_lib
from virl_jax.rollout import slots as slots_lib
from virl_jax.rollout import turns
from virl_jax.run import compiles


class Script:
  """Prompts with a picture, and for each trajectory how long its turns are and what comes back between them."""

  def __init__(self, cfg, seed, prompts=3, group=4, rounds=4):
    rng, self.grid, self.group = np.random.default_rng(seed), cfg.vision.grid, group
    self.read_by = []

    def around(words):
      rows, cols = rng.integers(1, 4, 2)
      image = types.ImageInput(rng.standard_normal((4 * rows * cols, self.grid.values), np.float32),
                               (2 * int(rows), 2 * int(cols)), types.Box(0, 0, 1, 1))
      ids = [rng.integers(10, 60, words), [cfg.vision_start], [cfg.image_token] * (rows * cols), [cfg.vision_end],
             rng.integers(10, 60, 2)]
      return np.concatenate(ids).astype(np.int32), image

    self.prompts = [around(int(rng.integers(1, 20))) for _ in range(prompts)]
    self.lengths = [rng.integers(1, 9, rng.integers(1, rounds + 1)).tolist() for _ in range(prompts * group)]
    self.replies = [[around(int(rng.integers(1, 9))) if rng.random() < 0.8 else
                     (rng.integers(10, 60, 3).astype(np.int32), None) for _ in lengths[1:]] for lengths in self.lengths]
    self.tasks = [types.Task(str(i), b"", "") for i in range(prompts)]

  def begin(self, policy, task):
    ids, image = self.prompts[int(task.uid)]
    return row_lib.prompt(policy.model, task, None, ids, image)

  def left(self, policy, row):
    return self.lengths[row.traj.index][row.turn] - row.said

  def hear(self, policy, row, ids, logp):
    row.hear(ids, logp)
    return self.left(policy, row) == 0

  def read(self, policy, row):
    (ids, logp), index = row.take(), row.traj.index
    row.traj.turns.append(types.Turn("assistant", ids, logp))
    if row.turn == len(self.replies[index]):
      row.traj.stop = types.StopReason.ANSWERED
      return None
    heard, image = self.replies[index][row.turn]
    row.traj.turns.append(types.Turn("tool", heard))
    if image is not None:
      row.traj.images.append(image)
    row.turn += 1
    return row_lib.reply(policy.model, heard, image, row.filled + len(ids), row.next_pos + len(ids))

  def run(self, cfg, params, mesh=None, temperature=0.0, **how):
    cfg = dataclasses.replace(cfg, eos=())
    how = {"pad_tokens": 32, "segment_tokens": 4} | how
    mesh = mesh or sharding.make(devices=jax.devices()[:1])
    policy = turns.Policy(cfg, None, None, None, turns.Config(max_total_tokens=128), mesh, slots_lib.Config(**how))
    return engine.run(policy, params, self.tasks, jax.random.key(0), self.group, temperature, self)


def test_a_growing_cache_gives_what_whole_sequences_give(small):
  """Prompts are copied between slots, crops added in later turns, slots refilled: each token is the likeliest one by a
  single forward pass over the whole sequence with all its pictures."""
  script = Script(small.cfg, 1, rounds=3)
  got, _ = script.run(small.cfg, small.params, slots=2)
  T = max(len(t.ids) for t in got)
  for traj in got:
    ids, ok = np.zeros((1, T), np.int32), np.zeros((1, T), np.int32)
    ids[0, :len(traj.ids)], ok[0, :len(traj.ids)] = traj.ids, 1
    inputs = qwen.hf_inputs(small.cfg, ids, ok, np.concatenate([im.patches_PC for im in traj.images]),
                            np.array([(1, *im.grid_hw) for im in traj.images]))
    h = qwen.hidden(small.params, small.cfg, *jax.tree.map(jax.numpy.asarray, inputs))
    likeliest = np.argmax(head.policy_logits(small.params, small.cfg, h, 1.0)[0], -1)
    at = len(traj.prompt_ids)
    for turn in traj.turns:
      if turn.role == "assistant":
        np.testing.assert_array_equal(turn.ids, likeliest[at - 1:at - 1 + len(turn.ids)])
      at += len(turn.ids)


MANY_SHAPES = {"slots": 7, "decode_ratio": 1.2, "append_ratio": 1.5, "token_steps": 4, "segment_tokens": 1}


@pytest.mark.parametrize("how", [pytest.param({"slots": 1}, marks=pytest.mark.slow), MANY_SHAPES], ids=str)
def test_what_is_sampled_does_not_depend_on_how(small, how):
  script = Script(small.cfg, 2)
  want, _ = script.run(small.cfg, small.params, temperature=1.0)
  got, _ = script.run(small.cfg, small.params, temperature=1.0, **how)
  for a, b in zip(want, got, strict=True):
    assert a.index == b.index
    np.testing.assert_array_equal(a.ids, b.ids)
    for x, y in zip(a.turns, b.turns, strict=True):
      if x.logp is not None:
        np.testing.assert_allclose(x.logp, y.logp, atol=1e-4)


@pytest.mark.slow
def test_eight_devices_sample_what_one_does(small):
  script = Script(small.cfg, 3, prompts=5)
  want, _ = script.run(small.cfg, small.params, temperature=1.0)
  mesh = sharding.make(data=2, fsdp=2, tensor=2)
  params = jax.device_put(small.params, sharding.param_shardings(qwen.specs(small.cfg), mesh))
  for slots in (4, 12):
    got, _ = script.run(small.cfg, params, mesh, temperature=1.0, slots=slots)
    for a, b in zip(want, got, strict=True):
      np.testing.assert_array_equal(a.ids, b.ids, str((slots, a.index)))


@pytest.mark.parametrize("slots", [3, 12])
def test_no_work_twice(small, slots, monkeypatch):
  """Each prompt is prefilled once for its group, each picture encoded once, each other token appended once."""
  script = Script(small.cfg, 4)
  encoded = []
  build = chunks.build
  monkeypatch.setattr(engine.chunks, "build", lambda entries, *a: (
      encoded.extend(id(e.reply.image) for e in entries if e.reply.image is not None), build(entries, *a))[1])
  got, stats = script.run(small.cfg, small.params, slots=slots)
  assert stats.prompt_tokens == sum(len(ids) for ids, _ in script.prompts)
  assert stats.appended_tokens == sum(len(ids) for replies in script.replies for ids, _ in replies)
  assert stats.sampled_tokens == sum(map(sum, script.lengths)) == sum(
      len(t.ids) for traj in got for t in traj.turns if t.role == "assistant")
  assert len(encoded) == len(set(encoded)) == len({id(im) for t in got for im in t.images})


@pytest.mark.slow
def test_a_hundred_rollouts_compile_few_programs(small):
  """Whatever the lengths and sizes: decoding for 2 row counts, chunks for row counts x tokens x windows."""
  counter, counts = compiles.Counter(), []
  for seed in range(100):
    Script(small.cfg, seed, prompts=2, group=4).run(small.cfg, small.params, slots=6)
    counts.append(counter.count)
  assert counts[-1] <= 40, counts
  assert counts[-1] - counts[49] <= 2, "most shapes are met early"
