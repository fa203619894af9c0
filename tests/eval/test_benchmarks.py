"""Tasks of benchmarks, from small files of each layout, and rows that are wrong in every way."""

import base64
import functools
import io
import json
import pathlib

from PIL import Image
import pytest

from virl_jax import types
from virl_jax.data import answers
from virl_jax.eval.benchmarks import choices
from virl_jax.eval.benchmarks import docvqa
from virl_jax.eval.benchmarks import hrbench
from virl_jax.eval.benchmarks import infographicsvqa
from virl_jax.eval.benchmarks import mme_realworld
from virl_jax.eval.benchmarks import needle
from virl_jax.eval.benchmarks import pope
from virl_jax.eval.benchmarks import records
from virl_jax.eval.benchmarks import rows as rows_lib
from virl_jax.eval.benchmarks import table
from virl_jax.eval.benchmarks import textvqa
from virl_jax.eval.benchmarks import treebench
from virl_jax.eval.benchmarks import visualprobe
from virl_jax.eval.benchmarks import vstar

NATIVE_ORDER = rows_lib.How(seed=None)


def picture(color="red", size=(40, 30)) -> bytes:
  out = io.BytesIO()
  Image.new("RGB", size, color).save(out, "PNG")
  return out.getvalue()


def b64(color="red") -> str:
  return base64.b64encode(picture(color)).decode()


def put(path: pathlib.Path, content) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else
                   (content if isinstance(content, str) else json.dumps(content)).encode())
  return str(path)


def tsv(path, rows) -> str:
  names = list(rows[0])
  lines = [names, *([row[name] for name in names] for row in rows)]
  return put(path, "".join("\t".join(map(str, line)) + "\n" for line in lines))


def said(loaded, **texts):
  return {uid: [rows_lib.Prediction(text)] for uid, text in texts.items()}


def causes(loaded):
  return {r.row: r.cause for r in loaded.rejects}


# --- V*


def vstar_json(path, **changes):
  return put(path, {"target_object": ["cup"], "bbox": [[1, 2, 10, 20]], "question": "What color is the cup?",
                    "options": ["It is red.", "It is blue.", "It is green.", "It is pink."]} | changes)


def test_vstar_s_folders(tmp_path):
  for kind, name in (("direct_attributes", "sa_1"), ("direct_attributes", "sa_2"), ("relative_position", "sa_3")):
    vstar_json(tmp_path / kind / f"{name}.json")
    put(tmp_path / kind / f"{name}.jpg", picture())
  loaded = vstar.load(str(tmp_path), NATIVE_ORDER)
  assert [t.uid for t in loaded.tasks] == ["direct_attributes/sa_1", "direct_attributes/sa_2", "relative_position/sa_3"]
  task = loaded.tasks[0]
  assert task.options[0] == "It is red." and task.answers == ("It is red.",) and task.match == "options"
  assert task.boxes == (types.Box(1, 2, 11, 22),), "x, y, width, height"
  assert task.kind == "direct_attributes" and task.image == str(tmp_path / "direct_attributes" / "sa_1.jpg")
  assert not loaded.rejects and loaded.n_rows == 3


def test_vstar_s_right_option_is_not_always_a(tmp_path):
  for i in range(40):
    vstar_json(tmp_path / "direct_attributes" / f"x{i}.json")
    put(tmp_path / "direct_attributes" / f"x{i}.jpg", picture())
  at = lambda how: [t.options.index("It is red.") for t in vstar.load(str(tmp_path), how).tasks]
  assert set(at(NATIVE_ORDER)) == {0}
  assert set(at(rows_lib.How(seed=0))) == {0, 1, 2, 3}
  assert at(rows_lib.How(seed=0)) == at(rows_lib.How(seed=0)) != at(rows_lib.How(seed=1))
  (tmp_path / "direct_attributes" / "x0.json").unlink()
  (tmp_path / "direct_attributes" / "x0.jpg").unlink()
  assert at(rows_lib.How(seed=0)) == at(rows_lib.How(seed=0))
  shuffled = vstar.load(str(tmp_path), rows_lib.How(seed=0))
  assert {t.uid: t.options for t in shuffled.tasks}["direct_attributes/x7"] == rows_lib.shuffled(
      "direct_attributes/x7", ("It is red.", "It is blue.", "It is green.", "It is pink."), 0), "whatever else is there"
  always_a = {t.uid: [rows_lib.Prediction("A")] for t in shuffled.tasks}
  assert vstar.score(vstar.load(str(tmp_path), NATIVE_ORDER), always_a)["score"] == 1.0
  assert vstar.score(shuffled, always_a)["score"] < 0.5


def test_what_is_wrong_with_rows_of_vstar_s_folders(tmp_path):
  folder = tmp_path / "direct_attributes"
  for name, changes in (("good", {}), ("no_image", {}), ("no_options", {"options": ["one"]}), ("bad_image", {}),
                        ("outside", {"bbox": [[100, 100, 5, 5]]}), ("clipped", {"bbox": [[30, 20, 100, 5]]}),
                        ("no_box", {"bbox": [[1, 2, 3]]}), ("no_question", {"question": 3.5})):
    vstar_json(folder / f"{name}.json", **changes)
    if name != "no_image":
      put(folder / f"{name}.jpg", picture() if name != "bad_image" else b"not a picture")
  put(folder / "broken.json", '{"question": ')
  put(folder / "broken.jpg", picture())
  put(folder / "lonely.jpg", picture())
  put(folder / "latin.json", json.dumps({"bbox": [], "options": ["a", "b"], "question": "na#ve"}).encode().replace(
      b"#", b"\xef"))
  put(folder / "latin.jpg", picture())
  loaded = vstar.load(str(tmp_path), NATIVE_ORDER)
  assert {t.uid.partition("/")[2] for t in loaded.tasks} == {"good", "clipped", "no_question"}
  assert loaded.tasks[0].boxes == (types.Box(30, 20, 40, 25),) and loaded.clipped == 1
  assert {r.name.partition("/")[2]: r.cause for r in loaded.rejects} == {
      "no_image": "no image file", "no_options": "options are missing", "bad_image": "no readable image",
      "outside": "a box without area in the picture", "no_box": "a box is not four numbers", "broken": "not JSON",
      "lonely": "no annotation beside the image", "latin": "question is not UTF-8"}
  assert loaded.n_rows == 11 and "3 of 11 rows can be used; 1 cannot: a box is not four" in loaded.describe()
  result = vstar.score(loaded, said(loaded, **{"direct_attributes/good": "A", "direct_attributes/clipped": "B"}))
  assert result["score"] == 0.5 and result["n"] == 2
  assert result["evaluated"] == {"rows": 11, "rejected": 8, "without_answers": 0, "without_prediction": 1,
                                 "share": 2 / 11}, "the share stands beside the score"


def test_a_folder_of_another_kind(tmp_path):
  put(tmp_path / "direct" / "x", b"")
  with pytest.raises(ValueError, match="must be a folder with direct_attributes and relative_position in it. "
                                       "Received: direct"):
    vstar.load(str(tmp_path))


def test_vstar_s_lines_and_table_have_options_of_their_own(tmp_path):
  put(tmp_path / "direct_attributes" / "g.jpg", picture())
  line = {"image": "direct_attributes/g.jpg", "category": "direct_attributes", "label": "B", "question_id": "0",
          "text": "What is the glove made of?\n(A) rubber\n(B) cotton\nAnswer with the option's letter from the given "
                  "choices directly."}
  other = {**line, "image": "direct_attributes/x.jpg"}
  wrong = [{**line, "label": "C"}, {**line, "text": "What?"}, {**line, "text": "What?\n(A) x\n(C) y"},
           {**line, "label": ""}]
  path = put(tmp_path / "test_questions.jsonl", "".join(json.dumps(x) + "\n" for x in [line, other, *wrong]))
  loaded = vstar.load(path)
  assert [(t.question, t.options, t.answers) for t in loaded.tasks] == [
      ("What is the glove made of?", ("rubber", "cotton"), ("cotton",))]
  assert causes(loaded) == {2: "no image file", 3: "the answer is the letter of no option", 4: "options are missing",
                            5: "options are missing", 6: "label is empty"}
  row = {"index": "0", "image": b64(), "question": "What?", "A": "rubber", "B": "cotton", "C": "", "D": "",
         "answer": "A", "category": "direct_attributes"}
  path = tsv(tmp_path / "t.tsv", [row, {**row, "index": 1, "image": "0"}, {**row, "index": 2, "image": "7"},
                                  {**row, "index": 3, "B": ""}, {**row, "index": 4, "D": "x"}, {**row, "index": 0}])
  loaded = vstar.load(path)
  assert [(t.uid, t.options, t.image == picture()) for t in loaded.tasks] == [
      ("0", ("rubber", "cotton"), True), ("1", ("rubber", "cotton"), True)]
  assert causes(loaded) == {3: "image is the index of no row with a picture", 4: "options are missing",
                            5: "options are missing", 6: "an id that an earlier row has"}


# --- HR-Bench


def hr_rows(questions=2, kinds=("single", "cross")):
  return [{"index": 4 * q + cycle, "question": f"q{q}", "answer": "DCBA"[cycle], "category": kinds[q % len(kinds)],
           **{"ABCD"[(3 - cycle + i) % 4]: f"option {i}" for i in range(4)}, "cycle_category": cycle,
           "image": b64() if not cycle else 4 * q} for q in range(questions) for cycle in range(4)]


def ordered(rows):
  return [{name: row[name] for name in ("index", "question", "answer", "category", *"ABCD", "cycle_category", "image")}
          for row in rows]


def test_hrbench_s_table_and_its_indices(tmp_path):
  loaded = hrbench.load(tsv(tmp_path / "hr.tsv", ordered(hr_rows())))
  assert len(loaded.tasks) == 8 and not loaded.rejects
  assert {t.answers for t in loaded.tasks} == {("option 0",)}, "the same text is right in each cycle"
  assert {t.image for t in loaded.tasks} == {picture()} and list(loaded.group.values()) == list("0123") * 2


def test_hrbench_s_pictures_may_go_to_files(tmp_path):
  path = tsv(tmp_path / "hr.tsv", ordered(hr_rows()))
  loaded = hrbench.load(path, rows_lib.How(store=str(tmp_path / "store")))
  assert {pathlib.Path(t.image).read_bytes() for t in loaded.tasks} == {picture()}
  assert len(list((tmp_path / "store").iterdir())) == 1
  bare = hrbench.load(path, rows_lib.How(need_images=False))
  assert {t.image for t in bare.tasks} == {""} and len(bare.tasks) == 8


def test_hrbench_s_average_is_over_cycles(tmp_path):
  """Cycle 0 has lost a question, so that the mean over cycles is not that of all rows."""
  rows = ordered(hr_rows(3))
  rows[0]["image"] = "*" * 100
  rows[1]["image"] = rows[2]["image"] = rows[3]["image"] = b64()
  loaded = hrbench.load(tsv(tmp_path / "hr.tsv", rows))
  assert causes(loaded) == {1: "image is not base64"} and len(loaded.tasks) == 11
  right = {"4", "5", "1", "2", "10"}  # cycles 0, 1, 1, 2, 2
  found = {t.uid: [rows_lib.Prediction(_letter(t, t.uid in right))] for t in loaded.tasks}
  figures = hrbench.score(loaded, found)["figures"]
  assert figures["cycles"] == pytest.approx({"0": 1 / 2, "1": 2 / 3, "2": 2 / 3, "3": 0})
  assert figures["average"] == pytest.approx((1 / 2 + 2 / 3 + 2 / 3) / 4) != figures["pooled"]
  assert figures["pooled"] == pytest.approx(5 / 11)
  # Questions 0 and 2 are single, 1 is cross.
  assert figures["single"] == pytest.approx((0 + 1 / 2 + 2 / 2 + 0) / 4)
  assert figures["cross"] == pytest.approx((1 + 1 + 0 + 0) / 4)
  assert figures["mean_of_categories"] == pytest.approx((figures["single"] + figures["cross"]) / 2)


def _letter(task, right):
  """The letter of the right option, or of a wrong one."""
  at = task.options.index(task.answers[0])
  return "ABCDE"[at if right else (at + 1) % len(task.options)]


def test_hrbench_s_json(tmp_path):
  row = {"index": 8, "question": "q", "answer": ["A", "B"], "category": "single", "cycle_category": 0,
         "options": ["A. x\nB. y\n", "A. y\nB. x\n"], "input_image": "image/8.png"}
  put(tmp_path / "image" / "8.png", picture())
  path = put(tmp_path / "a.json", [row, {**row, "index": 12, "answer": ["A"]}, {**row, "index": "x"},
                                   {**row, "index": 16, "options": "A. x"}, {**row, "input_image": "image/9.png"},
                                   {**row, "index": 20, "answer": ["A", "E"]}])
  loaded = hrbench.load(path)
  assert [(t.uid, t.answers, loaded.group[t.uid]) for t in loaded.tasks] == [
      ("8", ("x",), "0"), ("9", ("x",), "1"), ("20", ("x",), "0")]
  assert sorted(causes(loaded).values()) == sorted(
      ["another number of answers than of orders of options"] * 2 + ["index is not a number"] * 2 +
      ["options is not a list of texts", "no image file", "no image file", "the answer is the letter of no option"])


def test_a_table_without_a_column(tmp_path):
  rows = [{k: v for k, v in row.items() if k != "cycle_category"} for row in ordered(hr_rows())]
  with pytest.raises(ValueError, match="Received: no cycle_category; it has index, question, answer, category, A"):
    hrbench.load(tsv(tmp_path / "hr.tsv", rows))


# --- POPE


def pope_file(path, rows, as_lines=True):
  rows = [{"question_id": i + 1, "image": "a.png", "text": f"Is there a {name} in the image?", "label": label}
          for i, (name, label) in enumerate(rows)]
  return put(path, "".join(json.dumps(r) + "\n" for r in rows) if as_lines else rows)


def test_pope_s_files(tmp_path):
  coco, seem = tmp_path / "output" / "coco", tmp_path / "output" / "seem" / "gqa"
  pope_file(coco / "coco_pope_random.json", [("cup", "yes"), ("dog", "no")])
  pope_file(coco / "coco_pope_popular.json", [("cup", "yes"), ("cat", "maybe")])
  pope_file(seem / "gqa_pope_seem_random.json", [("cup", "No"), ("dog", "yes")], as_lines=False)
  put(tmp_path / "POPEv2" / "annotations.json", [
      {"image_id": 7, "image_name": f"/{folder}/7.png", "target_object": "cup", "query": "Is there a cup?",
       "label": label}
      for folder, label in (("images", "No"), ("coco", "Yes"))])
  for folder in (coco, seem):
    put(folder / "a.png", picture())
  put(tmp_path / "POPEv2" / "images" / "7.png", picture())
  loaded = pope.load(str(tmp_path))
  assert {uid: loaded.group[uid] for uid in loaded.group} == {
      "coco/random/1": "coco/random", "coco/random/2": "coco/random", "coco/popular/1": "coco/popular",
      "gqa/random/1": "gqa/random", "gqa/random/2": "gqa/random", "/images/7.png": "POPEv2"}
  assert {t.uid: t.answers for t in loaded.tasks}["gqa/random/1"] == ("no",), "labels in any case"
  assert sorted(causes(loaded).values()) == ["label is neither yes nor no", "no image file"]
  assert all(t.match == "yes_no" for t in loaded.tasks)
  assert pope.load(str(coco / "coco_pope_random.json")).n_rows == 2
  with pytest.raises(ValueError, match="must be a file of POPE's, or a folder with some"):
    pope.load(str(tmp_path / "POPEv2" / "images"))


def test_labels_alone_are_enough_to_score(tmp_path):
  path = put(tmp_path / "coco_pope_popular.labels.jsonl", '{"question_id": 1, "label": "yes"}\n')
  assert causes(pope.load(path)) == {1: "no image"}
  bare = pope.load(path, rows_lib.How(need_images=False))
  assert [(t.uid, t.answers) for t in bare.tasks] == [("coco/popular/1", ("yes",))]


@pytest.mark.parametrize("text, yes", [
    ("Yes", True), ("No", False), ("No.", False), ("no", False), ("No, there is none", False), ("It does not", False),
    ("Not sure", True), ("NO", True), ("There is none", True), ("Yes. But not here", True), ("", True),
    ("nothing", True), ("Yes, no", False), ("I do,not", True), ("a not-a-dog", True), (" no", False)])
def test_pope_s_words(text, yes):
  assert pope.says_yes(text) is yes


def test_pope_s_figures(tmp_path):
  path = pope_file(tmp_path / "coco_pope_random.json", list(zip("abcde", ("yes", "yes", "no", "no", "no"))))
  loaded = pope.load(path, rows_lib.How(need_images=False))
  texts = ["Yes", "No", "Yes", "no", "Not sure"]
  result = pope.score(loaded, {t.uid: [rows_lib.Prediction(text)] for t, text in zip(loaded.tasks, texts)})
  assert result["figures"]["splits"]["coco/random"] == pytest.approx(
      {"n": 5, "TP": 1, "FP": 2, "TN": 1, "FN": 1, "accuracy": 2 / 5, "precision": 1 / 3, "recall": 1 / 2, "F1": 2 / 5,
       "yes_ratio": 3 / 5})
  assert result["score"] == pytest.approx(2 / 5) and [r["score"] for r in result["rows"]] == [1, 0, 0, 1, 0]
  nobody = pope.score(loaded, {})
  assert nobody["score"] is None and nobody["evaluated"]["share"] == 0.0 and "-" in rows_lib.table(nobody)
  says_no = pope.score(loaded, {t.uid: [rows_lib.Prediction("no")] for t in loaded.tasks})
  assert says_no["figures"]["splits"]["coco/random"]["precision"] is None and says_no["score"] == 0.0


# --- reading


def test_textvqa_s_releases(tmp_path):
  row = {"question_id": 34602, "image_id": "ab", "question": "What brand?", "answers": ["x"] * 7 + ["y "] * 3}
  put(tmp_path / "train_images" / "ab.jpg", picture())
  path = put(tmp_path / "t.json", {"data": [row, {**row, "question_id": 34603, "image_id": "none"},
                                            {**row, "question_id": 34604, "answers": []},
                                            {**row, "question_id": 34605, "answers": ["one"]},
                                            {k: v for k, v in row.items() if k != "answers"} | {"question_id": 34606}]})
  loaded = textvqa.load(path)
  assert [(t.uid, t.match, len(t.answers)) for t in loaded.tasks] == [("34602", "vqa", 10), ("34606", "vqa", 0)]
  assert causes(loaded) == {2: "no image file", 3: "answers is not a list of texts",
                            4: "no answer that its rule can match"}
  result = textvqa.score(loaded, said(loaded, **{"34602": "Y", "34606": "x"}))
  assert result["score"] == pytest.approx(0.9) and result["evaluated"]["without_answers"] == 1
  old = put(tmp_path / "old.json", {"data": [{"image": "train/ab.jpg", "question": "What?", "answers": ["x"] * 6}] * 2})
  put(tmp_path / "ab.jpg", picture())
  assert [t.uid for t in textvqa.load(old).tasks] == ["ab#1", "ab#2"]


def test_docvqa_and_infographicsvqa(tmp_path):
  put(tmp_path / "documents" / "p.png", picture())
  put(tmp_path / "i.jpeg", picture())
  path = put(tmp_path / "d.json", {"data": [{"questionId": 1, "question": "?", "image": "documents/p.png",
                                             "answers": ["$3,700", "3,700"]}]})
  loaded = docvqa.load(path)
  assert loaded.tasks[0].match == "anls" and loaded.tasks[0].image == str(tmp_path / "documents" / "p.png")
  assert docvqa.score(loaded, said(loaded, **{"1": "3,701"}))["score"] == pytest.approx(4 / 5)
  path = put(tmp_path / "i.json", {"data": [{"questionId": 2, "question": "?", "image_local_name": "i.jpeg",
                                             "answers": ["cat"]}, {"questionId": 3, "question": "?"}]})
  loaded = infographicsvqa.load(path)
  assert causes(loaded) == {2: "no image_local_name"}
  result = infographicsvqa.score(loaded, said(loaded, **{"2": "cats    "}))
  assert (result["benchmark"], result["metric"]) == ("infographicsvqa", "ANLS")
  assert result["score"] == pytest.approx(7 / 8), "the denominator is the raw string's length"
  assert answers.rule("anls")("cats    ", ("cat",)) == pytest.approx(3 / 4), "a reward's is not"


# --- others with options


def test_mme_realworld_in_all_its_spellings(tmp_path):
  row = {"Question_id": "Perception/x/0", "Question Type": "Multiple Choice", "Image": "a.webp", "Text": "How many?",
         "Answer choices": ["(A) 1", "(B) 2", "(C) 3", "(D) 4", "(E) The image does not feature them"],
         "Ground truth": "E", "Category": "c", "Subtask": "Diagram and Table", "Task": "Perception"}
  put(tmp_path / "a.webp", picture())
  other = {("Question type" if k == "Question Type" else k): v for k, v in row.items()} | {
      "Question_id": "perception/x/1", "Subtask": "Diagram_and_Table", "Task": "perception", "Ground truth": "A"}
  path = put(tmp_path / "m.json", [row, other, {**row, "Question_id": "2", "Answer choices": ["(A) 1", "(C) 2"]},
                                   {**row, "Question_id": "3", "Ground truth": "F"}, "text"])
  loaded = mme_realworld.load(path)
  assert {t.kind for t in loaded.tasks} == {"perception/diagram and table"} and len(loaded.tasks) == 2
  assert loaded.tasks[0].answers == ("The image does not feature them",), "E is an answer like others"
  assert causes(loaded) == {3: "options are missing", 4: "the answer is the letter of no option", 5: "not an object"}
  table_row = {"index": 0, "image": b64(), "question": "?", **{c: c.lower() for c in "ABCDE"}, "answer": "E",
               "category": "Reasoning/OCR", "l2-category": "x"}
  loaded_ = mme_realworld.load(tsv(tmp_path / "m.tsv", [table_row, {**table_row, "index": 1, "category": "Perception",
                                                                    "l2-category": "OCR"}]))
  assert [(t.kind, t.answers) for t in loaded_.tasks] == [("reasoning/ocr", ("e",)), ("perception/ocr", ("e",))]
  result = mme_realworld.score(loaded_, said(loaded_, **{"0": "(E)", "1": "A. no"}))
  assert result["figures"] == {
      "overall": 0.5, "perception": {"accuracy": 0.0, "mean_of_subtasks": 0.0, "subtasks": {"ocr": 0.0}},
      "reasoning": {"accuracy": 1.0, "mean_of_subtasks": 1.0, "subtasks": {"ocr": 1.0}}}


def test_treebench(tmp_path):
  row = {"image": b64(), "question": "What?", "multi-choice options": '"A. red\nB. blue\n"', "answer": "B",
         "category": "Perception/OCR", "target_instances": "[[0,0,10,10],[20,0,30,10]]"}
  path = tsv(tmp_path / "t.tsv", [row, {**row, "target_instances": "[[0,0,10]]"},
                                  {**row, "target_instances": "nonsense"},
                                  {**row, "multi-choice options": "red or blue"}])
  loaded = treebench.load(path)
  assert causes(loaded) == {2: "a box is not four numbers", 3: "target_instances is not a list of boxes",
                            4: "options are missing"}
  assert loaded.tasks[0].boxes == (types.Box(0, 0, 10, 10), types.Box(20, 0, 30, 10))
  raw = "<think><box>[0,0,10,10]</box> and <box>[20, 0, 30, 10]</box></think>"
  assert treebench.written(raw) == (types.Box(0, 0, 10, 10),), "with spaces it is not the publishers' form"
  result = treebench.score(loaded, {"0": [rows_lib.Prediction("B", treebench.written(raw))]})
  assert result["figures"]["mIoU"] == pytest.approx(1 / 2) and result["figures"]["accuracy"] == 1.0
  half = (types.Box(0, 0, 10, 5), types.Box(0, 0, 100, 100))
  assert treebench.mean_iou(half, loaded.tasks[0].boxes) == pytest.approx((50 / 100 + 100 / 10000) / 2)
  assert treebench.mean_iou((), loaded.tasks[0].boxes) == 0.0


def test_visualprobe(tmp_path):
  put(tmp_path / "a.png", picture())
  row = {"problem": "<image>\nWhat is the number?", "solution": "42", "images": ["a.png"], "doc_id": 0,
         "data_source": "hard"}
  path = put(tmp_path / "v.json", [row, {**row, "solution": "7", "images": "a.png"}, {**row, "images": []},
                                   {**row, "images": ["a.png", "b.png"]}, {**row, "doc_id": 9, "problem": "<image>"}])
  loaded = visualprobe.load(path)
  assert [t.uid for t in loaded.tasks] == ["row 1", "row 2"]
  assert {t.question for t in loaded.tasks} == {"What is the number?"}
  assert causes(loaded) == {3: "not one image", 4: "not one image", 5: "problem is empty"}
  samples = {"row 1": ["42", "42.0", "7", "8"], "row 2": ["1", "2", "7", "2"]}
  result = visualprobe.score(loaded, {uid: [rows_lib.Prediction(t) for t in texts] for uid, texts in samples.items()})
  assert result["figures"]["average"] == pytest.approx((2 / 4 + 1 / 4) / 2)
  assert result["figures"]["majority"] == pytest.approx(1 / 2) and result["figures"]["samples"] == [4, 4]
  assert result["figures"]["levels"] == {"hard": pytest.approx(3 / 8)} and result["n"] == 2


def test_records_with_rules_of_their_own(tmp_path):
  put(tmp_path / "a.png", picture())
  record = {"image": "a.png", "question": "?", "answers": ["3 km"], "task": "length"}
  lines = [record, {**record, "match": "number"}, {**record, "match": "number:10%"}, {**record, "match": "fuzzy"},
           {**record, "match": "yes_no"}, {**record, "image": "b.png"}, {**record, "match": 3}]
  path = put(tmp_path / "r.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
  loaded = records.load(path)
  assert [t.match for t in loaded.tasks] == ["exact", "number", "number:10%"]
  assert causes(loaded) == {4: "no such match", 5: "no answer that its match can take", 6: "no image file",
                            7: "bad match"}
  result = records.score(loaded, {t.uid: [rows_lib.Prediction("3100 m")] for t in loaded.tasks})
  assert [r["score"] for r in result["rows"]] == [0, 0, 1]
  assert result["figures"]["kinds"] == {"length": pytest.approx(1 / 3)}


# --- all of them


def test_options_in_a_text():
  assert choices.block("A. red\nB. blue and\nC. x") == ("red", "blue and", "x")
  assert choices.asked("Which?\nTwo lines\n(A) x\n(B) y\nAnswer.") == ("Which?\nTwo lines", ("x", "y"))


def test_needle_is_drawn(monkeypatch):
  monkeypatch.setattr(needle.needle, "Config", functools.partial(needle.needle.Config, test_size=6))
  loaded = needle.load("")
  again = {t.uid: (t.image, t.answers) for t in needle.load("").tasks}
  assert len(again) == len(loaded.tasks) == 6 and again == {t.uid: (t.image, t.answers) for t in loaded.tasks}
  assert needle.score(loaded, {t.uid: [rows_lib.Prediction(t.answers[0])] for t in loaded.tasks})["score"] == 1.0


@pytest.mark.parametrize("name", [name for name in table.BENCHMARKS if name != "needle"])
def test_what_is_there_is_said_where_nothing_is(name, tmp_path):
  with pytest.raises(ValueError):
    table.BENCHMARKS[name].load(str(tmp_path / "nothing.json"))


def test_a_verdict_counts_in_place_of_the_rule():
  task = types.Task("t", "", "?", ("red",))
  loaded = rows_lib.Loaded((task,))
  scores = lambda *found: [r["score"] for r in rows_lib.scored(loaded, {"t": found})]
  assert scores(rows_lib.Prediction("crimson", verdict=1.0), rows_lib.Prediction("red", verdict=0.0),
                rows_lib.Prediction("red")) == [1.0, 0.0, 1.0]
