"""Counts compilations: a run that keeps compiling has a shape that keeps changing."""

from __future__ import annotations

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class Counter:
  """Counts XLA compilations from the moment it is made.

  Attributes:
    count: programs compiled, or fetched from the persistent cache.
    seconds: spent on them.
  """

  def __init__(self):
    self.count, self.seconds = 0, 0.0
    jax.monitoring.register_event_duration_secs_listener(self._heard)

  def _heard(self, event: str, duration: float, **_) -> None:
    if event == _EVENT:
      self.count += 1
      self.seconds += duration
