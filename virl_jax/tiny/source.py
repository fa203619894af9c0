"""Needle pictures as a source of tasks: drawn once, stored as array_record, read back from there."""

from __future__ import annotations

import hashlib
import json
import pathlib

from virl_jax import types
from virl_jax.run import caches
from virl_jax.tiny import needle


class Source:
  """Tasks of one split, read from array_record files.  Build with `load`."""

  def __init__(self, records, name: str, digest: str):
    self._records, self._name, self._digest = records, name, digest

  def __len__(self) -> int:
    return len(self._records)

  def task(self, index: int) -> types.Task:
    """The task at `index`."""
    r = self._records[index]
    fields = json.loads(r["task"])
    return types.Task(fields["uid"], r["image"], fields["question"], tuple(fields["answers"]),
                      tuple(types.Box(*b) for b in fields["boxes"]), None, fields["kind"])

  def fingerprint(self) -> str:
    """A hash that is the same for the same pictures, and for both splits: of the configuration and `needle.VERSION`."""
    return f"needle-{self._digest}"

  def describe(self) -> str:
    """One line for the log."""
    return f"needle: {len(self)} {self._name} pictures"


def load(path: str, split: str, cfg: needle.Config) -> Source:
  """The tasks of a split, drawn and stored on first use.

  Args:
    path: folder to keep the sets in; "" for the user's cache.
    split: "train" or "test".
    cfg: what to draw.

  Returns:
    The source.

  Raises:
    ValueError: if the split is empty or unknown.
  """
  size = {"train": cfg.train_size, "test": cfg.test_size}.get(split)
  if not size:
    raise ValueError(f"data.needle split must be 'train' or 'test' with a size above 0. Received: {split!r}, {size}")
  from virl_jax.tiny import store  # tensorflow-datasets takes seconds to import
  digest = hashlib.blake2b(repr((needle.VERSION, cfg)).encode(), digest_size=6).hexdigest()
  folder = pathlib.Path(path) if path else caches.folder()
  return Source(store.read(folder / f"needle-{digest}", split, cfg), split, digest)
