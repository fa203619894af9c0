"""Two evaluations of the same tasks: the difference, an exact test, and the tasks that flipped.

A folder is one that `evaluate` has written for a benchmark: results.json, rows.jsonl (the score of each prediction) and
shown.jsonl (tasks and raw answers, for pages).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import json

from etils import epath

from virl_jax.eval import figures as figures_lib
from virl_jax.eval import outcome
from virl_jax.run import files

_RIGHT = 0.5  # the least score of a right answer, as in `data.answers`
_TOLD = ("model", "step", "zoom", "options_seed", "limit", "judge", "rule", "layout")
CHANGES = {(False, True): "gained", (True, False): "lost", (True, True): "right in both",
           (False, False): "wrong in both"}


@dataclasses.dataclass(frozen=True)
class Side:
  """An evaluation, as read from its folder.

  Attributes:
    name: what to call it.
    result: what results.json holds.
    rows: what rows.jsonl holds: each prediction with its score.
    shown: what shown.jsonl holds, entries of `report.benchmark`; [] if there is no such file.
    folder: where it is.
  """

  name: str
  result: dict
  rows: list[dict]
  shown: list[dict] = dataclasses.field(default_factory=list)
  folder: epath.Path | None = None

  @property
  def scores(self) -> dict[str, float]:
    """The mean score of each task's predictions."""
    found: dict[str, list[float]] = {}
    for row in self.rows:
      found.setdefault(row["uid"], []).append(float(row["score"]))
    return {uid: sum(scores) / len(scores) for uid, scores in found.items()}


def pairs(a: str, b: str) -> list[tuple[Side, Side]]:
  """The evaluations of two folders, benchmark by benchmark.

  Args:
    a: a benchmark's folder, or one with such folders in it.
    b: the other.

  Raises:
    ValueError: there is no evaluation, or the two folders have evaluations of different names.
  """
  found = [_folders(name) for name in (a, b)]
  if all(list(each) == [""] for each in found):
    return [(_side(found[0][""], a), _side(found[1][""], b))]
  lone = sorted(found[0].keys() ^ found[1].keys())
  if lone:
    raise ValueError(f"{a} and {b} must have evaluations of the same names. Received: only one has "
                     f"{', '.join(name or 'results.json itself' for name in lone)}")
  return [(_side(found[0][name], a), _side(found[1][name], b)) for name in found[0]]


def compare(a: Side, b: Side, bootstrap: int = 2000, own: Callable[[list[dict]], dict] | None = None) -> dict:
  """What B has more than A.

  Args:
    a, b: evaluations of the same tasks.
    bootstrap: resamples for intervals, over the benchmark's clusters.
    own: gives the benchmark's own figures of rows, nested figures of `eval.figures`; None if it has only the mean.

  Returns:
    Ready for JSON: benchmark; folders; names, the parts of these that differ; n; a, b and difference (B less A), each a
    mean of scores over tasks with its interval, the last one paired; gained and lost, counts of the tasks that flipped,
    and p, of the exact test of these; if some score is not 0 or 1, better, worse and p_scores, the same for any change
    of score; by_kind, the same by category; differ, settings that the two do not share; quoted, the benchmark's own
    figure for both; figures, for each of its own figures a, b and the paired difference (b less a) with value, low and
    high; flips, the tasks that flipped, with both answers.

  Raises:
    ValueError: they are not of the same benchmark, and of the same tasks by name and accepted answers.
  """
  benchmarks = [side.result.get("benchmark") for side in (a, b)]
  if benchmarks[0] != benchmarks[1]:
    raise ValueError(f"{a.name} and {b.name} must be of the same benchmark. Received: {benchmarks[0]} and "
                     f"{benchmarks[1]}")
  old, new = a.scores, b.scores
  for one, other, has in ((a, b, old.keys() - new.keys()), (b, a, new.keys() - old.keys())):
    if has:
      named = ", ".join(sorted(has)[:5]) + (", ..." if len(has) > 5 else "")
      raise ValueError(f"{a.name} and {b.name} must be of the same tasks. Received: {len(has)} of {one.name} that "
                       f"{other.name} has no prediction for: {named}")
  if not old:
    raise ValueError(f"{a.name} and {b.name} must have predictions that were scored. Received: none")
  answers = [{row["uid"]: row["answers"] for row in side.rows} for side in (a, b)]
  other = [uid for uid in old if answers[0][uid] != answers[1][uid]]
  if other:
    raise ValueError(f"{a.name} and {b.name} must be of the same tasks. Received: other accepted answers for "
                     f"{len(other)}, such as {other[0]}: {answers[0][other[0]]!r:.80} and {answers[1][other[0]]!r:.80}")
  kinds = {row["uid"]: row["kind"] for row in a.rows}
  said = [{row["uid"]: row["prediction"] for row in reversed(side.rows)} for side in (a, b)]
  drawn_with = {row["uid"]: row.get("drawn_with", row["uid"]) for row in a.rows}.get
  by_kind = {kind: _figures([uid for uid in old if kinds[uid] == kind], old, new, drawn_with, bootstrap)
             for kind in sorted(set(kinds.values()))}
  differ = {key: [side.result.get(key) for side in (a, b)] for key in _TOLD if a.result.get(key) != b.result.get(key)}
  return {"benchmark": benchmarks[0], "folders": [a.name, b.name], "names": _apart(a.name, b.name),
          **_figures(list(old), old, new, drawn_with, bootstrap), "by_kind": by_kind, "differ": differ,
          "figures": _own(own(a.rows), own(b.rows), drawn_with, bootstrap) if own else {},
          "quoted": {"metric": a.result.get("metric"), "values": [side.result.get("score") for side in (a, b)]},
          "flips": [{"uid": uid, "kind": kinds[uid], "change": change(old[uid], new[uid]), "answers": answers[0][uid],
                     "said": [each[uid] for each in said], "scores": [old[uid], new[uid]]}
                    for uid in old if (old[uid] >= _RIGHT) != (new[uid] >= _RIGHT)]}


def change(old: float, new: float) -> str:
  """How a task changed, in words."""
  return CHANGES[old >= _RIGHT, new >= _RIGHT]


def _apart(a: str, b: str) -> list[str]:
  """The parts of two paths that differ: "x" and "y" of runs/x/vstar and runs/y/vstar."""
  parts = [name.rstrip("/").split("/") for name in (a, b)]
  for end in (0, -1):
    while all(len(each) > 1 for each in parts) and parts[0][end] == parts[1][end]:
      for each in parts:
        del each[end]
  return ["/".join(each) for each in parts]


def _own(old: dict, new: dict, drawn_with: Callable, bootstrap: int) -> dict:
  """Both values of each figure that both have, and their difference, by the flat name of the figure."""
  both = [{name: it for name, it in figures_lib.flat(tree).items() if isinstance(it, figures_lib.Figure)}
          for tree in (old, new)]
  more = {name: figures_lib.Difference(both[1][name], both[0][name]) for name in both[0] if name in both[1]}
  ends = figures_lib.intervals(more, drawn_with, bootstrap)
  return {name: {"a": both[0][name].value, "b": both[1][name].value} | _with_ends(it, ends[name])
          for name, it in more.items()}


def _with_ends(it: figures_lib.Figure, ends: Sequence[float] | None) -> dict:
  low, high = ends or (None, None)
  return {"value": it.value, "low": low, "high": high}


def _figures(uids: Sequence[str], old: dict[str, float], new: dict[str, float], drawn_with: Callable, bootstrap: int
             ) -> dict:
  flips = [change(old[uid], new[uid]) for uid in uids]
  gained, lost = flips.count("gained"), flips.count("lost")
  rows = [{"uid": uid, "a": old[uid], "b": new[uid], "difference": new[uid] - old[uid]} for uid in uids]
  means = {key: figures_lib.ratio(rows, lambda row, key=key: row[key]) for key in ("a", "b", "difference")}
  ends = figures_lib.intervals(means, drawn_with, bootstrap)
  found = {"n": len(uids), **{key: {"n": len(uids)} | _with_ends(it, ends[key]) for key, it in means.items()},
           "gained": gained, "lost": lost, "p": outcome.sign_test(gained, lost)}
  if any(scores[uid] not in (0.0, 1.0) for uid in uids for scores in (old, new)):
    better, worse = (sum(sign * (new[uid] - old[uid]) > 0 for uid in uids) for sign in (1, -1))
    found |= {"better": better, "worse": worse, "p_scores": outcome.sign_test(better, worse)}
  return found


def _folders(name: str) -> dict[str, epath.Path]:
  """Folders with results, by their name in the given folder; "" for the folder itself."""
  folder = files.path(name)
  if not files.is_dir(folder):
    raise ValueError(f"{name} must be a folder that evaluate has written. Received: no folder")
  if files.exists(folder / "results.json"):
    return {"": folder}
  found = {each: folder / each for each in sorted(files.names(folder)) if files.exists(folder / each / "results.json")}
  if not found:
    raise ValueError(f"{name} must be a folder that evaluate has written. Received: one without results.json, in it or "
                     "in its folders")
  return found


def _side(folder: epath.Path, name: str) -> Side:
  try:
    result = json.loads(files.read_text(folder / "results.json"))
    rows = _lines(folder / "rows.jsonl")
    for row in rows:
      row["uid"], row["kind"], row["group"], row["answers"], row["prediction"], float(row["score"])
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise ValueError(f"{folder} must have results.json and rows.jsonl as evaluate writes them. Received: "
                     f"{type(e).__name__}: {e}") from e
  shown = folder / "shown.jsonl"
  return Side(name, result, rows, _lines(shown) if files.exists(shown) else [], folder)


def _lines(path: epath.Path) -> list[dict]:
  return [json.loads(line) for line in files.read_text(path).splitlines() if line]
