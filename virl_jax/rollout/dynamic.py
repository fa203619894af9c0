"""Rollouts of a step, graded.  Dynamic sampling: uninformative groups are replaced, the batch keeps its shape.

A group whose rewards are all equal is not informative: its advantages are 0.  Instead of training on fewer groups,
further prompts are rolled out, and the informative groups among them replace the uninformative ones in order, until
none is left or the tries are used up; the rest stays.  So the batch does not depend on how many processes there are,
and little of it moves between them.
Source: DAPO (arXiv 2503.14476), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import TypeVar

import jax
import numpy as np

from virl_jax import types
from virl_jax.data import answers
from virl_jax.rollout import engine
from virl_jax.rollout import turns
from virl_jax.run import hosts
from virl_jax.run import verdicts

T = TypeVar("T")
_FURTHER = 2 ** 30  # folded into the step's key; no trajectory's index is that large


def run(policy: turns.Policy, params: dict, tasks: list[types.Task], draw: Callable[[int], list[types.Task]],
        key: jax.Array, group_size: int, tries: int, informative: Callable[[list[types.Trajectory]], np.ndarray],
        judge: verdicts.Verdicts | None = None) -> tuple[list[types.Trajectory], dict[str, float]]:
  """Rolls out tasks, and further ones in place of groups that are not informative; grades the answers.

  Args:
    policy: everything but the parameters.
    params: the policy's parameters.
    tasks: the step's own.
    draw: gives as many further tasks, for try 1, 2, ...; a pure function.
    key: of the step.
    group_size: G.
    tries: how many further batches at most; 0 keeps the first as it is.
    informative: gives bool for each trajectory of whole groups: whether its group is informative.
    judge: the judge model that is asked about answers that are wrong by their rule; or None.

  Returns:
    Trajectories, graded, groups together, as many as the first try gave; and metrics: what all tries took, and how many
    further ones there were.
  """
  stats, judged = None, {}
  for attempt in range(tries + 1):
    of_try = jax.random.fold_in(key, _FURTHER + attempt) if attempt else key
    found, took = engine.run(policy, params, draw(attempt) if attempt else tasks, of_try, group_size)
    answers.grade(found, judge)
    if judge:
      judged = _added(judged, judge.metrics())
    stats = took if stats is None else _sum(stats, took)
    if not tries:
      return found, _metrics(stats, 0) | judged
    groups = {found[i].index // group_size: found[i:i + group_size] for i in range(0, len(found), group_size)}
    useful = hosts.in_order(list(zip(groups, np.asarray(informative(found))[::group_size].tolist(), strict=True)))
    if not attempt:
      batch, places = groups, [number for number, yes in enumerate(useful) if not yes]
    else:
      moves = list(zip(places, [number for number, yes in enumerate(useful) if yes]))
      batch |= _moved(groups, moves)
      places = places[len(moves):]
    if not places:
      break
  return [t for _, group in sorted(batch.items()) for t in group], _metrics(stats, attempt) | judged


def _moved(groups: dict[int, T], moves: list[tuple[int, int]]) -> dict[int, T]:
  """This process's part of the groups that move into the batch, by place.

  Args:
    groups: this process's groups of a try, by number.
    moves: (place in the batch, number in the try), for all processes; `hosts.mine` says whose each of the two is.
  """
  sent = {place: groups[number] for place, number in moves if number in groups and not hosts.mine(place)}
  arrived = {place: group for sent in hosts.everyone(sent) for place, group in sent.items()}
  return {place: groups[number] if number in groups else arrived[place]
          for place, number in moves if hosts.mine(place)}


def _added(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
  return {name: a.get(name, 0.0) + value for name, value in b.items()}


def _sum(a: engine.Stats, b: engine.Stats) -> engine.Stats:
  return engine.Stats(**{f.name: getattr(a, f.name) + getattr(b, f.name) for f in dataclasses.fields(engine.Stats)})


def _metrics(stats: engine.Stats, further: int) -> dict[str, float]:
  """Metrics of all processes together, whose seconds pass at the same time."""
  all_ = functools.reduce(_sum, hosts.everyone(stats))
  each = jax.process_count()
  all_ = dataclasses.replace(all_, seconds=all_.seconds / each, idle_s=all_.idle_s / each)
  return all_.metrics() | {"rollout/further_batches": further}
