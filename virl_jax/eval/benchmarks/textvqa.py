"""TextVQA: reading in photographs, each question answered by ten people (Singh et al. 2019).

Layouts:

    0.5.1    TextVQA_0.5.1_val.json: an object with the rows under data: question_id, image_id, question, answers
    v0.1     the first release: image "train/ID.jpg", 6 to 22 answers, no ids
    lines    the same rows as JSON lines

Pictures are train_images/ID.jpg or ID.jpg.  Many other files have the image's id under question_id.
"""

from __future__ import annotations

import os

from virl_jax import types
from virl_jax.data import tables
from virl_jax.eval.benchmarks import rows as rows_lib

RULE = "VQA accuracy: min(1, n/3) of the others' answers, the mean over the people left out in turn"


def load(path: str, how: rows_lib.How = rows_lib.How()) -> rows_lib.Loaded:
  """Reads any of the layouts.

  Args:
    path: of the file.
    how: see `rows.How`.

  Returns:
    Tasks named by question id; those of v0.1 by image id and row number ("666bf94242a15dda#1").  Those of a split whose
    answers are not published have none.

  Raises:
    ValueError: the file cannot be read.
  """
  reader = rows_lib.Reader(how, os.path.dirname(path))
  for number, row in enumerate(tables.json_rows(path), 1):
    name = str(row.get("question_id", row.get("image", ""))) if isinstance(row, dict) else ""
    reader.add(number, name, lambda row=row, number=number: _task(reader, row, number))
  return reader.loaded()


def score(loaded: rows_lib.Loaded, predictions: rows_lib.Predictions) -> dict:
  """The mean VQA accuracy.

  Source: the TextVQA challenge; see `data.official.vqa`.
  """
  rows = rows_lib.scored(loaded, predictions)
  return rows_lib.result("textvqa", RULE, "accuracy", loaded, rows, {"accuracy": rows_lib.mean(rows)})


def _task(reader, row, number):
  if isinstance(row, dict) and "image_id" not in row and "image" in row:
    name = tables.text(row, "image")
    image_id = os.path.splitext(os.path.basename(name))[0]
    names, uid = (name, os.path.basename(name)), f"{image_id}#{number}"
  else:
    image_id = tables.text(row, "image_id")
    names = f"train_images/{image_id}.jpg", f"{image_id}.jpg", f"test_images/{image_id}.jpg"
    uid = tables.text(row, "question_id")
  answers = tables.texts(row, "answers") if "answers" in row else ()
  return types.Task(uid, reader.file(*names), tables.text(row, "question"), answers, kind="textvqa", match="vqa")
