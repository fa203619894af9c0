"""Rows of other people's files: tables with tabs and pictures inside, JSON arrays, JSON lines.

A fault of one row is an exception about that row, which the reader of the file counts; only what makes the
whole file useless is a `ValueError`.  Text is UTF-8: a row whose bytes are not is one of the bad rows.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Sequence
import csv
import json
import os

# A picture's column may hold the index of another row, which has the picture.  No picture is that short.
INDEX_MAX_CHARS = 64

_FIELD_MAX_CHARS = 2**31 - 1
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Unusable(Exception):
  """Why a row cannot be used, in words that many rows may share."""


def tsv(path: str, needed: Sequence[str]) -> Iterator[dict[str, str]]:
  """The rows of a table with tabs between its columns, as pandas writes it.

  Args:
    path: of the file.
    needed: names of columns that it must have.

  Yields:
    Each row, by column.  Fields beyond the header's are under the key None, and missing ones are None; see `columns`.

  Raises:
    ValueError: the file cannot be read, or lacks a column.
  """
  _utf8(path)
  csv.field_size_limit(_FIELD_MAX_CHARS)  # a picture is one field; the limit is the process's, and only ever raised
  try:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
      reader = csv.DictReader(file, delimiter="\t", restkey=None)
      missing = [name for name in needed if name not in (reader.fieldnames or ())]
      if missing:
        raise ValueError(f"{path} must have the columns {', '.join(needed)}. Received: no {', no '.join(missing)}; it "
                         f"has {_some(reader.fieldnames or ())}")
      yield from reader
  except csv.Error as e:
    raise ValueError(f"{path} must be a table with tabs between its columns ({e})") from e


def columns(row: dict) -> dict:
  """A row of `tsv`, if it has as many columns as the header.

  Raises:
    Unusable: it has not.
  """
  if None in row or None in row.values():
    raise Unusable("another number of columns than the header")
  return row


def json_rows(path: str, key: str = "data") -> list:
  """The rows of a file that holds a JSON array, an object with one, or JSON lines.

  Args:
    path: of the file.
    key: under which an object has the array.

  Returns:
    What the rows hold, of any type; a broken line of JSON lines is an `Unusable` in its place.

  Raises:
    ValueError: the file cannot be read, or is none of these.
  """
  _utf8(path)
  with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
    text = file.read()
  try:
    found = json.loads(text)
  except (ValueError, RecursionError) as whole:
    lines = [line for line in text.split("\n") if line.strip()]
    rows = [_line(line) for line in lines]
    if not any(isinstance(row, dict) for row in rows):
      raise ValueError(f"{path} must be a JSON array, an object with one under {key!r}, or JSON lines ({whole})"
                       ) from whole
    return rows
  if isinstance(found, dict):
    if key not in found and "\n" not in text.strip():
      return [found]  # one line of JSON lines
    found = found.get(key)
  if not isinstance(found, list):
    raise ValueError(f"{path} must be a JSON array, an object with one under {key!r}, or JSON lines")
  return found


def text(row: object, *names: str, empty: bool = False) -> str:
  """A row's text under the first of some names that it has; a number becomes text.

  Args:
    row: any JSON value; only an object has names.
    *names: keys, as different releases spell them.
    empty: whether the text may be blank.

  Raises:
    Unusable: the row is no object, has none of the names, or has something under it that is no text or is blank.
  """
  value = get(row, *names)
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    value = str(value)
  if not isinstance(value, str):
    raise Unusable(f"{names[0]} is not text")
  if not empty and not value.strip():
    raise Unusable(f"{names[0]} is empty")
  return utf8(value, names[0])


def get(row: object, *names: str):
  """What a row has under the first of some names that it has.

  Raises:
    Unusable: the row is no object, or has none of them.
  """
  if isinstance(row, Unusable):
    raise row
  if not isinstance(row, dict):
    raise Unusable("not an object")
  for name in names:
    if name in row:
      return row[name]
  raise Unusable(f"no {names[0]}")


def texts(row: object, *names: str) -> tuple[str, ...]:
  """A row's list of texts, at least one, under the first of some names that it has; numbers become text.

  Raises:
    Unusable: the row has none of the names, or has something else under it.
  """
  value = get(row, *names)
  if not isinstance(value, list) or not value or not all(isinstance(v, (str, int, float)) for v in value):
    raise Unusable(f"{names[0]} is not a list of texts")
  return tuple(utf8(str(v), names[0]) for v in value)


def utf8(value: str, name: str) -> str:
  """A text that can be written again.

  Raises:
    Unusable: it has bytes of another encoding, half of a character, or a null character.
  """
  try:
    value.encode("utf-8")
  except UnicodeEncodeError:
    raise Unusable(f"{name} is not UTF-8") from None
  if "\0" in value:
    raise Unusable(f"{name} has a null character")
  return value


def picture(field: str, known: dict[str, bytes | str], index: str | None = None,
            keep: Callable[[bytes], bytes | str] = lambda data: data) -> bytes | str:
  """The picture in a column: base64, or the index of an earlier row that has it.

  Args:
    field: the column's text.
    known: pictures by index of their row; the row's is added if the column holds it.
    index: the row's own; None if it has none.
    keep: turns a picture's bytes into what is returned: these bytes, or the path of a file that holds them.

  Raises:
    Unusable: it is neither, or the index leads nowhere.
  """
  field = field.strip()
  if not field:
    raise Unusable("no image")
  if len(field) <= INDEX_MAX_CHARS:
    if field not in known:
      raise Unusable("image is the index of no row with a picture")
    return known[field]
  try:
    data = base64.b64decode(field.rpartition(",")[2], validate=True)  # behind "data:image/jpeg;base64,"
  except (binascii.Error, ValueError):
    raise Unusable("image is not base64") from None
  if index is not None:
    known[index] = keep(data)
    return known[index]
  return keep(data)


def _line(line: str):
  try:
    return json.loads(line)
  except (ValueError, RecursionError):
    return Unusable("not JSON")


def _utf8(path: str) -> None:
  try:
    with open(os.fspath(path), "rb") as file:
      start = file.read(2)
  except (OSError, ValueError) as e:
    raise ValueError(f"{path} must be a file that can be read ({e})") from e
  if start in _UTF16:
    raise ValueError(f"{path} must be text in UTF-8. Received: UTF-16")


def _some(names: Sequence[str]) -> str:
  shown = ", ".join(map(str, names[:12]))
  return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "none"
