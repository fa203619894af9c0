"""Orbax checkpoints of a TrainState: written in the background, sealed with checksums, restored bit for bit.

Several processes write and read them together, each its own part, in a folder that all of them see.
"""

from __future__ import annotations

from collections.abc import Callable
import concurrent.futures
import contextlib
import hashlib
import json
import os
import time
from typing import TypeVar

from etils import epath
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from virl_jax.run import files
from virl_jax.run import hosts

_SUMS = "checksums.json"  # in a checkpoint's folder: file in the folders below it -> BLAKE2b of its bytes
_SCORE = "score"
_THREADS = 8  # that read files for their checksums
_TOLD_BYTES = 2 ** 29  # reading or writing a state of this size takes seconds, and is reported

T = TypeVar("T")


def _score(metrics: dict) -> float:
  """The score, from what Orbax keeps beside a checkpoint."""
  return metrics[_SCORE]


class Damaged(ValueError):
  """A checkpoint is not what was written."""


class Checkpoints:
  """The checkpoints of one workdir.

  Args:
    folder: where; created if absent.
    every: steps between saves; 0 for none but the last.
    keep: how many of the newest to keep.
    best: whether to keep the best as well, by the scores that checkpoints are saved with; if not, `best()` is None.
  """

  def __init__(self, folder: str | os.PathLike, every: int, keep: int, best: bool = False):
    self.folder, self.every = files.absolute(files.path(folder)), every
    self._saving: int | None = None
    self._saving_bytes = 0
    self._best = best
    kept = [policies.LatestN(n=keep)]
    if best:
      kept.append(policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False))
    # Orbax writes to a temporary name and renames; in a bucket, where nothing can be renamed, it writes last the file
    # without which a folder is no checkpoint.  A killed save leaves the older ones whole.
    self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept), best_fn=_score if best else None, create=True,
        async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal)))

  def latest(self) -> int | None:
    """The newest saved step, or None."""
    return self._manager.latest_step()

  def best(self) -> int | None:
    """The step with the highest score, of those that were saved with one; None if none was."""
    return self._manager.best_step() if self._best else None

  def steps(self) -> list[int]:
    """Every saved step, oldest first."""
    return sorted(self._manager.all_steps())

  def due(self, step: int) -> bool:
    """Whether a save is due after so many steps."""
    return self.every > 0 and step % self.every == 0

  def maybe_save(self, step: int, state, last: bool = False, score: float | None = None) -> bool:
    """Saves after `step` steps if it is due or `last`.

    Args:
      step: how many steps are done.
      state: the state after them.
      last: whether to save even if no save is due.
      score: how good the state is, the higher the better; None if that is not known.

    Returns:
      Whether a save was started; it continues in the background.
    """
    if not (last or self.due(step)) or self._manager.latest_step() == step:
      return False
    self.wait()
    self._saving, self._saving_bytes = step, _bytes(state)
    self._manager.save(step, args=ocp.args.StandardSave(state), metrics=None if score is None else {_SCORE: score})
    return True

  def resume(self, state) -> tuple[int, object]:
    """Where a run goes on: the newest step whose checkpoint is whole, and its state; 0 and `state` if nothing is saved.

    Damaged checkpoints after that step are reported, and moved to a folder beside this one.

    Args:
      state: see `restore`.

    Raises:
      ValueError: no checkpoint can be used.
    """
    step, found = self.newest(lambda step: self.restore(step, state)) or (0, state)
    for aside in hosts.first(lambda: self._put_aside(step)):
      hosts.say(f"put aside: {aside}")
    self._manager.reload()
    return step, found

  def _put_aside(self, step: int) -> list[epath.Path]:
    """Moves the checkpoints after a step into a folder beside this one."""
    moved = []
    for later in self.steps():
      if later > step:
        aside = self.folder.with_name(f"{self.folder.name}_damaged") / str(later)
        files.move(self.folder / str(later), aside)  # replaces an earlier damaged one of the same step
        moved.append(aside)
    return moved

  def newest(self, read: Callable[[int], T]) -> tuple[int, T] | None:
    """The newest step whose checkpoint is whole, and what `read` returns for it; None if nothing is saved.

    Args:
      read: a function of a step, such as `restore` or `restore_params` with their other argument bound.

    Raises:
      ValueError: no checkpoint can be used.
    """
    refused = []
    for step in reversed(self.steps()):
      try:
        found = read(step)
      except Damaged as e:
        refused.append(e)
        hosts.say(f"WARNING: {e}")
        continue
      if refused:
        hosts.say(f"WARNING: checkpoint {step}, the one before, is used instead")
      return step, found
    if refused:
      raise ValueError(f"none of the checkpoints can be used: {refused[0]}. Use another --workdir, or delete "
                       f"{self.folder} to begin again at the first step") from refused[0]
    return None

  def restore(self, step: int, state):
    """The state saved at `step`, placed like `state`.

    Args:
      step: one of `steps`.
      state: a state of the same shapes, dtypes and shardings; only these are read.

    Raises:
      Damaged: the checkpoint is not what was written.
      ValueError: there is none, or it does not fit.
    """
    return self._restore(step, ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state)),
                         _bytes(state))

  def restore_params(self, step: int, params):
    """Only the parameters saved at `step`: a third of what a state takes.

    Args:
      step: one of `steps`.
      params: `jax.ShapeDtypeStruct`s with shardings, or arrays to be placed like.

    Raises:
      Damaged: the checkpoint is not what was written.
      ValueError: there is none, or it does not fit.
    """
    item = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, params)}
    found = self._restore(step, ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True),
                          _bytes(params))
    return found["params"]

  def _restore(self, step: int, args, n_bytes: int):
    self.wait()  # a checkpoint that is being written has no folder yet
    name = f"checkpoint {step} in {self.folder}"
    if not files.is_dir(self.folder / str(step)):
      raise ValueError(f"{name} must be one of those there are. Received: {self.steps()}")
    found = told = cause = None
    with _said(f"restoring step {step}", n_bytes):
      sealed = self._verify(step, name)
      try:
        found = self._manager.restore(step, args=args)
      except Exception as e:  # Orbax raises nearly every type
        cause, told = e, str(e).partition("\n")[0][:200]  # its messages can be pages long
    told = next((said for said in hosts.everyone(told) if said is not None), None)
    if told is not None:
      if sealed:
        raise ValueError(f"{name} does not fit this model and optimizer: {told}") from cause
      raise Damaged(f"{name} does not fit this model and optimizer, or is damaged: {told}") from cause
    return found

  def _seal(self) -> None:
    """Writes the checksums.

    Orbax calls this in its own thread when all files are written and before their folder gets its name, so that no
    checkpoint lacks them.
    """
    if not hosts.leads():
      return
    for name in files.names(self.folder):
      if name.partition(".")[0] == str(self._saving):
        folder = self.folder / name
        files.write_text(folder / _SUMS, json.dumps(_sums(folder), indent=1) + "\n")

  def _verify(self, step: int, name: str) -> bool:
    """Whether a checkpoint has checksums, as all but those of older versions have.

    Raises:
      Damaged: its files don't match them.
    """
    folder = self.folder / str(step)
    if not files.exists(folder / _SUMS):
      hosts.say(f"{name} is of an older version, without checksums: whether it is whole is not known")
      return False
    wanted, changed, told = {}, [], None
    try:
      wanted = json.loads(files.read_text(folder / _SUMS))
      mine = {file: wanted[file] for number, file in enumerate(sorted(wanted)) if hosts.mine(number)}
      found = _sums(folder, mine)
      changed = [file for file in mine if mine[file] != found[file]]
    except (OSError, ValueError, TypeError, AttributeError) as e:
      told = str(e)
    all_ = hosts.everyone((changed, told))  # each looks at some of the files
    told = next((said for _, said in all_ if said is not None), None)
    changed = sorted(file for changed, _ in all_ for file in changed)
    if told is not None:
      raise Damaged(f"{name} is damaged: {told}")
    if changed:
      more = f" and {len(changed) - 1} more files are" if len(changed) > 1 else " is"
      raise Damaged(f"{name} is damaged: {changed[0]}{more} not what was written")
    return True

  def wait(self) -> None:
    """Returns when every save is on disk."""
    with _said(f"saving step {self._saving}", self._saving_bytes if self._manager.is_saving_in_progress() else 0):
      self._manager.wait_until_finished()  # raises what went wrong

  def close(self) -> None:
    """Waits and releases the manager."""
    self.wait()
    self._manager.close()


def _bytes(tree) -> int:
  """Of all leaves of a state or its shapes, on all devices together, each once."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@contextlib.contextmanager
def _said(what: str, n_bytes: int):
  """Says what is waited for, and afterwards for how long, where there is much to wait for."""
  if n_bytes < _TOLD_BYTES:
    yield
    return
  hosts.say(f"{what} ({n_bytes / 2 ** 30:.2f} GiB)")
  began = time.perf_counter()
  yield
  hosts.say(f"{what}: {time.perf_counter() - began:.0f} s")


def _sums(folder: epath.Path, names=None) -> dict[str, str]:
  """The checksum of each file in the folders below a folder, by its path there, or only of those in `names`.

  Files in the folder itself are left out: Orbax writes them last of all.
  """
  names = files.below(folder) if names is None else names
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return dict(zip(names, pool.map(lambda name: _sum(folder / name), names)))


def _sum(path: epath.Path) -> str:
  with files.opened(path) as file:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
