"""metrics.jsonl survives kills and resumes; the terminal line says what is left."""

import importlib.util
import io
import json
import math
import os
import pathlib
import struct
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2

from virl_jax.run import log


class _Lazy:
  """A stand-in for a device array, which notes that it was read."""

  shape = ()

  def __init__(self, value):
    self.value, self.reads = value, 0

  def __array__(self, dtype=None, copy=None):
    self.reads += 1
    return np.asarray(self.value, dtype=dtype)


def _steps(path):
  return [line["step"] for line in log.read(path)]


def _lines(path):
  with open(path, "rb") as f:
    return f.read().splitlines()


def _write(path, steps, start_step=0):
  metrics_log = log.MetricsLog(path, start_step)
  for step in steps:
    metrics_log.write(step, {"loss": step / 10})


def test_a_line_is_on_the_disk_when_write_returns(tmp_path, monkeypatch):
  path = str(tmp_path / "metrics.jsonl")
  synced = []
  fsync = os.fsync
  monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), fsync(fd)))
  metrics_log = log.MetricsLog(path, 0)
  for step, value in enumerate((1.5, 2.5)):
    lazy = _Lazy(value)
    assert metrics_log.write(step, {"loss": lazy}) == {"step": step, "loss": value}
    assert lazy.reads == 1
    assert log.read(path)[-1] == {"step": step, "loss": value}  # no later call is needed
    assert _steps(path) == list(range(step + 1))
    assert synced[-1] == os.path.getsize(path) and len(synced) == step + 1  # the whole of it, once


def test_scalars_of_every_sort_become_plain_json(tmp_path):
  path = str(tmp_path / "deep" / "metrics.jsonl")
  metrics_log = log.MetricsLog(path, 0)
  line = metrics_log.write(0, {"f32": np.float32(0.5), "i64": np.int64(7), "zero_d": np.array(2.0), "note": "fine",
                               "none": None, "nan": np.float32("nan"), "inf": math.inf, "minus": -math.inf})
  assert line["f32"] == 0.5 and line["i64"] == 7 and type(line["i64"]) is int
  with open(path, encoding="utf-8") as f:
    strict = json.loads(f.read(), parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))
  assert (strict["nan"], strict["inf"], strict["minus"], strict["none"]) == ("nan", "inf", "-inf", None)
  back = log.read(path)[0]
  assert math.isnan(back["nan"]) and back["inf"] == math.inf and back["minus"] == -math.inf
  assert back["note"] == "fine"


def test_resume_drops_exactly_what_will_be_done_again(tmp_path):
  path = str(tmp_path / "metrics.jsonl")
  _write(path, range(10))
  with open(path, "ab") as f:
    f.write(b'{"note": "no step"}\n')
  before = _lines(path)
  _write(path, range(6, 8), start_step=6)
  after = _lines(path)
  assert after[:7] == before[:6] + [before[10]]
  assert [json.loads(raw).get("step") for raw in after] == [0, 1, 2, 3, 4, 5, None, 6, 7]
  assert os.listdir(tmp_path) == ["metrics.jsonl"]


HEADER = {"config": {"steps": 3, "optim": {"clip_norm": math.inf}, "marks": ("a", "b")}, "versions": {"jax": "1"},
          "device": "cpu"}
KEPT = {"config": {"steps": 3, "optim": {"clip_norm": "inf"}, "marks": ["a", "b"]}, "versions": {"jax": "1"},
        "device": "cpu"}


def _begin(path, start_step, steps, **changes):
  metrics_log = log.MetricsLog(path, start_step, {**HEADER, **changes})
  for step in steps:
    metrics_log.write(step, {"loss": step / 10})


def test_the_header_is_the_first_line_and_no_step(tmp_path):
  path = str(tmp_path / "deep" / "metrics.jsonl")
  _begin(path, 0, range(2))
  first, *steps = (json.loads(raw, parse_constant=pytest.fail) for raw in _lines(path))
  assert first == log.header(path) == KEPT
  assert log.read(path) == steps == [{"step": 0, "loss": 0.0}, {"step": 1, "loss": 0.1}]


def test_a_resumed_run_has_one_header(tmp_path):
  path = str(tmp_path / "metrics.jsonl")
  _begin(path, 0, range(4))
  before = _lines(path)
  inode = os.stat(path).st_ino
  _begin(path, 4, [])
  assert os.stat(path).st_ino == inode  # the same header: the file is not rewritten
  _begin(path, 2, range(2, 4))
  assert _lines(path) == before
  log.MetricsLog(path, 4)
  assert _lines(path) == before  # none given: the old one stays
  _begin(path, 0, range(4))
  assert _lines(path) == before


def test_an_earlier_header_that_said_otherwise_is_kept(tmp_path):
  path = str(tmp_path / "metrics.jsonl")
  _begin(path, 0, range(4))
  _begin(path, 3, [3, 4, 5], versions={"jax": "2"})
  assert log.header(path) == {**KEPT, "versions": {"jax": "2"}, "earlier": [{"until": 3, **KEPT}]}
  _begin(path, 3, [3, 4, 5], versions={"jax": "3"}, device="gpu")  # no step of version "2" is left
  assert log.header(path)["earlier"] == [{"until": 3, **KEPT}]
  _begin(path, 5, [5], versions={"jax": "3"}, device="cpu")
  assert log.header(path)["earlier"] == [{"until": 3, **KEPT},
                                         {"until": 5, **KEPT, "versions": {"jax": "3"}, "device": "gpu"}]
  _begin(path, 2, [2])  # from an earlier step
  assert log.header(path)["earlier"] == [{"until": 2, **KEPT}]
  _begin(path, 0, [0, 1])
  assert log.header(path) == KEPT and _steps(path) == [0, 1]


def test_a_file_without_a_header_is_read_as_ever_and_gets_one(tmp_path):
  path = str(tmp_path / "metrics.jsonl")
  _write(path, range(3))
  old = _lines(path)
  assert log.header(path) is None and _steps(path) == [0, 1, 2]
  _begin(path, 3, [3])
  assert log.header(path) == KEPT and _steps(path) == [0, 1, 2, 3] and _lines(path)[1:4] == old


def test_line_cut_off_by_a_kill_is_dropped(tmp_path):
  path = str(tmp_path / "metrics.jsonl")
  _write(path, range(3))
  with open(path, "ab") as f:
    f.write(b'{"step": 3, "lo')
  assert _steps(path) == [0, 1, 2]
  _write(path, [3], start_step=3)
  assert _steps(path) == [0, 1, 2, 3]


def test_whole_last_line_without_newline_is_kept(tmp_path):
  path = str(tmp_path / "metrics.jsonl")
  _write(path, range(3))
  with open(path, "rb+") as f:
    f.truncate(os.path.getsize(path) - 1)
  _write(path, [3], start_step=3)
  assert _steps(path) == [0, 1, 2, 3]


def test_damage_in_the_middle_is_an_error_not_a_loss(tmp_path):
  path = tmp_path / "metrics.jsonl"
  content = b'{"step": 0}\n{"st\n{"step": 2}\n'
  path.write_bytes(content)
  with pytest.raises(ValueError, match="line 2"):
    log.read(str(path))
  with pytest.raises(ValueError, match="line 2"):
    log.MetricsLog(str(path), 5)
  assert path.read_bytes() == content


def test_an_opened_log_that_writes_nothing_changes_nothing(tmp_path):
  path = str(tmp_path / "metrics.jsonl")
  _write(path, range(3))
  before = os.stat(path)
  log.MetricsLog(path, 3)
  assert (os.stat(path).st_ino, os.stat(path).st_size) == (before.st_ino, before.st_size)


def test_bad_writes_are_refused(tmp_path):
  path = str(tmp_path / "metrics.jsonl")
  metrics_log = log.MetricsLog(path, 4)
  with pytest.raises(ValueError, match="at least 4"):
    metrics_log.write(3, {})
  metrics_log.write(4, {})
  with pytest.raises(ValueError, match="at least 5"):
    metrics_log.write(4, {})
  with pytest.raises(ValueError, match=r"metrics\['loss'\] must be a scalar.*\(2,\)"):
    metrics_log.write(5, {"loss": np.zeros(2)})
  assert _steps(path) == [4]
  metrics_log.write(5, {"loss": 1.0})  # after a refusal the step can still be written
  assert _steps(path) == [4, 5]


def test_progress_line():
  times = iter([0.0, 90.0, 96.0, 102.2])  # the first step compiles
  out = io.StringIO()
  progress = log.Progress(120, 9, out, clock=lambda: next(times))
  metrics = {"reward/total": 0.834, "acc_ans": 0.61, "acc_rat": 0.48, "rationale_count": 1.3}
  for step in (9, 10, 11):
    progress.line(step, metrics)
  last = out.getvalue().splitlines()[-1]
  assert last == "step  12/120  reward +0.83  acc_ans 0.61  acc_rat 0.48  zooms 1.3  6.2 s/step  left 11m10s"


def test_progress_forgets_old_paces_and_missing_values():
  times = iter([100.0 * i for i in range(41)] + [4000.0 + i for i in range(1, 31)])
  out = io.StringIO()
  progress = log.Progress(100, 0, out, clock=lambda: next(times))
  for step in range(70):
    progress.line(step, {"acc_ans": None})
  assert out.getvalue().splitlines()[-1] == "step  70/100  1.0 s/step  left 30s"


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (658.8, "10m59s"), (3600, "1h00m"), (11100, "3h05m"),
    (187200, "2d04h")])
def test_duration(seconds, text):
  assert log.duration(seconds) == text


def test_tensorboard_is_optional(tmp_path, monkeypatch):
  assert log.tensorboard_writer(str(tmp_path), False) is None
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  assert log.tensorboard_writer(str(tmp_path), True) is None
  assert os.listdir(tmp_path) == []


def _events(folder):
  """The events of a folder in the order in which TensorBoard reads them."""
  events = []
  for name in sorted(os.listdir(folder)):
    assert ".tfevents." in name
    with open(os.path.join(folder, name), "rb") as f:
      while head := f.read(12):  # length, its checksum, data, their checksum
        data = f.read(struct.unpack("<Q", head[:8])[0])
        assert struct.unpack("<I", f.read(4))[0] == record_writer.masked_crc32c(data)
        events.append(event_pb2.Event.FromString(data))
  return events


def _scalars(folder):
  """What TensorBoard shows: (tag, step) -> value, without steps that a later start does again."""
  shown = {}
  for event in _events(folder):
    if event.session_log.status == event_pb2.SessionLog.START:
      shown = {(tag, step): value for (tag, step), value in shown.items() if step < event.step}
    shown |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
  return shown


def test_tensorboard_gets_the_numbers_and_forgets_what_a_resume_repeats(tmp_path):
  folder = str(tmp_path / "tensorboard")
  writer = log.tensorboard_writer(folder, True)
  writer.write(0, {"step": 0, "loss/policy": 0.5, "note": "text", "none": None, "count": 3})
  writer.write(1, {"step": 1, "loss/policy": 0.25})
  writer.write(2, {"step": 2, "loss/policy": 0.75})
  writer.close()
  assert _scalars(folder) == {("loss/policy", 0): 0.5, ("count", 0): 3.0, ("loss/policy", 1): 0.25,
                              ("loss/policy", 2): 0.75}
  writer = log.tensorboard_writer(folder, True, start_step=1)
  writer.write(1, {"loss/policy": 0.125})
  writer.close()
  writer.close()  # again: nothing happens
  assert _scalars(folder) == {("loss/policy", 0): 0.5, ("count", 0): 3.0, ("loss/policy", 1): 0.125}
  assert len(os.listdir(folder)) == 2  # begun within one second, and neither replaced the other


def test_tensorboard_has_what_is_not_finite_without_a_warning_each_step(tmp_path, caplog):
  writer = log.tensorboard_writer(str(tmp_path), True)
  writer.write(0, {"loss": math.nan, "gap": math.inf})
  writer.close()
  shown = _scalars(str(tmp_path))
  assert math.isnan(shown["loss", 0]) and shown["gap", 0] == math.inf and not caplog.records


def test_tensorboard_loses_nothing_where_the_process_ends_without_closing(tmp_path):
  code = ("from virl_jax.run import log\n"
          f"writer = log.tensorboard_writer({str(tmp_path)!r}, True)\n"
          "for step in range(40): writer.write(step, {'a': step, 'b': 1.0})\n"
          "raise ValueError('a fault')")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                        cwd=pathlib.Path(__file__).parents[2])
  assert "a fault" in done.stderr
  assert len(_scalars(str(tmp_path))) == 80


def test_tensorboard_has_pictures(tmp_path):
  writer = log.tensorboard_writer(str(tmp_path), True)
  writer.pictures(3, [Image.new("RGB", (9, 5), "red"), Image.new("RGB", (7, 7))])
  writer.close()
  found = {v.tag: (e.step, v.image.width, v.image.height) for e in _events(tmp_path) for v in e.summary.value}
  assert found == {"trajectories/0": (3, 9, 5), "trajectories/1": (3, 7, 7)}


def test_wandb_is_only_there_if_asked_for(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  assert log.wandb_writer(str(tmp_path), "", 0, {}) is None
  with pytest.raises(ValueError, match=r"config.log.wandb must be '' unless .* pip install -e '.\[wandb\]'"):
    log.wandb_writer(str(tmp_path), "p", 0, {})
  assert os.listdir(tmp_path) == []


class FakeWandB:
  """The parts of the library that are called."""

  class Error(Exception):
    pass

  def __init__(self, refuses=None):
    self.refuses, self.started, self.logged, self.finished = refuses, [], [], 0
    self.Settings, self.Image = dict, lambda picture: ("picture", picture.size)

  def init(self, **how):
    if self.refuses:
      raise self.Error(self.refuses)
    self.started.append(how)
    return self

  def log(self, values, step):
    self.logged.append((step, values))

  def finish(self):
    self.finished += 1


def test_wandb_gets_what_tensorboard_gets_and_each_step_once(place, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandB())
  monkeypatch.delenv("WANDB_DIR", raising=False)
  log.MetricsLog(f"{place}/metrics.jsonl", 0)  # makes the folder, as a run does
  writer = log.wandb_writer(place, "p", 2, {"a": {"b": 1}})
  for step in range(2):
    writer.write(step, {"step": step, "loss/policy": step / 4, "note": "text", "none": None, "count": 3})
  writer.pictures(1, [Image.new("RGB", (9, 5))])
  writer.close()
  assert fake.logged == [(0, {"loss/policy": 0.0, "count": 3.0}), (1, {"loss/policy": 0.25, "count": 3.0}),
                         (1, {"trajectories/0": ("picture", (9, 5))})], "nothing was sent of this workdir before"
  writer = log.wandb_writer(place, "p", 2, {})  # a start that goes on from step 1
  for step in (1, 2):
    writer.write(step, {"loss/policy": 0.5})
    writer.pictures(step, [])
  assert [step for step, _ in fake.logged[3:]] == [2, 2] and fake.finished == 1
  first, second = fake.started
  assert first["id"] == second["id"] and (first["project"], first["name"], first["resume"]) == ("p", "run", "allow")
  assert first["dir"] == (None if place.startswith("gs:") else place) and first["config"] == {"a": {"b": 1}}


def test_what_wandb_refuses_is_said_and_leaves_no_id(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", FakeWandB("no API key\nmore"))
  with pytest.raises(ValueError, match="WANDB_MODE=offline. Received: no API key$"):
    log.wandb_writer(str(tmp_path), "p", 0, {})
  assert os.listdir(tmp_path) == []


def _wandb_records(path):
  """The records of a file that W&B will sync: blocks of 32 KiB, records in pieces, as LevelDB's logs have them."""
  from wandb.proto import wandb_internal_pb2
  data, at, whole, found = path.read_bytes(), 7, b"", []
  while at + 7 <= len(data):
    if 32768 - at % 32768 < 7:
      at += 32768 - at % 32768
      continue
    length, kind = struct.unpack("<HB", data[at + 4:at + 7])
    whole += data[at + 7:at + 7 + length]
    at += 7 + length
    if kind in (1, 4):  # all of a record, or its end
      found.append(wandb_internal_pb2.Record.FromString(whole))
      whole = b""
  return found


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the extra wandb")
def test_wandb_offline(tmp_path, monkeypatch):
  """The real library, without a network: two starts of one run, the same names and steps as in TensorBoard."""
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.delenv("WANDB_DIR", raising=False)
  board = log.tensorboard_writer(str(tmp_path / "tensorboard"), True)
  for start, sent in ((0, 0), (1, 3)):
    writer = log.wandb_writer(str(tmp_path), "p", sent, {"a": {"b": 1}})
    for step in range(start, start + 3):
      for each in (writer, board):
        each.write(step, {"loss/policy": step / 4, "gap": math.inf})
    writer.pictures(start + 2, [Image.new("RGB", (9, 5), "red")])
    writer.close()
  board.close()
  files_ = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
  records = [r for path in files_ for r in _wandb_records(path)]
  (run, *others) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
  assert {r.run_id for r in (run, *others)} == {(tmp_path / "wandb_id").read_text().strip()} and run.project == "p"
  steps = [(r.history.step.num, {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item})
           for r in records if r.WhichOneof("record_type") == "history"]
  assert [step for step, _ in steps] == [0, 1, 2, 3], "each once, though steps 1 and 2 were done again"
  assert {("loss/policy", step): found["loss/policy"] for step, found in steps} == {
      key: value for key, value in _scalars(tmp_path / "tensorboard").items() if key[0] == "loss/policy"}
  assert steps[2][1]["trajectories/0/_type"] == "image-file" and "trajectories/0/_type" not in steps[1][1]
  assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/trajectories/0_*.png"))) == 2
