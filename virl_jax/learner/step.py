"""What the device does with a batch: score it, update on it, imitate it.

`score` uses the policy before the update: it computes log-probabilities and, by `rl.judge`, rewards and advantages,
minibatch by minibatch, with statistics of all of them.  `update_step` is one PPO update.  `imitate_step` is one step of
maximum likelihood, for supervised fine-tuning and warm starts; `shown` puts demonstrations in the form of `score`.
All are pure; the state that they update is donated.

An update whose loss or gradient is not finite is skipped, or that one number would spread to all parameters, moments
and later steps.  The device decides, and counts such updates in "optim/skipped".
"""

from __future__ import annotations

from collections.abc import Sequence
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from virl_jax import types
from virl_jax.learner import microbatch
from virl_jax.learner import optim
from virl_jax.learner import pooled
from virl_jax.learner import state as state_lib
from virl_jax.model import family
from virl_jax.model import sharding
from virl_jax.rl import advantage
from virl_jax.rl import credit
from virl_jax.rl import judge
from virl_jax.rl import loss

NO_LIMIT = np.float32(np.inf)  # of the gradient's norm


@functools.partial(jax.jit, static_argnames="cfg")
def informative(boxes: judge.Boxes, answer_B: jax.Array, format_B: jax.Array, answerable_B: jax.Array,
                row_mask_B: jax.Array, cfg: judge.Config, h0: jax.Array | float) -> jax.Array:
  """bool[B]: whether each trajectory's group is informative at this step's threshold; see `judge.informative`."""
  looks = judge.looks(boxes, cfg.reward, h0)
  return judge.informative(looks, boxes, answer_B, format_B, answerable_B, row_mask_B, cfg)


def score(state: state_lib.TrainState, ref_params: dict | None, batches: Sequence[types.Batch], cfg: state_lib.Config,
          h0: jax.Array | float | None = None, frozen: dict | None = None
          ) -> list[tuple[types.ScoredBatch, pooled.Metrics]]:
  """Rewards, credit and advantages of a batch, with the policy as it is before the update.

  Args:
    state: the policy and, if there is one, the critic.
    ref_params: all parameters of the reference for the KL term, see `state.reference`, or None.
    batches: the minibatches that together are the batch; each of whole groups.
    cfg: static.
    h0: the threshold of this step; None for `cfg.reward.h0`, which the metrics always use.
    frozen: the policy's parameters that are not trained; None if all are.

  Returns:
    Each minibatch scored, and its metrics.  Statistics of the batch are over all minibatches.

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


def score_step(state: state_lib.TrainState, ref_params: dict | None, batch: types.Batch, cfg: state_lib.Config,
               h0: jax.Array | float | None = None, frozen: dict | None = None
               ) -> tuple[types.ScoredBatch, pooled.Metrics]:
  """`score` of a batch that is one minibatch."""
  return score(state, ref_params, [batch], cfg, h0, frozen)[0]


@flax.struct.dataclass
class _Read:
  """What the policy says of a minibatch's tokens, and what its trajectories earned; see `types.ScoredBatch`."""

  logp_BT: jax.Array | None
  logp_ref_BT: jax.Array | None
  value_BT: jax.Array | None
  row_mask_B: jax.Array
  looks: judge.Looks
  returns: judge.Returns


@functools.partial(jax.jit, static_argnames="cfg")
def _read(state, ref_params, batch, cfg, h0, frozen) -> tuple[_Read, pooled.Metrics]:
  """The part of scoring that needs one minibatch alone."""
  logp = value = kl_BT = None
  if not cfg.single_update or state.critic is not None or cfg.loss.kl_in_reward:
    logp, _, value = microbatch.outputs(family.whole(state.params, frozen or {}, cfg.model), cfg, batch, state.critic)
  if ref_params is not None and "reference" in cfg.offload:
    ref_params = state_lib.on_device(ref_params)
  logp_ref = logp if ref_params is None else microbatch.outputs(ref_params, cfg, batch)[0]
  looks = judge.looks(boxes(batch), cfg.reward, h0)
  total_B = judge.rewards(looks, batch.answer_B, batch.format_B, cfg.reward)
  # By the reward without the KL, which is noise that differs between a group's equal trajectories.
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
  returns = judge.returns(looks, total_B, batch.action_BT, batch.trained_BT, batch.row_mask_B, cfg.judge, value, kl_BT)
  return _Read(logp, logp_ref, value, batch.row_mask_B, looks, returns), metrics


@functools.partial(jax.jit, static_argnames="cfg")
def _share(read, batch, cfg, h0, whole) -> tuple[judge.Credits, pooled.Metrics]:
  """The rest of scoring, which may need statistics of the whole batch."""
  credits = judge.credits(read.looks, read.returns, batch.action_BT, batch.trained_BT, read.row_mask_B, cfg.judge, h0,
                          whole, batch.order_B)
  return credits, {"advantage/abs_mean": _each_row(jnp.abs(credits.advantage_B))}


def boxes(batch: types.Batch) -> judge.Boxes:
  """What visual actions are judged by, as `judge.looks` takes it."""
  return batch.box_BR4, batch.box_mask_BR, batch.gt_BJ4, batch.gt_mask_BJ


def _padding(rows: types.Rows) -> pooled.Ratio:
  """The share of padding in the slots that the model computes: those of microbatches with any token."""
  used_M = (rows.lengths_MUS > 0).any((1, 2))
  slots = used_M.sum() * rows.index_MUT[0].size
  return pooled.Ratio((slots - rows.lengths_MUS.sum()).astype(jnp.float32), slots.astype(jnp.float32))


def _each_row(x_B: jax.Array) -> pooled.Ratio:
  """The mean over all rows, masked ones too."""
  return pooled.mean_of(x_B.astype(jnp.float32), jnp.ones(x_B.shape, bool))


def _sampler_gap(logp_BT: jax.Array, batch: types.Batch) -> pooled.Metrics:
  """How far the trainer's log-probabilities of the trained tokens are from the sampler's."""
  gap = jnp.where(batch.trained_BT, jnp.abs(logp_BT - batch.logp_sampler_BT), 0.0)
  return {"rollout/logp_gap_max": pooled.Max(gap.max()), "rollout/logp_gap_mean": pooled.mean_of(gap, batch.trained_BT)}


def _score_metrics(batch: types.Batch, looks: judge.Looks, total_B: jax.Array, cfg: state_lib.Config) -> pooled.Metrics:
  """Metrics of the trajectories; zooms count by IoU and `cfg.reward.h0`, whatever is rewarded."""
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


def _apply(state: state_lib.TrainState, grads: dict, critic_grads: dict | None, loss_total: jax.Array,
           limit: jax.Array | float, cfg: state_lib.Config) -> tuple[state_lib.TrainState, pooled.Metrics, jax.Array]:
  """One step of both optimizers, or none of either.

  Args:
    state: the state before.
    grads, critic_grads: of the policy and of the critic, None without a critic.
    loss_total: float32 scalar, the loss that they are gradients of.
    limit: float32 scalar; the policy's gradient may have at most this norm.
    cfg: static.

  Returns:
    The state after, metrics, and bool scalar: whether the update was made.  If not, the state is unchanged.
  """
  grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)  # as the moments are
  opt_state, specs = state.opt_state, family.tables(cfg.model)[0]
  if cfg.mesh is not None:
    like = jax.tree.map(lambda p, where: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=where), state.params,
                        state_lib.places(cfg))
    lies = functools.partial(optim.shardings, opt_state, like, sharding.replicated(cfg.mesh))
  if "optimizer" in cfg.offload:  # only once the gradients are there: before, activations need the memory
    grads, opt_state = jax.lax.optimization_barrier((grads, opt_state))
    opt_state = jax.tree.map(lambda a, where: state_lib.on_device(a) if where.memory_kind == "pinned_host" else a,
                             opt_state, lies(host=True))
  made, metrics = _judged(loss_total, optax.tree.norm(grads),
                          None if critic_grads is None else optax.tree.norm(critic_grads), limit)
  # Chosen leaf by leaf, within the loop that writes the leaf: a branch would hold a second state.
  kept = functools.partial(jax.tree.map, functools.partial(jnp.where, made))
  updates, opt_state = optim.update(optim.optimizer(cfg.optim, specs), grads, opt_state, state.params, made)
  params = state_lib.pinned(kept(optax.apply_updates(state.params, updates), state.params), cfg)
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
  """Whether an update is made, bool scalar, and metrics that say why not; arguments as in `_apply`."""
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
def update_step(state: state_lib.TrainState, scored: types.ScoredBatch, cfg: state_lib.Config,
                frozen: dict | None = None, limit: jax.Array | float = NO_LIMIT
                ) -> tuple[state_lib.TrainState, pooled.Metrics]:
  """One PPO update on a minibatch, the same into however many microbatches that is cut.

  The update is skipped, and the state stays the same to the last bit, counters too, if the loss or a gradient is not
  finite or the norm of the policy's gradient, before it is clipped, is above the limit.

  Args:
    state: donated.
    scored: a scored minibatch.
    cfg: static.
    frozen: the policy's parameters that are not trained; None if all are.
    limit: float32 scalar, largest norm of the policy's gradient; `NO_LIMIT` for none.

  Returns:
    The next state, and metrics: "optim/skipped" is 1 if the update was skipped, "optim/spikes" if the limit was why.
    The losses of a skipped update are reported as they are, finite or not.

  Source: PPO (arXiv 1707.06347), equations 7 and 9, with the token advantages of `rl.credit`.
  """
  trained = scored.batch.trained_BT
  first = scored.logp_old_BT is None  # then the state is the policy that scored the batch

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

  (grads, critic_grads), found = microbatch.gradients(state, frozen, scored.batch, cfg, lambda *args: losses(*args)[0])
  metrics = _update_metrics(losses(found, trained)[1], trained)
  if first:
    metrics |= _sampler_gap(found[0], scored.batch)
  state, more, made = _apply(state, grads, critic_grads, metrics["loss/total"].value, limit, cfg)
  metrics |= more
  kl_coef = loss.next_kl_coef(state.kl_coef, metrics["loss/kl"].mean, trained.shape[0], cfg.loss)
  metrics |= {"loss/kl_coef": pooled.Mean(state.kl_coef)}
  return state.replace(kl_coef=jnp.where(made, kl_coef, state.kl_coef)), metrics


def _update_metrics(found: dict, trained_BT: jax.Array) -> pooled.Metrics:
  """An update's losses as metrics: means over trained tokens are pooled by tokens, losses are one per update."""
  tokens = trained_BT.sum()
  token_means = ("loss/kl", "loss/entropy", "ppo/clip_frac", "ppo/kl_old", "critic/loss", "critic/clip_frac",
                 "critic/return_var")
  pools = {name: pooled.Weighted(value, tokens) if name in token_means else
           pooled.Max(value) if name == "ppo/ratio_max" else pooled.Mean(value) for name, value in found.items()}
  if "critic/explained" in found:  # a share of the variance: weighted by that
    pools["critic/explained"] = pooled.Weighted(found["critic/explained"], tokens * found["critic/return_var"])
  return pools


def shown(batch: types.Batch, cfg: state_lib.Config) -> tuple[types.ScoredBatch, pooled.Metrics]:
  """Demonstrations in the form that the report and the log take: visual actions judged, every advantage 1.

  Args:
    batch: demonstrations.
    cfg: static; what actions and trajectories are judged by.

  Returns:
    The batch, scored as if it were of rollouts, without log-probabilities; and metrics of padding and tokens.
  """
  *found, metrics = _shown(batch, cfg)  # without the batch, which would be copied
  return types.ScoredBatch(batch, None, None, *found), metrics


@functools.partial(jax.jit, static_argnames="cfg")
def _shown(batch, cfg):
  looks = judge.looks(boxes(batch), cfg.reward)
  total_B = judge.rewards(looks, batch.answer_B, batch.format_B, cfg.reward)
  metrics = {"tokens/padding_share": _padding(batch.rows),
             "tokens/trained": pooled.Sum(batch.trained_BT.sum().astype(jnp.float32))}
  return (batch.trained_BT.astype(jnp.float32), looks.fidelity.iou_R, looks.class_BR,
          jnp.ones(looks.class_BR.shape, jnp.float32), jnp.ones_like(total_B), total_B, metrics)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def imitate_step(state: state_lib.TrainState, batch: types.Batch, cfg: state_lib.Config,
                 frozen: dict | None = None, limit: jax.Array | float = NO_LIMIT
                 ) -> tuple[state_lib.TrainState, pooled.Metrics]:
  """One step of maximum likelihood on the batch's assistant tokens: `update_step` with another loss.

  `loss.aggregate` says how much each token weighs.  The gradient is that of PPO's loss where every advantage is 1 and
  the batch serves one update.

  Args:
    state: donated; without a critic.
    batch: demonstrations.
    cfg: static.
    frozen, limit: see `update_step`.

  Returns:
    The next state, and metrics: "loss/total"; "loss/nll", nats a token; "loss/accuracy", the share of tokens that are
    the policy's likeliest; what `update_step` says of the gradient.
  """
  trained = batch.trained_BT
  nll = lambda found, here_BT, whole_BT=None: loss.aggregate(-found[0], here_BT, cfg.loss, whole_BT)
  (grads, critic_grads), found = microbatch.gradients(state, frozen, batch, cfg, nll, best=True)
  total = nll(found, trained)
  state, metrics, _ = _apply(state, grads, critic_grads, total, limit, cfg)
  right_BT = (found[0] >= found[2]).astype(jnp.float32)
  return state, metrics | {"loss/total": pooled.Mean(total), "loss/nll": pooled.mean_of(-found[0], trained),
                           "loss/accuracy": pooled.mean_of(right_BT, trained)}
