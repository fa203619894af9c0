"""Pages of evaluations: a benchmark's results, and two of them side by side."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
import functools

from PIL import Image

from virl_jax import types
from virl_jax.data import images
from virl_jax.eval import compare
from virl_jax.report import gallery
from virl_jax.report import page

PICTURES = 200           # tasks of a page that have their pictures: decoding thousands takes too long
_ROOM = 32_000_000       # characters of all predictions on a page with so many pictures; more pictures get more
_WORDS = 0.25            # the share of the room that is kept for text
_NO_ROOM = "no room for this picture"
_LISTED = 20             # rows that were not evaluated, for each cause
_MEASURES = (("acc_ans", "Answers right", True), ("acc_rat", "Actions right", True), ("hit_rate", "Hit rate", True),
             ("mean_iou", "Mean IoU", False), ("mean_best_iou", "Best IoU per task", False),
             ("rationale_count", "Zooms per task", False), ("invalid_action_rate", "Invalid zooms", True),
             ("overlong_rate", "Overlong", True))


def entries(tasks: Sequence[types.Task], rows: Sequence[dict], said: Mapping[tuple[str, int], dict],
            pictures: int = PICTURES) -> list[dict]:
  """What pages show of predictions: entries like those of `gallery.entry`, but with raw answers instead of turns.

  Args:
    tasks: of the benchmark.
    rows: predictions with their scores; see `eval.benchmarks.rows.scored`.
    said: by uid and sample, the text of a prediction, its boxes (pixels of the original) and, if they are known, its
      options, ious, classes and stop.
    pictures: as for `evaluation`.

  Returns:
    One for each row.  A picture that is a file is only named, under "file"; of the others, those that a page shows are
    included.
  """
  by_uid, found = {task.uid: task for task in tasks}, []
  for row in rows:
    task, told = by_uid[row["uid"]], said.get((row["uid"], row["sample"]), {})
    boxes = [[float(v) for v in box] for box in told.get("boxes") or ()]
    grades = [told.get(name) or [None] * len(boxes) for name in ("ious", "classes")]
    turn = {"role": "assistant", "text": told.get("text", row["prediction"]), "action": None, "box": None,
            "box_shown": None, "error": None, "iou": None, "class": None, "modulator": None, "advantage": None,
            "crop": None}
    zooms = [{**turn, "role": "looked", "text": "", "box": box, "iou": iou, "class": name}
             for box, iou, name in zip(boxes, *grades)]
    options = told.get("options") or task.options
    found.append({
        "uid": task.uid, "rollout": row["sample"], "kind": task.kind, "source": task.source, "question": task.question,
        "options": None if options is None else list(options), "answers": list(row["answers"]),
        "answer": row["prediction"], "correct": row["score"] >= 0.5, "score": row["score"],
        "stop": told.get("stop") or "",
        "width": None, "height": None, "boxes_gt": [[float(v) for v in box] for box in task.boxes], "boxes": boxes,
        "reward": None, "advantage": None, "reward_parts": None, "image": None,
        "file": task.image if isinstance(task.image, str) and task.image else None, "turns": [turn, *zooms]})
  chosen = _chosen(found, pictures)
  for i, entry in enumerate(found):
    image = by_uid[entry["uid"]].image
    if i in chosen and image and not isinstance(image, str):
      found[i] = _pictured(entry, image)
  return found


def evaluation(result: dict, shown: Sequence[dict], lost: dict, pictures: int = PICTURES) -> str:
  """The page of a benchmark's results.

  Args:
    result: what the benchmark's `score` gave, with rows, and what `evaluate` adds.
    shown: what `entries` gave.
    lost: lines about what was not evaluated, by cause.
    pictures: the most tasks whose pictures are on the page, wrong answers first.

  Returns:
    A whole HTML document.
  """
  ends, voted = result["intervals"], result.get("majority")
  trajectories, room = page.Shown(_room(pictures)), _WORDS * _room(pictures)
  chosen = _chosen(shown, pictures)
  for i in sorted(range(len(shown)), key=lambda i: (i not in chosen, i)):
    trajectories.add(_ready(shown[i], i in chosen and trajectories.room > room), "")
  summary, gap = result.get("summary") or {}, result.get("zooming_gap") or {}
  done = result["evaluated"]
  values = {
      "title": str(result["benchmark"]), "kind": "Evaluation",
      "facts": [fact for fact in (
          f"model {result['model']}" if result.get("model") else "",
          f"step {result['step']}" if result.get("step") else "",
          "without zooms" if result.get("zoom") is False else "",
          f"Avg@{result['samples']['most']}" if voted else "", str(result.get("rule") or ""),
          f"judge {result['judge']['model']}" if result.get("judge") else "") if fact],
      "metric": result["metric"], "score": (result["score"], *(ends.get(result["metric"]) or (None, None))),
      "of": f"{result['n']} of {done['rows']} rows evaluated ({100 * done['share']:.2f} %)",
      "figures": [*_flat(result["figures"], ends),
                  *(_flat(voted["figures"], voted["intervals"], "of the majority: ") if voted else ())],
      "categories": list(result["by_kind"].items()),
      "measures": [(name, share, _values(summary[key])) for key, name, share in _MEASURES
                   if key in summary and summary[key]["value"] is not None],
      "gap": [(name, _values(gap[key])) for key, name in (("acc_ans", "Answers right"), ("acc_rat", "Actions right"))
              if gap and gap[key]["value"] is not None], "gap_n": gap.get("n"),
      "lost": [(what, lines[:_LISTED], len(lines) - _LISTED) for what, lines in lost.items() if lines],
      "note": _note(trajectories, shown, "wrong answers first")}
  return page.render("evaluation.html.j2", values, trajectories.data([""], False, "sample"))


def comparison(found: dict, a: compare.Side, b: compare.Side, pictures: int = PICTURES) -> str:
  """The page of two evaluations of the same tasks.

  Args:
    found: what `compare.compare` gave.
    a, b: the two evaluations.
    pictures: the most tasks whose pictures are on the page, those that flipped first.

  Returns:
    A whole HTML document.
  """
  old, new = a.scores, b.scores
  told = {uid: compare.change(old[uid], new[uid]) for uid in old}
  order = ["lost", "gained", "wrong in both", "right in both"]
  both = sorted(((order.index(told[entry["uid"]]), i, run, entry) for run, side in enumerate((a, b))
                 for i, entry in enumerate(side.shown) if entry["uid"] in told), key=lambda each: each[:3])
  room, pictured = _room(pictures), set()
  trajectories = page.Shown(room)
  for _, _, run, entry in both:
    wanted = len(pictured) < pictures and trajectories.room > _WORDS * room or entry["uid"] in pictured
    ready = _ready(entry | {"change": told[entry["uid"]]}, wanted)
    if ready["image"] is not None:
      pictured.add(entry["uid"])
    trajectories.add(ready, "", run)
  summaries = [side.result.get("summary") or {} for side in (a, b)]
  values = {
      "title": f"{found['benchmark']}: {' and '.join(found['names'])}", "kind": "Two evaluations", "found": found,
      "own": [(name, it) for name, it in found["figures"].items() if it["value"] is not None],
      "rows": [("all", found), *(found["by_kind"].items() if len(found["by_kind"]) > 1 else ())],
      "measures": [(name, share, [_values(each.get(key)) for each in summaries]) for key, name, share in _MEASURES
                   if any((each.get(key) or {}).get("value") is not None for each in summaries)],
      "note": _note(trajectories, [entry for *_, entry in both], "those that flipped first",
                    {uid for uid, change in told.items() if change in order[:2]}) if both else
      "The folders have no shown.jsonl, so that there is nothing to look at."}
  return page.render("comparison.html.j2", values, trajectories.data(found["names"], True, "sample", found["names"][0]))


def _room(pictures: int) -> int:
  """Characters of all that is shown."""
  return round(_ROOM * max(1.0, pictures / PICTURES))


def _chosen(shown: Sequence[dict], pictures: int) -> set[int]:
  """The entries whose pictures are shown: wrong answers first."""
  return set(sorted(range(len(shown)), key=lambda i: (shown[i]["correct"], i))[:pictures])


def _ready(entry: dict, wanted: bool) -> dict:
  """An entry with its picture, if it is wanted and can be read, or why it has none; and with a size in any case."""
  if entry["image"] is not None:
    return entry
  why = "" if not entry["file"] else _NO_ROOM
  if wanted and entry["file"]:
    try:
      return _pictured(entry, _decoded(entry["file"]))
    except ValueError:
      why = "its picture can no longer be read"
  corners = [v for box in [*entry["boxes_gt"], *entry["boxes"]] for v in box if v is not None]
  side = max(corners, default=0.0) or 4.0  # any size keeps the boxes' places relative to each other
  return entry | {"width": max(1, round(side)), "height": max(1, round(side)), "left_out": why}


@functools.lru_cache(maxsize=1)  # predictions for one task come one after the other
def _decoded(path: str) -> Image.Image:
  return images.decode(path)


def _pictured(entry: dict, image: bytes | Image.Image) -> dict:
  decoded = images.decode(image)
  turns = [turn if turn["box"] is None else {**turn, "crop": gallery.crop(decoded, turn["box"])}
           for turn in entry["turns"]]
  return entry | {"image": gallery.data_uri(decoded, gallery.IMAGE_SIDE_PX, lossless=False), "width": decoded.width,
                  "height": decoded.height, "turns": turns}


def _note(trajectories: page.Shown, shown: Sequence[dict], order: str, flipped: Collection[str] = ()) -> str:
  """What the page has no room for: pictures, which come in some order, and predictions."""
  told, seen = [], {item["uid"] for item in trajectories.items if item["picture"] is not None}
  n, more = len({entry["uid"] for entry in shown}), any(item["left_out"] == _NO_ROOM for item in trajectories.items)
  if len(seen) < n:
    of = f"; of the {len(flipped)} that flipped, {len(seen & set(flipped))} have theirs" if flipped else ""
    told.append(f"Pictures of {len(seen)} of {n} tasks, {order}{of}.")
  if more:
    told.append("--pictures=N puts those of N tasks on the page; shown.jsonl names the files of all.")
  if trajectories.left_out:
    told.append(f"{trajectories.left_out} more predictions are in predictions.jsonl or rows.jsonl, for which this page "
                "has no room.")
  return " ".join(told)


def _values(measure: dict | None) -> tuple:
  return (None, None, None) if measure is None else tuple(measure.get(key) for key in ("value", "low", "high"))


def _flat(tree: dict, ends: dict, prefix: str = ""):
  """(name, value with its interval, whether it is a share) for each of nested figures."""
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _flat(value, ends.get(key) or {}, f"{prefix}{key}: ")
    else:
      yield f"{prefix}{key}", (value, *(ends.get(key) or (None, None))), isinstance(value, float)
