"""DocVQA: questions about scanned pages (Mathew et al. 2021).

Layout: val_v1.0.json, an object with the rows under data, or an array: questionId, question, image ("documents/X.png",
relative to the file), answers.  The rule is that of InfographicsVQA too, whose file is read by its own module.
"""

from __future__ import annotations

import os

from virl_jax import types
from virl_jax.data import official
from virl_jax.data import tables
from virl_jax.eval.benchmarks import rows as rows_lib

RULE = "ANLS: 1 less the edit distance by the longer raw string, of the best reference, 0 below one half; the mean"


def load(path: str, how: rows_lib.How = rows_lib.How()) -> rows_lib.Loaded:
  """Reads a split.

  Args:
    path: of the file.
    how: see `rows.How`.

  Returns:
    Tasks named by question id; those of a split whose answers are not published have none.

  Raises:
    ValueError: the file cannot be read.
  """
  return of_file(path, how, "docvqa", lambda row: (name := tables.text(row, "image"), os.path.basename(name)))


def score(loaded: rows_lib.Loaded, predictions: rows_lib.Predictions) -> dict:
  """The mean ANLS.

  Source: the Robust Reading Competition; see `data.official.anls`.
  """
  return anls("docvqa", loaded, predictions)


def of_file(path: str, how: rows_lib.How, name: str, pictures) -> rows_lib.Loaded:
  """`load` for a set with pictures elsewhere: `pictures` gives a row's possible paths, as `Reader.file` takes them."""
  reader = rows_lib.Reader(how, os.path.dirname(path))
  for number, row in enumerate(tables.json_rows(path), 1):
    uid = str(row.get("questionId", "")) if isinstance(row, dict) else ""
    reader.add(number, uid, lambda row=row: types.Task(
        tables.text(row, "questionId", "question_id"), reader.file(*pictures(row)), tables.text(row, "question"),
        tables.texts(row, "answers") if "answers" in row else (), kind=name, match="anls"))
  return reader.loaded()


def anls(name: str, loaded: rows_lib.Loaded, predictions: rows_lib.Predictions) -> dict:
  """`score` for the benchmark of that name."""
  rows = rows_lib.scored(loaded, predictions, lambda task, p: official.anls(p.text, task.answers))
  return rows_lib.result(name, RULE, "ANLS", loaded, rows, {"ANLS": rows_lib.mean(rows)})
