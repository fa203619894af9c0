"""Prompts and tool turns for rows of the cache, as padded arrays of few shapes.

Rows are split over lanes, one for each part of the mesh that holds rows of its own; a chunk has the same
number of rows for each lane, so that each device appends to its own rows.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from virl_jax.model import patches
from virl_jax.rollout import row as row_lib
from virl_jax.rollout import sample
from virl_jax.rollout import turns


@dataclasses.dataclass(frozen=True)
class Entry:
  """A reply and the row that it is for: row `slot` of lane `lane`."""

  lane: int
  slot: int
  reply: row_lib.Reply


@dataclasses.dataclass(frozen=True)
class Shape:
  """The shape of a chunk.

  Attributes:
    rows: for each lane.
    tokens: T.
    windows, cells: the most that any image has, see `patches.extent`; 0 if no row has an image.
  """

  rows: int
  tokens: int
  windows: int
  cells: int


def shape(entries: list[Entry], grid: patches.Grid) -> tuple[int, int, int, int]:
  """The least shape of a chunk of these: rows for each lane, tokens (both before padding), windows and cells."""
  if not entries:
    return 0, 0, 0, 0
  rows = np.bincount([e.lane for e in entries]).max()
  pictures = [e.reply.image for e in entries if e.reply.image is not None]
  return int(rows), max(len(e.reply.ids) for e in entries), *(patches.extent(pictures, grid) if pictures else (0, 0))


def build(entries: list[Entry], shape: Shape, lanes: int, slots: int, policy: turns.Policy) -> sample.Chunk:
  """A padded chunk of replies.

  Args:
    entries: for the lanes of this process, no slot twice.
    shape: large enough for them.
    lanes: how many this process has.
    slots: rows of a lane's cache; padding rows of the chunk get this number.
    policy: for the grid and the placeholder.

  Returns:
    A chunk of lanes * shape.rows rows, numpy leaves.
  """
  A, T = lanes * shape.rows, shape.tokens
  chunk = sample.Chunk(np.zeros((A, T), np.int32), np.zeros(A, np.int32), np.zeros((A, 3, T), np.int32),
                       np.zeros(A, np.int32), np.full((A, T), -1, np.int32), (), np.full(A, slots, np.int32),
                       np.zeros(A, np.int32))
  used, pictures = [0] * lanes, [None] * A
  for e in entries:
    a, r, n = e.lane * shape.rows + used[e.lane], e.reply, len(e.reply.ids)
    used[e.lane] += 1
    chunk.row_A[a], chunk.start_A[a], chunk.n_new_A[a], chunk.next_pos_A[a] = e.slot, r.start, n, r.next_pos
    chunk.tokens_AT[a, :n], chunk.pos_AXT[a, :, :n] = r.ids, r.pos_XT
    pictures[a] = r.image
  if not shape.windows:
    return chunk
  batch, where = patches.layout(pictures, policy.model.vision.grid, A, (shape.windows, shape.cells))
  of_lane = batch.window_IWQ[:shape.rows].size // policy.model.vision.merge ** 2
  for a, at in enumerate(where):
    chunk.vision_AT[a][chunk.tokens_AT[a] == policy.model.image_token] = at % of_lane  # a lane sees its own images
  return chunk.replace(images=(batch,))
