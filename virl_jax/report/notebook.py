"""What a notebook shows of runs: pages, curves, trajectories and words, as objects that Jupyter and Colab display.

None of it needs IPython, and text of models and data sets is never treated as markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import html as markup
import math

from virl_jax.report import curves
from virl_jax.report import html
from virl_jax.report import page as page_lib

_PAGE_PX = 640          # height of a frame
_CURVE_PX = 200         # least width of a curve
_WORDS_PX = 300         # the same for `side_by_side`
# The colours of page.css for values below and above the middle.
_LESS, _MORE = "232,84,44", "43,143,230"
# What a token's colour can show: its name on the page, the middle, and the least distance from it for full colour.
_COLOURS = {"logp": ("log-probability, nats", 0.0, 2.0), "advantage": ("advantage", 0.0, 1e-9),
            "modulator": ("modulator", 1.0, 0.1), "gap": ("trainer less sampler, nats", 0.0, 1e-6)}


@dataclasses.dataclass(frozen=True)
class Shown:
  """Markup that a notebook displays if it is a cell's last value.

  Attributes:
    html: the markup.
  """

  html: str

  def _repr_html_(self) -> str:
    return self.html


def page(document: str, height_px: int = _PAGE_PX) -> Shown:
  """A whole HTML document in a frame, isolated from the notebook's own page.

  Args:
    document: the document, such as `html.render` gives.
    height_px: of the frame.
  """
  # There is no allow-same-origin, so the document's script sees nothing of the notebook.
  return Shown('<iframe sandbox="allow-scripts" style="width:100%;border:1px solid #8886;border-radius:6px" '
               f'height="{int(height_px)}" srcdoc="{markup.escape(document)}"></iframe>')


def trajectories(entries: Sequence[dict], title: str, height_px: int = _PAGE_PX) -> Shown:
  """The report's viewer.

  Args:
    entries: as `gallery.entry` gives them.
    title: above them.
    height_px: of the frame.
  """
  return page(html.render(html.Run(title, kept=[("", list(entries))])), height_px)


def charts(lines: Sequence[dict], names: Sequence[str]) -> Shown:
  """A curve for each name, side by side.

  Args:
    lines: of metrics.jsonl, as `log.read` gives them.
    names: of metrics; those that no line has are left out.
  """
  found = [(name, [(line["step"], line[name]) for line in lines if name in line]) for name in names]
  return _row((curves.svg(points, name) for name, points in found if points), _CURVE_PX, 1.5 * _CURVE_PX)


def words(entry: dict, by: str) -> Shown:
  """What the policy wrote in one trajectory, a colour behind each token: blue for more, orange for less.

  Args:
    entry: as `gallery.entry` gives it, with tokens.
    by: "logp", "advantage", "modulator" or "gap".

  Raises:
    ValueError: `by` is none of these, or the entry does not have it for its tokens.
  """
  if by not in _COLOURS:
    raise ValueError(f"by must be one of {', '.join(_COLOURS)}. Received: {by!r}")
  name, middle, least = _COLOURS[by]
  said = [(turn["tokens"]["text"], turn["tokens"][by]) for turn in entry["turns"] if by in turn.get("tokens", {})]
  if not said:
    raise ValueError(f"entry must have {by} of each token. Received: an entry without it")
  said = [(texts, values if isinstance(values, list) else [values] * len(texts)) for texts, values in said]
  far = max([least, *(abs(v - middle) for _, values in said for v in values if v is not None)])
  turns = "".join(f'<div style="margin:4px 0">{"".join(map(_token(middle, far), texts, values))}</div>'
                  for texts, values in said)
  return Shown(f'<div style="font:13px/1.9 ui-monospace,monospace;white-space:pre-wrap;max-width:60em">'
               f'<b>{name}</b> (full colour: {curves.number(far)} from {curves.number(middle)}){turns}</div>')


def side_by_side(*shown: Shown) -> Shown:
  """Several in a row, or below each other if there is no room."""
  return _row((each.html for each in shown), _WORDS_PX)


def _row(parts: Iterable[str], least_px: float, most_px: float = math.inf) -> Shown:
  most = f";max-width:{most_px:g}px" if most_px < math.inf else ""
  cells = "".join(f'<div style="flex:1 1 {least_px:g}px{most}">{part}</div>' for part in parts)
  return Shown(f'<div style="display:flex;flex-wrap:wrap;gap:16px">{cells}</div>')


def _token(middle: float, far: float):
  def token(text: str, value: float | None) -> str:
    by = 0.0 if value is None else max(-1.0, min(1.0, (value - middle) / far))
    told = "" if value is None else curves.number(value)
    return (f'<span title="{told}" style="border-radius:3px;padding:2px 0;background:rgba({_LESS if by < 0 else _MORE},'
            f'{0.7 * abs(by):.2f})">{markup.escape(page_lib.visible(text))}</span>')
  return token
