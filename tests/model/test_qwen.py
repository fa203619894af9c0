"""The forward pass: what it may look at, and that every way of computing it gives the same numbers."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax import types
from virl_jax.model import cache as cache_lib
from virl_jax.model import head
from virl_jax.model import patches
from virl_jax.model import rope
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.model.qwen2_5 import text
from virl_jax.model.qwen2_5 import vision

ATOL = 1e-5

hidden = jax.jit(qwen.hidden, static_argnames="cfg")
logits = jax.jit(qwen.logits, static_argnames="cfg")
embed = jax.jit(qwen.embed, static_argnames="cfg")
extend = jax.jit(text.extend, static_argnames="cfg")


@flax.struct.dataclass
class Inputs:
  """What `qwen.hidden` takes."""

  tokens_BT: np.ndarray
  valid_BT: np.ndarray
  pos_BXT: np.ndarray
  vision_BT: np.ndarray
  images: tuple


def picture(rng, rows, cols, cfg):
  """A random image of rows x cols merged cells."""
  grid = cfg.vision.grid
  patches = rng.normal(size=(rows * cols * grid.merge ** 2, grid.values)).astype(np.float32)
  return types.ImageInput(patches, (rows * grid.merge, cols * grid.merge), types.Box(0, 0, 1, 1))


def words(rng, n):
  return rng.integers(10, 60, n).tolist()


@pytest.fixture(scope="module")
def case(small):
  """A trajectory: prompt with a shown image, a call, a crop, an answer; and arrays of a batch of two."""
  rng, cfg = np.random.default_rng(0), small.cfg
  shown, crop, other = picture(rng, 2, 3, cfg), picture(rng, 5, 2, cfg), picture(rng, 1, 2, cfg)
  frame = lambda n: [cfg.vision_start] + n * [cfg.image_token] + [cfg.vision_end]
  first = [words(rng, 3) + frame(6) + words(rng, 4), words(rng, 5), frame(10) + words(rng, 2), words(rng, 3)]
  second = words(rng, 2) + frame(2) + words(rng, 9)
  rows, grids = [sum(first, []), second], [[(2, 3), (5, 2)], [(1, 2)]]
  batch, index = patches.layout([shown, crop, other], cfg.vision.grid)
  index = [np.concatenate(index[:2]), index[2]]
  T = max(map(len, rows))
  tokens, valid = np.zeros((2, T), np.int32), np.zeros((2, T), bool)
  pos, vision = np.zeros((2, 3, T), np.int32), np.full((2, T), -1, np.int32)
  for b, row in enumerate(rows):
    tokens[b, :len(row)], valid[b, :len(row)] = row, True
    pos[b, :, :len(row)], _ = rope.positions(row, cfg.image_token, grids[b])
    vision[b, :len(row)][np.array(row) == cfg.image_token] = index[b]
  return Inputs(tokens, valid, pos, vision, (batch,)), [len(p) for p in first]


def run(model, b, cfg=None):
  cfg = cfg or model.cfg
  return hidden(model.params, cfg, b.tokens_BT, b.pos_BXT, b.valid_BT, b.vision_BT, b.images)


@pytest.mark.parametrize("together", [0, 1])
def test_pixels_may_come_as_bytes(small, together):
  """Also if images are encoded one after the other."""
  rng, cfg = np.random.default_rng(0), small.cfg
  grid = cfg.vision.grid
  cut = [patches.patchify(rng.integers(0, 256, (h * grid.factor, w * grid.factor, 3), dtype=np.uint8), grid)
         for h, w in ((2, 3), (5, 2), (9, 9))]
  of = lambda made: patches.layout([types.ImageInput(p, hw, types.Box(0, 0, 1, 1)) for p, hw in zip(
      made, ((4, 6), (10, 4), (18, 18)))], grid)
  encode = jax.jit(vision.encode, static_argnums=(1, 3, 4, 5, 6))
  (floats, index), (pixels, _) = of([patches.normalised(p, grid) for p in cut]), of(cut)
  assert (floats.patches_IWQC.dtype, pixels.patches_IWQC.dtype) == (np.float32, np.uint8)
  want = encode(small.params["vision"], cfg.vision, floats)
  got = encode(small.params["vision"], cfg.vision, pixels, jnp.float32, True, "cpu", together)
  at = np.concatenate(index)
  np.testing.assert_allclose(*(a.reshape(-1, a.shape[-1])[at] for a in (got, want)), atol=ATOL)


def test_no_token_sees_a_later_one(small, case):
  """Causality by gradient: d output[t] / d input[s] is 0 exactly where s > t."""
  b, _ = case
  x = embed(small.params, small.cfg, b.tokens_BT, b.vision_BT, b.images)

  @jax.jit
  def influence(x):
    weight_D = jnp.linspace(-1.0, 1.0, x.shape[-1])
    segment_BT = np.where(b.valid_BT[:1], 0, -1)
    out = lambda x: text.apply(small.params["text"], small.cfg.text, x, b.pos_BXT[:1], segment_BT)[0] @ weight_D
    return jnp.abs(jax.jacobian(out)(x)[:, 0]).sum(-1)

  seen_TT = np.asarray(influence(x[:1])) > 0
  T = seen_TT.shape[0]
  np.testing.assert_array_equal(seen_TT, np.tril(np.ones((T, T), bool)))


def test_changing_a_token_changes_nothing_before_it_nor_in_other_rows(small, case):
  b, _ = case
  before = np.asarray(run(small, b))
  tokens = b.tokens_BT.copy()
  at = 12
  tokens[0, at] = 11 + (tokens[0, at] == 11)
  after = np.asarray(run(small, b.replace(tokens_BT=tokens)))
  np.testing.assert_array_equal(after[1], before[1])
  np.testing.assert_array_equal(after[0, :at], before[0, :at])
  assert (np.abs(after[0, at:] - before[0, at:]).max(-1) > 1e-4).all()


def test_padding_on_either_side_changes_nothing(small, case):
  b, _ = case
  want = np.asarray(run(small, b))
  n = b.valid_BT[1].sum()

  def shifted(by):
    """Row 1 alone, with `by` paddings before it and the rest of 40 after."""
    put = lambda a, fill: np.concatenate([np.full(a.shape[:-1] + (by,), fill, a.dtype), a[..., :n],
                                          np.full(a.shape[:-1] + (40 - by - n,), fill, a.dtype)], -1)
    return b.replace(tokens_BT=put(b.tokens_BT[1:], 33), valid_BT=put(b.valid_BT[1:], False),
                     pos_BXT=put(b.pos_BXT[1:], 4), vision_BT=put(b.vision_BT[1:], -1))

  for by in (0, 1, 20):
    got = np.asarray(run(small, shifted(by)))[0, by:by + n]
    np.testing.assert_allclose(got, want[1, :n], atol=ATOL)


def test_images_in_other_buckets_or_windows_of_another_size_change_nothing(small, case):
  """The same three images, each in a batch of its own with room to spare."""
  b, _ = case
  want = np.asarray(run(small, b))[b.valid_BT]
  grid = small.cfg.vision.grid
  rng = np.random.default_rng(0)
  pictures = [picture(rng, 2, 3, small.cfg), picture(rng, 5, 2, small.cfg), picture(rng, 1, 2, small.cfg)]
  big = picture(np.random.default_rng(9), 9, 9, small.cfg)  # so that all images are cut by window; in `b` none is
  batches, index, base = [], [], 0
  for p in pictures:
    batch, where = patches.layout([big, p], grid, 3)
    assert batch.mask_IWQ.shape[1] > 1 == b.images[0].mask_IWQ.shape[1]
    index.append(where[1] + base)
    base += batch.mask_IWQ.size // grid.merge ** 2
    batches.append(batch)
  vision = b.vision_BT.copy()
  vision[0, vision[0] >= 0] = np.concatenate(index[:2])
  vision[1, vision[1] >= 0] = index[2]
  got = np.asarray(run(small, b.replace(vision_BT=vision, images=tuple(batches))))[b.valid_BT]
  np.testing.assert_allclose(got, want, atol=ATOL)


def test_jit_is_plain(small, case):
  b, _ = case
  plain = qwen.hidden(small.params, small.cfg, *map(jnp.asarray, (b.tokens_BT, b.pos_BXT, b.valid_BT, b.vision_BT)),
                      jax.tree.map(jnp.asarray, b.images))
  np.testing.assert_allclose(run(small, b), plain, atol=ATOL)


def mean_logp(params, cfg, b):
  h = qwen.hidden(params, cfg, b.tokens_BT, b.pos_BXT, b.valid_BT, b.vision_BT, b.images)
  return head.token_logp(params, cfg, h, jnp.asarray(b.tokens_BT) % 4 + 20, 1.0)[0].mean()


value_and_grad = jax.jit(jax.value_and_grad(mean_logp), static_argnums=1)


def test_remat_changes_nothing_and_every_parameter_has_a_gradient(small, case):
  b, _ = case
  value, grads = value_and_grad(small.params, small.cfg, b)
  value_r, grads_r = value_and_grad(small.params, dataclasses.replace(small.cfg, remat=True), b)
  np.testing.assert_allclose(value, value_r, rtol=1e-6)
  for (path, g), g_r in zip(jax.tree_util.tree_flatten_with_path(grads)[0], jax.tree.leaves(grads_r)):
    name, size = jax.tree_util.keystr(path), float(jnp.abs(g).max())
    np.testing.assert_allclose(g, g_r, atol=1e-5 * max(size, 1.0), err_msg=name)
    if "k_b" not in name:  # softmax cancels what is equal for all keys, which a bias is but for its rotation
      assert size > 1e-6, name
      if g.ndim > 1 and "blocks" in name:
        assert (jnp.abs(g).reshape(g.shape[0], -1).max(-1) > 1e-6).all(), name


def decode(model, b, lengths, slots=128):
  """Hidden states of row 0 by `extend`, in chunks of the given lengths; row 1 gets nothing."""
  x = embed(model.params, model.cfg, b.tokens_BT, b.vision_BT, b.images)
  cache, out, at = text.new_cache(model.cfg.text, 2, slots), [], 0
  width = max(lengths)
  x = jnp.pad(x, ((0, 0), (0, width), (0, 0)), constant_values=7.0)
  pos = np.pad(b.pos_BXT, ((0, 0), (0, 0), (0, width)), constant_values=3)
  for n in lengths:
    h, cache = extend(model.params["text"], model.cfg.text, x[:, at:at + width], pos[:, :, at:at + width],
                      np.array([n, 0], np.int32), cache)
    out.append(h[0, :n])
    at += n
  return jnp.concatenate(out), cache


@pytest.mark.parametrize("plan", ["turn by turn", "token by token", "all at once"])
def test_decoding_over_a_cache_is_the_full_forward_pass(small, case, plan):
  """The third stretch carries a crop: an image that enters in the middle of a trajectory."""
  b, lengths = case
  T = sum(lengths)
  lengths = {"turn by turn": lengths, "token by token": [1] * T, "all at once": [T]}[plan]
  got, cache = decode(small, b, lengths)
  np.testing.assert_allclose(got, run(small, b)[0, :T], atol=ATOL)
  assert cache.len_B.tolist() == [T, 0]
  assert not np.asarray(cache.k_LBKSH[:, 1]).any() and not np.asarray(cache.v_LBKSH[:, 1]).any()
  assert not np.asarray(cache.k_LBKSH[:, 0, :, T:]).any()  # padding is not written


@pytest.mark.parametrize("together", [64, 128, 192])
def test_rows_of_a_cache_have_lengths_of_their_own(small, together, monkeypatch):
  """Row 1 starts late, pauses, and crosses the border of a block of slots; row 0 has another length all the time."""
  # 128 does not divide the cache's 192.
  monkeypatch.setattr(cache_lib, "_slots_together", lambda T, S, platform: together)
  extend = jax.jit(lambda *a: text.extend(*a), static_argnums=1)  # traced anew
  rng = np.random.default_rng(3)
  ids = rng.integers(10, 60, (2, 150)).astype(np.int32)
  pos = np.broadcast_to(np.arange(150, dtype=np.int32), (2, 3, 150))
  x = embed(small.params, small.cfg, ids, np.full_like(ids, -1), ())
  want = jax.jit(text.apply, static_argnums=1)(small.params["text"], small.cfg.text, x, pos, np.ones((2, 150), bool))
  cache, at, got = text.new_cache(small.cfg.text, 2, 192), np.zeros(2, int), [[], []]
  for n in ((50, 0), (3, 50), (0, 40), (50, 7), (47, 50), (0, 3)):
    take = at[:, None] + np.arange(50)
    chunk = jnp.take_along_axis(jnp.pad(x, ((0, 0), (0, 50), (0, 0))), take[..., None], 1)
    chunk_pos = np.take_along_axis(np.pad(pos, ((0, 0), (0, 0), (0, 50))), take[:, None], 2)
    h, cache = extend(small.params["text"], small.cfg.text, chunk, chunk_pos, np.array(n, np.int32), cache)
    for r in (0, 1):
      got[r].append(h[r, :n[r]])
    at += n
  assert at.tolist() == [150, 150] == cache.len_B.tolist()
  for r in (0, 1):
    np.testing.assert_allclose(jnp.concatenate(got[r]), want[r], atol=ATOL)


@pytest.mark.parametrize("width", [1, 40])
def test_a_cache_in_half_precision_is_as_near_as_whole_sequences_are(small, width):
  rng, T = np.random.default_rng(5), 160
  ids, pos = rng.integers(10, 60, (1, T)).astype(np.int32), np.broadcast_to(np.arange(T, dtype=np.int32), (1, 3, T))
  x = embed(small.params, small.cfg, ids, np.full_like(ids, -1), ())
  half, p, cfg = x.astype(jnp.bfloat16), small.params["text"], small.cfg.text
  whole = jax.jit(text.apply, static_argnums=1)
  segment = np.zeros((1, T), np.int32)
  exact = whole(p, cfg, x, pos, segment)
  cache, out = text.new_cache(cfg, 1, 192, jnp.bfloat16), []
  for at in range(0, T, width):
    h, cache = extend(p, cfg, half[:, at:at + width], pos[:, :, at:at + width], np.array([width], np.int32), cache)
    out.append(h)
  got, wanted = jnp.concatenate(out, 1), whole(p, cfg, half, pos, segment)
  assert got.dtype == wanted.dtype == jnp.bfloat16
  error = lambda y: float(jnp.abs(y.astype(jnp.float32) - exact).mean())
  assert 0 < error(got) < 1.2 * error(wanted)


def test_cache_slots_come_in_blocks(small):
  with pytest.raises(ValueError, match="slots must be a multiple of 64. Received: 100"):
    text.new_cache(small.cfg.text, 1, 100)


@pytest.fixture(scope="module")
def states(small):
  rng = np.random.default_rng(4)
  h = rng.normal(size=(2, 11, small.cfg.text.hidden)).astype(np.float32)
  return h, rng.integers(10, 64, (2, 11)).astype(np.int32)


def naive(model, h, temperature):
  """float64[B, T, V]: log-probabilities without the placeholders."""
  x = h.astype(np.float64) @ np.asarray(model.params["text"]["head"], np.float64) / temperature
  x[..., list(model.cfg.banned)] = -np.inf
  x -= x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("chunk", [1, 4, 11, 128])
def test_token_logp_is_a_log_softmax_however_it_is_cut(small, states, chunk):
  h, y = states
  f = jax.jit(functools.partial(head.token_logp, cfg=small.cfg, temperature=0.7, chunk=chunk))
  logp, entropy = f(small.params, hidden_BTD=h, targets_BT=y)
  want = naive(small, h, 0.7)
  np.testing.assert_allclose(logp, np.take_along_axis(want, y[..., None], -1)[..., 0], atol=ATOL)
  p = np.exp(want)
  np.testing.assert_allclose(entropy, -(p * np.where(p > 0, want, 0)).sum(-1), atol=ATOL)
  assert logp.dtype == entropy.dtype == jnp.float32


@pytest.mark.parametrize("tied", [True, False])
def test_the_heads_gradient_in_half_precision(small, states, tied, optimized):
  """Optimised, as programs of a run are: then a CPU lacks a kernel for some products in half precision."""
  cfg = dataclasses.replace(small.cfg, compute_dtype="bfloat16")
  text_ = {k: v for k, v in small.params["text"].items() if not (tied and k == "head")}
  h, y = states[0].repeat(4, 0), states[1].repeat(4, 0)
  run = lambda text_, h: head.token_logp({"text": text_}, cfg, h, y, 1.0)[0].mean()
  got = jax.jit(jax.grad(run, (0, 1)))(text_, h.astype(jnp.bfloat16))
  want = jax.grad(run, (0, 1))(text_, h)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a.astype(np.float32), b, atol=0.02 * np.abs(b).max())


def test_placeholders_are_impossible_and_harmless(small, states):
  h, y = states
  y = y.copy()
  y[0, :5] = small.cfg.banned
  f = jax.jit(lambda h: head.token_logp(small.params, small.cfg, h, y, 1.0))
  logp, _ = f(h)
  assert (np.asarray(logp[0, :5]) < -1e29).all() and (np.asarray(logp[0, 5:]) > -50).all()
  p = jnp.exp(head.policy_logits(small.params, small.cfg, jnp.asarray(h), 1.0))
  assert (np.asarray(p[..., list(small.cfg.banned)]) == 0).all()
  grads = jax.jit(jax.grad(lambda h: f(h)[0][0, 5:].sum() + f(h)[1].sum()))(h)
  assert np.isfinite(grads).all()
  assert len(set(small.cfg.banned)) == 5 and not set(small.cfg.eos) & set(small.cfg.banned)


def test_logits_from_hf_inputs_are_the_same_numbers(small, case):
  b, _ = case
  rng = np.random.default_rng(0)
  pictures = [picture(rng, 2, 3, small.cfg), picture(rng, 5, 2, small.cfg), picture(rng, 1, 2, small.cfg)]
  got = qwen.logits_from_hf_inputs(
      small.params, small.cfg, b.tokens_BT, b.valid_BT.astype(int), np.concatenate([p.patches_PC for p in pictures]),
      [[1, *p.grid_hw] for p in pictures])
  want = logits(small.params, small.cfg, run(small, b))
  np.testing.assert_allclose(np.asarray(got)[b.valid_BT], np.asarray(want)[b.valid_BT], atol=1e-4)
  assert got.dtype == jnp.float32


@pytest.mark.parametrize("ids, grids, message", [
    ([5, 5, 1], [[1, 2, 4], [1, 2, 2]], "placeholders for 2 images. Received: for 1"),
    ([5, 1, 1], [[1, 2, 4]], "2 image placeholders.*Received: 1"),
    ([5, 5, 1], None, "0 image placeholders.*Received: 2"),
    ([5, 5, 1], [[2, 2, 4]], "one frame an image")])
def test_hf_inputs_that_do_not_fit_are_named(small, ids, grids, message):
  pixels = None if grids is None else np.zeros((100, 1176), np.float32)
  with pytest.raises(ValueError, match=message):
    qwen.logits_from_hf_inputs(small.params, small.cfg, [ids], [[1] * 3], pixels, grids)
