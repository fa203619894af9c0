"""Advantages: how much better a trajectory, or a token, did than was expected.

One number a trajectory (`relative`), its reward minus

    group  the mean of its group of G, divided by the group's standard deviation (GRPO), or not divided (Dr. GRPO)
    rloo   the mean of the other G - 1 of its group
    batch  the mean of the whole batch, divided by the batch's standard deviation

or one number a token: `gae`, from a critic's values, whitened over the whole batch.

A standard deviation below `std_floor` counts as `std_floor`.  ViRL's reward is dense: where all answers are right and
all boxes good, what is left of a group's spread is noise of the IoU, and dividing by that would make advantages as
large as those between right and wrong.

Our reading: the coarse advantage of ViRL is GRPO's; standard deviations are the population's; the floor is ours.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from virl_jax import checks

_EPS = 1e-6
KINDS = ("group", "rloo", "batch", "gae")
SPREADS = ("total", "answer", "fidelity")


@dataclasses.dataclass(frozen=True)
class Config:
  """How the coarse advantage is computed.

  Attributes:
    kind: one of `KINDS`.
    normalize_std: divide by the group's standard deviation, if kind is "group".
    std_floor: least standard deviation that is divided by, in units of the reward; 0 for none.
    gamma: discount a token, if kind is "gae".
    lam: lambda of GAE, between one-step (0) and Monte Carlo (1).
    spread_of: what makes a group informative, one of `SPREADS`: its total rewards, answers or fidelities.
    least_spread: a group is informative if the largest and the smallest of these differ by more than this.
    drop_equal: groups that are not informative don't count in the loss, not even in its denominators.
  """

  kind: str = "group"
  normalize_std: bool = True
  std_floor: float = 0.005
  gamma: float = 1.0
  lam: float = 1.0
  spread_of: str = "total"
  least_spread: float = 0.01
  drop_equal: bool = False

  def __post_init__(self):
    checks.section(vars(self), "advantage", kind=checks.one_of(KINDS), normalize_std=checks.flag,
                   std_floor=checks.real(0), gamma=checks.real(0, 1), lam=checks.real(0, 1),
                   spread_of=checks.one_of(SPREADS), least_spread=checks.real(0), drop_equal=checks.flag)


@flax.struct.dataclass
class Moments:
  """Count, mean and squared deviations of the entries that a mask shows.

  Attributes:
    count: float32 scalar, how many entries.
    mean: float32 scalar; 0 if there are none.
    square: float32 scalar, the sum of their squared distances from the mean.
  """

  count: jax.Array
  mean: jax.Array
  square: jax.Array


def moments(x: jax.Array, mask: jax.Array) -> Moments:
  """The moments of what the mask shows.

  Args:
    x: float32[...].
    mask: bool[...], of the same shape.

  Source: ours.
  """
  x_N, mask_N = x.reshape(-1), mask.reshape(-1)
  count = mask_N.sum().astype(jnp.float32)
  # Measured from one of the entries, equal entries are 0, and so is their mean: the mean of the entries
  # themselves is rounded, and dividing by the deviation would amplify that.
  base = jnp.where(count > 0, x_N[jnp.argmax(mask_N)], 0.0)
  offset_N = jnp.where(mask_N, x_N - base, 0.0)
  shift = offset_N.sum() / jnp.maximum(count, 1)
  return Moments(count, base + shift, jnp.where(mask_N, jnp.square(offset_N - shift), 0.0).sum())


def pooled(parts: list[Moments]) -> Moments:
  """The moments of several parts together; if all entries are equal, their mean is exact.

  Args:
    parts: one for each part; some may be empty.

  Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
  """
  count_N, mean_N, square_N = (jnp.stack([getattr(part, name) for part in parts])
                               for name in ("count", "mean", "square"))
  count, base = count_N.sum(), mean_N[jnp.argmax(count_N > 0)]
  mean = base + (count_N * (mean_N - base)).sum() / jnp.maximum(count, 1)
  return Moments(count, mean, (square_N + count_N * jnp.square(mean_N - mean)).sum())


def standardize(x: jax.Array, mask: jax.Array, divide: bool, floor: float = 0.0, of: Moments | None = None
                ) -> jax.Array:
  """Minus the mean of what the mask shows, divided by its standard deviation if asked.

  Args:
    x: float32[...].
    mask: bool[...], False on entries that count for nothing, whatever they hold.
    divide: whether to divide.
    floor: least standard deviation that is divided by.
    of: moments to use instead of those of these entries.

  Returns:
    float32[...], finite; exactly 0 off the mask, and throughout if all entries are equal.

  Source: GRPO, DeepSeekMath (arXiv 2402.03300), section 4.1.2; the floor is ours.
  """
  of = moments(x, mask) if of is None else of
  centred = jnp.where(mask, x - of.mean, 0.0)
  if not divide:
    return centred
  # eps under the root, not beside it: the root then has a gradient at 0.
  return centred / jnp.sqrt(jnp.maximum(of.square / jnp.maximum(of.count, 1), floor ** 2) + _EPS ** 2)


def relative(reward_B: jax.Array, group_size: int, cfg: Config, mask_B: jax.Array | None = None,
             of: Moments | None = None) -> jax.Array:
  """One advantage a trajectory, by `cfg.kind`; see the module docstring.

  Args:
    reward_B: float32[B]; rows of one group are neighbours.
    group_size: rows of a group, G; divides B.
    cfg: which kind.
    mask_B: bool[B], False on rows that count for nothing, whatever their reward holds; None if all rows count.
    of: moments of the whole batch, if these rows are a part of it and the kind is "batch"; None if they are all.

  Returns:
    float32[B], finite; exactly 0 on masked rows, throughout a group (batch) whose rewards are all equal, and
    for "rloo" on a row without siblings.

  Raises:
    ValueError: the rows don't make whole groups, the mask doesn't fit, or the kind has no advantage a trajectory.

  Source: GRPO, arXiv 2402.03300, section 4.1.2; Dr. GRPO, arXiv 2503.20783; RLOO, arXiv 2402.14740, section 3.2;
  REINFORCE++, arXiv 2501.03262, for statistics of the batch.
  """
  reward_B, mask_B = _rows(reward_B, mask_B, group_size)
  if cfg.kind == "batch":
    return standardize(reward_B, mask_B, True, cfg.std_floor, of)
  if cfg.kind not in ("group", "rloo"):
    raise ValueError(f"kind must be group, rloo or batch. Received: {cfg.kind!r}")

  def one_group(reward_G, mask_G):
    if cfg.kind == "group":
      return standardize(reward_G, mask_G, cfg.normalize_std, cfg.std_floor)
    # Minus the mean of the others is the deviation from the mean of all, times n / (n - 1).
    count = mask_G.sum()
    return standardize(reward_G, mask_G, False) * (count / jnp.maximum(count - 1, 1))

  groups = (-1, group_size)
  return jax.vmap(one_group)(reward_B.reshape(groups), mask_B.reshape(groups)).reshape(-1)


def steps(reward_BR: jax.Array, mask_BR: jax.Array, group_size: int, floor: float = 0.0) -> jax.Array:
  """How much better each visual action did than the actions of its whole group: z-scores.

  Args:
    reward_BR: float32[B, R], each action's own reward; rows of one group are neighbours.
    mask_BR: bool[B, R], True on actions that can be judged, of rows that count.
    group_size: G; divides B.
    floor: least standard deviation that is divided by.

  Returns:
    float32[B, R], finite; exactly 0 off the mask, and throughout a group whose actions all earned the same.

  Raises:
    ValueError: the rows don't make whole groups.

  Source: process supervision with GRPO, DeepSeekMath (arXiv 2402.03300), section 4.1.3.
  """
  B, R = reward_BR.shape
  if group_size < 1 or B % group_size:
    raise ValueError(f"group_size must divide the {B} rows of reward_BR. Received: {group_size}")
  if R == 0:
    return reward_BR
  groups = B // group_size, group_size * R
  each = jax.vmap(lambda r, m: standardize(r, m, True, floor))
  return each(reward_BR.reshape(groups), mask_BR.reshape(groups)).reshape(B, R)


def informative(reward_B: jax.Array, group_size: int, mask_B: jax.Array | None = None, least: float = 0.0) -> jax.Array:
  """Which rows belong to an informative group, one whose rewards are not all about equal.

  Args:
    reward_B: float32[B], the rewards whose spread counts; rows of one group are neighbours.
    group_size, mask_B: as in `relative`.
    least: the largest and the smallest of an informative group differ by more than this.

  Returns:
    bool[B], the same for all rows of a group; masked rows don't make a group unequal.

  Raises:
    ValueError: as `relative`.

  Source: dynamic sampling, DAPO (arXiv 2503.14476), section 3.2; its rewards are 0 or 1, the least spread is ours.
  """
  reward_B, mask_B = _rows(reward_B, mask_B, group_size)
  reward_NG, mask_NG = reward_B.reshape(-1, group_size), mask_B.reshape(-1, group_size)
  low_N = jnp.where(mask_NG, reward_NG, jnp.inf).min(-1)
  high_N = jnp.where(mask_NG, reward_NG, -jnp.inf).max(-1)
  return jnp.repeat(high_N - low_N > least, group_size)


def gae(reward_T: jax.Array, value_T: jax.Array, mask_T: jax.Array, cfg: Config) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation over the tokens that the policy wrote.

  What the policy did not write (tool results, padding) is skipped: the next sampled token follows the last one.

  Args:
    reward_T: float32[T], the reward that each token earned.
    value_T: float32[T], the critic's expectation before the token was written.
    mask_T: bool[T], True on tokens that the policy wrote.
    cfg: gamma and lam.

  Returns:
    Advantages and returns (the critic's targets), float32[T] each, 0 off the mask.

  Raises:
    ValueError: shapes differ.

  Source: GAE, arXiv 1506.02438, equations 11-16; the value after the last token is 0.
  """
  if not reward_T.shape == value_T.shape == mask_T.shape:
    raise ValueError("reward_T, value_T and mask_T must have the same shape. "
                     f"Received: {reward_T.shape}, {value_T.shape}, {mask_T.shape}")
  reward_T, value_T = (jnp.where(mask_T, x, 0.0) for x in (reward_T, value_T))

  def back(carry, token):
    next_value, next_advantage = carry
    reward, value, real = token
    advantage = reward + cfg.gamma * next_value - value + cfg.gamma * cfg.lam * next_advantage
    carry = jnp.where(real, value, next_value), jnp.where(real, advantage, next_advantage)
    return carry, jnp.where(real, advantage, 0.0)

  start = jnp.zeros((), reward_T.dtype), jnp.zeros((), reward_T.dtype)
  _, advantage_T = jax.lax.scan(back, start, (reward_T, value_T, mask_T), reverse=True)
  return advantage_T, jnp.where(mask_T, advantage_T + value_T, 0.0)


def _rows(reward_B, mask_B, group_size):
  reward_B = jnp.asarray(reward_B, jnp.float32)
  if reward_B.ndim != 1:
    raise ValueError(f"reward_B must have shape [B]. Received: {reward_B.shape}")
  if group_size < 1 or reward_B.shape[0] % group_size:
    raise ValueError(f"group_size must divide the {reward_B.shape[0]} rows of reward_B. "
                     f"Received: {group_size}")
  mask_B = jnp.ones(reward_B.shape, bool) if mask_B is None else jnp.asarray(mask_B, bool)
  if mask_B.shape != reward_B.shape:
    raise ValueError(f"mask_B must have shape {reward_B.shape}. Received: {mask_B.shape}")
  return reward_B, mask_B
