"""Images, questions and boxes of your own: the JSON lines that `data.sources.jsonl` describes."""

from __future__ import annotations

from virl_jax.data.sources import jsonl
from virl_jax.eval.benchmarks import rows as rows_lib

RULE = "the rule that each record names under match, `exact` if it names none; the mean over records with answers"


def load(path: str, how: rows_lib.How = rows_lib.How()) -> rows_lib.Loaded:
  """Reads a records file, whose pictures are where it says.

  Args:
    path: of the file.
    how: ignored; options stay in the file's order.

  Returns:
    Tasks named by id, or by line.

  Raises:
    ValueError: the file cannot be read, or holds no record that can be used.
  """
  del how
  source = jsonl.load(path, "all", 0.5, 0)  # all of it: the two others draw a split
  return rows_lib.Loaded(source.tasks, tuple(rows_lib.Reject(line, "", why) for line, why in source.rejects))


def score(loaded: rows_lib.Loaded, predictions: rows_lib.Predictions) -> dict:
  """The mean score of all records with answers, and of each kind."""
  rows = rows_lib.scored(loaded, predictions)
  figures = {"acc_ans": rows_lib.mean(rows), "kinds": {
      kind: rows_lib.mean(found) for kind, found in rows_lib.split(rows, "kind").items()}}
  return rows_lib.result("records", RULE, "acc_ans", loaded, rows, figures)
