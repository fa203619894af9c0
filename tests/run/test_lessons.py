"""Demonstrations as a source of training: what is left out is named, and a step's batch is always the same."""

import json
import pathlib
import runpy

from PIL import Image
import pytest

from tests import recorded
from virl_jax import sft
from virl_jax.report import gallery
from virl_jax.rollout import replay
from virl_jax.run import files
from virl_jax.run import lessons
from virl_jax.run import setup
from virl_jax.run import sources
from virl_jax.run import workdir as workdir_lib

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def policy():
  return setup.pieces(sft.by_example(config())).policy


def config(*paths, **knobs):
  c = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]()
  c.sft.data, c.sft.batch, c.eval.tasks = tuple(map(str, paths)), 8, 0
  c.sft.update(knobs)
  return c


def load(policy, workdir, *paths, **knobs):
  found = lessons.load(config(*paths, **knobs), policy)
  workdir.mkdir(exist_ok=True)
  found.look_through(files.path(workdir))
  return found


def test_a_step_s_batch_is_the_same_however_it_is_made(policy, tmp_path):
  path = recorded.write(tmp_path / "data", 12)
  names = lambda batch: [(t.index, t.task.uid, t.ids.tolist()) for t in batch]
  kept, anew = (load(policy, tmp_path / "w", path, cache_gib=gib) for gib in (1.0, 0.0))
  whole = [names(kept.batch(step)) for step in range(4)]
  assert [names(anew.batch(3)), names(anew.batch(1))] == [whole[3], whole[1]], "no step is made from another"
  assert [i for i, *_ in whole[0]] == list(range(8))
  order = [uid for step in whole[:3] for _, uid, _ in step]
  assert sorted(order) == sorted([f"demo {i}" for i in range(12)] * 2) and order[:12] != sorted(order[:12])
  assert len(kept._ready) == 12 and not anew._ready
  assert not hasattr(kept.batch(0)[0].task.image, "size"), "decoded pictures are not kept"
  for each in (kept, anew):
    each.close()


def test_what_is_left_out_is_counted_and_named(policy, tmp_path, capsys, monkeypatch):
  path = pathlib.Path(recorded.write(tmp_path / "data", 8))
  lines = [json.loads(text) for text in path.read_text().splitlines()]
  lines[1]["image"] = "gone.png"
  lines[2] = recorded.line(2, "2.png", (90, 90, 200, 200))
  lines[3]["correct"] = False
  (tmp_path / "data" / "4.png").write_bytes(b"no picture")
  recorded.save(path, lines)
  found = load(policy, tmp_path / "w", path)
  assert len(found) == 4 and found.describe() == (
      "demonstrations: 4 of 8 records (8 rollouts); not chosen 1 (1 its answer is wrong); left out 3 (1 no image file, "
      "1 its call can't be carried out, 1 no readable image)")
  said = capsys.readouterr().out
  assert "left out: demos.jsonl:2: no image file (gone.png)\n" in said
  assert "left out: demos.jsonl:3: its call can't be carried out (bbox_2d lies outside the image of 84 x 84)\n" in said
  told = json.loads((tmp_path / "w" / "left_out.json").read_text())
  assert (told["records"], told["used"], told["not_chosen"]) == (8, 4, {"its answer is wrong": 1})
  assert [where for where, *_ in told["each"]] == ["demos.jsonl:2", "demos.jsonl:3", "demos.jsonl:5"]
  # Another start knows them without checking again; under other budgets it checks.
  monkeypatch.setattr(replay, "replay", lambda *_: pytest.fail("it looks again"))
  again = load(policy, tmp_path / "w", path)
  assert again.describe() == found.describe() and again.fingerprint() == found.fingerprint()
  with pytest.raises(pytest.fail.Exception):
    load(policy, tmp_path / "w", path, only_right=False)
  monkeypatch.undo()
  with pytest.raises(ValueError, match="^--data must have demonstrations that can be used, at least a share of 0.9 of "
                                       "those that were chosen .*left out 3 .*left_out.json"):
    load(policy, tmp_path / "other", path, most_left_out=0.1)
  assert load(policy, tmp_path / "other", path, only_right=False, most_left_out=0.5)._records == 8
  lines[0]["question"] = "?"
  recorded.save(path, lines)
  assert lessons.load(config(path), policy).fingerprint() != found.fingerprint()
  for wrong in ([], [lines[1]]):
    with pytest.raises(ValueError, match="^--data must have demonstrations. Received: demonstrations: 0 of"):
      lessons.load(config(recorded.save(path, wrong)), policy)
  with pytest.raises(ValueError, match="^config.sft.data must be files of trajectories or workdirs"):
    lessons.load(config(), policy)


def test_rollouts_of_large_pictures_find_them_in_their_run_s_data(policy, tmp_path):
  """The copy of a photograph in a workdir is too small to learn from: it is taken from the run's data."""
  lines = []
  for i in range(4):
    Image.new("RGB", (700, 500), (60 * i, 90, 90)).save(tmp_path / f"{i}.jpg")
    lines.append({"image": f"{i}.jpg", "question": "What?", "answers": ["rows"], "boxes": [[0, 0, 99, 99]],
                  "id": f"p{i}"})
  run, workdir = config(), tmp_path / "run"
  run.data.source, run.data.path = "jsonl", recorded.save(tmp_path / "records.jsonl", lines)
  source = sources.load(run, "train")
  workdir_lib.claim(str(workdir), run, source).close()
  rolled = []
  for i in range(len(source)):
    path = recorded.save(tmp_path / "x.jsonl", [recorded.line(i, source.task(i).image)])
    traj = load(policy, tmp_path / "w0", path).batch(0)[0]
    rolled.append(gallery.entry(traj, Image.open(source.task(i).image), (0.5,), ("correct",), (1.0,), 1.0, 2.0, {})
                  | {"uid": source.task(i).uid})
  assert rolled[0]["image"].startswith("data:image/jpeg") and rolled[0]["turns"][0]["ids"]
  gallery.save(str(workdir / "rollouts" / "step_000001.jsonl"), rolled)
  found = load(policy, tmp_path / "w", workdir)
  assert len(found) == len(source) and found.batch(0)[0].images[0].region[2:] == (700, 500)
  assert found.batch(0)[0].turns[0].ids.tolist() in [item["turns"][0]["ids"] for item in rolled]
  rolled[0]["uid"] = "p9"
  gallery.save(str(workdir / "rollouts" / "step_000001.jsonl"), rolled)
  found = load(policy, tmp_path / "w2", workdir)
  assert [(why, more) for _, why, more in found._left_out] == [
      ("its picture is kept too small, and no task of its run has its name", "p9")]
  recorded.save(tmp_path / "records.jsonl", lines[:2])
  with pytest.raises(ValueError, match="its picture is kept too small, and its run's data cannot be found"):
    load(policy, tmp_path / "w3", workdir)
