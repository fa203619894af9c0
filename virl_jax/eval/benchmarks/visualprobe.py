"""VisualProbe: small things in large pictures, free answers (Lai et al. 2025, Mini-o3).

Layout: a JSON array, or JSON lines: problem (with <image> in the picture's place), solution (or ground_truth), images
(a list of one path, or a path), doc_id, data_source (the level of difficulty).
"""

from __future__ import annotations

import collections
import os

from virl_jax import types
from virl_jax.data import exact
from virl_jax.data import tables
from virl_jax.eval import figures as figures_lib
from virl_jax.eval.benchmarks import rows as rows_lib

RULE = ("the answer is the reference as a whole, by `exact` (the publishers ask a model to judge); Avg@k: the mean "
        "over a task's samples, then over tasks; majority: of each task's most frequent answer")


def load(path: str, how: rows_lib.How = rows_lib.How()) -> rows_lib.Loaded:
  """Reads a level.

  Args:
    path: of the file.
    how: see `rows.How`.

  Returns:
    Tasks named by doc_id if that is unique, and else by row number.

  Raises:
    ValueError: the file cannot be read.
  """
  reader = rows_lib.Reader(how, os.path.dirname(path))
  found = tables.json_rows(path)
  ids = collections.Counter(str(row.get("doc_id")) for row in found if isinstance(row, dict))
  for number, row in enumerate(found, 1):
    doc = str(row.get("doc_id")) if isinstance(row, dict) else ""
    uid = doc if ids[doc] == 1 and doc != "None" else f"row {number}"
    reader.add(number, uid, lambda row=row, uid=uid: _task(reader, row, uid))
  return reader.loaded()


def score(loaded: rows_lib.Loaded, predictions: rows_lib.Predictions) -> dict:
  """Avg@k and the majority's accuracy.

  Returns:
    As `rows.result`; figures: average, majority, samples (the fewest and the most of a task), levels (their average).
  """
  rows = rows_lib.scored(loaded, predictions)
  tasks = rows_lib.split(rows, "uid")
  sizes = [len(found) for found in tasks.values()]
  # A task's samples share its weight, so that each task counts as much, however many samples it has.
  average = lambda found: figures_lib.ratio(found, lambda row: row["score"] / len(tasks[row["uid"]]),
                                            lambda row: 1 / len(tasks[row["uid"]]))
  figures = {"average": average(rows), "majority": rows_lib.mean([_majority(found) for found in tasks.values()]),
             "samples": [min(sizes, default=0), max(sizes, default=0)],
             "levels": {kind: average(found) for kind, found in rows_lib.split(rows, "kind").items()}}
  return rows_lib.result("visualprobe", RULE, "average", loaded, rows, figures)


def _majority(samples):
  """The first of the samples that say what most say."""
  return samples[rows_lib.vote([exact.normalize(s["prediction"]) for s in samples])]


def _task(reader, row, uid):
  names = tables.get(row, "images", "image")
  names = names if isinstance(names, list) else [names]
  if len(names) != 1 or not isinstance(names[0], str):
    raise tables.Unusable("not one image")
  question = tables.text({"problem": tables.text(row, "problem").replace("<image>", "")}, "problem").strip()
  return types.Task(uid, reader.file(names[0], os.path.basename(names[0])), question,
                    (tables.text(row, "solution", "ground_truth"),),
                    kind=tables.text(row, "data_source") if "data_source" in row else "visualprobe")
