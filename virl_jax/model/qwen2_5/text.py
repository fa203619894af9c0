"""Qwen2.5-VL's text decoder as pure functions, with the key/value cache as a visible value.

`apply` runs whole sequences (training, scoring).  `extend` runs a chunk of new tokens against a cache
(prefill, tool results, single decode steps).  Both share one block, so they compute the same numbers.
Source: Qwen2.5 (arXiv 2412.15115): GQA with biased q, k, v; SwiGLU; RMSNorm.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from virl_jax.model import attention
from virl_jax.model import layers
from virl_jax.model import params as params_lib
from virl_jax.model import rope

Spec = params_lib.ParamSpec

CACHE_BLOCK = 64     # cache lengths are multiples of it
_ROWS_TOGETHER = 16  # rows that a CPU attends for at a time


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
          remat: bool = False, right_padded: bool = False, group_BT: jax.Array | None = None) -> jax.Array:
  """Hidden states of whole sequences.

  Args:
    params: the decoder's parameters.
    cfg: shapes.
    x_BTD: input embeddings.
    pos_BXT: int32 M-RoPE positions.
    valid_BT: bool, False on padding, on either side.
    remat: recompute blocks in the backward pass.
    right_padded: promise that padding only follows the tokens; some kernels need it.
    group_BT: int32, where a row holds several sequences, the number of each token's; None: one sequence a row.

  Returns:
    [B, T, D] after the final norm.
  """
  return _run(params, cfg, x_BTD, pos_BXT, valid_BT, remat, right_padded, group_BT, keep=False)[0]


def every_layer(params: dict, cfg: Config, x_BTD: jax.Array, pos_BXT: jax.Array, valid_BT: jax.Array) -> jax.Array:
  """The residual stream [L + 1, B, T, D]: before the first block, between blocks, and after the final norm."""
  last, before = _run(params, cfg, x_BTD, pos_BXT, valid_BT, False, False, None, keep=True)
  return jnp.concatenate([before, last[None]])


def _run(params, cfg, x_BTD, pos_BXT, valid_BT, remat, right_padded, group_BT, keep):
  cos, sin = rope.mrope(pos_BXT, cfg.head_size, cfg.mrope_section, cfg.theta)

  def block(x, p):
    q, k, v = _project(p, cfg, x, cos, sin)
    out = attention.attend(q, k, v, valid_BT, causal=True, right_padded=right_padded, group_BT=group_BT)
    return _finish(p, cfg, x, out), x if keep else None

  x, before = jax.lax.scan(jax.checkpoint(block) if remat else block, x_BTD, params["blocks"])
  return layers.rms_norm(x, params["norm"], cfg.eps), before


def _slots_together(T: int, S: int) -> int:
  """Cache slots that attention of T new tokens reads at a time: few and large steps, but where caches are small."""
  if jax.default_backend() == "cpu":
    return CACHE_BLOCK
  # No more scores at a time than 2^18 a head and row; an accelerator's loop pays for each of its steps.
  return min(S, max(CACHE_BLOCK, min(1024, 2 ** 18 // T // CACHE_BLOCK * CACHE_BLOCK)))


def _read(stack_LBKSH: jax.Array, layer: jax.Array, at: jax.Array, width: int, row_A: jax.Array | None, shards: int
          ) -> jax.Array:
  """[A, K, width, H]: a layer's slots from `at` on, of the rows `row_A` or of all."""
  L, B, K, S, H = stack_LBKSH.shape
  if row_A is None:
    return jax.lax.dynamic_slice(stack_LBKSH, (layer, 0, 0, at, 0), (1, B, K, width, H))[0]

  def shard(stack, rows):
    one = lambda r: jax.lax.dynamic_slice(stack, (layer, r, 0, at, 0), (1, 1, K, width, H))[0, 0]
    return jax.vmap(one)(rows)

  return by_shard(shard, shards)(stack_LBKSH, row_A)


def by_shard(fn, shards: int, out_axis: int = 0):
  """`fn(stack, *arrays)` on each shard's own rows: no device reads another's cache.

  The stack has its rows on axis 1, the arrays theirs on axis 0, the result its own on `out_axis`.
  """
  if shards == 1:
    return fn
  cut = lambda a, axis: a.reshape(*a.shape[:axis], shards, -1, *a.shape[axis + 1:])

  def run(stack, *arrays):
    out = jax.vmap(fn, (1, *(0 for _ in arrays)), out_axis)(cut(stack, 1), *(cut(a, 0) for a in arrays))
    return out.reshape(*out.shape[:out_axis], -1, *out.shape[out_axis + 2:])

  return run


def _write(stack_LBKSH: jax.Array, layer: jax.Array, row_A: jax.Array | None, slot_AT: jax.Array, new_ATKH: jax.Array,
           shards: int) -> jax.Array:
  """Puts keys or values into their slots; what lies past the last slot or row is dropped."""
  if row_A is None:
    row_A = jnp.tile(jnp.arange(stack_LBKSH.shape[1] // shards), shards)
  put = lambda stack, rows, slots, new: stack.at[layer, rows[:, None], :, slots].set(new, mode="drop")
  return by_shard(put, shards, 1)(stack_LBKSH, row_A, slot_AT, new_ATKH.astype(stack_LBKSH.dtype))


def _attend_cache(q_ATNH: jax.Array, k_LBKSH: jax.Array, v_LBKSH: jax.Array, layer: jax.Array, slot_AT: jax.Array,
                  filled: jax.Array, row_A: jax.Array | None, shards: int) -> jax.Array:
  """Attention of new tokens over what is filled of the cache, some slots at a time, by online softmax.

  A row's token in slot s sees slots 0..s.  Only the first `filled` slots are read, rounded up, so the cost
  follows what is filled and not what is allocated.  Products take the cache's own precision and add up in
  float32; the softmax is float32.

  Args:
    q_ATNH: rotated queries.
    k_LBKSH: already holds the new keys.
    v_LBKSH: already holds the new values.
    layer: int32 scalar.
    slot_AT: int32, the slot of each new token.
    filled: int32 scalar, slots that hold anything a query may see.
    row_A: int32, the cache row of each query row; None for all rows in order.
    shards: see `extend`.

  Returns:
    [A, T, N, H].
  """
  A, T, N, H = q_ATNH.shape
  if T == 1 and shards == 1 and A > _ROWS_TOGETHER and jax.default_backend() == "cpu":
    # A core works through what is filled: rows of like length together, so that short ones don't wait for long ones.
    order = jnp.argsort(slot_AT[:, 0])
    row_A = order if row_A is None else row_A[order]
    parts = [slice(i, i + _ROWS_TOGETHER) for i in range(0, A, _ROWS_TOGETHER)]
    outs = [_attend_cache(q_ATNH[order[p]], k_LBKSH, v_LBKSH, layer, slot_AT[order[p]],
                          jnp.minimum(filled, slot_AT[order[p], 0].max() + 1), row_A[p], 1)
            for p in parts]
    return jnp.zeros_like(q_ATNH).at[order].set(jnp.concatenate(outs))
  K, S = k_LBKSH.shape[2:4]
  G = N // K  # query heads that share a key head; each of them is one more query Q = T * G of it
  q_AKQH = (q_ATNH.astype(jnp.float32) * (H ** -0.5)).reshape(A, T, K, G, H).swapaxes(1, 2).reshape(A, K, T * G, H)
  q_AKQH, slot_AQ = q_AKQH.astype(k_LBKSH.dtype), jnp.repeat(slot_AT, G, axis=1)
  width = _slots_together(T, S)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def step(i, carry):
    top, total, acc = carry
    at = jnp.minimum(i * width, S - width)  # the last step may begin earlier, and then skips what it has seen
    logits = product("akqh,aksh->akqs", q_AKQH, _read(k_LBKSH, layer, at, width, row_A, shards))
    slot_11S = (at + jnp.arange(width))[None, None]
    seen_AQS = (slot_11S <= slot_AQ[:, :, None]) & (slot_11S >= i * width)
    logits = jnp.where(seen_AQS[:, None], logits, -jnp.inf)
    new_top = jnp.maximum(top, logits.max(-1))
    weight = jnp.exp(logits - new_top[..., None])
    keep = jnp.exp(top - new_top)
    value = product("akqs,aksh->akqh", weight.astype(v_LBKSH.dtype), _read(v_LBKSH, layer, at, width, row_A, shards))
    return new_top, total * keep + weight.sum(-1), acc * keep[..., None] + value

  # A finite floor: the first step always holds slot 0, which every query sees, so no row divides by zero.
  top = jnp.full((A, K, T * G), -1e30, jnp.float32)
  start = top, jnp.zeros_like(top), jnp.zeros(q_AKQH.shape, jnp.float32)
  _, total, acc = jax.lax.fori_loop(0, (filled + width - 1) // width, step, start)
  out_AKQH = acc / total[..., None]
  return out_AKQH.reshape(A, K, T, G, H).swapaxes(1, 2).reshape(A, T, N, H).astype(q_ATNH.dtype)


def extend(params: dict, cfg: Config, x_ATD: jax.Array, pos_AXT: jax.Array, n_new_A: jax.Array, cache: Cache,
           row_A: jax.Array | None = None, shards: int = 1) -> tuple[jax.Array, Cache]:
  """Appends a right-padded chunk to rows of a cache.

  Args:
    params: the decoder's parameters.
    cfg: shapes.
    x_ATD: embeddings of the chunk.
    pos_AXT: int32 M-RoPE positions of the chunk.
    n_new_A: int32, how many of the T tokens are real; 0 leaves a row as it is.
    cache: what came before.  Donate it.
    row_A: int32, the cache row of each chunk row, no row twice; None for all rows in order.  Within its
      shard, if there are several; a number past the last row is a chunk row that does nothing.
    shards: over how many devices the cache's rows are split.  Chunk rows are split likewise, so that each
      device appends to what it holds.

  Returns:
    [A, T, D] after the final norm (nonsense on padding), and the longer cache.  Tokens past the last slot
    are dropped: the caller sees to it that there is room.
  """
  T = x_ATD.shape[1]
  S = cache.k_LBKSH.shape[3]
  cos, sin = rope.mrope(pos_AXT, cfg.head_size, cfg.mrope_section, cfg.theta)
  len_B = cache.len_B
  len_A = len_B if row_A is None else len_B[global_rows(row_A, len(len_B), shards)]
  slot_AT = jnp.arange(T)[None] + len_A[:, None]
  real_AT = jnp.arange(T)[None] < n_new_A[:, None]
  write_AT = jnp.where(real_AT, slot_AT, S)  # out of range: dropped by the scatter
  filled = jnp.max(jnp.where(n_new_A > 0, len_A + n_new_A, 0))

  def block(carry, layer):
    x, k_all, v_all = carry
    p, l = layer
    q, k, v = _project(p, cfg, x, cos, sin)
    k_all, v_all = _write(k_all, l, row_A, write_AT, k, shards), _write(v_all, l, row_A, write_AT, v, shards)
    out = _attend_cache(q, k_all, v_all, l, slot_AT, filled, row_A, shards)
    return (_finish(p, cfg, x, out), k_all, v_all), None

  numbered = (params["blocks"], jnp.arange(cfg.layers))
  (x, k_all, v_all), _ = jax.lax.scan(block, (x_ATD, cache.k_LBKSH, cache.v_LBKSH), numbered)
  len_B = len_B + n_new_A if row_A is None else (
      len_B.at[global_rows(row_A, len(len_B), shards)].add(n_new_A, mode="drop"))
  return layers.rms_norm(x, params["norm"], cfg.eps), Cache(k_all, v_all, len_B)


def global_rows(row_A: jax.Array, rows: int, shards: int) -> jax.Array:
  """Numbers among all `rows` rows of numbers within a shard; one past its shard's last row becomes `rows`."""
  each = rows // shards
  base_A = jnp.arange(shards).repeat(len(row_A) // shards, total_repeat_length=len(row_A)) * each
  return jnp.where(row_A < each, base_A + row_A, rows)
