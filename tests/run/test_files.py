"""The files of a workdir, on a disk and in a bucket: the same calls, the same guarantees."""

import importlib
import json
import os
import pathlib
import re
import sys
import threading
import time

from etils import epath
import PIL.Image
import pytest

from virl_jax import config as config_lib
from virl_jax.report import gallery
from virl_jax.report import html
from virl_jax.run import files
from virl_jax.run import log
from virl_jax.run import loop
from virl_jax.run import setup
from virl_jax.run import watch
from virl_jax.run import workdir

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def quick(monkeypatch):
  """Makes leases renew and expire in fractions of a second."""
  monkeypatch.setattr(files, "RENEW_S", 0.05)
  monkeypatch.setattr(files, "LEASE_S", 0.6)


# --- paths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["s3://bucket/run", "gs:/bucket/run", "gs://", "gs:///run", "https://host/run",
                                   "file:///run", "/s3/bucket/run"])
def test_other_addresses_are_refused(where, bucket):
  with pytest.raises(ValueError, match="^a workdir must be a folder, or gs://BUCKET/DIR. Received: " + where):
    files.path(where)


def test_an_address_stays_one(bucket):
  path = files.path("gs://my-bucket/run/") / "rollouts" / "a.jsonl"
  assert str(path) == os.fspath(files.path(path)) == "gs://my-bucket/run/rollouts/a.jsonl"
  assert not files.is_local(path) and files.absolute(path) == path


def test_a_folder_stays_as_it_was_given(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert str(files.path("runs/tiny")) == "runs/tiny" and files.is_local(pathlib.Path("runs"))
  assert str(files.absolute(files.path("runs/tiny"))) == str(tmp_path / "runs" / "tiny")
  assert files.path(tmp_path) == epath.Path(tmp_path)


def test_what_is_missing_for_buckets_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  files._store.cache_clear()
  with pytest.raises(ValueError, match=r"^a workdir in a bucket needs packages.*gcsfs.*pip install 'virl-jax\[gcs\]'$"):
    files.path("gs://bucket/run")
  files._store.cache_clear()
  files.path("runs/tiny")


@pytest.mark.parametrize("key", ["model.path", "data.path", "warmstart.base"])
def test_only_a_workdir_may_lie_in_a_bucket(key):
  c = config_lib.default()
  c.update_from_flattened_dict({key: "gs://my-bucket/x"})
  with pytest.raises(ValueError, match=f"{key} must be on a disk.*gs://my-bucket/x"):
    setup.sections(c)


# --- files and folders -------------------------------------------------------------------------------------------


def test_what_is_written_is_there(place):
  root = files.path(place)
  assert not files.is_dir(root) and files.names(root) == [] and files.below(root) == []
  files.make(root / "rollouts")
  file = root / "rollouts" / "a.txt"
  assert not files.exists(file) and not files.is_file(file)
  with pytest.raises(FileNotFoundError):
    files.read_bytes(file)
  files.write_text(file, "Ä\n")
  files.append(file, b"1\n")
  files.append(file, b"2\n")
  files.append(root / "b", b"\r\n\x00")
  assert files.read_text(file) == "Ä\n1\n2\n" and files.read_bytes(root / "b") == b"\r\n\x00"
  assert files.is_file(file) and files.exists(file) and files.exists(root) and files.is_dir(root)
  assert not files.is_dir(file) and not files.is_file(root)
  assert files.names(root) == ["b", "rollouts"] and files.below(root) == ["rollouts/a.txt"]
  files.write_bytes(file, b"")
  assert files.read_bytes(file) == b"" and files.names(root / "rollouts") == ["a.txt"]
  with files.opened(root / "b") as it:
    assert it.read(1) == b"\r" and it.read() == b"\n\x00"


def test_what_can_t_be_written_leaves_what_there_was(place, monkeypatch, request):
  root = files.path(place)
  files.make(root)
  files.write_text(root / "a", "old")
  if files.is_local(root):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
  else:
    request.getfixturevalue("bucket").refuse = lambda method, path: 403 if method == "POST" else None
  with pytest.raises(OSError):
    files.write_text(root / "a", "new and longer")
  assert files.read_text(root / "a") == "old"


def test_a_bucket_s_append_outlives_an_error(bucket):
  file = files.path("gs://my-bucket/run/metrics.jsonl")
  files.append(file, b"1\n")
  answers = [503]
  bucket.refuse = lambda method, path: answers.pop() if method == "POST" and answers else None
  files.append(file, b"2\n")
  assert not answers and files.read_bytes(file) == b"1\n2\n"
  bucket.refuse = lambda method, path: 403 if method == "GET" else None
  with pytest.raises(OSError):
    files.append(file, b"3\n")
  bucket.refuse = lambda method, path: None
  assert files.read_bytes(file) == b"1\n2\n", "what can't be read is not taken for nothing"


def step_in(folder):
  files.make(folder / "default")
  for name in ("commit_success.txt", "default/x", "default/y"):
    files.write_text(folder / name, name)


def test_a_folder_moves_over_what_there_was(place):
  root = files.path(place)
  step_in(root / "checkpoints" / "2")
  files.make(root / "damaged" / "2")
  files.write_text(root / "damaged" / "2" / "older", "")
  files.move(root / "checkpoints" / "2", root / "damaged" / "2")
  assert not files.exists(root / "checkpoints" / "2") and files.names(root / "damaged") == ["2"]
  assert files.names(root / "damaged" / "2") == ["commit_success.txt", "default"]
  assert files.read_text(root / "damaged" / "2" / "default" / "x") == "default/x"


@pytest.mark.parametrize("method, allowed, left", [
    ("POST", 1, ["commit_success.txt", "default"]),   # copying: all is where it was
    ("DELETE", 1, ["default"])])                      # deleting: it is no checkpoint any more
def test_a_move_that_is_cut_off_can_be_made_again(bucket, method, allowed, left):
  root, made = files.path("gs://my-bucket/run"), []
  step_in(root / "2")
  bucket.refuse = lambda asked, path: 403 if asked == method and (made.append(path) or len(made) > allowed) else None
  with pytest.raises(OSError):
    files.move(root / "2", root / "damaged" / "2")
  bucket.refuse = lambda method, path: None
  assert files.names(root / "2") == left
  if method == "DELETE":
    assert len(bucket.files("run/damaged/2")) == 3
  files.move(root / "2", root / "damaged" / "2")
  assert not files.exists(root / "2")


# --- the lock ----------------------------------------------------------------------------------------------------


def test_a_lock_is_one_process_s(place, quick):
  file = files.path(place) / ".lock"
  files.make(file.parent)
  first = files.lock(file, pytest.fail)
  said = files.read_text(file)
  assert said.startswith(f"process {os.getpid()} on ") and said.endswith("\n")
  with pytest.raises(files.Held, match=f"^{re.escape(said.strip())}$"):
    files.lock(file, pytest.fail)
  time.sleep(0.3)  # renewals
  assert files.read_text(file) == said, "other processes compare it"
  first.close()
  first.close()
  second = files.lock(file, pytest.fail)
  assert files.read_text(file) != said or files.is_local(file)
  second.close()
  assert files.is_local(file) or not files.exists(file)


def killed(lease):
  """As if the process of a lease had ended, or slept."""
  lease._done.set()
  lease._thread.join()


def test_a_lease_that_is_not_renewed_is_taken_over(bucket, quick, capsys):
  file, lost = files.path("gs://my-bucket/run/.lock"), []
  old = files.lock(file, lost.append)
  killed(old)
  began = time.monotonic()
  new = files.lock(file, pytest.fail)
  assert time.monotonic() - began >= files.LEASE_S
  assert "gs://my-bucket/run is locked by process" in capsys.readouterr().out
  # The old one wakes up: it is told, once, and does not write.
  old._done = threading.Event()
  old._renew()
  holder = files.read_text(file).strip()
  assert lost == [f"gs://my-bucket/run is now used by {holder}, for this process had not renewed its lock for 0.6 s"]
  old.close()
  assert files.read_text(file).strip() == holder
  new.close()


def test_of_two_that_take_a_lease_over_one_gets_it(bucket, quick):
  file = files.path("gs://my-bucket/run/.lock")
  killed(files.lock(file, pytest.fail))
  got, refused = [], []

  def take():
    try:
      got.append(files.lock(file, pytest.fail))
    except files.Held as e:
      refused.append(str(e))

  threads = [threading.Thread(target=take) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(got) == 1 and len(refused) == 3
  got[0].close()


def test_a_lease_outlives_a_while_without_network(bucket, quick):
  file = files.path("gs://my-bucket/run/.lock")
  lease = files.lock(file, pytest.fail)
  bucket.refuse = lambda method, path: 403
  time.sleep(0.3)
  bucket.refuse = lambda method, path: None
  then = bucket.objects["run/.lock"][1]
  time.sleep(0.3)
  assert bucket.objects["run/.lock"][1] > then
  lease.close()


def test_a_lease_that_is_deleted_by_hand_is_made_again(bucket, quick):
  file = files.path("gs://my-bucket/run/.lock")
  lease = files.lock(file, pytest.fail)
  bucket.objects.clear()
  time.sleep(0.4)
  assert files.read_text(file) == lease._who
  lease.close()
  assert not files.exists(file)


def test_a_renewal_whose_answer_is_lost_is_no_loss(bucket, quick):
  lease = files.lock(files.path("gs://my-bucket/run/.lock"), pytest.fail)
  killed(lease)
  bucket.put("run/.lock", lease._who.encode())  # the upload succeeded; the library tries again
  assert lease._write() and lease._generation == bucket.objects["run/.lock"][1]
  bucket.put("run/.lock", b"another")
  assert not lease._write()


# --- a run's use of them -----------------------------------------------------------------------------------------


def claim(place, c=None, changes=None):
  with workdir.claim(place, c or config_lib.default(), None, changes) as claimed:
    return claimed


def test_a_workdir_is_one_run_s(place, quick):
  claimed = claim(place)
  assert files.names(claimed.folder)[-1] == "config.json" or files.is_local(claimed.folder)
  assert workdir.config(place) == config_lib.default()
  other = config_lib.default()
  other.optim.learning_rate = 1.0
  with pytest.raises(ValueError, match=f"^{place} holds a run with another configuration .*optim.learning_rate"):
    claim(place, other, False)
  assert claim(place, other, True).changed == {"optim.learning_rate": [1e-6, 1.0]}
  with workdir.claim(place, other):
    with pytest.raises(ValueError, match=rf"^{place} is in use by process \d+ on .*; stop it or use another --workd"):
      claim(place, other)
  claim(place, other)


def test_a_run_without_its_configuration_is_left_alone(place):
  folder = files.path(place)
  files.make(folder)
  files.write_text(folder / "metrics.jsonl", "")
  with pytest.raises(ValueError, match="holds a run but no config.json"):
    claim(place)
  with pytest.raises(ValueError, match="must be a run's folder, with a config.json. Received: " + place):
    workdir.config(place)


@pytest.mark.parametrize("where, status, said", [("gs://other-bucket/run", None, "other-bucket"),
                                                 ("gs://my-bucket/run", 403, "gs://my-bucket/run")])
def test_a_bucket_that_can_t_be_written_is_named(bucket, where, status, said):
  bucket.refuse = lambda method, path: status if method == "POST" else None
  with pytest.raises(ValueError, match=f"(?s)^--workdir must be a folder that can be made and written to.*{said}"):
    claim(where)
  assert not bucket.objects


def test_who_lost_the_workdir_ends(monkeypatch, capsys):
  monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
  with pytest.raises(SystemExit, match="1"):
    workdir._lost("it is another's")
  assert capsys.readouterr().out == "error: it is another's\n"


def test_the_log_goes_on_where_the_run_does(place):
  path = f"{place}/metrics.jsonl"
  metrics = log.MetricsLog(path, 0, {"config": {"a": 1}})
  for step in range(4):
    metrics.write(step, {"loss": step / 10})
    assert [line["step"] for line in log.read(path)] == list(range(step + 1))
  before = files.read_bytes(files.path(path))
  log.MetricsLog(path, 2, {"config": {"a": 2}}).write(2, {"loss": 9.0})
  assert log.read(path) == [{"step": 0, "loss": 0.0}, {"step": 1, "loss": 0.1}, {"step": 2, "loss": 9.0}]
  assert log.header(path) == {"config": {"a": 2}, "earlier": [{"until": 2, "config": {"a": 1}}]}
  assert files.read_bytes(files.path(path)).splitlines()[1:3] == before.splitlines()[1:3]
  files.append(files.path(path), b'{"step": 3, "lo')  # as a kill leaves it on a disk
  log.MetricsLog(path, 3).write(3, {"loss": 0.3})
  assert [line["step"] for line in log.read(path)] == [0, 1, 2, 3]


def entry():
  picture = gallery.data_uri(PIL.Image.new("RGB", (8, 8)), 8)
  return {"uid": "1", "rollout": 0, "kind": "k", "question": "Ä?", "options": None, "answers": ["x"], "answer": "x",
          "correct": True, "stop": "answer", "width": 8, "height": 8, "boxes_gt": [], "boxes": [], "reward": None,
          "advantage": None, "reward_parts": None, "image": picture, "turns": []}


def test_a_report_is_made_of_what_there_is(place):
  with pytest.raises(ValueError, match="workdir must be a folder"):
    html.write(place)
  claim(place)
  log.MetricsLog(f"{place}/metrics.jsonl", 0).write(0, {"reward/total": 1.0})
  for name in ("before", "step_000002", "other"):
    gallery.save(f"{place}/rollouts/{name}.jsonl", [entry()])
  assert gallery.load(f"{place}/rollouts/before.jsonl") == [entry()]
  assert html.write(place) == f"{place}/report.html"
  page = files.read_text(files.path(place) / "report.html")
  assert "<title>run" in page and "Step 2" in page and "Ä?" in page and "1 steps" in page


def test_an_evaluation_that_is_no_such_thing_is_named(place):
  file = files.path(place) / "eval_before.json"
  files.make(file.parent)
  files.write_text(file, json.dumps({"outcomes": []}))
  assert loop.of_these(file, []) == {"outcomes": []}
  files.write_text(file, "{")
  with pytest.raises(ValueError, match=f"^{file} must be an evaluation as a run writes it.*; delete it"):
    loop.of_these(file, [])


def test_where_threads_are_is_written(place):
  file = files.path(place) / "stuck_0.txt"
  files.make(file.parent)
  watch._write_stacks(file)
  assert "test_where_threads_are_is_written" in files.read_text(file)


def test_a_bucket_that_does_not_answer_keeps_nobody_from_ending(bucket, monkeypatch, capfd):
  monkeypatch.setattr(watch, "_UPLOAD_S", 0.2)
  bucket.refuse = lambda method, path: time.sleep(1.0)
  with pytest.raises(OSError, match="gs://my-bucket/run/stuck_0.txt can't be written within 0.2 s"):
    watch._write_stacks(files.path("gs://my-bucket/run/stuck_0.txt"))
  assert "keeps_nobody_from_ending" in capfd.readouterr().err, "said where it can be"


def test_tensorboard_s_files_go_there_too(place):
  # The library writes again when this process ends, and then there is no bucket any more.
  importlib.import_module("tensorboardX.record_writer").GCSRecordWriter.__del__ = lambda self: None
  writer = log.tensorboard_writer(f"{place}/tensorboard", True)
  writer.write(0, {"loss": 1.5})
  writer.close()
  folder = files.path(place) / "tensorboard"
  name, = files.names(folder)
  assert b"loss" in files.read_bytes(folder / name)
