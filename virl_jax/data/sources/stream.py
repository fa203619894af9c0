"""Raw files, read a record at a time: memory is bounded by one record and a few megabytes, however large the file.

A file that ends early, a folder that lacks what is wanted, or a file of another schema raises a `ValueError` that names
what was wanted and the first three examples of what was found.  A single bad line gives a `records.Reject`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import glob
import itertools
import json
import os
import re

from virl_jax.data.sources import records

_CHUNK_CHARS = 1 << 20
_MOST_CHARS = 1 << 27   # of one record; more is a file of another kind
_NEAR_CHARS = 64        # an error this close to the end of what was read may be due to what was not read yet
_EXAMPLES = 3
_BLANK = re.compile(r"[ \t\n\r]*")
_ROWS = 32              # of a parquet file, at a time: rows may hold large images


class _Window:
  """What has been read of a JSON file, and the place in it."""

  def __init__(self, file, path):
    self._file, self._path, self._text, self._at, self._passed = file, path, "", 0, 0
    self._decode = json.JSONDecoder().raw_decode

  def _fill(self) -> bool:
    """Reads on; False at the end of the file."""
    try:
      more = self._file.read(max(_CHUNK_CHARS, len(self._text) - self._at))
    except UnicodeDecodeError as error:
      raise ValueError(f"{self._path} must be JSON in UTF-8. Received: {error}") from error
    self._passed += self._at
    self._text, self._at = self._text[self._at:] + more, 0
    return bool(more)

  def _next(self) -> str:
    """The next character that is no blank; "" at the end."""
    while True:
      self._at = _BLANK.match(self._text, self._at).end()
      if self._at < len(self._text):
        return self._text[self._at]
      if not self._fill():
        return ""

  def broken(self, wanted: str) -> ValueError:
    """An error that says where the file is no JSON."""
    found = self._text[self._at:self._at + 40]
    place = f"at character {self._passed + self._at + 1}"
    if not found:
      return ValueError(f"{self._path} ends early, {place}, where {wanted} is wanted: half a download?")
    return ValueError(f"{self._path} must be JSON, with {wanted} {place}. Received: {found!r}")

  def value(self):
    """The next value, whole."""
    if not self._next():
      raise self.broken("a value")
    while True:
      try:
        found, end = self._decode(self._text, self._at)
        may_go_on = not isinstance(found, (str, list, dict)) and end > len(self._text) - _NEAR_CHARS  # digits
        if not may_go_on or not self._fill():
          # A fill that found nothing has moved the text to where the value begins.
          self._at = end if not may_go_on else self._decode(self._text, self._at)[1]
          return found
      except (json.JSONDecodeError, RecursionError) as error:
        is_cut = isinstance(error, json.JSONDecodeError) and (
            error.pos > len(self._text) - _NEAR_CHARS or error.msg.startswith("Unterminated string"))
        if not is_cut or len(self._text) - self._at > _MOST_CHARS:
          self._at = getattr(error, "pos", self._at)
          raise self.broken("a value") from error
        if not self._fill():
          self._at = len(self._text)
          raise self.broken("the rest of a record") from error

  def is_container(self) -> bool:
    """Whether a list or an object is next."""
    return self._next() in ("[", "{")

  def members(self) -> Iterator[str | int]:
    """The number or key of each value of the list or object that comes next; read each value before asking for more."""
    opening = self._next()
    if opening not in ("[", "{"):
      raise self.broken("a list or an object")
    closing = "]" if opening == "[" else "}"
    self._at += 1
    for number in itertools.count():
      mark = self._next()
      if mark == closing:
        break
      if number and mark != ",":
        raise self.broken(f"a comma or {closing}")
      self._at += bool(number)
      if opening == "[":
        yield number
        continue
      key = self.value()
      if not isinstance(key, str) or self._next() != ":":
        raise self.broken("a key and a colon")
      self._at += 1
      yield key
    self._at += 1

  def skip(self) -> None:
    """Passes over the next value, however large."""
    if not self.is_container():
      self.value()
      return
    for _ in self.members():
      self.value()


def items(path: str, key: str | None = None) -> Iterator[tuple[str | int, object]]:
  """The members of a JSON list or object, one at a time.

  Args:
    path: of the file, UTF-8.
    key: under which the outermost object has the list or object that is wanted; None for the outermost itself.

  Yields:
    Key or number, and value.

  Raises:
    ValueError: the file is no JSON, ends early, or has no such key.
  """
  with _opened(path) as file:
    window = _Window(file, path)
    if key is None:
      yield from ((name, window.value()) for name in window.members())
      return
    if window._next() != "{":
      raise window.broken(f"an object with {key!r}")
    passed = []
    for name in window.members():
      if name == key:
        yield from ((inner, window.value()) for inner in window.members())
        return
      passed.append(name)
      window.skip()
    raise ValueError(f"{path} must be a JSON object with {key!r}. Received: one with "
                     f"{', '.join(map(repr, passed[:_EXAMPLES])) or 'no keys'}")


def member(path: str, key: str):
  """A member of a JSON file's outermost object, whole; None if there is none.  Other members are skipped.

  Raises:
    ValueError: the file is no JSON object.
  """
  with _opened(path) as file:
    window = _Window(file, path)
    if window._next() != "{":
      raise window.broken("an object")
    for name in window.members():
      if name == key:
        return window.value()
      window.skip()
  return None


def is_list(path: str) -> bool:
  """Whether a JSON file's outermost value is a list."""
  with _opened(path) as file:
    return _Window(file, path)._next() == "["


def lines(path: str) -> Iterator[tuple[str, object]]:
  """The values of a file of JSON lines; blank lines are skipped.

  Yields:
    Where (the file's name and the line, from 1), and the value or, for a line that is not JSON, a `records.Reject`.

  Raises:
    ValueError: the file can't be read.
  """
  name = os.path.basename(path)
  try:
    with open(path, "rb") as file:
      for number, line in enumerate(file, start=1):
        if line.isspace():
          continue
        where = f"{name}:{number}"
        try:
          yield where, json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
          yield where, records.Reject(where, "broken line", f"{error}: {line[:80]!r}")
  except OSError as error:
    raise ValueError(f"{path} must be a readable file of JSON lines ({error})") from error


def rows(path: str, wanted: Iterable[str]) -> Iterator[tuple[str, dict]]:
  """The rows of a parquet file, a few at a time.

  Args:
    path: of the file.
    wanted: columns that it must have.

  Yields:
    Where (the file's name and the row, from 1), and the row.

  Raises:
    ValueError: pyarrow is not installed, or the file is no parquet file, ends early, or lacks a column.
  """
  try:
    import pyarrow.parquet
  except ImportError as error:
    raise ValueError("parquet files need pyarrow: pip install 'virl-jax[parquet]'") from error
  name = os.path.basename(path)
  try:
    file = pyarrow.parquet.ParquetFile(path)
  except (OSError, pyarrow.ArrowException) as error:
    raise ValueError(f"{path} must be a whole parquet file ({error})") from error
  with file:
    columns = file.schema_arrow.names
    missing = [column for column in wanted if column not in columns]
    if missing:
      raise ValueError(f"{path} must have the columns {', '.join(wanted)}. Received: none named {', '.join(missing)}; "
                       f"it has {', '.join(columns)}")
    number = 0
    try:
      for batch in file.iter_batches(batch_size=_ROWS):
        for row in batch.to_pylist():
          number += 1
          yield f"{name}:{number}", row
    except (OSError, pyarrow.ArrowException) as error:
      raise ValueError(f"{path} is damaged after row {number} ({error})") from error


def objects(found: Iterable[tuple[str, object]], path: str, wanted: Iterable[str]
            ) -> Iterator[tuple[str, dict | records.Reject]]:
  """The found values; those that are not objects with the wanted fields become rejects.

  Args:
    found: where each value is, and the value, as `lines` and `items` give them.
    path: of the file, for errors.
    wanted: fields that each object must have.

  Yields:
    Where the value is, and the object or a reject.

  Raises:
    ValueError: there are no values, or the first three (or all, if there are fewer) are rejects: the file is of another
      kind.
  """
  wanted, waiting, began = tuple(wanted), [], False
  for where, value in found:
    where = str(where)
    if not isinstance(value, records.Reject) and not (isinstance(value, dict) and all(map(value.__contains__, wanted))):
      value = records.Reject(where, "fields are missing", f"wanted: {', '.join(wanted)}. Received: {_short(value)}")
    if began:
      yield where, value
    elif not isinstance(value, records.Reject):
      began = True
      yield from waiting
      yield where, value
    else:
      waiting.append((where, value))
      if len(waiting) == _EXAMPLES:
        break
  if not began:
    examples = "; ".join(f"{where}: {reject.detail}" for where, reject in waiting) or "nothing"
    raise ValueError(f"{path} must hold records with {', '.join(wanted)}. Received: {examples}")


def files(root: str, patterns: Iterable[str], what: str, exclude: str = "") -> list[str]:
  """The files of a raw folder that match the first pattern that any file matches.

  Args:
    root: the raw folder.
    patterns: of paths relative to it, for `glob`, the best first.
    what: the source and what is wanted, for the error.
    exclude: a regular expression; files whose names contain a match are left out.

  Returns:
    Paths, sorted.

  Raises:
    ValueError: there are none; names the patterns, and three of the files that are there.
  """
  patterns = tuple(patterns)
  if os.path.isdir(root):
    for pattern in patterns:
      found = [path for path in glob.glob(os.path.join(glob.escape(root), pattern), recursive=True)
               if os.path.isfile(path) and not (exclude and re.search(exclude, os.path.basename(path)))]
      if found:
        return sorted(found)
  raise ValueError(f"{what} must be in {root}: {' or '.join(patterns)}. Received: {there(root)}")


def splits(root: str, split: str, endings: str, what: str) -> list[str]:
  """The data files of a split in a raw folder or in the folders in it, by the split in their names.

  A file without a split in its name is of "train".

  Args:
    root: the raw folder.
    split: "train", "val" or "test".
    endings: extensions of the files, the best first, with blanks between them.
    what: the source and what is wanted, for the error.

  Raises:
    ValueError: there are none.
  """
  words = {"train": "train", "val": "val|valid|validation|dev", "test": "test"}
  others = "|".join(word for name, word in words.items() if name != split)
  named = lambda word: rf"(?:^|[^a-z])(?:{word})(?:[^a-z]|$)"
  found = files(root, [f"{folder}*.{ending}" for ending in endings.split() for folder in ("", "data/", "*/")],
                f"{what} of the {split} split",
                exclude=named(others) if split == "train" else rf"^(?!.*{named(words[split])})")
  return found


def listed(path: str, wanted: Iterable[str], key: str | None = None) -> Iterator[tuple[str, dict | records.Reject]]:
  """The objects of a JSON list, each with its place: the file's name and its number, from 0; see `items`, `objects`."""
  name = os.path.basename(path)
  yield from objects(((f"{name}:{number}", value) for number, value in items(path, key)), path, wanted)


def any_objects(path: str, wanted: Iterable[str]) -> Iterator[tuple[str, dict | records.Reject]]:
  """The objects of a file of JSON (a list or lines) or the rows of a parquet file; see `objects` and `rows`."""
  wanted = tuple(wanted)
  if path.endswith(".parquet"):
    yield from rows(path, wanted)
  elif path.endswith(".jsonl") or not is_list(path):
    yield from objects(lines(path), path, wanted)
  else:
    yield from listed(path, wanted)


def folder(root: str, candidates: Iterable[str]) -> str:
  """The first of some folders, relative to a raw folder, that exists; the first of all if none does."""
  candidates = tuple(candidates)
  return next((name for name in candidates if os.path.isdir(os.path.join(root, name))), candidates[0])


def there(root: str) -> str:
  """The first three names in a folder, in words."""
  if not os.path.isdir(root):
    return "no such folder"
  with os.scandir(root) as entries:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in itertools.islice(entries, 1000))
  return f"a folder with {', '.join(names[:_EXAMPLES])}" if names else "an empty folder"


def _opened(path):
  try:
    return open(path, encoding="utf-8-sig", newline="")
  except OSError as error:
    raise ValueError(f"{path} must be a readable file of JSON ({error})") from error


def _short(value):
  text = f"an object with {', '.join(map(str, value)) or 'no fields'}" if isinstance(value, dict) else repr(value)
  return text if len(text) <= 200 else text[:200] + "..."
