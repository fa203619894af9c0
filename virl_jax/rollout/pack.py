"""Trajectories (host, ragged) -> Batch (padded, static shapes).  Numpy only; the caller places it.

Each process packs its own trajectories, for its own devices; the processes agree on the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
import itertools

import jax
import numpy as np

from virl_jax import shapes
from virl_jax import types
from virl_jax.model import patches
from virl_jax.model import rope
from virl_jax.run import hosts

MAX_JOINED = 8  # most trajectories in a row


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
    mask_stops: trajectories that ended for one of these reasons are masked from the loss.
    scope: which of a turn's tokens are its visual action's; see `rl.credit.SCOPES`.
    join: put several trajectories into one row of the model's batch, where they fit.
    pad_joined: counts of such rows are multiples of this.
    microbatch_tokens: most tokens of a shard in a microbatch, at least T; 0 for one microbatch.
    row_shown, row_crops: with microbatches: how many shown images and crops each row has places for.  Few programs
      serve all batches only if every microbatch has as many places; empty ones are computed, too.
    shards: how many devices of all processes trajectories are split over; 1 if they don't divide.
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
  microbatch_tokens: int = 0
  row_shown: int = 4
  row_crops: int = 8
  shards: int = 1


def pack(trajectories: list[types.Trajectory], cfg: Config) -> types.Batch:
  """Pads trajectories into one batch.

  An image that several rows of a microbatch and shard share (the same object) is kept once.

  Args:
    trajectories: graded; those of one group next to each other.
    cfg: padding.

  Returns:
    The batch, with numpy leaves.

  Raises:
    ValueError: if there are none, they are not graded, one has more visual actions than `cfg.max_rounds` or more images
      than a row has places for, or a row is longer than a microbatch.
  """
  if not trajectories:
    raise ValueError("trajectories must not be empty")
  B, order_B = len(trajectories), None
  shards = cfg.shards // jax.process_count()
  shards = shards if B % shards == 0 else 1
  if shards > 1:
    dealt = _dealt(trajectories, shards)
    trajectories, order_B = [trajectories[b] for b in dealt], np.argsort(dealt).astype(np.int32)
  ids = [t.ids for t in trajectories]
  longest, truths = hosts.agree([max(map(len, ids)), max(len(t.task.boxes) for t in trajectories)]).tolist()
  box_BR4, box_mask_BR, gt_BJ4, gt_mask_BJ = boxes(trajectories, cfg.max_rounds, truths)
  answer_B, format_B = outcomes(trajectories)
  T = width(longest, cfg.pad_tokens, cfg.join)
  f32 = np.float32
  b = types.Batch(
      tokens_BT=np.zeros((B, T), np.int32), valid_BT=np.zeros((B, T), bool), sampled_BT=np.zeros((B, T), bool),
      pos_BXT=np.zeros((B, 3, T), np.int32), vision_BT=np.full((B, T), -1, np.int32),
      logp_sampler_BT=np.zeros((B, T), f32), action_BT=np.full((B, T), -1, np.int32),
      box_BR4=box_BR4, box_mask_BR=box_mask_BR, gt_BJ4=gt_BJ4, gt_mask_BJ=gt_mask_BJ, answer_B=answer_B,
      format_B=format_B, answerable_B=answerable(trajectories), row_mask_B=counted(trajectories, cfg.mask_stops),
      rows=None, order_B=order_B)
  placed = _placed(trajectories, [len(row) for row in ids], T, shards, cfg)
  images, where = _images(trajectories, placed, cfg)
  for r, (t, row) in enumerate(zip(trajectories, ids)):
    n = len(row)
    b.tokens_BT[r, :n], b.valid_BT[r, :n] = row, True
    grids = [patches.merged_hw(im, cfg.grid) for im in t.images]
    b.pos_BXT[r, :, :n], _ = rope.positions(row, cfg.image_token, grids)
    if t.images:
      b.vision_BT[r, :n][row == cfg.image_token] = np.concatenate([where[r, i] for i in range(len(t.images))])
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
  return b.replace(rows=types.Rows(*_index(placed, [len(row) for row in ids], T, MAX_JOINED if cfg.join else 1),
                                   images))


def width(longest: int, pad_tokens: int, join: bool) -> int:
  """T for rows whose longest trajectory has `longest` tokens; the other two as in `Config`."""
  # Joined rows are full at any width, so a coarse one wastes nothing and needs fewer programs to be compiled.
  return shapes.up(longest, pad_tokens * (4 if join else 1))


def _credited(turn: types.Turn, scope: str) -> tuple[int, int]:
  """Which of a turn's tokens are its action's: by scope, or by the next wider one if the action has no such span."""
  whole = (0, len(turn.ids))
  return whole if scope == "turn" else turn.spans.get(scope) or turn.spans.get("call") or whole


def _dealt(trajectories: list[types.Trajectory], shards: int) -> list[int]:
  """An order in which all shards' parts of the batch have about as many tokens: the longest are dealt first.

  Groups stay together, with the image that they share, unless a shard then had over 5% more tokens than the mean.
  """
  lengths = [len(t.ids) for t in trajectories]
  groups = [[b for b, _ in same] for _, same in itertools.groupby(enumerate(trajectories), lambda e: id(e[1].task))]
  each = len(trajectories) // shards
  for units in (groups, [[b] for b in range(len(trajectories))]):
    loads, parts, room = [0] * shards, [[] for _ in range(shards)], [each] * shards
    for unit in sorted(units, key=lambda unit: (-sum(lengths[b] for b in unit), unit)):
      fits = [s for s in range(shards) if room[s] >= len(unit)]
      if not fits:
        break
      s = min(fits, key=lambda s: (loads[s], s))
      loads[s] += sum(lengths[b] for b in unit)
      room[s] -= len(unit)
      parts[s] += unit
    if not any(room) and max(loads) * shards <= 1.05 * sum(loads):
      break
  return [b for part in parts for b in sorted(part)]


def _placed(trajectories, lengths: list[int], width: int, shards: int, cfg: Config) -> list[list[list[list[int]]]]:
  """Trajectories by microbatch, shard and row; all microbatches have as many rows.

  A shard's trajectories are its own part of the batch, which is contiguous; their numbers are the batch's.
  """
  each = len(lengths) // shards
  of_shards = []
  for shard in range(shards):
    mine = range(shard * each, (shard + 1) * each)
    rows = [[b] for b in mine]
    if cfg.join:
      longest_first = sorted(mine, key=lambda b: (-lengths[b], b))
      rows = joined(lengths, longest_first, width, lambda row: _has_room(trajectories, row, cfg))
      if cfg.microbatch_tokens:
        # In no more rows, it is better to keep groups together: a row encodes an image that is shared in it once.
        near = joined(lengths, mine, width, lambda row: _has_room(trajectories, row, cfg))
        rows = near if len(near) <= len(rows) else rows
    of_shards.append(rows)
  most = int(hosts.agree([max(map(len, of_shards))])[0])
  if not cfg.microbatch_tokens:
    pad = -(-cfg.pad_joined // (shards * jax.process_count())) if cfg.join else 1
    at_once, count = min(shapes.up(most, pad), each), 1
  elif cfg.microbatch_tokens < width:
    raise ValueError(f"microbatch_tokens must be at least a row's {width} tokens. Received: {cfg.microbatch_tokens}")
  else:
    at_once = min(cfg.microbatch_tokens // width, most)
    count = shapes.least(-(-most // at_once), shapes.counts(-(-each // at_once)))
  cut = lambda rows, m: [*rows[m * at_once:(m + 1) * at_once], *[[]] * at_once][:at_once]
  return [[cut(rows, m) for rows in of_shards] for m in range(count)]


def _has_room(trajectories, row: list[int], cfg: Config) -> bool:
  """Whether a row has places for the images of these trajectories."""
  shown = {id(trajectories[b].images[0]) for b in row if trajectories[b].images}
  crops = sum(max(0, len(trajectories[b].images) - 1) for b in row)
  return not cfg.microbatch_tokens or len(shown) <= cfg.row_shown and crops <= cfg.row_crops


def image_counts(cfg: Config, at_once: int, shown: int, crops: int) -> tuple[int, int]:
  """Shown images and crops of a shard's microbatch of `at_once` rows, padded."""
  if cfg.microbatch_tokens:
    return at_once * cfg.row_shown, at_once * cfg.row_crops
  return shapes.up(shown, -(-cfg.pad_shown // cfg.shards)), shapes.up(crops, -(-cfg.pad_images // cfg.shards))


def joined(lengths: list[int], which: Iterable[int], width: int,
           has_room: Callable[[list[int]], bool] = lambda row: True) -> list[list[int]]:
  """Puts sequences into few rows, each whole into one of them: first fit.

  Args:
    lengths: of all sequences, in tokens.
    which: the sequences to place, in the order in which they are placed.
    width: of the rows, in tokens; at most `MAX_JOINED` sequences go into one.
    has_room: whether these sequences can share a row, apart from their length.

  Returns:
    For each row, the sequences in it, the longest first.
  """
  free, rows = [], []
  for b in which:
    row = next((r for r, room in enumerate(free) if room >= lengths[b] and len(rows[r]) < MAX_JOINED
                and has_room([*rows[r], b])), len(free))
    if row == len(free):
      free.append(width)
      rows.append([])
    free[row] -= lengths[b]
    rows[row].append(b)
  return [sorted(row, key=lambda b: (-lengths[b], b)) for row in rows]


def _index(placed, lengths: list[int], width: int, S: int) -> tuple[np.ndarray, np.ndarray]:
  """`types.Rows.index_MUT` and `lengths_MUS`."""
  M, shards, at_once = len(placed), len(placed[0]), len(placed[0][0])
  each = len(lengths) // shards
  index = np.full((M, shards, at_once, width), -1, np.int32)
  found = np.zeros((M, shards, at_once, S), np.int32)
  for (m, s, u), row in _rows(placed):
    if row:
      tokens = np.concatenate([(b - s * each) * width + np.arange(lengths[b]) for b in row])
      index[m, s, u, :len(tokens)], found[m, s, u, :len(row)] = tokens, [lengths[b] for b in row]
  return index.reshape(M, -1, width), found.reshape(M, -1, S)


def _rows(placed):
  """((microbatch, shard, row), trajectories) of every row."""
  for m, micro in enumerate(placed):
    for s, shard in enumerate(micro):
      for u, row in enumerate(shard):
        yield (m, s, u), row


def boxes(trajectories: list[types.Trajectory], max_rounds: int, truths: int = 0
          ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """What visual actions are rewarded by: the regions that they were about, and the ground truth.

  Args:
    trajectories: rows, at least one.
    max_rounds: R.
    truths: J is at least this.

  Returns:
    Regions of the actions float32[B, R, 4] and bool[B, R]; ground-truth boxes float32[B, J, 4] and bool[B, J], J a
    power of two.

  Raises:
    ValueError: if one has more visual actions than `max_rounds`.
  """
  B, R, most = len(trajectories), max_rounds, max(len(t.regions) for t in trajectories)
  if most > R:
    raise ValueError(f"trajectories must have at most max_rounds={R} visual actions. Received: {most}")
  J = 1 << (max(truths, max(len(t.task.boxes) for t in trajectories), 1) - 1).bit_length()
  box_BR4, box_mask_BR = np.zeros((B, R, 4), np.float32), np.zeros((B, R), bool)
  gt_BJ4, gt_mask_BJ = np.zeros((B, J, 4), np.float32), np.zeros((B, J), bool)
  for b, t in enumerate(trajectories):
    for r, box in enumerate(t.regions):
      box_BR4[b, r], box_mask_BR[b, r] = box, True
    for j, box in enumerate(t.task.boxes):
      gt_BJ4[b, j], gt_mask_BJ[b, j] = box, True
  return box_BR4, box_mask_BR, gt_BJ4, gt_mask_BJ


def outcomes(trajectories: list[types.Trajectory]) -> tuple[np.ndarray, np.ndarray]:
  """float32[B] each: how right the answer is, in [0, 1]; and 1 if every turn was well formed, else 0.

  Raises:
    ValueError: if `data.answers.grade` has not graded the answers yet.
  """
  if any(t.correct is None for t in trajectories):
    raise ValueError("trajectories must have been graded (data.answers.grade) before they are scored")
  return (np.array([t.worth for t in trajectories], np.float32),
          np.array([well_formed(t) for t in trajectories], np.float32))


def answerable(trajectories: list[types.Trajectory]) -> np.ndarray:
  """bool[B]: whether the task has accepted answers; if not, no answer is right or wrong."""
  return np.array([bool(t.task.answers) for t in trajectories])


def counted(trajectories: list[types.Trajectory], mask_stops: tuple[types.StopReason, ...]) -> np.ndarray:
  """bool[B]: False on trajectories that ended for one of these reasons and are therefore masked from the loss."""
  return np.array([t.stop not in mask_stops for t in trajectories])


def well_formed(trajectory: types.Trajectory) -> bool:
  """Whether every turn kept to the protocol and the last is an answer."""
  return trajectory.stop == types.StopReason.ANSWERED and all(t.error is None for t in trajectory.turns)


def _images(trajectories, placed, cfg) -> tuple[tuple[types.ImageBatch, ...], dict[tuple[int, int], np.ndarray]]:
  """Two buckets, shown images and crops, of each microbatch; and, by (trajectory, image), the places of its merged
  tokens among those of its microbatch and shard."""
  M, shards = len(placed), len(placed[0])
  mine = [[({}, {}) for _ in range(shards)] for _ in range(M)]  # by id(image): shown, crops
  for (m, s, _), row in _rows(placed):
    for b in row:
      for i, im in enumerate(trajectories[b].images):
        mine[m][s][1 if i else 0][id(im)] = im
  batches, where, base = [], {}, 0
  most = [max(len(found[kind]) for micro in mine for found in micro) for kind in (0, 1)]
  extents = [patches.extent([im for micro in mine for found in micro for im in found[kind].values()], cfg.grid)
             for kind in (0, 1)]
  most, *extents = hosts.agree([most, *extents]).tolist()
  counts = image_counts(dataclasses.replace(cfg, shards=shards * jax.process_count()), len(placed[0][0]), *most)
  for kind, count in enumerate(counts):
    parts, extent = [found[kind] for micro in mine for found in micro], extents[kind]
    if max(map(len, parts)) > count:
      raise ValueError(f"row_{('shown', 'crops')[kind]} must be enough for each trajectory's images. Received: "
                       f"{(cfg.row_shown, cfg.row_crops)[kind]}")
    some = next((im for part in parts for im in part.values()), None)
    laid = [patches.layout(list(part.values()), cfg.grid, count, extent, some) for part in parts]
    for n, (part, (_, index)) in enumerate(zip(parts, laid)):
      where.update({(n, key): at + base for key, at in zip(part, index)})
    fields = ([getattr(batch, f.name) for batch, _ in laid] for f in dataclasses.fields(types.ImageBatch))
    batches.append(types.ImageBatch(*(np.stack(a).reshape(M, shards * count, *a[0].shape[1:]) for a in fields)))
    base += int(np.prod(laid[0][0].mask_IWQ.shape)) // cfg.grid.merge ** 2
  return tuple(batches), {(b, i): where[m * shards + s, id(im)] for (m, s, _), row in _rows(placed)
                          for b in row for i, im in enumerate(trajectories[b].images)}


def split(trajectories: list[types.Trajectory], group_size: int, minibatches: int) -> list[list[types.Trajectory]]:
  """Splits whole groups into minibatches of neighbours: the data's order is already random.

  The groups of a process are evenly spread over the batch, so that all have as many in each minibatch.

  Args:
    trajectories: whole groups, one after the other; of this process.
    group_size: G.
    minibatches: how many; divides the number of groups.

  Raises:
    ValueError: if the groups don't divide.
  """
  n = len(trajectories)
  if n % group_size or n // group_size % minibatches:
    raise ValueError(f"{n} trajectories in groups of {group_size} must divide into {minibatches} minibatches")
  return [trajectories[i * n // minibatches:(i + 1) * n // minibatches] for i in range(minibatches)]
