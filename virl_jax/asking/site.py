"""A page on which a policy is asked, served over HTTP: the standard library's server, and plain JavaScript.

It serves a few files, each by its exact path, and takes one kind of request, POST /ask: JSON with a picture in base64,
a question, and options.  The reply is a line of JSON for each thing that happens, until the connection is closed.  No
path, file name or address that a client sends is ever opened.

It refuses: a Host header that names another machine (somebody else's name may have been bound to this address), an
Origin that is another page, a body that is not application/json (pages of other sites can send other types without
permission), bodies over the limits or shorter than they say, files that are not JPEG, PNG, WebP, GIF or BMP, and
pictures of too many pixels, which are counted before any is read.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
import dataclasses
import http
import http.server
import importlib.resources
import io
import ipaddress
import json
import math
import socket
import sys
import threading
import time
from typing import Any
import urllib.parse

from PIL import Image

from virl_jax import checks
from virl_jax import types
from virl_jax.asking import desk as desk_lib
from virl_jax.data import images
from virl_jax.report import gallery
from virl_jax.report import page as page_lib
from virl_jax.rollout import told

# The only formats that are opened: others that Pillow reads are rare in browsers, and EPS would start another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_FILES = {"/": ("asking", "page.html", "text/html; charset=utf-8"),
          "/page.js": ("asking", "page.js", "text/javascript; charset=utf-8"),
          "/page.css": ("asking", "page.css", "text/css; charset=utf-8"),
          "/report.css": ("report", "page.css", "text/css; charset=utf-8")}
_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; connect-src 'self'; "
           "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
_PICTURE_SIDE_PX, _CROP_SIDE_PX = 1280, 480  # longest sides of the pictures that are sent to the page
_MORE_BYTES = 200_000    # of a body, besides the picture
_PIECE_BYTES = 1 << 16
_UPLOADS = 4             # how many bodies are read, and pictures checked, at a time
_DRAIN_S = 2.0


class _Refused(Exception):
  """A request that is refused: an HTTP status, and why."""

  def __init__(self, status: http.HTTPStatus, why: str):
    super().__init__(why)
    self.status = status


@dataclasses.dataclass(frozen=True)
class Config:
  """Address and limits of the server.

  Attributes:
    host: address to listen at.
    port: 0 for any that is free.
    names: further host names that requests may use; see `_allowed`.
    upload_bytes: most bytes of a picture's file.
    upload_pixels: most pixels of a picture.
    question_chars: most characters of a question, and of all options together.
    most_options: most options; there are 26 letters.
    connections: most connections at a time.
    patience_s: how long a request may take to be sent, and a piece of the reply to be taken.
  """

  host: str = "127.0.0.1"
  port: int = 7860
  names: tuple[str, ...] = ()
  upload_bytes: int = 20_000_000
  upload_pixels: int = 50_000_000
  question_chars: int = 4000
  most_options: int = 26
  connections: int = 64
  patience_s: float = 30.0

  def __post_init__(self):
    count = checks.whole(1)
    for name in ("upload_bytes", "upload_pixels", "question_chars", "most_options", "connections"):
      value = getattr(self, name)
      if not count[0](value):
        raise ValueError(f"{name} must be {count[1]}. Received: {value!r}")
    if not 0 <= self.port < 1 << 16:
      raise ValueError(f"port must be from 0 to 65535. Received: {self.port!r}")


def make(desk: desk_lib.Desk, fits: Callable[[types.Task], None], about: dict, cfg: Config
         ) -> http.server.ThreadingHTTPServer:
  """A server that already listens; `serve_forever` answers.

  Args:
    desk: the queue that questions go to.
    fits: raises ValueError, in words for the asker, if a task whose picture is decoded cannot be asked.
    about: what the page says about the policy: text by heading.
    cfg: address and limits.

  Raises:
    ValueError: the address is in use, or is not this machine's.
  """
  kind = _V6 if ":" in cfg.host else _Server
  try:
    server = kind((cfg.host, cfg.port), _Handler)
  except (OSError, UnicodeError) as e:
    raise ValueError(f"--host and --port must be a free address of this machine. Received: {cfg.host}, {cfg.port} "
                     f"({e})") from e
  server.desk, server.fits, server.cfg = desk, fits, cfg
  server.about = json.dumps({
      "about": {page_lib.visible(k): page_lib.visible(v) for k, v in about.items()}, "upload_bytes": cfg.upload_bytes,
      "upload_pixels": cfg.upload_pixels, "question_chars": cfg.question_chars}).encode()
  package = importlib.resources.files("virl_jax")
  server.files = {path: (package.joinpath(folder, name).read_bytes(), kind)
                  for path, (folder, name, kind) in _FILES.items()}
  server.places = threading.BoundedSemaphore(cfg.connections)
  server.uploads = threading.BoundedSemaphore(_UPLOADS)
  return server


class _Server(http.server.ThreadingHTTPServer):
  """A server with a thread for each connection, and at most `cfg.connections` of them."""

  daemon_threads = True
  request_queue_size = 32

  def process_request(self, request, client_address):
    if not self.places.acquire(blocking=False):
      self.shutdown_request(request)
      return
    super().process_request(request, client_address)

  def process_request_thread(self, request, client_address):
    try:
      super().process_request_thread(request, client_address)
    finally:
      self.places.release()

  def handle_error(self, request, client_address):
    """Prints errors, except those of clients that have left."""
    if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
      super().handle_error(request, client_address)


class _V6(_Server):
  address_family = socket.AF_INET6


class _Handler(http.server.BaseHTTPRequestHandler):
  """One connection, one request."""

  server_version, sys_version = "virl_jax", ""
  error_message_format, error_content_type = "%(code)d %(message)s\n", "text/plain; charset=utf-8"

  def setup(self):
    self.timeout = self.server.cfg.patience_s
    super().setup()

  def log_message(self, *args):
    """Logs no requests: questions are private."""

  def do_GET(self):
    try:
      self._check_host()
      path = self.path.partition("?")[0]
      if path == "/about":
        return self._send(http.HTTPStatus.OK, self.server.about, "application/json")
      if path not in self.server.files:
        raise _Refused(http.HTTPStatus.NOT_FOUND, "there is no such page")
      self._send(http.HTTPStatus.OK, *self.server.files[path])
    except _Refused as e:
      self._refuse(e)

  def do_POST(self):
    try:
      self._check_host()
      if self.path != "/ask":
        raise _Refused(http.HTTPStatus.NOT_FOUND, "there is no such page")
      self._check_origin()
      with self.server.uploads:
        task = _task(self._body(), self.server.cfg)
        _check(task, self.server.fits, self.server.cfg)
      with self.server.desk.ask(task) as events:
        self._stream(events)
    except desk_lib.Full as e:
      self._refuse(_Refused(http.HTTPStatus.SERVICE_UNAVAILABLE, str(e)))
    except _Refused as e:
      self._refuse(e)

  def _check_host(self) -> None:
    hosts = self.headers.get_all("Host") or []
    if len(hosts) != 1 or not _allowed(hosts[0], self.server.server_address, self.server.cfg):
      raise _Refused(http.HTTPStatus.MISDIRECTED_REQUEST, "this server has another host name")

  def _check_origin(self) -> None:
    """Refuses requests that another site's page makes from a visitor's browser."""
    origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "same-origin")
    if origin is not None:
      found = urllib.parse.urlsplit(origin)
      if found.scheme not in ("http", "https") or found.netloc.lower() != self.headers["Host"].lower():
        raise _Refused(http.HTTPStatus.FORBIDDEN, "only this page may ask")
    if site not in ("same-origin", "none"):
      raise _Refused(http.HTTPStatus.FORBIDDEN, "only this page may ask")
    if self.headers.get_content_type() != "application/json" or "Content-Type" not in self.headers:
      raise _Refused(http.HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must be application/json")

  def _body(self) -> bytes:
    """The body, if it is as long as it says, and not too long."""
    length, most = self.headers.get("Content-Length", ""), _body_bytes(self.server.cfg)
    if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
      raise _Refused(http.HTTPStatus.LENGTH_REQUIRED, "the request must give its Content-Length")
    if len(length) > 15 or int(length) > most:
      raise _Refused(http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the picture's file must have at most "
                     f"{self.server.cfg.upload_bytes / 1e6:g} MB")
    pieces, left, until = [], int(length), time.monotonic() + self.server.cfg.patience_s
    while left:
      piece = self.rfile.read1(min(left, _PIECE_BYTES))
      if not piece or time.monotonic() > until:
        raise _Refused(http.HTTPStatus.REQUEST_TIMEOUT, "the request's body was cut off")
      pieces.append(piece)
      left -= len(piece)
    self._read = True
    return b"".join(pieces)

  def _stream(self, events) -> None:
    self._head(http.HTTPStatus.OK, "application/x-ndjson")
    for event in events:
      # The page ignores an empty line; if it cannot be sent, nobody is listening.
      self.wfile.write(b"\n" if event is None else json.dumps(plain(event)).encode() + b"\n")

  def _refuse(self, e: _Refused) -> None:
    self._send(e.status, json.dumps({"error": page_lib.visible(e)}).encode(), "application/json")
    if self.command == "POST" and not getattr(self, "_read", False):
      self._drain()

  def _drain(self) -> None:
    """Reads some of a refused body: a browser that is still sending would not read the refusal."""
    self.connection.shutdown(socket.SHUT_WR)
    self.connection.settimeout(_DRAIN_S)
    left, until = 2 * _body_bytes(self.server.cfg), time.monotonic() + _DRAIN_S
    try:
      while left > 0 and time.monotonic() < until and (piece := self.rfile.read1(_PIECE_BYTES)):
        left -= len(piece)
    except OSError:
      pass

  def _send(self, status: http.HTTPStatus, data: bytes, kind: str) -> None:
    self._head(status, kind, len(data))
    self.wfile.write(data)

  def _head(self, status: http.HTTPStatus, kind: str, length: int | None = None) -> None:
    self.send_response(status)
    more = {} if length is None else {"Content-Length": str(length)}
    for name, value in ({"Content-Type": kind, "Content-Security-Policy": _POLICY, "Cache-Control": "no-store",
                         "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                         "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
                         "Connection": "close"} | more).items():
      self.send_header(name, value)
    self.end_headers()


def _allowed(host: str, address: tuple, cfg: Config) -> bool:
  """Whether a Host header means this server, which listens at `address`.

  Nobody else can bind an IP address to this server as they can a domain, so any IP address is allowed if the server
  listens to other machines.
  """
  try:
    found = urllib.parse.urlsplit(f"//{host}")
    name, port = found.hostname or "", found.port
  except ValueError:
    return False
  if found.netloc != host or found.username is not None:
    return False
  if name in cfg.names:
    return True  # behind another server, which has its own port
  if (80 if port is None else port) != address[1]:
    return False
  if name in ("localhost", cfg.host):
    return True
  try:
    named = ipaddress.ip_address(name)
  except ValueError:
    return False
  return named.is_loopback or not ipaddress.ip_address(address[0]).is_loopback


def _body_bytes(cfg: Config) -> int:
  """The longest body: the picture in base64, and the rest."""
  return 4 * -(-cfg.upload_bytes // 3) + _MORE_BYTES


def _task(body: bytes, cfg: Config) -> types.Task:
  """The task in a body.

  Raises:
    _Refused: it is not what `page.js` sends.
  """
  bad = lambda why: _Refused(http.HTTPStatus.BAD_REQUEST, why)
  try:
    asked = json.loads(body)
  except (ValueError, RecursionError) as e:
    raise bad("the body must be JSON") from e
  if not isinstance(asked, dict) or not asked.keys() <= {"image", "question", "options"}:
    raise bad("the body must have image, question and options, and nothing else")
  question, options, picture = asked.get("question"), asked.get("options") or [], asked.get("image")
  if not isinstance(options, list) or not all(isinstance(text, str) for text in (question, picture, *options)):
    raise bad("image and question must be texts, and options a list of texts")
  if not question.strip():
    raise bad("a question must be asked")
  if len(question) > cfg.question_chars or sum(map(len, options)) > cfg.question_chars:
    raise bad(f"the question, and the options together, must have at most {cfg.question_chars} characters")
  if len(options) > cfg.most_options or not all(option.strip() for option in options):
    raise bad(f"there must be at most {cfg.most_options} options, none of them empty")
  try:
    "".join([question, *options]).encode()
  except UnicodeEncodeError as e:
    raise bad("the question and the options must be Unicode text") from e
  try:
    data = base64.b64decode(picture, validate=True)
  except (binascii.Error, ValueError) as e:
    raise bad("the picture must be in base64") from e
  if len(data) > cfg.upload_bytes:
    raise _Refused(http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                   f"the picture's file must have at most {cfg.upload_bytes / 1e6:g} MB")
  return types.Task("asked", data, question.strip(), options=tuple(options) or None, kind="asked")


def _check(task: types.Task, fits: Callable[[types.Task], None], cfg: Config) -> None:
  """Checks that a task's picture can be shown and its question asked.

  Raises:
    _Refused: it cannot; says why.
  """
  try:
    with Image.open(io.BytesIO(task.image), formats=_FORMATS) as im:
      pixels = im.width * im.height
  except Image.DecompressionBombError:  # Pillow's own limit
    pixels = math.inf
  except Exception as e:  # a decoder may raise anything on a damaged file
    raise _Refused(http.HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                   "the file must be a picture: JPEG, PNG, WebP, GIF or BMP") from e
  if pixels > cfg.upload_pixels:
    raise _Refused(http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                   f"the picture must have at most {cfg.upload_pixels / 1e6:g} million pixels")
  try:
    picture = images.decode(task.image, cfg.upload_pixels)
  except ValueError as e:
    raise _Refused(http.HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the picture is damaged, or cannot be decoded") from e
  try:
    fits(dataclasses.replace(task, image=picture))
  except ValueError as e:
    raise _Refused(http.HTTPStatus.UNPROCESSABLE_ENTITY, str(e)) from e


def plain(event: Any) -> dict:
  """An event as the page gets it: boxes in pixels of the original, pictures as data URIs, texts visible.

  Args:
    event: one of those of `told` or `desk`.
  """
  found = {"kind": type(event).__name__.lower()}
  if isinstance(event, told.Began):
    return found | {"picture": gallery.data_uri(event.picture, _PICTURE_SIDE_PX), "width": event.picture.width,
                    "height": event.picture.height, "shown": list(event.shown)}
  for name, value in vars(event).items():
    if isinstance(value, Image.Image):
      value = gallery.data_uri(value, _CROP_SIDE_PX)
    elif isinstance(value, tuple):
      value = [float(v) for v in value]
    elif isinstance(value, types.StopReason):
      value = value.value
    elif isinstance(value, str):
      value = page_lib.visible(value)
    found[name] = value
  return found
