"""Every kernel that runs here gives the same numbers; which one is used where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax.model import attention
from virl_jax.model import sharding
from virl_jax.run import placement

B, T, N, K, H = 2, 256, 4, 2, 16


def inputs(valid):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((B, T, heads, H), np.float32)) for heads in (N, K, K))
  return q, k, v, jnp.asarray(valid)


def right_padded():
  return np.arange(T)[None] < np.array([[T], [T - 77]])


def numbered(valid):
  return jnp.where(valid, 0, -1)


def lengths(valid):
  return valid.sum(1, dtype=jnp.int32)[:, None]


def by_hand(q, k, v, valid, causal):
  """Softmax attention in float64, one query at a time."""
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  out = np.zeros(q.shape)
  for b in range(B):
    for t in range(T):
      seen = np.flatnonzero(np.asarray(valid)[b] & ((np.arange(T) <= t) | (not causal)))
      for n in range(N if len(seen) else 0):
        score = k[b, seen, n // (N // K)] @ q[b, t, n] / np.sqrt(H)
        weight = np.exp(score - score.max())
        out[b, t, n] = weight @ v[b, seen, n // (N // K)] / weight.sum()
  return out


@pytest.fixture
def small_blocks(monkeypatch):
  monkeypatch.setattr(attention, "QUERY_BLOCK", 96)  # does not divide T


@pytest.mark.parametrize("kind, causal", [("plain", True), ("plain", False), ("blocks", True), ("blocks", False),
                                          ("splash", True), ("splash", False), ("cudnn", True), ("cudnn", False)])
def test_kernels_agree_with_attention_by_hand(kind, causal, small_blocks):
  q, k, v, valid = inputs(right_padded())
  got = attention.attend(q, k, v, numbered(valid), causal, lengths(valid), kind)
  np.testing.assert_allclose(got[valid], by_hand(q, k, v, valid, causal)[valid], atol=2e-6)
  assert np.isfinite(got).all()


@pytest.mark.parametrize("kind, causal", [("plain", False), ("blocks", False), ("plain", True), ("blocks", True),
                                          ("splash", True), ("splash", False)])
def test_groups_of_a_row_are_as_rows_of_their_own(kind, causal, small_blocks):
  q, k, v, valid = inputs(right_padded())
  group = np.random.default_rng(1).integers(0, 3, valid.shape)
  got = np.asarray(attention.attend(q, k, v, jnp.where(valid, group, -1), causal, kind=kind))
  for g in range(3):
    mine = valid & (group == g)
    np.testing.assert_allclose(got[mine], by_hand(q, k, v, mine, causal)[mine], atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("of_rows", [[[100, 60, 40, 20], [256, 0, 0, 0]], [[128, 128, 0, 0], [64, 64, 64, 64]],
                                     [[253, 1, 1, 1], [0, 0, 0, 0]]])
def test_cudnn_takes_segments_apart_and_puts_them_back(of_rows, causal):
  """Values and gradients, whose padding is not finite where a kernel leaves what was there."""
  q, k, v, _ = inputs(right_padded())
  of_rows = jnp.array(of_rows)
  segment = attention.segments(of_rows, T)

  def loss(kind, q, k, v):
    out = attention.attend(q, k, v, segment, causal, of_rows, kind)
    return jnp.sum(jnp.where((segment >= 0)[..., None, None], jnp.sin(out), 0)), out

  (_, want), want_grads = jax.value_and_grad(loss, (1, 2, 3), has_aux=True)("plain", q, k, v)
  (_, got), grads = jax.value_and_grad(loss, (1, 2, 3), has_aux=True)("cudnn", q, k, v)
  np.testing.assert_allclose(got[segment >= 0], want[segment >= 0], atol=2e-6)
  assert not got[segment < 0].any()
  for a, b in zip(grads, want_grads):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_segments_are_numbered_from_their_lengths():
  got = attention.segments(jnp.array([[3, 1, 0], [0, 0, 0], [2, 2, 2]]), 6)
  assert got.tolist() == [[0, 0, 0, 1, -1, -1], [-1] * 6, [0, 0, 1, 1, 2, 2]]


@pytest.mark.parametrize("platform, length, rows, together", [
    ("cpu", 64, 256, 1), ("gpu", 64, 256, 1), ("tpu", 64, 256, 8), ("tpu", 64, 2, 2), ("tpu", 64, 4, 4),
    ("tpu", 64, 6, 6), ("tpu", 100, 7, 1), ("tpu", 1024, 4, 1), ("tpu", 64, 1, 1)])
def test_short_rows_go_together_where_a_kernel_wants_long_ones(platform, length, rows, together):
  assert attention.rows_together(platform, length, rows) == together


@pytest.mark.parametrize("kind", ["plain", "blocks"])
@pytest.mark.parametrize("most", [1, 3 * N * T * T])
def test_only_some_rows_scores_exist_at_a_time(kind, most, monkeypatch):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((7, T, heads, H), np.float32)) for heads in (N, K, K))
  segment = jnp.where(jnp.arange(T)[None] < jnp.arange(10, 80, 10)[:, None], 0, -1)
  run = lambda q: jnp.sum(jnp.where((segment >= 0)[..., None, None],
                                    attention.attend(q, k, v, segment, True, kind=kind), 0) ** 2)
  want = jax.value_and_grad(run)(q)
  monkeypatch.setattr(attention, "SCORES", most)
  for a, b in zip(jax.value_and_grad(run)(q), want):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "blocks", "splash"])
def test_padding_on_the_left_is_not_seen(kind, small_blocks):
  q, k, v, valid = inputs(right_padded()[:, ::-1].copy())
  got = attention.attend(q, k, v, numbered(valid), True, kind=kind)
  np.testing.assert_allclose(got[valid], by_hand(q, k, v, valid, True)[valid], atol=2e-6)


@pytest.mark.parametrize("kind", ["blocks", "splash"])
def test_gradients_agree(kind, small_blocks):
  q, k, v, valid = inputs(right_padded())

  def loss(kind, q, k, v):
    out = attention.attend(q, k, v, numbered(valid), True, kind=kind)
    return jnp.sum(jnp.where(valid[..., None, None], out, 0) ** 2)

  want = jax.grad(loss, (1, 2, 3))("plain", q, k, v)
  for a, b in zip(jax.grad(loss, (1, 2, 3))(kind, q, k, v), want):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", attention.KINDS)
def test_each_device_attends_for_its_own_rows_and_heads(kind):
  mesh = sharding.make(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
  q, k, v, valid = inputs(right_padded())

  @jax.jit
  def on_mesh(q, k, v, valid):
    with sharding.context(mesh):
      return attention.attend(q, k, v, numbered(valid), True, lengths(valid), kind)

  lowered = on_mesh.lower(*placement.place((q, k, v, valid), mesh)).compile()
  assert "all-gather" not in lowered.as_text()
  got = on_mesh(*placement.place((q, k, v, valid), mesh))
  want = attention.attend(q, k, v, numbered(valid), True, kind="plain")
  np.testing.assert_allclose(got[valid], want[valid], atol=2e-6)
  assert got.sharding.shard_shape(got.shape) == (B // 2, T, N // 2, H)


def test_blocks_bound_the_scores():
  """Twice the length costs twice the memory, not four times."""
  def peak(kind, length):
    shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    grad = jax.grad(lambda q, k, v, valid: attention.attend(q, k, v, numbered(valid), True, kind=kind).sum())
    lowered = jax.jit(grad).lower(shape, shape, shape, jax.ShapeDtypeStruct((1, length), bool))
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert peak("blocks", 8192) < 2.5 * peak("blocks", 4096)
  assert peak("plain", 4096) > 3.5 * peak("plain", 2048)


@pytest.mark.parametrize("where, kind", [
    (("cpu", jnp.float32, 100, 128, True), "plain"), (("cpu", jnp.float32, 5000, 128, True), "blocks"),
    (("gpu", jnp.bfloat16, 5000, 128, True), "cudnn"), (("gpu", jnp.float32, 5000, 128, True), "blocks"),
    (("gpu", jnp.bfloat16, 5000, 128, False), "blocks"), (("gpu", jnp.bfloat16, 64, 80, True), "cudnn"),
    (("gpu", jnp.bfloat16, 100, 12, True), "plain"), (("tpu", jnp.bfloat16, 4096, 128, True), "splash"),
    (("tpu", jnp.bfloat16, 4100, 128, True), "blocks"), (("tpu", jnp.bfloat16, 4096, 80, False), "splash")])
def test_the_kernel_follows_from_where_it_runs(where, kind):
  assert attention.choose(*where) == kind
