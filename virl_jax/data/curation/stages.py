"""The section `curate` of the configuration: the settings of each stage of curation."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

from virl_jax import checks
from virl_jax.data.curation import band as band_lib
from virl_jax.data.curation import rules as rules_lib


@dataclasses.dataclass(frozen=True)
class Policy:
  """How often a policy is asked; see `config.py`, section `curate.policy`."""

  with_zoom: int = 8
  without_zoom: int = 4
  temperature: float = 1.0

  def __post_init__(self):
    checks.section(vars(self), "curate.policy", with_zoom=checks.whole(0), without_zoom=checks.whole(0),
                   temperature=checks.real(0))
    checks.need(self.temperature > 0 or max(self.with_zoom, self.without_zoom) <= 1, "curate.policy.temperature",
                "positive with several samples of a task: greedy ones are all the same", self.temperature)

  @property
  def is_on(self) -> bool:
    """Whether the policy is asked at all."""
    return bool(self.with_zoom or self.without_zoom)


@dataclasses.dataclass(frozen=True)
class Config:
  """All settings of curation; see `config.py`, section `curate`."""

  shard_tasks: int
  benchmarks: tuple[str, ...]
  rules: rules_lib.Config
  policy: Policy
  band: band_lib.Config

  def __post_init__(self):
    pairs = lambda v: checks.texts[0](v) and all(len(entry.split("=")) in (2, 3) for entry in v)
    checks.section(vars(self), "curate", shard_tasks=checks.whole(1),
                   benchmarks=(pairs, '"NAME=PATH" or "NAME=PATH=IMAGES" each'))
    object.__setattr__(self, "benchmarks", tuple(self.benchmarks))


def config(c: Mapping) -> Config:
  """The section `curate` of a configuration, checked.

  Raises:
    ValueError: names the key, what was wanted and what came.
  """
  return Config(c["shard_tasks"], c["benchmarks"], rules_lib.Config(**c["rules"]), Policy(**c["policy"]),
                band_lib.Config(**c["filter"]))
