"""The key/value cache: keys and values of what each row has seen, and attention over the filled slots.

Three ways to attend, to the same numbers:
    loop     XLA, an online softmax over blocks of slots     CPU, float32 on GPUs, small heads
    triton   a Pallas kernel, `cache_kernels.triton`         half precision on GPUs
    mosaic   a Pallas kernel, `cache_kernels.mosaic`         TPU

Keys and values of all layers are one stack each, [L, B, K, S, H].  A decoder's scan over its layers carries the
two stacks whole, and each layer writes and reads its own part: nothing is copied.  Under a mesh (`sharding.context`)
rows and heads are split over devices, and no device reads another's.  A is rows of a chunk: some of the B, or all.
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp

from virl_jax.model import cache_kernels
from virl_jax.model import sharding

KINDS = ("loop", "triton", "mosaic")
BLOCK = 64           # cache lengths are multiples of it
_ROWS_TOGETHER = 16  # rows that a CPU attends for at a time
_STACK = (None, "rows", "tensor")  # how the dimensions of a stack of keys or values are split


@flax.struct.dataclass
class Cache:
  """Keys and values of what each row has seen.

  Attributes:
    k_LBKSH: keys, rotated.
    v_LBKSH: values.
    len_B: int32, slots filled; token t of a row is in slot t.
  """

  k_LBKSH: jax.Array
  v_LBKSH: jax.Array
  len_B: jax.Array


@flax.struct.dataclass
class Places:
  """Where the tokens of a chunk go in a cache.

  Attributes:
    slot_AT: int32, the slot of each token; a row's tokens are in consecutive slots.
    write_AT: int32, `slot_AT`, but past the last slot where a token is padding.
    filled: int32 scalar, slots of the chunk's longest row, the chunk included: no token sees beyond.
    row_A: int32, the cache row of each chunk row, within its shard; None for all rows in order.
  """

  slot_AT: jax.Array
  write_AT: jax.Array
  filled: jax.Array
  row_A: jax.Array | None


def new(layers: int, rows: int, kv_heads: int, slots: int, head_size: int, dtype=jnp.float32) -> Cache:
  """An empty cache.

  Raises:
    ValueError: if `slots` is no multiple of `BLOCK`.
  """
  if slots % BLOCK:
    raise ValueError(f"slots must be a multiple of {BLOCK}. Received: {slots}")
  shape = (layers, rows, kv_heads, slots, head_size)
  return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((rows,), jnp.int32))


def places(cache: Cache, n_new_A: jax.Array, length: int, row_A: jax.Array | None = None) -> Places:
  """Where a right-padded chunk goes: after what its rows hold.

  Args:
    cache: the cache before the chunk.
    n_new_A: int32, how many of each row's T tokens are real; 0 leaves a row as it is.
    length: T, tokens of the chunk.
    row_A: int32, the cache row of each chunk row, no row twice; None for all rows in order.  Under a mesh, rows are
      numbered within their shard.  A chunk row whose number is past the last row does nothing.
  """
  len_A = cache.len_B if row_A is None else cache.len_B[global_rows(row_A, len(cache.len_B))]
  token_1T = jnp.arange(length)[None]
  slot_AT = token_1T + len_A[:, None]
  write_AT = jnp.where(token_1T < n_new_A[:, None], slot_AT, cache.k_LBKSH.shape[3])
  return Places(slot_AT, write_AT, jnp.max(jnp.where(n_new_A > 0, len_A + n_new_A, 0)), row_A)


def lengthened(len_B: jax.Array, n_new_A: jax.Array, at: Places) -> jax.Array:
  """int32[B]: slots filled once the chunk is in."""
  if at.row_A is None:
    return len_B + n_new_A
  return len_B.at[global_rows(at.row_A, len(len_B))].add(n_new_A, mode="drop")


def global_rows(row_A: jax.Array, rows: int) -> jax.Array:
  """Turns row numbers within a shard into numbers among all `rows`; any past the shard's last row becomes `rows`."""
  shards = sharding.shards("rows")
  each = rows // shards
  base_A = jnp.arange(shards).repeat(len(row_A) // shards, total_repeat_length=len(row_A)) * each
  return jnp.where(row_A < each, base_A + row_A, rows)


def write(stack_LBKSH: jax.Array, layer: jax.Array, new_ATKH: jax.Array, at: Places) -> jax.Array:
  """Puts a chunk's keys or values into their slots; what is past the last slot or row is dropped.

  Heads are indexed one by one.  With heads as a slice between rows and slots, a TPU's scatter needs another layout,
  slots before heads, and the compiler copies the whole cache into that layout and back.
  """
  def local(stack, layer, new, slots, rows=None):
    rows = jnp.arange(stack.shape[1]) if rows is None else rows
    heads = jnp.arange(stack.shape[2])
    return stack.at[layer, rows[:, None, None], heads, slots[..., None]].set(new.astype(stack.dtype), mode="drop")

  rows, names = _rows(at)
  return sharding.locally(local, (_STACK, (), ("rows", None, "tensor"), ("rows",), *names), _STACK,
                          stack_LBKSH, layer, new_ATKH, at.write_AT, *rows)


def copy(stack_LBKSH: jax.Array, to_A: jax.Array, from_A: jax.Array, width: int) -> jax.Array:
  """Copies the first `width` slots of rows, in all layers, to other rows of the same shard.

  A target past the last row copies nothing.  Rows are copied one by one, in order, so that no more than one row is held
  twice.

  Args:
    stack_LBKSH: keys or values.
    to_A, from_A: int32, rows within their shard.
    width: slots.
  """
  def local(stack, to, source):
    L, B, K, _, H = stack.shape

    def one(i, stack):
      # Instead of copying nothing, the last row is copied to itself: a branch would copy the whole stack on a GPU.
      at = jnp.minimum(to[i], B - 1)
      row = jax.lax.dynamic_slice(stack, (0, jnp.where(to[i] < B, source[i], at), 0, 0, 0), (L, 1, K, width, H))
      return jax.lax.dynamic_update_slice(stack, row, (0, at, 0, 0, 0))

    return jax.lax.fori_loop(0, len(to), one, stack)

  return sharding.locally(local, (_STACK, ("rows",), ("rows",)), _STACK, stack_LBKSH, to_A, from_A)


def _rows(at: Places) -> tuple[tuple, tuple]:
  """`row_A`, if there is one, and how it is split, as arguments for `sharding.locally`."""
  return ((), ()) if at.row_A is None else ((at.row_A,), (("rows",),))


def _read(stack_LBKSH: jax.Array, layer: jax.Array, first: jax.Array, width: int, at: Places) -> jax.Array:
  """[A, K, width, H]: a layer's slots from `first` on, of the chunk's rows."""
  L, B, K, S, H = stack_LBKSH.shape
  if at.row_A is None:
    return jax.lax.dynamic_slice(stack_LBKSH, (layer, 0, 0, first, 0), (1, B, K, width, H))[0]
  one = lambda r: jax.lax.dynamic_slice(stack_LBKSH, (layer, r, 0, first, 0), (1, 1, K, width, H))[0, 0]
  return jax.vmap(one)(at.row_A)


def choose(platform: str, dtype, head_size: int) -> str:
  """Which of `KINDS` to attend with.

  Args:
    platform: what this is compiled for, "cpu", "gpu" or "tpu".
    dtype: of the cache.
    head_size: H.
  """
  if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and head_size in (64, 128, 256) and (
      cache_kernels.has_triton()):
    return "triton"
  if platform == "tpu" and dtype in (jnp.bfloat16, jnp.float32) and head_size in (128, 256):
    return "mosaic"
  return "loop"


def attend(q_ATNH: jax.Array, k_LBKSH: jax.Array, v_LBKSH: jax.Array, layer: jax.Array, at: Places,
           platform: str = "cpu", kind: str | None = None) -> jax.Array:
  """Attention of a chunk's tokens over the filled slots of the cache: a token in slot s sees slots 0..s.

  The cost depends on the slots that are filled, not on those that are allocated.  Products are in the cache's own
  precision and add up in float32; the softmax is float32.

  Args:
    q_ATNH: rotated queries.
    k_LBKSH: already holds the chunk's keys.
    v_LBKSH: already holds its values.
    layer: int32 scalar.
    at: where the chunk is.
    platform: what this is compiled for, "cpu", "gpu" or "tpu".  A kernel of another platform is interpreted.
    kind: one of `KINDS`; None to `choose`.

  Returns:
    [A, T, N, H]; finite but meaningless where a token is padding.
  """
  kind = kind or choose(platform, k_LBKSH.dtype, k_LBKSH.shape[4])

  def local(q, k, v, layer, slot_AT, write_AT, filled, row_A=None):
    A, T = q.shape[:2]
    if kind != "loop":
      kernel, home = {"triton": (cache_kernels.triton, "gpu"), "mosaic": (cache_kernels.mosaic, "tpu")}[kind]
      end_A = jnp.where(write_AT < k.shape[3], slot_AT + 1, 0).max(1)  # padding is not written, and reads nothing
      rows = jnp.arange(A, dtype=jnp.int32) if row_A is None else row_A
      with jax.named_scope("cache_attend"):  # the name that `run.hlo` finds the kernel by
        return kernel(q, k, v, layer, rows, slot_AT[:, 0], end_A, interpret=platform != home)
    here = Places(slot_AT, write_AT, filled, row_A)
    if platform == "cpu" and T == 1 and A > _ROWS_TOGETHER:
      return _attend_by_length(q, k, v, layer, here)
    return _attend(q, k, v, layer, here, _slots_together(T, k.shape[3], platform))

  heads, (rows, names) = ("rows", None, "tensor"), _rows(at)
  return sharding.locally(local, (heads, _STACK, _STACK, (), ("rows",), ("rows",), (), *names), heads,
                          q_ATNH, k_LBKSH, v_LBKSH, layer, at.slot_AT, at.write_AT, at.filled, *rows)


def _slots_together(T: int, S: int, platform: str) -> int:
  """Cache slots that attention of T new tokens reads in a step."""
  if platform == "cpu":
    return BLOCK
  # Few large steps, because each costs an accelerator time, but at most 2^18 scores of a head and row in a step.
  return min(S, max(BLOCK, min(1024, 2 ** 18 // T // BLOCK * BLOCK)))


def _attend_by_length(q_A1NH, k_LBKSH, v_LBKSH, layer, at: Places) -> jax.Array:
  """`attend` for one token a row, a few rows of similar length at a time.

  A CPU does one part after the other, and a part costs as much as its longest row: short rows cost less this way.
  """
  order_A = jnp.argsort(at.slot_AT[:, 0])
  row_A = order_A if at.row_A is None else at.row_A[order_A]
  outs = []
  for start in range(0, len(order_A), _ROWS_TOGETHER):
    part = slice(start, start + _ROWS_TOGETHER)
    mine = order_A[part]
    slot_A1 = at.slot_AT[mine]
    filled = jnp.minimum(at.filled, slot_A1.max() + 1)
    outs.append(_attend(q_A1NH[mine], k_LBKSH, v_LBKSH, layer,
                        at.replace(slot_AT=slot_A1, filled=filled, row_A=row_A[part]), BLOCK))
  return jnp.zeros_like(q_A1NH).at[order_A].set(jnp.concatenate(outs))


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _attend(q_ATNH, k_LBKSH, v_LBKSH, layer, at: Places, width: int) -> jax.Array:
  """`attend` by online softmax, `width` slots at a time, up to the end of the longest row."""
  A, T, N, H = q_ATNH.shape
  K, S = k_LBKSH.shape[2:4]
  G = N // K  # query heads that share a key head, which therefore has Q = T * G queries
  q_AKQH = (q_ATNH.astype(jnp.float32) * (H ** -0.5)).reshape(A, T, K, G, H).swapaxes(1, 2).reshape(A, K, T * G, H)
  q_AKQH, slot_AQ1 = q_AKQH.astype(k_LBKSH.dtype), jnp.repeat(at.slot_AT, G, axis=1)[..., None]

  def step(i, carry):
    first = jnp.minimum(i * width, S - width)  # the last step may begin earlier, and masks slots that were seen before
    slot_11S = (first + jnp.arange(width))[None, None]
    seen_AQS = (slot_11S <= slot_AQ1) & (slot_11S >= i * width)
    logits = _product("akqh,aksh->akqs", q_AKQH, _read(k_LBKSH, layer, first, width, at))
    logits = jnp.where(seen_AQS[:, None], logits, -jnp.inf)
    return _online(carry, logits, _read(v_LBKSH, layer, first, width, at))

  # A finite floor: the first step always holds slot 0, which every query sees, so no row divides by zero.
  top = jnp.full((A, K, T * G), -1e30, jnp.float32)
  start = top, jnp.zeros_like(top), jnp.zeros(q_AKQH.shape, jnp.float32)
  _, total, acc = jax.lax.fori_loop(0, (at.filled + width - 1) // width, step, start)
  out_AKQH = acc / total[..., None]
  return out_AKQH.reshape(A, K, T, G, H).swapaxes(1, 2).reshape(A, T, N, H).astype(q_ATNH.dtype)


def _online(carry, logits_AKQS, v_AKSH):
  """One step of an online softmax: the largest logit so far, and the sums of weights and of values relative to it."""
  top, total, acc = carry
  new_top = jnp.maximum(top, logits_AKQS.max(-1))
  weight = jnp.exp(logits_AKQS - new_top[..., None])
  keep = jnp.exp(top - new_top)
  value = _product("akqs,aksh->akqh", weight.astype(v_AKSH.dtype), v_AKSH)
  return new_top, total * keep + weight.sum(-1), acc * keep[..., None] + value
