"""The page over real HTTP: what it sends, what it refuses, and that nothing hostile gets through."""

import base64
import http.client
import json
import socket
import struct
import threading
import time
import zlib

import pytest

from tests.asking import played
from virl_jax.asking import desk as desk_lib
from virl_jax.asking import site
from virl_jax.rollout import turns

PICTURE = played.picture()


class Served:
  """A server in a thread, and a client."""

  def __init__(self, answer, most=16, about=None, **how):
    self.answer = answer
    cfg = site.Config(port=0, patience_s=how.pop("patience_s", 5.0), **how)
    fits = lambda task: turns.check(answer.policy, task)
    self.server = site.make(desk_lib.Desk(answer, most, beat_s=0.05), fits, about or {"model": "<b>m"}, cfg)
    self.port = self.server.server_address[1]
    threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

  def request(self, method, path, body=None, **headers):
    link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
    link.putrequest(method, path, skip_host="Host" in headers)
    headers = {"Content-Length": str(len(body))} | headers if body is not None else headers
    for name, value in headers.items():
      link.putheader(name.replace("_", "-"), value)
    link.endheaders(body)
    return link.getresponse()

  def ask(self, picture=PICTURE, question="Which?", options=None, **headers):
    body = json.dumps({"image": base64.b64encode(picture).decode() if isinstance(picture, bytes) else picture,
                       "question": question} | ({} if options is None else {"options": options})).encode()
    return self.request("POST", "/ask", body, **({"Content_Type": "application/json"} | headers))

  def close(self):
    self.server.shutdown()
    self.server.server_close()


@pytest.fixture(scope="module")
def policy():
  return played.policy()


@pytest.fixture(scope="module")
def shared(policy):
  served = Served(played.Played(policy), upload_bytes=200_000, upload_pixels=1_000_000, names=("ask.example",))
  yield served
  served.close()


def events(reply):
  assert reply.status == 200
  return [json.loads(line) for line in reply.read().splitlines() if line]


def refused(reply, status, said):
  found = json.loads(reply.read())["error"]
  assert reply.status == status and said in found, (reply.status, found)


@pytest.mark.parametrize("path, kind, holds", [
    ("/", "text/html", b"<title>Ask about a picture"), ("/page.js", "text/javascript", b"use strict"),
    ("/page.css", "text/css", b".drop"), ("/report.css", "text/css", b"--accent"),
    ("/about", "application/json", b"<b>m")])
def test_what_there_is_to_get(shared, path, kind, holds):
  reply = shared.request("GET", path)
  assert reply.status == 200 and reply.headers["Content-Type"].startswith(kind) and holds in reply.read()
  assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
  assert "unsafe" not in reply.headers["Content-Security-Policy"]
  assert reply.headers["X-Content-Type-Options"] == "nosniff" and "frame-ancestors 'none'" in reply.headers[
      "Content-Security-Policy"]


def test_a_question_and_all_that_comes_of_it(shared):
  found = events(shared.ask(question="Which?", options=["rows", "dots"]))
  assert [e["kind"] for e in found if e["kind"] != "said"] == [
      "place", "began", "looked", "refused", "looked", "ended"]
  task = shared.answer.asked[-1]
  assert (task.question, task.options, task.image) == ("Which?", ("rows", "dots"), PICTURE)
  by_kind = {e["kind"]: e for e in found}
  assert (by_kind["began"]["width"], by_kind["began"]["height"], by_kind["began"]["shown"]) == (252, 168, [84, 56])
  first = next(e for e in found if e["kind"] == "looked")
  assert first["region"] == [30, 36, 120, 144] == first["cut"] and first["crop"].startswith("data:image/png;base64,")
  assert by_kind["refused"]["error"] == "bbox_2d must have x1 < x2 and y1 < y2"
  assert by_kind["ended"]["stop"] == "answered" and by_kind["ended"]["answer"].startswith("rows <script>")
  assert not {"\x1b", "\u202e"} & set(json.dumps(found, ensure_ascii=False)), "unseen characters are shown"


def test_it_is_told_as_it_happens(policy):
  go = threading.Semaphore(0)
  served = Served(played.Played(policy, pause=lambda: go.acquire(timeout=10)))
  try:
    reply, seen = served.ask(), []
    for _ in range(30):
      line = reply.readline()
      if line.strip():
        seen.append(json.loads(line)["kind"])
      if seen and seen[-1] in ("began", "said", "looked", "refused"):
        go.release()
      if seen[-1:] == ["ended"]:
        break
    assert seen[:3] == ["place", "began", "said"] and seen[-1] == "ended"
  finally:
    served.close()


def test_several_wait_and_one_leaves(policy):
  go = threading.Semaphore(0)
  served = Served(played.Played(policy, [played.TURNS[-1]], 1, pause=lambda: go.acquire(timeout=10)), most=3)
  kind = lambda reply: json.loads(next(line for line in iter(reply.readline, b"") if line.strip()))
  try:
    first = served.ask()
    assert kind(first)["ahead"] == 0 and kind(first)["kind"] == "began"
    second, third = served.ask(), None
    assert kind(second) == {"kind": "place", "ahead": 1}
    third = served.ask()
    assert kind(third) == {"kind": "place", "ahead": 2}
    refused(served.ask(), 503, "3 questions are waiting")
    second.close()  # noticed at the next heartbeats
    assert kind(third) == {"kind": "place", "ahead": 1}
    go.release()
    assert events(first)[-1]["kind"] == "ended" and kind(third) == {"kind": "place", "ahead": 0}
    go.release()
    assert events(third)[-1]["kind"] == "ended" and len(served.answer.asked) == 2
  finally:
    go.release(10)
    served.close()


def test_what_fails_inside_is_told_without_its_details(policy, capsys):
  answer = played.Played(policy)
  answer.policy, whole = None, policy  # every question fails, but is checked with the whole policy
  served = Served(answer)
  served.server.fits = lambda task: turns.check(whole, task)
  try:
    assert events(served.ask())[-1] == {"kind": "failed", "error": "the policy failed: AttributeError"}
    answer.policy = whole
    assert events(served.ask())[-1]["kind"] == "ended", "the next is answered"
  finally:
    served.close()


@pytest.mark.parametrize("host, ok", [
    ("127.0.0.1:{port}", True), ("localhost:{port}", True), ("[::1]:{port}", True), ("ask.example", True),
    ("LOCALHOST:{port}", True), ("evil.example:{port}", False), ("127.0.0.1", False), ("127.0.0.1:1", False),
    ("10.0.0.1:{port}", False), ("localhost:{port}@evil", False), ("x@localhost:{port}", False), ("", False),
    ("localhost:{port}/x", False), ("localhost.evil.example:{port}", False), ("localhost:99999999", False)])
def test_dns_rebinding(shared, host, ok):
  reply = shared.request("GET", "/", Host=host.format(port=shared.port))
  assert reply.status == (200 if ok else 421)
  host = host.format(port=shared.port)
  reply = shared.ask(Host=host, Origin=f"http://{host}")
  assert reply.status == (200 if ok else 421) and reply.read()


def test_addresses_where_it_listens_to_all():
  cfg = site.Config(host="0.0.0.0")
  allowed = lambda host: site._allowed(host, ("0.0.0.0", 80), cfg)
  assert allowed("10.0.0.1") and allowed("10.0.0.1:80") and not allowed("evil.example") and not allowed("10.0.0.1:81")


@pytest.mark.parametrize("headers, status", [
    ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": "file://"}, 403),
    ({"Origin": "http://127.0.0.1"}, 403), ({"Sec_Fetch_Site": "cross-site"}, 403),
    ({"Sec_Fetch_Site": "same-site"}, 403), ({"Content_Type": "text/plain"}, 415),
    ({"Content_Type": "multipart/form-data; boundary=x"}, 415),
    ({"Content_Type": "application/x-www-form-urlencoded"}, 415)])
def test_other_pages_may_not_ask(shared, headers, status):
  before = len(shared.answer.asked)
  assert shared.ask(**headers).status == status and len(shared.answer.asked) == before
  events(shared.ask(Origin=f"http://127.0.0.1:{shared.port}", Sec_Fetch_Site="same-origin"))


def bomb(side):
  """A small PNG whose header says that it has this many pixels a side."""
  chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)) +
          chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b""))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/tmp/owned) (w) file closefile\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.mark.parametrize("data, status, said", [
    (b"", 415, "must be a picture"), (b"<script>alert(1)</script>", 415, "must be a picture"),
    (SVG, 415, "must be a picture"), (EPS, 415, "must be a picture"), (b"%PDF-1.7\n", 415, "must be a picture"),
    (played.picture("TIFF"), 415, "must be a picture"), (PICTURE[:60], 415, "damaged"),
    (played.picture("JPEG")[:700], 415, "damaged"), (bomb(60000), 413, "at most 1 million pixels"),
    (bomb(2000), 413, "at most 1 million pixels"), (bomb(900), 415, "damaged"),
    (bytes(200_001), 413, "at most 0.2 MB"), ("/etc/passwd", 400, "base64"), ("file:///etc/passwd", 400, "base64"),
    ("http://127.0.0.1/", 400, "base64"), ("../../x.png=", 400, "base64"), (7, 400, "must be texts")],
    ids=lambda v: repr(v[:9]) if isinstance(v, bytes) else None)
def test_what_is_no_picture_of_use(shared, data, status, said):
  before = len(shared.answer.asked)
  refused(shared.ask(data), status, said)
  assert len(shared.answer.asked) == before


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_what_is_one(shared, kind):
  assert events(shared.ask(played.picture(kind, (40, 30))))[1]["width"] == 40


@pytest.mark.parametrize("body, status, said", [
    (b"", 400, "JSON"), (b"{", 400, "JSON"), (b"[" * 100_000, 400, "JSON"), (b"[]", 400, "nothing else"),
    (b'{"path": "/etc/passwd", "image": "", "question": "?"}', 400, "nothing else"),
    (b'{"image": "AAAA"}', 400, "must be texts"), (b'{"image": "", "question": "  "}', 400, "must be asked"),
    (b'{"image": "", "question": "\\ud800"}', 400, "Unicode"),
    (b'{"image": "", "question": "?", "options": "ab"}', 400, "list of texts"),
    (b'{"image": "", "question": "?", "options": ["a", ""]}', 400, "none of them empty"),
    (json.dumps({"image": "", "question": "?", "options": ["a"] * 27}).encode(), 400, "at most 26 options"),
    (json.dumps({"image": "", "question": "?" * 4001}).encode(), 400, "at most 4000 characters"),
    (json.dumps({"image": base64.b64encode(PICTURE).decode(), "question": "x" * 3900}).encode(), 422, "leave room")],
    ids=lambda v: repr(v[:40]) if isinstance(v, bytes) else None)
def test_bodies_of_no_use(shared, body, status, said):
  refused(shared.request("POST", "/ask", body, Content_Type="application/json"), status, said)


@pytest.mark.parametrize("headers, status", [
    ({"Content_Length": "999999999999"}, 413), ({"Content_Length": "9" * 400}, 413), ({"Content_Length": "-1"}, 411),
    ({"Content_Length": "x"}, 411), ({"Content_Length": "\u00b2"}, 411), ({}, 411),
    ({"Transfer_Encoding": "chunked"}, 411), ({"Content_Length": "2", "Transfer_Encoding": "chunked"}, 411)])
def test_lengths(shared, headers, status):
  assert shared.request("POST", "/ask", **({"Content_Type": "application/json"} | headers)).status == status


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/../../etc/passwd", 404), ("GET", "//etc/passwd", 404), ("GET", "/%2e%2e/setup.py", 404),
    ("GET", "/page.js/", 404), ("GET", "/ask", 404), ("POST", "/", 404), ("GET", "http://evil.example/", 421),
    ("PUT", "/ask", 501), ("OPTIONS", "/ask", 501), ("DELETE", "/<script>", 501)])
def test_paths_and_methods(shared, method, path, status):
  reply = shared.request(method, path, **({"Content_Length": "0"} if method == "POST" else {}))
  assert reply.status == status and not reply.headers["Content-Type"].startswith("text/html")


def test_who_sends_slowly_or_nothing_is_left_behind(policy):
  served = Served(played.Played(policy), patience_s=0.3, connections=4)
  try:
    head = f"POST /ask HTTP/1.1\r\nHost: localhost:{served.port}\r\nContent-Type: application/json\r\n"
    idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(2)]
    idle[0].sendall((head + "Content-Length: 1000\r\n\r\n{").encode())
    began = time.monotonic()
    for each in idle:
      each.settimeout(5)
      while each.recv(4096):
        pass
    assert time.monotonic() - began < 4
    many = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(12)]
    time.sleep(0.8)
    assert events(served.ask())[-1]["kind"] == "ended", "after those who said nothing"
    for each in (*idle, *many):
      each.close()
  finally:
    served.close()


@pytest.mark.parametrize("how, said", [
    ({"port": 70000}, "port must be"), ({"upload_bytes": 0}, "upload_bytes must be"),
    ({"host": "no such host"}, "--host and --port must be"), ({"host": "192.0.2.1"}, "--host and --port must be")])
def test_what_cannot_be_served(how, said):
  with pytest.raises(ValueError, match=said):
    site.make(None, None, {}, site.Config(**({"port": 0} | how)))


def test_nothing_in_the_page_makes_markup_of_text():
  """Whatever is shown goes through `textContent` and the like."""
  package = site.importlib.resources.files("virl_jax").joinpath("asking")
  script, page = (package.joinpath(name).read_text() for name in ("page.js", "page.html"))
  for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser", "srcdoc"):
    assert word not in script
  assert "<script src=" in page and page.count("<script") == 1 and " on" not in page.replace(" one", "").replace(
      " on which", "") and "style=" not in page
