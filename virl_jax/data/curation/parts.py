"""The pure half of `curate build`: a source's records in chunks, and the part of a set that each chunk becomes.

Records are read in the order of their files and dealt out in chunks.  Each chunk becomes one part, by a pure function
of the chunk and its pictures: whichever process makes it, the bytes are the same.  In DIR/SOURCE-SPLIT/.build/:

    part-000000.array_record    tasks, see `set_files.write_part`
    part-000000.json            the part's report, written last: counts, rejects, index
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
import json
import os
import pathlib
import re

import numpy as np

from virl_jax.data import images
from virl_jax.data.sources import records
from virl_jax.data.sources import set_files
from virl_jax.data.sources import table

CHUNK_RECORDS = 4096
CHUNK_BYTES = 64 << 20    # of encoded pictures
_SEEN_PENDING = 1 << 18   # how many new ids are gathered before they are sorted in
_PICTURES = 1 << 17       # how many pictures' sizes and hashes a process remembers
_ADDRESS = re.compile(r" ?<?[\w.]+ object at 0x[0-9a-f]+>?")


@dataclasses.dataclass(frozen=True)
class Job:
  """What is to be built.

  Attributes:
    source: a name of `table.SOURCES`.
    root: its raw folder.
    split: which of its splits.
    out: DIR; the set goes into a folder of it.
    boxes_from: the raw folder of Visual-CoT, for sources of `table.JOINED`; "" for none.
    embed: whether pictures in files of their own are copied into the set.
    decode: whether each picture is decoded, to find those that are cut off; else only its header is read.
    max_rejects: the largest share of records that may be rejected.
  """

  source: str
  root: str
  split: str
  out: str
  boxes_from: str = ""
  embed: bool = False
  decode: bool = False
  max_rejects: float = 0.1

  def __post_init__(self):
    if self.source not in table.SOURCES:
      raise ValueError(f"--source must be one of {', '.join(table.SOURCES)}. Received: {self.source!r}")
    module = table.SOURCES[self.source]
    if self.split not in module.SPLITS:
      raise ValueError(f"--split must be one of {', '.join(module.SPLITS)} for {self.source}. "
                       f"Received: {self.split!r}")
    if self.boxes_from and self.source not in table.JOINED:
      raise ValueError(f"--boxes_from must be left out for {self.source}, which has its own boxes or nothing to join "
                       f"by; it is for {', '.join(table.JOINED)}. Received: {self.boxes_from!r}")
    if not 0 <= self.max_rejects <= 1:
      raise ValueError(f"--max_rejects must be a share in [0, 1]. Received: {self.max_rejects!r}")

  @property
  def folder(self) -> pathlib.Path:
    """Where the set goes."""
    return pathlib.Path(self.out) / f"{self.source}-{self.split}"

  @property
  def parts(self) -> pathlib.Path:
    """Where its parts are while it is made."""
    return self.folder / ".build"

  @property
  def raw(self) -> str:
    """The folder that images' paths are relative to."""
    return os.path.dirname(self.root) or "." if os.path.isfile(self.root) else self.root


# Its number, and successive records, or what was wrong with them, in the order in which they were read.
Chunk = tuple[int, list[records.Raw | records.Reject]]


def chunks(job: Job) -> Iterator[Chunk]:
  """The records of a source in chunks, numbered from 0, each id only once: a pure function of its files."""
  module = table.SOURCES[job.source]
  more = {"boxes_from": job.boxes_from} if job.source in table.JOINED else {}
  seen, number, batch, size = _Seen(), 0, [], 0
  for record in module.read(job.root, job.split, **more):
    batch.append(record)
    size += len(record.image) if isinstance(record, records.Raw) and isinstance(record.image, bytes) else 0
    if len(batch) == CHUNK_RECORDS or size >= CHUNK_BYTES:
      yield number, _first_of_each(batch, seen)
      number, batch, size = number + 1, [], 0
  if batch:
    yield number, _first_of_each(batch, seen)


def make_part(job: Job, chunk: Chunk) -> int:
  """Writes the part of a chunk, and then its report; the same chunk gives the same bytes.

  Args:
    job: what is built.
    chunk: see `chunks`.

  Returns:
    The chunk's number.
  """
  number, batch = chunk
  counts, rejects, tasks, digests = records.Counts(), [], [], []
  for record in batch:
    outcome, repairs, notes, digest = record, {}, {}, ""
    if isinstance(record, records.Raw):
      found = _look(record, job)
      outcome = found
      if not isinstance(found, records.Reject):
        picture, data = found
        outcome, repairs = records.settle(record, picture)
        notes, digest = record.notes, picture.digest
        if data is not None and not isinstance(outcome, records.Reject):
          outcome = dataclasses.replace(outcome, image=data)
    counts.add(outcome, repairs, notes)
    if isinstance(outcome, records.Reject):
      rejects.append(dataclasses.asdict(outcome))
    else:
      tasks.append(outcome)
      digests.append(digest)
  part = set_files.write_part(part_path(job.parts, number), tasks, digests)
  report = {"counts": counts.to_dict(), "rejects": rejects,
            "index": [[int(image), provenance.hex()] for image, provenance in part.index_N]}
  write(report_path(job.parts, number), json.dumps(report))
  return number


@functools.lru_cache(_PICTURES)
def _picture(path: str, decode: bool) -> records.Picture | str:
  """A file's size and hash, or what is wrong with it."""
  try:
    with open(path, "rb") as file:
      return _of_bytes(file.read(), decode)
  except OSError as error:
    return str(error)


def _of_bytes(data, decode):
  try:
    size = images.decode(data).size if decode else images.upright_size(data)
  except ValueError as error:
    return _ADDRESS.sub("", str(error))  # Pillow names an object by its address, which differs each time
  return records.Picture(size, records.digest(data))


def _look(raw, job):
  """A record's picture, and its bytes if they are to be embedded, else None; or a reject."""
  if isinstance(raw.image, bytes):
    picture, data = _of_bytes(raw.image, job.decode), None
  else:
    path = os.path.join(job.raw, raw.image)
    if not os.path.isfile(path):  # also keeps away from pipes, which would block
      return records.Reject(raw.uid, "missing image", raw.image)
    picture, data = _picture(path, job.decode), None
    if job.embed and not isinstance(picture, str):
      data = pathlib.Path(path).read_bytes()
  if isinstance(picture, str):
    return records.Reject(raw.uid, "bad image", f"{raw.image if isinstance(raw.image, str) else ''} {picture}".strip())
  return picture, data


class _Seen:
  """Ids that have come before, as 8-byte hashes in a sorted array: tens of millions fit into memory."""

  def __init__(self):
    self._sorted, self._pending = np.zeros(0, np.uint64), set()

  def news(self, hashes: list[int]) -> list[bool]:
    """For each, whether it is new: not seen in this call or an earlier one."""
    old = self._sorted
    wanted = np.array(hashes, np.uint64)
    places = np.minimum(np.searchsorted(old, wanted), max(len(old) - 1, 0))
    known = old[places] == wanted if len(old) else np.zeros(len(wanted), bool)
    fresh = []
    for number, is_known in zip(hashes, known):
      fresh.append(not is_known and number not in self._pending)
      self._pending.add(number)
    if len(self._pending) >= _SEEN_PENDING:
      self._sorted = np.union1d(old, np.fromiter(self._pending, np.uint64, len(self._pending)))
      self._pending = set()
    return fresh


def _first_of_each(batch, seen):
  """The batch with a reject in place of each record whose id has come before."""
  hashes = [int(records.digest(r.uid.encode("utf-8", "surrogatepass"))[:16], 16) for r in batch
            if isinstance(r, records.Raw)]
  fresh = iter(seen.news(hashes))
  return [record if isinstance(record, records.Reject) or next(fresh) else
          records.Reject(record.uid, "duplicate id", record.question if isinstance(record.question, str) else "")
          for record in batch]


def part_path(parts: pathlib.Path, number: int) -> pathlib.Path:
  """Where a part is, in the folder of the parts."""
  return parts / f"part-{number:06d}.array_record"


def report_path(parts: pathlib.Path, number: int) -> pathlib.Path:
  """Where a part's report is."""
  return parts / f"part-{number:06d}.json"


def write(path: pathlib.Path, text: str) -> None:
  """Writes a file whole or not at all, even if another worker writes the same one."""
  partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  partial.write_text(text, "utf-8")
  os.replace(partial, path)
