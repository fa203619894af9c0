"""The command: what is printed while a policy looks, the page that is written, and the page that is served."""

import http.client
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

from absl import app
from absl import flags
from PIL import Image
import pytest

from configs import tiny
from tests import realdata
from tests.asking import played
from tests.asking.test_site import events
from tests.asking.test_site import Served
from virl_jax import ask
from virl_jax import types
from virl_jax.data import images
from virl_jax.rollout import told
from virl_jax.tiny import needle

ROOT = pathlib.Path(__file__).parents[1]


def task(picture, question="Which pattern does the red object have?"):
  return types.Task("x", images.decode(picture), question, kind="asked")


@pytest.fixture(scope="module")
def base():
  """The tiny base, as `--model=@tiny --config=configs/tiny.py` loads it."""
  return ask.load("@tiny", tiny.get_config())


def here(monkeypatch, *args):
  """The command, in this process."""
  values = flags.FlagValues()
  ask.define_flags(values)
  monkeypatch.setattr(sys, "argv", ["ask", *map(str, args)])
  values(sys.argv)
  monkeypatch.setattr(flags, "FLAGS", values)
  ask.main(["ask"])


@pytest.mark.parametrize("args, said", [
    ((), "--model=DIR and either"), (("--model=m",), "either"), (("--model=m", "--image=i"), "go together"),
    (("--model=m", "--question=i"), "go together"), (("--model=m", "--serve", "--image=i"), "or --serve"),
    (("--serve",), "--model=DIR"), (("--model=m", "--serve", "--out=o"), "or --serve")])
def test_how_it_is_used(monkeypatch, args, said):
  with pytest.raises(app.UsageError, match=said):
    here(monkeypatch, *args)


@pytest.mark.parametrize("args, said", [
    (("--image={place}/nothing.png",), "error: image must be a decodable file. Received: .*nothing.png"),
    (("--image={place}/a.png", "--model=nothing"), "error: config.model.path must be a folder"),
    (("--serve", "--model=nothing"), "error: config.model.path must be a folder")])
def test_a_slip_is_a_line(monkeypatch, tmp_path, args, said):
  (tmp_path / "a.png").write_bytes(played.picture())
  more = () if "--serve" in args else ("--question=?",)
  with pytest.raises(SystemExit, match=said):
    here(monkeypatch, "--model=@tiny", *more, *(a.format(place=tmp_path) for a in args))


def test_what_is_waited_for_is_said_before_it_is_waited_for(monkeypatch, tmp_path, capsys):
  """On standard error: standard output has the answer alone."""
  picture, heard = tmp_path / "a.png", []
  Image.new("RGB", (60, 40)).save(picture)

  def load(*args):
    heard.append(capsys.readouterr())
    return lambda task, tell: heard.append(capsys.readouterr())

  monkeypatch.setattr(ask, "load", load)
  here(monkeypatch, "--model=@tiny", f"--image={picture}", "--question=q")
  assert [it.err.strip().partition(" after ")[0] for it in heard] == ["loading @tiny", "loaded"]
  assert "waits for its programs, which are compiled unless the cache has them" in heard[1].err
  assert not heard[0].out and not heard[1].out
  monkeypatch.setattr(ask, "serve", lambda *args: heard.append(capsys.readouterr()))
  here(monkeypatch, "--model=@tiny", "--serve")
  assert heard[-2].err == "loading @tiny\n" and heard[-1].err.startswith("loaded after ")


def test_the_first_word_comes_before_what_takes_long_to_import():
  """There is no JAX here, so that its import ends the program."""
  code = ("import sys, runpy\nsys.modules['jax'] = None\n"
          "runpy.run_module('virl_jax.ask', run_name='__main__', alter_sys=True)")
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode and done.stderr.startswith("starting\n") and "jax" in done.stderr.splitlines()[-1]


def test_what_is_printed():
  out = io.StringIO()
  ask.ask(played.Played(played.policy(), pieces=3), task(played.picture()), stream=out)
  lines = out.getvalue().splitlines()
  assert lines[:5] == ["252 x 168 px, shown as 84 x 56 px", "<think>there</think><tool_call>",
                       '{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [10, 12, 40, 48]}}', "</tool_call>",
                       "[look 1: x 30 to 120, y 36 to 144 of 252 x 168 px; back came x 30 to 120, y 36 to 144 as 28 x "
                       "56 px]"]
  assert "[refused: bbox_2d must have x1 < x2 and y1 < y2]" in lines and lines[-1].startswith("answer: rows <script>")
  assert not {"\x1b", "\u202e"} & set(out.getvalue()), "nothing that a policy wrote moves the cursor"


def test_the_page_shows_nothing_that_is_graded(tmp_path):
  """One question without a known answer: no classes, no ground truth, no filters, nothing of a run."""
  path = tmp_path / "page.html"
  ask.ask(played.Played(played.policy(), pieces=3), task(played.picture()), str(path), io.StringIO())
  page = path.read_text()
  html = re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.S)
  seen = re.sub(r'<div class="(filters|list)".*?</div>', "", html, flags=re.S)  # which the style hides
  assert 'class="viewer alone"' in html and ".alone .filters,.alone .list{display:none}" in page
  assert not re.search("correct|erroneous|redundant|ground truth|ViRL|Outcome|training", seen)
  assert "A question about a picture" in seen and "2 looks" in seen
  shown = json.loads(re.search(r'id="trajectories">(.*?)</script>', page, re.S)[1])
  item, = shown["items"]
  assert item["outcome"] == "no answer known" and item["best"] is None and not item["truth"] and not item["classes"]
  assert [box["title"] for box in item["drawn"]] == ["zoom 1", "zoom 2"]


def test_the_end_without_an_answer():
  out = io.StringIO()
  ask.Printer(out)(told.Ended(types.StopReason.OUT_OF_ROUNDS, None, None))
  ask.Printer(out)(told.Ended(types.StopReason.MALFORMED, None, "the answer tag\x1b is not closed"))
  assert out.getvalue() == "no answer (out of rounds)\nno answer (malformed: the answer tag\ufffd is not closed)\n"


def test_the_tiny_base_looks_and_answers(base, tmp_path, capsys):
  """On a needle picture, which it was trained on; the page has what the terminal had."""
  one = needle.draw(5, "zoom", 0, needle.Config(families=("pattern",)))[0]
  traj = ask.ask(base, types.Task(one.uid, images.decode(one.image), one.question, kind="asked"),
                 str(tmp_path / "page.html"))
  said = capsys.readouterr().out
  assert traj.regions and len(re.findall(r"^\[look \d+: x ", said, re.M)) == len(traj.regions)
  assert all(turn.text.removesuffix("<|im_end|>") in said for turn in traj.turns if turn.role == "assistant")
  page = (tmp_path / "page.html").read_text()
  shown = json.loads(re.search(r'<script type="application/json" id="trajectories">(.*?)</script>', page, re.S)[1])
  crops = [turn["crop"] for turn in shown["items"][0]["turns"] if turn.get("crop") is not None]
  assert len(crops) == len(traj.regions) and "https://" not in page


def test_the_tiny_base_is_served(base):
  """Two questions in turn over HTTP, with pictures of different shapes; greedy, so that a question always has the same
  answer."""
  served = Served(base, upload_pixels=10 ** 6)
  try:
    ends = [events(served.ask(played.picture(size=size), "Which pattern?")) for size in ((252, 252),) * 2]
    tell = lambda found: [e for e in found if e["kind"] != "place"]
    assert tell(ends[0]) == tell(ends[1]) and ends[0][-1]["kind"] == "ended"
  finally:
    served.close()


@pytest.mark.slow
@pytest.mark.skipif(not (realdata.ROOT / "images").exists(), reason=f"no real photographs at {realdata.ROOT}")
def test_real_photographs(base, tmp_path):
  photos = sorted((realdata.ROOT / "images").glob("*.jpg"))[:5]
  assert len(photos) == 5
  for n, photo in enumerate(photos):
    out = io.StringIO()
    traj = ask.ask(base, task(str(photo), "Which pattern does the red ring have?"), str(tmp_path / f"{n}.html"), out)
    w, h = traj.task.image.size
    assert traj.stop is not None and f"{w} x {h} px, shown as" in out.getvalue()
    assert all(0 <= b.x1 < b.x2 <= w and 0 <= b.y1 < b.y2 <= h for b in traj.regions)
    assert (tmp_path / f"{n}.html").stat().st_size > 10_000


@pytest.mark.slow
def test_the_command_serves_until_it_is_stopped():
  process = subprocess.Popen(
      [sys.executable, "-m", "virl_jax.ask", "--model=@tiny", "--config=configs/tiny.py", "--serve", "--port=0"],
      cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
  try:
    port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ ", process.stdout.readline())[1])
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    link.request("GET", "/about")
    assert json.loads(link.getresponse().read())["about"] == {"model": "@tiny", "at most": "3 looks"}
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
  finally:
    process.kill()
