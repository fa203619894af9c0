"""The report of a run: one HTML file that needs no network, no script and nothing beside it."""

from __future__ import annotations

import dataclasses
import json
import os
import re

from virl_jax.eval import monitors
from virl_jax.report import curves
from virl_jax.report import gallery
from virl_jax.report import style
from virl_jax.report import trajectory
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
                 ("time/update_s", "Update, s", {"zero": True, "cap": 4.0}))))

_ALARM_STEPS = 8  # beginnings of one alarm that are listed; the curves show all

# No script may run and nothing may be fetched, whatever text ends up in the page.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render(config: dict, metrics: list[dict], before: dict | None, after: dict | None,
           difference: dict | None, gallery: list[dict], title: str) -> str:
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

  Returns:
    A whole HTML document.  What is empty or None is left out.
  """
  body = [_header(config, metrics, before, after, title)]
  if before or after:
    body += [_cards(config, before or {}, after or {}, difference or {}), _tables(before or {}, after or {})]
  if metrics:
    alarms = _begun(config, metrics)
    body += [_alarms(alarms), _curves(metrics, before or {}, after or {}, alarms)]
  if gallery:
    body.append(_gallery(gallery))
  if config:
    body.append(_config(config))
  return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
          f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
          f'<meta name="viewport" content="width=device-width,initial-scale=1">'
          f'<meta name="color-scheme" content="light dark"><title>{trajectory.escape(title)}</title>'
          f'<link rel="icon" href="data:,"><style>{style.CSS}</style></head>\n'
          f'<body><main>{"".join(body)}</main></body></html>\n')


def write(workdir: str) -> str:
  """Makes report.html from what a run has left in its folder so far.

  Args:
    workdir: may hold config.json, metrics.jsonl, eval_before.json, eval_after.json and
      rollouts/{before,step_*,after}.jsonl; what is missing is left out of the page.

  Returns:
    The page's path.

  Raises:
    ValueError: `workdir` is no folder, or a file in it is not what its name says.
  """
  if not os.path.isdir(workdir):
    raise ValueError(f"workdir must be a folder. Received: {workdir!r}")
  metrics_path = os.path.join(workdir, "metrics.jsonl")
  metrics = log.read(metrics_path) if os.path.exists(metrics_path) else []
  before, after = (_json(os.path.join(workdir, f"eval_{when}.json")) for when in ("before", "after"))
  config = _json(os.path.join(workdir, "config.json")) or {}
  kept = _kept_rollouts(os.path.join(workdir, "rollouts"), metrics)
  page = render(config, metrics, before, after, (after or {}).get("difference"), kept,
                os.path.basename(os.path.abspath(workdir)))
  path = os.path.join(workdir, "report.html")
  with open(f"{path}.tmp", "w", encoding="utf-8") as f:
    f.write(page)
  os.replace(f"{path}.tmp", path)
  return path


def _json(path):
  if not os.path.exists(path):
    return None
  with open(path, encoding="utf-8") as f:
    try:
      return json.load(f)
    except ValueError as e:
      raise ValueError(f"{path} must be JSON. Received: {e}") from e


def _kept_rollouts(folder, metrics):
  """The rollouts in order of time; where they are too many for a page, the middle of the run goes first."""
  found = {}
  for name in os.listdir(folder) if os.path.isdir(folder) else ():
    match = re.fullmatch(r"(before|after|step_(\d+))\.jsonl", name)
    if match:
      found[match[1]] = int(match[2] or 0)
  steps = sorted((name for name in found if name.startswith("step_")), key=found.get)
  wanted = [name for name in ("after", "before") if name in found] + steps[::-1]
  kept, room = {}, _GALLERY_BYTES
  for name in wanted:
    entries = []
    for item in gallery.load(os.path.join(folder, f"{name}.jsonl")):
      room -= len(json.dumps(item))
      if room < 0:
        break
      entries.append(item)
    if entries:
      kept[name] = entries
    if room < 0:
      break
  last = max((line["step"] for line in metrics if isinstance(line.get("step"), int)), default=-1) + 1
  in_time = [("before", 0, "Before")] + [(name, found[name], f"Step {found[name]}") for name in steps]
  in_time.append(("after", last, "After"))
  return [{"step": step, "label": label, "entries": kept[name]}
          for name, step, label in in_time if name in kept]


def _header(config, metrics, before, after, title):
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
  kind = "ViRL training report" if metrics or before or after else "ViRL"
  return (f'<header class="top"><p class="eyebrow">{kind}</p>'
          f'<h1>{trajectory.escape(title)}</h1>'
          f'<p class="facts">{" · ".join(trajectory.escape(fact) for fact in facts)}</p></header>')


def _cards(config, before, after, difference):
  h0 = trajectory.escape((config.get("reward") or {}).get("h0", "h0"))
  cards = "".join(_card(key, name, meaning.format(h0=h0), share, _interval(before.get(key)),
                        _interval(after.get(key)), _interval(difference.get(key)), bool(after))
                  for key, name, meaning, share in _CARDS
                  if _interval(before.get(key)) or _interval(after.get(key)))
  key = ('<p class="fine">Held-out tasks, with 95% intervals. '
         '<span class="dot was"></span> before <span class="dot now"></span> after training.</p>')
  return f'<section><h2>Before and after</h2>{key}<div class="cards">{cards}</div></section>'


def _card(key, name, meaning, share, before, after, difference, ended):
  shown = after if ended else before  # nothing to measure after training (no zoom is right) is not what was before
  value = _format(shown and shown[0], share)
  was = ""
  if before and ended:
    was = f'<p class="was">from {_format(before[0], share)}{_range(before, share)}</p>'
  now = f'<p class="now">{value}<span>{_range(shown, share)}</span></p>'
  return (f'<div class="card" data-measure="{key}"><h3>{name}</h3>{now}{was}'
          f'{_change(before, after, difference, share, judged=key != "rationale_count")}'
          f'{_strip(before, after, 1.0 if share or key == "mean_iou" else None)}'
          f'<p class="fine">{meaning}</p></div>')


def _change(before, after, difference, share, judged):
  if difference is None and not (before and after):
    return ""
  value, low, high = difference or (after[0] - before[0], None, None)
  arrow = "▲" if value > 0 else "▼" if value < 0 else "■"
  sure = low is not None and high is not None and (low > 0 or high < 0)
  kind = ("good" if value > 0 else "bad") if sure and judged else "sure" if sure else ""
  sign = "+" if value > 0 else ""
  return (f'<p class="change {kind}">{arrow} {sign}{_format(value, share, points=True)}'
          f'{_range((value, low, high), share)}</p>')


def _strip(before, after, top):
  """The two intervals on one axis."""
  ends = [v for e in (before, after) if e for v in e if v is not None]
  top = top or max(ends, default=0.0) * 1.1 or 1.0
  rows = []
  for y, name, e in ((7, "was", before), (17, "now", after)):
    if e:
      x, low, high = (None if v is None else 4 + 192 * min(max(v / top, 0.0), 1.0) for v in e)
      if low is not None and high is not None:
        rows.append(f'<line class="{name}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>')
      rows.append(f'<circle class="{name}" cx="{x:.1f}" cy="{y}" r="3.6"/>')
  return (f'<svg class="strip" viewBox="0 0 200 26" aria-hidden="true"><line class="axis" x1="4" x2="196" '
          f'y1="24" y2="24"/>{"".join(rows)}</svg>')


def _tables(before, after):
  out = []
  kinds = sorted({*(before.get("by_kind") or {}), *(after.get("by_kind") or {})})
  if kinds:
    rows = []
    for kind in kinds:
      b, a = ((summary.get("by_kind") or {}).get(kind) or {} for summary in (before, after))
      cells = "".join(f"<td>{_arrow(b.get(key), a.get(key), share, bool(after))}</td>" for key, _, share in _BY_KIND)
      rows.append(f'<tr><th scope="row">{trajectory.escape(kind or "–")}</th>'
                  f'<td>{trajectory.escape(a.get("n", b.get("n", "–")))}</td>{cells}</tr>')
    heads = "".join(f"<th>{name}</th>" for _, name, _ in _BY_KIND)
    out.append(f'<div class="wide"><h3>By kind of task</h3><div class="scroll"><table>'
               f'<thead><tr><th>Kind</th><th>n</th>{heads}</tr></thead>'
               f'<tbody>{"".join(rows)}</tbody></table></div></div>')
  rest = [(name, before.get(key), after.get(key), share) for key, name, share in _OTHER
          if _interval(before.get(key)) or _interval(after.get(key))]
  if rest:
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{_arrow(b, a, share, bool(after))}</td></tr>'
                   for name, b, a, share in rest)
    out.append(f'<div><h3>Also measured</h3><div class="scroll"><table><tbody>{rows}</tbody></table>'
               f'</div></div>')
  return f'<section class="tables">{"".join(out)}</section>' if out else ""


def _begun(config, metrics):
  """The alarms of a run by monitor, in order of the first: a monitor's number in the page is its place."""
  section = config.get("monitor") or {}  # runs once had none
  known = {f.name: section[f.name] for f in dataclasses.fields(monitors.Config) if f.name in section}
  steps = [line for line in metrics if _is_number(line.get("step"))]
  found = {}
  for alarm in monitors.all_begun(steps, monitors.Config(**known)):
    found.setdefault(alarm.name, []).append(alarm)
  return list(found.values())


def _alarms(alarms):
  items = []
  for of_one in alarms:
    steps = [str(alarm.step) for alarm in of_one]
    more = f" and {len(steps) - _ALARM_STEPS} more" if len(steps) > _ALARM_STEPS else ""
    when = f"from step{'s' * (len(steps) > 1)} {', '.join(steps[:_ALARM_STEPS])}{more}"
    items.append(f'<li><b>{trajectory.escape(_spoken(of_one[0]))}</b> {when}: '
                 f'{trajectory.escape(of_one[0].message)}.</li>')
  shown = f'<ol class="alarms">{"".join(items)}</ol>' if items else '<p class="fine">none</p>'
  return f"<section><h2>Alarms</h2>{shown}</section>"


def _spoken(alarm):
  return alarm.name.replace("_", " ")


def _curves(metrics, before, after, alarms):
  marks = sorted((alarm.step, str(i), f"step {alarm.step}: {_spoken(alarm)} begins")
                 for i, of_one in enumerate(alarms, start=1) for alarm in of_one)
  groups = []
  for heading, charts in _CHARTS:
    drawn = []
    for key, name, how in charts:
      points = [(line["step"], line[key]) for line in metrics
                if _is_number(line.get(key)) and _is_number(line.get("step"))]
      if points:
        ends = {"before": before.get(key), "after": after.get(key)} if heading == "Behaviour" else {}
        drawn.append(f'<div class="chart">{curves.svg(points, name, subtitle=key, marks=marks, **how, **ends)}</div>')
    if drawn:
      groups.append(f'<h3>{heading}</h3><div class="charts">{"".join(drawn)}</div>')
  held_out = " Diamonds: held-out tasks before and after." if before or after else ""
  numbers = " Numbered lines: where an alarm begins." if marks else ""
  return (f'<section><h2>Training</h2><p class="fine">Thin line: each step. Bold line and its label: '
          f'moving average.{held_out}{numbers}</p>{"".join(groups)}</section>')


def _gallery(shown):
  """Kept rollouts behind radio buttons: choosing one needs no script."""
  radios, labels, panes, rules = [], [], [], []
  for i, kept in enumerate(shown):
    checked = " checked" if i == len(shown) - 1 else ""
    radios.append(f'<input type="radio" name="kept" id="kept{i}"{checked}>')
    labels.append(f'<label for="kept{i}">{trajectory.escape(kept["label"])}</label>')
    panes.append(f'<div class="pane">{"".join(trajectory.render(item) for item in kept["entries"])}</div>')
    rules.append(f"#kept{i}:checked~.panes>:nth-child({i + 1}){{display:block}}"
                 f"#kept{i}:checked~.picks>:nth-child({i + 1}){{background:var(--ink);color:var(--paper)}}"
                 f"#kept{i}:focus-visible~.picks>:nth-child({i + 1}){{outline:2px solid var(--accent)}}")
  legend = ('<p class="legend"><span><i class="truth"></i>ground truth</span>'
            + "".join(f'<span><i class="{name}"></i>{name} zoom</span>' for name in trajectory.CLASSES)
            + "</p>")
  return (f'<section class="gallery"><h2>Trajectories</h2>{legend}<style>{"".join(rules)}</style>'
          f'{"".join(radios)}<div class="picks"{" hidden" * (len(shown) == 1)}>{"".join(labels)}</div>'
          f'<div class="panes">{"".join(panes)}</div></section>')


def _config(config):
  rows = "".join(f'<tr><th scope="row">{trajectory.escape(key)}</th><td>{trajectory.escape(value)}</td></tr>'
                 for key, value in _flat(config))
  return (f'<section><details><summary>Configuration</summary><div class="scroll">'
          f'<table class="config"><tbody>{rows}</tbody></table></div></details></section>')


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


def _format(value, share, points=False):
  if value is None:
    return "–"
  if share:
    return f"{100 * value:.1f}{' pts' if points else '%'}".replace("-", "−")
  return f"{value:.2f}".replace("-", "−")


def _range(interval, share):
  if interval is None or interval[1] is None or interval[2] is None:
    return ""
  low, high = (f"{100 * v:.1f}" if share else f"{v:.2f}" for v in interval[1:])
  return f' <small>{low.replace("-", "−")} to {high.replace("-", "−")}</small>'


def _arrow(before, after, share, ended):
  b, a = _interval(before), _interval(after)
  now = _format(((a if ended else b) or (None,))[0], share)
  return f'<span class="from">{_format(b[0], share)} →</span> {now}' if b and ended else now


def _is_number(value):
  return isinstance(value, (int, float)) and not isinstance(value, bool)
