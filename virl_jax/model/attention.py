"""Attention over whole sequences: one function that picks the kernel.

Four ways to the same numbers:
    plain    XLA, all scores at once                      short sequences anywhere
    blocks   XLA, a block of queries at a time            long ones on CPU, in float32, or with holes in the mask
    cudnn    cuDNN's flash attention                      half precision on NVIDIA GPUs
    splash   the Pallas TPU kernel that comes with JAX    TPU

Attention over a key/value cache is `cache.attend`: it reads only what is filled.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from virl_jax.model import sharding

PLATFORMS = ("cpu", "gpu", "tpu")
KINDS = ("plain", "blocks", "cudnn", "splash")
QUERY_BLOCK = 512    # queries whose scores exist at a time in "blocks"
_SPLASH_TILE = 128   # the kernel's tiles are multiples of it


def choose(platform: str, dtype, length: int, head_size: int, causal: bool, right_padded: bool) -> str:
  """Which of `KINDS` to use.

  Args:
    platform: one of `PLATFORMS`.
    dtype: of queries, keys and values.
    length: T, tokens.
    head_size: H.
    causal: whether tokens see only what precedes them.
    right_padded: whether padding only follows the tokens: then causal attention needs no mask.
  """
  if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and causal and right_padded and (
      head_size % 8 == 0 and head_size <= 128):
    return "cudnn"
  if platform == "tpu" and causal and length % _SPLASH_TILE == 0:
    return "splash"
  return "plain" if length <= 2 * QUERY_BLOCK else "blocks"


def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, valid_BT: jax.Array, causal: bool,
           right_padded: bool = False, kind: str | None = None, group_BT: jax.Array | None = None,
           platform: str = "cpu") -> jax.Array:
  """Grouped-query self-attention with scale 1 / sqrt(H) and a float32 softmax.

  Args:
    q_BTNH: queries.
    k_BTKH: keys; K divides N.
    v_BTKH: values.
    valid_BT: bool, False on padding.
    causal: whether a token sees only itself and what precedes it.
    right_padded: promise that each row's padding follows all its tokens.
    kind: one of `KINDS`; None to `choose`.
    group_BT: int32, not negative on tokens; they see only those of their own group.  None: all of their row.
    platform: what this is compiled for, one of `PLATFORMS`.  Elsewhere than on a TPU "splash" is interpreted.

  Returns:
    [B, T, N, H]; finite nonsense on padding.

  Source: GQA, arXiv 2305.13245; FlashAttention, arXiv 2205.14135, for what the kernels do.
  """
  kind = kind or choose(platform, q_BTNH.dtype, q_BTNH.shape[1], q_BTNH.shape[3], causal,
                        right_padded and group_BT is None)  # cuDNN's causal attention knows of no groups
  if kind == "cudnn":
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn")
  if kind == "splash":
    segment_BT = valid_BT.astype(jnp.int32) if group_BT is None else jnp.where(valid_BT, group_BT + 1, 0)
    return _splash(q_BTNH, k_BTKH, v_BTKH, segment_BT, interpret=platform != "tpu")
  if kind == "blocks":
    return _blocks(q_BTNH, k_BTKH, v_BTKH, valid_BT, causal, group_BT)
  mask = valid_BT[:, None, None, :]
  if group_BT is not None:
    mask = mask & (group_BT[:, None, :, None] == group_BT[:, None, None, :])
  if causal:
    T = q_BTNH.shape[1]
    mask = mask & jnp.tril(jnp.ones((T, T), bool))[None, None]
  return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=mask)


def _blocks(q_BTNH, k_BTKH, v_BTKH, valid_BT, causal, group_BT):
  """Scores of `QUERY_BLOCK` queries at a time, forward and backward."""
  B, T, N, H = q_BTNH.shape
  n = -(-T // QUERY_BLOCK)
  pad = lambda a: jnp.pad(a, ((0, 0), (0, n * QUERY_BLOCK - T)) + ((0, 0),) * (a.ndim - 2))
  split = lambda a: pad(a).reshape(B, n, QUERY_BLOCK, *a.shape[2:]).swapaxes(0, 1)

  @jax.checkpoint
  def one(args):
    i, q_BQNH, group_BQ = args
    mask = valid_BT[:, None, None, :]
    if group_BQ is not None:
      mask = mask & (group_BQ[:, None, :, None] == group_BT[:, None, None, :])
    if causal:
      at_Q = i * QUERY_BLOCK + jnp.arange(QUERY_BLOCK)
      mask = mask & (jnp.arange(T)[None] <= at_Q[:, None])[None, None]
    return jax.nn.dot_product_attention(q_BQNH, k_BTKH, v_BTKH, mask=mask)

  out = jax.lax.map(one, (jnp.arange(n), split(q_BTNH), None if group_BT is None else split(group_BT)))
  return out.swapaxes(0, 1).reshape(B, n * QUERY_BLOCK, N, H)[:, :T]


def _splash(q_BTNH, k_BTKH, v_BTKH, segment_BT, interpret: bool):
  """Causal attention within each segment of a row, padding among them, on each device's own rows and heads."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
  T, H = q_BTNH.shape[1], q_BTNH.shape[3]

  def local(q, k, v, segment_BT):
    heads = q.shape[2]
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * heads)
    tile = next(t for t in (512, 256, _SPLASH_TILE) if T % t == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=tile, block_kv=tile, block_kv_compute=tile, block_q_dkv=tile, block_kv_dkv=tile,
        block_kv_dkv_compute=tile, block_q_dq=tile, block_kv_dq=tile)
    kernel = splash_attention_kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1,
                                                     interpret=interpret)
    one = lambda q, k, v, s: kernel(q, k, v, segment_ids=splash_attention_kernel.SegmentIds(s, s))
    heads_first = (a.swapaxes(1, 2) for a in (q * H ** -0.5, k, v))
    return jax.vmap(one)(*heads_first, segment_BT).swapaxes(1, 2)

  # A kernel is opaque to the partitioner: under a mesh each device is told to run it on what it holds.
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return local(q_BTNH, k_BTKH, v_BTKH, segment_BT)
  tensor = "tensor" if k_BTKH.shape[2] % mesh.shape["tensor"] == 0 else None
  heads = PartitionSpec(sharding.ROWS, None, tensor, None)
  return jax.shard_map(local, in_specs=(heads, heads, heads, PartitionSpec(sharding.ROWS, None)), out_specs=heads,
                       check_vma=False)(q_BTNH, k_BTKH, v_BTKH, segment_BT)
