"""Updates that were skipped: a step's metrics without them, what is kept of their batches, and when the run should end.

The device skips an update that is not finite, or whose gradient norm is above a limit (`learner.step`).  Decisions here
depend on the lines of metrics.jsonl only, so that a run that was killed and resumed decides the same.

A folder in `bad_batches/` is about one step, and holds

    step.json           the step's line, and the metrics of each update, of which the line has only means
    trajectories.jsonl  as in rollouts/, of minibatches with a skipped update: those with numbers that are not finite
                        come first
    minibatch_N.npz     the arrays of such a minibatch by their names in `types`, without pictures; where several
                        processes train, each writes its own rows, minibatch_N_process_I.npz
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import io
import itertools
import json
import math
import os
import re
import statistics

from etils import epath
import jax
import numpy as np

from virl_jax import types
from virl_jax.learner import pooled
from virl_jax.report import gallery
from virl_jax.run import files
from virl_jax.run import hosts
from virl_jax.run import log as log_lib
from virl_jax.run import placement

SKIPPED, SPIKES = "optim/skipped", "optim/spikes"  # skipped updates, and those of them that were finite but too large
FOLDER = "bad_batches"
_TRAJECTORIES = 16  # of a step, that are kept
_NAME = re.compile(r"step_(\d+)")


def failures(line: dict) -> int:
  """How many updates of a step, or of one update's metrics, were skipped because they were not finite."""
  return round(line.get(SKIPPED, 0.0) - line.get(SPIKES, 0.0))


def merge(parts: Sequence[pooled.Metrics]) -> dict[str, float]:
  """`pooled.merge`; updates that are not finite are counted, and left out of all other metrics if any update is finite.

  One such update of eight says nothing about the step's loss, and would make a hole in every curve.  If none is finite,
  the metrics are reported as they are.

  Args:
    parts: the metrics of a step's calls of one kind; waits for the device.
  """
  parts = jax.device_get(list(parts))
  whole = pooled.merge(parts)
  good = [part for part in parts if not failures(pooled.merge([part]))]
  if not good or len(good) == len(parts):
    return whole
  return pooled.merge(good) | {name: whole[name] for name in (SKIPPED, SPIKES)}


def limit(history: Sequence[dict], above: float, window: int) -> np.float32:
  """The largest gradient norm that the next step accepts: a multiple of the median norm.

  The median includes spikes: if all gradients become larger for good, the limit follows within half a window.

  Args:
    history: lines of metrics.jsonl, oldest first; steps without a finite, positive norm don't count.
    above: the limit in medians; 0 for no limit.
    window: steps that the median is taken over.  There is no limit until half as many have a norm.

  Returns:
    The limit, infinite for none.

  Source: ours.
  """
  norms = [line.get("optim/grad_norm", 0.0) for line in history[-window:]]
  norms = [norm for norm in norms if math.isfinite(norm) and norm > 0]
  if not above or 2 * len(norms) < window:
    return np.float32(np.inf)
  return np.float32(min(above * statistics.median(norms), float(np.finfo(np.float32).max)))


def advice(history: Sequence[dict], most: int, rate: float, workdir: os.PathLike) -> str | None:
  """What to do about steps in a row with updates that were not finite, in a line; None while there are fewer.

  Args:
    history: lines of metrics.jsonl, oldest first.
    most: steps in a row that are too many; 0 for never.
    rate: the learning rate.
    workdir: the run's folder.
  """
  row = list(itertools.takewhile(failures, reversed(history)))
  if not most or len(row) < most:
    return None
  first, saved = row[-1]["step"], row[0]["step"] + 1
  return (
      f"error: {len(row)} steps in a row, from step {first} on, had updates that were skipped because their loss or "
      f"gradient was not finite; {workdir / FOLDER} shows the first. Look at optim/grad_norm and ppo/ratio_max "
      f"in the lines of {workdir}/metrics.jsonl before them. If they grew, the policy has diverged: in "
      f"{workdir}/checkpoints delete the checkpoints {first} to {saved}, and give the same command with "
      f"--config.optim.learning_rate={rate / 2:g} --resume-with-changes. It continues from the checkpoint before them, "
      "or from the beginning if there is none. If they did not, the batches are at fault: unchanged, the command goes "
      "on with the next step, and ends again if that is like these")


def said(line: dict, updates: Sequence[pooled.Metrics], at: os.PathLike | None) -> str:
  """A line for the terminal: how many updates of a step were skipped, why, and where the batch is kept.

  Args:
    line: the step's.
    updates: of the step, in order.
    at: a folder that `save` made, or None.
  """
  found = [each for update in updates if failures(each := pooled.merge([update]))]
  names = sorted({name for each in found for name, value in each.items() if not math.isfinite(value)})
  why = [f"{len(found)} not finite ({', '.join(names)})"] if found else []
  if line[SPIKES]:
    why.append(f"{line[SPIKES]:.0f} with a gradient longer than {line['optim/limit']:.3g}")
  where = f"; see {at}" if at else ""
  return f"skipped: {line[SKIPPED]:.0f} of {len(updates)} updates, {' and '.join(why)}{where}"


def save(workdir: os.PathLike, most: int, line: dict, updates: Sequence[pooled.Metrics],
         minibatches: Sequence[types.ScoredBatch], entries: Callable[[int, Sequence[int]], list[dict]]
         ) -> epath.Path | None:
  """Keeps the batch of a step with skipped updates, if there is room.

  The first batches stay, because later failures are often consequences of the first.  But a batch with an update that
  is not finite may replace the last one of a spike.

  Args:
    workdir: the run's folder.
    most: most folders in bad_batches/.
    line: the step's.
    updates: metrics of the step's updates, in order: all minibatches, once for each epoch.
    minibatches: all of the step.
    entries: (index of a minibatch, indices of its trajectories) -> what the report shows of them.

  Returns:
    The folder, or None if there was no room.
  """
  target = files.path(workdir) / FOLDER / f"step_{line['step']:06d}"
  if not hosts.first(lambda: _make_room(target, most, bool(failures(line)))):
    return None
  each = [pooled.merge([update]) for update in updates]
  chosen = sorted({i % len(minibatches) for i, one in enumerate(each) if one[SKIPPED]})
  found = {i: _arrays(minibatches[i]) for i in chosen}
  shown = []  # numbered in the order in which this process would show them
  for i, arrays in found.items():
    shown += enumerate(entries(i, _telling(arrays)[:_TRAJECTORIES]), start=len(shown))
    of = f"_process_{hosts.number()}" if hosts.several() else ""
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    files.write_bytes(target / f"minibatch_{i}{of}.npz", packed.getvalue())
  shown = hosts.in_order(shown)[:_TRAJECTORIES]
  told = [{"minibatch": i % len(minibatches), "epoch": i // len(minibatches), **one} for i, one in enumerate(each)]

  def finish() -> None:
    gallery.save(str(target / "trajectories.jsonl"), shown)
    files.write_text(target / "step.json", log_lib.dumps({"line": line, "updates": told}) + "\n")

  hosts.first(finish)
  return target


def kept(workdir: os.PathLike) -> list[tuple[int, epath.Path]]:
  """The folders in bad_batches/, with their steps, in order."""
  folder = files.path(workdir) / FOLDER
  return sorted((int(m[1]), folder / name) for name in files.names(folder) if (m := _NAME.fullmatch(name)))


def _make_room(target: epath.Path, most: int, failed: bool) -> bool:
  """Makes an empty folder to write into, and returns whether there was room; `failed` ones may replace a spike's."""
  others = [path for _, path in kept(target.parent.parent) if path != target]
  if len(others) >= most:
    spikes = [path for path in others if _is_spike(path)] if failed and most else []
    if not spikes:
      return False
    files.remove(spikes[-1])
  files.remove(target)  # left by this step before the run was resumed
  files.make(target)
  return True


def _is_spike(path: epath.Path) -> bool:
  try:
    return not failures(json.loads(files.read_text(path / "step.json"))["line"])
  except (OSError, ValueError, KeyError):  # not written by a run: somebody may need it
    return False


def _arrays(scored: types.ScoredBatch) -> dict[str, np.ndarray]:
  """The arrays of a minibatch by name, without pictures; with several processes, this one's rows."""
  batch, rows = scored.batch, scored.batch.rows
  fields = lambda of, but: {f.name: a for f in dataclasses.fields(of)
                            if f.name != but and (a := getattr(of, f.name)) is not None}
  found = placement.fetch_rows(fields(scored, "batch") | fields(batch, "rows"))
  if "order_B" in found:
    found["order_B"] = found["order_B"] % len(found["order_B"])
  return {name: np.asarray(a) for name, a in (found | placement.fetch_rows(fields(rows, "images"), 1)).items()}


def _telling(arrays: dict[str, np.ndarray]) -> list[int]:
  """Indices of a minibatch's trajectories, first those with values that are not finite."""
  valid_BT = arrays["valid_BT"]
  odd_B = np.zeros(len(valid_BT), bool)
  for a in arrays.values():
    if a.dtype.kind == "f" and len(a) == len(odd_B):
      odd = ~np.isfinite(a)
      odd_B |= (odd & valid_BT if a.shape == valid_BT.shape else odd.reshape(len(odd_B), -1).any(-1, keepdims=True)
                ).any(-1)
  if "order_B" in arrays:
    odd_B = odd_B[arrays["order_B"]]
  return np.argsort(~odd_B, kind="stable").tolist()
