"""From hidden states to the policy's distribution: temperature, banned ids, log-probabilities in chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from virl_jax.model import family


def policy_logits(params: dict, cfg: family.Config, hidden_BTD: jax.Array, temperature: float) -> jax.Array:
  """float32[B, T, V]: what is sampled from, and what the loss is about: placeholders out, temperature in."""
  x = family.of(cfg).logits(params, cfg, hidden_BTD) / temperature
  banned_V = np.isin(np.arange(cfg.text.vocab), cfg.banned)
  # Finite, so that entropy and its gradient stay finite; exp(-1e30) is 0 all the same.
  return jnp.where(banned_V[None, None], -1e30, x)


def token_logp(params: dict, cfg: family.Config, hidden_BTD: jax.Array, targets_BT: jax.Array, temperature: float,
               chunk: int = 128) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each target and entropy of the distribution that it came from.

  The logits of only `chunk` positions a row exist at a time, forward and backward.

  Args:
    params: the model's parameters.
    cfg: the model.
    hidden_BTD: hidden states at the positions that predict the targets.
    targets_BT: int32 ids; a banned id gets -1e30.
    temperature: of sampling.
    chunk: positions at a time.

  Returns:
    logp_BT, entropy_BT: float32, nats.
  """
  B, T, D = hidden_BTD.shape
  pad = -T % chunk if T > chunk else 0
  chunk = min(chunk, T)
  h = jnp.pad(hidden_BTD, ((0, 0), (0, pad), (0, 0))).reshape(B, -1, chunk, D).swapaxes(0, 1)
  y = jnp.pad(targets_BT, ((0, 0), (0, pad))).reshape(B, -1, chunk).swapaxes(0, 1)

  def one(args):
    h_BCD, y_BC = args
    x = policy_logits(params, cfg, h_BCD, temperature)
    logp = jax.nn.log_softmax(x)
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    return jnp.take_along_axis(logp, y_BC[..., None], axis=-1)[..., 0], entropy

  # A single chunk's logits may stay for the backward pass; more than one would add up.
  logp, entropy = jax.lax.map(jax.checkpoint(one) if len(h) > 1 else one, (h, y))
  join = lambda a: a.swapaxes(0, 1).reshape(B, -1)[:, :T]
  return join(logp), join(entropy)
