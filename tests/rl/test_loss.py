"""The loss by hand, against a slow loop, and where its inputs are extreme or masked."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax import config
from virl_jax.rl import loss

# Compiled, because tests pay for every small operation that is compiled by itself.
policy_loss = jax.jit(loss.policy_loss, static_argnames="cfg")
clipped_surrogate = jax.jit(loss.clipped_surrogate, static_argnames="cfg")
kl_k3 = jax.jit(loss.kl_k3)
loss_and_grad = jax.jit(jax.value_and_grad(loss.policy_loss, has_aux=True), static_argnames="cfg")
surrogate_grad = jax.jit(
    jax.grad(lambda *a, cfg: loss.clipped_surrogate(*a, cfg)[0].sum()), static_argnames="cfg")

CFG = loss.Config(clip_low=0.2, clip_high=0.3, kl_coef=0.1, entropy_coef=0.01)


def random_batch(seed=0, rows=6, tokens=20):
  rng = np.random.default_rng(seed)
  logp, old, ref = (-rng.exponential(1.0, (3, rows, tokens))).astype(np.float32)
  entropy = rng.random((rows, tokens)).astype(np.float32)
  advantage = rng.normal(size=(rows, tokens)).astype(np.float32)
  return logp, old, ref, entropy, advantage, rng.random((rows, tokens)) < 0.6


def slow_loss(logp, old, ref, entropy, advantage, mask, cfg):
  tokens = []
  for index in zip(*np.nonzero(np.asarray(mask))):
    p, o, r, a = (float(x[index]) for x in (logp, old, ref, advantage))
    ratio = math.exp(p - o)
    held = min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high)
    tokens.append({
        "loss/policy": -min(ratio * a, held * a),
        "loss/kl": math.exp(r - p) - (r - p) - 1,
        "loss/entropy": float(entropy[index]),
        "ppo/clip_frac": (a > 0 and ratio > 1 + cfg.clip_high) or (a < 0 and ratio < 1 - cfg.clip_low),
        "ppo/kl_old": ratio - (p - o) - 1,
        "ratio": ratio})
  means = {key: np.mean([t[key] for t in tokens]) for key in tokens[0]}
  means["ppo/ratio_max"] = max(t["ratio"] for t in tokens)
  del means["ratio"]
  means["loss/total"] = (means["loss/policy"] + cfg.kl_coef * means["loss/kl"]
                         - cfg.entropy_coef * means["loss/entropy"])
  return means


def test_masked_mean():
  x = jnp.array([[1.0, 2.0], [4.0, jnp.nan]])
  assert loss.masked_mean(x, jnp.array([[True, False], [True, False]])) == 2.5
  assert loss.masked_mean(x, jnp.zeros((2, 2), bool)) == 0.0
  with pytest.raises(ValueError, match=r"mask .*\(2, 2\).*\(2,\)"):
    loss.masked_mean(x, jnp.ones(2, bool))


@pytest.mark.parametrize("ratio, advantage, expected, clipped, slope", [
    (1.0, 2.0, -2.0, False, -2.0),   # on policy: plain policy gradient
    (1.2, 2.0, -2.4, False, -2.4),   # inside
    (1.5, 2.0, -2.6, True, 0.0),     # praised enough: held at 1.3
    (0.5, 2.0, -1.0, False, -1.0),   # praise for what has become rarer is never held
    (0.5, -2.0, 1.6, True, 0.0),     # blamed enough: held at 0.8
    (1.5, -2.0, 3.0, False, 3.0),    # blame for what has become likelier is never held
    (0.75, -1.0, 0.8, True, 0.0),    # the low side has its own limit
    (1.25, 1.0, -1.25, False, -1.25),
    (9.0, 0.0, 0.0, False, 0.0)])
def test_clipped_surrogate_golden(ratio, advantage, expected, clipped, slope):
  logp, old, advantage = (np.full((1, 1), x, np.float32) for x in (math.log(ratio) - 1.0, -1.0, advantage))
  value, is_clipped = clipped_surrogate(logp, old, advantage, CFG)
  assert value.item() == pytest.approx(expected, abs=1e-6)
  assert is_clipped.item() is clipped
  grad = surrogate_grad(logp, old, advantage, cfg=CFG)
  assert grad.item() == pytest.approx(slope, abs=1e-6)


def test_k3_golden_and_sign():
  logp = jnp.log(jnp.array([[0.5, 0.5, 0.25]]))
  ref = jnp.log(jnp.array([[0.5, 0.25, 0.5]]))
  np.testing.assert_allclose(kl_k3(logp, ref), [[0, 0.5 + math.log(2) - 1, 2 - math.log(2) - 1]], atol=1e-6)
  batch = random_batch()
  assert (kl_k3(batch[0], batch[2]) >= 0).all()


def test_k3_averages_to_the_divergence():
  p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
  estimate = kl_k3(jnp.log(p), jnp.log(q))
  assert (p * estimate).sum() == pytest.approx((p * np.log(p / q)).sum(), abs=1e-6)


def test_k3_gradient_brings_the_policy_to_the_reference():
  grad = jax.grad(lambda p: loss.kl_k3(p, jnp.array([-1.0, -30.0])).sum())(jnp.array([-3.0, -1.0]))
  assert grad[0] < 0 < grad[1]  # descent raises what is too rare and lowers what is too common


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_slow_loop(seed):
  batch = random_batch(seed)
  expected = slow_loss(*batch, CFG)
  for kernel in (loss.policy_loss, policy_loss) if seed == 0 else (policy_loss,):
    value, metrics = kernel(*batch, cfg=CFG)
    assert set(metrics) == set(expected)
    assert value == metrics["loss/total"]
    for name in expected:
      assert metrics[name].shape == ()
      np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_vmap_changes_nothing():
  kernel = functools.partial(policy_loss, cfg=CFG)
  batches = [random_batch(seed) for seed in range(3)]
  value, metrics = jax.vmap(kernel)(*(np.stack(x) for x in zip(*batches)))
  for index, batch in enumerate(batches):
    one_value, one_metrics = kernel(*batch)
    np.testing.assert_allclose(value[index], one_value, rtol=1e-5)
    np.testing.assert_allclose(metrics["ppo/ratio_max"][index], one_metrics["ppo/ratio_max"], rtol=1e-5)


def test_tokens_weigh_the_same_in_short_and_long_rows():
  zero_BT = jnp.zeros((2, 4))
  mask_BT = jnp.array([[True, False, False, False], [True, True, True, False]])
  advantage_BT = jnp.array([[4.0, 9, 9, 9], [0.0, 0.0, 0.0, 9.0]])
  value, _ = policy_loss(zero_BT, zero_BT, zero_BT, zero_BT, advantage_BT, mask_BT, CFG)
  assert value == -1.0  # 4 over four tokens; a mean of row means would give -2


def test_on_policy_the_gradient_is_that_of_the_policy_gradient():
  logp, _, _, entropy, advantage, mask = random_batch()
  _, grad = loss_and_grad(logp, logp, logp, entropy, advantage, mask, CFG)
  np.testing.assert_allclose(grad, np.where(mask, -advantage / mask.sum(), 0), atol=1e-6)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_masked_tokens_never_matter(junk):
  *inputs, mask = random_batch()
  clean = loss_and_grad(*inputs, mask, CFG)
  dirty = loss_and_grad(*(np.where(mask, x, np.float32(junk)) for x in inputs), mask, CFG)
  jax.tree.map(np.testing.assert_array_equal, clean, dirty)
  assert not clean[1][~mask].any()


def test_an_empty_mask_gives_nothing():
  *inputs, mask = random_batch()
  (value, metrics), grad = loss_and_grad(*inputs, np.zeros(mask.shape, bool), CFG)
  assert value == 0.0 and not grad.any()
  assert set(map(float, metrics.values())) == {0.0}


@pytest.mark.parametrize("logp, old", [
    (0.0, -1000.0), (-1000.0, 0.0), (-float("inf"), 0.0), (0.0, -float("inf"))])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_log_probabilities_stay_finite(logp, old, sign):
  one = np.ones((1, 1), np.float32)
  (value, metrics), grad = loss_and_grad(
      logp * one, old * one, max(old, -1000.0) * one, one, sign * one, one > 0, CFG)
  assert np.isfinite(grad).all()
  assert metrics["ppo/ratio_max"] <= math.exp(20) * 1.001
  assert np.isfinite(metrics["loss/policy"])
  if np.isfinite([logp, old]).all():
    assert np.isfinite(value) and all(np.isfinite(v) for v in metrics.values())


def test_ratio_max_sees_trained_tokens_only():
  zero_BT = jnp.zeros((1, 2))
  logp_BT, mask_BT = jnp.log(jnp.array([[0.5, 4.0]])), jnp.array([[True, False]])
  _, metrics = policy_loss(logp_BT, zero_BT, zero_BT, zero_BT, zero_BT, mask_BT, CFG)
  assert metrics["ppo/ratio_max"] == pytest.approx(0.5)


def test_defaults_are_the_configuration_s():
  assert loss.Config(**config.default().loss) == loss.Config()


def test_wrong_shapes_are_named():
  *inputs, mask = random_batch()
  with pytest.raises(ValueError, match=r"entropy_BT .*\(6, 20\).*\(20,\)"):
    loss.policy_loss(*inputs[:3], inputs[3][0], inputs[4], mask, CFG)
