"""V*Bench: 115 questions about attributes and 76 about relations, on large photographs (Wu and Xie 2023).

Layouts:

    folders     direct_attributes/X.jpg + X.json, relative_position/...: target_object, bbox (x, y, width, height),
                question, options with the right one first
    JSON        the same in one array, with input_image and test_type (ZoomEye's annotation_vstar.json)
    JSON lines  test_questions.jsonl: image, text with lettered options, category, label; no boxes
    TSV         VStarBench.tsv: index, image, question, A to D, answer, category; no boxes

The first two have the right option first, so that it is always A unless options are shuffled; results without shuffling
contain the policy's bias for or against A.  The last two have other, shorter options in another order: a letter of one
layout means nothing in another.
"""

from __future__ import annotations

import json
import os

from virl_jax import types
from virl_jax.data import tables
from virl_jax.eval.benchmarks import choices
from virl_jax.eval.benchmarks import rows as rows_lib

CATEGORIES = ("direct_attributes", "relative_position")
RULE = "the option that an answer begins with the letter of, or whose text it is; accuracy over all questions"

_PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def load(path: str, how: rows_lib.How = rows_lib.How()) -> rows_lib.Loaded:
  """Reads any of the layouts: a folder, or a file.

  Args:
    path: the folder with the two folders in it, or annotation_vstar.json, test_questions.jsonl, VStarBench.tsv.
    how: see `rows.How`; its seed is for the first two layouts.

  Returns:
    Tasks named by folder and file ("direct_attributes/sa_7429"), those of the TSV by index.

  Raises:
    ValueError: there is no such folder or file, or a file cannot be read or lacks a column.
  """
  if os.path.isdir(path):
    return _folders(path, how)
  reader = rows_lib.Reader(how, os.path.dirname(path))
  if path.endswith(".tsv"):
    for number, row in enumerate(tables.tsv(path, ("index", "image", "question", "A", "B", "answer", "category")), 1):
      reader.add(number, row["index"] or "", lambda row=row: _of_table(reader, tables.columns(row)))
    return reader.loaded()
  for number, row in enumerate(tables.json_rows(path), 1):
    name = row.get("input_image") or row.get("image") or "" if isinstance(row, dict) else ""
    make = _of_line if isinstance(row, dict) and "label" in row else _of_record
    reader.add(number, str(name), lambda row=row, make=make: make(reader, row))
  return reader.loaded()


def score(loaded: rows_lib.Loaded, predictions: rows_lib.Predictions) -> dict:
  """Accuracy of all questions, and of each category.

  Source: Wu and Xie 2023; "overall" is over questions, not over categories.
  """
  rows = rows_lib.scored(loaded, predictions)
  figures = {"overall": rows_lib.mean(rows)} | {
      kind: rows_lib.mean(found) for kind, found in rows_lib.split(rows, "kind").items()}
  return rows_lib.result("vstar", RULE, "overall", loaded, rows, figures)


def _folders(path, how):
  reader = rows_lib.Reader(how, path)
  folders = [name for name in CATEGORIES if os.path.isdir(os.path.join(path, name))]
  if not folders:
    raise ValueError(f"{path} must be a folder with {' and '.join(CATEGORIES)} in it. Received: "
                     f"{', '.join(sorted(os.listdir(path))[:8]) or 'nothing'}")
  number = 0
  for folder in folders:
    names = os.listdir(os.path.join(path, folder))
    for stem in sorted({os.path.splitext(n)[0] for n in names if n.endswith((".json", *_PICTURES))}):
      number += 1
      reader.add(number, f"{folder}/{stem}", lambda folder=folder, stem=stem: _of_record(
          reader, _annotation(os.path.join(path, folder, f"{stem}.json")) | {
              "input_image": f"{folder}/{stem}.jpg", "test_type": folder}))
  return reader.loaded()


def _annotation(path):
  try:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
      found = json.load(file)
  except FileNotFoundError:
    raise tables.Unusable("no annotation beside the image") from None
  except (OSError, ValueError, RecursionError):
    raise tables.Unusable("not JSON") from None
  if not isinstance(found, dict):
    raise tables.Unusable("not an object")
  return found


def _of_record(reader, row):
  name = tables.text(row, "input_image")
  uid = os.path.splitext(name)[0]
  options = tables.texts(row, "options")
  if len(options) < 2:
    raise tables.Unusable("options are missing")
  image = reader.file(name, *(uid + end for end in _PICTURES))
  return types.Task(
      uid, image, tables.text(row, "question"), (options[0],), reader.boxes(map(_corners, _list(row, "bbox")), image),
      rows_lib.shuffled(uid, options, reader.how.seed), tables.text(row, "test_type"), "options")


def _of_line(reader, row):
  name = tables.text(row, "image")
  question, options = choices.asked(tables.text(row, "text"))
  return types.Task(os.path.splitext(name)[0], reader.file(name), question,
                    (rows_lib.by_letter(tables.text(row, "label"), options),), (), options,
                    tables.text(row, "category"), "options")


def _of_table(reader, row):
  options = rows_lib.options_of(row)
  return types.Task(tables.text(row, "index"), reader.inside(row["image"], row["index"]),
                    tables.text(row, "question"), (rows_lib.by_letter(tables.text(row, "answer"), options),), (),
                    options, tables.text(row, "category"), "options")


def _list(row, name):
  value = tables.get(row, name)
  if not isinstance(value, list):
    raise tables.Unusable(f"{name} is not a list")
  return value


def _corners(box):
  """x1, y1, x2, y2 from x, y, width, height."""
  if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
    raise tables.Unusable("a box is not four numbers")
  x, y, width, height = box
  return x, y, x + width, y + height
