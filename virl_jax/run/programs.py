"""The programs that a run compiles, with their arguments' shapes; nothing is allocated."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from virl_jax import config as config_lib
from virl_jax import shapes
from virl_jax import types
from virl_jax.learner import state as state_lib
from virl_jax.learner import step as step_lib
from virl_jax.model import cache as cache_lib
from virl_jax.model import family
from virl_jax.model import patches
from virl_jax.model import sharding
from virl_jax.rollout import pack
from virl_jax.rollout import sample
from virl_jax.run import costs
from virl_jax.run import setup

NAMES = ("update", "score", "copy", "prefill", "append", "decode", "restart")
_BOXES = 4  # ground-truth boxes of a task, J


@dataclasses.dataclass(frozen=True)
class Work:
  """What is assumed of a step, besides the configuration.

  Attributes:
    trajectory_tokens: mean length of a trajectory.
    crops: crops of a trajectory; they, and the image, are assumed to be of the largest size.
  """

  trajectory_tokens: int
  crops: int = 2


def work(c: config_lib.ConfigDict) -> Work:
  """The default assumption: trajectories half as long as they may be."""
  return Work(c.rollout.max_total_tokens // 2)


@dataclasses.dataclass(frozen=True)
class Program:
  """A jitted function, and what a run calls it with.

  Attributes:
    fn: the function.
    args: its positional arguments: arrays as shapes, dtypes and shardings, host scalars as some value.
    fixed: indices of those that are compiled in.
    more: its arguments by name; all of them are compiled in.
  """

  fn: Callable
  args: tuple
  fixed: tuple[int, ...]
  more: dict = dataclasses.field(default_factory=dict)

  def lower(self) -> jax.stages.Lowered:
    """The function, traced."""
    return self.fn.lower(*self.args, **self.more)

  @property
  def arrays(self) -> tuple:
    """The arguments that the compiled program still takes, in order."""
    return tuple(a for i, a in enumerate(self.args) if i not in self.fixed)


def program(c: config_lib.ConfigDict, p: setup.Pieces, name: str, work: Work) -> Program:
  """A program of `NAMES`, for the mesh that the pieces have.

  Args:
    c: the configuration.
    p: its pieces, for devices that are here or not.
    name: which.
    work: what a step is like.
  """
  make = {"update": _update, "score": _score, "copy": _copy, "prefill": _prefill, "append": _append,
          "decode": _decode, "restart": _restart}[name]
  return make(c, p, work)


def lowered(c: config_lib.ConfigDict, p: setup.Pieces, name: str, work: Work) -> Callable[[], jax.stages.Lowered]:
  """A function that traces a program when it is called; arguments as in `program`."""
  return lambda: program(c, p, name, work).lower()


# --- training --------------------------------------------------------------------------------------------------


def _update(c, p, work) -> Program:
  batch = _batch(c, p, work)
  B, T = batch.tokens_BT.shape
  row = lambda *shape: _spec((B, *shape), jnp.float32, sharding.rows(p.mesh))
  gae = c.advantage.kind == "gae"
  scored = types.ScoredBatch(
      batch, None if p.step.single_update and not (gae or c.loss.kl_in_reward) else row(T),
      row(T) if c.loss.kl_coef or not p.step.single_update else None, row(T), row(p.pack.max_rounds),
      row(p.pack.max_rounds), row(p.pack.max_rounds), row(), row(), row(T) if gae else None, row(T) if gae else None)
  return Program(step_lib.update_step, (_state(c, p), scored, p.step, _split(c, p)[1], step_lib.NO_LIMIT), (2,))


def _score(c, p, work) -> Program:
  return Program(step_lib._read, (_state(c, p), _reference(c, p), _batch(c, p, work), p.step, np.float32(c.reward.h0),
                                  _split(c, p)[1]), (3,))


def _split(c, p) -> tuple[dict, dict]:
  """Trained and frozen parameters."""
  return family.abstract(p.step.model, c.model.dtype, p.mesh)


def _reference(c, p) -> dict | None:
  """The reference's parameters for the KL term, if there is one."""
  return state_lib.reference(*_split(c, p), p.step) if c.loss.kl_coef else None


def _state(c, p) -> state_lib.TrainState:
  return state_lib.abstract(
      _split(c, p)[0], p.step.optim, p.step.model.text.hidden if c.advantage.kind == "gae" else 0, p.step.offload,
      family.tables(p.step.model)[0])


def _batch(c, p, work) -> types.Batch:
  """A minibatch whose microbatches are full."""
  B = c.rollout.prompts * c.rollout.group_size // c.ppo.minibatches
  T = width(c)
  R, J, shards = p.pack.max_rounds, _BOXES, sharding.row_shards(p.mesh)
  at_once, M = rows_of(c, p, work)
  row = lambda dtype, *shape: _spec((B, *shape), dtype, sharding.rows(p.mesh))
  micro = lambda dtype, *shape: _spec((M, *shape), dtype, sharding.rows(p.mesh, 1))
  i32, f32 = jnp.int32, jnp.float32
  each = max(1, round(at_once * T / work.trajectory_tokens))  # trajectories of a shard's microbatch
  shown, crops = pack.image_counts(p.pack, at_once, each, each * work.crops)
  images = tuple(_images(p, limit, count * shards, micro) for count, limit in (
      (shown, c.image.max_pixels), (crops, c.image.crop_max_pixels)))
  return types.Batch(
      tokens_BT=row(i32, T), valid_BT=row(bool, T), sampled_BT=row(bool, T), pos_BXT=row(i32, 3, T),
      vision_BT=row(i32, T), logp_sampler_BT=row(f32, T), action_BT=row(i32, T), box_BR4=row(f32, R, 4),
      box_mask_BR=row(bool, R), gt_BJ4=row(f32, J, 4), gt_mask_BJ=row(bool, J), answer_B=row(f32), format_B=row(f32),
      answerable_B=row(bool), row_mask_B=row(bool),
      rows=types.Rows(micro(i32, at_once * shards, T),
                      micro(i32, at_once * shards, pack.MAX_JOINED if c.pack.join_rows else 1), images),
      order_B=row(i32) if shards > 1 else None)


def width(c) -> int:
  """T of the longest rows of a batch."""
  return pack.width(c.rollout.max_total_tokens, c.pack.pad_tokens, c.pack.join_rows)


def rows_of(c, p, work) -> tuple[int, int]:
  """Rows of a shard's microbatch, and microbatches of a minibatch."""
  B = c.rollout.prompts * c.rollout.group_size // c.ppo.minibatches
  T = width(c)
  each = B // sharding.row_shards(p.mesh)
  rows = math.ceil(each * work.trajectory_tokens / T) if c.pack.join_rows else each
  if not c.learner.microbatch_tokens:
    return rows, 1
  at_once = min(c.learner.microbatch_tokens // T, rows)
  return at_once, shapes.least(-(-rows // at_once), shapes.counts(-(-each // at_once)))


def _images(p, max_pixels: int, count: int, spec) -> types.ImageBatch:
  """`count` images of the largest size, square."""
  grid = p.pack.grid
  side = max(1, math.isqrt(max_pixels) // grid.factor)
  windows, cells = patches.bucket((math.ceil(side / grid.window) ** 2, side ** 2), grid)
  shape = count, windows, cells * grid.merge ** 2
  return types.ImageBatch(spec(jnp.uint8, *shape, grid.bytes), spec(jnp.int32, *shape), spec(jnp.int32, *shape, 2))


# --- rollouts --------------------------------------------------------------------------------------------------


def _copy(c, p, work) -> Program:
  params = family.whole(*_split(c, p), p.step.model)
  moved, where = sample.moves(params, p.policy.model, p.policy.mesh)
  leaves = jax.tree.leaves(params)
  return Program(sample.copy, ([leaves[i] for i in moved], jnp.dtype(c.model.compute_dtype), where,
                               p.policy.model.platform == "tpu"), (1, 2, 3))


def _weights(c, p):
  return family.whole(*family.abstract(p.policy.model, c.model.compute_dtype, p.policy.mesh), p.policy.model)


def _slots(c, p) -> int:
  """Cache rows of a shard."""
  return -(-(c.engine.slots or c.rollout.prompts * c.rollout.group_size) // sharding.row_shards(p.policy.mesh))


def _rollout(c, p) -> sample.State:
  mesh, model = p.policy.mesh, p.policy.model
  rows = _slots(c, p) * sharding.row_shards(mesh)
  state = jax.eval_shape(lambda: sample.start(model, rows, shapes.up(c.rollout.max_total_tokens, cache_lib.BLOCK)))
  kv = sharding.cache(mesh, model.text.kv_heads)
  return jax.tree.map(lambda a: _spec(a.shape, a.dtype, kv if a.ndim == 5 else sharding.rows(mesh)), state)


def _chunk(c, p, rows: int, tokens: int, max_pixels: int) -> sample.Chunk:
  A = rows * sharding.row_shards(p.policy.mesh)
  row = lambda dtype, *shape: _spec((A, *shape), dtype, sharding.rows(p.policy.mesh))
  i32 = jnp.int32
  images = _images(p, max_pixels, A, lambda dtype, count, *shape: row(dtype, *shape))
  return sample.Chunk(row(i32, tokens), row(i32), row(i32, 3, tokens), row(i32), row(i32, tokens), (images,), row(i32),
                      row(i32))


def _prefill_chunk(c, p) -> sample.Chunk:
  rows = max(shapes.row_sizes(-(-_slots(c, p) // c.rollout.group_size), c.engine.append_ratio))
  shown = c.image.max_pixels // p.pack.grid.factor ** 2
  tokens = min(shapes.up(shown + 512, c.engine.pad_tokens), shapes.up(c.rollout.max_total_tokens, cache_lib.BLOCK))
  return _chunk(c, p, rows, tokens, c.image.max_pixels)


def _prefill(c, p, work) -> Program:
  return Program(sample.append, (_weights(c, p), p.policy.model, _rollout(c, p), _prefill_chunk(c, p), True), (1, 4),
                 {"mesh": p.policy.mesh})


def _append_chunk(c, p) -> sample.Chunk:
  rows = max(shapes.row_sizes(_slots(c, p), c.engine.append_ratio))
  crop = c.image.crop_max_pixels // p.pack.grid.factor ** 2
  tokens = shapes.least(crop + 32, shapes.token_sizes(c.engine.token_steps))
  return _chunk(c, p, rows, tokens, c.image.crop_max_pixels)


def _append(c, p, work) -> Program:
  return Program(sample.append, (_weights(c, p), p.policy.model, _rollout(c, p), _append_chunk(c, p)), (1,),
                 {"mesh": p.policy.mesh})


def _decode(c, p, work) -> Program:
  A = _slots(c, p) * sharding.row_shards(p.policy.mesh)
  row = lambda: _spec((A,), jnp.int32, sharding.rows(p.policy.mesh))
  key = jax.eval_shape(lambda: jax.random.key(0))
  return Program(
      sample.decode, (_weights(c, p), p.policy.model, _rollout(c, p), sample.Writers(*(row() for _ in range(4))), key,
                      np.float32(1.0), c.engine.segment_tokens, np.int32(1), p.policy.rollout.keep), (1, 6, 8),
      {"mesh": p.policy.mesh})


def _restart(c, p, work) -> Program:
  A = _slots(c, p) * sharding.row_shards(p.policy.mesh)
  row = lambda: _spec((A,), jnp.int32, sharding.rows(p.policy.mesh))
  length = shapes.up(c.rollout.max_total_tokens, cache_lib.BLOCK)
  return Program(sample.restart, (_rollout(c, p), row(), row(), row(), row()), (),
                 {"width": length, "mesh": p.policy.mesh})


def _spec(shape, dtype, where) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


# --- what they cost --------------------------------------------------------------------------------------------


def cost(c: config_lib.ConfigDict, p: setup.Pieces, name: str, work: Work) -> costs.Work:
  """What a program does on all devices together: `update` and `score` in one microbatch, `decode` in one step."""
  weights, how = _device_bytes(_weights(c, p)), p.step.model.tuning
  if name in ("update", "score"):
    rows, (at_once, _) = sharding.row_shards(p.mesh), rows_of(c, p, work)
    tokens = float(rows * at_once * width(c))
    batch = _batch(c, p, work)
    # With values kept, part of the recomputation is left out; a lower bound then counts none of it.
    update = name == "update"
    passes, of_vision = costs.update_passes(how) if update else (1.0, 1.0)
    remat = float(update and c.model.remat and not (c.model.remat_keep or c.model.remat_offload))
    again = float(update and c.model.patches_together > 0)
    passes += remat
    of_vision += 0.0 if how.freeze_vision else remat + again
    held = _device_bytes(family.whole(*family.abstract(p.step.model, c.model.compute_dtype, p.mesh), p.step.model))
    slots = sum(math.prod(b.window_IWQ.shape[1:]) for b in batch.rows.images)
    biggest = max(math.prod(b.window_IWQ.shape[2:]) for b in batch.rows.images)
    return costs.Work(tokens, work.trajectory_tokens / 2, tokens, slots, biggest, passes, of_vision,
                      passes * held * p.mesh.shape["fsdp"])
  if name == "copy":
    return costs.Work(0.0, bytes_device=weights)
  slots = _slots(c, p) * sharding.row_shards(p.policy.mesh)
  cache = _device_bytes(_rollout(c, p).cache)
  if name == "decode":  # half of the cache is filled
    return costs.Work(float(slots), c.rollout.max_total_tokens / 2, float(slots), bytes_device=weights + cache / 2)
  if name == "restart":
    return costs.Work(0.0, bytes_device=float(cache))
  chunk = _prefill_chunk(c, p) if name == "prefill" else _append_chunk(c, p)
  A, T = chunk.tokens_AT.shape
  context = T / 2 if name == "prefill" else c.rollout.max_total_tokens / 2
  image = math.prod(chunk.images[0].window_IWQ.shape[1:])
  return costs.Work(float(A * T), context, 0.0, float(A * image), float(image), bytes_device=weights + cache / 2)


def kinds(c: config_lib.ConfigDict, p: setup.Pieces, work: Work) -> dict[str, float]:
  """GiB on a device, by what holds them, in training and in rollouts."""
  state = _state(c, p)
  moved, _ = sample.moves(family.whole(*_split(c, p), p.step.model), p.policy.model, p.policy.mesh)
  found = {"parameters": (state.params, _split(c, p)[1]), "optimizer": state.opt_state, "batch": _batch(c, p, work),
           "reference": _reference(c, p) if c.loss.kl_coef and not p.step.model.tuning.rank else (),
           "rollout weights": [jax.tree.leaves(_weights(c, p))[i] for i in moved], "cache": _rollout(c, p).cache}
  return {name: _device_bytes(tree) / 2 ** 30 for name, tree in found.items()}


def live(c: config_lib.ConfigDict, p: setup.Pieces, name: str, work: Work) -> float:
  """GiB that lie on a device when a program begins: its arguments, and what else is kept there meanwhile."""
  found = kinds(c, p, work)
  if name in ("update", "score"):
    beside = c.ppo.minibatches * found["batch"]
  elif name == "copy":
    beside = 0.0
  else:
    chunk = {"prefill": _prefill_chunk, "append": _append_chunk}.get(name, lambda c, p: ())(c, p)
    beside = found["rollout weights"] + found["cache"] + _device_bytes(chunk) / 2 ** 30
  return found["parameters"] + found["optimizer"] + found["reference"] + beside


def _device_bytes(tree) -> int:
  """Bytes of a tree on each device, without what is in the host's memory."""
  return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
             if a.sharding.memory_kind != "pinned_host")
