"""Rollouts whose words come from an OpenAI-compatible endpoint: the loop, the crop and the parser are ours.

Prompt, budgets and rules are those of the engine (`turns`); the endpoint only writes turns.  It is sent the words and
pictures of our own chat text, turn by turn, so that a server with the model's chat template reads the same text.
Pictures are sent as they are shown, already of a size that the model keeps, so that boxes mean the same pixels.

An endpoint that does not reply is waited for and asked again, for `endpoint.patience_s`; then there is an error, or no
trajectory.  No trajectory ends because of a connection.  If only one request gets no reply, it is put aside after
`endpoint.tries`: some servers fail at what a policy writes badly, and do so each time.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from concurrent import futures
import hashlib
import io
import re
import threading
import time
from typing import TypeVar

import numpy as np
from PIL import Image

from virl_jax import types
from virl_jax.data import endpoint
from virl_jax.data import prompt
from virl_jax.model import patches
from virl_jax.rollout import row as row_lib
from virl_jax.rollout import turns

_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.S)
_SAY_EVERY_S = 30.0
MISSING = (endpoint.Unreachable, endpoint.Refused, endpoint.PutAside)  # why there may be no reply

T = TypeVar("T")


class Endpoint:
  """An endpoint that several threads share, and with it the knowledge that it is gone."""

  def __init__(self, url: str, cfg: endpoint.Config, say: Callable[[str], None] = lambda line: None):
    """Args:
      url: up to and including "/v1".
      cfg: how it is asked.
      say: called with a line when it does not reply.
    """
    if not url.startswith(("http://", "https://")):
      raise ValueError(f"--endpoint must be an address, http://HOST:PORT/v1. Received: {url!r}")
    self.url, self.cfg, self._say = url, cfg, say
    self._lock, self._replied, self._told = threading.Lock(), 0.0, 0.0
    self._gone_s = 0.0  # how long it had been silent when it was given up; 0 if it has not been, or has replied since
    self._good: dict | None = None  # a request that it has replied to
    self.retries = 0

  def ask(self, body: dict) -> endpoint.Said:
    """A reply, however many tries that takes.

    Raises:
      endpoint.Unreachable: no thread got a reply for `patience_s`; from then on until there is one, the first failed
        try raises.
      endpoint.PutAside: this request failed `tries` times, and the endpoint replies to others.
      endpoint.Refused: the endpoint does not take the request.
    """
    wait_s, began, failed, alone = self.cfg.wait_s, time.monotonic(), 0, 0
    since = began
    while True:
      try:
        said = endpoint.chat(self.url, body, self.cfg.timeout_s)
      except endpoint.Again as e:
        failed += not e.busy
        if failed >= self.cfg.tries - 1 and not e.busy:
          alone = alone + 1 if self._replies(since) else 0
        if alone > 1:  # failed between two signs of life, twice: once may be due to an endpoint that is just back
          raise endpoint.PutAside(f"{e}, {failed} times, while other requests had a reply") from e
        since = time.monotonic()
        self._wait(e, wait_s, began)
        wait_s = min(2 * wait_s, endpoint.LONGEST_WAIT_S)
        continue
      except endpoint.Refused as e:
        raise endpoint.Refused(f"--endpoint must take chat completions with pictures of {self.cfg.model!r} "
                               f"(config.endpoint.model). Received: {e}") from e
      self._heard(body)
      return said

  def _heard(self, body: dict) -> None:
    """Takes note of a reply to a request."""
    with self._lock:
      self._replied, self._gone_s, self._good = time.monotonic(), 0.0, body

  def _replies(self, since: float) -> bool:
    """Whether the endpoint has replied to any request since then, or now replies to one that it replied to before."""
    with self._lock:
      if self._replied > since or self._good is None:
        return self._replied > since
      good = self._good
    try:
      endpoint.chat(self.url, good, self.cfg.timeout_s)
    except (endpoint.Again, endpoint.Refused):
      return False
    self._heard(good)
    return True

  def _wait(self, e: endpoint.Again, wait_s: float, began: float) -> None:
    with self._lock:
      self.retries += 1
      now = time.monotonic()
      silent_s = now - max(self._replied, began)
      if self._gone_s or silent_s > self.cfg.patience_s:
        self._gone_s = self._gone_s or silent_s
        raise endpoint.Unreachable(
            f"--endpoint {self.url} has given no reply for {self._gone_s:.0f} s (the last: {e}). Nothing was counted "
            "as wrong; what is finished is kept: start again when it is back") from e
      if now - self._told > _SAY_EVERY_S:
        self._told = now
        self._say(f"{self.url} gives no reply ({e}): waiting, for {silent_s:.0f} s until now")
    time.sleep(wait_s if e.wait_s is None else e.wait_s)


def rollout(policy: turns.Policy, server: Endpoint, tasks: Sequence[types.Task], seeds: Sequence[int],
            group_size: int = 1, temperature: float | None = None) -> list[types.Trajectory]:
  """Rolls out every task `group_size` times.

  Args:
    policy: as the engine takes it; of its model only the shapes are used.
    server: the endpoint that writes.
    tasks: prompts.
    seeds: int32 for each trajectory, by index; rollout g of task i has the index i * group_size + g.  A number that
      depends on the seed and the turn is sent with each request.
    group_size: G.
    temperature: overrides `policy.rollout.temperature`; 0 is greedy.

  Returns:
    The trajectories by index, groups together, each with a stop reason.

  Raises:
    ValueError: a task cannot be asked (see `turns.begin`), or the endpoint refuses a request.
    endpoint.Unreachable, endpoint.PutAside: see `Endpoint.ask`.
  """
  heat = policy.rollout.temperature if temperature is None else temperature
  return attempts(policy, server, tasks, seeds, heat, group_size, ())


def attempts(policy: turns.Policy, server: Endpoint, tasks: Sequence[types.Task], seeds: Sequence[int],
             temperature: float, group_size: int = 1, missing: tuple[type[Exception], ...] = MISSING
             ) -> list[types.Trajectory | str]:
  """Rolls out every task, whatever becomes of the others.

  Args:
    policy, server, tasks, seeds, temperature, group_size: as for `rollout`.
    missing: which exceptions of `Endpoint.ask` cost only their own trajectory.

  Returns:
    As `rollout`; or, in words, why there is no trajectory: the endpoint gave no reply, or does not take the request.

  Raises:
    ValueError: a task cannot be asked (see `turns.begin`).
  """
  def one(i: int) -> types.Trajectory | str:
    try:
      return _one(policy, server, tasks[i // group_size], i, seeds[i], temperature)
    except missing as e:
      return str(e if isinstance(e, endpoint.PutAside) else e.__cause__)

  return _at_once(server, len(tasks) * group_size, one)


def seed(*of: object) -> int:
  """A seed of 31 bits, a pure function of the arguments' texts."""
  return int.from_bytes(hashlib.blake2b(" ".join(map(str, of)).encode(), digest_size=4).digest()) >> 1


def _at_once(server: Endpoint, n: int, one: Callable[[int], T]) -> list[T]:
  """`one` of 0 to n - 1, as many at a time as the endpoint may be asked."""
  pool = futures.ThreadPoolExecutor(server.cfg.in_flight)
  try:
    return list(pool.map(one, range(n)))
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def _one(policy, server, task, index, at, temperature) -> types.Trajectory:
  """One trajectory from its prompt to its end."""
  row = turns.begin(policy, task).row(index)
  words = prompt.render(task.question, task.options, policy.prompt, policy.actions)
  while True:
    shown = [_uri(picture(row.picture, image, policy.model.vision.grid)) for image in row.traj.images]
    body = {"model": server.cfg.model, "messages": messages(words, shown), "temperature": temperature,
            "max_tokens": turns.left(policy, row), "seed": seed(at, row.turn)}
    _hear(policy, row, server.ask(body))
    reply = turns.read(policy, row)
    if reply is None:
      return row.traj
    row.filled, row.next_pos = reply.start + len(reply.ids), reply.next_pos
    words += "".join(turn.text for turn in row.traj.turns[-2:])


def _hear(policy: turns.Policy, row: row_lib.Row, said: endpoint.Said) -> None:
  """Adds a turn to the row, closed unless it was cut off; only the part that fits if it is too long.

  Stop strings are found here and not by the endpoint, which would remove them from the text.
  """
  ids = policy.codec.encode(prompt.plain(said.text.removesuffix(prompt.END)))
  if said.finish != "length":
    ids = np.append(ids, np.int32(policy.codec.end))
  ids = ids[:max(1, turns.left(policy, row))]
  turns.hear(policy, row, ids, np.zeros(len(ids), np.float32))


def messages(words: str, shown: Sequence[str]) -> list[dict]:
  """Chat text as messages of the endpoint.

  Args:
    words: whole turns, and then the assistant's opening, as `prompt.render` and `prompt.tool_turn` write them.
    shown: data URIs of the pictures, in the order of their placeholders.

  Returns:
    {"role", "content"} for each whole turn; if it has pictures, content is in parts, in the order of the text.
  """
  found, used = [], 0
  for role, text in _TURN.findall(words):
    pieces = text.split(prompt.IMAGE)
    if len(pieces) == 1:
      found.append({"role": role, "content": text})
      continue
    parts = []
    for i, piece in enumerate(pieces):
      if i:
        parts.append({"type": "image_url", "image_url": {"url": shown[used]}})
        used += 1
      if piece:
        parts.append({"type": "text", "text": piece})
    found.append({"role": role, "content": parts})
  return found


def picture(original: Image.Image, shown: types.ImageInput, grid: patches.Grid) -> Image.Image:
  """The pixels of an image as the policy is shown it."""
  if shown.region != (0, 0, *original.size):
    original = original.crop(tuple(shown.region))
  return original.resize(patches.shown_wh(shown, grid), Image.Resampling.BICUBIC)


def _uri(image: Image.Image) -> str:
  out = io.BytesIO()
  image.save(out, "PNG", compress_level=1)
  return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
