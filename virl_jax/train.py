"""Trains a policy to look where it should before it answers.  Start here.

    python -m virl_jax.train --config=configs/tiny.py --workdir=runs/tiny
    python -m virl_jax.train --config=configs/tiny.py --config.seed=1 --config.steps=50

A workdir, which may be gs://BUCKET/DIR, holds config.json, data.json, metrics.jsonl, wallclock.jsonl, checkpoints/,
rollouts/, eval_before.json, eval_after.json, report.html, bad_batches/ if updates were skipped (docs/monitors.md), and
verdicts/ if a model judges answers (docs/data.md).
Stop it at any time and give the same command again: it goes on from the last checkpoint, and ends as if it had not
been stopped.  Ctrl-C and SIGTERM save the last finished step first; the exit status is 130 or 0, respectively.  With
--resume-with-changes it goes on with changes, such as another learning rate.

Several processes, each with devices of its own, train together as one: start each with the same command, and
--coordinator=HOST:PORT --num_processes=N --process_id=I, or VIRL_JAX_DISTRIBUTED=auto where JAX knows the cluster.
"""

from __future__ import annotations

if __name__ == "__main__":
  from virl_jax.run import signals
  signals.install()

import contextlib
import functools
import time

from absl import app
from absl import flags
import jax
import numpy as np

from virl_jax import plan
from virl_jax import types
from virl_jax.data import batches
from virl_jax.learner import state as state_lib
from virl_jax.learner import step as step_lib
from virl_jax.rl import reward
from virl_jax.rollout import dynamic
from virl_jax.rollout import pack
from virl_jax.rollout import sample
from virl_jax.run import hosts
from virl_jax.run import loop
from virl_jax.run import memory
from virl_jax.run import pace
from virl_jax.run import placement
from virl_jax.run import setup
from virl_jax.run import sources
from virl_jax.run import workdir as workdir_lib


def train(c, workdir: str, resume_with_changes: bool = False) -> dict:
  """Runs all of it: evaluation, training, evaluation, report.

  Args:
    c: the configuration, as `config.default` has it.
    workdir: the folder that the run owns, or gs://BUCKET/DIR.
    resume_with_changes: whether the configuration may differ from the one that the workdir holds; see `workdir.claim`.

  Returns:
    The last step's metrics.

  Raises:
    ValueError: if the configuration, the model, the data or the workdir cannot be used, or the devices are too small.
  """
  began = time.time()
  workdir_lib.alike(c)
  p = setup.pieces(c)
  plan.check(c, p)
  source = sources.load(c, "train")
  with loop.claimed(c, source, workdir, resume_with_changes) as claimed:
    run = loop.begin(c, p, claimed, source, began, pace.learner(c, p.step.model, jax.devices()))
    return _train(c, p, source, run)


def _train(c, p: setup.Pieces, source, run: loop.Run) -> dict:
  state, record = run.state, run.record
  ref_params = state_lib.reference(run.base.trained, run.base.frozen, p.step) if c.loss.kl_coef else None
  rows = c.rollout.prompts * c.rollout.group_size
  hosts.say(memory.cache_size(p.policy.model, c.rollout.max_total_tokens, c.engine.slots, rows, p.policy.mesh,
                              memory.free_bytes()))
  feed = batches.Feed(source, c.seed, c.rollout.prompts, c.image.decode_max_pixels, run.fits,
                      c.engine.threads)
  feed.skipped = record.last.get("data/skipped", 0)  # tasks that earlier starts of the run skipped
  run.clock.lap("startup", resumed=run.start)

  with contextlib.closing(feed), run.kept() as kept:
    for step in run.steps():
      key = jax.random.fold_in(run.root_key, step)  # so that resuming needs no RNG state
      tasks = feed.batch(step)                  # pure in (seed, step)
      record.lap("data")
      weights = sample.weights(run.policy(state), p.policy.model, p.policy.mesh)  # laid out for rollouts
      record.lap("weights", weights)
      trajectories, rolled_out = dynamic.run(   # G of each task, and which answers are right
          p.policy, weights, tasks, functools.partial(feed.further, step), key, c.rollout.group_size,
          c.rollout.resample, functools.partial(_informative, p, step), run.judge)
      gib = memory.device_gib(weights)
      del weights                               # an update needs the memory
      record.lap("rollout")
      parts = pack.split(trajectories, c.rollout.group_size, c.ppo.minibatches)
      minibatches, scores = zip(*step_lib.score(
          state, ref_params, [placement.place_batch(pack.pack(part, p.pack), p.mesh) for part in parts], p.step,
          _threshold(p, step), run.base.frozen))
      record.lap("score", minibatches)
      with kept.changing():  # until the step is finished, no state can be saved: updates donate it
        updates, limit = [], record.limit
        for minibatch in c.ppo.epochs * minibatches:
          state, metrics = step_lib.update_step(state, minibatch, p.step, run.base.frozen, limit)
          updates.append(metrics)
        record.step(step, parts, minibatches, (scores, updates), rolled_out | {
            "data/skipped": feed.skipped, "rollout/weights_gib": gib})
        run.finished(kept, step, state)
      run.leave_if_stuck()
  return run.end(state)


def _informative(p, step: int, found: list[types.Trajectory]) -> np.ndarray:
  """bool for each trajectory: whether its group is informative, at this step's threshold."""
  return step_lib.informative(pack.boxes(found, p.pack.max_rounds), *pack.outcomes(found), pack.answerable(found),
                              pack.counted(found, p.pack.mask_stops), p.step.judge, _threshold(p, step))


def _threshold(p, step: int) -> np.float32:
  return np.float32(reward.threshold(p.step.reward, step))


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the command's flags; not on import, because other commands have flags of the same names."""
  loop.define_flags(values)
  flags.adopt_module_key_flags(loop, values)  # so that --helpshort shows them


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  args = flags.FLAGS
  setup.begin()
  with setup.told():
    train(args.config, loop.joined(args), args["resume-with-changes"].value)


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=setup.parse)
