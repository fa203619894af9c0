"""What all pages are made with: the template's environment, data for the script, what may stand in them as markup.

A page is one HTML file that needs no network and nothing beside it.  Everything that a model or a data set wrote is
hostile text.  The template escapes whatever it prints and takes out what can't be seen; what the script shows is JSON
that can't end its element, and goes into text nodes; the page's policy allows this package's script and no other.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
import functools
import hashlib
import importlib.resources
import json
import math
import re

import jinja2
import markupsafe

from virl_jax.report import curves
from virl_jax.report import trajectory

_IMAGE_URI = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}")
# Control characters, lone surrogates and marks that reorder text: they could make a page unreadable or
# make it say what the model did not.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Inside a script element; JSON has these characters in strings alone, where such an escape means the same.
_ESCAPED = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


class Shown:
  """The trajectories of a page, each picture once.

  Args:
    room: characters that they may take; those that find none are counted.
  """

  def __init__(self, room: int):
    self.items: list[dict] = []
    self.left_out = 0  # of entries
    self._pictures: dict[str, int] = {}
    self._room = room

  @property
  def room(self) -> int:
    """Characters that are left; negative when it is full."""
    return self._room

  def add(self, entry: dict, when: str, run: int = 0, **more) -> bool:
    """Takes an entry of `gallery`, if there is room.

    Args:
      entry: as `gallery.entry` gives it.
      when: what it is of, such as "Step 20".
      run: number of the run.
      **more: what else the script is to know of it.
    """
    if self._room < 0:
      self.left_out += 1
      return False
    before, taken = len(self._pictures), 0

    def keep(uri):
      nonlocal taken
      if not _is_picture(uri):
        return None
      if uri not in self._pictures:
        self._pictures[uri], taken = len(self._pictures), taken + len(uri)
      return self._pictures[uri]

    item = clean(trajectory.view(entry, keep) | {"when": when, "run": run} | more)
    self._room -= taken + len(json.dumps(item, ensure_ascii=False))
    if self._room < 0:
      for uri in list(self._pictures)[before:]:
        del self._pictures[uri]
      self.left_out += 1
      return False
    self.items.append(item)
    return True

  def data(self, runs: Sequence[str], beside: bool, word: str = "rollout", start: str = "") -> markupsafe.Markup | None:
    """What the script reads; None without any.

    Args:
      runs: their names.
      beside: whether two of a task are shown side by side from the start.
      word: for one of several of a task.
      start: name of the run whose trajectories are listed at first; "" for all.
    """
    if not self.items:
      return None
    return embedded({"runs": list(runs), "beside": beside, "word": word, "start": start, "items": self.items,
                     "pictures": list(self._pictures)})


def clean(value: object) -> object:
  """JSON-able data without invisible characters in its strings, and with null for numbers that are not finite."""
  if isinstance(value, str):
    return visible(value)
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, dict):
    return {visible(str(key)): clean(inner) for key, inner in value.items()}
  return [clean(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def embedded(value: object) -> markupsafe.Markup:
  """JSON that may stand in a script element: nothing in it can end the element or begin another."""
  text = json.dumps(clean(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
  return markupsafe.Markup(text.translate(_ESCAPED))


def render(template: str, values: dict, trajectories: markupsafe.Markup | None) -> str:
  """A whole document.

  Args:
    template: name of a file of this package that extends base.html.j2.
    values: what it prints.
    trajectories: of `Shown.data`.
  """
  script = _file("viewer.js")
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  # Markup: files of this package, never text of a run.
  return _environment().get_template(template).render(values | {
      "css": markupsafe.Markup(_file("page.css")), "script": markupsafe.Markup(script),
      "script_hash": f"sha256-{digest}", "trajectories": trajectories, "classes": trajectory.CLASSES})


def plain(template: str, values: dict) -> str:
  """A whole document without a script.

  Args:
    template: name of a file of this package.
    values: what it prints.
  """
  return _environment().get_template(template).render(values | {"css": markupsafe.Markup(_file("page.css"))})


def visible(value: object) -> str:
  """Whatever the template prints goes through here before it is escaped: nothing invisible is left in it."""
  if isinstance(value, markupsafe.Markup):
    return value  # a macro's output, whose values came through here, or markup of this package
  return _UNSEEN.sub("\ufffd", str(value).replace("\r\n", "\n"))


@functools.cache  # with the templates that it has compiled
def _environment() -> jinja2.Environment:
  env = jinja2.Environment(loader=jinja2.FunctionLoader(_file), autoescape=True, undefined=jinja2.StrictUndefined,
                           finalize=visible, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
  env.filters |= {"cut": _cut, "figure": figure, "number": curves.number, "picture": _picture}
  return env


def _cut(text: str, longest: int) -> str:
  return text if len(text) <= longest else text[:longest] + " …"


def _is_picture(uri: object) -> bool:
  """Whether it is the data URI of a picture."""
  return isinstance(uri, str) and _IMAGE_URI.fullmatch(uri) is not None


def _picture(uri: object, alt: str) -> markupsafe.Markup:
  """A picture, if that is what the data URI is of, or nothing."""
  return markupsafe.Markup('<img src="{}" alt="{}">').format(uri, alt) if _is_picture(uri) else markupsafe.Markup()


def _file(name: str) -> str:
  return importlib.resources.files("virl_jax.report").joinpath(name).read_text(encoding="utf-8")


def figure(value: float | None, share: bool, unit: str = "") -> str:
  """A measure for people; the unit is that of shares."""
  if value is None:
    return "–"
  return (f"{100 * value:.1f}{unit}" if share else f"{value:.2f}").replace("-", "−")
