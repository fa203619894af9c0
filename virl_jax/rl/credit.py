"""Bi-level credit assignment: from one advantage a trajectory to one advantage a token.

The coarse level is the trajectory's advantage A.  The fine level multiplies A, on the tokens of
visual action k, by m_k, which depends on the class of the action and on the sign of A:

                  correct     redundant          erroneous
    A > 0         h_good      h_redundant        h_bad
    A < 0         h_bad       2 - h_redundant    h_good
    A = 0         1           1                  1

A good trajectory praises its correct zooms most; a bad one blames its erroneous zooms most.

Our reading: the paper names the amplification and attenuation; this table and the mirror image for
A < 0 are ours.

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

CORRECT, REDUNDANT, ERRONEOUS, NONE = 0, 1, 2, -1
NAMES = {CORRECT: "correct", REDUNDANT: "redundant", ERRONEOUS: "erroneous", NONE: "none"}


@dataclasses.dataclass(frozen=True)
class Config:
  """Modulators of the fine level; see the table in the module docstring.

  Attributes:
    h_good: amplifies (> 1).
    h_redundant: attenuates the redundant (in [0, 1]).
    h_bad: attenuates (in [0, 1]).
  """

  h_good: float = 1.5
  h_redundant: float = 0.75
  h_bad: float = 0.5


def classify(correct_R: jax.Array, redundant_R: jax.Array, mask_R: jax.Array) -> jax.Array:
  """The class of each visual action.

  Args:
    correct_R: bool[R], the action hits a target.
    redundant_R: bool[R], it hits one that was hit before, without refining it; outranks correct.
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


def modulator(class_R: jax.Array, advantage: jax.Array, cfg: Config) -> jax.Array:
  """What the advantage is multiplied by on the tokens of each visual action.

  Args:
    class_R: int32[R], from `classify`.
    advantage: float32 scalar, the trajectory's.
    cfg: the modulators.

  Returns:
    float32[R]; 1 for NONE, and everywhere if the advantage is 0.

  Source: ViRL (arXiv 2511.23031), bi-level credit assignment; the form is our reading.
  """
  praise_3 = jnp.array([cfg.h_good, cfg.h_redundant, cfg.h_bad], jnp.float32)
  blame_3 = jnp.array([cfg.h_bad, 2.0 - cfg.h_redundant, cfg.h_good], jnp.float32)
  sign = jnp.sign(advantage)
  m_3 = jnp.where(sign > 0, praise_3, jnp.where(sign < 0, blame_3, 1.0))
  return jnp.where(class_R == NONE, 1.0, m_3[jnp.clip(class_R, 0, 2)])


def token_advantages(advantage: jax.Array, m_R: jax.Array, action_T: jax.Array,
                     sampled_T: jax.Array) -> jax.Array:
  """Spreads a trajectory's advantage over its tokens.

  Args:
    advantage: float32 scalar, the trajectory's.
    m_R: float32[R], from `modulator`; R may be 0.
    action_T: int32[T], the visual action a token belongs to; -1 outside actions.
    sampled_T: bool[T], True on tokens that the policy wrote.

  Returns:
    float32[T]: A * m_k on the sampled tokens of action k, A on other sampled tokens, 0 elsewhere.

  Raises:
    ValueError: shapes differ.

  Source: ViRL (arXiv 2511.23031), bi-level credit assignment.
  """
  if action_T.shape != sampled_T.shape:
    raise ValueError("action_T and sampled_T must have the same shape. "
                     f"Received: {action_T.shape}, {sampled_T.shape}")
  outside = m_R.shape[0]  # one more entry, for tokens outside actions; also serves R = 0
  m_T = jnp.append(m_R, 1.0)[jnp.where(action_T < 0, outside, jnp.minimum(action_T, outside))]
  return jnp.where(sampled_T, advantage * m_T, 0.0)
