"""Pallas kernels for attention over a key/value cache: one for GPUs (Triton), one for TPUs (Mosaic).

Both take the whole stacks of all layers [L, B, K, S, H], and the indices of the layer and of the rows as values:
nothing is sliced out or copied.  Both read a row only as far as a block of its queries sees.

Query heads that share a key head count as further queries of that head: [A, T, N, H] becomes [A, K, Q, H].  A token's
G = N / K heads are padded to a power of two, so that a query's token is its index shifted to the right, and all
queries to whole blocks.  A is rows of the chunk, Q queries of a key head.
"""

from __future__ import annotations

import functools
import importlib.util

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

_FEWEST = 16             # queries of a block, at least: rows of a TPU's tile of bfloat16, and of Triton's products
_FLOOR = -1e30           # below any logit, and finite: a query that sees nothing is no NaN
_TINY = 1e-30
_TRITON_QUERIES = 64     # most queries of a program
_TRITON_BLOCK = 64 * 128  # most values of keys that a program holds: 64 slots, which divide every cache, of width 128
_TRITON_PROGRAMS = 512   # programs that keep a large GPU busy: about four for each multiprocessor
_TRITON_PART = 256       # a cache is split into parts of at least so many slots
_MOSAIC_QUERIES = (512, 256, 128, 64, 32, 16)  # of a step: the most whose values, of all heads in float32, fit in
_MOSAIC_SLOTS = (1024, 512, 256, 128, 64)      # of a step: the most that divide the cache and whose keys fit in
_MOSAIC_BYTES = 2 ** 20                        # so many bytes; all that a step holds is about eight times that
_MOSAIC_SCORES = 2 ** 18                       # most scores of a head at a time


def triton(q_ATNH: jax.Array, k_LBKSH: jax.Array, v_LBKSH: jax.Array, layer: jax.Array, row_A: jax.Array,
           first_A: jax.Array, end_A: jax.Array, interpret: bool) -> jax.Array:
  """The GPU's: a program for a row, a key head, a block of queries and, where those are few, a part of the cache.

  Args:
    q_ATNH: rotated queries.
    k_LBKSH, v_LBKSH: the stacks, the chunk's own keys and values included; half precision.  S is a multiple of 64, H
      a power of two.
    layer: int32 scalar.
    row_A: int32, the cache row of each chunk row; a number past the last row reads nothing.
    first_A: int32, the slot of each row's first token; its other tokens follow.
    end_A: int32, most slots that the row's tokens may see; 0 reads nothing.
    interpret: whether to run without a GPU.

  Returns:
    [A, T, N, H]: what a token in slot s sees in slots 0..s.  Zeros where a block of queries sees nothing.

  Source: FlashAttention-2, arXiv 2307.08691; the parts of a cache are from Flash-Decoding, and XLA combines their
  maxima, sums and values.
  """
  from jax.experimental.pallas import triton as backend
  A, (K, S, H) = len(q_ATNH), k_LBKSH.shape[2:]
  q_AKQH, block, group = _queries(q_ATNH, k_LBKSH, _TRITON_QUERIES)
  blocks = q_AKQH.shape[2] // block
  parts = splits(A * K * blocks, S)
  row_A, end_A = _within(k_LBKSH, row_A, end_A)
  whole = pl.BlockSpec()
  queries = pl.BlockSpec((None, None, block, H), lambda i, k, a: (a, k, jax.lax.div(i, parts), 0))
  of_part = lambda *size: pl.BlockSpec((None, None, None, *size), lambda i, k, a: (
      a, jax.lax.rem(i, parts), k, jax.lax.div(i, parts), *[0] * (len(size) - 1)))
  out = jax.ShapeDtypeStruct(q_AKQH.shape, q_ATNH.dtype)
  specs = queries
  if parts > 1:
    size = (A, parts, *q_AKQH.shape[1:])
    out = [jax.ShapeDtypeStruct(size, jnp.float32), *[jax.ShapeDtypeStruct(size[:-1], jnp.float32)] * 2]
    specs = [of_part(block, H), of_part(block), of_part(block)]
  found = pl.pallas_call(
      functools.partial(_cache_attend_triton, block=block, group=group, parts=parts), grid=(blocks * parts, K, A),
      in_specs=[whole, whole, whole, whole, queries, whole, whole], out_specs=specs, out_shape=out,
      compiler_params=backend.CompilerParams(num_warps=4, num_stages=2), interpret=interpret,
      name="cache_attend_triton",
  )(layer.reshape(1), row_A, first_A, end_A, q_AKQH, k_LBKSH, v_LBKSH)
  if parts > 1:
    acc, total, top = found
    weight = jnp.exp(top - top.max(1, keepdims=True))
    total = (total * weight).sum(1)
    found = (acc * weight[..., None]).sum(1) / jnp.maximum(total, _TINY)[..., None]
  return _heads(found, q_ATNH, group)


def has_triton() -> bool:
  """Whether this JAX has Pallas's Triton backend, which JAX 0.12 announces to be removed."""
  return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def splits(programs: int, slots: int) -> int:
  """Into how many parts a cache of `slots` is split if there are `programs` for each part: a power of two."""
  parts = 1
  while programs * parts < _TRITON_PROGRAMS and slots >= 2 * parts * _TRITON_PART:
    parts *= 2
  return parts


def _cache_attend_triton(layer_ref, row_ref, first_ref, end_ref, q_ref, k_ref, v_ref, out_ref, *parted, block, group,
                         parts):
  i, head, a = (pl.program_id(axis) for axis in range(3))
  i, part = jax.lax.div(i, parts), jax.lax.rem(i, parts)
  layer, row, first = layer_ref[0], row_ref[a], first_ref[a]
  width, tokens = min(64, _TRITON_BLOCK // q_ref.shape[1]), block // group
  steps = _up(_seen(first, end_ref[a], i, tokens), width)
  each = _up(steps, parts)
  start = part * each
  q = q_ref[...]
  slot_Q1 = first + i * tokens + _token(jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0), group)

  def step(n, carry):
    slot = (start + n) * width
    read = lambda ref: ref[layer, row, head, pl.ds(slot, width), :]
    slot_1S = slot + jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
    return _online(carry, q, read(k_ref), read(v_ref), slot_1S <= slot_Q1)

  empty = jnp.full((block, 1), _FLOOR, jnp.float32), jnp.zeros((block, 1), jnp.float32), jnp.zeros(q.shape, jnp.float32)
  top, total, acc = jax.lax.fori_loop(0, jnp.maximum(jnp.minimum(each, steps - start), 0), step, empty)
  if parts == 1:
    out_ref[...] = (acc / jnp.maximum(total, _TINY)).astype(out_ref.dtype)
  else:
    total_ref, top_ref = parted
    out_ref[...], total_ref[...], top_ref[...] = acc, total.reshape(block), top.reshape(block)


def mosaic(q_ATNH: jax.Array, k_LBKSH: jax.Array, v_LBKSH: jax.Array, layer: jax.Array, row_A: jax.Array,
           first_A: jax.Array, end_A: jax.Array, interpret: bool) -> jax.Array:
  """The TPU's: a step for a row, a block of queries and a block of slots of all heads.

  Steps past the slots that a block of queries sees name the last block that it sees, which is not fetched again; there
  are no steps past what any row sees.

  Args:
    q_ATNH: rotated queries.
    k_LBKSH, v_LBKSH: the stacks, the chunk's own keys and values included.  S is a multiple of 64, H of 128.
    layer, row_A, first_A, end_A: as `triton` takes them.
    interpret: whether to run without a TPU.

  Returns:
    As `triton`.

  Source: FlashAttention-2, arXiv 2307.08691.
  """
  from jax.experimental.pallas import tpu as backend
  A, (K, S, H) = len(q_ATNH), k_LBKSH.shape[2:]
  fitting = lambda sizes, fits: next((n for n in sizes if fits(n)), sizes[-1])
  q_AKQH, block, group = _queries(q_ATNH, k_LBKSH, fitting(_MOSAIC_QUERIES, lambda n: n * K * H * 4 <= _MOSAIC_BYTES))
  width = fitting(_MOSAIC_SLOTS, lambda n: S % n == 0 and n * block <= _MOSAIC_SCORES and (
      n * K * H * k_LBKSH.dtype.itemsize <= _MOSAIC_BYTES))
  row_A, end_A = _within(k_LBKSH, row_A, end_A)

  def slots(a, i, j, layer, row, first, end):
    last = _up(_seen(first[a], end[a], i, block // group), width) - 1
    return layer[0], row[a], 0, jnp.maximum(jnp.minimum(j, last), 0), 0

  queries = pl.BlockSpec((None, K, block, H), lambda a, i, j, *_: (a, 0, i, 0))
  stack = pl.BlockSpec((None, None, K, width, H), slots)
  steps = jnp.maximum(_up(end_A.max(), width), 1)
  scratch = lambda lanes: backend.VMEM((K, block, lanes), jnp.float32)
  out = pl.pallas_call(
      functools.partial(_cache_attend_mosaic, block=block, group=group, width=width, heads=K),
      grid_spec=backend.PrefetchScalarGridSpec(
          num_scalar_prefetch=4, grid=(A, q_AKQH.shape[2] // block, steps), in_specs=[queries, stack, stack],
          out_specs=queries, scratch_shapes=[scratch(128), scratch(128), scratch(H)]),
      out_shape=jax.ShapeDtypeStruct(q_AKQH.shape, q_ATNH.dtype),
      compiler_params=backend.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
      interpret=interpret, name="cache_attend_mosaic",
  )(layer.reshape(1), row_A, first_A, end_A, q_AKQH, k_LBKSH, v_LBKSH)
  return _heads(out, q_ATNH, group)


def _cache_attend_mosaic(layer_ref, row_ref, first_ref, end_ref, q_ref, k_ref, v_ref, out_ref, top_ref, total_ref,
                         acc_ref, *, block, group, width, heads):
  del layer_ref, row_ref  # the blocks are of this layer and row already
  a, i, j = (pl.program_id(axis) for axis in range(3))
  tokens = block // group

  @pl.when(j == 0)
  def _():
    top_ref[...] = jnp.full(top_ref.shape, _FLOOR, jnp.float32)
    total_ref[...], acc_ref[...] = jnp.zeros(total_ref.shape, jnp.float32), jnp.zeros(acc_ref.shape, jnp.float32)

  @pl.when(j * width < _seen(first_ref[a], end_ref[a], i, tokens))
  def _():
    query_QS = jax.lax.broadcasted_iota(jnp.int32, (block, width), 0)
    slot_QS = j * width + jax.lax.broadcasted_iota(jnp.int32, (block, width), 1)
    seen_QS = slot_QS <= first_ref[a] + i * tokens + _token(query_QS, group)
    for head in range(heads):
      carry = top_ref[head][:, :1], total_ref[head][:, :1], acc_ref[head]
      top, total, acc = _online(carry, q_ref[head], k_ref[head], v_ref[head], seen_QS)
      top_ref[head], total_ref[head] = (jnp.broadcast_to(x, (block, 128)) for x in (top, total))
      acc_ref[head] = acc

  @pl.when(j == pl.num_programs(2) - 1)
  def _():
    for head in range(heads):
      out_ref[head] = (acc_ref[head] / jnp.maximum(total_ref[head][:, :1], _TINY)).astype(out_ref.dtype)


def _online(carry, q_QH, k_SH, v_SH, seen_QS):
  """One step of an online softmax: the largest logit so far, and the sums of weights and of values relative to it."""
  top_Q1, total_Q1, acc_QH = carry
  product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
  logits_QS = product(q_QH, k_SH, (((1,), (1,)), ((), ())))
  logits_QS = jnp.where(seen_QS, logits_QS, -jnp.inf)
  new_Q1 = jnp.maximum(top_Q1, logits_QS.max(1, keepdims=True))
  weight_QS, keep_Q1 = jnp.exp(logits_QS - new_Q1), jnp.exp(top_Q1 - new_Q1)
  value_QH = product(weight_QS.astype(v_SH.dtype), v_SH, (((1,), (0,)), ((), ())))
  return new_Q1, total_Q1 * keep_Q1 + weight_QS.sum(1, keepdims=True), acc_QH * keep_Q1 + value_QH


def _up(n, size: int):
  """n / size, rounded up, for n >= 0; an index map may not use `//`, which handles signs."""
  return jax.lax.div(n + (size - 1), size)


def _token(query, group: int):
  """Which token a query belongs to."""
  return jax.lax.shift_right_logical(query, jnp.full_like(query, group.bit_length() - 1))


def _seen(first, end, i, tokens: int):
  """Most slots that the i-th block of `tokens` tokens sees."""
  return jnp.minimum(end, first + (i + 1) * tokens)


def _within(stack_LBKSH, row_A, end_A):
  """Row numbers that exist, and how far to read each row: 0 where `row_A` names a row that does not exist."""
  B, S = stack_LBKSH.shape[1], stack_LBKSH.shape[3]
  return jnp.minimum(row_A, B - 1), jnp.where(row_A < B, jnp.clip(end_A, 0, S), 0)


def _queries(q_ATNH, stack_LBKSH, most: int):
  """[A, K, Q, H] queries, scaled and in the cache's dtype; the queries of a block, and those of a token."""
  A, T, N, H = q_ATNH.shape
  K = stack_LBKSH.shape[2]
  group = _power(N // K)
  block = max(_FEWEST, group, min(most, _power(T * group)))
  q_ATKGH = (q_ATNH.astype(jnp.float32) * (H ** -0.5)).astype(stack_LBKSH.dtype).reshape(A, T, K, N // K, H)
  q_ATKGH = jnp.pad(q_ATKGH, ((0, 0), (0, 0), (0, 0), (0, group - N // K), (0, 0)))
  q_AKQH = q_ATKGH.swapaxes(1, 2).reshape(A, K, T * group, H)
  return jnp.pad(q_AKQH, ((0, 0), (0, 0), (0, -(T * group) % block), (0, 0))), block, group


def _power(n: int) -> int:
  """The least power of two that is at least n."""
  return 1 << (n - 1).bit_length()


def _heads(out_AKQH, q_ATNH, group: int):
  """[A, T, N, H]: the inverse of `_queries`."""
  A, T, N, H = q_ATNH.shape
  K = out_AKQH.shape[1]
  out_AKTGH = out_AKQH[:, :, :T * group].reshape(A, K, T, group, H)[:, :, :, :N // K]
  return out_AKTGH.swapaxes(1, 2).reshape(A, T, N, H).astype(q_ATNH.dtype)
