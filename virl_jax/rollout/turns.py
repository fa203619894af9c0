"""One trajectory on the host: its prompt, and what each sampled turn leads to.

Every turn is read once, by strict rules that never raise: it zooms (a crop of the original picture comes
back), answers, or has failed (the policy is told why, or the trajectory ends).  Budgets are kept here.
A turn holds one call: credit goes to one visual action a turn, so two calls in one are told off.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from virl_jax import types
from virl_jax.data import answers
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.model import rope
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.rollout import sample


@dataclasses.dataclass(frozen=True)
class Config:
  """See `config.py`, section `rollout`."""

  max_rounds: int = 6
  max_turn_tokens: int = 1024
  max_total_tokens: int = 16384
  temperature: float = 1.0
  pad_tokens: int = 64
  max_images: int = 0
  max_vision_tokens: int = 0
  keep: sample.Filter = sample.Filter()
  stop_strings: tuple[str, ...] = ()
  slots: int = 0
  segment_tokens: int = 32
  serve_share: float = 0.125
  decode_ratio: float = 4.0
  append_ratio: float = 4.0
  token_steps: int = 1
  threads: int = 2


@dataclasses.dataclass(frozen=True)
class Policy:
  """Everything a rollout needs but the parameters.

  Attributes:
    model: the model's configuration.
    codec: text <-> ids.
    prompt: how prompts are worded.
    image: pixel limits.
    rollout: budgets and sampling.
    mesh: where rows go.
  """

  model: qwen.Config
  codec: prompt.Codec
  prompt: prompt.Config
  image: images.Config
  rollout: Config
  mesh: jax.sharding.Mesh


@dataclasses.dataclass
class Row:
  """A trajectory that is under way.

  Attributes:
    traj: what there is of it.
    picture: the original.
    filled: tokens in the cache before the turn that is being written.
    next_pos: M-RoPE position of that turn's first token.
    turn: which of its turns that is.
    ids, logp: what has been sampled of it, segment by segment.
  """

  traj: types.Trajectory
  picture: object
  filled: int = 0
  next_pos: int = 0
  turn: int = 0
  ids: list[np.ndarray] = dataclasses.field(default_factory=list)
  logp: list[np.ndarray] = dataclasses.field(default_factory=list)

  @property
  def said(self) -> int:
    """Tokens sampled of this turn."""
    return sum(map(len, self.ids))


@dataclasses.dataclass(frozen=True)
class Reply:
  """What is appended to a row's cache.

  Attributes:
    ids: int32[T]; after a turn its last token first, if that is not in the cache yet.
    image: the one among them, or None.
    start: tokens that the row keeps before it.
    pos_XT: int32 M-RoPE positions.
    next_pos: the position after it.
  """

  ids: np.ndarray
  image: types.ImageInput | None
  start: int
  pos_XT: np.ndarray
  next_pos: int


def reply(policy: Policy, ids: np.ndarray, image: types.ImageInput | None, start: int, pos: int) -> Reply:
  """A `Reply` whose first token has M-RoPE position `pos`."""
  grids = [] if image is None else [images.merged_hw(image, policy.model.vision.grid)]
  return Reply(ids, image, start, *rope.positions(ids, policy.model.image_token, grids, pos))


def begin(policy: Policy, task: types.Task) -> Row:
  """A row with nothing but its prompt.

  Raises:
    ValueError: if the image can't be decoded, or the prompt leaves no room to answer.
  """
  picture = images.decode(task.image, policy.image.decode_max_pixels)
  grid = policy.model.vision.grid
  shown = images.prepare(picture, None, policy.image.min_pixels, policy.image.max_pixels, grid)
  words = prompt.render(task.question, task.options, policy.prompt)
  ids = policy.codec.encode(words, (images.vision_tokens(shown, grid),))
  cfg = policy.rollout
  room = cfg.max_total_tokens - cfg.max_turn_tokens
  if len(ids) > room:
    raise ValueError(f"task {task.uid}: the prompt must leave room for a turn: at most {room} tokens "
                     f"(rollout.max_total_tokens - rollout.max_turn_tokens). Received: {len(ids)}")
  if cfg.max_vision_tokens and images.vision_tokens(shown, grid) > cfg.max_vision_tokens:
    raise ValueError(f"task {task.uid}: its image must fit rollout.max_vision_tokens = {cfg.max_vision_tokens}; lower "
                     f"image.max_pixels. Received: {images.vision_tokens(shown, grid)} vision tokens")
  return Row(types.Trajectory(task, -1, ids, images=[shown]), picture)


def left(policy: Policy, row: Row) -> int:
  """Most tokens that a row may still sample in the turn that it writes."""
  cfg = policy.rollout
  return min(cfg.max_turn_tokens, cfg.max_total_tokens - row.filled) - row.said


def hear(policy: Policy, row: Row, ids: np.ndarray, logp: np.ndarray) -> bool:
  """Takes in a segment of the turn.

  Args:
    policy: for the end of turn and the stop strings.
    row: its `ids` and `logp` grow; what was sampled past a stop string is dropped.
    ids: int32[T], sampled.
    logp: float32[T].

  Returns:
    Whether the turn is over.
  """
  row.ids.append(ids)
  row.logp.append(logp)
  over = len(ids) and ids[-1] == policy.codec.eos or left(policy, row) <= 0
  if policy.rollout.stop_strings:
    said = np.concatenate(row.ids)
    n = stops_at(policy.codec, said, policy.rollout.stop_strings)
    if n:
      row.ids, row.logp = [said[:n]], [np.concatenate(row.logp)[:n]]
      return True
  return bool(over)


def stops_at(codec: prompt.Codec, ids: np.ndarray, stops: tuple[str, ...]) -> int:
  """How many of the tokens it takes for their text to hold one of the stop strings; 0 if it holds none."""
  holds = lambda n: any(stop in codec.decode(ids[:n]) for stop in stops)
  return _least(holds, len(ids)) if holds(len(ids)) else 0


def _least(holds, most: int) -> int:
  """The least n from 1 to `most` for which `holds(n)`, which goes on holding from there and holds for `most`."""
  low, high = 1, most
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if holds(middle) else (middle + 1, high)
  return low


def token_span(codec: prompt.Codec, ids: np.ndarray, chars: tuple[int, int]) -> tuple[int, int]:
  """Which tokens hold the characters first..last-1 of the tokens' text, half-open."""
  reaches = lambda length: _least(lambda n: len(codec.decode(ids[:n])) >= length, len(ids))
  return reaches(chars[0] + 1) - 1, reaches(chars[1])


def read(policy: Policy, row: Row) -> Reply | None:
  """Reads the turn that has just ended into the trajectory.

  Args:
    policy: rules and budgets.
    row: its turn is taken out of `ids` and `logp`; the trajectory grows, or stops.

  Returns:
    What to append before the next turn, or None if the trajectory has stopped.
  """
  traj, codec, cfg, grid = row.traj, policy.codec, policy.rollout, policy.model.vision.grid
  ids, logp = np.concatenate(row.ids), np.concatenate(row.logp)
  row.ids, row.logp, turn = [], [], row.turn
  said = types.Turn("assistant", ids, logp, codec.decode(ids))
  traj.turns.append(said)
  at_end = len(ids) > 0 and ids[-1] == codec.eos
  if not at_end and not any(stop in said.text for stop in cfg.stop_strings):
    traj.stop = types.StopReason.OVERLONG
    return None
  parsed = prompt.parse(said.text)
  if isinstance(parsed, prompt.Answer):
    traj.stop, traj.answer = types.StopReason.ANSWERED, parsed.text
    traj.correct = answers.matches(parsed.text, traj.task.answers, traj.task.options)
    return None
  if isinstance(parsed, prompt.ParseFailure) and not parsed.is_call:
    said.error, traj.stop = parsed.message, types.StopReason.MALFORMED
    return None
  if turn == cfg.max_rounds:
    traj.stop = types.StopReason.OUT_OF_ROUNDS
    return None
  crop, error = None, None
  if isinstance(parsed, prompt.ParseFailure):
    error = parsed.message
  else:
    found = _zoom(policy, row, parsed)
    if isinstance(found, str):
      error = found
    else:
      box, crop = found
  new = () if crop is None else (images.vision_tokens(crop, grid),)
  spent = sum(images.vision_tokens(im, grid) for im in traj.images) + sum(new)
  n_images = len(traj.images) + len(new)
  if cfg.max_vision_tokens and spent > cfg.max_vision_tokens or cfg.max_images and n_images > cfg.max_images:
    traj.stop = types.StopReason.OVERLONG
    return None
  smallest = max(1, policy.image.crop_min_pixels // grid.factor ** 2)
  last = (turn + 1 == cfg.max_rounds or n_images == cfg.max_images
          or cfg.max_vision_tokens and spent + smallest > cfg.max_vision_tokens)
  words = prompt.tool_turn(error, policy.prompt.last_notice if last else "")
  heard = codec.encode(words if at_end else prompt.END + words, new)
  kept = row.filled + len(ids) - at_end
  if kept + at_end + len(heard) >= cfg.max_total_tokens:
    traj.stop = types.StopReason.OVERLONG
    return None
  said.error = error
  if crop is not None:
    said.box, said.box_shown, said.target_image = box, parsed.box, parsed.target_image
    said.call_span, said.box_span = (token_span(codec, ids, c) for c in (parsed.call_chars, parsed.box_chars))
    traj.images.append(crop)
  traj.turns.append(types.Turn("tool", heard, text=prompt.readable(codec.decode(heard)),
                               image_index=None if crop is None else len(traj.images) - 1))
  row.turn += 1
  # The end of turn was sampled but never fed; anything else was.
  said_pos = row.next_pos + len(ids) - at_end
  return reply(policy, np.concatenate([ids[-1:], heard]) if at_end else heard, crop, kept, said_pos)


def _zoom(policy: Policy, row: Row, call: prompt.Zoom) -> tuple[types.Box, types.ImageInput] | str:
  """The box on the original and the crop of it, or what is wrong with the call."""
  grid, shots = policy.model.vision.grid, row.traj.images
  if call.target_image and not policy.prompt.zoom_into_crops:
    return "target_image must be 0: only the first image can be zoomed into"
  if call.target_image >= len(shots):
    return f"target_image must be below {len(shots)}, the number of images so far"
  shown, limits = shots[call.target_image], policy.image
  box = images.check_zoom(call.box, shown.region, images.shown_wh(shown, grid), limits)
  if isinstance(box, str):
    return box
  region = images.expand(box, row.picture.size, limits) if limits.crop_expand else box
  return box, images.prepare(row.picture, region, limits.crop_min_pixels, limits.crop_max_pixels, grid)
