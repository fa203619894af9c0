"""A stand-in for Cloud Storage: its JSON API, as far as gcsfs, TensorStore and google-cloud-storage use it here.

Objects are whole or absent, have generations, and are written only if those match: there is no append and no rename.
All clients are the real ones; environment variables point them here.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse

BUCKET = "my-bucket"


class Bucket:
  """A bucket in this process.

  Attributes:
    objects: name -> (content, generation).
    refuse: called with method and path of each request; if it returns a status, that is the answer.
  """

  def __init__(self):
    self.objects: dict[str, tuple[bytes, int]] = {}
    self.refuse = lambda method, path: None
    self.lock, self.numbers, self.uploads = threading.Lock(), itertools.count(1), {}

  def put(self, name: str, content: bytes, match: str | None = None) -> dict | None:
    """Writes an object if the one that is there has generation `match`; returns None if it has another."""
    with self.lock:
      if match is not None and int(match) != self.objects.get(name, (b"", 0))[1]:
        return None
      self.objects[name] = content, next(self.numbers)
      return self.describe(name)

  def describe(self, name: str) -> dict:
    content, generation = self.objects[name]
    return {"kind": "storage#object", "bucket": BUCKET, "name": name, "id": f"{BUCKET}/{name}/{generation}",
            "size": str(len(content)), "generation": str(generation), "metageneration": "1",
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z"}

  def files(self, prefix: str) -> dict[str, bytes]:
    """The content of the objects below a prefix, by the path from there."""
    return {name.removeprefix(f"{prefix}/"): content for name, (content, _) in sorted(self.objects.items())
            if name.startswith(f"{prefix}/")}


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def answer(self, status=200, content=b"", **headers):
    if isinstance(content, dict):
      content, headers["Content-Type"] = json.dumps(content).encode(), "application/json"
    self.send_response(status)
    for name, value in (headers | {"Content-Length": str(len(content))}).items():
      self.send_header(name.replace("_", "-"), value)
    self.end_headers()
    self.wfile.write(content)

  def body(self):
    if self.headers.get("Transfer-Encoding") != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length") or 0))
    parts = []
    while size := int(self.rfile.readline(), 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b"".join(parts)

  def handle_one(self, method):
    store, url = self.server.store, urllib.parse.urlsplit(self.path)
    body = self.body()
    if status := store.refuse(method, urllib.parse.unquote(self.path)):
      return self.answer(status)
    if url.path.startswith("/batch/"):
      return self.batch(body)
    asked = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    if asked.get("name") is None and url.path.startswith("/upload/") and "id" in asked:
      return self.resumed(asked["id"], body)
    if not (found := re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", url.path)):
      return self.answer(404)
    if found[1] != BUCKET:
      return self.answer(404, {"error": {"code": 404, "message": "no such bucket"}})
    if url.path.startswith("/upload/"):
      return self.upload(asked, body)
    if found[2] is None:
      return self.list(asked) if url.path.endswith("/o") else self.answer(
          200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET, "locationType": "region"})
    name, _, copy = found[2].partition("/rewriteTo/")
    name = urllib.parse.unquote(name)
    if copy:
      if name not in store.objects:
        return self.answer(404)
      to = urllib.parse.unquote(copy.partition("/o/")[2])
      made = store.put(to, store.objects[name][0])
      return self.answer(200, {"kind": "storage#rewriteResponse", "done": True, "resource": made})
    return self.one(method, name, asked)

  def one(self, method, name, asked):
    """Reads or deletes an object."""
    store = self.server.store
    with store.lock:
      content, generation = store.objects.get(name, (b"", 0))
      if not generation:
        return self.answer(404, {"error": {"code": 404, "message": "no such object"}})
      for key, same in (("ifGenerationMatch", True), ("ifGenerationNotMatch", False)):
        if key in asked and (int(asked[key]) == generation) != same:
          return self.answer(412 if same else 304)
      if method == "DELETE":
        del store.objects[name]
        return self.answer(204)
      described = store.describe(name)
    if asked.get("alt") != "media":
      return self.answer(200, described)
    headers = {"x_goog_generation": str(generation), "Content_Type": "application/octet-stream"}
    if span := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
      first = int(span[1]) if span[1] else len(content) - int(span[2])
      last = min(int(span[2]) if span[1] and span[2] else len(content) - 1, len(content) - 1)
      if first > last:
        return self.answer(416)
      headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
      return self.answer(206, content[first:last + 1], **headers)
    return self.answer(200, content, **headers)

  def list(self, asked):
    prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
    found, folders = [], set()
    with self.server.store.lock:
      for name in sorted(self.server.store.objects):
        if not name.startswith(prefix) or name < asked.get("startOffset", ""):
          continue
        if (end := asked.get("endOffset")) and name >= end:
          continue
        head, cut, _ = name[len(prefix):].partition(delimiter) if delimiter else (name, "", "")
        if cut:
          folders.add(prefix + head + cut)
        else:
          found.append(self.server.store.describe(name))
    self.answer(200, {"kind": "storage#objects", "items": found, "prefixes": sorted(folders)})

  def upload(self, asked, body):
    store, kind = self.server.store, asked.get("uploadType")
    described, content = {}, body
    if kind == "multipart":
      mark = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1].encode()
      _, about, rest = body.split(b"--" + mark, 2)
      described = json.loads(about.strip().replace(b"\r", b"").partition(b"\n\n")[2])
      line = b"\r\n" if rest.startswith(b"\r") else b"\n"  # gcsfs writes the latter
      content = rest.rpartition(line + b"--" + mark)[0].partition(line * 2)[2]
    elif kind == "resumable" and body:
      described = json.loads(body)
    name, match = asked.get("name") or described["name"], asked.get("ifGenerationMatch")
    if kind == "resumable":
      number = str(next(store.numbers))
      store.uploads[number] = [name, match, b""]
      where = f"http://{self.headers['Host']}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&id={number}"
      return self.answer(200, Location=where)
    made = store.put(name, content, match)
    return self.answer(200, made) if made else self.answer(412)

  def resumed(self, number, body):
    upload = self.server.store.uploads[number]
    upload[2] += body
    if self.headers.get("Content-Range", "").endswith("/*"):  # more is to come
      return self.answer(308, Range=f"bytes=0-{len(upload[2]) - 1}")
    name, match, content = self.server.store.uploads.pop(number)
    made = self.server.store.put(name, content, match)
    return self.answer(200, made) if made else self.answer(412)

  def batch(self, body):
    """Deletions, many in one request."""
    mark = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1]
    parts = []
    for i, path in enumerate(re.findall(rb"DELETE (?:https?://[^/ ]+)?(\S+) HTTP", body)):
      name = urllib.parse.unquote(path.decode().partition("?")[0].partition("/o/")[2])
      with self.server.store.lock:
        gone = self.server.store.objects.pop(name, None)
      parts.append(f"--{mark}\r\nContent-Type: application/http\r\nContent-ID: <response-{i}>\r\n\r\n"
                   f"HTTP/1.1 {'204 No Content' if gone else '404 Not Found'}\r\nContent-Length: 0\r\n\r\n\r\n")
    self.answer(200, ("".join(parts) + f"--{mark}--").encode(), Content_Type=f"multipart/mixed; boundary={mark}")

  do_GET = lambda self: self.handle_one("GET")
  do_POST = lambda self: self.handle_one("POST")
  do_PUT = lambda self: self.handle_one("PUT")
  do_DELETE = lambda self: self.handle_one("DELETE")


@contextlib.contextmanager
def serve(patch):
  """A `with` block in which there is a `Bucket`, for this process and those that it starts.

  Args:
    patch: pytest's MonkeyPatch.
  """
  class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    handle_error = lambda *_: None  # clients close connections that they no longer need

  server = Server(("127.0.0.1", 0), _Handler)
  server.store = Bucket()
  where = f"http://127.0.0.1:{server.server_port}"
  patch.setenv("STORAGE_EMULATOR_HOST", where)      # gcsfs and google-cloud-storage
  patch.setenv("TENSORSTORE_GCS_HTTP_URL", where)
  patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # TensorStore
  patch.setenv("NO_GCE_CHECK", "true")              # keeps google-auth from asking Google's metadata server
  patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # keeps gcsfs from asking for the bucket's type
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield server.store
  finally:
    server.shutdown()
    server.server_close()
