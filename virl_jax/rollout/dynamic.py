"""Rollouts of a step, graded.  Dynamic sampling: uninformative groups are replaced, the batch keeps its shape.

A group whose rewards are all equal is not informative: it has no advantage.  Instead of training on what is left,
further prompts are rolled out until there are as many groups as before, or the tries are spent; then the first of the
uninformative groups fill up.
Source: DAPO (arXiv 2503.14476), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools

import jax
import numpy as np

from virl_jax import types
from virl_jax.data import answers
from virl_jax.rollout import engine
from virl_jax.rollout import turns
from virl_jax.run import hosts
from virl_jax.run import verdicts

_FURTHER = 2 ** 30  # folded into the step's key; no trajectory's index is ever so large


def run(policy: turns.Policy, params: dict, tasks: list[types.Task], draw: Callable[[int], list[types.Task]],
        key: jax.Array, group_size: int, tries: int, informative: Callable[[list[types.Trajectory]], np.ndarray],
        judge: verdicts.Verdicts | None = None) -> tuple[list[types.Trajectory], dict[str, float]]:
  """Rolls out tasks, and further ones in place of groups that are not informative; says which answers are right.

  Args:
    policy: everything but the parameters.
    params: the policy's parameters.
    tasks: the step's own.
    draw: as many further tasks, for try 1, 2, ...; a pure function.
    key: of the step.
    group_size: G.
    tries: how many further batches at most; 0 keeps what comes.
    informative: bool for each trajectory of whole groups, whether its group is informative.
    judge: who is asked about answers that no rule takes; None for nobody.

  Returns:
    Trajectories, groups together, as many as the first try gave; and metrics: what all tries took, and how many
    further ones there were.
  """
  good, spare, wanted, stats, judged = [], [], 0, None, {}
  for attempt in range(tries + 1):
    of_try = jax.random.fold_in(key, _FURTHER + attempt) if attempt else key
    found, took = engine.run(policy, params, draw(attempt) if attempt else tasks, of_try, group_size)
    answers.grade(found, judge)
    if judge:
      judged = _added(judged, judge.metrics())
    stats = took if stats is None else _sum(stats, took)
    if not tries:
      return found, _metrics(stats, 0) | judged
    groups = [(attempt, i, found[i:i + group_size]) for i in range(0, len(found), group_size)]
    wanted = wanted or len(groups)
    for group, useful in zip(groups, np.asarray(informative(found))[::group_size], strict=True):
      (good if useful else spare).append(group)
    # Processes go on together: each keeps its own groups, and the one that lacks most decides.
    if hosts.agree([wanted - len(good)])[0] <= 0:
      break
  # In the order that they were drawn in, so that no minibatch gets all of those that fill up.
  kept = sorted((good + spare)[:wanted], key=lambda group: group[:2])
  return [t for *_, group in kept for t in group], _metrics(stats, attempt) | judged


def _added(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
  return {name: a.get(name, 0.0) + value for name, value in b.items()}


def _sum(a: engine.Stats, b: engine.Stats) -> engine.Stats:
  return engine.Stats(**{f.name: getattr(a, f.name) + getattr(b, f.name) for f in dataclasses.fields(engine.Stats)})


def _metrics(stats: engine.Stats, further: int) -> dict[str, float]:
  """Of all processes together, whose seconds pass at the same time."""
  all_ = functools.reduce(_sum, hosts.everyone(stats))
  each = jax.process_count()
  all_ = dataclasses.replace(all_, seconds=all_.seconds / each, idle_s=all_.idle_s / each)
  return all_.metrics() | {"rollout/further_batches": further}
