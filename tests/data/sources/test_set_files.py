"""The files of a finished set: tasks as they were, in a spec of tensorflow-datasets; and finishing again."""

import dataclasses
import os

import numpy as np
import pytest

from tests.data.sources.test_sets import a_task
from tests.data.sources.test_sets import digest_of
from virl_jax import types
from virl_jax.data.sources import set_files
from virl_jax.data.sources import sets


def test_a_task_comes_back_as_it_was():
  for task in (a_task(1), a_task(2), a_task(0, boxes=(), answers=()), a_task(5, image=b"\xff\xd8\x00jpeg")):
    assert set_files.decode(set_files.encode(task), "") == task
  assert set_files.decode(set_files.encode(a_task(3)), "/raw").image == "/raw/img/3.jpg"
  with pytest.raises(ValueError, match="t3: image must be an encoded file.*Received: ndarray"):
    set_files.encode(dataclasses.replace(a_task(3), image=np.zeros((2, 2))))


def test_what_is_stored_is_the_spec(tmp_path):
  task = a_task(5)
  got = set_files.features().deserialize_example_np(set_files.encode(task))
  assert set_files.features().serialize_example(set_files.features().encode_example(got))  # TFDS knows each field
  assert set(got) == {*set_files.TEXTS, *set_files.LISTS, "image", "image_path", "boxes"}
  assert {f.name for f in dataclasses.fields(types.Task)} <= set(got)


def test_an_end_that_was_cut_off_is_repeated(tmp_path):
  folder = tmp_path / "s"
  folder.mkdir()
  parts = [set_files.write_part(folder / f"p{i}", [a_task(i)], [digest_of(a_task(i))]) for i in range(3)]
  os.replace(folder / "p0", folder / "gqa-train.array_record-00000-of-00003")  # as far as an interrupted end got
  (folder / "gqa-train.array_record-00000-of-00007").write_bytes(b"of an earlier build")
  for _ in range(2):
    set_files.finish(folder, "gqa", "train", parts, "", {})
  assert [t.uid for t in sets.load(folder, "all", 0.5, 0).tasks] == ["t0", "t1", "t2"]


def test_a_set_of_nothing_is_none(tmp_path):
  with pytest.raises(ValueError, match="at least one task"):
    set_files.finish(tmp_path / "none", "gqa", "train", [], "", {})
