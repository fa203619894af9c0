"""One question to an OpenAI-compatible endpoint, as vLLM, SGLang and others serve it.

The caller decides how often to ask: `chat` tries once, and says whether another try makes sense (`Again`).  A failed
connection never counts as an answer.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import urllib.error
import urllib.request

from virl_jax import checks

_AGAIN = (408, 409, 425, 429)  # statuses that are worth another try, as are all from 500 on
_BUSY = (*_AGAIN, 503)  # statuses that say nothing about the request
_KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_WAIT_S = 60.0


@dataclasses.dataclass(frozen=True)
class Config:
  """Who is asked in place of the engine, and how patiently; see `config.py`, section `endpoint`.

  Attributes:
    model: as the endpoint names it.
    timeout_s: for one turn.
    wait_s: before the second try; twice as long before each further one, or as the endpoint asks for.
    patience_s: how long an endpoint may give no reply at all before it counts as gone.
    tries: how often a request that fails is sent while the endpoint replies to others; then it is put aside.
    in_flight: trajectories, and so requests, at a time.
  """

  model: str = ""
  timeout_s: float = 300.0
  wait_s: float = 1.0
  patience_s: float = 3600.0
  tries: int = 8
  in_flight: int = 32

  def __post_init__(self):
    checks.section(vars(self), "endpoint", model=checks.text, timeout_s=checks.real(above=0), wait_s=checks.real(0),
                   patience_s=checks.real(0), tries=checks.whole(2), in_flight=checks.whole(1))


class Refused(ValueError):
  """The endpoint refuses the request, and would refuse it again."""


class Unreachable(RuntimeError):
  """The endpoint gave no reply, however often it was asked."""


class PutAside(RuntimeError):
  """The endpoint replies to other requests, but not to this one, however often it was asked."""


class Again(Exception):
  """The endpoint gave no usable reply this time.

  Attributes:
    wait_s: how long it asks to be left alone; None if it did not say.
    busy: whether it said that it is busy, which is not the request's fault.
  """

  def __init__(self, why: str, wait_s: float | None = None, busy: bool = False):
    super().__init__(why)
    self.wait_s, self.busy = wait_s, busy


@dataclasses.dataclass(frozen=True)
class Said:
  """A reply.

  Attributes:
    text: the words.
    finish: why the text ends: "stop" or "length", as the endpoint says; "" if it did not say.
  """

  text: str
  finish: str = ""


def chat(url: str, body: dict, timeout_s: float) -> Said:
  """Asks once.

  Args:
    url: of the endpoint, up to and including "/v1".  The variable OPENAI_API_KEY is sent along, if it is set.
    body: of the request, ready for JSON: model, messages and so on.
    timeout_s: for the reply.

  Raises:
    Again: the connection failed, the endpoint is busy or broken, or its reply is cut off.
    Refused: the endpoint does not take the request.
  """
  headers = {"Content-Type": "application/json"}
  if os.environ.get(_KEY_VARIABLE):
    headers["Authorization"] = f"Bearer {os.environ[_KEY_VARIABLE]}"
  data = json.dumps(body).encode("utf-8", "replace")
  try:
    request = urllib.request.Request(url.rstrip("/") + "/chat/completions", data, headers)
    with urllib.request.urlopen(request, timeout=timeout_s) as reply:
      choice = json.loads(reply.read())["choices"][0]
      text, finish = _words(choice["message"]), choice.get("finish_reason")
  except urllib.error.HTTPError as e:
    words = _body(e)
    if e.code < 500 and e.code not in _AGAIN:
      raise Refused(f"{e.code} from {url} ({words[:200]})") from e
    raise Again(f"{e.code} {words[:100]}", _asked_for(e.headers.get("Retry-After")), e.code in _BUSY) from e
  except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as e:
    raise Again(f"{type(e).__name__}: {e}") from e  # ValueError: cut off JSON
  if not isinstance(text, str):
    raise Again("a reply without text")
  return Said(text, finish if isinstance(finish, str) else "")


def _words(message: dict) -> object:
  """All that was said.  Some servers take thoughts and tool calls out of the text: they are put back into it."""
  text = message["content"]
  thought = message.get("reasoning_content") or message.get("reasoning")
  if isinstance(thought, str):
    text = f"<think>{thought}</think>{text or ''}"
  for call in message.get("tool_calls") or ():
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    try:
      written = json.dumps(json.loads(written))
    except ValueError:  # as it came: whoever reads it finds out
      pass
    text = f'{text or ""}<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {written}}}\n</tool_call>'
  return text


def _body(e: urllib.error.HTTPError) -> str:
  try:
    return e.read(500).decode("utf-8", "replace").strip()
  except (OSError, http.client.HTTPException):
    return "no more was said"


def _asked_for(header: str | None) -> float | None:
  try:
    return min(max(float(header), 0.0), LONGEST_WAIT_S)
  except (TypeError, ValueError):
    return None
