"""Kernels that rlax has as well, against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax.rl import advantage
from virl_jax.rl import loss

rlax = pytest.importorskip("rlax", reason="rlax comes with the extra `parity`")


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_gae(gamma, lam):
  rng = np.random.default_rng(0)
  reward_T, value_T = rng.normal(size=(2, 40)).astype(np.float32)
  mask_T = rng.random(40) < 0.7
  ours, returns = jax.jit(advantage.gae, static_argnames="cfg")(
      reward_T, value_T, mask_T, cfg=advantage.Config(kind="gae", gamma=gamma, lam=lam))
  # rlax has no mask: what the policy did not write is left out, and the value after the last token is 0.
  r, v = reward_T[mask_T], np.append(value_T[mask_T], np.float32(0))
  theirs = rlax.truncated_generalized_advantage_estimation(jnp.asarray(r), jnp.full(len(r), gamma), lam, jnp.asarray(v))
  np.testing.assert_allclose(ours[mask_T], theirs, atol=1e-5)
  np.testing.assert_allclose(returns[mask_T], theirs + v[:-1], atol=1e-5)


@pytest.mark.parametrize("clip", [0.1, 0.2, 0.5])
def test_the_clipped_surrogate_and_its_gradient(clip):
  rng = np.random.default_rng(1)
  old_T, gap_T, advantage_T = rng.normal(size=(3, 60)).astype(np.float32)
  logp_T, mask_BT = old_T + 0.4 * gap_T, np.ones((1, 60), bool)
  cfg = loss.Config(clip_low=clip, clip_high=clip)
  nothing_BT = np.zeros((1, 60), np.float32)

  def ours(logp_T):
    return loss.policy_loss(logp_T[None], old_T[None], old_T[None], nothing_BT, advantage_T[None], mask_BT, cfg)[0]

  theirs = lambda logp_T: rlax.clipped_surrogate_pg_loss(jnp.exp(logp_T - old_T), jnp.asarray(advantage_T), clip)
  for ours_is, theirs_is in zip(jax.value_and_grad(ours)(logp_T), jax.value_and_grad(theirs)(logp_T)):
    np.testing.assert_allclose(ours_is, theirs_is, atol=1e-6)
