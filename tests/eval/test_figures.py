"""Figures as ratios of sums: values, and intervals that agree with a slow resampling of the same draws."""

import numpy as np
import pytest

from virl_jax import types
from virl_jax.eval import figures
from virl_jax.eval import outcome
from virl_jax.eval.benchmarks import hrbench
from virl_jax.eval.benchmarks import pope
from virl_jax.eval.benchmarks import rows as rows_lib
from virl_jax.eval.benchmarks import table


def _rows(n=60, images=12, seed=0):
  rng = np.random.default_rng(seed)
  return [{"uid": f"u{i}", "image": f"i{i % images}", "part": "ab"[i % 2], "said": int(rng.integers(2)),
           "is": int(rng.integers(2))} for i in range(n)]


def _f1(rows):
  tp = sum(r["said"] and r["is"] for r in rows)
  bottom = sum(r["said"] + r["is"] for r in rows)
  return 2 * tp / bottom if bottom else np.nan


def _tree(rows):
  f1 = lambda found: figures.ratio(found, lambda r: 2 * r["said"] * r["is"], lambda r: r["said"] + r["is"])
  parts = {part: f1([r for r in rows if r["part"] == part]) for part in "ab"}
  return {"whole": f1(rows), "mean": figures.Mean(tuple(parts.values())), "parts": parts, "n": len(rows)}


@pytest.mark.parametrize("by", ["uid", "image"])
def test_values_and_intervals_agree_with_a_loop(by):
  rows = _rows()
  tree, cluster = _tree(rows), {r["uid"]: r[by] for r in rows}
  values = figures.values(tree)
  assert values["n"] == 60 and values["whole"] == pytest.approx(_f1(rows), abs=1e-12)
  split = lambda found: [_f1([r for r in found if r["part"] == part]) for part in "ab"]
  assert values["mean"] == pytest.approx(np.mean(split(rows)), abs=1e-12)
  found = figures.intervals(tree, cluster.get, bootstrap=40, seed=3)
  names = list(dict.fromkeys(cluster[r["uid"]] for r in rows))
  drawn_SN = np.random.default_rng(3).integers(len(names), size=(40, len(names)))
  slow = []
  for drawn_N in drawn_SN:
    sample = [r for k in drawn_N for r in rows if cluster[r["uid"]] == names[k]]
    slow.append((_f1(sample), *split(sample), np.nanmean(split(sample))))
  low, high = np.percentile(slow, (2.5, 97.5), axis=0)
  for k, at in enumerate((found["whole"], found["parts"]["a"], found["parts"]["b"], found["mean"])):
    np.testing.assert_allclose(at, (low[k], high[k]), atol=1e-12)
  assert "n" not in found


def test_what_nothing_is_divided_by_has_no_value():
  nothing = figures.ratio([], lambda r: 1.0)
  never = figures.ratio(_rows(), lambda r: 1.0, lambda r: 0.0)
  tree = {"nothing": nothing, "never": never, "mean": figures.Mean((nothing, never)), "none": figures.Mean(())}
  assert set(figures.values(tree).values()) == {None} == set(figures.intervals(tree, bootstrap=5).values())
  whole = figures.ratio([{"uid": "u"}], lambda r: 1.0)
  assert figures.values({"m": figures.Mean((whole, never))}) == {"m": 1.0}
  assert figures.intervals({}, bootstrap=5) == {}


def test_a_plain_mean_has_the_interval_that_it_had():
  rows = [{"uid": f"u{i}", "score": float(v)} for i, v in enumerate(np.random.default_rng(1).random(50))]
  told = outcome.mean([r["score"] for r in rows])
  low, high = figures.intervals({"m": rows_lib.mean(rows)})["m"]
  assert (low, high) == pytest.approx((told["low"], told["high"]), abs=1e-12)


def _pope(images):
  tasks = tuple(types.Task(f"coco/{split}/{i}", f"{i % images}.jpg", "?", ("yes" if i % 2 else "no",),
                           kind="x", match="yes_no") for split in ("random", "popular") for i in range(120))
  return rows_lib.Loaded(tasks, group={t.uid: t.uid.rpartition("/")[0] for t in tasks})


def test_questions_about_an_image_are_drawn_together():
  """Answers are wrong for a quarter of the images, whatever is asked: fewer images give wider intervals."""
  wide = {}
  for images in (8, 120):
    loaded = _pope(images)
    said = {t.uid: [rows_lib.Prediction("yes" if (t.answers[0] == "yes") == (int(t.image[:-4]) % 4 > 0) else "no")]
            for t in loaded.tasks}
    result = pope.score(loaded, said)
    assert set(result["intervals"]) == {"F1", "accuracy", "precision", "recall", "yes_ratio", "splits"}
    assert set(result["intervals"]["splits"]["coco/random"]) == {"F1", "accuracy", "precision", "recall", "yes_ratio"}
    low, high = result["intervals"]["F1"]
    assert low <= result["score"] <= high
    wide[images] = high - low
  assert wide[8] > 2 * wide[120]


def test_the_cycles_of_a_question_are_drawn_together():
  tasks = tuple(types.Task(str(i), "", "?", ("x",), (), ("x", "y"), "single", "options") for i in range(160))
  loaded = rows_lib.Loaded(tasks, group={t.uid: str(int(t.uid) % 4) for t in tasks})
  said = {t.uid: [rows_lib.Prediction("A" if int(t.uid) // 4 % 2 else "B")] for t in tasks}
  low, high = hrbench.score(loaded, said)["intervals"]["average"]
  assert high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(40), rel=0.1), "as of 40 questions, not of 160"


@pytest.mark.parametrize("name", table.BENCHMARKS)
def test_every_figure_that_is_a_share_has_an_interval(name):
  kind = {"pope": ("yes_no", ("yes",), None), "textvqa": ("vqa", ("red",) * 10, None)}.get(
      name, ("options", ("red",), ("red", "blue")))
  tasks = tuple(types.Task(str(i), "", "?", kind[1], (types.Box(0, 0, 9, 9),), kind[2], f"k{i % 2}/s", kind[0])
                for i in range(12))
  loaded = rows_lib.Loaded(tasks, group={t.uid: str(int(t.uid) % 4) for t in tasks})
  said = {t.uid: [rows_lib.Prediction("red" if i % 3 else "blue", (types.Box(0, 0, 9, 5),))]
          for i, t in enumerate(tasks)}
  result = table.BENCHMARKS[name].score(loaded, said)

  def walk(values, ends):
    for key, value in values.items():
      if isinstance(value, dict):
        walk(value, ends[key])
      elif isinstance(value, float):
        assert ends[key][0] <= value <= ends[key][1], key
      else:
        assert ends.get(key) is None, key

  walk(result["figures"], result["intervals"])
  assert result["intervals"][result["metric"]] is not None
  assert f"  [{100 * result['intervals'][result['metric']][0]:.2f}, " in rows_lib.table(result)


def test_what_most_samples_say():
  task = types.Task("u", "", "?", ("cat",), (), ("dog", "cat"), "k", "options")
  free = types.Task("v", "", "?", ("red",), kind="k")
  loaded = rows_lib.Loaded((task, free))
  said = {"u": [rows_lib.Prediction(t) for t in ("A", "B. cat", "the cat", "dog", "(B)")],
          "v": [rows_lib.Prediction(t) for t in ("blue", "Red.", "green", "red")], "strange": []}
  voted = rows_lib.majority(loaded, said)
  assert {uid: [p.text for p in samples] for uid, samples in voted.items()} == {"u": ["B. cat"], "v": ["Red."]}
  assert rows_lib.vote(["a", "b"]) == 0, "of a tie, what was said first"
  assert pope.says(task, "There is no dog.") == "no" != pope.says(task, "There is a dog")
