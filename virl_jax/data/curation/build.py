"""From a source's raw folder to a finished set (`data/sources/set_files.py`): what `curate build` does.

Its parts (`parts`) are made in this process, in others, or in a Beam pipeline.  A part that is written is not made
again: a build that was interrupted goes on, and all ways give the same bytes.  In DIR/SOURCE-SPLIT/:

    the set, see `set_files`
    counts.json      records read, tasks, boxes ok, clipped and unusable, rejects by reason; see `records.Counts`
    rejects.jsonl    {"where", "reason", "detail"} of each
    .build/          while it is made: plan.json (what is made of what), parts and their reports

and in DIR/ the counts of all of them by name (counts.json), and their rejects, with source and split (rejects.jsonl).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import shutil

import numpy as np

from virl_jax.data.curation import parts as parts_lib
from virl_jax.data.sources import records
from virl_jax.data.sources import set_files
from virl_jax.data.sources import stream
from virl_jax.data.sources import table
from virl_jax.run import progress

_FORMAT = 1
_EXAMPLES = 3


def run(job: parts_lib.Job, jobs: int = 1, beam_options: list[str] | None = None,
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
  parts_lib.write(pathlib.Path(out) / "counts.json", json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
  partial = pathlib.Path(out) / f"rejects.jsonl.{os.getpid()}.tmp"
  with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
    for name in whole:
      source, _, split = name.rpartition("-")
      with open(pathlib.Path(out) / name / "rejects.jsonl", encoding="utf-8") as own:
        for line in own:
          file.write(json.dumps({"source": source, "split": split, **json.loads(line)}, ensure_ascii=False) + "\n")
  os.replace(partial, pathlib.Path(out) / "rejects.jsonl")
  return whole


def pipeline(job: parts_lib.Job, options: list[str], runner=None):
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
       | "deal" >> beam.Reshuffle() | "make" >> beam.MapTuple(parts_lib.make_part))
  return made


def _due(job: parts_lib.Job) -> Iterator[tuple[parts_lib.Job, parts_lib.Chunk]]:
  """The chunks whose parts are not yet made."""
  for chunk in parts_lib.chunks(job):
    if not parts_lib.report_path(job.parts, chunk[0]).exists():
      yield job, chunk


def _beam(job, options):
  result = pipeline(job, options).run()
  result.wait_until_finish()


def _processes(job, jobs):
  """Makes the parts that are missing; gives the numbers of all."""
  with progress.bar(None, f"reading {job.source}", "record") as bar:  # how many there are nobody knows before the end
    return _made(job, jobs, bar)


def _made(job, jobs, bar):
  if jobs == 1:
    n_chunks = 0
    for chunk in _counted(job, bar):
      n_chunks += 1
      if not parts_lib.report_path(job.parts, chunk[0]).exists():
        parts_lib.make_part(job, chunk)
    return range(n_chunks)
  n_chunks, waiting = 0, set()
  # A fork of a process that has JAX in it may hang.
  with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
    for chunk in _counted(job, bar):
      n_chunks += 1
      if parts_lib.report_path(job.parts, chunk[0]).exists():
        continue
      waiting.add(pool.submit(parts_lib.make_part, job, chunk))
      if len(waiting) >= 2 * jobs:  # chunks wait in memory
        done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
        for one in done:
          one.result()
    for one in concurrent.futures.as_completed(waiting):
      one.result()
  return range(n_chunks)


def _counted(job, bar):
  """The chunks of a job, whose records move a bar when their part is made, or waits for a process."""
  for chunk in parts_lib.chunks(job):
    yield chunk
    bar.update(len(chunk[1]))


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
          "files": files, "embed": job.embed, "decode": job.decode,
          "chunk": [parts_lib.CHUNK_RECORDS, parts_lib.CHUNK_BYTES]}


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
    parts_lib.write(there, json.dumps(plan))
  return parts


def _end(job, plan, parts, numbers, say):
  """The set of its parts, with counts and rejects."""
  counts, made = records.Counts(), []
  partial = job.folder / "rejects.jsonl.tmp"
  examples = {}
  with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
    for number in numbers:
      report = json.loads(parts_lib.report_path(parts, number).read_text())
      counts.merge(records.Counts.from_dict(report["counts"]))
      index = [(image, bytes.fromhex(provenance)) for image, provenance in report["index"]]
      made.append(set_files.Part(str(parts_lib.part_path(parts, number)), np.array(index, set_files.INDEX)))
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
  parts_lib.write(job.folder / "counts.json", json.dumps(counts.to_dict(), indent=1, ensure_ascii=False) + "\n")
  if n_bad > job.max_rejects * counts.records or not counts.tasks:
    reasons = "; ".join(_words(reason, count, examples[reason], job)
                        for reason, count in counts.rejects.most_common(_EXAMPLES))
    raise ValueError(f"{job.source}: at most {job.max_rejects:.0%} of the records may be rejected (--max_rejects). "
                     f"Received: {n_bad} of {counts.records}: {reasons}. All are named in "
                     f"{job.folder / 'rejects.jsonl'}")
  set_files.finish(job.folder, job.source, job.split, made, "" if job.embed else job.raw,
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


