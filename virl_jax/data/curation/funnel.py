"""From finished sets to a smaller one whose tasks need looking: what `python -m virl_jax.curate` does.

    facts    of each task, read once (`facts`)
    rules    what can be decided without a policy (`rules`)
    policy   a policy's answers to the tasks that are left, with zooms and without, and their scores (`policy`)
    filter   which tasks stay, by these answers (`band`)

Tasks are dealt to shards by their content.  A shard's facts, and the policy's answers to its tasks, are files that are
written whole, each with a hash of all that went into it: an interrupted curation goes on, and one with other thresholds
of the filter reads no picture again and asks no policy.  In OUT/:

    NAME/                 for each set of the data, those of its tasks that stay; OUT is what data.path takes
    tasks.jsonl           each task that stays: its facts in short, and how often it was solved
    rejects.jsonl         each task that is dropped: the same, with stage, reason and detail
    counts.json           how many, by stage, reason and source
    report.html           the same for people, with pictures
    .curate/              facts/ and samples/: one file a shard
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import hashlib
import itertools
import json
import pathlib
import shutil

from virl_jax import types
from virl_jax.data import endpoint
from virl_jax.data import images
from virl_jax.data.curation import band
from virl_jax.data.curation import facts as facts_lib
from virl_jax.data.curation import policy as policy_lib
from virl_jax.data.curation import rules
from virl_jax.data.curation import stages
from virl_jax.data.sources import records
from virl_jax.data.sources import set_files
from virl_jax.data.sources import sets
from virl_jax.eval.benchmarks import rows
from virl_jax.eval.benchmarks import table
from virl_jax.report import gallery
from virl_jax.report import sieve
from virl_jax.run import files
from virl_jax.run import hosts
from virl_jax.run import progress

_FORMAT = 1
_PART_TASKS = 4096
_EXAMPLES = 3          # for each reason
_KEPT_EXAMPLES = 9
_EXAMPLE_SIDE_PX = 360
_UNASKED = "could not be asked"
_LOST = "the endpoint gave no reply"


@dataclasses.dataclass(frozen=True)
class Job:
  """What is to be done.

  Attributes:
    data: the set, or folder of sets.
    out: OUT, see the module.
    shard_tasks: about how many tasks a shard has.
    benchmarks: "NAME=PATH" or "NAME=PATH=IMAGES" of each benchmark whose pictures nobody may train on.
    rules, policy, band: thresholds of the stages.
    image: how pictures are shown.
    factor: what a shown picture's sides are multiples of, pixels.
    seed: of the choice among near-duplicates and of the sampling.
  """

  data: str
  out: str
  shard_tasks: int
  benchmarks: tuple[str, ...]
  rules: rules.Config
  policy: stages.Policy
  band: band.Config
  image: images.Config
  factor: int
  seed: int

  @property
  def work(self) -> pathlib.Path:
    """The folder of the shards."""
    return pathlib.Path(self.out) / ".curate"


@dataclasses.dataclass(frozen=True)
class _Sets:
  """The data: sets by name, and the place, (set, index), of each task of each shard."""

  names: tuple[str, ...]
  sources: tuple[sets.Source, ...]
  shards: tuple[tuple[tuple[int, int], ...], ...]

  def task(self, place: tuple[int, int]) -> types.Task:
    return self.sources[place[0]].task(place[1])

  def provenance(self, place: tuple[int, int]) -> str:
    return self.sources[place[0]].provenance_N[place[1]].ljust(16, b"\0").hex()


def run(job: Job, asker: policy_lib.Asker | None = None, threads: int = 2,
        say: Callable[[str], None] = lambda line: None) -> dict:
  """Curates, or goes on with it.

  Args:
    job: what to curate, and how.
    asker: the policy that is asked; None for none: then no task is filtered by a policy's answers.
    threads: how many read pictures in this process.
    say: called with each line of progress, by each process.

  Returns:
    What counts.json holds.

  Raises:
    ValueError: there is no set, a benchmark cannot be read, or no task stays.
    endpoint.Unreachable: the endpoint is gone; or it gave no reply to some tasks: names them, once all else is written.
  """
  if "://" in job.out:
    raise ValueError(f"--out must be on a disk, for only a workdir may lie in a bucket. Received: {job.out}")
  here, there = pathlib.Path(job.data).resolve(), pathlib.Path(job.out).resolve()
  if here == there or here in there.parents or there in here.parents:
    raise ValueError(f"--out must be another folder than --data, and neither within the other. Received: {job.out}")
  data = _open(job)
  hosts.first(lambda: (job.work / "facts").mkdir(parents=True, exist_ok=True))
  hosts.first(lambda: (job.work / "samples").mkdir(parents=True, exist_ok=True))
  leaks = _benchmarks(job, threads)
  facts = _facts(job, data, threads, say)
  drops = _rules(job, facts, leaks)
  said = _said(job, data, facts, drops, asker, say)
  for place, line in said.items():
    whole = job.rules.is_whole(facts[place])
    found = rules.Drop(_UNASKED, line["unasked"]) if line["unasked"] else rules.Drop(_LOST, line["lost"]) if (
        "lost" in line) else band.judge(
            *([sample["score"] for sample in line[name]] for name in ("with", "without")), job.band, whole)
    if found:
      drops[place] = found
  counts = hosts.first(lambda: _write(job, data, facts, drops, said))
  _missing([f"{facts[place].uid}: {line['lost']}" for place, line in said.items() if "lost" in line])
  return counts


def _missing(lost: Sequence[str]) -> None:
  """Ends a curation that lacks tasks, each given with why it was lost.

  Raises:
    endpoint.Unreachable: some are lost; names them.
  """
  if lost:
    raise endpoint.Unreachable(
        f"--endpoint gave no reply to {len(lost)} tasks ({progress.few(lost)}). They count as dropped, none as "
        "wrong; all else is written: the same command asks for them again")


def stage(reason: str) -> str:
  """The stage that drops tasks for this reason."""
  return ("rules" if reason in (*rules.ALONE, *rules.TOGETHER) else "policy" if reason in (_UNASKED, _LOST) else
          "filter")


def _open(job: Job) -> _Sets:
  """The sets, their tasks dealt to shards by content."""
  folders = sets.folders(job.data)
  sources = tuple(sets.load(folder, "all", 0.5, 0) for folder in folders)
  n_shards = -(-sum(map(len, sources)) // job.shard_tasks)
  shards = [[] for _ in range(n_shards)]
  data = _Sets(tuple(folder.resolve().name for folder in folders), sources, ())
  for place in ((k, i) for k, source in enumerate(sources) for i in range(len(source))):
    shards[int(data.provenance(place)[:16], 16) % n_shards].append(place)
  return dataclasses.replace(data, shards=tuple(map(tuple, shards)))


# --- shards: a file that is not whole, or not made from what is wanted now, is made again -------------------------


def _digest(*parts) -> str:
  return hashlib.blake2b(json.dumps([_FORMAT, *parts]).encode(), digest_size=16).hexdigest()


def _read(path: pathlib.Path, of: str) -> list[dict] | None:
  """The lines of a shard's file, if it is whole and was made from what `of` is the hash of; else None."""
  try:
    head, *lines = path.read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines] if json.loads(head) == {"of": of, "n": len(lines)} else None
  except (OSError, ValueError):
    return None


def _keep(path: pathlib.Path, of: str, lines: Sequence[dict]) -> None:
  files.write_text(files.path(path), "".join(json.dumps(it) + "\n" for it in ({"of": of, "n": len(lines)}, *lines)))


def _facts(job, data, threads, say) -> dict[tuple[int, int], facts_lib.Facts]:
  """The facts of each task, by place, in the order of the sets."""
  names = ("min_pixels", "max_pixels", "crop_min_side_px", "crop_max_aspect", "crop_expand", "decode_max_pixels")
  how = [facts_lib.VERSION, job.factor, *(getattr(job.image, name) for name in names)]
  paths = [job.work / "facts" / f"{number:05d}.jsonl" for number in range(len(data.shards))]
  of = [_digest("facts", how, [(data.names[k], i, data.provenance((k, i))) for k, i in shard]) for shard in data.shards]
  due = [n for n in range(len(paths)) if hosts.mine(n) and _read(paths[n], of[n]) is None]
  if due:
    say(f"facts: {len(due)} of {len(paths)} shards to read")
  one = lambda place: facts_lib.of(data.task(place), int(data.sources[place[0]].image_N[place[1]]), job.image,
                                   job.factor).to_json()
  n = sum(len(data.shards[number]) for number in due)
  with futures.ThreadPoolExecutor(threads) as pool, progress.bar(n, "rules: reading", "task", hosts.leads()) as bar:
    for number in due:
      hosts.beat("facts")
      lines = []
      for line in pool.map(one, data.shards[number]):
        lines.append(line)
        bar.update(1)
      _keep(paths[number], of[number], lines)
  hosts.meet()  # now all are there
  found = {}
  for shard, path, digest in zip(data.shards, paths, of):
    lines = _read(path, digest)
    if lines is None:
      raise ValueError(f"{path} must be on a disk that all processes see, and is not there, or not whole")
    found |= zip(shard, map(facts_lib.Facts.from_json, lines))
  return dict(sorted(found.items()))


def _benchmarks(job, threads) -> list[tuple[str, facts_lib.Look]]:
  """The pictures of the benchmarks, each with its benchmark's name."""
  found = []
  for number, entry in enumerate(job.benchmarks):
    name, path, folder = (*entry.split("=", 2), "")[:3]
    if name not in table.BENCHMARKS:
      raise ValueError(f"config.curate.benchmarks must name benchmarks out of {', '.join(table.BENCHMARKS)}, as "
                       f"NAME=PATH. Received: {entry!r}")
    loaded = table.BENCHMARKS[name].load(path, rows.How(folder or None, seed=None))
    if not loaded.tasks:
      raise ValueError(f"config.curate.benchmarks: {path} must have rows of {name} with pictures. Received: "
                       f"{loaded.describe()}")
    pictures = list({_identity(task.image): task.image for task in loaded.tasks}.items())
    shard, of = job.work / "facts" / f"benchmark-{number}-{name}.jsonl", _digest(
        "benchmark", facts_lib.VERSION, name, [key for key, _ in pictures])
    if hosts.mine(number) and _read(shard, of) is None:
      with futures.ThreadPoolExecutor(threads) as pool:
        looks = pool.map(lambda pair: _look(pair[1], job.image.decode_max_pixels), pictures)
        made = list(progress.over(looks, len(pictures), f"rules: looking at {name}", "picture", hosts.leads()))
      _keep(shard, of, made)
    found.append((name, shard, of))
  hosts.meet()
  looks = []
  for name, shard, of in found:
    looks += [(name, facts_lib.Look((w, h), bits, bytes.fromhex(thumb))) for w, h, bits, thumb in
              (line["look"] for line in _read(shard, of) or ()) if thumb]
  return looks


def _identity(image) -> str:
  """What a benchmark's picture is recognised by: its bytes, or its file's path, size and time."""
  if isinstance(image, bytes):
    return records.digest(image)
  about = pathlib.Path(image).stat()
  return f"{image} {about.st_size} {about.st_mtime_ns}"


def _look(image, max_pixels) -> dict:
  try:
    it = facts_lib.look(images.decode(image, max_pixels))
  except ValueError:
    return {"look": [0, 0, 0, ""]}  # no question about it can be asked
  return {"look": [*it.size_px, it.hash, it.thumb.hex()]}


def _rules(job, facts, leaks) -> dict[tuple[int, int], rules.Drop]:
  """Which tasks the rules drop, and why."""
  drops = {place: drop for place, it in facts.items() if (drop := rules.alone(it, job.rules))}
  left = [place for place in facts if place not in drops]
  shared = rules.together([facts[place] for place in left], leaks, job.rules, job.seed)
  return drops | {left[number]: drop for number, drop in shared.items()}


def _said(job, data, facts, drops, asker, say) -> dict[tuple[int, int], dict]:
  """The policy's answers to the tasks that are left, by place; empty if there is no policy."""
  if asker is None or not job.policy.is_on:
    return {}
  shards = [[place for place in shard if place not in drops] for shard in data.shards]
  paths = [job.work / "samples" / f"{number:05d}.jsonl" for number in range(len(shards))]
  of = [_digest("samples", asker.about, dataclasses.asdict(job.policy), job.seed,
                [facts[place].provenance for place in shard]) for shard in shards]
  done = [_read(path, digest) or [] for path, digest in zip(paths, of)]
  wanted = hosts.first(lambda: [[i for i in range(len(shard)) if not lines or "lost" in lines[i]]
                                for shard, lines in zip(shards, done)])
  due = [n for n, places in enumerate(wanted) if places]
  if due:
    say(f"policy: {len(due)} of {len(shards)} shards to ask, {sum(len(wanted[n]) for n in due)} tasks")
  for at, number in enumerate(due):
    if not asker.together and not hosts.mine(number):
      continue
    hosts.beat("policy")
    found = policy_lib.ask(asker, [data.task(shards[number][i]) for i in wanted[number]], job.policy, job.seed)
    lines = list(done[number] or found)
    for i, line in zip(wanted[number], found):
      lines[i] = line
    if asker.together:
      hosts.first(lambda number=number, lines=lines: _keep(paths[number], of[number], lines))
    else:
      _keep(paths[number], of[number], lines)
    say(f"policy: shard {at + 1} of {len(due)}")
    if len(found) > 1 and all("lost" in line for line in found):
      _missing([f"{facts[shards[number][i]].uid}: {line['lost']}" for i, line in zip(wanted[number], found)])
  hosts.meet()
  return {place: line for shard, path, digest in zip(shards, paths, of) if shard
          for place, line in zip(shard, _read(path, digest))}


# --- results ------------------------------------------------------------------------------------------------------


def _write(job, data, facts, drops, said) -> dict:
  """The sets, the lists and the report."""
  out = pathlib.Path(job.out)
  lines = {place: _line(job, data.names[place[0]], it, said.get(place), drops.get(place))
           for place, it in facts.items()}
  kept = [place for place in facts if place not in drops]
  counts = _counts(facts, drops, kept, bool(said))
  for name, places in (("tasks", kept), ("rejects", [place for place in facts if place in drops])):
    files.write_text(files.path(out / f"{name}.jsonl"), "".join(json.dumps(lines[place]) + "\n" for place in places))
  files.write_text(files.path(out / "counts.json"), json.dumps(counts, indent=1) + "\n")
  report = sieve.render({
      "title": out.resolve().name, "counts": counts, "lines": list(lines.values()),
      "examples": _examples(job, data, facts, drops, lines), "config": _config(job)})
  files.write_text(files.path(out / "report.html"), report)
  for number, name in enumerate(data.names):
    _set(job, data, number, [place for place in kept if place[0] == number], out / name)
  if not kept:
    raise ValueError(f"no task stays of {len(facts)}: {_most(counts)}. {out / 'report.html'} has examples")
  return counts


def _set(job, data, number, places, folder) -> None:
  """Writes a set of the tasks that stay, if there are any."""
  if folder.exists():
    if not _is_ours(folder):
      raise ValueError(f"--out must be a folder of its own: {folder} is there, and is none of curate's sets")
    shutil.rmtree(folder)
  if not places:
    return
  source, parts = data.sources[number], []
  for at in range(0, len(places), _PART_TASKS):
    some = [index for _, index in places[at:at + _PART_TASKS]]
    parts.append(set_files.write_part(job.work / f"part-{len(parts):05d}", (source.stored(i)[0] for i in some),
                                 (f"{int(source.image_N[i]):016x}" for i in some)))
  root = source.stored(places[0][1])[1]
  name, _, split = data.names[number].rpartition("-")
  plain = "".join(c if c.isalnum() and c.isascii() else "_" for c in (name or split).lower())
  set_files.finish(folder, plain if plain[:1].isalpha() else f"set_{plain}", split or "train", parts, root,
              {"curated": _config(job)})


def _is_ours(folder: pathlib.Path) -> bool:
  """Whether a folder holds a set that curation has made, or only files of one that it has begun to make."""
  try:
    return "curated" in json.loads((folder / "set.json").read_text())["about"]
  except (OSError, ValueError, KeyError, TypeError):
    return all(".array_record-" in path.name or path.name == "index.npy" or path.suffix == ".tmp"
               for path in folder.iterdir())


def _line(job, name, it: facts_lib.Facts, said, drop) -> dict:
  rates = {f"pass_{key}": band.rate([sample["score"] for sample in said[key]]) for key in ("with", "without")} if (
      said) else {"pass_with": None, "pass_without": None}
  w, h = it.look.size_px if it.look else (0, 0)
  line = {"provenance": it.provenance, "uid": it.uid, "set": name, "source": it.source, "kind": it.kind,
          "question_type": it.question_type, "answer_type": it.answer_type, "width": w, "height": h,
          "coverage": round(it.coverage, 6), "boxes": it.n_boxes, **rates,
          "zooms": sum(s["zooms"] for s in said["with"]) / len(said["with"]) if said and said["with"] else None}
  return line if drop is None else line | {"stage": stage(drop.reason), "reason": drop.reason, "detail": drop.detail}


def _counts(facts, drops, kept, is_asked) -> dict:
  """How many tasks were read, dropped by stage and reason, left after each stage, and kept; in all and by source."""
  def whole(places):
    return {"all": len(places), "sources": dict(sorted(collections.Counter(facts[p].source for p in places).items()))}

  reasons = [*rules.ALONE, *rules.TOGETHER] + ([_UNASKED, _LOST, *band.REASONS] if is_asked else [])
  dropped, left, after = [], set(facts), {}
  for step, these in itertools.groupby(reasons, stage):
    for reason in these:
      places = [place for place, drop in drops.items() if drop.reason == reason]
      left -= set(places)
      if places:
        dropped.append({"stage": step, "reason": reason, "n": whole(places)})
    after[step] = whole(left)
  return {"read": whole(facts), "dropped": dropped, "after": after, "kept": whole(kept)}


def _most(counts) -> str:
  found = sorted(counts["dropped"], key=lambda it: -it["n"]["all"])[:3]
  return ", ".join(f"{it['n']['all']} {it['reason']}" for it in found)


def _examples(job, data, facts, drops, lines) -> list[dict]:
  """Some tasks for each reason, and some that stay, with their pictures: those whose hash comes first."""
  groups = collections.defaultdict(list)
  for place in sorted(facts, key=lambda place: facts[place].provenance):
    group = groups[drops[place].reason if place in drops else ""]
    if len(group) < (_EXAMPLES if place in drops else _KEPT_EXAMPLES):
      group.append(place)
  order = ["", *rules.ALONE, *rules.TOGETHER, _UNASKED, _LOST, *band.REASONS]
  found = []
  for reason in (reason for reason in order if reason in groups):
    for place in groups[reason]:
      task, it = data.task(place), facts[place]
      try:
        picture = gallery.data_uri(images.decode(task.image, job.image.decode_max_pixels), _EXAMPLE_SIDE_PX)
      except ValueError:
        picture = None
      w, h = it.look.size_px if it.look else (1, 1)
      found.append(lines[place] | {
          "reason": reason, "detail": lines[place].get("detail", ""), "question": task.question,
          "options": list(task.options or ()), "answers": list(dict.fromkeys(task.answers)), "picture": picture,
          "width": w, "height": h, "rects": [[b.x1, b.y1, b.x2 - b.x1, b.y2 - b.y1] for b in task.boxes]})
  return found


def _config(job: Job) -> dict:
  return {"seed": job.seed, "benchmarks": list(job.benchmarks),
          **{name: dataclasses.asdict(getattr(job, name)) for name in ("rules", "policy", "band")}}
