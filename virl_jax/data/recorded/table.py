"""Which kinds of recorded conversations there are, and how files of them become scripts.

A kind is a module with `is_mine(record)` and `read(record, folder, uid, frame)`, and a line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib

from virl_jax.data.recorded import mini_o3
from virl_jax.data.recorded import rollouts
from virl_jax.data.recorded import script
from virl_jax.data.recorded import sharegpt

KINDS = {"rollouts": rollouts, "mini_o3": mini_o3, "sharegpt": sharegpt}  # the first whose `is_mine` is true reads it


@dataclasses.dataclass(frozen=True)
class Choice:
  """Which of the conversations that can be read are used.

  Attributes:
    frame: of ShareGPT's boxes, one of `script.FRAMES`.
    only_right: drop conversations whose answer is known to be wrong.
    least_reward: drop conversations whose reward is known to be less.
    best_of: keep this many conversations of each task, those with the most reward; 0 keeps all.
  """

  frame: str = "original"
  only_right: bool = True
  least_reward: float = -1e9
  best_of: int = 0


@dataclasses.dataclass(frozen=True)
class Read:
  """What files hold.

  Attributes:
    scripts: by where they were, such as "demos.jsonl:3".
    left_out: (where, reason, detail) for each record that is no script.
    not_chosen: the same for each script that was not chosen.
    kinds: how many records there were of each kind.
    digest: a hash of all bytes of the files.
  """

  scripts: dict[str, script.Script]
  left_out: tuple[tuple[str, str, str], ...]
  not_chosen: tuple[tuple[str, str, str], ...]
  kinds: dict[str, int]
  digest: str


def files_of(path: str) -> list[pathlib.Path]:
  """The files that a path means: itself, or the rollouts of the steps in a run's workdir, which are of training tasks.

  Raises:
    ValueError: there are none.
  """
  given = pathlib.Path(path)
  if given.is_file():
    return [given]
  found = sorted(given.glob("rollouts/step_*.jsonl"))
  if not found:
    raise ValueError(f"--data must be a file of trajectories (.json, .jsonl), or a run's workdir with "
                     f"rollouts/step_*.jsonl. Received: {path}")
  return found


def read(paths: Sequence[str], choice: Choice) -> Read:
  """All scripts in some files, and why other records are none.

  Args:
    paths: files, or workdirs.
    choice: which scripts are used.

  Raises:
    ValueError: a path is neither a file nor a workdir, or a file can't be read at all.
  """
  scripts: dict[str, script.Script] = {}
  left_out, not_chosen, kinds, digest = [], [], {}, hashlib.blake2b(digest_size=16)
  for file in (file for path in paths for file in files_of(path)):
    try:
      content = file.read_bytes()
    except OSError as e:
      raise ValueError(f"--data must be readable. Received: {file} ({e})") from e
    digest.update(hashlib.blake2b(content).digest())
    for number, record in _records(content, file):
      where = f"{file.name}:{number}"
      where = where if where not in scripts else f"{file}:{number}"
      try:
        if not isinstance(record, dict):
          raise script.Unusable("it is no JSON object")
        kind = next((name for name, module in KINDS.items() if module.is_mine(record)), None)
        if kind is None:
          raise script.Unusable("its format is unknown", ", ".join(sorted(record)[:6]))
        kinds[kind] = kinds.get(kind, 0) + 1
        found = KINDS[kind].read(record, os.fspath(file.parent), where, choice.frame)
        if why := _unwanted(found, choice):
          not_chosen.append((where, *why))
        else:
          scripts[where] = found
      except script.Unusable as e:
        left_out.append((where, e.reason, e.detail))
  if choice.best_of:
    scripts, more = _best(scripts, choice.best_of)
    not_chosen += more
  return Read(scripts, tuple(left_out), tuple(not_chosen), kinds, digest.hexdigest())


def _records(content: bytes, file: pathlib.Path) -> Iterator[tuple[int, object]]:
  """The records of a file, numbered from 1: a JSON list's items, or one a line; None for a line that is not JSON."""
  text = content.decode("utf-8-sig", errors="replace")
  if text.lstrip().startswith("["):
    try:
      yield from enumerate(json.loads(text), start=1)
    except ValueError as e:
      raise ValueError(f"{file} must be a JSON list, or JSON lines ({e})") from e
    return
  for number, line in enumerate(text.splitlines(), start=1):
    if line.strip():
      try:
        yield number, json.loads(line)
      except ValueError:
        yield number, None


def _unwanted(found: script.Script, choice: Choice) -> tuple[str, str] | None:
  """Why a script is not chosen, in short and in detail; None if it is."""
  if choice.only_right and found.correct is False:
    return "its answer is wrong", ""
  if found.reward is not None and found.reward < choice.least_reward:
    return "it earned less than sft.least_reward", f"{found.reward:g}"
  return None


def _best(scripts: dict[str, script.Script], most: int
          ) -> tuple[dict[str, script.Script], list[tuple[str, str, str]]]:
  """The scripts of each task with the most reward, in the given order; and why the others are not among them."""
  by_task: dict[tuple[str, str], list[str]] = {}
  for where, found in scripts.items():
    by_task.setdefault((found.task.uid, found.task.question), []).append(where)
  earned = lambda where: -float("inf") if scripts[where].reward is None else scripts[where].reward
  kept = {where for same in by_task.values() for where in sorted(same, key=earned, reverse=True)[:most]}
  left = [(where, "others of its task earned more", f"{earned(where):g}") for where in scripts if where not in kept]
  return {where: found for where, found in scripts.items() if where in kept}, left
