"""The pages in a real browser: what the script draws, filters and keys, hostile text, phones and dark mode."""

import dataclasses
import json
import shutil

from PIL import Image
import pytest

from tests.report import test_benchmark
from tests.report import test_html
from virl_jax.eval import compare
from virl_jax.report import benchmark
from virl_jax.report import html

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
  playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")
  if _CHROMIUM is None:
    pytest.skip("needs chromium on the path: apt-get install chromium")
  with playwright.sync_playwright() as p:
    started = p.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
    yield started
    started.close()


@pytest.fixture(scope="module")
def tab(browser):
  context = browser.new_context(viewport={"width": 1300, "height": 900})
  yield context.new_page()
  context.close()


@pytest.fixture
def show(browser, tab, tmp_path):
  """Opens a page from a file; nothing may be printed on the console, fetched, or raised."""
  said, contexts = [], []
  heard = {"console": lambda message: said.append(message.text), "pageerror": lambda error: said.append(str(error)),
           "dialog": lambda dialog: (said.append(f"dialog {dialog.message}"), dialog.dismiss()),
           "request": lambda request: said.append(request.url) if request.url.split(":")[0] not in (
               "file", "data") else None}

  def listen(page):
    for name, hear in heard.items():
      page.on(name, hear)

  def opened(text, **how):
    page = tab
    if how:
      contexts.append(browser.new_context(**how))
      page = contexts[-1].new_page()
      listen(page)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector("#viewer.ready")
    return page

  opened.said = said
  listen(tab)
  yield opened
  for name, hear in heard.items():
    tab.remove_listener(name, hear)
  for context in contexts:
    context.close()
  assert said == []


def _items(n=40):
  """Trajectories that differ in everything that there is a filter for."""
  made = []
  for i in range(n):
    name = ("correct", "redundant", "erroneous")[i % 3]
    item = test_html._item(boxes=((10, 20, 40, 60),) * (i % 2), classes=(name,) * (i % 2), uid=f"u{i}")
    item |= {"question": f"Which of {i}?", "correct": i % 4 == 0, "kind": f"kind {i % 2}", "source": f"set {i % 5}",
             "reward": i / 10, "rollout": 0}
    for turn in item["turns"]:
      turn["iou"] = i / n if turn["box"] else None
      if turn["role"] == "assistant" and i == 1:
        turn["tokens"] = {"text": ["<think>", "hm", "é", "", "</think>"], "logp": [-0.1, -2.0, 0.0, -0.5, None],
                          "advantage": 0.5, "modulator": [1, 1.5, 1.5, 0.5, 1], "gap": [0, 1e-3, 0, 0, 0]}
    made.append(item)
  return made


def _page(**more):
  items = _items()
  return html.render(html.Run("run", {}, [{"step": 0, "rollout/logp_gap_mean": 1e-4}], kept=[
      ("Before", items[:4]), ("After", items)], **more))


def _choose(page, part, text):
  select = page.locator(f"[data-part={part}]")
  value = select.evaluate("(s, t) => [...s.options].find(o => o.textContent.startsWith(t)).value", text)
  select.select_option(value)
  return page.locator("[data-part=count]").inner_text()


def _question(page):
  return page.locator("#viewer article h3").first.inner_text()


def test_elements_and_filters(show):
  page = show(_page())
  count = page.locator("[data-part=count]")
  assert count.inner_text() == "44 of 44" and page.locator("select[data-part=run]").is_hidden()
  assert "Sampler–trainer gap" in page.locator(".tiles").inner_text()
  assert page.locator(".tile").first.bounding_box()["y"] < 400, "on the first screen"
  assert _choose(page, "outcome", "right") == "11 of 44" and _question(page) == "Which of 0?"
  assert _choose(page, "when", "After") == "10 of 44"
  page.locator("[data-part=reset]").click()
  assert count.inner_text() == "44 of 44"
  assert _choose(page, "class", "erroneous") == "6 of 44"
  assert _choose(page, "class", "no action") == "22 of 44"
  assert _choose(page, "class", "any") == "44 of 44"
  assert _choose(page, "kind", "kind 1") == "22 of 44"
  assert _choose(page, "source", "set 3") == "5 of 44"
  page.locator("[data-part=low]").fill("0.5")
  assert count.inner_text() == "2 of 44"
  page.locator("[data-part=high]").fill("0.6")
  assert count.inner_text() == "1 of 44" and _question(page) == "Which of 23?"
  page.locator("[data-part=reset]").click()
  page.locator("[data-part=search]").fill("WHICH of 31")
  assert count.inner_text() == "1 of 44" and _question(page) == "Which of 31?"
  page.locator("[data-part=search]").fill("nothing has this")
  assert count.inner_text() == "0 of 44" and "Nothing is left" in page.locator("[data-part=detail]").inner_text()
  page.locator("[data-part=reset]").click()
  _choose(page, "sort", "reward, highest")
  page.keyboard.press("Escape")
  page.locator("[data-part=list]").focus()
  page.keyboard.press("Home")
  assert _question(page) == "Which of 39?"


def test_what_one_trajectory_shows(show):
  item = test_html._item(boxes=((10, 20, 40.5, 60), (100, 50, 200, 100)), classes=("correct", "erroneous"))
  item["turns"][0]["text"] = "<think>a <b>" + "<|image_pad|>" * 3 + "</think>"
  page = show(html.render(html.Run("run", kept=[("After", [item])])))
  text = page.locator("#viewer article").inner_text()
  for said in ("correct", "IoU 0.50", "× 1.5", "A +1.35", "reward +1.25", "advantage +0.90",
               "right", "answered", "fidelity −0.50", "box (10, 20, 40.5, 60) px of the original", "told: too small",
               "200 × 100 px", "pattern", "u1"):
    assert said in text, said
  assert page.locator(".stage svg").get_attribute("viewBox") == "0 0 200 100"
  boxes = page.locator(".stage .box").evaluate_all("all => all.map(b => [b.classList[1], b.getAttribute('x')])")
  assert boxes == [["correct", "10"], ["erroneous", "100"], ["truth", "1"]]
  assert page.locator(".stage .tag").all_inner_texts() == ["1", "2"] and page.locator(".crops img").count() == 2
  assert page.locator("pre").first.inner_text() == "<think>a <b><|image_pad|>×3</think>"
  assert page.locator("pre .sp").first.inner_text() == "<think>"
  assert page.locator("img").evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 0)")


@pytest.mark.slow
def test_keys_and_the_enlarged_picture(show):
  page = show(_page())
  page.keyboard.press("j")
  page.keyboard.press("j")
  assert _question(page) == "Which of 2?"
  page.keyboard.press("k")
  assert _question(page) == "Which of 1?"
  small = page.locator("button.stage").bounding_box()["width"]
  page.keyboard.press("z")
  large = page.locator("dialog .stage")
  assert large.bounding_box()["width"] > 2 * small and page.locator("dialog .box").count() == 2
  wide = large.bounding_box()["width"]
  page.keyboard.press("+")
  assert large.bounding_box()["width"] == pytest.approx(1.5 * wide, rel=0.01)
  page.keyboard.press("b")
  assert page.locator("dialog .tag").first.is_hidden()
  page.keyboard.press("b")
  page.keyboard.press("Escape")
  assert page.locator("dialog").is_hidden() and _question(page) == "Which of 1?"
  page.locator(".crops button").first.click()
  assert "zoom 1 · redundant · box (10, 20, 40, 60)" in page.locator("dialog figcaption").inner_text()
  page.locator("[data-part=close]").click()
  page.keyboard.press("/")
  page.keyboard.type("of 30")
  assert page.locator("[data-part=count]").inner_text() == "1 of 44", "letters are words there, not keys"
  page.keyboard.press("Escape")
  page.locator("[data-part=reset]").click()
  page.locator("[data-part=list]").focus()
  page.keyboard.press("End")
  assert page.locator("[aria-selected=true]").get_attribute("aria-posinset") == "44"
  page.keyboard.press("ArrowUp")
  assert page.locator("[aria-selected=true]").is_visible()
  assert page.locator("[role=option]").count() < 40, "rows that can't be seen are not there"


@pytest.mark.slow
def test_tokens_have_colours(show):
  page = show(_page())
  page.keyboard.press("j")
  assert page.locator(".tok").count() == 0
  _choose(page, "colour", "log-probability")
  tokens = page.locator("pre").first.locator(".tok")
  assert tokens.all_inner_texts() == ["<think>", "hm", "é", "</think>"]
  colour = lambda i: tokens.nth(i).evaluate("t => getComputedStyle(t).backgroundColor")
  assert len({colour(0), colour(1), colour(2)}) == 3
  tokens.nth(1).hover()
  assert page.locator(".readout").inner_text() == (
      "log-probability −2 · advantage 0.5 · modulator 1.5 · trainer less sampler 0.001")
  _choose(page, "colour", "modulator")
  assert colour(1) == colour(2) != colour(0)
  page.keyboard.press("Escape")
  page.locator("[data-part=list]").focus()
  page.keyboard.press("k")
  assert page.locator(".tok").count() == 0, "this one has no tokens"


def test_the_same_task_side_by_side(show):
  items = _items(8)
  first = html.Run("one", kept=[("After", items)])
  second = html.Run("two", kept=[("After", [item | {"correct": not item["correct"]} for item in items])])
  page = show(html.render(first, second))
  told = lambda: page.locator("#viewer article .chips").evaluate_all("all => all.map(c => c.firstChild.textContent)")
  assert told() == ["right", "wrong"] and page.locator("#viewer article").count() == 2
  page.keyboard.press("j")
  assert told() == ["wrong", "right"] and page.locator("#viewer article h3").all_inner_texts() == ["Which of 1?"] * 2
  page.keyboard.press("s")
  assert told() == ["wrong"]
  assert _choose(page, "run", "two") == "8 of 16"


@pytest.mark.slow
def test_pages_of_evaluations(show, tmp_path):
  Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
  tasks = [test_benchmark._task(i, str(tmp_path / "a.png")) for i in range(6)]
  sides = []
  for name, texts in (("one", ["red"] * 3 + ["blue"] * 3), ("two", ["red", "blue"] * 3)):
    result, shown = test_benchmark._result(tasks, texts)
    sides.append(compare.Side(name, result, result["rows"], shown))
  page = show(benchmark.evaluation(sides[0].result, sides[0].shown, {}))
  assert _choose(page, "outcome", "wrong") == "3 of 6"
  assert page.locator("#viewer article .box").count() == 2 and page.locator(".crops img").count() == 1
  page = show(benchmark.comparison(compare.compare(*sides), *sides))
  assert page.locator("[data-part=count]").inner_text() == "6 of 12" and page.locator("#viewer article").count() == 2
  assert _choose(page, "change", "gained") == "1 of 12" and _question(page) == "Which 4?"
  told = page.locator("#viewer article .chips .good, #viewer article .chips .bad")
  assert told.all_inner_texts() == ["wrong", "right"]


def _hostile(value):
  """A value with hostile text in every place that can hold text, also in dicts' keys that are names."""
  if isinstance(value, str) and not value.startswith("data:"):
    return test_html._HOSTILE + value
  if isinstance(value, dict):
    return {key: _hostile(inner) for key, inner in value.items()}
  return [_hostile(inner) for inner in value] if isinstance(value, list) else value


def test_hostile_text_everywhere_is_text(show, monkeypatch):
  item = test_html._item(boxes=((10, 20, 40, 60),))
  item["turns"][0]["tokens"] = {"text": ["x", "y"], "logp": [0, -1]}
  item["reward_parts"] = {test_html._HOSTILE: 1.0}
  bad = _hostile(item)
  for turn in bad["turns"]:
    turn["text"] += "</script><script>alert(3)</script>"
  run = html.Run(test_html._HOSTILE, {test_html._HOSTILE: test_html._HOSTILE}, kept=[(test_html._HOSTILE, [bad, bad])])
  pages = [html.render(run), html.render(run, dataclasses.replace(run, name="</script>" + run.name))]
  result, shown = test_benchmark._result([test_benchmark._task(0), test_benchmark._task(1)], ["red", "blue"])
  result, shown = _hostile(result), _hostile(shown)
  side = compare.Side(test_html._HOSTILE, result, result["rows"], shown)
  pages.append(benchmark.evaluation(result, shown, {test_html._HOSTILE: [test_html._HOSTILE]}))
  pages.append(benchmark.comparison(compare.compare(side, side), side, side))
  for text in pages:
    page = show(text)
    page.keyboard.press("c")
    page.keyboard.press("j")
    if page.locator("button.stage").count():
      page.keyboard.press("z")
      page.keyboard.press("Escape")
    for crop in page.locator(".crops button").all()[:1]:
      crop.click()
      page.keyboard.press("Escape")
    assert page.locator("script").count() == 2 and page.locator("img[src=x], [onerror]").count() == 0
    assert "<script>alert(1)</script>" in page.locator("#viewer article h3").first.inner_text()
  # Even if there were markup, the page's policy would not let it run.
  page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=\"window.ran = 1\">')")
  page.wait_for_timeout(100)
  assert page.evaluate("window.ran") is None
  refused = show.said.pop()
  assert "Content Security Policy" in refused and "script-src" in refused


@pytest.mark.parametrize("how", [
    {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}, {"color_scheme": "dark"}],
    ids=["phone", "dark"])
def test_phones_and_the_dark(show, how):
  page = show(_page(before=test_html._summary(0.5)), **how)
  page.locator("[data-part=list]").scroll_into_view_if_needed()
  assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the screen"
  if "color_scheme" in how:
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 26)"
    return
  page.locator("[role=option]").nth(1).tap()
  assert _question(page) == "Which of 1?" and page.locator("#viewer article h3").is_visible()
  lefts = [page.locator(part).bounding_box()["x"] for part in (".list", ".detail")]
  assert lefts[0] == lefts[1], "one below the other"
  page.locator("button.stage").tap()
  assert page.locator("dialog .stage").bounding_box()["width"] <= 360


@pytest.mark.slow
def test_thousands_are_all_found_again(show):
  """2,000 trajectories: the list has a few rows at a time, and its last can be reached."""
  items = [item | {"uid": f"{i}/{item['uid']}"} for i in range(50) for item in _items()]
  page = show(html.render(html.Run("run", kept=[("After", items)])))
  assert page.locator("[data-part=count]").inner_text() == "2,000 of 2,000"
  page.locator("[data-part=list]").evaluate("l => { l.scrollTop = l.scrollHeight }")
  page.wait_for_function("document.querySelector('[aria-posinset=\"2000\"]') !== null")
  page.locator("[aria-posinset='2000']").click()
  assert _question(page) == "Which of 39?" and page.locator("[role=option]").count() < 40
  assert _choose(page, "outcome", "right") == "500 of 2,000"
  assert json.loads(page.evaluate("JSON.stringify(performance.getEntriesByType('resource').length)")) == 0
