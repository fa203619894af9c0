"""Files of predictions in every layout, made here, some of them faulty."""

import json

import pytest

from virl_jax import types
from virl_jax.data import tables
from virl_jax.eval import predictions
from virl_jax.eval.benchmarks import docvqa
from virl_jax.eval.benchmarks import hrbench
from virl_jax.eval.benchmarks import mme_realworld
from virl_jax.eval.benchmarks import pope
from virl_jax.eval.benchmarks import rows as rows_lib
from virl_jax.eval.benchmarks import textvqa
from virl_jax.eval.benchmarks import treebench
from virl_jax.eval.benchmarks import vstar


def lines(tmp_path, rows, name="p.jsonl"):
  path = tmp_path / name
  path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
  return str(path)


def task(uid, answers=("red",), options=("red", "blue"), match="options", **more):
  return types.Task(uid, "", "?", answers, options=options, match=match, **more)


def loaded(*tasks, group=None):
  return rows_lib.Loaded(tasks, (), group or {})


def texts(read):
  return {uid: [p.text for p in found] for uid, found in read.predictions.items()}


def test_our_own(tmp_path):
  about = loaded(task("a"), task("b", options=("blue", "red")), task("c"), task("d"))
  path = lines(tmp_path, [
      {"uid": "a", "answer": "A", "options": ["red", "blue"], "boxes": [[0, 0, 2, 2]]},
      {"uid": "b", "answer": "A", "options": ["red", "blue"]},  # shown in another order than the file's
      {"uid": "c", "answer": None, "text": "A"}, {"uid": "x", "answer": "A"},
      {"uid": "a", "sample": 1, "answer": "B. blue", "options": ["red", "blue"]},
      {"uid": "d", "answer": None, "skipped": "too long"}, {"uid": "a", "answer": 3}, '{"uid": "a", "ans'])
  read = predictions.read(path, "vstar", about)
  assert read.layout == "ours" and texts(read) == {
      "a": ["A", "B"], "b": ["B"], "c": [""], "x": ["A"]}, "no answer is an empty one, whatever was written"
  assert read.predictions["a"][0].boxes == (types.Box(0, 0, 2, 2),)
  assert read.strange == ("x",) and [(r.row, r.cause) for r in read.rejects] == [
      (6, "skipped: too long"), (7, "answer is not text"), (8, "not JSON")]
  result = vstar.score(about, read.predictions)
  assert [(r["uid"], r["sample"], r["score"]) for r in result["rows"]] == [
      ("a", 0, 1), ("a", 1, 0), ("b", 0, 1), ("c", 0, 0)]
  assert result["n"] == 3 and result["evaluated"]["without_prediction"] == 1


def test_options_that_look_like_letters_keep_their_places(tmp_path):
  about = loaded(task("a", ("B",), ("A", "B", "C")))
  path = lines(tmp_path, [{"uid": "a", "answer": "A", "options": ["B", "C", "A"]}])
  assert texts(predictions.read(path, "vstar", about)) == {"a": ["B"]}, "the option 'B', which is at B here"


def test_an_option_that_is_not_there(tmp_path):
  path = lines(tmp_path, [{"uid": "a", "answer": "A", "options": ["pink", "blue"]}, {"uid": "b", "answer": "A"}])
  read = predictions.read(path, "vstar", loaded(task("a"), task("b")))
  assert texts(read) == {"b": ["A"]}
  assert [r.cause for r in read.rejects] == ["picked an option that the benchmark's file has not"]


def test_raw_texts(tmp_path):
  path = lines(tmp_path, [{"uid": "a", "text": "<think><box>[1,2,3,4]</box> A?</think><answer> B </answer>"},
                          {"uid": "b", "text": "<answer>A</answer> no: <answer>red"}, {"uid": "c", "text": "red"}])
  read = predictions.read(path, "treebench", loaded(task("a"), task("b"), task("c")))
  assert texts(read) == {"a": ["B"], "b": ["red"], "c": ["red"]}
  assert read.predictions["a"][0].boxes == (types.Box(1, 2, 3, 4),)
  assert treebench.score(read.loaded, read.predictions)["figures"]["accuracy"] == pytest.approx(2 / 3)


def test_vlmevalkit_s_table(tmp_path):
  path = tmp_path / "m_HRBench4K.tsv"
  path.write_text("index\tquestion\tprediction\n0\tq\tA. red\n1\tq\t\"B\nbecause\"\n2\tq\n")
  read = predictions.read(str(path), "hrbench4k", loaded(task("0"), task("1"), group={"0": "0", "1": "1"}))
  assert read.layout == "VLMEvalKit" and texts(read) == {"0": ["A. red"], "1": ["B\nbecause"]}
  assert [r.cause for r in read.rejects] == ["another number of columns than the header"]
  assert hrbench.score(read.loaded, read.predictions)["figures"]["cycles"] == {"0": 1.0, "1": 0.0}


def test_deepeyes(tmp_path):
  row = {"image": "sa_1.jpg", "question": "What?", "answer": "It is red.", "pred_ans": "A. It is red.", "acc": 1.0,
         "prompt_text": "Question: What?\nOptions: \nA. It is red.\nB. It is blue.\n\nThink first."}
  path = lines(tmp_path, [row, {**row, "image": "sa_2.jpg", "pred_ans": "B"}, {**row, "prompt_text": "?"}],
               "result_relative_position_x.jsonl")
  read = predictions.read(path, "vstar", None)
  assert [t.uid for t in read.loaded.tasks] == ["relative_position/sa_1", "relative_position/sa_2"]
  result = vstar.score(read.loaded, read.predictions)
  assert result["figures"] == {"overall": 0.5, "relative_position": 0.5}
  assert [r.cause for r in read.rejects] == ["options are missing"]
  home = loaded(task("relative_position/sa_1", ("It is red.",), ("It is blue.", "It is red.")))
  read = predictions.read(path, "vstar", home)
  assert vstar.score(home, read.predictions)["score"] == 1.0 and texts(read)["relative_position/sa_1"] == ["B"]


def test_lowest_loss_and_zoomeye(tmp_path):
  row = {"input_image": "direct_attributes/a.jpg", "test_type": "direct_attributes", "question": "?",
         "options": ["x", "y"], "output": 0}
  path = lines(tmp_path, [row, {**row, "input_image": "direct_attributes/b.jpg", "output": 1}, {**row, "output": 2}])
  read = predictions.read(path, "vstar", None)
  assert vstar.score(read.loaded, read.predictions)["score"] == 0.5
  assert [r.cause for r in read.rejects] == ["output is the index of no option"]
  row = {"index": 0, "category": "single", "cycle_category": 0, "answer": ["A", "B"], "output": ["A", "A"]}
  read = predictions.read(lines(tmp_path, [row, {**row, "index": 4, "output": ["A"]}]), "hrbench8k", None)
  assert hrbench.score(read.loaded, read.predictions)["figures"]["cycles"] == {"0": 1.0, "1": 0.0}
  assert [r.cause for r in read.rejects] == ["not as many outputs as answers"]


def pope_tasks(n, splits=("random", "popular"), question="Is there a {}?"):
  tasks = [types.Task(f"coco/{s}/{i + 1}", "", question.format(i), ("yes" if i % 2 else "no",), kind=f"coco/{s}",
                      match="yes_no") for s in splits for i in range(n)]
  return loaded(*tasks, group={t.uid: t.kind for t in tasks})


def test_llava_s_answers_to_pope_go_by_order(tmp_path):
  """Ids have a different offset in each split, and splits may be mixed."""
  rows = [{"question_id": 10_000_000 * k + i, "category": s, "text": f"{s} {i}"} for i in range(3)
          for k, s in enumerate(("popular", "random"))]
  read = predictions.read(lines(tmp_path, rows), "pope", pope_tasks(3))
  assert texts(read) == {f"coco/{s}/{i + 1}": [f"{s} {i}"] for s in ("popular", "random") for i in range(3)}
  with pytest.raises(ValueError, match="in their order. Received: 2 answers for 3 questions; number 1 may be another"):
    predictions.read(lines(tmp_path, rows[:4]), "pope", pope_tasks(3))
  with pytest.raises(ValueError, match="in their order. Received: 3 answers for 2 questions; number 1"):
    predictions.read(lines(tmp_path, rows), "pope", pope_tasks(2))
  read = predictions.read(lines(tmp_path, [*rows, {"category": "other", "text": "x"}]), "pope", pope_tasks(3))
  assert [r.cause for r in read.rejects] == ["a split that the benchmark's files have not"]
  lacking = rows_lib.Loaded(pope_tasks(3).tasks, (rows_lib.Reject(7, "", "no label"),), pope_tasks(3).group)
  with pytest.raises(ValueError, match="none may be missing. Received: 6 of 7 rows can be used; 1 cannot: no label"):
    predictions.read(lines(tmp_path, rows), "pope", lacking)


def test_prompts_tell_which_answers_are_in_step(tmp_path):
  rows = [{"question_id": i, "text": "No", "prompt": f"Is there a {i}?\nAnswer with one word."} for i in range(2)]
  read = predictions.read(lines(tmp_path, rows), "pope", pope_tasks(3, ("random",)))
  assert list(texts(read)) == ["coco/random/1", "coco/random/2"], "the first of three"
  with pytest.raises(ValueError, match="Received: 1 answers for 3 questions; number 1 may be another"):
    predictions.read(lines(tmp_path, rows[1:]), "pope", pope_tasks(3, ("random",)))
  slip = pope_tasks(2, ("random",), "Is there a {} in the image?")
  rows = [{**row, "prompt": f"Is there a {i} in the imange?"} for i, row in enumerate(rows)]
  assert len(texts(predictions.read(lines(tmp_path, rows), "pope", slip))) == 2


def test_splits_of_answers_stand_in_the_file_of_questions(tmp_path):
  rows = [{"question_id": i, "text": f"{i}"} for i in range(4)]
  path = lines(tmp_path, rows, "my_answers.jsonl")
  with pytest.raises(ValueError, match="must say which split an answer is of, .* with its questions in .*my_questions"):
    predictions.read(path, "pope", pope_tasks(2))
  lines(tmp_path, [{"question_id": i, "category": ("random", "popular")[i // 2]} for i in range(4)],
        "my_questions.jsonl")
  assert texts(predictions.read(path, "pope", pope_tasks(2))) == {
      "coco/random/1": ["0"], "coco/random/2": ["1"], "coco/popular/1": ["2"], "coco/popular/2": ["3"]}


def test_llava_s_answers_to_textvqa_have_the_image_s_id(tmp_path):
  make = lambda uid, image, question: types.Task(uid, f"d/{image}.jpg", question, ("x",) * 10, match="vqa")
  about = loaded(make("1", "ab", "What brand?"), make("2", "ab", "What color?"), make("3", "cd", "What brand?"))
  path = lines(tmp_path, [{"question_id": "ab", "prompt": "What color?\nReference OCR: x\nAnswer.", "text": "x"},
                          {"question_id": "ab", "question": "WHAT BRAND?", "text": "y"},
                          {"question_id": "ef", "question": "What brand?", "text": "y"}])
  read = predictions.read(path, "textvqa", about)
  assert texts(read) == {"2": ["x"], "1": ["y"], "ef: what brand?": ["y"]} and read.strange == ("ef: what brand?",)
  assert textvqa.score(about, read.predictions)["score"] == 0.5


def test_submissions(tmp_path):
  about = loaded(task("7", ("x",) * 10, None, "vqa"), task("8", ("x",) * 10, None, "vqa"))
  path = tmp_path / "s.json"
  path.write_text(json.dumps([{"question_id": 7, "answer": "x"}, {"question_id": 9, "answer": ""}]))
  read = predictions.read(str(path), "textvqa", about)
  assert (read.layout, texts(read), read.strange) == ("submission", {"7": ["x"], "9": [""]}, ("9",))
  path.write_text(json.dumps([{"questionId": 7, "answer": "cats"}]))
  read = predictions.read(str(path), "docvqa", loaded(task("7", ("cat",), None, "anls")))
  assert docvqa.score(read.loaded, read.predictions)["score"] == pytest.approx(3 / 4)
  path.write_text(json.dumps([{"questionId": 7, "question": "?", "predicted_answer": None, "ground_truth": ["cat"]},
                              {"questionId": 8, "question": "?", "predicted_answer": "CAT", "ground_truth": ["cat"]}]))
  read = predictions.read(str(path), "infographicsvqa", None)
  assert docvqa.score(read.loaded, read.predictions)["score"] == 0.5, "no prediction is an empty one"


def test_the_template_of_mme_realworld(tmp_path):
  row = {"Question_id": "a", "Image": "a.jpg", "Text": "?", "Answer choices": ["(A) 1", "(B) 2"], "Ground truth": "B",
         "Task": "Perception", "Subtask": "OCR", "Output": "(B) 2"}
  path = tmp_path / "o.json"
  path.write_text(json.dumps([row, {**row, "Question_id": "b", "Output": "A"}, {**row, "Question_id": "c",
                                                                             "Answer choices": []}]))
  read = predictions.read(str(path), "mme_realworld_lite", None)
  assert mme_realworld.score(read.loaded, read.predictions)["score"] == 0.5
  assert [r.cause for r in read.rejects] == ["not a question that can be used"]


@pytest.mark.parametrize("benchmark, row", [
    ("vstar", {"uid": "a", "answer": "A"}), ("pope", {"question_id": 1, "text": "No", "category": "random"}),
    ("textvqa", {"question_id": "a", "text": "x"}), ("docvqa", {"questionId": 1, "answer": "x"}),
    ("hrbench4k", {"index": 0, "prediction": "A"})])
def test_predictions_without_references_need_the_benchmark_s_files(tmp_path, benchmark, row):
  with pytest.raises(ValueError, match="must come with the benchmark's own files .--data.: predictions of the layout"):
    predictions.read(lines(tmp_path, [row]), benchmark, None)


def test_files_of_no_layout(tmp_path):
  with pytest.raises(ValueError, match="predictions for pope in one of these layouts: LLaVA .question_id, text.; "
                                       "ours .answer, uid.*Received: rows with guess, id"):
    predictions.read(lines(tmp_path, [{"id": 1, "guess": "x"}]), "pope", pope_tasks(1))
  with pytest.raises(ValueError, match="must be a JSON array"):
    predictions.read(lines(tmp_path, []), "pope", pope_tasks(1))
  with pytest.raises(ValueError, match="Received: none of 1 rows is about one .ours: 'nobody'; tasks are named as "
                                       "'coco/random/1'"):
    predictions.read(lines(tmp_path, [{"uid": "nobody", "answer": "x"}]), "pope", pope_tasks(1))


def test_pope_scores_what_was_read(tmp_path):
  rows = [{"category": "random", "text": text} for text in ("No", "Yes")]
  read = predictions.read(lines(tmp_path, [{"question_id": i, **row} for i, row in enumerate(rows)]), "pope",
                          pope_tasks(2, ("random",)))
  assert pope.score(read.loaded, read.predictions)["score"] == 1.0


def test_tables_for_others_programs(tmp_path):
  tasks = (task("7", ("blue",), boxes=(types.Box(0, 0, 9, 9),), kind="Perception/OCR"), task("8"), task("9"),
           types.Task("10", "", "Free,\t\"quoted\"?", ("x",)))
  said = {"7": [rows_lib.Prediction("B", (types.Box(0.4, 1.6, 3, 4), types.Box(5, 6, 7, 8)))],
          "8": [rows_lib.Prediction("two\nlines"), rows_lib.Prediction("A")], "10": [rows_lib.Prediction("x")]}
  read = predictions.Read("ours", loaded(*tasks), said)
  path = tmp_path / "t.tsv"
  path.write_text(predictions.table(read, False))
  found = list(tables.tsv(str(path), ("index", "question", "A", "B", "answer", "category", "prediction")))
  assert [(r["index"], r["A"], r["B"], r["answer"], r["prediction"]) for r in found] == [
      ("7", "red", "blue", "B", "B"), ("8", "red", "blue", "A", "two\nlines"), ("10", "", "", "x", "x")]
  assert found[2]["question"] == "Free,\t\"quoted\"?" and found[0]["category"] == "Perception/OCR"
  again = predictions.read(str(path), "treebench", read.loaded)
  assert again.layout == "VLMEvalKit" and texts(again) == {"7": ["B"], "8": ["two\nlines"], "10": ["x"]}
  path.write_text(predictions.table(read, True))
  boxed = predictions.read(str(path), "treebench", read.loaded)
  assert next(tables.tsv(str(path), ()))["prediction"] == (
      "<think><box>[0,2,3,4]</box><box>[5,6,7,8]</box></think><answer>B</answer>")
  assert boxed.predictions["7"][0] == rows_lib.Prediction("B", (types.Box(0, 2, 3, 4), types.Box(5, 6, 7, 8)))
