"""The policy loss: clipped surrogate, k3 estimates of KL, entropy bonus, means over tokens.

Our reading: the mean is over all sampled tokens of the batch (DAPO's token mean), so that long
trajectories weigh more than short ones.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

_MAX_LOG_RATIO = 20.0  # nats; e^20 is far outside any clip range, and finite in float32


@dataclasses.dataclass(frozen=True)
class Config:
  """Weights of the loss.

  Attributes:
    clip_low: the ratio is clipped at 1 - clip_low.
    clip_high: the ratio is clipped at 1 + clip_high.
    kl_coef: weight of KL(policy || reference).
    entropy_coef: weight of the entropy bonus.
  """

  clip_low: float = 0.2
  clip_high: float = 0.28
  kl_coef: float = 0.0
  entropy_coef: float = 0.0


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  """The mean of what the mask shows; 0 if it shows nothing.

  Args:
    x: float32[...].
    mask: bool[...], of the same shape.

  Returns:
    float32 scalar.

  Raises:
    ValueError: shapes differ.

  Source: ours.
  """
  if x.shape != mask.shape:
    raise ValueError(f"mask must have the shape of x, {x.shape}. Received: {mask.shape}")
  return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def clipped_surrogate(logp_BT: jax.Array, logp_old_BT: jax.Array, advantage_BT: jax.Array,
                      cfg: Config) -> tuple[jax.Array, jax.Array]:
  """PPO's pessimistic surrogate, with a clip of its own on either side.

  Args:
    logp_BT: float32[B, T] nats, under the policy that is being updated.
    logp_old_BT: float32[B, T] nats, under the policy before the update.
    advantage_BT: float32[B, T].
    cfg: the clip.

  Returns:
    loss_BT: float32[B, T], to be minimised.
    clipped_BT: bool[B, T], True where the clip stops the gradient.

  Source: PPO (arXiv 1707.06347), eq. 7; the asymmetric clip is DAPO's (arXiv 2503.14476).
  """
  ratio_BT = _ratio(logp_BT, logp_old_BT)
  kept_BT = jnp.clip(ratio_BT, 1.0 - cfg.clip_low, 1.0 + cfg.clip_high)
  free_BT, held_BT = ratio_BT * advantage_BT, kept_BT * advantage_BT
  return -jnp.minimum(free_BT, held_BT), held_BT < free_BT


def kl_k3(logp_BT: jax.Array, logp_ref_BT: jax.Array) -> jax.Array:
  """Per-token estimate of KL(policy || reference) on tokens that the policy sampled.

  Non-negative and unbiased.  A reference more than 20 nats above the policy counts as 20.

  Args:
    logp_BT: float32[B, T] nats, under the policy.
    logp_ref_BT: float32[B, T] nats, under the reference.

  Returns:
    float32[B, T] nats.

  Source: Schulman, "Approximating KL divergence" (2020), k3.
  """
  gap_BT = jnp.minimum(logp_ref_BT - logp_BT, _MAX_LOG_RATIO)
  return jnp.exp(gap_BT) - gap_BT - 1.0


def policy_loss(logp_BT: jax.Array, logp_old_BT: jax.Array, logp_ref_BT: jax.Array,
                entropy_BT: jax.Array, advantage_BT: jax.Array, mask_BT: jax.Array,
                cfg: Config) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss of a minibatch, and what to watch.

  What stands at masked tokens never matters, not even if it is not finite.

  Args:
    logp_BT: float32[B, T] nats, under the policy that is being updated.
    logp_old_BT: float32[B, T] nats, under the policy before the update.
    logp_ref_BT: float32[B, T] nats, under the frozen reference.
    entropy_BT: float32[B, T] nats, of the policy's next-token distribution.
    advantage_BT: float32[B, T], after credit assignment.
    mask_BT: bool[B, T], True on the tokens that are trained on.
    cfg: clip and weights.

  Returns:
    loss: float32 scalar, policy + kl_coef * kl - entropy_coef * entropy; 0 for an empty mask.
    metrics: float32 scalars.  `loss/total`; `loss/policy`; `loss/kl` (nats, against the reference);
      `loss/entropy` (nats); `ppo/clip_frac` in [0, 1]; `ppo/ratio_max` (largest ratio on a trained
      token, at most e^20; 0 if there is none); `ppo/kl_old` (nats, KL(old || policy)).

  Raises:
    ValueError: shapes differ.

  Source: PPO (arXiv 1707.06347), eq. 9; token mean from DAPO (arXiv 2503.14476), eq. 8.
  """
  named = {"logp_old_BT": logp_old_BT, "logp_ref_BT": logp_ref_BT, "entropy_BT": entropy_BT,
           "advantage_BT": advantage_BT, "mask_BT": mask_BT}
  for name, value in named.items():
    if value.shape != logp_BT.shape:
      raise ValueError(f"{name} must have the shape of logp_BT, {logp_BT.shape}. Received: {value.shape}")
  # Cleared before the exponentials: masking their results would leave NaN in the gradients.
  logp_BT, logp_old_BT, logp_ref_BT, entropy_BT, advantage_BT = (
      jnp.where(mask_BT, x, 0.0) for x in (logp_BT, logp_old_BT, logp_ref_BT, entropy_BT, advantage_BT))

  surrogate_BT, clipped_BT = clipped_surrogate(logp_BT, logp_old_BT, advantage_BT, cfg)
  policy = masked_mean(surrogate_BT, mask_BT)
  kl = masked_mean(kl_k3(logp_BT, logp_ref_BT), mask_BT)
  entropy = masked_mean(entropy_BT, mask_BT)
  loss = policy + cfg.kl_coef * kl - cfg.entropy_coef * entropy
  return loss, {
      "loss/total": loss,
      "loss/policy": policy,
      "loss/kl": kl,
      "loss/entropy": entropy,
      "ppo/clip_frac": masked_mean(clipped_BT.astype(jnp.float32), mask_BT),
      "ppo/ratio_max": jnp.max(jnp.where(mask_BT, _ratio(logp_BT, logp_old_BT), 0.0), initial=0.0),
      "ppo/kl_old": masked_mean(kl_k3(logp_old_BT, logp_BT), mask_BT),  # the old policy sampled
  }


def _ratio(logp_BT, logp_old_BT):
  return jnp.exp(jnp.clip(logp_BT - logp_old_BT, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
