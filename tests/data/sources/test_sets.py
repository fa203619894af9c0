"""Finished sets: what is written is read back, by us and by tensorflow-datasets; the split is by image."""

import collections
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from virl_jax import types
from virl_jax.data.sources import records
from virl_jax.data.sources import set_files
from virl_jax.data.sources import sets


def a_task(number: int, image: str | bytes = "", **fields) -> types.Task:
  image = image or f"img/{number % 7}.jpg"
  boxes = (types.Box(1, 2.5, 3, 4), types.Box(0, 0, number + 1, 9))[:number % 3]
  made = types.Task(uid=f"t{number}", image=image, question=f"wie groß ist {number}?", answers=("a", "a", "b "),
                    boxes=boxes, options=("b", "a", "c") if number % 2 else None, kind="k", source="gqa", split="train",
                    licence="CC BY 4.0")
  made = dataclasses.replace(made, **fields)
  digest = records.provenance(digest_of(made), made.question, made.answers, made.options, made.boxes, made.match)
  return dataclasses.replace(made, provenance=digest)


def digest_of(task: types.Task) -> str:
  return records.digest(task.image if isinstance(task.image, bytes) else task.image.encode())


def write(folder, tasks, parts=3, name="gqa", root="", split="train"):
  folder.mkdir(parents=True, exist_ok=True)
  cut = [tasks[i::parts] for i in range(parts)]
  made = [set_files.write_part(folder / f"part-{i}", some, map(digest_of, some)) for i, some in enumerate(cut)]
  set_files.finish(folder, name, split, made, root, {"n": len(tasks)})
  return [task for some in cut for task in some]


def at(root, task):
  return dataclasses.replace(task, image=os.path.join(root, task.image)) if isinstance(task.image, str) else task


def test_a_set_is_read_back_lazily_and_in_order(tmp_path):
  (tmp_path / "raw").mkdir()
  tasks = write(tmp_path / "out", [a_task(i) for i in range(20)] + [a_task(20, b"bytes")], root=str(tmp_path / "raw"))
  source = sets.load(tmp_path / "out", "all", 0.2, 0)
  assert [source.task(i) for i in range(len(source))] == [at(tmp_path / "raw", task) for task in tasks]
  assert len(source.tasks) == 21 and source.tasks[-1] == source.task(20)
  assert source.tasks[1:3] == [source.task(1), source.task(2)] and source.about == [{"n": 21}]
  assert source.describe() == f"set {tmp_path / 'out'}: all split has 21 of 21 tasks, on 8 images"


def test_tensorflow_datasets_reads_it_as_its_own(tmp_path):
  """In its own process, because TensorFlow must not be imported with it."""
  tasks = write(tmp_path / "out", [a_task(i) for i in range(5)], root=str(tmp_path))
  code = f"""
import sys, tensorflow_datasets as tfds
source = tfds.builder_from_directory({str(tmp_path / 'out')!r}).as_data_source("train")
for row in source:
  answers = [text.decode() for text in row["answers"]]
  print(answers, row["boxes"].tolist(), row["question"].decode(), row["image_path"].decode())
assert "tensorflow" not in sys.modules
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.splitlines() == [
      f"{list(t.answers)} {[list(map(float, b)) for b in t.boxes]} {t.question} {t.image}" for t in tasks]


def test_the_same_tasks_give_the_same_bytes_and_another_folder_the_same_fingerprint(tmp_path):
  tasks = [a_task(i) for i in range(9)]
  for name in ("a", "b"):
    write(tmp_path / name, tasks, root=str(tmp_path))
  files = lambda name: {p.name: p.read_bytes() for p in (tmp_path / name).glob("*array_record*")}
  assert files("a") == files("b") and len(files("a")) == 3
  of = lambda name, split="all": sets.load(tmp_path / name, split, 0.3, 1).fingerprint()
  assert of("a") == of("b") == of("b", "test")
  write(tmp_path / "c", tasks[:-1], root=str(tmp_path))
  assert of("c") != of("a")


def test_sides_are_dealt_by_image(tmp_path):
  write(tmp_path / "s", [a_task(i, image=f"{i % 50}.jpg") for i in range(200)], root=str(tmp_path))
  train, test, whole = (sets.load(tmp_path / "s", split, 0.25, 3) for split in sets.SPLITS)
  images = [{task.image for task in source.tasks} for source in (train, test, whole)]
  assert not images[0] & images[1] and images[0] | images[1] == images[2] and len(images[2]) == 50
  assert len(train) + len(test) == len(whole) == 200 and abs(len(test) - 50) <= 4
  assert len(set(test.image_N.tolist())) == len(images[1])
  other = sets.load(tmp_path / "s", "test", 0.25, 4)
  assert {t.image for t in other.tasks} != images[1]
  # Each image is held out about as often as the fraction says.
  held = collections.Counter(t.image for seed in range(40) for t in sets.load(tmp_path / "s", "test", 0.25, seed).tasks)
  assert len(held) == 50 and max(held.values()) < 4 * 40 * 0.65


def test_a_folder_of_sets_is_read_one_after_the_other(tmp_path):
  for name, raw in (("b", "raw_b"), ("a", "raw_a")):
    (tmp_path / raw).mkdir()
    write(tmp_path / "all" / name, [a_task(i) for i in range(4)], root=str(tmp_path / raw))
  source = sets.load(tmp_path / "all", "all", 0.5, 0)
  assert [os.path.relpath(t.image, tmp_path).partition("/")[0] for t in source.tasks] == ["raw_a"] * 4 + ["raw_b"] * 4


def test_several_sets_are_read_as_one_whatever_their_order(tmp_path):
  """A picture that two of them have is on one side."""
  picture = lambda i: f"img/{i % 10}.jpg".encode()
  write(tmp_path / "x" / "gqa-train", [a_task(i, picture(i)) for i in range(20)])
  write(tmp_path / "x" / "b-train", [a_task(i, picture(i)) for i in range(20, 50)])
  write(tmp_path / "y" / "coco-train", [a_task(i, picture(i)) for i in range(50, 60)])
  path = f"{tmp_path / 'x'}, {tmp_path / 'y' / 'coco-train'}"
  source = sets.load(path, "all", 0.3, 0)
  assert source.names == ("b-train", "coco-train", "gqa-train")
  assert np.bincount(source.set_N).tolist() == [30, 10, 20]
  for i, task in enumerate(source.tasks):
    assert source.names[source.set_N[i]] == ("gqa-train" if int(task.uid[1:]) < 20 else
                                             "b-train" if int(task.uid[1:]) < 50 else "coco-train")
    assert bytes.fromhex(task.provenance).rstrip(b"\0") == source.provenance_N[i]
  other = sets.load(",".join(reversed(path.split(", "))), "all", 0.3, 0)
  assert other.tasks[:] == source.tasks[:] and other.fingerprint() == source.fingerprint()
  train, test = (sets.load(path, split, 0.3, 0) for split in ("train", "test"))
  assert not {t.image for t in train.tasks} & {t.image for t in test.tasks} and len(train) + len(test) == 60
  assert np.bincount(train.set_N).tolist() == [21, 7, 14]
  (tmp_path / "a,b").mkdir()
  write(tmp_path / "a,b" / "s", [a_task(i) for i in range(4)])
  assert len(sets.load(tmp_path / "a,b" / "s", "all", 0.3, 0)) == 4, "a comma may be part of a path"
  with pytest.raises(ValueError, match="folders of different names. Received twice: .*coco-train"):
    sets.load(f"{path},{tmp_path / 'y'}", "all", 0.3, 0)
  with pytest.raises(ValueError, match="a set must be finished.*none, which is no folder"):
    sets.load(f"{path},{tmp_path / 'none'}", "all", 0.3, 0)


def test_pass_rates_lie_beside_a_set_or_above_it(tmp_path):
  tasks = write(tmp_path / "x" / "gqa-train", [a_task(i, b"%d" % i) for i in range(4)])
  others = write(tmp_path / "y", [a_task(i, b"%d" % i) for i in range(4, 8)])
  line = lambda task, rate: json.dumps({"provenance": task.provenance, "uid": task.uid, "pass_with": rate}) + "\n"
  (tmp_path / "x" / "tasks.jsonl").write_text(line(tasks[0], 0.25) + line(tasks[1], None) + line(tasks[2], 1))
  key = lambda task: bytes.fromhex(task.provenance).rstrip(b"\0")
  want = {key(tasks[0]): 0.25, key(tasks[2]): 1.0}
  assert sets.pass_rates(tmp_path / "x") == sets.pass_rates(tmp_path / "x" / "gqa-train") == want
  assert sets.pass_rates(f"{tmp_path / 'x'},{tmp_path / 'y'}") == want
  (tmp_path / "y" / "tasks.jsonl").write_text(line(others[0], 0.5))
  assert sets.pass_rates(f"{tmp_path / 'x'},{tmp_path / 'y'}") == want | {key(others[0]): 0.5}
  for bad, said in ((line(others[0], 1.5), "line 1 .*no share"), (line(others[0], 0.5) + "{", "line 2"),
                    ('{"pass_with": 1}\n', "line 1 .*provenance"),
                    (line(others[0], None), "with none in .*tasks.jsonl"),
                    (line(others[0], "much"), "line 1"), (line(others[0], float("nan")), "no share")):
    (tmp_path / "y" / "tasks.jsonl").write_text(bad)
    with pytest.raises(ValueError, match=said):
      sets.pass_rates(tmp_path / "y")
  (tmp_path / "y" / "tasks.jsonl").unlink()
  with pytest.raises(ValueError, match="pass rates must lie in tasks.jsonl.*with no such file"):
    sets.pass_rates(tmp_path / "y")


def test_a_set_and_its_raw_folder_move_together(tmp_path):
  (tmp_path / "one" / "raw").mkdir(parents=True)
  write(tmp_path / "one" / "set", [a_task(i) for i in range(4)], root=str(tmp_path / "one" / "raw"))
  shutil.move(tmp_path / "one", tmp_path / "two")
  assert os.path.realpath(os.path.dirname(sets.load(tmp_path / "two" / "set", "all", 0.5, 0).task(0).image)
                          ) == str(tmp_path / "two" / "raw" / "img")
  shutil.rmtree(tmp_path / "two" / "raw")
  with pytest.raises(ValueError, match="the images of .*set lie in .*raw, which is no folder any more.*embed"):
    sets.load(tmp_path / "two" / "set", "all", 0.5, 0)


def test_a_set_that_is_half_replaced_is_none(tmp_path, monkeypatch):
  write(tmp_path / "s", [a_task(i) for i in range(6)])
  monkeypatch.setattr(np, "save", lambda *args: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    write(tmp_path / "s", [a_task(i) for i in range(6, 12)])
  with pytest.raises(ValueError, match="a set must be finished"):
    sets.load(tmp_path / "s", "all", 0.5, 0)


@pytest.mark.parametrize("damage, said", [
    (lambda f: (f / "dataset_info.json").unlink(), "a set must be finished: a folder with dataset_info.json"),
    (lambda f: (f / "index.npy").write_bytes(b"nonsense"), "a set must be finished, as `curate build` writes it"),
    (lambda f: next(f.glob("*-00001-of-*")).unlink(), "with all of its 3 array_record files. .* with 2"),
    (lambda f: shutil.rmtree(f), "which is no folder")])
def test_what_is_not_whole_is_refused(damage, said, tmp_path):
  write(tmp_path / "s", [a_task(i) for i in range(6)])
  damage(tmp_path / "s")
  with pytest.raises(ValueError, match=said):
    sets.load(tmp_path / "s", "all", 0.5, 0)


def test_bad_arguments_are_refused(tmp_path):
  write(tmp_path / "s", [a_task(0), a_task(7)])
  with pytest.raises(ValueError, match="split must be one of train, test, all. Received: 'val'"):
    sets.load(tmp_path / "s", "val", 0.5, 0)
  with pytest.raises(ValueError, match="eval_fraction must be between 0 and 1"):
    sets.load(tmp_path / "s", "all", 1.0, 0)
  with pytest.raises(ValueError, match="at least 2 images .* with 1"):
    sets.load(tmp_path / "s", "train", 0.5, 0)
