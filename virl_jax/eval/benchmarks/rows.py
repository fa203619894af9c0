"""What all benchmarks have in common: rows that can be used and rows that cannot, and the rows of a result.

A benchmark is a module with

    load(path, how) -> Loaded                its tasks, from any of its layouts
    score(loaded, predictions) -> dict       its figures for predictions, by its official rule
    figures(rows) -> dict                    only if its own figures are more than a mean of scores: nested figures of
                                             `eval.figures` for scored rows, by which two evaluations are compared
    says(task, text) -> str                  only if its rule reads answers in its own way: see `says` here

A row that cannot be used is counted and named; the others are evaluated, and the share of rows that were evaluated is
given beside the score.  So is the number of missing predictions, which do not count as wrong.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import hashlib
import os

import numpy as np

from virl_jax import types
from virl_jax.data import answers
from virl_jax.data import choice
from virl_jax.data import exact
from virl_jax.data import images
from virl_jax.data import tables
from virl_jax.eval import figures as figures_lib

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True)
class How:
  """How benchmarks are read.

  Attributes:
    images: folder of the pictures; None if they are beside the file.
    need_images: whether a row without a readable picture is rejected; False to score predictions without pictures.
    seed: draws the order of options if the files have the right one in a fixed place; None leaves them in order.
    store: folder where pictures from tables are written, once each; None keeps them in memory.
  """

  images: str | None = None
  need_images: bool = True
  seed: int | None = 0
  store: str | None = None


@dataclasses.dataclass(frozen=True)
class Reject:
  """A row that cannot be used: its number, from 1, its name, or "", and why."""

  row: int
  name: str
  cause: str


@dataclasses.dataclass(frozen=True)
class Loaded:
  """What a benchmark asks.

  Attributes:
    tasks: their `kind` is the benchmark's category; they have no answers if the split's are not published.
    rejects: rows that cannot be used.
    group: uid -> the part of the benchmark that the task is in, if the score is an average over parts: a cycle of
      options, a split.
    clipped: how many boxes reached over the edge and were clipped.
  """

  tasks: tuple[types.Task, ...]
  rejects: tuple[Reject, ...] = ()
  group: Mapping[str, str] = dataclasses.field(default_factory=dict)
  clipped: int = 0

  @property
  def n_rows(self) -> int:
    return len(self.tasks) + len(self.rejects)

  def describe(self) -> str:
    """What was found, and what is wrong with the rest, with three examples of each cause."""
    lines = [f"{len(self.tasks)} of {self.n_rows} rows can be used"]
    for cause in sorted({r.cause for r in self.rejects}):
      found = [r for r in self.rejects if r.cause == cause]
      named = ", ".join(f"row {r.row}" + (f" ({r.name})" if r.name else "") for r in found[:3])
      lines.append(f"{len(found)} cannot: {cause}: {named}" + (", ..." if len(found) > 3 else ""))
    return "; ".join(lines)


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a policy answered.

  Attributes:
    text: the answer, or the raw text that has it; "" for none.
    boxes: where it looked, pixels of the original image.
    verdict: a judge model's score for it, in [0, 1], which counts in place of the task's rule; or None.
  """

  text: str
  boxes: tuple[types.Box, ...] = ()
  verdict: float | None = None


Predictions = Mapping[str, Sequence[Prediction]]  # by uid; several where a task was sampled several times


class Reader:
  """Collects the tasks of a file, and the rows that cannot be used.

  Use: `reader.add(row_number, name, make)` for each row, where `make` returns a task, or raises `tables.Unusable`.
  """

  def __init__(self, how: How, folder: str):
    """Args:
      how: see `How`.
      folder: that paths of pictures are relative to.
    """
    self.how, self.folder = how, folder
    self.tasks: list[types.Task] = []
    self.rejects: list[Reject] = []
    self.group: dict[str, str] = {}
    self.clipped = 0
    self._pictures: dict[str, bytes | str] = {}
    self._sizes: dict[bytes | str, tuple[int, int]] = {}
    self._uids: set[str] = set()

  def add(self, number: int, name: str, make: Callable[[], types.Task], group: str | None = None) -> None:
    """Turns a row into a task, or a reject.

    Args:
      number: of the row, from 1.
      name: of the row, for the reject.
      make: gives the task, or raises `tables.Unusable`.
      group: see `Loaded`; None for none.
    """
    try:
      task = make()
      if task.uid in self._uids:
        raise tables.Unusable("an id that an earlier row has")
      if task.answers and not answers.attainable(task.match, task.answers, task.options):
        raise tables.Unusable("no answer among the options" if task.options else "no answer that its rule can match")
    except tables.Unusable as why:
      self.rejects.append(Reject(number, name, str(why)))
      return
    self._uids.add(task.uid)
    self.tasks.append(task)
    if group is not None:
      self.group[task.uid] = group

  def loaded(self) -> Loaded:
    return Loaded(tuple(self.tasks), tuple(self.rejects), dict(self.group), self.clipped)

  def file(self, *names: str) -> str:
    """The path of a picture: the first of some names that is a file.

    Args:
      *names: relative to the folder of the pictures.

    Raises:
      Unusable: there is none, or it is no picture, and pictures are needed.
    """
    folders = [self.how.images] if self.how.images else [self.folder]
    paths = [os.path.join(folder, name.lstrip("/")) for folder in folders for name in names]
    path = next((p for p in paths if os.path.isfile(p)), None)
    if path is None:
      if self.how.need_images:
        raise tables.Unusable("no image file")
      return paths[0]
    if self.how.need_images:
      self._size(path)
    return path

  def inside(self, field: str, index: str) -> bytes | str:
    """The picture in a table's column; see `tables.picture`."""
    if not self.how.need_images:
      return ""
    picture = tables.picture(field, self._pictures, index, self._keep)
    self._size(picture)
    return picture

  def boxes(self, found: Iterable[Sequence[float]], image: bytes | str) -> tuple[types.Box, ...]:
    """Boxes [x1, y1, x2, y2], in pixels, clipped to their picture if pictures are needed.

    Raises:
      Unusable: one is not four numbers, has no area, or is outside the picture.
    """
    size = self._size(image) if self.how.need_images else None
    made = []
    for box in found:
      if not isinstance(box, Sequence) or len(box) != 4 or not all(_finite(v) for v in box):
        raise tables.Unusable("a box is not four numbers")
      x1, y1, x2, y2 = map(float, box)
      if size is not None:
        x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(size[0])), min(y2, float(size[1]))
      if x1 >= x2 or y1 >= y2:
        raise tables.Unusable("a box without area in the picture")
      self.clipped += (x1, y1, x2, y2) != tuple(map(float, box))
      made.append(types.Box(x1, y1, x2, y2))
    return tuple(made)

  def _size(self, image: bytes | str) -> tuple[int, int]:
    if image not in self._sizes:
      try:
        self._sizes[image] = images.upright_size(image)
      except ValueError:
        raise tables.Unusable("no readable image") from None
    return self._sizes[image]

  def _keep(self, data: bytes) -> bytes | str:
    return keep(data, self.how.store)


def keep(data: bytes, store: str | None) -> bytes | str:
  """Writes a picture into a folder, once, and returns its path; returns the picture itself if there is no folder."""
  if store is None:
    return data
  path = os.path.join(store, hashlib.blake2b(data, digest_size=16).hexdigest())
  if not os.path.isfile(path) or os.path.getsize(path) != len(data):
    os.makedirs(store, exist_ok=True)
    part = f"{path}.{os.getpid()}.part"  # several processes may write it
    with open(part, "wb") as file:
      file.write(data)
    os.replace(part, path)
  return path


def options_of(row: dict[str, str], letters: str = LETTERS[:8]) -> tuple[str, ...]:
  """The options in a table's columns A, B, C ..., up to the first that is empty.

  Raises:
    Unusable: there are fewer than two, or one is missing between others.
  """
  found = [tables.utf8((row.get(letter) or "").strip(), letter) for letter in letters]
  n = next((i for i, text in enumerate(found) if not text), len(found))
  if n < 2 or any(found[n:]):
    raise tables.Unusable("options are missing")
  return tuple(found[:n])


def by_letter(letter: str, options: tuple[str, ...]) -> str:
  """The text of the option with that letter.

  Raises:
    Unusable: there is no such option.
  """
  index = LETTERS.find(letter.strip().strip("().").upper()) if letter.strip() else -1
  if not 0 <= index < len(options) or len(letter.strip().strip("().")) != 1:
    raise tables.Unusable("the answer is the letter of no option")
  return options[index]


def shuffled(uid: str, options: tuple[str, ...], seed: int | None) -> tuple[str, ...]:
  """Options in an order that depends only on the seed and the task's uid; as they are if the seed is None."""
  if seed is None:
    return options
  word = int.from_bytes(hashlib.blake2b(f"{seed}\0{uid}".encode(), digest_size=8).digest())
  return tuple(options[i] for i in np.random.default_rng(word).permutation(len(options)))


def scored(loaded: Loaded, predictions: Predictions,
           rule: Callable[[types.Task, Prediction], float] | None = None) -> list[dict]:
  """Each prediction with its score; tasks without answers, or without a prediction, are left out.

  Args:
    loaded: the tasks.
    predictions: by uid.
    rule: gives the score of a prediction for a task, in [0, 1]; None: its verdict or, without one, the score by the
      task's own rule.

  Returns:
    A dict for each prediction, tasks in order: uid, kind, group, sample, prediction, answers, score.
  """
  found = []
  for task in loaded.tasks:
    if not task.answers:
      continue
    for sample, prediction in enumerate(predictions.get(task.uid, ())):
      if rule is not None:
        score = rule(task, prediction)
      elif prediction.verdict is not None:
        score = prediction.verdict
      else:
        score = answers.rule(task.match)(prediction.text, task.answers, task.options)
      found.append({"uid": task.uid, "kind": task.kind, "group": loaded.group.get(task.uid, ""), "sample": sample,
                    "prediction": prediction.text, "answers": list(task.answers), "score": float(score)})
  return found


def says(task: types.Task, text: str) -> str:
  """What an answer says, the same for answers that mean the same: an option's letter, or else its normal form."""
  if task.options:
    picked = choice.letter(text, task.options)
    same = [i for i, option in enumerate(task.options) if exact.same(text, option)]
    if picked is not None or same:
      return LETTERS[same[0] if picked is None else picked]
  return exact.normalize(text)


def vote(said: Sequence[str]) -> int:
  """The index of the first sample that says what most say; in a tie, what was said first wins."""
  return said.index(collections.Counter(said).most_common(1)[0][0])  # in the order in which they came


def majority(loaded: Loaded, predictions: Predictions, says: Callable[[types.Task, str], str] = says) -> Predictions:
  """For each task, the first of its samples that says what most say.

  Args:
    loaded: the tasks.
    predictions: by uid.
    says: gives what an answer says.

  Returns:
    One prediction for each task that has any, by uid.
  """
  tasks = {task.uid: task for task in loaded.tasks}
  return {uid: samples and [samples[vote([says(tasks[uid], p.text) for p in samples])]]
          for uid, samples in predictions.items() if uid in tasks}


def result(name: str, rule: str, metric: str, loaded: Loaded, rows: list[dict], figures: dict,
           drawn_with: Callable[[str], str] = lambda uid: uid) -> dict:
  """What `score` returns.

  Args:
    name: of the benchmark.
    rule: that it was scored by, in a line.
    metric: the name of the figure to quote.
    loaded: the tasks.
    rows: what `scored` gave.
    figures: nested: figures of `eval.figures`, shares in [0, 1], and counts.
    drawn_with: gives the name of a task's cluster for intervals, from its uid; see `eval.figures`.

  Returns:
    {"benchmark", "rule", "metric", "score", "n", "evaluated", "figures", "intervals", "by_kind", "rows"}, ready for
    JSON; an interval is [low, high], nested like its figure; by_kind has for each category n, its number of tasks, and
    value, low and high of its mean score.  If tasks share clusters, each row has the number of its cluster under
    drawn_with.
  """
  done = {row["uid"] for row in rows}
  kinds = split(rows, "kind")
  of_kind = {kind: mean(found) for kind, found in kinds.items()}
  intervals = figures_lib.intervals({"figures": figures, "kinds": of_kind}, drawn_with)  # from the same resamples
  ends, intervals = intervals["kinds"], intervals["figures"]
  by_kind = {kind: {"n": len({row["uid"] for row in found}), "value": of_kind[kind].value, "low": ends[kind][0],
                    "high": ends[kind][1]} for kind, found in kinds.items()}
  figures = figures_lib.values(figures)
  together = {uid: drawn_with(uid) for uid in dict.fromkeys(row["uid"] for row in rows)}
  if any(uid != name for uid, name in together.items()):
    number = {name: i for i, name in enumerate(dict.fromkeys(together.values()))}
    rows = [row | {"drawn_with": number[together[row["uid"]]]} for row in rows]
  return {
      "benchmark": name, "rule": rule, "metric": metric, "score": figures[metric], "n": len(done),
      "evaluated": {"rows": loaded.n_rows, "rejected": len(loaded.rejects),
                    "without_answers": sum(not t.answers for t in loaded.tasks),
                    "without_prediction": sum(bool(t.answers) and t.uid not in done for t in loaded.tasks),
                    "share": len(done) / loaded.n_rows if loaded.n_rows else 0.0},
      "figures": figures, "intervals": intervals, "by_kind": by_kind, "rows": rows}


def table(result: dict) -> str:
  """The figures of a result for a terminal, in percent where they are shares, and what was evaluated."""
  lines = [f"{result['benchmark']}: {result['rule']}"] if result["rule"] else [result["benchmark"]]
  flat, ends = figures_lib.flat(result["figures"]), figures_lib.flat(result["intervals"])
  width = max(map(len, flat))
  lines += [f"  {name.ljust(width)}  {_shown(value)}{_between(ends.get(name))}" for name, value in flat.items()]
  done = result["evaluated"]
  left_out = [f"{done[key]} {key.replace('_', ' ')}" for key in ("rejected", "without_answers", "without_prediction")
              if done[key]]
  if most := result.get("samples", {}).get("most"):
    voted = result["majority"]
    lines.append(f"  Avg@{most}: all of this is over {most} samples of a task; of what most of them say, "
                 f"{result['metric']} is {_shown(voted['score']).strip()}"
                 f"{_between(voted['intervals'].get(result['metric']))}")
  lines.append(f"  {result['n']} of {done['rows']} rows evaluated ({100 * done['share']:.2f} %)"
               + (f": {', '.join(left_out)}" if left_out else ""))
  return "\n".join(lines)


def mean(rows: Sequence[dict], key: str = "score") -> figures_lib.Ratio:
  """The mean of a number over predictions."""
  return figures_lib.ratio(rows, lambda row: row[key])


def means(parts: Iterable[figures_lib.Ratio | figures_lib.Mean]) -> figures_lib.Mean:
  """The mean of means."""
  return figures_lib.Mean(tuple(parts))


def split(rows: Sequence[dict], key: str) -> dict[str, list[dict]]:
  """Rows grouped by their value of a key, values in sorted order."""
  found: dict[str, list[dict]] = {}
  for row in rows:
    found.setdefault(row[key], []).append(row)
  return dict(sorted(found.items()))


def _shown(value) -> str:
  return "-" if value is None else f"{100 * value:8.4f} %" if isinstance(value, float) else f"{value!s:>8}"


def _between(ends: Sequence[float] | None) -> str:
  return "" if ends is None else f"  [{100 * ends[0]:.2f}, {100 * ends[1]:.2f}]"


def _finite(value) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))
