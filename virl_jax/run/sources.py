"""From `config.data` to the tasks of a run: drawn pictures, records or sets, by weight, and from easy to hard."""

from __future__ import annotations

import numpy as np

from virl_jax import config as config_lib
from virl_jax.data import mixture
from virl_jax.data.sources import jsonl
from virl_jax.data.sources import sets
from virl_jax.tiny import needle
from virl_jax.tiny import source as tiny_source

KINDS = ("needle", "jsonl", "set")  # of `data.source`


def load(c: config_lib.ConfigDict, split: str):
  """The tasks of one side, as `data.batches` takes them.

  Args:
    c: a configuration; its section `data` is what counts.
    split: "train" or "test".

  Returns:
    A source: `len(source)`, `source.task(i)`, `source.tasks`, `source.describe()`, `source.fingerprint()`.

  Raises:
    ValueError: there are no tasks where the configuration points to, or they have no pass rates where these are needed.
  """
  if c.data.source == "needle":
    return tiny_source.load(c.data.path, split, needle.Config(**c.data.needle))
  kind = sets if c.data.source == "set" else jsonl
  of = lambda path, side: kind.load(path, side, c.data.eval_fraction, c.data.split_seed)
  if not c.data.eval_path:
    found = of(c.data.path, split)
    return _planned(c.data, split, found) if c.data.weights or c.data.easy_first_epochs else found
  held_out = of(c.data.eval_path, "all")
  return held_out if split == "test" else _planned(c.data, split, of(c.data.path, "all"), held_out)


def _planned(d: config_lib.ConfigDict, split: str, found: sets.Source | jsonl.Source,
             held_out: sets.Source | jsonl.Source | None = None) -> mixture.Source:
  """A source whose tasks are drawn by weights, from easy to hard, or both; its fingerprint covers what is held out."""
  parts, rate_N, epochs, known = mixture.weighted(d.weights, found.names), None, d.easy_first_epochs, {}
  about = [] if held_out is None else [f"held out: {held_out.describe()}"]
  if d.weights:
    total = sum(places for places, _ in parts.values())
    about.append("weights " + ", ".join(f"{name} {places / total:.4g}" for name, (places, _) in parts.items()))
  if epochs:
    known = sets.pass_rates(d.path)
    rate_N = np.array([known.get(name, np.nan) for name in found.provenance_N])
    about.append(f"easy first in epochs up to {epochs}, by pass rates of {np.sum(~np.isnan(rate_N))} tasks")
    if split == "train" and np.isnan(rate_N).all():
      raise ValueError(f"config.data.easy_first_epochs needs pass rates of the sets' tasks. Received: {len(known)} in "
                       f"the tasks.jsonl of {d.path}, all of other tasks")
  walked = split == "train" and (d.weights or epochs)
  plan = mixture.plan(parts, found.set_N, rate_N, epochs, d.easy_first_width) if walked else None
  how = mixture.digest(sorted((name, places, [found.names[i] for i in its]) for name, (places, its) in parts.items()),
                       *((epochs, d.easy_first_width, sorted(known.items())) if epochs else ()),
                       *([] if held_out is None else [held_out.fingerprint()]))
  return mixture.Source(found, plan, "; ".join(about), how)
