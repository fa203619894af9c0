"""TreeBench: questions with boxes of the evidence (Wang et al. 2025).

Layout: a TSV of image (base64), question, "multi-choice options" (a text of lettered lines), answer, category,
target_instances (the text of a list of boxes [x1, y1, x2, y2], pixels).  It may have an index; else rows are numbered.
"""

from __future__ import annotations

import json
import os
import re

from virl_jax import types
from virl_jax.data import tables
from virl_jax.eval.benchmarks import choices
from virl_jax.eval.benchmarks import rows as rows_lib

RULE = ("the option that an answer begins with the letter of, or whose text it is; mIoU: the mean over a question's "
        "boxes of the best IoU with a box of the prediction, the mean over questions")

# The form of boxes in a policy's text that the publishers read: whole numbers, no spaces.
_BOX = re.compile(r"<box>\[(\d+),(\d+),(\d+),(\d+)\]</box>")
_COLUMNS = ("image", "question", "multi-choice options", "answer", "category", "target_instances")


def load(path: str, how: rows_lib.How = rows_lib.How()) -> rows_lib.Loaded:
  """Reads the table.

  Args:
    path: of the TSV.
    how: see `rows.How`.

  Raises:
    ValueError: it cannot be read, or lacks a column.
  """
  reader = rows_lib.Reader(how, os.path.dirname(path))
  for number, row in enumerate(tables.tsv(path, _COLUMNS), 1):
    index = row.get("index") or str(number - 1)
    reader.add(number, index, lambda row=row, index=index: _task(reader, tables.columns(row), index))
  return reader.loaded()


def score(loaded: rows_lib.Loaded, predictions: rows_lib.Predictions) -> dict:
  """Accuracy of all questions and of each category, and mIoU over questions with boxes.

  Returns:
    As `rows.result`; figures: accuracy, mIoU, categories.  A prediction's boxes are those that come with it, or else
    those that its text has as <box>[x1,y1,x2,y2]</box>.
  """
  rows = rows_lib.scored(loaded, predictions)
  by_uid = {task.uid: task for task in loaded.tasks}
  for row in rows:
    truth, prediction = by_uid[row["uid"]].boxes, predictions[row["uid"]][row["sample"]]
    row["mIoU"] = mean_iou(prediction.boxes or written(prediction.text), truth) if truth else None
  return rows_lib.result("treebench", RULE, "accuracy", loaded, rows, figures(rows))


def figures(rows: list[dict]) -> dict:
  """The figures of scored rows; see `score`."""
  boxed = [row for row in rows if row["mIoU"] is not None]
  return {"accuracy": rows_lib.mean(rows), "mIoU": rows_lib.mean(boxed, "mIoU"),
          "categories": {kind: rows_lib.mean(found) for kind, found in rows_lib.split(rows, "kind").items()}}


def written(text: str) -> tuple[types.Box, ...]:
  """The boxes that a text has in the publishers' form."""
  return tuple(types.Box(*map(float, found)) for found in _BOX.findall(text))


def mean_iou(boxes: tuple[types.Box, ...], truth: tuple[types.Box, ...]) -> float:
  """The mean over a question's boxes of the best IoU with a box of the prediction, in [0, 1]; 0 if it has none.

  Args:
    boxes: of the prediction.
    truth: of the question, at least one.

  Source: Wang et al. 2025.  It is a recall: boxes that hit nothing cost nothing.
  """
  return sum(max((_iou(box, true) for box in boxes), default=0.0) for true in truth) / len(truth)


def _iou(a, b):
  width, height = min(a.x2, b.x2) - max(a.x1, b.x1), min(a.y2, b.y2) - max(a.y1, b.y1)
  common = max(width, 0.0) * max(height, 0.0)
  area = lambda box: max(box.x2 - box.x1, 0.0) * max(box.y2 - box.y1, 0.0)
  return common / (area(a) + area(b) - common) if common else 0.0


def _task(reader, row, index):
  options = choices.block(tables.text(row, "multi-choice options"))
  image = reader.inside(row["image"], index)
  try:
    boxes = json.loads(row["target_instances"] or "[]")
  except (ValueError, RecursionError):
    raise tables.Unusable("target_instances is not a list of boxes") from None
  if not isinstance(boxes, list):
    raise tables.Unusable("target_instances is not a list of boxes")
  return types.Task(index, image, tables.text(row, "question"),
                    (rows_lib.by_letter(tables.text(row, "answer"), options),), reader.boxes(boxes, image), options,
                    tables.text(row, "category"), "options")
