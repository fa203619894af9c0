"""From a source's raw folder to a finished set (`data/sources/sets.py`): what `curate build` does.

Records are read in the order of their files and dealt out in chunks; each chunk becomes one part, by a pure function
of the chunk and its pictures, in this process, in others, or in a Beam pipeline.  A part that is written is not made
again: a build that was interrupted goes on, and all ways give the same bytes.  In DIR/SOURCE-SPLIT/:

    the set, see `sets`
    counts.json      records read, tasks, boxes ok, clipped and unusable, rejects by reason; see `records.Counts`
    rejects.jsonl    {"where", "reason", "detail"} of each
    .build/          while it is made: plan.json (what is made of what), parts and their reports

and in DIR/ the counts of all of them by name (counts.json), and their rejects, with source and split (rejects.jsonl).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import re
import shutil

import numpy as np

from virl_jax.data import images
from virl_jax.data.sources import records
from virl_jax.data.sources import sets
from virl_jax.data.sources import stream
from virl_jax.data.sources import table

_FORMAT = 1
_CHUNK_RECORDS = 4096
_CHUNK_BYTES = 64 << 20   # of encoded pictures
_SEEN_PENDING = 1 << 18   # new ids before they are sorted in
_PICTURES = 1 << 17       # whose size and hash a process remembers
_EXAMPLES = 3
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
    embed: whether pictures that lie in files are copied into the set.
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
  def raw(self) -> str:
    """The folder that images' paths are relative to."""
    return os.path.dirname(self.root) or "." if os.path.isfile(self.root) else self.root


# A run of records in the order they were read, or what was wrong with them.
Chunk = tuple[int, list[records.Raw | records.Reject]]


def run(job: Job, jobs: int = 1, beam_options: list[str] | None = None,
        say: Callable[[str], None] = lambda line: None) -> records.Counts:
  """Builds a set, or goes on with it, or leaves it as it is if it is whole and of the same files.

  Args:
    job: what.
    jobs: how many processes make parts; with 1, this one does.
    beam_options: a Beam pipeline makes them instead, with these options, such as --runner=DirectRunner.
    say: is told what goes on.

  Returns:
    What became of the records.

  Raises:
    ValueError: the raw folder or a file of it is not what is wanted, or more than the given share was rejected, or
      there is no task.  What was made stays, and another start goes on from there.
  """
  plan = _plan(job)
  counts = _built(job.folder, plan)
  if counts is not None:
    say(f"{job.folder} is there, of the same files")
    return counts
  parts = _begin(job.folder, plan, say)
  if beam_options is not None:
    _beam(job, beam_options)
    numbers = range(sum(1 for _ in parts.glob("part-*.json")))
  else:
    numbers = _processes(job, jobs)
  return _end(job, plan, parts, numbers, say)


def gather(out: str) -> dict[str, dict]:
  """Writes DIR/counts.json and DIR/rejects.jsonl, of all sets in DIR.

  Args:
    out: DIR.

  Returns:
    Counts by the name of the set's folder.
  """
  whole = {path.parent.name: json.loads(path.read_text())
           for path in sorted(pathlib.Path(out).glob("*/counts.json"))}
  os.makedirs(out, exist_ok=True)
  _write(pathlib.Path(out) / "counts.json", json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
  partial = pathlib.Path(out) / f"rejects.jsonl.{os.getpid()}.tmp"
  with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
    for name in whole:
      source, _, split = name.rpartition("-")
      with open(pathlib.Path(out) / name / "rejects.jsonl", encoding="utf-8") as own:
        for line in own:
          file.write(json.dumps({"source": source, "split": split, **json.loads(line)}, ensure_ascii=False) + "\n")
  os.replace(partial, pathlib.Path(out) / "rejects.jsonl")
  return whole


def chunks(job: Job) -> Iterator[Chunk]:
  """The records of a source in chunks, numbered from 0, each id but once: a pure function of its files."""
  module = table.SOURCES[job.source]
  more = {"boxes_from": job.boxes_from} if job.source in table.JOINED else {}
  seen, number, batch, size = _Seen(), 0, [], 0
  for record in module.read(job.root, job.split, **more):
    batch.append(record)
    size += len(record.image) if isinstance(record, records.Raw) and isinstance(record.image, bytes) else 0
    if len(batch) == _CHUNK_RECORDS or size >= _CHUNK_BYTES:
      yield number, _first_of_each(batch, seen)
      number, batch, size = number + 1, [], 0
  if batch:
    yield number, _first_of_each(batch, seen)


def make_part(job: Job, chunk: Chunk) -> int:
  """Writes the part of a chunk, and then its report; the same chunk gives the same bytes.

  Args:
    job: what it is for.
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
  parts = job.folder / ".build"
  part = sets.write_part(_part_path(parts, number), tasks, digests)
  report = {"counts": counts.to_dict(), "rejects": rejects,
            "index": [[int(image), provenance.hex()] for image, provenance in part.index_N]}
  _write(_report_path(parts, number), json.dumps(report))
  return number


def pipeline(job: Job, options: list[str], runner=None):
  """The Beam pipeline that makes a job's parts; it is not run.

  Args:
    job: what; DIR must be a file system that all workers see.
    options: of Beam, such as --runner=FlinkRunner and --flink_master=HOST:PORT.
    runner: an object of Beam's that takes the place of the options' runner.

  Raises:
    ValueError: Beam is not installed, or has no such runner.
  """
  try:
    import apache_beam as beam
    from apache_beam.options import pipeline_options
  except ImportError as error:
    raise ValueError("--runner needs Apache Beam: pip install 'virl-jax[curate]'") from error
  try:
    made = beam.Pipeline(runner, options=pipeline_options.PipelineOptions(options))
  except (ImportError, ValueError) as error:  # no such runner, or one that needs more of Beam's own extras
    raise ValueError(f"--runner and --beam must be a runner of Apache Beam and its options. Received: {options} "
                     f"({error})") from error
  _ = (made | "source" >> beam.Create([job]) | "read" >> beam.FlatMap(_due)
       | "deal" >> beam.Reshuffle() | "make" >> beam.MapTuple(make_part))
  return made


def _due(job: Job) -> Iterator[tuple[Job, Chunk]]:
  """The chunks whose parts are not yet made."""
  parts = job.folder / ".build"
  for chunk in chunks(job):
    if not _report_path(parts, chunk[0]).exists():
      yield job, chunk


def _beam(job, options):
  result = pipeline(job, options).run()
  result.wait_until_finish()


def _processes(job, jobs):
  """Makes the parts that are missing; gives the numbers of all."""
  if jobs == 1:
    n_chunks = 0
    for chunk in chunks(job):
      n_chunks += 1
      if not _report_path(job.folder / ".build", chunk[0]).exists():
        make_part(job, chunk)
    return range(n_chunks)
  n_chunks, waiting = 0, set()
  # A fork of a process that has JAX in it may hang.
  with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
    for chunk in chunks(job):
      n_chunks += 1
      if _report_path(job.folder / ".build", chunk[0]).exists():
        continue
      waiting.add(pool.submit(make_part, job, chunk))
      if len(waiting) >= 2 * jobs:  # chunks wait in memory
        done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
        for one in done:
          one.result()
    for one in concurrent.futures.as_completed(waiting):
      one.result()
  return range(n_chunks)


def _plan(job):
  """What is made of what: as long as this stays the same, parts that are there are good."""
  module = table.SOURCES[job.source]
  more = {"boxes_from": job.boxes_from} if job.source in table.JOINED else {}
  if not os.path.exists(job.root):
    raise ValueError(f"--data must be {job.source}'s raw folder, with {module.WANTED}. Received: {job.root}, which is "
                     "not there")
  files = [[os.path.relpath(path, job.raw), os.stat(path).st_size, os.stat(path).st_mtime_ns]
           for path in module.files(job.root, job.split, **more)]
  return {"format": _FORMAT, "source": job.source, "split": job.split, "root": os.path.realpath(job.raw),
          "files": files, "embed": job.embed, "decode": job.decode, "chunk": [_CHUNK_RECORDS, _CHUNK_BYTES]}


def _built(folder, plan):
  """The counts of a set that is whole and made by the same plan, or None."""
  try:
    about = json.loads((folder / "set.json").read_text())["about"]
    is_whole = about["plan"] == plan and all((folder / name).is_file() for name in (
        "dataset_info.json", "counts.json", "rejects.jsonl"))
    return records.Counts.from_dict(about["counts"]) if is_whole else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _begin(folder, plan, say):
  """The folder of the parts, with those that an earlier start of the same plan has made."""
  parts = folder / ".build"
  there = parts / "plan.json"
  if there.is_file() and json.loads(there.read_text()) == plan:
    made = sum(1 for _ in parts.glob("part-*.json"))
    say(f"{folder}: goes on after {made} parts")
  else:
    if parts.exists():
      say(f"{folder}: begins anew, for its files or options have changed")
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    _write(there, json.dumps(plan))
  return parts


def _end(job, plan, parts, numbers, say):
  """The set of its parts, with counts and rejects."""
  counts, made = records.Counts(), []
  partial = job.folder / "rejects.jsonl.tmp"
  examples = {}
  with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
    for number in numbers:
      report = json.loads(_report_path(parts, number).read_text())
      counts.merge(records.Counts.from_dict(report["counts"]))
      index = [(image, bytes.fromhex(provenance)) for image, provenance in report["index"]]
      made.append(sets.Part(str(_part_path(parts, number)), np.array(index, sets.INDEX)))
      for reject in report["rejects"]:
        file.write(json.dumps(reject, ensure_ascii=False) + "\n")
        known = examples.setdefault(reject["reason"], [])
        if len(known) < _EXAMPLES:
          known.append(reject)
  os.replace(partial, job.folder / "rejects.jsonl")
  n_same = counts.tasks - len(np.unique(np.concatenate([part.index_N["provenance"] for part in made]))) if made else 0
  if n_same:
    counts.notes["tasks that are the same as an earlier one"] = n_same
  n_bad = sum(counts.rejects.values())
  _write(job.folder / "counts.json", json.dumps(counts.to_dict(), indent=1, ensure_ascii=False) + "\n")
  if n_bad > job.max_rejects * counts.records or not counts.tasks:
    reasons = "; ".join(_words(reason, count, examples[reason], job)
                        for reason, count in counts.rejects.most_common(_EXAMPLES))
    raise ValueError(f"{job.source}: at most {job.max_rejects:.0%} of the records may be rejected (--max_rejects). "
                     f"Received: {n_bad} of {counts.records}: {reasons}. All are named in "
                     f"{job.folder / 'rejects.jsonl'}")
  sets.finish(job.folder, job.source, job.split, made, "" if job.embed else job.raw,
              {"plan": plan, "counts": counts.to_dict()})
  shutil.rmtree(parts)
  say(f"{job.folder}: {counts.tasks} tasks of {counts.records} records")
  return counts


def _words(reason, count, examples, job):
  """A reason with its first examples and, for missing images, what lies there instead."""
  said = f"{count} {reason} ({'; '.join(e['where'] + ': ' + e['detail'] for e in examples)})"
  if reason == "missing image":
    folder = os.path.dirname(examples[0]["detail"])
    said += f"; instead, {os.path.join(job.raw, folder)} is {stream.there(os.path.join(job.raw, folder))}"
  return said


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
    return _ADDRESS.sub("", str(error))  # Pillow names an object in memory, at another address each time
  return records.Picture(size, records.digest(data))


def _look(raw, job):
  """A record's picture, and the bytes that are stored in its place if that is wanted; or a reject."""
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
  """Ids that have come before, as 8-byte hashes in sorted arrays: tens of millions fit."""

  def __init__(self):
    self._sorted, self._pending = np.zeros(0, np.uint64), set()

  def news(self, hashes: list[int]) -> list[bool]:
    """Of each, whether it has not come before, in this call or an earlier one."""
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


def _part_path(parts, number):
  return parts / f"part-{number:06d}.array_record"


def _report_path(parts, number):
  return parts / f"part-{number:06d}.json"


def _write(path, text):
  """Whole or not at all."""
  partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  partial.write_text(text, "utf-8")
  os.replace(partial, path)
