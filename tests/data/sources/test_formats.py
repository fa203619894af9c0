"""Small samples of every publisher's format, made here: all their fields, and the traps in real files."""

import collections
import json

import pytest

from virl_jax.data.sources import gqa
from virl_jax.data.sources import records
from virl_jax.data.sources import table
from virl_jax.data.sources import visual_cot


def put(root, name, value):
  path = root / name
  path.parent.mkdir(parents=True, exist_ok=True)
  if name.endswith(".jsonl"):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in value), "utf-8")
  elif name.endswith(".json"):
    path.write_text(json.dumps(value), "utf-8")
  else:
    path.write_bytes(value)
  return path


def put_rows(root, name, rows):
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet as pq
  (root / name).parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.Table.from_pylist(rows), root / name)


def read(source, root, split="train", **more):
  return list(table.SOURCES[source].read(str(root), split, **more))


def reasons(got):
  return [r.reason for r in got if isinstance(r, records.Reject)]


def one(got):
  raw, = got
  assert isinstance(raw, records.Raw), raw
  return raw


def settled(raw, size):
  return records.settle(raw, records.Picture(size))[0]


# GQA

GRAPH = {"7": {"width": 100, "height": 50, "location": "field", "objects": {
    "11": {"name": "camera", "x": 10, "y": 5, "w": 20, "h": 10, "attributes": [], "relations": []},
    "12": {"h": 30, "w": 60, "y": -2, "x": 50, "name": "light", "relations": [], "attributes": []}}}}


def question(**fields):
  return {"semantic": [{"operation": "select", "dependencies": [], "argument": "light (12) "}], "entailed": [],
          "equivalent": [], "question": "What is the device on the traffic signal?", "imageId": "7", "isBalanced": True,
          "groups": {"global": None, "local": ""}, "answer": "camera", "semanticStr": "select: light (12) ->query",
          "types": {"detailed": "d", "semantic": "rel", "structural": "query"}, "fullAnswer": "The device is a camera.",
          "annotations": {"answer": {"0": "11"}, "question": {"6:8": "12"}, "fullAnswer": {"4": "11", "1": "12"}},
          **fields}


def gqa_folder(root, questions, graph=GRAPH, split="train"):
  put(root, f"{split}_balanced_questions.json", questions)
  if graph:
    put(root, f"sceneGraphs/{split}_sceneGraphs.json", graph)
  return root


def test_gqa_takes_the_answer_s_objects_first(tmp_path):
  yes = {"answer": {}, "question": {"6:8": "12"}, "fullAnswer": {"1": "12", "4": "11"}}
  got = read("gqa", gqa_folder(tmp_path, {"00123": question(), "00124": question(answer="yes", annotations=yes)}))
  assert [raw.uid for raw in got] == ["00123", "00124"] and [raw.kind for raw in got] == ["gqa_query"] * 2
  assert got[0].boxes == ((10, 5, 20, 10),) and got[0].notes["rationales from the answer"] == 1
  assert set(got[1].boxes) == {(10, 5, 20, 10), (50, -2, 60, 30)} and len(got[1].boxes) == 2  # each object once
  assert got[1].notes == {"question objects found": 1, "fullAnswer objects found": 2, "objects of several words": 1,
                          "rationales from the question": 1}
  assert settled(got[1], (100, 50)).boxes == ((50, 0, 100, 28), (10, 5, 30, 15))
  assert got[0].image == "images/7.jpg" and got[0].size_px == (100, 50)


def test_gqa_s_annotations_may_name_what_is_not_there(tmp_path):
  odd = {"answer": {"0": "99"}, "question": {"6:9": "12 ", "x": "11", "3:3": "-"}, "fullAnswer": None}
  raw = one(read("gqa", gqa_folder(tmp_path, {"1": question(annotations=odd)})))
  assert raw.boxes == ((50, -2, 60, 30), (10, 5, 20, 10))
  assert raw.notes == {"answer objects not in a scene graph": 1, "question objects found": 2,
                       "question objects not in a scene graph": 1, "objects of several words": 1,
                       "annotations beyond the words": 1, "annotations of no word": 2,
                       "rationales from the question": 1}


@pytest.mark.parametrize("key, words", [("4", (4, 5)), ("6:8", (6, 8)), ("0", (0, 1))])
def test_gqa_s_ranges_end_before_their_last_number(key, words):
  assert gqa.span(key) == words


@pytest.mark.parametrize("key", ["8:6", "3:3", "x", "-1", ""])
def test_gqa_s_other_keys_mean_nothing(key):
  with pytest.raises(ValueError):
    gqa.span(key)


def test_gqa_s_questions_in_several_files_and_without_graphs(tmp_path):
  for i in range(3):
    put(tmp_path, f"questions1.2/train_all_questions/train_all_questions_{i}.json", {f"{i}0": question()})
  got = read("gqa", tmp_path)
  assert [raw.uid for raw in got] == ["00", "10", "20"] and not any(raw.boxes for raw in got)
  assert all(raw.notes["images without a scene graph"] == 1 for raw in got)
  put(tmp_path, "testdev_balanced_questions.json", {"201307251": question(imageId="n411121")})
  assert one(read("gqa", tmp_path, "testdev")).image == "images/n411121.jpg"


# Visual-CoT

def cot_line(**fields):
  return {"question": "What is across from the truck?", "answer": "tv", "image": "1.jpg", "width": 640, "height": 354,
          "bboxs": [[343.87, 94.03, 396.81, 126.06]], "dataset": "vsr", "split": "train", **fields}


def cot_item(dataset="vsr", number=3, box="[343, 94, 396, 126]", **fields):
  path = f"cot/{'textvqa' if dataset == 'textcap' else dataset}/1.jpg"
  return {"dataset": dataset, "split": "train", "question_id": number, "image": [path, f"{path}###{box}"],
          "conversations": [
              {"from": "human", "value": "<image>\nWhat is across from the truck? Please provide the bounding box "
                                         "coordinate of the region that can help you answer the question better."},
              {"from": "gpt", "value": "[0.5, 0.1, 0.6, 0.2]"}, {"from": "human", "value": "<image>"},
              {"from": "gpt", "value": "tv"}], **fields}


def test_visual_cot_s_lines(tmp_path):
  put(tmp_path, "metadata/vsr_cot_train.jsonl", [
      cot_line(), cot_line(bboxs=[[1, 1, 5, 5], [2, 2, 6, 6]], possible_answers=["tv", "television"]),
      cot_line(split="val"), "nonsense", cot_line(answer=3, dataset="v7w"), cot_line(bboxs="none"),
      cot_line(dataset="textcap")])
  got = read("visual_cot", tmp_path)
  assert got[0] == records.Raw(
      "vsr_cot_train.jsonl:1", "images/cot/vsr/1.jpg", "What is across from the truck?", ("tv",),
      ((343.87, 94.03, 396.81, 126.06),), kind="vsr", source="visual_cot", split="train", size_px=(640, 354))
  assert (got[1].answers, len(got[1].boxes)) == (("tv", "television"), 2)
  assert (got[4].answers, got[4].kind, got[4].image) == (("3",), "visual7w", "images/cot/v7w/1.jpg")
  assert (got[6].kind, got[6].image) == ("textcap", "images/cot/textvqa/1.jpg")
  assert reasons(got) == ["another split", "broken line", "bad boxes"]


def test_visual_cot_s_items(tmp_path):
  put(tmp_path, "viscot_363k.json", [cot_item(), cot_item("textcap", 4), cot_item("v7w", 5), cot_item(image=["a", "b"]),
                                     cot_item(conversations=[]), cot_item(box="[1, 2")])
  (tmp_path / "cot").mkdir()
  got = read("visual_cot", tmp_path)
  assert got[0] == records.Raw("vsr/3", "cot/vsr/1.jpg", "What is across from the truck?", ("tv",),
                               ((343, 94, 396, 126),), kind="vsr", source="visual_cot", split="train")
  assert [(r.kind, r.image) for r in got[1:3]] == [("textcap", "cot/textvqa/1.jpg"), ("visual7w", "cot/v7w/1.jpg")]
  assert reasons(got) == ["no box in the item", "fields are missing", "fields are missing"]


def test_visual_cot_prefers_floats(tmp_path):
  """For a set in both layouts, the metadata is read; for an item in benchmark_det, that box, if it is the same one."""
  put(tmp_path, "viscot_363k.json", [cot_item(), cot_item("cub", 9)])
  put(tmp_path, "metadata/vsr_cot_train.jsonl", [cot_line()])
  assert [(raw.kind, raw.boxes[0][0]) for raw in read("visual_cot", tmp_path)] == [("vsr", 343.87), ("cub", 343)]
  put(tmp_path, "viscot_benchmark/benchmark/vsr.json", [cot_item(split="val"), cot_item(number=4, split="val"),
                                                        cot_item(number=5, split="val")])
  det = {"img_path": "cot/vsr/1.jpg", "expression": "q", "bbox": [343.87, 94.03, 396.81, 126.06], "height": 354,
         "width": 640, "question_id": 3, "split": "val"}
  put(tmp_path, "viscot_benchmark/benchmark_det/vsr.jsonl", [det, {**det, "question_id": 4, "bbox": [1, 2, 3, 4]}])
  got = read("visual_cot", tmp_path, "val")
  assert [raw.boxes[0][0] for raw in got] == [343.87, 343, 343] and [raw.size_px for raw in got] == [(640, 354), None,
                                                                                                      None]
  assert [raw.notes for raw in got] == [{"boxes from benchmark_det": 1}, {}, {}]


def test_boxes_that_lie_wholly_outside_their_page_are_dropped(tmp_path):
  put(tmp_path, "dude_cot_train.jsonl", [cot_line(dataset="dude", width=1700, height=2200, bboxs=[[1644, 2423, 2072,
                                                                                                   2545]])])
  task = settled(one(read("visual_cot", tmp_path)), (1700, 2200))
  assert task.boxes == () and task.answers == ("tv",)


# TextVQA, DocVQA, InfographicsVQA

def text_item(**fields):
  return {"question": "what brand liquor is on the right?", "image_id": "831bcec304a17054", "image_width": 1024,
          "image_height": 576, "answers": ["bowmore ", "bowmore", "martial arts"], "question_id": 34605,
          "set_name": "train", "image_classes": ["Bottle"], "question_tokens": ["what"], "flickr_original_url": "u",
          "flickr_300k_url": "u", **fields}


def test_textvqa_joins_by_image_and_question_and_never_by_id(tmp_path):
  put(tmp_path, "TextVQA_0.5.1_train.json", {"dataset_type": "train", "dataset_name": "textvqa", "data": [
      text_item(), text_item(question="What  BRAND liquor is on the right? "), text_item(question="other?"),
      text_item(question_id="831bcec304a17054", question="q1"),
      text_item(question_id="831bcec304a17054", question="q2"), text_item(set_name="val"),
      text_item(question=None)], "dataset_version": "0.5.1"})
  put(tmp_path, "cot/metadata/textvqa_cot_train.jsonl", [
      cot_line(dataset="textvqa", image="831bcec304a17054.jpg", question="What brand liquor is on the right?",
               width=1024, height=576, bboxs=[[1.5, 2, 30, 40]]),
      cot_line(dataset="textvqa", image="831bcec304a17054.jpg", question="What brand liquor is on the right?",
               width=1024, height=576, bboxs=[[50, 2, 60, 40]]),
      cot_line(dataset="vsr", image="831bcec304a17054.jpg", question="other?")])
  got = read("textvqa", tmp_path, boxes_from=str(tmp_path / "cot"))
  assert [raw.boxes for raw in got[:5]] == [((1.5, 2, 30, 40), (50, 2, 60, 40))] * 2 + [()] * 3
  assert got[0].answers == ("bowmore", "bowmore", "martial arts") and got[0].size_px == (1024, 576)
  assert (got[0].uid, got[0].image) == ("34605", "train_images/831bcec304a17054.jpg")
  assert [raw.uid for raw in got[3:5]] == ["TextVQA_0.5.1_train.json:3", "TextVQA_0.5.1_train.json:4"]
  counts = collections.Counter()
  for raw in got[:5]:
    counts.update(raw.notes)
  assert counts == {"joined with Visual-CoT": 2, "not in Visual-CoT": 3}  # how many boxes were joined
  assert reasons(got) == ["another split", "fields are missing"]
  assert not any(raw.notes or raw.boxes for raw in read("textvqa", tmp_path)[:5])


def test_textvqa_needs_boxes_of_its_own_set(tmp_path):
  put(tmp_path, "TextVQA_0.5.1_train.json", {"data": [text_item()]})
  put(tmp_path, "cot/vsr_cot_train.jsonl", [cot_line()])
  with pytest.raises(ValueError, match="--boxes_from must be a folder of Visual-CoT with boxes of textvqa.*train"):
    read("textvqa", tmp_path, boxes_from=str(tmp_path / "cot"))
  with pytest.raises(ValueError, match="Visual-CoT's train annotations must be in .*: metadata"):
    read("textvqa", tmp_path, boxes_from=str(tmp_path))


def test_docvqa_and_infographicsvqa(tmp_path):
  put(tmp_path, "d/train_v1.0_withQT.json", {"dataset_name": "docvqa", "dataset_split": "train", "data": [
      {"questionId": 337, "question": "what is the date?", "question_types": ["handwritten", "form"],
       "image": "documents/xnbl0037_1.png", "docId": 279, "ucsf_document_id": "xnbl0037", "ucsf_document_page_no": "1",
       "answers": ["1/8/93", "1/8/93 ", "$5"], "data_split": "train"}]})
  raw = one(read("docvqa", tmp_path / "d"))
  assert (raw.uid, raw.image, raw.kind) == ("337", "documents/xnbl0037_1.png", "docvqa_handwritten")
  assert raw.answers == ("1/8/93", "1/8/93", "$5")
  (tmp_path / "d" / "spdocvqa_images").mkdir()
  assert one(read("docvqa", tmp_path / "d")).image == "spdocvqa_images/xnbl0037_1.png"
  put(tmp_path, "i/infographicsVQA_train_v1.0.json", {"dataset_name": "infographicsVQA", "data": [
      {"questionId": 98313, "question": "Which?", "image_local_name": "37313.jpeg", "image_url": "u",
       "ocr_output_file": "37313.json", "answers": ["pinterest"], "data_split": "train"},
      {"questionId": 1, "question": "q", "image_local_name": "1.jpeg", "answers": ["a"], "data_split": "test"}]})
  put(tmp_path, "cot/infographicsvqa_cot_val.jsonl", [cot_line(
      dataset="infographicsvqa", split="val", image="37313.jpeg", question="which?", bboxs=[[1, 2, 3, 4]])])
  got = read("infographicsvqa", tmp_path / "i", boxes_from=str(tmp_path / "cot"))
  assert (got[0].image, got[0].boxes) == ("infographicsvqa_images/37313.jpeg", ((1, 2, 3, 4),))
  assert reasons(got) == ["another split"]


# Visual7W

def visual7w(root):
  pairs = [{"qa_id": 100 + i, "image_id": 7, "question": f"Where is {i}?", "type": "where", "answer": "Grass.",
            "multiple_choices": ["Bed.", "Table.", "Chair."]} for i in range(12)]
  put(root, "dataset_v7w_telling.json", {"dataset": "visual7w-telling", "images": [
      {"image_id": 7, "filename": "v7w_7.jpg", "split": "train", "qa_pairs": [
          *pairs, {"qa_id": 1}, {"qa_id": 113, "question": "q", "answer": "a", "multiple_choices": [None]}]},
      {"image_id": 8, "filename": "v7w_8.jpg", "split": "val", "qa_pairs": pairs}]})
  put(root, "dataset_v7w_grounding_annotations/v7w_telling_answers.json", {"boxes": [
      {"qa_id": 100, "name": "grass", "x": 1, "y": 2, "width": 30, "height": 40, "score": 1},
      {"qa_id": 100, "name": "grass", "x": 5, "y": 6, "width": 7, "height": 8}]})
  put(root, "dataset_v7w_pointing.json", {"dataset": "visual7w-pointing", "boxes": [
      {"box_id": 1, "name": "pillow", "x": -1, "y": -1, "width": 30, "height": 40},
      {"box_id": 2, "name": "pillow", "x": 50, "y": 1, "width": 30, "height": 40}], "images": [
      {"image_id": 7, "filename": "v7w_7.jpg", "split": "train", "qa_pairs": [
          {"qa_id": 100, "question": "Which is left?", "type": "which", "answer": 1, "multiple_choices": [2, 3, 4]},
          {"qa_id": 101, "question": "Which?", "type": "which", "answer": 77, "multiple_choices": [1, 2, 3]}]}]})


def test_visual7w_telling_and_pointing(tmp_path):
  visual7w(tmp_path)
  got = read("visual7w", tmp_path)
  telling = [raw for raw in got if isinstance(raw, records.Raw) and raw.kind == "visual7w_where"]
  assert len(telling) == 12 and telling[0].boxes == ((1, 2, 30, 40), (5, 6, 7, 8)) and not telling[1].boxes
  assert settled(telling[0], (100, 100)).boxes == ((1, 2, 31, 42), (5, 6, 12, 14))
  assert telling[0].notes == {"telling questions with boxes": 1}
  assert telling[1].notes == {"telling questions without boxes": 1}
  assert all(sorted(raw.options) == ["Bed.", "Chair.", "Grass.", "Table."] for raw in telling)
  assert len({raw.options.index("Grass.") for raw in telling}) > 2  # and not always at A
  assert [raw.options for raw in telling] == [raw.options for raw in read("visual7w", tmp_path)[:12]]
  pointing = next(raw for raw in got if getattr(raw, "kind", "") == "visual7w_pointing")
  assert (pointing.uid, pointing.answers, pointing.boxes) == ("pointing/100", (), ((-1, -1, 30, 40),))
  task, repairs = records.settle(pointing, records.Picture((100, 100)))
  assert task.boxes == ((0, 0, 29, 39),) and repairs == {"clipped": 1}
  assert reasons(got) == ["fields are missing", "fields are missing", "no such box"]
  assert len({raw.uid for raw in got if isinstance(raw, records.Raw)}) == 13  # a pointing id may equal a telling one


def test_visual7w_of_another_split(tmp_path):
  visual7w(tmp_path)
  (tmp_path / "dataset_v7w_pointing.json").unlink()
  with pytest.raises(ValueError, match="must have images of the split 'test'. Received: train, val"):
    read("visual7w", tmp_path, "test")
  assert len(read("visual7w", tmp_path, "val")) == 12


# GRIT

def test_grit_s_phrases_are_characters_and_shares(tmp_path):
  row = {"key": "000373938", "clip_similarity_vitb32": 0.35, "id": 1, "url": "u", "width": 200, "height": 100,
         "caption": "two dogs and a cat", "noun_chunks": [
             [0, 8, 0.1, 0.2, 0.3, 0.4, 0.9], [0, 8, 0.5, 0.2, 0.7, 0.4, 0.8], [13, 18, 0.5, 0.5, 1.0, 1.2, 0.7],
             [13, 99, 0, 0, 1, 1, 0.5]],
         "ref_exps": [[13.0, 18.0, 0.5, 0.5, 1.0, 1.2, 0.7]]}
  put(tmp_path, "images/00037/000373938.jpg", b"")
  put(tmp_path, "a.jsonl", [row, "{", {**row, "key": None}])
  got = read("grit", tmp_path)
  raws = [raw for raw in got if isinstance(raw, records.Raw)]
  assert [raw.question for raw in raws] == ["Where in the picture is this: two dogs?",
                                           *["Where in the picture is this: a cat?"] * 2]
  assert [pytest.approx(box) for box in settled(raws[0], (200, 100)).boxes] == [(20, 20, 60, 40), (100, 20, 140, 40)]
  assert settled(raws[1], (400, 50)).boxes == ((200, 25, 400, 50),)  # whatever size was downloaded
  assert {raw.image for raw in raws} == {"images/00037/000373938.jpg"} and len({raw.uid for raw in raws}) == 3
  assert reasons(got) == ["no phrase", "broken line", "fields are missing"]
  with pytest.raises(ValueError, match="split must be 'train'"):
    read("grit", tmp_path, "val")


def test_grit_in_parquet_is_the_same(tmp_path):
  row = {"key": "1", "width": 10, "height": 10, "caption": "a cat", "ref_exps": [],
         "noun_chunks": [[0.0, 5.0, 0.1, 0.2, 0.3, 0.4, 0.9]]}
  put_rows(tmp_path / "p", "coyo_0_snappy.parquet", [row])
  put(tmp_path / "j", "a.jsonl", [row])
  assert read("grit", tmp_path / "p") == read("grit", tmp_path / "j") != []


# What others have for this job

def verl_row(**fields):
  return {"data_source": "vstar", "prompt": [
      {"role": "system", "content": "You are a helpful assistant."},
      {"role": "user", "content": "<image>\nWhat is the color?\nA. red\nB. blue\nThink first."}],
      "images": [{"bytes": b"\xff\xd8pixels", "path": None}], "ability": "vl_chart", "env_name": "visual_toolbox_v2",
      "reward_model": {"style": "model", "ground_truth": "B. blue"},
      "extra_info": {"question": "What is the color?\n(A) red\n(B) blue", "answer": "B", "id": "5", "index": 3},
      **fields}


def test_deepeyes(tmp_path):
  put_rows(tmp_path, "data/data_0.1.2_visual_toolbox_v2.parquet", [
      verl_row(), verl_row(extra_info={"question": None, "answer": "x", "id": "6", "index": 4}),
      verl_row(images=[{"bytes": b"a", "path": None}, {"bytes": b"b", "path": None}]), verl_row(images=[]),
      verl_row(extra_info={"question": "How many?", "answer": "3", "id": None, "index": 9},
               reward_model={"style": "rule", "ground_truth": None})])
  got = read("deepeyes", tmp_path)
  assert got[0] == records.Raw("vstar/5", b"\xff\xd8pixels", "What is the color?", ("blue",), options=("red", "blue"),
                               kind="deepeyes_vstar", source="deepeyes", split="train")
  assert (got[1].question, got[1].options, got[1].answers) == ("What is the color?", ("red", "blue"), ("blue",))
  assert reasons(got) == ["several images", "no image"] and got[4].answers == ("3",)


def test_mini_o3(tmp_path):
  put(tmp_path, "probe/visual_probe_train.json", [
      {"images": ["img/1.png"], "problem": "<image>\nWhat is on the sign?", "solution": "stop", "doc_id": 4,
       "data_source": "visual_probe"},
      {"images": ["img/2.png"], "problem": "Which?<image>", "solution": 3, "doc_id": 0, "data_source": ""},
      {"images": ["img/3.png"], "problem": "Which?", "solution": "x", "doc_id": 0},
      {"images": ["1", "2"], "problem": "q", "solution": "x"}, {"images": [], "problem": "q", "solution": "x"}, 5])
  put(tmp_path, "probe/visual_probe_val.json", [])
  got = read("mini_o3", tmp_path)
  assert [(r.uid, r.image, r.question, r.answers, r.kind) for r in got[:3]] == [
      ("visual_probe_train.json/4", "probe/img/1.png", "What is on the sign?", ("stop",), "mini_o3_visual_probe"),
      ("visual_probe_train.json:1", "probe/img/2.png", "Which?", ("3",), "mini_o3"),
      ("visual_probe_train.json:2", "probe/img/3.png", "Which?", ("x",), "mini_o3")]
  assert reasons(got) == ["several images", "no image", "fields are missing"]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.parquet"])
def test_pixel_reasoner(name, tmp_path):
  rows = [{"question": "How many?", "image": ["a.jpg"], "is_video": False, "answer": ["2"], "qid": "pr-1"},
          {"question": "What?", "image": ["v/1.jpg", "v/2.jpg"], "is_video": True, "answer": ["x"], "qid": "pr-2"},
          {"question": "What?", "image": [], "is_video": False, "answer": ["x"], "qid": "pr-3"}]
  (put_rows if name.endswith("parquet") else put)(tmp_path, name, rows)
  (tmp_path / "images").mkdir()
  got = read("pixel_reasoner", tmp_path)
  assert (got[0].uid, got[0].image, got[0].answers) == ("pr-1", "images/a.jpg", ("2",))
  assert reasons(got) == ["a video", "no image"]


def test_pixel_reasoner_with_one_path(tmp_path):
  put(tmp_path, "d/data.json", [{"question": "Q?\nA. x\nB. y", "image": "a.jpg", "answer": "A"}])
  raw = one(read("pixel_reasoner", tmp_path))
  assert (raw.uid, raw.image, raw.options, raw.answers) == ("data.json:0", "d/a.jpg", ("x", "y"), ("A",))


def test_treevgr(tmp_path):
  boxes = [{"bbox": [1.0, 2.0, 30.0, 40.0], "name": "sign"}, {"bbox": [5.0, 6.0, 7.0, 8.0], "name": "car"}]
  put_rows(tmp_path, "vstar30k_visdrone6k_x1y1x2y2.parquet", [
      {"images": [{"bytes": b"x", "path": None}], "problem": "<image>What?\nA. a\nB. b", "answer": "A",
       "target_instances": boxes}])
  raw = one(read("treevgr", tmp_path))
  assert (raw.image, raw.question, raw.options, raw.answers) == (b"x", "What?", ("a", "b"), ("A",))
  assert raw.boxes == ((1, 2, 30, 40), (5, 6, 7, 8)) and raw.frame == "corners"


def test_treevgr_s_boxes_in_a_string(tmp_path):
  put_rows(tmp_path, "t.parquet", [
      {"image": {"bytes": b"x", "path": None}, "question": "What?", "answer": "a", "target_instances": text}
      for text in ("[[1, 2, 3, 4], [5, 6, 7, 8]]", "[[1, 2")])
  got = read("treevgr", tmp_path)
  assert got[0].boxes == ((1, 2, 3, 4), (5, 6, 7, 8)) and reasons(got) == ["fields are missing"]


def test_hf_parquet(tmp_path):
  put_rows(tmp_path, "data/train-00000-of-00001.parquet", [
      {"image": {"bytes": b"x", "path": "a.png"}, "question": "What?", "answer": 1, "choices": ["a", "b"],
       "bbox": [1.0, 2.0, 3.0, 4.0], "id": 7},
      {"image": {"bytes": None, "path": "a.png"}, "question": "What?", "answer": 2, "choices": ["a", "b"], "bbox": None,
       "id": 8}, {"image": {"bytes": None, "path": "b.png"}, "question": "What?", "answer": 4, "choices": [],
                  "bbox": None, "id": None}])
  put_rows(tmp_path, "data/validation-00000-of-00001.parquet", [
      {"images": [{"bytes": b"y", "path": None}], "problem": "Q?", "answers": ["x", "y"]}])
  got = read("hf_parquet", tmp_path)
  assert got[0] == records.Raw("7", b"x", "What?", ("b",), ((1, 2, 3, 4),), options=("a", "b"), kind="hf_parquet",
                               source="hf_parquet", split="train")
  assert reasons(got) == ["no answer among the options"]
  assert (got[2].uid, got[2].image, got[2].answers) == ("train-00000-of-00001.parquet:3", "data/b.png", ("4",))
  assert one(read("hf_parquet", tmp_path, "val")).answers == ("x", "y")


def test_visualprobe_made_into_parquet(tmp_path):
  """Its publishers have JSON beside pictures; parquet files that others make have schemas that other sources read."""
  probe = {"problem": "<image>\nWhat is on the sign?", "solution": "stop", "doc_id": 4, "data_source": "visual_probe"}
  put_rows(tmp_path / "hf", "data/train-00000-of-00001.parquet", [
      probe | {"images": [{"bytes": b"x", "path": "1.png"}]}])
  got = one(read("hf_parquet", tmp_path / "hf"))
  assert (got.image, got.question, got.answers) == (b"x", "What is on the sign?", ("stop",))
  put_rows(tmp_path / "verl", "train.parquet", [{
      "data_source": "visual_probe", "images": [{"image": "img/1.png", "max_pixels": 9}], "ability": "vision_qa",
      "prompt": [{"role": "user", "content": probe["problem"]}],
      "reward_model": {"style": "rule", "ground_truth": "stop"},
      "extra_info": {"index": 4, "question": probe["problem"]}}])
  got = one(read("deepeyes", tmp_path / "verl"))
  assert (got.uid, got.image, got.question, got.answers) == ("visual_probe/4", "img/1.png", "What is on the sign?",
                                                             ("stop",))


def test_lines_of_ones_own(tmp_path):
  put(tmp_path, "r.jsonl", [
      {"image": "a.jpg", "question": "Q?", "answers": ["x", "x"], "boxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "id": 3,
       "options": ["x", "y"], "task": "kind", "licence": "CC0", "source": "mine", "split": "val", "match": "exact"},
      {"image": "b.jpg", "question": "Q?", "answers": [], "boxes": [[1, 2, 3, 4]], "options": None},
      {"image": "b.jpg", "question": "Q?", "answers": "x", "source": {"repo": "r"}}, {"image": "b.jpg"}])
  got = read("jsonl", tmp_path)
  assert got[0] == records.Raw("3", "a.jpg", "Q?", ("x", "x"), ((1, 2, 3, 4), (5, 6, 7, 8)), options=("x", "y"),
                               kind="kind", source="mine", split="val", licence="CC0")
  assert (got[1].uid, got[1].options, got[1].source) == ("r.jsonl:2", None, "jsonl")
  assert got[2].answers == ("x",) and got[2].source == "jsonl" and reasons(got) == ["fields are missing"]
  assert read("jsonl", tmp_path / "r.jsonl") == got


# What bad input gets

@pytest.mark.parametrize("source", table.SOURCES)
def test_a_wrong_folder_is_named_with_what_is_in_it(source, tmp_path):
  for name in ("x.txt", "y.csv", "z.bin", "zz"):
    (tmp_path / name).write_text("")
  split = table.SOURCES[source].SPLITS[0]
  for call in (read, lambda *a: table.SOURCES[source].files(str(a[1]), a[2])):
    with pytest.raises(ValueError) as error:
      call(source, tmp_path, split)
    assert str(tmp_path) in str(error.value) and "x.txt, y.csv, z.bin" in str(error.value)


HALVES = {
    "gqa": ("train_balanced_questions.json", {"1": question()}),
    "textvqa": ("TextVQA_0.5.1_train.json", {"data": [text_item()]}),
    "docvqa": ("train_v1.0.json", {"data": [{"questionId": 1, "question": "q", "image": "i", "answers": ["a"]}]}),
    "infographicsvqa": ("infographicsVQA_train_v1.0.json", {"data": [
        {"questionId": 1, "question": "q", "image_local_name": "i", "answers": ["a"]}]}),
    "mini_o3": ("a.json", [{"images": ["a"], "problem": "q", "solution": "a"}]),
    "pixel_reasoner": ("a.json", [{"image": "a", "question": "q", "answer": "a"}]),
    "visual_cot": ("viscot_363k.json", [cot_item()])}


@pytest.mark.parametrize("source", HALVES)
def test_half_a_download_is_named(source, tmp_path):
  name, value = HALVES[source]
  path = put(tmp_path, name, value)
  assert len(read(source, tmp_path)) == 1
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(ValueError, match=f"{name} ends early.*half a download"):
    read(source, tmp_path)


@pytest.mark.parametrize("source", HALVES)
def test_another_schema_is_named_by_examples(source, tmp_path):
  name, value = HALVES[source]
  other = [{"instruction": "a", "output": "b"}, {"instruction": "c"}, ["d"]]
  if isinstance(value, dict):
    other = {"data": other} if "data" in value else {str(i): item for i, item in enumerate(other)}
  put(tmp_path, name, other)
  with pytest.raises(ValueError, match=f"{name} must hold records with .*an object with instruction, output.*'d'"):
    read(source, tmp_path)


@pytest.mark.parametrize("source, said", [
    ("deepeyes", "must have the columns data_source, prompt, images, reward_model. Received: none named data_source"),
    ("treevgr", "must have the columns answer, target_instances"), ("hf_parquet", "must have a column image or images"),
    ("pixel_reasoner", "must have the columns question, image")])
def test_a_parquet_file_of_another_schema(source, said, tmp_path):
  put_rows(tmp_path, "a.parquet", [{"x": 1}])
  with pytest.raises(ValueError, match=said):
    read(source, tmp_path)


def test_the_table_has_all_that_it_says():
  for name, module in table.SOURCES.items():
    assert module.NAME == name and module.SPLITS and module.WANTED and isinstance(module.LICENCE, str)
    assert module.__doc__.strip().count("\n") > 2
  assert set(table.JOINED) <= set(table.SOURCES) and "Visual-CoT" in visual_cot.__doc__
