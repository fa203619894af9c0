"""Scores other than the IoU, averages other than the mean, coverage, the schedule, and rewards on tokens."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl import oracles
from virl_jax.rl import reward

SQUARE, SHIFTED, AWAY, INNER = (0, 0, 10, 10), (5, 0, 15, 10), (20, 20, 30, 30), (0, 0, 5, 5)
# Compiled, because tests pay for every small operation that is compiled by itself.
overlap = jax.jit(reward.overlap, static_argnames="mode")
fidelity = jax.jit(reward.fidelity, static_argnames="cfg")
pool = jax.jit(reward.pool, static_argnames="cfg")
place = jax.jit(reward.place, static_argnames="cfg")
ONE_TARGET = np.array([SQUARE], np.float32), np.ones(1, bool)


@pytest.mark.parametrize("mode, expected", [
    # the same box;  half of it, shifted;  far away;  a quarter of it
    ("iou", [1, 1 / 3, 0, 0.25]),
    ("giou", [1, 1 / 3, -7 / 9, 0.25]),
    ("coverage", [1, 0.5, 0, 0.25]),
    ("tightness", [1, 0.5, 0, 1]),
    ("centre", [1, 1 - 25 / 325, 1 - 800 / 1800, 1 - 12.5 / 200])])
def test_scores_by_hand(mode, expected):
  boxes = jnp.array([SQUARE, SHIFTED, AWAY, INNER], jnp.float32)
  np.testing.assert_allclose(overlap(boxes, jnp.array([SQUARE], jnp.float32), mode)[:, 0], expected, atol=1e-6)


@pytest.mark.parametrize("mode", reward.MODES)
def test_scores_agree_with_the_slow_loop(mode):
  rng = np.random.default_rng(0)
  a, b = rng.uniform(0, 60, (2, 24, 4)).astype(np.float32)
  a[:16, 2:] += a[:16, :2]  # the others are mostly reversed
  b[:20, 2:] += b[:20, :2]
  slow = [[oracles.overlap(x, y, mode) for y in b.tolist()] for x in a.tolist()]
  np.testing.assert_allclose(overlap(a, b, mode), slow, atol=2e-6)
  np.testing.assert_allclose(reward.overlap(a[:3], b[:3], mode), overlap(a[:3], b[:3], mode), atol=1e-6)
  mapped = jax.vmap(functools.partial(overlap, mode=mode))(a[:, None], b[:, None])
  np.testing.assert_allclose(mapped[:, 0, 0], np.diagonal(np.array(slow)), atol=2e-6)


@pytest.mark.parametrize("mode", reward.MODES)
@pytest.mark.parametrize("bad", [(3, 3, 3, 3), (8, 8, 3, 3), (3, 3, 8, 3), (math.nan, 0, 1, 1), (0, 0, 1e30, 1e30)])
def test_what_is_no_box_scores_worst_with_finite_gradients(mode, bad):
  grads = jax.jit(jax.grad(lambda a, b: overlap(a, b, mode).sum(), argnums=(0, 1)))
  bad = jnp.array([bad], jnp.float32)
  for a, b in ((bad, jnp.array([SQUARE], jnp.float32)), (jnp.array([SQUARE], jnp.float32), bad), (bad, bad)):
    assert overlap(a, b, mode).item() == (-1.0 if mode == "giou" else 0.0)
    if np.isfinite(bad).all():
      assert all(np.isfinite(g).all() for g in grads(a, b))


def test_another_score_decides_what_is_correct_and_the_iou_is_told_all_the_same():
  box_R4 = np.array([INNER, AWAY], np.float32)
  f = fidelity(box_R4, np.ones(2, bool), *ONE_TARGET, reward.Config(h0=0.4, mode="tightness"))
  np.testing.assert_allclose(f.score_R, [1.0, 0.0])
  np.testing.assert_allclose(f.iou_R, [0.25, 0.0])
  assert f.correct_R.tolist() == [True, False]
  # 1 + .5 * 1;  -1
  np.testing.assert_allclose(f.reward_R, [1.5, -1.0])
  # Far away the generalised IoU is below 0: no bonus, but the action still has a target.
  g = fidelity(box_R4, np.ones(2, bool), *ONE_TARGET, reward.Config(h0=0.2, mode="giou"))
  assert g.target_R.tolist() == [0, 0] and g.correct_R.tolist() == [True, False]
  np.testing.assert_allclose(g.reward_R, [1.125, -1.0], atol=1e-6)


def test_the_best_iou_need_not_be_with_the_target():
  targets = np.array([(0, 0, 2, 2), SQUARE], np.float32)
  f = fidelity(np.array([(0, 0, 10, 9)], np.float32), np.ones(1, bool), targets, np.ones(2, bool),
               reward.Config(mode="coverage"))
  assert f.target_R.tolist() == [0]  # all of the small one is shown
  np.testing.assert_allclose(f.iou_R, [0.9], atol=1e-6)


AVERAGED = np.array([2.0, -1.0, 0.5, 9.0], np.float32), np.array([True, True, True, False])


@pytest.mark.parametrize("average, expected", [
    ("mean", 0.5), ("sum", 1.5), ("discounted", 2 - 0.5 + 0.125), ("best", 2.0)])
def test_averages_by_hand(average, expected):
  cfg = reward.Config(average=average, discount=0.5)
  for kernel in (pool, reward.pool):
    assert kernel(*AVERAGED, cfg) == pytest.approx(expected)
    assert kernel(AVERAGED[0], np.zeros(4, bool), cfg) == 0.0
    assert kernel(np.zeros(0, np.float32), np.zeros(0, bool), cfg) == 0.0
  both = jax.vmap(functools.partial(pool, cfg=cfg))(np.stack([AVERAGED[0]] * 2), np.stack([AVERAGED[1]] * 2))
  np.testing.assert_allclose(both, [expected] * 2, rtol=1e-6)
  slope = jax.grad(lambda r, mask: reward.pool(r, mask, cfg))
  for mask in (AVERAGED[1], np.zeros(4, bool)):
    grad = slope(jnp.array(AVERAGED[0]), mask)
    assert np.isfinite(grad).all() and not np.asarray(grad)[~mask].any()


def test_the_best_action_may_be_a_bad_one():
  cfg = reward.Config(average="best")
  assert pool(np.array([-3.0, -1.0, 0.0], np.float32), np.array([True, True, False]), cfg) == -1.0


def test_discounting_counts_actions_and_not_places():
  cfg = reward.Config(average="discounted", discount=0.5)
  assert pool(np.array([7.0, 1.0, 7.0, 1.0], np.float32), np.array([False, True, False, True]), cfg) == 1.5


def test_covering_all_targets_pays():
  targets = np.array([SQUARE, AWAY], np.float32), np.ones(2, bool)
  cfg = reward.Config(lam=0.0, rho=0.0, w_cover=0.5)
  boxes = lambda *b: (np.array(b, np.float32), np.ones(len(b), bool))
  one, twice, both = (fidelity(*boxes(*b), *targets, cfg) for b in ((SQUARE, INNER), (SQUARE, SQUARE), (SQUARE, AWAY)))
  np.testing.assert_allclose([f.covered for f in (one, twice, both)], [0.5, 0.5, 1.0])
  np.testing.assert_allclose([f.mean for f in (one, twice, both)], [0.25, 1.25, 1.5])
  none = fidelity(*boxes(SQUARE, SQUARE), targets[0], np.zeros(2, bool), cfg)
  assert none.covered == none.mean == 0.0


def test_every_term_can_be_switched_off():
  half, most = (0, 0, 10, 5), (0, 0, 10, 8)
  boxes = np.array([half, half, most], np.float32), np.ones(3, bool)
  off = {"w_sign": 0.0, "lam": 0.0, "rho": 0.0}
  for term, expected in (("w_sign", [1, 1, 1]), ("lam", [0.5, 0, 0.3]), ("rho", [0, -1, 0])):
    f = fidelity(*boxes, *ONE_TARGET, reward.Config(**off | {term: 1.0}))
    np.testing.assert_allclose(f.reward_R, expected, atol=1e-6)


def test_the_threshold_may_move():
  cfg = reward.Config(h0=0.5, h0_start=0.1, h0_steps=4)
  np.testing.assert_allclose([reward.threshold(cfg, s) for s in (0, 1, 2, 4, 9)], [0.1, 0.2, 0.3, 0.5, 0.5])
  assert reward.threshold(reward.Config(h0=0.3), 7) == 0.3
  box = np.array([(0, 0, 10, 4)], np.float32), np.ones(1, bool)
  correct = [bool(fidelity(*box, *ONE_TARGET, cfg, np.float32(reward.threshold(cfg, s))).correct_R[0]) for s in (0, 4)]
  assert correct == [True, False]


def test_rewards_come_with_the_tokens_that_earned_them():
  cfg = reward.Config(w_fidelity=0.5)
  f = fidelity(np.array([SQUARE, AWAY, SQUARE], np.float32), np.array([True, True, False]), *ONE_TARGET, cfg)
  #                   thought zoom zoom tool zoom answer answer padding
  action_T = np.array([-1, 0, 0, 0, 1, -1, -1, -1])
  sampled_T = np.array([True, True, True, False, True, True, True, False])
  total = reward.total(1.0, 1.0, f.mean, cfg)
  got = place(total, f, action_T, sampled_T, cfg)
  # Two actions, half each, weight 0.5: (1 + 0.5) / 4 and -1 / 4; the rest is 1 + 0.2.
  np.testing.assert_allclose(got, [0, 0, 0.375, 0, -0.25, 0, 1.2, 0], atol=1e-6)
  np.testing.assert_allclose(reward.place(total, f, action_T, sampled_T, cfg), got, atol=1e-6)
  pooled = reward.Config(w_fidelity=0.5, average="sum")
  np.testing.assert_allclose(place(total, f, action_T, sampled_T, pooled), np.eye(8)[6] * total, atol=1e-6)
  assert not place(total, f, action_T, np.zeros(8, bool), cfg).any()


@pytest.mark.parametrize("average", reward.AVERAGES)
def test_placed_rewards_add_up(average):
  rng, cfg = np.random.default_rng(0), reward.Config(average=average, w_cover=0.3)
  box_BR4 = rng.uniform(0, 10, (32, 3, 4)).astype(np.float32)
  box_BR4[..., 2:] += box_BR4[..., :2]
  mask_BR = rng.random((32, 3)) < 0.6
  f = jax.vmap(lambda b, m: fidelity(b, m, *ONE_TARGET, cfg))(box_BR4, mask_BR)
  total_B = f.mean + rng.normal(size=32).astype(np.float32)
  action_BT, sampled_BT = rng.integers(-1, 3, (32, 12)), rng.random((32, 12)) < 0.5
  sampled_BT[:, 5] = True
  got = jax.vmap(lambda *a: place(*a, cfg))(total_B, f, action_BT, sampled_BT)
  np.testing.assert_allclose(got.sum(-1), total_B, atol=1e-5)
  assert not np.asarray(got)[~sampled_BT].any()


def test_without_rounds_or_targets():
  cfg = reward.Config(mode="giou", average="best", w_cover=1.0)
  nothing = np.zeros((0, 4), np.float32), np.zeros(0, bool)
  assert fidelity(*nothing, *ONE_TARGET, cfg).mean == np.float32(cfg.no_action)
  f = fidelity(*nothing, *nothing, cfg)
  assert f.mean == f.covered == 0.0
  np.testing.assert_allclose(place(2.0, f, np.array([-1, -1]), np.array([True, False]), cfg), [2.0, 0.0])


def test_what_there_is_not_is_named():
  with pytest.raises(ValueError, match="mode must be one of iou, giou.*Received: 'dice'"):
    reward.overlap(jnp.zeros((1, 4)), jnp.zeros((1, 4)), "dice")
  with pytest.raises(ValueError, match="average must be one of mean, sum.*Received: 'median'"):
    reward.pool(jnp.zeros(1), jnp.ones(1, bool), reward.Config(average="median"))
