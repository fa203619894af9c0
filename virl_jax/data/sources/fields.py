"""Fields that publishers write in different ways: pictures, answers, options within a question."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import hashlib
import os
import re

from virl_jax.data.sources import records

_PLACEHOLDER = re.compile(r"\s*<(?:image|img|video)>\s*", re.IGNORECASE)
_OPTION = re.compile(r"\(?([A-Z])[).:]\s*(\S.*)")
_INSTRUCTION = re.compile(r"(?:answer|respond|please|select|choose|think|you)\b", re.IGNORECASE)


class Unusable(Exception):
  """Why a record can't be read: the reason and detail of a `records.Reject`."""


def text(value: object) -> str:
  """A field that is text, or a number, as text; without blanks at its ends.

  Raises:
    Unusable: it is neither.
  """
  if isinstance(value, bool) or not isinstance(value, (str, int, float)):
    raise Unusable("fields are missing", f"text is wanted. Received: {value!r}"[:200])
  return str(value).strip()


def texts(value: object) -> tuple[str, ...]:
  """A text, or a list of texts, as a tuple without blank ones; () for None.

  Raises:
    Unusable: it is neither.
  """
  if value is None:
    return ()
  found = (text(one) for one in (value if isinstance(value, (list, tuple)) else [value]))
  return tuple(one for one in found if one)


def picture(value: object) -> bytes | str:
  """A picture as Hugging Face's datasets and peers write it: a path, bytes, {"bytes", "path"}, or a list of one.

  Returns:
    The encoded bytes if there are any, else the path.

  Raises:
    Unusable: there is none, or there are several.
  """
  if isinstance(value, (list, tuple)):
    if len(value) > 1:
      raise Unusable("several images", f"one is wanted. Received: {len(value)}")
    value = value[0] if value else None
  if isinstance(value, dict):
    value = value.get("bytes") or value.get("path") or value.get("image")
  if not isinstance(value, (bytes, str)) or not value:
    raise Unusable("no image", f"a path or an encoded file is wanted. Received: {value!r}"[:200])
  return value.removeprefix("file://") if isinstance(value, str) else value


def question(value: object) -> tuple[str, tuple[str, ...] | None]:
  """A question without the picture's placeholder, and the options at its end, or None.

  Options are lines "A. cat", "(A) cat" or "A: cat", from A on, at least two; an instruction may follow them.

  Raises:
    Unusable: it is no text.
  """
  lines = [line.strip() for line in _PLACEHOLDER.sub("\n", text(value)).strip().splitlines()]
  lines = [line for line in lines if line]
  first = next((i for i, line in enumerate(lines) if (m := _OPTION.fullmatch(line)) and m[1] == "A"), None)
  if first:
    found = []
    for line in lines[first:]:
      match = _OPTION.fullmatch(line)
      if not match or ord(match[1]) - ord("A") != len(found):
        break
      found.append(match[2].strip())
    after = lines[first + len(found):]
    before = lines[:first]
    if len(found) > 1 and all(_INSTRUCTION.match(line) for line in after):
      if len(before) > 1 and re.fullmatch(r"(?:options|choices)\s*:?", before[-1], re.IGNORECASE):
        before = before[:-1]
      return "\n".join(before), tuple(found)
  return "\n".join(lines), None


def answer(value: object, options: tuple[str, ...] | None) -> tuple[str, ...]:
  """Accepted answers; "B. cat" and "(B) cat" become "cat" if that is option B.

  Raises:
    Unusable: it is neither text nor a list of texts.
  """
  found = []
  for one in texts(value):
    match = _OPTION.fullmatch(one) if options else None
    place = ord(match[1]) - ord("A") if match else -1
    found.append(options[place] if match and place < len(options) and options[place] == match[2].strip() else one)
  return tuple(found)


def shuffled(right: str, wrong: Iterable[str], uid: str) -> tuple[str, ...]:
  """The options in a fixed order that depends on the record: were the right one always first, A would be learned."""
  rank = lambda option: hashlib.blake2b(f"{uid}\0{option}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
  return tuple(sorted((right, *wrong), key=rank))


def box_lists(value: object) -> tuple[tuple[float, ...], ...]:
  """Boxes from a list of four numbers each, a list of {"bbox": four numbers}, or one box alone; () for None.

  Raises:
    Unusable: it is no list.
  """
  if value is None:
    return ()
  if not isinstance(value, (list, tuple)):
    raise Unusable("bad boxes", f"a list is wanted. Received: {value!r}"[:200])
  if len(value) == 4 and not any(isinstance(one, (list, tuple, dict)) for one in value):
    value = [value]
  found = []
  for one in value:
    if isinstance(one, dict):
      one = one.get("bbox", one.get("bbox_2d", one.get("box")))
    found.append(tuple(one) if isinstance(one, (list, tuple)) else ())  # () is no box, and counted as such
  return tuple(found)


def beside(root: str, path: str, image: bytes | str) -> bytes | str:
  """An image's path, relative to its annotation file, made relative to the raw folder; bytes as they are.

  Args:
    root: the raw folder.
    path: of the annotation file.
    image: as the file has it; an absolute path stays.
  """
  if isinstance(image, bytes) or os.path.isabs(image):
    return image
  folder = os.path.relpath(os.path.dirname(path) or ".", root)
  return image if folder == "." else os.path.join(folder, image)


def raws(found: Iterable[tuple[str, dict | records.Reject]], make: Callable[[dict, str], records.Raw]
         ) -> Iterator[records.Raw | records.Reject]:
  """A record from each of a file's objects, or a reject if it can't be one; rejects are passed on.

  Args:
    found: where each object is, and the object, as `stream` gives them.
    make: gives the record of an object, from the object and where it is.  What it raises rejects the object.
  """
  for where, item in found:
    if isinstance(item, records.Reject):
      yield item
      continue
    try:
      raw = make(item, where)
    except (Unusable, TypeError, ValueError, AttributeError, LookupError) as error:
      raw = reject(where, error)
    yield raw


def reject(where: str, error: Exception) -> records.Reject:
  """The reject that an error becomes; an error that is not `Unusable` comes from a missing or mistyped field."""
  if isinstance(error, Unusable):
    return records.Reject(where, *error.args)
  return records.Reject(where, "fields are missing", f"{type(error).__name__}: {error}"[:200])
