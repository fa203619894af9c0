"""What the device does with a batch: score it, update on it, imitate it.

`score` reads the policy before the update: its log-probabilities, and what `rl.judge` makes of the batch, minibatch by
minibatch, with statistics of all of them.  `update_step` is one PPO update.  `imitate_step` is one step of maximum
likelihood, for supervised fine-tuning and warm starts; `shown` says what demonstrations are like, as `score` does.
All are pure; the state they update is donated.

An update whose loss or gradient is not finite is skipped: else that one number would spread to all parameters,
moments and later steps.  The device decides, leaf by leaf, and counts: "optim/skipped".
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from virl_jax import types
from virl_jax.learner import optim
from virl_jax.learner import pooled
from virl_jax.model import family
from virl_jax.model import head
from virl_jax.model import sharding
from virl_jax.model import tuning
from virl_jax.rl import advantage
from virl_jax.rl import credit
from virl_jax.rl import judge
from virl_jax.rl import loss
from virl_jax.rl import reward

OFFLOAD = ("optimizer", "reference")
NO_LIMIT = np.float32(np.inf)  # to the gradient's norm


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything the steps need that is no array; hashable, so that it can be a static argument.

  With a mesh, updated parameters and moments stay where `sharding.param_shardings` puts them.  Left alone, the
  partitioner moves some about, and the next step is compiled again.

  With `single_update`, a batch serves one update, made with the policy that scores it: where scoring has no use for
  log-probabilities, it leaves them to the update's own forward pass.

  What `offload` names out of `OFFLOAD` lies in pinned memory of the host between steps: the optimiser's moments, the
  reference for the KL term.  A step moves it to the device and back.
  """

  model: family.Config
  group_size: int
  temperature: float = 1.0
  reward: reward.Config = reward.Config()
  credit: credit.Config = credit.Config()
  advantage: advantage.Config = advantage.Config()
  loss: loss.Config = loss.Config()
  optim: optim.OptimConfig = optim.OptimConfig()
  mesh: jax.sharding.Mesh | None = None
  single_update: bool = False
  offload: tuple[str, ...] = ()

  @property
  def judge(self) -> judge.Config:
    """What a batch is judged by."""
    return judge.Config(self.group_size, self.reward, self.credit, self.advantage)


@flax.struct.dataclass
class TrainState:
  """All that training carries from step to step; no RNG, no iterator, no clock, and nothing that is frozen.

  Attributes:
    update: int32 scalar, optimiser updates so far; one that was skipped is none.
    params: what of the policy is trained; with what is frozen it is all of it, see `family.whole`.
    opt_state: the optimiser's moments and counters.
    kl_coef: float32 scalar, weight of the KL term; moves if it is adaptive.
    critic: the value head, "w" float32[D] and "b" float32[1]; None if there is none.
    critic_opt_state: its moments.
  """

  update: jax.Array
  params: dict
  opt_state: optax.OptState
  kl_coef: jax.Array
  critic: dict | None = None
  critic_opt_state: optax.OptState | None = None


def abstract_state(params: dict, cfg: optim.OptimConfig, critic_width: int = 0, offload: Sequence[str] = (),
                   specs: dict | None = None) -> TrainState:
  """Shapes of a state, and where it lies: moments as the parameters do, all else whole on every device.

  Args:
    params: the policy, or its `jax.ShapeDtypeStruct`s with shardings.
    cfg: the optimisers.
    critic_width: D, for a value head; 0 for none.
    offload: with "optimizer" among it, moments lie in pinned memory of the host; see `Config`.
    specs: the parameters' table; see `optim.optimizer`.

  Returns:
    A state of `jax.ShapeDtypeStruct`s; without shardings if the parameters are not on a mesh.

  Raises:
    ValueError: if moments are to be in the host's memory, and there is no mesh or no such memory.
  """
  first = jax.tree.leaves(params)[0].sharding
  whole = sharding.replicated(first.mesh) if isinstance(first, jax.sharding.NamedSharding) else None
  host = "optimizer" in offload
  if whole is None and host:
    raise ValueError(f"parameters must be on a mesh for an optimizer that is offloaded. Received: {first}")
  spec = lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
  put = lambda tree: jax.tree.map(lambda a: spec(a, whole), tree)
  opt_state = jax.eval_shape(optim.optimizer(cfg, specs).init, params)
  opt_state = put(opt_state) if whole is None else jax.tree.map(
      spec, opt_state, optim.shardings(opt_state, params, whole, host))
  scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=whole)
  critic = critic_opt_state = None
  if critic_width:
    critic = {"w": jax.ShapeDtypeStruct((critic_width,), jnp.float32, sharding=whole),
              "b": jax.ShapeDtypeStruct((1,), jnp.float32, sharding=whole)}
    critic_opt_state = put(jax.eval_shape(optim.critic_optimizer(cfg).init, critic))
  return TrainState(scalar(jnp.int32), jax.tree.map(lambda a: spec(a, a.sharding), params), opt_state,
                    scalar(jnp.float32), critic, critic_opt_state)


def init_state(params: dict, cfg: optim.OptimConfig, kl_coef: float = 0.0, critic_width: int = 0,
               offload: Sequence[str] = (), specs: dict | None = None) -> TrainState:
  """A fresh state around parameters, laid out as `abstract_state` has it.

  Args:
    params: what is trained of the policy.
    cfg: the optimisers.
    kl_coef: what the KL term's weight begins with.
    critic_width: D, for a value head that expects nothing (0) at first; 0 for none.
    offload, specs: see `abstract_state`.
  """
  like = abstract_state(params, cfg, critic_width, offload, specs)
  where = lambda tree: jax.tree.map(lambda a: a.sharding, tree)
  rest = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like.replace(params=None, opt_state=None))
  rest = rest.replace(kl_coef=jnp.float32(kl_coef))
  if like.critic is not None:
    rest = rest.replace(critic_opt_state=optim.critic_optimizer(cfg).init(rest.critic))
  init = optim.optimizer(cfg, specs).init
  if like.update.sharding is None:
    return rest.replace(params=params, opt_state=jax.jit(init)(params))
  rest = jax.device_put(rest, like.update.sharding)
  # Zeros depend on no input, so that jit by itself would put them whole on every device.  First to the devices: older
  # compilers have no constants in two memories.
  on_device = optim.shardings(like.opt_state, params, like.update.sharding)
  opt_state = jax.jit(init, out_shardings=on_device)(params)
  return rest.replace(params=params, opt_state=jax.device_put(opt_state, where(like.opt_state)))


def outputs(params: dict, cfg: Config, batch: types.Batch, critic: dict | None = None
            ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """What a policy and a critic make of every token given what precedes it, a microbatch at a time.

  Args:
    params: any policy's parameters, all of them.
    cfg: model and temperature.
    batch: trajectories.
    critic: the value head, on the policy's last hidden state; None for none.

  Returns:
    Log-probability of each token and entropy where it was written (nats), and what the critic expected before
    it (None without one); float32[B, T] each.  Position t is about token t, position 0 holds 0.
  """
  zeros = jnp.zeros(batch.tokens_BT.shape, jnp.float32)

  def add(found, micro):
    return jax.tree.map(jnp.add, found, _outputs(params, cfg, batch, micro, critic)[0])

  with sharding.context(cfg.mesh):
    return _each_microbatch(add, batch.rows, (zeros, zeros, None if critic is None else zeros))


def _each_microbatch(fn, rows: types.Rows, start):
  """fn(... fn(start, first microbatch) ..., last microbatch); those without a token cost nothing."""
  take = lambda i: jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), rows)
  if len(rows.index_MUT) == 1:
    return fn(start, take(0))
  count = (rows.lengths_MUS > 0).any((1, 2)).sum()
  return jax.lax.fori_loop(0, count, lambda i, carry: fn(carry, take(i)), start)


def _outputs(params, cfg: Config, batch: types.Batch, micro: types.Rows, critic, best: bool = False
             ) -> tuple[tuple[jax.Array, jax.Array, jax.Array | None], jax.Array]:
  """`outputs` of a microbatch, 0 elsewhere, and bool[B] which trajectories are of it.

  Args:
    micro: without the leading axis.
    best: whether the log-probability of the likeliest token takes the place of what a critic expected.
  """
  valid = micro.index_MUT >= 0
  tokens, targets, vision, *pos = _taken(batch, micro.index_MUT)
  h = family.of(cfg.model).hidden(params, cfg.model, tokens, jnp.stack(pos, axis=1), valid, vision, micro.images,
                                  micro.lengths_MUS)
  found = list(head.token_logp(params, cfg.model, h, targets, cfg.temperature, best=best))
  if critic is not None:
    found.append(jnp.einsum("btd,d->bt", h.astype(jnp.float32), critic["w"]) + critic["b"][None])

  def put_back(tokens_BT, index_UT, *found):
    B, T = tokens_BT.shape
    at_UT = jnp.where(index_UT >= 0, index_UT, B * T)
    flat = lambda a: jnp.zeros(B * T, a.dtype).at[at_UT].set(a, mode="drop").reshape(B, T)
    # What is said at a token is about the next.
    return [jnp.pad(flat(a)[:, :-1], ((0, 0), (1, 0))) for a in found] + [flat(index_UT >= 0).any(-1)]

  *found, here_B = sharding.locally(put_back, [("rows",)] * (2 + len(found)), [("rows",)] * (len(found) + 1),
                                    batch.tokens_BT, micro.index_MUT, *found)
  logp, entropy, *value = found
  return (logp, entropy, value[0] if value else None), here_B


def _taken(batch: types.Batch, index_UT: jax.Array) -> list[jax.Array]:
  """What stands in rows, int32[U, T] each: tokens, the tokens that follow, vision indices, and three positions."""
  def take(index_UT, *arrays):
    at = jnp.maximum(index_UT, 0)
    return [a.reshape(-1)[at] for a in arrays]

  arrays = [batch.tokens_BT, jnp.roll(batch.tokens_BT, -1, axis=1), batch.vision_BT,
            *(batch.pos_BXT[:, x] for x in range(3))]
  return sharding.locally(take, [("rows",)] * 7, [("rows",)] * 6, index_UT, *arrays)


def mask(batch: types.Batch) -> jax.Array:
  """bool[B, T]: the tokens that the loss is about."""
  return batch.sampled_BT & batch.row_mask_B[:, None]


@functools.partial(jax.jit, static_argnames="cfg")
def informative(boxes: judge.Boxes, answer_B: jax.Array, format_B: jax.Array, answerable_B: jax.Array,
                row_mask_B: jax.Array, cfg: judge.Config, h0: jax.Array | float) -> jax.Array:
  """bool[B]: whether each trajectory's group is informative at this step's threshold; see `judge.informative`."""
  looks = judge.looks(boxes, cfg.reward, h0)
  return judge.informative(looks, boxes, answer_B, format_B, answerable_B, row_mask_B, cfg)


def score(state: TrainState, ref_params: dict | None, batches: Sequence[types.Batch], cfg: Config,
          h0: jax.Array | float | None = None, frozen: dict | None = None
          ) -> list[tuple[types.ScoredBatch, pooled.Metrics]]:
  """Rewards, credit and advantages of a batch, with the policy as it is before the update.

  Args:
    state: the policy and, if there is one, the critic.
    ref_params: all parameters of the reference for the KL term, see `reference`, or None.
    batches: the minibatches that together are the batch; each of whole groups.
    cfg: static.
    h0: the threshold of this step; None for `cfg.reward.h0`, which the metrics always use.
    frozen: what of the policy is not trained; None for nothing.

  Returns:
    Each minibatch scored, and its metrics.  What is standardised or scaled over the batch is so over all of them.

  Source: ViRL (arXiv 2511.23031); see `rl.judge`.
  """
  h0 = cfg.reward.h0 if h0 is None else h0
  found = [_read(state, ref_params, batch, cfg, h0, frozen) for batch in batches]
  batches = [batch.replace(row_mask_B=read.row_mask_B) for batch, (read, _) in zip(batches, found)]
  moments = [read.returns.moments for read, _ in found]
  whole = None if moments[0] is None else advantage.pooled(moments)
  shared = [_share(read, batch, cfg, h0, whole) for batch, (read, _) in zip(batches, found)]
  spread_BTs = [credits.advantage_BT for credits, _ in shared]
  if cfg.credit.keep_scale:
    sizes_2 = sum(credits.sizes_2 for credits, _ in shared)
    spread_BTs = [credit.keep_scale(advantage_BT, sizes_2) for advantage_BT in spread_BTs]
  return [(types.ScoredBatch(batch, read.logp_BT, read.logp_ref_BT, advantage_BT, read.looks.fidelity.iou_R,
                             read.looks.class_BR, credits.modulator_BR, credits.advantage_B, read.returns.total_B,
                             read.value_BT, read.returns.return_BT), metrics | more)
          for batch, (read, metrics), (credits, more), advantage_BT in zip(batches, found, shared, spread_BTs)]


def score_step(state: TrainState, ref_params: dict | None, batch: types.Batch, cfg: Config,
               h0: jax.Array | float | None = None, frozen: dict | None = None
               ) -> tuple[types.ScoredBatch, pooled.Metrics]:
  """`score` of a batch that is one minibatch."""
  return score(state, ref_params, [batch], cfg, h0, frozen)[0]


@flax.struct.dataclass
class _Read:
  """What the policy makes of a minibatch, and what it earned; fields as in `types.ScoredBatch`."""

  logp_BT: jax.Array | None
  logp_ref_BT: jax.Array | None
  value_BT: jax.Array | None
  row_mask_B: jax.Array
  looks: judge.Looks
  returns: judge.Returns


@functools.partial(jax.jit, static_argnames="cfg")
def _read(state, ref_params, batch, cfg, h0, frozen) -> tuple[_Read, pooled.Metrics]:
  """All of scoring that one minibatch settles by itself."""
  logp = value = kl_BT = None
  if not cfg.single_update or state.critic is not None or cfg.loss.kl_in_reward:
    logp, _, value = outputs(family.whole(state.params, frozen or {}, cfg.model), cfg, batch, state.critic)
  if ref_params is not None and "reference" in cfg.offload:
    ref_params = _on_device(ref_params)
  logp_ref = logp if ref_params is None else outputs(ref_params, cfg, batch)[0]
  looks = judge.looks(boxes(batch), cfg.reward, h0)
  total_B = judge.rewards(looks, batch.answer_B, batch.format_B, cfg.reward)
  # Not of what the KL leaves: that is noise, different for each of a group's equal trajectories.
  informative_B = judge.informative(looks, boxes(batch), batch.answer_B, batch.format_B, batch.answerable_B,
                                    batch.row_mask_B, cfg.judge, batch.order_B)
  metrics = _score_metrics(batch, looks, total_B, cfg) | {
      "advantage/informative_share": _each_row(informative_B), "tokens/padding_share": _padding(batch.rows)}
  if logp is not None:
    metrics |= _sampler_gap(logp, batch)
  if cfg.advantage.drop_equal:
    batch = batch.replace(row_mask_B=batch.row_mask_B & informative_B)
  if cfg.loss.kl_in_reward:
    kl_BT = state.kl_coef * jnp.where(batch.sampled_BT, loss.kl(logp, logp_ref, cfg.loss.kl_estimator), 0.0)
  returns = judge.returns(looks, total_B, batch.action_BT, mask(batch), batch.row_mask_B, cfg.judge, value, kl_BT)
  return _Read(logp, logp_ref, value, batch.row_mask_B, looks, returns), metrics


@functools.partial(jax.jit, static_argnames="cfg")
def _share(read, batch, cfg, h0, whole) -> tuple[judge.Credits, pooled.Metrics]:
  """The rest of it, which may want statistics of the whole batch."""
  credits = judge.credits(read.looks, read.returns, batch.action_BT, mask(batch), read.row_mask_B, cfg.judge, h0, whole,
                          batch.order_B)
  return credits, {"advantage/abs_mean": _each_row(jnp.abs(credits.advantage_B))}


def boxes(batch: types.Batch) -> judge.Boxes:
  """What visual actions are judged by, as `judge.looks` takes it."""
  return batch.box_BR4, batch.box_mask_BR, batch.gt_BJ4, batch.gt_mask_BJ


def _padding(rows: types.Rows) -> pooled.Ratio:
  """The share of what the model computes, in microbatches with any token, that is no token."""
  used_M = (rows.lengths_MUS > 0).any((1, 2))
  slots = used_M.sum() * rows.index_MUT[0].size
  return pooled.Ratio((slots - rows.lengths_MUS.sum()).astype(jnp.float32), slots.astype(jnp.float32))


def _each_row(x_B: jax.Array) -> pooled.Ratio:
  """The mean over all rows, masked ones too."""
  return pooled.mean_of(x_B.astype(jnp.float32), jnp.ones(x_B.shape, bool))


def _sampler_gap(logp_BT: jax.Array, batch: types.Batch) -> pooled.Metrics:
  """How far the trainer's log-probabilities of the trained tokens are from the sampler's."""
  gap = jnp.where(mask(batch), jnp.abs(logp_BT - batch.logp_sampler_BT), 0.0)
  return {"rollout/logp_gap_max": pooled.Max(gap.max()), "rollout/logp_gap_mean": pooled.mean_of(gap, mask(batch))}


def _score_metrics(batch: types.Batch, looks: judge.Looks, total_B: jax.Array, cfg: Config) -> pooled.Metrics:
  """What the trajectories are like; in terms of IoU and `cfg.reward.h0`, whatever is rewarded."""
  fid, judged_BR, has_gt_B = looks.fidelity, looks.judged_BR, batch.gt_mask_BJ.any(-1)
  hit_BR = judged_BR & (fid.iou_R >= cfg.reward.h0)
  return {
      "reward/total": _each_row(total_B), "reward/answer": _each_row(batch.answer_B),
      "reward/format": _each_row(batch.format_B), "reward/fidelity": _each_row(fid.mean),
      "acc_ans": pooled.mean_of(batch.answer_B, batch.answerable_B),
      "acc_rat": pooled.mean_of(hit_BR.astype(jnp.float32), judged_BR),
      "rationale_count": _each_row(batch.box_mask_BR.sum(-1)),
      "hit_rate": pooled.mean_of(hit_BR.any(-1).astype(jnp.float32), has_gt_B),
      "coverage": pooled.mean_of(fid.covered, has_gt_B),
      "mean_iou": pooled.mean_of(fid.iou_R, judged_BR),
      "credit/redundant_share": pooled.mean_of((looks.class_BR == credit.REDUNDANT).astype(jnp.float32), judged_BR),
      "data/no_boxes_share": _each_row(~has_gt_B), "data/no_answers_share": _each_row(~batch.answerable_B),
      "box/log_area_ratio": pooled.mean_of(_log_area_ratio(batch.box_BR4, batch.gt_BJ4, fid.target_R), judged_BR),
      "tokens/generated": pooled.Sum(batch.sampled_BT.sum().astype(jnp.float32)),
  }


def _log_area_ratio(box_BR4, gt_BJ4, target_BR):
  """log2 of each box's area over that of the box it is judged by, both at least a pixel: finite where masked, too."""
  area = lambda box_X4: (box_X4[..., 2] - box_X4[..., 0]) * (box_X4[..., 3] - box_X4[..., 1])
  judge_BRJ = jax.nn.one_hot(target_BR, gt_BJ4.shape[1]) > 0
  gt_BR = jnp.where(judge_BRJ, area(gt_BJ4)[:, None], 0.0).sum(-1)
  return jnp.log2(jnp.maximum(area(box_BR4), 1.0) / jnp.maximum(gt_BR, 1.0))


def _gradients(state: TrainState, frozen: dict | None, batch: types.Batch, cfg: Config, loss_fn, best: bool = False
               ) -> tuple:
  """Gradients of a minibatch's loss, added up over its microbatches, and what there was to differentiate.

  Args:
    state: the policy and the critic.
    frozen: what of the policy gets no gradient.
    batch: the minibatch.
    cfg: static.
    loss_fn: (outputs, mask of the microbatch's trained tokens, mask of all) -> the microbatch's part of the loss.
    best: see `_outputs`; there is no critic then.

  Returns:
    Gradients for what is trained of the policy and for the critic, float32, and the `outputs` of the whole minibatch.
  """
  trained = mask(batch)

  def part(params, critic, micro):
    found, here_B = _outputs(family.whole(params, frozen or {}, cfg.model), cfg, batch, micro, critic, best)
    return loss_fn(found, trained & here_B[:, None], trained), found

  def add(sums, micro):
    by, found = jax.grad(part, (0, 1), has_aux=True)(state.params, state.critic, micro)
    by, found = jax.tree.map(jnp.add, sums, (by, found))
    return (_pinned(by[0], cfg), by[1]), found

  zeros = jnp.zeros(trained.shape, jnp.float32)
  sums = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), (state.params, state.critic))
  with sharding.context(cfg.mesh):
    return _each_microbatch(add, batch.rows, ((_pinned(sums[0], cfg), sums[1]),
                                              (zeros, zeros, zeros if best or state.critic is not None else None)))


def _pinned(params: dict, cfg: Config) -> dict:
  """What is trained, or what has its shapes, kept where it lies."""
  if cfg.mesh is None:
    return params
  return jax.tree.map(jax.lax.with_sharding_constraint, params, _places(cfg))


def _places(cfg: Config) -> dict:
  """Where what is trained lies on the mesh."""
  return sharding.param_shardings(family.tables(cfg.model)[0], cfg.mesh)


def _on_device(tree):
  """Arrays that lie in the host's memory, on the device, divided as they are; within a program."""
  return jax.tree.map(lambda a: jax.device_put(a, jax.memory.Space.Device), tree)


def reference(trained: dict, frozen: dict, cfg: Config) -> dict:
  """The policy as it is now, for the KL term, whatever updates make of it.

  Updates are given the arrays of what is trained: those are copied, or all are, into pinned memory of the host.

  Args:
    trained, frozen: arrays, or `jax.ShapeDtypeStruct`s.
    cfg: what is trained, and whether the reference is offloaded.

  Raises:
    ValueError: it is to be offloaded, and the platform has no such memory.
  """
  params = tuning.reference(trained, frozen, cfg.model.tuning)
  put = lambda a, where: (jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
                          if isinstance(a, jax.ShapeDtypeStruct) else jax.device_put(a, where))
  if "reference" not in cfg.offload:
    return params
  return jax.tree.map(lambda a: put(a, sharding.in_host(a.sharding)), params)


def _apply(state: TrainState, grads: dict, critic_grads: dict | None, loss_total: jax.Array, limit: jax.Array | float,
           cfg: Config) -> tuple[TrainState, pooled.Metrics, jax.Array]:
  """One step of both optimisers, or none of either.

  Args:
    state: what it begins with.
    grads, critic_grads: of the policy and of the critic, None without one.
    loss_total: float32 scalar, what they are gradients of.
    limit: float32 scalar; the policy's gradient may have at most this norm.
    cfg: static.

  Returns:
    The state, metrics, and bool scalar: whether the update was made.  If not, all of the state is as it was.
  """
  grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)  # as the moments are
  opt_state, specs = state.opt_state, family.tables(cfg.model)[0]
  if cfg.mesh is not None:
    like = jax.tree.map(lambda p, where: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=where), state.params,
                        _places(cfg))
    lies = functools.partial(optim.shardings, opt_state, like, sharding.replicated(cfg.mesh))
  if "optimizer" in cfg.offload:  # once the gradients are there: before, activations have the room
    grads, opt_state = jax.lax.optimization_barrier((grads, opt_state))
    opt_state = jax.tree.map(lambda a, where: _on_device(a) if where.memory_kind == "pinned_host" else a, opt_state,
                             lies(host=True))
  made, metrics = _judged(loss_total, optax.tree.norm(grads),
                          None if critic_grads is None else optax.tree.norm(critic_grads), limit)
  # Leaf by leaf, so that it is part of the loop that writes the leaf: a branch would hold a second state.
  kept = functools.partial(jax.tree.map, functools.partial(jnp.where, made))
  updates, opt_state = optim.update(optim.optimizer(cfg.optim, specs), grads, opt_state, state.params, made)
  params = _pinned(kept(optax.apply_updates(state.params, updates), state.params), cfg)
  if cfg.mesh is not None:
    opt_state = jax.tree.map(jax.lax.with_sharding_constraint, opt_state, lies())
  if "optimizer" in cfg.offload:
    opt_state = jax.tree.map(lambda a, where: jax.device_put(a, where) if where.memory_kind == "pinned_host" else a,
                             opt_state, lies(host=True))
  metrics |= {"optim/learning_rate": pooled.Mean(optim.schedule(cfg.optim)(state.update))}
  state = state.replace(update=state.update + made, params=params, opt_state=opt_state)
  if state.critic is not None:
    updates, critic_opt_state = optim.update(optim.critic_optimizer(cfg.optim), critic_grads, state.critic_opt_state,
                                             state.critic, made)
    state = state.replace(critic=kept(optax.apply_updates(state.critic, updates), state.critic),
                          critic_opt_state=critic_opt_state)
  return state, metrics, made


def _judged(loss_total: jax.Array, norm: jax.Array, critic_norm: jax.Array | None, limit: jax.Array | float
            ) -> tuple[jax.Array, pooled.Metrics]:
  """Whether an update is made, bool scalar, and metrics that say why not; arguments as `_apply` has them."""
  finite = jnp.isfinite(loss_total) & jnp.isfinite(norm)
  metrics = {"optim/grad_norm": pooled.Mean(norm)}
  if critic_norm is not None:  # its gradient may overflow by itself
    finite &= jnp.isfinite(critic_norm)
    metrics["critic/grad_norm"] = pooled.Mean(critic_norm)
  spike = finite & (norm.astype(jnp.float32) > limit)
  made = finite & ~spike
  count = lambda yes: pooled.Sum(yes.astype(jnp.float32))
  return made, metrics | {"optim/skipped": count(~made), "optim/spikes": count(spike)}


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def update_step(state: TrainState, scored: types.ScoredBatch, cfg: Config, frozen: dict | None = None,
                limit: jax.Array | float = NO_LIMIT) -> tuple[TrainState, pooled.Metrics]:
  """One PPO update, of any number of microbatches: it is about the minibatch, however that is cut.

  It is skipped, and leaves the state as it was to the last bit, counters too, if its loss or a gradient is not finite
  or the policy's gradient, before it is clipped, is longer than the limit.

  Args:
    state: donated.
    scored: a scored minibatch.
    cfg: static.
    frozen: what of the policy is not trained; None for nothing.
    limit: float32 scalar, the longest gradient that is followed; `NO_LIMIT` for none.

  Returns:
    The next state, and metrics: "optim/skipped" is 1 for an update that was skipped, "optim/spikes" if it was for its
    length.  Its losses are as they came, finite or not.

  Source: PPO (arXiv 1707.06347), equations 7 and 9, with the token advantages of `rl.credit`.
  """
  trained = mask(scored.batch)
  first = scored.logp_old_BT is None  # then this is the policy that scored the batch

  def losses(found, here_BT, whole_BT=None):
    logp, entropy, value = found
    logp_old = jax.lax.stop_gradient(logp) if first else scored.logp_old_BT
    logp_ref = logp_old if scored.logp_ref_BT is None else scored.logp_ref_BT
    total, said = loss.policy_loss(logp, logp_old, logp_ref, entropy, scored.advantage_BT, here_BT, cfg.loss,
                                   scored.batch.logp_sampler_BT, state.kl_coef, whole_BT)
    if value is not None:
      critic_loss, more = loss.value_loss(value, scored.value_old_BT, scored.return_BT, here_BT, cfg.loss, whole_BT)
      total = total + cfg.loss.value_coef * critic_loss
      said = said | more | {"loss/total": total}
    return total, said

  (grads, critic_grads), found = _gradients(state, frozen, scored.batch, cfg, lambda *args: losses(*args)[0])
  metrics = _update_metrics(losses(found, trained)[1], trained)
  if first:
    metrics |= _sampler_gap(found[0], scored.batch)
  state, more, made = _apply(state, grads, critic_grads, metrics["loss/total"].value, limit, cfg)
  metrics |= more
  kl_coef = loss.next_kl_coef(state.kl_coef, metrics["loss/kl"].mean, trained.shape[0], cfg.loss)
  metrics |= {"loss/kl_coef": pooled.Mean(state.kl_coef)}
  return state.replace(kl_coef=jnp.where(made, kl_coef, state.kl_coef)), metrics


def _update_metrics(found: dict, trained_BT: jax.Array) -> pooled.Metrics:
  """What the losses say of an update: means over trained tokens are pooled, a loss is the update's own."""
  tokens = trained_BT.sum()
  token_means = ("loss/kl", "loss/entropy", "ppo/clip_frac", "ppo/kl_old", "critic/loss", "critic/clip_frac",
                 "critic/return_var")
  pools = {name: pooled.Weighted(value, tokens) if name in token_means else
           pooled.Max(value) if name == "ppo/ratio_max" else pooled.Mean(value) for name, value in found.items()}
  if "critic/explained" in found:  # a share of the variance there is
    pools["critic/explained"] = pooled.Weighted(found["critic/explained"], tokens * found["critic/return_var"])
  return pools


def shown(batch: types.Batch, cfg: Config) -> tuple[types.ScoredBatch, pooled.Metrics]:
  """Demonstrations as the report and the log want them: visual actions judged, every advantage 1.

  Args:
    batch: demonstrations.
    cfg: static; what actions and trajectories are judged by.

  Returns:
    What an update would be made with that took them for rollouts, and metrics of padding and tokens.
  """
  *found, metrics = _shown(batch, cfg)  # without the batch, which would be copied
  return types.ScoredBatch(batch, None, None, *found), metrics


@functools.partial(jax.jit, static_argnames="cfg")
def _shown(batch, cfg):
  looks = judge.looks(boxes(batch), cfg.reward)
  total_B = judge.rewards(looks, batch.answer_B, batch.format_B, cfg.reward)
  metrics = {"tokens/padding_share": _padding(batch.rows),
             "tokens/trained": pooled.Sum(mask(batch).sum().astype(jnp.float32))}
  return (mask(batch).astype(jnp.float32), looks.fidelity.iou_R, looks.class_BR,
          jnp.ones(looks.class_BR.shape, jnp.float32), jnp.ones_like(total_B), total_B, metrics)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def imitate_step(state: TrainState, batch: types.Batch, cfg: Config, frozen: dict | None = None,
                 limit: jax.Array | float = NO_LIMIT) -> tuple[TrainState, pooled.Metrics]:
  """One step of maximum likelihood on the batch's assistant tokens: `update_step` with another loss.

  What a token counts for is `loss.aggregate`'s to say.  With every advantage 1 and the only update of a batch, the
  gradient of PPO's loss is this one.

  Args:
    state: donated; without a critic.
    batch: demonstrations.
    cfg: static.
    frozen, limit: see `update_step`.

  Returns:
    The next state, and metrics: "loss/total"; "loss/nll", nats a token; "loss/accuracy", the share of tokens that are
    the policy's likeliest; what `update_step` says of the gradient.
  """
  trained = mask(batch)
  nll = lambda found, here_BT, whole_BT=None: loss.aggregate(-found[0], here_BT, cfg.loss, whole_BT)
  (grads, critic_grads), found = _gradients(state, frozen, batch, cfg, nll, best=True)
  total = nll(found, trained)
  state, metrics, _ = _apply(state, grads, critic_grads, total, limit, cfg)
  right_BT = (found[0] >= found[2]).astype(jnp.float32)
  return state, metrics | {"loss/total": pooled.Mean(total), "loss/nll": pooled.mean_of(-found[0], trained),
                           "loss/accuracy": pooled.mean_of(right_BT, trained)}
