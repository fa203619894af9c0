"""Recorded conversations as demonstrations to train on: checked and counted once, and prepared a step ahead.

Those that can't be used are left out, for a reason that is counted and written to left_out.json of the workdir.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import threading

from etils import epath

from virl_jax import checks
from virl_jax import config as config_lib
from virl_jax import types
from virl_jax.data import order
from virl_jax.data.recorded import script
from virl_jax.data.recorded import table
from virl_jax.rollout import replay
from virl_jax.rollout import turns
from virl_jax.run import files
from virl_jax.run import hosts
from virl_jax.run import progress
from virl_jax.run import sources
from virl_jax.run import workdir as workdir_lib

_FILE = "left_out.json"
_EXAMPLES = 3  # of each reason that are printed
# The knobs that decide which demonstrations can be used.
_DEPENDS = ("model.path", "prompt.", "image.", "rollout.max", "rollout.stop_strings", "sft.")

LeftOut = tuple[str, str, str]  # where, reason, detail


class Lessons:
  """Demonstrations, as a source of training: `load` makes it, `look_through` finds out which can be used.

  Attributes:
    used: of each demonstration that is used, the file and place that it is from.
  """

  def __init__(self, c: config_lib.ConfigDict, policy: turns.Policy, read: table.Read):
    self._c, self._policy, self._read = c, policy, read
    self._scripts = read.scripts
    self._left_out: list[LeftOut] = list(read.left_out)
    self.used = list(read.scripts)
    self._pool = concurrent.futures.ThreadPoolExecutor(c.engine.threads)
    self._ready: dict[str, types.Trajectory] = {}
    self._room = c.sft.cache_gib * 2 ** 30
    self._ahead: dict[int, list[concurrent.futures.Future]] = {}
    self._opening, self._runs = threading.Lock(), {}  # results of `_tasks_of`, by folder

  def __len__(self) -> int:
    return len(self.used)

  def fingerprint(self) -> str:
    """The same for the same records on the same images, wherever they lie.

    It depends on each byte of the files of records, and on the size in bytes of each image that has a file.
    """
    return self._fingerprint

  @functools.cached_property
  def _fingerprint(self) -> str:
    digest = hashlib.blake2b(self._read.digest.encode(), digest_size=16)
    paths = sorted({s.task.image for s in self._scripts.values() if isinstance(s.task.image, str) and s.task.image})
    for path in paths:
      digest.update(f"{os.path.basename(path)}\0{os.path.getsize(path)}\0".encode("utf-8", "surrogateescape"))
    return f"sft-{digest.hexdigest()}"

  def describe(self) -> str:
    """One line for the log."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self._read.kinds.items()))
    return (f"demonstrations: {len(self)} of {self._records} records ({kinds}); not chosen "
            f"{_counted(self._read.not_chosen)}; left out {_counted(self._left_out)}")

  @property
  def _records(self) -> int:
    return len(self._scripts) + len(self._read.left_out) + len(self._read.not_chosen)

  def look_through(self, workdir: epath.Path) -> None:
    """Finds out which demonstrations can be used, unless the workdir knows it already; prints what is left out.

    Each process checks a part of them.

    Raises:
      ValueError: too few can be used.
    """
    c, file = self._c, workdir / _FILE
    sections = {k: v for k, v in config_lib.flat(json.loads(config_lib.to_json(c))).items() if k.startswith(_DEPENDS)}
    for where in ("sft.data", "sft.cache_gib"):
      sections.pop(where)
    of = json.dumps([self.fingerprint(), sections], sort_keys=True)
    of = hashlib.blake2b(of.encode(), digest_size=16).hexdigest()
    found = hosts.first(lambda: _known(file, of))
    if found is None:
      mine = [where for i, where in enumerate(self._scripts) if hosts.mine(i)]
      looked = progress.over(self._pool.map(self._look, mine), len(mine), "looking through the demonstrations",
                             "demonstration", hosts.leads())
      found = sum(hosts.everyone([why for why in looked if why is not None]), [])
    bad = {where for where, *_ in found}
    self.used = [where for where in self._scripts if where not in bad]
    self._left_out = [*self._read.left_out, *found]
    hosts.first(lambda: files.write_text(file, json.dumps({
        "of": of, "records": self._records, "used": len(self), "left_out": dict(_reasons(self._left_out)),
        "not_chosen": dict(_reasons(self._read.not_chosen)), "each": self._left_out, "when_replayed": found,
        "each_not_chosen": self._read.not_chosen}, indent=1) + "\n"))
    self._say(file)

  def _say(self, file: os.PathLike) -> None:
    shown = collections.Counter()
    for where, reason, detail in self._left_out:
      if shown[reason] < _EXAMPLES:
        hosts.say(f"left out: {where}: {reason}{f' ({detail})' if detail else ''}")
      shown[reason] += 1
    chosen, most = self._records - len(self._read.not_chosen), self._c.sft.most_left_out
    if not len(self) or len(self._left_out) > most * chosen:
      raise ValueError(f"--data must have demonstrations that can be used, at least a share of {1 - most:g} of those "
                       f"that were chosen (config.sft.most_left_out). Received: {self.describe()}; see {file}")

  def _look(self, where: str) -> LeftOut | None:
    """Why a script can't be used, or None."""
    hosts.beat()
    try:
      self._lesson(where)
    except script.Unusable as e:
      return where, e.reason, e.detail
    return None

  def _lesson(self, where: str) -> types.Trajectory:
    """A script as a trajectory."""
    if (ready := self._ready.get(where)) is not None:
      return ready
    found = self._scripts[where]
    if not found.task.image:
      image = self._picture(found.folder, found.task.uid)
      found = dataclasses.replace(found, task=dataclasses.replace(found.task, image=image))
    traj = replay.replay(self._policy, found)
    traj.task = found.task  # without the decoded picture
    size = sum(image.patches_PC.nbytes for image in traj.images)
    if size <= self._room:
      self._room -= size
      self._ready[where] = traj
    return traj

  def _picture(self, folder: str, uid: str) -> bytes | str:
    """The picture of a task of the run that a folder of rollouts belongs to."""
    with self._opening:
      if folder not in self._runs:
        self._runs[folder] = _tasks_of(pathlib.Path(folder).parent)
    tasks = self._runs[folder]
    if isinstance(tasks, str):
      raise script.Unusable("its picture is kept too small, and its run's data cannot be found", tasks)
    if uid not in tasks:
      raise script.Unusable("its picture is kept too small, and no task of its run has its name", uid)
    return tasks[uid]().image

  def batch(self, step: int) -> list[types.Trajectory]:
    """This process's demonstrations of a step: a pure function of (data, seed, step).

    Those of the next step are prepared meanwhile.

    Raises:
      ValueError: one can't be used any more.
    """
    due = self._ahead.pop(step, None) or self._asked(step)
    self._ahead = {step + 1: self._asked(step + 1)}
    return [future.result() for future in due]

  def _asked(self, step: int) -> list[concurrent.futures.Future]:
    which = order.batch_indices(self._c.seed, step, len(self), self._c.sft.batch)
    return [self._pool.submit(self._placed, place, self.used[i]) for place, i in enumerate(which) if hosts.mine(place)]

  def _placed(self, place: int, where: str) -> types.Trajectory:
    try:
      return dataclasses.replace(self._lesson(where), index=place)
    except script.Unusable as e:
      raise ValueError(f"{where} could be used when the run began, and now can't: {e}") from e

  def close(self) -> None:
    """Stops preparing demonstrations."""
    self._pool.shutdown(cancel_futures=True)


def load(c: config_lib.ConfigDict, policy: turns.Policy) -> Lessons:
  """Reads the files that `c.sft.data` names.

  Args:
    c: the configuration.
    policy: its protocol and budgets are those of the demonstrations.

  Raises:
    ValueError: there are no files, or none of their records is chosen.
  """
  checks.need(bool(c.sft.data), "sft.data", "files of trajectories or workdirs, as --data gives them", c.sft.data)
  s = c.sft
  read = table.read(s.data, table.Choice(s.frame, s.only_right, s.least_reward, s.best_of))
  lessons = Lessons(c, policy, read)
  if not len(lessons):
    lessons.close()
    first = "".join(f"; {where}: {reason} ({detail})" for where, reason, detail in read.left_out[:_EXAMPLES])
    raise ValueError(f"--data must have demonstrations. Received: {lessons.describe()}{first}")
  return lessons


def _tasks_of(workdir: pathlib.Path) -> dict[str, Callable[[], types.Task]] | str:
  """A function that reads a task, for each training task of a run, by uid; or why there are none."""
  try:
    source, known = sources.load(workdir_lib.config(workdir), "train"), workdir_lib.fingerprint(files.path(workdir))
  except ValueError as e:
    return str(e)
  if known is not None and known["fingerprint"] != source.fingerprint():
    return f"its data has changed: {source.describe()}"
  return {source.task(i).uid: functools.partial(source.task, i) for i in range(len(source))}


def _known(file: epath.Path, of: str) -> list[LeftOut] | None:
  """What an earlier process found out about the same records under the same configuration."""
  try:
    kept = json.loads(files.read_text(file))
    return [(str(where), str(reason), str(detail)) for where, reason, detail in kept["when_replayed"]] if (
        kept["of"] == of) else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _reasons(left_out: Iterable[LeftOut]) -> list[tuple[str, int]]:
  """How many there are of each reason, the most frequent first."""
  return collections.Counter(reason for _, reason, _ in left_out).most_common()


def _counted(left_out: Iterable[LeftOut]) -> str:
  found = _reasons(left_out)
  return f"{sum(n for _, n in found)} ({', '.join(f'{n} {reason}' for reason, n in found)})" if found else "none"
