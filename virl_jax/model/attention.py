"""Attention over whole sequences: one function that picks the kernel.

Four ways to the same numbers:
    plain    XLA, all scores of some rows at once         short sequences anywhere
    blocks   XLA, a block of queries at a time            long ones on CPU, or in float32
    cudnn    cuDNN's flash attention                      half precision on NVIDIA GPUs
    splash   the Pallas TPU kernel that comes with JAX    TPU

Under a mesh (`sharding.context`) each device attends for its own rows and heads, in all four: a kernel is opaque
to the partitioner, and a loop over rows would gather them.  Attention over a key/value cache is `cache.attend`: it
reads only what is filled.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from virl_jax import shapes
from virl_jax.model import remat
from virl_jax.model import sharding

PLATFORMS = ("cpu", "gpu", "tpu")
KINDS = ("plain", "blocks", "cudnn", "splash")
QUERY_BLOCK = 512    # queries at a time in "blocks"
SCORES = 2 ** 27     # most scores on a device at a time in "plain" and "blocks", unless a single row has more
_TILE = 128          # splash's tiles are multiples of it, and so are the lengths that cuDNN is given
_WIDE_TILE = 512     # splash's fastest tile


def choose(platform: str, dtype, length: int, head_size: int, end_to_end: bool) -> str:
  """Which of `KINDS` to use.

  Args:
    platform: one of `PLATFORMS`.
    dtype: of queries, keys and values.
    length: T, tokens of a row.
    head_size: H.
    end_to_end: whether a row's segments are end to end, padding after them, and their lengths are known.
  """
  if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and end_to_end and (
      head_size % 8 == 0 and head_size <= 128):
    return "cudnn"
  if platform == "tpu" and length % _TILE == 0:
    return "splash"
  return "plain" if length <= 2 * QUERY_BLOCK else "blocks"


def segments(lengths_BS: jax.Array, length: int) -> jax.Array:
  """int32[B, T]: 0 on the first segment of each row, 1 on the second ..., -1 after the last.

  Args:
    lengths_BS: int32, tokens of the segments of each row; 0 for none.
    length: T.
  """
  end_BS = jnp.cumsum(lengths_BS, axis=1)
  number_BT = (jnp.arange(length)[None, :, None] >= end_BS[:, None]).sum(-1, dtype=jnp.int32)
  return jnp.where(number_BT < lengths_BS.shape[1], number_BT, -1)


def rows_together(platform: str, length: int, rows: int) -> int:
  """How many neighbouring rows to attend for as one row of several segments: splash is faster on long rows."""
  if platform != "tpu":
    return 1
  return max((n for n in range(1, rows + 1) if rows % n == 0 and n * length <= max(_WIDE_TILE, length)
              and n * length % _TILE == 0), default=1)


def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_BT: jax.Array, causal: bool,
           lengths_BS: jax.Array | None = None, kind: str | None = None, platform: str = "cpu") -> jax.Array:
  """Grouped-query self-attention with scale 1 / sqrt(H) and a float32 softmax.

  Args:
    q_BTNH: queries.
    k_BTKH: keys; K divides N.
    v_BTKH: values.
    segment_BT: int32; a token sees the tokens of its row with the same number.  Negative on padding.
    causal: whether a token sees only itself and what precedes it.
    lengths_BS: int32, if given `segment_BT` must be `segments` of these, the longest first; "cudnn" needs them.
    kind: one of `KINDS`; None to `choose`.
    platform: what this is compiled for, one of `PLATFORMS`.  A kernel of another platform is interpreted.

  Returns:
    [B, T, N, H]; finite but meaningless on padding.

  Source: GQA, arXiv 2305.13245; FlashAttention, arXiv 2205.14135, for what the kernels do.
  """
  T, H = q_BTNH.shape[1], q_BTNH.shape[3]
  kind = kind or choose(platform, q_BTNH.dtype, T, H, lengths_BS is not None)
  known = segment_BT
  if kind == "cudnn":
    run, known = functools.partial(_cudnn, causal=causal, interpret=platform != "gpu"), lengths_BS
  elif kind == "splash":
    run = functools.partial(_splash, causal=causal, interpret=platform != "tpu")
  else:
    run = functools.partial(_xla, causal=causal, block=min(T, QUERY_BLOCK) if kind == "blocks" else T)
  heads = ("rows", None, "tensor", None)
  out = sharding.locally(run, (heads, heads, heads, ("rows", None)), heads, q_BTNH, k_BTKH, v_BTKH, known)
  # A kernel names what its backward pass needs itself, its output included.
  return out if kind in ("cudnn", "splash") else remat.named(out, "attention")


def _xla(q_BTNH, k_BTKH, v_BTKH, segment_BT, causal, block):
  """Scores of `block` queries of some rows at a time, forward and backward."""
  B, T, N, H = q_BTNH.shape
  n = -(-T // block)
  pad = lambda a: jnp.pad(a, ((0, 0), (0, n * block - T)) + ((0, 0),) * (a.ndim - 2))

  def rows(args):
    q, k, v, segment = args
    split = lambda a: pad(a).reshape(len(a), n, block, *a.shape[2:]).swapaxes(0, 1)

    def one(args):
      i, q_BQNH, segment_BQ = args
      mask = (segment >= 0)[:, None, None, :] & (segment_BQ[:, None, :, None] == segment[:, None, None, :])
      if causal:
        mask = mask & (jnp.arange(T)[None] <= (i * block + jnp.arange(block))[:, None])[None, None]
      return jax.nn.dot_product_attention(q_BQNH, k, v, mask=mask)

    if n == 1:
      return one((0, q, segment))
    out = jax.lax.map(jax.checkpoint(one), (jnp.arange(n), split(q), split(segment)))
    return out.swapaxes(0, 1).reshape(len(q), n * block, N, H)[:, :T]

  together = max(1, SCORES // (N * block * T))
  if B <= together:
    return rows((q_BTNH, k_BTKH, v_BTKH, segment_BT))
  parts = -(-B // together)
  cut = lambda a: jnp.pad(a, ((0, parts * together - B),) + ((0, 0),) * (a.ndim - 1)).reshape(
      parts, together, *a.shape[1:])
  out = jax.lax.map(jax.checkpoint(rows), tuple(map(cut, (q_BTNH, k_BTKH, v_BTKH, segment_BT))))
  return out.reshape(parts * together, T, N, H)[:B]


def _cudnn(q_BTNH, k_BTKH, v_BTKH, lengths_BS, causal, interpret):
  """cuDNN's kernel, which takes lengths but no segments: the segments of a row are cut apart.

  The j-th longest of a row has at most T / j tokens, so that all cuts together have about T * log S.
  """
  attend = functools.partial(jax.nn.dot_product_attention, is_causal=causal,
                             implementation="xla" if interpret else "cudnn")
  T, S = q_BTNH.shape[1], lengths_BS.shape[1]
  if S == 1 and causal:  # only padding comes after, and no query sees that
    return attend(q_BTNH, k_BTKH, v_BTKH)
  outs, places, base, start_B = [], [], 0, jnp.zeros_like(lengths_BS[:, 0])
  for j in range(S):
    width, length_B = min(T, shapes.up(T // (j + 1), _TILE)), lengths_BS[:, j]
    some_B = jnp.maximum(length_B, 1)
    parts = (_cut(a, start_B if j else None, length_B, width) for a in (q_BTNH, k_BTKH, v_BTKH))
    outs.append(attend(*parts, query_seq_lengths=some_B, key_value_seq_lengths=some_B))
    places.append(base + jnp.arange(T)[None] - start_B[:, None])
    base, start_B = base + width, start_B + length_B
  segment_BT = segments(lengths_BS, T)
  out = outs[0]
  if S > 1:
    number_BT = jnp.maximum(segment_BT, 0)
    at_BT = jnp.take_along_axis(jnp.stack(places, axis=-1), number_BT[..., None], axis=-1)[..., 0]
    out = jnp.take_along_axis(jnp.concatenate(outs, axis=1), jnp.clip(at_BT, 0, base - 1)[..., None, None], axis=1)
  return jnp.where((segment_BT >= 0)[..., None, None], out, 0)


def _cut(a_BTNH, start_B, length_B, width):
  """[B, width, N, H]: each row from its start on (None: 0), and 0 past its length.

  No gradient comes back from there, where kernels leave memory as it was.
  """
  slot_1W = jnp.arange(width)[None]
  if start_B is not None:
    at_BW = jnp.minimum(start_B[:, None] + slot_1W, a_BTNH.shape[1] - 1)
    a_BTNH = jnp.take_along_axis(a_BTNH, at_BW[..., None, None], axis=1)
  return jnp.where((slot_1W < length_B[:, None])[..., None, None], a_BTNH, 0)


def _splash(q_BTNH, k_BTKH, v_BTKH, segment_BT, causal, interpret):
  """Pallas's kernel; padding is a segment of its own."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
  T, N, H = q_BTNH.shape[1:]
  mask = splash_attention_mask.CausalMask((T, T)) if causal else splash_attention_mask.FullMask((T, T))
  tile = next(t for t in (_WIDE_TILE, 256, _TILE) if T % t == 0)
  sizes = splash_attention_kernel.BlockSizes(
      block_q=tile, block_kv=tile, block_kv_compute=tile, block_q_dkv=tile, block_kv_dkv=tile,
      block_kv_dkv_compute=tile, block_q_dq=tile, block_kv_dq=tile)
  kernel = splash_attention_kernel.make_splash_mha(
      splash_attention_mask.MultiHeadMask([mask] * N), block_sizes=sizes, head_shards=1, q_seq_shards=1,
      interpret=interpret, residual_checkpoint_name="attention")
  one = lambda q, k, v, s: kernel(q, k, v, segment_ids=splash_attention_kernel.SegmentIds(s, s))
  heads_first = (a.swapaxes(1, 2) for a in (q_BTNH * H ** -0.5, k_BTKH, v_BTKH))
  return jax.vmap(one)(*heads_first, segment_BT).swapaxes(1, 2)
