"""The report of a curation: how many tasks were left at each stage, what they were like before and after, and examples.

One HTML file, in the style of a run's report and made with the same template engine: all text of tasks is escaped, no
script may run, and pictures are data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from virl_jax.report import html
from virl_jax.report import page

_COVERAGE = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.9)  # ends of bins, shares of the picture
_MEGAPIXELS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_RATES = (0.0, 0.25, 0.5, 0.75, 0.999)
_MOST_BARS = 12
_STAGES = {"rules": "after rules", "policy": "after policy generation", "filter": "after reasoning-centric filtering"}


def render(found: dict) -> str:
  """Makes the page.

  Args:
    found: title; counts, as in counts.json; lines, as in tasks.jsonl and rejects.jsonl; examples, such lines with
      question, options, answers, picture (a data URI or None) and rects (x, y, width, height in pixels); config,
      nested.

  Returns:
    A whole HTML document, the same for the same tasks.
  """
  counts = found["counts"]
  return page.plain("sieve.html.j2", {
      "title": found["title"], "facts": _facts(counts), "steps": _steps(counts), "dropped": _dropped(counts),
      "sources": list(counts["read"]["sources"]), "charts": _charts(found["lines"]),
      "groups": _groups(found["examples"]), "config": html.flat(found["config"])})


def _facts(counts) -> list[str]:
  n, kept = counts["read"]["all"], counts["kept"]["all"]
  return [f"{n:,} tasks read", f"{kept:,} kept", f"{100 * kept / max(n, 1):.1f}%", f"{len(counts['read']['sources'])} "
          f"source{'' if len(counts['read']['sources']) == 1 else 's'}"]


def _steps(counts) -> list[dict]:
  """The funnel: how many tasks are left after each stage, in all and by source."""
  steps = [("read", counts["read"]), *((_STAGES[name], it) for name, it in counts["after"].items())]
  return [{"name": name, "n": it["all"], "share": it["all"] / max(counts["read"]["all"], 1),
           "cells": [(it["sources"].get(source, 0), it["sources"].get(source, 0) / n)
                     for source, n in counts["read"]["sources"].items()]} for name, it in steps]


def _dropped(counts) -> list[dict]:
  return [{"stage": it["stage"], "reason": it["reason"], "n": it["n"]["all"],
           "share": it["n"]["all"] / max(counts["read"]["all"], 1),
           "cells": [it["n"]["sources"].get(source, 0) for source in counts["read"]["sources"]]}
          for it in counts["dropped"]]


def _charts(lines: Sequence[dict]) -> list[dict]:
  """Distributions before and after, over tasks whose value is known."""
  percent = lambda v: f"{100 * v:g}%"
  seen = [line for line in lines if line["width"]]
  boxed = [line for line in seen if line["boxes"]]
  found = [
      _chart("Share of the picture in boxes", boxed, _binned(lambda it: it["coverage"], _COVERAGE, percent)),
      _chart("Picture, megapixels", seen, _binned(lambda it: it["width"] * it["height"] / 1e6, _MEGAPIXELS,
                                                  lambda v: f"{v:g}")),
      _chart("Question", lines, (lambda it: it["question_type"], None)),
      _chart("Answer", lines, (lambda it: it["answer_type"], None)),
      _chart("Kind", lines, (lambda it: it["kind"] or "–", None))]
  for key, name in (("pass_with", "Solved with zooms"), ("pass_without", "Solved without zooming")):
    asked = [line for line in lines if line[key] is not None]
    rate = lambda it, key=key: it[key]
    found.append(_chart(f"{name}, share of samples", asked, _binned(rate, _RATES, percent, closed=True)))
  return [chart for chart in found if chart["rows"]]


def _binned(value: Callable[[dict], float], ends: Sequence[float], name: Callable[[float], str], closed: bool = False):
  """A function that names a line's bin, and the names of all bins in order; `closed` bins include their upper end."""
  if closed:
    names = ["none", *(f"{name(low)} to {name(high)}" for low, high in zip(ends[:-1], [*ends[1:-1], 1.0])), "all"]
    return lambda it: names[sum(value(it) > end for end in ends)], names
  names = [f"below {name(ends[0])}", *(f"{name(low)} to {name(high)}" for low, high in zip(ends, ends[1:])),
           f"from {name(ends[-1])}"]
  return lambda it: names[sum(value(it) >= end for end in ends)], names


def _chart(title, lines, how) -> dict:
  of, names = how
  before, after = {}, {}
  for line in lines:
    it = of(line)
    before[it] = before.get(it, 0) + 1
    if "reason" not in line:
      after[it] = after.get(it, 0) + 1
  if names is None:  # the most frequent
    names = sorted(before, key=lambda it: (-before[it], it))
    rest = names[_MOST_BARS:]
    if rest:
      names = [*names[:_MOST_BARS], "others"]
      for counts in (before, after):
        counts["others"] = counts.get("others", 0) + sum(counts.pop(it, 0) for it in rest)
  n_before, n_after = sum(before.values()), sum(after.values())
  top = max([counts.get(it, 0) / n for counts, n in ((before, n_before), (after, n_after)) if n for it in names],
            default=0.0) or 1.0
  row = lambda it, counts, n: {"n": counts.get(it, 0), "share": counts.get(it, 0) / n if n else 0.0,
                               "width": 100 * counts.get(it, 0) / n / top if n else 0.0}
  return {"title": title, "n": n_before, "n_after": n_after,
          "rows": [{"name": it, "before": row(it, before, n_before), "after": row(it, after, n_after)} for it in names]
          if n_before else []}


def _groups(examples: Sequence[dict]) -> list[dict]:
  """Examples by reason, in the given order."""
  groups: dict[str, list[dict]] = {}
  for it in examples:
    groups.setdefault(it["reason"], []).append(it)
  return [{"reason": reason, "stage": its[0].get("stage", ""), "tasks": its} for reason, its in groups.items()]
