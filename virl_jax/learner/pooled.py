"""Kinds of metrics, which say how the values of several minibatches become one.

A step's metrics are a dict of these.  The device fills them in; `merge` reads them on the host, once a step.
Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import numpy as np


@flax.struct.dataclass
class Ratio:
  """A share or a mean over things that minibatches have different numbers of: sums are pooled, then divided.

  Attributes:
    top, bottom: float32 scalars; the ratio is 0 if the bottom is.
  """

  top: jax.Array
  bottom: jax.Array


@flax.struct.dataclass
class Weighted:
  """A `Ratio` that is given as a mean and the number of things that it is over.

  Attributes:
    mean: float32 scalar.
    count: scalar, of things or of their weight; 0 leaves the mean out.
  """

  mean: jax.Array
  count: jax.Array


@flax.struct.dataclass
class Mean:
  """A number of each minibatch, such as its loss: the mean over minibatches."""

  value: jax.Array


@flax.struct.dataclass
class Sum:
  """A count: the sum over minibatches."""

  value: jax.Array


@flax.struct.dataclass
class Max:
  """The largest over minibatches."""

  value: jax.Array


Metrics = dict[str, Ratio | Weighted | Mean | Sum | Max]


def mean_of(x: jax.Array, mask: jax.Array) -> Ratio:
  """The mean of what the mask shows, float32[...] and bool[...]."""
  return Ratio(jax.numpy.where(mask, x, 0.0).sum(), mask.sum())


def merge(parts: Sequence[Metrics]) -> dict[str, float]:
  """The metrics of several minibatches as one; waits for the device.

  Args:
    parts: one dict a minibatch, of the same names and kinds.
  """
  parts = jax.device_get(list(parts))
  return {name: _merge([part[name] for part in parts]) for name in parts[0]}


def _merge(found: list) -> float:
  values = np.array([jax.tree.leaves(one) for one in found], np.float64)  # a row of one or two numbers a minibatch
  match found[0]:
    case Ratio():
      top, bottom = values.sum(0)
      return float(top / bottom) if bottom else 0.0
    case Weighted():
      mean, count = values.T
      return float((mean * count).sum() / count.sum()) if count.any() else 0.0
    case Mean():
      return float(values.mean())
    case Sum():
      return float(values.sum())
    case Max():
      return float(values.max())
  raise ValueError(f"a metric must be a Ratio, Weighted, Mean, Sum or Max. Received: {found[0]!r}")
