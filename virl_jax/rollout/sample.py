"""Jitted prefill, append and decode over a visible key/value cache.

Three calls, all with a donated state: `append` puts a right-padded chunk (a prompt, a tool turn with its
crop) behind each row; `fan_out` repeats prefilled prompts for their group; `decode` samples until every
running row has ended its turn.  A turn's last token (end of turn) is sampled but not yet in the cache:
the next chunk starts with it.
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp

from virl_jax import types
from virl_jax.model import qwen
from virl_jax.model import text


@flax.struct.dataclass
class State:
  """Where each row stands between two calls.

  Attributes:
    cache: what it has seen.
    pos_B: int32, M-RoPE position of its next token.
    hidden_BD: final hidden state of its last appended token, from which the next is sampled.
  """

  cache: text.Cache
  pos_B: jax.Array
  hidden_BD: jax.Array


@flax.struct.dataclass
class Chunk:
  """What is appended to each row.

  Attributes:
    tokens_BT: int32, right-padded.
    n_new_B: int32, real tokens; 0 leaves a row alone.
    pos_BXT: int32 M-RoPE positions.
    next_pos_B: int32, the position after the chunk.
    vision_BT: int32 index into the merged tokens of `images`; -1 on text.
    images: buckets of new images.
  """

  tokens_BT: jax.Array
  n_new_B: jax.Array
  pos_BXT: jax.Array
  next_pos_B: jax.Array
  vision_BT: jax.Array
  images: tuple[types.ImageBatch, ...]


@functools.partial(jax.jit, static_argnames=("cfg", "rows", "slots"))
def start(cfg: qwen.Config, rows: int, slots: int) -> State:
  """An empty state of `rows` rows with room for `slots` tokens each."""
  dtype = jnp.dtype(cfg.compute_dtype)
  return State(text.new_cache(cfg.text, rows, slots, dtype), jnp.zeros((rows,), jnp.int32),
               jnp.zeros((rows, cfg.text.hidden), dtype))


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="state")
def append(params: dict, cfg: qwen.Config, state: State, chunk: Chunk) -> State:
  """Runs a chunk through the model, encoding only its new images.

  Args:
    params: the policy.
    cfg: static.
    state: donated.
    chunk: what to append; the caller sees to it that the cache has room.
  """
  x = qwen.embed(params, cfg, chunk.tokens_BT, chunk.vision_BT, chunk.images)
  h, cache = text.extend(params["text"], cfg.text, x, chunk.pos_BXT, chunk.n_new_B, state.cache)
  last = jnp.take_along_axis(h, jnp.maximum(chunk.n_new_B - 1, 0)[:, None, None], axis=1)[:, 0]
  new = chunk.n_new_B > 0
  return State(cache, jnp.where(new, chunk.next_pos_B, state.pos_B),
               jnp.where(new[:, None], last, state.hidden_BD))


@functools.partial(jax.jit, static_argnames="copies")
def fan_out(state: State, copies: int) -> State:
  """Every row `copies` times, copies next to each other: a prompt prefilled once serves its group."""
  cache = text.Cache(jnp.repeat(state.cache.k_LBKSH, copies, axis=1),
                     jnp.repeat(state.cache.v_LBKSH, copies, axis=1),
                     jnp.repeat(state.cache.len_B, copies))
  return State(cache, jnp.repeat(state.pos_B, copies), jnp.repeat(state.hidden_BD, copies, axis=0))


@functools.partial(jax.jit, static_argnames=("cfg", "max_new"), donate_argnames="state")
def decode(params: dict, cfg: qwen.Config, state: State, running_B: jax.Array, uid_B: jax.Array, turn: jax.Array,
           key: jax.Array, temperature: jax.Array, max_new: int
           ) -> tuple[State, jax.Array, jax.Array, jax.Array]:
  """Samples one turn of each running row.

  Args:
    params: the policy.
    cfg: static.
    state: donated.
    running_B: bool, rows that take part.
    uid_B: int32; a row's samples depend on (key, its uid, turn) and on nothing beside it.
    turn: int32 scalar.
    key: of the step.
    temperature: float32 scalar; 0 is greedy.
    max_new: most tokens a turn.

  Returns:
    The state, tokens int32[B, max_new], their log-probabilities float32[B, max_new] in nats under the
    distribution that they were sampled from (at temperature 1 if greedy), and int32[B] how many each row
    sampled.  A row that ended its turn has `cfg.eos` last.
  """
  B = running_B.shape[0]
  keys = jax.vmap(lambda uid: jax.random.fold_in(jax.random.fold_in(key, uid), turn))(uid_B)
  greedy = temperature <= 0
  scale = jnp.where(greedy, 1.0, temperature)

  def pick(hidden_BD, t):
    logits = qwen.policy_logits(params, cfg, hidden_BD[:, None], scale)[:, 0]
    drawn = jax.vmap(lambda k, row: jax.random.categorical(jax.random.fold_in(k, t), row))(keys, logits)
    token = jnp.where(greedy, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    return token, logp

  def record(t, token, logp, running, out, logps, count):
    out = out.at[:, t].set(jnp.where(running, token, 0))
    logps = logps.at[:, t].set(jnp.where(running, logp, 0.0))
    return out, logps, count + running, running & (token != cfg.eos)

  def body(carry):
    t, token, state, running, out, logps, count = carry
    x = qwen.embed(params, cfg, token[:, None], jnp.full((B, 1), -1), ())
    pos_BXT = jnp.broadcast_to(state.pos_B[:, None, None], (B, 3, 1))
    h, cache = text.extend(params["text"], cfg.text, x, pos_BXT, running.astype(jnp.int32), state.cache)
    state = State(cache, state.pos_B + running, jnp.where(running[:, None], h[:, 0], state.hidden_BD))
    token, logp = pick(state.hidden_BD, t)
    out, logps, count, running = record(t, token, logp, running, out, logps, count)
    return t + 1, token, state, running, out, logps, count

  token, logp = pick(state.hidden_BD, 0)
  out, logps = jnp.zeros((B, max_new), jnp.int32), jnp.zeros((B, max_new), jnp.float32)
  out, logps, count, running = record(0, token, logp, running_B, out, logps, jnp.zeros((B,), jnp.int32))
  carry = (jnp.int32(1), token, state, running, out, logps, count)
  _, _, state, _, out, logps, count = jax.lax.while_loop(
      lambda c: (c[0] < max_new) & c[3].any(), body, carry)
  return state, out, logps, count
