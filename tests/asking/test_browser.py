"""The page in a real browser: a picture is dropped, a question typed, and zooms are drawn as they happen."""

import os
import pathlib
import shutil
import threading
import time

import pytest

from tests.asking import played
from tests.asking.test_site import Served

CHROMIUM = os.environ.get("VIRL_JAX_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SHOTS = os.environ.get("VIRL_JAX_SCREENSHOTS")  # a folder to keep screenshots in


@pytest.fixture(scope="module")
def browser():
  api = pytest.importorskip("playwright.sync_api", reason="needs the extra browser")
  if CHROMIUM is None:
    pytest.skip("needs Chromium: apt-get install chromium, or its path as VIRL_JAX_CHROMIUM")
  with api.sync_playwright() as p:
    found = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
    yield found
    found.close()


@pytest.fixture(scope="module")
def policy():
  return played.policy()


def until(page, holds, timeout_s=15.0):
  """Playwright's own `wait_for_function` would have the page evaluate a string, which its policy forbids."""
  end = time.monotonic() + timeout_s
  while not holds():
    assert time.monotonic() < end, "it did not come to pass"
    page.wait_for_timeout(20)


class Visit:
  """A tab with the page, and what went wrong in it."""

  def __init__(self, browser, served, **how):
    self.context = browser.new_context(**how)
    self.page = self.context.new_page()
    self.page.set_default_timeout(15_000)
    self.wrong = []
    self.page.on("console", lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None)
    self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
    self.page.on("dialog", lambda d: self.wrong.append(f"dialog: {d.message}"))
    self.page.goto(f"http://127.0.0.1:{served.port}/")
    until(self.page, lambda: self.text("#about"))

  def choose(self, path):
    self.page.set_input_files("#file", path)

  def ask(self, question):
    self.page.fill("#question", question)
    self.page.click("#send")

  def text(self, where):
    return self.page.text_content(where)

  def shot(self, name):
    if SHOTS:
      self.page.screenshot(path=os.path.join(SHOTS, f"{name}.png"), full_page=True)


@pytest.fixture
def visit(browser, policy):
  opened = []

  def open_(answer=None, most=16, **how):
    served = Served(answer or played.Played(policy), most, about={"model": "<b>tiny</b>"}, upload_bytes=300_000)
    opened.append(served)
    opened.append(Visit(browser, served, **how))
    return opened[-1]

  yield open_
  for each in opened:
    each.context.close() if isinstance(each, Visit) else each.close()


@pytest.fixture
def photo(tmp_path):
  path = tmp_path / "<img src=x onerror=alert(1)>.png"
  path.write_bytes(played.picture(colour="#668"))
  return path


def test_looks_are_drawn_as_they_happen(visit, policy, photo):
  go = threading.Semaphore(0)
  v = visit(played.Played(policy, pieces=1, pause=lambda: go.acquire(timeout=15)))
  v.choose(photo)
  assert v.text("#name").startswith("<img src=x onerror=alert(1)>.png")
  v.ask("Which <b>pattern</b>?")
  v.page.wait_for_selector("#stage img")
  assert v.page.locator("#stage rect").count() == 0
  for looks, turns in ((1, 1), (1, 2), (2, 3)):
    go.release()
    until(v.page, lambda turns=turns: v.page.locator("#turns .note").count() == turns)
    assert v.page.locator("#stage rect.box.plain").count() == v.page.locator("#turns .crop").count() == looks
  go.release()
  v.page.wait_for_selector("#final:not([hidden])")
  box = v.page.locator("#stage rect.box.plain").first
  assert [box.get_attribute(name) for name in ("x", "y", "width", "height")] == ["30", "36", "90", "108"]
  assert v.page.evaluate("document.querySelector('#stage img').naturalWidth") == 252
  assert "looks at (30, 36, 120, 144) px of the original" in v.text("#turns")
  v.shot("desktop")
  assert v.text("#asked") == "Which <b>pattern</b>?" and v.text("#about").startswith("model <b>tiny</b>")
  assert "rows <script>document.title" in v.text("#final") and "<img src=x" in v.text("#turns")
  assert "\u202e" not in v.text("#turns") and "\x1b" not in v.text("#turns")
  assert v.page.title() == "Ask about a picture" and v.page.locator("main script, main b:not(#hint b)").count() == 0
  assert not v.page.locator("#stop").is_visible() and v.page.locator("#send").is_enabled() and v.wrong == []


def test_a_drop_a_second_question_and_the_keyboard(visit):
  v = visit()
  data = v.page.evaluate_handle("""async () => {
    const canvas = Object.assign(document.createElement('canvas'), {width: 300, height: 200});
    canvas.getContext('2d').fillRect(20, 20, 99, 50);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve));
    const data = new DataTransfer();
    data.items.add(new File([blob], 'drawn.png', {type: 'image/png'}));
    return data;
  }""")
  v.page.dispatch_event("#drop", "drop", {"dataTransfer": data})
  assert v.text("#name").startswith("drawn.png")
  for n in (1, 2):
    v.page.fill("#question", f"question {n}")
    v.page.press("#question", "Enter")
    until(v.page, lambda n=n: v.text("#asked") == f"question {n}")
    v.page.wait_for_selector("#final:not([hidden])")
    assert v.page.locator("#stage rect.box.plain").count() == 2 and v.page.locator("#turns li").count() == 4
  assert v.wrong == []


def test_hostile_files_are_refused_in_words(visit, tmp_path, photo):
  v = visit()
  v.ask("?")
  assert v.text("#alert") == "Choose a picture first."
  for name, data, said in (("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg' onload='x()'/>", "must be a picture"),
                           ("b.png", b"<script>alert(1)</script>", "must be a picture"),
                           ("c.png", played.picture()[:80], "damaged")):
    (tmp_path / name).write_bytes(data)
    v.choose(tmp_path / name)
    v.ask("What is it?")
    until(v.page, lambda said=said: said in v.text("#alert") and v.page.locator("#send").is_enabled())
  v.shot("refused")
  (tmp_path / "d.png").write_bytes(bytes(400_000))
  v.choose(tmp_path / "d.png")
  assert v.text("#alert") == "The file must have at most 0.3 MB; it has 0.4." and v.text("#name") == ""
  v.ask("What is it?")
  assert v.text("#alert") == "Choose a picture first.", "not about the one before"
  assert all("status of 4" in each for each in v.wrong), f"the refusals, and nothing else: {v.wrong}"
  v.choose(photo)
  v.ask("What is it?")
  v.page.wait_for_selector("#final:not([hidden])")
  assert v.text("#alert") == ""


def test_places_and_stopping(visit, policy, photo):
  go = threading.Semaphore(0)
  first = visit(played.Played(policy, pause=lambda: go.acquire(timeout=15)))
  first.choose(photo)
  first.ask("first")
  first.page.wait_for_selector("#stage img")
  second = first.context.new_page()
  second.goto(first.page.url)
  second.set_input_files("#file", photo)
  second.fill("#question", "second")
  second.click("#send")
  until(second, lambda: second.text_content("#status") == "Waiting: 1 question comes first.")
  first.page.click("#stop")
  until(first.page, lambda: first.text("#status") == "Stopped.")
  go.release(200)
  second.wait_for_selector("#final:not([hidden])", timeout=15_000)
  assert first.wrong == [] and first.text("#alert") == ""


@pytest.mark.parametrize("how", [{"viewport": {"width": 360, "height": 740}},
                                 {"color_scheme": "dark"}], ids=["narrow", "dark"])
def test_on_a_phone_and_in_the_dark(visit, photo, how, request):
  v = visit(**how)
  v.shot(f"{request.node.callspec.id}_empty")
  v.choose(photo)
  v.ask("Which pattern does the object have, " + "and a very long word: " + "x" * 200)
  v.page.wait_for_selector("#final:not([hidden])")
  v.shot(request.node.callspec.id)
  assert v.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing reaches beyond the screen"
  dark = v.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 26)"
  assert dark == ("color_scheme" in how) and v.wrong == []


def test_the_page_that_ask_writes(browser, policy, tmp_path):
  from virl_jax import ask
  from virl_jax import types
  from virl_jax.data import images
  task = types.Task("<b>x</b>", images.decode(played.picture()), "Which <i>one</i>?", kind="asked")
  out = tmp_path / "page.html"
  ask.ask(played.Played(policy), task, str(out), open(os.devnull, "w"))
  page, wrong = browser.new_page(), []
  page.on("console", lambda m: wrong.append(m.text))
  page.on("dialog", lambda d: wrong.append(d.message))
  page.goto(pathlib.Path(out).as_uri())
  if SHOTS:
    page.screenshot(path=os.path.join(SHOTS, "out.png"), full_page=True)
  assert page.locator(".stage rect.box").count() == 2 and page.locator(".crop").count() == 2
  assert "rows <script>" in page.text_content(".answers") and page.text_content("h3") == "Which <i>one</i>?"
  assert wrong == [] and page.title() == "A question about a picture"
