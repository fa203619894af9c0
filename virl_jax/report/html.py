"""The report of a run, or of two side by side: a single HTML file that needs no network.

Here the page's plain data is put together; page.py makes it safe, and page.html.j2, viewer.html.j2, viewer.js and
page.css say what it looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import json
import os
import re

from etils import epath
import markupsafe

from virl_jax import config as config_lib
from virl_jax.eval import monitors
from virl_jax.eval import outcome
from virl_jax.report import curves
from virl_jax.report import gallery
from virl_jax.report import page as page_lib
from virl_jax.run import files
from virl_jax.run import goodput
from virl_jax.run import log

_GALLERY_BYTES = 32_000_000  # of trajectories on a page: curves and tables need far less

# The headline figures: key in an evaluation's summary, name, what it means, whether it is a share (of 1).
_CARDS = (
    ("acc_ans", "Answer accuracy", "answers that are right", True),
    ("acc_rat", "Rationale accuracy", "zooms that hit the evidence, IoU ≥ {h0}", True),
    ("hit_rate", "Hit rate", "tasks with at least one such zoom", True),
    ("rationale_count", "Zooms per task", "visual actions a trajectory", False),
    ("mean_iou", "Mean IoU", "of zooms with the evidence", False))
_OTHER = (
    ("mean_best_iou", "Best IoU per task", False),
    ("invalid_action_rate", "Invalid zooms", True),
    ("overlong_rate", "Overlong", True))
_BY_KIND = (("acc_ans", "Answers", True), ("acc_rat", "Rationales", True), ("hit_rate", "Hits", True),
            ("rationale_count", "Zooms", False))

# The charts: heading, then key in the metrics, name, and how curves.svg should draw it.
_CHARTS = (
    ("Reward", (("reward/total", "Total", {}), ("reward/answer", "Answer", {}),
                ("reward/fidelity", "Rationale fidelity", {}))),
    ("Behaviour", (("acc_ans", "Answer accuracy", {"zero": True}),
                   ("acc_rat", "Rationale accuracy", {"zero": True}),
                   ("hit_rate", "Hit rate", {"zero": True}),
                   ("rationale_count", "Zooms per trajectory", {"zero": True}),
                   ("mean_iou", "Mean IoU", {"zero": True}),
                   ("box/log_area_ratio", "Box area to truth, log2", {"zero": True}))),
    ("Imitation", (("loss/nll", "Nats a token", {"zero": True}),
                   ("loss/accuracy", "Tokens that are the likeliest", {"zero": True}))),
    ("Optimisation", (("loss/policy", "Policy loss", {}), ("loss/entropy", "Entropy, nats", {}),
                      ("ppo/clip_frac", "Clipped share", {"zero": True}))),
    ("Machine", (("rollout/logp_gap_max", "Sampler–trainer gap", {"log": True}),
                 ("time/rollout_s", "Rollout, s", {"zero": True, "cap": 4.0}),
                 ("time/update_s", "Update, s", {"zero": True, "cap": 4.0}),
                 ("speed/tokens_s", "Tokens a second", {"zero": True}),
                 ("speed/mfu", "Model FLOPs utilisation", {"zero": True}),
                 ("speed/goodput", "Goodput", {"zero": True}))))

_ALARM_STEPS = 8       # steps at which one alarm begins that are listed; the curves show all


@dataclasses.dataclass(frozen=True)
class Run:
  """What a report shows of a run.

  Attributes:
    name: of the run.
    config: its configuration, nested.
    metrics: the lines of metrics.jsonl.
    before: the evaluation's summary before training, or None.
    after: the same after training, with "difference" by measure, each with value, low and high; or None.
    kept: rollouts in order of time, each (label, entries of `gallery`).
    clock: the lines of wallclock.jsonl, as `goodput.read` gives them.
  """

  name: str
  config: dict = dataclasses.field(default_factory=dict)
  metrics: Sequence[dict] = ()
  before: dict | None = None
  after: dict | None = None
  kept: Sequence[tuple[str, list[dict]]] = ()
  clock: Sequence[dict] = ()


def render(run: Run, beside: Run | None = None) -> str:
  """Makes the page.

  Args:
    run: the run.
    beside: a second run to compare with, or None.

  Returns:
    A whole HTML document.  Parts whose data is empty or None are left out.
  """
  before, after = run.before or {}, run.after or {}
  ended, runs = bool(run.after), [run] + [beside] * (beside is not None)
  alarms = [_begun(each) if each.metrics else [] for each in runs]
  shown = page_lib.Shown(_GALLERY_BYTES)
  for number, label, entries in _first_to_last(runs):
    for entry in entries:
      shown.add(entry, label, number)
  names = [each.name for each in runs]
  values = {
      "title": " and ".join(names), "facts": [_facts(each) for each in runs], "names": names,
      "kind": "ViRL training report" if run.metrics or before or after else "ViRL",
      "sound": [tiles for each, found in zip(runs, alarms) if (tiles := _sound(each, found))],
      "cards": _cards(run.config, before, after, after.get("difference") or {}, ended) if before or after else None,
      "by_kind": _by_kind(before, after, ended), "others": _others(before, after, ended),
      "alarms": [_alarm(of_one, each.name if beside else "") for each, found in zip(runs, alarms) for of_one in found]
      if any(each.metrics for each in runs) else None,
      "wall": _wall(run.clock),
      "side": _side(run, beside) if beside else None,
      "training": _training(run, beside, alarms[0]) if any(each.metrics for each in runs) else None,
      "left_out": f"{shown.left_out} more are kept in rollouts/, for which this page has no room."
      if shown.left_out else "",
      "config": flat(run.config) if beside is None else _differences(run.config, beside.config)}
  return page_lib.render("page.html.j2", values, shown.data(names, beside is not None))


def write(workdir: str, beside: str | None = None, out: str | None = None) -> str:
  """Makes report.html from what a run has written to its workdir so far.

  Args:
    workdir: may hold config.json, metrics.jsonl, wallclock.jsonl, eval_before.json, eval_after.json,
      rollouts/{before,step_*,after}.jsonl and bad_batches/; what is missing is left out of the page.
    beside: workdir of a second run to compare with, or None.
    out: where the page goes; None for report.html in `workdir`.

  Returns:
    The page's path.

  Raises:
    ValueError: a workdir is no folder, or a file in it is not what its name says.
  """
  first, second = read(workdir), None
  if beside is not None:
    second = read(beside)
    if first.name == second.name:  # runs/a/x and runs/b/x
      first, second = (dataclasses.replace(run, name=os.path.join(*files.absolute(files.path(folder)).parts[-2:]))
                       for run, folder in ((first, workdir), (second, beside)))
  target = files.path(workdir) / "report.html" if out is None else files.path(out)
  files.make(target.parent)
  files.write_text(target, render(first, second))
  return str(target)


def read(workdir: str) -> Run:
  """What a run has written to its workdir; see `write`, also for what is raised."""
  folder = files.path(workdir)
  if not files.is_dir(folder):
    raise ValueError(f"workdir must be a folder. Received: {workdir!r}")
  metrics_path = folder / "metrics.jsonl"
  return Run(files.absolute(folder).name, config_lib.translate(_json(folder / "config.json") or {}),
             log.read(str(metrics_path)) if files.exists(metrics_path) else [],
             *(_json(folder / f"eval_{when}.json") for when in ("before", "after")),
             _kept_rollouts(folder), goodput.read(str(folder / "wallclock.jsonl")))


def _json(path):
  if not files.exists(path):
    return None
  try:
    return json.loads(files.read_text(path))
  except ValueError as e:
    raise ValueError(f"{path} must be JSON. Received: {e}") from e


def _kept_rollouts(folder: epath.Path) -> list[tuple[str, list[dict]]]:
  """The rollouts and the bad batches, in order of time."""
  rollouts = folder / "rollouts"
  steps = [(step, f"Step {step}", path) for step, path in _numbered(rollouts, r"step_(\d+)\.jsonl")]
  skipped = [(step, f"Skipped, step {step}", path / "trajectories.jsonl")
             for step, path in _numbered(folder / "bad_batches", r"step_(\d+)")]
  wanted = [(-1, "Before", rollouts / "before.jsonl"), *sorted([*steps, *skipped]),
            (-1, "After", rollouts / "after.jsonl")]
  kept = ((label, gallery.load(str(path))) for _, label, path in wanted if files.exists(path))
  return [(label, entries) for label, entries in kept if entries]


def _first_to_last(runs: Sequence[Run]) -> list[tuple[int, str, list[dict]]]:
  """(number of the run, label, entries), the most important for a page first: after training, before it, skipped
  batches, and then the steps from the last on."""
  rank = lambda label: next(i for i, start in enumerate(("After", "Before", "Skipped", "")) if label.startswith(start))
  found = [(rank(label), -at, number, label, entries) for number, run in enumerate(runs)
           for at, (label, entries) in enumerate(run.kept)]
  return [each[2:] for each in sorted(found, key=lambda each: each[:3])]


def _numbered(folder, pattern):
  """(number, path) of what has a name like this in a folder, in order."""
  found = [(int(match[1]), name) for name in files.names(folder) if (match := re.fullmatch(pattern, name))]
  return [(number, folder / name) for number, name in sorted(found)]


def _facts(run):
  config, metrics, facts = run.config, run.metrics, []
  if metrics:
    facts.append(f"{len(metrics)} steps")
  rollout, example = config.get("rollout") or {}, config.get("sft") or {}
  if example.get("batch") and any("loss/nll" in line for line in metrics):
    facts.append(f"{example['batch']} demonstrations a step")
  elif rollout.get("prompts") and rollout.get("group_size"):
    facts.append(f"{rollout['prompts']} prompts × {rollout['group_size']} rollouts a step")
  if rollout.get("max_rounds"):
    facts.append(f"at most {rollout['max_rounds']} zooms")
  if (config.get("model") or {}).get("path"):
    facts.append(f"model {os.path.basename(str(config['model']['path']).rstrip('/'))}")
  if (config.get("reward") or {}).get("h0") is not None:
    facts.append(f"h0 = {config['reward']['h0']}")
  tasks = (run.after or run.before or {}).get("n")
  if tasks:
    facts.append(f"{tasks} held-out tasks")
  return facts


def _sound(run, alarms):
  """Tiles that tell whether the figures can be trusted: first, the gap between sampler and trainer."""
  tiles, cfg = [], _monitor(run.config)
  for key, name, limit in (("rollout/logp_gap_mean", "Sampler–trainer gap, mean", cfg.drift_mean_nats),
                           ("rollout/logp_gap_max", "Sampler–trainer gap, largest", cfg.drift_max_nats)):
    found = [(line[key], line.get("step")) for line in run.metrics if _is_number(line.get(key))]
    if found:
      worst, step = max(found, key=lambda each: (each[0] != each[0], each[0]))
      tiles.append({"name": name, "value": f"{curves.number(found[-1][0])} nats", "bad": not worst < limit,
                    "told": f"last step; at most {curves.number(worst)}, in step {step}; alarm from "
                            f"{curves.number(limit)}"})
  if run.metrics:
    told = ", ".join(_spoken(of_one[0]) for of_one in alarms) or "no monitor has anything to say"
    tiles.append({"name": "Alarms", "value": str(sum(map(len, alarms))), "bad": bool(alarms), "told": told})
    skipped = sum(line["optim/skipped"] for line in run.metrics if _is_number(line.get("optim/skipped")))
    tiles.append({"name": "Skipped updates", "value": curves.number(skipped), "bad": skipped > 0,
                  "told": "for a loss or gradient that was not finite, or far too long"})
  if wall := _wall(run.clock):
    tiles.append({"name": "Goodput", "value": page_lib.figure(wall["goodput"], True, "%"), "bad": False,
                  "told": f"steps that count, of {wall['total']}"})
  return {"run": run.name, "tiles": tiles} if tiles else None


def _side(run, beside):
  """Both runs' measures, and their differences on the same tasks."""
  rows, paired, why = [], {}, "one of them has no evaluation after training"
  if run.after and beside.after:
    try:
      found = [[outcome.Outcome(**{"uid": "", **o, "ious": tuple(o["ious"])}) for o in each.after["outcomes"]]
               for each in (run, beside)]
      paired = outcome.difference(*found, (run.config.get("reward") or {}).get("h0", 0.5))
      why = ""
    except (KeyError, TypeError, ValueError) as e:
      why = "their held-out tasks are not the same" if isinstance(e, ValueError) else "tasks have no outcomes"
  for key, name, share in [(key, name, share) for key, name, _, share in _CARDS] + list(_OTHER):
    cells = []
    for each in (run, beside):
      b, a = (_interval((of or {}).get(key)) for of in (each.before, each.after))
      cells.append({"was": b, "now": a})
    if any(cell["was"] or cell["now"] for cell in cells):
      rows.append({"name": name, "share": share, "cells": cells,
                   "change": _change(None, None, _interval(paired.get(key)), judged=True)})
  return {"rows": rows, "names": [run.name, beside.name], "why": why if rows else "", "n": paired.get("n")}


def _differences(one, other):
  """Knobs that differ: (name, value in the first, value in the second)."""
  found = [dict(flat(config)) for config in (one, other)]
  return [(key, *(each.get(key, "–") for each in found)) for key in dict.fromkeys([*found[0], *found[1]])
          if found[0].get(key) != found[1].get(key)]


def _cards(config, before, after, difference, ended):
  h0 = (config.get("reward") or {}).get("h0", "h0")
  out = []
  for key, name, meaning, share in _CARDS:
    b, a = _interval(before.get(key)), _interval(after.get(key))
    if b or a:
      # If there is nothing to measure after training (no zoom), the value from before is not shown in its place.
      out.append({"key": key, "name": name, "meaning": meaning.format(h0=h0), "share": share,
                  "shown": (a if ended else b) or (None, None, None), "was": b if ended else None,
                  "change": _change(b, a, _interval(difference.get(key)), judged=key != "rationale_count"),
                  "strip": _strip(b, a, 1.0 if share or key == "mean_iou" else None)})
  return out


def _change(before, after, difference, judged):
  """How a measure has changed, in words and colours; None if unknown."""
  if difference is None and not (before and after):
    return None
  value, low, high = difference or (after[0] - before[0], None, None)
  sure = low is not None and high is not None and (low > 0 or high < 0)
  return {"interval": (value, low, high), "arrow": "▲" if value > 0 else "▼" if value < 0 else "■",
          "sign": "+" if value > 0 else "",
          "kind": ("good" if value > 0 else "bad") if sure and judged else "sure" if sure else ""}


def _strip(before, after, top):
  """The places of the two intervals on one axis, 192 wide."""
  ends = [v for e in (before, after) if e for v in e if v is not None]
  top = top or max(ends, default=0.0) * 1.1 or 1.0
  at = lambda v: None if v is None else 4 + 192 * min(max(v / top, 0.0), 1.0)
  return [{"name": name, "y": y, "x": at(e[0]), "low": at(e[1]), "high": at(e[2])}
          for y, name, e in ((7, "was", before), (17, "now", after)) if e]


def _by_kind(before, after, ended):
  before, after = before.get("by_kind") or {}, after.get("by_kind") or {}
  rows = []
  for kind in sorted({*before, *after}):
    b, a = before.get(kind) or {}, after.get(kind) or {}
    rows.append({"kind": kind, "n": a.get("n", b.get("n", "–")),
                 "cells": [_cell(b.get(key), a.get(key), share, ended) for key, _, share in _BY_KIND]})
  return {"columns": [name for _, name, _ in _BY_KIND], "rows": rows} if rows else None


def _others(before, after, ended):
  return [(name, _cell(before.get(key), after.get(key), share, ended)) for key, name, share in _OTHER
          if _interval(before.get(key)) or _interval(after.get(key))]


def _cell(before, after, share, ended):
  b, a = _interval(before), _interval(after)
  return {"was": b[0] if b and ended else None, "now": ((a if ended else b) or (None,))[0], "share": share}


def _monitor(config):
  section = config.get("monitor") or {}  # older runs have none
  return monitors.Config(**{f.name: section[f.name] for f in dataclasses.fields(monitors.Config) if f.name in section})


def _begun(run):
  """The alarms of a run: a list for each monitor, in order of the first alarm.  The page numbers monitors by place."""
  steps = [line for line in run.metrics if _is_number(line.get("step"))]
  found = {}
  for alarm in monitors.all_begun(steps, _monitor(run.config)):
    found.setdefault(alarm.name, []).append(alarm)
  return list(found.values())


def _alarm(of_one, run):
  return {"name": _spoken(of_one[0]), "message": of_one[0].message, "run": run,
          "steps": [alarm.step for alarm in of_one[:_ALARM_STEPS]], "more": max(0, len(of_one) - _ALARM_STEPS)}


def _spoken(alarm):
  return alarm.name.replace("_", " ")


def _wall(clock):
  """Where the time since the first start went: each part that took some, with its share."""
  parts = goodput.split(clock)
  total = sum(parts.values())
  if not total:
    return None
  rows = [{"key": key, "name": goodput.PARTS[key], "time": log.duration(seconds), "share": seconds / total}
          for key, seconds in parts.items() if seconds]
  starts = sum(event["spent"] == "stopped" for event in clock)
  return {"rows": rows, "goodput": goodput.share(parts), "total": log.duration(total), "starts": starts}


def _training(run, beside, alarms):
  before, after = run.before or {}, run.after or {}
  marks = sorted((alarm.step, str(i), page_lib.visible(f"step {alarm.step}: {_spoken(alarm)} begins"))
                 for i, of_one in enumerate(alarms, start=1) for alarm in of_one)
  groups = []
  for heading, charts in _CHARTS:
    drawn = []
    for key, name, how in charts:
      points, others = _points(run, key), _points(beside, key) if beside else []
      if points or others:
        ends = {"before": before.get(key), "after": after.get(key)} if heading == "Behaviour" else {}
        # Safe as markup: `curves.svg` draws numbers, and escapes its few words.
        drawn.append(markupsafe.Markup(curves.svg(points, name, subtitle=key, marks=marks, beside=others, **how,
                                                  **ends)))
    if drawn:
      groups.append((heading, drawn))
  return {"groups": groups, "held_out": bool(before or after), "marked": bool(marks)}


def _points(run, key):
  return [(line["step"], line[key]) for line in run.metrics
          if _is_number(line.get(key)) and _is_number(line.get("step"))]


def flat(nested: dict, prefix: str = "") -> list[tuple[str, str]]:
  """The leaves of a nested dict as JSON, by dotted key."""
  out = []
  for key, value in nested.items():
    out += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, json.dumps(value))]
  return out


def _interval(measure):
  """(value, low, high) of a measure that is a dict, a number or None."""
  if isinstance(measure, dict):
    return None if measure.get("value") is None else tuple(measure.get(k) for k in ("value", "low", "high"))
  return None if measure is None else (measure, None, None)


def _is_number(value):
  return isinstance(value, (int, float)) and not isinstance(value, bool)
