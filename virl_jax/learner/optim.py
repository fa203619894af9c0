"""Optimizers of the policy and of the critic, and where their states lie.

Three for the policy, all after clipping by global norm, all with the same schedule, and with decay of matrices only:

    adamw      two moments a parameter (AdamW, arXiv 1711.05101)
    adafactor  a second moment for each row and column of a matrix, no first moment (Adafactor, arXiv 1804.04235)
    muon       one moment a parameter in the layers' matrices, whose update is made orthogonal (Muon, K. Jordan 2024);
               AdamW for all else

An update that is not made leaves the moments unchanged (`update`).  If optax computed the new moments and the choice
between old and new came afterwards, both would be in memory: a second copy of the state.  So AdamW's moments and Muon's
momentum are written here, and choose first: the update is computed from the moments that were chosen.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from virl_jax import checks
from virl_jax.model import params as params_lib
from virl_jax.model import sharding

KINDS = ("adamw", "adafactor", "muon")
FIRST_MOMENTS = ("param", "float32", "bfloat16")
_MUON_BETA = 0.95  # of its momentum [Muon]
_MUON_STEPS, _MUON_COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration [Muon]
_MUON_RMS = 0.2    # root mean square of its updates, as AdamW's tend to have it [arXiv 2502.16982, section 2.2]


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """See `config.py`, section `optim`."""

  learning_rate: float = 1e-6
  critic_learning_rate: float = 1e-5
  warmup_steps: int = 0
  decay_steps: int = 0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  kind: str = "adamw"
  first_moment: str = "param"
  skip_above: float = 0.0
  skip_window: int = 64
  stop_after: int = 3

  def __post_init__(self):
    rate, decay = checks.real(0), checks.real(0, below=1)
    checks.section(vars(self), "optim", kind=checks.one_of(KINDS), learning_rate=rate, critic_learning_rate=rate,
                   warmup_steps=checks.whole(0), decay_steps=checks.whole(0), b1=decay, b2=decay,
                   eps=checks.real(above=0), first_moment=checks.one_of(FIRST_MOMENTS), weight_decay=rate,
                   clip_norm=rate, skip_window=checks.whole(1), stop_after=checks.whole(0),
                   skip_above=(lambda v: rate[0](v) and (v == 0 or v > 1), "0, or above 1: in medians"))
    checks.need(self.kind != "adafactor" or self.first_moment == "param", "optim.first_moment",
                "'param', the default, with optim.kind = 'adafactor', which has none", self.first_moment)


def schedule(cfg: OptimConfig, peak: float | None = None) -> optax.Schedule:
  """Linear warm-up to the peak (`cfg.learning_rate`), then constant, or linear decay to a tenth."""
  peak = cfg.learning_rate if peak is None else peak
  after = (optax.linear_schedule(peak, 0.1 * peak, cfg.decay_steps) if cfg.decay_steps
           else optax.constant_schedule(peak))
  if not cfg.warmup_steps:
    return after
  # The first update already moves: the ramp starts at peak / (warmup + 1), not at 0.
  ramp = optax.linear_schedule(peak / (cfg.warmup_steps + 1), peak, cfg.warmup_steps)
  return optax.join_schedules([ramp, after], [cfg.warmup_steps])


def optimizer(cfg: OptimConfig, specs: dict | None = None) -> optax.GradientTransformation:
  """The policy's optimizer behind global-norm clipping, if there is any; vectors (norms, biases) are not decayed.

  Args:
    cfg: which, and its numbers.  Adafactor uses only the schedule, `weight_decay` and `clip_norm`.
    specs: the parameters' table, which tells Muon which axes of a parameter are a matrix; the others ignore it.

  Raises:
    ValueError: Muon without a table.
  """
  if cfg.kind == "adafactor":
    chosen = _adafactor(cfg)
  elif cfg.kind == "muon":
    chosen = _muon(cfg, specs)
  else:
    chosen = _adamw(cfg)
  return optax.chain(_clip(cfg), chosen)


def update(of: optax.GradientTransformationExtraArgs, grads: dict, state: optax.OptState, params: dict, made: jax.Array
           ) -> tuple[dict, optax.OptState]:
  """A step of an optimizer of this file, or none.

  Args:
    of: the optimizer.
    grads: in the parameters' dtypes.
    state: of that optimizer.
    params: the parameters.
    made: bool scalar, whether the update is made.

  Returns:
    What to add to the parameters, and the next state.  If the update is not made, the first means nothing, and the
    state is unchanged to the last bit.
  """
  updates, after = of.update(grads, state, params, made=made)
  chose = lambda node: isinstance(node, (optax.ScaleByAdamState, optax.TraceState))
  return updates, jax.tree.map(lambda new, old: new if chose(new) else jnp.where(made, new, old), after, state,
                               is_leaf=chose)


def critic_optimizer(cfg: OptimConfig) -> optax.GradientTransformation:
  """The value head's Adam, with clipping of its own, whichever optimizer the policy has."""
  return optax.chain(_clip(cfg), optax.chain(
      _adam_moments(cfg, None), optax.scale_by_learning_rate(schedule(cfg, cfg.critic_learning_rate))))


def _clip(cfg: OptimConfig) -> optax.GradientTransformation:
  # A norm of 0 would shorten every gradient to nothing.
  return optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()


def _decayed(params: dict) -> dict:
  """Which parameters are decayed: all but norms and biases."""
  # By name, not by rank: layers are stacked, and a stacked bias has as many axes as a matrix.
  decayed = lambda path, _: not (path[-1].key.startswith("norm") or path[-1].key.endswith("_b"))
  return jax.tree_util.tree_map_with_path(decayed, params)


def _mu_dtype(cfg: OptimConfig) -> str | None:
  return None if cfg.first_moment == "param" else cfg.first_moment


def _adamw(cfg: OptimConfig) -> optax.GradientTransformation:
  return optax.chain(_adam_moments(cfg, _mu_dtype(cfg)), optax.add_decayed_weights(cfg.weight_decay, _decayed),
                     optax.scale_by_learning_rate(schedule(cfg)))


def _adam_moments(cfg: OptimConfig, mu_dtype: str | None) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_adam`, number for number, but for the choice of moments; see the module docstring."""
  def step(grads, state, params=None, *, made=True, **_):
    del params
    mu = _kept(made, optax.tree.update_moment(grads, state.mu, cfg.b1, 1), state.mu)
    nu = _kept(made, optax.tree.update_moment_per_elem_norm(grads, state.nu, cfg.b2, 2), state.nu)
    count = optax.safe_increment(state.count)
    mean, square = optax.tree.bias_correction(mu, cfg.b1, count), optax.tree.bias_correction(nu, cfg.b2, count)
    updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v + 0.0) + cfg.eps), mean, square)
    count = jnp.where(made, count, state.count)
    return updates, optax.ScaleByAdamState(count, _like(mu, state.mu), _like(nu, state.nu))

  return optax.GradientTransformationExtraArgs(optax.scale_by_adam(mu_dtype=mu_dtype).init, step)


def _momentum(cfg: OptimConfig) -> optax.GradientTransformationExtraArgs:
  """`optax.trace` with Nesterov's correction, number for number, but for the choice of moments; see above."""
  add = lambda g, t: g + _MUON_BETA * t

  def step(grads, state, params=None, *, made=True, **_):
    del params
    trace = _kept(made, jax.tree.map(add, grads, state.trace), state.trace)
    return jax.tree.map(add, grads, trace), optax.TraceState(_like(trace, state.trace))

  return optax.GradientTransformationExtraArgs(
      optax.trace(_MUON_BETA, accumulator_dtype=_mu_dtype(cfg)).init, step)


def _kept(made, new: dict, old: dict) -> dict:
  """The new moments or the old ones, in the dtype that the new ones are computed in: neither loses precision."""
  return jax.tree.map(lambda a, b: jnp.where(made, a, b.astype(a.dtype)), new, old)


def _like(tree: dict, old: dict) -> dict:
  return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, old)


def _adafactor(cfg: OptimConfig) -> optax.GradientTransformation:
  """Adafactor as `optax.adafactor` puts it together, but for two things.

  Used of the paper: the factored second moment, decayed by 1 - t^-0.8 (sections 3 and 7.2), of arrays that have two
  axes of 128 or more; and updates clipped to a root mean square of 1, layers of a stack together (section 6).
  Not used: steps relative to a parameter's size (section 8), and optax's decay, which is not multiplied by the learning
  rate: learning rate and decay mean here what they mean in AdamW.
  """
  return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0),
                     optax.add_decayed_weights(cfg.weight_decay, mask=_decayed),
                     optax.scale_by_learning_rate(schedule(cfg)))


def _muon(cfg: OptimConfig, specs: dict | None) -> optax.GradientTransformation:
  """Muon for the matrices of the layers' stacks, each layer's by itself; AdamW for all else.

  Nesterov's momentum, made orthogonal, and scaled by equation 4 of arXiv 2502.16982, so that AdamW's learning rates and
  decay can be used.  optax's own (`contrib.muon`) takes all layers of a stack at once, and its peak for v7b on eight
  devices is 14 GiB above AdamW's.
  """
  if specs is None:
    raise ValueError("optim.kind = 'muon' needs the parameters' table, which says what is a matrix. Received: None")
  axes = matrices(specs)
  name = lambda path: tuple(entry.key for entry in path)

  def orthogonal(updates, params):
    del params
    return jax.tree_util.tree_map_with_path(lambda path, u: _orthogonal(u, *axes[name(path)]), updates)

  muon = optax.chain(
      _momentum(cfg), optax.stateless(orthogonal),
      optax.add_decayed_weights(cfg.weight_decay), optax.scale_by_learning_rate(schedule(cfg)))
  label = lambda tree: jax.tree_util.tree_map_with_path(
      lambda path, _: "muon" if name(path) in axes else "adamw", tree)
  return optax.partition({"muon": muon, "adamw": _adamw(cfg)}, label)


def _orthogonal(u: jax.Array, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> jax.Array:
  """Each layer's matrix with singular values near 1, times 0.2 and the root of its longer side.

  Source: Muon, whose five Newton-Schulz steps leave singular values between about 0.7 and 1.2.
  """
  size = lambda some: math.prod(u.shape[i] for i in some)
  short, long = sorted((inputs, outputs), key=size)
  order = (0, *short, *long)

  def one(x):
    x = x.reshape(size(short), size(long)).astype(jnp.float32)
    x = x / (jnp.linalg.norm(x) + 1e-8)
    for _ in range(_MUON_STEPS):
      a, b, c = _MUON_COEFFICIENTS
      xx = x @ x.T
      x = a * x + (b * xx + c * xx @ xx) @ x
    return _MUON_RMS * math.sqrt(size(long)) * x

  # A layer at a time: the iteration holds several whole matrices, which for all layers at once is several times the
  # parameters' memory.
  moved = u.transpose(order)
  found = jax.lax.map(one, moved).reshape(moved.shape).astype(u.dtype)
  return found.transpose([order.index(i) for i in range(u.ndim)])


def matrices(specs: dict) -> dict[tuple[str, ...], tuple[tuple[int, ...], tuple[int, ...]]]:
  """Which parameters of the layers' stacks are matrices: by path, the axes of inputs and those of outputs.

  A matrix is what is one in HF files, outputs x inputs, however many axes it has here.

  Args:
    specs: the parameters' table.
  """
  found = {}
  for path, spec in params_lib.leaves(specs):
    if not spec.layer_matrix:
      continue
    perm, outputs = spec.perm or tuple(range(len(spec.hf_shape))), params_lib.hf_rows(spec)
    found[path] = (tuple(1 + i for i, at in enumerate(perm) if at >= outputs),
                   tuple(1 + i for i, at in enumerate(perm) if at < outputs))
  return found


def shardings(state: optax.OptState, params: dict, whole: jax.sharding.Sharding, host: bool = False) -> optax.OptState:
  """Where an optimizer's state lies: what has a parameter's shape lies like it, all else is whole on every device.

  Args:
    state: of any optimizer of this file, arrays or their shapes.
    params: the parameters, or their shapes, each with its sharding.
    whole: the sharding of what is whole on every device.
    host: whether what has a parameter's shape lies in pinned memory of the host.

  Returns:
    The state with a sharding in place of each array.
  """
  table = {jax.tree_util.keystr(path): p for path, p in jax.tree_util.tree_flatten_with_path(params)[0]}

  def one(path, a):
    # A moment's path ends in its parameter's.
    p = next((table[name] for i in range(len(path)) if (name := jax.tree_util.keystr(path[i:])) in table), None)
    if p is None or p.shape != a.shape:  # rows and columns of a factored moment, counters
      return whole
    return sharding.in_host(p.sharding) if host else p.sharding

  return jax.tree_util.tree_map_with_path(one, state)
