"""Values from the JSON files of an HF folder; errors name the file and the key.

A key that is absent or null has its default.  `where` names the object that the key is in, for errors.
"""

from __future__ import annotations

import json
import math
import pathlib


def read(path: pathlib.Path) -> dict:
  """The object that a file holds.

  Raises:
    ValueError: it is unreadable, or holds something else.
    FileNotFoundError: it is not there.
  """
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise
  except (OSError, ValueError, RecursionError) as e:
    raise ValueError(f"{path} must be JSON ({e})") from e
  if not isinstance(config, dict):
    raise ValueError(f"{path} must hold a JSON object. Received: {type(config).__name__}")
  return config


def section(config: dict, key: str, where: str) -> dict:
  """An object inside an object; empty by default."""
  value = config.get(key)
  _need(value is None or isinstance(value, dict), where, key, "an object", value)
  return value or {}


def whole(config: dict, key: str, where: str, default: int | None = None, low: int = 1) -> int:
  """A whole number, `low` or more; without a default it must be there."""
  value = _value(config, key, where, default)
  _need(_is_whole(value, low), where, key, f"a whole number, {low} or more", value)
  return value


def wholes(config: dict, key: str, where: str, default: tuple[int, ...] | None = None, low: int = 0) -> tuple[int, ...]:
  """A list of whole numbers, each `low` or more; without a default it must be there."""
  value = _value(config, key, where, default)
  _need(isinstance(value, (list, tuple)) and all(_is_whole(v, low) for v in value), where, key,
        f"a list of whole numbers, each {low} or more", value)
  return tuple(value)


def ids(config: dict, key: str, where: str, default: tuple[int, ...]) -> tuple[int, ...]:
  """Token ids, given as one or as a list; without repeats, in order."""
  value = _value(config, key, where, list(default))
  found = value if isinstance(value, list) else [value]
  _need(found != [] and all(_is_whole(v, 0) for v in found), where, key, "a token id or a list of them", value)
  return tuple(dict.fromkeys(found))


def real(config: dict, key: str, where: str, default: float | None = None) -> float:
  """A positive finite number; without a default it must be there."""
  value = _value(config, key, where, default)
  ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
  _need(ok, where, key, "a positive number", value)
  return float(value)


def flag(config: dict, key: str, where: str, default: bool = False) -> bool:
  """True or false."""
  value = _value(config, key, where, default)
  _need(isinstance(value, bool), where, key, "true or false", value)
  return value


def _value(config, key, where, default):
  value = config.get(key)
  if value is None:
    value = default
  if value is None:
    raise ValueError(f"{where}: key {key!r} is missing")
  return value


def _is_whole(value, low) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _need(ok, where, key, wanted, got) -> None:
  if not ok:
    raise ValueError(f"{where}: {key} must be {wanted}. Received: {got!r}"[:400])
