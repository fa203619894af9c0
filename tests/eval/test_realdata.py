"""Real files of benchmarks, and real predictions with figures that others computed."""

import csv
import json

import pytest

from tests import realdata
from virl_jax import evaluate
from virl_jax.data import tables
from virl_jax.eval import predictions
from virl_jax.eval.benchmarks import docvqa
from virl_jax.eval.benchmarks import hrbench
from virl_jax.eval.benchmarks import infographicsvqa
from virl_jax.eval.benchmarks import mme_realworld
from virl_jax.eval.benchmarks import pope
from virl_jax.eval.benchmarks import records
from virl_jax.eval.benchmarks import rows as rows_lib
from virl_jax.eval.benchmarks import textvqa
from virl_jax.eval.benchmarks import vstar

pytestmark = realdata.needed
NATIVE, FORMATS, PREDICTIONS = realdata.NATIVE, realdata.FORMATS, realdata.NATIVE / "predictions"
BARE = rows_lib.How(need_images=False, seed=None)


@pytest.fixture(scope="module")
def expected():
  return realdata.expected()


def kinds(loaded):
  return {kind: sum(t.kind == kind for t in loaded.tasks) for kind in {t.kind for t in loaded.tasks}}


# --- counts of all formats


def test_vstar(expected):
  e = expected["vstar"]
  loaded = vstar.load(str(NATIVE / "vstar" / "annotation_vstar.json"), BARE)
  assert loaded.n_rows == len(loaded.tasks) == e["records"] and kinds(loaded) == e["by_type"]
  assert sum(len(t.boxes) for t in loaded.tasks) == e["boxes_xywh"]
  assert {str(n): sum(len(t.options) == n for t in loaded.tasks) for n in (2, 4)} == e["options_per_record"]
  assert all(t.answers == t.options[:1] for t in loaded.tasks)
  folders = vstar.load(str(NATIVE / "vstar"), BARE)
  assert len(folders.tasks) == e["per_image_json"]
  whole = {t.uid: t for t in loaded.tasks}
  assert all((t.options, t.boxes, t.question) == (whole[t.uid].options, whole[t.uid].boxes, whole[t.uid].question)
             for t in folders.tasks), "both layouts say the same of a question"
  missing = vstar.load(str(NATIVE / "vstar"))
  assert len(missing.tasks) == e["images_present"]
  assert {r.cause for r in missing.rejects} == {"no image file"} and len(missing.rejects) == e["per_image_json"]


def test_vstar_as_others_publish_it():
  folders = {t.uid: t for t in vstar.load(str(FORMATS / "vstar")).tasks}
  lines = {t.uid: t for t in vstar.load(str(FORMATS / "vstar" / "test_questions.jsonl")).tasks}
  table = vstar.load(str(FORMATS / "vstar" / "VStarBench.tsv"))
  assert len(folders) == len(lines) == len(table.tasks) == 8 and not table.rejects and set(folders) == set(lines)
  for uid, task in lines.items():
    assert task.question == folders[uid].question
    # The short option is part of the other layout's sentence, and the letters differ.
    assert task.answers[0].lower() in folders[uid].answers[0].lower()
  assert {t.options.index(t.answers[0]) for t in lines.values()} != {0}


@pytest.mark.parametrize("name, rows, groups", [("hr_bench_4k", 8, 2), ("hr_bench_8k", 4, 1)])
def test_hrbench_s_tables(name, rows, groups):
  loaded = hrbench.load(str(FORMATS / "hrbench" / f"{name}.tsv"))
  assert len(loaded.tasks) == loaded.n_rows == rows and len({t.image for t in loaded.tasks}) == groups
  assert len({(t.question, t.answers) for t in loaded.tasks}) == groups, "the right text is the same in each cycle"


def test_hrbench_s_json(expected):
  e = expected["hrbench"]
  loaded = hrbench.load(str(NATIVE / "hrbench" / "annotation_hr-bench_4k.json"), BARE)
  assert len(loaded.tasks) == loaded.n_rows == e["rows_after_expansion"]
  assert {kind: n // 4 for kind, n in kinds(loaded).items()} == e["by_category"]
  texts = {}
  for task in loaded.tasks:
    texts.setdefault(int(task.uid) // 4, set()).add(task.answers[0])
    assert len(task.options) == 4
  assert len(texts) == e["groups"] and all(len(found) == 1 for found in texts.values())
  assert sorted(loaded.group.values()) == sorted("0123" * e["groups"])


def test_pope_s_variants(expected):
  loaded = pope.load(str(NATIVE / "pope_variants"), BARE)
  names = {"POPEv2": "POPEv2"} | {f"{of}/{split}": f"{of}_{split}" for of in ("gqa", "aokvqa") for split in pope.SPLITS}
  assert set(loaded.group.values()) == set(names) and not loaded.rejects
  for group, name in names.items():
    e, found = expected["pope_variants"][name], [t for t in loaded.tasks if loaded.group[t.uid] == group]
    labels = {k.lower(): v for k, v in e.get("labels", e).items()}
    assert len(found) == e["records"]
    assert [sum(t.answers == (label,) for t in found) for label in ("yes", "no")] == [labels["yes"], labels["no"]]
    assert len({t.image for t in found}) == e.get("images", e.get("image_names"))


def test_pope_s_coco_files():
  whole = pope.load(str(FORMATS / "pope" / "real_full"), BARE)
  assert len(whole.tasks) == 9000 and kinds(whole) == {f"coco/{split}": 3000 for split in pope.SPLITS}
  assert sum(t.answers == ("yes",) for t in whole.tasks) == 4500
  assert len(pope.load(str(FORMATS / "pope" / "subset"), BARE).tasks) == 54
  assert not pope.load(str(FORMATS / "pope" / "subset")).tasks


def test_textvqa(expected):
  e = expected["textvqa"]
  for name, file in (("0.5.1", "TextVQA_0.5.1_val.json"), ("v0.1", "TextVQA_with_url_val_v0.1.json")):
    loaded = textvqa.load(str(NATIVE / "textvqa" / file), BARE)
    assert len(loaded.tasks) == loaded.n_rows == e[name]["records"]
    assert sum(len(t.answers) for t in loaded.tasks) == e[name]["answers"]
    assert len({t.image for t in loaded.tasks}) == e[name]["images"]
  counts = {}
  for task in loaded.tasks:
    counts[str(len(task.answers))] = counts.get(str(len(task.answers)), 0) + 1
  assert counts == e["v0.1"]["answer_counts"]


def test_docvqa_and_infographicsvqa(expected):
  e = expected["docvqa"]
  path = str(NATIVE / "docvqa" / "val_v1.0.json")
  loaded = docvqa.load(path, BARE)
  assert len(loaded.tasks) == e["records"] and sum(len(t.answers) for t in loaded.tasks) == e["answers"]
  assert len({t.image for t in loaded.tasks}) == e["images_named"]
  present = docvqa.load(path)
  assert len(present.tasks) == e["records_with_image"] and len({t.image for t in present.tasks}) == e["images_present"]
  assert len(present.rejects) == e["records"] - e["records_with_image"] and present.rejects[0].name == "49153"
  e = expected["infographicsvqa"]["annotation"]
  loaded = infographicsvqa.load(str(NATIVE / "infographicsvqa" / "infographicsVQA_val_v1.0.json"), BARE)
  assert len(loaded.tasks) == e["records"] and sum(len(t.answers) for t in loaded.tasks) == e["answers"]


def test_mme_realworld(expected):
  e = expected["mme_realworld"]
  loaded = mme_realworld.load(str(NATIVE / "mme_realworld" / "output_test_template.json"), BARE)
  assert len(loaded.tasks) == e["records"] and sum(len(t.options) for t in loaded.tasks) == e["options"]
  assert sum(t.options.index(t.answers[0]) == 4 for t in loaded.tasks) == e["E_is_right"]


def test_records():
  loaded = records.load(str(realdata.ROOT / "records.jsonl"))
  assert len(loaded.tasks) == loaded.n_rows == 94


# --- scores of others' predictions


def test_pope_s_agreement(expected):
  folder = PREDICTIONS / "pope_llava15_13b"
  result, read = evaluate.score(str(folder / "answers.jsonl"), "pope", str(folder / "gt"))
  assert read.layout == "LLaVA" and not read.strange and not read.rejects
  for split in pope.SPLITS:
    assert result["figures"]["splits"][f"coco/{split}"] == pytest.approx(
        expected["predictions"][f"pope_llava15_13b/{split}"], abs=1e-12)
  published = json.loads((folder / "published.json").read_text())
  for split, f1 in published["F1"].items():
    assert 100 * result["figures"]["splits"][f"coco/{split}"]["F1"] == pytest.approx(f1, abs=0.1)
  assert round(100 * result["score"], 1) == published["average_F1"]
  assert result["evaluated"]["share"] == 1.0


def test_answers_for_another_release_of_pope_are_refused():
  with pytest.raises(ValueError, match="in their order. Received: 2910 answers for 3000 questions"):
    evaluate.score(str(PREDICTIONS / "pope_llava15_13b" / "answers.jsonl"), "pope",
                   str(FORMATS / "pope" / "real_full"))


def test_answers_with_prompts_show_that_they_are_in_step():
  """The first hundred of the adversarial split, some of whose questions had a typing error."""
  path = PREDICTIONS / "pope_llava15_13b" / "native_sample_answers.jsonl"
  result, _ = evaluate.score(str(path), "pope", str(FORMATS / "pope" / "real_full"))
  assert result["n"] == len(realdata.lines(path)) == 100 and result["evaluated"]["without_prediction"] == 8900
  assert result["figures"]["splits"]["coco/adversarial"]["n"] == 100


def test_textvqa_s_agreement(expected):
  e = expected["predictions"]["textvqa_llava15_13b"]
  truth = str(PREDICTIONS / "textvqa_gt" / "textvqa_0.5.1_val_answers.jsonl")
  result, read = evaluate.score(str(PREDICTIONS / "textvqa_llava15_13b" / "answers.jsonl"), "textvqa", truth)
  assert read.loaded.n_rows == expected["predictions"]["textvqa_gt"]["records"]
  assert result["n"] == e["joined_by_image_and_question"] == e["rows"] and not read.strange
  assert 100 * result["score"] == pytest.approx(e["official_accuracy_pct"], abs=1e-9)
  assert round(100 * result["score"], 1) == e["published"]
  sample, _ = evaluate.score(str(PREDICTIONS / "textvqa_llava15_13b" / "native_sample_answers.jsonl"), "textvqa", truth)
  assert sample["n"] == 100 and {r["uid"]: r["score"] for r in sample["rows"]}.items() <= {
      r["uid"]: r["score"] for r in result["rows"]}.items(), "prompts and questions say the same"


def test_docvqa_s_agreement(expected):
  e = expected["predictions"]["docvqa_qwen2_vl_7b_instruct"]
  result, read = evaluate.score(str(PREDICTIONS / "docvqa_qwen2_vl_7b_instruct" / "results.json"), "docvqa")
  assert result["n"] == e["rows"] and result["score"] == pytest.approx(e["official_ANLS"], abs=1e-12)
  assert read.layout == "with references"


def test_hrbench_s_agreement(expected):
  e = expected["predictions"]["hrbench4k_llava15/hr_4k_baseline.jsonl"]
  result, _ = evaluate.score(str(PREDICTIONS / "hrbench4k_llava15" / "hr_4k_baseline.jsonl"), "hrbench4k")
  figures = result["figures"]
  assert result["n"] == e["rows"]
  assert {k: 100 * v for k, v in figures["cycles"].items()} == pytest.approx(e["per_cycle"])
  for ours, theirs in (("single", "single"), ("cross", "cross"), ("pooled", "pooled"),
                       ("mean_of_categories", "overall_mean_of_two")):
    assert 100 * figures[ours] == pytest.approx(e[theirs])
  assert 100 * figures["average"] == pytest.approx(sum(e["per_cycle"].values()) / 4)


def test_hrbench_s_predictions_go_with_the_benchmark_s_own_file():
  path = str(PREDICTIONS / "hrbench4k_llava15" / "hr_4k_baseline.jsonl")
  alone, _ = evaluate.score(path, "hrbench4k")
  result, read = evaluate.score(path, "hrbench4k", str(NATIVE / "hrbench" / "annotation_hr-bench_4k.json"))
  assert result["n"] == 400 and len(read.strange) == 400, "the sample has half of the questions"
  by_uid = {r["uid"]: r["score"] for r in alone["rows"]}
  assert all(by_uid[r["uid"]] == r["score"] for r in result["rows"])


def test_vstar_s_agreement_with_a_judge_row_by_row(expected):
  e = expected["predictions"]["vstar_deepeyes/direct_attributes"]
  path = PREDICTIONS / "vstar_deepeyes" / "result_direct_attributes_deepeyes_acc.jsonl"
  result, read = evaluate.score(str(path), "vstar")
  assert result["n"] == e["rows"] and 100 * result["score"] == pytest.approx(e["accuracy_pct"])
  assert 100 * result["score"] == pytest.approx(e["final_acc.json"])
  assert [row["score"] for row in result["rows"]] == [line["acc"] for line in realdata.lines(path)]
  assert {t.options.index(t.answers[0]) for t in read.loaded.tasks} == {0}, "the right one is at A in every row"


@pytest.mark.parametrize("name", ["vstar_448_448", "vstar_crop", "vstar_pooling_336_336"])
def test_vstar_s_agreement_with_verdicts_row_by_row(expected, name):
  folder = PREDICTIONS / "vstar_llava15_options"
  e = expected["predictions"][f"vstar_llava15_options/{name}.jsonl"]
  result, _ = evaluate.score(str(folder / f"{name}.jsonl"), "vstar")
  figures = {kind: 100 * figure for kind, figure in result["figures"].items()}
  assert figures == pytest.approx(e["accuracy_pct"] | {"overall": e["overall_pct"]}) and result["n"] == e["rows"]
  with open(folder / "results_vstar.csv", newline="") as file:
    verdicts = {f"{row['test_type']}/{row['input_image']}": float(row[name]) for row in csv.DictReader(file)}
  assert {row["uid"]: row["score"] for row in result["rows"]} == verdicts


def test_vstar_s_letters_are_carried_to_options_in_another_order(expected):
  """Our options are shuffled; the predictions' letters refer to their own prompts."""
  shuffled = vstar.load(str(NATIVE / "vstar" / "annotation_vstar.json"), rows_lib.How(need_images=False, seed=3))
  path = str(PREDICTIONS / "vstar_deepeyes" / "result_direct_attributes_deepeyes_acc.jsonl")
  read = predictions.read(path, "vstar", shuffled)
  rows = vstar.score(read.loaded, read.predictions)["rows"]
  verdicts = {f"direct_attributes/{line['image'][:-4]}": line["acc"] for line in realdata.lines(
      PREDICTIONS / "vstar_deepeyes" / "result_direct_attributes_deepeyes_acc.jsonl")}
  assert len(rows) == expected["vstar"]["by_type"]["direct_attributes"]
  assert [row["score"] for row in rows] == [verdicts[row["uid"]] for row in rows]


def test_short_options_of_another_layout_are_not_taken_for_its_letters():
  with pytest.raises(ValueError, match="none of 115 rows is about one"):
    evaluate.score(str(PREDICTIONS / "vstar_deepeyes" / "result_direct_attributes_deepeyes_acc.jsonl"), "vstar",
                   str(FORMATS / "vstar" / "test_questions.jsonl"))


def test_mme_realworld_s_template(expected):
  path = str(NATIVE / "mme_realworld" / "output_test_template.json")
  for data in (None, path):
    result, _ = evaluate.score(path, "mme_realworld", data)
    assert result["score"] == pytest.approx(expected["mme_realworld"]["correct"] / expected["mme_realworld"]["records"])


def test_a_submission_for_other_questions_is_refused(expected):
  path = NATIVE / "infographicsvqa" / "submission_sample.json"
  assert len(tables.json_rows(str(path))) == expected["infographicsvqa"]["submission"]["rows"]
  with pytest.raises(ValueError, match="none of 40 rows is about one .submission: '98439', '90984'.*named as '98313'"):
    evaluate.score(str(path), "infographicsvqa", str(NATIVE / "infographicsvqa" / "infographicsVQA_val_v1.0.json"))
  with pytest.raises(ValueError, match="must come with the benchmark's own files .--data."):
    evaluate.score(str(path), "infographicsvqa")


def test_predictions_for_another_benchmark_are_refused():
  with pytest.raises(ValueError, match="must have predictions for vstar in one of these layouts: DeepEyes .*Received: "
                                       "rows with answer_id, metadata, model_id, prompt, question_id, text"):
    evaluate.score(str(PREDICTIONS / "gqa_llava15_13b_no_gt" / "answers_sample.jsonl"), "vstar")
