"""From hidden states to the policy's distribution: temperature, banned ids, log-probabilities in chunks."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from virl_jax.model import family
from virl_jax.model import layers
from virl_jax.model import sharding

LOGITS = 2 ** 26  # most logits on a device at a time


def policy_logits(params: dict, cfg: family.Config, hidden_BTD: jax.Array, temperature: float) -> jax.Array:
  """float32[B, T, V]: the logits of sampling and of the loss: banned ids removed, divided by the temperature."""
  x = layers.logits(hidden_BTD, family.of(cfg).head(params)) / temperature
  banned_V = np.isin(np.arange(cfg.text.vocab), cfg.banned)
  # Finite, so that entropy and its gradient stay finite; exp(-1e30) is still 0.
  return jnp.where(banned_V[None, None], -1e30, x)


def token_logp(params: dict, cfg: family.Config, hidden_BTD: jax.Array, targets_BT: jax.Array, temperature: float,
               chunk: int | None = None, best: bool = False) -> tuple[jax.Array, ...]:
  """Log-probability of each target and entropy of the distribution that it came from.

  Logits are computed for some positions at a time, forward and backward, and only the entropy and the normaliser are
  kept.  Under a mesh the head is gathered once, in the compute dtype, and its gradient is added up in float32 and
  reduced once; over "tensor" the vocabulary stays split.

  Args:
    params: the model's parameters.
    cfg: the model.
    hidden_BTD: hidden states at the positions that predict the targets.
    targets_BT: int32 ids; a banned id gets -1e30.
    temperature: of sampling.
    chunk: positions of a row at a time; None for as many as `LOGITS` allows.
    best: whether to return the likeliest id's log-probability too; where the target is the likeliest, the two are equal
      to the last bit.

  Returns:
    logp_BT, entropy_BT, and with `best` best_BT, which has no gradient: float32, nats.
  """
  w_DV = family.of(cfg).head(params)
  spec = _Spec(w_DV.shape[1], w_DV.shape[0], float(temperature), cfg.banned, chunk, cfg.tuning.rank > 0,
               cfg.platform == "cpu", best)
  return tuple(sharding.locally(functools.partial(_token_logp, spec), (("fsdp", "tensor"), ("rows",), ("rows",)),
                                [("rows",)] * (2 + best), w_DV, hidden_BTD, targets_BT))


class _Spec(NamedTuple):
  """The static arguments of `token_logp`.

  Attributes:
    vocab, width: V and D of the whole head, of which a device may hold a part.
    temperature, banned, chunk: see `token_logp`.
    frozen: whether the head gets no gradient.
    cast: whether half precision is cast to float32 before products that add up in float32: a CPU lacks some of them.
    best: see `token_logp`.
  """

  vocab: int
  width: int
  temperature: float
  banned: tuple[int, ...]
  chunk: int | None
  frozen: bool
  cast: bool
  best: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logp(spec: _Spec, w_DV, hidden_BTD, targets_BT):
  return _forward(spec, w_DV, hidden_BTD, targets_BT)[0]


def _forward(spec, w_DV, hidden_BTD, targets_BT):
  w = _gathered(spec, w_DV, hidden_BTD.dtype)

  def one(args):
    h_BCD, y_BC = args
    x, target = _logits(spec, w, h_BCD, y_BC)
    top = _over_vocabulary(spec, w, jax.lax.pmax, x.max(-1))
    weight = jnp.exp(x - top[..., None])
    total, tilt, hit = (_over_vocabulary(spec, w, jax.lax.psum, a.sum(-1)) for a in (
        weight, weight * (x - top[..., None]), jnp.where(target, x, 0.0)))
    log_total = jnp.log(total)
    return hit - top - log_total, log_total - tilt / total, top + log_total, *([-log_total] if spec.best else [])

  logp, entropy, norm, *best = (_joined(a, targets_BT) for a in jax.lax.map(
      one, _chunks(spec, w, hidden_BTD, targets_BT)))
  return [logp, entropy, *best], (w_DV, hidden_BTD, targets_BT, entropy, norm)


def _backward(spec, kept, cotangents):
  w_DV, hidden_BTD, targets_BT, entropy_BT, norm_BT = kept
  w = _gathered(spec, w_DV, hidden_BTD.dtype)
  # The outputs are the same on all parts of the vocabulary, and `shard_map` divides their cotangents among the parts.
  by_logp_BT, by_entropy_BT = (_over_vocabulary(spec, w, jax.lax.psum, c) for c in cotangents[:2])

  def one(by_w_DV, args):
    h_BCD, y_BC, entropy, norm, by_logp, by_entropy = args
    x, target = _logits(spec, w, h_BCD, y_BC)
    logp = x - norm[..., None]
    p = jnp.exp(logp)
    by_x = by_logp[..., None] * (target - p) - by_entropy[..., None] * p * (logp + entropy[..., None])
    by_x = (jnp.where(_banned(spec, w)[None, None], 0.0, by_x) / spec.temperature).astype(h_BCD.dtype)
    by_h = jnp.einsum("bcv,dv->bcd", by_x, w)
    if spec.frozen:
      return (), by_h
    pair = (h_BCD.astype(jnp.float32), by_x.astype(jnp.float32)) if spec.cast else (h_BCD, by_x)
    return by_w_DV + jnp.einsum("bcd,bcv->dv", *pair, preferred_element_type=jnp.float32), by_h

  chunks = _chunks(spec, w, hidden_BTD, targets_BT, entropy_BT, norm_BT, by_logp_BT, by_entropy_BT)
  by_w_DV, by_h = jax.lax.scan(one, () if spec.frozen else jnp.zeros(w.shape, jnp.float32), chunks)
  if spec.frozen:
    return jnp.zeros_like(w_DV), _joined(by_h, targets_BT), None
  if w_DV.shape[0] < spec.width:
    by_w_DV = jax.lax.psum_scatter(by_w_DV, "fsdp", tiled=True)
  return by_w_DV.astype(w_DV.dtype), _joined(by_h, targets_BT), None


_token_logp.defvjp(_forward, _backward)


def _gathered(spec, w_DV, dtype):
  """All of the head's rows, in the compute dtype."""
  w_DV = w_DV.astype(dtype)
  return jax.lax.all_gather(w_DV, "fsdp", tiled=True) if w_DV.shape[0] < spec.width else w_DV


def _ids(spec, w_DV):
  """int32[V]: the ids of this device's columns of the head."""
  here = w_DV.shape[1]
  return jnp.arange(here) + (jax.lax.axis_index("tensor") * here if here < spec.vocab else 0)


def _banned(spec, w_DV):
  return jnp.isin(_ids(spec, w_DV), jnp.array(spec.banned, jnp.int32))


def _logits(spec, w_DV, h_BCD, y_BC):
  """float32[B, C, V] this device's part of the logits, and bool[B, C, V] which of them is the target's."""
  x = jnp.where(_banned(spec, w_DV)[None, None], -1e30, layers.logits(h_BCD, w_DV) / spec.temperature)
  return x, y_BC[..., None] == _ids(spec, w_DV)[None, None]


def _over_vocabulary(spec, w_DV, reduce, x):
  return reduce(x, "tensor") if w_DV.shape[1] < spec.vocab else x


def _chunks(spec, w_DV, hidden_BTD, *arrays_BT):
  """Each array with its chunks of positions first, the last one padded."""
  B, T = hidden_BTD.shape[:2]
  chunk = min(T, spec.chunk or max(1, LOGITS // (B * w_DV.shape[1])))
  n = -(-T // chunk)
  cut = lambda a: jnp.pad(a, ((0, 0), (0, n * chunk - T)) + ((0, 0),) * (a.ndim - 2)).reshape(
      B, n, chunk, *a.shape[2:]).swapaxes(0, 1)
  return tuple(map(cut, (hidden_BTD, *arrays_BT)))


def _joined(a, like_BT):
  """The inverse of `_chunks`."""
  B, T = like_BT.shape
  a = a.swapaxes(0, 1)
  return a.reshape(B, -1, *a.shape[3:])[:, :T]
