"""Runs a policy on held-out tasks, and collects the outcome of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses

import jax

from virl_jax import types
from virl_jax.data import answers
from virl_jax.eval import outcome
from virl_jax.report import gallery
from virl_jax.rl import credit
from virl_jax.rl import judge as judge_lib
from virl_jax.rl import reward
from virl_jax.rollout import engine
from virl_jax.rollout import pack
from virl_jax.rollout import turns
from virl_jax.run import hosts
from virl_jax.run import verdicts


@dataclasses.dataclass(frozen=True)
class Judged:
  """A trajectory with its visual actions judged.

  Attributes:
    trajectory: what the policy did.
    ious: for each visual action, its best IoU with a ground-truth box.
    classes: for each visual action, a name from `credit.NAMES`.
  """

  trajectory: types.Trajectory
  ious: tuple[float, ...]
  classes: tuple[str, ...]

  @property
  def outcome(self) -> outcome.Outcome:
    t = self.trajectory
    return outcome.Outcome(
        uid=t.task.uid, correct=t.correct, ious=self.ious,
        invalid_actions=t.refused, has_boxes=bool(t.task.boxes),
        overlong=t.stop == types.StopReason.OVERLONG, kind=t.task.kind, answerable=bool(t.task.answers),
        answer=t.answer, score=t.score)

  def entry(self, decode: Callable[[Sequence[int]], str] | None = None) -> dict:
    """An entry for the report's gallery; see `gallery.entry`, also for `decode`."""
    t = self.trajectory
    return gallery.entry(t, t.task.image, self.ious, self.classes, None, None, None, None, decode)


_looks = jax.jit(judge_lib.looks, static_argnames="cfg")


def judge(trajectories: list[types.Trajectory], max_rounds: int, cfg: reward.Config,
          model: verdicts.Verdicts | None = None) -> list[Judged]:
  """Judges answers, and IoU and class of every visual action.

  Args:
    trajectories: any number, as a rollout gives them.
    max_rounds: most visual actions in one.
    cfg: the reward, for h0.
    model: the judge model that is asked about answers that are wrong by their rule, by all processes together; or None.
  """
  answers.grade(trajectories, model)
  if not trajectories:
    return []
  looks = _looks(pack.boxes(trajectories, max_rounds), cfg)
  iou_BR, class_BR = jax.device_get((looks.fidelity.iou_R, looks.class_BR))
  return [Judged(t, tuple(float(v) for v in iou_BR[b, :len(t.regions)]),
                 tuple(credit.NAMES[int(k)] for k in class_BR[b, :len(t.regions)]))
          for b, t in enumerate(trajectories)]


def run(policy: turns.Policy, params: dict, tasks: list[types.Task], key: jax.Array, slots: int,
        temperature: float, cfg: reward.Config, model: verdicts.Verdicts | None = None) -> list[Judged]:
  """One rollout of each task.

  Args:
    policy: everything but the parameters.
    params: the policy's parameters.
    tasks: what to ask, pictures decoded; as `engine.run` takes them.
    key: of the sampling.
    slots: rollouts at a time.
    temperature: 0 is greedy.
    cfg: the reward, for h0.
    model: see `judge`.

  Returns:
    One for each task, in order; with several processes, only this one's.
  """
  policy = dataclasses.replace(policy, engine=dataclasses.replace(policy.engine, slots=slots))
  return judge(engine.rollout(policy, params, tasks, key, 1, temperature), policy.rollout.max_rounds, cfg, model)


def result(judged: list[Judged], h0: float, bootstrap: int) -> dict:
  """What `eval_before.json` and `eval_after.json` hold: the summary, and each task's outcome, over all processes."""
  outcomes = hosts.in_order([(j.trajectory.index, j.outcome) for j in judged])
  return outcome.summary(outcomes, h0, bootstrap) | {"outcomes": [dataclasses.asdict(o) for o in outcomes]}


def outcomes(saved: dict, tasks: list[types.Task] | None = None) -> list[outcome.Outcome]:
  """The outcomes of a saved result.

  Args:
    saved: what `result` gave, read from JSON.
    tasks: the tasks, in order; they name the outcomes where the result does not, as in older runs.
  """
  found = saved["outcomes"]
  uids = [t.uid for t in tasks] if tasks and len(tasks) == len(found) else [f"number {i}" for i in range(len(found))]
  return [outcome.Outcome(**{"uid": uid, **o, "ious": tuple(o["ious"])}) for uid, o in zip(uids, found)]
