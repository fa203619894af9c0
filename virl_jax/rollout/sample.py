"""Jitted prefill, append, restart and decode over a visible key/value cache.

The cache has a fixed number of rows, the decode slots; a trajectory has one until it ends, then the next gets
it.  There are three calls, all with a donated state: `append` adds right-padded chunks (prompts, tool turns
with their crops) to some rows; `restart` sets rows back to the end of a prompt that this or another row
holds, so that a prompt is prefilled once for its whole group; `decode` samples a segment of tokens in all
rows that have a turn to write.  A token that ends a turn is sampled but not yet in the cache: the next chunk
starts with it.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp

from virl_jax import checks
from virl_jax import types
from virl_jax.model import cache as cache_lib
from virl_jax.model import family
from virl_jax.model import head
from virl_jax.model import sharding


@dataclasses.dataclass(frozen=True)
class Filter:
  """Which part of the policy's distribution is sampled from.

  Attributes:
    top_k: the k likeliest tokens; 0 for all.
    top_p: the fewest tokens whose probabilities add up to this, the likeliest first; 1 for all.
    min_p: tokens with at least this share of the likeliest one's probability; 0 for all.
  """

  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0

  def __post_init__(self):
    checks.section(vars(self), "rollout", top_k=checks.whole(0), top_p=checks.real(above=0, high=1),
                   min_p=checks.real(0, 1))


@flax.struct.dataclass
class State:
  """The state of each row between two calls.

  Attributes:
    cache: keys and values of its tokens.
    pos_B: int32, M-RoPE position of its next token.
    hidden_BD: final hidden state of its last token in the cache, from which the next is sampled.
    prompt_BD: the same for the last token of its prompt.
  """

  cache: cache_lib.Cache
  pos_B: jax.Array
  hidden_BD: jax.Array
  prompt_BD: jax.Array


@flax.struct.dataclass
class Chunk:
  """What is appended, to which rows.

  Attributes:
    tokens_AT: int32, right-padded.
    n_new_A: int32, how many tokens are not padding; 0 leaves a row unchanged.
    pos_AXT: int32 M-RoPE positions.
    next_pos_A: int32, the position after the chunk.
    vision_AT: int32 index into the merged tokens of `images`; -1 on text.
    images: buckets of new images.
    row_A: int32, the row of its shard that each is for, no row twice, past the last for padding; None for all rows in
      order.
    start_A: int32, how many tokens the row keeps before the chunk; None to keep all.
  """

  tokens_AT: jax.Array
  n_new_A: jax.Array
  pos_AXT: jax.Array
  next_pos_A: jax.Array
  vision_AT: jax.Array
  images: tuple[types.ImageBatch, ...]
  row_A: jax.Array | None = None
  start_A: jax.Array | None = None


@flax.struct.dataclass
class Writers:
  """Which rows sample, and how much.

  Attributes:
    index_A: int32, the trajectory's index or seed; its samples depend on (key, index, turn) and nothing else.
    turn_A: int32, which of its turns this is.
    said_A: int32, how many tokens of the turn were sampled before.
    left_A: int32, most tokens that it may still sample in this turn; 0 for padding.
    row_A: int32, its row within its shard, no row twice, past the last for padding; None for all rows in order.
  """

  index_A: jax.Array
  turn_A: jax.Array
  said_A: jax.Array
  left_A: jax.Array
  row_A: jax.Array | None = None


def _within(fn):
  """`fn`, traced within the context of its `mesh`."""
  @functools.wraps(fn)
  def run(*args, mesh=None, **kwargs):
    with sharding.context(mesh):
      return fn(*args, **kwargs)

  return run


def weights(params: dict, cfg: family.Config, mesh: jax.sharding.Mesh | None = None) -> dict:
  """A policy's parameters for rollouts: in the compute dtype, and sharded as rollouts need them.

  Training splits parameters over all devices and gathers them layer by layer, which pays for a batch, but would make
  each sampled token wait.  Parameters that are as needed already, as frozen ones may be, are not copied.

  Args:
    params: the parameters; not donated.
    cfg: for the compute dtype.
    mesh: of the rollouts, over the devices that the parameters are on; None leaves them where they are.
  """
  leaves, tree = jax.tree.flatten(params)
  at, where = moves(params, cfg, mesh)
  if not at:
    return params
  for i, a in zip(at, copy([leaves[i] for i in at], jnp.dtype(cfg.compute_dtype), where,
                          cfg.platform == "tpu")):
    leaves[i] = a
  return tree.unflatten(leaves)


def moves(params: dict, cfg: family.Config, mesh: jax.sharding.Mesh | None) -> tuple[list[int], tuple]:
  """Which of the parameters `weights` copies, by their number among the leaves, and the sharding each of them gets.

  Args:
    params, cfg, mesh: as `weights` takes them; only shapes, dtypes and shardings of parameters are used.
  """
  leaves = jax.tree.leaves(params)
  where = [a.sharding for a in leaves] if mesh is None else jax.tree.leaves(family.shardings(cfg, mesh))
  at = [i for i, (a, s) in enumerate(zip(leaves, where))
        if a.dtype != cfg.compute_dtype or not a.sharding.is_equivalent_to(s, a.ndim)]
  return at, tuple(where[i] for i in at)


@functools.partial(jax.jit, static_argnames=("dtype", "where", "in_turn"))
def copy(arrays: list[jax.Array], dtype, where: tuple, in_turn: bool = False) -> list[jax.Array]:
  """Copies of parameters, in a dtype and with the given shardings; made one after the other if `in_turn`.

  In turn, v7b's copy on 64 TPUs v5e peaks at 8.8 GiB instead of 14.6, but on 8 H100 at 28.1 instead of 23.9.
  """
  done = []
  for a, s in zip(arrays, where):
    if done and in_turn:
      a, done[-1] = jax.lax.optimization_barrier((a, done[-1]))
    done.append(jax.lax.with_sharding_constraint(a.astype(dtype), s))
  return done


@functools.partial(jax.jit, static_argnames=("cfg", "rows", "slots", "mesh"))
def start(cfg: family.Config, rows: int, slots: int, mesh: jax.sharding.Mesh | None = None) -> State:
  """An empty state of `rows` rows with room for `slots` tokens each.

  Args:
    cfg: static.
    rows: B.
    slots: S.
    mesh: what to split rows and heads over; None for one device.
  """
  dtype = jnp.dtype(cfg.compute_dtype)
  hidden = jnp.zeros((rows, cfg.text.hidden), dtype)
  state = State(family.of(cfg).new_cache(cfg, rows, slots), jnp.zeros((rows,), jnp.int32), hidden, hidden)
  if mesh is None:
    return state
  kv, rest = sharding.cache(mesh, state.cache.k_LBKSH.shape[2]), sharding.rows(mesh)
  return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, kv if a.ndim == 5 else rest), state)


@functools.partial(jax.jit, static_argnames=("cfg", "prompt", "mesh"), donate_argnames="state")
@_within
def append(params: dict, cfg: family.Config, state: State, chunk: Chunk, prompt: bool = False,
           mesh: jax.sharding.Mesh | None = None) -> State:
  """Runs a chunk through the model, encoding only its new images.

  Args:
    params: the policy.
    cfg: static.
    state: donated.
    chunk: what to append; the caller makes sure that the cache has room.
    prompt: whether these are prompts, whose ends `restart` goes back to.
    mesh: what rows are split over; `chunk.row_A` counts within each part; None for one device.

  Returns:
    The new state.
  """
  B, cache = len(state.pos_B), state.cache
  row_A = None if chunk.row_A is None else cache_lib.global_rows(chunk.row_A, B)
  at = slice(None) if row_A is None else row_A
  if chunk.start_A is not None:
    cache = cache.replace(len_B=cache.len_B.at[at].set(chunk.start_A, mode="drop"))
  model = family.of(cfg)
  x = model.embed(params, cfg, chunk.tokens_AT, chunk.vision_AT, chunk.images)
  h, cache = model.extend(params, cfg, x, chunk.pos_AXT, chunk.n_new_A, cache, chunk.row_A)
  last = jnp.take_along_axis(h, jnp.maximum(chunk.n_new_A - 1, 0)[:, None, None], axis=1)[:, 0]
  new = chunk.n_new_A > 0
  # A chunk's row without tokens leaves the state as it was.
  put = lambda old, value: old.at[at].set(
      jnp.where(new.reshape(-1, *[1] * (old.ndim - 1)), value, old[at]), mode="drop")
  return State(cache, put(state.pos_B, chunk.next_pos_A), put(state.hidden_BD, last),
               put(state.prompt_BD, last) if prompt else state.prompt_BD)


@functools.partial(jax.jit, static_argnames=("width", "mesh"), donate_argnames="state")
@_within
def restart(state: State, to_A: jax.Array, from_A: jax.Array, len_A: jax.Array, pos_A: jax.Array, width: int,
            mesh: jax.sharding.Mesh | None = None) -> State:
  """Sets rows to the end of a prompt.

  Args:
    state: donated.
    to_A: int32, rows within their shard, none twice; past the last for padding.
    from_A: int32, the row of the same shard that holds the prompt: the row itself, or another.
    len_A: int32, the prompt's tokens.
    pos_A: int32, the position after it.
    width: static, in tokens, at least the longest of these prompts.
    mesh: what rows are split over; None for one device.

  Returns:
    The new state.
  """
  k, v = (cache_lib.copy(a, to_A, from_A, width) for a in (state.cache.k_LBKSH, state.cache.v_LBKSH))
  B = len(state.pos_B)
  to, source = (cache_lib.global_rows(a, B) for a in (to_A, from_A))
  prompt = state.prompt_BD[source]
  return State(cache_lib.Cache(k, v, state.cache.len_B.at[to].set(len_A, mode="drop")),
               state.pos_B.at[to].set(pos_A, mode="drop"), state.hidden_BD.at[to].set(prompt, mode="drop"),
               state.prompt_BD.at[to].set(prompt, mode="drop"))


def _filtered(logits_BV: jax.Array, keep: Filter) -> jax.Array:
  """Logits with -1e30 on tokens that are not sampled from."""
  x, ban = logits_BV, lambda x, where: jnp.where(where, -1e30, x)
  if keep.top_k:
    x = ban(x, x < jax.lax.top_k(x, keep.top_k)[0][:, -1:])
  if keep.min_p > 0:
    x = ban(x, x < x.max(-1, keepdims=True) + jnp.log(keep.min_p))
  if keep.top_p < 1:
    ranked = jnp.sort(x, axis=-1, descending=True)
    p = jax.nn.softmax(ranked)
    # The first token always stays: nothing comes before it.
    kept = jnp.cumsum(p, axis=-1) - p < keep.top_p
    x = ban(x, x < jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True))
  return x


@functools.partial(jax.jit, static_argnames=("cfg", "steps", "keep", "mesh"), donate_argnames="state")
@_within
def decode(params: dict, cfg: family.Config, state: State, writers: Writers, key: jax.Array, temperature: jax.Array,
           steps: int, serve: jax.Array | int = 2 ** 30, keep: Filter = Filter(),
           mesh: jax.sharding.Mesh | None = None) -> tuple[State, jax.Array, jax.Array, jax.Array]:
  """Samples a segment: the next tokens of every row that has a turn to write.  Other rows cost nothing.

  Args:
    params: the policy.
    cfg: static.
    state: donated.
    writers: the rows that sample.
    key: of the step.
    temperature: float32 scalar; 0 is greedy.
    steps: most tokens that a row samples in this segment.
    serve: int32 scalar; the segment ends early when this many rows have ended their turns.
    keep: static; which part of the distribution is sampled from.
    mesh: what rows are split over; None for one device.

  Returns:
    The state, tokens int32[A, steps], their log-probabilities float32[A, steps] in nats, and int32[A] how
    many each row sampled.  A row that ended its turn has one of `cfg.eos` last.  Log-probabilities are those of the
    policy that the loss is about: with the temperature (1 if greedy), without placeholders, before `keep` removes
    tokens.
  """
  model, A, B = family.of(cfg), len(writers.index_A), len(state.pos_B)
  at = slice(None) if writers.row_A is None else cache_lib.global_rows(writers.row_A, B)
  of_turn = lambda index, turn: jax.random.fold_in(jax.random.fold_in(key, index), turn)
  keys = jax.vmap(of_turn)(writers.index_A, writers.turn_A)
  greedy = temperature <= 0
  scale = jnp.where(greedy, 1.0, temperature)

  def pick(hidden_AD, t_A):
    logits = head.policy_logits(params, cfg, hidden_AD[:, None], scale)[:, 0]
    draw = jax.vmap(lambda k, t, row: jax.random.categorical(jax.random.fold_in(k, t), row))
    token = jax.lax.cond(greedy, lambda: jnp.argmax(logits, axis=-1), lambda: draw(keys, t_A, _filtered(logits, keep)))
    token = token.astype(jnp.int32)
    return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]

  def body(carry):
    t, cache, pos_A, hidden_AD, writes, out, logps, count = carry
    token, logp = pick(hidden_AD, writers.said_A + count)
    out = out.at[:, t].set(jnp.where(writes, token, 0))
    logps = logps.at[:, t].set(jnp.where(writes, logp, 0.0))
    count = count + writes
    feed = writes & ~jnp.isin(token, jnp.array(cfg.eos, jnp.int32))
    x = model.embed(params, cfg, token[:, None], jnp.full((A, 1), -1), ())
    pos_AXT = jnp.broadcast_to(pos_A[:, None, None], (A, 3, 1))
    h, cache = model.extend(params, cfg, x, pos_AXT, feed.astype(jnp.int32), cache, writers.row_A)
    hidden_AD = jnp.where(feed[:, None], h[:, 0], hidden_AD)
    return t + 1, cache, pos_A + feed, hidden_AD, feed & (count < writers.left_A), out, logps, count

  writes = writers.left_A > 0
  goes_on = lambda c: (c[0] < steps) & c[4].any() & (writes.sum() - c[4].sum() < serve)
  carry = (jnp.int32(0), state.cache, state.pos_B[at], state.hidden_BD[at], writes, jnp.zeros((A, steps), jnp.int32),
           jnp.zeros((A, steps), jnp.float32), jnp.zeros((A,), jnp.int32))
  _, cache, pos_A, hidden_AD, _, out, logps, count = jax.lax.while_loop(goes_on, body, carry)
  state = state.replace(cache=cache, pos_B=state.pos_B.at[at].set(pos_A, mode="drop"),
                        hidden_BD=state.hidden_BD.at[at].set(hidden_AD, mode="drop"))
  return state, out, logps, count
