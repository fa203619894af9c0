"""Curation as a whole: what is left and said of the rest, stopping anywhere, and asking nobody twice.  What a policy
says is played here."""

import json
import pathlib
import threading

import numpy as np
import pytest

from tests import lockstep
from tests.data.curation.test_facts import photo
from tests.data.curation.test_facts import saved
from virl_jax import config as config_lib
from virl_jax import types
from virl_jax.data import images
from virl_jax.data.curation import band
from virl_jax.data.curation import funnel
from virl_jax.data.curation import policy as policy_lib
from virl_jax.data.curation import rules
from virl_jax.data.curation import stages
from virl_jax.data.sources import records
from virl_jax.data.sources import set_files
from virl_jax.data.sources import sets
from virl_jax.eval import asked
from virl_jax.run import hosts
from virl_jax.run import progress
from virl_jax.run import setup

HOSTILE = '<script>alert(1)</script>"'


def make(folder: pathlib.Path, source: str, tasks: list[dict], raw: pathlib.Path | None = None) -> None:
  """A finished set, pictures in it or in a raw folder."""
  made, digests = [], []
  for i, fields in enumerate(tasks):
    data = fields.pop("data")
    image = data
    if raw is not None:
      (raw / f"{i}.png").write_bytes(data)
      image = f"{i}.png"
    it = types.Task(**{"uid": f"{source}{i}", "image": image, "question": f"what is {i}?", "answers": ("red",),
                       "boxes": (types.Box(10, 10, 60, 50),), "source": source, "split": "train", "kind": "k"} | fields)
    digests.append(records.digest(data))
    made.append(types.Task(**vars(it) | {"provenance": records.provenance(
        digests[-1], it.question, it.answers, it.options, it.boxes, it.match)}))
  folder.mkdir(parents=True)
  part = set_files.write_part(folder / "part", made, digests)
  set_files.finish(folder, source, "train", [part], str(raw or ""), {})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Two sets: 30 tasks in one, 6 in a raw folder; by the rules, 5 are to go."""
  tmp_path = tmp_path_factory.mktemp("data")
  raw = tmp_path / "raw"
  raw.mkdir()
  first = [{"data": saved(photo(i))} for i in range(26)]
  first += [{"data": saved(photo(100)), "boxes": (types.Box(0, 0, 320, 200),)},                     # too much
            {"data": b"no picture"},
            {"data": saved(photo(3).resize((200, 150))), "question": "What is 3", "boxes": (types.Box(5, 5, 40, 40),)},
            {"data": saved(photo(101)), "answers": ()}]                                             # no answer
  make(tmp_path / "sets" / "a-train", "a", first)
  make(tmp_path / "sets" / "b-train", "b", [
      {"data": saved(photo(200 + i)), "question": HOSTILE, "answers": (HOSTILE,)} for i in range(5)] + [
      {"data": saved(photo(300)), "boxes": ()}], raw)
  return tmp_path / "sets"


def job(data, out, **fields) -> funnel.Job:
  return funnel.Job(**{
      "data": str(data), "out": str(out), "shard_tasks": 5, "benchmarks": (), "rules": rules.Config(),
      "policy": stages.Policy(4, 2), "band": band.Config(), "image": images.Config(), "factor": 28, "seed": 0} | fields)


class Played:
  """A policy whose answers depend on the task and the seed; some tasks are always solved, some never, some blind."""

  def __init__(self):
    self.asked = []

  def rollout(self, tasks, seeds, samples, zooms):
    assert len(seeds) == len(tasks) * samples
    found = []
    for i, seed in enumerate(seeds):
      task = tasks[i // samples]
      self.asked.append((task.uid, zooms, seed))
      way = int(task.provenance[:2], 16) % 4  # never, always, blind, now and then
      right = way == 1 and zooms or way == 2 and not zooms or way == 3 and zooms and seed % 2
      said = types.Turn("assistant", np.arange(2), action="zoom", region=types.Box(0, 0, 2, 2)) if zooms else None
      found.append(types.Trajectory(task, i, np.zeros(1, np.int32), [said] if said else [], [],
                                    types.StopReason.ANSWERED, task.answers[0] if right else f"no {seed}"))
    return found

  def asker(self, **about) -> policy_lib.Asker:
    return policy_lib.Asker(None, self.rollout, False, {"model": "played"} | about)


@pytest.fixture(autouse=True)
def all_fit(monkeypatch):
  monkeypatch.setattr(asked, "unfit", lambda policy, task: "too long" if task.uid == "a7" else None)


def content(out) -> dict[str, bytes]:
  return {str(p.relative_to(out)): p.read_bytes() for p in sorted(pathlib.Path(out).rglob("*")) if p.is_file()}


def lines(out, name) -> list[dict]:
  return [json.loads(line) for line in (pathlib.Path(out) / f"{name}.jsonl").read_text().splitlines()]


def test_what_is_left_and_what_is_said_of_the_rest(data, tmp_path):
  played, out = Played(), tmp_path / "out"
  counts = funnel.run(job(data, out), played.asker())
  rejects, kept = lines(out, "rejects"), lines(out, "tasks")
  assert len(rejects) + len(kept) == 36 == counts["read"]["all"] and counts["read"]["sources"] == {"a": 30, "b": 6}
  reasons = {line["uid"]: line["reason"] for line in rejects}
  assert reasons["a26"] == "boxes cover too much" and reasons["a27"] == "unusable picture"
  assert reasons["a29"] == "kind of answer" and reasons["b5"] == "no box" and reasons["a7"] == "could not be asked"
  assert {"a3", "a28"} & {uid for uid, why in reasons.items() if why == "near-duplicate"}
  assert {"never solved", "always solved", "solved without zooming"} < set(reasons.values())
  assert {it["reason"]: it["n"]["all"] for it in counts["dropped"]} == {
      reason: list(reasons.values()).count(reason) for reason in reasons.values()}
  assert counts["after"]["rules"]["all"] == 31 and counts["after"]["policy"]["all"] == 30
  assert counts["after"]["filter"] == counts["kept"] and counts["kept"]["all"] == len(kept) > 3
  assert json.loads((out / "counts.json").read_text()) == counts
  for line in kept:
    assert 0.1 <= line["pass_with"] <= 0.9 and line["pass_without"] == 0 and line["zooms"] == 1.0
    assert int(line["provenance"][:2], 16) % 4 == 3, "those that are solved now and then, with zooms"
  n_asked = sum(1 for line in rejects + kept if line["pass_with"] is not None)
  assert n_asked == 30 and len(played.asked) == 30 * 6 and len({seed for _, _, seed in played.asked}) == 180
  # Training reads it.
  c = config_lib.default()
  c.data.source, c.data.path = "set", str(out)
  found = [*setup.source(c, "train").tasks, *setup.source(c, "test").tasks]
  assert sorted(t.uid for t in found) == sorted(line["uid"] for line in kept)
  original = {t.uid: t for name in ("a-train", "b-train") for t in sets.load(data / name, "all", 0.5, 0).tasks}
  for task in found:
    assert vars(task) == vars(original[task.uid]) and images.decode(task.image).size == (320, 240)
  # From easy to hard, by what the policy made of them.
  c.data.easy_first_epochs, c.data.easy_first_width = 1, 0.0
  source, rate_of = setup.source(c, "train"), {line["uid"]: line["pass_with"] for line in kept}
  rates = [rate_of[source.task(source.plan.due(0, step, 1)[0]).uid] for step in range(len(source))]
  assert rates == sorted(rates, reverse=True) and f"by pass rates of {len(source)} tasks" in source.describe()


def test_the_report_has_each_reason_and_no_hostile_text(data, tmp_path):
  out = tmp_path / "out"
  funnel.run(job(data, out), Played().asker())
  page = (out / "report.html").read_text()
  for reason in {line["reason"] for line in lines(out, "rejects")}:
    assert f"Dropped: {reason}" in page
  assert "data:image/" in page and HOSTILE not in page and "&lt;script&gt;" in page


def test_rules_alone(data, tmp_path):
  counts = funnel.run(job(data, tmp_path / "out"))
  assert list(counts["after"]) == ["rules"] and counts["kept"]["all"] == 31
  assert all(line["pass_with"] is None for line in lines(tmp_path / "out", "tasks"))
  assert "Solved with zooms" not in (tmp_path / "out" / "report.html").read_text()


def test_stopped_anywhere_it_ends_as_if_it_had_not_been(data, tmp_path, monkeypatch):
  out = tmp_path / "out"
  funnel.run(job(data, out), Played().asker())
  want = content(out)
  out.rename(tmp_path / "whole")
  write, left = funnel.files.write_bytes, [0]

  def dying(path, data):
    left[0] -= 1
    if left[0] < 0:
      pathlib.Path(f"{path}.tmp").write_bytes(data[:len(data) // 2])
      raise KeyboardInterrupt
    write(path, data)

  monkeypatch.setattr(funnel.files, "write_bytes", dying)
  stops = 0
  while True:
    left[0] = 3  # three files further each time
    try:
      funnel.run(job(data, out), Played().asker())
      break
    except KeyboardInterrupt:
      stops += 1
    if stops > 3:  # the files at the end are written in one go
      left[0] = 10 ** 6
      monkeypatch.setattr(funnel.files, "write_bytes", write)
  found = {name: data for name, data in content(out).items() if not name.endswith(".tmp")}
  assert stops > 3 and found == want


def test_a_shard_that_is_damaged_is_made_again(data, tmp_path):
  out = tmp_path / "out"
  funnel.run(job(data, out), Played().asker())
  want = content(out)
  for i, path in enumerate(sorted((out / ".curate").rglob("*.jsonl"))):
    path.write_bytes((b"", b"{", path.read_bytes()[:-9], path.read_bytes().replace(b'"of"', b'"off"'))[i % 4])
  funnel.run(job(data, out), Played().asker())
  assert content(out) == want


def test_nobody_is_asked_twice(data, tmp_path):
  out, played = tmp_path / "out", Played()
  before = funnel.run(job(data, out), played.asker())
  played.asked.clear()
  after = funnel.run(job(data, out, band=band.Config(most_without=1.0, most_pass=1.0)), played.asker())
  assert not played.asked and after["kept"]["all"] > before["kept"]["all"]
  funnel.run(job(data, out, seed=1), played.asker())
  assert len(played.asked) == 180, "another seed asks again"
  played.asked.clear()
  funnel.run(job(data, out, seed=1), played.asker(step=3))
  assert len(played.asked) == 180, "and so does another policy"


def test_samples_do_not_depend_on_shard_or_company(data, tmp_path):
  few, many, played = tmp_path / "few", tmp_path / "many", (Played(), Played())
  funnel.run(job(data, few), played[0].asker())
  funnel.run(job(data, many, shard_tasks=1000, rules=rules.Config(answer_types=("text", "none"))), played[1].asker())
  assert set(played[0].asked) < set(played[1].asked)


def test_a_set_without_a_task_that_stays_is_no_set(data, tmp_path):
  out = tmp_path / "out"
  funnel.run(job(data, out))
  assert (out / "b-train" / "dataset_info.json").exists()
  funnel.run(job(data, out, rules=rules.Config(most_question_chars=20)))
  assert not (out / "b-train").exists() and (out / "a-train" / "dataset_info.json").exists()
  with pytest.raises(ValueError, match="no task stays of 36: .*32 answer too long.*report.html has examples"):
    funnel.run(job(data, out, rules=rules.Config(most_answer_chars=1, most_question_chars=20)))
  assert not (out / "a-train").exists() and "0 kept" in (out / "report.html").read_text()


def test_folders_that_are_not_its_own_are_left_alone(data, tmp_path):
  (tmp_path / "out" / "a-train").mkdir(parents=True)
  (tmp_path / "out" / "a-train" / "thesis.tex").write_text("mine")
  with pytest.raises(ValueError, match="--out must be a folder of its own.*a-train is there"):
    funnel.run(job(data, tmp_path / "out"))
  assert (tmp_path / "out" / "a-train" / "thesis.tex").exists()
  with pytest.raises(ValueError, match="--out must be on a disk.*gs://b/x"):
    funnel.run(job(data, "gs://b/x"))
  for wrong in (data, data / "a-train" / "x", data.parent):
    with pytest.raises(ValueError, match="--out must be another folder than --data"):
      funnel.run(job(data, wrong))


@pytest.fixture
def benchmark(tmp_path):
  """Two records on pictures of which one is in the data, saved again; and one of which the picture is gone."""
  folder = tmp_path / "bench"
  folder.mkdir()
  (folder / "x.jpg").write_bytes(saved(photo(5), "JPEG", quality=60))
  (folder / "y.png").write_bytes(saved(photo(999)))
  (folder / "r.jsonl").write_text("".join(json.dumps({
      "image": name, "question": "?", "answers": ["a"]}) + "\n" for name in ("x.jpg", "y.png", "z.png")))
  return folder / "r.jsonl"


def test_what_the_rules_read_moves_bars(data, tmp_path, benchmark, monkeypatch):
  """Of all that is left to read; of nothing, none moves."""
  moved, bar = [], progress.bar

  def counted(total, words, unit, shown=True):
    made = bar(total, words, unit, shown)
    moved.append([words, unit, total, 0])
    entry = moved[-1]
    made.update = lambda count: entry.__setitem__(3, entry[3] + count)
    return made

  monkeypatch.setattr(progress, "bar", counted)
  again = lambda: funnel.run(job(data, tmp_path / "out", benchmarks=(f"records={benchmark}",)))
  again()
  found = {words: (unit, total, done) for words, unit, total, done in moved}
  assert len(moved) == 2 and found["rules: reading"] == ("task", 36, 36)
  unit, total, done = found["rules: looking at records"]
  assert unit == "picture" and total == done > 0
  moved.clear()
  (tmp_path / "out" / ".curate" / "facts" / "00001.jsonl").unlink()
  again()
  assert [words for words, *_ in moved] == ["rules: reading"] and 0 < moved[0][2] == moved[0][3] < 36


def test_benchmarks_are_kept_out(data, tmp_path, benchmark):
  out = tmp_path / "out"
  counts = funnel.run(job(data, out, benchmarks=(f"records={benchmark}",)))
  assert {line["uid"]: line["detail"] for line in lines(out, "rejects")
          if line["reason"] == "on a benchmark's picture"} == {"a5": "records"}
  assert counts["kept"]["all"] == 30
  want = content(out)
  funnel.run(job(data, out, benchmarks=(f"records={benchmark}",)))
  assert content(out) == want
  with pytest.raises(ValueError, match="config.curate.benchmarks must name benchmarks out of vstar, .*'nope=x'"):
    funnel.run(job(data, out, benchmarks=("nope=x",)))


@pytest.mark.parametrize("together", [False, True], ids=["endpoint", "engine"])
@pytest.mark.parametrize("n", [2, 3])
def test_several_processes_leave_what_one_does(data, tmp_path, monkeypatch, n, together):
  """With an endpoint each asks about shards of its own; with the engine, all of them about each, some tasks each."""
  funnel.run(job(data, tmp_path / "one" / "out"), Played().asker())
  want, played, died = content(tmp_path / "one" / "out"), [Played() for _ in range(n)], []

  def rollout(number):
    def of_this(tasks, seeds, samples, zooms):
      if died and number == 1 and len(played[1].asked) > 12:
        raise KeyboardInterrupt
      found = played[number].rollout(tasks, seeds, samples, zooms)
      return [t for t in found if hosts.mine(t.index // samples)] if together else found
    return of_this

  def one(number):
    asker = policy_lib.Asker(None, rollout(number), together, {"model": "played"})
    return funnel.run(job(data, tmp_path / "some" / "out"), asker)

  died.append(True)
  with pytest.raises((KeyboardInterrupt, threading.BrokenBarrierError)):
    lockstep.Lockstep(monkeypatch, n).run(one)
  assert not (tmp_path / "some" / "out" / "counts.json").exists()
  died.clear()
  counts = lockstep.Lockstep(monkeypatch, n).run(one)
  assert content(tmp_path / "some" / "out") == want and counts == [counts[0]] * n
  asked_by = [{uid for uid, _, _ in it.asked} for it in played]
  assert together or not set.intersection(*asked_by) and all(asked_by)


def test_shards_are_by_content(data):
  found = funnel._open(job(data, "x", shard_tasks=7))
  assert len(found.shards) == 6 and sorted(place for shard in found.shards for place in shard) == [
      (k, i) for k, n in ((0, 30), (1, 6)) for i in range(n)]
  assert all(int(found.provenance(place)[:16], 16) % 6 == number for number, shard in enumerate(found.shards)
             for place in shard)


@pytest.mark.parametrize("changes, said", [
    ({"curate.benchmarks": ("vstar",)}, "curate.benchmarks must be .NAME=PATH"),
    ({"curate.policy.temperature": 0.0}, "curate.policy.temperature must be positive with several samples"),
    ({"curate.rules.least_coverage": 0.9}, "curate.rules.least_coverage must be at most"),
    ({"curate.filter.least_pass": 0.95}, "curate.filter.least_pass must be at most")])
def test_thresholds_are_part_of_the_configuration(changes, said):
  c = config_lib.default()
  c.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=said):
    setup.sections(c)
