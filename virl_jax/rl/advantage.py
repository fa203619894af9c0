"""Group-relative advantages: how much better a trajectory did than its siblings.

Our reading: the coarse advantage of ViRL is GRPO's; the standard deviation is the population's.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Config:
  """How the coarse advantage is computed.

  Attributes:
    normalize_std: divide by the group's standard deviation.
  """

  normalize_std: bool = True


def group_relative(reward_B: jax.Array, group_size: int, cfg: Config,
                   mask_B: jax.Array | None = None) -> jax.Array:
  """Reward minus the mean of the group, divided by the group's standard deviation.

  Args:
    reward_B: float32[B]; rows of one group are neighbours.
    group_size: rows of a group, G; divides B.
    cfg: whether to divide by the standard deviation.
    mask_B: bool[B], False on rows that count for nothing, whatever their reward holds; None for none.

  Returns:
    float32[B], finite; exactly 0 on masked rows and throughout a group whose rewards are all equal.

  Raises:
    ValueError: the rows don't make whole groups, or the mask doesn't fit.

  Source: GRPO, DeepSeekMath (arXiv 2402.03300), section 4.1.2.
  """
  reward_B = jnp.asarray(reward_B, jnp.float32)
  if reward_B.ndim != 1:
    raise ValueError(f"reward_B must have shape [B]. Received: {reward_B.shape}")
  if group_size < 1 or reward_B.shape[0] % group_size:
    raise ValueError(f"group_size must divide the {reward_B.shape[0]} rows of reward_B. "
                     f"Received: {group_size}")
  mask_B = jnp.ones(reward_B.shape, bool) if mask_B is None else jnp.asarray(mask_B, bool)
  if mask_B.shape != reward_B.shape:
    raise ValueError(f"mask_B must have shape {reward_B.shape}. Received: {mask_B.shape}")

  def one_group(reward_G, mask_G):
    count = jnp.maximum(mask_G.sum(), 1)
    # Measured from one of the group's own rewards, equal rewards are 0, and so is their mean:
    # the mean of the rewards themselves is rounded, and dividing by the deviation would amplify that.
    offset_G = jnp.where(mask_G, reward_G - reward_G[jnp.argmax(mask_G)], 0.0)
    centred_G = jnp.where(mask_G, offset_G - offset_G.sum() / count, 0.0)
    if not cfg.normalize_std:
      return centred_G
    # eps under the root, not beside it: the root then has a gradient at 0.
    return centred_G / jnp.sqrt(jnp.square(centred_G).sum() / count + _EPS**2)

  groups = (-1, group_size)
  return jax.vmap(one_group)(reward_B.reshape(groups), mask_B.reshape(groups)).reshape(-1)
