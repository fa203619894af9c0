"""Writes an HF folder: whole or not at all, and only over one that this program wrote."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import importlib.metadata
import json
import os
import pathlib
import shutil

_MARKER = "virl_jax.json"  # in each HF folder that is written here


def check(out: str | pathlib.Path, keep: tuple[str | pathlib.Path, ...] = ()) -> None:
  """Checks that a folder may be replaced; called before anything slow, and again when it is written.

  Args:
    out: the folder that is asked for.
    keep: paths that must not be inside it, such as the run that it is made from.

  Raises:
    ValueError: it is neither absent, nor empty, nor one that this program wrote, or a path of `keep` is inside it.
  """
  folder = pathlib.Path(out)
  need = lambda ok, why: _need(ok, folder, why)
  if "://" in os.fspath(out):
    raise ValueError(f"an HF folder must be written to a disk, and can be copied from there. Received: {out}")
  whole = folder.resolve()
  need(not folder.is_symlink(), "it is a symbolic link")
  need(not folder.exists() or folder.is_dir(), "it is a file")
  above = next((p for p in whole.parents if p.exists()), whole)
  need(above.is_dir() and os.access(above, os.W_OK), f"nothing can be made in {above}")
  for path, what in [(pathlib.Path.cwd(), "this process is"), (pathlib.Path.home(), "the home folder is"),
                     *((pathlib.Path(path), f"{path} is") for path in keep if "://" not in os.fspath(path))]:
    need(not path.resolve().is_relative_to(whole), f"{what} in it")
  if folder.is_dir():
    there = sorted(folder.iterdir())
    need(not there or (folder / _MARKER).is_file(), f"it holds {there[0].name if there else ''}, and no {_MARKER}")
    strange = [p.name for p in there if p.is_dir()]
    need(not strange, f"it holds a folder, {strange[0] if strange else ''}, which was not written with it")


@contextlib.contextmanager
def writing(out: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to write to, which takes the place of `out` when the block ends, and is gone if it fails.

  Raises:
    ValueError: something else is there; see `check`.
  """
  check(out)
  folder = pathlib.Path(out)
  # Names that nobody else uses: if they exist, they are left from a save that was cut off.
  tmp, old = (folder.with_name(f".{folder.name}.virl_jax_{state}") for state in ("new", "old"))
  shutil.rmtree(tmp, ignore_errors=True)
  tmp.mkdir(parents=True)
  try:
    yield tmp
  except BaseException:
    shutil.rmtree(tmp, ignore_errors=True)
    raise
  _mark(tmp)
  shutil.rmtree(old, ignore_errors=True)
  if folder.exists():
    folder.rename(old)
  tmp.rename(folder)
  shutil.rmtree(old, ignore_errors=True)


def _mark(folder: pathlib.Path) -> None:
  """Marks a folder as one that may be replaced."""
  try:
    version = importlib.metadata.version("virl_jax")
  except importlib.metadata.PackageNotFoundError:  # run from a checkout
    version = "not installed"
  (folder / _MARKER).write_text(json.dumps({"written_by": "virl_jax", "version": version}) + "\n")


def _need(ok: bool, folder: pathlib.Path, why: str) -> None:
  if not ok:
    raise ValueError(f"an HF folder must be written to an absent or empty folder, or over one that this program wrote: "
                     f"nothing else is replaced. Received: {folder} ({why})")
