"""What `train` and `sft` have in common: how a run begins, which steps it has, and how it ends.

Between `begin` and `end` each has a loop of its own:

    with loop.claimed(c, source, workdir) as claimed:
      run = loop.begin(c, p, claimed, source, began, learner)
      with run.kept() as kept:
        for step in run.steps():
          ...
          with kept.changing():
            state = update(state)
            run.record.step(step, ...)
            run.finished(kept, step, state)
          run.leave_if_stuck()
      return run.end(state)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import time

from absl import flags
from etils import epath
import jax
from ml_collections import config_flags

from virl_jax import config as config_lib
from virl_jax.data import batches
from virl_jax.data import judge_model
from virl_jax.eval import harness
from virl_jax.eval import outcome
from virl_jax.learner import checkpoint
from virl_jax.learner import state as state_lib
from virl_jax.model import family
from virl_jax.report import html
from virl_jax.rollout import sample
from virl_jax.rollout import turns
from virl_jax.run import ending
from virl_jax.run import files
from virl_jax.run import goodput
from virl_jax.run import hosts
from virl_jax.run import load
from virl_jax.run import pace
from virl_jax.run import record as record_lib
from virl_jax.run import setup
from virl_jax.run import sources
from virl_jax.run import verdicts
from virl_jax.run import watch
from virl_jax.run import workdir as workdir_lib

_EVAL_STREAM = 2 ** 31 - 1  # folded into the root key; no step has this number


@dataclasses.dataclass
class Run:
  """A run in progress.

  Attributes:
    c: its configuration.
    p: its pieces, see `setup.Pieces`.
    workdir: its folder.
    clock: writes down where its time goes.
    root_key: the key that those of steps are folded from.
    base: the policy that training began with, its frozen parameters included.
    fits: whether a task can be asked within the budgets; see `batches.Fits`.
    held_out: the tasks that are asked before and after training, or None.
    before: the evaluation before training, or None.
    checkpoints: where states are saved.
    start, state: the first step of this process, and the state before it.
    record: writes down each step.
    judge: the model that is asked about answers that no rule accepts, or None.
  """

  c: config_lib.ConfigDict
  p: setup.Pieces
  workdir: epath.Path
  clock: goodput.Clock
  root_key: jax.Array
  base: load.Loaded
  fits: batches.Fits
  held_out: list | None
  before: dict | None
  checkpoints: checkpoint.Checkpoints
  start: int
  state: state_lib.TrainState
  record: record_lib.Recorder
  judge: verdicts.Verdicts | None

  def policy(self, state: state_lib.TrainState) -> dict:
    """All parameters of the policy, as the model takes them."""
    return family.whole(state.params, self.base.frozen, self.p.step.model)

  def kept(self) -> ending.Kept:
    """The context that saves the last finished step, whatever ends the loop."""
    return ending.Kept(self.checkpoints, self.start, self.state, self.record.close)

  def steps(self) -> Iterator[int]:
    """The steps that are to be done, each begun in the record; they end early if an alarm, perhaps of an earlier
    process, ends the run."""
    for step in range(self.start, self.c.steps):
      if self.record.stopping:
        break
      self.record.begin()
      yield step

  def finished(self, kept: ending.Kept, step: int, state: state_lib.TrainState) -> None:
    """Notes that a step is finished, with the state after it; called after `record.step`, so that no checkpoint is
    ahead of the log."""
    c, record = self.c, self.record
    kept.finished(step + 1, state, last=step + 1 == c.steps or bool(record.stopping or record.stuck),
                  score=record.score(c.checkpoint.best, c.checkpoint.every))

  def leave_if_stuck(self) -> None:
    """Ends a run if too many of its last steps had updates that were not finite.

    Raises:
      SystemExit: says what to do.
    """
    if self.record.stuck:
      hosts.say(f"report: {hosts.first(lambda: html.write(str(self.workdir)))}")
      raise SystemExit(self.record.stuck)

  def end(self, state: state_lib.TrainState) -> dict:
    """Evaluates, prints what changed, writes the report; returns the last step's metrics."""
    self.clock.lap("checkpoint")
    if stopped := self.record.stopping:
      hosts.say(f"stopped by {stopped.name}, which began at step {stopped.step + 1}. To go on, give the same command "
                "with --config.monitor.stop='()'")
    after = evaluate(self.c, self.p, self.policy(state), self.held_out, self.root_key, self.workdir, "after",
                     self.judge, self.before)
    self.clock.lap("evaluation")
    if after is not None:
      hosts.say("\n" + outcome.format_table(self.before, after, after["difference"]) + "\n")
    hosts.say(goodput.said(self.clock.parts))
    hosts.say(f"report: {hosts.first(lambda: html.write(str(self.workdir)))}")
    return self.record.last


def define_flags(values: flags.FlagValues) -> None:
  """Defines the flags of a command that trains."""
  config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
  flags.DEFINE_string("workdir", None, "The run's folder, or gs://BUCKET/DIR; by default runs/NAME, by the "
                      "configuration's name.", flag_values=values)
  flags.DEFINE_bool("resume-with-changes", False, "Continue although the configuration differs from the workdir's, if "
                    "model, data and evaluation do not; metrics.jsonl keeps the old one.", flag_values=values)
  hosts.define_flags(values)


def joined(args: flags.FlagValues, suffix: str = "") -> str:
  """Joins other processes if the flags say so, and returns the workdir: by default runs/NAME and a suffix, NAME the
  configuration's.

  Raises:
    ValueError: there is no such configuration, or the processes don't find each other.
  """
  hosts.join(args.coordinator, args.num_processes, args.process_id, args.join_timeout_s)
  name = pathlib.Path(setup.config_file(args)).stem
  return args.workdir or os.path.join("runs", f"{name}{suffix}")


@contextlib.contextmanager
def claimed(c: config_lib.ConfigDict, source, workdir: str, resume_with_changes: bool = False,
            free: Collection[str] | None = None) -> Iterator[workdir_lib.Claimed]:
  """Claims the workdir for this process, and ends the process if it gets stuck.

  Args:
    c: the configuration.
    source: the data that is trained on.
    workdir: a folder, or gs://BUCKET/DIR.
    resume_with_changes, free: see `workdir.claim`.

  Raises:
    ValueError: the folder cannot be used.
  """
  with (workdir_lib.claim(workdir, c, source, resume_with_changes, free) as found,
        watch.over(found.folder, watch.Config(**c.watch))):
    yield found


def begin(c: config_lib.ConfigDict, p: setup.Pieces, claimed: workdir_lib.Claimed, source, began: float,
          learner: pace.Learner) -> Run:
  """Loads the base, evaluates it, and finds the step to go on from.

  Args:
    c: the configuration.
    p: the run's pieces.
    claimed: its workdir.
    source: the data that is trained on, with `describe`.
    began: when this process began, by `time.time`.
    learner: see `pace.Learner`.
  """
  # --- what is fixed -----------------------------------------------------------------------------------
  workdir = claimed.folder
  clock = goodput.Clock(str(workdir / "wallclock.jsonl") if hosts.leads() else None, began)
  hosts.say(source.describe())
  for caution in setup.cautions(c):
    hosts.say(f"WARNING: {caution}")
  for key, (old, new) in claimed.changed.items():
    hosts.say(f"config.{key} changes from {old!r} to {new!r}")
  root_key = jax.random.key(c.seed)
  base = load.base(p.hf_dir, c.model.dtype, p.mesh, p.step.model, c.seed)

  # --- how good is the base? ---------------------------------------------------------------------------
  fits = functools.partial(turns.check, p.policy)
  held_out = _held_out(c, fits) if c.eval.tasks else None
  clock.lap("startup")
  judge = verdicts.judge(judge_model.Config(**c.judge), workdir)
  before = evaluate(c, p, base.params, held_out, root_key, workdir, "before", judge)
  clock.lap("evaluation")

  # --- where are we? -----------------------------------------------------------------------------------
  state = state_lib.init(base.trained, p.step.optim, p.step.loss.kl_coef,
                              p.policy.model.text.hidden if p.step.advantage.kind == "gae" else 0, p.step.offload,
                              family.tables(p.step.model)[0])
  checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", c.checkpoint.every, c.checkpoint.keep,
                                       bool(c.checkpoint.best))
  start, state = checkpoints.resume(state)
  if start:
    hosts.say(f"going on from step {start}")
  record = record_lib.Recorder(workdir, c, start, workdir_lib.header(c, claimed.changed), learner, clock,
                               p.policy.codec.decode)
  return Run(c, p, workdir, clock, root_key, base, fits, held_out, before, checkpoints, start, state, record, judge)


def _held_out(c, fits) -> list:
  """The tasks that are asked before and after training."""
  drawn = batches.held_out(sources.load(c, "test"), c.eval.tasks, c.image.decode_max_pixels, c.data.split_seed, fits,
                           c.engine.threads)
  batches.report(drawn)
  return drawn.tasks


def evaluate(c, p, params, tasks, root_key, workdir: epath.Path, when: str, judge: verdicts.Verdicts | None = None,
             before: dict | None = None) -> dict | None:
  """Evaluates unless the workdir already has the answer; keeps a few trajectories for the report.

  Args:
    c, p: of the run.
    params: all parameters of the policy.
    tasks: what to ask; None for no evaluation.
    root_key: of the run.
    workdir: its folder.
    when: "before" or "after" training.
    judge: the model that is asked about answers that no rule accepts, or None.
    before: the evaluation to compare with, or None.

  Returns:
    What eval_WHEN.json holds; None for no evaluation.
  """
  file = workdir / f"eval_{when}.json"
  if tasks is None:
    return None
  if when == "before" and (kept := hosts.first(lambda: of_these(file, tasks) if files.exists(file) else None)):
    return kept
  hosts.say(f"evaluating {when} training: {len(tasks)} held-out tasks")
  began = time.perf_counter()
  weights = sample.weights(params, p.policy.model, p.policy.mesh)
  judged = harness.run(p.policy, weights, tasks, jax.random.fold_in(root_key, _EVAL_STREAM),
                       c.engine.slots or c.rollout.prompts * c.rollout.group_size, c.eval.temperature, p.step.reward,
                       judge)
  result = harness.result(judged, c.reward.h0, c.eval.bootstrap)
  if before is not None:
    result["difference"] = outcome.difference(harness.outcomes(before, tasks), harness.outcomes(result), c.reward.h0,
                                              c.eval.bootstrap)
  shown = [j.entry(p.policy.codec.decode) for j in judged[:c.log.gallery]]
  record_lib.save_gallery(workdir / "rollouts" / f"{when}.jsonl", shown, c.log.gallery)
  hosts.first(lambda: files.write_text(file, json.dumps(result) + "\n"))
  hosts.say(f"evaluated in {time.perf_counter() - began:.0f} s")
  return result


def of_these(file: epath.Path, tasks) -> dict:
  """A kept evaluation, which must be about the present tasks.

  Raises:
    ValueError: it is about others, or is not an evaluation.
  """
  try:
    result = json.loads(files.read_text(file))
    kept = {o.uid for o in harness.outcomes(result, tasks)}
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise ValueError(f"{file} must be an evaluation as a run writes it ({type(e).__name__}: {e}); delete it, and the "
                     "base is evaluated again") from e
  if len(result["outcomes"]) != len(tasks) or kept != {t.uid for t in tasks}:
    raise ValueError(f"{file} must be about the {len(tasks)} held-out tasks there are now. Received: "
                     f"{len(result['outcomes'])} tasks, {len(kept - {t.uid for t in tasks})} of them others; the data, "
                     "or how they are drawn, has changed: use another --workdir")
  return result
