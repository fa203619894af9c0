"""What a batch of trajectories earned, and whom it is credited to: the four kernels, composed once.

    judge    looks -> rewards -> advantages -> token advantages
             regions and targets   answers, format   groups   tokens

`looks` judges visual actions, `rewards` trajectories, `credits` tokens; each takes what the one before gave.  Arrays
in, arrays out, whole batches; no model.  A new term of the reward is a kernel in `reward` and a line here.
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
  """Everything that is judged by.

  Attributes:
    group_size: rollouts of one prompt, G; rows of one group are neighbours.
    reward, credit, advantage: of the kernels.
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
    judged_BR: bool, the actions that there is something to judge by.
  """

  fidelity: reward.Fidelity
  class_BR: jax.Array
  judged_BR: jax.Array


@flax.struct.dataclass
class Credits:
  """Advantages.

  Attributes:
    advantage_BT: float32, of each token, after credit assignment; 0 off trained tokens.
    advantage_B: float32, of each trajectory.
    modulator_BR: float32, what the advantage was multiplied by on each action's tokens.
    return_BT: float32, the critic's targets; None without a critic.
  """

  advantage_BT: jax.Array
  advantage_B: jax.Array
  modulator_BR: jax.Array
  return_BT: jax.Array | None = None


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
    answer_B: float32, 1 if the answer is right.
    format_B: float32, 1 if every turn was well formed.
    cfg: weights.

  Source: see `reward.total`.
  """
  return jax.vmap(lambda *a: reward.total(*a, cfg))(answer_B, format_B, looks.fidelity.mean)


def informative(boxes: Boxes, answer_B: jax.Array, format_B: jax.Array, cfg: Config, h0: jax.Array | float | None
                ) -> jax.Array:
  """bool[B]: whether the rewards of each trajectory's group differ; arguments as in `looks` and `rewards`."""
  return advantage.informative(rewards(looks(boxes, cfg.reward, h0), answer_B, format_B, cfg.reward), cfg.group_size)


def credits(looks: Looks, total_B: jax.Array, action_BT: jax.Array, trained_BT: jax.Array, row_mask_B: jax.Array,
            value_BT: jax.Array | None, cfg: Config, h0: jax.Array | float | None = None) -> Credits:
  """Shares each trajectory's advantage out over its tokens.

  Args:
    looks: the visual actions.
    total_B: float32, what each trajectory earned.
    action_BT: int32, the visual action that a token belongs to; -1 outside actions.
    trained_BT: bool, the tokens that the loss is about.
    row_mask_B: bool, False on rows that count for nothing.
    value_BT: float32, what the critic expected before each token; needed if advantages are GAE's.
    cfg: of the kernels.
    h0: the threshold of this step; None for `cfg.reward.h0`.

  Source: ViRL (arXiv 2511.23031), bi-level credit assignment; see `advantage` and `credit`.
  """
  h0 = cfg.reward.h0 if h0 is None else h0
  plain_BT, advantage_B, return_BT = _coarse(looks, total_B, action_BT, trained_BT, row_mask_B, value_BT, cfg)
  modulate = jax.vmap(lambda class_R, sign, score_R: credit.modulator(class_R, sign, cfg.credit, score_R - h0))
  modulator_of = lambda sign_B: modulate(looks.class_BR, sign_B, looks.fidelity.score_R)
  modulator_BR = modulator_of(advantage_B)
  if cfg.advantage.kind == "gae":  # each token has a sign of its own
    advantage_BT = sum(_spread(jnp.where(plain_BT * sign > 0, plain_BT, 0.0),
                               modulator_of(jnp.full_like(advantage_B, sign)), action_BT, trained_BT)
                       for sign in (1.0, -1.0))
  else:
    step_BR = None
    if cfg.credit.kind == "additive":
      step_BR = cfg.credit.step_weight * advantage.steps(looks.fidelity.reward_R, looks.judged_BR, cfg.group_size)
    advantage_BT = _spread(advantage_B, modulator_BR, action_BT, trained_BT, step_BR)
  if cfg.credit.keep_scale:
    advantage_BT = credit.keep_scale(advantage_BT, plain_BT, trained_BT)
  return Credits(advantage_BT, advantage_B, modulator_BR, return_BT)


def _coarse(looks, total_B, action_BT, trained_BT, row_mask_B, value_BT, cfg
            ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Advantages before the fine level: of each token, of each trajectory; and the critic's targets, if there is one."""
  if cfg.advantage.kind != "gae":
    advantage_B = advantage.relative(total_B, cfg.group_size, cfg.advantage, row_mask_B)
    return jnp.where(trained_BT, advantage_B[:, None], 0.0), advantage_B, None
  reward_BT = jax.vmap(lambda *a: reward.place(*a, cfg.reward))(total_B, looks.fidelity, action_BT, trained_BT)
  raw_BT, return_BT = jax.vmap(lambda *a: advantage.gae(*a, cfg.advantage))(reward_BT, value_BT, trained_BT)
  plain_BT = advantage.standardize(raw_BT.reshape(-1), trained_BT.reshape(-1), True).reshape(raw_BT.shape)
  count_B = jnp.maximum(trained_BT.sum(-1), 1)
  return plain_BT, jnp.where(trained_BT, plain_BT, 0.0).sum(-1) / count_B, return_BT


def _spread(advantage_BX, modulator_BR, action_BT, trained_BT, step_BR=None):
  spread = jax.vmap(credit.token_advantages, (0, 0, 0, 0, None if step_BR is None else 0))
  return spread(advantage_BX, modulator_BR, action_BT, trained_BT, step_BR)
