"""The page shows what happened, needs nothing from elsewhere, and trusts no text."""

import base64
import dataclasses
import hashlib
import html.parser
import importlib.resources
import json
import pathlib
import re

from absl import app
from absl import flags
import numpy as np
from PIL import Image
import pytest

from virl_jax import types
from virl_jax.eval import monitors
from virl_jax.report import __main__ as report_main
from virl_jax.report import gallery
from virl_jax.report import html as page_html
from virl_jax.report import page as page_lib
from virl_jax.report import trajectory
from virl_jax.run import log

_VOID = {"meta", "link", "img", "input", "br", "hr"}
_IDS = np.zeros(1, np.int32)
_HOSTILE = '<script>alert(1)</script>"\'><img src=x onerror=alert(2)>&lt;</pre>\x00\ud800\u202e'


class _Page(html.parser.HTMLParser):
  """Collects elements and text, and checks that every opened element is closed."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.open, self.words = [], [], []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in _VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if not self.open or self.open[-1] not in ("style", "script"):
      self.words.append(data)

  def all(self, tag, **attrs):
    return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in attrs.items())]

  @property
  def text(self):
    return " ".join(" ".join(self.words).split())


def _item(boxes=((10, 20, 40, 60),), classes=("correct",), uid="u1", size=(200, 100), answers=("B",)):
  turns = [types.Turn("assistant", _IDS, text="<think>hm</think>", region=types.Box(*box), written=tuple(box))
           for box in boxes]
  turns.append(types.Turn("assistant", _IDS, text="eh", error="too small"))
  task = types.Task(uid, b"", "Which?", answers, (types.Box(1, 2, 31, 42),), ("x", "y"), "pattern")
  traj = types.Trajectory(task, 0, _IDS, turns, [], types.StopReason.ANSWERED, "B", True)
  n = len(boxes)
  return gallery.entry(traj, Image.new("RGB", size), [0.5] * n, classes, [1.5] * n, 0.9, 1.25,
                       {"answer": 1.0, "fidelity": -0.5})


def _measure(value):
  return {"value": value, "low": value - 0.05, "high": value + 0.05}


def _summary(value):
  return {"n": 64, "acc_ans": _measure(value), "acc_rat": _measure(value), "hit_rate": _measure(value),
          "rationale_count": _measure(1.5), "mean_iou": {"value": None, "low": None, "high": None},
          "overlong_rate": _measure(0.125),
          "by_kind": {"pattern": {"n": 64, "acc_ans": value, "acc_rat": None, "hit_rate": _measure(value)}}}


def _entropies(*stretches):
  return [{"step": i, "loss/entropy": v} for i, v in enumerate(v for n, v in stretches for _ in range(n))]


def _render(config=None, metrics=(), before=None, after=None, difference=None, kept=(), title="run",
            clock=()):
  if after is not None and difference is not None:
    after = after | {"difference": difference}
  return page_html.render(page_html.Run(title, config or {}, list(metrics), before, after, list(kept), clock))


def _kept(*items, label="After"):
  return label, list(items)


def _data(text):
  """What a page's script reads."""
  inside = re.search(r'<script type="application/json" id="trajectories">(.*?)</script>', text, re.DOTALL)
  return {"items": [], "pictures": []} if inside is None else json.loads(inside[1])


def _shown(item):
  """What a page's script gets about one trajectory."""
  found, = _data(_render(kept=[_kept(item)]))["items"]
  return found


def _full(**more):
  metrics = [{"step": i, "acc_ans": i / 9, "reward/total": float("nan"), "rollout/logp_gap_max": 1e-5}
             for i in range(10)]
  given = {"config": {"reward": {"h0": 0.4}, "model": {"path": "/some/where/name"}}, "metrics": metrics,
           "before": _summary(0.25), "after": _summary(0.75),
           "difference": {"acc_ans": {"value": 0.5, "low": 0.4, "high": 0.6}},
           "kept": [_kept(_item(), label="Before"), _kept(_item())]}
  return _render(**{**given, **more})


def test_page_needs_nothing_from_elsewhere():
  text = _full()
  page = _Page(text)
  for tag, attrs in page.elements:
    assert tag not in ("iframe", "object", "base")
    for name in ("src", "href", "srcset", "action", "xlink:href"):
      assert attrs.get(name, "data:").startswith(("data:", "#")), (tag, attrs)
    assert not any(name.startswith("on") for name in attrs)
  assert "url(" not in text and "@import" not in text
  policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
  script = importlib.resources.files("virl_jax.report").joinpath("viewer.js").read_text(encoding="utf-8")
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}';" in policy
  assert [a.get("type") for a in page.all("script")] == ["application/json", None]
  assert f"<script>{script}</script>" in text
  assert not any(name in script for name in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(",
                                             "fetch(", "XMLHttpRequest", "</script", "import("))


def _strings(value):
  """The places of text in nested dicts and lists, each as a tuple of keys."""
  pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  return [()] if isinstance(value, str) else [(key, *rest) for key, inner in pairs for rest in _strings(inner)]


def _put(value, place, text):
  for key in place[:-1]:
    value = value[key]
  value[place[-1]] = text


def _get(value, place):
  for key in place:
    value = value[key]
  return value


def _entry():
  """An entry with text wherever an entry can have it."""
  item = _item()
  item["turns"][0] |= {"error": "too small", "action": "look"}
  item["turns"].append({**item["turns"][1], "role": "tool", "action": "measure"})
  return item


def _safe(text):
  text.encode("utf-8")
  for ours in ('<script type="application/json" id="trajectories">', "\n<script>\"use strict\"", "\n<script>// "):
    text = text.replace(ours, "<i>", 1).replace("</script>", "</i>", 1) if ours in text else text
  assert "<script" not in text and "<img src=x" not in text and "\x00" not in text and "\u202e" not in text
  page = _Page(text)
  assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
  return page


@pytest.mark.parametrize("place", [*_strings(_entry()), ("reward_parts",)], ids=str)
def test_hostile_text_in_a_trajectory_is_text(place):
  item = _entry()
  _put(item, place, {_HOSTILE: 1.0} if place == ("reward_parts",) else _HOSTILE)
  page = _render(after=_summary(0.5), kept=[_kept(item), _kept(item)])
  _safe(page)
  data = _data(page)
  if place[-1] in ("image", "crop"):
    assert len(data["pictures"]) == 1 and "alert" not in json.dumps(data)
  else:
    told = [word for item in data["items"] for at in _strings(item) for word in [_get(item, at)] if "alert(1)" in word]
    keys = [name for item in data["items"] for name, _ in item["parts"]]
    assert any(_HOSTILE[:20] in word for word in told + keys)
    assert not {"\x00", "\ud800", "\u202e"} & set(json.dumps(data, ensure_ascii=False))


def _crowded():
  """Everything else that a page is made of."""
  return {"config": {"reward": {"h0": "0.4"}, "model": {"path": "model"}, "monitor": {"window": 1},
                     "data": {"a": ["b"]}, "rollout": {"prompts": "4", "group_size": "8", "max_rounds": "6"}},
          "metrics": _entropies((30, 0.5), (2, 0.01)) + [{"step": 99, "acc_ans": "high", "note": "words"}],
          "before": _summary(0.25), "after": _summary(0.75) | {"by_kind": {"pattern": {"n": "64"}}, "n": "64"},
          "kept": [_kept(label="Before"), _kept()], "title": "run"}


@pytest.mark.parametrize("place", _strings(_crowded()), ids=str)
def test_hostile_text_in_a_page_is_text(place):
  how = _crowded()
  _put(how, place, "m" + _HOSTILE)
  page = _safe(_render(**how))
  assert place[0] == "metrics" or "onerror=alert(2)" in page.text  # of metrics only numbers are shown


def test_hostile_names_of_knobs_and_metrics_are_text():
  page = _safe(_full(config={_HOSTILE: {_HOSTILE: 1}}, metrics=[{"step": 0, "acc_ans": 1.0, _HOSTILE: 1.0}]))
  assert page.text.count("alert(1)") == 2


def test_a_hostile_kind_of_task_is_text():
  before, after = _summary(0.5), _summary(0.5)
  before["by_kind"], after["by_kind"] = {_HOSTILE: {"n": [_HOSTILE]}}, {_HOSTILE: {"n": _HOSTILE}}
  for summary in (before, after):
    page = _safe(_render(after=summary))
    assert page.text.count("alert(1)") == 2


def test_a_hostile_alarm_is_text(monkeypatch):
  alarm = monitors.Alarm(_HOSTILE, 1, _HOSTILE)
  monkeypatch.setattr(monitors, "all_begun", lambda lines, cfg: [alarm])
  text = _render(metrics=_entropies((3, 0.5)))
  assert _safe(text).text.count("alert(1)") == 4 and 'class="mark"' in text  # in a tile, listed, told, and on a curve


def test_a_forgotten_filter_leaves_nothing_unsafe():
  """Escaping, and removing what can't be seen, are done by the environment and not by the template."""
  shown = page_lib._environment().from_string("{{ text }}{{ many }}<i title='{{ text }}'>").render(
      text=_HOSTILE, many=[_HOSTILE])
  assert "<script" not in shown and "<img" not in shown and "'\"" not in shown
  assert not {"\x00", "\ud800", "\u202e"} & set(shown)


def test_what_the_page_is_made_of_is_in_the_package():
  files = importlib.resources.files("virl_jax.report")
  texts = {file.name: file.read_text(encoding="utf-8") for file in files.iterdir() if file.is_file()}
  assert "</style" not in texts["page.css"] and "url(" not in texts["page.css"]
  templates = {name: text for name, text in texts.items() if name.endswith(".j2")}
  assert not any(re.search(r"\|\s*safe|autoescape|<img", text) for text in templates.values())
  assert [name for name, text in templates.items() if "<script" in text] == ["base.html.j2"]
  setup = (pathlib.Path(__file__).parents[2] / "setup.py").read_text(encoding="utf-8")
  shipped = re.search(r"package_data=\{(.*?)\}", setup)[1]
  assert all(f'"**/*.{ending}"' in shipped for ending in ("css", "j2", "js"))


@pytest.mark.parametrize("uri", [
    "http://example.org/a.png", "data:text/html;base64,AAAA", 'data:image/png;base64,AA" onerror="alert(1)',
    "javascript:alert(1)", "data:image/svg+xml;base64,AAAA", "data:image/png;base64,AAAA\n"])
def test_only_pictures_are_shown_as_pictures(uri):
  item = _item()
  item["image"] = item["turns"][0]["crop"] = uri
  shown = _shown(item)
  assert shown["picture"] is None and shown["turns"][0]["crop"] is None


def test_a_picture_that_many_have_is_there_once():
  data = _data(_render(kept=[_kept(_item(), label="Before"), _kept(_item(), _item(size=(50, 50)))]))
  first, second, third = (item["picture"] for item in data["items"])
  assert first == third != second
  assert len(data["pictures"]) == 4 and all(uri.startswith("data:image/png") for uri in data["pictures"])


def test_what_finds_no_room_leaves_no_picture():
  large = _item() | {"image": "data:image/png;base64," + "A" * 100_000}
  shown = page_lib.Shown(50_000)
  assert shown.add(_item(), "After") and not shown.add(large, "After") and not shown.add(_item(), "After")
  data = json.loads(shown.data(["run"], False))
  assert (len(data["items"]), shown.left_out) == (1, 2) and sum(map(len, data["pictures"])) < 50_000


def test_nothing_ends_the_element_that_holds_the_data():
  for text in ("</script>", "<!--<script>", "\u2028", "&lt;", "]]>", "</SCRIPT >"):
    inside = page_lib.embedded({text: [text, float("nan")]})
    assert not set("<>&\u2028") & set(inside) and json.loads(inside) == {text: [text, None]}


def test_boxes_lie_where_they_were_drawn():
  shown = _shown(_item(boxes=((10, 20, 40.5, 60), (100, 50, 200, 100)), classes=("correct", "erroneous"),
                       size=(200, 100)))
  place = lambda box: tuple(float(box[k]) for k in ("x", "y", "width", "height"))
  assert (shown["width"], shown["height"]) == (200, 100)  # the overlay's units: original pixels
  assert [place(box) for box in shown["truth"]] == [(1, 2, 30, 40)]
  assert [(box["kind"], place(box), box["left"], box["top"]) for box in shown["drawn"]] == [
      ("correct", (10, 20, 30.5, 40), "5.00", "20.00"), ("erroneous", (100, 50, 100, 50), "50.00", "50.00")]


def test_shrunk_picture_keeps_original_coordinates():
  shown = _shown(_item(boxes=((1000, 500, 1500, 700),), size=(3000, 2000)))
  assert (shown["width"], shown["drawn"][0]["x"], shown["crisp"]) == (3000, "1000", False)


def test_numbers_of_zooms_at_one_place_stand_side_by_side():
  box = (100, 50, 150, 90)
  shown = _shown(_item(boxes=(box, box, (102, 51, 150, 90)), classes=("correct",) * 3))
  assert [(box["beside"], box["number"]) for box in shown["drawn"]] == [(0, 1), (1, 2), (2, 3)]


def test_an_item_says_what_it_is_found_by():
  shown = _shown(_item(boxes=((10, 20, 40, 60), (0, 0, 9, 9)), classes=("redundant", "correct")))
  for key, value in {"outcome": "right", "stop": "answered", "best": 0.5, "classes": ["correct", "redundant"],
                     "kind": "pattern", "source": "", "when": "After", "run": 0, "reward": 1.25, "advantage": 0.9,
                     "parts": [["answer", 1.0], ["fidelity", -0.5]]}.items():
    assert shown[key] == value, key
  assert _shown(_item(boxes=(), classes=()))["best"] == 0.0, "who looks nowhere has found nothing"
  assert _shown(_item() | {"correct": False})["outcome"] == "wrong"
  assert _shown(_item() | {"source": "gqa", "stop": None}).items() >= {"source": "gqa", "stop": "unfinished"}.items()
  untold = _item()
  untold["turns"][0]["iou"] = None
  assert _shown(untold)["best"] is None


def test_what_is_no_number_is_none():
  """A file that somebody else has written may hold anything in a number's place, but the script relies on numbers."""
  item = _item(boxes=((10, 20, 40, 60),)) | {"reward": "x", "advantage": [], "score": True, "reward_parts": {"a": "b"}}
  item["turns"][0] |= {"iou": "high", "modulator": {}, "advantage": _HOSTILE,
                       "tokens": {"text": ["a", 1], "logp": ["x", -1.0], "gap": "y", "else": _HOSTILE}}
  shown = _shown(item)
  turn = shown["turns"][0]
  assert (shown["reward"], shown["advantage"], shown["score"], shown["best"], shown["parts"]) == (
      None, None, None, None, [["a", None]])
  assert (turn["iou"], turn["modulator"], turn["advantage"]) == (None, None, None)
  assert turn["tokens"] == {"text": ["a", "1"], "logp": [None, -1.0], "gap": None}


def test_turns_say_what_was_made_of_them():
  first, last = _shown(_item(boxes=((10, 20, 40, 60),), classes=("redundant",)))["turns"]
  for key, value in {"class": "redundant", "kind": "redundant", "iou": 0.5, "modulator": 1.5, "number": 1,
                     "advantage": pytest.approx(1.35), "call": "zoom 1", "tiny": True,
                     "notes": ["box (10, 20, 40, 60) px of the original", "written as (10, 20, 40, 60)"]}.items():
    assert first[key] == value, key
  assert (last["error"], last["notes"], last["number"]) == ("too small", ["told: too small"], None)


def test_an_entry_without_names_of_actions_is_of_zooms():
  item = _item()
  for turn in item["turns"]:
    del turn["action"]  # as older runs wrote them
  told = {**item, "turns": [{**turn, "action": turn["box"] and "image_zoom_in_tool"} for turn in item["turns"]]}
  assert _shown(told) == _shown(item) and "image_zoom_in_tool" not in json.dumps(_shown(item))
  assert _shown(item)["drawn"][0]["title"] == "zoom 1: correct"


def test_an_action_that_showed_no_picture_has_its_box_and_its_name():
  item = _item(boxes=((10, 20, 40, 60), (50, 20, 90, 60)), classes=("correct", "redundant"))
  item["turns"][1] |= {"action": "read_text", "crop": None}
  shown = _shown(item)
  assert [box["title"] for box in shown["drawn"]] == ["zoom 1: correct", "read_text 2: redundant"]
  assert [turn["crop"] is None for turn in shown["turns"]] == [False, True, True]
  assert (shown["turns"][1]["other_action"], shown["turns"][1]["number"]) == ("read_text", 2)


def test_an_action_without_a_box_has_no_number():
  item = _item(boxes=((10, 20, 40, 60),))
  measured = {**item["turns"][1], "action": "measure", "error": None, "modulator": 0.5, "class": "correct"}
  item["turns"].insert(0, measured)
  del measured["crop"]
  shown = _shown(item)
  assert [(t["other_action"], t["number"]) for t in shown["turns"]] == [("measure", None), (None, 1), (None, None)]
  assert len(shown["drawn"]) == 1 and shown["turns"][0]["notes"] == []


def test_without_an_accepted_answer_nothing_is_right_or_wrong():
  assert _shown(_item(answers=()))["outcome"] == "no answer known"


def test_transcript_dims_special_tokens_and_folds_pads():
  said = "<|im_start|>a <b>" + "<|image_pad|>" * 324 + "</tool_call>\n"
  assert trajectory.transcript(said) == ["", "<|im_start|>", "a <b>", "<|image_pad|>", "×324", "</tool_call>", ""]
  item = _item(boxes=(), classes=())
  item["turns"][0]["text"] = "\n two\r\n  lines \n"
  assert _shown(item)["turns"][0]["text"] == [" two\n  lines "]  # as they were written
  long = trajectory.transcript("x" * 20000)
  assert len(long[0]) == 12000 and long[1] == " … 8000 more characters"


def test_cards_show_values_intervals_and_the_difference():
  text = _Page(_full()).text
  assert "75.0% 70.0 to 80.0 from 25.0% 20.0 to 30.0 ▲ +50.0 pts 40.0 to 60.0" in text
  assert "IoU ≥ 0.4" in text and "64 held-out tasks" in text and "model name ·" in text
  assert "Mean IoU of zooms" not in text  # no value, no card
  assert "pattern 64 25.0% → 75.0% – 25.0% → 75.0% –" in text
  assert "Overlong 12.5% → 12.5%" in text


def test_what_can_no_longer_be_measured_is_not_shown_as_it_was():
  """A policy that has stopped zooming has no share of right zooms, and that from before is not shown in its place."""
  after = _summary(0.75) | {"acc_rat": {"value": None, "low": None, "high": None}, "overlong_rate": None}
  after["by_kind"] = {"pattern": {"n": 64, "acc_ans": 0.75, "acc_rat": None, "hit_rate": None}}
  page = _full(after=after)
  text = _Page(page).text
  assert "Rationale accuracy – from 25.0% 20.0 to 30.0 zooms that hit" in text
  assert "pattern 64 25.0% → 75.0% – 25.0% → – –" in text and "Overlong 12.5% → –" in text
  assert "25.0% 20.0 to 30.0 zooms that hit" in _Page(_full(after=None)).text  # before the end there is no other


def test_a_fall_is_shown_as_a_fall():
  difference = {"acc_ans": {"value": -0.5, "low": -0.6, "high": -0.4}}
  text = _full(before=_summary(0.75), after=_summary(0.25), difference=difference)
  assert "▼ −50.0 pts −60.0 to −40.0" in _Page(text).text
  assert '<p class="change bad">' in text
  unsure = _full(difference={"acc_ans": {"value": 0.1, "low": -0.1, "high": 0.3}})
  assert '<p class="change good">' not in unsure and '<p class="change bad">' not in unsure


def test_only_curves_with_values_are_drawn():
  labels = [a["aria-label"] for a in _Page(_full()).all("svg") if a.get("class") == "curve"]
  assert labels == ["Total", "Answer accuracy", "Sampler–trainer gap"]


def test_alarms_are_listed_and_marked_where_they_begin():
  metrics = _entropies((20, 0.5), (12, 0.05), (20, 0.5), (12, 0.05))
  for line in metrics[40:]:
    line["rollout/logp_gap_mean"] = 1.0
  text = _full(metrics=metrics)
  page = _Page(text)
  assert "Alarms entropy collapse from steps 27, 59: entropy is 0.05 nats a token" in page.text
  assert "sampler drift from step 43: rollout/logp_gap_mean is 1 nats" in page.text  # once, though it persists
  svg = text[text.index('aria-label="Entropy, nats"'):]
  svg = svg[:svg.index("</svg>")]
  marks = re.findall(r'<g class="mark"><title>(.*?)</title><line x1="([\d.]+)".*?>(\d)</text>', svg)
  assert [(title, tag) for title, _, tag in marks] == [
      ("step 27: entropy collapse begins", "1"), ("step 43: sampler drift begins", "2"),
      ("step 59: entropy collapse begins", "1")]
  x27, x43, x59 = (float(x) for _, x, _ in marks)
  assert (x43 - x27) / (x59 - x27) == pytest.approx(16 / 32, abs=0.01)


def test_a_run_without_alarms_says_so():
  text = _full(metrics=_entropies((40, 0.5)))
  assert "Alarms none Training" in _Page(text).text and 'class="mark"' not in text
  assert "Alarms" not in _Page(_full(metrics=[])).text


def test_alarms_are_by_the_run_s_own_thresholds():
  metrics = _entropies((40, 0.5))
  strict = _full(metrics=metrics, config={"monitor": {"entropy_nats": 0.6, "window": 3, "stop": [], "new": 1}})
  assert "entropy collapse from step 2: entropy is 0.5 nats a token (means of 3 steps)" in _Page(strict).text


def test_an_alarm_that_comes_and_goes_keeps_the_list_short():
  metrics = _entropies(*[(1, 0.01 if i % 4 == 3 else 0.5) for i in range(60)])
  text = _Page(_full(metrics=metrics, config={"monitor": {"window": 1}})).text
  assert "entropy collapse from steps 3, 7, 11, 15, 19, 23, 27, 31 and 7 more: entropy" in text


def test_missing_pieces_are_left_out():
  page = _Page(_render())
  assert page.text == "run ViRL run" and not page.all("section")
  assert "from" not in _Page(_render(before=_summary(0.25))).text
  assert "25.0%" in _Page(_render(after=_summary(0.25))).text
  empty = {key: None for key in _summary(0.5)}
  _Page(_render(before=empty, after={"n": 0}, metrics=[{"note": 1}], kept=[_kept()]))


def test_last_rollouts_are_shown_first():
  text = _render(kept=[_kept(_item(), label=label) for label in ("Before", "Step 20", "Skipped, step 30", "Step 40",
                                                                 "After")])
  assert [item["when"] for item in _data(text)["items"]] == [
      "After", "Before", "Skipped, step 30", "Step 40", "Step 20"]
  assert {a.get("data-part") for a in _Page(text).all("select")} >= {
      "run", "when", "outcome", "class", "kind", "source"}
  assert 'id="viewer"' not in _render() and "<script" not in _render()


def test_the_sampler_trainer_gap_is_on_the_first_screen():
  lines = [{"step": i, "rollout/logp_gap_mean": v, "rollout/logp_gap_max": 10 * v, "optim/skipped": float(i == 1)}
           for i, v in enumerate((1e-4, 0.06, 2e-4))]
  text = _render(metrics=lines, before=_summary(0.5))
  page = _Page(text)
  assert "Sampler–trainer gap, mean 2e-4 nats last step; at most 0.06, in step 1; alarm from 0.05" in page.text
  assert "largest 0.002 nats last step; at most 0.6, in step 1; alarm from 5" in page.text
  assert [a["class"] for a in page.all("div") if a.get("class", "").startswith("tile")] == [
      "tiles", "tile bad", "tile", "tile", "tile bad"]
  assert text.index("Sampler–trainer gap") < text.index("Before and after")
  assert "tiles" not in _render().split("</style>")[1]


def _side(**more):
  outcomes = lambda right: [{"uid": f"u{i}", "correct": i < right, "ious": [0.9 if i < right else 0.1],
                             "invalid_actions": 0, "has_boxes": True, "overlong": False, "kind": "k",
                             "answerable": True} for i in range(20)]
  make = lambda name, right, rate: page_html.Run(
      name, {"optim": {"rate": rate}, "steps": 3}, _entropies((5, 0.5)), _summary(0.25),
      _summary(right / 20) | {"outcomes": outcomes(right)}, [_kept(_item())])
  return make("one", 5, 1e-5), dataclasses.replace(make("two", 15, 2e-5), **more)


def test_two_runs_side_by_side():
  page = _Page(text := page_html.render(*_side()))
  assert "one and two" in page.text and "20 tasks that both were asked" in page.text
  assert re.search(r"Answer accuracy 25.0% → 25.0% 20.0 to 30.0 25.0% → 75.0% 70.0 to 80.0 \+50.0 pts [\d.]+ to",
                   page.text)
  assert "optim.rate 1e-05 2e-05" in page.text and "steps" not in page.text.split("where it differs")[1]
  assert text.count('<g class="other">') == 1, "the second run's entropy"
  data = _data(text)
  assert data["runs"] == ["one", "two"] and [item["run"] for item in data["items"]] == [0, 1] and data["beside"]


def test_runs_of_other_tasks_have_no_difference():
  first, second = _side()
  second.after["outcomes"][0]["uid"] = "another"
  assert "Without a difference: their held-out tasks are not the same." in _Page(page_html.render(first, second)).text
  assert "no evaluation after training" in _Page(page_html.render(*_side(after=None))).text
  del second.after["outcomes"]
  assert "tasks have no outcomes" in _Page(page_html.render(first, second)).text


def test_hostile_names_of_two_runs_are_text():
  first, second = _side(name=_HOSTILE, kept=[(_HOSTILE, [_entry()])], config={_HOSTILE: _HOSTILE})
  _safe(page_html.render(first, second))
  _safe(page_html.render(second, first))


def test_the_command(tmp_path, capsys, monkeypatch):
  for name in ("a/x", "b/x"):
    _workdir(tmp_path / name)

  def command(*args):
    values = flags.FlagValues()
    report_main.define_flags(values)
    monkeypatch.setattr(flags, "FLAGS", values)
    report_main.main(values(["report", *map(str, args)]))

  command(tmp_path / "a/x")
  with pytest.raises(app.UsageError, match="--out=PAGE.html is needed"):
    command(tmp_path / "a/x", tmp_path / "b/x")
  with pytest.raises(app.UsageError, match="a run's folder is needed"):
    command()
  with pytest.raises(SystemExit, match="error: workdir must be a folder"):
    command(tmp_path / "c")
  command(tmp_path / "a/x", tmp_path / "b/x", f"--out={tmp_path}/pages/both.html")
  assert capsys.readouterr().out.split() == [str(tmp_path / "a/x/report.html"), str(tmp_path / "pages/both.html")]
  assert "a/x and b/x" in _Page((tmp_path / "pages/both.html").read_text()).text


def _workdir(tmp_path):
  tmp_path.mkdir(parents=True, exist_ok=True)
  config = {"rollout": {"prompts": 4, "group_size": 8, "max_rounds": 6}}
  (tmp_path / "config.json").write_text(json.dumps(config))
  metrics_log = log.MetricsLog(str(tmp_path / "metrics.jsonl"), 0)
  for step in range(5):
    metrics_log.write(step, {"acc_ans": step / 5})
  (tmp_path / "eval_before.json").write_text(json.dumps(_summary(0.25)))
  difference = {"acc_ans": {"value": 0.5, "low": 0.4, "high": 0.6}}
  (tmp_path / "eval_after.json").write_text(json.dumps({**_summary(0.75), "difference": difference}))
  for name in ("before", "step_000100", "step_000020", "after"):
    gallery.save(str(tmp_path / "rollouts" / f"{name}.jsonl"), [_item(uid=f"task of {name}")])
  (tmp_path / "rollouts" / "notes.txt").write_text("not a rollout")


def test_write_puts_a_run_together(tmp_path):
  _workdir(tmp_path)
  path = page_html.write(str(tmp_path))
  assert path == str(tmp_path / "report.html") and not list(tmp_path.glob("*.tmp"))
  page = _Page((tmp_path / "report.html").read_text(encoding="utf-8"))
  assert "5 steps · 4 prompts × 8 rollouts a step · at most 6 zooms" in page.text
  assert "+50.0 pts 40.0 to 60.0" in page.text
  data = _data((tmp_path / "report.html").read_text(encoding="utf-8"))
  assert [item["when"] for item in data["items"]] == ["After", "Before", "Step 100", "Step 20"]
  assert str(tmp_path) not in page.text


def test_write_makes_do_with_an_empty_folder(tmp_path):
  assert page_html.write(str(tmp_path)) == str(tmp_path / "report.html")
  _Page((tmp_path / "report.html").read_text(encoding="utf-8"))
  with pytest.raises(ValueError, match="workdir must be a folder"):
    page_html.write(str(tmp_path / "missing"))
  (tmp_path / "eval_after.json").write_text("{")
  with pytest.raises(ValueError, match="eval_after.json must be JSON"):
    page_html.write(str(tmp_path))


def test_page_keeps_first_last_and_newest_when_there_is_too_much(tmp_path, monkeypatch):
  _workdir(tmp_path)
  one = len(json.dumps(_shown(_item(uid="task of step_000100"))))  # the picture counts once
  monkeypatch.setattr(page_html, "_GALLERY_BYTES", int(3.5 * one) + 2 * len(_item()["image"]))
  page_html.write(str(tmp_path))
  text = (tmp_path / "report.html").read_text(encoding="utf-8")
  assert [item["uid"] for item in _data(text)["items"]] == ["task of after", "task of before", "task of step_000100"]
  assert "1 more are kept in rollouts/, for which this page has no room." in _Page(text).text


def test_where_the_time_went():
  step = {"spent": "step", "compile_s": 1.0, "checkpoint_s": 0.0}
  clock = [{"at": 0.0, "spent": "stopped"}, {"at": 5.0, "spent": "startup", "resumed": 0},
           {"at": 16.0, "step": 0, **step}, {"at": 100.0, "spent": "stopped"}]
  page = _Page(_render(clock=clock))
  assert "Goodput 10.0%: steps that count, of 1m40s since the first start, in 2 starts." in page.text
  assert ("steps that count 10s 10.0% compiling in steps 1s 1.0% starting up 5s 5.0% between starts 1m24s 84.0%"
          in page.text)
  assert [a["class"] for a in page.all("i") if "style" in a] == ["useful", "compile", "startup", "stopped"]
  assert [a["style"] for a in page.all("i") if "style" in a][0] == "flex-grow:0.1000"
  assert all("Where the time went" not in _render(clock=none) for none in ((), clock[:1]))


def test_a_folder_with_a_clock(tmp_path):
  (tmp_path / "wallclock.jsonl").write_text('{"at": 1, "spent": "stopped"}\n{"at": 3, "spent": "evaluation"}\n{"at"')
  assert "evaluation" in _Page(pathlib.Path(page_html.write(str(tmp_path))).read_text()).text
