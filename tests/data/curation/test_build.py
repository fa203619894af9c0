"""Building sets: what is counted, one result whoever makes the parts, and going on after any end."""

import collections
import io
import json
import os
import pathlib
import subprocess
import sys

from absl import flags
from PIL import Image
import pytest

from virl_jax import config
from virl_jax import curate
from virl_jax.data import batches
from virl_jax.data import images
from virl_jax.data.curation import build
from virl_jax.data.curation import parts
from virl_jax.data.sources import records
from virl_jax.data.sources import sets
from virl_jax.run import setup

ROOT = pathlib.Path(__file__).parents[3]


def picture(number: int, size=(40, 30), kind="PNG") -> bytes:
  out = io.BytesIO()
  Image.new("RGB", size, (number % 256, number // 256, 7)).save(out, kind)
  return out.getvalue()


@pytest.fixture
def raw(tmp_path):
  """A raw folder with most of what can be wrong: 20 good records, 8 bad ones."""
  root = tmp_path / "raw"
  (root / "img").mkdir(parents=True)
  for i in range(10):
    (root / "img" / f"{i}.png").write_bytes(picture(i))
  (root / "img" / "cut.png").write_bytes(picture(1, (400, 300))[:-300])
  (root / "img" / "no.png").write_bytes(b"<html>not found</html>")
  line = lambda i, **fields: json.dumps({"image": f"img/{i % 10}.png", "question": f"q{i}?", "answers": ["a"],
                                         "boxes": [[1, 2, 10, 20]], "id": f"r{i}", "task": f"k{i % 2}", **fields})
  lines = [line(i) for i in range(16)]
  lines += [line(16, boxes=[[-5, 2, 10, 50], [1, 1, 2, 2]]), line(17, boxes=[[1, 40, 9, 60]]), line(18, boxes=[]),
            line(19, question="q0?", image="img/0.png")]  # the last is the first by another name
  lines += [line(0), line(1, image="img/9.png"), line(22, image="img/none.png"), line(23, image="img/no.png"),
            line(24, image="img/cut.png"), "nonsense", line(26, answers=[], boxes=[[5, 5, 5, 9]]),
            line(27, question="")]
  (root / "r.jsonl").write_text("\n".join(lines) + "\n")
  return root


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(parts, "CHUNK_RECORDS", 5)


def job(raw, out, **fields):
  return parts.Job("jsonl", str(raw), "train", str(out), **{"max_rejects": 1.0, **fields})


def content(out):
  """All files of a set, but for tensorflow-datasets' own two."""
  folder = pathlib.Path(out) / "jsonl-train"
  return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
          if p.is_file() and p.name not in ("dataset_info.json", "features.json", "set.json")}


WANT = {
    "records": 28, "tasks": 21, "boxes": {"ok": 19, "clipped": 1, "unusable": 1},
    "rejects": {"bad image": 1, "broken line": 1, "duplicate id": 2, "missing image": 1,
                "neither answers nor usable boxes": 1, "no question": 1},
    "notes": {"tasks that are the same as an earlier one": 1, "tasks that lost all their boxes": 1},
    "kinds": {"k0": {"clipped": 1, "ok": 10, "tasks": 11}, "k1": {"ok": 9, "tasks": 10, "unusable": 1}}}


def test_what_is_counted_and_named(raw, tmp_path):
  counts = build.run(job(raw, tmp_path / "out"))
  assert counts.to_dict() == WANT
  assert json.loads((tmp_path / "out" / "jsonl-train" / "counts.json").read_text()) == WANT
  rejects = [json.loads(line) for line in (tmp_path / "out" / "jsonl-train" / "rejects.jsonl").read_text().splitlines()]
  assert collections.Counter(r["reason"] for r in rejects) == WANT["rejects"]
  assert {r["where"]: r["reason"] for r in rejects} == {
      "r0": "duplicate id", "r1": "duplicate id", "r22": "missing image", "r23": "bad image",
      "r.jsonl:26": "broken line", "r26": "neither answers nor usable boxes", "r27": "no question"}
  assert next(r["detail"] for r in rejects if r["where"] == "r22") == "img/none.png"
  assert not (tmp_path / "out" / "jsonl-train" / ".build").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_read_moves_a_bar(raw, tmp_path, monkeypatch, jobs):
  """By the records of the source, whoever makes parts of them; how many come nobody knows."""
  bar, made = build.progress.bar, []

  def counted(total, words, unit, shown=True):
    made.append((total, words, unit))
    it = bar(total, words, unit, shown)
    it.update = made.append
    return it

  monkeypatch.setattr(build.progress, "bar", counted)
  build.run(job(raw, tmp_path / "out"), jobs)
  assert made[0] == (None, "reading jsonl", "record") and len(made) > 3 and sum(made[1:]) == WANT["records"]


def test_the_set_is_what_training_reads(raw, tmp_path):
  build.run(job(raw, tmp_path / "out"))
  source = sets.load(tmp_path / "out", "all", 0.2, 0)
  assert [task.uid for task in source.tasks] == [f"r{i}" for i in range(20)] + ["r24"]
  task = source.task(16)
  assert task.boxes == ((0, 2, 10, 30), (1, 1, 2, 2)) and task.source == "jsonl" and task.split == "train"
  data = (raw / "img" / "6.png").read_bytes()
  assert task.image == str(raw / "img" / "6.png")
  assert task.provenance == records.provenance(records.digest(data), "q16?", ["a"], None, task.boxes, "exact")
  assert int(source.image_N[16]) == int(records.digest(data)[:16], 16)


def test_embedded_pictures_need_no_raw_folder(raw, tmp_path):
  build.run(job(raw, tmp_path / "out", embed=True))
  kept = build.run(job(raw, tmp_path / "kept"))
  source = sets.load(tmp_path / "kept", "all", 0.2, 0)
  wanted = [(task.uid, task.provenance, (raw / task.image).read_bytes()) for task in source.tasks]
  raw.rename(tmp_path / "elsewhere")
  source = sets.load(tmp_path / "out", "all", 0.2, 0)
  assert [(t.uid, t.provenance, t.image) for t in source.tasks] == wanted and len(source) == kept.tasks
  assert images.decode(source.task(3).image).size == (40, 30)


def test_decoding_finds_pictures_that_are_cut_off(raw, tmp_path):
  counts = build.run(job(raw, tmp_path / "out", decode=True))
  assert counts.rejects["bad image"] == 2 and counts.tasks == 20


@pytest.mark.parametrize("how", [{"jobs": 2}])
def test_whoever_makes_the_parts_the_bytes_are_the_same(how, raw, tmp_path):
  build.run(job(raw, tmp_path / "one"))
  build.run(job(raw, tmp_path / "other"), **how)
  assert content(tmp_path / "one") == content(tmp_path / "other")


def test_a_build_that_ends_anywhere_goes_on(raw, tmp_path, monkeypatch):
  """Ended before each of the things that it does to files, in turn."""
  build.run(job(raw, tmp_path / "whole"))
  want, ended, made = content(tmp_path / "whole"), 0, []
  replace, make_part = os.replace, parts.make_part

  class Ended(Exception):
    pass

  while True:
    left = ended
    out = tmp_path / f"out{ended}"

    def counted(*args):
      nonlocal left
      left -= 1
      if left < 0:
        raise Ended
      replace(*args)

    monkeypatch.setattr(os, "replace", counted)
    try:
      build.run(job(raw, out))
      break
    except Ended:
      pass
    monkeypatch.setattr(os, "replace", replace)
    there = {p.stem for p in out.glob("*/.build/part-*.json")}
    monkeypatch.setattr(parts, "make_part", lambda job, chunk: made.append(chunk[0]) or make_part(job, chunk))
    build.run(job(raw, out))
    assert content(out) == want, ended
    assert not there & {f"part-{number:06d}" for number in made}  # what was made is not made again
    made.clear()
    monkeypatch.setattr(parts, "make_part", make_part)
    ended += 1
  assert ended > 15


def test_a_whole_set_is_left_alone_until_its_files_change(raw, tmp_path):
  said = []
  build.run(job(raw, tmp_path / "out"), say=said.append)
  before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
  assert build.run(job(raw, tmp_path / "out"), say=said.append).to_dict() == WANT
  assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
  assert said[-1].endswith("is there, of the same files")
  with open(raw / "r.jsonl", "a") as file:
    file.write('{"image": "img/1.png", "question": "new?", "answers": ["b"]}\n')
  assert build.run(job(raw, tmp_path / "out")).tasks == WANT["tasks"] + 1
  assert len(sets.load(tmp_path / "out", "all", 0.2, 0)) == WANT["tasks"] + 1


def test_parts_of_other_files_are_not_taken(raw, tmp_path):
  said, out = [], tmp_path / "out"
  with pytest.raises(ValueError):
    build.run(job(raw, out, max_rejects=0.01))
  assert list(out.glob("*/.build/part-*.json"))
  build.run(job(raw, out, max_rejects=1.0), say=said.append)  # the share is no part of the plan
  assert "goes on after 6 parts" in said[0]
  with pytest.raises(ValueError):
    build.run(job(raw, tmp_path / "b", max_rejects=0.01))
  (raw / "r.jsonl").write_text((raw / "r.jsonl").read_text().replace("q3?", "other?"))
  build.run(job(raw, tmp_path / "b"), say=said.append)
  assert "begins anew" in said[2] and sets.load(tmp_path / "b", "all", 0.2, 0).task(3).question == "other?"


def test_too_many_rejects_are_fatal_and_say_what_was_found(raw, tmp_path):
  lines = [json.dumps({"image": f"train/n{i}.jpg", "question": "q", "answers": ["a"]}) for i in range(6)]
  good = json.dumps({"image": "img/1.png", "question": "q", "answers": ["a"]})
  (raw / "r.jsonl").write_text("\n".join([*lines, good]))
  with pytest.raises(ValueError) as error:
    build.run(job(raw, tmp_path / "out", max_rejects=0.5))
  said = str(error.value)
  assert "at most 50% of the records may be rejected (--max_rejects). Received: 6 of 7: 6 missing image" in said
  assert "train/n0.jpg; r.jsonl:2: train/n1.jpg; r.jsonl:3: train/n2.jpg" in said and "no such folder" in said
  (raw / "train").mkdir()
  for name in ("v0.jpg", "v1.jpg", "v2.jpg", "v3.jpg"):  # images of another split
    (raw / "train" / name).write_bytes(b"")
  with pytest.raises(ValueError, match="instead, .*train is a folder with v0.jpg, v1.jpg, v2.jpg"):
    build.run(job(raw, tmp_path / "out", max_rejects=0.5))
  assert build.run(job(raw, tmp_path / "out", max_rejects=0.9)).tasks == 1


def test_a_raw_folder_that_is_not_there(tmp_path):
  with pytest.raises(ValueError, match=r"--data must be jsonl's raw folder, with \*.jsonl.*which is not there"):
    build.run(job(tmp_path / "none", tmp_path / "out"))


def test_the_sets_of_a_folder_are_gathered(raw, tmp_path):
  build.run(job(raw, tmp_path / "out"))
  whole = build.gather(str(tmp_path / "out"))
  assert whole == {"jsonl-train": WANT} == json.loads((tmp_path / "out" / "counts.json").read_text())
  first = json.loads((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()[0])
  assert first == {"source": "jsonl", "split": "train", "where": "r0", "reason": "duplicate id", "detail": "q0?"}


def command(*args, **how):
  return subprocess.run([sys.executable, "-m", "virl_jax.curate", *args], cwd=ROOT, capture_output=True, text=True,
                        **how)


def test_the_command_builds_what_it_can(raw, tmp_path):
  done = command("build", "--source=jsonl,gqa", f"--data={raw}", f"--out={tmp_path / 'out'}", "--max_rejects=0.5",
                 "--jobs=1")
  assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
  assert "error: gqa: not built, for the reasons above; built: jsonl" in done.stderr
  assert "GQA's train questions must be in" in done.stdout and "a folder with img/, r.jsonl" in done.stdout
  assert "jsonl-train: 28 records, 21 tasks\n  boxes: 19 ok, 1 clipped, 1 unusable\n" in done.stdout
  assert list(json.loads((tmp_path / "out" / "counts.json").read_text())) == ["jsonl-train"]


@pytest.mark.parametrize("args, said", [
    (("--source=jsonl",), "--data is missing: curate build --source=NAME --data=RAW --out=DIR"),
    (("--source=jsonl", "--data=a,b", "--out=o"), "--data must be one folder, or one for each source.* 2 for 1"),
    (("--source=jsonl", "--data=a", "--out=o", "--beam=--x"), "--beam must be left out without --runner"),
    (("--source=coco", "--data=a", "--out=o"), "--source must be one of")])
def test_the_command_s_own_mistakes_are_named(args, said):
  values = flags.FlagValues()
  curate.define_flags(values)
  values(["curate", *args])
  with pytest.raises(ValueError, match=said):
    curate.build(values)


def test_another_sub_command_is_refused():
  done = command("bild", "--source=jsonl")
  assert done.returncode == 1 and "must be build, or there must be none. Received: ['bild']" in (
      done.stdout + done.stderr)


# Beam, where it is installed

def test_beam_gives_the_same_bytes(raw, tmp_path):
  pytest.importorskip("apache_beam")
  build.run(job(raw, tmp_path / "one"))
  # In this process: workers of their own would have chunks of another size.
  options = ["--runner=DirectRunner", "--direct_running_mode=in_memory"]
  assert build.run(job(raw, tmp_path / "beam"), beam_options=options).to_dict() == WANT
  assert content(tmp_path / "one") == content(tmp_path / "beam")


def test_beam_goes_on_where_another_way_ended(raw, tmp_path):
  pytest.importorskip("apache_beam")
  with pytest.raises(ValueError):
    build.run(job(raw, tmp_path / "out", max_rejects=0.01))
  made = tmp_path / "out" / "jsonl-train" / ".build"
  (made / "part-000002.json").unlink()
  kept = {p: p.stat().st_mtime_ns for p in made.glob("part-*.json")}
  with pytest.raises(ValueError):
    build.run(job(raw, tmp_path / "out", max_rejects=0.01), beam_options=["--runner=DirectRunner"])
  now = {p: p.stat().st_mtime_ns for p in made.glob("part-*.json")}
  assert len(now) == 6 and all(now[p] == time for p, time in kept.items())


@pytest.mark.parametrize("options, view, flag, value", [
    (["--runner=FlinkRunner", "--flink_master=host:8081"], "FlinkRunnerOptions", "flink_master", "host:8081"),
    (["--runner=SparkRunner", "--spark_master_url=spark://host:7077"], "SparkRunnerOptions", "spark_master_url",
     "spark://host:7077"),
    (["--runner=DataflowRunner", "--project=p", "--region=r", "--temp_location=gs://b/t"], "GoogleCloudOptions",
     "project", "p"),
    (["--runner=DirectRunner", "--direct_num_workers=2"], "DirectOptions", "direct_num_workers", 2)])
def test_beam_s_other_runners_take_their_flags(options, view, flag, value, raw, tmp_path):
  """The pipeline is built and not run: no cluster is here."""
  pytest.importorskip("apache_beam")
  from apache_beam.options import pipeline_options
  from apache_beam.runners.direct import direct_runner
  # Dataflow's own runner asks the cloud for its buckets as soon as it is made.
  runner = direct_runner.DirectRunner() if "--runner=DataflowRunner" in options else None
  made = build.pipeline(job(raw, tmp_path / "out"), options, runner)
  assert getattr(made._options.view_as(getattr(pipeline_options, view)), flag) == value
  graph = made.to_runner_api().components.transforms
  assert {"source", "read", "deal", "make"} <= {step.unique_name for step in graph.values()}


def test_beam_s_unknown_runner_is_named(raw, tmp_path):
  pytest.importorskip("apache_beam")
  with pytest.raises(ValueError, match="--runner and --beam must be a runner.*RayRunner.*Valid values.*DirectRunner"):
    build.pipeline(job(raw, tmp_path / "out"), ["--runner=RayRunner"])


def test_without_beam_the_extra_is_named(raw, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  with pytest.raises(ValueError, match=r"--runner needs Apache Beam: pip install 'virl-jax\[curate\]'"):
    build.run(job(raw, tmp_path / "out"), beam_options=["--runner=DirectRunner"])


def test_a_run_s_source_is_a_set(raw, tmp_path):
  build.run(job(raw, tmp_path / "out"))
  c = config.default()
  c.data.source, c.data.path, c.data.eval_fraction = "set", str(tmp_path / "out"), 0.3
  setup.sections(c)
  train, test = (setup.source(c, split) for split in ("train", "test"))
  assert len(train) + len(test) == WANT["tasks"] and len(test) and train.fingerprint() == test.fingerprint()
  # One picture is cut off, which its header does not say: another task stands in for it.
  drawn = batches.train(train, 0, 0, len(train), 10 ** 6)
  assert len(drawn.tasks) == len(train) and all(task.image.mode == "RGB" for task in drawn.tasks)
  c.data.path = ""
  with pytest.raises(ValueError, match="config.data.path must be the folder of a finished set when"):
    setup.sections(c)
  c.data.path = str(raw)
  with pytest.raises(ValueError, match="data.path must be a finished set.*which holds img, r.jsonl"):
    setup.source(c, "train")
