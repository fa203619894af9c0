"""Reward kernels: IoU and related scores, rationale fidelity, and the total reward of one trajectory.

Each function takes one trajectory; the caller vmaps.  With `s_kj` the score of visual action k with ground-truth
box j (its IoU, unless another of `MODES` is asked for), and `best_kj` the best score with that box of any action
before k (0 if there is no such action, or the score is below 0, as a generalised IoU may be); with `s_k` the best of
the s_kj, and `best_k` the best_kj of the box that has it:

    sign_k   = +1 if s_k >= h0 else -1
    bonus_k  = max(0, s_k - best_k)
    again_k  = 1 if s_k >= h0, and for each box j with s_kj >= h0: best_kj >= h0 and s_kj <= best_kj + refine_margin
    r_k      = w_sign * sign_k + lam * bonus_k - rho * again_k
    fidelity = average of r_k over the actions + w_cover * (targets hit / targets)

An action counts for every target that it hits, not only for the one that it fits best: boxes overlap in real data,
and a zoom that shows two of them has hit both.

Our reading: refinement and redundancy are kept per target, so that a first zoom to a second target
is neither compared with the first one nor called redundant; with one target this is the paper's
running best.
Our reading: a zoom that hits again what was hit before refines it only if it is better by more than a margin,
`refine_margin`.  With a margin of 0, every other zoom of a policy that jitters by a pixel or two is a refinement.
Our reading: a task without boxes has no fidelity (0), and a trajectory that never zooms on a task
with boxes has a fidelity of its own, `no_action`.
Our reading: coverage of all targets (w_cover), the other scores, the other averages and the schedule of h0
are not the paper's.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from virl_jax import checks

MODES = ("iou", "giou", "coverage", "tightness", "centre")
AVERAGES = ("mean", "sum", "discounted", "best")


@dataclasses.dataclass(frozen=True)
class Config:
  """Weights and thresholds of the reward; see `config.default().reward` for where they come from.

  Attributes:
    h0: score that makes a visual action correct; an IoU in [0, 1] if mode is "iou".
    h0_start: where a linear schedule of h0 begins.
    h0_steps: steps until it arrives at h0; 0 for a constant h0.
    mode: what a box is scored by, one of `MODES`; see `overlap`.
    w_sign: weight of signed correctness.
    lam: weight of progressive refinement.
    rho: penalty of a redundant action.
    refine_margin: an action that hits a target again refines it if its score is above the best so far by more than
      this; in units of the score.
    average: how the r_k become one number, one of `AVERAGES`; see `pool`.
    discount: factor of each further action, if average is "discounted".
    w_cover: weight of the share of targets that were hit.
    w_answer: weight of a right answer.
    w_format: weight of a well-formed trajectory.
    w_fidelity: weight of the fidelity of the visual actions.
    no_action: fidelity of a trajectory without visual actions on a task with boxes.
  """

  h0: float = 0.4
  h0_start: float = 0.2
  h0_steps: int = 0
  mode: str = "iou"
  w_sign: float = 1.0
  lam: float = 0.5
  rho: float = 0.5
  refine_margin: float = 0.05
  average: str = "mean"
  discount: float = 0.9
  w_cover: float = 0.0
  w_answer: float = 1.0
  w_format: float = 0.2
  w_fidelity: float = 1.0
  no_action: float = -1.0

  def __post_init__(self):
    weight = checks.real(0)
    checks.section(vars(self), "reward", h0=checks.real(0, 1, wanted="an IoU in [0, 1]"),
                   h0_start=checks.real(0, 1, wanted="an IoU in [0, 1]"), h0_steps=checks.whole(0),
                   mode=checks.one_of(MODES), w_sign=weight, lam=weight, rho=weight, refine_margin=checks.real(0, 1),
                   average=checks.one_of(AVERAGES), discount=checks.real(above=0, high=1), w_cover=weight,
                   w_answer=weight, w_format=weight, w_fidelity=weight, no_action=checks.real())


@flax.struct.dataclass
class Fidelity:
  """What the visual actions of one trajectory earned.

  Attributes:
    reward_R: float32, r_k; 0 where there is no action or the task has no boxes.
    iou_R: float32 in [0, 1], best IoU with a ground-truth box, whatever the mode; 0 where there is none.
    score_R: float32, best score with a ground-truth box; equal to iou_R if the mode is "iou".
    target_R: int32, the ground-truth box of that score; -1 where there is no action or no box, so
      `target_R >= 0` says which actions can be judged.
    redundant_R: bool, hits only targets that are already hit, and refines none of them.
    correct_R: bool, score >= h0; a redundant action is correct too.
    mean: float32 scalar, the fidelity term of the trajectory.
    covered: float32 scalar in [0, 1], share of the targets that were hit; 0 if there are none.
  """

  reward_R: jax.Array
  iou_R: jax.Array
  score_R: jax.Array
  target_R: jax.Array
  redundant_R: jax.Array
  correct_R: jax.Array
  mean: jax.Array
  covered: jax.Array


def threshold(cfg: Config, step: int) -> float:
  """h0 at a step of training: constant, or on a line from `h0_start` to `h0`."""
  if not cfg.h0_steps:
    return cfg.h0
  return cfg.h0_start + (cfg.h0 - cfg.h0_start) * min(1.0, step / cfg.h0_steps)


def iou(box_N4: jax.Array, box_M4: jax.Array) -> jax.Array:
  """Intersection over union of every box of one list with every box of another.

  Args:
    box_N4: float32[N, 4], x1 y1 x2 y2 in pixels, half-open.
    box_M4: float32[M, 4], in the same frame.

  Returns:
    float32[N, M] in [0, 1]; 0 for boxes that are empty, reversed or not finite.

  Raises:
    ValueError: an argument is not a list of boxes.

  Source: ours (the Jaccard index of two rectangles).
  """
  shared_NM, area_N1, area_1M = _areas(_boxes("box_N4", box_N4), _boxes("box_M4", box_M4))
  # A fused multiply-add can end one ulp above.
  return jnp.minimum(_ratio(shared_NM, area_N1 + area_1M - shared_NM), 1.0)


def overlap(box_N4: jax.Array, box_M4: jax.Array, mode: str) -> jax.Array:
  """How well every box of one list fits every box of another, by one of `MODES`.

      iou        intersection / union                                  in [0, 1]
      giou       iou - (hull - union) / hull                           in [-1, 1]
      coverage   intersection / second box: is all of it shown?        in [0, 1]
      tightness  intersection / first box: is nothing else shown?      in [0, 1]
      centre     1 - (distance of the centres / hull's diagonal) ** 2  in [0, 1]

  The hull is the smallest box around both.

  Args:
    box_N4: float32[N, 4], x1 y1 x2 y2 in pixels, half-open: what the policy looked at.
    box_M4: float32[M, 4], in the same frame: ground truth.
    mode: which.

  Returns:
    float32[N, M]; the lowest value of the mode's range for boxes that are empty, reversed or not finite.

  Raises:
    ValueError: an argument is not a list of boxes, or there is no such mode.

  Source: generalised IoU, arXiv 1902.09630; the centre term of DIoU, arXiv 1911.08287; the others are ours.
  """
  if mode not in MODES:
    raise ValueError(f"mode must be one of {', '.join(MODES)}. Received: {mode!r}")
  if mode == "iou":
    return iou(box_N4, box_M4)
  box_N4, box_M4 = _boxes("box_N4", box_N4), _boxes("box_M4", box_M4)
  shared_NM, area_N1, area_1M = _areas(box_N4, box_M4)
  good_NM = (area_N1 > 0) & (area_1M > 0) & (area_N1 + area_1M < jnp.inf)
  if mode in ("coverage", "tightness"):
    whole_NM = jnp.broadcast_to(area_1M if mode == "coverage" else area_N1, shared_NM.shape)
    return jnp.where(good_NM, jnp.minimum(_ratio(shared_NM, whole_NM), 1.0), 0.0)
  side_NM2 = (jnp.maximum(box_N4[:, None, 2:], box_M4[None, :, 2:])
              - jnp.minimum(box_N4[:, None, :2], box_M4[None, :, :2]))
  side_NM2 = jnp.where(good_NM[..., None], side_NM2, 1.0)
  if mode == "giou":
    hull_NM, union_NM = _area(side_NM2), area_N1 + area_1M - shared_NM
    gap_NM = _ratio(jnp.where(good_NM, hull_NM - union_NM, 0.0), hull_NM)
    return jnp.where(good_NM, iou(box_N4, box_M4) - jnp.clip(gap_NM, 0.0, 1.0), -1.0)
  middle = lambda box_X4: jnp.where(jnp.isfinite(box_X4).all(-1, keepdims=True), box_X4[:, :2] + box_X4[:, 2:], 0.0) / 2
  apart_NM = jnp.square(middle(box_N4)[:, None] - middle(box_M4)[None]).sum(-1)
  return jnp.where(good_NM, 1.0 - jnp.minimum(_ratio(apart_NM, jnp.square(side_NM2).sum(-1)), 1.0), 0.0)


def pool(reward_R: jax.Array, mask_R: jax.Array, cfg: Config) -> jax.Array:
  """The rewards of a trajectory's actions as one number; 0 if there is no action.

      mean        sum of r_k / K
      sum         sum of r_k
      discounted  sum of discount ** k * r_k, k = 0 for the first action
      best        the largest r_k

  Args:
    reward_R: float32[R].
    mask_R: bool[R], True on actions.
    cfg: which, and the discount.

  Returns:
    float32 scalar.

  Raises:
    ValueError: there is no such average.

  Source: the mean is ViRL's (arXiv 2511.23031); the others are ours.
  """
  if cfg.average not in AVERAGES:
    raise ValueError(f"average must be one of {', '.join(AVERAGES)}. Received: {cfg.average!r}")
  reward_R, count = jnp.where(mask_R, reward_R, 0.0), mask_R.sum()
  if cfg.average == "mean":
    return reward_R.sum() / jnp.maximum(count, 1)
  if cfg.average == "sum":
    return reward_R.sum()
  if cfg.average == "discounted":
    return (reward_R * jnp.float32(cfg.discount) ** jnp.maximum(jnp.cumsum(mask_R) - 1, 0)).sum()
  # Not masked to -inf: its gradient would not be finite.
  best = jnp.max(jnp.where(mask_R, reward_R, -1e30), initial=-1e30)
  return jnp.where(count > 0, best, 0.0)


def fidelity(box_R4: jax.Array, box_mask_R: jax.Array, gt_J4: jax.Array, gt_mask_J: jax.Array,
             cfg: Config, h0: jax.Array | None = None) -> Fidelity:
  """Scores the visual actions of one trajectory, in order.

  Among targets of equal score the first is the action's own (`Fidelity.target_R`); every target that it hits counts.

  Args:
    box_R4: float32[R, 4], boxes of the actions, pixels of the original image; R may be 0.
    box_mask_R: bool[R], True on actions.
    gt_J4: float32[J, 4], ground-truth boxes in the same frame; J may be 0.
    gt_mask_J: bool[J], True on boxes.
    cfg: thresholds and weights.
    h0: float32 scalar, the threshold of this step (`threshold`); None for `cfg.h0`.

  Returns:
    `Fidelity`; its mean is `pool`ed over the actions, `cfg.no_action` if there is none, and 0 if the task
    has no boxes.

  Raises:
    ValueError: a shape does not fit, or `cfg` has an unknown mode or average.

  Source: ViRL (arXiv 2511.23031), step-level rationale fidelity; form and constants are our reading.
  """
  h0 = cfg.h0 if h0 is None else h0
  box_R4, gt_J4 = _boxes("box_R4", box_R4), _boxes("gt_J4", gt_J4)
  box_mask_R = _mask("box_mask_R", box_mask_R, box_R4)
  gt_mask_J = _mask("gt_mask_J", gt_mask_J, gt_J4)
  if gt_J4.shape[0] == 0:  # argmax needs at least one entry
    gt_J4, gt_mask_J = jnp.zeros((1, 4), jnp.float32), jnp.zeros((1,), bool)
  targets = gt_mask_J.sum()
  judged_R = box_mask_R & (targets > 0)
  iou_RJ = iou(box_R4, gt_J4)

  # Masked boxes score below all others, so that they are never best and never hit.
  score_RJ = jnp.where(gt_mask_J, iou_RJ if cfg.mode == "iou" else overlap(box_R4, gt_J4, cfg.mode), -2.0)

  def action(best_J, inputs):
    score_J, judged = inputs
    target = jnp.argmax(score_J)
    value, best = score_J[target], best_J[target]
    hit_J = score_J >= h0
    stale_J = (best_J >= h0) & (score_J <= best_J + cfg.refine_margin)
    correct = judged & (value >= h0)
    redundant = correct & (~hit_J | stale_J).all()
    reward = (cfg.w_sign * jnp.where(correct, 1.0, -1.0)
              + cfg.lam * jnp.maximum(0.0, value - jnp.maximum(best, 0.0)) - jnp.where(redundant, cfg.rho, 0.0))
    best_J = jnp.where(judged, jnp.maximum(best_J, score_J), best_J)
    return best_J, (jnp.where(judged, reward, 0.0), jnp.where(judged, value, 0.0),
                    jnp.where(judged, target, -1).astype(jnp.int32), redundant, correct)

  # Untouched targets start below any threshold, so that h0 = 0 doesn't make them look hit already.
  untouched_J = jnp.full(gt_mask_J.shape, -1.0, jnp.float32)
  best_J, (reward_R, score_R, target_R, redundant_R, correct_R) = jax.lax.scan(
      action, untouched_J, (score_RJ, judged_R))

  covered = (gt_mask_J & (best_J >= h0)).sum() / jnp.maximum(targets, 1)
  found = pool(reward_R, judged_R, cfg) + cfg.w_cover * covered
  mean = jnp.where(judged_R.any(), found, cfg.no_action)
  return Fidelity(reward_R=reward_R, iou_R=jnp.where(judged_R, jnp.where(gt_mask_J, iou_RJ, 0.0).max(-1), 0.0),
                  score_R=score_R, target_R=target_R, redundant_R=redundant_R, correct_R=correct_R,
                  mean=jnp.where(targets > 0, mean, 0.0), covered=covered)


def total(answer: jax.Array, format: jax.Array, fidelity_mean: jax.Array, cfg: Config) -> jax.Array:
  """The reward of a trajectory: answer, format and fidelity, weighted.

  Args:
    answer: float32 scalar in [0, 1], how right the answer is; see `data.answers`.
    format: float32 scalar, 1 if every turn was well formed, else 0.
    fidelity_mean: float32 scalar, `Fidelity.mean`.
    cfg: the weights.

  Returns:
    float32 scalar.

  Source: ViRL (arXiv 2511.23031); the weights are ours.
  """
  return cfg.w_answer * answer + cfg.w_format * format + cfg.w_fidelity * fidelity_mean


def place(total: jax.Array, fidelity: Fidelity, action_T: jax.Array, sampled_T: jax.Array, cfg: Config) -> jax.Array:
  """A trajectory's reward on the tokens that earned it, for advantages token by token.

  What each visual action adds to a mean fidelity is on the action's last token; the rest is on the trajectory's last
  token.

  Args:
    total: float32 scalar, from `total`.
    fidelity: of the trajectory.
    action_T: int32[T], the visual action a token belongs to; -1 outside actions.
    sampled_T: bool[T], True on tokens that the policy wrote.
    cfg: weights; unless `cfg.average` is "mean", actions have no share of their own, and all is on the last token.

  Returns:
    float32[T] that adds up to `total`; all 0 if nothing was sampled.

  Source: ours.
  """
  R, order_T = fidelity.reward_R.shape[0], jnp.arange(action_T.shape[0])
  judged_R = fidelity.target_R >= 0
  share_R = cfg.w_fidelity * fidelity.reward_R / jnp.maximum(judged_R.sum(), 1)
  mine_RT = (action_T[None] == jnp.arange(R)[:, None]) & sampled_T[None]
  seen_R = judged_R & mine_RT.any(-1) & (cfg.average == "mean")
  share_R = jnp.where(seen_R, share_R, 0.0)
  last_R = jnp.where(mine_RT, order_T[None], 0).max(-1)
  reward_T = jnp.zeros(action_T.shape, jnp.float32).at[last_R].add(share_R)
  rest = jnp.where(sampled_T.any(), total - share_R.sum(), 0.0)
  return reward_T.at[jnp.where(sampled_T, order_T, 0).max()].add(rest)


def _areas(box_N4, box_M4):
  """Shared areas [N, M], and each list's own areas [N, 1] and [1, M]."""
  low_NM2 = jnp.maximum(box_N4[:, None, :2], box_M4[None, :, :2])
  high_NM2 = jnp.minimum(box_N4[:, None, 2:], box_M4[None, :, 2:])
  own = lambda box_X4: _area(box_X4[:, 2:] - box_X4[:, :2])
  return _area(high_NM2 - low_NM2), own(box_N4)[:, None], own(box_M4)[None, :]


def _ratio(top, bottom):
  """0 where the denominator is 0 or not finite."""
  # Both operands are made safe before the division: a `where` after it would let NaN into gradients.
  good = (bottom > 0) & (bottom < jnp.inf)
  return jnp.where(good, top, 0.0) / jnp.where(good, bottom, 1.0)


def _area(side_X2):
  """Product of the sides; a negative side counts as 0."""
  side_X2 = jnp.maximum(side_X2, 0.0)
  return side_X2[..., 0] * side_X2[..., 1]  # jnp.prod has NaN gradients where two sides are 0


def _boxes(name, value):
  value = jnp.asarray(value, jnp.float32)
  if value.ndim != 2 or value.shape[-1] != 4:
    raise ValueError(f"{name} must be unbatched boxes with shape [n, 4]. Received: {value.shape}")
  return value


def _mask(name, value, boxes):
  value = jnp.asarray(value, bool)
  if value.shape != boxes.shape[:1]:
    raise ValueError(f"{name} must have shape {boxes.shape[:1]}, one entry a box. Received: {value.shape}")
  return value
