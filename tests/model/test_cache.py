"""Attention over a cache, against one query at a time in float64; and that it is the same for every platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax.model import cache as cache_lib

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
