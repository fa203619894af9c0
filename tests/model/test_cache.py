"""Attention over a cache, against one query at a time in float64; and that it is the same for every platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax.model import cache as cache_lib
from virl_jax.model import cache_kernels
from virl_jax.model import sharding

L, K, H, N, S = 2, 2, 8, 4, 192


def filled(rows, seed=0):
  """A cache with something in every slot, of layers that differ."""
  rng = np.random.default_rng(seed)
  draw = lambda: jnp.asarray(rng.standard_normal((L, rows, K, S, H), np.float32))
  return cache_lib.Cache(draw(), draw(), jnp.asarray(rng.integers(0, S - 8, rows), jnp.int32))


def by_hand(q_ATNH, cache, layer, slot_AT, rows):
  k, v = (np.asarray(a, np.float64)[layer] for a in (cache.k_LBKSH, cache.v_LBKSH))
  out = np.zeros(q_ATNH.shape)
  for a, t, n in np.ndindex(*q_ATNH.shape[:3]):
    row, head, seen = rows[a], n // (N // K), slice(slot_AT[a, t] + 1)
    score = k[row, head, seen] @ np.asarray(q_ATNH[a, t, n], np.float64) / np.sqrt(H)
    weight = np.exp(score - score.max())
    out[a, t, n] = weight @ v[row, head, seen] / weight.sum()
  return out


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("rows, length, picked", [(5, 1, None), (40, 1, None), (40, 1, 19), (3, 8, None), (6, 5, 2)])
def test_a_chunk_sees_what_its_row_holds(platform, rows, length, picked):
  """40 rows of one token are more than a CPU takes together, and no multiple of it."""
  cache, rng = filled(rows), np.random.default_rng(1)
  row_A = None if picked is None else jnp.asarray(rng.permutation(rows)[:picked], jnp.int32)
  mine = np.arange(rows) if picked is None else np.asarray(row_A)
  q = jnp.asarray(rng.standard_normal((len(mine), length, N, H), np.float32))
  at = cache_lib.places(cache, jnp.full(len(mine), length, jnp.int32), length, row_A)
  assert int(at.filled) == np.asarray(cache.len_B)[mine].max() + length
  got = jax.jit(cache_lib.attend, static_argnames="platform")(
      q, cache.k_LBKSH, cache.v_LBKSH, jnp.int32(1), at, platform=platform)
  np.testing.assert_allclose(got, by_hand(q, cache, 1, np.asarray(at.slot_AT), mine), atol=1e-5)


def test_how_much_is_read_at_a_time_follows_from_the_platform():
  read = cache_lib._slots_together
  assert [read(1, 4096, p) for p in ("cpu", "gpu", "tpu")] == [64, 1024, 1024]
  assert read(1, 192, "gpu") == 192 and read(512, 4096, "gpu") == 512 and read(8192, 16384, "gpu") == 64


def test_padding_is_written_nowhere():
  cache, new = filled(3), jnp.ones((3, 4, K, H))
  n_new = jnp.array([4, 0, 2], jnp.int32)
  at = cache_lib.places(cache, n_new, 4)
  got = np.asarray(cache_lib.write(cache.k_LBKSH, jnp.int32(0), new, at))
  changed = (got != np.asarray(cache.k_LBKSH)).any((0, 2, 4))  # rows and slots
  len_B = np.asarray(cache.len_B)
  want = [[start <= s < start + n for s in range(S)] for start, n in zip(len_B, (4, 0, 2))]
  np.testing.assert_array_equal(changed, want)
  np.testing.assert_array_equal(got[1], cache.k_LBKSH[1])
  np.testing.assert_array_equal(cache_lib.lengthened(cache.len_B, n_new, at), len_B + [4, 0, 2])


# --- kernels, interpreted ---------------------------------------------------------------------------------------

KERNELS = ("triton", "mosaic")
BIG = dict(layers=3, rows=5, kv_heads=2, slots=640, head_size=128)  # ten blocks of slots for triton, five for mosaic
attend = jax.jit(cache_lib.attend, static_argnames=("platform", "kind"))


def drawn(group, length, dtype, len_B, seed=2):
  """A cache with something in every slot, and queries for as many rows."""
  draw = lambda i, shape: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape).astype(dtype)
  stack = (BIG["layers"], len(len_B), BIG["kv_heads"], BIG["slots"], BIG["head_size"])
  q = draw(0, (len(len_B), length, BIG["kv_heads"] * group, BIG["head_size"]))
  return q, cache_lib.Cache(draw(1, stack), draw(2, stack), jnp.asarray(len_B, jnp.int32))


def same(got, want, real_AT, dtype):
  got, want = (np.asarray(a, np.float32) for a in (got, want))
  assert np.isfinite(got).all(), "padding, and rows that don't exist, give nonsense, but finite nonsense"
  tolerance = dict(atol=1e-5) if dtype == "float32" else dict(atol=2 ** -7, rtol=2 ** -7)
  np.testing.assert_allclose(got[real_AT], want[real_AT], **tolerance)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("dtype, group, length, picked", [
    ("float32", 7, 1, True), ("float32", 1, 20, False), ("bfloat16", 2, 1, True), ("bfloat16", 7, 100, False),
    *(pytest.param(*how, marks=pytest.mark.slow) for how in (
        ("float32", 2, 1, False), ("float32", 7, 100, True), ("bfloat16", 1, 1, True), ("bfloat16", 2, 20, True),
        ("bfloat16", 7, 1, True)))])
def test_a_kernel_and_the_loop_give_the_same(kind, dtype, group, length, picked):
  """Cache rows that are empty, of all lengths, and full; chunk rows of real tokens, with padding, and of padding only;
  and one whose row does not exist."""
  q, cache = drawn(group, length, dtype, [0, BIG["slots"] - length, 127, 63, 300])
  row_A = jnp.array([1, BIG["rows"] + 4, 0, 4, 2], jnp.int32) if picked else None
  n_new = np.array([length, 0, length, -(-length // 2), 0])
  at = cache_lib.places(cache, jnp.asarray(n_new, jnp.int32), length, row_A)
  real_AT = np.arange(length) < n_new[:, None]
  given = q, cache.k_LBKSH, cache.v_LBKSH, jnp.int32(2), at
  same(attend(*given, kind=kind), attend(*given, kind="loop"), real_AT, dtype)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("length", [1, 20])
def test_a_kernel_reads_only_what_is_seen(kind, length):
  """Neither other layers and rows, nor blocks of slots after the filled ones of a row; nothing at all for a chunk row
  without tokens, or one whose row does not exist."""
  q, cache = drawn(2, length, "float32", [0, 100, 383, 500, 620 - length])
  row_A = jnp.array([3, BIG["rows"] + 4, 0, 1], jnp.int32)
  n_new = np.array([length, length, length, 0])
  filled_B = np.asarray(cache.len_B) + length
  block = 64 if kind == "triton" else 128
  mine = np.zeros((*cache.k_LBKSH.shape[:2], BIG["slots"]), bool)
  for row in (0, 3):
    mine[1, row, :-(-filled_B[row] // block) * block] = True
  spoilt = [jnp.where(mine[:, :, None, :, None], a, jnp.nan) for a in (cache.k_LBKSH, cache.v_LBKSH)]
  at = cache_lib.places(cache, jnp.asarray(n_new, jnp.int32), length, row_A)
  want = attend(q[:4], cache.k_LBKSH, cache.v_LBKSH, jnp.int32(1), at, kind="loop")
  same(attend(q[:4], *spoilt, jnp.int32(1), at, kind=kind), want, np.array([True, False, True, False]), "float32")


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (4, 1, 2)])
def test_kernels_attend_for_each_device_s_rows_and_heads(kind, sizes):
  mesh = sharding.make(*sizes)
  rows = 8
  q, cache = drawn(2, 3, "float32", np.arange(rows) * 75)
  n_new = jnp.array([3, 0, 3, 3, 2, 3, 1, 3], jnp.int32)
  here = rows // sharding.row_shards(mesh)
  within = jnp.asarray(np.tile(np.arange(here)[::-1], rows // here), jnp.int32)  # each shard's rows, backwards

  @jax.jit
  def split(q, cache):
    with sharding.context(mesh):
      at = cache_lib.places(cache, n_new, 3, within)
      return cache_lib.attend(q, cache.k_LBKSH, cache.v_LBKSH, jnp.int32(1), at, kind=kind)

  kv = sharding.cache(mesh, BIG["kv_heads"])
  put = cache_lib.Cache(jax.device_put(cache.k_LBKSH, kv), jax.device_put(cache.v_LBKSH, kv),
                        jax.device_put(cache.len_B, sharding.rows(mesh)))
  row_A = within + jnp.repeat(jnp.arange(rows // here) * here, here)
  want = attend(q, cache.k_LBKSH, cache.v_LBKSH, jnp.int32(1), cache_lib.places(cache, n_new, 3, row_A), kind="loop")
  same(split(jax.device_put(q, sharding.rows(mesh)), put), want, np.arange(3) < np.asarray(n_new)[:, None], "float32")


@pytest.mark.parametrize("platform, dtype, head_size, kind", [
    ("cpu", "bfloat16", 128, "loop"), ("gpu", "bfloat16", 128, "triton"), ("gpu", "float16", 64, "triton"),
    ("gpu", "float32", 128, "loop"), ("gpu", "bfloat16", 80, "loop"), ("gpu", "bfloat16", 32, "loop"),
    ("tpu", "bfloat16", 128, "mosaic"), ("tpu", "float32", 256, "mosaic"), ("tpu", "bfloat16", 64, "loop"),
    ("tpu", "float16", 128, "loop")])
def test_which_one_is_taken(platform, dtype, head_size, kind):
  assert cache_lib.choose(platform, jnp.dtype(dtype), head_size) == kind


def test_a_jax_without_triton_takes_the_loop(monkeypatch):
  monkeypatch.setattr(cache_kernels.importlib.util, "find_spec", lambda name: None)
  assert cache_lib.choose("gpu", jnp.bfloat16, 128) == "loop"


def test_few_rows_are_split_until_they_fill_a_gpu():
  """64 rows of 8 heads need no parts; 8 rows of 4 heads take 16 parts; a short cache has too few slots for that."""
  assert [cache_kernels.splits(*it) for it in ((512, 16384), (32, 16384), (1, 16384), (1, 640), (1, 64))] == [
      1, 16, 64, 2, 1]
