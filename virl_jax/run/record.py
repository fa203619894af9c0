"""What a training run keeps of each step: its line in the log, alarms, and some trajectories for the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import pathlib
import platform
import time

import jax
import numpy as np

from virl_jax import types
from virl_jax.data import images
from virl_jax.eval import monitors
from virl_jax.learner import pooled
from virl_jax.report import drawn
from virl_jax.report import gallery
from virl_jax.rl import credit
from virl_jax.rollout import pack
from virl_jax.run import bad
from virl_jax.run import compiles
from virl_jax.run import files
from virl_jax.run import goodput
from virl_jax.run import hosts
from virl_jax.run import log as log_lib
from virl_jax.run import pace
from virl_jax.run import placement
from virl_jax.run import progress
from virl_jax.run import watch


class Recorder:
  """Writes a workdir's metrics.jsonl, rollouts/, bad_batches/ and tensorboard/, prints a line a step, raises alarms.

  It also logs to Weights & Biases, if the configuration says so.  Of several processes the first writes, and all know
  what it has written.

  Args:
    workdir: the run's folder.
    c: the configuration.
    start: the first step that will be recorded; what metrics.jsonl holds of it and of later steps is dropped.
    header: what the figures are made with; see `log.MetricsLog`.
    learner: the devices, and the operations of a step.
    clock: writes down where time goes.
    decode: text of token ids, for single tokens in the report; None leaves them out.
  """

  def __init__(self, workdir: pathlib.Path, c, start: int, header: dict, learner: pace.Learner, clock: goodput.Clock,
               decode: Callable[[Sequence[int]], str] | None = None):
    self._decode = decode
    self._workdir, self._cfg, self._watch = workdir, c.log, monitors.Config(**c.monitor)
    self._optim = c.optim
    self._compiled, self._learner, self._clock = compiles.Counter(), learner, clock
    file = str(workdir / "metrics.jsonl")
    sent = hosts.first(lambda: _logged(workdir / "metrics.jsonl"))  # before steps that will be done again are dropped
    self._log = hosts.first(lambda: log_lib.MetricsLog(file, start, header))
    self._history = hosts.first(lambda: log_lib.read(file))
    self._alarms = monitors.all_begun(self._history, self._watch)
    self._progress = log_lib.Progress(c.steps, start)
    leads = hosts.leads()
    boards = (log_lib.tensorboard_writer(str(workdir / "tensorboard"), c.log.tensorboard and leads, start),
              log_lib.wandb_writer(str(workdir), c.log.wandb if leads else "", sent, header["config"]))
    self._boards = [board for board in boards if board is not None]
    self._laps: dict[str, float] = {}
    self._waits, self._waited, self._pace = {}, 0.0, watch.Config(**c.watch)
    self._compiled_s, self._then = 0.0, time.perf_counter()

  @property
  def stopping(self) -> monitors.Alarm | None:
    """The alarm that ends the run, perhaps raised in an earlier process."""
    return monitors.stopping(self._alarms, self._watch)

  @property
  def limit(self) -> np.float32:
    """The largest gradient norm that the next step accepts; see `bad.limit`."""
    return bad.limit(self._history, self._optim.skip_above, self._optim.skip_window)

  @property
  def stuck(self) -> str | None:
    """What to do if too many of the last steps had updates that were not finite, else None; such a run should end."""
    return bad.advice(self._history, self._optim.stop_after, self._optim.learning_rate, self._workdir)

  @property
  def last(self) -> dict:
    """The last line of the log; empty before the first step."""
    return self._history[-1] if self._history else {}

  def score(self, name: str, steps: int) -> float | None:
    """How good the policy has been in the last steps: the mean of a metric, negated if "-" precedes its name.

    Args:
      name: of the metric, as in metrics.jsonl; "" for none.
      steps: how many of the last steps; at least one is used.

    Returns:
      The higher, the better; None without a name, or if the log has no such number.
    """
    found = [line.get(name.removeprefix("-")) for line in self._history[-max(steps, 1):]]
    found = [value for value in found if isinstance(value, (int, float))]
    if not name or not found:
      return None
    return float(np.mean(found)) * (-1 if name.startswith("-") else 1)

  def begin(self) -> None:
    """Begins a step; the time since the last one was spent on saving a checkpoint, and counts to this step."""
    now = time.perf_counter()
    self._laps, self._then = {"time/checkpoint_s": now - self._then}, now
    self._waits, self._waited = {}, hosts.waited()
    hosts.beat("the last step")

  def lap(self, phase: str, arrays=None) -> None:
    """Ends a phase of the step, once these arrays are computed; its time is what has passed since the last phase."""
    jax.block_until_ready(arrays)
    now, waited = time.perf_counter(), hosts.waited()
    self._laps[f"time/{phase}_s"], self._then = now - self._then, now
    self._waits[phase], self._waited = waited - self._waited, waited
    hosts.beat(phase)

  def step(self, step: int, parts: Sequence[list[types.Trajectory]], minibatches: Sequence[types.ScoredBatch],
           metrics: Sequence[Sequence[pooled.Metrics]], host: dict[str, float]) -> None:
    """Records a step; waits for the device.

    Args:
      step: which, counted from 0.
      parts: this process's trajectories of each minibatch.
      minibatches: the minibatches, scored.
      metrics: the device's: for each kind of call the metrics of its minibatches; updates come last.
      host: the host's metrics by name, the same on all processes.

    Raises:
      SystemExit: a metric is not finite, and no update was skipped for it.
    """
    found = {name: value for parts in metrics for name, value in bad.merge(parts).items()}
    if np.isfinite(self.limit):
      found["optim/limit"] = self.limit
    self.lap("update")
    mine = stops(sum(parts, [])) | pace.work(parts) | pace.device_memory(jax.local_devices())
    found |= self._laps | host | pooled.merge(hosts.everyone(mine)) | {
        "time/compile_s": self._compiled.seconds, "compile/count": self._compiled.count}
    found |= pace.metrics(found, self._learner) | self._goodput(step)
    line = hosts.first(lambda: self._log.write(step, found))
    if hosts.leads():
      self._progress.line(step, line)
    for board in self._boards:
      board.write(step, line)
    if not bad.failures(line):
      _check_finite(line, self._workdir, self._optim.learning_rate)
    if line.get(bad.SKIPPED):
      at = bad.save(self._workdir, self._cfg.bad_batches, line, metrics[-1], minibatches,
                    lambda i, which: entries(parts[i], minibatches[i], which, self._decode))
      hosts.say(bad.said(line, metrics[-1], at))
    self._history.append(line)
    if said := watch.slow(self._history, hosts.everyone((platform.node(), self._waits)), self._pace):
      hosts.say(said)
    begun = monitors.begun(self._history, self._watch)
    for alarm in begun if hosts.leads() else ():
      progress.say(f"alarm: {alarm.name}: {alarm.message}")
    self._alarms += begun
    if step and self._cfg.gallery_every and step % self._cfg.gallery_every == 0:
      kept = save_gallery(
          self._workdir / "rollouts" / f"step_{step:06d}.jsonl",
          entries(parts[0], minibatches[0], range(min(len(parts[0]), self._cfg.gallery)), self._decode),
          self._cfg.gallery)
      pictures = [drawn.picture(entry) for entry in kept] if self._boards else []
      for board in self._boards:
        board.pictures(step, pictures)
    self._then = time.perf_counter()

  def _goodput(self, step: int) -> dict[str, float]:
    """The share of all time since the run's first start that went into steps that count, this one included."""
    compile_s = self._compiled.seconds - self._compiled_s
    self._compiled_s = self._compiled.seconds
    self._clock.lap("step", step=step, compile_s=compile_s, checkpoint_s=self._laps["time/checkpoint_s"])
    return {"speed/goodput": goodput.share(self._clock.parts)}

  def close(self) -> None:
    """Closes the writers; everything is on disk when this returns."""
    for board in self._boards:
      board.close()


def _logged(file: pathlib.Path) -> int:
  """The first step that no earlier process has logged."""
  steps = [line["step"] for line in log_lib.read(str(file)) if "step" in line] if files.exists(file) else []
  return max(steps, default=-1) + 1


def save_gallery(file: pathlib.Path, entries: list[dict], most: int) -> list[dict]:
  """Writes the first `most` of all processes' entries for the report, and returns them."""
  all_ = hosts.in_order([(entry["rollout"], entry) for entry in entries[:most]])[:most]
  hosts.first(lambda: gallery.save(str(file), all_))
  return all_


def stops(trajectories: Sequence[types.Trajectory]) -> pooled.Metrics:
  """Share of trajectories by stop reason, and of tool calls that were refused."""
  n = len(trajectories)
  reasons = {f"stop/{r.value}": pooled.Ratio(sum(t.stop == r for t in trajectories), n) for r in types.StopReason}
  refused = sum(t.refused for t in trajectories)
  taken = sum(turn.action is not None for t in trajectories for turn in t.turns)
  return reasons | {"invalid_action_rate": pooled.Ratio(refused, refused + taken)}


def entries(trajectories: Sequence[types.Trajectory], scored: types.ScoredBatch, which: Sequence[int],
            decode: Callable[[Sequence[int]], str] | None = None) -> list[dict]:
  """Trajectories for the report, with their scores in training.

  Args:
    trajectories: this process's part of the batch, in order.
    scored: the batch.
    which: indices of the trajectories that are wanted.
    decode: text of token ids; None leaves out the scores of single tokens.
  """
  rows = list(zip(*placement.fetch_rows((scored.iou_BR, scored.class_BR, scored.modulator_BR, scored.advantage_B,
                                     scored.reward_B))))
  tokens = placement.fetch_rows({name: values for name, values in (
      ("advantage", scored.advantage_BT), ("action", scored.batch.action_BT), ("trainer", scored.logp_old_BT))
      if values is not None}) if decode is not None else {}
  order_B = range(len(rows))
  if scored.batch.order_B is not None:
    order_B = placement.fetch_rows(scored.batch.order_B) % len(rows)
  found = []
  for i in which:
    traj, (iou_R, class_R, modulator_R, advantage, earned) = trajectories[i], rows[order_B[i]]
    k = len(traj.regions)
    by_token = {name: values[order_B[i]] for name, values in tokens.items()}
    if by_token:
      action_T = by_token.pop("action")
      by_token["modulator"] = np.where(action_T >= 0, modulator_R[np.maximum(action_T, 0)], 1.0)
    parts = {"answer": traj.worth, "format": float(pack.well_formed(traj))}
    classes = [credit.NAMES[int(v)] for v in class_R[:k]]
    found.append(gallery.entry(traj, images.decode(traj.task.image), iou_R[:k].tolist(), classes,
                               modulator_R[:k].tolist(), float(advantage), float(earned), parts, decode, by_token))
  return found


def _check_finite(line: dict, workdir: pathlib.Path, rate: float) -> None:
  bad = sorted(k for k, v in line.items() if not np.isfinite(v))
  if bad:
    raise SystemExit(
        f"error: step {line['step']}: {', '.join(bad)} not finite. Look at optim/grad_norm and ppo/ratio_max in the "
        f"last lines of {workdir}/metrics.jsonl: if they grew, give the same command with --config.optim.learning_rate="
        f"{rate / 2:g} --resume-with-changes. It continues from the last checkpoint, or from the beginning if there "
        "is none. Unchanged, the command would reach this step again")
