"""The report of a run: one HTML file that needs no network, no script and nothing beside it.

Here the page's plain data is put together; what it looks like stands in page.html.j2, trajectory.html.j2 and page.css.
Everything that a model or a data set wrote is hostile text.  The template escapes whatever it prints, and takes out
what can't be seen; only what is `Markup` here goes through as it is, and says why it may.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import importlib.resources
import json
import os
import re

import jinja2
import markupsafe

from virl_jax import config as config_lib
from virl_jax.eval import monitors
from virl_jax.report import curves
from virl_jax.report import gallery
from virl_jax.report import trajectory
from virl_jax.run import files
from virl_jax.run import goodput
from virl_jax.run import log

_GALLERY_BYTES = 13_500_000  # keeps a page below 15 MB: curves and tables need far less than the rest

# The headline: key in an evaluation's summary, name, what it means, whether it is a share (of 1).
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
    ("Optimisation", (("loss/policy", "Policy loss", {}), ("loss/entropy", "Entropy, nats", {}),
                      ("ppo/clip_frac", "Clipped share", {"zero": True}))),
    ("Machine", (("rollout/logp_gap_max", "Sampler–trainer gap", {"log": True}),
                 ("time/rollout_s", "Rollout, s", {"zero": True, "cap": 4.0}),
                 ("time/update_s", "Update, s", {"zero": True, "cap": 4.0}),
                 ("speed/tokens_s", "Tokens a second", {"zero": True}),
                 ("speed/mfu", "Model FLOPs utilisation", {"zero": True}),
                 ("speed/goodput", "Goodput", {"zero": True}))))

_ALARM_STEPS = 8       # beginnings of one alarm that are listed; the curves show all
_LONGEST_TEXT = 12000  # characters shown of one turn

_IMAGE_URI = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}")
_SPECIAL = re.compile(r"(<\|[A-Za-z0-9_/]{1,40}\|>|</?(?:think|answer|tool_call|tool_response|tools)>)")
_REPEATED = re.compile(r"(<\|(?:image|video)_pad\|>)\1+")
# Control characters, lone surrogates and marks that reorder text: they could make a page unreadable or
# make it say what the model did not.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def render(config: dict, metrics: list[dict], before: dict | None, after: dict | None,
           difference: dict | None, gallery: list[dict], title: str, clock: Sequence[dict] = ()) -> str:
  """Makes the page.

  Args:
    config: the run's configuration, nested.
    metrics: the lines of metrics.jsonl.
    before: the evaluation's summary before training, or None.
    after: the same after training, or None.
    difference: after - before by measure, each with value, low and high, or None.
    gallery: kept rollouts, each {"step": int, "label": str, "entries": [gallery.entry(...), ...]};
      the last one is shown first.
    title: of the page.
    clock: the lines of wallclock.jsonl, as `goodput.read` gives them.

  Returns:
    A whole HTML document.  What is empty or None is left out.
  """
  ended, summaries = bool(after), (before or {}, after or {})
  alarms = _begun(config, metrics) if metrics else []
  page = {
      "title": title, "facts": _facts(config, metrics, before, after),
      "kind": "ViRL training report" if metrics or before or after else "ViRL",
      "css": markupsafe.Markup(_file("page.css")),  # a file of this package, never text of a run
      "cards": _cards(config, *summaries, difference or {}, ended) if before or after else None,
      "by_kind": _by_kind(*summaries, ended), "others": _others(*summaries, ended),
      "alarms": [_alarm(of_one) for of_one in alarms] if metrics else None,
      "wall": _wall(clock),
      "training": _training(metrics, *summaries, alarms) if metrics else None,
      "kept": [{"label": each["label"], "entries": [trajectory.view(item) for item in each["entries"]]}
               for each in gallery],
      "classes": trajectory.CLASSES, "config": _flat(config)}
  return _environment().get_template("page.html.j2").render(page)


def write(workdir: str) -> str:
  """Makes report.html from what a run has left in its folder so far.

  Args:
    workdir: may hold config.json, metrics.jsonl, wallclock.jsonl, eval_before.json, eval_after.json and
      rollouts/{before,step_*,after}.jsonl and bad_batches/; what is missing is left out of the page.

  Returns:
    The page's path.

  Raises:
    ValueError: `workdir` is no folder, or a file in it is not what its name says.
  """
  folder = files.path(workdir)
  if not files.is_dir(folder):
    raise ValueError(f"workdir must be a folder. Received: {workdir!r}")
  metrics_path = folder / "metrics.jsonl"
  metrics = log.read(str(metrics_path)) if files.exists(metrics_path) else []
  before, after = (_json(folder / f"eval_{when}.json") for when in ("before", "after"))
  config = config_lib.translate(_json(folder / "config.json") or {})
  kept = _kept_rollouts(folder, metrics)
  page = render(config, metrics, before, after, (after or {}).get("difference"), kept,
                files.absolute(folder).name, goodput.read(str(folder / "wallclock.jsonl")))
  files.write_text(folder / "report.html", page)
  return str(folder / "report.html")


def _json(path):
  if not files.exists(path):
    return None
  try:
    return json.loads(files.read_text(path))
  except ValueError as e:
    raise ValueError(f"{path} must be JSON. Received: {e}") from e


def _kept_rollouts(folder, metrics):
  """The rollouts in order of time, bad batches among them; too many for a page, the middle of the run goes first."""
  rollouts = folder / "rollouts"
  last = max((line["step"] for line in metrics if isinstance(line.get("step"), int)), default=-1) + 1
  before, after = ((step, name.title(), rollouts / f"{name}.jsonl") for step, name in ((0, "before"), (last, "after")))
  steps = [(step, f"Step {step}", path) for step, path in _numbered(rollouts, r"step_(\d+)\.jsonl")]
  skipped = [(step, f"Skipped, step {step}", path / "trajectories.jsonl")
             for step, path in _numbered(folder / "bad_batches", r"step_(\d+)")]
  kept, room = {}, _GALLERY_BYTES
  for each in [after, before, *skipped[::-1], *steps[::-1]]:
    entries = []
    for item in gallery.load(str(each[2])) if files.exists(each[2]) else ():
      room -= len(json.dumps(item))
      if room < 0:
        break
      entries.append(item)
    if entries:
      kept[each] = entries
    if room < 0:
      break
  return [{"step": each[0], "label": each[1], "entries": kept[each]}
          for each in (before, *sorted([*steps, *skipped]), after) if each in kept]


def _numbered(folder, pattern):
  """What of a folder has a name like this: (number, path), in order."""
  found = [(int(match[1]), name) for name in files.names(folder) if (match := re.fullmatch(pattern, name))]
  return [(number, folder / name) for number, name in sorted(found)]


@functools.cache  # with the templates that it has compiled
def _environment() -> jinja2.Environment:
  env = jinja2.Environment(loader=jinja2.FunctionLoader(_file), autoescape=True, undefined=jinja2.StrictUndefined,
                           finalize=visible, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
  env.filters |= {"figure": _figure, "number": curves.number, "signed": _signed, "cut": _cut, "picture": _picture,
                  "transcript": _transcript}
  return env


def _file(name: str) -> str:
  return importlib.resources.files("virl_jax.report").joinpath(name).read_text(encoding="utf-8")


def visible(value: object) -> str:
  """Whatever the template prints goes through here before it is escaped: nothing invisible is left in it."""
  if isinstance(value, markupsafe.Markup):
    return value  # a macro's output, whose values came through here, or markup of this module
  return _UNSEEN.sub("\ufffd", str(value).replace("\r\n", "\n"))


def _picture(uri: str | None) -> str | None:
  """The data URI of a picture as it is, or None for anything else."""
  return uri if isinstance(uri, str) and _IMAGE_URI.fullmatch(uri) else None


def _cut(text: str, longest: int) -> str:
  return text if len(text) <= longest else text[:longest] + " …"


def _transcript(text: str) -> list[tuple[str, bool]]:
  """What a turn holds in pieces: (text, whether it is a special token, which the style dims)."""
  text = _REPEATED.sub(lambda m: f"{m[1]}×{len(m[0]) // len(m[1])}", text.strip("\n"))
  more = len(text) - _LONGEST_TEXT
  pieces = [(piece, i % 2 == 1) for i, piece in enumerate(_SPECIAL.split(text[:_LONGEST_TEXT]))]
  return pieces + [(f" … {more} more characters", True)] * (more > 0)


def _signed(value: float | None) -> str:
  """A number with its sign, two decimals."""
  return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def _figure(value: float | None, share: bool, unit: str = "") -> str:
  """A measure for people; the unit is that of shares."""
  if value is None:
    return "–"
  return (f"{100 * value:.1f}{unit}" if share else f"{value:.2f}").replace("-", "−")


def _facts(config, metrics, before, after):
  facts = []
  if metrics:
    facts.append(f"{len(metrics)} steps")
  rollout = config.get("rollout") or {}
  if rollout.get("prompts") and rollout.get("group_size"):
    facts.append(f"{rollout['prompts']} prompts × {rollout['group_size']} rollouts a step")
  if rollout.get("max_rounds"):
    facts.append(f"at most {rollout['max_rounds']} zooms")
  if (config.get("model") or {}).get("path"):
    facts.append(f"model {os.path.basename(str(config['model']['path']).rstrip('/'))}")
  if (config.get("reward") or {}).get("h0") is not None:
    facts.append(f"h0 = {config['reward']['h0']}")
  tasks = (after or before or {}).get("n")
  if tasks:
    facts.append(f"{tasks} held-out tasks")
  return facts


def _cards(config, before, after, difference, ended):
  h0 = (config.get("reward") or {}).get("h0", "h0")
  out = []
  for key, name, meaning, share in _CARDS:
    b, a = _interval(before.get(key)), _interval(after.get(key))
    if b or a:
      # Nothing to measure after training (no zoom is right) is not what was before.
      out.append({"key": key, "name": name, "meaning": meaning.format(h0=h0), "share": share,
                  "shown": (a if ended else b) or (None, None, None), "was": b if ended else None,
                  "change": _change(b, a, _interval(difference.get(key)), judged=key != "rationale_count"),
                  "strip": _strip(b, a, 1.0 if share or key == "mean_iou" else None)})
  return out


def _change(before, after, difference, judged):
  if difference is None and not (before and after):
    return None
  value, low, high = difference or (after[0] - before[0], None, None)
  sure = low is not None and high is not None and (low > 0 or high < 0)
  return {"interval": (value, low, high), "arrow": "▲" if value > 0 else "▼" if value < 0 else "■",
          "sign": "+" if value > 0 else "",
          "kind": ("good" if value > 0 else "bad") if sure and judged else "sure" if sure else ""}


def _strip(before, after, top):
  """Where the two intervals lie on one axis, 192 wide."""
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


def _begun(config, metrics):
  """The alarms of a run by monitor, in order of the first: a monitor's number in the page is its place."""
  section = config.get("monitor") or {}  # runs once had none
  known = {f.name: section[f.name] for f in dataclasses.fields(monitors.Config) if f.name in section}
  steps = [line for line in metrics if _is_number(line.get("step"))]
  found = {}
  for alarm in monitors.all_begun(steps, monitors.Config(**known)):
    found.setdefault(alarm.name, []).append(alarm)
  return list(found.values())


def _alarm(of_one):
  return {"name": _spoken(of_one[0]), "message": of_one[0].message,
          "steps": [alarm.step for alarm in of_one[:_ALARM_STEPS]], "more": max(0, len(of_one) - _ALARM_STEPS)}


def _spoken(alarm):
  return alarm.name.replace("_", " ")


def _wall(clock):
  """Where the time since the first start went: each part that took any, with its share."""
  parts = goodput.split(clock)
  total = sum(parts.values())
  if not total:
    return None
  rows = [{"key": key, "name": goodput.PARTS[key], "time": log.duration(seconds), "share": seconds / total}
          for key, seconds in parts.items() if seconds]
  starts = sum(event["spent"] == "stopped" for event in clock)
  return {"rows": rows, "goodput": goodput.share(parts), "total": log.duration(total), "starts": starts}


def _training(metrics, before, after, alarms):
  marks = sorted((alarm.step, str(i), visible(f"step {alarm.step}: {_spoken(alarm)} begins"))
                 for i, of_one in enumerate(alarms, start=1) for alarm in of_one)
  groups = []
  for heading, charts in _CHARTS:
    drawn = []
    for key, name, how in charts:
      points = [(line["step"], line[key]) for line in metrics
                if _is_number(line.get(key)) and _is_number(line.get("step"))]
      if points:
        ends = {"before": before.get(key), "after": after.get(key)} if heading == "Behaviour" else {}
        # Markup: `curves.svg` draws numbers, and escapes its few words.
        drawn.append(markupsafe.Markup(curves.svg(points, name, subtitle=key, marks=marks, **how, **ends)))
    if drawn:
      groups.append((heading, drawn))
  return {"groups": groups, "held_out": bool(before or after), "marked": bool(marks)}


def _flat(nested, prefix=""):
  out = []
  for key, value in nested.items():
    out += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, json.dumps(value))]
  return out


def _interval(measure):
  """(value, low, high) of a measure that is a dict, a number or None."""
  if isinstance(measure, dict):
    return None if measure.get("value") is None else tuple(measure.get(k) for k in ("value", "low", "high"))
  return None if measure is None else (measure, None, None)


def _is_number(value):
  return isinstance(value, (int, float)) and not isinstance(value, bool)
