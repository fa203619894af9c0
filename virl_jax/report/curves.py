"""Line charts as SVG text: no plotting library, crisp at any size, for light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
import html
import math
import statistics

_WIDTH, _HEIGHT = 360, 196
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 54, 34, 24  # margins around the plot: tick labels, last value, title
_MAX_DRAWN = 400    # more points than this can't be told apart at this width
_MAX_HOVER = 120    # each hover target is a separate element
_ACCENT = "var(--accent, #1f6fb5)"
_OTHER = "var(--other, #8a63d2)"
_ALERT = "var(--bad, #b8420b)"
_FONT = "font-family:system-ui,-apple-system,'Segoe UI',sans-serif;font-variant-numeric:tabular-nums"


def svg(points: Sequence[tuple[float, float]], title: str, *, subtitle: str = "", log: bool = False,
        zero: bool = False, cap: float | None = None, marks: Sequence[tuple[float, str, str]] = (),
        before: dict | float | None = None, after: dict | float | None = None,
        beside: Sequence[tuple[float, float]] = ()) -> str:
  """Draws one quantity over the steps of a run.

  The thin line is the raw values, the bold one their moving average, whose last value is labelled.
  Colours come from `currentColor` and from the CSS variables --accent and --bad, where the page sets them.

  Args:
    points: (x, y) in order of x; where y is NaN or infinite the line is broken.
    title: what is drawn.
    subtitle: in smaller, paler letters beside the title.
    log: whether y is logarithmic; values that are not positive are then left out.
    zero: whether the y axis always includes 0; without effect if `log`.
    cap: values above this many times the median (> 0) are drawn as triangles at the top edge and left out of
      the average, so that one slow first step does not flatten all the others.
    marks: (x, tag, label) in order of x, moments that get a vertical line; the tag, a few characters, is above it,
      the label is shown on hovering.
    before: an evaluation before the run, drawn at the left edge: its value, or value, low and high.
    after: the same after the run, at the right edge.
    beside: the same quantity of a second run, of which only the moving average is drawn, dashed, in --other.

  Returns:
    One <svg> element, well-formed XML that refers to nothing outside of it.
  """
  kept = [(float(x), float(y)) for x, y in points if math.isfinite(x)]
  shown = [(x, y) for x, y in kept if _drawable(y, log)]
  outliers: list[tuple[float, float]] = []
  if cap is not None and shown:
    limit = cap * statistics.median(y for _, y in shown)
    outliers = [(x, y) for x, y in shown if y > limit > 0]
    if outliers:
      shown = [(x, y) for x, y in shown if y <= limit]
      kept = [(x, y) for x, y in kept if not y > limit]
  ends = [(side, e) for side, e in (("before", _interval(before)), ("after", _interval(after)))
          if e is not None and _drawable(e[0], log)]
  head = (f'<svg xmlns="http://www.w3.org/2000/svg" class="curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
          f'role="img" aria-label="{html.escape(title)}" fill="currentColor" style="{_FONT}">'
          f'<text x="2" y="14" font-size="12.5" font-weight="600">{html.escape(title)}'
          f'<tspan dx="6" font-weight="400" font-size="10.5" fill-opacity=".55">{html.escape(subtitle)}'
          f'</tspan></text>')
  others = [(float(x), float(y)) for x, y in beside if math.isfinite(x) and _drawable(y, log)]
  if cap is not None and others:
    limit = cap * statistics.median(y for _, y in others)
    others = [(x, y) for x, y in others if not y > limit > 0]
  if not shown and not ends and not others:
    return head + _text(_WIDTH / 2, _HEIGHT / 2 + 8, "no values", "middle", size=11) + "</svg>"

  xs = [x for x, _ in shown + outliers + others]
  at_x = _scale(xs or [0.0, 1.0], _LEFT, _WIDTH - _RIGHT, pad=0.0)
  values = [y for _, y in shown + others] + [v for _, e in ends for v in e if _drawable(v, log)]
  values += [0.0] if zero and not log else []
  at_y, y_ticks = _y_axis(values, log)
  parts = [head, _grid(at_x, at_y, y_ticks, bool(xs))]
  parts.append(_marks([mark for mark in marks if at_x.low <= mark[0] <= at_x.high], at_x))
  if others:
    parts.append(_second(others, at_x, at_y, log))
  parts.append(_lines(kept, shown, at_x, at_y, log))
  for x, y in outliers:
    parts.append(f'<path class="outlier" d="M{at_x(x):.1f} {_TOP}l4 7h-8z" style="fill:{_ACCENT}">'
                 f'<title>step {number(x)}: {number(y)}</title></path>')
  for side, e in ends:
    parts.append(_end(side, e, at_y, log))
  return "".join(parts) + "</svg>"


def number(value: float | None) -> str:
  """At most three significant digits, thousands as k, millions as M, billions as G; a dash for a missing value."""
  if value is None or math.isnan(value):
    return "–"
  if math.isinf(value):
    return "∞" if value > 0 else "−∞"
  size = abs(value)
  for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
    if size >= limit:
      return _minus(f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}")
  if size == 0:
    return "0"
  if size < 1e-3:
    mantissa, exponent = f"{value:.1e}".split("e")
    return _minus(f"{mantissa.removesuffix('.0')}e{int(exponent)}")
  return _minus(f"{value:.0f}" if size >= 100 else f"{value:.3g}")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Round numbers (1, 2 or 5 times a power of ten) inside [low, high], about `count` of them."""
  if not high > low:
    return [low]
  rough = (high - low) / count
  base = 10.0 ** math.floor(math.log10(rough))
  step = base * next(m for m in (1, 2, 5, 10) if m * base >= rough * 0.999)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [i * step for i in range(first, last + 1)]


def smooth(ys: Sequence[float]) -> list[float]:
  """An exponential moving average over about a twelfth of the points, unbiased from the first point on."""
  alpha = 2.0 / (max(3.0, len(ys) / 12.0) + 1.0)
  mean, weight, out = 0.0, 0.0, []
  for y in ys:
    mean = (1 - alpha) * mean + alpha * y
    weight = (1 - alpha) * weight + alpha
    out.append(mean / weight)
  return out


class _scale:
  """A linear (or logarithmic) map from values to pixels; a single value is in the middle."""

  def __init__(self, values, low_px, high_px, pad, log=False):
    self.low, self.high = min(values), max(values)
    self._px, self._log = (low_px, high_px), log
    a, b = (math.log10(self.low), math.log10(self.high)) if log else (self.low, self.high)
    if b - a <= 1e-12 * max(abs(a), abs(b)):
      half = 0.5 if log else (abs(a) * 0.1 or 0.5)
      a, b = a - half, b + half
    self._a, self._b = a - pad * (b - a), b + pad * (b - a)

  def __call__(self, value):
    share = ((math.log10(value) if self._log else value) - self._a) / (self._b - self._a)
    return self._px[0] + share * (self._px[1] - self._px[0])

  @property
  def domain(self):
    return (10 ** self._a, 10 ** self._b) if self._log else (self._a, self._b)


def _y_axis(values, log):
  bottom, top = _HEIGHT - _BOTTOM, _TOP
  if log:
    first = math.floor(math.log10(min(values)) + 1e-9)
    last = max(first + 1, math.ceil(math.log10(max(values)) - 1e-9))
    every = math.ceil((last - first) / 5)
    return (_scale([10.0 ** first, 10.0 ** last], bottom, top, 0.0, log=True),
            [10.0 ** e for e in range(first, last + 1, every)])
  at_y = _scale(values, bottom, top, 0.06)
  low, high = at_y.domain
  if min(values) == 0 < max(values):  # nothing is below 0: let the axis begin there
    at_y = _scale([0.0, high], bottom, top, 0.0)
    low = 0.0
  return at_y, ticks(low, high)


def _grid(at_x, at_y, y_ticks, has_steps):
  right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
  out = []
  for y in y_ticks:
    out.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}" '
               f'stroke="currentColor" stroke-opacity=".12"/>')
    out.append(_text(_LEFT - 6, at_y(y) + 3.5, number(round(y, 12)), "end"))
  if has_steps:
    whole = {round(x) for x in ticks(at_x.low, at_x.high)} if at_x.high - at_x.low >= 1 else {at_x.low}
    out += [_text(at_x(x), bottom + 15, number(x), "middle") for x in sorted(whole)
            if at_x.low <= x <= at_x.high]
  return "".join(out)


def _marks(marks, at_x):
  out, free = [], 0.0
  for x, tag, label in marks:
    out.append(f'<g class="mark"><title>{html.escape(label)}</title><line x1="{at_x(x):.1f}" x2="{at_x(x):.1f}" '
               f'y1="{_TOP - 4}" y2="{_HEIGHT - _BOTTOM}" style="stroke:{_ALERT}" stroke-opacity=".7" '
               f'stroke-dasharray="2 3"/>')
    wide = 3.2 * len(tag) + 1
    at = max(at_x(x), free + wide)  # beside the tag before, but not so far that it seems to be another mark's
    if at - at_x(x) <= 10:
      free = at + wide
      out.append(f'<text x="{at:.1f}" y="{_TOP - 6}" font-size="10" font-weight="600" text-anchor="middle" '
                 f'style="fill:{_ALERT}">{html.escape(tag)}</text>')
    out.append("</g>")
  return "".join(out)


def _average(shown, log):
  return [10 ** y if log else y for y in smooth([math.log10(y) if log else y for _, y in shown])]


def _second(shown, at_x, at_y, log):
  """A second run's moving average, and its last value."""
  bold = [(x, y) for (x, _), y in zip(shown, _average(shown, log), strict=True)]
  bold = bold[:-1:math.ceil(len(bold) / _MAX_DRAWN)] + bold[-1:]
  path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in bold)
  x, y = bold[-1]
  return (f'<g class="other"><polyline points="{path}" fill="none" style="stroke:{_OTHER}" stroke-width="1.8" '
          f'stroke-dasharray="5 3"/><text x="{at_x(x) + 7:.1f}" y="{at_y(y) + 4:.1f}" font-size="10.5" '
          f'style="fill:{_OTHER}">{number(y)}</text></g>')


def _lines(kept, shown, at_x, at_y, log):
  if not shown:
    return ""
  average = _average(shown, log)
  runs, run = [], []
  for x, y in [*kept, (0.0, math.nan)]:  # a gap in the values is a gap in the line
    if _drawable(y, log):
      run.append((x, y))
    elif run:
      runs, run = [*runs, run], []
  out = []
  for run in runs:
    if len(run) == 1:
      out.append(f'<circle class="raw" cx="{at_x(run[0][0]):.1f}" cy="{at_y(run[0][1]):.1f}" r="2" '
                 f'style="fill:{_ACCENT}" fill-opacity=".5"/>')
    else:
      out.append(_polyline("raw", _thin(run), at_x, at_y, 'stroke-width="1" stroke-opacity=".38"'))
  bold = [(x, y) for (x, _), y in zip(shown, average, strict=True)]
  stride = math.ceil(len(bold) / _MAX_DRAWN)
  bold = bold[:-1:stride] + bold[-1:]
  if len(bold) > 1:
    out.append(_polyline("ema", bold, at_x, at_y, 'stroke-width="2.2" stroke-linejoin="round"'))
  x, y = bold[-1]
  out.append(f'<circle class="last" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3" style="fill:{_ACCENT}"/>')
  out.append(f'<text class="value" x="{at_x(x) + 7:.1f}" y="{at_y(y) + 4:.1f}" font-size="11.5" '
             f'font-weight="600" style="fill:{_ACCENT}">{number(y)}</text>')
  stride = math.ceil(len(shown) / _MAX_HOVER)
  for (x, y), mean in list(zip(shown, average, strict=True))[::-stride]:
    out.append(f'<circle class="hover" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="5" fill-opacity="0">'
               f'<title>step {number(x)}: {number(y)} (average {number(mean)})</title></circle>')
  return "".join(out)


def _thin(run):
  """At most about _MAX_DRAWN points that keep each stretch's lowest and highest, so no spike is lost."""
  size = math.ceil(2 * len(run) / _MAX_DRAWN)
  if size <= 2:
    return run
  kept = []
  for i in range(0, len(run), size):
    stretch = run[i:i + size]
    kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
  return kept


def _polyline(name, points, at_x, at_y, more):
  path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
  return f'<polyline class="{name}" points="{path}" fill="none" style="stroke:{_ACCENT}" {more}/>'


def _end(side, interval, at_y, log):
  value, low, high = interval
  x = _LEFT if side == "before" else _WIDTH - _RIGHT
  y = at_y(value)
  bar = ""
  if _drawable(low, log) and _drawable(high, log):
    bar = (f'<line x1="{x}" x2="{x}" y1="{at_y(low):.1f}" y2="{at_y(high):.1f}" stroke="currentColor" '
           f'stroke-width="1.5" stroke-opacity=".6"/>')
  fill = "fill-opacity=\".8\"" if side == "after" else 'style="fill:var(--paper, #fff)"'
  return (f'<g class="{side}">{bar}<path d="M{x} {y - 4.5:.1f}l4.5 4.5l-4.5 4.5l-4.5 -4.5z" '
          f'stroke="currentColor" stroke-width="1.3" {fill}/>'
          f'<title>{side} training, held-out tasks: {number(value)}</title></g>')


def _interval(value) -> tuple[float, float, float] | None:
  """(value, low, high); low and high are NaN if not known."""
  if value is None:
    return None
  if not isinstance(value, dict):
    return float(value), math.nan, math.nan
  if value.get("value") is None:
    return None
  return tuple(math.nan if value.get(k) is None else float(value[k]) for k in ("value", "low", "high"))


def _drawable(y, log):
  return math.isfinite(y) and (y > 0 or not log)


def _text(x, y, text, anchor, size=10):
  return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill-opacity=".6">'
          f'{html.escape(text)}</text>')


def _minus(text):
  return text.replace("-", "−", 1) if text.startswith("-") else text
