"""Real records in their publishers' own formats: each loader gives the counts that other code took from the files;
expected.json beside them holds these."""

import collections
import json
import pathlib

import pytest

from virl_jax.data.sources import records
from virl_jax.data.sources import table
from virl_jax.data.sources import visual_cot

ROOT = pathlib.Path(__file__).parents[3].parent / "shared" / "realdata"
NATIVE = ROOT / "native"
pytestmark = pytest.mark.skipif(not NATIVE.exists(), reason="the native samples (shared/realdata/native) are not here")


@pytest.fixture(scope="module")
def expected():
  return json.loads((NATIVE / "expected.json").read_text())


def read(source, folder, split, **more):
  """The raw records, none of which is a reject; and their counts, if pictures have the sizes that they state."""
  raws = list(table.SOURCES[source].read(str(NATIVE / folder), split, **more))
  assert not [r for r in raws if isinstance(r, records.Reject)]
  counts = records.Counts()
  for raw in raws:
    counts.add(*records.settle(raw, records.Picture(raw.size_px or (10 ** 6, 10 ** 6))), raw.notes)
  assert not counts.rejects and len({raw.uid for raw in raws}) == len(raws)
  return raws, counts


def boxes(counts, kind=None):
  got = counts.boxes if kind is None else counts.kinds[kind]
  return {"boxes": sum(got[name] for name in ("ok", "clipped", "unusable")), "ok": got["ok"], "clip": got["clipped"],
          "unusable": got["unusable"], "usable": got["ok"] + got["clipped"]}


def of(want, *names):
  return {name: want[name] for name in names}


BOXES = ("boxes", "ok", "clip", "unusable", "usable")


@pytest.mark.parametrize("split", ["train", "val"])
def test_gqa(split, expected):
  want = expected["gqa"][split]
  raws, counts = read("gqa", "gqa", split)
  for part in ("answer", "question", "fullAnswer"):
    assert counts.notes[f"{part} objects found"] == want[f"{part}_boxes_resolved"], part
  assert len(raws) == want["questions"] and counts.notes["objects of several words"] == want["multi_token_keys"]
  named = lambda part: sum(
      any(name.startswith(f"{part} objects") for name in raw.notes) for raw in raws)
  assert named("answer") == want["with_answer_object"] and named("question") == want["with_question_object"]
  assert not counts.notes["annotations beyond the words"]  # ranges end before their last number
  present = {raw.image for raw in raws if (NATIVE / "gqa" / raw.image).is_file()}
  assert sum(raw.image in present for raw in raws) == want["images_present"]
  assert sum(len(raw.answers) for raw in raws) == len(raws)
  assert all(raw.uid.startswith("0") for raw in raws)  # ids are text, and keep their zeros


def test_gqa_s_scene_graphs(expected):
  want = expected["gqa"]["train"]
  from virl_jax.data.sources import gqa
  graphs = gqa._boxes_by_image(str(NATIVE / "gqa" / "train_sceneGraphs.json"))
  found = collections.Counter()
  for size, packed in graphs.values():
    _, outcomes = records.repair(json.loads(packed).values(), records.XYWH, size, size)
    found.update(outcomes)
  assert len(graphs) == want["scene_graphs"] and sum(found.values()) == want["scene_graph_objects"]
  names = want["scene_graph_boxes"]
  assert (found["ok"], found["clipped"], found["unusable"]) == (names["ok"], names["clip"], names["unusable"])


def test_textvqa(expected):
  want = expected["textvqa"]["0.5.1"]
  raws, _ = read("textvqa", "textvqa", "val")
  assert (len(raws), len({raw.image for raw in raws})) == (want["records"], want["images"])
  assert sum(len(raw.answers) for raw in raws) == want["answers"]
  assert sum(len(raw.answers) == 10 for raw in raws) == want["records_with_10_answers"]
  assert all(raw.uid.isdigit() for raw in raws) == want["question_ids_int"]
  assert all(answer == answer.strip() for raw in raws for answer in raw.answers)  # they carry trailing blanks
  assert all(raw.size_px for raw in raws)


def test_textvqa_of_the_first_release(expected, tmp_path):
  want = expected["textvqa"]["v0.1"]
  (tmp_path / "TextVQA_with_url_val_v0.1.json").symlink_to(NATIVE / "textvqa" / "TextVQA_with_url_val_v0.1.json")
  raws, _ = read("textvqa", tmp_path, "val")
  assert (len(raws), len({raw.image for raw in raws})) == (want["records"], want["images"])
  assert sum(len(raw.answers) for raw in raws) == want["answers"]
  assert {str(n): c for n, c in collections.Counter(len(r.answers) for r in raws).items()} == want["answer_counts"]


def test_docvqa(expected):
  want = expected["docvqa"]
  raws, _ = read("docvqa", "docvqa", "val")
  there = lambda raw: (NATIVE / "docvqa" / raw.image).is_file()
  assert len(raws) == want["records"] and len({raw.image for raw in raws}) == want["images_named"]
  assert sum(map(there, raws)) == want["records_with_image"]
  assert sum(len(raw.answers) for raw in raws) == want["answers"]  # spellings that differ in case are kept


def test_infographicsvqa(expected):
  want = expected["infographicsvqa"]["annotation"]
  raws, _ = read("infographicsvqa", "infographicsvqa", "val")
  assert len(raws) == want["records"] and sum(len(raw.answers) for raw in raws) == want["answers"]


def test_visual_cot_s_metadata(expected):
  raws, counts = read("visual_cot", "visual_cot", "train")
  names = [name for name in expected["visual_cot"] if name.endswith(".jsonl")]
  assert sorted(f"{kind}_cot_train.jsonl" for kind in counts.kinds) == sorted(names)
  for name in names:
    want, kind = expected["visual_cot"][name], name.partition("_cot_")[0]
    own = [raw for raw in raws if raw.kind == kind]
    assert (len(own), sum(len(raw.answers) for raw in own)) == (want["records"], want["answers"])
    assert boxes(counts, kind) == of(want, *BOXES), name
    kept = [records.settle(raw, records.Picture(raw.size_px))[0].boxes for raw in own]
    assert sum(map(bool, kept)) == want["records_with_a_usable_box"]


def test_visual_cot_s_benchmark(expected):
  raws, counts = read("visual_cot", "visual_cot", "val")
  names = [name for name in expected["visual_cot"] if name.startswith("benchmark/")]
  assert sorted(f"benchmark/{kind}" for kind in counts.kinds) == sorted(names)
  for name in names:
    want, kind = expected["visual_cot"][name], name.partition("/")[2]
    own = [raw for raw in raws if raw.kind == kind]
    assert (len(own), sum(len(raw.answers) for raw in own)) == (want["records"], want["answers"])
    assert boxes(counts, kind) == of(want, *BOXES), name
    assert {raw.image.split("/")[2] for raw in own} == set(want["image_dir"])
    assert sum("boxes from benchmark_det" in raw.notes for raw in own) == want["det_bbox_truncates_to_item_box"]
    assert not any("Please provide" in raw.question or "<image>" in raw.question for raw in own)
  whole = sum(side != int(side) for raw in raws if raw.kind == "vsr" for box in raw.boxes for side in box)
  assert whole  # the floats, not the whole numbers that the items have


def test_grit(expected):
  want = expected["grit"]
  raws, counts = read("grit", "grit", "train")
  assert boxes(counts) == of(want, *BOXES)
  assert collections.Counter(raw.kind for raw in raws) == {
      "grit_noun_chunks": want["noun_chunks"], "grit_ref_exps": want["ref_exps"]}
  row = json.loads((NATIVE / "grit" / "grit_coyo.jsonl").read_text())
  size = row["width"], row["height"]
  got = []
  for raw in raws:
    task, _ = records.settle(raw, records.Picture(size))
    phrase = raw.question.partition(": ")[2].removesuffix("?")
    got += [[phrase, [round(side, 2) for side in box], raw.kind.removeprefix("grit_")] for box in task.boxes]
  assert got == want["phrases_and_pixel_boxes"]


@pytest.mark.parametrize("name, records_", [("grit_coyo.jsonl", None), ("other_grit_docstring.jsonl", "other_grit")])
def test_grit_s_lines(name, records_, expected, tmp_path):
  (tmp_path / name).symlink_to(NATIVE / "grit" / name)
  _, counts = read("grit", tmp_path, "train")
  want = expected["grit"][records_] if records_ else expected["grit"]
  assert boxes(counts) == of(want, *BOXES)


def test_boxes_are_joined_by_image_and_question():
  raws, counts = read("docvqa", "docvqa", "val", boxes_from=str(NATIVE / "visual_cot"))
  there = visual_cot.boxes_by_question(str(NATIVE / "visual_cot"), "docvqa")
  joined = [raw for raw in raws if raw.boxes]
  assert joined and counts.notes["joined with Visual-CoT"] == len(joined)
  assert counts.notes["not in Visual-CoT"] == len(raws) - len(joined)
  for raw in joined:
    assert there[visual_cot.join_key(raw.image, raw.question)][0] == raw.boxes


@pytest.mark.parametrize("source, folder, split", [
    ("visual_cot", "visual_cot", "train"), ("docvqa", "docvqa", "val"), ("gqa", "gqa", "train")])
def test_each_says_what_it_is_of(source, folder, split):
  raws, _ = read(source, folder, split)
  assert {(raw.source, raw.split, raw.licence) for raw in raws} == {(source, split, table.SOURCES[source].LICENCE)}


def test_records_of_ones_own():
  path = ROOT / "records.jsonl"
  raws = list(table.SOURCES["jsonl"].read(str(path), "train"))
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [raw.uid for raw in raws] == [str(line["id"]) for line in lines]
  assert [list(map(list, raw.boxes)) for raw in raws] == [line["boxes"] for line in lines]
  assert all((ROOT / raw.image).is_file() for raw in raws)
