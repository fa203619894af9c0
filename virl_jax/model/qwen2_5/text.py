"""Qwen2.5-VL's text decoder as pure functions.

`apply` runs whole sequences (training, scoring).  `extend` runs a chunk of new tokens against a `cache.Cache`
(prefill, tool results, single decode steps).  Both share one block, so they compute the same numbers.
Source: Qwen2.5 (arXiv 2412.15115): GQA with biased q, k, v; SwiGLU; RMSNorm.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from virl_jax.model import attention
from virl_jax.model import cache as cache_lib
from virl_jax.model import layers
from virl_jax.model import params as params_lib
from virl_jax.model import remat as remat_lib
from virl_jax.model import rope
from virl_jax.model import sharding
from virl_jax.model.qwen2_5 import config

Spec = params_lib.ParamSpec
_HEADS = ("rows", None, "tensor")  # how queries, keys and values are split


def specs(cfg: config.Text) -> dict:
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


def _project(p: dict, cfg: config.Text, x, cos, sin):
  """Rotated q [B,T,N,H], rotated k and v [B,T,K,H] of a block's input."""
  h = layers.rms_norm(x, p["norm1"], cfg.eps)
  q, k, v = (sharding.constrain(layers.dense(h, p[n + "_w"]) + p[n + "_b"].astype(h.dtype)[None, None], *_HEADS)
             for n in "qkv")
  return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v


def _finish(p: dict, cfg: config.Text, x, out):
  """Adds the attention output and the MLP to the residual stream."""
  x = sharding.constrain(x + layers.dense(out, p["o_w"], 2), "rows")
  return sharding.constrain(x + layers.swiglu(layers.rms_norm(x, p["norm2"], cfg.eps), p), "rows")


def apply(params: dict, cfg: config.Text, x_BTD: jax.Array, pos_BXT: jax.Array, segment_BT: jax.Array,
          remat: bool = False, lengths_BS: jax.Array | None = None, platform: str = "cpu",
          kept: remat_lib.Kept = remat_lib.Kept()) -> jax.Array:
  """Hidden states of whole sequences.

  Args:
    params: the decoder's parameters.
    cfg: shapes.
    x_BTD: input embeddings.
    pos_BXT: int32 M-RoPE positions.
    segment_BT: int32, the number of each token's sequence within its row; negative on padding.
    remat: recompute blocks in the backward pass.
    lengths_BS: int32, if sequences are end to end, their lengths; see `attention.attend`.
    platform: see `config.Config`.
    kept: values of a block that are not recomputed.

  Returns:
    [B, T, D] after the final norm.
  """
  return _run(params, cfg, x_BTD, pos_BXT, segment_BT, remat, lengths_BS, platform, keep=False, kept=kept)[0]


def every_layer(params: dict, cfg: config.Text, x_BTD: jax.Array, pos_BXT: jax.Array, segment_BT: jax.Array,
                platform: str = "cpu") -> jax.Array:
  """The residual stream [L + 1, B, T, D]: before the first block, between blocks, and after the final norm."""
  last, before = _run(params, cfg, x_BTD, pos_BXT, segment_BT, False, None, platform, keep=True)
  return jnp.concatenate([before, last[None]])


def _run(params, cfg, x_BTD, pos_BXT, segment_BT, remat, lengths_BS, platform, keep, kept=remat_lib.Kept()):
  cos, sin = rope.mrope(pos_BXT, cfg.head_size, cfg.mrope_section, cfg.theta)

  def block(x, p):
    q, k, v = (remat_lib.named(a, "qkv") for a in _project(p, cfg, x, cos, sin))
    out = attention.attend(q, k, v, segment_BT, causal=True, lengths_BS=lengths_BS, platform=platform)
    return _finish(p, cfg, x, out), x if keep else None

  x = sharding.constrain(x_BTD, "rows")
  x, before = jax.lax.scan(remat_lib.layer(block, remat, kept), x, params["blocks"])
  return layers.rms_norm(x, params["norm"], cfg.eps), before


def new_cache(cfg: config.Text, rows: int, slots: int, dtype=jnp.float32) -> cache_lib.Cache:
  """An empty cache of this decoder; see `cache.new`."""
  return cache_lib.new(cfg.layers, rows, cfg.kv_heads, slots, cfg.head_size, dtype)


def extend(params: dict, cfg: config.Text, x_ATD: jax.Array, pos_AXT: jax.Array, n_new_A: jax.Array,
           cache: cache_lib.Cache, row_A: jax.Array | None = None, platform: str = "cpu"
           ) -> tuple[jax.Array, cache_lib.Cache]:
  """Appends a right-padded chunk to rows of a cache.

  Args:
    params: the decoder's parameters.
    cfg: shapes.
    x_ATD: embeddings of the chunk.
    pos_AXT: int32 M-RoPE positions of the chunk.
    n_new_A: int32, how many of each row's T tokens are real; 0 leaves a row as it is.
    cache: the cache before the chunk.  Donate it.
    row_A: which rows; see `cache.places`.
    platform: see `config.Config`.

  Returns:
    [A, T, D] after the final norm (meaningless on padding), and the longer cache.  Tokens past the last slot
    are dropped: the caller makes sure that there is room.
  """
  cos, sin = rope.mrope(pos_AXT, cfg.head_size, cfg.mrope_section, cfg.theta)
  at = cache_lib.places(cache, n_new_A, x_ATD.shape[1], row_A)

  def block(carry, numbered):
    x, k_all, v_all = carry
    p, layer = numbered
    q, k, v = _project(p, cfg, x, cos, sin)
    k_all, v_all = cache_lib.write(k_all, layer, k, at), cache_lib.write(v_all, layer, v, at)
    out = cache_lib.attend(q, k_all, v_all, layer, at, platform)
    return (_finish(p, cfg, x, out), k_all, v_all), None

  numbered = (params["blocks"], jnp.arange(cfg.layers))
  x = sharding.constrain(x_ATD, "rows")
  (x, k_all, v_all), _ = jax.lax.scan(block, (x, cache.k_LBKSH, cache.v_LBKSH), numbered)
  len_B = cache_lib.lengthened(cache.len_B, n_new_A, at)
  return layers.rms_norm(x, params["norm"], cfg.eps), cache_lib.Cache(k_all, v_all, len_B)
