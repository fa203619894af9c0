"""Scores worked out by hand, updates, and the same update on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from virl_jax import types
from virl_jax.learner import microbatch
from virl_jax.learner import optim
from virl_jax.learner import pooled
from virl_jax.learner import state as state_lib
from virl_jax.learner import step as step_lib
from virl_jax.model import family
from virl_jax.model import head
from virl_jax.model import params as params_lib
from virl_jax.model import sharding
from virl_jax.model import tuning
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.rl import advantage
from virl_jax.rl import credit
from virl_jax.rl import loss
from virl_jax.rl import reward
from virl_jax.rollout import pack
from virl_jax.run import placement

TARGET = types.Box(0, 0, 40, 40)
HALF = types.Box(0, 0, 40, 20)     # IoU 0.5 with the target
AWAY = types.Box(100, 100, 140, 140)
# eps far above rounding noise, so that a gradient of 1e-9 is not blown up into a step.
OPTIM = optim.OptimConfig(learning_rate=1e-2, eps=1e-3)


def score_step(*args, **kwargs):
  """`step_lib.score_step`, its metrics as numbers."""
  scored, metrics = step_lib.score_step(*args, **kwargs)
  return scored, pooled.merge([metrics])


def update_step(*args):
  """`step_lib.update_step`, its metrics as numbers."""
  state, metrics = step_lib.update_step(*args)
  return state, pooled.merge([metrics])


def held(params):
  """A state that is only read."""
  return state_lib.TrainState(jnp.int32(0), params, (), jnp.float32(0.0))


def make_config(model, group_size=4, **kwargs):
  return state_lib.Config(model.cfg, group_size, optim=OPTIM, **kwargs)


def trajectories(cfg):
  """Two groups of four, whose boxes and answers are below; tokens and pictures are random."""
  rng = np.random.default_rng(0)
  grid = cfg.vision.grid

  def picture(rows, cols):
    patches = rng.normal(size=(4 * rows * cols, grid.values)).astype(np.float32)
    return types.ImageInput(patches, (2 * rows, 2 * cols), types.Box(0, 0, 200, 200))

  def row(task, shown, boxes, correct, stop=types.StopReason.ANSWERED):
    t = types.Trajectory(task, 0, np.array([10, *[cfg.image_token] * 4, 11, 12], np.int32), [], [shown], stop,
                         correct=correct)
    for box in boxes:
      t.turns.append(types.Turn("assistant", rng.integers(13, 60, 3).astype(np.int32), np.full(3, -1.0, np.float32),
                                region=box))
      t.images.append(picture(1, 2))
      t.turns.append(types.Turn("tool", np.array([cfg.image_token] * 2 + [13], np.int32)))
    t.turns.append(types.Turn("assistant", rng.integers(13, 60, 2).astype(np.int32), np.full(2, -2.0, np.float32)))
    return t

  with_box, without = types.Task("a", b"", "?", ("x",), (TARGET,)), types.Task("b", b"", "?", ("x",))
  one, two = picture(2, 2), picture(2, 2)
  return [row(with_box, one, [HALF, TARGET], True), row(with_box, one, [AWAY], False),
          row(with_box, one, [], True), row(with_box, one, [TARGET, TARGET], False, types.StopReason.OVERLONG),
          row(without, two, [AWAY], True), row(without, two, [], False), row(without, two, [], False),
          row(without, two, [AWAY], False)]


def packed(small, rows=None, **kwargs):
  cfg = dict(max_rounds=2, pad_tokens=8, pad_images=8) | kwargs
  return pack.pack(rows or trajectories(small.cfg), pack.Config(small.cfg.vision.grid, small.cfg.image_token, **cfg))


@pytest.fixture(scope="module")
def batch(small):
  return packed(small)


@pytest.fixture(scope="module")
def scored(small, batch):
  return score_step(held(small.params), None, batch, make_config(small))


REWARD = np.array([
    1 + 0.2 + np.mean([1 + 0.5 * 0.5, 1 + 0.5 * 0.5]),  # 0.5, then refined by 0.5
    0 + 0.2 - 1,
    1 + 0.2 - 1,                                        # never zoomed on a task with boxes
    0 + 0.0 + np.mean([1 + 0.5 * 1.0, 1 - 0.5]),        # the second zoom is redundant
    1.2, 0.2, 0.2, 0.2])                                # the task has no boxes: no fidelity


def test_rewards_classes_and_advantages_by_hand(batch, scored):
  s, _ = scored
  np.testing.assert_allclose(s.reward_B, REWARD, atol=1e-6)
  groups = REWARD.reshape(2, 4)
  wanted = ((groups - groups.mean(1, keepdims=True)) / groups.std(1, keepdims=True)).ravel()
  np.testing.assert_allclose(s.advantage_B, wanted, atol=1e-4)
  good, again, bad, none = credit.CORRECT, credit.REDUNDANT, credit.ERRONEOUS, credit.NONE
  assert s.class_BR.tolist() == [[good, good], [bad, none], [none, none], [good, again], *[[none, none]] * 4]
  np.testing.assert_allclose(s.iou_BR[:4], [[0.5, 1], [0, 0], [0, 0], [1, 1]], atol=1e-6)
  assert wanted[0] > 0 > wanted[1] and wanted[3] > 0
  modulator = np.array([[1.5, 1.5], [1.5, 1], [1, 1], [1.5, 0.75], *[[1, 1]] * 4])
  np.testing.assert_allclose(s.modulator_BR, modulator)
  for b in range(8):
    for t in range(batch.tokens_BT.shape[1]):
      k = batch.action_BT[b, t]
      want = wanted[b] * (modulator[b, k] if k >= 0 else 1) if batch.sampled_BT[b, t] else 0
      np.testing.assert_allclose(s.advantage_BT[b, t], want, atol=2e-4)


def test_log_probabilities_are_about_the_token_at_their_place(small, batch, scored):
  s, metrics = scored
  hidden = jax.jit(qwen.hidden, static_argnums=1)(
      small.params, small.cfg, batch.tokens_BT, batch.pos_BXT, batch.valid_BT, batch.vision_BT,
      jax.tree.map(lambda a: a[0], batch.rows.images))
  logits = np.asarray(jax.jit(qwen.logits, static_argnums=1)(small.params, small.cfg, hidden), np.float64)
  logits[..., list(small.cfg.banned)] = -np.inf
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  B, T = batch.tokens_BT.shape
  want = np.zeros((B, T))
  for b in range(B):
    for t in range(1, T):
      want[b, t] = logp[b, t - 1, batch.tokens_BT[b, t]]
  np.testing.assert_allclose(np.asarray(s.logp_old_BT)[batch.sampled_BT], want[batch.sampled_BT], atol=1e-5)
  np.testing.assert_array_equal(s.logp_ref_BT, s.logp_old_BT)
  gap = np.abs(want - batch.logp_sampler_BT)[batch.sampled_BT]
  np.testing.assert_allclose([metrics["rollout/logp_gap_max"], metrics["rollout/logp_gap_mean"]],
                             [gap.max(), gap.mean()], rtol=1e-4)


def test_metrics_by_hand(batch, scored):
  _, m = scored
  want = {
      "reward/total": REWARD.mean(), "reward/answer": 3 / 8, "acc_ans": 3 / 8, "reward/format": 7 / 8,
      "reward/fidelity": (1.25 - 1 - 1 + 1.0) / 8,
      "acc_rat": 4 / 5, "mean_iou": (0.5 + 1 + 0 + 1 + 1) / 5, "credit/redundant_share": 1 / 5,  # of judged actions
      "box/log_area_ratio": -1 / 5,  # HALF is half of TARGET; AWAY is as large
      "rationale_count": 7 / 8, "hit_rate": 2 / 4,  # of tasks with boxes
      "tokens/generated": batch.sampled_BT.sum(),
  }
  for name, value in want.items():
    np.testing.assert_allclose(m[name], value, rtol=1e-5, err_msg=name)
  assert all(np.isfinite(v) for v in m.values())


def test_boxes_are_measured_against_the_truth_that_they_are_judged_by(small, batch):
  box_BR4, gt_BJ4 = batch.box_BR4.copy(), np.zeros((8, 2, 4), np.float32)
  gt_BJ4[:4, 0], gt_BJ4[:4, 1] = (0, 0, 40, 40), (100, 100, 110, 110)
  gt_mask_BJ = np.repeat([[True, True], [False, False]], 4, axis=0)
  box_BR4[1, 0] = (100, 100, 120, 120)  # four times the second box
  box_BR4[3, 1] = (5, 5, 5, 5)          # no area at all counts as a pixel
  cfg, other = make_config(small), batch.replace(box_BR4=box_BR4, gt_BJ4=gt_BJ4, gt_mask_BJ=gt_mask_BJ)
  _, m = score_step(held(small.params), None, other, cfg)
  np.testing.assert_allclose(m["box/log_area_ratio"], (-1 + 0 + 2 + 0 - np.log2(1600)) / 5, rtol=1e-5)
  _, m = score_step(held(small.params), None, batch.replace(gt_mask_BJ=np.zeros((8, 1), bool)), cfg)
  assert m["box/log_area_ratio"] == 0 and all(np.isfinite(v) for v in m.values())


def test_a_reference_has_log_probabilities_of_its_own(small, batch, scored):
  other = jax.tree.map(lambda a: a * 0.9, small.params)
  s, _ = score_step(held(small.params), other, batch, make_config(small))
  np.testing.assert_allclose(s.logp_old_BT, scored[0].logp_old_BT, atol=1e-5)
  alone, _ = score_step(held(other), None, batch, make_config(small))
  np.testing.assert_allclose(s.logp_ref_BT, alone.logp_old_BT, atol=1e-5)
  assert np.abs(np.asarray(s.logp_ref_BT - s.logp_old_BT)[batch.sampled_BT]).max() > 0.1


def fresh(small):
  """A new state: updates donate it."""
  return state_lib.init(jax.tree.map(jnp.copy, small.params), OPTIM)


def poisoned(s, value=np.nan):
  """The batch with one advantage that is not finite."""
  b, t = np.argwhere(np.asarray(s.batch.sampled_BT))[-1]
  return s.replace(advantage_BT=s.advantage_BT.at[b, t].set(value))


def assert_skipped(state, s, cfg, frozen=None):
  """Checks that an update leaves the whole state the same, to the last bit, and on the same devices."""
  before, where = jax.device_get(state), [a.sharding for a in jax.tree.leaves(state)]
  state, metrics = update_step(state, s, cfg, frozen)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
  assert all(a.sharding.is_equivalent_to(w, a.ndim) and a.sharding.memory_kind == w.memory_kind
             for a, w in zip(jax.tree.leaves(state), where))
  assert (metrics["optim/skipped"], metrics["optim/spikes"]) == (1, 0) and not np.isfinite(metrics["optim/grad_norm"])


@pytest.fixture(scope="module")
def updated(small, scored):
  """The update that all other ways of computing it must give."""
  state, metrics = update_step(fresh(small), scored[0], make_config(small))
  return jax.device_get(state), metrics


def test_an_update_moves_every_parameter_and_starts_on_policy(small, updated):
  state, metrics = updated
  assert state.update == 1
  for path, moved in jax.tree_util.tree_flatten_with_path(
      jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, small.params))[0]:
    name = jax.tree_util.keystr(path)
    assert moved < 1.01 * OPTIM.learning_rate, name
    assert moved > (0 if "k_b" in name else 1e-6), name
  np.testing.assert_allclose([metrics["ppo/ratio_max"], metrics["ppo/clip_frac"], metrics["ppo/kl_old"]], [1, 0, 0],
                             atol=1e-5)
  np.testing.assert_allclose(metrics["optim/learning_rate"], OPTIM.learning_rate)
  assert metrics["optim/grad_norm"] > 0 and metrics["loss/entropy"] > 0
  assert all(np.isfinite(v) for v in metrics.values())


def test_the_loss_is_minus_the_mean_advantage(batch, scored, updated):
  want = -np.asarray(scored[0].advantage_BT)[batch.sampled_BT].mean()
  np.testing.assert_allclose(updated[1]["loss/policy"], want, atol=1e-5)


def test_masked_rows_count_for_nothing(small, batch, scored):
  """Whatever they hold: the gradient, and so the update, stays the same to the last bit."""
  s, cfg = scored[0], make_config(small)
  mask = np.array([True] * 4 + [False] * 4)
  s = s.replace(batch=s.batch.replace(row_mask_B=mask))
  first, m = update_step(fresh(small), s, cfg)
  tokens = np.where(mask[:, None], batch.tokens_BT, 33)
  junk = s.replace(batch=s.batch.replace(tokens_BT=tokens), advantage_BT=jnp.where(mask[:, None], s.advantage_BT, 9.0),
                   logp_old_BT=jnp.where(mask[:, None], s.logp_old_BT, jnp.nan))
  second, m_junk = update_step(fresh(small), junk, cfg)
  jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
  assert m == m_junk and np.isfinite(m["loss/total"])
  # And they count when they are not masked.
  third, _ = update_step(fresh(small), scored[0], cfg)
  assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(third.params)))


def test_masked_rows_leave_the_others_advantages_alone(small, batch):
  mask = np.array([True, True, True, False] * 2)
  s, _ = score_step(held(small.params), None, batch.replace(row_mask_B=mask), make_config(small))
  groups = REWARD.reshape(2, 4)[:, :3]
  want = np.pad((groups - groups.mean(1, keepdims=True)) / groups.std(1, keepdims=True), ((0, 0), (0, 1))).ravel()
  np.testing.assert_allclose(s.advantage_B, want, atol=1e-4)
  assert not np.asarray(s.advantage_BT)[3].any()


@pytest.mark.parametrize("sizes, micro, together", [
    pytest.param((8, 1, 1), 1, 0, marks=pytest.mark.slow), pytest.param((1, 8, 1), 1, 0, marks=pytest.mark.slow),
    pytest.param((2, 2, 2), 1, 0, marks=pytest.mark.slow), ((1, 2, 4), 2, 0), ((1, 2, 1), 4, 16)])
def test_several_devices_compute_what_one_does(small, batch, scored, updated, sizes, micro, together):
  """Each device sees only the images of its own rows, some at a time or all; any number of microbatches."""
  mesh = sharding.make(*sizes, devices=jax.devices()[:np.prod(sizes)])
  # Through numpy copies: what is donated must not share memory with the fixture.
  params = jax.device_put(jax.tree.map(np.array, small.params), sharding.param_shardings(qwen.specs(small.cfg), mesh))
  cfg, shards = make_config(small, mesh=mesh), sharding.row_shards(mesh)
  cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, patches_together=together, gather_vision=True))
  there = packed(small, shards=shards, microbatch_tokens=batch.tokens_BT.size // shards // micro)
  assert len(there.rows.index_MUT) == micro
  order = np.arange(8) if there.order_B is None else there.order_B
  dealt = np.argsort(order)  # rows are dealt to shards by length
  there = placement.place_batch(there, mesh)
  got = jax.tree.map(lambda a: np.asarray(a)[dealt], scored[0].replace(batch=None))
  got = placement.place(got, mesh).replace(batch=there)
  if sizes in ((2, 2, 2), (1, 2, 4)):  # the others would show nothing new
    got, _ = score_step(held(params), None, there, cfg)
    np.testing.assert_allclose(np.asarray(got.reward_B)[order], REWARD, atol=1e-5)
    for name in ("logp_old_BT", "advantage_BT"):
      mine, want = (np.asarray(getattr(s, name)) for s in (got, scored[0]))
      np.testing.assert_allclose(mine[order][batch.valid_BT], want[batch.valid_BT], atol=1e-4, err_msg=name)
  state = state_lib.init(params, OPTIM)
  where = [a.sharding for a in jax.tree.leaves(state)]
  moments = [a.sharding for a in jax.tree.leaves(state.opt_state) if a.ndim]
  assert moments == 2 * [a.sharding for a in jax.tree.leaves(params)]  # Adam's two, split as the parameters
  state, update_metrics = update_step(state, got, cfg)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, updated[0].params)
  # An update leaves everything where it is, so that the next finds its program compiled.
  assert all(a.sharding.is_equivalent_to(s, a.ndim) for a, s in zip(jax.tree.leaves(state), where))
  for name, value in updated[1].items():
    np.testing.assert_allclose(update_metrics[name], value, atol=1e-4, err_msg=name)
  if sizes == (2, 2, 2):  # one row, of one device, is not finite: all of them skip the update
    assert_skipped(state, poisoned(got), cfg)


LORA = tuning.Config(rank=4, alpha=8.0, freeze_vision=True)


def tuned(small, how):
  """The same model with fewer trained parameters."""
  return dataclasses.replace(small, cfg=dataclasses.replace(small.cfg, tuning=how))


@pytest.fixture(scope="module")
def adapters(small):
  """Adapters that are not zero."""
  rng = np.random.default_rng(7)
  table = family.tables(tuned(small, LORA).cfg)[0]
  return params_lib.map_specs(lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape), jnp.float32), table)


@pytest.fixture(scope="module")
def adapted(small, batch, adapters):
  """Scores and an update of those adapters."""
  cfg = make_config(tuned(small, LORA))
  s, _ = score_step(held(adapters), None, batch, cfg, frozen=small.params)
  state = state_lib.init(jax.tree.map(jnp.copy, adapters), OPTIM)
  state, metrics = update_step(state, s, cfg, small.params)
  return s, jax.device_get(state), metrics


def test_adapters_alone_are_trained(small, scored, adapters, adapted):
  s, state, metrics = adapted
  assert np.abs(np.asarray(s.logp_old_BT - scored[0].logp_old_BT)).max() > 0.1
  assert jax.tree.structure(state.params) == jax.tree.structure(adapters)
  # Neither a bias nor the head has an adapter's gradient.
  assert all(np.abs(a - b).max() > 1e-6 for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(adapters)))
  assert sum(a.size for a in jax.tree.leaves(state.opt_state)) < 2.1 * sum(a.size for a in jax.tree.leaves(adapters))
  assert metrics["ppo/ratio_max"] == pytest.approx(1, abs=1e-5)
  state = jax.tree.map(jnp.asarray, state)
  assert_skipped(state, poisoned(s), make_config(tuned(small, LORA)), small.params)


def test_fresh_adapters_are_the_base(small, batch, scored):
  """In all scores of a batch, to the last bit."""
  low = tuned(small, LORA)
  fresh_ones = params_lib.init(family.tables(low.cfg)[0], jax.random.key(0), jnp.float32)
  s, metrics = score_step(held(fresh_ones), None, batch, make_config(low), frozen=small.params)
  np.testing.assert_array_equal(s.logp_old_BT, scored[0].logp_old_BT)
  assert metrics == scored[1]


def test_an_adapters_gradient_is_the_matrixs(small, scored):
  """With b = 0 and a matrix's gradient g, the gradient of b is scale a' g, and that of a is 0; the head gets none."""
  low, cfg = tuned(small, LORA), make_config(small)
  fresh_ones = params_lib.init(family.tables(low.cfg)[0], jax.random.key(0), jnp.float32)
  nll = lambda found, here_BT, whole_BT: -jnp.where(here_BT, found[0] + 0.3 * found[1], 0.0).sum()
  run = jax.jit(lambda params, frozen, batch, cfg: microbatch.gradients(held(params), frozen, batch, cfg, nll)[0][0],
                static_argnums=3)
  want = run(small.params, None, scored[0].batch, cfg)["text"]["blocks"]
  got = run(fresh_ones, small.params, scored[0].batch, make_config(low))["text"]["blocks"]
  assert set(got) == {"q_w", "k_w", "v_w", "o_w", "gate_w", "up_w", "down_w"}
  for name, by in got.items():
    a = np.asarray(fresh_ones["text"]["blocks"][name]["a"])
    n = a.ndim - 2  # axes of inputs
    for layer in range(len(a)):
      b = LORA.scale * np.tensordot(a[layer], np.asarray(want[name][layer]), (range(n), range(n)))
      np.testing.assert_allclose(by["b"][layer], b, atol=1e-4 * np.abs(b).max(), err_msg=name)
    assert not np.asarray(by["a"]).any() and np.abs(by["b"]).max() > 0


@pytest.mark.parametrize("sizes, micro", [
    pytest.param((8, 1, 1), 1, marks=pytest.mark.slow), pytest.param((1, 8, 1), 1, marks=pytest.mark.slow),
    pytest.param((2, 2, 2), 2, marks=pytest.mark.slow), ((1, 2, 4), 4)])
def test_adapters_on_several_devices(small, adapters, adapted, sizes, micro):
  """The update and the log-probabilities are those of one device, with any sharding and any microbatches."""
  s, want, want_metrics = adapted
  mesh = sharding.make(*sizes)
  low, shards = tuned(small, LORA), sharding.row_shards(mesh)
  cfg = make_config(low, mesh=mesh)
  placed = lambda tree, table: jax.device_put(jax.tree.map(np.array, tree), sharding.param_shardings(table, mesh))
  trained, frozen = (placed(tree, table) for tree, table in zip((adapters, small.params), family.tables(low.cfg)))
  there = packed(small, shards=shards, microbatch_tokens=s.batch.tokens_BT.size // shards // micro)
  order = np.arange(8) if there.order_B is None else there.order_B
  got, _ = score_step(held(trained), None, placement.place_batch(there, mesh), cfg, frozen=frozen)
  valid_BT = np.asarray(s.batch.valid_BT)
  np.testing.assert_allclose(np.asarray(got.logp_old_BT)[order][valid_BT], np.asarray(s.logp_old_BT)[valid_BT],
                             atol=1e-4)
  state, metrics = update_step(state_lib.init(trained, OPTIM), got, cfg, frozen)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, want.params)
  assert metrics == pytest.approx(want_metrics, abs=1e-4)


def test_what_is_frozen_stays_and_the_rest_learns_as_ever(small, batch, scored):
  """A frozen tower: the same gradients for the decoder; the tower is kept in the compute dtype."""
  unclipped = dataclasses.replace(OPTIM, clip_norm=0.0)  # the norm depends on what is trained
  frozen_tower = tuning.Config(freeze_vision=True)
  trained, frozen = tuning.cut(jax.tree.map(jnp.copy, small.params), frozen_tower)
  found = []
  for model, params, rest in ((small, jax.tree.map(jnp.copy, small.params), None),
                              (tuned(small, frozen_tower), trained, frozen)):
    cfg = dataclasses.replace(make_config(model), optim=unclipped)
    found.append(update_step(state_lib.init(params, unclipped), scored[0], cfg, rest)[0].params)
  everything, decoder = found
  assert set(decoder) == {"text"}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), decoder["text"], everything["text"])
  jax.tree.map(np.testing.assert_array_equal, frozen["vision"], small.params["vision"])


@pytest.mark.parametrize("loss_cfg, critic", [
    pytest.param(dict(aggregate="token", entropy_coef=0.1, kl_coef=0.1), True, marks=pytest.mark.slow),
    (dict(aggregate="sequence"), False),
    pytest.param(dict(aggregate="constant", norm_tokens=7), False, marks=pytest.mark.slow),
    pytest.param(dict(kind="gspo", aggregate="sequence"), False, marks=pytest.mark.slow)])
def test_any_number_of_microbatches_gives_the_same_update(small, loss_cfg, critic):
  """The mean is over the tokens of the minibatch, masked rows or not, whatever microbatch they are in."""
  o = loss.Config(**loss_cfg)
  a = advantage.Config(kind="gae") if critic else advantage.Config()
  cfg = make_config(small, loss=o, advantage=a)
  ref = jax.tree.map(lambda a: a * 0.9, small.params) if o.kl_coef else None
  found = []
  ways = [(1, False), (8, False)] + ([(2, False), (4, False), (2, True)] if critic else [])
  for micro, join in ways:
    b = packed(small, join=join, microbatch_tokens=8 // micro * 24)
    b = b.replace(row_mask_B=np.array([True, True, False, True] * 2))
    assert b.tokens_BT.shape[1] == (32 if join else 24)
    state = state_lib.init(jax.tree.map(jnp.copy, small.params), OPTIM, o.kl_coef,
                                small.cfg.text.hidden if critic else 0)
    s, _ = score_step(state, ref, b, cfg)
    moved = s.replace(logp_old_BT=s.logp_old_BT - 0.1 * jnp.cos(jnp.arange(s.logp_old_BT.shape[1]))[None])
    state, metrics = update_step(state, moved, cfg)
    used = (b.rows.lengths_MUS > 0).any((1, 2)).sum()
    found.append((used, state.params, state.critic, metrics))
  (_, want, want_critic, want_metrics), *others = found
  assert [used for used, *_ in others] == [micro for micro, _ in ways[1:]]
  for _, params, value, metrics in others:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), (params, value), (want, want_critic))
    for name, value in want_metrics.items():
      np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_microbatches_without_a_token_cost_nothing(small, batch, scored, updated):
  """They are padding, so that few programs serve all batches."""
  rows = jax.tree.map(lambda a: np.concatenate([a, np.full_like(a, 0)]), batch.rows)
  rows = rows.replace(index_MUT=np.concatenate([batch.rows.index_MUT, np.full_like(batch.rows.index_MUT, -1)]))
  s = scored[0].replace(batch=batch.replace(rows=rows))
  state, metrics = update_step(fresh(small), s, make_config(small))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, updated[0].params)
  assert metrics == pytest.approx(updated[1], abs=1e-5)
  _, said = score_step(held(small.params), None, s.batch, make_config(small))
  assert said["tokens/padding_share"] == pytest.approx(1 - batch.valid_BT.mean())


def joined(small):
  """The batch with several trajectories to a row."""
  return packed(small, join=True, pad_joined=1)


def test_joined_rows_compute_what_rows_of_their_own_do(small, batch, scored, updated):
  together = joined(small)
  assert together.rows.index_MUT.shape[:2] == (1, 4) and len(together.tokens_BT) == 8
  s, metrics = score_step(held(small.params), None, together, make_config(small))
  T = batch.tokens_BT.shape[1]
  for name in ("logp_old_BT", "advantage_BT"):
    got, want = (np.asarray(getattr(x, name))[:, :T][batch.valid_BT] for x in (s, scored[0]))
    np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)
  assert metrics.pop("tokens/padding_share") < scored[1]["tokens/padding_share"]
  for name, value in metrics.items():
    np.testing.assert_allclose(value, scored[1][name], rtol=1e-4, atol=1e-6, err_msg=name)
  state, metrics = update_step(fresh(small), s, make_config(small))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, updated[0].params)
  for name, value in updated[1].items():
    np.testing.assert_allclose(metrics[name], value, atol=1e-4, err_msg=name)


def test_a_critic_values_tokens_of_joined_rows_as_of_their_own(small, batch):
  critic = {"w": jnp.asarray(np.random.default_rng(0).normal(size=small.cfg.text.hidden), jnp.float32),
            "b": jnp.full(1, 0.5)}
  run = jax.jit(lambda b: microbatch.outputs(small.params, make_config(small), b, critic))
  T = batch.tokens_BT.shape[1]
  for got, want in zip(run(joined(small)), run(batch)):
    np.testing.assert_allclose(got[:, :T][batch.valid_BT], want[batch.valid_BT], atol=1e-5)
    assert not np.asarray(got)[:, 0].any()


@pytest.mark.parametrize("reference", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_single_update_computes_the_old_log_probabilities_itself(small, batch, scored, reference):
  """Scoring leaves them out, and the results of the update, metrics included, are the same."""
  ref = jax.tree.map(lambda a: a * 0.9, small.params) if reference else None
  o = loss.Config(kl_coef=0.1 * reference, sampler_cap=2.0)
  found = []
  for single in (False, True):
    cfg = make_config(small, loss=o, single_update=single)
    s, metrics = score_step(held(small.params), ref, batch, cfg)
    assert (s.logp_old_BT is None) == single and (s.logp_ref_BT is None) == (single and not reference)
    state, more = update_step(fresh(small), s, cfg)
    found.append((state.params, metrics | more))
  (want, want_metrics), (got, metrics) = found
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)
  assert metrics.keys() == want_metrics.keys() and metrics["rollout/logp_gap_max"] > 0
  for name, value in want_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_scoring_keeps_log_probabilities_where_it_needs_them(small, batch):
  run = lambda state, **kwargs: jax.eval_shape(
      lambda s, b: step_lib.score_step(s, None, b, make_config(small, single_update=True, **kwargs)), state, batch)[0]
  o = loss.Config(kl_coef=0.1, kl_in_reward=True, kl_estimator="k1")
  assert run(held(small.params), loss=o).logp_old_BT is not None
  critic = {"w": jnp.zeros(small.cfg.text.hidden), "b": jnp.zeros(1)}
  s = run(held(small.params).replace(critic=critic), advantage=advantage.Config(kind="gae"))
  assert s.logp_old_BT is not None and s.value_old_BT is not None


def test_imitation_lowers_the_loss(small, batch):
  cfg, state, losses = make_config(small, 1), fresh(small), []
  for _ in range(5):
    state, metrics = step_lib.imitate_step(state, batch, cfg)
    losses.append(float(metrics["loss/total"].value))
  assert all(b < a for a, b in zip(losses, losses[1:])) and losses[-1] < losses[0] - 0.1
  assert int(state.update) == 5
  logp = microbatch.outputs(small.params, cfg, batch)[0]
  np.testing.assert_allclose(losses[0], -np.asarray(logp)[batch.sampled_BT].mean(), rtol=1e-5)


def cross_entropy(params, model, batch):
  """By hand: nats a token, over the assistant's tokens; each row is one trajectory."""
  images = jax.tree.map(lambda a: a[0], batch.rows.images)
  h = qwen.hidden(params, model.cfg, batch.tokens_BT, batch.pos_BXT, batch.valid_BT, batch.vision_BT, images)
  logp_BTV = jax.nn.log_softmax(head.policy_logits(params, model.cfg, h, 1.0))[:, :-1]
  said_BT = jnp.asarray(batch.sampled_BT)[:, 1:]
  logp_BT = jnp.take_along_axis(logp_BTV, jnp.asarray(batch.tokens_BT)[:, 1:, None], 2)[..., 0]
  right = jnp.where(said_BT, logp_BTV.argmax(-1) == batch.tokens_BT[:, 1:], 0).sum() / said_BT.sum()
  return -jnp.where(said_BT, logp_BT, 0.0).sum() / said_BT.sum(), right


def test_imitation_follows_the_gradient_of_the_cross_entropy(small, batch):
  """And so does PPO's update where every advantage is 1; without assistant's tokens there is no gradient."""
  plain = optim.OptimConfig(learning_rate=1e-2, eps=1e-3, clip_norm=0.0)
  cfg = dataclasses.replace(make_config(small, single_update=True), optim=plain)
  (nll, right), wanted = jax.jit(jax.value_and_grad(lambda p: cross_entropy(p, small, batch), has_aux=True))(
      small.params)
  gradient = lambda state: jax.tree.map(lambda m: m / (1 - plain.b1), optax.tree.get(state.opt_state, "mu"))
  start = lambda: state_lib.init(jax.tree.map(jnp.copy, small.params), plain)
  state, metrics = step_lib.imitate_step(start(), batch, cfg)
  found = pooled.merge([metrics])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient(state), wanted)
  assert found["optim/grad_norm"] > 0.1 and max(float(jnp.abs(g).max()) for g in jax.tree.leaves(wanted)) > 0.01
  np.testing.assert_allclose([found["loss/nll"], found["loss/total"], found["loss/accuracy"]], [nll, nll, right],
                             rtol=1e-5)
  shown, of_batch = step_lib.shown(batch, cfg)
  by_reward, _ = step_lib.update_step(start(), shown, cfg)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(by_reward), gradient(state))
  assert pooled.merge([of_batch])["tokens/trained"] == batch.sampled_BT.sum()
  np.testing.assert_allclose(shown.reward_B, REWARD, atol=1e-6)
  state, metrics = step_lib.imitate_step(start(), batch.replace(sampled_BT=np.zeros_like(batch.sampled_BT)), cfg)
  assert pooled.merge([metrics])["optim/grad_norm"] == 0 and not any(
      np.any(g) for g in jax.tree.leaves(gradient(state)))


# --- other algorithms: how the kernels are put together; the kernels have tests of their own ------------------


@pytest.fixture
def score(small, batch, monkeypatch):
  """score_step with another algorithm, and a model that costs nothing: logp -1, reference -1.5, values 0.5."""
  def outputs(params, cfg, batch, critic=None):
    one = jnp.ones(batch.tokens_BT.shape)
    return -1.5 * one if "other" in params else -one, one, None if critic is None else 0.5 * one

  def run(h0=None, mask=None, batches=None, coef=None, **kwargs):
    cfg = make_config(small, **kwargs)
    rows = batch if mask is None else batch.replace(row_mask_B=mask)
    state = held(small.params).replace(kl_coef=jnp.float32(cfg.loss.kl_coef if coef is None else coef))
    if cfg.advantage.kind == "gae":
      state = state.replace(critic={"w": jnp.zeros(1), "b": jnp.zeros(1)})
    monkeypatch.setattr(microbatch, "outputs", outputs)
    with jax.disable_jit():
      if batches is not None:
        return step_lib.score(state, {"other": jnp.ones(1)}, jax.tree.map(jnp.asarray, batches), cfg, h0)
      return score_step(state, {"other": jnp.ones(1)}, jax.tree.map(jnp.asarray, rows), cfg, h0)

  return run


def test_rloo_and_additive_credit(batch, score):
  s, _ = score(advantage=advantage.Config(kind="rloo"), credit=credit.Config(kind="additive", step_weight=0.5))
  groups = REWARD.reshape(2, 4)
  want = ((groups - groups.mean(1, keepdims=True)) * 4 / 3).ravel()
  np.testing.assert_allclose(s.advantage_B, want, atol=1e-5)
  # Rewards of the first group's actions; the second group's actions can't be judged.
  earned = np.array([1.25, 1.25, -1.0, 1.5, 0.5])
  z = 0.5 * (earned - earned.mean()) / earned.std()
  for b, k, i in ((0, 0, 0), (0, 1, 1), (1, 0, 2), (3, 0, 3), (3, 1, 4)):
    at = batch.sampled_BT[b] & (batch.action_BT[b] == k)
    np.testing.assert_allclose(s.advantage_BT[b][at], want[b] + z[i], atol=1e-5)
  for b in range(8):
    at = batch.sampled_BT[b] & ((batch.action_BT[b] < 0) | (b >= 4))
    np.testing.assert_allclose(s.advantage_BT[b][at], want[b], atol=1e-5)


def test_soft_credit_knows_how_near_the_threshold_an_action_is(score):
  s, _ = score(credit=credit.Config(kind="soft", softness=0.1), reward=reward.Config(h0=0.4))
  near = 0.5 + 1 / (1 + np.exp(-1.0))  # IoU 0.5, one softness above
  np.testing.assert_allclose(s.modulator_BR[0, 0], near, atol=1e-5)
  np.testing.assert_allclose(s.modulator_BR[0, 1], 0.5 + 1 / (1 + np.exp(-6.0)), atol=1e-5)


def test_the_scale_can_be_kept(batch, score):
  s, _ = score(credit=credit.Config(keep_scale=True))
  got = np.abs(np.asarray(s.advantage_BT))[batch.sampled_BT].mean()
  plain = np.abs(np.broadcast_to(np.asarray(s.advantage_B)[:, None], batch.sampled_BT.shape))[batch.sampled_BT].mean()
  np.testing.assert_allclose(got, plain, rtol=1e-5)


def test_a_threshold_that_moves_changes_the_reward_and_not_the_metrics(score):
  strict, m_strict = score(h0=np.float32(0.6))
  plain, m_plain = score()
  assert strict.class_BR[0].tolist() == [credit.ERRONEOUS, credit.CORRECT]
  assert plain.class_BR[0].tolist() == [credit.CORRECT, credit.CORRECT]
  assert strict.reward_B[0] < plain.reward_B[0]
  for name in ("acc_rat", "hit_rate", "mean_iou"):
    assert m_strict[name] == m_plain[name]


def parts_of(small, batch):
  """The batch's two groups as minibatches of their own, the first padded further."""
  one, two = trajectories(small.cfg)[:4], trajectories(small.cfg)[4:]
  return [packed(small, one, pad_tokens=32), packed(small, two)]


@pytest.mark.parametrize("kwargs", [
    dict(advantage=advantage.Config(kind="batch")),
    pytest.param(dict(advantage=advantage.Config(kind="gae")), marks=pytest.mark.slow),
    dict(credit=credit.Config(keep_scale=True)),
    pytest.param(dict(advantage=advantage.Config(kind="gae"), credit=credit.Config(keep_scale=True)),
                 marks=pytest.mark.slow)])
def test_statistics_are_of_the_batch_and_not_of_a_minibatch(small, batch, score, kwargs):
  whole, _ = score(**kwargs)
  parts = score(batches=parts_of(small, batch), **kwargs)
  alone = [score(batches=[part], **kwargs)[0] for part in parts_of(small, batch)]
  for got, one, rows in zip(parts, alone, (slice(0, 4), slice(4, 8))):
    sampled = np.asarray(got[0].batch.sampled_BT)
    want = np.asarray(whole.advantage_BT)[rows][batch.sampled_BT[rows]]
    np.testing.assert_allclose(np.asarray(got[0].advantage_BT)[sampled], want, atol=1e-5)
    assert np.abs(np.asarray(one[0].advantage_BT)[sampled] - want).max() > 0.01, "a minibatch by itself is another"


def test_rewards_that_are_equal_throughout_give_exactly_no_advantage(small, batch, score):
  """Also where their mean, pooled over minibatches, would be rounded."""
  cfg = reward.Config(w_answer=0.0, w_fidelity=0.0, w_format=0.0, no_action=0.0)
  sevenths = [part.replace(answer_B=np.ones(4, np.float32)) for part in parts_of(small, batch)]
  for s, _ in score(batches=sevenths, reward=dataclasses.replace(cfg, w_answer=1 / 7),
                    advantage=advantage.Config(kind="batch", std_floor=0.0)):
    np.testing.assert_allclose(s.reward_B, 1 / 7)
    assert not np.asarray(s.advantage_BT).any()


def test_additive_credit_compares_with_rows_that_count(batch, score):
  rows = np.array([True, True, True, False] + [True] * 4)
  s, _ = score(mask=rows, credit=credit.Config(kind="additive", step_weight=0.5))
  earned = np.array([1.25, 1.25, -1.0])  # without the fourth row's 1.5 and 0.5
  z = 0.5 * (earned - earned.mean()) / earned.std()
  for b, k, i in ((0, 0, 0), (0, 1, 1), (1, 0, 2)):
    at = batch.sampled_BT[b] & (batch.action_BT[b] == k)
    np.testing.assert_allclose(s.advantage_BT[b][at], s.advantage_B[b] + z[i], atol=1e-5)
  assert not np.asarray(s.advantage_BT[3]).any()


def test_a_small_spread_is_not_blown_up(batch, score):
  """All answers right and all boxes good: only noise of the IoU differs."""
  near = np.array([40, 39.8, 39.6, 39.9, 40, 39.7, 39.9, 39.8], np.float32)
  boxes = np.zeros((8, 2, 4), np.float32)
  boxes[:, 0, 2], boxes[:, 0, 3] = 40, near
  rows = batch.replace(
      box_BR4=boxes, box_mask_BR=np.tile([True, False], (8, 1)), answer_B=np.ones(8, np.float32),
      format_B=np.ones(8, np.float32), gt_BJ4=np.tile(np.array([[0, 0, 40, 40]], np.float32), (8, 1, 1)),
      gt_mask_BJ=np.ones((8, 1), bool))
  run = lambda **kwargs: score(batches=[rows], advantage=advantage.Config(**kwargs))[0]
  size = lambda **kwargs: float(np.abs(run(**kwargs)[0].advantage_B).mean())
  assert size(std_floor=0.0) > 0.8
  assert size() < 0.6
  assert size(std_floor=0.1) < 0.03
  s, metrics = run(drop_equal=True)
  assert not np.asarray(s.batch.row_mask_B).any() and pooled.merge([metrics])["advantage/informative_share"] == 0.0
  _, metrics = run(least_spread=0.0)
  assert pooled.merge([metrics])["advantage/informative_share"] == 1.0


def test_equal_groups_are_equal_whatever_the_kl(small, batch, score):
  """The KL in the reward differs between trajectories; a group with equal rewards before it is left out even so."""
  o = loss.Config(kl_coef=0.1, kl_in_reward=True, kl_estimator="k1")
  rows = np.array([True] * 4 + [False, True, True, True])
  s, m = score(mask=rows, loss=o, advantage=advantage.Config(drop_equal=True))
  assert len(set(np.asarray(s.reward_B)[5:].tolist())) > 1
  assert np.asarray(s.batch.row_mask_B).tolist() == [True] * 4 + [False] * 4


def test_tasks_without_answers_are_neither_right_nor_wrong(batch, score):
  _, m = score()
  assert m["acc_ans"] == 3 / 8 and m["data/no_answers_share"] == 0.0
  (_, metrics), = score(batches=[batch.replace(answerable_B=np.array([True] * 4 + [False] * 4))])
  m = pooled.merge([metrics])
  assert m["acc_ans"] == 2 / 4 and m["data/no_answers_share"] == 0.5 and m["reward/answer"] == 3 / 8


def test_equal_groups_are_left_out_of_the_means(batch, score):
  rows = np.array([True] * 4 + [False, True, True, True])  # the rest of the second group has equal rewards
  s, m = score(mask=rows, advantage=advantage.Config(drop_equal=True))
  assert np.asarray(s.batch.row_mask_B).tolist() == [True] * 4 + [False] * 4
  assert m["advantage/informative_share"] == 0.5
  s, _ = score(mask=rows)
  assert np.asarray(s.batch.row_mask_B).tolist() == rows.tolist()


def test_kl_in_the_reward(batch, score):
  s, m = score(loss=loss.Config(kl_coef=0.1, kl_in_reward=True, kl_estimator="k1"))
  np.testing.assert_allclose(s.reward_B, REWARD - 0.1 * 0.5 * batch.sampled_BT.sum(1), atol=1e-5)
  np.testing.assert_allclose(m["reward/total"], REWARD.mean(), rtol=1e-5)  # what the task gave
  # With a critic each token's KL is in its own reward: with lambda 1, the KL still to come is that of later tokens.
  o = loss.Config(kl_coef=0.1, kl_in_reward=True, kl_estimator="k1")
  plain, _ = score(advantage=advantage.Config(kind="gae"))
  s, _ = score(advantage=advantage.Config(kind="gae"), loss=o)
  for b in range(8):
    at = np.flatnonzero(batch.sampled_BT[b])
    paid = np.asarray(plain.return_BT[b] - s.return_BT[b])[at]
    np.testing.assert_allclose(paid, 0.05 * np.arange(len(at), 0, -1), atol=1e-5)
  s, _ = score(advantage=advantage.Config(kind="gae", lam=0.0), loss=o)
  paid = np.asarray(score(advantage=advantage.Config(kind="gae", lam=0.0))[0].return_BT - s.return_BT)
  np.testing.assert_allclose(paid[batch.sampled_BT], 0.05, atol=1e-5)


def test_a_critic_gives_each_token_an_advantage(batch, score):
  s, _ = score(advantage=advantage.Config(kind="gae", gamma=1.0, lam=1.0))
  trained = batch.sampled_BT
  # With lambda 1: what is still to come, minus the value 0.5; whitened over the batch.
  fid_0, rest_0 = [1.25 / 2, 1.25 / 2], 1.2
  to_come = np.zeros(trained.shape)
  for b in range(8):
    for t in np.flatnonzero(trained[b]):
      to_come[b, t] = REWARD[b]
  for t in np.flatnonzero(trained[0]):
    k = batch.action_BT[0, t]
    to_come[0, t] = sum(fid_0[max(k, 0):] if k >= 0 else []) + rest_0
  for t in np.flatnonzero(trained[1] & (batch.action_BT[1] < 0)):
    to_come[1, t] = 0.2
  for t in np.flatnonzero(trained[3]):
    k = batch.action_BT[3, t]
    to_come[3, t] = {0: 1.5 / 2 + 0.5 / 2, 1: 0.5 / 2, -1: 0.0}[k]
  np.testing.assert_allclose(np.asarray(s.return_BT)[trained], to_come[trained], atol=1e-5)
  raw = (to_come - 0.5)[trained]
  plain = np.zeros(trained.shape)
  plain[trained] = (raw - raw.mean()) / raw.std()
  for b, k, c in ((0, 0, 0), (0, 1, 0), (1, 0, 2), (3, 0, 0), (3, 1, 1)):
    at = trained[b] & (batch.action_BT[b] == k)
    praise, blame = ((1.5, 0.5), (0.75, 1.25), (0.5, 1.5))[c]
    m = np.where(plain[b] > 0, praise, blame)
    np.testing.assert_allclose(s.advantage_BT[b][at], (plain[b] * m)[at], atol=1e-4)
  at = trained[0] & (batch.action_BT[0] < 0)
  np.testing.assert_allclose(s.advantage_BT[0][at], plain[0][at], atol=1e-4)


def test_rows_that_do_not_count_are_not_whitened_in(batch, score):
  rows = np.array([True, True, False, True, False, True, True, True])
  s, _ = score(mask=rows, advantage=advantage.Config(kind="gae"), credit=credit.Config(kind="none"))
  trained = batch.sampled_BT & rows[:, None]
  raw = np.asarray(s.return_BT)[trained] - 0.5
  np.testing.assert_allclose(np.asarray(s.advantage_BT)[trained], (raw - raw.mean()) / raw.std(), atol=1e-4)
  assert not np.asarray(s.advantage_BT)[~trained].any()


def test_the_coefficient_that_adapts_is_the_state_s(small, batch, score, monkeypatch):
  o = loss.Config(kl_coef=0.1, kl_in_reward=True, kl_estimator="k1")
  s, _ = score(loss=o, coef=0.7)
  np.testing.assert_allclose(s.reward_B, REWARD - 0.7 * 0.5 * batch.sampled_BT.sum(1), atol=1e-5)
  monkeypatch.undo()
  cfg = make_config(small, loss=loss.Config(kl_coef=0.1, kl_target=1e-6, kl_horizon=8.0))
  ref = jax.tree.map(lambda a: a * 0.9, small.params)
  s, _ = score_step(held(small.params), ref, batch, cfg)
  for coef in (0.0, 0.5):
    state, m = update_step(fresh(small).replace(kl_coef=jnp.float32(coef)), s, cfg)
    assert m["loss/kl"] > 0
    np.testing.assert_allclose(m["loss/total"] - m["loss/policy"], coef * m["loss/kl"], atol=1e-6)
    np.testing.assert_allclose(state.kl_coef, 1.2 * coef, rtol=1e-5)  # far above the target: a fifth more
    np.testing.assert_allclose(m["loss/kl_coef"], coef, rtol=1e-6)


def test_a_value_s_step_is_clipped_about_what_it_was(small, batch):
  """About the values that scored the batch, not about the present ones."""
  cfg = make_config(small, advantage=advantage.Config(kind="gae"), loss=loss.Config(value_clip=0.01))
  cfg = dataclasses.replace(cfg, optim=dataclasses.replace(OPTIM, learning_rate=0.0, critic_learning_rate=0.05))
  state = state_lib.init(jax.tree.map(jnp.copy, small.params), cfg.optim, 0.0, small.cfg.text.hidden)
  s, _ = score_step(state, None, batch, cfg)
  state, first = update_step(state, s, cfg)
  assert first["critic/clip_frac"] == 0
  value = np.asarray(microbatch.outputs(state.params, cfg, batch, state.critic)[2])[batch.sampled_BT]
  want, old = (np.asarray(x)[batch.sampled_BT] for x in (s.return_BT, s.value_old_BT))
  held_back = np.square(old + np.clip(value - old, -0.01, 0.01) - want)
  _, second = update_step(state, s, cfg)
  worse = np.maximum(held_back, np.square(value - want))
  np.testing.assert_allclose(second["critic/loss"], 0.5 * worse.mean(), rtol=1e-3)
  assert second["critic/clip_frac"] == pytest.approx((held_back > np.square(value - want)).mean()) and (
      second["critic/clip_frac"] > 0.2)


def test_a_critic_learns_what_to_expect(small, batch):
  cfg = make_config(small, advantage=advantage.Config(kind="gae", lam=0.95), loss=loss.Config(value_clip=0.0))
  cfg = dataclasses.replace(cfg, optim=dataclasses.replace(OPTIM, learning_rate=0.0, critic_learning_rate=0.05))
  state = state_lib.init(jax.tree.map(jnp.copy, small.params), cfg.optim, 0.0, small.cfg.text.hidden)
  s, _ = score_step(state, None, batch, cfg)
  assert not np.asarray(s.value_old_BT).any()  # it expects nothing at first
  losses = []
  for _ in range(60):
    state, m = update_step(state, s, cfg)
    losses.append(float(m["critic/loss"]))
  assert losses[-1] < 0.5 * losses[0] and m["critic/explained"] > 0.3
  np.testing.assert_allclose(losses[0], 0.5 * np.square(np.asarray(s.return_BT)[batch.sampled_BT]).mean(), rtol=1e-4)


@pytest.mark.slow
def test_what_waits_in_the_host_s_memory_changes_no_number(small, batch, scored, updated):
  """Moments, and the reference for the KL term; both are in the same memory after the update."""
  mesh = sharding.make(1, 2, 1, devices=jax.devices()[:2])
  params = jax.device_put(jax.tree.map(np.array, small.params), sharding.param_shardings(qwen.specs(small.cfg), mesh))
  there = placement.place_batch(packed(small, shards=2), mesh)
  found = {}
  for offload in ((), state_lib.OFFLOAD):
    cfg = make_config(small, mesh=mesh, offload=offload, loss=loss.Config(kl_coef=0.1))
    ref = jax.tree.map(lambda a: a * 0.9, params)
    ref = state_lib.reference(ref, {}, cfg)
    state = state_lib.init(jax.tree.map(jnp.copy, params), OPTIM, 0.1, offload=offload)
    where = [a.sharding for a in jax.tree.leaves((state, ref))]
    s, _ = score_step(state, ref, there, cfg)
    state, metrics = update_step(state, s, cfg)
    assert [a.sharding.memory_kind for a in jax.tree.leaves((state, ref))] == [w.memory_kind for w in where]
    assert all(a.sharding.is_equivalent_to(w, a.ndim) for a, w in zip(jax.tree.leaves((state, ref)), where))
    assert {a.sharding.memory_kind for a in jax.tree.leaves(ref)} == {"pinned_host" if offload else "device"}
    found[offload] = jax.device_get((s.logp_ref_BT, state, metrics))
    assert_skipped(state, poisoned(s), cfg)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *found.values())
  # And its log-probabilities are not the policy's.
  assert np.abs(found[()][0] - np.asarray(s.logp_old_BT)).max() > 0.1


# --- updates that are skipped ------------------------------------------------------------------------------------


def test_an_update_that_is_not_finite_leaves_everything_as_it_was(small):
  """In one microbatch of several, with a critic and an adaptive KL weight; likewise for a gradient above the limit."""
  cfg = make_config(small, loss=loss.Config(kl_coef=0.1, kl_target=1e-6, kl_horizon=8.0),
                    advantage=advantage.Config(kind="gae"))
  cfg = dataclasses.replace(cfg, optim=dataclasses.replace(OPTIM, warmup_steps=5))
  batch = packed(small, microbatch_tokens=48)
  assert len(batch.rows.index_MUT) == 4
  state = state_lib.init(jax.tree.map(jnp.copy, small.params), cfg.optim, 0.1, small.cfg.text.hidden)
  s, _ = score_step(state, jax.tree.map(lambda a: a * 0.9, small.params), batch, cfg)
  state, metrics = update_step(state, s, cfg, None, step_lib.NO_LIMIT)
  assert state.update == 1 and float(state.kl_coef) != np.float32(0.1) and np.asarray(state.critic["w"]).any()
  assert (metrics["optim/skipped"], metrics["optim/spikes"]) == (0, 0) and metrics["critic/grad_norm"] > 0
  norm, before = metrics["optim/grad_norm"], jax.device_get(state)
  at = tuple(np.argwhere(batch.sampled_BT)[-1])
  cases = {"loss": (poisoned(s), np.inf), "gradient alone": (poisoned(s, 1e30), np.inf),
           "critic": (s.replace(return_BT=s.return_BT.at[at].set(jnp.inf)), np.inf),
           "reference": (s.replace(logp_ref_BT=s.logp_ref_BT.at[at].set(jnp.nan)), np.inf),
           "spike": (s, 1e-3 * norm)}
  for name, (bad, limit) in cases.items():
    state, m = update_step(state, bad, cfg, None, np.float32(limit))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)  # counters, too
    assert (m["optim/skipped"], m["optim/spikes"]) == (1, name == "spike"), name
    assert np.isfinite(m["loss/total"]) == (name in ("spike", "gradient alone")), name  # reported as it is
    assert np.isfinite(m["optim/grad_norm"]) == (name == "spike"), name
  _, m = update_step(state, s, cfg, None, np.float32(1e3 * norm))
  assert m["optim/skipped"] == 0 and m["optim/learning_rate"] == pytest.approx(OPTIM.learning_rate * 2 / 6)


@pytest.mark.parametrize("kind", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_what_is_finite_is_updated_as_if_nothing_were_skipped(small, optimized, monkeypatch, kind):
  """To the last bit, in optimised programs as in a run: against an update without the choice."""
  cfg = make_config(small)
  cfg = dataclasses.replace(cfg, optim=optim.OptimConfig(1e-2, kind=kind, weight_decay=0.1))
  rng = np.random.default_rng(0)
  draw = lambda tree: jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), tree)
  params = small.params if kind == "muon" else {"layer": small.params["text"]["blocks"]}  # less to compile
  state = state_lib.init(params, cfg.optim, 0.1, small.cfg.text.hidden, specs=family.tables(small.cfg)[0])
  start, grads = jax.device_get(state), [(draw(state.params), draw(state.critic)) for _ in range(2)]
  found, judged = [], step_lib._judged
  for judge in (judged, lambda *args: (jnp.array(True), judged(*args)[1])):
    monkeypatch.setattr(step_lib, "_judged", judge)
    run = jax.jit(lambda state, *given: step_lib._apply(state, *given, step_lib.NO_LIMIT, cfg)[0], donate_argnums=0)
    state = jax.tree.map(jnp.array, start)
    for by, of_critic in grads:
      state = run(state, by, of_critic, jnp.float32(0))
    found.append(jax.device_get(state))
  assert found[0].update == 2
  jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_critic_s_gradient_alone_is_enough():
  one = jnp.float32(1.0)
  for norms, limit, skipped, spikes in (((one, one), np.inf, 0, 0), ((one, one * np.inf), np.inf, 1, 0),
                                        ((one, one * 9), 2.0, 0, 0), ((one * 3, one), 2.0, 1, 1),
                                        ((one * 2, one), 2.0, 0, 0), ((one * np.nan, one), 2.0, 1, 0)):
    made, metrics = step_lib._judged(one, *norms, np.float32(limit))
    found = pooled.merge([metrics])
    assert (bool(made), found["optim/skipped"], found["optim/spikes"]) == (not skipped, skipped, spikes)


def test_imitation_skips_what_is_not_finite(small, batch):
  state, metrics = step_lib.imitate_step(fresh(small), batch, make_config(small))
  assert state.update == 1 and pooled.merge([metrics])["optim/skipped"] == 0
  before = jax.device_get(state)
  shown, *others = batch.rows.images
  white = shown.replace(patches_IWQC=np.full_like(shown.patches_IWQC, np.inf))
  state, metrics = step_lib.imitate_step(
      state, batch.replace(rows=batch.rows.replace(images=(white, *others))), make_config(small))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
  found = pooled.merge([metrics])
  assert found["optim/skipped"] == 1 and np.isnan(found["loss/total"])
