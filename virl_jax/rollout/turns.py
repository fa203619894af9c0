"""One trajectory on the host: its prompt, and what each sampled turn leads to.

Every turn is read once, by strict rules that never raise: it takes a visual action (whose result comes back), answers,
or fails (the policy is told why, or the trajectory ends).  Budgets are kept here.
A turn holds one call: credit goes to one visual action a turn, so two calls in one turn are an error.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import numpy as np

from virl_jax import checks
from virl_jax import types
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.model import family
from virl_jax.model import patches
from virl_jax.rollout import row as row_lib
from virl_jax.rollout import sample
from virl_jax.rollout import slots
from virl_jax.rollout.actions import table


@dataclasses.dataclass(frozen=True)
class Config:
  """See `config.py`, section `rollout`."""

  max_rounds: int = 6
  max_turn_tokens: int = 1024
  max_total_tokens: int = 16384
  temperature: float = 1.0
  max_images: int = 0
  max_vision_tokens: int = 0
  keep: sample.Filter = sample.Filter()
  stop_strings: tuple[str, ...] = ()

  def __post_init__(self):
    checks.section(vars(self), "rollout", max_rounds=checks.whole(1), max_turn_tokens=checks.whole(1),
                   max_total_tokens=checks.whole(1), max_images=checks.whole(0), max_vision_tokens=checks.whole(0),
                   temperature=checks.real(above=0, wanted="positive (PPO needs a distribution to sample from)"),
                   stop_strings=checks.texts)
    checks.need(self.max_images != 1, "rollout.max_images", "0 (no limit) or at least 2: the shown image is one", 1)


@dataclasses.dataclass(frozen=True)
class Policy:
  """Everything a rollout needs but the parameters.

  Attributes:
    model: the model's configuration.
    codec: text <-> ids.
    prompt: how prompts are worded.
    image: pixel limits.
    rollout: budgets and sampling.
    mesh: what rows are split over.
    engine: how the device is used.
    actions: the visual actions that it may take, by name; see `actions.table`.
  """

  model: family.Config
  codec: prompt.Codec
  prompt: prompt.Config
  image: images.Config
  rollout: Config
  mesh: jax.sharding.Mesh
  engine: slots.Config = slots.Config()
  actions: Mapping[str, Any] = dataclasses.field(default_factory=lambda: table.ACTIONS)


def without_actions(policy: Policy) -> Policy:
  """The same policy without visual actions: the prompt describes none, and calls are refused."""
  return dataclasses.replace(policy, actions={}, prompt=dataclasses.replace(policy.prompt, describe_tool=False))


def check(policy: Policy, task: types.Task) -> None:
  """Checks that a task, its picture decoded, can be asked within the budgets.

  Raises:
    ValueError: it cannot; names the budget.
  """
  grid, cfg = policy.model.vision.grid, policy.image
  h, w = images.smart_resize(task.image.height, task.image.width, grid.factor, cfg.min_pixels, cfg.max_pixels)
  _prompt(policy, task, h // grid.factor * (w // grid.factor))


def begin(policy: Policy, task: types.Task) -> row_lib.Prompt:
  """The task as the policy is shown it.

  Raises:
    ValueError: the image can't be decoded, or the task can't be asked; see `check`.
  """
  grid = policy.model.vision.grid
  try:
    picture = images.decode(task.image, policy.image.decode_max_pixels)
    shown = images.prepare(picture, None, policy.image.min_pixels, policy.image.max_pixels, grid)
    ids = _prompt(policy, task, patches.vision_tokens(shown, grid))
  except ValueError as e:
    raise ValueError(f"task {task.uid}: {e}") from e
  return row_lib.prompt(policy.model, task, picture, ids, shown)


def _prompt(policy: Policy, task: types.Task, vision_tokens: int) -> np.ndarray:
  """int32[T], the prompt of a task whose image takes this many tokens.

  Raises:
    ValueError: it exceeds a budget.
  """
  cfg = policy.rollout
  if cfg.max_vision_tokens and vision_tokens > cfg.max_vision_tokens:
    raise ValueError(f"its image must fit rollout.max_vision_tokens = {cfg.max_vision_tokens}; lower image.max_pixels. "
                     f"Received: {vision_tokens} vision tokens")
  ids = policy.codec.encode(prompt.render(task.question, task.options, policy.prompt, policy.actions), (vision_tokens,))
  room = cfg.max_total_tokens - cfg.max_turn_tokens
  if len(ids) > room:
    raise ValueError(f"its prompt must leave room for a turn: at most {room} tokens (rollout.max_total_tokens - "
                     f"rollout.max_turn_tokens). Received: {len(ids)}")
  return ids


def left(policy: Policy, row: row_lib.Row) -> int:
  """Most tokens that a row may still sample in the turn that it writes."""
  cfg = policy.rollout
  return min(cfg.max_turn_tokens, cfg.max_total_tokens - row.filled) - row.said


def hear(policy: Policy, row: row_lib.Row, ids: np.ndarray, logp: np.ndarray) -> bool:
  """Takes in a segment of the turn.

  Args:
    policy: for the end-of-turn tokens, budgets and stop strings.
    row: its `ids` and `logp` grow; what was sampled past a stop string is dropped.
    ids: int32[T], sampled.
    logp: float32[T], their log-probabilities, in nats.

  Returns:
    Whether the turn is over.
  """
  row.hear(ids, logp)
  over = len(ids) and ids[-1] in policy.codec.eos or left(policy, row) <= 0
  if policy.rollout.stop_strings:
    said = np.concatenate(row.ids)
    n = stops_at(policy.codec, said, policy.rollout.stop_strings)
    if n:
      row.ids, row.logp = [said[:n]], [np.concatenate(row.logp)[:n]]
      return True
  return bool(over)


def stops_at(codec: prompt.Codec, ids: np.ndarray, stops: tuple[str, ...]) -> int:
  """How many of the tokens it takes until their text holds a stop string; 0 if it never does."""
  holds = lambda n: any(stop in codec.decode(ids[:n]) for stop in stops)
  return _least(holds, len(ids)) if holds(len(ids)) else 0


def _least(holds, most: int) -> int:
  """The least n from 1 to `most` with `holds(n)`, which must be monotonic and true for `most`."""
  low, high = 1, most
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if holds(middle) else (middle + 1, high)
  return low


def token_span(codec: prompt.Codec, ids: np.ndarray, chars: tuple[int, int]) -> tuple[int, int]:
  """Which tokens hold these characters of the tokens' text; both half-open."""
  reaches = lambda length: _least(lambda n: len(codec.decode(ids[:n])) >= length, len(ids))
  return reaches(chars[0] + 1) - 1, reaches(chars[1])


def read(policy: Policy, row: row_lib.Row) -> row_lib.Reply | None:
  """Reads the turn that has just ended into the trajectory.

  Args:
    policy: rules and budgets.
    row: its `ids` and `logp` are emptied; the trajectory gets the turn and, unless it stops, the reply.

  Returns:
    What to append before the next turn, or None if the trajectory has stopped.
  """
  traj, codec = row.traj, policy.codec
  ids, logp = row.take()
  said = types.Turn("assistant", ids, logp, codec.decode(ids))
  traj.turns.append(said)
  ended = len(ids) > 0 and ids[-1] in codec.eos
  if not ended and not any(stop in said.text for stop in policy.rollout.stop_strings):
    traj.stop = types.StopReason.OVERLONG
    return None
  parsed = prompt.parse(said.text, policy.actions)
  if isinstance(parsed, prompt.Answer):
    traj.stop, traj.answer = types.StopReason.ANSWERED, parsed.text
    return None
  failed = isinstance(parsed, prompt.ParseFailure)
  said.called = not failed or parsed.is_call
  if failed and not parsed.is_call:
    said.error, traj.stop = parsed.message, types.StopReason.MALFORMED
    return None
  if row.turn == policy.rollout.max_rounds:
    traj.stop = types.StopReason.OUT_OF_ROUNDS
    return None
  seen = parsed.message if failed else policy.actions[parsed.name].carry_out(policy, row, parsed)
  return _answer_call(policy, row, said, None if failed else parsed.name, seen, ended)


def _answer_call(policy: Policy, row: row_lib.Row, said: types.Turn, action: str | None,
                 seen: types.Observation | str, ended: bool) -> row_lib.Reply | None:
  """The reply with a call's result or error; None if it does not fit a budget.

  Args:
    policy: budgets.
    row: the trajectory grows by the tool's turn, or stops.
    said: the turn that called.
    action: the name of the action that it called, if the call was well formed.
    seen: the action's result, or what was wrong.
    ended: whether the turn has an end-of-turn token, which was sampled but is not in the cache yet.  If it is not the
      chat template's own, that one follows it.
  """
  traj, codec, cfg, grid = row.traj, policy.codec, policy.rollout, policy.model.vision.grid
  error = seen if isinstance(seen, str) else None
  seen = types.Observation() if error is not None else seen
  vision = [patches.vision_tokens(im, grid) for im in (*traj.images, *([seen.image] if seen.image else []))]
  if cfg.max_vision_tokens and sum(vision) > cfg.max_vision_tokens or cfg.max_images and len(vision) > cfg.max_images:
    traj.stop = types.StopReason.OVERLONG
    return None
  smallest = max(1, policy.image.crop_min_pixels // grid.factor ** 2)
  last = (row.turn + 1 == cfg.max_rounds or len(vision) == cfg.max_images
          or cfg.max_vision_tokens and sum(vision) + smallest > cfg.max_vision_tokens)
  words = prompt.tool_turn(error, policy.prompt.last_notice if last else "", seen.image is not None, seen.text)
  closed = ended and said.ids[-1] == codec.end
  heard = codec.encode(words if closed else prompt.END + words, tuple(vision[len(traj.images):]))
  kept = row.filled + len(said.ids) - ended
  if kept + ended + len(heard) >= cfg.max_total_tokens:
    traj.stop = types.StopReason.OVERLONG
    return None
  told = types.Turn("tool", heard, text=prompt.readable(codec.decode(heard)))
  if error is not None:
    said.error = error
  else:
    said.action, said.region, said.written, said.of_image = action, seen.region, seen.written, seen.of_image
    said.spans = {scope: token_span(codec, said.ids, chars) for scope, chars in seen.chars.items()}
  if seen.image is not None:
    traj.images.append(seen.image)
    told.image_index = len(traj.images) - 1
  traj.turns.append(told)
  row.turn += 1
  said_pos = row.next_pos + len(said.ids) - ended
  heard = np.concatenate([said.ids[-1:], heard]) if ended else heard
  return row_lib.reply(policy.model, heard, seen.image, kept, said_pos)
