"""Which tasks a step takes from several sets: by weights, and from easy to hard where pass rates are known.

Like `order`, all of it is a pure function of (seed, step, try): nothing is kept from step to step.

Weights become whole numbers (0.3 and 0.7 become 3 and 7), and training walks through rounds of their sum: in a round of
ten places the first set has three, evenly spread, the second seven.  A step's share of each set is therefore almost
never more than one task off, and over whole rounds it is exact.  The places of a step are then shuffled, so that they
do not fall to the same processes and minibatches each time.  Each set is walked through in epochs of its own.

Easy first: the first epochs of a set are walked through as one, beginning with the tasks that a policy got right most
often when the set was curated.  `width` blurs that order: it mixes tasks whose ranks, as shares of the set, are up to
`width` apart; from 1 on almost no order is left.  Later epochs are as usual.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import fractions
import functools
import hashlib
import math

import numpy as np

from virl_jax import types
from virl_jax.data import order

_SHUFFLE = 2 ** 32 - 1  # a stream that no set has
_LONGEST_ROUND = 100_000


@dataclasses.dataclass(frozen=True)
class Part:
  """What is walked through by itself: a set, or several that share a weight.

  Attributes:
    name: of the set, or of the weight that several share.
    rows_N: int64, which of the source's tasks, ascending.
    weight: its places in a round; 0 leaves it out.
    rate_N: float, how often each was solved, in [0, 1], NaN where that is unknown; None if no order follows from it.
  """

  name: str
  rows_N: np.ndarray
  weight: int
  rate_N: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a source's tasks are walked through.

  Attributes:
    parts: what is walked through; those with a weight must have tasks.
    easy_first_epochs: how many epochs of each part with pass rates are walked through as one, from easy to hard.
    width: see the module.
  """

  parts: tuple[Part, ...]
  easy_first_epochs: int = 0
  width: float = 0.25

  def __post_init__(self):
    empty = [part.name for part in self.parts if part.weight and not len(part.rows_N)]
    if empty or not any(part.weight for part in self.parts):
      raise ValueError("sets that are trained on must have tasks, and there must be one. Received: "
                       + (f"none in {', '.join(empty)}" if empty else "no set with a weight above 0"))

  def due(self, seed: int, step: int, wanted: int, attempt: int = 0) -> np.ndarray:
    """Which tasks a step takes: int64[wanted]; arguments as `order.batch_indices` takes them.

    Raises:
      ValueError: an argument is out of range.
    """
    order.check(seed, step, sum(len(part.rows_N) for part in self.parts), wanted, attempt)
    first, round_M = step * wanted, _round(tuple(part.weight for part in self.parts))
    which = round_M[np.arange(first, first + wanted) % len(round_M)]
    due = np.zeros(wanted, np.int64)
    for number, part in enumerate(self.parts):
      whole, rest = divmod(first, len(round_M))
      begin = whole * part.weight + int(np.sum(round_M[:rest] == number))
      places = np.flatnonzero(which == number)
      if len(places):
        due[places] = part.rows_N[self._walk(number, seed, begin, begin + len(places), attempt)]
    return due[order.generator(seed, step, attempt, _SHUFFLE).permutation(wanted)]

  def stand_ins(self) -> Callable[[int], Iterator[int]]:
    """What may stand in for a task of a step: others of its part, from its far side on, in a fixed order.

    Returns:
      A function of a task that a step was to take: an iterator of stand-ins, which all tasks of a part share.
    """
    found = {}

    def instead(row: int) -> Iterator[int]:
      for number, part in enumerate(self.parts):
        at = int(np.searchsorted(part.rows_N, row))
        if at < len(part.rows_N) and part.rows_N[at] == row:
          return found.setdefault(number, _from_afar(part.rows_N, at))
      raise ValueError(f"row must be one that a step takes. Received: {row}")

    return instead

  def _walk(self, number: int, seed: int, first: int, last: int, attempt: int) -> np.ndarray:
    part = self.parts[number]
    n = len(part.rows_N)
    sorted_ = self.easy_first_epochs * n if part.rate_N is not None else 0
    found = order.walk(seed, max(first, sorted_), max(last, sorted_), n, attempt, number)
    if first < sorted_:
      rng = order.generator(seed, 0, attempt, number)
      walk = rng.permutation(sorted_) % n
      key = _rank(part.rate_N)[walk] + self.width * rng.random(sorted_)
      found = np.concatenate([walk[np.argsort(key, kind="stable")][first:last], found])
    return found


class Source:
  """A source that is walked through by a plan.

  Args:
    source: has the tasks.
    plan: see `plan`.
    about: what is added to the source's description.
    digest: what is added to its fingerprint.

  Attributes:
    plan: see `Plan`; None if it is not trained on.
  """

  def __init__(self, source, plan: Plan | None, about: str, digest: str):
    self._source, self.plan, self._about, self._digest = source, plan, about, digest

  def __len__(self) -> int:
    return len(self._source)

  def task(self, index: int) -> types.Task:
    """The task with that number, from 0."""
    return self._source.task(index)

  @property
  def tasks(self) -> Sequence[types.Task]:
    """All tasks of the source."""
    return self._source.tasks

  def fingerprint(self) -> str:
    """A hash of the data, of how it is weighted, and of the pass rates if they count."""
    return f"{self._source.fingerprint()}-{self._digest}"

  def describe(self) -> str:
    """One line for the log."""
    return f"{self._source.describe()}; {self._about}"


def parse(words: Sequence[str]) -> dict[str, fractions.Fraction]:
  """Weights by name, from texts such as "NAME:WEIGHT".

  Raises:
    ValueError: one is not of that form, or comes twice.
  """
  found = {}
  for word in words:
    name, _, number = word.rpartition(":")
    try:
      weight = fractions.Fraction(number)
    except (ValueError, ZeroDivisionError):
      weight = fractions.Fraction(-1)
    if not name or weight < 0 or name in found:
      raise ValueError(f"a weight must be NAME:NUMBER, 0 or more, one for each name. Received: {word!r}")
    found[name] = weight
  return found


def weighted(words: Sequence[str], names: Sequence[str]) -> dict[str, tuple[int, list[int]]]:
  """What is weighted, and how.

  Args:
    words: "NAME:WEIGHT"; () weights by size.
    names: of the sets, such as "gqa-train"; a weight's name is that of a set, or the part of it before the last "-",
      which several sets may share.

  Returns:
    By a weight's name: its places in a round, and the numbers of its sets.  By size there is one part, with all sets.

  Raises:
    ValueError: a weight belongs to no set, a set to no weight, or the round is too long.
  """
  if not words:
    return {"all": (1, list(range(len(names))))}
  weights = parse(words)
  of = [next((key for key in (name, name.rpartition("-")[0]) if key in weights), None) for name in names]
  idle, bare = [key for key in weights if key not in of], [name for name, key in zip(names, of) if key is None]
  if idle or bare:
    raise ValueError("config.data.weights must name each set of data.path, and nothing else. Received: "
                     + (f"no set {', '.join(idle)}" if idle else f"no weight of {', '.join(bare)}")
                     + f"; the sets are {', '.join(names)}")
  places = _whole(weights)
  return {key: (places[key], [i for i, its in enumerate(of) if its == key]) for key in weights}


def plan(parts: Mapping[str, tuple[int, list[int]]], set_N: np.ndarray, rate_N: np.ndarray | None,
         easy_first_epochs: int, width: float) -> Plan:
  """A plan for tasks of numbered sets.

  Args:
    parts: see `weighted`.
    set_N: the number of each task's set.
    rate_N: see `Part`; None if tasks are not ordered by it.
    easy_first_epochs, width: see `Plan`.

  Raises:
    ValueError: a part that is trained on has no task.
  """
  made = []
  for name, (weight, numbers) in parts.items():
    rows_N = np.flatnonzero(np.isin(set_N, numbers))
    its = None if rate_N is None or np.isnan(rate_N[rows_N]).all() else rate_N[rows_N]
    made.append(Part(name, rows_N, weight, its))
  return Plan(tuple(made), easy_first_epochs, width)


def digest(*what) -> str:
  """A short hash of plain values."""
  return hashlib.blake2b(repr(what).encode(), digest_size=6).hexdigest()


def _from_afar(rows_N: np.ndarray, at: int) -> Iterator[int]:
  n = len(rows_N)
  return (int(rows_N[(at + n // 2 + i) % n]) for i in range(n))


def _whole(weights: Mapping[str, fractions.Fraction]) -> dict[str, int]:
  scale = math.lcm(*(weight.denominator for weight in weights.values()))
  places = {name: int(weight * scale) for name, weight in weights.items()}
  common = math.gcd(*places.values()) or 1
  if not 0 < sum(places.values()) // common <= _LONGEST_ROUND:
    raise ValueError(f"config.data.weights must not all be 0, and be whole numbers, when divided by what they have in "
                     f"common, with a sum of at most {_LONGEST_ROUND}. Received: "
                     + ", ".join(f"{name}:{float(weight):g}" for name, weight in weights.items()))
  return {name: number // common for name, number in places.items()}


@functools.lru_cache(8)
def _round(weights: tuple[int, ...]) -> np.ndarray:
  """Which part has each place of a round: each one's places as evenly spread as can be."""
  when = np.concatenate([(np.arange(weight) + 0.5) / max(weight, 1) for weight in weights])
  return np.repeat(np.arange(len(weights)), weights)[np.argsort(when, kind="stable")]


def _rank(rate_N: np.ndarray) -> np.ndarray:
  """The share of tasks that are solved more often, counting half of those solved equally often; 0.5 if unknown."""
  known = np.sort(rate_N[~np.isnan(rate_N)])
  below_N, upto_N = (np.searchsorted(known, rate_N, side) for side in ("left", "right"))
  return np.where(np.isnan(rate_N), 0.5, 1 - (below_N + upto_N) / (2 * len(known)))
