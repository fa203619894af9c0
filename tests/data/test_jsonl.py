"""Records files, good and bad, the split by image, and the real images beside the repository."""

import json
import os
import pathlib

import PIL.ExifTags
import PIL.Image
import pytest

from virl_jax import types
from virl_jax.data import images
from virl_jax.data.sources import jsonl

REAL = pathlib.Path(__file__).parents[2].parent / "shared" / "realdata"
GOOD = {"image": "a.png", "question": "What?", "answers": ["cat"], "boxes": [[1, 2, 11, 12]]}


def write_image(path, size=(40, 30), **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.Image.new("RGB", size, "red").save(path, **options)


def write_records(folder, records):
  path = folder / "records.jsonl"
  lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
  path.write_bytes(b"\n".join(lines))
  return str(path)


def read(folder, *records):
  if not (folder / "a.png").exists():
    write_image(folder / "a.png")
  return jsonl.load(write_records(folder, records), "all", 0.2, 0)


@pytest.fixture
def many(tmp_path):
  """30 images with 1, 2 or 3 records each."""
  records = []
  for i in range(30):
    write_image(tmp_path / f"images/{i}.png")
    records += [{**GOOD, "id": f"{i}_{k}", "image": f"images/{i}.png"} for k in range(1 + i % 3)]
  return write_records(tmp_path, records)


def test_a_record_becomes_a_task(tmp_path):
  source = read(tmp_path, {**GOOD, "id": "x", "options": ["cat", "dog"], "task": "pets", "extra": {}}, GOOD)
  assert len(source) == 2
  assert source.task(0) == types.Task(
      uid="x", image=str(tmp_path / "a.png"), question="What?", answers=("cat",),
      boxes=(types.Box(1.0, 2.0, 11.0, 12.0),), options=("cat", "dog"), kind="pets")
  assert (source.task(1).uid, source.task(1).kind, source.task(1).options) == ("line 2", "jsonl", None)
  assert source.describe() == (f"jsonl {tmp_path}/records.jsonl: all split has 2 of 2 records, on 1 images; "
                               "skipped none")


def test_unusual_but_usable_records(tmp_path):
  write_image(tmp_path / "elsewhere" / "b.png")
  source = read(
      tmp_path,
      b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"", b"  \r",
      {**GOOD, "image": str(tmp_path / "elsewhere" / "b.png"), "id": 0},
      {**GOOD, "answers": [], "options": []},
      {**GOOD, "boxes": []}, {**GOOD, "boxes": None}, {k: v for k, v in GOOD.items() if k != "boxes"},
      {**GOOD, "answers": ["B", "cow"], "options": ["dog", "cat"], "id": None, "task": None})
  assert not source.skipped
  assert [task.uid for task in source.tasks] == ["line 1", "0", *(f"line {n}" for n in range(5, 10))]
  assert source.task(1).image == str(tmp_path / "elsewhere" / "b.png")
  assert source.task(2).answers == () and source.task(2).options is None
  assert source.task(3).boxes == source.task(4).boxes == source.task(5).boxes == ()
  assert source.task(6).answers == ("B", "cow") and source.task(6).kind == "jsonl"


def test_several_files_are_read_as_one(tmp_path):
  """Whatever their order; a picture that two have is on one side, and all uids differ."""
  paths = []
  for name, numbers in (("b", range(20)), ("a", range(10, 20))):
    for i in numbers:
      write_image(tmp_path / "img" / f"{i}.png")
    (tmp_path / name).mkdir()
    records = [{**GOOD, "image": f"../img/{i}.png"} for i in numbers] + [{"image": "x"}]
    paths.append(pathlib.Path(write_records(tmp_path / name, records)).rename(tmp_path / name / f"{name}.jsonl"))
  of = lambda split="all", order=1: jsonl.load(",".join(map(str, paths[::order])), split, 0.3, 0)
  source = of()
  assert source.names == ("a", "b") and source.set_N.tolist() == [0] * 10 + [1] * 20
  assert source.tasks == of(order=-1).tasks and source.fingerprint() == of(order=-1).fingerprint()
  assert source.fingerprint() not in {jsonl.load(str(path), "all", 0.3, 0).fingerprint() for path in paths}
  assert len({task.uid for task in source.tasks}) == 30 and source.skipped == {"no question": 2}
  assert source.rejects == (("a line 11", "no question"), ("b line 21", "no question"))
  train, test = of("train"), of("test")
  assert len(train) + len(test) == 30 and not {t.image for t in train.tasks} & {t.image for t in test.tasks}
  for side in (train, test):
    assert [source.set_N[source.tasks.index(t)] for t in side.tasks] == side.set_N.tolist()
  assert jsonl.load(str(paths[0]), "test", 0.3, 0).rejects == ((21, "no question"),)
  with pytest.raises(ValueError, match="must have different names"):
    jsonl.load(f"{paths[0]},{paths[0]}", "all", 0.3, 0)
  with pytest.raises(ValueError, match="must be a readable file.*none"):
    jsonl.load(f"{paths[0]},{tmp_path / 'none'}", "all", 0.3, 0)


def test_uids_are_unique(tmp_path):
  source = read(tmp_path, *({**GOOD, "id": uid} for uid in ("x", "x", "line 4", "x (line 2)")), GOOD)
  assert len({task.uid for task in source.tasks}) == 5


@pytest.mark.parametrize("record, reason", [
    (b"{", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[" * 100_000, "not JSON"),
    (b"[1]", "not a JSON object"),
    *(({k: v for k, v in GOOD.items() if k != field}, f"no {field}") for field in ("image", "question", "answers")),
    *(({**GOOD, field: None}, f"bad {field}") for field in ("image", "question", "answers")),
    ({**GOOD, "boxes": "1, 2, 3, 4"}, "bad boxes"), ({**GOOD, "boxes": {}}, "bad boxes"),
    ({**GOOD, "question": "\ud800"}, "bad question"), ({**GOOD, "question": " "}, "bad question"),
    ({**GOOD, "answers": "cat"}, "bad answers"), ({**GOOD, "answers": [3]}, "bad answers"),
    ({**GOOD, "options": "AB"}, "bad options"), ({**GOOD, "task": 3}, "bad task"),
    ({**GOOD, "id": []}, "bad id"),
    ({**GOOD, "answers": [], "boxes": []}, "neither answers nor boxes"),
    ({**GOOD, "answers": [], "boxes": None}, "neither answers nor boxes"),
    ({"image": "a.png", "question": "What?", "answers": []}, "neither answers nor boxes"),
    ({**GOOD, "options": ["cat", *(f"{i} dogs" for i in range(26))]}, "more than 26 options"),
    ({**GOOD, "options": ["dog", "cow"]}, "no answer among the options"),
    ({**GOOD, "options": ["Cat.", "CAT"]}, "no answer among the options"),
    ({**GOOD, "answers": ["C", "3"], "options": ["dog", "cow"]}, "no answer among the options"),
    ({**GOOD, "image": "b.png"}, "no image file"), ({**GOOD, "image": "."}, "no image file"),
    ({**GOOD, "image": "x" * 5000}, "no image file"), ({**GOOD, "image": "a\0.png"}, "bad image"),
    ({**GOOD, "image": "records.jsonl"}, "no readable image"),
    ({**GOOD, "image": "cut.png"}, "no readable image"),
    ({**GOOD, "image": "bomb.gif"}, "image too large"),
    ({**GOOD, "boxes": [[1, 2, 3]]}, "box is not 4 finite numbers"),
    ({**GOOD, "boxes": [1, 2, 3, 4]}, "box is not 4 finite numbers"),
    ({**GOOD, "boxes": [[1, 2, "3", 4]]}, "box is not 4 finite numbers"),
    ({**GOOD, "boxes": [[False, 2, 3, 4]]}, "box is not 4 finite numbers"),
    ({**GOOD, "boxes": [[1, 2, float("nan"), 4]]}, "box is not 4 finite numbers"),
    ({**GOOD, "boxes": [[1, 2, float("inf"), 4]]}, "box is not 4 finite numbers"),
    ({**GOOD, "boxes": [[1, 2, 10**400, 4]]}, "box is not 4 finite numbers"),
    ({**GOOD, "boxes": [[5, 2, 3, 4]]}, "box is empty or reversed"),
    ({**GOOD, "boxes": [[3, 2, 3, 4]]}, "box is empty or reversed"),
    ({**GOOD, "boxes": [[40, 2, 50, 4]]}, "box is outside the image"),
    ({**GOOD, "boxes": [[-9, -9, 5, 0]]}, "box is outside the image"),
    ({**GOOD, "boxes": [[1, 2, 11, 12], [5, 2, 3, 4]]}, "box is empty or reversed")])
def test_bad_records_are_skipped_and_counted(tmp_path, record, reason):
  write_image(tmp_path / "a.png")
  (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:20])
  write_image(tmp_path / "bomb.gif")
  claimed = bytearray((tmp_path / "bomb.gif").read_bytes())
  claimed[6:10] = b"\xff" * 4  # width and height
  (tmp_path / "bomb.gif").write_bytes(claimed)
  source = read(tmp_path, GOOD, record, GOOD, record)
  assert source.skipped == {reason: 2}
  assert len(source) == 2
  assert f"skipped 2 (2 {reason})" in source.describe()


def test_boxes_are_clipped_to_the_image_whatever_the_record_says(tmp_path):
  boxes = [[-5, 10.5, 1e9, 99], [0, 0, 40, 30]]
  source = read(tmp_path, {**GOOD, "boxes": boxes, "width": 4000, "height": 3000})
  assert source.task(0).boxes == ((0.0, 10.5, 40.0, 30.0), (0.0, 0.0, 40.0, 30.0))
  assert source.describe().endswith("; 1 state another size than their image")
  for stated, other in (((40, 30), 0), (("40", "30"), 0), ((" 40.0", 30.0), 0), ((None, "30"), 0), (("41", "30"), 1),
                        (("wide", 30), 1), (([40], 30), 1)):
    assert read(tmp_path, {**GOOD, **dict(zip(("width", "height"), stated))}).n_other_size == other, stated


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_the_frame_is_the_upright_image(tmp_path, suffix):
  exif = PIL.Image.Exif()
  exif[PIL.ExifTags.Base.Orientation] = 6  # shown 200 x 400
  write_image(tmp_path / f"b.{suffix}", (400, 200), exif=exif)
  boxes = [[0, 200, 200, 400], [0, 0, 999, 999]]
  source = read(tmp_path, {**GOOD, "image": f"b.{suffix}", "boxes": boxes, "width": 200, "height": 400})
  assert source.task(0).boxes == ((0.0, 200.0, 200.0, 400.0), (0.0, 0.0, 200.0, 400.0))
  assert source.n_other_size == 0
  assert images.decode(source.task(0).image).size == (200, 400)


def test_the_split_is_by_image_and_complete(many):
  train, test = (jsonl.load(many, split, 0.25, 0) for split in ("train", "test"))
  assert {task.image for task in train.tasks}.isdisjoint(task.image for task in test.tasks)
  uids = [task.uid for source in (train, test) for task in source.tasks]
  assert sorted(uids) == sorted(task.uid for task in jsonl.load(many, "all", 0.25, 0).tasks)
  assert train.n_images + test.n_images == 30
  assert train.n_records == test.n_records == 60


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.9, 0.999])
def test_the_fraction_of_records_is_met_and_no_side_is_empty(many, fraction):
  sizes = [len(jsonl.load(many, split, fraction, seed=1)) for split in ("train", "test")]
  assert min(sizes) > 0
  assert abs(sizes[1] - 60 * fraction) <= 3  # no image has more than three


def test_one_image_spelt_in_two_ways_stays_on_one_side(tmp_path):
  write_image(tmp_path / "a.png")
  (tmp_path / "link.png").symlink_to("a.png")
  spellings = ("a.png", "./a.png", str(tmp_path / "a.png"), "link.png")
  path = write_records(tmp_path, [{**GOOD, "image": image} for image in spellings])
  assert jsonl.load(path, "all", 0.5, 0).n_images == 1
  with pytest.raises(ValueError, match="at least 2 images"):
    jsonl.load(path, "test", 0.5, 0)


def test_the_split_hangs_on_the_seed_and_not_on_place_or_order(many, tmp_path):
  held = {task.uid for task in jsonl.load(many, "test", 0.25, 0).tasks}
  assert held != {task.uid for task in jsonl.load(many, "test", 0.25, 1).tasks}
  lines = pathlib.Path(many).read_bytes().split(b"\n")
  write_records(tmp_path, lines[::-1])
  assert held == {task.uid for task in jsonl.load(many, "test", 0.25, 0).tasks}
  moved = tmp_path.rename(tmp_path.with_name("moved"))
  assert held == {task.uid for task in jsonl.load(str(moved / "records.jsonl"), "test", 0.25, 0).tasks}


def test_bad_arguments_are_named(tmp_path):
  with pytest.raises(ValueError, match="path must be a readable file.*nowhere.jsonl"):
    jsonl.load(str(tmp_path / "nowhere.jsonl"), "train", 0.2, 0)
  with pytest.raises(ValueError, match="path must be a readable file"):
    jsonl.load(str(tmp_path), "train", 0.2, 0)
  with pytest.raises(ValueError, match=r"records.jsonl, with 3 \(1 bad question, 2 not JSON\)"):
    read(tmp_path, b"{", {**GOOD, "question": 3}, b"}")
  with pytest.raises(ValueError, match="no record at all"):
    read(tmp_path)
  path = write_records(tmp_path, [GOOD])
  with pytest.raises(ValueError, match="split must be one of train, test, all. Received: 'val'"):
    jsonl.load(path, "val", 0.2, 0)
  for fraction in (0.0, 1.0, float("nan")):
    with pytest.raises(ValueError, match="eval_fraction must be between 0 and 1"):
      jsonl.load(path, "train", fraction, 0)


def test_relative_paths_work_from_the_file_s_own_folder(tmp_path, monkeypatch):
  write_image(tmp_path / "a.png")
  write_records(tmp_path, [GOOD])
  monkeypatch.chdir(tmp_path)
  assert os.path.isabs(jsonl.load("records.jsonl", "all", 0.2, 0).task(0).image)


@pytest.mark.skipif(not (REAL / "records.jsonl").exists(), reason=f"no real images at {REAL}")
def test_real_records():
  path = str(REAL / "records.jsonl")
  train, test, every = (jsonl.load(path, split, 0.2, 0) for split in ("train", "test", "all"))
  assert len(every) == 94 and every.n_images == 67
  assert not every.skipped and every.n_other_size == 0
  assert len(train) + len(test) == 94 and abs(len(test) - 0.2 * 94) <= 3
  assert sum(not task.answers for task in every.tasks) == 5
  assert all(task.boxes for task in every.tasks)
  assert len({task.kind for task in every.tasks}) == 5
