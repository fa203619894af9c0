"""Every kernel that runs here gives the same numbers; which one is used where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax.model import attention
from virl_jax.model import sharding
from virl_jax.run import hosts

B, T, N, K, H = 2, 256, 4, 2, 16


def inputs(valid):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((B, T, heads, H), np.float32)) for heads in (N, K, K))
  return q, k, v, jnp.asarray(valid)


def right_padded():
  return np.arange(T)[None] < np.array([[T], [T - 77]])


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
                                          ("splash", True)])
def test_kernels_agree_with_attention_by_hand(kind, causal, small_blocks):
  q, k, v, valid = inputs(right_padded())
  got = attention.attend(q, k, v, valid, causal, right_padded=True, kind=kind)
  np.testing.assert_allclose(got[valid], by_hand(q, k, v, valid, causal)[valid], atol=2e-6)
  assert np.isfinite(got).all()


@pytest.mark.parametrize("kind, causal", [("plain", False), ("blocks", False), ("plain", True), ("blocks", True),
                                          ("splash", True)])
def test_groups_of_a_row_are_as_rows_of_their_own(kind, causal, small_blocks):
  q, k, v, valid = inputs(right_padded())
  group = np.random.default_rng(1).integers(0, 3, valid.shape)
  got = np.asarray(attention.attend(q, k, v, valid, causal, kind=kind, group_BT=group))
  for g in range(3):
    mine = valid & (group == g)
    np.testing.assert_allclose(got[mine], by_hand(q, k, v, mine, causal)[mine], atol=2e-6)


def test_a_kernel_that_knows_of_no_groups_is_not_chosen_for_them(monkeypatch):
  asked = []
  monkeypatch.setattr(attention, "choose", lambda *args: asked.append(args[-1]) or "plain")
  q, k, v, valid = inputs(right_padded())
  for group in (None, jnp.zeros(valid.shape, jnp.int32)):
    attention.attend(q, k, v, valid, True, right_padded=True, group_BT=group)
  assert asked == [True, False]


@pytest.mark.parametrize("kind", ["plain", "blocks", "splash"])
def test_padding_on_the_left_is_not_seen(kind, small_blocks):
  q, k, v, valid = inputs(right_padded()[:, ::-1].copy())
  got = attention.attend(q, k, v, valid, True, kind=kind)
  np.testing.assert_allclose(got[valid], by_hand(q, k, v, valid, True)[valid], atol=2e-6)


@pytest.mark.parametrize("kind", ["blocks", "splash"])
def test_gradients_agree(kind, small_blocks):
  q, k, v, valid = inputs(right_padded())

  def loss(kind, q, k, v):
    out = attention.attend(q, k, v, valid, True, kind=kind)
    return jnp.sum(jnp.where(valid[..., None, None], out, 0) ** 2)

  want = jax.grad(loss, (1, 2, 3))("plain", q, k, v)
  for a, b in zip(jax.grad(loss, (1, 2, 3))(kind, q, k, v), want):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_splash_runs_where_its_rows_and_heads_are():
  mesh = sharding.make(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
  q, k, v, valid = inputs(right_padded())

  @jax.jit
  def on_mesh(q, k, v, valid):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return attention.attend(q, k, v, valid, True, kind="splash")

  got = on_mesh(*hosts.place((q, k, v, valid), mesh))
  want = attention.attend(q, k, v, valid, True, kind="plain")
  np.testing.assert_allclose(got[valid], want[valid], atol=2e-6)
  assert got.sharding.shard_shape(got.shape) == (B // 2, T, N // 2, H)


def test_blocks_bound_the_scores():
  """Twice the length costs twice the memory, not four times."""
  def peak(kind, length):
    shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    grad = jax.grad(lambda q, k, v, valid: attention.attend(q, k, v, valid, True, kind=kind).sum())
    lowered = jax.jit(grad).lower(shape, shape, shape, jax.ShapeDtypeStruct((1, length), bool))
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert peak("blocks", 8192) < 2.5 * peak("blocks", 4096)
  assert peak("plain", 4096) > 3.5 * peak("plain", 2048)


@pytest.mark.parametrize("where, kind", [
    (("cpu", jnp.float32, 100, 128, True, True), "plain"), (("cpu", jnp.float32, 5000, 128, True, True), "blocks"),
    (("gpu", jnp.bfloat16, 5000, 128, True, True), "cudnn"), (("gpu", jnp.float32, 5000, 128, True, True), "blocks"),
    (("gpu", jnp.bfloat16, 5000, 128, True, False), "blocks"), (("gpu", jnp.bfloat16, 5000, 80, False, True), "blocks"),
    (("gpu", jnp.bfloat16, 100, 12, True, True), "plain"), (("tpu", jnp.bfloat16, 4096, 128, True, True), "splash"),
    (("tpu", jnp.bfloat16, 4100, 128, True, True), "blocks"),
    (("tpu", jnp.bfloat16, 4096, 80, False, False), "blocks")])
def test_the_kernel_follows_from_where_it_runs(where, kind):
  assert attention.choose(*where) == kind
