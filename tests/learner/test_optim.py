"""Optimizers: their definitions, how large their states are, and where these lie."""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
import pytest

from virl_jax import config
from virl_jax.learner import optim
from virl_jax.learner import state as state_lib
from virl_jax.learner import step as step_lib
from virl_jax.model import params as params_lib
from virl_jax.model import sharding
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.run import compiles

OPTIM = optim.OptimConfig(learning_rate=1e-2, eps=1e-3)
KINDS = pytest.mark.parametrize("kind", optim.KINDS)


def of(kind, **changes):
  return dataclasses.replace(OPTIM, kind=kind, **changes)


def drawn(params, seed=0):
  """Gradients like parameters."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda a: rng.standard_normal(a.shape, np.float32).astype(a.dtype), params)


def updates_of(cfg, params, grads, specs=None):
  """A few steps: the updates of each, and the last state."""
  opt = optim.optimizer(cfg, specs)
  update = jax.jit(opt.update)
  state, found = jax.jit(opt.init)(params), []
  for grad in grads:
    updates, state = update(grad, state, params)
    found.append(updates)
    params = optax.apply_updates(params, updates)
  return found, state


def close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("cfg, want", [
    (optim.OptimConfig(2.0), {0: 2, 1: 2, 1000: 2}),
    (optim.OptimConfig(2.0, warmup_steps=3), {0: 0.5, 1: 1, 2: 1.5, 3: 2, 4: 2, 1000: 2}),
    (optim.OptimConfig(2.0, decay_steps=10), {0: 2, 5: 1.1, 10: 0.2, 11: 0.2, 1000: 0.2}),
    (optim.OptimConfig(2.0, warmup_steps=1, decay_steps=10), {0: 1, 1: 2, 6: 1.1, 11: 0.2, 50: 0.2})])
def test_schedules_by_hand(cfg, want):
  schedule = optim.schedule(cfg)
  np.testing.assert_allclose([schedule(i) for i in want], list(want.values()), rtol=1e-6)


@KINDS
def test_only_matrices_are_decayed(small, kind):
  optimizer = optim.optimizer(of(kind, weight_decay=0.5), qwen.specs(small.cfg))
  ones = jax.tree.map(lambda a: np.ones(a.shape, np.float32), small.params)
  zeros = jax.tree.map(np.zeros_like, ones)
  updates, _ = jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p))(ones, zeros)
  vectors = ("norm", "norm1", "norm2")
  for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
    name = path[-1].key
    want = 0 if name in vectors or name.endswith("_b") else -0.5 * OPTIM.learning_rate
    np.testing.assert_allclose(update, want, rtol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_a_norm_of_0_clips_nothing():
  long = {"w": np.full((2, 2), 3.0, np.float32)}

  def update(clip_norm):
    optimizer = optim.optimizer(optim.OptimConfig(1.0, eps=1.0, clip_norm=clip_norm))
    return optimizer.update(long, optimizer.init(long), long)[0]["w"]

  np.testing.assert_allclose(update(0.0), -0.75, rtol=1e-4)  # 3 / (3 + eps), as Adam's first step has it
  np.testing.assert_array_equal(update(0.0), update(1e9))
  np.testing.assert_allclose(update(1.0), -0.5 / 1.5, rtol=1e-4)


def test_defaults_are_the_configuration_s():
  assert optim.OptimConfig(**config.default().optim) == optim.OptimConfig()


def test_adafactor_is_optax_s_with_steps_of_an_absolute_size():
  params = {"a_w": jnp.ones((130, 140)), "stack": {"b_w": 2 * jnp.ones((2, 128, 3, 150)), "b_b": jnp.ones((2, 150))}}
  grads = [drawn(params, seed) for seed in range(3)]
  got, _ = updates_of(of("adafactor", clip_norm=0.0), params, grads)
  other = optax.adafactor(OPTIM.learning_rate, multiply_by_parameter_scale=False)
  state = other.init(params)
  for updates, grad in zip(got, grads):
    want, state = jax.jit(other.update)(grad, state, params)
    close(updates, want, rtol=1e-5, atol=1e-9)
  assert np.sqrt(np.square(got[0]["a_w"]).mean()) <= 1.001 * OPTIM.learning_rate  # clipped


def test_adafactor_keeps_rows_and_columns():
  """For a released model's layers: a thousandth of the size of a moment, or less."""
  specs = {k: v for k, v in qwen.specs(qwen.SIZES["7b"])["text"].items() if k in ("blocks", "embed")}
  params = params_lib.abstract(specs, jnp.float32)
  size = lambda tree: sum(math.prod(a.shape) for a in jax.tree.leaves(tree))
  kept = jax.eval_shape(optim.optimizer(of("adafactor")).init, params)
  assert size(kept) < 0.01 * size(params)
  assert not any(a.shape[:1] == (28,) and a.shape[-2:] == (3584, 18944) for a in jax.tree.leaves(kept))
  assert 2 * size(params) < size(jax.eval_shape(optim.optimizer(of("adamw")).init, params)) < 2.01 * size(params)
  muon = size(jax.eval_shape(optim.optimizer(of("muon"), specs).init, params))
  assert 1 * size(params) < muon < 1.1 * size(params)  # one moment, two of the embedding


def matrix(a, axes):
  """[L, outputs, inputs] of a stacked parameter."""
  inputs, outputs = axes
  a = np.asarray(a, np.float64).transpose(0, *outputs, *inputs)
  return a.reshape(len(a), math.prod(a.shape[1:1 + len(outputs)]), -1)


def test_muon_sees_the_matrices_of_hf_files(small):
  """Each layer's matrices, in HF's layout according to the table."""
  specs, axes = qwen.specs(small.cfg), optim.matrices(qwen.specs(small.cfg))
  table = dict(params_lib.leaves(specs))
  assert {path for path, spec in table.items() if "blocks" in path and path[-1].endswith("_w")} == set(axes)
  assert axes[("text", "blocks", "q_w")] == ((1,), (2, 3)) and axes[("text", "blocks", "o_w")] == ((1, 2), (3,))
  assert axes[("vision", "blocks", "qkv_w")] == ((1,), (2, 3, 4))
  for path, which in axes.items():
    a = np.random.default_rng(0).standard_normal(table[path].shape)
    want = [params_lib.to_hf(table[path], layer) for layer in a]
    np.testing.assert_array_equal(matrix(a, which), want, err_msg=str(path))


def test_muon_s_updates_are_orthogonal(small):
  """Nearly equal singular values, whatever the gradient's are, and updates about as large as AdamW's."""
  cfg, specs = of("muon", clip_norm=0.0), qwen.specs(small.cfg)
  grads = drawn(small.params)
  (updates, *_), state = updates_of(cfg, small.params, [grads], specs)
  flat = lambda tree: {tuple(k.key for k in path): a for path, a in jax.tree_util.tree_flatten_with_path(tree)[0]}
  updates, grads = flat(updates), flat(grads)
  axes = optim.matrices(specs)
  for path, which in axes.items():
    values = np.linalg.svd(matrix(updates[path], which), compute_uv=False)
    before = np.linalg.svd(matrix(grads[path], which), compute_uv=False)
    unit = 0.2 * cfg.learning_rate * math.sqrt(max(matrix(updates[path], which).shape[1:]))
    assert 0.5 * unit < values.min() and values.max() < 1.3 * unit, path
    # The whole update is against the gradient, in the same directions.
    assert (np.einsum("lij,lij->l", matrix(updates[path], which), matrix(grads[path], which))
            < -0.8 * unit * before.sum(1)).all(), path
  # All else is AdamW's.
  (plain, *_), _ = updates_of(dataclasses.replace(cfg, kind="adamw"), small.params, [drawn(small.params)])
  for path, update in flat(plain).items():
    if path not in axes:
      np.testing.assert_allclose(updates[path], update, rtol=1e-6, err_msg=str(path))


def test_muon_s_steps_by_hand():
  """Momentum as in its author's code, and five Newton-Schulz steps for one layer after the other."""
  specs = {"q_w": params_lib.ParamSpec((2, 6, 2, 5), ("layers", "embed", "heads", None), "normal", "q.{layer}", (10, 6),
                                       (2, 0, 1))}
  params = {"q_w": jnp.ones((2, 6, 2, 5))}
  grads = [drawn(params, seed) for seed in range(3)]
  found, _ = updates_of(of("muon", clip_norm=0.0, weight_decay=0.3), params, grads, specs)
  momentum, w = np.zeros((2, 6, 10)), np.ones((2, 6, 10))
  for updates, grad in zip(found, grads):
    g = grad["q_w"].astype(np.float64).reshape(2, 6, 10)
    momentum = 0.05 * g + 0.95 * momentum
    want = np.empty_like(w)
    for layer, x in enumerate(0.05 * g + 0.95 * momentum):
      x = x / np.linalg.norm(x)
      for _ in range(5):
        x = 3.4445 * x - 4.775 * (x @ x.T) @ x + 2.0315 * np.linalg.matrix_power(x @ x.T, 2) @ x
      want[layer] = -OPTIM.learning_rate * (0.2 * np.sqrt(10) * x + 0.3 * w[layer])
    np.testing.assert_allclose(updates["q_w"].reshape(2, 6, 10), want, rtol=1e-3, atol=1e-5)
    w = w + want


@pytest.mark.skipif("consistent_rms" not in inspect.signature(getattr(contrib, "muon", len)).parameters,
                    reason="this optax has no Muon, or one that is scaled otherwise")
def test_muon_begins_as_optax_s(small):
  """Only the first steps: optax corrects momentum for its start."""
  cfg, specs = of("muon", clip_norm=0.0), qwen.specs(small.cfg)
  axes, grads = optim.matrices(specs), drawn(small.params)
  numbers = jax.tree_util.tree_map_with_path(
      lambda path, _: contrib.MuonDimensionNumbers(*found) if (found := axes.get(tuple(k.key for k in path))) else None,
      small.params)
  other = contrib.muon(cfg.learning_rate, muon_weight_dimension_numbers=numbers, consistent_rms=0.2)
  want, _ = jax.jit(other.update)(grads, other.init(small.params), small.params)
  (got,), _ = updates_of(cfg, small.params, [grads], specs)
  for tower in ("text", "vision"):
    for name, update in got[tower]["blocks"].items():
      if name.endswith("_w"):
        np.testing.assert_allclose(update, want[tower]["blocks"][name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_muon_says_what_it_needs():
  with pytest.raises(ValueError, match="'muon' needs the parameters' table"):
    optim.optimizer(of("muon"))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_first_moment_in_bfloat16_is_close(small, kind):
  params = small.params
  grads = [drawn(params, seed) for seed in range(4)]
  specs = qwen.specs(small.cfg)
  full, state = updates_of(of(kind), params, grads, specs)
  half, less = updates_of(of(kind, first_moment="bfloat16"), params, grads, specs)
  mu = lambda state: [a for path, a in jax.tree_util.tree_flatten_with_path(state)[0]
                      if any(getattr(k, "name", None) in ("mu", "trace") for k in path)]
  nu = lambda state: [a for path, a in jax.tree_util.tree_flatten_with_path(state)[0]
                      if any(getattr(k, "name", None) == "nu" for k in path)]
  assert {a.dtype for a in mu(less)} == {jnp.dtype("bfloat16")} and len(mu(less)) == len(jax.tree.leaves(params))
  assert {a.dtype for a in mu(state) + nu(state) + nu(less)} == {jnp.dtype("float32")}
  norm = lambda tree: float(optax.tree.norm(tree))
  off = norm(jax.tree.map(jnp.subtract, half[-1], full[-1])) / norm(full[-1])
  assert 0 < off < 0.02


def test_a_first_moment_can_be_finer_than_its_parameters():
  params = {"a_w": jnp.ones((4, 4), jnp.bfloat16)}
  init = lambda kind: optim.optimizer(of("adamw", first_moment=kind)).init(params)
  kinds = {kind: optax.tree.get(init(kind), "mu")["a_w"].dtype for kind in optim.FIRST_MOMENTS}
  assert kinds == {"param": jnp.bfloat16, "float32": jnp.float32, "bfloat16": jnp.bfloat16}


def test_adafactor_has_no_first_moment():
  with pytest.raises(ValueError, match="config.optim.first_moment must be 'param', the default, with optim.kind = "):
    of("adafactor", first_moment="bfloat16")


@KINDS
def test_moments_lie_like_their_parameters_and_all_else_whole(kind):
  mesh = sharding.make(2, 2, 2)
  cfg = qwen.Text(vocab=64, hidden=256, layers=2, heads=4, kv_heads=2, head_size=128, intermediate=320,
                  mrope_section=(16, 24, 24))
  specs = qwen.text.specs(cfg)
  where = sharding.param_shardings(specs, mesh)
  params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
                        params_lib.abstract(specs, jnp.float32), where)
  state = state_lib.abstract(params, of(kind), specs=specs).opt_state
  whole, seen = sharding.replicated(mesh), {True: 0, False: 0}
  for path, a in jax.tree_util.tree_flatten_with_path(state)[0]:
    name = jax.tree_util.keystr(path)
    p = next((p for at, p in jax.tree_util.tree_flatten_with_path(params)[0]
              if name.endswith(jax.tree_util.keystr(at))), None)
    like = p is not None and p.shape == a.shape
    assert a.sharding == (p.sharding if like else whole), name
    seen[like] += 1
  vectors = sum(1 for _, spec in params_lib.leaves(specs) if spec.init != "normal")
  count = len(jax.tree.leaves(params))
  # AdamW has two of each; Muon only one of the layers' seven matrices; Adafactor whole ones of vectors.
  assert seen[True] == {"adamw": 2 * count, "muon": 2 * count - 7}.get(kind, seen[True])
  if kind == "adafactor":
    assert vectors <= seen[True] < count and seen[False] > count


WIDE = qwen.Config(
    text=qwen.Text(vocab=128, hidden=128, layers=2, heads=2, kv_heads=2, head_size=128, intermediate=256,
                   mrope_section=(16, 24, 24)),
    vision=qwen.Vision(depth=2, hidden=16, heads=2, intermediate=24, out=128, full_blocks=(1,)))


def after_two_steps(kind, mesh=None, offload=()):
  """The states before and after two steps on the same gradients, and how many programs the second compiled."""
  specs = qwen.specs(WIDE)
  rng = np.random.default_rng(0)
  values = params_lib.map_specs(lambda s: rng.standard_normal(s.shape, np.float32), specs)
  params = jax.device_put(values, sharding.param_shardings(specs, mesh) if mesh else None)
  cfg = state_lib.Config(WIDE, 1, optim=of(kind, weight_decay=0.1), mesh=mesh, offload=offload)
  apply = jax.jit(lambda state, grads: step_lib._apply(state, grads, None, jnp.float32(1), step_lib.NO_LIMIT, cfg)[0],
                  donate_argnums=0)
  state = state_lib.init(params, cfg.optim, offload=offload, specs=specs)
  like = state_lib.abstract(params, cfg.optim, offload=offload, specs=specs)
  jax.tree.map(lambda a, s: np.testing.assert_equal((a.shape, a.dtype), (s.shape, s.dtype)), state, like)
  states, counter = [jax.tree.map(lambda a: a.sharding, state)], None
  for seed in range(2):
    grads = jax.device_put(drawn(values, seed), sharding.param_shardings(specs, mesh) if mesh else None)
    state = apply(state, grads)
    counter = counter or compiles.Counter()  # after the first
    states.append(jax.tree.map(lambda a: a.sharding, state))
  assert mesh is None or jax.tree.leaves(states[0]) == [a.sharding for a in jax.tree.leaves(like)]
  return states, jax.device_get(state), counter.count


@pytest.fixture(scope="module")
def alone():
  """Each optimizer's results on one device."""
  found = {}
  return lambda kind: found.setdefault(kind, after_two_steps(kind)[1])


@KINDS
@pytest.mark.parametrize("offload", [pytest.param((), marks=pytest.mark.slow), ("optimizer",)])
def test_a_state_stays_where_it_is(alone, kind, offload):
  """On a mesh, in the host's memory or not: the second step compiles nothing, and numbers are those of one device."""
  states, found, compiled = after_two_steps(kind, sharding.make(2, 2, 2), offload)
  leaves = jax.tree.leaves(states[0].opt_state)
  for later in states[1:]:
    for before, after, a in zip(jax.tree.leaves(states[0]), jax.tree.leaves(later), jax.tree.leaves(found)):
      assert after.is_equivalent_to(before, np.ndim(a)) and after.memory_kind == before.memory_kind
  assert compiled == 0
  kinds = {s.memory_kind for s in leaves}
  assert kinds == ({"device", "pinned_host"} if offload else {"device"})  # counters stay
  assert {s.memory_kind for s in jax.tree.leaves(states[0].params)} == {"device"}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, alone(kind))


def test_what_is_offloaded_needs_a_mesh(small):
  with pytest.raises(ValueError, match="parameters must be on a mesh for an optimizer that is offloaded"):
    state_lib.init(small.params, OPTIM, offload=("optimizer",))


def first_steps(of, params, grads, **more):
  state, found = of.init(params), []
  for g in grads:
    updates, state = of.update(g, state, params, **more)
    found.append(updates)
  return found, state


@pytest.mark.parametrize("params_in, first", [("float32", "param"), ("float32", "bfloat16"), ("bfloat16", "float32"),
                                              ("bfloat16", "param")])
def test_adam_and_momentum_are_optax_s(params_in, first):
  """To the last bit, with a state of the same shape."""
  rng = np.random.default_rng(0)
  draw = lambda: {name: jnp.asarray(rng.normal(size=shape), params_in) for name, shape in (("a_w", (5, 3)), ("b_b", 4))}
  params, grads = draw(), [draw() for _ in range(3)]
  cfg = optim.OptimConfig(1e-2, b2=0.98, weight_decay=0.1, first_moment=first, warmup_steps=2)
  dtype = None if first == "param" else first
  for ours, theirs in (
      (optim._adamw(cfg), optax.adamw(optim.schedule(cfg), b2=0.98, weight_decay=0.1, mu_dtype=dtype,
                                      mask=optim._decayed)),
      (optim.critic_optimizer(cfg), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(
          optim.schedule(cfg, cfg.critic_learning_rate), b2=0.98))),
      (optim._momentum(cfg), optax.trace(0.95, nesterov=True, accumulator_dtype=dtype))):
    got, want = first_steps(ours, params, grads), first_steps(theirs, params, grads)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      assert a.dtype == b.dtype
      np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("kind, first", [("adamw", "bfloat16"), ("adafactor", "param"), ("muon", "bfloat16")])
def test_an_update_that_is_not_made_leaves_the_state(small, kind, first):
  cfg, specs = optim.OptimConfig(1e-2, kind=kind, first_moment=first), qwen.specs(small.cfg)
  grads = jax.tree.map(jnp.ones_like, small.params)
  state = optim.optimizer(cfg, specs).init(small.params)
  of = optim.optimizer(cfg, specs)
  step = jax.jit(lambda grads, state, made: optim.update(of, grads, state, small.params, made)[1])
  state = step(grads, state, True)
  after = step(jax.tree.map(lambda g: g * jnp.nan, grads), state, False)
  jax.tree.map(np.testing.assert_array_equal, after, state)
  moved = jax.tree.map(lambda a, b: np.any(np.asarray(a != b)), step(grads, state, True), state)
  assert any(jax.tree.leaves(moved))
