"""One trajectory as HTML: the picture with its boxes, then turn by turn what the policy wrote and saw.

Everything a model or a data set wrote is hostile text here: it reaches the page through `escape`.
"""

from __future__ import annotations

from collections.abc import Sequence
import html
import re

from virl_jax.report import curves

CLASSES = ("correct", "redundant", "erroneous")
_LONGEST_TEXT = 12000  # characters shown of one turn
_TINY_CROP_PX = 96     # smaller crops are enlarged on the page, pixel by pixel
_IMAGE_URI = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}")
_SPECIAL = re.compile(r"(<\|[A-Za-z0-9_/]{1,40}\|>|</?(?:think|answer|tool_call|tool_response|tools)>)")
_REPEATED = re.compile(r"(<\|(?:image|video)_pad\|>)\1+")
# Control characters, lone surrogates and marks that reorder text: they could make a page unreadable or
# make it say what the model did not.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def render(item: dict) -> str:
  """Draws one entry of `report.gallery`.

  Args:
    item: what `gallery.entry` returns.

  Returns:
    One <article> element.
  """
  turns, action = [], 0
  for turn in item["turns"]:
    if turn["box"] is not None:
      action += 1
    turns.append(_turn(turn, action))
  figure = picture(item)
  return (f'<article class="traj">{_head(item)}<div class="cols">{figure}'
          f'<ol class="turns">{"".join(turns)}</ol></div></article>')


def picture(item: dict) -> str:
  """The picture with ground-truth boxes (dashed) and the policy's boxes (numbered, by class) over it.

  Args:
    item: what `gallery.entry` returns.

  Returns:
    One <figure> element.  The overlay's units are pixels of the original picture.
  """
  width, height = int(item["width"]), int(item["height"])
  classes = [turn["class"] for turn in item["turns"] if turn["box"] is not None]
  rects, tags = [], []
  rows: list[list[float]] = []  # of numbers that stand side by side: left %, top %, how many
  for k, (box, name) in enumerate(zip(item["boxes"], classes, strict=True), start=1):
    if None in box:
      continue
    kind = name if name in CLASSES else "plain"
    rects.append(_rect(box, kind, f"zoom {k}: {name or 'not graded'}"))
    left, top, row = _corner(box, width, height, rows)
    tags.append(f'<span class="tag {kind}" style="left:min({left:.2f}% + {19 * row}px,100% - 18px);'
                f'top:max({top:.2f}% - 19px,0px)">{k}</span>')
  # Dashed and on top: a zoom that matches the evidence must not hide it.
  rects += [_rect(box, "truth", "ground truth") for box in item["boxes_gt"] if None not in box]
  uri = safe_image(item["image"])
  image = f'<img src="{uri}" alt="the picture that the question is about">' if uri else ""
  crisp = " pixels" if max(width, height) <= 300 else ""
  return (f'<figure class="pic"><div class="stage{crisp}" style="aspect-ratio:{width}/{height}">{image}'
          f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">'
          f'{"".join(rects)}</svg>{"".join(tags)}</div>'
          f'<figcaption>{width} × {height} px</figcaption></figure>')


def escape(text: object) -> str:
  """Text that is safe between tags and inside quoted attributes, with nothing invisible left in it."""
  return html.escape(_UNSEEN.sub("\ufffd", str(text).replace("\r\n", "\n")))


def transcript(text: str) -> str:
  """Escapes what a turn holds and marks its special tokens, so that a style can dim them."""
  text = _REPEATED.sub(lambda m: f"{m[1]}×{len(m[0]) // len(m[1])}", text.strip("\n"))
  more = len(text) - _LONGEST_TEXT
  out = [f'<span class="sp">{escape(piece)}</span>' if i % 2 else escape(piece)
         for i, piece in enumerate(_SPECIAL.split(text[:_LONGEST_TEXT]))]
  if more > 0:
    out.append(f'<span class="sp"> … {more} more characters</span>')
  return "".join(out)


def safe_image(uri: str | None) -> str | None:
  """The data URI of a picture as it is, or None for anything else."""
  return uri if uri and _IMAGE_URI.fullmatch(uri) else None


def signed(value: float | None) -> str:
  """A number with its sign, two decimals."""
  return "–" if value is None else f"{value:+.2f}".replace("-", "−")


def _head(item):
  chips = []
  if item["answers"]:  # without an accepted answer there is no right and wrong
    chips.append(_chip("right", "good") if item["correct"] else _chip("wrong", "bad"))
  stop = (item["stop"] or "unfinished").replace("_", " ")
  chips.append(_chip(stop, "" if stop == "answered" else "warn"))
  chips += [_chip(f"{name} {signed(item[name])}") for name in ("reward", "advantage")
            if item[name] is not None]
  options = "".join(f"<li>{escape(option)}</li>" for option in item["options"] or ())
  answers = [("answer", item["answer"])] + [("accepted", " | ".join(item["answers"]))] * bool(item["answers"])
  rows = "".join(f"<div><dt>{name}</dt><dd>{_answer(text)}</dd></div>" for name, text in answers)
  parts = "".join(f"<span>{escape(name)} <b>{signed(value)}</b></span>"
                  for name, value in (item["reward_parts"] or {}).items())
  return (f'<header><p class="eyebrow">{escape(item["kind"] or "task")} · {escape(item["uid"])}</p>'
          f'<h3>{escape(item["question"])}</h3>'
          + (f'<ol class="options" type="A">{options}</ol>' if options else "")
          + f'<dl class="answers">{rows}</dl><p class="chips">{"".join(chips)}</p>'
          + (f'<p class="parts">{parts}</p>' if parts else "") + "</header>")


def _answer(text: str | None) -> str:
  return "<i>none</i>" if text is None else escape(text if len(text) <= 300 else text[:300] + " …")


def _turn(turn, action):
  """One turn; `action` is the number of its zoom, counted from 1, if it has a box."""
  zoom = turn["box"] is not None
  kind = turn["class"] if turn["class"] in CLASSES else "plain"
  badge = f'<span class="num {kind}">{action}</span>' if zoom else ""
  chips = []
  if zoom:
    if turn["class"] is not None:
      chips.append(_chip(turn["class"], kind))
    if turn["iou"] is not None:
      chips.append(_chip(f"IoU {turn['iou']:.2f}"))
    if turn["modulator"] is not None:
      chips.append(_chip(f"× {curves.number(turn['modulator'])}", "", "modulator of the advantage"))
  if turn["advantage"] is not None:
    chips.append(_chip(f"A {signed(turn['advantage'])}", "", "advantage of this turn's tokens"))
  if turn["error"] is not None:
    chips.append(_chip("refused", "warn", turn["error"]))
  notes = []
  if zoom:
    notes.append(f"box {_numbers(turn['box'])} px of the original")
  if turn["box_shown"] is not None:
    notes.append(f"written as {_numbers(turn['box_shown'])}")
  if turn["error"] is not None:
    notes.append(f"told: {turn['error']}")
  who = {"assistant": "policy", "tool": "tool"}.get(turn["role"], turn["role"])
  crop = _crop(turn, action) if zoom else ""
  note = f'<p class="note">{escape(" · ".join(notes))}</p>' if notes else ""
  return (f'<li class="turn {"said" if turn["role"] == "assistant" else "told"}">'
          f'<div class="who">{badge}<span>{escape(who)}</span>{"".join(chips)}</div>'
          f'<div class="body"><pre>{transcript(turn["text"])}</pre>{crop}</div>{note}</li>')


def _crop(turn, action):
  uri = safe_image(turn["crop"])
  if not uri:
    return ""
  x1, y1, x2, y2 = turn["box"]
  tiny = " tiny" if max(x2 - x1, y2 - y1) < _TINY_CROP_PX else ""
  return f'<img class="crop{tiny}" src="{uri}" alt="what zoom {action} showed">'


def _rect(box: Sequence[float], kind: str, title: str) -> str:
  x1, y1, x2, y2 = box
  place = f'x="{x1:g}" y="{y1:g}" width="{max(0.0, x2 - x1):g}" height="{max(0.0, y2 - y1):g}"'
  return (f'<rect class="halo" {place}/><rect class="box {kind}" {place}>'
          f'<title>{escape(title)}</title></rect>')


def _corner(box, width, height, rows):
  """Where a zoom's number goes: its box's upper left corner, in line with numbers already there."""
  left, top = (min(max(100.0 * v / whole, 0.0), 100.0) for v, whole in ((box[0], width), (box[1], height)))
  for row in rows:
    if abs(left - row[0]) < 6 and abs(top - row[1]) < 6:
      row[2] += 1
      return row[0], row[1], int(row[2]) - 1
  rows.append([left, top, 1])
  return left, top, 0


def _numbers(values: Sequence[float]) -> str:
  return "(" + ", ".join("–" if v is None else f"{v:g}" for v in values) + ")"


def _chip(text: str, kind: str = "", title: str = "") -> str:
  tip = f' title="{escape(title)}"' if title else ""
  return f'<span class="chip {kind}"{tip}>{escape(text)}</span>'
