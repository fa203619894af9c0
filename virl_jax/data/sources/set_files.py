"""The files of a finished set, and how they are written: by `curate build`, and by curation.  `sets` reads them.

A set is a folder that tensorflow-datasets reads as one of its own, without TensorFlow:

    dataset_info.json, features.json        tensorflow-datasets' own; written last, so that a set is whole or no set
    NAME-SPLIT.array_record-00000-of-00004  the tasks, as `features` has them
    index.npy                               for each task, in order: its image and its provenance, as hashes
    set.json                                the raw folder that images are in, and what the writer adds about the set

An image is its encoded file, or a path relative to the raw folder.  Boxes are stored in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import json
import os
import pathlib

import numpy as np

from virl_jax import types

# The fields of `types.Task`, except boxes and the picture itself: `image` holds an encoded file or nothing,
# `image_path` a path or nothing.
TEXTS = ("uid", "question", "kind", "match", "source", "split", "licence", "provenance")
LISTS = ("answers", "options")
INDEX = np.dtype([("image", "<u8"), ("provenance", "S16")])
INFO, META, INDEX_FILE = "dataset_info.json", "set.json", "index.npy"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Part:
  """Some of a set's tasks, written; see `write_part`.

  Attributes:
    path: the array_record file.
    index_N: see `INDEX`.
  """

  path: str
  index_N: np.ndarray


def encode(task: types.Task) -> bytes:
  """A task as tensorflow-datasets stores it: a serialised tf.train.Example of `features()`.

  Raises:
    ValueError: its picture is a decoded one.
  """
  if not isinstance(task.image, (bytes, str)):
    raise ValueError(f"task {task.uid}: image must be an encoded file's bytes or a path to be stored. "
                     f"Received: {type(task.image).__name__}")
  example = _proto().Example()
  fields = example.features.feature
  for name in TEXTS:
    fields[name].bytes_list.value.append(getattr(task, name).encode())
  for name in LISTS:
    fields[name].bytes_list.value.extend([text.encode() for text in getattr(task, name) or ()])
  is_path = isinstance(task.image, str)
  fields["image"].bytes_list.value.append(b"" if is_path else task.image)
  fields["image_path"].bytes_list.value.append(os.fsencode(task.image) if is_path else b"")
  fields["boxes"].float_list.value.extend([side for box in task.boxes for side in box])
  return example.SerializeToString(deterministic=True)


def decode(data: bytes, root: str = "") -> types.Task:
  """The inverse of `encode`.

  Args:
    data: a serialised example.
    root: the folder that an image's path is relative to.
  """
  fields = _proto().Example.FromString(data).features.feature
  text = lambda name: fields[name].bytes_list.value[0]
  texts = lambda name: tuple(value.decode() for value in fields[name].bytes_list.value)
  sides = list(fields["boxes"].float_list.value)
  path = text("image_path")
  return types.Task(
      image=os.path.join(root, os.fsdecode(path)) if path else text("image"), answers=texts("answers"),
      options=texts("options") or None,
      boxes=tuple(types.Box(*sides[at:at + 4]) for at in range(0, len(sides), 4)),
      **{name: text(name).decode() for name in TEXTS})


def features():
  """The tensorflow-datasets feature spec of a task."""
  import tensorflow_datasets as tfds  # takes seconds
  text = tfds.features.Text()
  return tfds.features.FeaturesDict(
      {name: text for name in (*TEXTS, "image", "image_path")}
      | {name: tfds.features.Sequence(text) for name in LISTS}
      | {"boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.float32)})


def write_part(path: str | os.PathLike, tasks: Iterable[types.Task], image_digests: Iterable[str]) -> Part:
  """Writes a part of a set, whole or not at all; an existing file is replaced.

  Args:
    path: of the array_record file.
    tasks: the part's tasks, in the set's order.
    image_digests: of each task's image file; see `records.digest`.

  Returns:
    The part; the same tasks give the same bytes.
  """
  from array_record.python import array_record_module
  path = os.fspath(path)
  partial = f"{path}.{os.getpid()}.tmp"
  index = []
  writer = array_record_module.ArrayRecordWriter(partial, "group_size:1")
  try:
    for task, digest in zip(tasks, image_digests, strict=True):
      writer.write(encode(task))
      index.append((int(digest[:16] or "0", 16), bytes.fromhex(task.provenance)))
  except BaseException:
    writer.close()
    os.unlink(partial)
    raise
  writer.close()
  os.replace(partial, path)
  return Part(path, np.array(index, INDEX))


def finish(folder: str | os.PathLike, name: str, split: str, parts: Sequence[Part], root: str, about: dict) -> None:
  """Makes a set of its parts, which move into it; an existing set is replaced.  Can be repeated if it is interrupted.

  Args:
    folder: of the set.
    name: of the set, lower-case letters, digits and underscores, as tensorflow-datasets demands.
    split: the name of its only split.
    parts: those without tasks leave no file.
    root: the folder that images' paths are relative to; "" if there are no paths.
    about: kept in set.json; ready for JSON.

  Raises:
    ValueError: there is no task.
  """
  import tensorflow_datasets as tfds
  parts = [part for part in parts if len(part.index_N)]
  if not parts:
    raise ValueError(f"a set must have at least one task. Received: none for {folder}")
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / INFO).unlink(missing_ok=True)
  names = [f"{name}-{split}.array_record-{number:05d}-of-{len(parts):05d}" for number in range(len(parts))]
  for old in folder.glob("*.array_record-*-of-*"):
    if old.name not in names:
      old.unlink()
  for part, new in zip(parts, names):
    if os.path.exists(part.path):  # else an interrupted `finish` has moved it
      os.replace(part.path, folder / new)
  _replace(folder / INDEX_FILE, lambda file: np.save(file, np.concatenate([part.index_N for part in parts])))
  meta = {"format": FORMAT, "root": os.path.abspath(root) if root else "",
          "root_from_here": os.path.relpath(root, folder) if root else "", "about": about}
  _replace(folder / META, lambda file: file.write(json.dumps(meta, indent=1, ensure_ascii=False).encode() + b"\n"))
  infos = [tfds.core.SplitInfo(name=split, shard_lengths=[len(part.index_N) for part in parts],
                               num_bytes=sum((folder / new).stat().st_size for new in names))]
  tfds.folder_dataset.write_metadata(data_dir=folder, features=features(), split_infos=infos, version="1.0.0",
                                     check_data=False)


def _replace(path, write):
  """Writes a file whole or not at all."""
  partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  with open(partial, "wb") as file:
    write(file)
  os.replace(partial, path)


def _proto():
  from tensorflow_datasets.proto import tf_example_pb2
  return tf_example_pb2
