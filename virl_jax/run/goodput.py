"""How much of a run's wall-clock time went into steps that count, over all of its starts.

metrics.jsonl has no times of day, and drops steps that are done again.  So there is another file, wallclock.jsonl,
which is appended to and never rewritten: "spent" says what the time from the line before to this one went into.  A kill
loses no line, and the time from the last line to the next start counts as lost.  Training does not depend on the file.

    {"at": 1764192569.12, "spent": "stopped"}                                          a start
    {"at": 1764192581.75, "spent": "startup", "resumed": 40}                           it goes on from step 40
    {"at": 1764192612.03, "spent": "step", "step": 40, "compile_s": 8.5, "checkpoint_s": 0.1}

Source: ours.  The word is from "ML Productivity Goodput" (arXiv 2502.06982); ours is the product of its scheduling and
runtime goodput, because time with no process counts as lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import json
import math
import time

from virl_jax.run import files
from virl_jax.run import log

# Values of "spent".
SPENT = ("stopped", "startup", "evaluation", "checkpoint", "step")
# The parts of the time, in the order in which they are shown, and their names for people.
PARTS = {"useful": "steps that count", "redone": "steps done again", "compile": "compiling in steps",
         "checkpoint": "checkpoints", "evaluation": "evaluation", "startup": "starting up", "stopped": "between starts"}


def split(events: Sequence[dict]) -> dict[str, float]:
  """Where the time from the first line to the last went.

  Args:
    events: lines as `read` gives them, in order.

  Returns:
    Seconds by the keys of `PARTS`; they add up to all of the time.
    useful: steps whose result the run's state still holds; without their compiling and saving.
    redone: steps that were done again, because no later checkpoint was left when the run started again.
    compile, checkpoint: of all steps; checkpoint includes the wait for the last one.
    evaluation, startup: with their own compiling.
    stopped: from a start's last line to the next start: a step that was cut off, and all time with no process.
  """
  found, kept = dict.fromkeys(PARTS, 0.0), math.inf
  for before, event in reversed(list(zip(events, events[1:]))):
    seconds = max(0.0, event["at"] - before["at"])
    kept = min(kept, event.get("resumed", math.inf))  # a later start goes on from this step
    if event["spent"] != "step":
      found[event["spent"]] += seconds
      continue
    for part in ("checkpoint", "compile"):  # threads that compile at the same time may add up to more than has passed
      took = min(event.get(f"{part}_s", 0.0), seconds)
      found[part] += took
      seconds -= took
    found["useful" if event["step"] < kept else "redone"] += seconds
  return found


def share(parts: dict[str, float]) -> float:
  """Goodput, in [0, 1]: useful seconds over all of them; 0 before any have passed.

  Args:
    parts: seconds, as `split` gives them.
  """
  return parts["useful"] / (sum(parts.values()) or 1.0)


def said(parts: dict[str, float]) -> str:
  """A line for people: the share, and what took the rest, the largest first.

  Args:
    parts: seconds, as `split` gives them.
  """
  total = sum(parts.values()) or 1.0
  rest = sorted((part for part in PARTS if part != "useful"), key=lambda part: -parts[part])
  lost = [f"{PARTS[part]} {log.duration(parts[part])}" for part in rest if parts[part] >= 0.005 * total]
  return (f"goodput {100 * share(parts):.0f} % of {log.duration(sum(parts.values()))}"
          + (f"; the rest: {', '.join(lost)}" if lost else ""))


def read(path: str) -> list[dict]:
  """The lines of a file that `Clock` writes; none if there is no such file.

  Anything else in it is left out, and its time counts to the next line: a power cut may leave anything, and no run
  should fail because of that.
  """
  return [event for raw in _content(path).split(b"\n") if (event := _event(raw))]


class Clock:
  """Writes down what time went into.

  Args:
    path: the file; None writes none.
    began: when this start of the run began, seconds since 1970.
    now: gives the time, in the same unit.
  """

  def __init__(self, path: str | None, began: float, now: Callable[[], float] = time.time):
    self._path, self._now = path, now
    self._events = [] if path is None else read(path)
    self._parts = split(self._events)
    if path is not None and not (_content(path) or b"\n").endswith(b"\n"):
      _append(path, b"\n")  # the last line is cut off
    self._add({"at": began, "spent": "stopped"})

  def lap(self, spent: str, **more: float) -> None:
    """Notes what the time since the last call was spent on.

    Args:
      spent: one of `SPENT`.
      more: for a "step" its number, "step", and its parts "compile_s" and "checkpoint_s" in seconds; "resumed", the
        step that a start goes on from: those from it on will be done again.
    """
    self._add({"at": self._now(), "spent": spent, **more})

  @property
  def parts(self) -> dict[str, float]:
    """`split` of all lines so far; without a file, of this start alone."""
    return dict(self._parts)

  def _add(self, event: dict) -> None:
    last = self._events[-1]["at"] if self._events else event["at"]
    event = {key: round(value, 3) if isinstance(value, float) else value for key, value in event.items()}
    event["at"] = max(event["at"], last)  # clocks may be set back, or differ between machines
    self._events.append(event)
    if "resumed" in event:  # earlier steps may have to be done again
      self._parts = split(self._events)
    else:
      self._parts = {part: self._parts[part] + more for part, more in split(self._events[-2:]).items()}
    if self._path is not None:
      _append(self._path, json.dumps(event).encode() + b"\n")


def _event(raw: bytes) -> dict | None:
  """A line as a dict; None if it is not one of ours."""
  try:
    event = json.loads(raw)
  except ValueError:
    return None
  if not isinstance(event, dict) or event.get("spent") not in SPENT or not _is_number(event.get("at")):
    return None
  if event["spent"] == "step" and not _is_number(event.get("step")):
    return None
  return event if all(_is_number(value) for key, value in event.items() if key != "spent") else None


def _is_number(value: object) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _content(path: str) -> bytes:
  """A file's content; empty if there is none."""
  try:
    return files.read_bytes(files.path(path))
  except FileNotFoundError:
    return b""


def _append(path: str, content: bytes) -> None:
  files.append(files.path(path), content)
