"""InfographicsVQA: questions about infographics (Mathew et al. 2022).

Layout: infographicsVQA_val_v1.0.json, an object with the rows under data: questionId, question, image_local_name
("37313.jpeg", beside the file), answers.
"""

from __future__ import annotations

from virl_jax.data import tables
from virl_jax.eval.benchmarks import docvqa
from virl_jax.eval.benchmarks import rows as rows_lib


def load(path: str, how: rows_lib.How = rows_lib.How()) -> rows_lib.Loaded:
  """Reads a split; see `docvqa.load`."""
  def pictures(row):
    name = tables.text(row, "image_local_name")
    return name, f"infographicsvqa_images/{name}", f"images/{name}"

  return docvqa.of_file(path, how, "infographicsvqa", pictures)


def score(loaded: rows_lib.Loaded, predictions: rows_lib.Predictions) -> dict:
  """The mean ANLS, by the rule of `docvqa`."""
  return docvqa.anls("infographicsvqa", loaded, predictions)
