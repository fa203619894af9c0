"""Two evaluations: pairing by name, the exact test worked out by hand, and what is refused."""

import json
import math

import numpy as np
import pytest

from virl_jax import types
from virl_jax.eval import compare
from virl_jax.eval import outcome
from virl_jax.eval.benchmarks import hrbench
from virl_jax.eval.benchmarks import pope
from virl_jax.eval.benchmarks import rows as rows_lib


def _rows(scores, **more):
  return [{"uid": uid, "kind": "k" + uid[0], "group": "", "sample": i, "prediction": f"says {s}", "answers": ["x"],
           "score": s} | more for uid, each in scores.items() for i, s in enumerate(each)]


def _side(name, scores, benchmark="vstar", **result):
  return compare.Side(name, {"benchmark": benchmark, "metric": "accuracy", "score": 0.5} | result, _rows(scores))


@pytest.mark.parametrize("better, worse, p", [
    (0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (0, 6, 2 / 64), (3, 1, 10 / 16), (2, 2, 1.0), (10, 2, 2 * 79 / 4096)])
def test_the_exact_test_by_hand(better, worse, p):
  assert outcome.sign_test(better, worse) == pytest.approx(p, abs=1e-15)


def test_the_exact_test_is_the_binomial_s(rng=np.random.default_rng(0)):
  for b, w in rng.integers(0, 300, (20, 2)).tolist():
    tail = sum(math.comb(b + w, i) for i in range(min(b, w) + 1)) / 2 ** (b + w)
    assert outcome.sign_test(b, w) == pytest.approx(min(1.0, 2 * tail), rel=1e-12) == outcome.sign_test(w, b)
  assert 0 < outcome.sign_test(2600, 2400) < 0.01, "thousands of flips, too"
  with pytest.raises(ValueError, match="must be counts. Received: -1 and 2"):
    outcome.sign_test(-1, 2)


def test_a_mean_and_its_interval():
  found = outcome.mean([0.0, 1.0] * 200, 500)
  assert (found["n"], found["value"]) == (400, 0.5)
  assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)
  assert outcome.mean([0.25] * 5) == {"n": 5, "value": 0.25, "low": 0.25, "high": 0.25}
  assert outcome.mean([]) == {"n": 0, "value": None, "low": None, "high": None}


def test_tasks_are_paired_by_name_and_flips_are_named():
  a = _side("A", {"a1": [1], "a2": [0], "b1": [1], "b2": [0]}, model="m", zoom=True)
  b = _side("B", {"b2": [1], "b1": [0], "a2": [1], "a1": [1]}, model="n", zoom=True)
  found = compare.compare(a, b, 200)
  json.dumps(found, allow_nan=False)
  assert (found["n"], found["a"]["value"], found["b"]["value"]) == (4, 0.5, 0.75)
  assert found["difference"]["value"] == 0.25 and found["difference"]["low"] <= 0.25 <= found["difference"]["high"]
  assert (found["gained"], found["lost"], found["p"]) == (2, 1, 1.0) and "p_scores" not in found
  assert [(f["uid"], f["change"], f["said"]) for f in found["flips"]] == [
      ("a2", "gained", ["says 0", "says 1"]), ("b1", "lost", ["says 1", "says 0"]),
      ("b2", "gained", ["says 0", "says 1"])]
  assert {k: (v["n"], v["gained"], v["lost"]) for k, v in found["by_kind"].items()} == {
      "ka": (2, 1, 0), "kb": (2, 1, 1)}
  assert found["differ"] == {"model": ["m", "n"]}


@pytest.mark.parametrize("a, b, names", [
    ("eval/base/vstar", "eval/trained/vstar/", ["base", "trained"]), ("x", "y", ["x", "y"]), ("x", "x", ["x", "x"]),
    ("out/vstar", "out/vstar_without_zoom", ["vstar", "vstar_without_zoom"]), ("/r/a/v", "q/a/v", ["/r", "q"]),
    ("v", "w/v", ["v", "w/v"])])
def test_what_tells_two_folders_apart(a, b, names):
  assert compare.compare(_side(a, {"a": [1]}), _side(b, {"a": [1]}), 10)["names"] == names


def test_what_makes_a_task_hard_for_both_cancels_out():
  hard = {f"a{i}": [i % 2] for i in range(100)}
  better = hard | {f"a{i}": [1] for i in range(0, 20, 2)}
  found = compare.compare(_side("A", hard), _side("B", better), 500)
  assert found["difference"]["value"] == pytest.approx(0.1) and found["difference"]["low"] > 0.03
  assert found["p"] == pytest.approx(2 / 2 ** 10)
  apart = found["a"]["high"] > found["b"]["low"]
  assert apart, "two separate intervals would not have told"


def test_samples_are_one_task_and_scores_in_between_have_a_test_of_their_own():
  found = compare.compare(_side("A", {"a": [1, 0, 0], "b": [0.4], "c": [0.7]}),
                          _side("B", {"a": [1, 1], "b": [0.3], "c": [0.9]}))
  assert found["a"]["value"] == pytest.approx((1 / 3 + 0.4 + 0.7) / 3)
  assert (found["gained"], found["lost"], found["better"], found["worse"], found["p_scores"]) == (1, 0, 2, 1, 1.0)


def _pope(seed, right, images=9, n=60):
  """Scored answers to questions of two splits; the share of right ones is `right`, and less on every other image."""
  rng = np.random.default_rng(seed)
  tasks = tuple(types.Task(f"coco/{split}/{i}", f"{i % images}.jpg", "?", (("yes", "no")[(i // 3) % 2],), kind="x",
                           match="yes_no") for split in ("popular", "random") for i in range(n))
  loaded = rows_lib.Loaded(tasks, group={t.uid: t.uid.rpartition("/")[0] for t in tasks})
  hit = lambda task: rng.random() < right - 0.4 * (int(task.image[:-4]) % 2)
  said = {t.uid: [rows_lib.Prediction(t.answers[0] if hit(t) else {"yes": "no", "no": "yes"}[t.answers[0]])]
          for t in tasks}
  result = pope.score(loaded, said)
  return compare.Side(str(seed), result, result["rows"]), loaded


def _f1(rows):
  """F1 of yes by a second reading, from precision and recall, and the other figures; means over splits."""
  found = []
  for split in ("coco/popular", "coco/random"):
    said, true = (np.array([it == "yes" for it in each]) for each in zip(
        *((r["prediction"], r["answers"][0]) for r in rows if r["group"] == split)))
    hits = (said & true).sum()
    precision, recall = hits / said.sum(), hits / true.sum()
    found.append((2 * precision * recall / (precision + recall), (said == true).mean(), precision, recall))
  return np.mean(found, 0)


def test_the_difference_of_f1_is_paired_and_drawn_by_image():
  """Against a loop that builds each resample of images row by row, and computes F1 in another way."""
  sides = [_pope(1, 0.8), _pope(2, 0.9)]
  loaded = sides[0][1]
  a, b = (compare.Side(side.name, side.result, json.loads(json.dumps(side.result["rows"]))) for side, _ in sides)
  found = compare.compare(a, b, 150, pope.figures)
  json.dumps(found, allow_nan=False)
  image = {t.uid: t.image for t in loaded.tasks}
  names, of_image = list(dict.fromkeys(image[r["uid"]] for r in a.rows)), []
  for side in (a, b):
    of_image.append({name: [r for r in side.rows if image[r["uid"]] == name] for name in names})
  slow = []
  for drawn_N in np.random.default_rng(0).integers(len(names), size=(150, len(names))):
    old, new = (_f1([r for k in drawn_N for r in rows[names[k]]]) for rows in of_image)
    slow.append((*(new - old), old[1], new[1]))
  low, high = np.percentile(slow, (2.5, 97.5), axis=0)
  old, new = _f1(a.rows), _f1(b.rows)
  for k, name in enumerate(("F1", "accuracy", "precision", "recall")):
    it = found["figures"][name]
    assert (it["a"], it["b"], it["value"]) == pytest.approx((old[k], new[k], new[k] - old[k]), abs=1e-12)
    assert (it["low"], it["high"]) == pytest.approx((low[k], high[k]), abs=1e-12), name
  for k, name in ((1, "difference"), (4, "a"), (5, "b")):  # the plain mean of scores, of the same draws
    assert (found[name]["low"], found[name]["high"]) == pytest.approx((low[k], high[k]), abs=1e-12), name
  assert "splits: coco/random: F1" in found["figures"] and "splits: coco/random: TP" not in found["figures"]
  apart = max(it["b"] for it in found["figures"].values()) - min(it["a"] for it in found["figures"].values())
  assert apart > 0, "the two are not the same"


def test_nothing_differs_from_itself():
  side, _ = _pope(3, 0.7)
  found = compare.compare(side, side, 50, pope.figures)["figures"]
  assert found and all((it["value"], it["low"], it["high"]) == (0, 0, 0) for it in found.values())


def test_a_figure_that_one_has_not_has_no_difference():
  """No answer is yes, so there is no precision."""
  a, loaded = _pope(1, 0.8)
  never = pope.score(loaded, {t.uid: [rows_lib.Prediction("no")] for t in loaded.tasks})
  b = compare.Side("never", never, never["rows"])
  it = compare.compare(a, b, 20, pope.figures)["figures"]["precision"]
  assert it["a"] > 0 and (it["b"], it["value"], it["low"], it["high"]) == (None,) * 4


def test_the_cycles_of_a_question_are_drawn_together():
  tasks = tuple(types.Task(str(i), "", "?", ("x",), (), ("x", "y"), "single", "options") for i in range(160))
  loaded = rows_lib.Loaded(tasks, group={t.uid: str(int(t.uid) % 4) for t in tasks})
  sides = []
  for wrong in (2, 3):
    result = hrbench.score(loaded, {t.uid: [rows_lib.Prediction("B" if int(t.uid) // 4 % wrong == 0 else "A")]
                                    for t in tasks})
    sides.append(compare.Side(str(wrong), result, result["rows"]))
  found = compare.compare(*sides, own=hrbench.figures)
  own = found["figures"]["average"]
  assert (own["low"], own["high"]) == pytest.approx((found["difference"]["low"], found["difference"]["high"]))
  apart = np.array([(i % 2 == 0) * 1.0 - (i % 3 == 0) for i in range(40)])
  assert own["high"] - own["low"] == pytest.approx(2 * 1.96 * apart.std() / np.sqrt(40), rel=0.15), "of 40, not of 160"


@pytest.mark.parametrize("b, said", [
    ({"a1": [1], "c": [0]}, "A and B must be of the same tasks. Received: 2 of A that B has no prediction for: a2, a3"),
    ({"a1": [1], "a2": [1], "a3": [0], "new": [1]}, "1 of B that A has no prediction for: new")])
def test_other_tasks_are_refused_by_name(b, said):
  with pytest.raises(ValueError, match=said):
    compare.compare(_side("A", {"a1": [1], "a2": [0], "a3": [1]}), _side("B", b))


def test_what_else_is_refused():
  a = _side("A", {"a": [1]})
  with pytest.raises(ValueError, match="A and B must be of the same benchmark. Received: vstar and pope"):
    compare.compare(a, _side("B", {"a": [1]}, "pope"))
  b = _side("B", {"a": [1]})
  b.rows[0]["answers"] = ["y"]
  with pytest.raises(ValueError, match=r"other accepted answers for 1, such as a: \['x'\] and \['y'\]"):
    compare.compare(a, b)
  with pytest.raises(ValueError, match="must have predictions that were scored. Received: none"):
    compare.compare(_side("A", {}), _side("B", {}))


def _write(folder, scores, **more):
  folder.mkdir(parents=True)
  (folder / "results.json").write_text(json.dumps({"benchmark": "vstar"} | more))
  (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(scores)))


def test_folders_of_one_benchmark_and_of_several(tmp_path):
  for out in ("x", "y"):
    for name in ("pope", "vstar"):
      _write(tmp_path / out / name, {"a": [1]})
  place = lambda *names: str(tmp_path.joinpath(*names))
  (one, other), = compare.pairs(place("x", "vstar"), place("y", "vstar"))
  assert one.name == place("x", "vstar") and other.scores == {"a": 1.0} and one.shown == []
  assert [str(a.folder) for a, _ in compare.pairs(place("x"), place("y"))] == [place("x", "pope"), place("x", "vstar")]
  _write(tmp_path / "y" / "needle", {"a": [1]})
  with pytest.raises(ValueError, match="must have evaluations of the same names. Received: only one has needle"):
    compare.pairs(place("x"), place("y"))
  with pytest.raises(ValueError, match="only one has results.json itself, pope, vstar"):
    compare.pairs(place("x"), place("x", "vstar"))


@pytest.mark.parametrize("spoil, said", [
    (lambda p: None, "no folder"), (lambda p: p.mkdir(), "one without results.json"),
    (lambda p: (_write(p, {"a": [1]}), (p / "rows.jsonl").unlink()), "FileNotFoundError"),
    (lambda p: (_write(p, {"a": [1]}), (p / "rows.jsonl").write_text("{")), "JSONDecodeError"),
    (lambda p: (_write(p, {"a": [1]}), (p / "rows.jsonl").write_text('{"uid": 1}\n')), "KeyError: 'kind'")])
def test_folders_that_are_no_use_are_named(tmp_path, spoil, said):
  _write(tmp_path / "good", {"a": [1]})
  spoil(tmp_path / "bad")
  with pytest.raises(ValueError, match=f"{tmp_path}/bad must .*{said}"):
    compare.pairs(str(tmp_path / "good"), str(tmp_path / "bad"))
