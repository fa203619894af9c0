"""POPE: is there such an object in the image?  (Li et al. 2023)

Layouts:

    coco         output/coco/coco_pope_{random,popular,adversarial}.json: JSON lines, in spite of the name
    seem         output/seem/{gqa,aokvqa}/..._pope_seem_{...}.json: JSON arrays
    POPEv2       annotations.json: image_id, image_name, target_object, query, label "Yes" or "No"; two rows for each
                 image, one of them with an edited image
    labels       only question_id and label, as some publish beside their predictions; for scoring, not for asking

The older release, with 2,910 rows in its random split, is read like the newer one.
"""

from __future__ import annotations

import os
import re

from virl_jax import types
from virl_jax.data import tables
from virl_jax.eval import figures as figures_lib
from virl_jax.eval.benchmarks import rows as rows_lib

SPLITS = ("random", "popular", "adversarial")
RULE = ("of the first sentence, without commas and cut at blanks: 'No', 'not' or 'no' among the words is a no, and all "
        "else is a yes; F1 of yes, the mean over splits")

_FILE = re.compile(r"(?:(?P<of>[a-z0-9]+)_)?pope_(?:seem_)?(?P<split>random|popular|adversarial)(?:\.labels)?\.jsonl?",
                   re.IGNORECASE)


def load(path: str, how: rows_lib.How = rows_lib.How()) -> rows_lib.Loaded:
  """Reads one file, or all of a folder and the folders in it.

  Args:
    path: a file or a folder.
    how: see `rows.How`.

  Returns:
    Tasks named by split and question id ("coco/random/1"), for POPEv2 by image name; grouped by split.

  Raises:
    ValueError: there is no file of POPE, or one cannot be read.
  """
  files = [path] if os.path.isfile(path) else sorted(
      os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
      if _FILE.fullmatch(name) or name == "annotations.json")
  if not files:
    raise ValueError(f"{path} must be a file of POPE's, or a folder with some, such as coco_pope_random.json")
  reader = rows_lib.Reader(how, os.path.dirname(files[0]))
  number = 0
  for file in files:
    reader.folder = os.path.dirname(file)
    named = _FILE.fullmatch(os.path.basename(file))
    group = f"{named['of'] or 'coco'}/{named['split']}".lower() if named else "POPEv2"
    for row in tables.json_rows(file):
      number += 1
      name = f"{os.path.basename(file)} {row.get('question_id', row.get('image_name', ''))}" if isinstance(
          row, dict) else os.path.basename(file)
      reader.add(number, name, lambda row=row, group=group: _task(reader, row, group), group)
  return reader.loaded()


def says_yes(text: str) -> bool:
  """The official reading of an answer.  Only three words are a no, so that "Not sure" is a yes, and so is "NO".

  Source: Li et al. 2023, the published evaluation's rule.
  """
  words = text.split(".")[0].replace(",", "").split(" ")
  return not {"No", "not", "no"} & set(words)


def says(task: types.Task, text: str) -> str:
  """What an answer says, "yes" or "no", for a vote among samples."""
  del task
  return "yes" if says_yes(text) else "no"


def score(loaded: rows_lib.Loaded, predictions: rows_lib.Predictions) -> dict:
  """Accuracy, precision, recall, F1 and share of yes for each split, and their means.

  Returns:
    As `rows.result`; figures: accuracy, precision, recall, F1, yes_ratio (means over splits), splits (with n, TP, FP,
    TN, FN).  Yes is positive.  All questions about an image, in all splits, are one cluster for intervals.
  """
  yes = lambda task: task.answers[0] == "yes"
  rows = rows_lib.scored(loaded, predictions, lambda task, p: says_yes(p.text) == yes(task))
  images = {task.uid: task.image or task.uid for task in loaded.tasks}
  return rows_lib.result("pope", RULE, "F1", loaded, rows, figures(rows), images.get)


def figures(rows: list[dict]) -> dict:
  """The figures of scored rows: those of each split, and their means over splits."""
  splits = {group: _figures(found) for group, found in rows_lib.split(rows, "group").items()}
  means = {name: rows_lib.means(s[name] for s in splits.values())
           for name in ("F1", "accuracy", "precision", "recall", "yes_ratio")}
  return means | {"splits": splits}


def _figures(rows: list[dict]) -> dict:
  """Counts and figures of a split."""
  says = lambda row: says_yes(row["prediction"])
  is_ = lambda row: row["answers"][0] == "yes"
  hit = lambda row: float(says(row) and is_(row))
  count = lambda said, true: sum((says(row), is_(row)) == (said, true) for row in rows)
  return {"n": len(rows), "TP": count(True, True), "FP": count(True, False), "TN": count(False, False),
          "FN": count(False, True), "accuracy": rows_lib.mean(rows), "precision": figures_lib.ratio(rows, hit, says),
          "recall": figures_lib.ratio(rows, hit, is_),
          "F1": figures_lib.ratio(rows, lambda row: 2 * hit(row), lambda row: float(says(row)) + is_(row)),
          "yes_ratio": figures_lib.ratio(rows, says)}


def _task(reader, row, group):
  label = tables.text(row, "label").strip().lower()
  if label not in ("yes", "no"):
    raise tables.Unusable("label is neither yes nor no")
  if "image_name" in row:
    name = tables.text(row, "image_name")
    return types.Task(name, reader.file(name, os.path.basename(name)), tables.text(row, "query"), (label,),
                      kind=group, match="yes_no")
  uid = f"{group}/{tables.text(row, 'question_id')}"
  if not reader.how.need_images and "image" not in row and "text" not in row:
    return types.Task(uid, "", "", (label,), kind=group, match="yes_no")
  name = tables.text(row, "image")
  return types.Task(uid, reader.file(name, f"val2014/{name}", f"images/{name}"), tables.text(row, "text"), (label,),
                    kind=group, match="yes_no")
