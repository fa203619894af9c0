"""A learner's step on the tiny run's own trajectories: joined rows against a row for each, and what scoring costs.

    python benchmarks/learner.py

Both sides get the same 128 trajectories, rolled out by the tiny base.  "own rows" pads each trajectory to the longest;
"joined" puts several into a row (sequence packing).  "two passes" computes the log-probabilities before the update in a
separate forward pass, as several updates of a batch need; "one pass" leaves them to the update.  The time of scoring
without that pass is what reward, credit and advantage kernels cost in a training step.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import runpy

import jax
import numpy as np
import timing  # of this folder

from virl_jax.data import batches
from virl_jax.learner import state as state_lib
from virl_jax.learner import step as step_lib
from virl_jax.model import family
from virl_jax.rollout import engine
from virl_jax.rollout import pack
from virl_jax.run import load
from virl_jax.run import memory
from virl_jax.run import placement
from virl_jax.run import setup
from virl_jax.run import sources

TINY = pathlib.Path(__file__).parents[1] / "configs" / "tiny.py"


class Side:
  """One way to do a step, whose scoring and update are timed separately."""

  def __init__(self, p, params, batch, h0: float):
    # A copy: an update donates its state.
    self.p, self.h0, self.batch = p, np.float32(h0), placement.place_batch(batch, p.mesh)
    self.state = state_lib.init(jax.tree.map(lambda a: a.copy(), params), p.step.optim, offload=p.step.offload,
                                     specs=family.of(p.step.model).specs(p.step.model))

  def score(self):
    self.scored = jax.block_until_ready(step_lib.score_step(self.state, None, self.batch, self.p.step, self.h0))[0]

  def update(self):
    self.state = jax.block_until_ready(step_lib.update_step(self.state, self.scored, self.p.step))[0]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeat", type=int, default=7)
  args = parser.parse_args()
  memory.keep_when_on_cpu()
  c = runpy.run_path(str(TINY))["get_config"]()
  p = setup.pieces(c)
  params = load.base(p.hf_dir, c.model.dtype, p.mesh).params
  tasks = batches.train(sources.load(c, "train"), c.seed, 0, c.rollout.prompts, c.image.decode_max_pixels).tasks
  trajectories = engine.rollout(p.policy, params, tasks, jax.random.key(c.seed), c.rollout.group_size)

  sides, packed = {}, {}
  for rows, join in (("own rows", False), ("joined", True)):
    packed[rows] = pack.pack(trajectories, dataclasses.replace(p.pack, join=join))
    for passes, single in (("two passes", False), ("one pass", True)):
      way = dataclasses.replace(p, step=dataclasses.replace(p.step, single_update=single))
      sides[f"{rows}, {passes}"] = Side(way, params, packed[rows], c.reward.h0)
  work = {f"{name}/{part}": getattr(side, part) for name, side in sides.items() for part in ("score", "update")}
  seconds = timing.interleaved(work, args.repeat)

  step = {n: [a + b for a, b in zip(seconds[f"{n}/score"], seconds[f"{n}/update"])] for n in sides}
  base = timing.median(step["own rows, two passes"])
  tokens = {n: b.rows.index_MUT.size for n, b in packed.items()}
  real = int(packed["joined"].valid_BT.sum())
  print(timing.table(
      ["", "score, s", "update, s", "both, s", "times as fast", "tokens in rows"],
      [[n, timing.spread(seconds[f"{n}/score"]), timing.spread(seconds[f"{n}/update"]), timing.spread(step[n]),
        f"{base / timing.median(step[n]):.2f}", tokens[n.split(",")[0]]] for n in sides]) + "\n")
  kernels = timing.median(seconds["joined, one pass/score"])
  share = kernels / timing.median(step["joined, one pass"])
  # The losses would tell nothing: on policy, a loss is minus the mean advantage, whatever the model computes.
  first, *others = (jax.tree.leaves(jax.device_get(s.state.params)) for s in sides.values())
  apart = max(float(np.abs(a - b).max()) for other in others for a, b in zip(first, other))
  print(f"{len(trajectories)} trajectories of {real} tokens; reward, credit and advantage take {1e3 * kernels:.1f} ms, "
        f"{100 * share:.2g} % of the learner's step; parameters after {args.repeat + 1} updates differ by up to "
        f"{apart:.1e}\n")
  print(timing.last_line(vars(args) | {
      "tokens": real, "tokens_in_rows": tokens, "kernel_share": share, "parameters_differ": apart,
      "seconds": {n: {"score": timing.median(seconds[f"{n}/score"]), "update": timing.median(seconds[f"{n}/update"]),
                      "both": timing.median(step[n])} for n in sides}}))


if __name__ == "__main__":
  main()
