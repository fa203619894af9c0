"""Qwen2.5-VL's text decoder as pure functions, with the key/value cache as a visible value.

`apply` runs whole sequences (training, scoring).  `extend` runs a chunk of new tokens against a cache
(prefill, tool results, single decode steps).  Both share one block, so they compute the same numbers.
Source: Qwen2.5 (arXiv 2412.15115): GQA with biased q, k, v; SwiGLU; RMSNorm.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from virl_jax.model import attention
from virl_jax.model import layers
from virl_jax.model import params as params_lib
from virl_jax.model import rope

Spec = params_lib.ParamSpec

# Cache slots that attention reads at a time; cache lengths are multiples of it.
CACHE_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Config:
  """Shapes of the text decoder.

  Attributes:
    vocab: V.
    hidden: D.
    layers: L.
    heads: N.
    kv_heads: K, divides N.
    head_size: H.
    intermediate: F.
    mrope_section: frequencies for time, height, width; adds up to H / 2.
    theta: rotary base.
    eps: of RMSNorm.
    tied: whether the output head is the embedding.
  """

  vocab: int = 152064
  hidden: int = 3584
  layers: int = 28
  heads: int = 28
  kv_heads: int = 4
  head_size: int = 128
  intermediate: int = 18944
  mrope_section: tuple[int, ...] = (16, 24, 24)
  theta: float = 1e6
  eps: float = 1e-6
  tied: bool = False


@flax.struct.dataclass
class Cache:
  """Keys and values of what each row has seen.

  Attributes:
    k_LBKSH: keys, rotated.
    v_LBKSH: values.
    len_B: int32, slots filled; row b's token t stands in slot t.
  """

  k_LBKSH: jax.Array
  v_LBKSH: jax.Array
  len_B: jax.Array


def specs(cfg: Config) -> dict:
  """The decoder's parameter table."""
  D, N, K, H, F, V = cfg.hidden, cfg.heads, cfg.kv_heads, cfg.head_size, cfg.intermediate, cfg.vocab
  b = "model.layers.{layer}."
  block = {
      "norm1": Spec((D,), (None,), "ones", b + "input_layernorm.weight", (D,)),
      "q_w": Spec((D, N, H), ("embed", "heads", None), "normal", b + "self_attn.q_proj.weight",
                  (N * H, D), (2, 0, 1)),
      "q_b": Spec((N, H), ("heads", None), "zeros", b + "self_attn.q_proj.bias", (N * H,)),
      "k_w": Spec((D, K, H), ("embed", "kv_heads", None), "normal", b + "self_attn.k_proj.weight",
                  (K * H, D), (2, 0, 1)),
      "k_b": Spec((K, H), ("kv_heads", None), "zeros", b + "self_attn.k_proj.bias", (K * H,)),
      "v_w": Spec((D, K, H), ("embed", "kv_heads", None), "normal", b + "self_attn.v_proj.weight",
                  (K * H, D), (2, 0, 1)),
      "v_b": Spec((K, H), ("kv_heads", None), "zeros", b + "self_attn.v_proj.bias", (K * H,)),
      "o_w": Spec((N, H, D), ("heads", None, "embed"), "normal", b + "self_attn.o_proj.weight",
                  (D, N * H), (1, 2, 0)),
      "norm2": Spec((D,), (None,), "ones", b + "post_attention_layernorm.weight", (D,)),
      "gate_w": Spec((D, F), ("embed", "mlp"), "normal", b + "mlp.gate_proj.weight", (F, D), (1, 0)),
      "up_w": Spec((D, F), ("embed", "mlp"), "normal", b + "mlp.up_proj.weight", (F, D), (1, 0)),
      "down_w": Spec((F, D), ("mlp", "embed"), "normal", b + "mlp.down_proj.weight", (D, F), (1, 0)),
  }
  table = {
      "embed": Spec((V, D), ("vocab", "embed"), "normal", "model.embed_tokens.weight", (V, D)),
      "blocks": params_lib.stack(cfg.layers, block),
      "norm": Spec((D,), (None,), "ones", "model.norm.weight", (D,)),
  }
  if not cfg.tied:
    table["head"] = Spec((D, V), ("embed", "vocab"), "normal", "lm_head.weight", (V, D), (1, 0))
  return table


def head(params: dict) -> jax.Array:
  """[D, V]: the output head, tied or not."""
  return params["head"] if "head" in params else params["embed"].T


def new_cache(cfg: Config, rows: int, slots: int, dtype=jnp.float32) -> Cache:
  """An empty cache.

  Raises:
    ValueError: if `slots` is no multiple of `CACHE_BLOCK`.
  """
  if slots % CACHE_BLOCK:
    raise ValueError(f"slots must be a multiple of {CACHE_BLOCK}. Received: {slots}")
  shape = (cfg.layers, rows, cfg.kv_heads, slots, cfg.head_size)
  return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((rows,), jnp.int32))


def _project(p: dict, cfg: Config, x, cos, sin):
  """Rotated q [B,T,N,H], rotated k and v [B,T,K,H] of a block's input."""
  h = layers.rms_norm(x, p["norm1"], cfg.eps)
  q, k, v = (layers.dense(h, p[n + "_w"]) + p[n + "_b"].astype(h.dtype)[None, None] for n in "qkv")
  return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v


def _finish(p: dict, cfg: Config, x, out):
  """Adds the attention output and the MLP to the residual stream."""
  x = x + layers.dense(out, p["o_w"], 2)
  return x + layers.swiglu(layers.rms_norm(x, p["norm2"], cfg.eps), p)


def apply(params: dict, cfg: Config, x_BTD: jax.Array, pos_BXT: jax.Array, valid_BT: jax.Array,
          remat: bool = False, right_padded: bool = False) -> jax.Array:
  """Hidden states of whole sequences.

  Args:
    params: the decoder's parameters.
    cfg: shapes.
    x_BTD: input embeddings.
    pos_BXT: int32 M-RoPE positions.
    valid_BT: bool, False on padding, on either side.
    remat: recompute blocks in the backward pass.
    right_padded: promise that padding only follows the tokens; some kernels need it.

  Returns:
    [B, T, D] after the final norm.
  """
  return _run(params, cfg, x_BTD, pos_BXT, valid_BT, remat, right_padded, keep=False)[0]


def every_layer(params: dict, cfg: Config, x_BTD: jax.Array, pos_BXT: jax.Array, valid_BT: jax.Array) -> jax.Array:
  """The residual stream [L + 1, B, T, D]: before the first block, between blocks, and after the final norm."""
  last, before = _run(params, cfg, x_BTD, pos_BXT, valid_BT, False, False, keep=True)
  return jnp.concatenate([before, last[None]])


def _run(params, cfg, x_BTD, pos_BXT, valid_BT, remat, right_padded, keep):
  cos, sin = rope.mrope(pos_BXT, cfg.head_size, cfg.mrope_section, cfg.theta)

  def block(x, p):
    q, k, v = _project(p, cfg, x, cos, sin)
    out = attention.attend(q, k, v, valid_BT, causal=True, right_padded=right_padded)
    return _finish(p, cfg, x, out), x if keep else None

  x, before = jax.lax.scan(jax.checkpoint(block) if remat else block, x_BTD, params["blocks"])
  return layers.rms_norm(x, params["norm"], cfg.eps), before


def _attend_cache(q_BTNH: jax.Array, cache: Cache, layer: jax.Array, slot_BT: jax.Array, n_blocks: jax.Array
                  ) -> jax.Array:
  """Attention of new tokens over the filled blocks of the cache, by online softmax.

  A row's token in slot s sees slots 0..s.  Only `n_blocks` blocks are read, so the cost follows what is
  filled and not what is allocated.

  Args:
    q_BTNH: rotated queries.
    cache: already holds the new keys and values.
    layer: int32 scalar.
    slot_BT: int32, the slot of each new token.
    n_blocks: int32 scalar, blocks that hold anything a query may see.

  Returns:
    [B, T, N, H].
  """
  B, T, N, H = q_BTNH.shape
  K = cache.k_LBKSH.shape[2]
  q = (q_BTNH.astype(jnp.float32) * (H ** -0.5)).reshape(B, T, K, N // K, H)

  def read(stack, i):
    block = jax.lax.dynamic_slice(stack, (layer, 0, 0, i * CACHE_BLOCK, 0), (1, B, K, CACHE_BLOCK, H))
    return block[0].astype(jnp.float32)

  def step(i, carry):
    top, total, acc = carry
    logits = jnp.einsum("btkgh,bksh->btkgs", q, read(cache.k_LBKSH, i))
    seen = (i * CACHE_BLOCK + jnp.arange(CACHE_BLOCK))[None, None] <= slot_BT[:, :, None]
    logits = jnp.where(seen[:, :, None, None], logits, -jnp.inf)
    new_top = jnp.maximum(top, logits.max(-1))
    weight = jnp.exp(logits - new_top[..., None])
    keep = jnp.exp(top - new_top)
    acc = acc * keep[..., None] + jnp.einsum("btkgs,bksh->btkgh", weight, read(cache.v_LBKSH, i))
    return new_top, total * keep + weight.sum(-1), acc

  # A finite floor: block 0 always holds slot 0, which every query sees, so no row divides by zero.
  top = jnp.full((B, T, K, N // K), -1e30, jnp.float32)
  start = (top, jnp.zeros_like(top), jnp.zeros((B, T, K, N // K, H), jnp.float32))
  _, total, acc = jax.lax.fori_loop(0, n_blocks, step, start)
  return (acc / total[..., None]).reshape(B, T, N, H).astype(q_BTNH.dtype)


def extend(params: dict, cfg: Config, x_BTD: jax.Array, pos_BXT: jax.Array, n_new_B: jax.Array, cache: Cache
           ) -> tuple[jax.Array, Cache]:
  """Appends a right-padded chunk to each row of a cache.

  Args:
    params: the decoder's parameters.
    cfg: shapes.
    x_BTD: embeddings of the chunk.
    pos_BXT: int32 M-RoPE positions of the chunk.
    n_new_B: int32, how many of the T tokens are real; 0 leaves a row as it is.
    cache: what came before.  Donate it.

  Returns:
    [B, T, D] after the final norm (nonsense on padding), and the longer cache.  Tokens past the last slot
    are dropped: the caller sees to it that there is room.
  """
  B, T, _ = x_BTD.shape
  S = cache.k_LBKSH.shape[3]
  cos, sin = rope.mrope(pos_BXT, cfg.head_size, cfg.mrope_section, cfg.theta)
  offset_BT = jnp.arange(T)[None] + cache.len_B[:, None]
  real_BT = jnp.arange(T)[None] < n_new_B[:, None]
  write_BT = jnp.where(real_BT, offset_BT, S)  # out of range: dropped by the scatter
  rows = jnp.arange(B)[:, None]
  len_B = cache.len_B + n_new_B
  n_blocks = (jnp.max(len_B) + CACHE_BLOCK - 1) // CACHE_BLOCK

  def block(carry, layer):
    x, k_all, v_all = carry
    p, l = layer
    q, k, v = _project(p, cfg, x, cos, sin)
    k_all = k_all.at[l, rows, :, write_BT].set(k.astype(k_all.dtype), mode="drop")
    v_all = v_all.at[l, rows, :, write_BT].set(v.astype(v_all.dtype), mode="drop")
    out = _attend_cache(q, Cache(k_all, v_all, len_B), l, offset_BT, n_blocks)
    return (_finish(p, cfg, x, out), k_all, v_all), None

  numbered = (params["blocks"], jnp.arange(cfg.layers))
  (x, k_all, v_all), _ = jax.lax.scan(block, (x_BTD, cache.k_LBKSH, cache.v_LBKSH), numbered)
  return layers.rms_norm(x, params["norm"], cfg.eps), Cache(k_all, v_all, len_B)
