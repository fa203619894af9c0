"""HR-Bench 4K and 8K: 200 questions each, asked four times with the options in other orders (Wang et al. 2024).

Layouts:

    TSV    hr_bench_4k.tsv: index, question, answer, category (single, cross), A to D, cycle_category, image (base64, or
           the index of the row that has it)
    JSON   ZoomEye's annotation_hr-bench_4k.json: a record for each question, with lists of four answers and of four
           texts of options; its index goes up by four, and its cycle_category is always 0
"""

from __future__ import annotations

import os

from virl_jax import types
from virl_jax.data import tables
from virl_jax.eval.benchmarks import choices
from virl_jax.eval.benchmarks import rows as rows_lib

RULE = ("the option that an answer begins with the letter of, or whose text it is; the mean over cycles of each "
        "cycle's accuracy, all questions pooled")

_COLUMNS = ("index", "question", "answer", "category", "A", "B", "cycle_category", "image")


def load(path: str, how: rows_lib.How = rows_lib.How()) -> rows_lib.Loaded:
  """Reads either layout.

  Args:
    path: of the file.
    how: see `rows.How`; options stay in their four orders.

  Returns:
    Tasks named by the index of their row in the TSV, grouped by cycle.

  Raises:
    ValueError: the file cannot be read, or lacks a column.
  """
  reader = rows_lib.Reader(how, os.path.dirname(path))
  if path.endswith(".tsv"):
    for number, row in enumerate(tables.tsv(path, _COLUMNS), 1):
      reader.add(number, row["index"] or "", lambda row=row: _of_row(reader, tables.columns(row)),
                 (row["cycle_category"] or "").strip())
    return reader.loaded()
  number = 0
  for row in tables.json_rows(path):
    cycles = row["options"] if isinstance(row, dict) and isinstance(row.get("options"), list) else [None]
    for cycle in range(len(cycles)):
      number += 1
      name = f"{row['index']}, cycle {cycle}" if isinstance(row, dict) and "index" in row else ""
      reader.add(number, name, lambda row=row, cycle=cycle: _of_record(reader, row, cycle), str(cycle))
  return reader.loaded()


def score(loaded: rows_lib.Loaded, predictions: rows_lib.Predictions) -> dict:
  """The average over cycles, of all questions and of each category, and other figures that are quoted.

  Returns:
    As `rows.result`; figures: average (over cycles), each category (over cycles), mean_of_categories, pooled, cycles.
    The cycles of a question are one cluster for intervals.

  Source: VLMEvalKit's report, whose "Average" is the mean over cycles of each cycle's pooled accuracy.
  """
  rows = rows_lib.scored(loaded, predictions)
  return rows_lib.result("hrbench", RULE, "average", loaded, rows, figures(rows),
                         lambda uid: _question(uid, loaded.group.get(uid, "")))


def figures(rows: list[dict]) -> dict:
  """The figures of scored rows; see `score`."""
  cycles = rows_lib.split(rows, "group")
  kinds = list(rows_lib.split(rows, "kind"))
  over = lambda kind: rows_lib.means(rows_lib.mean([r for r in found if kind in (None, r["kind"])])
                                     for found in cycles.values())
  return {"average": over(None)} | {kind: over(kind) for kind in kinds} | {
      "mean_of_categories": rows_lib.means(over(kind) for kind in kinds), "pooled": rows_lib.mean(rows),
      "cycles": {cycle: rows_lib.mean(found) for cycle, found in cycles.items()}}


def _question(uid: str, cycle: str) -> str:
  """The index of a question's first cycle: its cycles have successive indices."""
  return str(int(uid) - int(cycle)) if uid.isdecimal() and cycle.isdecimal() else uid


def _of_row(reader, row):
  options = rows_lib.options_of(row)
  tables.text(row, "cycle_category")
  return types.Task(tables.text(row, "index"), reader.inside(row["image"], row["index"]),
                    tables.text(row, "question"), (rows_lib.by_letter(tables.text(row, "answer"), options),), (),
                    options, tables.text(row, "category"), "options")


def _of_record(reader, row, cycle):
  index = tables.get(row, "index")
  if not isinstance(index, int):
    raise tables.Unusable("index is not a number")
  letters, texts = tables.texts(row, "answer"), tables.texts(row, "options")
  if len(letters) != len(texts):
    raise tables.Unusable("another number of answers than of orders of options")
  options = choices.block(texts[cycle])
  return types.Task(str(index + cycle), reader.file(tables.text(row, "input_image")), tables.text(row, "question"),
                    (rows_lib.by_letter(letters[cycle], options),), (), options, tables.text(row, "category"),
                    "options")
