"""Trains a policy to look where it should before it answers.  Start here.

    python -m virl_jax.train --config=configs/tiny.py --workdir=runs/tiny
    python -m virl_jax.train --config=configs/tiny.py --config.seed=1 --config.steps=50

A workdir holds config.json, metrics.jsonl, checkpoints/, rollouts/, eval_before.json, eval_after.json and
report.html.  Stop it at any time and give the same command again: it goes on from the last checkpoint, and
ends as if it had not been stopped.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import pathlib
import time

from absl import app
from absl import flags
import jax
from ml_collections import config_flags
import numpy as np

from virl_jax import types
from virl_jax.data import batches
from virl_jax.eval import harness
from virl_jax.eval import monitors
from virl_jax.eval import outcome
from virl_jax.learner import checkpoint
from virl_jax.learner import step as step_lib
from virl_jax.model import sharding
from virl_jax.report import gallery
from virl_jax.report import html
from virl_jax.rl import credit
from virl_jax.rl import reward
from virl_jax.rollout import dynamic
from virl_jax.rollout import pack
from virl_jax.rollout import plan
from virl_jax.run import compiles
from virl_jax.run import log as log_lib
from virl_jax.run import setup

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; runs/NAME_OF_CONFIG by default.")

_EVAL_STREAM = 2 ** 31 - 1  # folded into the root key; no step is ever numbered so


def train(c, workdir: str) -> dict:
  """Runs the whole of it: evaluation, training, evaluation, report.

  Args:
    c: the configuration, as `config.default` has it.
    workdir: the folder that the run owns.

  Returns:
    The last step's metrics.

  Raises:
    ValueError: if the configuration, the model, the data or the workdir won't do.
  """
  # --- what is fixed -----------------------------------------------------------------------------------
  p = setup.pieces(c)
  source = setup.source(c, "train")
  workdir = setup.claim_workdir(workdir, c)
  print(source.describe(), flush=True)
  compiled = compiles.Counter()
  root_key = jax.random.key(c.seed)
  base_params = setup.load_params(p, c.model.dtype)
  # The state is donated at each update, so a reference has to be a copy of its own.
  ref_params = jax.tree.map(lambda a: a.copy(), base_params) if c.loss.kl_coef else None

  # --- how good is the base? ---------------------------------------------------------------------------
  held_out = _held_out(c) if c.eval.tasks else None
  before = _evaluate(c, p, base_params, held_out, root_key, workdir, "before")
  if before is not None and len(before["outcomes"]) != len(held_out):
    raise ValueError(f"{workdir}/eval_before.json must be about the {len(held_out)} held-out tasks there are now. "
                     f"Received: {len(before['outcomes'])}; the data has changed, use another --workdir")

  # --- where are we? -----------------------------------------------------------------------------------
  state = step_lib.init_state(base_params, p.step.optim, c.loss.kl_coef,
                              p.policy.model.text.hidden if c.advantage.kind == "gae" else 0)
  checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", c.checkpoint.every, c.checkpoint.keep)
  start = checkpoints.latest() or 0
  if start:
    state = checkpoints.restore(start, state)
    print(f"going on from step {start}", flush=True)
  rows = c.rollout.prompts * c.rollout.group_size
  print(plan.cache(p.policy.model, c.rollout.max_total_tokens, c.rollout.slots, rows, p.mesh, plan.free_bytes()),
        flush=True)
  log = log_lib.MetricsLog(str(workdir / "metrics.jsonl"), start, setup.header(c))
  history = log_lib.read(str(workdir / "metrics.jsonl"))
  watch = monitors.Config(**c.monitor)
  alarms = monitors.all_begun(history, watch)
  progress = log_lib.Progress(c.steps, start)
  tensorboard = log_lib.tensorboard_writer(str(workdir / "tensorboard"), c.log.tensorboard, start)
  prefetch = concurrent.futures.ThreadPoolExecutor(1)
  # Each further try of a step walks through the data in an order of its own.
  draw = lambda step, attempt=0: prefetch.submit(batches.train, source, c.seed + attempt * 2 ** 32, step,
                                                 c.rollout.prompts, c.image.decode_max_pixels)
  further = lambda step, attempt: draw(step, attempt).result().tasks
  upcoming, skipped = draw(start), 0

  # --- the loop ----------------------------------------------------------------------------------------
  for step in range(start, c.steps):
    if monitors.stopping(alarms, watch):  # perhaps in an earlier process
      break
    began = time.perf_counter()
    key = jax.random.fold_in(root_key, step)  # so that resuming needs no RNG state
    drawn, upcoming = upcoming.result(), draw(step + 1)
    skipped += _report_skips(drawn)
    h0 = np.float32(reward.threshold(p.step.reward, step))
    trajectories, rolled_out, tries = dynamic.run(
        p.policy, state.params, drawn.tasks, functools.partial(further, step), key, c.rollout.group_size,
        c.rollout.resample, _teaches(p, h0))
    rolled = time.perf_counter()
    dealt = pack.split(trajectories, c.rollout.group_size, c.ppo.minibatches, (c.seed, step))
    scored, score_metrics = zip(*[
        step_lib.score_step(state, ref_params, sharding.place(pack.pack(part, p.pack), p.mesh), p.step, h0)
        for part in dealt])
    updates = []
    for minibatch in c.ppo.epochs * scored:
      state, update_metrics = step_lib.update_step(state, minibatch, p.step)
      updates.append(update_metrics)
    metrics = _merge(score_metrics) | _merge(updates)  # waits for the update
    metrics |= {"time/rollout_s": rolled - began, "time/update_s": time.perf_counter() - rolled,
                "time/compile_s": compiled.seconds, "compile/count": compiled.count, "data/skipped": skipped,
                "rollout/further_batches": tries, **_stops(trajectories), **rolled_out.metrics()}
    line = log.write(step, metrics)  # before the checkpoint: it never runs ahead of the log
    progress.line(step, line)
    if tensorboard is not None:
      tensorboard.write(step, line)
    _check_finite(line, workdir)
    history.append(line)
    alarms += _say(monitors.begun(history, watch))
    if step and step % c.log.gallery_every == 0:
      _keep(workdir / "rollouts" / f"step_{step:06d}.jsonl", dealt[0][:c.log.gallery], scored[0])
    checkpoints.maybe_save(step + 1, state, last=step + 1 == c.steps or bool(monitors.stopping(alarms, watch)))
  prefetch.shutdown(cancel_futures=True)
  checkpoints.close()
  if tensorboard is not None:
    tensorboard.close()

  # --- what came of it ---------------------------------------------------------------------------------
  if stopped := monitors.stopping(alarms, watch):
    print(f"stopped by {stopped.name}, which began at step {stopped.step + 1}. To go on, give the same command with "
          "--config.monitor.stop='()'", flush=True)
  after = _evaluate(c, p, state.params, held_out, root_key, workdir, "after", before)
  if after is not None:
    print("\n" + outcome.format_table(before, after, after["difference"]) + "\n", flush=True)
  print(f"report: {html.write(str(workdir))}", flush=True)
  lines = log_lib.read(str(workdir / "metrics.jsonl"))
  return lines[-1] if lines else {}


def _held_out(c) -> list:
  """The tasks that are asked before and after."""
  drawn = batches.held_out(setup.source(c, "test"), c.eval.tasks, c.image.decode_max_pixels)
  _report_skips(drawn)
  return drawn.tasks


def _evaluate(c, p, params, tasks, root_key, workdir: pathlib.Path, when: str, before: dict | None = None
              ) -> dict | None:
  """Evaluates unless the workdir already has the answer; keeps a few trajectories for the report."""
  file = workdir / f"eval_{when}.json"
  if tasks is None:
    return None
  if when == "before" and file.exists():
    return json.loads(file.read_text())
  print(f"evaluating {when} training: {len(tasks)} held-out tasks", flush=True)
  began = time.perf_counter()
  judged = harness.run(p.policy, params, tasks, jax.random.fold_in(root_key, _EVAL_STREAM),
                       c.rollout.slots or c.rollout.prompts * c.rollout.group_size, c.eval.temperature, p.step.reward)
  result = harness.result(judged, c.reward.h0, c.eval.bootstrap)
  if before is not None:
    result["difference"] = outcome.difference(harness.outcomes(before), harness.outcomes(result), c.reward.h0,
                                                  c.eval.bootstrap)
  gallery.save(str(workdir / "rollouts" / f"{when}.jsonl"), [j.entry for j in judged[:c.log.gallery]])
  setup.write_text(file, json.dumps(result) + "\n")
  print(f"evaluated in {time.perf_counter() - began:.0f} s", flush=True)
  return result


def _teaches(p, h0):
  """Whether each trajectory's group teaches something, at this threshold."""
  return lambda found: step_lib.teaches(pack.boxes(found, p.pack.max_rounds), *pack.outcomes(found), p.step, h0)


def _merge(parts) -> dict:
  """Metrics of several minibatches as one: maxima of maxima, sums of counts, means of the rest."""
  parts = jax.device_get(list(parts))
  how = {"max": np.max, "generated": np.sum}
  return {k: float(next((f for end, f in how.items() if k.endswith(end)), np.mean)([m[k] for m in parts]))
          for k in parts[0]}


def _stops(trajectories) -> dict:
  """Share of each stop reason, and of refused tool calls per trajectory."""
  n = len(trajectories)
  reasons = {f"stop/{r.value}": sum(t.stop == r for t in trajectories) / n for r in types.StopReason}
  errors = sum(turn.error is not None for t in trajectories for turn in t.turns)
  return reasons | {"invalid_action_rate": errors / max(1, errors + sum(len(t.boxes) for t in trajectories))}


def _check_finite(line: dict, workdir: pathlib.Path) -> None:
  bad = sorted(k for k, v in line.items() if not np.isfinite(v))
  if bad:
    raise SystemExit(f"step {line['step']}: {', '.join(bad)} not finite. Look at optim/grad_norm and ppo/ratio_max in "
                     f"the last lines of {workdir}/metrics.jsonl: if they grew, lower config.optim.learning_rate. "
                     "Earlier checkpoints are whole")


def _report_skips(drawn) -> int:
  for why in drawn.skipped:
    print(f"skipped {why}", flush=True)
  return len(drawn.skipped)


def _say(alarms: list) -> list:
  for alarm in alarms:
    print(f"alarm: {alarm.name}: {alarm.message}", flush=True)
  return alarms


def _keep(path: pathlib.Path, trajectories, scored) -> None:
  """Saves the first trajectories of a scored minibatch for the report, with what training made of them."""
  rows = zip(*jax.device_get((scored.iou_BR, scored.class_BR, scored.modulator_BR, scored.advantage_B,
                              scored.reward_B)))
  entries = []
  for traj, (iou_R, class_R, modulator_R, advantage, earned) in zip(trajectories, rows):
    k = len(traj.boxes)
    parts = {"answer": float(traj.correct), "format": float(pack.well_formed(traj))}
    entries.append(gallery.entry(traj, traj.task.image, iou_R[:k].tolist(), [credit.NAMES[int(v)] for v in class_R[:k]],
                                 modulator_R[:k].tolist(), float(advantage), float(earned), parts))
  gallery.save(str(path), entries)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  setup.begin()
  name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
  with setup.told():
    train(_CONFIG.value, _WORKDIR.value or os.path.join("runs", name))


if __name__ == "__main__":
  app.run(main)
