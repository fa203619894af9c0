"""A model that judges those answers of a run that no rule accepts: process 0 asks it, for all processes.

Verdicts are looked up in a folder of the workdir before the model is asked, so that a run that goes on from a
checkpoint has the same verdicts as before, and no answer is asked about twice.  In WORKDIR/verdicts/:

    000000.jsonl, ...    of one round of questions each: verdicts as `judge_model.Judge` has them, with the questions

If the endpoint gives no reply, the run says so and waits; after `patience_s` it ends, with its last finished step
saved.  No answer counts as wrong because of a connection.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import time

from etils import epath

from virl_jax import types
from virl_jax.data import judge_model
from virl_jax.run import files
from virl_jax.run import hosts

_ROUND = 32  # times `in_flight`: most questions before processes meet again
_TRIES = 2  # of a request before the run says that it waits
_LONGEST_WAIT_S = 60.0


class Verdicts:
  """The judge that `answers.grade` takes; see above.  All processes call it at the same places."""

  def __init__(self, cfg: judge_model.Config, folder: epath.Path):
    """Reads the verdicts that there are.

    Args:
      cfg: whom to ask.
      folder: of the verdicts; made when there are some.

    Raises:
      ValueError: the folder can't be read.
    """
    self._cfg, self._folder = cfg, folder
    self._fresh: list[dict] = []
    self._judge: judge_model.Judge | None = None  # process 0's
    self._took = (0, 0, 0)
    hosts.first(self._open)

  def __call__(self, trajectories: Sequence[types.Trajectory]) -> list[float | None]:
    """What answers are worth: 1 or 0; None for tasks whose answers are not judged.

    An answer is worth 0 if the reply says neither yes nor no.

    Args:
      trajectories: of this process, those that are wrong by their rules.

    Raises:
      judge_model.Unreachable: the endpoint has given no reply for `patience_s`.
      SystemExit: the same with several processes, on all of them, so that they leave together and save the last step.
      ValueError: the endpoint refuses the request.
      signals.Stopped: see `hosts.agree`.
    """
    mine = [self._question(t) for t in trajectories]
    all_ = [question for each in hosts.everyone([it for it in mine if it]) for question in each]
    found = self._verdicts(list(dict.fromkeys(all_)))
    asked = [it for it in all_ if judge_model.literal(it) is None]
    self._took = (len(asked), sum(found[it] or 0 for it in asked), sum(found[it] is None for it in asked))
    return [None if it is None else found[it] or 0.0 for it in mine]

  def metrics(self) -> dict[str, float]:
    """Counts of the last call, over all processes.

    Returns:
      judge/answers: answers that the model has judged, in this call or earlier.
      judge/right: those that it found right.
      judge/unclear: those that it called neither right nor wrong.
    """
    return dict(zip(("judge/answers", "judge/right", "judge/unclear"), map(float, self._took)))

  def _question(self, t: types.Trajectory) -> judge_model.Asked | None:
    """What to ask about a trajectory's answer; None if the task has options, no reference, or another rule."""
    task = t.task
    if task.options or not task.answers or task.match.partition(":")[0] not in self._cfg.rules:
      return None
    return judge_model.Asked(task.question, task.answers, t.answer)

  def _verdicts(self, asked: list[judge_model.Asked]) -> dict[judge_model.Asked, float | None]:
    found, size = {}, _ROUND * self._cfg.in_flight
    for at in range(0, len(asked), size):
      some = asked[at:at + size]
      began, wait_s = time.monotonic(), self._cfg.wait_s
      while isinstance(said := hosts.first(lambda some=some, began=began: self._try(some, began)), str):
        hosts.say(said)
        hosts.agree([0])  # so that a signal ends the wait, and `watch` sees progress
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
      if isinstance(said, judge_model.Unreachable):
        raise SystemExit(f"error: {said}") if hosts.several() else said
      hosts.agree([0])
      found |= zip(some, said)
    return found

  def _try(self, asked: list[judge_model.Asked], began: float) -> list[float | None] | str | judge_model.Unreachable:
    """Process 0's: the verdicts, or a line that says that the run waits, or the error once it has waited too long."""
    try:
      return self._judge.verdicts(asked)
    except judge_model.Unreachable as e:
      said = f"the judge has given no verdict for {time.monotonic() - began:.0f} s ({e})"
      if time.monotonic() - began > self._cfg.patience_s:
        return judge_model.Unreachable(f"{said}. Nothing was counted as wrong: give the same command when it replies")
      return f"{said}: waiting"
    finally:
      self._store()

  def _open(self) -> None:
    known = [line for name in files.names(self._folder) if name.endswith(".jsonl")
             for line in judge_model.lines(files.read_bytes(self._folder / name))]
    self._judge = judge_model.Judge(dataclasses.replace(self._cfg, tries=_TRIES), known, self._fresh.append, final=True)
    self._next = 1 + max((int(name[:6]) for name in files.names(self._folder) if name[:6].isdigit()), default=-1)

  def _store(self) -> None:
    if self._fresh:
      files.make(self._folder)
      files.write_text(self._folder / f"{self._next:06d}.jsonl", "".join(json.dumps(it) + "\n" for it in self._fresh))
      self._fresh.clear()
      self._next += 1


def judge(cfg: judge_model.Config, workdir: epath.Path) -> Verdicts | None:
  """The judge of a run; None if it has none."""
  return Verdicts(cfg, workdir / "verdicts") if cfg.model else None
