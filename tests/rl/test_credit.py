"""The table of modulators, the worked example of the docstring, and a slow numpy oracle."""

import dataclasses
import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl import oracles
from virl_jax import config
from virl_jax.rl import credit

# Compiled, because tests pay for every small operation that is compiled by itself.
classify = jax.jit(credit.classify)
modulator = jax.jit(credit.modulator, static_argnames="cfg")
token_advantages = jax.jit(credit.token_advantages)

CFG = credit.Config(h_good=1.5, h_redundant=0.75, h_bad=0.5)


def test_the_worked_example_holds():
  failed, tried = doctest.testmod(credit)
  assert tried >= 8 and failed == 0


def test_classes():
  correct_R = jnp.array([True, True, False, False, True])
  redundant_R = jnp.array([False, True, False, False, True])
  mask_R = jnp.array([True, True, True, False, False])
  class_R = classify(correct_R, redundant_R, mask_R)
  assert class_R.tolist() == [credit.CORRECT, credit.REDUNDANT, credit.ERRONEOUS, credit.NONE, credit.NONE]
  assert class_R.dtype == jnp.int32
  assert sorted(credit.NAMES) == [-1, 0, 1, 2]


@pytest.mark.parametrize("advantage, expected", [
    (0.1, [1.5, 0.75, 0.5, 1.0]), (7.0, [1.5, 0.75, 0.5, 1.0]),
    (-0.1, [0.5, 1.25, 1.5, 1.0]), (0.0, [1.0] * 4), (-0.0, [1.0] * 4)])
def test_modulators(advantage, expected):
  class_R = jnp.array([credit.CORRECT, credit.REDUNDANT, credit.ERRONEOUS, credit.NONE])
  np.testing.assert_allclose(modulator(class_R, advantage, CFG), expected)


def test_good_zooms_never_fare_worse_than_bad_ones():
  class_R = jnp.array([credit.CORRECT, credit.REDUNDANT, credit.ERRONEOUS])
  for advantage in (2.0, -2.0):
    scaled = advantage * np.asarray(modulator(class_R, advantage, CFG))
    assert scaled[0] > scaled[1] > scaled[2]


def test_token_advantages_agree_with_the_slow_loop():
  rng = np.random.default_rng(0)
  advantage_B, m_BR = rng.normal(size=32).astype(np.float32), rng.random((32, 4)).astype(np.float32)
  action_BT, sampled_BT = rng.integers(-1, 4, (32, 50)), rng.random((32, 50)) < 0.7
  arguments = advantage_B, m_BR, action_BT, sampled_BT
  slow = [oracles.token_advantages(*row) for row in zip(*arguments)]
  np.testing.assert_allclose(jax.vmap(token_advantages)(*arguments), slow, atol=1e-6)
  row = [jnp.asarray(x[0]) for x in arguments]
  np.testing.assert_allclose(credit.token_advantages(*row), slow[0], atol=1e-6)
  np.testing.assert_allclose(token_advantages(*row), slow[0], atol=1e-6)


def test_jit_and_vmap_of_the_modulator_change_nothing():
  class_BR = jnp.array([[0, 1, 2, -1]] * 3)
  kernel = functools.partial(modulator, cfg=CFG)
  advantage_B = jnp.array([1.0, -1.0, 0.0])
  mapped = jax.vmap(kernel)(class_BR, advantage_B)
  for row in range(3):
    np.testing.assert_array_equal(mapped[row], kernel(class_BR[row], advantage_B[row]))
    np.testing.assert_array_equal(mapped[row], credit.modulator(class_BR[row], advantage_B[row], CFG))


def test_without_rounds_every_sampled_token_gets_the_advantage():
  nothing = np.zeros(0, bool)
  class_R = classify(nothing, nothing, nothing)
  m_R = modulator(class_R, 3.0, CFG)
  assert class_R.shape == m_R.shape == (0,)
  adv_T = token_advantages(3.0, m_R, np.array([-1, -1]), np.array([True, False]))
  assert adv_T.tolist() == [3.0, 0.0]


def test_gradient_with_respect_to_the_advantage_is_the_modulator():
  m_R, action_T = jnp.array([0.5, 2.0]), jnp.array([-1, 0, 1, 1])
  grad_T = jax.jacobian(token_advantages)(0.0, m_R, action_T, jnp.array([True, True, True, False]))
  assert grad_T.tolist() == [1.0, 0.5, 2.0, 0.0]


def test_defaults_are_the_configuration_s():
  assert credit.Config(**config.default().credit) == credit.Config()


def test_wrong_shapes_are_named():
  with pytest.raises(ValueError, match=r"correct_R, redundant_R and mask_R.*\(3,\)"):
    credit.classify(jnp.ones(2, bool), jnp.ones(3, bool), jnp.ones(2, bool))
  with pytest.raises(ValueError, match=r"action_T and sampled_T.*\(4,\).*\(5,\)"):
    credit.token_advantages(1.0, jnp.ones(2), jnp.zeros(4, int), jnp.ones(5, bool))


def test_soft_modulators_by_hand():
  cfg = credit.Config(kind="soft", h_good=1.5, h_redundant=0.75, h_bad=0.5, softness=0.1)
  class_R = jnp.array([credit.CORRECT, credit.ERRONEOUS, credit.CORRECT, credit.REDUNDANT, credit.NONE])
  margin_R = jnp.array([0.0, -0.1, 5.0, 0.1, 0.3])
  s = 1 / (1 + np.exp(-1.0))  # one softness above the threshold
  praise = [1.0, 0.5 + (1 - s), 1.5, 0.75, 1.0]
  blame = [1.0, 1.5 - (1 - s), 0.5, 1.25, 1.0]
  for advantage, expected in ((2.0, praise), (-2.0, blame), (0.0, [1.0] * 5)):
    for kernel in (modulator, credit.modulator):
      np.testing.assert_allclose(kernel(class_R, advantage, cfg, margin_R), expected, atol=1e-6)
  np.testing.assert_allclose(modulator(class_R, -2.0, dataclasses.replace(cfg, mirror=False), margin_R), praise,
                             atol=1e-6)
  with pytest.raises(ValueError, match=r"margin_R .*\(5,\).*None"):
    credit.modulator(class_R, 1.0, cfg)


def test_soft_becomes_hard():
  cfg = credit.Config(kind="soft", softness=1e-4)
  class_R = jnp.array([credit.CORRECT, credit.ERRONEOUS, credit.REDUNDANT])
  for advantage in (1.0, -1.0):
    np.testing.assert_allclose(modulator(class_R, advantage, cfg, jnp.array([0.2, -0.2, 0.2])),
                               modulator(class_R, advantage, credit.Config()), atol=1e-6)


def test_without_the_mirror_blame_is_dealt_as_praise():
  class_R = jnp.array([credit.CORRECT, credit.REDUNDANT, credit.ERRONEOUS])
  cfg = dataclasses.replace(CFG, mirror=False)
  np.testing.assert_allclose(modulator(class_R, -1.0, cfg), [1.5, 0.75, 0.5])


@pytest.mark.parametrize("kind", ["additive", "none"])
def test_kinds_that_do_not_multiply(kind):
  assert modulator(jnp.array([0, 1, 2]), -1.0, credit.Config(kind=kind)).tolist() == [1.0, 1.0, 1.0]


def test_steps_are_added_on_their_own_tokens():
  action_T, sampled_T = jnp.array([-1, 0, 0, 1, -1]), jnp.array([True, True, False, True, False])
  got = token_advantages(2.0, jnp.ones(2), action_T, sampled_T, jnp.array([0.5, -3.0]))
  assert got.tolist() == [2.0, 2.5, 0.0, -1.0, 0.0]
  nothing = token_advantages(2.0, jnp.ones(0), action_T, sampled_T, jnp.zeros(0))
  assert nothing.tolist() == [2.0, 2.0, 0.0, 2.0, 0.0]


def test_an_advantage_of_its_own_for_each_token():
  action_T, sampled_T = jnp.array([-1, 0, 0, 1]), jnp.array([True, True, False, True])
  got = token_advantages(jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([0.5, 2.0]), action_T, sampled_T)
  assert got.tolist() == [1.0, 1.0, 0.0, 8.0]


def test_scale_is_kept():
  rng = np.random.default_rng(0)
  plain, after, mask = *rng.normal(size=(2, 8, 30)).astype(np.float32), rng.random((8, 30)) < 0.5
  kept = jax.jit(lambda after, plain, mask: credit.keep_scale(after, credit.sizes(after, plain, mask)))
  got = np.asarray(kept(after, plain, mask))
  assert np.abs(got[mask]).mean() == pytest.approx(np.abs(plain[mask]).mean(), rel=1e-5)
  np.testing.assert_allclose(got[0, 0] / got[3, 7], after[0, 0] / after[3, 7], rtol=1e-5)  # only scaled
  np.testing.assert_allclose(credit.keep_scale(after, credit.sizes(after, plain, mask)), got, rtol=1e-5)
  parts = [credit.sizes(after[rows], plain[rows], mask[rows]) for rows in (slice(3), slice(3, 8))]
  np.testing.assert_allclose(sum(parts), credit.sizes(after, plain, mask), rtol=1e-5)
  grad = jax.grad(lambda a, m: kept(a, plain, m).sum())
  for nothing in (np.zeros_like(mask), mask):
    assert np.isfinite(grad(jnp.zeros((8, 30)), nothing)).all()
  assert not kept(jnp.zeros((8, 30)), plain, mask).any()


def test_an_unknown_kind_is_named():
  with pytest.raises(ValueError, match="kind must be one of hard, soft, additive, none. Received: 'firm'"):
    credit.modulator(jnp.zeros(1, int), 1.0, credit.Config(kind="firm"))
