"""MME-RealWorld and its Lite: large pictures, five options, E for "not in the image" (Zhang et al. 2024).

Layouts:

    JSON   an array: Question_id, Image, Text, "Answer choices" ("(A) ..."), "Ground truth", Task, Subtask, Category.
           The spelling of keys and values varies ("Question Type", "Question type"; "Perception", "perception")
    TSV    VLMEvalKit's: index, image, question, A to E, answer, category, l2-category
"""

from __future__ import annotations

import os
import re

from virl_jax import types
from virl_jax.data import tables
from virl_jax.eval.benchmarks import rows as rows_lib

RULE = ("the option that an answer begins with the letter of, or whose text it is; accuracy over all questions, and "
        "the mean over subtasks beside it")

_LETTERED = re.compile(r"\s*\(?([A-Z])[).:]\s*(.*)", re.DOTALL)
_COLUMNS = ("index", "image", "question", "A", "B", "answer", "category")


def load(path: str, how: rows_lib.How = rows_lib.How()) -> rows_lib.Loaded:
  """Reads either layout.

  Args:
    path: of the file.
    how: see `rows.How`.

  Returns:
    Tasks of kind "task/subtask", in lower case.

  Raises:
    ValueError: the file cannot be read, or lacks a column.
  """
  reader = rows_lib.Reader(how, os.path.dirname(path))
  if path.endswith(".tsv"):
    for number, row in enumerate(tables.tsv(path, _COLUMNS), 1):
      reader.add(number, row["index"] or "", lambda row=row: _of_row(reader, tables.columns(row)))
    return reader.loaded()
  for number, row in enumerate(tables.json_rows(path), 1):
    row = {_key(k): v for k, v in row.items()} if isinstance(row, dict) else row
    name = str(row.get("question id", "")) if isinstance(row, dict) else ""
    reader.add(number, name, lambda row=row: _of_record(reader, row))
  return reader.loaded()


def score(loaded: rows_lib.Loaded, predictions: rows_lib.Predictions) -> dict:
  """Accuracy of all questions, of perception and reasoning, and of each subtask.

  Returns:
    As `rows.result`; figures: overall, and for each task its accuracy, the mean over its subtasks, and that of each
    subtask.

  Source: Zhang et al. 2024 ("Avg" and "Avg-C").
  """
  rows = rows_lib.scored(loaded, predictions)
  for row in rows:
    row["task"] = row["kind"].partition("/")[0]
  return rows_lib.result("mme_realworld", RULE, "overall", loaded, rows, figures(rows))


def figures(rows: list[dict]) -> dict:
  """The figures of scored rows; see `score`."""
  tree: dict = {"overall": rows_lib.mean(rows)}
  for task, found in rows_lib.split(rows, "task").items():
    subtasks = {kind.partition("/")[2]: rows_lib.mean(r) for kind, r in rows_lib.split(found, "kind").items()}
    tree[task] = {"accuracy": rows_lib.mean(found), "mean_of_subtasks": rows_lib.means(subtasks.values()),
                  "subtasks": subtasks}
  return tree


def _of_record(reader, row):
  found = [_LETTERED.fullmatch(choice) for choice in tables.texts(row, "answer choices")]
  letters = "".join(m[1] for m in found if m)
  if len(found) < 2 or letters != rows_lib.LETTERS[:len(found)] or not all(m[2].strip() for m in found):
    raise tables.Unusable("options are missing")
  options = tuple(m[2].strip() for m in found)
  return types.Task(tables.text(row, "question id"), reader.file(tables.text(row, "image")), tables.text(row, "text"),
                    (rows_lib.by_letter(tables.text(row, "ground truth"), options),), (), options,
                    f"{_key(tables.text(row, 'task'))}/{_key(tables.text(row, 'subtask'))}", "options")


def _of_row(reader, row):
  options = rows_lib.options_of(row)
  category = tables.text(row, "category")
  task, slash, subtask = category.partition("/")
  if not slash:
    subtask = tables.text(row, "l2-category") if "l2-category" in row else ""
  return types.Task(tables.text(row, "index"), reader.inside(row["image"], row["index"]),
                    tables.text(row, "question"), (rows_lib.by_letter(tables.text(row, "answer"), options),), (),
                    options, f"{_key(task)}/{_key(subtask)}", "options")


def _key(name: str) -> str:
  return " ".join(name.lower().replace("_", " ").split())
