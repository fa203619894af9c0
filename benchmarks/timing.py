"""What the benchmarks share: interleaved timing, a table for people, and JSON as the last line."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time


def interleaved(sides: dict, repeat: int) -> dict[str, list[float]]:
  """Times all sides in turn, `repeat` times over, after one run of each that does not count.

  Args:
    sides: name -> function without arguments that returns when its work is done.
    repeat: how often.

  Returns:
    name -> seconds of each run; those of the first, which does not count, are under name + "/first".
  """
  seconds = {}
  for turn in range(repeat + 1):
    for name, run in sides.items():
      began = time.perf_counter()
      run()
      seconds.setdefault(name if turn else f"{name}/first", []).append(time.perf_counter() - began)
  return seconds


def median(seconds: list[float]) -> float:
  return statistics.median(seconds)


def spread(seconds: list[float]) -> str:
  """Median, least and most, as in "0.123 (0.120-0.130)"."""
  return f"{median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f})"


def table(header: list[str], rows: list[list[str]]) -> str:
  """A Markdown table, padded so that it is readable as text."""
  widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
  line = lambda row: "| " + " | ".join(str(v).ljust(w) for v, w in zip(row, widths)) + " |"
  return "\n".join([line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def made_by(packages: tuple[str, ...] = ()) -> dict:
  """What figures were made with: command, device and versions."""
  import jax
  device = jax.devices()[0]
  versions = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", *packages)}
  return {"command": " ".join(["python", *sys.argv]), "device": device.device_kind, "devices": jax.device_count(),
          "cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(),
          "versions": versions}


def last_line(figures: dict, packages: tuple[str, ...] = ()) -> str:
  """The figures, with what they were made with, as one line of JSON."""
  return json.dumps({**made_by(packages), **figures})
