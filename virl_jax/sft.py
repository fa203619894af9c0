"""Supervised fine-tuning on trajectories: the protocol by example, before or instead of reward.

    python -m virl_jax.sft --config=configs/v7b.py --data=Mini-o3-Coldstart.json --workdir=runs/sft
    python -m virl_jax.sft --config=configs/tiny.py --data=runs/tiny --config.sft.least_reward=2.0

A demonstration is a conversation out of a file (Mini-o3's, ShareGPT's) or a rollout of a run.  `rollout.replay` writes
it again in our protocol, with crops that our own zoom cuts; it is packed as rollouts are, and the assistant's tokens
are learned.  The workdir is as `train` leaves one, and the command stops, goes on and joins processes as `train` does.
docs/sft.md has the formats, what is left out, and how RL goes on from the result.
"""

from __future__ import annotations

if __name__ == "__main__":
  from virl_jax.run import signals
  signals.install()

import contextlib
import copy
import dataclasses
import time

from absl import app
from absl import flags
import jax

from virl_jax import checks
from virl_jax import config as config_lib
from virl_jax import plan
from virl_jax.learner import step as step_lib
from virl_jax.model import sharding
from virl_jax.rollout import pack
from virl_jax.run import lessons
from virl_jax.run import loop
from virl_jax.run import pace
from virl_jax.run import placement
from virl_jax.run import setup
from virl_jax.run import workdir as workdir_lib

# A workdir is refused for other values of the knobs that training compares, and of these, which decide what is learned.
_FREE = config_lib.free_keys() - {f"sft.{name}" for name in (
    "batch", "frame", "only_right", "least_reward", "best_of", "most_left_out")}


def sft(c, workdir: str, resume_with_changes: bool = False) -> dict:
  """Runs all of it: evaluation, training, evaluation, report.

  Args:
    c: the configuration; `c.sft.data` says what is learned from.
    workdir: the folder that the run owns, or gs://BUCKET/DIR.
    resume_with_changes: see `train.train`.

  Returns:
    The last step's metrics.

  Raises:
    ValueError: if the configuration, the model, the demonstrations or the workdir cannot be used, or the devices are
      too small.
  """
  began = time.time()
  workdir_lib.alike(c)
  taught = by_example(c)
  p = setup.pieces(taught)
  p = dataclasses.replace(p, step=dataclasses.replace(p.step, temperature=1.0))
  plan.check(taught, p)
  with contextlib.closing(lessons.load(c, p.policy)) as demonstrations:
    with loop.claimed(c, demonstrations, workdir, resume_with_changes, _FREE) as claimed:
      demonstrations.look_through(claimed.folder)
      run = loop.begin(c, p, claimed, demonstrations, began, pace.learner(taught, p.step.model, jax.devices()))
      return _train(demonstrations, p, run)


def _train(demonstrations: lessons.Lessons, p: setup.Pieces, run: loop.Run) -> dict:
  state, record = run.state, run.record
  run.clock.lap("startup", resumed=run.start)
  with run.kept() as kept:
    for step in run.steps():
      trajectories = demonstrations.batch(step)  # pure in (seed, step)
      record.lap("data")
      batch = placement.place_batch(pack.pack(trajectories, p.pack), p.mesh)
      shown, of_batch = step_lib.shown(batch, p.step)
      record.lap("score", shown)
      with kept.changing():
        state, metrics = step_lib.imitate_step(state, batch, p.step, run.base.frozen, record.limit)
        record.step(step, [trajectories], [shown], ([of_batch], [metrics]), {})
        run.finished(kept, step, state)
      run.leave_if_stuck()
  return run.end(state)


def by_example(c: config_lib.ConfigDict) -> config_lib.ConfigDict:
  """The configuration of steps that learn by example: a batch of single trajectories, one update each, no reference.

  Args:
    c: any configuration; its rewards and advantages play no part.

  Raises:
    ValueError: the batch can't be split over the devices.
  """
  shards = sharding.row_shards(sharding.make(c.mesh.data, c.mesh.fsdp, c.mesh.tensor))
  checks.section(c.sft, "sft", batch=checks.whole(1))
  checks.need(c.sft.batch % shards == 0, "sft.batch", f"a multiple of the mesh's data x fsdp = {shards}", c.sft.batch)
  taught = copy.deepcopy(c).unlock()
  taught.engine.slots = c.engine.slots or c.rollout.prompts * c.rollout.group_size  # for evaluations
  taught.rollout.prompts, taught.rollout.group_size = c.sft.batch, 1
  taught.ppo.minibatches = taught.ppo.epochs = 1
  taught.advantage.kind, taught.advantage.drop_equal = "batch", False
  taught.loss.kl_coef, taught.loss.kl_target, taught.loss.kl_in_reward = 0.0, 0.0, False
  taught.learner.offload = tuple(name for name in c.learner.offload if name != "reference")
  if not c.eval.tasks:
    taught.data.source = "needle"  # there is no evaluation, and so no records are needed
  return taught


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the command's flags; not on import, because other commands have flags of the same names."""
  loop.define_flags(values)
  flags.adopt_module_key_flags(loop, values)  # so that --helpshort shows them
  flags.DEFINE_list("data", None, "Files of trajectories, or workdirs whose rollouts are learned from, separated by "
                    "commas; config.sft.data by default.", flag_values=values)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  args = flags.FLAGS
  setup.begin()
  with setup.told():
    workdir = loop.joined(args, "_sft")
    if args.data:
      args.config.sft.data = tuple(args.data)
    sft(args.config, workdir, args["resume-with-changes"].value)


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=setup.parse)
