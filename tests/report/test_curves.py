"""Charts are well-formed and true to their values, also to odd ones."""

import itertools
import math
import random
from xml.etree import ElementTree

import pytest

from virl_jax.report import curves


def _draw(points, **how):
  return ElementTree.fromstring(curves.svg(points, "A <title> & more", **how))


def _named(root, name):
  return [e for e in root.iter() if e.get("class") == name]


def _path(element):
  return [tuple(map(float, pair.split(","))) for pair in element.get("points").split()]


def _words(root):
  return ["".join(e.itertext()) for e in root.iter() if e.tag.endswith("}text")]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("points", [
    [], [(0, 1.0)], [(5, 0.0)], [(0, 2.0), (1, 2.0), (2, 2.0)], [(0, 0.0), (1, 0.0)], [(3, 1.0), (3, 2.0)],
    [(0, math.nan)], [(0, math.nan), (1, 1.0), (2, math.inf), (3, 2.0), (4, 3.0)], [(0, -1.0), (1, 1.0)],
    [(0, 1e-30), (1, 1e30)], [(0, -1e300), (1, 1e300)], [(i, 1e9 + i) for i in range(4)]])
def test_odd_values_draw_inside_the_picture(points, log):
  root = _draw(points, log=log, zero=True, cap=4.0, marks=[(1, "<t>", "<m>")], before=0.5,
               after={"value": 0.7, "low": 0.6, "high": None})
  _, _, width, height = map(float, root.get("viewBox").split())
  drawn = [p for line in root.iter() if line.get("points") for p in _path(line)]
  drawn += [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter() if c.get("cx")]
  assert all(0 <= x <= width and 0 <= y <= height for x, y in drawn)
  assert "nan" not in ElementTree.tostring(root, "unicode")


def test_nothing_to_draw_is_said():
  for points in ([], [(0, math.nan)]):
    assert "no values" in _words(_draw(points))
  assert "no values" in _words(_draw([(0, -1.0)], log=True))


def test_line_is_to_scale():
  raw = _path(_named(_draw([(0, 0.0), (1, 10.0), (2, 5.0), (4, 0.0)]), "raw")[0])
  (x0, y0), (x1, y1), (x2, y2), (x4, y4) = raw
  assert x1 - x0 == pytest.approx((x4 - x0) / 4, abs=0.2) and x2 - x0 == pytest.approx((x4 - x0) / 2, abs=0.2)
  assert y0 == y4 > y2 > y1 and y0 - y2 == pytest.approx((y0 - y1) / 2, abs=0.2)


def test_logarithmic_line_is_to_scale():
  root = _draw([(0, 1e-6), (1, 1e-4), (2, 1e-5)], log=True)
  ys = [y for _, y in _path(_named(root, "raw")[0])]
  assert ys[0] - ys[2] == pytest.approx(ys[2] - ys[1], abs=0.2)
  assert {"1e-6", "1e-5", "1e-4"} <= set(_words(root))


def test_a_gap_in_the_values_breaks_the_raw_line_only():
  points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 3.0), (4, 1.0)]
  root = _draw(points)
  assert [len(_path(e)) for e in _named(root, "raw")] == [2, 2]
  assert [len(_path(e)) for e in _named(root, "ema")] == [4]


def test_last_value_is_labelled_and_points_say_their_values():
  root = _draw([(i, 0.25) for i in range(30)])
  assert _named(root, "value")[0].text == "0.25"
  titles = [e.text for e in root.iter() if e.tag.endswith("}title")]
  assert "step 29: 0.25 (average 0.25)" in titles and len(titles) == 30


def test_a_long_run_stays_small_and_keeps_its_spike():
  rng = random.Random(0)
  points = [(i, rng.random()) for i in range(20000)]
  points[7777] = (7777, 50.0)
  text = curves.svg(points, "t")
  assert len(text) < 60_000
  raw = _path(_named(ElementTree.fromstring(text), "raw")[0])
  low, high = min(y for _, y in raw), max(y for _, y in raw)
  assert high - low > 100  # the spike spans nearly the whole plot


def test_cap_keeps_a_slow_first_step_from_flattening_the_rest():
  points = [(0, 60.0)] + [(i, 4.0 + i % 2) for i in range(1, 20)]
  spans = []
  for cap in (None, 4.0):
    root = _draw(points, zero=True, cap=cap)
    ys = [y for _, y in _path(_named(root, "raw")[0])][1:]
    spans.append(max(ys) - min(ys))
  assert spans[1] > 8 * spans[0]
  assert _named(root, "outlier")[0][0].text == "step 0: 60"


def test_marks_and_evaluations_are_drawn():
  root = _draw([(0, 0.0), (10, 1.0)], marks=[(5, "<1>", "a <b>"), (99, "2", "outside")], before=0.0,
               after={"value": 1.0, "low": 0.5, "high": 1.0})
  mark, = _named(root, "mark")
  title, line, tag = mark
  assert (title.text, tag.text) == ("a <b>", "<1>")
  (x0, _), (x1, _) = _path(_named(root, "raw")[0])
  assert float(line.get("x1")) == float(line.get("x2")) == float(tag.get("x")) == pytest.approx((x0 + x1) / 2, abs=0.1)
  assert _named(root, "before") and _named(root, "after")
  bar = next(e for e in _named(root, "after")[0] if e.get("y1"))
  (_, y0), (_, y1) = _path(_named(root, "raw")[0])
  assert float(bar.get("y1")) == pytest.approx((y0 + y1) / 2, abs=0.2)
  assert not _named(_draw([(0, 1.0)], before={"value": None}), "before")


def test_tags_of_crowded_marks_do_not_overlap():
  root = _draw([(0, 0.0), (999, 1.0)], marks=[(x, "1", "m") for x in (0, 1, 2, 500, 501, 998)])
  marks = _named(root, "mark")
  assert len(marks) == 6 and all(m.findall("{*}line") for m in marks)
  tags = [float(t.get("x")) for m in marks for t in m.findall("{*}text")]
  assert len(tags) == 5 and all(b - a > 8 for a, b in itertools.pairwise(tags))  # the tag of 2 would be too far away


@pytest.mark.parametrize(("low", "high"), [
    (0, 1), (-0.62, 1.17), (0, 119), (1e-7, 3e-7), (-5e6, 2e6), (99.1, 99.9)])
def test_ticks_are_round_and_inside(low, high):
  found = curves.ticks(low, high)
  assert 2 <= len(found) <= 7
  assert all(low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high) for t in found)
  step = found[1] - found[0]
  assert round(step / 10.0 ** math.floor(math.log10(step) + 1e-6), 6) in (1, 2, 5)
  assert [b - a for a, b in itertools.pairwise(found)] == pytest.approx([step] * (len(found) - 1))


def test_smooth_is_unbiased_and_follows():
  assert curves.smooth([]) == []
  assert curves.smooth([3.0] * 5) == pytest.approx([3.0] * 5)
  step = curves.smooth([0.0] * 50 + [1.0] * 50)
  assert step[49] == 0.0 and 0.0 < step[50] < 0.5 and step[-1] > 0.99


@pytest.mark.parametrize(("value", "text"), [
    (None, "–"), (math.nan, "–"), (math.inf, "∞"), (0.0, "0"), (0.12345, "0.123"), (-0.5, "−0.5"),
    (119, "119"), (1234.5, "1234"), (12345, "12.3k"), (2.5e6, "2.5M"), (3e-6, "3e-6"), (-5.81e-4, "−5.8e-4")])
def test_number(value, text):
  assert curves.number(value) == text
