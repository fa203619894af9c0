"""A minibatch, a microbatch at a time: the model's outputs, and the gradients of a loss of them.

How a minibatch is cut is the host's choice (`rollout.pack`), and changes numbers only by rounding: one program runs
over the microbatches that hold a token, and adds up in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from virl_jax import types
from virl_jax.learner import state as state_lib
from virl_jax.model import family
from virl_jax.model import head
from virl_jax.model import sharding


def outputs(params: dict, cfg: state_lib.Config, batch: types.Batch, critic: dict | None = None
            ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """A policy's log-probabilities and entropies, and a critic's values, of every token given those before it.

  Args:
    params: all parameters of the policy.
    cfg: model and temperature.
    batch: trajectories.
    critic: the value head, on the policy's last hidden state; None for none.

  Returns:
    Of each token its log-probability (nats), the entropy of the distribution that it is from (nats), and what the
    critic expected before it (None without a critic); float32[B, T] each.  Position t is about token t; position 0
    holds 0, and values on padding are meaningless.
  """
  zeros = jnp.zeros(batch.tokens_BT.shape, jnp.float32)

  def add(found, micro):
    return jax.tree.map(jnp.add, found, _outputs(params, cfg, batch, micro, critic)[0])

  with sharding.context(cfg.mesh):
    return _each_microbatch(add, batch.rows, (zeros, zeros, None if critic is None else zeros))


def _each_microbatch(fn, rows: types.Rows, start):
  """fn(... fn(start, first microbatch) ..., last microbatch); microbatches without a token are skipped."""
  take = lambda i: jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), rows)
  if len(rows.index_MUT) == 1:
    return fn(start, take(0))
  count = (rows.lengths_MUS > 0).any((1, 2)).sum()
  return jax.lax.fori_loop(0, count, lambda i, carry: fn(carry, take(i)), start)


def _outputs(params, cfg: state_lib.Config, batch: types.Batch, micro: types.Rows, critic, best: bool = False
             ) -> tuple[tuple[jax.Array, jax.Array, jax.Array | None], jax.Array]:
  """`outputs` of a microbatch, 0 elsewhere, and bool[B] which trajectories are in it.

  Args:
    micro: the microbatch's rows, without the axis M.
    best: whether the third output is the log-probability of the likeliest token; there is no critic then.
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
    # The model's output at a token is about the next one.
    return [jnp.pad(flat(a)[:, :-1], ((0, 0), (1, 0))) for a in found] + [flat(index_UT >= 0).any(-1)]

  *found, here_B = sharding.locally(put_back, [("rows",)] * (2 + len(found)), [("rows",)] * (len(found) + 1),
                                    batch.tokens_BT, micro.index_MUT, *found)
  logp, entropy, *value = found
  return (logp, entropy, value[0] if value else None), here_B


def _taken(batch: types.Batch, index_UT: jax.Array) -> list[jax.Array]:
  """What rows hold, int32[U, T] each: tokens, the tokens that follow, vision indices, and three positions."""
  def take(index_UT, *arrays):
    at = jnp.maximum(index_UT, 0)
    return [a.reshape(-1)[at] for a in arrays]

  arrays = [batch.tokens_BT, jnp.roll(batch.tokens_BT, -1, axis=1), batch.vision_BT,
            *(batch.pos_BXT[:, x] for x in range(3))]
  return sharding.locally(take, [("rows",)] * 7, [("rows",)] * 6, index_UT, *arrays)


def gradients(state: state_lib.TrainState, frozen: dict | None, batch: types.Batch, cfg: state_lib.Config, loss_fn,
              best: bool = False) -> tuple:
  """Gradients of a minibatch's loss, added up over its microbatches, and the outputs that the loss is of.

  Args:
    state: the policy and the critic.
    frozen: the policy's parameters that get no gradient; None if all get one.
    batch: the minibatch.
    cfg: static.
    loss_fn: (outputs, mask of the microbatch's trained tokens, mask of all) -> the microbatch's part of the loss.
    best: see `_outputs`; there is no critic then.

  Returns:
    Gradients of the trained parameters and of the critic, float32, and the `outputs` of the whole minibatch.
  """
  trained = batch.trained_BT

  def part(params, critic, micro):
    found, here_B = _outputs(family.whole(params, frozen or {}, cfg.model), cfg, batch, micro, critic, best)
    return loss_fn(found, trained & here_B[:, None], trained), found

  def add(sums, micro):
    by, found = jax.grad(part, (0, 1), has_aux=True)(state.params, state.critic, micro)
    by, found = jax.tree.map(jnp.add, sums, (by, found))
    return (state_lib.pinned(by[0], cfg), by[1]), found

  zeros = jnp.zeros(trained.shape, jnp.float32)
  sums = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), (state.params, state.critic))
  with sharding.context(cfg.mesh):
    return _each_microbatch(add, batch.rows, ((state_lib.pinned(sums[0], cfg), sums[1]),
                                              (zeros, zeros, zeros if best or state.critic is not None else None)))
