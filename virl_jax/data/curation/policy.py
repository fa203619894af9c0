"""The stage `policy`: a policy's answers to a task, with zooms and without, and whether they are right.

The answers come from the engine, on the whole mesh, or from an endpoint.  What is sampled for a task depends on the
seed, the task's content and the number of the sample, not on its neighbours, its shard or how often the program was
stopped.  Answers are judged by the tasks' own rules (`data.answers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses

import jax

from virl_jax import types
from virl_jax.data import answers
from virl_jax.data import endpoint
from virl_jax.data.curation import stages
from virl_jax.eval import asked
from virl_jax.rollout import engine
from virl_jax.rollout import remote
from virl_jax.rollout import turns
from virl_jax.run import hosts

# (tasks, seeds, samples of each task, whether the policy may zoom) -> this process's trajectories; from an endpoint
# all, by index, or why there is none.
Rollout = Callable[[Sequence[types.Task], Sequence[int], int, bool], list[types.Trajectory | str]]


@dataclasses.dataclass(frozen=True)
class Asker:
  """A policy that can be asked.

  Attributes:
    policy: its shapes, wording and budgets.
    rollout: samples its answers.
    together: whether all processes take part in each shard; else shards are dealt to them.
    about: what its answers depend on, ready for JSON.
  """

  policy: turns.Policy
  rollout: Rollout
  together: bool
  about: dict


def by_engine(policy: turns.Policy, params: dict, cfg: stages.Policy, seed: int, about: dict) -> Asker:
  """Our own engine.

  Args:
    policy: everything but the parameters.
    params: its parameters, as rollouts need them.
    cfg: how it is asked.
    seed: of the sampling.
    about: see `Asker`.
  """
  key = jax.random.key(seed)

  def rollout(tasks, seeds, samples, zooms):
    of = policy if zooms else turns.without_actions(policy)
    return engine.run(of, params, list(tasks), key, samples, cfg.temperature, seeds=seeds)[0]

  return Asker(policy, rollout, True, about)


def by_endpoint(policy: turns.Policy, server: remote.Endpoint, cfg: stages.Policy, about: dict) -> Asker:
  """An endpoint; see `by_engine`."""
  def rollout(tasks, seeds, samples, zooms):
    of = policy if zooms else turns.without_actions(policy)
    return remote.attempts(of, server, tasks, seeds, cfg.temperature, samples, (endpoint.PutAside,))

  return Asker(policy, rollout, False, about)


def ask(asker: Asker, tasks: Sequence[types.Task], cfg: stages.Policy, seed: int) -> list[dict]:
  """A policy's answers to some tasks.

  Args:
    asker: the policy that is asked.
    tasks: the tasks; if all processes take part, the same on all.
    cfg: how often each is asked.
    seed: of the sampling.

  Returns:
    A dict for each task, in order, ready for JSON: "provenance"; "with" and "without", lists with {"score", "zooms",
    "stop", "answer"} for each sample; "unasked", why the task could not be asked, or None.  If an endpoint put a sample
    aside, the task has "lost", why, and no samples: see `endpoint.PutAside`.
  """
  why = [asked.unfit(asker.policy, task) for task in tasks]
  fit = [i for i, reason in enumerate(why) if reason is None]
  found = [{"provenance": task.provenance, "unasked": reason, "with": [], "without": []}
           for task, reason in zip(tasks, why)]
  for name, samples, zooms in (("with", cfg.with_zoom, True), ("without", cfg.without_zoom, False)):
    fit = [i for i in fit if "lost" not in found[i]]
    if not samples or not fit:
      continue
    seeds = [remote.seed(seed, tasks[i].provenance, name, k) for i in fit for k in range(samples)]
    said = asker.rollout([tasks[i] for i in fit], seeds, samples, zooms)
    whole = [t for t in said if not isinstance(t, str)]
    answers.grade(whole)
    lines = [(t.index, _line(t)) for t in whole]
    for at, line in enumerate(hosts.in_order(lines)) if asker.together else lines:
      found[fit[at // samples]][name].append(line)
    for at, it in enumerate(said):
      if isinstance(it, str):
        found[fit[at // samples]] |= {"with": [], "without": [], "lost": it}
  return found


def _line(t: types.Trajectory) -> dict:
  return {"score": t.worth, "zooms": len(t.regions), "stop": t.stop.value if t.stop else None, "answer": t.answer}
