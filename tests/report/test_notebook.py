"""What notebooks show: frames that see nothing of the notebook, true colours, and no text as markup."""

import html
import re

import numpy as np
from PIL import Image
import pytest

from virl_jax import types
from virl_jax.report import gallery
from virl_jax.report import notebook

HOSTILE = '</pre></iframe><script>alert(1)</script>"\'&\x1b'


def entry(logp=(-2.0, 0.0), advantage=(1.5, -0.75), texts=("see", HOSTILE), **how):
  ids = np.arange(2, dtype=np.int32)
  turns = [types.Turn("assistant", ids, logp=np.asarray(logp, np.float32), text="see it"),
           types.Turn("tool", ids, text="there")]
  traj = types.Trajectory(types.Task("u", b"", HOSTILE, ("a",)), 0, ids[:1], turns, [], types.StopReason.ANSWERED, "a")
  by_token = {"advantage": np.asarray((0.0, *advantage, 9.0, 9.0), np.float32)}
  return gallery.entry(traj, Image.new("RGB", (8, 8)), None, None, None, 1.0, 1.0, None,
                       lambda some: "".join(texts[i] for i in some), by_token, **how)


def shades(shown):
  """(text, r, g, b, alpha) of each token."""
  found = re.findall(r"background:rgba\((\d+),(\d+),(\d+),([\d.]+)\)\">(.*?)</span>", shown.html)
  return [(html.unescape(text), *map(int, rgb), float(alpha)) for *rgb, alpha, text in found]


def test_a_page_is_whole_in_its_frame_and_apart():
  document = f"<!doctype html><title>{html.escape(HOSTILE)}</title><script>1</script>"
  shown = notebook.page(document, 300)._repr_html_()
  assert html.unescape(re.search(r'srcdoc="([^"]*)"', shown)[1]) == document and 'height="300"' in shown
  assert 'sandbox="allow-scripts"' in shown and shown.count("<iframe") == shown.count("</iframe") == 1
  assert "<script" not in shown, "nothing of it is the notebook's"


def test_trajectories_are_in_the_viewer():
  shown = notebook.trajectories([entry()], "Rollouts")._repr_html_()
  document = html.unescape(re.search(r'srcdoc="([^"]*)"', shown)[1])
  assert '<section id="viewer"' in document and "Rollouts" in document and "alert(1)</script>" not in document


def test_words_are_shaded_by_what_they_are_about():
  (a, *less, faint), (b, *_, none) = shades(notebook.words(entry(), "logp"))
  assert a == "see" and b == HOSTILE.replace("\x1b", "\ufffd") and less == [232, 84, 44]
  assert (faint, none) == (0.7, 0.0)
  (*_, slight), _ = shades(notebook.words(entry(logp=(-0.5, 0.0)), "logp"))
  assert slight == pytest.approx(0.7 / 4, abs=0.006), "-2 nats is the least in full colour"
  (_, *more, full), (_, *fewer, half) = shades(notebook.words(entry(), "advantage"))
  assert more == [43, 143, 230] and fewer == less and full == 0.7 and half == pytest.approx(0.35)
  (*_, first), (*_, second) = shades(notebook.words(entry(advantage=(-1.0, -1.0)), "advantage"))
  assert first == second == 0.7, "one number stands for all"
  assert "<script" not in notebook.words(entry(), "logp").html and "there" not in notebook.words(entry(), "logp").html


def test_words_without_numbers_are_refused():
  with pytest.raises(ValueError, match="by must be one of logp, advantage, modulator, gap. Received: 'iou'"):
    notebook.words(entry(), "iou")
  with pytest.raises(ValueError, match="entry must have modulator of each token"):
    notebook.words(entry(), "modulator")


def test_charts_are_of_what_there_is():
  lines = [{"step": 0, "a": 1.0}, {"step": 1, "a": 2.0, "b": 3.0}]
  shown = notebook.charts(lines, ("a", "b", "c")).html
  assert shown.count("<svg") == 2 and ">a<" in shown and ">b<" in shown and ">c<" not in shown
  both = notebook.side_by_side(notebook.Shown("<i>1</i>"), notebook.Shown("<i>2</i>")).html
  assert both.index("<i>1</i>") < both.index("<i>2</i>")
