"""What the C library does with memory that is given back, which decides a third of the time of a step on a CPU."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # malloc.h of the GNU C library


def keep_when_on_cpu() -> bool:
  """On a CPU, freed memory stays with the process.  Call it before anything computes.

  XLA asks for the temporary memory of a program anew at each run.  Left alone, malloc gets gigabytes from the
  kernel each time, page by page, and gives them back.  Nothing changes where an accelerator may compute, or
  without the GNU C library.

  Returns:
    Whether it was done.

  Source: mallopt(3).
  """
  platforms = os.environ.get("JAX_PLATFORMS", "")
  accelerated = bool(importlib.metadata.entry_points(group="jax_plugins")) or importlib.util.find_spec("libtpu")
  if not platforms.startswith("cpu") and (platforms or accelerated):
    return False
  if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "gnu_get_libc_version"):
    return False
  # One arena, because only the first one grows where it can keep what it had; and never a mapping of its own.
  return all([library.mallopt(_ARENA_MAX, 1), library.mallopt(_MMAP_MAX, 0), library.mallopt(_TRIM_THRESHOLD, -1)])
