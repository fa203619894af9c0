"""The loss by hand, against a slow loop, and with extreme or masked inputs."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl import oracles
from virl_jax import config
from virl_jax.rl import loss

# Compiled, because tests pay for every small operation that is compiled by itself.
policy_loss = jax.jit(loss.policy_loss, static_argnames="cfg")
surrogate = jax.jit(loss.surrogate, static_argnames="cfg")
kl = jax.jit(loss.kl, static_argnames="estimator")
loss_and_grad = jax.jit(jax.value_and_grad(loss.policy_loss, has_aux=True), static_argnames="cfg")
surrogate_grad = jax.jit(
    jax.grad(lambda *a, cfg: loss.surrogate(*a, cfg)[0].sum()), static_argnames="cfg")

CFG = loss.Config(clip_low=0.2, clip_high=0.3, kl_coef=0.1, entropy_coef=0.01)


def random_batch(seed=0, rows=6, tokens=20):
  rng = np.random.default_rng(seed)
  logp, old, ref = (-rng.exponential(1.0, (3, rows, tokens))).astype(np.float32)
  entropy = rng.random((rows, tokens)).astype(np.float32)
  advantage = rng.normal(size=(rows, tokens)).astype(np.float32)
  return logp, old, ref, entropy, advantage, rng.random((rows, tokens)) < 0.6


def test_masked_mean():
  x = jnp.array([[1.0, 2.0], [4.0, jnp.nan]])
  assert loss.masked_mean(x, jnp.array([[True, False], [True, False]])) == 2.5
  assert loss.masked_mean(x, jnp.zeros((2, 2), bool)) == 0.0
  with pytest.raises(ValueError, match=r"mask .*\(2, 2\).*\(2,\)"):
    loss.masked_mean(x, jnp.ones(2, bool))


@pytest.mark.parametrize("ratio, advantage, expected, clipped, slope", [
    (1.0, 2.0, -2.0, False, -2.0),   # on policy: plain policy gradient
    (1.2, 2.0, -2.4, False, -2.4),   # inside
    (1.5, 2.0, -2.6, True, 0.0),     # praised enough: clipped at 1.3
    (0.5, 2.0, -1.0, False, -1.0),   # praise for what has become rarer is never clipped
    (0.5, -2.0, 1.6, True, 0.0),     # blamed enough: clipped at 0.8
    (1.5, -2.0, 3.0, False, 3.0),    # blame for what has become likelier is never clipped
    (0.75, -1.0, 0.8, True, 0.0),    # the low side has its own limit
    (1.25, 1.0, -1.25, False, -1.25),
    (9.0, 0.0, 0.0, False, 0.0)])
def test_clipped_surrogate_golden(ratio, advantage, expected, clipped, slope):
  logp, old, advantage = (np.full((1, 1), x, np.float32) for x in (math.log(ratio) - 1.0, -1.0, advantage))
  one = np.ones((1, 1), bool)
  value, is_clipped = surrogate(logp, old, advantage, one, CFG)
  assert value.item() == pytest.approx(expected, abs=1e-6)
  assert is_clipped.item() is clipped
  grad = surrogate_grad(logp, old, advantage, one, cfg=CFG)
  assert grad.item() == pytest.approx(slope, abs=1e-6)


def test_k3_golden_and_sign():
  logp = jnp.log(jnp.array([[0.5, 0.5, 0.25]]))
  ref = jnp.log(jnp.array([[0.5, 0.25, 0.5]]))
  np.testing.assert_allclose(kl(logp, ref), [[0, 0.5 + math.log(2) - 1, 2 - math.log(2) - 1]], atol=1e-6)
  batch = random_batch()
  assert (kl(batch[0], batch[2]) >= 0).all()


def test_k3_averages_to_the_divergence():
  p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
  estimate = kl(jnp.log(p), jnp.log(q))
  assert (p * estimate).sum() == pytest.approx((p * np.log(p / q)).sum(), abs=1e-6)


def test_k3_gradient_brings_the_policy_to_the_reference():
  grad = jax.grad(lambda p: loss.kl(p, jnp.array([-1.0, -9.0])).sum())(jnp.array([-3.0, -1.0]))
  assert grad[0] < 0 < grad[1]  # descent raises what is too rare and lowers what is too common


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_slow_loop(seed):
  batch = random_batch(seed)
  _, expected = oracles.policy_loss(*batch, CFG)
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


# --- other surrogates and aggregates, against one slow loop ---------------------------------------------


RIVALS = {
    "dual": {"dual_clip": 1.5}, "gspo": {"kind": "gspo", "aggregate": "sequence"}, "cispo": {"kind": "cispo"},
    "sequence": {"aggregate": "sequence"}, "constant": {"aggregate": "constant", "norm_tokens": 7},
    "sampler": {"sampler_cap": 1.2}, "all": {"kind": "cispo", "aggregate": "constant", "sampler_cap": 2.0}}


@pytest.mark.parametrize("changes", RIVALS.values(), ids=RIVALS)
def test_rivals_agree_with_the_slow_loop(changes):
  cfg = loss.Config(**changes)
  logp, old, ref, entropy, advantage, mask = random_batch(7)
  mask[2] = False  # a row that counts for nothing
  sampler = (old + np.random.default_rng(1).normal(size=old.shape) * 0.5).astype(np.float32)
  want, _ = oracles.policy_loss(logp, old, ref, entropy, advantage, mask, cfg, sampler)
  for kernel in (policy_loss, loss.policy_loss):
    value, metrics = kernel(logp, old, ref, entropy, advantage, mask, cfg=cfg, logp_sampler_BT=sampler)
    np.testing.assert_allclose([value, metrics["loss/policy"]], [want, want], rtol=1e-5, atol=1e-6)
  both, _ = jax.vmap(lambda *a: policy_loss(*a[:-1], cfg, a[-1]))(
      *(np.stack([x, x]) for x in (logp, old, ref, entropy, advantage, mask, sampler)))
  np.testing.assert_allclose(both, [want, want], rtol=1e-5, atol=1e-6)
  # What is masked never matters, and nothing at all gives nothing.
  grad = jax.jit(jax.grad(lambda p, m, s: loss.policy_loss(p, old, ref, entropy, advantage, m, cfg, s)[0]))
  clean = grad(logp, mask, sampler)
  np.testing.assert_array_equal(clean, grad(np.where(mask, logp, np.nan), mask, np.where(mask, sampler, np.inf)))
  assert np.abs(clean).max() > 0 and not np.asarray(clean)[~mask].any()
  assert not grad(logp, np.zeros_like(mask), sampler).any()


def test_gspo_clips_whole_sequences_and_keeps_each_token_s_advantage():
  cfg = loss.Config(kind="gspo", aggregate="sequence", clip_low=0.1, clip_high=0.1)
  logp = jnp.log(jnp.array([[2.0, 0.5, 1.0], [2.0, 1.0, 1.0]]))  # geometric means 1 and 2 ** (1 / 3) = 1.26
  old, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
  advantage = jnp.array([[1.0, -1.0, 3.0], [1.0, 1.0, 1.0]])
  value, clipped = surrogate(logp, old, advantage, mask, cfg)
  np.testing.assert_allclose(value, [[-1, 1, -3], [-1.1] * 3], atol=1e-6)
  assert clipped.tolist() == [[False] * 3, [True] * 3]
  grad = surrogate_grad(logp, old, advantage, mask, cfg=cfg)
  np.testing.assert_allclose(grad, [[-1, 1, -3], [0, 0, 0]], atol=1e-6)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
  cfg, one = loss.Config(kind="cispo", clip_high=0.3), np.ones((1, 1), bool)
  logp, old, advantage = (np.full((1, 1), x, np.float32) for x in (math.log(4) - 3.0, -3.0, 2.0))
  assert surrogate_grad(logp, old, advantage, one, cfg=cfg).item() == pytest.approx(-2.6)
  assert surrogate(logp, old, advantage, one, cfg)[1].item()
  assert surrogate_grad(logp, old, advantage, one, cfg=loss.Config(clip_high=0.3)).item() == 0.0


def test_the_dual_clip_bounds_blame():
  cfg, one = loss.Config(dual_clip=3.0), np.ones((1, 1), bool)
  for ratio, advantage, value, slope in ((5.0, -2.0, 6.0, 0.0), (2.0, -2.0, 4.0, 4.0), (5.0, 2.0, -2.56, 0.0)):
    inputs = (np.full((1, 1), x, np.float32) for x in (math.log(ratio) - 1.0, -1.0, advantage))
    logp, old, advantage = inputs
    assert surrogate(logp, old, advantage, one, cfg)[0].item() == pytest.approx(value, rel=1e-5)
    assert surrogate_grad(logp, old, advantage, one, cfg=cfg).item() == pytest.approx(slope, abs=1e-5)


def test_weights_against_the_sampler():
  old, sampler = jnp.log(jnp.array([0.5, 0.5, 0.1])), jnp.log(jnp.array([0.5, 0.1, 0.5]))
  np.testing.assert_allclose(loss.sampler_weight(old, sampler, loss.Config(sampler_cap=2.0)), [1, 2, 0.2], rtol=1e-6)
  assert loss.sampler_weight(old, sampler, loss.Config()).tolist() == [1.0] * 3
  assert not jax.grad(lambda o: loss.sampler_weight(o, sampler, loss.Config(sampler_cap=2.0)).sum())(old).any()
  with pytest.raises(ValueError, match=r"logp_sampler_BT must have the shape of logp_BT.*None"):
    loss.policy_loss(*random_batch(), loss.Config(sampler_cap=2.0))


def test_kl_estimators_by_hand():
  logp, ref = jnp.log(jnp.array([0.5, 0.25])), jnp.log(jnp.array([0.25, 0.5]))
  two = math.log(2)
  np.testing.assert_allclose(kl(logp, ref, "k1"), [two, -two], rtol=1e-6)
  np.testing.assert_allclose(kl(logp, ref, "k2"), [two ** 2 / 2] * 2, rtol=1e-6)
  np.testing.assert_allclose(kl(logp, ref, "k3"), [0.5 + two - 1, 2 - two - 1], rtol=1e-5)
  with pytest.raises(ValueError, match="estimator must be one of k1, k2, k3. Received: 'k4'"):
    loss.kl(logp, ref, "k4")


def test_k1_and_k3_average_to_the_divergence_and_k2_comes_near():
  p, q = np.array([0.7, 0.2, 0.1]), np.array([0.6, 0.25, 0.15])
  true = (p * np.log(p / q)).sum()
  for estimator, far in (("k1", 1e-6), ("k3", 1e-6), ("k2", 0.1 * true)):
    assert (p * np.asarray(kl(jnp.log(p), jnp.log(q), estimator))).sum() == pytest.approx(true, abs=far)


def softmax_policy(theta):
  p = np.exp(theta - theta.max())
  return p / p.sum()


def score_gradient(theta, q, estimator):
  """REINFORCE's expected gradient if the estimate is (part of) the reward: sum of p * estimate * grad log p."""
  p = softmax_policy(theta)
  each = np.asarray(kl(jnp.log(p), jnp.log(q), estimator), np.float64)
  return p * (each - (p * each).sum())


def divergence(theta, q):
  p = softmax_policy(theta)
  return float((p * np.log(p / q)).sum())


@pytest.mark.parametrize("ratio, advantage, slope", [
    (1.0, 2.0, -2.0), (1.2, 2.0, -2.4), (9.0, 2.0, -2.6), (0.1, 2.0, -1.6), (9.0, -2.0, 2.6), (0.1, -2.0, 1.6)])
def test_cispo_weighs_each_token_by_a_ratio_that_is_no_variable(ratio, advantage, slope):
  """The gradient is -clip(ratio) * A: through the ratio it would be larger inside the clip, and 0 outside."""
  cfg = loss.Config(kind="cispo", clip_low=0.2, clip_high=0.3)
  logp, old, advantage = (np.full((1, 1), x, np.float32) for x in (math.log(ratio) - 1.0, -1.0, advantage))
  grad = surrogate_grad(logp, old, advantage, np.ones((1, 1), bool), cfg=cfg)
  assert grad.item() == pytest.approx(slope, rel=1e-5)


def test_in_the_reward_only_k1_has_the_gradient_of_the_divergence():
  q = np.array([0.15, 0.25, 0.6])
  theta = np.log(np.array([0.7, 0.2, 0.1]))
  eps = 1e-5
  true = np.array([(divergence(theta + eps * e, q) - divergence(theta - eps * e, q)) / (2 * eps) for e in np.eye(3)])
  np.testing.assert_allclose(score_gradient(theta, q, "k1"), true, atol=1e-5)
  for estimator in ("k2", "k3"):
    got = score_gradient(theta, q, estimator)
    assert got @ true / np.linalg.norm(got) / np.linalg.norm(true) < 0.9, "it points elsewhere"
  start = {e: theta for e in loss.ESTIMATORS}
  for _ in range(200):  # exact steps down each one's gradient
    start = {e: t - 0.1 * score_gradient(t, q, e) for e, t in start.items()}
  assert divergence(start["k1"], q) < 0.01 * divergence(theta, q) < divergence(start["k3"], q)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_in_the_reward_k2_and_k3_are_refused(estimator):
  with pytest.raises(ValueError, match=f"config.loss.kl_estimator must be 'k1' with loss.kl_in_reward.*'{estimator}'"):
    loss.Config(kl_coef=0.1, kl_in_reward=True, kl_estimator=estimator)


@pytest.mark.parametrize("gap", [3.0, 20.0, 500.0, -500.0])
def test_k3_of_one_token_is_bounded(gap):
  logp = jnp.array([-1.0])
  got = loss.kl(logp, logp + gap).item()
  assert got == 10.0
  assert np.isfinite(jax.grad(lambda p: loss.kl(p, logp + gap).sum())(logp)).all()


def test_kl_is_in_the_loss_or_in_the_reward():
  *inputs, mask = random_batch()
  cfg = loss.Config(kl_coef=0.3)
  value, m = policy_loss(*inputs, mask, cfg)
  assert value == pytest.approx(float(m["loss/policy"] + 0.3 * m["loss/kl"]), rel=1e-6)
  value, m = policy_loss(*inputs, mask, dataclasses.replace(cfg, kl_in_reward=True, kl_estimator="k1"))
  assert value == m["loss/policy"] and m["loss/kl"] != 0
  value, m = policy_loss(*inputs, mask, cfg, kl_coef=jnp.float32(0.7))
  assert value == pytest.approx(float(m["loss/policy"] + 0.7 * m["loss/kl"]), rel=1e-6)


@pytest.mark.parametrize("found, factor", [(0.1, 1.0), (0.5, 1.2), (0.0, 0.8), (0.11, 1.1)])
def test_the_coefficient_adapts(found, factor):
  cfg = loss.Config(kl_target=0.1, kl_horizon=64)
  assert loss.next_kl_coef(jnp.float32(0.5), found, 64, cfg) == pytest.approx(0.5 * factor, rel=1e-5)
  assert loss.next_kl_coef(jnp.float32(0.5), found, 64, loss.Config()) == 0.5


def test_value_loss_by_hand():
  cfg = loss.Config(value_clip=0.2)
  value, old, target = (jnp.array([x]) for x in ([1.0, 0.5, 9.0, 0.0], [0.0, 0.5, 0.0, 0.1], [1.0, 1.0, 0.0, 0.0]))
  mask = jnp.array([[True, True, False, True]])
  # Clipped at 0.2, the first misses by 0.8 and not by 0; the others may move that far.
  got, m = jax.jit(loss.value_loss, static_argnames="cfg")(value, old, target, mask, cfg)
  assert got == pytest.approx(0.5 * (0.64 + 0.25 + 0.0) / 3) and m["critic/loss"] == got
  assert m["critic/clip_frac"] == pytest.approx(1 / 3)
  # Returns 1, 1, 0: variance 2 / 9; errors 0, 0.5, 0: variance 1 / 18.
  assert m["critic/explained"] == pytest.approx(0.75)
  free, _ = loss.value_loss(value, old, target, mask, loss.Config(value_clip=0.0))
  assert free == pytest.approx(0.25 / 6)
  grad = jax.grad(lambda v, m: loss.value_loss(v, old, target, m, cfg)[0])
  np.testing.assert_allclose(grad(value, mask), [[0.0, -0.5 / 3, 0.0, 0.0]], atol=1e-6)
  assert not grad(value, jnp.zeros((1, 4), bool)).any()
  assert set(map(float, loss.value_loss(value, old, target, jnp.zeros((1, 4), bool), cfg)[1].values())) == {0.0}


def test_what_there_is_not_is_named():
  *inputs, mask = random_batch()
  with pytest.raises(ValueError, match="kind must be one of ppo, gspo, cispo. Received: 'trpo'"):
    loss.policy_loss(*inputs, mask, loss.Config(kind="trpo"))
  with pytest.raises(ValueError, match="aggregate must be one of token, sequence, constant. Received: 'row'"):
    loss.policy_loss(*inputs, mask, loss.Config(aggregate="row"))
