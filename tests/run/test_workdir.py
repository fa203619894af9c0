"""A workdir belongs to one run, even after upgrades: never to another run, other data, or two processes at once."""

import io
import json
import pathlib
import subprocess
import sys

import PIL.Image
import pytest

from virl_jax import config as config_lib
from virl_jax import train
from virl_jax import warmstart
from virl_jax.data.sources import jsonl
from virl_jax.run import workdir
from virl_jax.tiny import needle
from virl_jax.tiny import source as tiny_source

# Of a tiny run of four steps, as that commit wrote it.
OLD = pathlib.Path(__file__).parent / "old" / "config_f7d5c2e.json"
ROOT = pathlib.Path(__file__).parents[2]


class Data:
  """A stand-in for a source."""

  def __init__(self, print_="a"):
    self.print_ = print_

  def fingerprint(self):
    return self.print_

  def describe(self):
    return f"data {self.print_}"


def made(**changes):
  c = config_lib.default()
  c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
  return c


def claim(path, c, *args, **kwargs):
  """Claims a workdir and releases it at once."""
  with workdir.claim(str(path), c, *args, **kwargs) as claimed:
    return claimed.changed


def content(folder):
  return {f: f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_an_older_configuration_is_read_under_today_s_names():
  old = json.loads(OLD.read_text())
  assert "engine" not in old and old["rollout"]["slots"] == 0
  old["rollout"] |= {"slots": 5, "segment_tokens": 7, "pad_tokens": 128}
  c = config_lib.from_json(json.dumps(old))
  assert (c.engine.slots, c.engine.segment_tokens, c.engine.pad_tokens, c.pack.pad_tokens) == (5, 7, 128, 128)
  assert c.pack.join_rows is True and "slots" not in c.rollout
  new = config_lib.flat(config_lib.default().to_dict())
  assert all(name in new and (key not in new or key in names) for key, names in config_lib.RENAMED.items()
             for name in names)


def test_the_split_of_an_older_run_stays_as_its_seed_drew_it():
  old = json.loads(OLD.read_text()) | {"seed": 7}
  c = config_lib.from_json(json.dumps(old))
  assert (c.seed, c.data.split_seed) == (7, 7)
  c.data.split_seed = 3
  again = config_lib.from_json(config_lib.to_json(c))
  assert (again.seed, again.data.split_seed) == (7, 3)


def test_a_knob_that_is_no_more_must_hold_what_is_left(monkeypatch):
  monkeypatch.setattr(config_lib, "REMOVED", {"rollout.gone": 3})
  assert config_lib.from_json('{"rollout": {"gone": 3}}') == config_lib.default()
  with pytest.raises(ValueError, match=r"rollout.gone = 4 is of an older version; this one only knows 3"):
    config_lib.from_json('{"rollout": {"gone": 4}}')


def test_an_older_workdir_is_the_same_run_s(tmp_path):
  (tmp_path / "config.json").write_text(OLD.read_text())
  c = config_lib.from_json(OLD.read_text())
  c.steps, c.checkpoint.keep, c.engine.threads, c.warmstart.steps, c.log.gallery_every = 9, 5, 1, 7, 0
  assert claim(tmp_path, c, Data()) == {}
  assert workdir.config(tmp_path) == c
  assert json.loads((tmp_path / "data.json").read_text())["fingerprint"] == "a", "known from now on"


def test_what_belongs_to_the_run_may_change_on_purpose_only(tmp_path):
  claim(tmp_path, made(), Data())
  other = made(optim__learning_rate=1e-4, reward__h0=0.3)
  before = content(tmp_path)
  with pytest.raises(ValueError, match=r"another configuration \(optim.learning_rate: 1e-06 there, 0.0001 now; "
                                       r"reward.h0: 0.4 there, 0.3 now\).*or --resume-with-changes"):
    claim(tmp_path, other, Data(), False)
  assert content(tmp_path) == before
  assert claim(tmp_path, other, Data(), True) == {"optim.learning_rate": [1e-6, 1e-4], "reward.h0": [0.4, 0.3]}
  assert claim(tmp_path, other, Data(), False) == {}, "it is the run's now"


@pytest.mark.parametrize("key, value, why", [
    ("data.weights", ("a:1", "b:2"), "they order the data"), ("data.easy_first_width", 0.5, "it orders the data"),
    ("model.path", "elsewhere", "the checkpoints are of that model"), ("model.dtype", "bfloat16", "of that type"),
    ("seed", 1, "orders the data"), ("data.needle.guessable", 0.5, "about the same tasks"),
    ("eval.tasks", 8, "in the same way")])
def test_what_makes_it_another_run_never_changes(tmp_path, key, value, why):
  claim(tmp_path, made(), Data())
  before = content(tmp_path)
  for changes in (False, True):
    with pytest.raises(ValueError, match=rf"{key}: .* now \(.*{why}.*\); use another --workdir$"):
      claim(tmp_path, made(**{key: value, "reward.h0": 0.3}), Data(), changes)
  assert content(tmp_path) == before


def test_data_may_move_but_not_change(tmp_path):
  here, there = (made(data__source="jsonl", data__path=p) for p in ("here.jsonl", "there.jsonl"))
  claim(tmp_path, here, Data())
  assert claim(tmp_path, there, Data()) == {}
  before = content(tmp_path)
  for changes in (False, True):
    with pytest.raises(ValueError, match=r"other data: .*config.data.path = 'there.jsonl' .*changed.*data a.*data b"):
      claim(tmp_path, there, Data("b"), changes)
    with pytest.raises(ValueError, match="data.path: 'there.jsonl' there, 'here.jsonl' now"):
      claim(tmp_path, here, Data("b"), changes)
  assert content(tmp_path) == before
  (tmp_path / "data.json").write_text("{")
  with pytest.raises(ValueError, match="data.json must hold a fingerprint"):
    claim(tmp_path, there, Data())


def records(folder, question="?", behind=b""):
  folder.mkdir(exist_ok=True)
  picture = io.BytesIO()
  PIL.Image.new("RGB", (8, 8)).save(picture, "PNG")
  lines = []
  for i in range(4):
    (folder / f"{i}.png").write_bytes(picture.getvalue() + behind)
    lines.append(json.dumps({"image": f"{i}.png", "question": question, "answers": ["x"], "boxes": []}))
  (folder / "records.jsonl").write_text("\n".join(lines))
  return folder / "records.jsonl"


def test_fingerprints_are_of_the_content(tmp_path):
  prints = lambda path: {jsonl.load(path, split, 0.5, 0).fingerprint() for split in ("train", "test", "all")}
  first, = prints(records(tmp_path / "a"))
  assert prints(records(tmp_path / "moved")) == {first}
  assert not prints(records(tmp_path / "words", question="What?")) & {first}
  assert not prints(records(tmp_path / "images", behind=b" ")) & {first}
  drawn = lambda **kw: tiny_source.load(str(tmp_path / "drawn"), "test", needle.Config(train_size=1, test_size=1, **kw))
  assert drawn().fingerprint() == drawn().fingerprint() != drawn(seed=1).fingerprint()


def test_two_at_once_are_refused_and_nothing_is_touched(tmp_path):
  c = made(model__path="@tiny", data__needle__train_size=4, data__needle__test_size=2)
  with workdir.claim(str(tmp_path), c):
    before = content(tmp_path)
    for start in (lambda: claim(tmp_path, c), lambda: train.train(c, str(tmp_path)),
                  lambda: warmstart.warm_start(c, "out", str(tmp_path), "")):
      with pytest.raises(ValueError, match=rf"^{tmp_path} is in use by process \d+ on .* since 2.*; stop it or use"):
        start()
    assert content(tmp_path) == before
  assert claim(tmp_path, c) == {}


HOLD = """
import sys, time
from virl_jax import config
from virl_jax.run import workdir
claimed = workdir.claim(sys.argv[1], config.default())
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_is_gone_when_its_process_is_killed(tmp_path):
  other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  try:
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"is in use by process {other.pid} on"):
      claim(tmp_path, made())
  finally:
    other.kill()
    other.communicate()
  assert claim(tmp_path, made()) == {}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file", tmp_path / "file" / "below"):
    with pytest.raises(ValueError, match="^--workdir must be a folder that can be made and written to.*file"):
      claim(path, made())
  assert (tmp_path / "file").read_text() == ""


def test_what_no_one_knows_is_left_alone(tmp_path):
  (tmp_path / "metrics.jsonl").write_text("")
  with pytest.raises(ValueError, match="no config.json that says whose"):
    claim(tmp_path, made())
  (tmp_path / "config.json").write_text('{"newer": 1}')
  with pytest.raises(ValueError, match="must be a configuration as a run writes it.*newer.*; use another --workdir"):
    claim(tmp_path, made())
  assert {f.name for f in tmp_path.iterdir()} == {"metrics.jsonl", "config.json"}


def test_changes_stand_in_the_header():
  assert "changed" not in workdir.header(made())
  assert workdir.header(made(), {"reward.h0": [0.4, 0.3]})["changed"] == {"reward.h0": [0.4, 0.3]}
