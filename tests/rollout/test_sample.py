"""Prefill, restart and decode: what is sampled, from which distribution, and in which rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax.model import family
from virl_jax.model import head
from virl_jax.model import params as params_lib
from virl_jax.model import sharding
from virl_jax.model import tuning
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.rollout import sample
from virl_jax.run import memory
from virl_jax.run import placement

PROMPTS = [[10, 11, 12, 13], [20, 21], [30, 31, 32]]


def chunk(rows, tokens, starts, row_A=None):
  """Text only; row b gets tokens[b] at position and slot starts[b]."""
  T = 8
  c = sample.Chunk(*(np.zeros(s, np.int32) for s in ((rows, T), rows, (rows, 3, T), rows)),
                   np.full((rows, T), -1, np.int32), (), row_A, np.asarray(starts, np.int32))
  for b, ids in enumerate(tokens):
    n = len(ids)
    c.tokens_AT[b, :n], c.n_new_A[b], c.next_pos_A[b] = ids, n, starts[b] + n
    c.pos_AXT[b, :, :n] = starts[b] + np.arange(n)
  return jax.tree.map(jnp.asarray, c)


def turns(uids, turn=0, said=0, left=6, row_A=None):
  full = lambda v: jnp.broadcast_to(jnp.asarray(v, jnp.int32), (len(uids),))
  return sample.Writers(jnp.asarray(uids, jnp.int32), full(turn), full(said), full(left), row_A)


def decode(small, state, who, steps=6, temperature=1.0, key=0, **kw):
  out = sample.decode(small.params, small.cfg, state, who, jax.random.key(key), jnp.float32(temperature), steps, **kw)
  return out[0], *map(np.asarray, out[1:])


def prefilled(small, rows=3):
  state = sample.start(small.cfg, rows, 64)
  return sample.append(small.params, small.cfg, state, chunk(rows, PROMPTS[:rows], [0] * rows), prompt=True)


def logits_of(small, ids):
  """float[V], from a forward pass over the whole sequence."""
  T = len(ids)
  tokens = jnp.asarray([ids])
  pos = jnp.broadcast_to(jnp.arange(T)[None, None], (1, 3, T))
  h = qwen.hidden(small.params, small.cfg, tokens, pos, jnp.ones((1, T), bool), jnp.full((1, T), -1), ())
  return np.asarray(head.policy_logits(small.params, small.cfg, h[:, -1:], 1.0)[0, 0])


def test_segments_are_one_turn(small):
  """Two segments of three tokens give the same as one of six."""
  _, want, want_logp, n = decode(small, prefilled(small), turns([5, 6, 7]))
  state, a, a_logp, na = decode(small, prefilled(small), turns([5, 6, 7]), steps=3)
  going = (na == 3) & ~np.isin(a[:, -1], small.cfg.eos)
  _, b, b_logp, nb = decode(small, state, turns([5, 6, 7], said=3, left=3 * going), steps=3)
  np.testing.assert_array_equal(np.concatenate([a, b], 1), want)
  np.testing.assert_allclose(np.concatenate([a_logp, b_logp], 1), want_logp, atol=1e-6)
  np.testing.assert_array_equal(na + nb, n)


def test_any_of_the_ids_that_end_a_turn_ends_it(small):
  """What is sampled is the same, up to the first of them."""
  free = dataclasses.replace(small, cfg=dataclasses.replace(small.cfg, eos=()))
  _, want, _, n = decode(free, prefilled(free), turns([5, 6, 7]))
  assert n.tolist() == [6, 6, 6], "nothing ends a turn"
  eos = (int(want[0, 1]), int(want[1, 3]))
  both = dataclasses.replace(small, cfg=dataclasses.replace(small.cfg, eos=eos))
  state, out, _, n = decode(both, prefilled(both), turns([5, 6, 7]))
  ends = [next((t + 1 for t, token in enumerate(row) if token in eos), 6) for row in want.tolist()]
  assert n.tolist() == ends and len(set(ends)) > 1
  for row in range(3):
    np.testing.assert_array_equal(out[row, :n[row]], want[row, :n[row]])
  fed = np.asarray(state.cache.len_B) - [len(p) for p in PROMPTS]
  assert fed.tolist() == [m - (m < 6 or want[b, 5] in eos) for b, m in enumerate(ends)], "the last is not fed"


def test_some_rows_write_and_the_others_stay(small):
  state, want, want_logp, _ = decode(small, prefilled(small), turns([5, 6, 7], left=[6, 0, 6]))
  other, out, logp, _ = decode(small, prefilled(small), turns([7, 5, 0], left=[6, 6, 0], row_A=jnp.asarray([2, 0, 3])))
  np.testing.assert_array_equal(out[:2], want[[2, 0]])
  np.testing.assert_allclose(logp[:2], want_logp[[2, 0]], atol=1e-5)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other)):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)


def test_each_token_has_luck_of_its_own(small):
  """At a temperature so high that the policy hardly matters, tokens of a turn, another turn and another row differ."""
  allowed = small.cfg.text.vocab - len(small.cfg.banned)
  _, out, _, n = decode(small, prefilled(small), turns([5, 6, 7], left=40), steps=40, temperature=1e6)
  rows = [out[b, :n[b]] for b in range(3) if n[b] > 10]
  assert rows
  for row in rows:  # 40 draws of about 60 have 29 different ones, on average
    assert len(set(row.tolist())) > len(row) / 3
  _, other, _, _ = decode(small, prefilled(small), turns([5, 6, 7], turn=1, left=40), steps=40, temperature=1e6)
  alike = lambda a, b: np.mean(a[:10] == b[:10])
  assert max(alike(out[0], other[0]), alike(out[0], out[1]), alike(out[0], out[2])) < 0.5, allowed


def test_logps_are_those_of_the_whole_sequence(small):
  _, out, logp, n = decode(small, prefilled(small), turns([5, 6, 7]))
  for b, ids in enumerate(PROMPTS):
    for t in range(n[b]):
      want = jax.nn.log_softmax(logits_of(small, ids + out[b, :t].tolist()))
      assert abs(float(want[out[b, t]]) - logp[b, t]) < 1e-4


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_policy_is_the_model_at_its_temperature(small, temperature):
  """The sampling distribution, its log-probabilities, and what the learner computes again are logits / temperature."""
  _, out, logp, n = decode(small, prefilled(small), turns([5, 6, 7]), temperature=temperature)
  for b, ids in enumerate(PROMPTS):
    row = jnp.asarray([ids + out[b, :n[b]].tolist()])
    T = row.shape[1]
    pos = jnp.broadcast_to(jnp.arange(T)[None, None], (1, 3, T))
    h = qwen.hidden(small.params, small.cfg, row, pos, jnp.ones((1, T), bool), jnp.full((1, T), -1), ())
    x = np.asarray(qwen.logits(small.params, small.cfg, h)[0], np.float64) / temperature
    x[:, list(small.cfg.banned)] = -np.inf
    want = x - np.log(np.exp(x).sum(-1, keepdims=True))
    at, next_T = np.arange(len(ids) - 1, T - 1), np.asarray(row[0])[len(ids):]
    np.testing.assert_allclose(logp[b, :n[b]], want[at, next_T], atol=1e-4)
    learned, entropy = head.token_logp(small.params, small.cfg, h, jnp.roll(row, -1, 1), temperature)
    np.testing.assert_allclose(np.asarray(learned)[0, at], want[at, next_T], atol=1e-4)
    surprise = -np.exp(want) * np.where(np.isfinite(want), want, 0.0)
    np.testing.assert_allclose(np.asarray(entropy)[0], surprise.sum(-1), atol=1e-4)


def test_restart_brings_a_prompt_back(small):
  """From another row, and from the row itself after it has gone on."""
  state, want, _, _ = decode(small, prefilled(small), turns([5, 6, 7]))
  moves = [[0, 1, 9], [0, 0, 0], [4, 4, 0], [4, 4, 0]]  # row 9 does not exist
  state = sample.restart(state, *(jnp.asarray(m, jnp.int32) for m in moves), width=64)
  _, out, _, _ = decode(small, state, turns([5, 5, 7], left=[6, 6, 0]))
  np.testing.assert_array_equal(out[0], want[0])
  np.testing.assert_array_equal(out[1], want[0], "row 1 has row 0's prompt, and uid 5's luck")


def test_append_to_some_rows_keeps_the_others(small):
  everywhere = sample.append(small.params, small.cfg, prefilled(small), chunk(3, [[40], [], [42, 43]], [4, 2, 3]))
  some = sample.append(small.params, small.cfg, prefilled(small),
                       chunk(2, [[42, 43], [40]], [3, 4], jnp.asarray([2, 0])))
  for a, b in zip(jax.tree.leaves(everywhere), jax.tree.leaves(some)):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)
  assert np.asarray(some.cache.len_B).tolist() == [5, 2, 5]


def test_a_row_can_go_back_before_a_chunk(small):
  """Tokens that were sampled past a stop string leave no trace."""
  want = sample.append(small.params, small.cfg, prefilled(small), chunk(3, [[40], [41], [42]], [4, 2, 3]))
  state, _, _, n = decode(small, prefilled(small), turns([5, 6, 7]))
  assert n.max() > 1
  got = sample.append(small.params, small.cfg, state, chunk(3, [[40], [41], [42]], [4, 2, 3]))
  np.testing.assert_allclose(np.asarray(got.hidden_BD), np.asarray(want.hidden_BD), atol=1e-5)
  np.testing.assert_array_equal(np.asarray(got.cache.len_B), [5, 3, 4])


def test_placeholders_are_never_sampled_and_rows_rest(small):
  hot = decode(small, prefilled(small), turns([1, 2, 3], left=[6, 0, 2]), temperature=50.0)
  _, out, _, n = hot
  assert n[1] == 0 and n[2] <= 2 and not out[1].any()
  for key in range(20):
    _, out, _, n = decode(small, prefilled(small), turns([1, 2, 3]), temperature=50.0, key=key)
    for b in range(3):
      assert not np.isin(out[b, :n[b]], small.cfg.banned).any()


def test_a_segment_ends_when_enough_have_ended(small):
  _, _, _, n = decode(small, prefilled(small), turns([1, 2, 3], left=[6, 2, 6]), temperature=0.0)
  assert n[0] > 2, "greedily, row 0 goes on"
  _, _, _, n = decode(small, prefilled(small), turns([1, 2, 3], left=[6, 2, 6]), temperature=0.0, serve=jnp.int32(1))
  assert n.max() <= 2


@pytest.mark.parametrize("keep,allowed", [
    (sample.Filter(top_k=3), lambda p: np.argsort(-p)[:3]),
    (sample.Filter(min_p=0.3), lambda p: np.flatnonzero(p >= 0.3 * p.max())),
    (sample.Filter(top_p=0.4), lambda p: np.argsort(-p)[:1 + int(np.searchsorted(np.cumsum(np.sort(p)[::-1]), 0.4))]),
    (sample.Filter(top_k=4, top_p=0.5, min_p=0.05), None)], ids=["top_k", "min_p", "top_p", "all"])
def test_filters(small, keep, allowed):
  """All that may be sampled is, nothing else is, and log-probabilities are those of the whole distribution."""
  x = logits_of(small, PROMPTS[0])
  p = np.exp(x - x.max())
  p /= p.sum()
  if allowed is None:  # one after the other, each on what the one before left
    order = np.argsort(-p)[:4]
    order = order[p[order] >= 0.05 * p.max()]
    share = np.cumsum(p[order] / p[order].sum())
    want = set(order[:1 + int(np.searchsorted(share, 0.5))].tolist())
  else:
    want = set(allowed(p).tolist())
  state = prefilled(small, 1)
  many = sample.start(small.cfg, 256, 64).replace(hidden_BD=jnp.repeat(state.hidden_BD, 256, axis=0))
  _, out, logp, _ = decode(small, many, turns(range(256), left=1), steps=1, keep=keep)
  seen = out[:, 0]
  assert set(seen.tolist()) == want
  np.testing.assert_allclose(logp[:, 0], np.log(p[seen]), atol=1e-4)


@pytest.mark.parametrize("tensor", [1, 2])
def test_weights_are_copied_once_for_rollouts(small, tensor):
  """In the compute dtype; those that are right already are not copied."""
  mesh = sharding.make(1, 8, 1)
  params = jax.device_put(small.params, sharding.param_shardings(qwen.specs(small.cfg), mesh))
  half = dataclasses.replace(small.cfg, compute_dtype="bfloat16")
  rolled = sharding.replicas(mesh, tensor)
  assert rolled.devices.ravel().tolist() == mesh.devices.ravel().tolist() and rolled.shape["tensor"] == tensor
  got = sample.weights(params, half, rolled)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(params)):
    assert a.dtype == jnp.bfloat16 and b.dtype == jnp.float32
    np.testing.assert_array_equal(a, np.asarray(b).astype(jnp.bfloat16))
  assert sample.weights(got, half, rolled) is got and sample.weights(params, small.cfg) is params
  whole = sum(a.size * 2 for a in jax.tree.leaves(params))
  held = memory.device_gib(got) * 2 ** 30
  assert held == whole if tensor == 1 else whole / 2 < held < 0.8 * whole  # norms and the like are whole


def adapted(small):
  """The same model with adapters beside its matrices, also in the tower, which are not zero."""
  cfg = dataclasses.replace(small.cfg, tuning=tuning.Config(rank=4, alpha=8.0))
  rng = np.random.default_rng(3)
  some = params_lib.map_specs(lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape), jnp.float32),
                              family.tables(cfg)[0])
  return dataclasses.replace(small, cfg=cfg, params=family.whole(some, small.params, cfg))


def test_what_is_frozen_is_not_copied_for_rollouts(small):
  """Frozen weights have the compute dtype; trained ones are cast."""
  cfg = dataclasses.replace(small.cfg, compute_dtype="bfloat16", tuning=tuning.Config(rank=4))
  base = jax.tree.map(lambda a: a.astype(jnp.bfloat16), small.params)
  trained = params_lib.init(family.tables(cfg)[0], jax.random.key(0), jnp.float32)
  got = sample.weights(family.whole(trained, base, cfg), cfg)
  w = got["text"]["blocks"]["q_w"]
  assert w.base is base["text"]["blocks"]["q_w"] and got["text"]["embed"] is base["text"]["embed"]
  assert w.a.dtype == w.b.dtype == jnp.bfloat16 and got["vision"]["patch_embed"] is base["vision"]["patch_embed"]


@pytest.mark.parametrize("how", [pytest.param("plain", marks=pytest.mark.slow), "adapters"])
def test_rows_on_eight_devices(small, how):
  """Each device appends to its own rows, and nothing else changes."""
  small = adapted(small) if how == "adapters" else small
  mesh = sharding.make(data=4, fsdp=1, tensor=2)
  prompts = [[10 + b, 11, 12] for b in range(8)]
  one = sample.append(small.params, small.cfg, sample.start(small.cfg, 8, 64), chunk(8, prompts, [0] * 8), prompt=True)
  state = sample.start(small.cfg, 8, 64, mesh)
  assert state.cache.k_LBKSH.sharding.is_equivalent_to(sharding.cache(mesh, small.cfg.text.kv_heads), 5)
  put = lambda c: placement.place_rows(c, mesh)
  # Training has another layout; in that of rollouts, no token waits for weights.
  there = sharding.make(1, 4, 2)
  trained = jax.device_put(small.params, family.shardings(small.cfg, there))
  params = sample.weights(trained, small.cfg, mesh)
  jax.tree.map(lambda a, s: np.testing.assert_(a.sharding.is_equivalent_to(s, a.ndim)), params,
               family.shardings(small.cfg, mesh))
  # Two rows in each lane, in different orders; one of lane 3's is padding.
  rows = np.array([0, 1, 1, 0, 0, 1, 1, 2], np.int32)
  order = [0, 1, 3, 2, 4, 5, 7]
  state = sample.append(params, small.cfg, state, put(chunk(8, [prompts[b] for b in order] + [[]], [0] * 8, rows)),
                        prompt=True, mesh=mesh)
  # Lane 3 copies its second row's prompt to its first.
  moves = np.array([[9, 9, 9, 0], [0, 0, 0, 1], [0, 0, 0, 3], [0, 0, 0, 3]], np.int32)
  state = sample.restart(state, *put(tuple(moves)), width=64, mesh=mesh)
  assert state.cache.k_LBKSH.sharding.is_equivalent_to(sharding.cache(mesh, small.cfg.text.kv_heads), 5)
  one = sample.restart(one, *(jnp.asarray([v], jnp.int32) for v in (6, 7, 3, 3)), width=64)
  _, want, want_logp, _ = decode(small, one, turns(range(8)))
  state, out, logp, _ = decode(small, state, put(turns(range(8))), mesh=mesh)
  np.testing.assert_array_equal(out, want)
  np.testing.assert_allclose(logp, want_logp, atol=1e-5)
  assert state.cache.k_LBKSH.sharding.is_equivalent_to(sharding.cache(mesh, small.cfg.text.kv_heads), 5)
