"""Raw downloads to tasks: records a second on one core, and memory for files of millions of lines.

    python benchmarks/data.py --part=speed                   # all JSON sources, 30,000 records each
    python benchmarks/data.py --part=memory                  # a GQA-shaped file of five million lines; 5 GB of disk
    python benchmarks/data.py --part=pictures                # decode, crop, patchify, beside transformers' processor
    python benchmarks/data.py --part=batches                 # a step's prompts, beside what steps take
    python benchmarks/data.py --part=memory --records=100000

The files are made here, in the publishers' schemas, over a few hundred pictures.  speed builds a set of each, in one
process, from the first byte to the finished files; "read" is the reader by itself.  Its seconds are processor time, so
that other programs on the machine do not count; wall time is in the JSON.  memory builds a set in its own process,
whose peak memory is what the operating system states.  pictures takes a photograph from its file to the patches of the
shown image and of a crop.  batches takes the prompts of one step after the other from a feed, as training does, but
without training: needle pictures of configs/tiny.py, which is then run for some steps, and as many photographs as
configs/v7b.py needs, from two sets by weight; with each number of threads.  How much more threads help depends on the
machine's cores.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import random
import resource
import runpy
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image
import timing  # of this folder

from virl_jax import types
from virl_jax.data import batches
from virl_jax.data import images
from virl_jax.data.curation import build
from virl_jax.data.curation import parts
from virl_jax.data.sources import records
from virl_jax.data.sources import set_files
from virl_jax.data.sources import table
from virl_jax.model import patches
from virl_jax.run import sources

ROOT = pathlib.Path(__file__).parents[1]
WORDS = ("the", "truck", "is", "left", "of", "a", "person", "with", "red", "umbrella", "behind", "window", "near", "tv")
PICTURES = 300
LONGEST = 12  # words of a question
# From docs/scaling.md: the least that a v7b microbatch takes on 8 x H100, by `plan`; the fastest step in its tables.
UPDATE_S, SCORE_S, WIDEST_S = 1.6607, 0.4152, 23.0
PHASES = ("rollout", "score", "update")
THREADS = (1, 2, 4)  # how many decode pictures: engine.threads


def config(name: str):
  """What configs/NAME.py gives: the folder is in no package, and a script's own folder is all that Python adds."""
  return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()


def words(rng: random.Random, count: int) -> str:
  return " ".join(rng.choices(WORDS, k=count))


def pictures(folder: pathlib.Path, names) -> None:
  """Writes pictures of 640 x 480, of noise that JPEG cannot make small: about 60 kB each."""
  folder.mkdir(parents=True)
  noise = np.random.default_rng(0)
  data = []
  for _ in range(8):
    out = io.BytesIO()
    small = noise.integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(out, "JPEG", quality=92)
    data.append(out.getvalue())
  for i, name in enumerate(names):
    (folder / name).write_bytes(data[i % len(data)] + i.to_bytes(4, "big"))  # bytes after the end make each different


def a_question(rng: random.Random, number: int) -> dict:
  """A question like GQA's, with all of its fields; about 700 bytes."""
  image = number * 7 % PICTURES
  first, second = str(image * 100 + rng.randrange(20)), str(image * 100 + rng.randrange(20))
  question = words(rng, rng.randrange(5, LONGEST)) + "?"
  return {"semantic": [{"operation": "select", "dependencies": [], "argument": f"truck ({first}) "},
                       {"operation": "relate", "dependencies": [0], "argument": f"person,left of,s ({second}) "},
                       {"operation": "query", "dependencies": [1], "argument": "name"}],
          "entailed": [f"{number + i:08d}" for i in range(3)], "equivalent": [f"{number:08d}"], "question": question,
          "imageId": str(2300000 + image), "isBalanced": True, "groups": {"global": "truck", "local": "10-truck_left"},
          "answer": rng.choice(WORDS), "semanticStr": f"select: truck ({first})->relate: person ({second}) [0]->query",
          "annotations": {"answer": {"0": first} if number % 3 == 0 else {}, "question": {"1": first, "3:5": second},
                          "fullAnswer": {"1": second}},
          "types": {"detailed": "relS", "semantic": "rel", "structural": "query"},
          "fullAnswer": words(rng, rng.randrange(5, LONGEST)) + "."}


def gqa(root: pathlib.Path, count: int, n_graphs: int = PICTURES) -> None:
  """Writes questions in one object, a line each, and scene graphs with 20 objects for each image."""
  rng = random.Random(0)
  drawn = [json.dumps(a_question(rng, number)) for number in range(min(count, 30_000))]
  with open(root / "train_balanced_questions.json", "w", encoding="utf-8") as file:
    file.write("{")
    for number in range(count):
      file.write(f'{"," if number else ""}\n"{number:08d}": {drawn[number % len(drawn)]}')
    file.write("\n}\n")
  with open(root / "train_sceneGraphs.json", "w", encoding="utf-8") as file:
    file.write("{")
    for image in range(n_graphs):
      objects = {str(image * 100 + i): {"name": rng.choice(WORDS), "h": 40, "w": 60, "y": 5 * i, "x": 20 * i,
                                        "attributes": ["red"], "relations": [{"object": "1", "name": "left"}] * 4}
                 for i in range(20)}
      graph = {"width": 640, "height": 480, "objects": objects}
      file.write(f'{", " if image else ""}"{2300000 + image}": {json.dumps(graph)}')
    file.write("}")
  pictures(root / "images", [f"{2300000 + i}.jpg" for i in range(PICTURES)])


def cot_lines(root: pathlib.Path, count: int) -> None:
  rng = random.Random(0)
  (root / "metadata").mkdir()
  with open(root / "metadata" / "vsr_cot_train.jsonl", "w", encoding="utf-8") as file:
    for i in range(count):
      x, y = rng.uniform(0, 500), rng.uniform(0, 400)
      file.write(json.dumps({
          "question": words(rng, 8) + "?", "answer": "tv", "image": f"{i % PICTURES}.jpg", "width": 640, "height": 480,
          "bboxs": [[x, y, x + 150, y + 60]], "dataset": "vsr", "split": "train"}) + "\n")
  pictures(root / "cot" / "vsr", [f"{i}.jpg" for i in range(PICTURES)])


def cot_items(root: pathlib.Path, count: int) -> None:
  rng = random.Random(0)
  items = []
  for i in range(count):
    path, box = f"cot/vsr/{i % PICTURES}.jpg", [rng.randrange(300), rng.randrange(200), 400, 300]
    items.append({"dataset": "vsr", "split": "train", "question_id": i, "image": [path, f"{path}###{box}"],
                  "conversations": [
                      {"from": "human", "value": f"<image>\n{words(rng, 8)}? Please provide the bounding box "
                                                 "coordinate of the region that can help you answer the question "
                                                 "better."},
                      {"from": "gpt", "value": "[0.100, 0.200, 0.300, 0.400]"}, {"from": "human", "value": "<image>"},
                      {"from": "gpt", "value": "tv"}]})
  (root / "viscot_363k.json").write_text(json.dumps(items, indent=4))
  pictures(root / "cot" / "vsr", [f"{i}.jpg" for i in range(PICTURES)])


def textvqa(root: pathlib.Path, count: int) -> None:
  rng = random.Random(0)
  data = [{"question": words(rng, 7) + "?", "image_id": f"{i % PICTURES:016x}", "image_width": 640, "image_height": 480,
           "answers": [words(rng, 2) for _ in range(10)], "question_id": i, "set_name": "train",
           "question_tokens": words(rng, 7).split(), "image_classes": ["Bottle", "Table"],
           "flickr_original_url": "https://farm8.staticflickr.com/0/0_o.jpg",
           "flickr_300k_url": "https://c8.staticflickr.com/0/0_z.jpg"} for i in range(count)]
  (root / "TextVQA_0.5.1_train.json").write_text(json.dumps({"dataset_type": "train", "data": data}))
  pictures(root / "train_images", [f"{i:016x}.jpg" for i in range(PICTURES)])


def visual7w(root: pathlib.Path, count: int) -> None:
  rng = random.Random(0)
  shown, n_each = [], -(-count // PICTURES)
  for image in range(PICTURES):
    pairs = [{"qa_id": image * n_each + i, "image_id": image, "question": words(rng, 6) + "?", "type": "where",
              "answer": words(rng, 3) + ".", "multiple_choices": [words(rng, 3) + f" {c}." for c in "xyz"]}
             for i in range(n_each)]
    shown.append({"image_id": image, "filename": f"v7w_{image}.jpg", "split": "train", "qa_pairs": pairs})
  (root / "dataset_v7w_telling.json").write_text(json.dumps({"dataset": "visual7w-telling", "images": shown}))
  boxes = [{"qa_id": i, "name": "grass", "x": 5, "y": 6, "width": 100, "height": 50} for i in range(0, count, 2)]
  (root / "v7w_telling_answers.json").write_text(json.dumps({"boxes": boxes}))
  pictures(root / "images", [f"v7w_{i}.jpg" for i in range(PICTURES)])


def mini_o3(root: pathlib.Path, count: int) -> None:
  rng = random.Random(0)
  data = [{"images": [f"images/{i % PICTURES}.jpg"], "problem": f"<image>\n{words(rng, 8)}?\nA. tv\nB. truck",
           "solution": "A", "doc_id": i + 1, "data_source": "visual_probe"} for i in range(count)]
  (root / "visual_probe_train.json").write_text(json.dumps(data))
  pictures(root / "images", [f"{i}.jpg" for i in range(PICTURES)])


SETS = {"gqa": ("gqa", gqa), "visual_cot, metadata": ("visual_cot", cot_lines),
        "visual_cot, items": ("visual_cot", cot_items), "textvqa": ("textvqa", textvqa),
        "visual7w": ("visual7w", visual7w), "mini_o3": ("mini_o3", mini_o3)}


def speed(args, folder: pathlib.Path) -> dict:
  """Records a second of each source, in one process."""
  count, figures, rows = args.records or 30_000, {}, []
  for name, (source, make) in SETS.items():
    root = folder / source / "raw"
    shutil.rmtree(folder / source, ignore_errors=True)
    root.mkdir(parents=True)
    make(root, count)
    took = collections.defaultdict(list)
    for turn in range(args.repeat + 1):
      began = time.process_time()
      n_read = sum(isinstance(record, records.Raw) for record in table.SOURCES[source].read(str(root), "train"))
      read, wall = time.process_time(), time.perf_counter()
      out = folder / source / f"out{turn}"
      counts = build.run(parts.Job(source, str(root), "train", str(out)), 1)
      if turn:  # the first fills caches
        took["read"].append(n_read / (read - began))
        took["build"].append(counts.tasks / (time.process_time() - read))
        took["wall"].append(counts.tasks / (time.perf_counter() - wall))
      shutil.rmtree(out)
    assert counts.tasks >= count and not counts.rejects, counts.to_dict()
    bytes_ = sum(p.stat().st_size for p in root.rglob("*.json*"))
    figures[name] = {"records": counts.records, "bytes": bytes_, **{
        f"{what}_per_s": timing.median(rates) for what, rates in took.items()}, "build_least_per_s": min(took["build"])}
    rows.append([name, counts.records, f"{bytes_ / 1e6:.0f}", *(f"{timing.median(rates):,.0f} ({min(rates):,.0f}-"
                                                              f"{max(rates):,.0f})"
                                                              for what, rates in took.items() if what != "wall")])
  print(timing.table(["source", "records", "MB", "read, records/s", "build, records/s"], rows))
  return figures


def memory(args, folder: pathlib.Path) -> dict:
  """The peak memory of a process that builds a set from a file of many lines."""
  count = args.records or 5_000_000
  root = folder / "raw"
  root.mkdir()
  gqa(root, count, n_graphs=75_000)  # as many as GQA's train split has
  size = sum(p.stat().st_size for p in root.glob("*.json"))
  code = f"""
import resource, time
from virl_jax.data.curation import build
from virl_jax.data.curation import parts
began = time.process_time()
counts = build.run(parts.Job("gqa", {str(root)!r}, "train", {str(folder / 'out')!r}), 1)
print(counts.tasks, time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
  tasks, seconds, peak = map(float, done.stdout.split())
  assert tasks == count
  figures = {"records": count, "bytes": size, "peak_bytes": int(peak), "seconds": seconds, "per_s": tasks / seconds}
  print(timing.table(["lines", "GB of JSON", "peak, GB", "minutes of a core", "records/s"], [[
      count, f"{size / 1e9:.2f}", f"{peak / 1e9:.2f}", f"{seconds / 60:.1f}", f"{tasks / seconds:,.0f}"]]))
  return figures


def photographs(args) -> list[bytes]:
  """The files in --photos, or else drawn pictures with sizes of photographs."""
  if args.photos:
    return [p.read_bytes() for p in sorted(pathlib.Path(args.photos).glob("*.jpg"))[:12]]
  noise, made = np.random.default_rng(0), []
  for width, height in ((640, 480), (1024, 768), (1600, 1200), (2048, 1536)):
    out = io.BytesIO()
    small = noise.integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    made.append(out.getvalue())
  return made


def shown(args, _folder) -> dict:
  """From a file to the patches of the shown image and of a crop: ours, and transformers' processor, in turns."""
  from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
  files, grid, cfg = photographs(args), patches.Grid(), images.Config()
  theirs = Qwen2VLImageProcessorPil(min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels)
  box = lambda im: (im.width // 4, im.height // 4, im.width // 2, im.height // 2)

  def ours():
    for data in files:
      im = images.decode(data)
      images.prepare(im, None, cfg.min_pixels, cfg.max_pixels, grid)
      images.prepare(im, types.Box(*box(im)), cfg.crop_min_pixels, cfg.crop_max_pixels, grid)

  def processor():
    for data in files:
      im = Image.open(io.BytesIO(data)).convert("RGB")
      for part in (im, im.crop(box(im))):
        theirs(images=[part], return_tensors="np")

  took = timing.interleaved({"ours": ours, "transformers": processor}, args.repeat)
  rate = {name: len(files) / timing.median(took[name]) for name in ("ours", "transformers")}
  print(timing.table(["side", "photographs a second", "seconds for all"], [
      [name, f"{rate[name]:.1f}", timing.spread(took[name])] for name in rate]))
  print(f"ratio {rate['ours'] / rate['transformers']:.2f}")
  return {"photographs": len(files), **{f"{name}_per_s": value for name, value in rate.items()},
          "ratio": rate["ours"] / rate["transformers"]}


def least_v7b_s() -> dict[str, float]:
  """The least seconds that a step of configs/v7b.py takes, by name; the last is the smallest in any table."""
  c = config("v7b")
  trajectories = c.rollout.prompts * c.rollout.group_size
  # On 8 x H100, a microbatch is a row of `microbatch_tokens` a device; trajectories have half of max_total_tokens.
  microbatches = trajectories * c.rollout.max_total_tokens / 2 / (8 * c.learner.microbatch_tokens)
  return {"8 x H100, update and score alone": microbatches * (UPDATE_S + SCORE_S),
          "1,024 x H100, all of a step": WIDEST_S}


def batches_part(args, folder: pathlib.Path) -> dict:
  """Batches a second from a feed, with each number of threads, beside what steps of the tiny run and of 7B consume."""
  tiny_c, v7b_c = config("tiny"), config("v7b")
  tiny_c.data.path = str(folder / "needle")
  files = photographs(args)
  every = [files[i % len(files)] + i.to_bytes(4, "big") for i in range(2 * v7b_c.rollout.prompts)]
  for name, some in (("one-train", every[::2]), ("two-train", every[1::2])):
    (folder / "sets" / name).mkdir(parents=True)
    tasks = [types.Task(f"{name}{i}", data, "?", ("a",), provenance=f"{i:032x}") for i, data in enumerate(some)]
    part = set_files.write_part(folder / name, tasks, [records.digest(data) for data in some])
    set_files.finish(folder / "sets" / name, name.partition("-")[0], "train", [part], "", {})
  v7b_c.data.source, v7b_c.data.path, v7b_c.data.weights = "set", str(folder / "sets"), ("one:3", "two:1")
  figures, rows = {}, []
  for name, c in (("tiny", tiny_c), ("v7b", v7b_c)):
    source, prompts = sources.load(c, "train"), c.rollout.prompts
    for threads in THREADS:
      count = args.batches if name == "v7b" else 20 * args.batches
      with contextlib.closing(
          batches.Feed(source, c.seed, prompts, c.image.decode_max_pixels, threads=threads)) as feed:
        feed.batch(0)
        began, cpu = time.perf_counter(), time.process_time()
        for step in range(1, count + 1):
          feed.batch(step)
        wall, used = time.perf_counter() - began, time.process_time() - cpu
      figures[f"{name}/{threads}"] = {"prompts": prompts, "threads": threads, "batches_per_s": count / wall,
                                      "core_s_per_batch": used / count, "pictures_per_core_s": prompts * count / used}
      rows.append([name, prompts, threads, f"{count / wall:.3g}", f"{used / count:.3g}",
                   f"{prompts * count / used:,.0f}"])
  print(timing.table(["configuration", "prompts", "threads", "batches/s", "core seconds a batch",
                      "pictures a core second"], rows))
  consumed = {"tiny, here": ("tiny", tiny_step_s(args.run, folder))} | {f"v7b, {name}": ("v7b", s)
                                                              for name, s in least_v7b_s().items()}
  rows = []
  for name, (of, seconds) in consumed.items():
    batch_s = figures[f"{of}/1"]["core_s_per_batch"]
    times = {threads: figures[f"{of}/{threads}"]["batches_per_s"] * seconds for threads in THREADS}
    figures[name] = {"step_s": seconds, "batches_per_s": 1 / seconds, "cores": batch_s / seconds,
                     "given_over_taken": times}
    rows.append([name, f"{seconds:.3g}", f"{1 / seconds:.3g}", f"{batch_s:.3g}", f"{batch_s / seconds:.2g}",
                 *(f"{times[threads]:,.0f}" for threads in THREADS)])
  print(timing.table(["step of", "takes, s", "consumes batches/s", "core seconds a batch", "cores kept busy",
                      *(f"given over taken, threads: {threads}" for threads in THREADS)], rows))
  return figures


def tiny_step_s(workdir: str, folder: pathlib.Path) -> float:
  """Seconds of the fastest step of configs/tiny.py (others compile), of a workdir or of a run in the folder."""
  run = pathlib.Path(workdir or folder / "run")
  if not workdir:
    subprocess.run([sys.executable, "-m", "virl_jax.train", f"--config={ROOT / 'configs' / 'tiny.py'}",
                    f"--workdir={run}", "--config.steps=6", "--config.eval.tasks=0",
                    f"--config.data.path={folder / 'needle'}", "--config.log.tensorboard=False"],
                   check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[1:]]
  return min(sum(line[f"time/{phase}_s"] for phase in PHASES) for line in lines)


PARTS = {"speed": speed, "memory": memory, "pictures": shown, "batches": batches_part}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--part", choices=PARTS, default="speed")
  parser.add_argument("--records", type=int, default=0, help="of each file; 0 for the part's own number")
  parser.add_argument("--repeat", type=int, default=3)
  parser.add_argument("--batches", type=int, default=3, help="of photographs, 20 times as many needle pictures")
  parser.add_argument("--run", default="", help="workdir of configs/tiny.py, for batches; without one it is run")
  parser.add_argument("--photos", default="", help="folder of JPEG files for photographs; without one they are drawn")
  parser.add_argument("--folder", default="", help="where files are made; without one, the system's temporary folder")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
    figures = PARTS[args.part](args, pathlib.Path(folder))
  figures = {args.part: figures, "peak_bytes_here": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
  print(timing.last_line(figures, ("numpy", "pillow", "transformers")))


if __name__ == "__main__":
  main()
