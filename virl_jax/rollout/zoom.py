"""The zoom loop: a policy decodes to a tool call or an answer, the host crops, the policy goes on.

The device holds one cache for all rows.  The host parses turns, maps boxes to the original images, cuts
crops out of them at full resolution, and appends only what is new.  What was sampled is kept as it was
sampled: nothing is tokenised a second time.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from virl_jax import mesh as mesh_lib
from virl_jax import types
from virl_jax.data import answers
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.model import qwen
from virl_jax.model import rope
from virl_jax.model import text
from virl_jax.rollout import pack
from virl_jax.rollout import sample


@dataclasses.dataclass(frozen=True)
class Config:
  """See `config.py`, section `rollout`."""

  max_rounds: int = 6
  max_turn_tokens: int = 1024
  max_total_tokens: int = 16384
  temperature: float = 1.0
  pad_tokens: int = 64


@dataclasses.dataclass(frozen=True)
class Policy:
  """Everything a rollout needs but the parameters.

  Attributes:
    model: the model's configuration.
    codec: text <-> ids.
    prompt: how prompts are worded.
    image: pixel limits.
    rollout: budgets and temperature.
    mesh: where rows go.
  """

  model: qwen.Config
  codec: prompt.Codec
  prompt: prompt.Config
  image: images.Config
  rollout: Config
  mesh: jax.sharding.Mesh


@dataclasses.dataclass
class _Row:
  """Host side of one row: its trajectory, its picture, and the position of its next token."""

  traj: types.Trajectory
  image: object
  next_pos: int = 0


def rollout(policy: Policy, params: dict, tasks: list[types.Task], key: jax.Array, group_size: int = 1,
            temperature: float | None = None) -> list[types.Trajectory]:
  """Rolls out every task `group_size` times.

  Args:
    policy: everything but the parameters.
    params: the policy's parameters.
    tasks: prompts; row i * group_size + g is rollout g of task i, and that number is its uid.
    key: of the step.  A row's samples depend on (key, uid, turn) and nothing else.
    group_size: G.
    temperature: overrides `policy.rollout.temperature`; 0 is greedy.

  Returns:
    len(tasks) * group_size trajectories, groups together, each with a stop reason.

  Raises:
    ValueError: if there are no tasks, an image can't be decoded, or a prompt leaves no room to answer.
  """
  if not tasks:
    raise ValueError("tasks must not be empty")
  cfg = policy.rollout
  temperature = cfg.temperature if temperature is None else temperature
  prompts = [_prompt(policy, task) for task in tasks]
  slots = pack.up(cfg.max_total_tokens, text.CACHE_BLOCK)
  state = sample.start(policy.model, len(tasks), slots)
  state = sample.append(params, policy.model, state,
                        _chunk(policy, prompts, [r.traj.prompt_ids for r in prompts],
                               [r.traj.images for r in prompts], cfg.pad_tokens, len(prompts)))
  if group_size > 1:
    state = sample.fan_out(state, group_size)
  rows = [_Row(types.Trajectory(r.traj.task, i * group_size + g, r.traj.prompt_ids, images=list(r.traj.images)),
               r.image, r.next_pos) for i, r in enumerate(prompts) for g in range(group_size)]
  place = lambda a: mesh_lib.place(a, policy.mesh)
  uid_B = place(np.array([r.traj.uid for r in rows], np.int32))
  for turn in range(cfg.max_rounds + 1):
    running = np.array([r.traj.stop is None for r in rows])
    state, out, logp, count = sample.decode(params, policy.model, state, place(running), uid_B, np.int32(turn), key,
                                            np.float32(temperature), cfg.max_turn_tokens)
    out, logp, count = jax.device_get((out, logp, count))
    new_ids, new_images = [np.zeros(0, np.int32)] * len(rows), [[] for _ in rows]
    for b in np.flatnonzero(running):
      reply = _take_turn(policy, rows[b], out[b, :count[b]], logp[b, :count[b]], turn)
      if reply is not None:
        new_ids[b], new_images[b] = reply
    if all(r.traj.stop is not None for r in rows):
      break
    n_crops = sum(map(len, new_images))
    # Two sizes of crop bucket, so that few crops don't pay for many and few shapes are compiled.
    few = max(1, len(rows) // 4)
    state = sample.append(params, policy.model, state, _chunk(
        policy, rows, new_ids, new_images, 0, few if n_crops <= few else len(rows)))
  return [r.traj for r in rows]


def _prompt(policy: Policy, task: types.Task) -> _Row:
  """A row that holds only its prompt."""
  image = images.decode(task.image, policy.image.decode_max_pixels)
  grid = policy.model.vision.grid
  shown = images.prepare(image, None, policy.image.min_pixels, policy.image.max_pixels, grid)
  words = prompt.render(task.question, task.options, policy.prompt)
  ids = policy.codec.encode(words, (int(np.prod(images.merged_hw(shown, grid))),))
  room = policy.rollout.max_total_tokens - policy.rollout.max_turn_tokens
  if len(ids) > room:
    raise ValueError(f"task {task.uid}: the prompt must leave room for a turn: at most {room} tokens "
                     f"(rollout.max_total_tokens - rollout.max_turn_tokens). Received: {len(ids)}")
  return _Row(types.Trajectory(task, -1, ids, images=[shown]), image)


def _take_turn(policy: Policy, row: _Row, ids: np.ndarray, logp: np.ndarray, turn: int
               ) -> tuple[np.ndarray, list[types.ImageInput]] | None:
  """Reads a sampled turn into the trajectory.

  Returns:
    Ids to append (the sampled end of turn first, then the tool's turn) and their images, or None if the
    trajectory has stopped.
  """
  traj, codec, cfg = row.traj, policy.codec, policy.rollout
  said = types.Turn("assistant", ids, logp, codec.decode(ids))
  traj.turns.append(said)
  if not len(ids) or ids[-1] != codec.eos:
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
  grid, shown = policy.model.vision.grid, traj.images[0]
  if isinstance(parsed, prompt.ParseFailure):
    error = parsed.message
  else:
    box = images.check_zoom(parsed.box, shown.region, images.shown_wh(shown, grid), policy.image)
    if isinstance(box, str):
      error = box
    else:
      crop = images.prepare(row.image, box, policy.image.crop_min_pixels, policy.image.crop_max_pixels, grid)
  reply = codec.encode(prompt.tool_turn(error),
                       () if crop is None else (int(np.prod(images.merged_hw(crop, grid))),))
  used = len(traj.prompt_ids) + sum(len(t.ids) for t in traj.turns)
  if used + len(reply) + cfg.max_turn_tokens > cfg.max_total_tokens:
    traj.stop = types.StopReason.OVERLONG
    return None
  said.error = error
  if crop is not None:
    said.box, said.box_shown = box, parsed.box
    traj.images.append(crop)
  traj.turns.append(types.Turn("tool", reply, text=prompt.readable(codec.decode(reply)),
                               image_index=None if crop is None else len(traj.images) - 1))
  return np.concatenate([ids[-1:], reply]), [] if crop is None else [crop]


def _chunk(policy: Policy, rows: list[_Row], new_ids: list[np.ndarray], new_images: list[list[types.ImageInput]],
           pad_tokens: int, n_images: int) -> sample.Chunk:
  """Pads what each row gets; advances the rows' positions.

  Args:
    policy: for the grid and the mesh.
    rows: all of them.
    new_ids: int32[T] each; empty for rows that get nothing.
    new_images: the images among them, in order.
    pad_tokens: T becomes a multiple of this; 0 for a power of two, at least 16.
    n_images: size of the image bucket.
  """
  grid, image_token = policy.model.vision.grid, policy.model.image_token
  longest, B = max(map(len, new_ids)), len(rows)
  T = pack.up(longest, pad_tokens) if pad_tokens else max(16, 1 << (longest - 1).bit_length())
  batch, where = images.layout([im for group in new_images for im in group], grid, n_images)
  chunk = sample.Chunk(np.zeros((B, T), np.int32), np.zeros(B, np.int32), np.zeros((B, 3, T), np.int32),
                       np.zeros(B, np.int32), np.full((B, T), -1, np.int32), (batch,))
  at = 0
  for b, (row, ids, group) in enumerate(zip(rows, new_ids, new_images)):
    n = len(ids)
    if not n:
      continue
    chunk.tokens_BT[b, :n], chunk.n_new_B[b] = ids, n
    # After the prompt a chunk starts with the end of the sampled turn: its place is one before the next.
    began = row.next_pos + (len(row.traj.turns[-2].ids) - 1 if row.traj.turns else 0)
    chunk.pos_BXT[b, :, :n], row.next_pos = rope.positions(
        ids, image_token, [images.merged_hw(im, grid) for im in group], began)
    chunk.next_pos_B[b] = row.next_pos
    if group:
      chunk.vision_BT[b, :n][ids == image_token] = np.concatenate(where[at:at + len(group)])
      at += len(group)
  return mesh_lib.place(chunk, policy.mesh)
