"""Trajectories (host, ragged) -> Batch (padded, static shapes).  Numpy only; the caller places it."""

from __future__ import annotations

import dataclasses

import numpy as np

from virl_jax import shapes
from virl_jax import types
from virl_jax.model import patches
from virl_jax.model import rope


@dataclasses.dataclass(frozen=True)
class Config:
  """How batches are padded.

  Attributes:
    grid: patch geometry.
    image_token: id of the image placeholder.
    max_rounds: R.
    pad_tokens: T is a multiple of this, or of four times this if rows are joined.
    pad_shown: counts of shown images are multiples of this.
    pad_images: counts of crops are multiples of this.
    mask_stops: rows that ended for one of these reasons are masked from the loss.
    scope: which of a turn's tokens are its visual action's; see `rl.credit.SCOPES`.
    join: put several trajectories into a row of the model's, where they fit.
    pad_joined: counts of such rows are multiples of this.
  """

  grid: patches.Grid
  image_token: int
  max_rounds: int = 6
  pad_tokens: int = 64
  pad_images: int = 8
  pad_shown: int = 8
  mask_stops: tuple[types.StopReason, ...] = ()
  scope: str = "turn"
  join: bool = False
  pad_joined: int = 8


def pack(trajectories: list[types.Trajectory], cfg: Config) -> types.Batch:
  """Pads trajectories into one batch.

  An image that several rows share (the same object) is kept once.

  Args:
    trajectories: rows; those of one group next to each other.
    cfg: padding.

  Returns:
    The batch, with numpy leaves.

  Raises:
    ValueError: if there are none, or one has more visual actions than `cfg.max_rounds`.
  """
  if not trajectories:
    raise ValueError("trajectories must not be empty")
  B = len(trajectories)
  box_BR4, box_mask_BR, gt_BJ4, gt_mask_BJ = boxes(trajectories, cfg.max_rounds)
  answer_B, format_B = outcomes(trajectories)
  ids = [t.ids for t in trajectories]
  # Joined rows are full whatever their width: one that fits all batches is one program less to compile.
  T = shapes.up(max(map(len, ids)), cfg.pad_tokens * (4 if cfg.join else 1))
  f32 = np.float32
  b = types.Batch(
      tokens_BT=np.zeros((B, T), np.int32), valid_BT=np.zeros((B, T), bool), sampled_BT=np.zeros((B, T), bool),
      pos_BXT=np.zeros((B, 3, T), np.int32), vision_BT=np.full((B, T), -1, np.int32),
      logp_sampler_BT=np.zeros((B, T), f32), action_BT=np.full((B, T), -1, np.int32),
      box_BR4=box_BR4, box_mask_BR=box_mask_BR, gt_BJ4=gt_BJ4, gt_mask_BJ=gt_mask_BJ, answer_B=answer_B,
      format_B=format_B, answerable_B=answerable(trajectories), row_mask_B=counted(trajectories, cfg.mask_stops),
      images=())
  batches, where = _images(trajectories, cfg)
  for r, (t, row) in enumerate(zip(trajectories, ids)):
    n = len(row)
    b.tokens_BT[r, :n], b.valid_BT[r, :n] = row, True
    grids = [patches.merged_hw(im, cfg.grid) for im in t.images]
    b.pos_BXT[r, :, :n], _ = rope.positions(row, cfg.image_token, grids)
    if t.images:
      b.vision_BT[r, :n][row == cfg.image_token] = np.concatenate([where[id(im)] for im in t.images])
    at, action = len(t.prompt_ids), 0
    for turn in t.turns:
      span = slice(at, at + len(turn.ids))
      if turn.logp is not None:
        b.sampled_BT[r, span], b.logp_sampler_BT[r, span] = True, turn.logp
      if turn.region is not None:
        first, last = _credited(turn, cfg.scope)
        b.action_BT[r, at + first:at + last] = action
        action += 1
      at += len(turn.ids)
  return b.replace(images=batches, joined_UT=joined([len(row) for row in ids], T, cfg.pad_joined) if cfg.join else None)


def _credited(turn: types.Turn, scope: str) -> tuple[int, int]:
  """Which of a turn's tokens are its action's: by scope, or what of it comes nearest where the action names no such."""
  whole = (0, len(turn.ids))
  return whole if scope == "turn" else turn.spans.get(scope) or turn.spans.get("call") or whole


def joined(lengths: list[int], width: int, pad: int) -> np.ndarray:
  """Sequences in fewer rows, each whole in one of them: first fit, the longest first.

  Args:
    lengths: of the sequences, in tokens; each stands at the start of a row `width` long.
    width: of the new rows, too.
    pad: their number is a multiple of this, but not above the number of sequences.

  Returns:
    int32[U, width]: which token of the old rows put flat stands there; -1 for none.
  """
  free, members = [], []
  for b in sorted(range(len(lengths)), key=lambda b: (-lengths[b], b)):
    row = next((r for r, room in enumerate(free) if room >= lengths[b]), len(free))
    if row == len(free):
      free.append(width)
      members.append([])
    free[row] -= lengths[b]
    members[row].append(b)
  index_UT = np.full((max(len(members), min(shapes.up(len(members), pad), len(lengths))), width), -1, np.int32)
  for row, bs in enumerate(members):
    tokens = np.concatenate([b * width + np.arange(lengths[b]) for b in bs])
    index_UT[row, :len(tokens)] = tokens
  return index_UT


def boxes(trajectories: list[types.Trajectory], max_rounds: int
          ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """What the reward of visual actions is about: the regions that they were about, and those that they should be.

  Args:
    trajectories: rows, at least one.
    max_rounds: R.

  Returns:
    Regions of the actions float32[B, R, 4] and bool[B, R]; ground-truth boxes float32[B, J, 4] and bool[B, J], J a
    power of two.

  Raises:
    ValueError: if one has more visual actions than `max_rounds`.
  """
  B, R, most = len(trajectories), max_rounds, max(len(t.regions) for t in trajectories)
  if most > R:
    raise ValueError(f"trajectories must have at most max_rounds={R} visual actions. Received: {most}")
  J = 1 << (max(max(len(t.task.boxes) for t in trajectories), 1) - 1).bit_length()
  box_BR4, box_mask_BR = np.zeros((B, R, 4), np.float32), np.zeros((B, R), bool)
  gt_BJ4, gt_mask_BJ = np.zeros((B, J, 4), np.float32), np.zeros((B, J), bool)
  for b, t in enumerate(trajectories):
    for r, box in enumerate(t.regions):
      box_BR4[b, r], box_mask_BR[b, r] = box, True
    for j, box in enumerate(t.task.boxes):
      gt_BJ4[b, j], gt_mask_BJ[b, j] = box, True
  return box_BR4, box_mask_BR, gt_BJ4, gt_mask_BJ


def outcomes(trajectories: list[types.Trajectory]) -> tuple[np.ndarray, np.ndarray]:
  """float32[B] each: 1 if the answer is right; 1 if every turn was well formed.

  Raises:
    ValueError: if `data.answers.grade` has not said yet whether the answers are right.
  """
  if any(t.correct is None for t in trajectories):
    raise ValueError("trajectories must have been graded (data.answers.grade) before they are scored")
  return (np.array([t.correct for t in trajectories], np.float32),
          np.array([well_formed(t) for t in trajectories], np.float32))


def answerable(trajectories: list[types.Trajectory]) -> np.ndarray:
  """bool[B]: whether the task has accepted answers; if not, no answer is right or wrong."""
  return np.array([bool(t.task.answers) for t in trajectories])


def counted(trajectories: list[types.Trajectory], mask_stops: tuple[types.StopReason, ...]) -> np.ndarray:
  """bool[B]: False on those that ended for one of these reasons, which the loss is not about."""
  return np.array([t.stop not in mask_stops for t in trajectories])


def well_formed(trajectory: types.Trajectory) -> bool:
  """Whether every turn kept to the protocol and the last is an answer."""
  return trajectory.stop == types.StopReason.ANSWERED and all(t.error is None for t in trajectory.turns)


def _images(trajectories, cfg) -> tuple[tuple[types.ImageBatch, ...], dict[int, np.ndarray]]:
  """Two buckets, shown images and crops; and by id(image) where its merged tokens are in both put flat."""
  shown, crops = {}, {}
  for t in trajectories:
    for i, im in enumerate(t.images):
      (crops if i else shown)[id(im)] = im
  batches, where, base = [], {}, 0
  for bucket, pad in ((shown, cfg.pad_shown), (crops, cfg.pad_images)):
    batch, index = patches.layout(list(bucket.values()), cfg.grid, shapes.up(len(bucket), pad))
    where.update({key: at + base for key, at in zip(bucket, index)})
    batches.append(batch)
    base += int(np.prod(batch.mask_IWQ.shape)) // cfg.grid.merge ** 2
  return tuple(batches), where


def split(trajectories: list[types.Trajectory], group_size: int, minibatches: int, seed: tuple[int, ...]
          ) -> list[list[types.Trajectory]]:
  """Deals whole groups into minibatches, in an order drawn from the seed.

  Args:
    trajectories: whole groups, one after the other.
    group_size: G.
    minibatches: how many; divides the number of groups.
    seed: of the order; the same seed gives the same split.

  Raises:
    ValueError: if the groups don't divide.
  """
  groups = [trajectories[i:i + group_size] for i in range(0, len(trajectories), group_size)]
  if len(trajectories) % group_size or len(groups) % minibatches:
    raise ValueError(f"{len(trajectories)} trajectories in groups of {group_size} must divide into "
                     f"{minibatches} minibatches")
  order = np.random.default_rng(seed).permutation(len(groups)) if minibatches > 1 else np.arange(len(groups))
  each = len(groups) // minibatches
  return [[t for g in sorted(order[i * each:(i + 1) * each]) for t in groups[g]] for i in range(minibatches)]
