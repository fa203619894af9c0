"""The report of a curation: what is in it, and that no text of a task becomes markup."""

import html.parser

import pytest

from virl_jax.report import sieve

HOSTILE = '<script>alert(1)</script>"\'><img src=x onerror=alert(1)>\u202e{{ 7*7 }}</style>'


class Tags(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.seen = []

  def handle_starttag(self, tag, attrs):
    self.seen.append((tag, dict(attrs)))


def line(uid, source="gqa", **fields):
  return {"uid": uid, "set": "gqa-train", "source": source, "kind": "k", "question_type": "what", "answer_type": "text",
          "width": 640, "height": 480, "coverage": 0.05, "boxes": 1, "pass_with": 0.5, "pass_without": 0.0,
          "zooms": 1.0, "provenance": "0" * 32} | fields


def example(name, reason="", **fields):
  return line(name) | {"reason": reason, "detail": "", "question": "What?", "options": [], "answers": ["red"],
                      "picture": "data:image/png;base64,iVBORw0KGgo=", "rects": [[1, 2, 30, 40]]} | fields


def found(text="gqa"):
  n = lambda count: {"all": count, "sources": {text: count}}
  reject = line("b", text, stage="rules", reason="boxes cover too much", detail=text, coverage=0.95)
  return {"title": text, "lines": [line("a", text), reject, line("c", text, width=0, height=0, pass_with=None)],
          "counts": {"read": n(3), "dropped": [{"stage": "rules", "reason": "boxes cover too much", "n": n(1)}],
                     "after": {"rules": n(2), "policy": n(2), "filter": n(2)}, "kept": n(2)},
          "examples": [example("a", question=text, options=[text], answers=[text], uid=text, source=text),
                       example("b", "boxes cover too much", detail=text, picture=None)],
          "config": {"rules": {"caps": [text]}}}


def test_what_is_told():
  page = sieve.render(found())
  for words in ("3 tasks read", "2 kept", "66.7%", "after rules", "after reasoning-centric filtering",
                "boxes cover too much", "Share of the picture in boxes", "from 90%", "gqa", "rules.caps", "with zooms"):
    assert words in page, words
  assert page == sieve.render(found())
  tags = Tags()
  tags.feed(page)
  assert sum(tag == "img" for tag, _ in tags.seen) == 1 and sum(tag == "rect" for tag, _ in tags.seen) == 4


def test_hostile_text_stays_text():
  page, plain = sieve.render(found(HOSTILE)), sieve.render(found())
  tags, usual = Tags(), Tags()
  tags.feed(page)
  usual.feed(plain)
  assert [tag for tag, _ in tags.seen] == [tag for tag, _ in usual.seen], "no element more, no element less"
  assert not any(name.startswith("on") for _, attrs in tags.seen for name in attrs)
  assert "\u202e" not in page and "{{ 7*7 }}" in page and page.count("&lt;script&gt;") > 5


def test_a_picture_that_is_none_is_left_out():
  it = found()
  it["examples"][0]["picture"] = 'data:text/html;base64,PHNjcmlwdD4="onload=alert(1)'
  assert "text/html" not in sieve.render(it)


@pytest.mark.parametrize("lines", [[], [line("a", coverage=0.0, boxes=0, pass_with=None, pass_without=None)]])
def test_little_is_no_error(lines):
  n = {"all": len(lines), "sources": {"gqa": 1} if lines else {}}
  page = sieve.render({"title": "x", "lines": lines, "examples": [], "config": {},
                       "counts": {"read": n, "dropped": [], "after": {"rules": n}, "kept": n}})
  assert f"{len(lines)} tasks read" in page and "Solved with zooms" not in page


def test_rare_kinds_are_put_together():
  it = found()
  it["lines"] = [line(str(i), kind=f"kind{i % 30:02d}") for i in range(90)]
  page = sieve.render(it)
  assert "others" in page and "kind11" in page and "kind29" not in page
