"""The page shows what happened, needs nothing from elsewhere, and trusts no text."""

import html.parser
import importlib.resources
import json
import pathlib
import re

import numpy as np
from PIL import Image
import pytest

from virl_jax import types
from virl_jax.eval import monitors
from virl_jax.report import gallery
from virl_jax.report import html as page_html
from virl_jax.run import log

_VOID = {"meta", "link", "img", "input", "br", "hr"}
_IDS = np.zeros(1, np.int32)
_HOSTILE = '<script>alert(1)</script>"\'><img src=x onerror=alert(2)>&lt;</pre>\x00\ud800\u202e'


class _Page(html.parser.HTMLParser):
  """Collects elements and text, and insists that what is opened is closed."""

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
    if not self.open or self.open[-1] != "style":
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
  return page_html.render(config or {}, list(metrics), before, after, difference, list(kept), title, clock)


def _kept(*items, label="After"):
  return {"step": 3, "label": label, "entries": list(items)}


def _article(item):
  """The part of a page that is about one trajectory."""
  text = _render(kept=[_kept(item)])
  return text[text.index("<article"):text.index("</article>") + len("</article>")]


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
    assert tag not in ("script", "iframe", "object", "base")
    for name in ("src", "href", "srcset", "action", "xlink:href"):
      assert attrs.get(name, "data:").startswith("data:"), (tag, attrs)
    assert not any(name.startswith("on") for name in attrs)
  assert "url(" not in text and "@import" not in text
  policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
  assert "default-src 'none'" in policy and "script-src" not in policy


def _strings(value):
  """Where a nest of dicts and lists holds text: each place as a tuple of keys."""
  pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  return [()] if isinstance(value, str) else [(key, *rest) for key, inner in pairs for rest in _strings(inner)]


def _put(value, place, text):
  for key in place[:-1]:
    value = value[key]
  value[place[-1]] = text


def _entry():
  """An entry with text wherever one can have it."""
  item = _item()
  item["turns"][0] |= {"error": "too small", "action": "look"}
  item["turns"].append({**item["turns"][1], "role": "tool", "action": "measure"})
  return item


def _safe(text):
  text.encode("utf-8")
  assert "<script" not in text and "<img src=x" not in text and "\x00" not in text and "\u202e" not in text
  page = _Page(text)
  assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
  return page


@pytest.mark.parametrize("place", [*_strings(_entry()), ("reward_parts",)], ids=str)
def test_hostile_text_in_a_trajectory_is_text(place):
  item = _entry()
  _put(item, place, {_HOSTILE: 1.0} if place == ("reward_parts",) else _HOSTILE)
  page = _safe(_render(after=_summary(0.5), kept=[_kept(item), _kept(item)]))
  if place[-1] in ("image", "crop"):
    assert len(page.all("img")) == 2
  else:
    assert "alert(1)" in page.text
    assert any(_HOSTILE[:-3] in words for words in page.words)  # to the last quote as it was written


def _crowded():
  """Whatever else a page is made of."""
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
  assert _safe(text).text.count("alert(1)") == 3 and 'class="mark"' in text  # listed, told, and marked on a curve


def test_a_forgotten_filter_leaves_nothing_unsafe():
  """Escaping and the taking out of what can't be seen are the environment's, not the template's."""
  shown = page_html._environment().from_string("{{ text }}{{ many }}<i title='{{ text }}'>").render(
      text=_HOSTILE, many=[_HOSTILE])
  assert "<script" not in shown and "<img" not in shown and "'\"" not in shown
  assert not {"\x00", "\ud800", "\u202e"} & set(shown)


def test_what_the_page_is_made_of_is_in_the_package():
  files = importlib.resources.files("virl_jax.report")
  texts = {name: files.joinpath(name).read_text(encoding="utf-8")
           for name in ("page.css", "page.html.j2", "trajectory.html.j2")}
  assert "</style" not in texts["page.css"] and "url(" not in texts["page.css"]
  templates = texts["page.html.j2"] + texts["trajectory.html.j2"]
  assert "<script" not in templates and not re.search(r"\|\s*safe|autoescape", templates)
  assert templates.count("<img") == 1  # the one that looks at what it is given
  setup = (pathlib.Path(__file__).parents[2] / "setup.py").read_text(encoding="utf-8")
  shipped = re.search(r"package_data=\{(.*?)\}", setup)[1]
  assert '"**/*.css"' in shipped and '"**/*.j2"' in shipped


@pytest.mark.parametrize("uri", [
    "http://example.org/a.png", "data:text/html;base64,AAAA", 'data:image/png;base64,AA" onerror="alert(1)',
    "javascript:alert(1)", "data:image/svg+xml;base64,AAAA", "data:image/png;base64,AAAA\n"])
def test_only_pictures_are_shown_as_pictures(uri):
  item = _item()
  item["image"] = item["turns"][0]["crop"] = uri
  assert _Page(_render(kept=[_kept(item)])).all("img") == []


def test_boxes_lie_where_they_were_drawn():
  page = _Page(_article(_item(boxes=((10, 20, 40.5, 60), (100, 50, 200, 100)),
                                        classes=("correct", "erroneous"), size=(200, 100))))
  assert page.all("svg")[0]["viewbox"] == "0 0 200 100"  # the overlay covers the picture: original pixels
  found = {a["class"]: tuple(float(a[k]) for k in ("x", "y", "width", "height"))
           for a in page.all("rect") if a["class"] != "halo"}
  assert found == {"box truth": (1, 2, 30, 40), "box correct": (10, 20, 30.5, 40),
                   "box erroneous": (100, 50, 100, 50)}
  tags = [(a["class"], a["style"]) for a in page.all("span") if "style" in a]
  assert [name for name, _ in tags] == ["tag correct", "tag erroneous"]
  assert "left:min(5.00% + 0px" in tags[0][1] and "top:max(20.00%" in tags[0][1]
  assert "left:min(50.00% + 0px" in tags[1][1] and "top:max(50.00%" in tags[1][1]


def test_shrunk_picture_keeps_original_coordinates():
  item = _item(boxes=((1000, 500, 1500, 700),), size=(3000, 2000))
  page = _Page(_article(item))
  assert page.all("svg")[0]["viewbox"] == "0 0 3000 2000"
  assert page.all("rect", **{"class": "box correct"})[0]["x"] == "1000"


def test_numbers_of_zooms_at_one_place_stand_side_by_side():
  box = (100, 50, 150, 90)
  page = _Page(_article(_item(boxes=(box, box, (102, 51, 150, 90)), classes=("correct",) * 3)))
  assert [re.search(r"\+ (\d+)px", a["style"])[1] for a in page.all("span") if "style" in a] == ["0", "19", "38"]
  assert "1 2 3 200 × 100 px" in page.text


def test_turns_say_what_was_made_of_them():
  item = _item(boxes=((10, 20, 40, 60),), classes=("redundant",))
  text = _Page(_article(item)).text
  for said in ("redundant", "IoU 0.50", "× 1.5", "A +1.35", "reward +1.25", "advantage +0.90", "right",
               "answered", "fidelity −0.50", "box (10, 20, 40, 60) px", "told: too small"):
    assert said in text, said


def test_an_entry_without_names_of_actions_is_of_zooms():
  item = _item()
  for turn in item["turns"]:
    del turn["action"]  # as runs wrote them once
  told = {**item, "turns": [{**turn, "action": turn["box"] and "image_zoom_in_tool"} for turn in item["turns"]]}
  assert _article(told) == _article(item) and "image_zoom_in_tool" not in _article(item)
  assert 'alt="what zoom 1 showed"' in _article(item) and "<title>zoom 1: correct</title>" in _article(item)


def test_an_action_that_showed_no_picture_has_its_box_and_its_name():
  item = _item(boxes=((10, 20, 40, 60), (50, 20, 90, 60)), classes=("correct", "redundant"))
  item["turns"][1] |= {"action": "read_text", "crop": None}
  page = _Page(_article(item))
  assert [a["class"] for a in page.all("rect")] == ["halo", "box correct", "halo", "box redundant", "halo", "box truth"]
  assert len(page.all("img")) == 2  # the picture, and what the zoom showed
  assert [a["class"] for a in page.all("span") if a.get("class", "").startswith("num")] == [
      "num correct", "num redundant"]
  assert "2 policy read_text redundant IoU 0.50" in page.text and "read_text 2: redundant" in page.text
  assert "box (50, 20, 90, 60) px" in page.text


def test_an_action_without_a_box_has_no_number():
  item = _item(boxes=((10, 20, 40, 60),))
  measured = {**item["turns"][1], "action": "measure", "error": None, "modulator": 0.5, "class": "correct"}
  item["turns"].insert(0, measured)
  del measured["crop"]
  page = _Page(_article(item))
  assert "policy measure correct × 0.5" in page.text and "1 policy correct IoU 0.50" in page.text
  assert [a["class"] for a in page.all("span") if a.get("class", "").startswith("num")] == ["num correct"]
  assert len(page.all("rect", **{"class": "box correct"})) == 1 and page.text.count("px of the original") == 1
  refused = {**measured, "error": "no such thing"}
  assert "measure" in _article({**item, "turns": [refused], "boxes": []})


def test_without_an_accepted_answer_nothing_is_right_or_wrong():
  text = _Page(_article(_item(answers=()))).text
  assert "right" not in text and "wrong" not in text and "accepted" not in text


def test_transcript_dims_special_tokens_and_folds_pads():
  def shown(text):
    item = _item(boxes=(), classes=())
    item["turns"][0]["text"] = text
    return re.search("<pre>(.*?)</pre>", _article(item), re.DOTALL)[1]

  assert shown("<|im_start|>a <b>" + "<|image_pad|>" * 324 + "</tool_call>\n") == (
      '<span class="sp">&lt;|im_start|&gt;</span>a &lt;b&gt;'
      '<span class="sp">&lt;|image_pad|&gt;</span>×324<span class="sp">&lt;/tool_call&gt;</span>')
  assert shown("\n two\r\n  lines \n") == " two\n  lines "  # as they were written
  long = shown("x" * 20000)
  assert len(long) < 12100 and "8000 more characters" in long


def test_cards_show_values_intervals_and_the_difference():
  text = _Page(_full()).text
  assert "75.0% 70.0 to 80.0 from 25.0% 20.0 to 30.0 ▲ +50.0 pts 40.0 to 60.0" in text
  assert "IoU ≥ 0.4" in text and "64 held-out tasks" in text and "model name ·" in text
  assert "Mean IoU of zooms" not in text  # no value, no card
  assert "pattern 64 25.0% → 75.0% – 25.0% → 75.0% –" in text
  assert "Overlong 12.5% → 12.5%" in text


def test_what_can_no_longer_be_measured_is_not_shown_as_it_was():
  """A policy that has stopped zooming has no share of right zooms, least of all that of before."""
  after = _summary(0.75) | {"acc_rat": {"value": None, "low": None, "high": None}, "overlong_rate": None}
  after["by_kind"] = {"pattern": {"n": 64, "acc_ans": 0.75, "acc_rat": None, "hit_rate": None}}
  page = _full(after=after)
  text = _Page(page).text
  assert "Rationale accuracy – from 25.0% 20.0 to 30.0 zooms that hit" in text
  assert "pattern 64 25.0% → 75.0% – 25.0% → – –" in text and "Overlong 12.5% → –" in text
  assert "25.0% 20.0 to 30.0 zooms that hit" in _Page(_full(after=None)).text  # before the end it is all there is


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


def test_last_rollouts_are_shown_first_and_each_can_be_chosen():
  text = _render(kept=[_kept(_item(), label="Before"), _kept(_item(), label="Step 20"), _kept(_item())])
  page = _Page(text)
  radios = page.all("input")
  assert ["checked" in a for a in radios] == [False, False, True]
  assert [a["for"] for a in page.all("label")] == [a["id"] for a in radios]
  for i, radio in enumerate(radios, start=1):
    assert f"#{radio['id']}:checked~.panes>:nth-child({i}){{display:block}}" in text


def _workdir(tmp_path):
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
  assert "Before Step 20 Step 100 After" in page.text
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
  one = len(json.dumps(_item(uid="task of step_000100")))
  monkeypatch.setattr(page_html, "_GALLERY_BYTES", int(3.5 * one))
  page_html.write(str(tmp_path))
  text = (tmp_path / "report.html").read_text(encoding="utf-8")
  there = [name for name in ("before", "step_000020", "step_000100", "after") if f"task of {name}<" in text]
  assert there == ["before", "step_000100", "after"]


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
