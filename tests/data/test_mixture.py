"""Weights and easy first: exact over rounds, pure in (seed, step), every task once an epoch of its set."""

import collections
import json
import os
import pathlib
import socket
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from tests.data.sources import test_sets
from virl_jax import config
from virl_jax import types
from virl_jax.data import batches
from virl_jax.data import mixture
from virl_jax.data import order
from virl_jax.data.sources import sets
from virl_jax.run import hosts
from virl_jax.run import setup
from virl_jax.run import sources
from virl_jax.tiny import needle


def a_plan(weights, sizes, **how):
  starts = np.cumsum([0, *sizes])
  return mixture.Plan(tuple(mixture.Part(f"s{i}", np.arange(a, b), w) for i, (w, a, b) in enumerate(
      zip(weights, starts, starts[1:]))), **how)


def walked(plan, steps, batch, seed=0):
  return np.concatenate([plan.due(seed, step, batch) for step in range(steps)])


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 9)), min_size=1, max_size=4).filter(
    lambda parts: any(w for w, _ in parts)), st.integers(1, 11), st.integers(0, 2 ** 32 - 1))
def test_weights_are_exact_over_rounds_and_each_set_has_its_own_epochs(parts, batch, seed):
  weights, sizes = zip(*parts)
  plan, starts, a_round = a_plan(weights, sizes), np.cumsum([0, *sizes]), sum(weights)
  taken = walked(plan, 3 * a_round, batch, seed)  # 3 * batch whole rounds
  which = np.searchsorted(starts, taken, "right") - 1
  for number, (weight, size) in enumerate(parts):
    assert np.sum(which == number) == 3 * batch * weight
    # After whole epochs all tasks have come equally often; in between, their counts differ by at most one.
    counts = np.bincount(taken[which == number] - starts[number], minlength=size)
    assert counts.max() - counts.min() <= 1
  for step in range(3 * a_round):  # and nearly so in each step
    got = np.bincount(which[step * batch:(step + 1) * batch], minlength=len(parts))
    assert np.all(np.abs(got - batch * np.array(weights) / a_round) < len(parts) + 1)


def test_a_walk_is_the_set_s_own_whatever_stands_beside_it():
  """For one set, and so for the first of several, it is the walk without a plan, with a step's places shuffled."""
  alone = a_plan([1], [9])
  for step in (0, 1, 700):
    assert sorted(alone.due(5, step, 4)) == sorted(order.batch_indices(5, step, 9, 4))
  mixed = walked(a_plan([1, 2], [9, 6]), 30, 3, 5)
  assert sorted(mixed[mixed < 9][:27]) == sorted(order.batch_indices(5, 0, 9, 27))


def test_a_step_is_a_function_of_seed_step_and_try():
  plan = a_plan([3, 1], [40, 40])
  again = a_plan([3, 1], [40, 40])
  wanted = [plan.due(1, step, 16).tolist() for step in range(5)]
  assert [again.due(1, step, 16).tolist() for step in (4, 0, 3)] == [wanted[4], wanted[0], wanted[3]]
  others = [plan.due(2, 0, 16).tolist(), plan.due(1, 0, 16, 1).tolist(), plan.due(1, 0, 16, 2).tolist()]
  assert len({tuple(sorted(it)) for it in [wanted[0], *others]}) == 4
  of_first = [sum(i < 40 for i in it) for it in wanted + others]
  assert of_first == [12] * 8, "further tries have the same share of each set"
  # Two sets of the same size are not walked through in the same order.
  both = walked(a_plan([1, 1], [40, 40]), 10, 8)
  assert set(both[both < 40][:20]) != set(both[both >= 40][:20] - 40)


def test_golden():
  # A changed plan would change what a resumed run sees.
  assert a_plan([2, 1], [4, 3]).due(0, 1, 6).tolist() == [1, 3, 2, 0, 5, 5]
  assert mixture._round((3, 1, 0, 2)).tolist() == [0, 3, 0, 1, 3, 0]


def test_places_of_a_set_do_not_stay_with_a_process():
  """With two equal sets, every other place is the first one's: unshuffled, each of two processes would have one set."""
  plan = a_plan([1, 1], [50, 50])
  firsts = [np.mean(plan.due(0, step, 8)[::2] < 50) for step in range(40)]
  assert 0.3 < np.mean(firsts) < 0.7 and not np.isin(firsts, (0, 1)).all()


@pytest.mark.parametrize("weights, places", [
    (("a:0.3", "b:0.7"), [3, 7]), (("a:2", "b:4"), [1, 2]), (("a:1/3", "b:1"), [1, 3]), (("b:1", "a:0"), [1, 0])])
def test_weights_become_whole_numbers(weights, places):
  names = [word.partition(":")[0] for word in weights]
  assert [mixture.weighted(weights, sorted(names))[name][0] for name in names] == places


def test_weights_name_sets():
  names = ("gqa-train", "gqa-val", "textvqa-train")
  assert mixture.weighted((), names) == {"all": (1, [0, 1, 2])}
  assert mixture.weighted(("gqa:3", "textvqa-train:1"), names) == {"gqa": (3, [0, 1]), "textvqa-train": (1, [2])}
  assert mixture.weighted(("gqa:3", "gqa-val:2", "textvqa:1"), names) == {
      "gqa": (3, [0]), "gqa-val": (2, [1]), "textvqa": (1, [2])}
  for words, said in ((("gqa:1",), "no weight of textvqa-train"), (("gqa:1", "textvqa:1", "grit:1"), "no set grit"),
                      (("gqa:0", "textvqa:0"), "not all be 0"), (("gqa:1", "textvqa:1e-9"), "at most 100000"),
                      (("gqa", "textvqa:1"), "NAME:NUMBER.*'gqa'"), (("gqa:-1", "textvqa:1"), "0 or more"),
                      (("gqa:nan", "textvqa:1"), "0 or more"), (("gqa:1", "gqa:2"), "one for each name")):
    with pytest.raises(ValueError, match=said):
      mixture.weighted(words, names)
  with pytest.raises(ValueError, match="must have tasks.*none in s1"):
    a_plan([1, 1], [3, 0])
  a_plan([1, 0], [3, 0])


def easy_first(rates, epochs, width, n_plain=0):
  parts = [mixture.Part("rated", np.arange(len(rates)), 1, np.array(rates, float))]
  if n_plain:
    parts.append(mixture.Part("plain", len(rates) + np.arange(n_plain), 1))
  return mixture.Plan(tuple(parts), epochs, width)


def test_easy_first_walks_from_what_is_solved_to_what_is_not():
  rates = np.random.default_rng(0).integers(0, 9, 200) / 8
  taken = walked(easy_first(rates, 2, 0.0), 40, 20)
  assert np.all(np.diff(rates[taken[:400]].reshape(20, 20).mean(1)) <= 0) and rates[taken[:20]].min() == 1
  assert np.all(np.bincount(taken[:400]) == 2), "each task so often as there are epochs"
  assert np.all(np.bincount(taken[400:600]) == 1), "and then once an epoch, as always"
  assert abs(np.corrcoef(rates[taken[400:600]], np.arange(200))[0, 1]) < 0.3
  assert taken.tolist() != walked(easy_first(rates, 2, 0.0), 40, 20, seed=1).tolist()
  plan = easy_first(rates, 2, 0.0)
  assert plan.due(0, 7, 20).tolist() == taken[140:160].tolist()


def test_the_width_says_how_much_is_mixed():
  rates = np.arange(400)[::-1] / 400  # task 0 is the easiest
  for width, most in ((0.0, 0), (0.1, 0.1 * 400), (0.5, 0.5 * 400)):
    first = np.sort(walked(easy_first(rates, 1, width), 1, 8))
    assert first[-1] <= most + 8
  spread = [np.mean(np.abs(walked(easy_first(rates, 1, w), 40, 10) - np.arange(400))) for w in (0.0, 0.1, 0.5, 1.0)]
  assert spread == sorted(spread) and spread[0] < 10


def test_tasks_that_nobody_knows_come_in_the_middle_and_sets_without_rates_as_always():
  rates = np.where(np.arange(90) % 3 == 0, np.nan, np.arange(90) < 45)
  taken = walked(easy_first(rates, 1, 0.0), 9, 10)
  assert np.isnan(rates[taken[30:60]]).all() and set(rates[taken[:30]]) == {1} and set(rates[taken[60:]]) == {0}
  both = walked(easy_first(np.arange(60) / 60, 1, 0.0, n_plain=60), 12, 10)
  rated, plain = both[both < 60], both[both >= 60] - 60
  assert np.corrcoef(rated, np.arange(60))[0, 1] < -0.9 and abs(np.corrcoef(plain, np.arange(60))[0, 1]) < 0.4
  assert np.bincount(plain).tolist() == [1] * 60


class Mixed:
  """Two sets of 8, by a plan; some pictures are broken."""

  def __init__(self, bad=()):
    self.plan, self._bad = a_plan([3, 1], [8, 8]), bad

  def __len__(self):
    return 16

  def task(self, index):
    return types.Task(str(index), b"" if index in self._bad else PNG, "?")


PNG = needle.encode(np.zeros((4, 4, 3), np.uint8))


def test_another_of_the_same_set_stands_in():
  whole, some = ([[int(t.uid) for t in batches.train(Mixed(bad), 0, step, 8, 10 ** 6).tasks] for step in range(8)]
                 for bad in ((), (2, 9)))
  assert any({2, 9} & set(it) for it in whole) and not any({2, 9} & set(it) for it in some)
  assert [[i < 8 for i in it] for it in some] == [[i < 8 for i in it] for it in whole] and sum(
      i < 8 for it in some for i in it) == 48


def test_a_set_without_a_usable_task_gives_its_places_to_the_others():
  drawn = batches.train(Mixed(range(8, 16)), 0, 0, 8, 10 ** 6)
  assert len(drawn.tasks) == 8 and all(int(t.uid) < 8 for t in drawn.tasks) and drawn.passed_over >= 8


@pytest.mark.parametrize("n_processes", [2, 3])
def test_processes_have_parts_of_one_batch(n_processes, monkeypatch):
  """Each decodes its own pictures, none twice, and together they have what one has alone; some are broken."""
  source = Mixed((2, 9))
  alone = [[t.uid for t in batches.train(source, 0, step, 8, 10 ** 6).tasks] for step in range(3)]
  bad_here = {uid: None for uid in ("2", "9")}
  for step in range(3):
    owned = collections.Counter()
    for me in range(n_processes):
      monkeypatch.setattr(hosts, "mine", lambda number, me=me: number % n_processes == me)
      drawn = _agreed(source, step, monkeypatch, bad_here)
      assert [t.uid for t in drawn] == alone[step]
      owned.update(i for i, t in enumerate(drawn) if t.image is not None)
      assert all((t.image is not None) == (i % n_processes == me) for i, t in enumerate(drawn))
    assert owned == collections.Counter(range(8))


def _agreed(source, step, monkeypatch, bad):
  """The tasks of a step on one process, which hears from the others which of their pictures are broken."""
  due = source.plan.due(0, step, 8).tolist()
  stand_in = source.plan.stand_ins()
  now, waiting = dict(enumerate(due)), list(range(8))

  def agree(mine):
    nonlocal waiting
    found = np.array([str(now[place]) in bad for place in waiting])
    assert all(found[i] >= is_bad for i, is_bad in enumerate(mine))
    waiting = [place for place, is_bad in zip(waiting, found) if is_bad]
    for place in waiting:
      now[place] = next(stand_in(due[place]))
    return found

  monkeypatch.setattr(hosts, "agree", agree)
  return batches.train(source, 0, step, 8, 10 ** 6).tasks


def drawn_by_one(path, begin):
  """What the steps from `begin` to 4 hold, and which pictures this process has; printed by each process of a run."""
  source = Mixed((2, 9))
  feed = batches.Feed(source, 0, 8, 10 ** 6, threads=2)
  steps = {step: [(t.uid, t.image is not None) for t in feed.batch(step)] for step in range(begin, 4)}
  tries = [(t.uid, t.image is not None) for t in feed.further(3, 1)]
  feed.close()
  path.write_text(json.dumps({"steps": steps, "tries": tries, "skipped": feed.skipped}))


@pytest.mark.slow
def test_two_processes_that_go_on_have_what_one_has(tmp_path):
  """With JAX's own gathering, from step 2 on, and broken pictures on both processes."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  code = """
import pathlib, sys
from virl_jax.run import hosts
hosts.join(sys.argv[1], 2, int(sys.argv[2]), 100)
from tests.data import test_mixture
test_mixture.drawn_by_one(pathlib.Path(sys.argv[3]), 2)
"""
  root = pathlib.Path(__file__).parents[2]
  started = [subprocess.Popen([sys.executable, "-c", code, f"127.0.0.1:{port}", str(i), str(tmp_path / f"{i}.json")],
                              cwd=root, env=dict(os.environ, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1",
                                                 PYTHONPATH=str(root))) for i in range(2)]
  assert [p.wait(200) for p in started] == [0, 0]
  drawn_by_one(tmp_path / "alone.json", 0)
  alone, *each = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "0", "1"))
  assert each[0]["skipped"] == each[1]["skipped"] > 0
  for step, want in [*list(alone["steps"].items())[2:], ("tries", alone["tries"])]:
    one, two = (e["tries"] if step == "tries" else e["steps"][step] for e in each)
    assert [uid for uid, _ in one] == [uid for uid, _ in two] == [uid for uid, _ in want]
    assert [has for _, has in one] == [not has for _, has in two] == [True, False] * 4


# --- a run's source ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
  """Two sets of pictures, 40 and 20 tasks, and how often each task was solved, except for some of the second."""
  folder, lines = tmp_path_factory.mktemp("curated"), []
  for name, numbers in (("big-train", range(40)), ("small-train", range(100, 120))):
    for task in test_sets.write(folder / name, [test_sets.a_task(i, PNG + b"%d" % i) for i in numbers]):
      number = int(task.uid[1:])
      lines.append({"provenance": task.provenance, "pass_with": None if number % 4 == 3 else number % 100 / 40})
  (folder / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def a_config(path, **changes):
  c = config.default()
  c.data.source, c.data.path, c.data.eval_fraction = "set", str(path), 0.25
  c.update_from_flattened_dict({f"data.{key}": value for key, value in changes.items()})
  setup.sections(c)
  return c


def uids(source, steps=15, wanted=8):
  return [[t.uid for t in batches.train(source, 0, step, wanted, 10 ** 6).tasks] for step in range(steps)]


def test_a_run_by_weights(curated):
  plain = sources.load(a_config(curated), "train")
  c = a_config(curated, weights=("small:3", "big-train:1"))
  source = sources.load(c, "train")
  taken = uids(source)
  of_small = [sum(len(uid) == 4 for uid in step) for step in taken]
  assert of_small == [6] * 15 and sorted({uid for step in taken for uid in step}) == sorted(
      t.uid for t in plain.tasks)
  assert "weights small 0.75, big-train 0.25" in source.describe() and plain.describe() in source.describe()
  test = sources.load(c, "test")
  assert [t.uid for t in test.tasks] == [t.uid for t in sources.load(a_config(curated), "test").tasks]
  assert test.fingerprint() == source.fingerprint()
  assert not {t.uid for t in test.tasks} & {uid for step in taken for uid in step}
  drawn = batches.held_out(test, 5, 10 ** 6)
  assert len(drawn.tasks) == 5


def test_held_out_tasks_of_their_own(curated, tmp_path):
  c = a_config(curated / "big-train", eval_path=str(curated / "small-train"))
  train, test = sources.load(c, "train"), sources.load(c, "test")
  small, big = (sets.load(curated / name, "all", 0.2, 0) for name in ("small-train", "big-train"))
  assert [t.uid for t in test.tasks] == [t.uid for t in small.tasks]
  assert {t.uid for t in train.tasks} == {t.uid for t in big.tasks} and len(train) == len(big)
  assert uids(train) == uids(big)  # in the same order as by itself
  assert f"held out: {small.describe()}" in train.describe()
  other = sources.load(a_config(curated / "big-train", eval_path=str(curated)), "train")
  assert len({train.fingerprint(), other.fingerprint(), big.fingerprint()}) == 3
  weights = ("small:3", "big-train:1")
  weighted = sources.load(a_config(curated, eval_path=str(curated / "small-train"), weights=weights), "train")
  assert [sum(len(uid) == 4 for uid in step) for step in uids(weighted)] == [6] * 15
  assert "weights small 0.75" in weighted.describe() and "held out: " in weighted.describe()
  with pytest.raises(ValueError, match="a set must be finished.*nowhere"):
    sources.load(a_config(curated, eval_path=str(tmp_path / "nowhere")), "test")


def test_the_fingerprint_is_of_all_that_decides_who_comes(curated, tmp_path):
  of = lambda path=curated, **changes: sources.load(a_config(path, **changes), "train").fingerprint()
  found = [of(), of(weights=("small:3", "big:1")), of(weights=("small:2", "big:1")), of(easy_first_epochs=1),
           of(easy_first_epochs=2), of(easy_first_epochs=1, easy_first_width=0.5)]
  assert len(set(found)) == len(found) and of(weights=("big:2", "small:6")) == found[1]
  by_size = sources.load(a_config(curated), "train")
  assert not hasattr(by_size, "plan"), "by size all is as it was before there were weights"
  text = (curated / "tasks.jsonl").read_text()
  other = tmp_path / "moved"
  other.mkdir()
  for name in ("big-train", "small-train"):
    (other / name).symlink_to(curated / name)
  (other / "tasks.jsonl").write_text(text)
  assert of(other, easy_first_epochs=1) == found[3]
  (other / "tasks.jsonl").write_text(text.replace("0.25", "0.2"))
  assert of(other, easy_first_epochs=1) != found[3] and of(other) == found[0]


def test_a_run_from_easy_to_hard(curated):
  c = a_config(curated, easy_first_epochs=1, easy_first_width=0.0)
  source = sources.load(c, "train")
  known = {json.loads(line)["provenance"]: json.loads(line)["pass_with"]
           for line in (curated / "tasks.jsonl").read_text().splitlines()}
  rates = [known[t.provenance] for step in range(5) for t in batches.train(source, 0, step, 9, 10 ** 6).tasks]
  means = [np.mean([rate for rate in rates[at:at + 9] if rate is not None] or [np.nan]) for at in range(0, 45, 9)]
  assert means[0] > 0.8 and means[-1] < 0.2 and np.nanmax(np.diff([m for m in means if m == m])) <= 0
  n_known = sum(known[t.provenance] is not None for t in source.tasks)
  assert n_known < len(source)
  assert f"easy first in epochs up to 1, by pass rates of {n_known} tasks" in source.describe()


def test_records_files_by_weight(tmp_path):
  for name, count in (("few", 6), ("many", 24)):
    lines = []
    for i in range(count):
      (tmp_path / f"{name}{i}.jpg").write_bytes(PNG)
      lines.append({"image": f"{name}{i}.jpg", "question": "?", "answers": ["a"], "id": f"{name}{i}"})
    (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
  path = f"{tmp_path / 'many.jsonl'},{tmp_path / 'few.jsonl'}"
  source = sources.load(a_config(path, source="jsonl", weights=("few:1", "many:1")), "train")
  taken = uids(source, steps=8)
  assert [sum(uid.startswith("few") for uid in step) for step in taken] == [4] * 8
  plain = sources.load(a_config(path, source="jsonl"), "train")
  assert {uid for step in taken for uid in step} == {t.uid for t in plain.tasks} and not hasattr(plain, "plan")


def test_knobs_that_do_not_go_together_are_refused(curated, tmp_path):
  for changes, said in (({"weights": ("big",)}, "config.data.weights: .*NAME:NUMBER"),
                        ({"weights": ("a:1",), "source": "needle"}, r"data.weights must be \(\) while .*'needle'"),
                        ({"easy_first_epochs": 1, "source": "jsonl"}, "data.easy_first_epochs must be 0 unless"),
                        ({"easy_first_width": 1.5}, "easy_first_width must be a share")):
    with pytest.raises(ValueError, match=said):
      a_config(curated, **changes)
  with pytest.raises(ValueError, match="no weight of small-train; the sets are big-train, small-train"):
    sources.load(a_config(curated, weights=("big:1",)), "train")
  with pytest.raises(ValueError, match="pass rates must lie in tasks.jsonl"):
    test_sets.write(tmp_path / "s", [test_sets.a_task(i, PNG + b"%d" % i) for i in range(9)])
    sources.load(a_config(tmp_path / "s", easy_first_epochs=1), "train")
  line = {"provenance": "00" * 16, "pass_with": 0.5}
  (tmp_path / "tasks.jsonl").write_text(json.dumps(line) + "\n")
  with pytest.raises(ValueError, match="needs pass rates of the sets' tasks. Received: 1 in .* all of other tasks"):
    sources.load(a_config(tmp_path / "s", easy_first_epochs=1), "train")
