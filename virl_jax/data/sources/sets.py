"""Finished sets of tasks, as training reads them; `set_files` says which files one has, and writes them.

A path is a set's folder, or a folder of such folders, which are read one after the other, in the order of their names;
or several of either.  Curated sets have tasks.jsonl in their folder or in the one above, which says how often a policy
solved each task.
"""

from __future__ import annotations

from collections.abc import Sequence
import hashlib
import json
import os
import pathlib

import numpy as np

from virl_jax import types
from virl_jax.data.sources import set_files

SPLITS = ("train", "test", "all")
_RATES = "tasks.jsonl"


class Source:
  """Tasks of a finished set, decoded as they are asked for.  Build with `load`.

  Attributes:
    image_N: uint64, a hash of each task's image file, in the order of the tasks.
    provenance_N: S16, each task's provenance.
    set_N: the number of each task's set, in `names`.
    names: of the sets' folders.
    about: for each folder, what set.json has under "about".
  """

  def __init__(self, path: str, split: str, records, roots: Sequence[tuple[int, str]], rows_N: np.ndarray,
               index_N: np.ndarray, about: list[dict], names: Sequence[str]):
    self._path, self._split, self._records, self._roots, self._rows_N = path, split, records, roots, rows_N
    self._n_all, self._n_images = len(index_N), len(np.unique(index_N["image"][rows_N]))
    self._digest = hashlib.blake2b(np.sort(index_N["provenance"]).tobytes(), digest_size=16).hexdigest()
    self.image_N = index_N["image"][rows_N]
    self.provenance_N = index_N["provenance"][rows_N]
    self.set_N = np.searchsorted([end for end, _ in roots], rows_N, side="right")
    self.names = tuple(names)
    self.about = about

  def __len__(self) -> int:
    return len(self._rows_N)

  def task(self, index: int) -> types.Task:
    """The task with that number, from 0."""
    row = int(self._rows_N[index])
    return set_files.decode(self._records[row], self._root_of(row))

  def stored(self, index: int) -> tuple[types.Task, str]:
    """The task as its set stores it, and the raw folder that its image's path is relative to; "" for none."""
    row = int(self._rows_N[index])
    return set_files.decode(self._records[row]), self._root_of(row)

  @property
  def tasks(self) -> Sequence[types.Task]:
    """All tasks, each read when it is asked for."""
    return _Tasks(self)

  def _root_of(self, row):
    return next(root for end, root in self._roots if row < end)

  def fingerprint(self) -> str:
    """A hash that is the same for the same tasks, wherever they are, in any order, and for both splits."""
    return f"set-{self._digest}"

  def describe(self) -> str:
    """One line for the log."""
    return (f"set {self._path}: {self._split} split has {len(self)} of {self._n_all} tasks, on {self._n_images} images")


class _Tasks(Sequence):
  def __init__(self, source):
    self._source = source

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return [self._source.task(i) for i in range(len(self))[index]]
    return self._source.task(range(len(self))[index])


def folders(path: str | os.PathLike) -> list[pathlib.Path]:
  """The sets in a folder: itself, or the folders in it, in the order of their names.

  Args:
    path: the folder, or several with commas between them.

  Raises:
    ValueError: one of the folders has none, or two sets have the same name.
  """
  found = [folder for one in paths(path) for folder in _folders(pathlib.Path(one))]
  found.sort(key=lambda folder: (folder.name, str(folder)))  # whatever the order in which they are given
  twice = [str(a) for a, b in zip(found, found[1:]) if a.name == b.name]
  if twice:
    raise ValueError(f"sets must lie in folders of different names. Received twice: {twice[0]}")
  return found


def paths(path: str | os.PathLike) -> list[str]:
  """The paths in a text with commas between them; a text that is a path itself is one."""
  path = os.fspath(path)
  return [path] if os.path.exists(path) else [one.strip() for one in path.split(",")]


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
  if (path / set_files.INFO).is_file():
    return [path]
  found = sorted(info.parent for info in path.glob(f"*/{set_files.INFO}"))
  if not found:
    there = sorted(p.name for p in path.iterdir())[:3] if path.is_dir() else None
    holds = "which is no folder" if there is None else f"which holds {', '.join(there) or 'nothing'}"
    raise ValueError(f"a set must be finished: a folder with {set_files.INFO}, as `curate build` writes it, "
                     f"or a folder of such folders. Received: {path}, {holds}")
  return found


def load(path: str | os.PathLike, split: str, eval_fraction: float, seed: int) -> Source:
  """One side of a set, or of several together.

  All tasks on one image are on the same side.  Which side depends on the seed and on the image files' bytes.

  Args:
    path: see `folders`.
    split: "train", "test", or "all" for both sides.
    eval_fraction: share of the tasks on the test side, in (0, 1); met as nearly as whole images allow, and neither
      side is empty.
    seed: draws the split.

  Raises:
    ValueError: an argument is out of range, there is no set, its files are not whole, its raw folder is gone, or it
      has only one image, which can't be split.
  """
  from array_record.python import array_record_data_source
  if split not in SPLITS:
    raise ValueError(f"split must be one of {', '.join(SPLITS)}. Received: {split!r}")
  if not 0.0 < eval_fraction < 1.0:
    raise ValueError(f"eval_fraction must be between 0 and 1. Received: {eval_fraction!r}")
  shards, roots, indices, about, there = [], [], [], [], folders(path)
  for folder in there:
    meta, index_N, files = _read(folder)
    shards += files
    indices.append(index_N)
    roots.append((sum(map(len, indices)), _root(folder, meta)))
    about.append(meta["about"])
  index_N = np.concatenate(indices)
  records = array_record_data_source.ArrayRecordDataSource(shards)
  if len(records) != len(index_N):
    raise ValueError(f"a set must be finished. Received: {path}, whose files hold {len(records)} tasks, its "
                     f"index {len(index_N)}; build it again")
  rows_N = np.arange(len(index_N))
  if split != "all":
    held_N = _held_out(index_N["image"], eval_fraction, seed, path)
    rows_N = rows_N[held_N == (split == "test")]
  return Source(os.fspath(path), split, records, roots, rows_N, index_N, about, [folder.name for folder in there])


def pass_rates(path: str | os.PathLike) -> dict[bytes, float]:
  """How often each task was solved when its set was curated, in [0, 1], by provenance as in `Source.provenance_N`.

  It is `pass_with` of tasks.jsonl, which is in the set's folder or in the one above; tasks without it are left out.

  Args:
    path: see `folders`.

  Raises:
    ValueError: there is no such file, it has no pass rate at all, or a line has another layout.
  """
  folders_ = folders(path)
  files = dict.fromkeys(place / _RATES for folder in folders_ for place in (folder, folder.absolute().parent)
                        if (place / _RATES).is_file())
  found = {}
  for file in files:
    with open(file, "rb") as lines:
      for number, line in enumerate(lines, start=1):
        try:
          said = json.loads(line)
          rate = said["pass_with"]
          if rate is not None:
            # numpy drops zero bytes at the end, and so do we.
            found[bytes.fromhex(said["provenance"]).rstrip(b"\0")] = float(rate)
            if not 0 <= rate <= 1:
              raise ValueError("pass_with is no share")
        except (ValueError, KeyError, TypeError) as error:
          raise ValueError(f"{file} must have lines with provenance and pass_with, as `curate` writes them. "
                           f"Received: line {number} ({type(error).__name__}: {error})") from error
  if not found:
    raise ValueError(f"pass rates must lie in {_RATES}, in a set's folder or above it, as `curate` writes it when it "
                     f"has asked a policy. Received: {path}, with "
                     + (f"none in {', '.join(map(str, files))}" if files else "no such file"))
  return found


def _read(folder):
  """A set's set.json, its index, and the paths of its array_record files."""
  try:
    meta = json.loads((folder / set_files.META).read_text())
    index_N = np.load(folder / set_files.INDEX_FILE)
    splits = json.loads((folder / set_files.INFO).read_text())["splits"]
    sizes = [int(n) for found in splits for n in found["shardLengths"]]
    if meta["format"] != set_files.FORMAT or index_N.dtype != set_files.INDEX or sum(sizes) != len(index_N):
      raise ValueError("its files do not belong together")
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f"a set must be finished, as `curate build` writes it. Received: {folder} ({error})"
                     ) from error
  files = sorted(str(p) for p in folder.glob("*.array_record-*-of-*"))
  if len(files) != len(sizes):
    raise ValueError(f"a set must be finished, with all of its {len(sizes)} array_record files. "
                     f"Received: {folder}, with {len(files)}")
  return meta, index_N, files


def _root(folder, meta):
  """The raw folder of a set: where it was when the set was built or, if both have moved together, where it is now."""
  if not meta["root"]:
    return ""
  places = [pathlib.Path(meta["root"]), folder / meta["root_from_here"]]
  found = next((place for place in places if place.is_dir()), None)
  if found is None:
    raise ValueError(f"the images of {folder} lie in {meta['root']}, which is no folder any more. Move it back, or "
                     "build the set with --images=embed, which needs no raw folder")
  return str(found)


def _held_out(image_N, eval_fraction, seed, path):
  """bool[N], True on the test side: so many images of a shuffled list that their tasks are nearest to the fraction."""
  unique_U, of_N, counts_U = np.unique(image_N, return_inverse=True, return_counts=True)
  if len(unique_U) < 2:
    raise ValueError(f"a set must have tasks on at least 2 images for a train and a test split. "
                     f"Received: {path}, with {len(unique_U)}")
  order_U = np.argsort(_mixed(unique_U, seed), kind="stable")
  held_U = np.cumsum(counts_U[order_U[:-1]])
  n_held = 1 + int(np.argmin(np.abs(held_U - eval_fraction * len(image_N))))
  is_held_U = np.zeros(len(unique_U), bool)
  is_held_U[order_U[:n_held]] = True
  return is_held_U[of_N]


def _mixed(numbers_N, seed):
  """uint64[N], as good as drawn at random for each number and seed (splitmix64's finaliser)."""
  start = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little")
  with np.errstate(over="ignore"):
    mixed_N = numbers_N + np.uint64(start)
    for shift, factor in ((30, 0xbf58476d1ce4e5b9), (27, 0x94d049bb133111eb)):
      mixed_N = (mixed_N ^ (mixed_N >> np.uint64(shift))) * np.uint64(factor)
    return mixed_N ^ (mixed_N >> np.uint64(31))
