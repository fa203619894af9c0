"""The report's page with thousands of trajectories in headless Chromium: ms to first paint, to the list, per filter.

    python benchmarks/report.py                         # 2,000 trajectories
    python benchmarks/report.py --count=500 --words=400

Trajectories are made up: pictures of 252 x 200 px, four rollouts of each task, up to three zooms with their crops, and
numbers for each token.  A filter's time is from its change to the second frame after it, so that it includes drawing;
an idle page takes about 33 ms for two frames.  Beside it is the processor time of the page's main thread, which a busy
machine does not stretch.  Needs playwright, and chromium on the path.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import shutil
import statistics
import tempfile
import time

import numpy as np
from PIL import Image, ImageDraw
from playwright.sync_api import sync_playwright

from virl_jax import types
from virl_jax.report import gallery
from virl_jax.report import html

WORDS = "a the small blue red cup lamp mark on of is where stands near corner left upper I look zoom in faint".split()
FRAMES = ("new Promise(done => requestAnimationFrame(() => requestAnimationFrame("
          "() => done(performance.now() - began))))")


def picture(rng: random.Random) -> Image.Image:
  image = Image.new("RGB", (252, 200), (235, 232, 220))
  draw = ImageDraw.Draw(image)
  for _ in range(9):
    x, y = rng.randrange(220), rng.randrange(170)
    draw.ellipse((x, y, x + 22, y + 22), fill=tuple(rng.randrange(256) for _ in range(3)))
  return image


def entry(rng: random.Random, number: int, image: Image.Image, words: int) -> dict:
  """One trajectory, with numbers for each token."""
  turns, ious, classes, text = [], [], [], []

  def said(tail: str, **more) -> types.Turn:
    pieces = [f"{w} " for w in rng.choices(WORDS, k=words)] + [tail]
    ids = np.arange(len(text), len(text) + len(pieces))
    text.extend(pieces)
    return types.Turn("assistant", ids, np.float32([-rng.expovariate(2) for _ in pieces]), "".join(pieces), **more)

  for _ in range(rng.randrange(4)):
    x, y = rng.randrange(200), rng.randrange(150)
    box = types.Box(x, y, x + 50, y + 50)
    turns.append(said("<tool_call>{}</tool_call>", region=box, written=tuple(box), action="image_zoom_in_tool"))
    turns.append(types.Turn("tool", np.zeros(3, np.int32), text="<tool_response></tool_response>", image_index=1))
    ious.append(rng.random())
    classes.append(rng.choice(["correct", "redundant", "erroneous"]))
  turns.append(said("<answer>B</answer>"))
  task = types.Task(f"task {number // 4}", b"", f"Which mark is on object {number // 4}?", ("B",),
                    (types.Box(40, 50, 80, 90),), ("x", "y"), rng.choice(["one", "two"]), source=rng.choice("abc"))
  right = rng.random() < 0.6
  traj = types.Trajectory(task, number % 4, np.zeros(4, np.int32), turns, [], types.StopReason.ANSWERED, "B", right)
  size = len(traj.ids)
  return gallery.entry(traj, image, ious, classes, [1.5] * len(ious), rng.gauss(0, 1), rng.random(), {"answer": right},
                       lambda ids: "".join(text[i] for i in ids),
                       {"advantage": np.float32([rng.gauss(0, 1) for _ in range(size)]), "modulator": np.ones(size)})


def timed(page, action: str) -> float:
  """Milliseconds of an action and two frames."""
  return page.evaluate(f"() => {{ const began = performance.now(); {action}; return {FRAMES}; }}")


def busy_ms(session) -> float:
  """Processor time of the page's main thread so far, in milliseconds."""
  metrics = session.send("Performance.getMetrics")["metrics"]
  return 1e3 * next(m["value"] for m in metrics if m["name"] == "TaskDuration")


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--count", type=int, default=2000)
  parser.add_argument("--words", type=int, default=60, help="words of a turn")
  parser.add_argument("--tries", type=int, default=5)
  args = parser.parse_args()
  rng = random.Random(0)
  pictures = [picture(random.Random(i)) for i in range(args.count // 4 + 1)]
  kept = [("After", [entry(rng, i, pictures[i // 4], args.words) for i in range(args.count)])]
  began = time.perf_counter()
  text = html.render(html.Run("many", kept=kept))
  print(f"{args.count} trajectories: {len(text) / 1e6:.1f} MB, made in {time.perf_counter() - began:.2f} s")
  choose = lambda part, value: (f"const s = document.querySelector('[data-part={part}]'); s.value = '{value}'; "
                                "s.dispatchEvent(new Event(s.tagName === 'SELECT' ? 'change' : 'input'))")
  key = lambda name: f"dispatchEvent(new KeyboardEvent('keydown', {{key: '{name}'}}))"
  actions = {
      "nothing": "", "outcome": choose("outcome", "right"), "class": choose("class", "erroneous"),
      "IoU from 0.5": choose("low", "0.5"), "kind": choose("kind", "one"), "source": choose("source", "a"),
      "all again": "document.querySelector('[data-part=reset]').click()",
      "words, the first time": choose("search", "cup"), "words": choose("search", "object 77"),
      "order by IoU": choose("sort", "IoU, lowest first"),
      "next": key("j"), "next, tokens in colours": key("c") + ";" + key("j"),
      "scroll": "document.querySelector('[data-part=list]').scrollTop += 20000"}
  found = {name: [] for name in ("first paint", "list drawn", *actions)}
  used = {name: [] for name in ("list drawn", *actions)}
  with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
    file = pathlib.Path(folder) / "report.html"
    file.write_text(text, encoding="utf-8")
    browser = p.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
                                args=["--no-sandbox"])
    for _ in range(args.tries):
      page = browser.new_page(viewport={"width": 1300, "height": 900})
      session = page.context.new_cdp_session(page)
      session.send("Performance.enable", {"timeDomain": "threadTicks"})
      before = busy_ms(session)
      page.goto(file.as_uri())
      page.wait_for_selector("#viewer.ready")
      used["list drawn"].append(busy_ms(session) - before)
      found["list drawn"].append(page.evaluate("performance.now()"))
      page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length > 0")
      found["first paint"].append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
      page.locator("[data-part=list]").scroll_into_view_if_needed()
      for name, action in actions.items():
        if name in ("words, the first time", "order by IoU", "next"):
          timed(page, actions["all again"])
        before = busy_ms(session)
        found[name].append(timed(page, action))
        used[name].append(busy_ms(session) - before)
      page.close()
    version = browser.version
    browser.close()
  for name, times in found.items():
    busy = f"; {statistics.median(used[name]):4.0f} ms of the processor" if name in used else ""
    print(f"  {name:24} {statistics.median(times):7.0f} ms (most {max(times):.0f}){busy}")
  print(json.dumps({"count": args.count, "megabytes": round(len(text) / 1e6, 1), "chromium": version} | {
      name: round(statistics.median(times), 1) for name, times in found.items()} | {
          f"{name}, processor": round(statistics.median(times), 1) for name, times in used.items()}))


if __name__ == "__main__":
  main()
