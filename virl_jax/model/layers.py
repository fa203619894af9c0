"""The layers that the vision tower and the text decoder share."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


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

  return layer(jax.nn.silu(layer(x, "gate")) * layer(x, "up"), "down")


def dense(x: jax.Array, w: jax.Array, n_in: int = 1) -> jax.Array:
  """x times w over the last `n_in` axes of x and the first `n_in` of w, in x's dtype.

  One plain matrix product: XLA's CPU backend takes a third longer for the gradient of the same product
  written over several axes.
  """
  lead, tail = x.shape[:x.ndim - n_in], w.shape[n_in:]
  size = math.prod(w.shape[:n_in])
  return (x.reshape(-1, size) @ w.astype(x.dtype).reshape(size, -1)).reshape(*lead, *tail)
