"""Ranges of knobs.  The frozen configurations check themselves with these, before anything slow starts.

A rule is a pair: a test of one value, and what is wanted, in words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import math
import numbers

Rule = tuple[Callable[[object], bool], str]

flag: Rule = (lambda v: isinstance(v, bool), "True or False")
text: Rule = (lambda v: isinstance(v, str), "text")
texts: Rule = (lambda v: isinstance(v, (tuple, list)) and all(isinstance(s, str) and s for s in v), "non-empty strings")


def real(low: float = -math.inf, high: float = math.inf, *, above: float | None = None, below: float | None = None,
         wanted: str | None = None) -> Rule:
  """A finite number.

  Args:
    low, high: the least and the most.
    above, below: exclusive bounds.
    wanted: in words, where the bounds alone say too little.
  """
  def test(v) -> bool:
    return (isinstance(v, numbers.Real) and not isinstance(v, bool) and math.isfinite(v) and low <= v <= high
            and (above is None or v > above) and (below is None or v < below))

  return test, wanted or _range(low, high, above, below) or "a finite number"


def whole(low: int, high: int | None = None, *, wanted: str | None = None) -> Rule:
  """A whole number from `low` to `high`, both included."""
  def test(v) -> bool:
    return isinstance(v, numbers.Integral) and not isinstance(v, bool) and low <= v and (high is None or v <= high)

  return test, wanted or f"{_range(low, math.inf if high is None else high, None, None)}, a whole number"


def one_of(known) -> Rule:
  """One of a few words or numbers."""
  return lambda v: not isinstance(v, bool) and any(type(v) is type(k) and v == k for k in known), (
      f"one of {', '.join(map(str, known))}")


def some_of(known, least: int = 0) -> Rule:
  """A tuple of words out of some, `least` or more of them."""
  return (lambda v: isinstance(v, (tuple, list)) and len(v) >= least and all(s in known for s in v),
          f"{'one or more ' if least else ''}names out of {', '.join(known)}")


def need(ok: bool, key: str, wanted: str, got) -> None:
  """Raises the error about a value.

  Args:
    ok: whether the value is valid.
    key: of the configuration, dotted.
    wanted: in words.
    got: the value.

  Raises:
    ValueError: it is not valid.
  """
  if not ok:
    raise ValueError(f"config.{key} must be {wanted}. Received: {got!r}")


def section(values: Mapping[str, object], name: str, **rules: Rule) -> None:
  """Checks the values of a section, each by its rule.

  Args:
    values: by key; `vars(self)` of a frozen configuration, or a section of the whole.
    name: of the section; "" for knobs outside sections.
    **rules: by key.

  Raises:
    ValueError: names the first key whose value is out of range.
  """
  for key, (test, wanted) in rules.items():
    need(test(values[key]), f"{name}.{key}" if name else key, wanted, values[key])


def _range(low, high, above, below) -> str:
  least = f"above {above:g}" if above is not None else "0 or more" if low == 0 else f"at least {low:g}"
  most = f"below {below:g}" if below is not None else f"at most {high:g}"
  has_least, has_most = above is not None or low > -math.inf, below is not None or high < math.inf
  if above is None and below is None and has_least and has_most:
    return f"between {low:g} and {high:g}"
  return " and ".join(words for words, has in ((least, has_least), (most, has_most)) if has)
