"""Goldens worked by hand, a slow numpy oracle, and inputs that are empty, reversed or missing."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl import oracles
from virl_jax import config
from virl_jax.rl import reward

CFG = reward.Config(h0=0.4, lam=0.5, rho=0.5, refine_margin=0.0, no_action=-0.75)
SQUARE = (0.0, 0.0, 10.0, 10.0)
ELSEWHERE = (20.0, 20.0, 30.0, 30.0)
# Compiled, because tests pay for every small operation that is compiled by itself.
IOU = jax.jit(reward.iou)
IOU_GRADS = jax.jit(jax.grad(lambda a, b: reward.iou(a, b).sum(), argnums=(0, 1)))
FIDELITY = jax.jit(reward.fidelity, static_argnames="cfg")
FIDELITIES = jax.jit(jax.vmap(functools.partial(reward.fidelity, cfg=CFG)))


def score(boxes, targets, cfg=CFG, box_mask=None, gt_mask=None, pad=(5, 3)):
  """Scores lists of any length, padded as in a batch to one shape, so that they share one compilation."""
  box_R4, gt_J4 = (np.array(x, np.float32).reshape(-1, 4) for x in (boxes, targets))
  box_mask_R = np.ones(len(box_R4), bool) if box_mask is None else np.array(box_mask, bool)
  gt_mask_J = np.ones(len(gt_J4), bool) if gt_mask is None else np.array(gt_mask, bool)
  n, more_R, more_J = len(box_R4), max(0, pad[0] - len(box_R4)), max(0, pad[1] - len(gt_J4))
  f = jax.device_get(FIDELITY(
      np.pad(box_R4, ((0, more_R), (0, 0))), np.pad(box_mask_R, (0, more_R)),
      np.pad(gt_J4, ((0, more_J), (0, 0))), np.pad(gt_mask_J, (0, more_J)), cfg))
  return jax.tree.map(lambda x: x[:n] if x.ndim else x, f)


def random_batch(seed=0, n=64, rounds=6, targets=3):
  """Small whole coordinates, so that ties, repeats and empty boxes are common."""
  rng = np.random.default_rng(seed)
  box_BR4 = rng.integers(0, 7, (n, rounds, 4)).astype(np.float32)
  box_BR4[:, :, 2:] += rng.integers(0, 3, (n, rounds, 1))
  gt_BJ4 = rng.integers(0, 4, (n, targets, 4)).astype(np.float32)
  gt_BJ4[:, :, 2:] += 3
  repeat = rng.random((n, rounds)) < 0.5  # zooms that are exactly a target, often the same twice
  looked_at = gt_BJ4[np.arange(n)[:, None], rng.integers(0, targets, (n, rounds))]
  box_BR4 = np.where(repeat[..., None], looked_at, box_BR4)
  return box_BR4, rng.random((n, rounds)) < 0.8, gt_BJ4, rng.random((n, targets)) < 0.7


def test_iou_goldens():
  boxes = jnp.array([SQUARE, (5, 0, 15, 10), (0, 0, 5, 5), (10, 0, 20, 10), ELSEWHERE], jnp.float32)
  value_NM = reward.iou(boxes, boxes)
  np.testing.assert_allclose(np.asarray(value_NM)[:, 0], [1, 1 / 3, 0.25, 0, 0], atol=1e-7)
  np.testing.assert_allclose(IOU(boxes, boxes), value_NM, atol=1e-7)
  assert value_NM.dtype == jnp.float32
  assert IOU(boxes, boxes[:2]).shape == (5, 2)


@pytest.mark.parametrize("bad", [
    (3, 3, 3, 3), (3, 3, 3, 8), (3, 3, 8, 3), (8, 8, 3, 3), (8, 3, 3, 8), (3, 8, 8, 3),
    (float("nan"), 0, 1, 1), (-float("inf"), 0, float("inf"), 9), (0, 0, 1e30, 1e30)])
def test_iou_of_what_is_no_box_is_zero_with_finite_gradients(bad):
  box = jnp.array([bad], jnp.float32)
  for other in (box, jnp.array([SQUARE]), jnp.zeros((1, 4))):
    assert IOU(box, other).item() == 0.0
    if np.isfinite(bad).all():
      grads = IOU_GRADS(box, other)
      assert all(np.isfinite(g).all() for g in grads)


def test_iou_gradient_pulls_towards_the_target():
  grad, _ = IOU_GRADS(jnp.array([[2.0, 2.0, 9.0, 9.0]]), jnp.array([SQUARE]))
  assert (grad[0, :2] < 0).all() and (grad[0, 2:] > 0).all()


coordinate = st.floats(-1e4, 1e4, width=32)
box = st.tuples(coordinate, coordinate, coordinate, coordinate)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.lists(box, min_size=4, max_size=4), st.lists(box, min_size=4, max_size=4))
def test_iou_properties(a, b):
  a, b = jnp.array(a, jnp.float32), jnp.array(b, jnp.float32)
  value = np.asarray(IOU(a, b))
  assert ((value >= 0) & (value <= 1)).all()
  np.testing.assert_allclose(value, np.asarray(IOU(b, a)).T, atol=1e-6)


def test_iou_agrees_with_the_slow_loop():
  rng = np.random.default_rng(1)
  a, b = rng.uniform(0, 100, (40, 4)), rng.uniform(0, 100, (30, 4))
  a[:, 2:] += a[:, :2]
  b[:20, 2:] += b[:20, :2]  # the last ten are mostly reversed
  slow = [[oracles.overlap(x, y, "iou") for y in b] for x in a]
  np.testing.assert_allclose(IOU(a, b), slow, atol=1e-6)
  assert np.max(slow) > 0.3


def test_fidelity_golden_one_target():
  half, most = (0, 0, 10, 5), (0, 0, 10, 8)
  f = score([half, half, most, ELSEWHERE, SQUARE], [SQUARE], box_mask=[1, 1, 1, 1, 0])
  np.testing.assert_allclose(f.iou_R, [0.5, 0.5, 0.8, 0, 0], atol=1e-6)
  # 1 + .5*.5;  1 - .5 (nothing refined);  1 + .5*(.8-.5);  a miss;  no action
  np.testing.assert_allclose(f.reward_R, [1.25, 0.5, 1.15, -1, 0], atol=1e-6)
  np.testing.assert_array_equal(f.correct_R, [True, True, True, False, False])
  np.testing.assert_array_equal(f.redundant_R, [False, True, False, False, False])
  np.testing.assert_array_equal(f.target_R, [0, 0, 0, 0, -1])
  assert f.target_R.dtype == jnp.int32
  np.testing.assert_allclose(f.mean, (1.25 + 0.5 + 1.15 - 1) / 4, atol=1e-6)


def test_fidelity_golden_two_targets():
  first, second = (0, 0, 10, 8), (20, 20, 30, 25)
  f = score([first, second, second], [SQUARE, ELSEWHERE])
  np.testing.assert_array_equal(f.target_R, [0, 1, 1])
  np.testing.assert_array_equal(f.redundant_R, [False, False, True])  # a new target is news
  np.testing.assert_allclose(f.reward_R, [1.4, 1.25, 0.5], atol=1e-6)


def overlapping_batch(seed, n=300, targets=3, jitter=4):
  """Targets that overlap, and zooms to them and between them."""
  rng = np.random.default_rng(seed)
  middle = np.array([20.0, 20.0, 60.0, 60.0])
  gt_BJ4 = middle + rng.normal(0, jitter, (n, targets, 4))
  box_BR4 = gt_BJ4[np.arange(n)[:, None], rng.integers(0, targets, (n, 5))] + rng.normal(0, jitter, (n, 5, 4))
  full = lambda x: np.ones(x.shape[:2], bool)
  return box_BR4.astype(np.float32), full(box_BR4), gt_BJ4.astype(np.float32), full(gt_BJ4)


def test_a_look_counts_for_every_target_that_it_hits():
  outer, inner = (0, 0, 10, 10), (0, 0, 10, 8)
  f = score([outer, inner, inner], [outer, inner])
  # The first zoom is the outer box, and hits the inner one at IoU 0.8: the second adds 0.2 to that, the third nothing.
  np.testing.assert_array_equal(f.target_R, [0, 1, 1])
  np.testing.assert_array_equal(f.redundant_R, [False, False, True])
  np.testing.assert_allclose(f.reward_R, [1.5, 1 + 0.5 * 0.2, 0.5], atol=1e-6)
  assert score([outer], [outer, inner]).covered == 1.0
  assert score([inner], [outer, ELSEWHERE]).covered == 0.5


def test_a_look_that_hits_one_target_for_the_first_time_is_not_redundant():
  left, right, both = (0, 0, 10, 10), (10, 0, 20, 10), (0, 0, 20, 10)
  assert score([left, both], [left, right]).redundant_R.tolist() == [False, False]  # 0.5 of each: the right is news
  assert score([left, right, both], [left, right]).redundant_R.tolist() == [False, False, True]


def test_four_looks_at_one_spot_are_one_hit_of_four_near_equal_boxes():
  spots = [(0, 0, 40 + d, 40 + d) for d in range(4)]
  f = score(spots, spots, cfg=reward.Config(h0=0.4, lam=0.5, rho=0.5), pad=(5, 4))
  assert f.redundant_R.tolist() == [False, True, True, True]
  assert f.covered == 1.0
  np.testing.assert_allclose(f.reward_R, [1.5] + [0.5 + 0.5 * (1 - 40 * 40 / 41 ** 2)] + [
      0.5 + 0.5 * (1 - (39 + d) ** 2 / (40 + d) ** 2) for d in (2, 3)], atol=1e-6)


def test_overlapping_targets_agree_with_the_slow_loop():
  cfgs = [CFG, reward.Config()]
  for cfg in cfgs:
    batch = overlapping_batch(seed=7)
    f = jax.device_get(jax.vmap(functools.partial(reward.fidelity, cfg=cfg))(*batch))
    for row in range(len(batch[0])):
      for name, value in oracles.fidelity(*(x[row] for x in batch), cfg).items():
        np.testing.assert_allclose(np.asarray(getattr(f, name)[row], np.float64), value, atol=1e-5, err_msg=name)
    # A zoom hits several at once, which this test is about.
    assert f.covered.mean() > 0.9 and f.redundant_R.mean() > 0.2


def test_a_refinement_is_more_than_a_margin():
  looks = [(0, 0, 10, 5), (0, 0, 10, 5.4), (0, 0, 10, 5.6), (0, 0, 10, 6.6)]  # IoU .5, .54, .56, .66
  redundant = lambda margin: score(looks, [SQUARE], cfg=reward.Config(refine_margin=margin)).redundant_R.tolist()
  assert redundant(0.0) == [False, False, False, False]
  assert redundant(0.05) == [False, True, True, False]  # each against the best so far
  assert redundant(0.15) == [False, True, True, True]


def test_looks_that_jitter_about_one_spot_are_redundant():
  rng = np.random.default_rng(0)
  target_B4 = np.tile(np.array([100.0, 100.0, 150.0, 150.0], np.float32), (200, 1))
  looks_BR4 = target_B4[:, None] + rng.normal(0, 5, (200, 1, 4)) + rng.uniform(-3, 3, (200, 6, 4))
  args = looks_BR4.astype(np.float32), np.ones((200, 6), bool), target_B4[:, None], np.ones((200, 1), bool)
  share = lambda margin: float(jax.vmap(functools.partial(
      reward.fidelity, cfg=reward.Config(refine_margin=margin)))(*args).redundant_R[:, 1:].mean())
  assert share(0.0) < 0.8 < 0.9 < share(reward.Config().refine_margin)


def test_a_miss_is_never_redundant_and_a_near_miss_still_raises_the_bar():
  near = (0, 0, 10, 3)  # 0.3: below h0
  f = score([near, (0, 0, 10, 5), near], [SQUARE])
  np.testing.assert_allclose(f.reward_R, [-1 + 0.15, 1 + 0.1, -1], atol=1e-6)
  assert not f.redundant_R.any()


def test_iou_at_the_threshold_is_correct():
  assert score([(0, 0, 10, 4)], [SQUARE]).correct_R.all()


def test_ties_pick_the_first_target():
  assert score([SQUARE], [SQUARE, SQUARE]).target_R.tolist() == [0]
  assert score([SQUARE], [SQUARE, SQUARE, SQUARE], gt_mask=[0, 1, 1]).target_R.tolist() == [1]


def test_threshold_zero_makes_no_first_look_redundant():
  f = score([ELSEWHERE, ELSEWHERE], [SQUARE], cfg=reward.Config(h0=0.0))
  assert f.correct_R.all()
  assert f.redundant_R.tolist() == [False, True]


def test_masked_slots_leave_no_trace():
  with_gap = score([SQUARE, SQUARE, ELSEWHERE], [ELSEWHERE, SQUARE], box_mask=[0, 1, 1], gt_mask=[0, 1])
  without = score([SQUARE, ELSEWHERE], [SQUARE])
  np.testing.assert_array_equal(with_gap.reward_R[1:], without.reward_R)
  assert with_gap.mean == without.mean
  assert with_gap.target_R.tolist() == [-1, 1, 1]


@pytest.mark.parametrize("boxes, box_mask, pad", [
    ([], [], (5, 3)), ([SQUARE], [0], (5, 3)), ([], [], (0, 0))])
def test_no_action(boxes, box_mask, pad):
  assert score(boxes, [SQUARE], box_mask=box_mask, pad=pad).mean == np.float32(CFG.no_action)
  assert score(boxes, [], box_mask=box_mask, pad=pad).mean == 0.0


@pytest.mark.parametrize("targets, gt_mask, pad", [
    ([], [], (5, 3)), ([SQUARE], [0], (5, 3)), ([], [], (0, 0))])
def test_a_task_without_boxes_judges_nothing(targets, gt_mask, pad):
  f = score([SQUARE, SQUARE], targets, cfg=reward.Config(h0=0.0), gt_mask=gt_mask, pad=pad)
  assert f.mean == 0.0
  assert f.reward_R.tolist() == f.iou_R.tolist() == [0.0, 0.0]
  assert f.target_R.tolist() == [-1, -1]
  assert not f.correct_R.any() and not f.redundant_R.any()


def test_fidelity_agrees_with_the_slow_loop():
  batch = random_batch()
  f = jax.device_get(FIDELITIES(*batch))
  for row in range(len(batch[0])):
    want = oracles.fidelity(*(x[row] for x in batch), CFG)
    for name, value in want.items():
      np.testing.assert_allclose(np.asarray(getattr(f, name)[row], np.float64), value, atol=1e-6, err_msg=name)
  assert 0.05 < f.redundant_R.mean() < f.correct_R.mean() < 0.95  # the cases are worth the loop


def test_one_target_is_the_running_best_over_all_actions():
  box_BR4, box_mask_BR, gt_BJ4, _ = random_batch(seed=3, targets=1)
  f = jax.device_get(FIDELITIES(box_BR4, box_mask_BR, gt_BJ4, np.ones((64, 1), bool)))
  value = np.where(box_mask_BR, f.iou_R, 0)
  best = np.maximum.accumulate(np.pad(value, ((0, 0), (1, 0))), axis=1)[:, :-1]
  sign = np.where(value >= CFG.h0, 1, -1)
  again = (value >= CFG.h0) & (best >= CFG.h0) & (value <= best)
  expected = sign + CFG.lam * np.maximum(0, value - best) - CFG.rho * again
  np.testing.assert_allclose(f.reward_R, np.where(box_mask_BR, expected, 0), atol=1e-6)


def test_jit_and_vmap_change_nothing():
  batch = random_batch(seed=2)
  mapped = FIDELITIES(*batch)
  for row in range(2):
    inputs = [x[row] for x in batch]
    plain, jitted = reward.fidelity(*inputs, CFG), FIDELITY(*inputs, CFG)
    for name in vars(plain):
      np.testing.assert_allclose(getattr(jitted, name), getattr(plain, name), atol=1e-6)
      np.testing.assert_allclose(getattr(mapped, name)[row], getattr(plain, name), atol=1e-6)


def test_gradients_are_finite_whatever_is_masked():
  box_BR4, box_mask_BR, gt_BJ4, gt_mask_BJ = random_batch(seed=4)
  box_mask_BR[:8], gt_mask_BJ[4:12], box_BR4[12:20] = False, False, 0.0

  def mean(box_BR4, gt_BJ4):
    return FIDELITIES(box_BR4, box_mask_BR, gt_BJ4, gt_mask_BJ).mean.sum()

  grads = jax.jit(jax.grad(mean, argnums=(0, 1)))(box_BR4, gt_BJ4)
  assert all(np.isfinite(g).all() for g in grads)
  assert np.abs(grads[0]).max() > 0


def test_total():
  cfg = reward.Config(w_answer=2.0, w_format=0.2, w_fidelity=0.5)
  assert reward.total(1.0, 1.0, -1.0, cfg) == pytest.approx(1.7)
  total_B = reward.total(jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0]), jnp.zeros(2), cfg)
  np.testing.assert_allclose(total_B, [0.2, 2.0])


def test_defaults_are_the_configuration_s():
  assert reward.Config(**config.default().reward) == reward.Config()


def test_wrong_shapes_are_named():
  boxes, mask = jnp.zeros((2, 4)), jnp.ones(2, bool)
  with pytest.raises(ValueError, match=r"box_M4 .*\[n, 4\].*\(4,\)"):
    reward.iou(boxes, jnp.zeros(4))
  with pytest.raises(ValueError, match=r"gt_J4 .*\(1, 2, 4\)"):
    reward.fidelity(boxes, mask, boxes[None], mask, CFG)
  with pytest.raises(ValueError, match=r"box_mask_R .*\(2,\).*\(3,\)"):
    reward.fidelity(boxes, jnp.ones(3, bool), boxes, mask, CFG)
  with pytest.raises(ValueError, match="gt_mask_J"):
    reward.fidelity(boxes, mask, boxes, jnp.ones((2, 1), bool), CFG)
