"""The reward of a batch of trajectories, and its credit to tokens: the four kernels, composed once.

    judge    looks -> rewards -> returns -> credits
             regions and targets   answers, format   the KL, a critic   groups, tokens

`looks` judges visual actions, `rewards` trajectories, `credits` tokens; each takes what the one before returned.
Arrays in, arrays out; no model.  A new term of the reward is a kernel in `reward` and a line here.

A batch that is scored in parts (minibatches) is credited as a whole: the `returns` of each part hold its statistics
(`Returns.moments`), and `credits` takes those of all parts, pooled.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from virl_jax.rl import advantage
from virl_jax.rl import credit
from virl_jax.rl import reward

Boxes = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
  """What trajectories are judged by.

  Attributes:
    group_size: rollouts of one prompt, G; rows of one group are neighbours.
    reward, credit, advantage: the kernels' configurations.
  """

  group_size: int
  reward: reward.Config = reward.Config()
  credit: credit.Config = credit.Config()
  advantage: advantage.Config = advantage.Config()


@flax.struct.dataclass
class Looks:
  """Visual actions, judged.

  Attributes:
    fidelity: of each trajectory; leaves have a leading B.
    class_BR: int32, one of `credit.NAMES`.
    judged_BR: bool, the actions that can be judged, because their task has boxes.
  """

  fidelity: reward.Fidelity
  class_BR: jax.Array
  judged_BR: jax.Array


@flax.struct.dataclass
class Returns:
  """Total rewards of trajectories, as advantages are computed from them.

  Attributes:
    total_B: float32, the reward, minus the KL if that is in the reward.
    raw_BT: float32, advantages token by token, before whitening; None without a critic.
    return_BT: float32, the critic's targets; None without a critic.
    moments: of what is standardised over the whole batch; None if nothing is.
  """

  total_B: jax.Array
  raw_BT: jax.Array | None = None
  return_BT: jax.Array | None = None
  moments: advantage.Moments | None = None


@flax.struct.dataclass
class Credits:
  """Advantages.

  Attributes:
    advantage_BT: float32, of each token, after credit assignment; 0 off trained tokens.
    advantage_B: float32, of each trajectory.
    modulator_BR: float32, what the advantage was multiplied by on each action's tokens.
    sizes_2: float32, these rows' part of what `credit.keep_scale` needs of the batch; None if that is off.
  """

  advantage_BT: jax.Array
  advantage_B: jax.Array
  modulator_BR: jax.Array
  sizes_2: jax.Array | None = None


def looks(boxes: Boxes, cfg: reward.Config, h0: jax.Array | float | None = None) -> Looks:
  """Judges visual actions.

  Args:
    boxes: float32[B, R, 4] regions of the actions and bool[B, R]; float32[B, J, 4] ground truth and bool[B, J];
      pixels of the original.
    cfg: thresholds and weights.
    h0: the threshold of this step; None for `cfg.h0`.

  Source: ViRL (arXiv 2511.23031); see `reward.fidelity` and `credit.classify`.
  """
  h0 = cfg.h0 if h0 is None else h0
  fidelity = jax.vmap(lambda *a: reward.fidelity(*a, cfg, h0))(*boxes)
  judged_BR = fidelity.target_R >= 0
  return Looks(fidelity, jax.vmap(credit.classify)(fidelity.correct_R, fidelity.redundant_R, judged_BR), judged_BR)


def rewards(looks: Looks, answer_B: jax.Array, format_B: jax.Array, cfg: reward.Config) -> jax.Array:
  """float32[B]: the total reward of each trajectory.

  Args:
    looks: its visual actions.
    answer_B: float32 in [0, 1], how right the answer is.
    format_B: float32, 1 if every turn was well formed.
    cfg: weights.

  Source: see `reward.total`.
  """
  return jax.vmap(lambda *a: reward.total(*a, cfg))(answer_B, format_B, looks.fidelity.mean)


def informative(looks: Looks, boxes: Boxes, answer_B: jax.Array, format_B: jax.Array, answerable_B: jax.Array,
                row_mask_B: jax.Array, cfg: Config, order_B: jax.Array | None = None) -> jax.Array:
  """bool[B]: whether each trajectory's group is informative, by `cfg.advantage.spread_of` and `least_spread`.

  Where a task has no accepted answers, or no boxes, the total reward takes the place of "answer", or "fidelity".

  Args:
    looks: the visual actions.
    boxes: as in `looks`.
    answer_B, format_B: as in `rewards`.
    answerable_B: bool, whether the task has accepted answers.
    row_mask_B: bool, False on rows that count for nothing.
    cfg: the configurations of the kernels.
    order_B: int32, the rows in the order that puts groups together; None: they are together.

  Source: see `advantage.informative`.
  """
  seen_B = rewards(looks, answer_B, format_B, cfg.reward)
  if cfg.advantage.spread_of == "answer":
    seen_B = jnp.where(answerable_B, answer_B, seen_B)
  elif cfg.advantage.spread_of == "fidelity":
    seen_B = jnp.where(boxes[3].any(-1), looks.fidelity.mean, seen_B)
  least = cfg.advantage.least_spread
  judged = lambda seen_B, mask_B: advantage.informative(seen_B, cfg.group_size, mask_B, least)
  return _by_group(judged, order_B, seen_B, row_mask_B)


def returns(looks: Looks, total_B: jax.Array, action_BT: jax.Array, trained_BT: jax.Array, row_mask_B: jax.Array,
            cfg: Config, value_BT: jax.Array | None = None, kl_BT: jax.Array | None = None) -> Returns:
  """Total rewards of trajectories, and their part of the batch's statistics.

  Args:
    looks: the visual actions.
    total_B: float32, from `rewards`.
    action_BT: int32, the visual action that a token belongs to; -1 outside actions.
    trained_BT: bool, the tokens that the loss is about.
    row_mask_B: bool, False on rows that count for nothing.
    cfg: the configurations of the kernels.
    value_BT: float32, what the critic expected before each token; needed if advantages are GAE's.
    kl_BT: float32, kl_coef times each token's KL against the reference; 0 off sampled tokens; None if the KL is not
      in the reward.

  Source: GAE with rewards on the tokens that earn them, and each token's KL on that token: ours.
  """
  net_B = total_B if kl_BT is None else total_B - kl_BT.sum(-1)
  if cfg.advantage.kind != "gae":
    return Returns(net_B, moments=advantage.moments(net_B, row_mask_B) if cfg.advantage.kind == "batch" else None)
  reward_BT = jax.vmap(lambda *a: reward.place(*a, cfg.reward))(total_B, looks.fidelity, action_BT, trained_BT)
  if kl_BT is not None:
    reward_BT = reward_BT - kl_BT
  raw_BT, return_BT = jax.vmap(lambda *a: advantage.gae(*a, cfg.advantage))(reward_BT, value_BT, trained_BT)
  return Returns(net_B, raw_BT, return_BT, advantage.moments(raw_BT, trained_BT))


def credits(looks: Looks, returns: Returns, action_BT: jax.Array, trained_BT: jax.Array, row_mask_B: jax.Array,
            cfg: Config, h0: jax.Array | float | None = None, of: advantage.Moments | None = None,
            order_B: jax.Array | None = None) -> Credits:
  """Assigns each trajectory's advantage to its tokens.

  Args:
    looks: the visual actions.
    returns: what they earned.
    action_BT, trained_BT, row_mask_B: as in `returns`.
    cfg: the configurations of the kernels.
    h0: the threshold of this step; None for `cfg.reward.h0`.
    of: `Returns.moments` of the whole batch, pooled; None if these rows are all of it.
    order_B: as in `informative`.

  Returns:
    The advantages.  If `cfg.credit.keep_scale`, the caller has to apply `credit.keep_scale`, which needs `sizes_2` of
    the whole batch.

  Source: ViRL (arXiv 2511.23031), bi-level credit assignment; see `advantage` and `credit`.
  """
  h0, of = cfg.reward.h0 if h0 is None else h0, returns.moments if of is None else of
  modulate = jax.vmap(lambda class_R, sign, score_R: credit.modulator(class_R, sign, cfg.credit, score_R - h0))
  modulator_of = lambda sign_B: modulate(looks.class_BR, sign_B, looks.fidelity.score_R)
  if cfg.advantage.kind == "gae":  # each token has a sign of its own
    plain_BT = advantage.standardize(returns.raw_BT, trained_BT, True, cfg.advantage.std_floor, of)
    advantage_B = plain_BT.sum(-1) / jnp.maximum(trained_BT.sum(-1), 1)
    modulator_BR = modulator_of(advantage_B)
    advantage_BT = sum(_spread(jnp.where(plain_BT * sign > 0, plain_BT, 0.0),
                               modulator_of(jnp.full_like(advantage_B, sign)), action_BT, trained_BT)
                       for sign in (1.0, -1.0))
  else:
    relative = lambda total_B, mask_B: advantage.relative(total_B, cfg.group_size, cfg.advantage, mask_B, of)
    advantage_B = _by_group(relative, order_B, returns.total_B, row_mask_B)
    modulator_BR = modulator_of(advantage_B)
    plain_BT, step_BR = jnp.where(trained_BT, advantage_B[:, None], 0.0), None
    if cfg.credit.kind == "additive":
      steps = lambda reward_BR, mask_BR: advantage.steps(reward_BR, mask_BR, cfg.group_size, cfg.advantage.std_floor)
      step_BR = cfg.credit.step_weight * _by_group(steps, order_B, looks.fidelity.reward_R,
                                                   looks.judged_BR & row_mask_B[:, None])
    advantage_BT = _spread(advantage_B, modulator_BR, action_BT, trained_BT, step_BR)
  sizes_2 = credit.sizes(advantage_BT, plain_BT, trained_BT) if cfg.credit.keep_scale else None
  return Credits(advantage_BT, advantage_B, modulator_BR, sizes_2)


def _by_group(fn, order_B, *arrays):
  """Calls fn with the rows of each group together; its result is in the rows' own order again."""
  if order_B is None:
    return fn(*arrays)
  out = fn(*(a[order_B] for a in arrays))
  return jnp.zeros_like(out).at[order_B].set(out)


def _spread(advantage_BX, modulator_BR, action_BT, trained_BT, step_BR=None):
  spread = jax.vmap(credit.token_advantages, (0, 0, 0, 0, None if step_BR is None else 0))
  return spread(advantage_BX, modulator_BR, action_BT, trained_BT, step_BR)
