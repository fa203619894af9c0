"""The policy loss: a surrogate, KL to the reference, entropy bonus, means over tokens; and the critic's loss.

Surrogates (`KINDS`), with r the ratio of a token's probability under the policy to that before the update:

    ppo    min(r A, clip(r) A); with a dual clip at least dual_clip * A where A < 0
    gspo   the same with the sequence's ratio: r is e to the mean of the log-ratios of a trajectory's tokens
    cispo  -stop_gradient(clip(r)) * A * logp: no token loses its gradient

How a batch's tokens become one number (`AGGREGATES`):

    token     mean over all trained tokens, so that long trajectories weigh more than short ones
    sequence  mean over trajectories of the mean over their tokens
    constant  sum over tokens / (trajectories * norm_tokens): lengths play no part

Our reading: the mean is over all sampled tokens of the batch (DAPO's token mean) unless another is asked for.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from virl_jax import checks

_MAX_LOG_RATIO = 20.0  # nats; e^20 is far outside any clip range, and finite in float32
_MAX_K3 = 10.0         # nats a token, as verl caps it: at a gap of 20 nats k3 is 4.9e8, and drowns all other tokens
KINDS = ("ppo", "gspo", "cispo")
AGGREGATES = ("token", "sequence", "constant")
ESTIMATORS = ("k1", "k2", "k3")


@dataclasses.dataclass(frozen=True)
class Config:
  """Weights of the loss.

  Attributes:
    kind: the surrogate, one of `KINDS`.
    aggregate: one of `AGGREGATES`.
    norm_tokens: tokens that a trajectory's sum is divided by if aggregate is "constant".
    clip_low: the ratio is clipped at 1 - clip_low.
    clip_high: the ratio is clipped at 1 + clip_high.
    dual_clip: largest ratio that counts where A < 0; 0 for no limit.
    sampler_cap: largest importance weight of a token, trainer against sampler (truncated importance sampling); 0 for
      no such weights.
    kl_coef: weight of KL(policy || reference).
    kl_estimator: one of `ESTIMATORS`; "k1" if the KL is in the reward.
    kl_in_reward: subtract the KL from the reward, token by token, instead of adding it to the loss.
    kl_target: nats a token that an adaptive kl_coef aims at; 0 for a constant one.
    kl_horizon: trajectories over which an adaptive kl_coef changes by the share by which the KL misses its target.
    entropy_coef: weight of the entropy bonus.
    value_coef: weight of the critic's loss.
    value_clip: largest change of a value in one update that the loss rewards; 0 for no limit.
  """

  kind: str = "ppo"
  aggregate: str = "token"
  norm_tokens: int = 1024
  clip_low: float = 0.2
  clip_high: float = 0.28
  dual_clip: float = 0.0
  sampler_cap: float = 0.0
  kl_coef: float = 0.0
  kl_estimator: str = "k3"
  kl_in_reward: bool = False
  kl_target: float = 0.0
  kl_horizon: float = 10000.0
  entropy_coef: float = 0.0
  value_coef: float = 0.5
  value_clip: float = 0.2

  def __post_init__(self):
    some = checks.real(0)
    checks.section(vars(self), "loss", kind=checks.one_of(KINDS), aggregate=checks.one_of(AGGREGATES),
                   norm_tokens=checks.whole(1), clip_low=checks.real(0, 1), clip_high=some, dual_clip=some,
                   sampler_cap=some, kl_coef=some, kl_estimator=checks.one_of(ESTIMATORS), kl_in_reward=checks.flag,
                   kl_target=some, kl_horizon=checks.real(above=0), entropy_coef=some, value_coef=some, value_clip=some)
    checks.need(self.kl_estimator == "k1" or not self.kl_in_reward, "loss.kl_estimator",
                "'k1' with loss.kl_in_reward: there the gradient of k2 and k3 is not the divergence's, and following "
                "it the divergence grows", self.kl_estimator)


def masked_mean(x: jax.Array, mask: jax.Array, whole: jax.Array | None = None) -> jax.Array:
  """The mean of what the mask shows; 0 if it shows nothing.

  Args:
    x: float32[...].
    mask: bool[...], of the same shape.
    whole: bool[...], a mask of which `mask` is a part: the result is then that part's share of the whole's mean, so
      that the shares of all parts add up to the mean.

  Returns:
    float32 scalar.

  Raises:
    ValueError: shapes differ.

  Source: ours.
  """
  if x.shape != mask.shape:
    raise ValueError(f"mask must have the shape of x, {x.shape}. Received: {mask.shape}")
  return jnp.where(mask, x, 0.0).sum() / jnp.maximum((mask if whole is None else whole).sum(), 1)


def aggregate(x_BT: jax.Array, mask_BT: jax.Array, cfg: Config, whole_BT: jax.Array | None = None) -> jax.Array:
  """The mean of a batch's tokens, by one of `AGGREGATES`; 0 if the mask shows nothing.

  Args:
    x_BT: float32[B, T].
    mask_BT: bool[B, T]; a trajectory without trained tokens does not count.
    cfg: which of `AGGREGATES`.
    whole_BT: bool[B, T], the minibatch's mask, where `mask_BT` shows a microbatch's trajectories: the result is then
      the microbatch's share of the minibatch's number, so that the shares of all microbatches add up to it.

  Returns:
    float32 scalar.

  Raises:
    ValueError: shapes differ, or there is no such aggregate.

  Source: "token" DAPO (arXiv 2503.14476), eq. 8; "sequence" GRPO (arXiv 2402.03300), eq. 3; "constant"
  Dr. GRPO (arXiv 2503.20783), section 3.2.
  """
  if cfg.aggregate == "token":
    return masked_mean(x_BT, mask_BT, whole_BT)
  if cfg.aggregate not in AGGREGATES:
    raise ValueError(f"aggregate must be one of {', '.join(AGGREGATES)}. Received: {cfg.aggregate!r}")
  if x_BT.shape != mask_BT.shape:
    raise ValueError(f"mask_BT must have the shape of x_BT, {x_BT.shape}. Received: {mask_BT.shape}")
  sum_B, count_B = jnp.where(mask_BT, x_BT, 0.0).sum(-1), mask_BT.sum(-1)
  per = jnp.maximum(count_B, 1) if cfg.aggregate == "sequence" else cfg.norm_tokens
  rows = (count_B > 0) if whole_BT is None else whole_BT.any(-1)
  return (sum_B / per).sum() / jnp.maximum(rows.sum(), 1)


def log_ratio(logp_BT: jax.Array, logp_old_BT: jax.Array, mask_BT: jax.Array, cfg: Config) -> jax.Array:
  """The logarithm of the ratio that the surrogate uses: each token's own, or its sequence's.

  Args:
    logp_BT: float32[B, T] nats, under the policy.
    logp_old_BT: float32[B, T] nats, under the policy before the update.
    mask_BT: bool[B, T], the trained tokens.
    cfg: "gspo" makes it the sequence's.

  Returns:
    float32[B, T] nats, within +-20.  The sequence's has its value from the whole sequence and its gradient
    from each token alone, so that tokens can have advantages of their own.

  Source: GSPO (arXiv 2507.18071), eq. 7, and eq. 14 for the gradient.
  """
  gap_BT = jnp.clip(logp_BT - logp_old_BT, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
  if cfg.kind != "gspo":
    return gap_BT
  gap_BT = jnp.where(mask_BT, gap_BT, 0.0)
  mean_B1 = gap_BT.sum(-1, keepdims=True) / jnp.maximum(mask_BT.sum(-1, keepdims=True), 1)
  return jax.lax.stop_gradient(mean_B1) + gap_BT - jax.lax.stop_gradient(gap_BT)


def surrogate(logp_BT: jax.Array, logp_old_BT: jax.Array, advantage_BT: jax.Array, mask_BT: jax.Array,
              cfg: Config) -> tuple[jax.Array, jax.Array]:
  """What is minimised on each token; the ratio has one clip above 1 and another below.

  Args:
    logp_BT: float32[B, T] nats, under the policy that is being updated.
    logp_old_BT: float32[B, T] nats, under the policy before the update.
    advantage_BT: float32[B, T].
    mask_BT: bool[B, T], the trained tokens.
    cfg: kind and clips.

  Returns:
    loss_BT: float32[B, T].
    clipped_BT: bool[B, T], True where a clip is active: in "cispo" it bounds the weight, else it stops the gradient.

  Raises:
    ValueError: there is no such kind.

  Source: PPO (arXiv 1707.06347), eq. 7; the asymmetric clip is DAPO's (arXiv 2503.14476), the dual one is from
  arXiv 1912.09729, eq. 5; GSPO, arXiv 2507.18071; CISPO, MiniMax-M1 (arXiv 2506.13585), eq. 4.
  """
  if cfg.kind not in KINDS:
    raise ValueError(f"kind must be one of {', '.join(KINDS)}. Received: {cfg.kind!r}")
  ratio_BT = jnp.exp(log_ratio(logp_BT, logp_old_BT, mask_BT, cfg))
  kept_BT = jnp.clip(ratio_BT, 1.0 - cfg.clip_low, 1.0 + cfg.clip_high)
  if cfg.kind == "cispo":
    return -jax.lax.stop_gradient(kept_BT) * advantage_BT * logp_BT, kept_BT != ratio_BT
  free_BT, held_BT = ratio_BT * advantage_BT, kept_BT * advantage_BT
  gain_BT, clipped_BT = jnp.minimum(free_BT, held_BT), held_BT < free_BT
  if cfg.dual_clip:
    floor_BT = cfg.dual_clip * advantage_BT
    low_BT = (advantage_BT < 0) & (gain_BT < floor_BT)
    gain_BT, clipped_BT = jnp.where(low_BT, floor_BT, gain_BT), clipped_BT | low_BT
  return -gain_BT, clipped_BT


def kl(logp_BT: jax.Array, logp_ref_BT: jax.Array, estimator: str = "k3") -> jax.Array:
  """Per-token estimate of KL(policy || reference) on tokens that the policy sampled.

      k1  logp - logp_ref                       unbiased, of either sign
      k2  (logp - logp_ref) ** 2 / 2            biased, never negative
      k3  ratio - 1 - log ratio, ref / policy   unbiased, never negative

  In the loss, where the estimate itself is differentiated, k2 has the gradient of the divergence, k3 that of the
  divergence the other way round, and k1's has nothing to do with it.  In the reward, where the estimate weighs the
  gradient of the token's log-probability, only k1 has the divergence's.

  k3 is capped at 10 nats, and has no gradient above: as in verl.

  Args:
    logp_BT: float32[B, T] nats, under the policy.
    logp_ref_BT: float32[B, T] nats, under the reference.
    estimator: one of `ESTIMATORS`.

  Returns:
    float32[B, T] nats.

  Raises:
    ValueError: there is no such estimator.

  Source: Schulman, "Approximating KL divergence" (2020); the cap is verl's.
  """
  if estimator not in ESTIMATORS:
    raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}. Received: {estimator!r}")
  if estimator == "k1":
    return logp_BT - logp_ref_BT
  if estimator == "k2":
    return 0.5 * jnp.square(logp_BT - logp_ref_BT)
  gap_BT = jnp.clip(logp_ref_BT - logp_BT, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
  return jnp.minimum(jnp.exp(gap_BT) - gap_BT - 1.0, _MAX_K3)


def next_kl_coef(kl_coef: jax.Array, kl_mean: jax.Array, rows: int, cfg: Config) -> jax.Array:
  """The adaptive coefficient after a batch: up if the KL is above its target, else down.

  Args:
    kl_coef: float32 scalar, positive.
    kl_mean: float32 scalar, nats a token, of this batch.
    rows: trajectories of this batch.
    cfg: target and horizon.

  Returns:
    float32 scalar; unchanged if there is no target.

  Source: Ziegler et al., arXiv 1909.08593, section 2.2; the error is clipped to +-0.2 as there.
  """
  if not cfg.kl_target:
    return kl_coef
  return kl_coef * (1.0 + jnp.clip(kl_mean / cfg.kl_target - 1.0, -0.2, 0.2) * rows / cfg.kl_horizon)


def sampler_weight(logp_old_BT: jax.Array, logp_sampler_BT: jax.Array, cfg: Config) -> jax.Array:
  """Truncated importance weights between the sampler's distribution and the trainer's before the update.

  Args:
    logp_old_BT: float32[B, T] nats, the trainer's.
    logp_sampler_BT: float32[B, T] nats, as sampled.
    cfg: the cap; with 0 all weights are 1.

  Returns:
    float32[B, T] in [0, cap], without a gradient.

  Source: truncated importance sampling for rollouts, Yao et al., "Your efficient RL framework secretly brings
  you off-policy RL training" (2025).
  """
  if not cfg.sampler_cap:
    return jnp.ones_like(logp_old_BT)
  gap_BT = jnp.clip(logp_old_BT - logp_sampler_BT, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
  return jax.lax.stop_gradient(jnp.minimum(jnp.exp(gap_BT), cfg.sampler_cap))


def value_loss(value_BT: jax.Array, value_old_BT: jax.Array, return_BT: jax.Array, mask_BT: jax.Array,
               cfg: Config, whole_BT: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The critic's loss: half the squared error, the worse of the value's and the clipped value's.

  Args:
    value_BT: float32[B, T], of the critic that is being updated.
    value_old_BT: float32[B, T], before the update.
    return_BT: float32[B, T], the targets.
    mask_BT: bool[B, T], the trained tokens.
    cfg: the clip.
    whole_BT: bool[B, T], see `aggregate`.

  Returns:
    float32 scalar, mean over tokens, and metrics: `critic/loss`, `critic/clip_frac`, `critic/return_var` (the returns'
    variance), `critic/explained` (the share of it that the values explain; 0 if there is none).

  Source: PPO's reference implementation; `critic/explained` is the usual diagnostic.
  """
  value_BT, value_old_BT, return_BT = (jnp.where(mask_BT, x, 0.0) for x in (value_BT, value_old_BT, return_BT))
  error_BT = jnp.square(value_BT - return_BT)
  clipped_BT = jnp.zeros_like(mask_BT)
  if cfg.value_clip:
    near_BT = value_old_BT + jnp.clip(value_BT - value_old_BT, -cfg.value_clip, cfg.value_clip)
    near_error_BT = jnp.square(near_BT - return_BT)
    clipped_BT, error_BT = near_error_BT > error_BT, jnp.maximum(error_BT, near_error_BT)
  value = 0.5 * masked_mean(error_BT, mask_BT, whole_BT)
  spread = lambda x: masked_mean(jnp.square(x - masked_mean(x, mask_BT)), mask_BT)
  total, rest = spread(return_BT), spread(return_BT - value_BT)
  return value, {"critic/loss": value, "critic/clip_frac": masked_mean(clipped_BT.astype(jnp.float32), mask_BT),
                 "critic/return_var": total,
                 "critic/explained": jnp.where(total > 0, 1.0 - rest / jnp.where(total > 0, total, 1.0), 0.0)}


def policy_loss(logp_BT: jax.Array, logp_old_BT: jax.Array, logp_ref_BT: jax.Array,
                entropy_BT: jax.Array, advantage_BT: jax.Array, mask_BT: jax.Array,
                cfg: Config, logp_sampler_BT: jax.Array | None = None, kl_coef: jax.Array | None = None,
                whole_BT: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss of a minibatch, and what to watch.

  Values at masked tokens never matter, not even if they are not finite.

  Args:
    logp_BT: float32[B, T] nats, under the policy that is being updated.
    logp_old_BT: float32[B, T] nats, under the policy before the update.
    logp_ref_BT: float32[B, T] nats, under the frozen reference.
    entropy_BT: float32[B, T] nats, of the policy's next-token distribution.
    advantage_BT: float32[B, T], after credit assignment.
    mask_BT: bool[B, T], True on the tokens that are trained on.
    cfg: kinds, clips and weights.
    logp_sampler_BT: float32[B, T] nats, as sampled; needed if `cfg.sampler_cap`.
    kl_coef: float32 scalar, the coefficient of this step; None for `cfg.kl_coef`.
    whole_BT: bool[B, T], the minibatch's trained tokens, where `mask_BT` shows those of a microbatch: the loss is then
      the microbatch's share of the minibatch's; the metrics are the microbatch's own, except the losses.

  Returns:
    loss: float32 scalar, policy + kl_coef * kl - entropy_coef * entropy, without the kl if it is in the reward;
      0 for an empty mask.
    metrics: float32 scalars.  `loss/total`; `loss/policy`; `loss/kl` (nats, against the reference);
      `loss/entropy` (nats); `ppo/clip_frac` in [0, 1]; `ppo/ratio_max` (largest ratio on a trained
      token, at most e^20; 0 if there is none); `ppo/kl_old` (nats, KL(old || policy)).

  Raises:
    ValueError: shapes differ, or `cfg` has an unknown kind.

  Source: PPO (arXiv 1707.06347), eq. 9; see `surrogate`, `aggregate` and `kl` for the rest.
  """
  named = {"logp_old_BT": logp_old_BT, "logp_ref_BT": logp_ref_BT, "entropy_BT": entropy_BT,
           "advantage_BT": advantage_BT, "mask_BT": mask_BT}
  if cfg.sampler_cap:
    named["logp_sampler_BT"] = logp_sampler_BT
  for name, value in named.items():
    if value is None or value.shape != logp_BT.shape:
      raise ValueError(f"{name} must have the shape of logp_BT, {logp_BT.shape}. "
                       f"Received: {None if value is None else value.shape}")
  # Cleared before the exponentials: masking their results would leave NaN in the gradients.
  clear = lambda x: jnp.where(mask_BT, x, 0.0)
  logp_BT, logp_old_BT, logp_ref_BT, entropy_BT, advantage_BT = map(
      clear, (logp_BT, logp_old_BT, logp_ref_BT, entropy_BT, advantage_BT))

  surrogate_BT, clipped_BT = surrogate(logp_BT, logp_old_BT, advantage_BT, mask_BT, cfg)
  if cfg.sampler_cap:
    surrogate_BT = surrogate_BT * sampler_weight(logp_old_BT, clear(logp_sampler_BT), cfg)
  policy = aggregate(surrogate_BT, mask_BT, cfg, whole_BT)
  kl_mean = aggregate(kl(logp_BT, logp_ref_BT, cfg.kl_estimator), mask_BT, cfg, whole_BT)
  entropy = aggregate(entropy_BT, mask_BT, cfg, whole_BT)
  kl_coef = 0.0 if cfg.kl_in_reward else cfg.kl_coef if kl_coef is None else kl_coef
  loss = policy + kl_coef * kl_mean - cfg.entropy_coef * entropy
  ratio_BT = jnp.exp(log_ratio(logp_BT, logp_old_BT, mask_BT, cfg))
  return loss, {
      "loss/total": loss,
      "loss/policy": policy,
      "loss/kl": masked_mean(kl(logp_BT, logp_ref_BT, cfg.kl_estimator), mask_BT),
      "loss/entropy": masked_mean(entropy_BT, mask_BT),
      "ppo/clip_frac": masked_mean(clipped_BT.astype(jnp.float32), mask_BT),
      "ppo/ratio_max": jnp.max(jnp.where(mask_BT, ratio_BT, 0.0), initial=0.0),
      "ppo/kl_old": masked_mean(kl(logp_old_BT, logp_BT), mask_BT),  # the old policy sampled
  }
