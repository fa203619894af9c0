"""The layers that the vision tower and the text decoder share."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from virl_jax.model import params as params_lib
from virl_jax.model import remat
from virl_jax.model import sharding


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
  """RMSNorm: float32 inside, cast back before the weight, as the reference does."""
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return x32.astype(x.dtype) * weight.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def swiglu(x: jax.Array, p: dict) -> jax.Array:
  """down(silu(gate(x)) * up(x)), with biases where `p` has them."""
  def layer(x, name):
    y, b = dense(x, p[name + "_w"]), p.get(name + "_b")
    return y if b is None else y + b.astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))

  gate, up = (remat.named(layer(x, name), "mlp") for name in ("gate", "up"))
  inner = jax.nn.silu(gate) * up
  return layer(sharding.constrain(inner, "rows", *[None] * (x.ndim - 2), "tensor"), "down")


def dense(x: jax.Array, w: jax.Array | params_lib.LowRank, n_in: int = 1) -> jax.Array:
  """x times w over the last `n_in` axes of x and the first `n_in` of w, in x's dtype.

  One plain matrix product: XLA's CPU backend takes a third longer for the gradient of the same product
  written over several axes.
  """
  if isinstance(w, params_lib.LowRank):
    return dense(x, w.base, n_in) + w.scale * dense(dense(x, w.a, n_in), w.b)
  lead, tail = x.shape[:x.ndim - n_in], w.shape[n_in:]
  size = math.prod(w.shape[:n_in])
  return (x.reshape(-1, size) @ w.astype(x.dtype).reshape(size, -1)).reshape(*lead, *tail)


def logits(x: jax.Array, w_DV: jax.Array) -> jax.Array:
  """float32[..., V]: x[..., D] times the head in x's dtype, added up in float32."""
  return jnp.matmul(x, w_DV.astype(x.dtype), preferred_element_type=jnp.float32)


def lookup(w_VD: jax.Array, ids_BT: jax.Array, dtype) -> jax.Array:
  """[B, T, D]: the embedding's rows, cast to `dtype`; gradients add up in the embedding's own dtype.

  Under a mesh each device looks up its own part of the width for all rows, and an all-to-all exchanges widths for rows:
  neither the embedding nor its gradient is moved.
  """
  V, D = w_VD.shape
  fsdp = sharding.shards("fsdp")
  if len(ids_BT) % sharding.shards("rows") or D % fsdp:
    return sharding.constrain(w_VD[ids_BT].astype(dtype), "rows")

  def local(w_VD, ids_BT):
    split = w_VD.shape[0] < V
    ids_BT = jax.lax.all_gather(ids_BT, "fsdp", tiled=True) if fsdp > 1 else ids_BT
    if split:  # each device has some of the ids
      ids_BT = ids_BT - jax.lax.axis_index("tensor") * w_VD.shape[0]
      here_BT = (ids_BT >= 0) & (ids_BT < w_VD.shape[0])
      x = jnp.where(here_BT[..., None], w_VD[jnp.clip(ids_BT, 0, w_VD.shape[0] - 1)], 0).astype(dtype)
      x = jax.lax.psum(x, "tensor")
    else:
      x = w_VD[ids_BT].astype(dtype)
    return jax.lax.all_to_all(x, "fsdp", 0, 2, tiled=True) if fsdp > 1 else x

  return sharding.locally(local, (("tensor", "fsdp"), ("rows",)), ("rows",), w_VD, ids_BT)
