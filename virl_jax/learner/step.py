"""What the device does with a batch: score it, update on it, imitate it.

`score_step` reads the policy before the update: log-probabilities, rewards, classes, advantages.
`update_step` is one PPO update.  `imitate_step` is one step of maximum likelihood, for warm starts.
All are pure; the state they update is donated.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax

from virl_jax import mesh as mesh_lib
from virl_jax import types
from virl_jax.model import qwen
from virl_jax.rl import advantage
from virl_jax.rl import credit
from virl_jax.rl import loss
from virl_jax.rl import reward


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """See `config.py`, section `optim`."""

  learning_rate: float = 1e-6
  warmup_steps: int = 0
  decay_steps: int = 0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything the steps need that is no array; hashable, so that it can be a static argument.

  With a mesh, updated parameters and moments stay where `mesh.param_shardings` puts them.  Left alone, the
  partitioner moves some about, and the next step is compiled again.
  """

  model: qwen.Config
  group_size: int
  temperature: float = 1.0
  reward: reward.Config = reward.Config()
  credit: credit.Config = credit.Config()
  advantage: advantage.Config = advantage.Config()
  loss: loss.Config = loss.Config()
  optim: OptimConfig = OptimConfig()
  mesh: jax.sharding.Mesh | None = None


@flax.struct.dataclass
class TrainState:
  """All that training carries from step to step; no RNG, no iterator, no clock.

  Attributes:
    update: int32 scalar, optimiser updates so far.
    params: the policy.
    opt_state: AdamW's moments and counters.
  """

  update: jax.Array
  params: dict
  opt_state: optax.OptState


def schedule(cfg: OptimConfig) -> optax.Schedule:
  """Linear warm-up, then constant, or linear decay to a tenth."""
  peak = cfg.learning_rate
  after = (optax.linear_schedule(peak, 0.1 * peak, cfg.decay_steps) if cfg.decay_steps
           else optax.constant_schedule(peak))
  if not cfg.warmup_steps:
    return after
  # The first update already moves: the ramp starts at peak / (warmup + 1), not at 0.
  ramp = optax.linear_schedule(peak / (cfg.warmup_steps + 1), peak, cfg.warmup_steps)
  return optax.join_schedules([ramp, after], [cfg.warmup_steps])


def optimizer(cfg: OptimConfig) -> optax.GradientTransformation:
  """AdamW behind global-norm clipping; vectors (norms, biases) are not decayed."""
  # By name, not by rank: layers are stacked, and a stacked bias has as many axes as a matrix.
  decayed = lambda path, _: not (path[-1].key.startswith("norm") or path[-1].key.endswith("_b"))
  return optax.chain(
      optax.clip_by_global_norm(cfg.clip_norm),
      optax.adamw(schedule(cfg), b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay,
                  mask=lambda p: jax.tree_util.tree_map_with_path(decayed, p)))


def init_state(params: dict, cfg: OptimConfig) -> TrainState:
  """A fresh state around parameters; moments take the parameters' shardings."""
  opt, first = optimizer(cfg), jax.tree.leaves(params)[0].sharding
  if not isinstance(first, jax.sharding.NamedSharding):
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(opt.init)(params))
  # Zeros depend on no input, so that jit by itself would put them whole on every device.
  whole = mesh_lib.replicated(first.mesh)
  shardings = optax.tree.map_params(opt, lambda _, p: p.sharding, jax.eval_shape(opt.init, params), params,
                                    transform_non_params=lambda _: whole)
  return TrainState(jax.device_put(jnp.zeros((), jnp.int32), whole), params,
                    jax.jit(opt.init, out_shardings=shardings)(params))


def logp_entropy(params: dict, cfg: Config, batch: types.Batch) -> tuple[jax.Array, jax.Array]:
  """Log-probability of every token given what precedes it, and the entropy there.

  Args:
    params: any policy's parameters.
    cfg: model and temperature.
    batch: trajectories.

  Returns:
    float32[B, T] each, nats; position t is about token t, position 0 holds 0.
  """
  with mesh_lib.context(cfg.mesh):
    h = qwen.hidden(params, cfg.model, batch.tokens_BT, batch.pos_BXT, batch.valid_BT, batch.vision_BT, batch.images,
                    right_padded=True)
  targets = jnp.roll(batch.tokens_BT, -1, axis=1)
  logp, entropy = qwen.token_logp(params, cfg.model, h, targets, cfg.temperature)
  shift = lambda a: jnp.pad(a[:, :-1], ((0, 0), (1, 0)))
  return shift(logp), shift(entropy)


def mask(batch: types.Batch) -> jax.Array:
  """bool[B, T]: the tokens that the loss is about."""
  return batch.sampled_BT & batch.row_mask_B[:, None]


@functools.partial(jax.jit, static_argnames="cfg")
def score_step(params: dict, ref_params: dict | None, batch: types.Batch, cfg: Config
               ) -> tuple[types.ScoredBatch, dict]:
  """Rewards, credit and advantages of a batch, with the policy as it is before the update.

  Args:
    params: the policy.
    ref_params: the frozen reference for the KL term, or None.
    batch: whole groups, neighbours in rows.
    cfg: static.

  Returns:
    The scored batch, and metrics (float32 scalars).

  Source: ViRL (arXiv 2511.23031), as DESIGN's formulas read it; see `rl.reward` and `rl.credit`.
  """
  logp, _ = logp_entropy(params, cfg, batch)
  logp_ref = logp if ref_params is None else logp_entropy(ref_params, cfg, batch)[0]
  fid = jax.vmap(lambda *a: reward.fidelity(*a, cfg.reward))(
      batch.box_BR4, batch.box_mask_BR, batch.gt_BJ4, batch.gt_mask_BJ)
  total_B = jax.vmap(lambda *a: reward.total(*a, cfg.reward))(batch.answer_B, batch.format_B, fid.mean)
  advantage_B = advantage.group_relative(total_B, cfg.group_size, cfg.advantage, batch.row_mask_B)
  class_BR = jax.vmap(credit.classify)(fid.correct_R, fid.redundant_R, fid.target_R >= 0)
  modulator_BR = jax.vmap(lambda c, a: credit.modulator(c, a, cfg.credit))(class_BR, advantage_B)
  advantage_BT = jax.vmap(credit.token_advantages)(advantage_B, modulator_BR, batch.action_BT, mask(batch))
  gap = jnp.where(mask(batch), jnp.abs(logp - batch.logp_sampler_BT), 0.0)
  actions = batch.box_mask_BR.sum()
  has_gt_B = batch.gt_mask_BJ.any(-1)
  # Visual actions are judged only where there is something to judge them by.
  judged_BR = batch.box_mask_BR & has_gt_B[:, None]
  metrics = {
      "reward/total": total_B.mean(), "reward/answer": batch.answer_B.mean(), "reward/format": batch.format_B.mean(),
      "reward/fidelity": fid.mean.mean(), "acc_ans": batch.answer_B.mean(),
      "acc_rat": loss.masked_mean(fid.correct_R.astype(jnp.float32), judged_BR),
      "rationale_count": actions / batch.answer_B.shape[0],
      "hit_rate": loss.masked_mean(fid.correct_R.any(-1).astype(jnp.float32), has_gt_B),
      "mean_iou": loss.masked_mean(fid.iou_R, judged_BR),
      "box/log_area_ratio": loss.masked_mean(_log_area_ratio(batch.box_BR4, batch.gt_BJ4, fid.target_R), judged_BR),
      "credit/redundant_share": loss.masked_mean((class_BR == credit.REDUNDANT).astype(jnp.float32), judged_BR),
      "advantage/abs_mean": jnp.abs(advantage_B).mean(),
      "rollout/logp_gap_max": gap.max(), "rollout/logp_gap_mean": loss.masked_mean(gap, mask(batch)),
      "tokens/generated": batch.sampled_BT.sum().astype(jnp.float32),
  }
  return types.ScoredBatch(batch, logp, logp_ref, advantage_BT, fid.iou_R, class_BR, modulator_BR, advantage_B,
                           total_B), metrics


def _log_area_ratio(box_BR4, gt_BJ4, target_BR):
  """log2 of each box's area over that of the box it is judged by, both at least a pixel: finite where masked, too."""
  area = lambda box_X4: (box_X4[..., 2] - box_X4[..., 0]) * (box_X4[..., 3] - box_X4[..., 1])
  judge_BRJ = jax.nn.one_hot(target_BR, gt_BJ4.shape[1]) > 0
  gt_BR = jnp.where(judge_BRJ, area(gt_BJ4)[:, None], 0.0).sum(-1)
  return jnp.log2(jnp.maximum(area(box_BR4), 1.0) / jnp.maximum(gt_BR, 1.0))


def _apply(state: TrainState, loss_fn, cfg: Config) -> tuple[TrainState, dict]:
  (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  updates, opt_state = optimizer(cfg.optim).update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  if cfg.mesh is not None:
    shardings = mesh_lib.param_shardings(qwen.specs(cfg.model), cfg.mesh)
    pin = jax.lax.with_sharding_constraint
    params = jax.tree.map(pin, params, shardings)
    opt_state = optax.tree.map_params(optimizer(cfg.optim), pin, opt_state, shardings)
  metrics = dict(metrics, **{"optim/grad_norm": optax.tree.norm(grads),
                             "optim/learning_rate": schedule(cfg.optim)(state.update)})
  return TrainState(state.update + 1, params, opt_state), metrics


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def update_step(state: TrainState, scored: types.ScoredBatch, cfg: Config) -> tuple[TrainState, dict]:
  """One PPO update.

  Args:
    state: donated.
    scored: a scored minibatch.
    cfg: static.

  Returns:
    The next state, and metrics (float32 scalars); check "loss/total" for finiteness.

  Source: PPO (arXiv 1707.06347), equation 7, with a group-relative advantage and the token advantages of
  `rl.credit`.
  """
  def loss_fn(params):
    logp, entropy = logp_entropy(params, cfg, scored.batch)
    return loss.policy_loss(logp, scored.logp_old_BT, scored.logp_ref_BT, entropy, scored.advantage_BT,
                            mask(scored.batch), cfg.loss)

  return _apply(state, loss_fn, cfg)


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def imitate_step(state: TrainState, batch: types.Batch, cfg: Config) -> tuple[TrainState, dict]:
  """One step of maximum likelihood on the batch's assistant tokens.

  Args:
    state: donated.
    batch: demonstrations.
    cfg: static.

  Returns:
    The next state, and metrics; "loss/total" is in nats a token.
  """
  def loss_fn(params):
    logp, _ = logp_entropy(params, cfg, batch)
    nll = -loss.masked_mean(logp, mask(batch))
    return nll, {"loss/total": nll}

  return _apply(state, loss_fn, cfg)
