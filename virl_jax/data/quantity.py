"""Answers that are numbers with units, or lists."""

from __future__ import annotations

import collections
import decimal
import re

from virl_jax.data import exact

_MAX_CHARS = 64
_MAX_ITEMS = 100
_NEAR = decimal.Decimal("1e-9")  # relative: what converting units may lose

# By dimension: the names of each unit, and its worth in the dimension's first unit.
_DIMENSIONS = (
    (("m meter meters metre metres", 1), ("mm millimeter millimeters millimetre millimetres", "0.001"),
     ("cm centimeter centimeters centimetre centimetres", "0.01"),
     ("km kilometer kilometers kilometre kilometres", 1000),
     ("in inch inches \"", "0.0254"), ("ft foot feet '", "0.3048"), ("yd yard yards", "0.9144"),
     ("mi mile miles", "1609.344")),
    (("g gram grams gramme grammes", 1), ("mg milligram milligrams", "0.001"),
     ("kg kilogram kilograms kilo kilos", 1000),
     ("t tonne tonnes", 1000000), ("oz ounce ounces", "28.349523125"), ("lb lbs pound pounds", "453.59237")),
    (("s sec secs second seconds", 1), ("ms millisecond milliseconds", "0.001"), ("min mins minute minutes", 60),
     ("h hr hrs hour hours", 3600), ("day days", 86400), ("week weeks", 604800)),
    (("l liter liters litre litres", 1), ("ml milliliter milliliters millilitre millilitres", "0.001"),
     ("cl centiliter centiliters centilitre centilitres", "0.01")),
    (("% percent pct per cent", 1),),
    (("\N{DEGREE SIGN}c celsius degrees celsius", 1),),
    (("\N{DEGREE SIGN}f fahrenheit degrees fahrenheit", 1),),
    (("\N{DEGREE SIGN} degree degrees", 1),),
    (("$ dollar dollars usd", 1), ("cent cents \N{CENT SIGN}", "0.01")),
    (("\N{EURO SIGN} euro euros eur", 1),),
    (("\N{POUND SIGN} gbp", 1),),
    (("\N{YEN SIGN} yen jpy", 1),),
)
_SCALES = {"hundred": 10 ** 2, "thousand": 10 ** 3, "k": 10 ** 3, "million": 10 ** 6, "mn": 10 ** 6,
           "billion": 10 ** 9, "bn": 10 ** 9, "trillion": 10 ** 12}
_WORDS = {word: value for value, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve".split())}
_QUANTITY = re.compile(r"(?P<sign>[-+]?)\s*(?P<before>[$\u00a3\u20ac\u00a5]?)\s*(?P<minus>-?)"
                       r"(?P<number>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+|[a-z]+(?=\s|\Z))\s*(?P<after>.*)",
                       re.ASCII | re.DOTALL)
_BETWEEN = re.compile(r"\s*(?:;|\n|,(?!\d{3}(?!\d))|\s(?:and|&)\s)\s*(?:(?:and|&)\s+)?", re.IGNORECASE)
_BULLET = re.compile(r"\A(?:[-*\u2022]\s+|\d{1,2}[.)]\s+)")


def _units() -> dict[str, tuple[int, decimal.Decimal]]:
  """Every word for a unit: its dimension, and what it is worth."""
  found = {}
  for dimension, units in enumerate(_DIMENSIONS):
    for names, worth in units:
      for name in names.replace("per cent", "per_cent").replace("degrees c", "degrees_c").replace(
          "degrees f", "degrees_f").split():
        found[name.replace("_", " ")] = dimension, decimal.Decimal(worth)
  return found


_UNITS = _units()


def tolerance(text: str) -> tuple[str, decimal.Decimal]:
  """How far off a number may be: "2%" of the accepted one, or "0.5" in its own unit.

  Returns:
    ("share", 0.02) for "2%", ("units", 0.5) for "0.5".

  Raises:
    ValueError: it is neither.
  """
  try:
    size = decimal.Decimal(text.removesuffix("%"))
    if size.is_finite() and size >= 0:
      return ("share", size / 100) if text.endswith("%") else ("units", size)
  except decimal.InvalidOperation:
    pass
  raise ValueError(f"a number's tolerance must be such as number:2% or number:0.5. Received: {text!r}")


def number(answer: str | None, answers: tuple[str, ...], options: tuple[str, ...] | None = None,
           within: tuple[str, decimal.Decimal] = ("share", decimal.Decimal(0))) -> float:
  """Whether an answer is the right quantity: the same number of the same unit, however written.

  "1.5 km" is "1500 m" and "three" is "3".  If the accepted answer has a unit, the answer needs one that converts to it,
  or the same words; if it has none, any words may follow the number ("3 dogs" for "3"), but none that change the amount
  ("3 million", "3%", "3 km").

  Args:
    answer: what was answered, or None.
    answers: the accepted answers.
    options: ignored.
    within: how far off it may be; see `tolerance`.

  Returns:
    1 or 0; 0 for an answer with two numbers, or with words before the number.

  Source: ours.
  """
  del options
  found = None if not isinstance(answer, str) else _quantity(answer)
  return float(found is not None and any(_agree(found, accepted, within) for accepted in map(_quantity, answers)))


def items(answer: str | None, answers: tuple[str, ...], options: tuple[str, ...] | None = None) -> float:
  """How much of a list was named: the number of items that both have, divided by that of the longer list.

  Items are separated by commas, semicolons, line breaks or "and"; their order is free, and each is matched by `exact`.

  Args:
    answer: what was answered, or None.
    answers: the accepted lists, each as one text.
    options: ignored.

  Returns:
    In [0, 1], for the accepted list that fits best; 1 only if no item is missing and none is added.

  Source: ours.
  """
  del options
  if not isinstance(answer, str):
    return 0.0
  given = _items(answer)
  return max((_overlap(given, _items(accepted)) for accepted in answers), default=0.0)


def _quantity(text: str):
  """(value, what the unit measures: a dimension, words, or None), or None for a text that is no quantity."""
  text = exact.normalize(text)
  found = _QUANTITY.fullmatch(text) if len(text) <= _MAX_CHARS else None
  if not found:
    return None
  digits = found["number"]
  if digits[0].isalpha():
    if digits not in _WORDS:
      return None
    value = decimal.Decimal(_WORDS[digits])
  else:
    value = decimal.Decimal(digits.replace(",", ""))
  after = found["after"].strip()
  scale, _, others = after.partition(" ")
  if scale in _SCALES:
    value, after = value * _SCALES[scale], others.strip()
  if re.search(r"\d", after) or found["before"] and after:
    return None
  if "-" in (found["sign"], found["minus"]):
    value = -value
  unit = found["before"] or after
  if unit in _UNITS:
    dimension, worth = _UNITS[unit]
    return value, dimension, worth
  return value, unit or None, decimal.Decimal(1)


def _agree(found, accepted, within) -> bool:
  if accepted is None:
    return False
  value, unit, worth = found
  wanted, of, of_worth = accepted
  free = of is None and (unit is None or isinstance(unit, str))
  if not (free or unit == of):
    return False
  kind, size = within
  near = max(abs(wanted) * size if kind == "share" else size, abs(wanted) * _NEAR)
  return abs(value * worth / of_worth - wanted) <= near


def _items(text: str) -> list[str]:
  parts = _BETWEEN.split(text.strip())
  return [part for part in (_BULLET.sub("", p).strip() for p in parts[:_MAX_ITEMS + 1]) if part]


def _overlap(given: list[str], wanted: list[str]) -> float:
  if not given or not wanted or len(given) > _MAX_ITEMS:
    return 0.0
  left = collections.deque(wanted)
  for item in given:
    for _ in range(len(left)):
      other = left.popleft()
      if exact.same(item, other):
        break
      left.append(other)
  return (len(wanted) - len(left)) / max(len(given), len(wanted))
