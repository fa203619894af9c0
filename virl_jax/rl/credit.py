"""Bi-level credit assignment: from one advantage a trajectory to one advantage a token.

The coarse level is the trajectory's advantage A.  The fine level multiplies A, on the tokens of
visual action k, by m_k, which depends on the class of the action and on the sign of A:

                  correct     redundant          erroneous
    A > 0         h_good      h_redundant        h_bad
    A < 0         h_bad       2 - h_redundant    h_good
    A = 0         1           1                  1

A good trajectory praises its correct zooms most; a bad one blames its erroneous zooms most.  Other `KINDS`:

    soft      the step from h_bad to h_good is a sigmoid of (score - h0) / softness; a redundant action gets
              at most h_redundant, and at least 2 - h_redundant of the blame
    additive  A + step_weight * a_k, where a_k compares the action's own reward with those of all actions of
              the group (`advantage.steps`)
    none      A

Without `mirror`, the row of A > 0 serves A < 0 too.

Our reading: the paper names the amplification and attenuation; this table and the mirror image for
A < 0 are ours, and so are the other kinds.

A worked example.  Three zooms: one hits, the second hits the same target again without refining it,
the third misses.  The tokens are: thought, zoom 0, tool result, zoom 1, zoom 2, answer.

>>> import jax.numpy as jnp
>>> from virl_jax.rl import credit
>>> cfg = credit.Config(h_good=1.5, h_redundant=0.75, h_bad=0.5)
>>> correct_R, redundant_R = jnp.array([True, True, False]), jnp.array([False, True, False])
>>> class_R = credit.classify(correct_R, redundant_R, mask_R=jnp.array([True, True, True]))
>>> [credit.NAMES[int(c)] for c in class_R]
['correct', 'redundant', 'erroneous']
>>> action_T = jnp.array([-1, 0, -1, 1, 2, -1])
>>> sampled_T = jnp.array([True, True, False, True, True, True])
>>> for advantage in (2.0, -2.0):
...   m_R = credit.modulator(class_R, advantage, cfg)
...   print(m_R.tolist(), credit.token_advantages(advantage, m_R, action_T, sampled_T).tolist())
[1.5, 0.75, 0.5] [2.0, 3.0, 0.0, 1.5, 1.0, 2.0]
[0.5, 1.25, 1.5] [-2.0, -1.0, 0.0, -2.5, -3.0, -2.0]
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from virl_jax import checks

CORRECT, REDUNDANT, ERRONEOUS, NONE = 0, 1, 2, -1
NAMES = {CORRECT: "correct", REDUNDANT: "redundant", ERRONEOUS: "erroneous", NONE: "none"}


KINDS = ("hard", "soft", "additive", "none")
SCOPES = ("turn", "call", "box")


@dataclasses.dataclass(frozen=True)
class Config:
  """What is done at the fine level; see the module docstring.

  Attributes:
    kind: one of `KINDS`.
    scope: which tokens are an action's, one of `SCOPES`: its whole turn with the reasoning that leads to it,
      the tool call, or the four numbers of the box.
    h_good: amplifies (> 1).
    h_redundant: attenuates the redundant (in [0, 1]).
    h_bad: attenuates (in [0, 1]).
    softness: width of the sigmoid around h0, in units of the score, if kind is "soft".
    mirror: whether blame mirrors praise.
    step_weight: of the actions' own advantages, if kind is "additive".
    keep_scale: scale a batch's token advantages so that their mean absolute value is the same as without this level.
  """

  kind: str = "hard"
  scope: str = "turn"
  h_good: float = 1.5
  h_redundant: float = 0.75
  h_bad: float = 0.5
  softness: float = 0.1
  mirror: bool = True
  step_weight: float = 0.5
  keep_scale: bool = False

  def __post_init__(self):
    checks.section(vars(self), "credit", kind=checks.one_of(KINDS), scope=checks.one_of(SCOPES), h_good=checks.real(1),
                   h_redundant=checks.real(0, 1), h_bad=checks.real(0, 1), softness=checks.real(above=0),
                   mirror=checks.flag, step_weight=checks.real(0), keep_scale=checks.flag)


def classify(correct_R: jax.Array, redundant_R: jax.Array, mask_R: jax.Array) -> jax.Array:
  """The class of each visual action.

  Args:
    correct_R: bool[R], the action hits a target.
    redundant_R: bool[R], all targets that it hits were hit before, and it refines none; outranks correct.
    mask_R: bool[R], True on actions that can be judged; pass `reward.Fidelity.target_R >= 0`, so
      that on a task without boxes no zoom is called erroneous.

  Returns:
    int32[R], one of CORRECT, REDUNDANT, ERRONEOUS, NONE.

  Raises:
    ValueError: shapes differ.

  Source: ViRL (arXiv 2511.23031), fine-grained credit assignment.
  """
  if not correct_R.shape == redundant_R.shape == mask_R.shape:
    raise ValueError("correct_R, redundant_R and mask_R must have the same shape. "
                     f"Received: {correct_R.shape}, {redundant_R.shape}, {mask_R.shape}")
  class_R = jnp.where(redundant_R, REDUNDANT, jnp.where(correct_R, CORRECT, ERRONEOUS))
  return jnp.where(mask_R, class_R, NONE).astype(jnp.int32)


def modulator(class_R: jax.Array, advantage: jax.Array, cfg: Config, margin_R: jax.Array | None = None) -> jax.Array:
  """What the advantage is multiplied by on the tokens of each visual action.

  Args:
    class_R: int32[R], from `classify`.
    advantage: float32 scalar, the trajectory's.
    cfg: the modulators.
    margin_R: float32[R], score - h0 of each action; needed if kind is "soft".

  Returns:
    float32[R]; 1 for NONE, and everywhere if the advantage is 0 or the kind does not multiply.

  Raises:
    ValueError: there is no such kind, or it lacks the margins.

  Source: ViRL (arXiv 2511.23031), bi-level credit assignment; the form is our reading.
  """
  if cfg.kind not in KINDS:
    raise ValueError(f"kind must be one of {', '.join(KINDS)}. Received: {cfg.kind!r}")
  if cfg.kind in ("additive", "none"):
    return jnp.ones(class_R.shape, jnp.float32)
  if cfg.kind == "soft":
    if margin_R is None or margin_R.shape != class_R.shape:
      raise ValueError(f"margin_R must have the shape of class_R, {class_R.shape}. "
                       f"Received: {None if margin_R is None else margin_R.shape}")
    praise_R = cfg.h_bad + (cfg.h_good - cfg.h_bad) * jax.nn.sigmoid(margin_R / cfg.softness)
    blame_R = cfg.h_good + cfg.h_bad - praise_R
    redundant_R = class_R == REDUNDANT
    praise_R = jnp.where(redundant_R, jnp.minimum(praise_R, cfg.h_redundant), praise_R)
    blame_R = jnp.where(redundant_R, jnp.maximum(blame_R, 2.0 - cfg.h_redundant), blame_R)
  else:
    index_R = jnp.clip(class_R, 0, 2)
    praise_R = jnp.array([cfg.h_good, cfg.h_redundant, cfg.h_bad], jnp.float32)[index_R]
    blame_R = jnp.array([cfg.h_bad, 2.0 - cfg.h_redundant, cfg.h_good], jnp.float32)[index_R]
  sign = jnp.sign(advantage)
  m_R = jnp.where(sign > 0, praise_R, jnp.where(sign < 0, blame_R if cfg.mirror else praise_R, 1.0))
  return jnp.where(class_R == NONE, 1.0, m_R)


def sizes(advantage_BT: jax.Array, plain_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """The size of a batch's token advantages, after the fine level and before: what `keep_scale` compares.

  Args:
    advantage_BT: float32[B, T], after the fine level.
    plain_BT: float32[B, T], before it.
    mask_BT: bool[B, T], the tokens that are trained on.

  Returns:
    float32[2]: the sums of their absolute values, so that those of a batch's parts add up to the batch's.

  Source: ours.
  """
  return jnp.stack([jnp.where(mask_BT, jnp.abs(x), 0.0).sum() for x in (advantage_BT, plain_BT)])


def keep_scale(advantage_BT: jax.Array, sizes_2: jax.Array) -> jax.Array:
  """Scales token advantages so that their mean absolute value over the batch is the same as without the fine level.

  Args:
    advantage_BT: float32[B, T], after the fine level.
    sizes_2: float32[2], of the whole batch, from `sizes`.

  Returns:
    float32[B, T]; unchanged if all advantages are 0.

  Source: ours.
  """
  now, wanted = sizes_2
  return advantage_BT * jnp.where(now > 0, wanted / jnp.where(now > 0, now, 1.0), 1.0)


def token_advantages(advantage: jax.Array, m_R: jax.Array, action_T: jax.Array, sampled_T: jax.Array,
                     step_R: jax.Array | None = None) -> jax.Array:
  """Spreads a trajectory's advantage over its tokens.

  Args:
    advantage: float32 scalar, the trajectory's; or float32[T], each token's own.
    m_R: float32[R], from `modulator`; R may be 0.
    action_T: int32[T], the visual action a token belongs to; -1 outside actions.
    sampled_T: bool[T], True on tokens that the policy wrote.
    step_R: float32[R], added on the action's tokens, such as `advantage.steps`; None for nothing.

  Returns:
    float32[T]: A * m_k + step_k on the sampled tokens of action k, A on other sampled tokens, 0 elsewhere.

  Raises:
    ValueError: shapes differ.

  Source: ViRL (arXiv 2511.23031), bi-level credit assignment.
  """
  if action_T.shape != sampled_T.shape:
    raise ValueError("action_T and sampled_T must have the same shape. "
                     f"Received: {action_T.shape}, {sampled_T.shape}")
  outside = m_R.shape[0]  # one more entry, for tokens outside actions; also serves R = 0
  at_T = jnp.where(action_T < 0, outside, jnp.minimum(action_T, outside))
  value_T = advantage * jnp.append(m_R, 1.0)[at_T]
  if step_R is not None:
    value_T = value_T + jnp.append(step_R, 0.0)[at_T]
  return jnp.where(sampled_T, value_T, 0.0)
