"""Orbax checkpoints of a TrainState: written in the background, restored bit for bit."""

from __future__ import annotations

import pathlib

import jax
import orbax.checkpoint as ocp


class Checkpoints:
  """The checkpoints of one workdir.

  Args:
    folder: where; created if absent.
    every: steps between saves.
    keep: how many of the newest to keep.
  """

  def __init__(self, folder: str | pathlib.Path, every: int, keep: int):
    self.folder, self.every = pathlib.Path(folder).absolute(), every
    # Orbax writes to a temporary name and renames: a killed save leaves the older checkpoints whole.
    self._manager = ocp.CheckpointManager(
        self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True))

  def latest(self) -> int | None:
    """The newest saved step, or None."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """Every saved step, oldest first."""
    return sorted(self._manager.all_steps())

  def maybe_save(self, step: int, state, last: bool = False) -> bool:
    """Saves after `step` steps if it is due or `last`.

    Returns:
      Whether a save was started; it goes on in the background.
    """
    if (step % self.every and not last) or self._manager.latest_step() == step:
      return False
    self._manager.save(step, args=ocp.args.StandardSave(state))
    return True

  def restore(self, step: int, state):
    """The state saved at `step`, placed like `state`.

    Args:
      step: one that `latest` gave.
      state: a state of the same shapes, dtypes and shardings; only these are read.

    Raises:
      ValueError: if the checkpoint does not fit.
    """
    return self._restore(step, ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state)))

  def restore_params(self, step: int, params):
    """Only the parameters saved at `step`: a third of what a state takes.

    Args:
      step: one that `latest` gave.
      params: `jax.ShapeDtypeStruct`s with shardings, or arrays to be placed like.

    Raises:
      ValueError: if the checkpoint does not fit.
    """
    item = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, params)}
    found = self._restore(step, ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True))
    return found["params"]

  def _restore(self, step: int, args):
    try:
      return self._manager.restore(step, args=args)
    except (ValueError, KeyError, TypeError, FileNotFoundError, OSError) as e:
      raise ValueError(f"checkpoint {step} in {self.folder} does not fit this model and optimiser, or is "
                       f"damaged: {e}. Delete that step's folder to go on from the one before") from e

  def wait(self) -> None:
    """Returns when every save is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and releases the manager."""
    self._manager.wait_until_finished()
    self._manager.close()
