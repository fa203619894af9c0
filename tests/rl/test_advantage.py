"""Group statistics by hand, against a slow loop, and on groups without rows that count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl import oracles
from virl_jax import config
from virl_jax.rl import advantage

# Compiled, because tests pay for every small operation that is compiled by itself.
relative = jax.jit(advantage.relative, static_argnames=("group_size", "cfg"))
PLAIN, SCALED = advantage.Config(normalize_std=False), advantage.Config(normalize_std=True)


def test_golden():
  reward_B = jnp.array([1.0, 3.0, 5.0, 5.0, 0.0, 1.0, 0.0, 1.0])  # means 3.5, 0.5; deviations sqrt(2.75), 0.5
  np.testing.assert_allclose(relative(reward_B, 4, PLAIN),
                             [-2.5, -0.5, 1.5, 1.5, -0.5, 0.5, -0.5, 0.5], atol=1e-6)
  np.testing.assert_allclose(
      relative(reward_B, 4, SCALED),
      [-1.5075567, -0.3015113, 0.9045340, 0.9045340, -1.0, 1.0, -1.0, 1.0], atol=1e-5)


@pytest.mark.parametrize("cfg", [PLAIN, SCALED])
def test_agrees_with_the_slow_loop(cfg):
  rng = np.random.default_rng(0)
  for group_size in (1, 2, 5):
    reward_B = rng.normal(size=group_size * 20).astype(np.float32)
    for mask_B in (rng.random(reward_B.shape) < 0.7, np.ones(reward_B.shape, bool)):
      expected = oracles.relative(reward_B, group_size, cfg, mask_B)
      np.testing.assert_allclose(relative(reward_B, group_size, cfg, mask_B), expected, atol=1e-6)
  np.testing.assert_allclose(relative(reward_B, 5, cfg), expected, atol=1e-6)
  np.testing.assert_allclose(advantage.relative(reward_B, 5, cfg), expected, atol=1e-6)


def test_vmap_changes_nothing():
  reward_NB = np.random.default_rng(1).normal(size=(3, 12)).astype(np.float32)
  kernel = functools.partial(relative, group_size=4, cfg=SCALED)
  np.testing.assert_allclose(jax.vmap(kernel)(reward_NB), [kernel(row) for row in reward_NB], atol=1e-6)


@pytest.mark.parametrize("cfg", [PLAIN, SCALED])
@pytest.mark.parametrize("value", [0.0, 0.1, -0.7, 1e-8, 3e7])
def test_equal_rewards_give_exactly_nothing(cfg, value):
  # 0.1 and 7 rows: the mean of the rewards themselves is not 0.1 in float32.
  assert not relative(jnp.full(7, value), 7, cfg).any()
  reward_B = jnp.array([value, value, 9.0, value])
  assert not relative(reward_B, 4, cfg, jnp.array([True, True, False, True])).any()


@pytest.mark.parametrize("cfg", [PLAIN, SCALED])
def test_masked_rows_count_for_nothing(cfg):
  mask_B = jnp.array([True, False, True, True])
  expected = relative(jnp.array([1.0, 2.0, 4.0]), 3, cfg)
  for junk in (0.0, 1e30, float("nan"), float("inf")):
    adv_B = relative(jnp.array([1.0, junk, 2.0, 4.0]), 4, cfg, mask_B)
    np.testing.assert_allclose(adv_B[mask_B], expected, atol=1e-6)
    assert adv_B[1] == 0.0


def test_groups_do_not_mix():
  reward_B = jnp.array([1.0, 2.0, 3.0, 5.0])
  moved_B = reward_B.at[2:].add(100.0)
  np.testing.assert_allclose(relative(reward_B, 2, PLAIN),
                             relative(moved_B, 2, PLAIN))


GRAD = jax.jit(jax.grad(lambda r, mask_B: (advantage.relative(r, 4, SCALED, mask_B) ** 2).sum()))


@pytest.mark.parametrize("mask_B", [[True] * 4, [False] * 4, [True, False, False, False]])
def test_gradients_are_finite(mask_B):
  for reward_B in (jnp.full(4, 0.3), jnp.array([0.0, 1.0, 2.0, 3.0])):
    grad = GRAD(reward_B, jnp.array(mask_B))
    assert np.isfinite(grad).all()


def test_defaults_are_the_configuration_s():
  assert advantage.Config(**config.default().advantage) == advantage.Config()


def test_bad_input_is_named():
  with pytest.raises(ValueError, match="group_size must divide the 6 rows.*Received: 4"):
    advantage.relative(jnp.zeros(6), 4, PLAIN)
  with pytest.raises(ValueError, match="group_size"):
    advantage.relative(jnp.zeros(6), 0, PLAIN)
  with pytest.raises(ValueError, match=r"mask_B .*\(6,\).*\(3,\)"):
    advantage.relative(jnp.zeros(6), 3, PLAIN, jnp.ones(3, bool))
  with pytest.raises(ValueError, match=r"reward_B .*\(2, 3\)"):
    advantage.relative(jnp.zeros((2, 3)), 3, PLAIN)


def test_rloo_and_batch_by_hand():
  reward_B = jnp.array([1.0, 3.0, 5.0, 0.0, 0.0, 3.0])
  # 1 - (3 + 5) / 2, 3 - (1 + 5) / 2, ...
  np.testing.assert_allclose(relative(reward_B, 3, advantage.Config(kind="rloo")), [-3, 0, 3, -1.5, -1.5, 3], atol=1e-6)
  # mean 2, variance (1 + 1 + 9 + 4 + 4 + 1) / 6
  np.testing.assert_allclose(relative(reward_B, 3, advantage.Config(kind="batch")),
                             np.array([-1, 1, 3, -2, -2, 1]) / np.sqrt(20 / 6), atol=1e-6)


@pytest.mark.parametrize("kind", ["rloo", "batch"])
def test_the_other_kinds_agree_with_the_slow_loop(kind):
  rng, cfg = np.random.default_rng(3), advantage.Config(kind=kind)
  reward_B, mask_B = rng.normal(size=40).astype(np.float32), rng.random(40) < 0.7
  mask_B[:5], mask_B[5:9], mask_B[9] = False, False, True  # a group without rows, and one of a single row
  slow_B = oracles.relative(reward_B, 5, cfg, mask_B)
  np.testing.assert_allclose(relative(reward_B, 5, cfg, mask_B), slow_B, atol=1e-6)
  np.testing.assert_allclose(advantage.relative(reward_B, 5, cfg, mask_B), slow_B, atol=1e-6)
  kernel = functools.partial(relative, group_size=5, cfg=cfg)
  np.testing.assert_allclose(jax.vmap(kernel)(reward_B.reshape(2, 20)), [kernel(r) for r in reward_B.reshape(2, 20)],
                             atol=1e-6)
  assert not relative(jnp.full(10, 0.1), 5, cfg).any()
  grad = jax.grad(lambda r, m: (relative(r, 5, cfg, m) ** 2).sum())
  for mask in (mask_B, np.zeros(40, bool)):
    for values in (reward_B, np.full(40, 0.3, np.float32)):
      assert np.isfinite(grad(values, mask)).all()


def test_which_groups_teach_something():
  reward_B = jnp.array([1.0, 1.0, 0.0, 1.0, 2.0, 3.0, 5.0, jnp.nan])
  mask_B = jnp.array([True, True, True, True, True, False, True, False])
  got = jax.jit(advantage.informative, static_argnums=1)(reward_B, 2, mask_B)
  assert got.tolist() == [False, False, True, True, False, False, False, False]
  assert advantage.informative(jnp.array([0.1, 0.1, 0.1, 0.2]), 2).tolist() == [False, False, True, True]
  assert not advantage.informative(reward_B, 4, jnp.zeros(8, bool)).any()


def test_a_spread_has_a_least_size():
  reward_B = jnp.array([0.8, 0.9, 1.0, 0.9, 1.0, 1.3, 1.0, 1.0])
  assert advantage.informative(reward_B, 4, least=0.25).tolist() == [False] * 4 + [True] * 4
  assert advantage.informative(reward_B, 4, least=0.15).all()
  assert not advantage.informative(reward_B, 4, jnp.array([True] * 5 + [False] + [True] * 2), 0.25).any()


def test_the_deviation_that_is_divided_by_has_a_floor():
  reward_B = jnp.array([0.80, 0.81, 0.80, 0.81, 0.0, 1.0, 0.0, 1.0])
  floor = advantage.Config(std_floor=0.1)
  np.testing.assert_allclose(relative(reward_B, 4, floor), [-0.05, 0.05, -0.05, 0.05, -1, 1, -1, 1], atol=1e-5)
  none = relative(reward_B, 4, advantage.Config(std_floor=0.0))
  np.testing.assert_allclose(none, [-1, 1, -1, 1, -1, 1, -1, 1], atol=1e-3)
  batch = advantage.Config(kind="batch", std_floor=2.0)
  np.testing.assert_allclose(relative(reward_B, 4, batch), (reward_B - reward_B.mean()) / 2, atol=1e-6)
  steps = advantage.steps(reward_B.reshape(4, 2), jnp.ones((4, 2), bool), 2, 0.1)
  np.testing.assert_allclose(steps.ravel(), [-0.05, 0.05, -0.05, 0.05, -1, 1, -1, 1], atol=1e-5)


def test_moments_of_parts_are_those_of_the_whole():
  rng = np.random.default_rng(5)
  x, mask = rng.normal(3, 2, 40).astype(np.float32), rng.random(40) < 0.6
  mask[:10] = False  # a part with nothing in it comes first
  cuts = (0, 10, 13, 29, 40)
  parts = [advantage.moments(x[a:b], mask[a:b]) for a, b in zip(cuts, cuts[1:])]
  for got in (advantage.pooled(parts), advantage.moments(x, mask)):
    np.testing.assert_allclose([got.count, got.mean, got.square / got.count],
                               [mask.sum(), x[mask].mean(), x[mask].var()], rtol=1e-5)
  sevenths = [advantage.moments(jnp.full(n, 1 / 7, jnp.float32), jnp.ones(n, bool)) for n in (3, 7, 11)]
  assert advantage.pooled(sevenths).mean == np.float32(1 / 7) and advantage.pooled(sevenths).square == 0


def test_the_default_reaches_back_to_the_first_token():
  """With a critic that expects 0, the first of 500 tokens is credited with the whole reward at the end."""
  reward_T = np.zeros(500, np.float32)
  reward_T[-1] = 1.0
  got, _ = advantage.gae(reward_T, np.zeros(500, np.float32), np.ones(500, bool), advantage.Config(kind="gae"))
  assert got[0] == 1.0
  short, _ = advantage.gae(reward_T, np.zeros(500, np.float32), np.ones(500, bool),
                           advantage.Config(kind="gae", lam=0.95))
  assert short[0] < 1e-11


def test_steps_are_compared_with_all_actions_of_the_group():
  reward_BR = jnp.array([[1.0, -1.0], [1.0, 9.0], [2.0, 2.0], [2.0, 7.0]])
  mask_BR = jnp.array([[True, True], [True, False], [True, True], [True, False]])
  got = jax.jit(advantage.steps, static_argnums=2)(reward_BR, mask_BR, 2)
  z = np.sqrt(8 / 9)  # of 1, -1, 1: mean 1/3, variance 8/9
  np.testing.assert_allclose(got, [[2 / 3 / z, -4 / 3 / z], [2 / 3 / z, 0], [0, 0], [0, 0]], atol=1e-6)
  np.testing.assert_allclose(advantage.steps(reward_BR, mask_BR, 2), got, atol=1e-6)
  assert advantage.steps(jnp.zeros((4, 0)), jnp.zeros((4, 0), bool), 2).shape == (4, 0)
  with pytest.raises(ValueError, match="group_size must divide the 4 rows.*Received: 3"):
    advantage.steps(reward_BR, mask_BR, 3)


def test_gae_agrees_with_its_definition():
  gae = jax.jit(advantage.gae, static_argnames="cfg")
  for seed, (gamma, lam) in enumerate([(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)]):
    rng, cfg = np.random.default_rng(seed), advantage.Config(kind="gae", gamma=gamma, lam=lam)
    reward_T, value_T = rng.normal(size=(2, 40)).astype(np.float32)
    mask_T = rng.random(40) < 0.6
    want, _ = oracles.gae(reward_T, value_T, mask_T, cfg)
    got, returns = gae(reward_T, value_T, mask_T, cfg)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(returns, np.where(mask_T, want + value_T, 0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(advantage.gae(reward_T, value_T, mask_T, cfg)[0], got, atol=1e-6)
    rows, _ = jax.vmap(functools.partial(gae, cfg=cfg))(*(np.stack([x, x]) for x in (reward_T, value_T, mask_T)))
    np.testing.assert_allclose(rows[1], got, atol=1e-6)


def test_gae_at_its_ends():
  cfg = advantage.Config(kind="gae", gamma=1.0, lam=1.0)
  reward_T, value_T = jnp.array([0.0, 5.0, 0.0, 2.0]), jnp.array([1.0, jnp.nan, 0.5, 0.5])
  got, returns = advantage.gae(reward_T, value_T, jnp.array([True, False, True, True]), cfg)
  # Monte Carlo: the reward still to come is 2 throughout, and values off the mask never matter.
  np.testing.assert_allclose(got, [1.0, 0.0, 1.5, 1.5])
  np.testing.assert_allclose(returns, [2.0, 0.0, 2.0, 2.0])
  grad = jax.grad(lambda v: advantage.gae(reward_T, v, jnp.zeros(4, bool), cfg)[0].sum())(value_T)
  assert not grad.any()
  with pytest.raises(ValueError, match=r"reward_T, value_T and mask_T.*\(4,\), \(4,\), \(3,\)"):
    advantage.gae(reward_T, value_T, jnp.ones(3, bool), cfg)


def test_a_kind_that_is_no_number_a_trajectory():
  with pytest.raises(ValueError, match="kind must be group, rloo or batch. Received: 'gae'"):
    advantage.relative(jnp.zeros(4), 2, advantage.Config(kind="gae"))
