"""Group statistics by hand, against a slow loop, and on groups that have none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax import config
from virl_jax.rl import advantage

# Compiled, because tests pay for every small operation that is compiled by itself.
group_relative = jax.jit(advantage.group_relative, static_argnames=("group_size", "cfg"))
PLAIN, SCALED = advantage.Config(normalize_std=False), advantage.Config(normalize_std=True)


def slow(reward_B, group_size, cfg, mask_B):
  adv_B = np.zeros(len(reward_B))
  for start in range(0, len(reward_B), group_size):
    rows = [i for i in range(start, start + group_size) if mask_B[i]]
    if not rows:
      continue
    values = np.array([reward_B[i] for i in rows], np.float64)
    scale = np.sqrt(values.var() + 1e-12) if cfg.normalize_std else 1.0
    for i, value in zip(rows, values):
      adv_B[i] = (value - values.mean()) / scale
  return adv_B


def test_golden():
  reward_B = jnp.array([1.0, 3.0, 5.0, 5.0, 0.0, 1.0, 0.0, 1.0])  # means 3.5, 0.5; deviations sqrt(2.75), 0.5
  np.testing.assert_allclose(group_relative(reward_B, 4, PLAIN),
                             [-2.5, -0.5, 1.5, 1.5, -0.5, 0.5, -0.5, 0.5], atol=1e-6)
  np.testing.assert_allclose(
      group_relative(reward_B, 4, SCALED),
      [-1.5075567, -0.3015113, 0.9045340, 0.9045340, -1.0, 1.0, -1.0, 1.0], atol=1e-5)


@pytest.mark.parametrize("cfg", [PLAIN, SCALED])
def test_agrees_with_the_slow_loop(cfg):
  rng = np.random.default_rng(0)
  for group_size in (1, 2, 5):
    reward_B = rng.normal(size=group_size * 20).astype(np.float32)
    for mask_B in (rng.random(reward_B.shape) < 0.7, np.ones(reward_B.shape, bool)):
      expected = slow(reward_B, group_size, cfg, mask_B)
      np.testing.assert_allclose(group_relative(reward_B, group_size, cfg, mask_B), expected, atol=1e-6)
  np.testing.assert_allclose(group_relative(reward_B, 5, cfg), expected, atol=1e-6)
  np.testing.assert_allclose(advantage.group_relative(reward_B, 5, cfg), expected, atol=1e-6)


def test_vmap_changes_nothing():
  reward_NB = np.random.default_rng(1).normal(size=(3, 12)).astype(np.float32)
  kernel = functools.partial(group_relative, group_size=4, cfg=SCALED)
  np.testing.assert_allclose(jax.vmap(kernel)(reward_NB), [kernel(row) for row in reward_NB], atol=1e-6)


@pytest.mark.parametrize("cfg", [PLAIN, SCALED])
@pytest.mark.parametrize("value", [0.0, 0.1, -0.7, 1e-8, 3e7])
def test_equal_rewards_give_exactly_nothing(cfg, value):
  # 0.1 and 7 rows: the mean of the rewards themselves is not 0.1 in float32.
  assert not group_relative(jnp.full(7, value), 7, cfg).any()
  reward_B = jnp.array([value, value, 9.0, value])
  assert not group_relative(reward_B, 4, cfg, jnp.array([True, True, False, True])).any()


@pytest.mark.parametrize("cfg", [PLAIN, SCALED])
def test_masked_rows_count_for_nothing(cfg):
  mask_B = jnp.array([True, False, True, True])
  expected = group_relative(jnp.array([1.0, 2.0, 4.0]), 3, cfg)
  for junk in (0.0, 1e30, float("nan"), float("inf")):
    adv_B = group_relative(jnp.array([1.0, junk, 2.0, 4.0]), 4, cfg, mask_B)
    np.testing.assert_allclose(adv_B[mask_B], expected, atol=1e-6)
    assert adv_B[1] == 0.0


def test_groups_do_not_mix():
  reward_B = jnp.array([1.0, 2.0, 3.0, 5.0])
  moved_B = reward_B.at[2:].add(100.0)
  np.testing.assert_allclose(group_relative(reward_B, 2, PLAIN),
                             group_relative(moved_B, 2, PLAIN))


GRAD = jax.jit(jax.grad(lambda r, mask_B: (advantage.group_relative(r, 4, SCALED, mask_B) ** 2).sum()))


@pytest.mark.parametrize("mask_B", [[True] * 4, [False] * 4, [True, False, False, False]])
def test_gradients_are_finite(mask_B):
  for reward_B in (jnp.full(4, 0.3), jnp.array([0.0, 1.0, 2.0, 3.0])):
    grad = GRAD(reward_B, jnp.array(mask_B))
    assert np.isfinite(grad).all()


def test_defaults_are_the_configuration_s():
  assert advantage.Config(**config.default().advantage) == advantage.Config()


def test_bad_input_is_named():
  with pytest.raises(ValueError, match="group_size must divide the 6 rows.*Received: 4"):
    advantage.group_relative(jnp.zeros(6), 4, PLAIN)
  with pytest.raises(ValueError, match="group_size"):
    advantage.group_relative(jnp.zeros(6), 0, PLAIN)
  with pytest.raises(ValueError, match=r"mask_B .*\(6,\).*\(3,\)"):
    advantage.group_relative(jnp.zeros(6), 3, PLAIN, jnp.ones(3, bool))
  with pytest.raises(ValueError, match=r"reward_B .*\(2, 3\)"):
    advantage.group_relative(jnp.zeros((2, 3)), 3, PLAIN)
