"""What a training run writes down while it runs: metrics.jsonl, a line on the terminal, TensorBoard, W&B."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import importlib
import json
import logging
import math
import os
import statistics
import time
import uuid

from etils import epath
import numpy as np
from PIL import Image

from virl_jax.run import files
from virl_jax.run import progress

# Prefixes of metrics that depend on the machine and the time, and differ when the same steps are done again.
MEASURED = ("time/", "compile/", "speed/", "memory/")

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_TIMED_STEPS = 20  # last steps that the estimate of the time left is from

# What the terminal line shows: label, key in the metrics, format.
_SHOWN = (("reward", "reward/total", "+.2f"), ("acc_ans", "acc_ans", ".2f"),
          ("acc_rat", "acc_rat", ".2f"), ("zooms", "rationale_count", ".1f"), ("nll", "loss/nll", ".3f"),
          ("tokens right", "loss/accuracy", ".3f"))


class MetricsLog:
  """Appends one JSON object a step to a file, which is open only while a line is written; see `files.append`."""

  def __init__(self, path: str, start_step: int, header: dict | None = None):
    """Opens the file, and drops the steps that a resumed run will do again.

    Lines with "step" >= start_step and a last line that was cut off are dropped, by replacing the
    file whole; every other line but the header is kept byte for byte.

    Args:
      path: the metrics file; made, with its folder, if missing.
      start_step: the first step that will be written.
      header: what the figures are made with, "config" above all, as JSON has it: the file's first line.  A different
        header that is there is kept in this one's list "earlier", with the first step that it is not about, "until".
        None keeps the header that is there.

    Raises:
      ValueError: a line other than the last is not a JSON object.
    """
    self._path = files.path(path)
    files.make(self._path.parent)
    _rewind(self._path, start_step, header)
    self._next_step = start_step

  def write(self, step: int, metrics: dict) -> dict:
    """Writes a step's metrics; the line is on the disk when this returns.

    Args:
      step: later than every step so far.
      metrics: scalars by name: Python, numpy or device numbers (which it waits for), or short strings.

    Returns:
      The line as plain Python values.

    Raises:
      ValueError: the step goes back, or a value is not a scalar.
    """
    if step < self._next_step:
      raise ValueError(f"step must be at least {self._next_step}, the first that is not yet in the log. "
                       f"Received: {step}")
    for name, value in metrics.items():
      if not isinstance(value, str) and getattr(value, "shape", ()) != ():
        raise ValueError(f"metrics[{name!r}] must be a scalar. Received: shape {tuple(value.shape)}")
    line = {"step": int(step), **{k: _plain(v) for k, v in metrics.items() if k != "step"}}
    files.append(self._path, _bytes(line))
    self._next_step = step + 1
    return line


def read(path: str) -> list[dict]:
  """Reads a metrics file; the header and a last line that was cut off are left out.

  Args:
    path: a file that `MetricsLog` wrote, perhaps one that is still growing.

  Returns:
    The lines in order.  "nan", "inf" and "-inf" are floats again.

  Raises:
    ValueError: a line other than the last is not a JSON object.
  """
  return [{k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in line.items()}
          for _, line in _parse(path, files.read_bytes(files.path(path))) if not _is_header(line)]


def header(path: str) -> dict | None:
  """What the figures of a metrics file are made with.

  Args:
    path: a file that `MetricsLog` wrote.

  Returns:
    The header that the log was given, as JSON has it, with "earlier" if it was given several; None for a file without
    one, as older versions wrote them.

  Raises:
    ValueError: a line other than the last is not a JSON object.
  """
  return next((line for _, line in _parse(path, files.read_bytes(files.path(path))) if _is_header(line)), None)


class Progress:
  """Prints a line a step, with the time that is left."""

  def __init__(self, total_steps: int, start_step: int, stream=None,
               clock: Callable[[], float] = time.monotonic):
    """Starts the clock.

    Args:
      total_steps: how many steps the whole run has.
      start_step: the step that this process begins with; 0 unless it resumes.
      stream: where to print; None is standard output.
      clock: seconds, never going back.
    """
    self._total_steps = total_steps
    self._start_step = start_step
    self._stream = stream
    self._clock = clock
    self._then = clock()
    self._step_s: list[float] = []

  def line(self, step: int, metrics: dict) -> None:
    """Prints one step, counted from 1 as people do.

    The estimate is the median of the last step times: neither a compilation nor a slow checkpoint
    disturbs it.

    Args:
      step: the step that is done, counted from 0.
      metrics: its values as `MetricsLog` returns them; what is missing is left out of the line.
    """
    now = self._clock()
    self._step_s = [*self._step_s, now - self._then][-_TIMED_STEPS:]
    self._then = now
    step_s = statistics.median(self._step_s)
    width = len(str(self._total_steps))
    parts = [f"step {step + 1:>{width}}/{self._total_steps}"]
    parts += [f"{label} {metrics[key]:{form}}" for label, key, form in _SHOWN
              if isinstance(metrics.get(key), (int, float))]
    parts += [f"{step_s:.{2 if step_s < 1 else 1}f} s/step",
              f"left {duration(step_s * max(0, self._total_steps - step - 1))}"]
    if self._stream is None:
      progress.say("  ".join(parts))
    else:
      print("  ".join(parts), file=self._stream, flush=True)


def duration(seconds: float) -> str:
  """A length of time for people, in its two largest units: 58s, 10m58s, 3h05m, 2d04h."""
  whole = round(seconds)
  for big, big_s, small, small_s in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
    if whole >= big_s:
      return f"{whole // big_s}{big}{whole % big_s // small_s:02d}{small}"
  return f"{whole}s"


def numbers(metrics: dict) -> dict[str, float]:
  """What TensorBoard and W&B get of a step: its numbers by name; missing values and texts are left out."""
  return {name: float(value) for name, value in metrics.items()
          if name != "step" and value is not None and not isinstance(value, str)}


class TensorBoard:
  """Writes scalars and pictures for TensorBoard.

  A thread of the library does the writing: files are about a second behind, in a bucket half a minute.
  """

  def __init__(self, writer):
    """Takes the library's writer; see `tensorboard_writer`."""
    self._writer = writer

  def write(self, step: int, metrics: dict) -> None:
    """Hands on a step's `numbers`."""
    for tag, value in numbers(metrics).items():
      self._writer.add_scalar(tag, value, step)

  def pictures(self, step: int, pictures: Sequence[Image.Image]) -> None:
    """Hands on a step's pictures, by the names trajectories/0, trajectories/1 ..."""
    for i, picture in enumerate(pictures):
      self._writer.add_image(f"trajectories/{i}", np.asarray(picture), step, dataformats="HWC")

  def close(self) -> None:
    """Waits until everything is on the disk, which the end of the process does too."""
    self._writer.close()


def tensorboard_writer(logdir: str, enabled: bool, start_step: int = 0) -> TensorBoard | None:
  """Opens a file of events.

  Needs the package `tensorboardX`, but not TensorFlow; TensorBoard itself is only for looking at the files.

  Args:
    logdir: the folder of event files.
    enabled: False returns None at once.
    start_step: TensorBoard drops what an earlier process logged from this step on.

  Returns:
    The writer; None if the package is not installed.
  """
  if not enabled:
    return None
  try:
    library = importlib.import_module("tensorboardX")  # not before: it imports torch if that is installed
  except ImportError:
    return None
  # Without the library's warning, each step, of metrics that are not finite: TensorBoard and metrics.jsonl show them.
  logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
  # File names have the time in whole seconds: the step keeps two starts within a second apart, and in order.
  flush_secs = 1 if files.is_local(logdir) else 30  # in a bucket, each flush writes the whole file again
  return TensorBoard(library.SummaryWriter(logdir, purge_step=start_step, flush_secs=flush_secs,
                                           filename_suffix=f".{start_step:08d}"))


class WandB:
  """Sends what TensorBoard is given to Weights & Biases, by the same names and steps."""

  def __init__(self, library, run, sent: int):
    """Takes the library and its run; steps before `sent` are there already; see `wandb_writer`."""
    self._library, self._run, self._sent = library, run, sent

  def write(self, step: int, metrics: dict) -> None:
    """Hands on a step's `numbers`."""
    if step >= self._sent:
      self._run.log(numbers(metrics), step=step)

  def pictures(self, step: int, pictures: Sequence[Image.Image]) -> None:
    """Hands on the pictures of the step that was written last."""
    if step >= self._sent:
      self._run.log({f"trajectories/{i}": self._library.Image(picture) for i, picture in enumerate(pictures)},
                    step=step)

  def close(self) -> None:
    """Waits until everything is sent or, offline, on the disk."""
    self._run.finish()


def wandb_writer(workdir: str, project: str, sent: int, config: dict) -> WandB | None:
  """Opens a run of Weights & Biases, or goes on with the one of this workdir, whose id is in its file wandb_id.

  The service accepts each step once: what a resumed run does again is not sent again.  The library's environment
  variables, such as WANDB_MODE=offline, WANDB_ENTITY and WANDB_DIR, have their usual meaning.

  Args:
    workdir: of the run; the library's own files go there too, if it is on a disk.
    project: "" returns None at once.
    sent: the first step that no earlier process has logged.
    config: of the run, nested.

  Raises:
    ValueError: the package is not installed, or the library refuses.
  """
  if not project:
    return None
  try:
    library = importlib.import_module("wandb")  # takes seconds
  except ImportError as e:
    raise ValueError("config.log.wandb must be '' unless the package wandb is installed: pip install -e '.[wandb]'. "
                     f"Received: {project!r}") from e
  folder = files.path(workdir)
  file = folder / "wandb_id"
  known = files.read_text(file).strip() if files.exists(file) else ""
  name = known or uuid.uuid4().hex[:12]
  where = os.environ.get("WANDB_DIR") or (str(folder) if files.is_local(workdir) else None)
  try:
    run = library.init(project=project, id=name, name=files.absolute(folder).name, resume="allow", dir=where,
                       config=config, settings=library.Settings(console="off", silent=True))
  except library.Error as e:
    raise ValueError("config.log.wandb needs an account: run `wandb login` first, or set WANDB_MODE=offline. "
                     f"Received: {str(e).splitlines()[0] if str(e) else type(e).__name__}") from e
  if not known:
    files.write_text(file, name + "\n")
  return WandB(library, run, sent if known else 0)


def _plain(value):
  if value is None or isinstance(value, str):
    return value
  array = np.asarray(value)
  return int(array) if array.dtype.kind in "iub" else float(array)


def _parse(path: str | os.PathLike, content: bytes) -> list[tuple[bytes, dict]]:
  """The whole lines of a file's content, each as its bytes and as a dict; blank ones are left out."""
  lines = content.split(b"\n")
  parsed = []
  for number, raw in enumerate(lines, start=1):
    if not raw.strip():
      continue
    line = _object(raw)
    if line is not None:
      parsed.append((raw, line))
    elif number < len(lines):  # only what follows the last newline can be a line that was cut off
      raise ValueError(f"{path}, line {number}, must be a JSON object. Received: {raw[:80]!r}; if it "
                       "can't be repaired, delete the line")
  return parsed


def _object(raw: bytes) -> dict | None:
  try:
    line = json.loads(raw)
  except ValueError:
    return None
  return line if isinstance(line, dict) else None


def _is_header(line: dict) -> bool:
  return "config" in line and "step" not in line


def _succeed(old: dict | None, new: dict, start_step: int) -> dict:
  """The new header, with the earlier ones that other steps were made with."""
  if old is None:
    return new
  entries = old.pop("earlier", [])
  if old != new:
    entries = [*entries, {"until": start_step, **old}]
  earlier, since = [], 0
  for entry in entries:
    until = min(entry["until"], start_step)  # the run may have gone back to an earlier step
    if until > since:
      earlier.append({**entry, "until": until})
      since = until
  return {**new, "earlier": earlier} if earlier else new


def _strict(value):
  """Turns numbers that are not finite, which JSON does not have, into text."""
  if isinstance(value, dict):
    return {k: _strict(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_strict(v) for v in value]
  return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def dumps(value) -> str:
  """Strict JSON: numbers that are not finite are text, "nan", "inf" or "-inf"."""
  return json.dumps(_strict(value), allow_nan=False)


def _bytes(line: dict) -> bytes:
  return dumps(line).encode() + b"\n"


def _rewind(path: epath.Path, start_step: int, header: dict | None) -> None:
  try:
    content = files.read_bytes(path)
  except FileNotFoundError:
    content = b""
  lines = _parse(path, content)
  kept = b"".join(raw + b"\n" for raw, line in lines if not (header and _is_header(line))
                  and (not isinstance(line.get("step"), int) or line["step"] < start_step))
  if header:
    old = next((line for _, line in lines if _is_header(line)), None)
    kept = _bytes(_succeed(old, _strict(header), start_step)) + kept
  if kept != content:
    files.write_bytes(path, kept)
