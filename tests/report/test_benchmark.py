"""Pages of evaluations say what was measured, show what was answered, and trust no text."""

import json
import re

import numpy as np
from PIL import Image
import pytest

from tests.report.test_html import _data
from tests.report.test_html import _HOSTILE
from tests.report.test_html import _Page
from tests.report.test_html import _put
from tests.report.test_html import _safe
from tests.report.test_html import _strings
from virl_jax import types
from virl_jax.eval import compare
from virl_jax.eval.benchmarks import rows as rows_lib
from virl_jax.report import benchmark


def _task(i, image="", kind="colour", boxes=(types.Box(1, 2, 11, 12),)):
  return types.Task(f"u{i}", image, f"Which {i}?", ("red",), boxes, ("red", "blue"), kind, source="set")


def _result(tasks, texts, pictures=benchmark.PICTURES, **more):
  """What a benchmark gives, and what its pages show."""
  loaded = rows_lib.Loaded(tuple(tasks))
  found = {t.uid: [rows_lib.Prediction(text)] for t, text in zip(tasks, texts)}
  rows = rows_lib.scored(loaded, found)
  figures = {"accuracy": rows_lib.mean(rows), "by": {"n": len(rows)}}
  said = {(t.uid, 0): {"text": f"<think>hm</think><answer>{text}</answer>", "boxes": [[0, 0, 10, 10]], "ious": [0.6],
                       "classes": ["correct"], "stop": "answered"} for t, text in zip(tasks, texts)}
  result = rows_lib.result("vstar", "option", "accuracy", loaded, rows, figures) | more
  return result, benchmark.entries(tasks, rows, said, pictures)


def test_a_page_of_results(tmp_path):
  Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
  tasks = [_task(i, str(tmp_path / "a.png"), "colour" if i % 2 else "place") for i in range(8)]
  measure = {"value": 0.5, "low": 0.4, "high": 0.6}
  gap = {"n": 8, "acc_ans": measure, "acc_rat": {"value": None, "low": None, "high": None}}
  result, shown = _result(tasks, ["red"] * 6 + ["blue"] * 2, model="m", step=7, summary={"acc_rat": measure},
                          zooming_gap=gap)
  lost = {"tasks that cannot be asked": [f"u{i}: why" for i in range(23)], "no": []}
  text = benchmark.evaluation(result, shown, lost)
  page = _Page(text)
  assert "model m · step 7 · option" in page.text and "8 of 8 rows evaluated (100.00 %)" in page.text
  assert re.search(r"accuracy 75.0% [\d.]+ to [\d.]+ 8 of 8 rows", page.text)
  assert re.search(r"colour 4 75.0% [\d.]+ to [\d.]+ place 4 75.0%", page.text)
  assert "Actions right 50.0% 40.0 to 60.0" in page.text and "by: n 8" in page.text
  assert "on the 8 tasks that were asked both ways" in page.text and "+50.0 pts 40.0 to 60.0" in page.text
  assert "tasks that cannot be asked: 23" in page.text and "and 3 more" in page.text and "u22" not in page.text
  data = _data(text)
  first = data["items"][0]
  assert [item["outcome"] for item in data["items"]] == ["right"] * 6 + ["wrong"] * 2 and len(data["pictures"]) == 2
  assert (first["width"], first["height"], first["source"], first["best"]) == (60, 40, "set", 0.6)
  assert first["turns"][0]["text"] == ["", "<think>", "hm", "</think>", "", "<answer>", "red", "</answer>", ""]
  assert (first["turns"][1]["role"], first["turns"][1]["crop"] is None, first["drawn"][0]["kind"]) == (
      "looked", False, "correct")


def test_each_figure_has_its_own_interval():
  result, shown = _result([_task(i) for i in range(4)], ["red", "red", "blue", "red"])
  told = result | {"figures": {"other": 0.5, "accuracy": 0.75},
                   "intervals": {"other": [0.1, 0.6], "accuracy": [0.2, 0.8]}}
  page = _Page(benchmark.evaluation(told, shown, {})).text
  assert "accuracy 75.0% 20.0 to 80.0 4 of 4" in page and "other 50.0% 10.0 to 60.0 accuracy 75.0% 20.0 to 80.0" in page
  without = told | {"intervals": {"accuracy": None}}
  assert "accuracy 75.0% 4 of 4" in _Page(benchmark.evaluation(without, shown, {})).text


def test_several_samples_and_what_most_of_them_say():
  result, shown = _result([_task(i) for i in range(4)], ["red", "red", "blue", "red"])
  voted = {"score": 1.0, "figures": {"accuracy": 1.0}, "intervals": {"accuracy": [0.9, 1.0]}}
  page = _Page(benchmark.evaluation(result | {"samples": {"least": 3, "most": 4}, "majority": voted}, shown, {})).text
  assert "Avg@4" in page and "of the majority: accuracy 100.0% 90.0 to 100.0" in page


def test_pictures_go_to_wrong_answers_first_and_what_has_none_says_so(tmp_path):
  Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
  path = str(tmp_path / "a.png")
  tasks = [_task(0, path), _task(1, path), _task(2, str(tmp_path / "gone.png")), _task(3, ""),
           _task(4, Image.new("RGB", (30, 20))), _task(5, (tmp_path / "a.png").read_bytes())]
  result, shown = _result(tasks, ["red", "blue", "blue", "red", "red", "red"], 2)
  assert [e["file"] for e in shown] == [path, path, str(tmp_path / "gone.png"), None, None, None]
  assert all(e["image"] is None for e in shown), "what has no file is embedded if it is one of the first"
  text = benchmark.evaluation(result, shown, {}, 2)
  told = {item["uid"]: (item["picture"] is not None, item["left_out"]) for item in _data(text)["items"]}
  assert told == {"u1": (True, ""), "u2": (False, "its picture can no longer be read"),
                  "u0": (False, "no room for this picture"), "u3": (False, ""), "u4": (False, ""), "u5": (False, "")}
  assert ("Pictures of 1 of 6 tasks, wrong answers first. --pictures=N puts those of N tasks on the page; shown.jsonl "
          "names") in _Page(text).text
  _, shown = _result(tasks, ["red"] * 6, 6)
  assert [(e["image"] is not None, e["width"]) for e in shown[3:]] == [(False, None), (True, 30), (True, 60)]


def test_what_nobody_knows_is_not_said():
  """Others' predictions do not say how a policy ended, or where it looked."""
  task = _task(0, boxes=())
  rows = rows_lib.scored(rows_lib.Loaded((task,)), {"u0": [rows_lib.Prediction("red")]})
  shown = benchmark.entries([task], rows, {("u0", 0): {"text": "red", "boxes": ()}})
  item, = _data(benchmark.evaluation(_result([task], ["red"])[0], shown, {}))["items"]
  assert (item["stop"], item["best"], item["classes"], item["drawn"], item["picture"]) == ("", None, [], [], None)


def _side(name, texts, **more):
  result, shown = _result([_task(i, kind="colour" if i % 2 else "place") for i in range(len(texts))], texts, **more)
  return compare.Side(name, result, result["rows"], shown)


def test_a_page_of_two():
  a = _side("one", ["red", "blue", "blue", "blue", "blue", "red"], model="m")
  b = _side("two", ["red", "red", "red", "red", "blue", "blue"], model="n")
  text = benchmark.comparison(compare.compare(a, b), a, b)
  page = _Page(text)
  assert "one and two" in page.text and "6 tasks that both were asked" in page.text
  assert "Exact test p = 0.6250 3 gained, 1 lost" in page.text and "model m n" in page.text
  assert re.search(r"colour 3 33.3% 66.7% \+33.3 pts [\d.−]+ to [\d.−]+ 2 1 1.0000", page.text)
  data = _data(text)
  assert (data["runs"], data["beside"], data["start"]) == (["one", "two"], True, "one")
  assert [(i["uid"], i["run"], i["change"]) for i in data["items"]][:4] == [
      ("u5", 0, "lost"), ("u5", 1, "lost"), ("u1", 0, "gained"), ("u1", 1, "gained")]
  bare = benchmark.comparison(compare.compare(a, b), *(compare.Side(s.name, s.result, s.rows) for s in (a, b)))
  assert "have no shown.jsonl" in _Page(bare).text and "<script" not in bare


def _painted(folder, n, texts_of):
  """Two evaluations of tasks with a picture each, no two the same."""
  rng, tasks = np.random.default_rng(0), []
  for i in range(n):
    Image.fromarray(rng.integers(0, 255, (160, 240, 3), np.uint8)).save(folder / f"{i}.png")
    tasks.append(_task(i, str(folder / f"{i}.png")))
  sides = [_result(tasks, texts) for texts in texts_of]
  return [compare.Side(name, result, result["rows"], shown) for name, (result, shown) in zip("ab", sides)]


def test_tasks_that_flipped_are_the_first_to_have_their_pictures(tmp_path, monkeypatch):
  """Of 12 tasks the last five flipped, whatever else there is."""
  a, b = _painted(tmp_path, 12, (["red"] * 7 + ["blue"] * 3 + ["red"] * 2, ["red"] * 10 + ["blue"] * 2))
  found = compare.compare(a, b)
  pictured = lambda text: {i["uid"] for i in _data(text)["items"] if i["picture"] is not None}
  flipped = {f"u{i}" for i in range(7, 12)}
  for pictures, some in ((4, 4), (6, 5)):
    said = f"Pictures of {pictures} of 12 tasks, those that flipped first; of the 5 that flipped, {some} have theirs."
    text = benchmark.comparison(found, a, b, pictures)
    assert len(pictured(text)) == pictures and (pictured(text) <= flipped if pictures < 5 else flipped < pictured(text))
    assert said in _Page(text).text and "--pictures=N puts those of N tasks on the page" in _Page(text).text
    assert len(_data(text)["items"]) == 24, "all have their words"
  assert "Pictures of" not in _Page(benchmark.comparison(found, a, b, 12)).text
  for i in range(8, 12):  # what can no longer be read takes nobody's place
    (tmp_path / f"{i}.png").unlink()
  text = benchmark.comparison(found, a, b, 6)
  assert pictured(text) == {"u7", *(f"u{i}" for i in range(5))} and "of the 5 that flipped, 1 have theirs" in text
  gone = benchmark.comparison(found, a, b, 12)
  assert "Pictures of 8 of 12 tasks" in gone and "--pictures=N" not in gone
  a, b = _painted(tmp_path, 12, (["red"] * 7 + ["blue"] * 3 + ["red"] * 2, ["red"] * 10 + ["blue"] * 2))
  # Room for some of the pictures alone: the rest has its words all the same, and more pictures have more room.
  size = len(benchmark.comparison(found, a, b, 12)) - len(benchmark.comparison(found, a, b, 0))
  monkeypatch.setattr(benchmark, "_ROOM", size)
  monkeypatch.setattr(benchmark, "PICTURES", 12)
  text = benchmark.comparison(found, a, b, 12)
  assert flipped < pictured(text) and 5 < len(pictured(text)) < 12 and len(_data(text)["items"]) == 24
  assert len(pictured(benchmark.comparison(found, a, b, 24))) == 12


def _crowded():
  """All text that a page of results is made of."""
  result, shown = _result([_task(0), _task(1)], ["red", "blue"], model="m", step="1", summary={},
                          judge={"model": "j"}, zooming_gap=None)
  shown[0]["left_out"] = "why"
  return {"result": result, "shown": shown, "lost": {"what": ["line"]}}


@pytest.mark.parametrize("place", [p for p in _strings(_crowded()) if p[-1] not in ("role",)], ids=str)
def test_hostile_text_is_text(place):
  how = _crowded()
  _put(how, place, _HOSTILE)
  text = benchmark.evaluation(**how)
  page = _safe(text)
  hidden = place[:2] == ("result", "rows") or place[-1] in ("file", "image", "left_out")
  assert hidden or "alert(1)" in page.text + json.dumps(_data(text))


def test_a_hostile_category_is_text():
  result, shown = _result([_task(0, kind=_HOSTILE), _task(1)], ["red", "blue"])
  assert "alert(1)" in _safe(benchmark.evaluation(result, shown, {})).text.partition("Predictions")[0]


def test_hostile_text_in_a_comparison_is_text():
  a, b = (_side(_HOSTILE, [_HOSTILE, text], model=_HOSTILE + text, metric=_HOSTILE, benchmark=_HOSTILE)
          for text in ("red", "blue"))
  for side in (a, b):
    for row in side.rows:
      row["kind"] = _HOSTILE
  found = compare.compare(a, b)
  assert _safe(benchmark.comparison(found, a, b)).text.count("alert(1)") > 6


def test_the_files_of_a_page_that_is_too_large_are_named(monkeypatch):
  monkeypatch.setattr(benchmark, "_ROOM", 3000)
  result, shown = _result([_task(i) for i in range(9)], ["red"] * 9)
  text = benchmark.evaluation(result, shown, {})
  there = len(_data(text)["items"])
  assert 0 < there < 9 and f"{9 - there} more predictions are in predictions.jsonl or rows.jsonl" in _Page(text).text
