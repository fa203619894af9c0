"""Trains a policy to look where it should before it answers.  Start here.

    python -m virl_jax.train --config=configs/tiny.py --workdir=runs/tiny
    python -m virl_jax.train --config=configs/tiny.py --config.seed=1 --config.steps=50

A workdir, which may be gs://BUCKET/DIR, holds config.json, data.json, metrics.jsonl, wallclock.jsonl, checkpoints/,
rollouts/, eval_before.json, eval_after.json, report.html, and bad_batches/ if updates were skipped (docs/monitors.md).
Stop it at any time and give the same command again: it goes on from the last checkpoint, and ends as if it had not
been stopped.  Ctrl-C and SIGTERM save the last finished step first, and end it with status 130 and 0.  With
--resume-with-changes it goes on with another learning rate, say.

Several processes, each with devices of its own, train together as one: start each with the same command, and
--coordinator=HOST:PORT --num_processes=N --process_id=I, or VIRL_JAX_DISTRIBUTED=auto where JAX knows the cluster.
"""

from __future__ import annotations

if __name__ == "__main__":
  from virl_jax.run import signals
  signals.install()

import contextlib
import functools
import json
import os
import pathlib
import time

from absl import app
from absl import flags
from etils import epath
import jax
from ml_collections import config_flags
import numpy as np

from virl_jax import plan
from virl_jax import types
from virl_jax.data import batches
from virl_jax.eval import harness
from virl_jax.eval import outcome
from virl_jax.learner import checkpoint
from virl_jax.learner import step as step_lib
from virl_jax.model import family
from virl_jax.report import html
from virl_jax.rl import reward
from virl_jax.rollout import dynamic
from virl_jax.rollout import pack
from virl_jax.rollout import sample
from virl_jax.rollout import turns
from virl_jax.run import ending
from virl_jax.run import files
from virl_jax.run import goodput
from virl_jax.run import hosts
from virl_jax.run import load
from virl_jax.run import memory
from virl_jax.run import pace
from virl_jax.run import record as record_lib
from virl_jax.run import setup
from virl_jax.run import watch
from virl_jax.run import workdir as workdir_lib

_EVAL_STREAM = 2 ** 31 - 1  # folded into the root key; no step is ever numbered so


def train(c, workdir: str, resume_with_changes: bool = False) -> dict:
  """Runs the whole of it: evaluation, training, evaluation, report.

  Args:
    c: the configuration, as `config.default` has it.
    workdir: the folder that the run owns, or gs://BUCKET/DIR.
    resume_with_changes: whether the configuration may differ from the one that the workdir holds; see `workdir.claim`.

  Returns:
    The last step's metrics.

  Raises:
    ValueError: if the configuration, the model, the data or the workdir won't do, or the devices are too small.
  """
  began = time.time()
  workdir_lib.alike(c)
  p = setup.pieces(c)
  plan.check(c, p)
  source = setup.source(c, "train")
  with (workdir_lib.claim(workdir, c, source, resume_with_changes) as claimed,
        watch.over(claimed.folder, watch.Config(**c.watch))):
    return _train(c, p, source, claimed, began)


def _train(c, p: setup.Pieces, source, claimed: workdir_lib.Claimed, began: float) -> dict:
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
  policy = lambda state: family.whole(state.params, base.frozen, p.step.model)
  ref_params = step_lib.reference(base.trained, base.frozen, p.step) if c.loss.kl_coef else None

  # --- how good is the base? ---------------------------------------------------------------------------
  fits = functools.partial(turns.check, p.policy)
  held_out = _held_out(c, fits) if c.eval.tasks else None
  clock.lap("startup")
  before = _evaluate(c, p, base.params, held_out, root_key, workdir, "before")
  clock.lap("evaluation")

  # --- where are we? -----------------------------------------------------------------------------------
  state = step_lib.init_state(base.trained, p.step.optim, c.loss.kl_coef,
                              p.policy.model.text.hidden if c.advantage.kind == "gae" else 0, p.step.offload,
                              family.tables(p.step.model)[0])
  checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", c.checkpoint.every, c.checkpoint.keep,
                                       bool(c.checkpoint.best))
  start, state = checkpoints.resume(state)
  if start:
    hosts.say(f"going on from step {start}")
  rows = c.rollout.prompts * c.rollout.group_size
  hosts.say(memory.cache_size(p.policy.model, c.rollout.max_total_tokens, c.engine.slots, rows, p.policy.mesh,
                              memory.free_bytes()))
  learner = pace.learner(c, p.step.model, jax.devices())
  record = record_lib.Recorder(workdir, c, start, workdir_lib.header(c, claimed.changed), learner, clock,
                                p.policy.codec.decode)
  feed = batches.Feed(source, c.seed, c.rollout.prompts, c.image.decode_max_pixels, fits)
  feed.skipped = record.last.get("data/skipped", 0)  # what an earlier process passed over
  clock.lap("startup", resumed=start)

  # --- the loop ----------------------------------------------------------------------------------------
  with contextlib.closing(feed), ending.Kept(checkpoints, start, state, record.close) as kept:
    for step in range(start, c.steps):
      if record.stopping:  # perhaps in an earlier process
        break
      record.begin()
      key = jax.random.fold_in(root_key, step)  # so that resuming needs no RNG state
      tasks = feed.batch(step)                  # pure in (seed, step)
      record.lap("data")
      weights = sample.weights(policy(state), p.policy.model, p.policy.mesh)  # as rollouts want them
      record.lap("weights", weights)
      trajectories, rolled_out = dynamic.run(   # G of each task, and which answers are right
          p.policy, weights, tasks, functools.partial(feed.further, step), key, c.rollout.group_size,
          c.rollout.resample, functools.partial(_informative, p, step))
      gib = memory.device_gib(weights)
      del weights                               # an update wants the room
      record.lap("rollout")
      parts = pack.split(trajectories, c.rollout.group_size, c.ppo.minibatches)
      minibatches, scores = zip(*step_lib.score(
          state, ref_params, [hosts.place_batch(pack.pack(part, p.pack), p.mesh) for part in parts], p.step,
          _threshold(p, step), base.frozen))
      record.lap("score", minibatches)
      with kept.changing():  # until the step is finished, there is no state that could be saved
        updates, limit = [], record.limit
        for minibatch in c.ppo.epochs * minibatches:
          state, metrics = step_lib.update_step(state, minibatch, p.step, base.frozen, limit)
          updates.append(metrics)
        record.step(step, parts, minibatches, (scores, updates), rolled_out | {
            "data/skipped": feed.skipped, "rollout/weights_gib": gib})
        # After the log, which it never runs ahead of.
        kept.finished(step + 1, state, last=step + 1 == c.steps or bool(record.stopping or record.stuck),
                      score=record.score(c.checkpoint.best, c.checkpoint.every))
      if record.stuck:
        hosts.say(f"report: {hosts.first(lambda: html.write(str(workdir)))}")
        raise SystemExit(record.stuck)

  # --- what came of it ---------------------------------------------------------------------------------
  clock.lap("checkpoint")
  if stopped := record.stopping:
    hosts.say(f"stopped by {stopped.name}, which began at step {stopped.step + 1}. To go on, give the same command "
              "with --config.monitor.stop='()'")
  after = _evaluate(c, p, policy(state), held_out, root_key, workdir, "after", before)
  clock.lap("evaluation")
  if after is not None:
    hosts.say("\n" + outcome.format_table(before, after, after["difference"]) + "\n")
  hosts.say(goodput.said(clock.parts))
  hosts.say(f"report: {hosts.first(lambda: html.write(str(workdir)))}")
  return record.last


def _held_out(c, fits) -> list:
  """The tasks that are asked before and after."""
  drawn = batches.held_out(setup.source(c, "test"), c.eval.tasks, c.image.decode_max_pixels, c.data.split_seed, fits)
  batches.report(drawn)
  return drawn.tasks


def _evaluate(c, p, params, tasks, root_key, workdir: epath.Path, when: str, before: dict | None = None
              ) -> dict | None:
  """Evaluates unless the workdir already has the answer; keeps a few trajectories for the report."""
  file = workdir / f"eval_{when}.json"
  if tasks is None:
    return None
  if when == "before" and (kept := hosts.first(lambda: _of_these(file, tasks) if files.exists(file) else None)):
    return kept
  hosts.say(f"evaluating {when} training: {len(tasks)} held-out tasks")
  began = time.perf_counter()
  weights = sample.weights(params, p.policy.model, p.policy.mesh)
  judged = harness.run(p.policy, weights, tasks, jax.random.fold_in(root_key, _EVAL_STREAM),
                       c.engine.slots or c.rollout.prompts * c.rollout.group_size, c.eval.temperature, p.step.reward)
  result = harness.result(judged, c.reward.h0, c.eval.bootstrap)
  if before is not None:
    result["difference"] = outcome.difference(harness.outcomes(before, tasks), harness.outcomes(result), c.reward.h0,
                                              c.eval.bootstrap)
  shown = [j.entry(p.policy.codec.decode) for j in judged[:c.log.gallery]]
  record_lib.save_gallery(workdir / "rollouts" / f"{when}.jsonl", shown, c.log.gallery)
  hosts.first(lambda: files.write_text(file, json.dumps(result) + "\n"))
  hosts.say(f"evaluated in {time.perf_counter() - began:.0f} s")
  return result


def _of_these(file: epath.Path, tasks) -> dict:
  """A kept evaluation, if it is about the tasks that there are now."""
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


def _informative(p, step: int, found: list[types.Trajectory]) -> np.ndarray:
  """bool for each trajectory: whether its group is informative, at this step's threshold."""
  return step_lib.informative(pack.boxes(found, p.pack.max_rounds), *pack.outcomes(found), pack.answerable(found),
                              pack.counted(found, p.pack.mask_stops), p.step.judge, _threshold(p, step))


def _threshold(p, step: int) -> np.float32:
  return np.float32(reward.threshold(p.step.reward, step))


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines what the command line takes; not on import, for other commands have flags of the same names."""
  config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
  flags.DEFINE_string("workdir", None, "Where the run lives, a folder or gs://BUCKET/DIR; runs/NAME_OF_CONFIG by "
                      "default.", flag_values=values)
  flags.DEFINE_bool("resume-with-changes", False, "Go on though the configuration differs from the workdir's, as long "
                    "as model, data and evaluation do not; metrics.jsonl keeps what it was.", flag_values=values)
  hosts.define_flags(values)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  args = flags.FLAGS
  setup.begin()
  with setup.told():
    hosts.join(args.coordinator, args.num_processes, args.process_id, args.join_timeout_s)
    name = pathlib.Path(setup.config_file(args)).stem
    train(args.config, args.workdir or os.path.join("runs", name), args["resume-with-changes"].value)


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=setup.parse)
