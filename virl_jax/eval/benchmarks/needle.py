"""The test split of the needle pictures, which is drawn, not read: for policies that were trained on them."""

from __future__ import annotations

import dataclasses

from virl_jax.eval.benchmarks import rows as rows_lib
from virl_jax.tiny import needle

RULE = "the answer is the reference as a whole, by `exact`"


def load(path: str, how: rows_lib.How = rows_lib.How()) -> rows_lib.Loaded:
  """Draws the test split of `needle.Config()`.

  Args:
    path: ignored.
    how: see `rows.How`; only `store` is used.
  """
  del path
  cfg = needle.Config()
  tasks = (needle.draw(cfg.seed, "test", i, cfg)[0] for i in range(cfg.test_size))
  return rows_lib.Loaded(tuple(dataclasses.replace(t, image=rows_lib.keep(t.image, how.store)) for t in tasks))


def score(loaded: rows_lib.Loaded, predictions: rows_lib.Predictions) -> dict:
  """The share of right answers, and of each family of questions."""
  rows = rows_lib.scored(loaded, predictions)
  figures = {"acc_ans": rows_lib.mean(rows), "kinds": {
      kind: rows_lib.mean(found) for kind, found in rows_lib.split(rows, "kind").items()}}
  return rows_lib.result("needle", RULE, "acc_ans", loaded, rows, figures)
