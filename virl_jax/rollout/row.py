"""The contents of an engine's slots: prompts, unfinished rows, and the chunks appended to them."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from virl_jax import types
from virl_jax.model import family
from virl_jax.model import patches
from virl_jax.model import rope


@dataclasses.dataclass(frozen=True)
class Reply:
  """What is appended to a row's cache.

  Attributes:
    ids: int32[T]; they begin with the last token of the turn before, if that is not in the cache yet.
    image: the one whose placeholders are among them, or None.
    start: how many tokens the row keeps before them.
    pos_XT: int32 M-RoPE positions.
    next_pos: the position after them.
  """

  ids: np.ndarray
  image: types.ImageInput | None
  start: int
  pos_XT: np.ndarray
  next_pos: int


@dataclasses.dataclass
class Row:
  """A trajectory that has not ended.

  Attributes:
    traj: the trajectory so far.
    picture: the original.
    filled: tokens in the cache before the turn that is being written.
    next_pos: M-RoPE position of that turn's first token.
    turn: its number, from 0.
    ids, logp: what has been sampled of it, segment by segment.
  """

  traj: types.Trajectory
  picture: Image.Image | None
  filled: int = 0
  next_pos: int = 0
  turn: int = 0
  ids: list[np.ndarray] = dataclasses.field(default_factory=list)
  logp: list[np.ndarray] = dataclasses.field(default_factory=list)

  @property
  def said(self) -> int:
    """How many tokens of this turn have been sampled."""
    return sum(map(len, self.ids))

  def hear(self, ids: np.ndarray, logp: np.ndarray) -> None:
    """Takes in a segment of the turn: int32[T] sampled ids, and their float32[T] log-probabilities in nats."""
    self.ids.append(ids)
    self.logp.append(logp)

  def take(self) -> tuple[np.ndarray, np.ndarray]:
    """All that was sampled of the turn, ids and log-probabilities; empties both for the next turn."""
    ids, logp = np.concatenate(self.ids), np.concatenate(self.logp)
    self.ids, self.logp = [], []
    return ids, logp


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What all rollouts of a task begin with.

  Attributes:
    task: the question.
    picture: the original.
    reply: the prompt's tokens, with the shown image, at the start of a row.
  """

  task: types.Task
  picture: Image.Image | None
  reply: Reply

  def row(self, index: int) -> Row:
    """Rollout number `index` of a step, at the end of the prompt."""
    traj = types.Trajectory(self.task, index, self.reply.ids, images=[self.reply.image])
    return Row(traj, self.picture, len(self.reply.ids), self.reply.next_pos)


def prompt(model: family.Config, task: types.Task, picture: Image.Image | None, ids: np.ndarray,
           shown: types.ImageInput) -> Prompt:
  """A `Prompt` of these tokens: int32[T], the shown image's placeholders among them."""
  return Prompt(task, picture, reply(model, ids, shown, 0, 0))


def reply(model: family.Config, ids: np.ndarray, image: types.ImageInput | None, start: int, pos: int) -> Reply:
  """A `Reply` of these tokens, int32[T], of which the first has M-RoPE position `pos`."""
  grids = [] if image is None else [patches.merged_hw(image, model.vision.grid)]
  return Reply(ids, image, start, *rope.positions(ids, model.image_token, grids, pos))
