"""Every kernel of virl_jax.rl agrees with a slow loop, plain, compiled and mapped, and has finite gradients.

Each is tried on trajectories that have everything, and on those that lack something: nothing under any mask, no
actions, no rounds (R = 0), no ground truth, groups with equal rewards.
"""

from collections.abc import Callable
import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl import oracles
from virl_jax.rl import advantage
from virl_jax.rl import credit
from virl_jax.rl import loss
from virl_jax.rl import reward

B, G, J, T = 8, 4, 3, 12
REGIMES = ("plenty", "empty masks", "no actions", "no rounds", "no targets", "equal groups")
DRAWS = 3  # mapped over; and each by itself


def draw(seed: int, regime: str) -> dict[str, np.ndarray]:
  """All arguments that a kernel may need, in float32, of B trajectories."""
  rng = np.random.default_rng(seed)
  R = 0 if regime == "no rounds" else 4
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)

  def boxes(n):
    corner, side = rng.uniform(0, 40, (B, n, 2)), rng.uniform(5, 30, (B, n, 2))
    return np.concatenate([corner, corner + side], -1).astype(np.float32)

  gt, box = boxes(J), boxes(R)
  for b in range(B):
    if rng.random() < 0.5:  # two targets that one zoom can hit
      gt[b, 1] = gt[b, 0] + normal(4)
  for b, k in np.ndindex(B, R):
    if rng.random() < 0.6:  # near a target; sometimes exactly the zoom before
      box[b, k] = gt[b, rng.integers(J)] + normal(4)
    if k and rng.random() < 0.3:
      box[b, k] = box[b, k - 1]
  d = {
      "box": box, "box_mask": rng.random((B, R)) < 0.8, "gt": gt, "gt_mask": rng.random((B, J)) < 0.7,
      "answer": (rng.random(B) < 0.5).astype(np.float32), "format": (rng.random(B) < 0.8).astype(np.float32),
      "reward": normal(B), "row_mask": rng.random(B) < 0.8, "advantage": normal(B),
      "action": rng.integers(-1, R, (B, T)).astype(np.int32), "sampled": rng.random((B, T)) < 0.7,
      "class": rng.integers(-1, 3, (B, R)).astype(np.int32), "correct": rng.random((B, R)) < 0.5,
      "margin": 0.3 * normal(B, R), "modulator": np.abs(normal(B, R)), "step": normal(B, R), "earned": normal(B, R),
      "entropy": np.abs(normal(B, T)), "advantages": normal(B, T), "plain": normal(B, T), "rewards": normal(B, T),
      "value": normal(B, T), "value_old": normal(B, T), "return": normal(B, T),
      "logp": -np.abs(normal(B, T)), "kl_coef": np.float32(rng.uniform(0.1, 1)), "kl": np.float32(rng.uniform(0, 0.3))}
  d |= {name: (d["logp"] + 0.3 * normal(B, T)).astype(np.float32) for name in ("old", "ref", "sampler")}
  if rng.random() < 0.5:
    d["reward"][:G] = d["reward"][0]  # a group that is not informative
  d["redundant"] = d["correct"] & (rng.random((B, R)) < 0.3)
  if regime == "empty masks":
    for name in ("box_mask", "gt_mask", "row_mask", "sampled"):
      d[name][:] = False
  if regime in ("no actions", "no rounds"):
    d["box_mask"][:], d["action"][:], d["class"][:] = False, -1, credit.NONE
  if regime == "no targets":
    d["gt_mask"][:] = False
  if regime == "equal groups":
    d["reward"], d["earned"][:] = np.repeat(normal(B // G), G), 0.1
    d["advantage"][:], d["advantages"][:] = 0.0, 0.0
  return d


@dataclasses.dataclass(frozen=True)
class Case:
  """A kernel in one of its settings.

  Attributes:
    kernel: under test; results that mean nothing must be made 0, see `shown`.
    oracle: the slow loop, with the same arguments and results.
    takes: names of its arguments in what `draw` returns; after "row." that of one trajectory.
    of: the function that the case is about.
  """

  kernel: Callable
  oracle: Callable
  takes: str
  of: Callable

  def arguments(self, d: dict) -> tuple:
    return tuple(d[name[4:]][0] if name.startswith("row.") else d[name] for name in self.takes.split())


def with_cfg(kernel, oracle, takes, cfg):
  """A case whose kernel and oracle have a configuration, or a tuple of settings, as last arguments."""
  more = cfg if isinstance(cfg, tuple) else (cfg,)
  return Case(lambda *a: kernel(*a, *more), lambda *a: oracle(*a, *more), takes, kernel)


def shown(kernel, mask_at):
  """The kernel, with 0 off its mask, where its results mean nothing."""
  @functools.wraps(kernel)
  def run(*args):
    return jax.tree.map(lambda x: jnp.where(args[mask_at], x, 0), kernel(*args))
  return run


ACTIONS = "row.box row.box_mask row.gt row.gt_mask"
TOKENS = "row.action row.sampled"
OVERLAPS = lambda a, b, mode: np.array([[oracles.overlap(x, y, mode) for y in b] for x in a]).reshape(len(a), len(b))
R, C, A, L = reward.Config, credit.Config, advantage.Config, loss.Config
WEIGHTS = R(w_answer=2.0, w_fidelity=0.5)
LOSSES = {
    "ppo": L(), "dual clip": L(dual_clip=1.3, clip_high=0.25),
    "gspo": L(kind="gspo", aggregate="sequence", clip_low=0.05),
    "cispo": L(kind="cispo", aggregate="constant", norm_tokens=7), "sequence": L(aggregate="sequence")}


def _with_h0(box, box_mask, gt, gt_mask, margin):
  return reward.fidelity(box, box_mask, gt, gt_mask, R(lam=0.2), jnp.abs(margin).sum())


def _place(cfg):
  def kernel(total, *rest):
    return reward.place(total, reward.fidelity(*rest[:4], cfg), *rest[4:], cfg)

  def oracle(total, *rest):
    return oracles.place(float(total), oracles.fidelity(*rest[:4], cfg), *rest[4:], cfg)

  return Case(kernel, oracle, f"row.reward {ACTIONS} {TOKENS}", reward.place)


def _modulator(**changes):
  cfg = C(h_redundant=0.8, **changes)
  return Case(lambda c, a, m: credit.modulator(c, a, cfg, m), lambda c, a, m: oracles.modulator(c, a, cfg, m),
              "row.class row.advantage row.margin", credit.modulator)


def _policy_loss(cfg, coef):
  names = "logp old ref entropy advantages sampled sampler" + " kl_coef" * coef
  kernel = lambda *a: loss.policy_loss(*a[:6], cfg, *a[6:])
  return Case(kernel, lambda *a: oracles.policy_loss(*a[:6], cfg, *a[6:]), names, loss.policy_loss)


CASES = {
    "iou": Case(reward.iou, lambda a, b: OVERLAPS(a, b, "iou"), "row.box row.gt", reward.iou),
    **{f"overlap {m}": with_cfg(reward.overlap, OVERLAPS, "row.box row.gt", m) for m in reward.MODES},
    **{f"fidelity {m}": with_cfg(reward.fidelity, oracles.fidelity, ACTIONS, R(mode=m, w_cover=0.3))
       for m in reward.MODES},
    "fidelity, weights": with_cfg(reward.fidelity, oracles.fidelity, ACTIONS, R(w_sign=0.5, lam=2.0, rho=0.0, h0=0.2)),
    "fidelity, its own h0": Case(
        _with_h0, lambda *a: oracles.fidelity(*a[:4], R(lam=0.2), float(np.abs(a[4]).sum())), f"{ACTIONS} row.margin",
        reward.fidelity),
    **{f"fidelity {a}": with_cfg(reward.fidelity, oracles.fidelity, ACTIONS, R(average=a, no_action=-0.3))
       for a in reward.AVERAGES},
    **{f"pool {a}": with_cfg(reward.pool, lambda r, m, cfg: oracles.pool([float(x) for x in r[m]], cfg),
                             "row.earned row.box_mask", R(average=a)) for a in reward.AVERAGES},
    "total": Case(lambda *a: reward.total(*a, WEIGHTS),
                  lambda a, f, m: 2.0 * float(a) + 0.2 * float(f) + 0.5 * float(m), "row.answer row.format row.reward",
                  reward.total),
    **{f"place {a}": _place(R(average=a, w_cover=0.2, w_fidelity=0.7)) for a in reward.AVERAGES},
    "classify": Case(credit.classify, lambda c, r, m: np.array(
        [credit.NONE if not k else credit.REDUNDANT if j else credit.CORRECT if i else credit.ERRONEOUS
         for i, j, k in zip(c, r, m)], np.int32), "row.correct row.redundant row.box_mask", credit.classify),
    **{f"modulator {k}{'' if m else ', no mirror'}": _modulator(kind=k, mirror=m)
       for k in credit.KINDS for m in (True, False)},
    "token_advantages": Case(credit.token_advantages, oracles.token_advantages,
                             f"row.advantage row.modulator {TOKENS}", credit.token_advantages),
    "token_advantages, each its own": Case(credit.token_advantages, oracles.token_advantages,
                                           f"row.advantages row.modulator {TOKENS} row.step", credit.token_advantages),
    "sizes": Case(credit.sizes, oracles.sizes, "advantages plain sampled", credit.sizes),
    "keep_scale": Case(lambda *a: credit.keep_scale(a[0], credit.sizes(*a)),
                       lambda *a: oracles.keep_scale(a[0], oracles.sizes(*a)), "advantages plain sampled",
                       credit.keep_scale),
    "moments": Case(advantage.moments, oracles.moments, "advantages sampled", advantage.moments),
    "pooled": Case(lambda x, m: advantage.pooled([advantage.moments(r, k) for r, k in zip(x, m)]), oracles.moments,
                   "advantages sampled", advantage.pooled),
    **{f"standardize, divide={d}, floor={f}": with_cfg(advantage.standardize, oracles.standardize, "reward row_mask",
                                                       (d, f)) for d, f in ((True, 0.0), (True, 2.0), (False, 2.0))},
    **{f"relative {name}": Case(functools.partial(lambda cfg, r, m: advantage.relative(r, G, cfg, m), cfg),
                                functools.partial(lambda cfg, r, m: oracles.relative(r, G, cfg, m), cfg),
                                "reward row_mask", advantage.relative)
       for name, cfg in {"group": A(), "no floor": A(std_floor=0.0), "high floor": A(std_floor=1.0),
                         "Dr. GRPO": A(normalize_std=False), "rloo": A(kind="rloo"), "batch": A(kind="batch")}.items()},
    **{f"steps, floor={f}": with_cfg(advantage.steps, oracles.steps, "earned box_mask", (G, f)) for f in (0.0, 0.8)},
    **{f"informative, least={v}": Case(functools.partial(lambda v, r, m: advantage.informative(r, G, m, v), v),
                                       functools.partial(lambda v, r, m: np.array(oracles.informative(r, G, m, v)), v),
                                       "reward row_mask", advantage.informative) for v in (0.0, 1.5)},
    **{f"gae {gamma}, {lam}": with_cfg(advantage.gae, oracles.gae, "row.rewards row.value row.sampled",
                                       A(gamma=gamma, lam=lam))
       for gamma, lam in ((1.0, 0.95), (0.9, 0.0), (0.97, 1.0))},
    "masked_mean": Case(loss.masked_mean, lambda x, m: float(x[m].astype(np.float64).mean()) if m.any() else 0.0,
                        "entropy sampled", loss.masked_mean),
    **{f"aggregate {a}": with_cfg(loss.aggregate, oracles.aggregate, "plain sampled", L(aggregate=a, norm_tokens=5))
       for a in loss.AGGREGATES},
    **{f"log_ratio {n}": with_cfg(shown(loss.log_ratio, 2), oracles.log_ratio, "logp old sampled", LOSSES[n])
       for n in ("ppo", "gspo")},
    **{f"surrogate {n}": with_cfg(shown(loss.surrogate, 3), oracles.surrogate, "logp old advantages sampled", cfg)
       for n, cfg in LOSSES.items()},
    **{f"kl {e}": with_cfg(loss.kl, lambda p, r, e: np.vectorize(lambda p, r: oracles.kl(p, r, e))(p, r), "logp ref", e)
       for e in loss.ESTIMATORS},
    **{f"next_kl_coef, target {t}": with_cfg(loss.next_kl_coef, oracles.next_kl_coef, "kl_coef kl",
                                             (B, L(kl_target=t, kl_horizon=100.0))) for t in (0.0, 0.1)},
    **{f"sampler_weight, cap {c}": with_cfg(
        loss.sampler_weight, lambda o, s, cfg: np.vectorize(lambda o, s: oracles.sampler_weight(o, s, cfg))(o, s),
        "old sampler", L(sampler_cap=c)) for c in (0.0, 1.2)},
    **{f"value_loss, clip {c}": with_cfg(loss.value_loss, oracles.value_loss, "value value_old return sampled",
                                         L(value_clip=c)) for c in (0.0, 0.2)},
    **{f"policy_loss {n}": _policy_loss(
        dataclasses.replace(cfg, kl_coef=0.1, entropy_coef=0.02, sampler_cap=1.5), n == "ppo")
       for n, cfg in LOSSES.items()},
    "policy_loss k1, in the reward": _policy_loss(L(kl_coef=0.1, kl_estimator="k1", kl_in_reward=True), False),
    "policy_loss k2": _policy_loss(L(kl_coef=0.1, kl_estimator="k2"), False),
}


def leaves(result) -> dict[str, np.ndarray]:
  """Results by name: fields of a dataclass, keys of a dict, indices of a tuple."""
  result = vars(result) if dataclasses.is_dataclass(result) else result
  found, _ = jax.tree_util.tree_flatten_with_path(result)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


def assert_same(got: dict, want: dict, what: str):
  assert got.keys() == want.keys()
  for name in want:
    assert got[name].shape == want[name].shape, (what, name)
    np.testing.assert_allclose(got[name].astype(np.float64), want[name].astype(np.float64), rtol=1e-6, atol=1e-6,
                               err_msg=f"{what} {name}")


@functools.cache
def compiled(name: str):
  """The case's kernel, the kernel under vmap, and its gradient: compiled once for all regimes of the same shapes."""
  kernel = CASES[name].kernel

  def scalar(*args):
    found = kernel(*args)
    found = vars(found) if dataclasses.is_dataclass(found) else found
    floats = [x for x in jax.tree.leaves(found) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum((x.sum() for x in floats), jnp.float32(0))

  def gradients(*args):
    at = tuple(i for i, a in enumerate(args) if a.dtype == np.float32)
    return jax.grad(scalar, at)(*args) if at else ()

  return jax.jit(kernel), jax.jit(jax.vmap(kernel)), jax.jit(gradients)


# Without rounds all is compiled once more.
@pytest.mark.parametrize("regime", [pytest.param(r, marks=pytest.mark.slow) if r == "no rounds" else r
                                    for r in REGIMES])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_slow_loop_plain_compiled_and_mapped(name, regime):
  case, (jitted, mapped, gradients) = CASES[name], compiled(name)
  inputs = [case.arguments(draw(seed, regime)) for seed in range(DRAWS)]
  want = [leaves(case.oracle(*args)) for args in inputs]
  assert_same(leaves(case.kernel(*map(jnp.asarray, inputs[0]))), want[0], "plain")
  together = leaves(mapped(*map(np.stack, zip(*inputs))))
  for i, args in enumerate(inputs):
    assert_same(leaves(jitted(*args)), want[i], "jit")
    assert_same({k: v[i] for k, v in together.items()}, want[i], "vmap")
    for g, a in zip(gradients(*args), (a for a in args if a.dtype == np.float32)):
      assert g.shape == a.shape and np.isfinite(g).all()


def test_there_is_a_case_for_every_kernel():
  public = {f for module in (reward, credit, advantage, loss)
            for name, f in inspect.getmembers(module, inspect.isfunction)
            if f.__module__ == module.__name__ and not name.startswith("_")}
  tested = {inspect.unwrap(case.of) for case in CASES.values()}
  assert public - tested == {reward.threshold}  # a host's scalar, with a test of its own


@pytest.mark.parametrize("name", CASES)
def test_a_case_can_fail(name):
  """Where nothing is missing, a kernel's results are not constant, and change with its inputs."""
  case = CASES[name]
  first, *others = (leaves(case.oracle(*case.arguments(draw(seed, "plenty")))) for seed in range(4))
  changes = any(not np.allclose(first[k], o[k]) for o in others for k in first)
  assert changes or name.startswith(("modulator none", "modulator additive", "sampler_weight, cap 0.0"))
