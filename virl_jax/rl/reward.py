"""Reward kernels: IoU, rationale fidelity and the total reward of one trajectory.

Each function takes one trajectory; the caller vmaps.  With `iou_k` the best IoU of visual action k
with a ground-truth box, `j_k` that box, and `best_k` the best IoU that actions before k reached on
`j_k` (0 if they reached none):

    sign_k  = +1 if iou_k >= h0 else -1
    bonus_k = lam * max(0, iou_k - best_k)
    again_k = rho if iou_k >= h0, best_k >= h0 and iou_k <= best_k else 0
    r_k     = sign_k + bonus_k - again_k

Our reading: refinement and redundancy are kept per target, so that a first look at a second target
is neither compared with the first one nor called redundant; with one target this is the paper's
running best.
Our reading: a task without boxes has no fidelity (0), and a trajectory that never zooms on a task
with boxes has a fidelity of its own, `no_action`.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Config:
  """Weights and thresholds of the reward; see `config.default().reward` for where they come from.

  Attributes:
    h0: IoU in [0, 1] that makes a visual action correct.
    lam: weight of progressive refinement.
    rho: penalty of a redundant action.
    w_answer: weight of a right answer.
    w_format: weight of a well-formed trajectory.
    w_fidelity: weight of the mean fidelity of the visual actions.
    no_action: fidelity of a trajectory without visual actions on a task with boxes.
  """

  h0: float = 0.4
  lam: float = 0.5
  rho: float = 0.5
  w_answer: float = 1.0
  w_format: float = 0.2
  w_fidelity: float = 1.0
  no_action: float = -1.0


@flax.struct.dataclass
class Fidelity:
  """What the visual actions of one trajectory earned.

  Attributes:
    reward_R: float32, r_k; 0 where there is no action or the task has no boxes.
    iou_R: float32 in [0, 1], best IoU with a ground-truth box; 0 where there is none.
    target_R: int32, the ground-truth box of that IoU; -1 where there is no action or no box, so
      `target_R >= 0` says which actions can be judged.
    redundant_R: bool, hits a target that is already hit without refining it.
    correct_R: bool, IoU >= h0; a redundant action is correct too.
    mean: float32 scalar, the fidelity term of the trajectory.
  """

  reward_R: jax.Array
  iou_R: jax.Array
  target_R: jax.Array
  redundant_R: jax.Array
  correct_R: jax.Array
  mean: jax.Array


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
  box_N4, box_M4 = _boxes("box_N4", box_N4), _boxes("box_M4", box_M4)
  low_NM2 = jnp.maximum(box_N4[:, None, :2], box_M4[None, :, :2])
  high_NM2 = jnp.minimum(box_N4[:, None, 2:], box_M4[None, :, 2:])
  shared_NM = _area(high_NM2 - low_NM2)
  union_NM = (_area(box_N4[:, 2:] - box_N4[:, :2])[:, None]
              + _area(box_M4[:, 2:] - box_M4[:, :2])[None, :] - shared_NM)
  # Both operands are made safe before the division: a `where` after it would let NaN into gradients.
  good_NM = (union_NM > 0) & (union_NM < jnp.inf)
  ratio_NM = jnp.where(good_NM, shared_NM, 0.0) / jnp.where(good_NM, union_NM, 1.0)
  return jnp.minimum(ratio_NM, 1.0)  # a fused multiply-add can end one ulp above


def fidelity(box_R4: jax.Array, box_mask_R: jax.Array, gt_J4: jax.Array, gt_mask_J: jax.Array,
             cfg: Config) -> Fidelity:
  """Scores the visual actions of one trajectory, in order.

  Among targets of equal IoU the first counts.

  Args:
    box_R4: float32[R, 4], boxes of the actions, pixels of the original image; R may be 0.
    box_mask_R: bool[R], True on actions.
    gt_J4: float32[J, 4], ground-truth boxes in the same frame; J may be 0.
    gt_mask_J: bool[J], True on boxes.
    cfg: thresholds and weights.

  Returns:
    `Fidelity`; its mean is over the actions, `cfg.no_action` if there is none, and 0 if the task
    has no boxes.

  Raises:
    ValueError: a shape does not fit.

  Source: ViRL (arXiv 2511.23031), step-level rationale fidelity; form and constants are our reading.
  """
  box_R4, gt_J4 = _boxes("box_R4", box_R4), _boxes("gt_J4", gt_J4)
  box_mask_R = _mask("box_mask_R", box_mask_R, box_R4)
  gt_mask_J = _mask("gt_mask_J", gt_mask_J, gt_J4)
  if gt_J4.shape[0] == 0:  # argmax needs something to look at
    gt_J4, gt_mask_J = jnp.zeros((1, 4), jnp.float32), jnp.zeros((1,), bool)
  has_boxes = gt_mask_J.any()
  judged_R = box_mask_R & has_boxes

  def action(best_J, inputs):
    iou_J, judged = inputs
    target = jnp.argmax(jnp.where(gt_mask_J, iou_J, -1.0))
    value, best = iou_J[target], best_J[target]
    correct = judged & (value >= cfg.h0)
    redundant = correct & (best >= cfg.h0) & (value <= best)
    reward = (jnp.where(correct, 1.0, -1.0) + cfg.lam * jnp.maximum(0.0, value - jnp.maximum(best, 0.0))
              - jnp.where(redundant, cfg.rho, 0.0))
    best_J = best_J.at[target].max(jnp.where(judged, value, -1.0))
    return best_J, (jnp.where(judged, reward, 0.0), jnp.where(judged, value, 0.0),
                    jnp.where(judged, target, -1).astype(jnp.int32), redundant, correct)

  # Untouched targets start below any IoU, so that h0 = 0 doesn't make them look hit already.
  untouched_J = jnp.full(gt_mask_J.shape, -1.0, jnp.float32)
  _, (reward_R, iou_R, target_R, redundant_R, correct_R) = jax.lax.scan(
      action, untouched_J, (iou(box_R4, gt_J4), judged_R))

  count = judged_R.sum()
  mean = jnp.where(count > 0, reward_R.sum() / jnp.maximum(count, 1), cfg.no_action)
  return Fidelity(reward_R=reward_R, iou_R=iou_R, target_R=target_R, redundant_R=redundant_R,
                  correct_R=correct_R, mean=jnp.where(has_boxes, mean, 0.0))


def total(answer: jax.Array, format: jax.Array, fidelity_mean: jax.Array, cfg: Config) -> jax.Array:
  """The reward of a trajectory: answer, format and fidelity, weighted.

  Args:
    answer: float32 scalar, 1 if the answer is right, else 0.
    format: float32 scalar, 1 if every turn was well formed, else 0.
    fidelity_mean: float32 scalar, `Fidelity.mean`.
    cfg: the weights.

  Returns:
    float32 scalar.

  Source: ViRL (arXiv 2511.23031); the weights are ours.
  """
  return cfg.w_answer * answer + cfg.w_format * format + cfg.w_fidelity * fidelity_mean


def _area(side_X2):
  """Product of the sides; a negative side is no side."""
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
