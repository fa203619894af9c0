"""Asks a policy the questions of a benchmark, and writes down its answers, so that it can be stopped at any time.

A folder has `meta.json`, what the predictions were made with, and `predictions.jsonl`, a line for each prediction, in
the tasks' order.  Tasks are asked in chunks, which do not depend on interruptions: a chunk that was not written whole
is asked again, with the same result.  However often it was interrupted, the finished file is the same.

Answers come from our engine, or from an endpoint.  A task that an endpoint gives no reply to has no prediction: the
file says so, and the next start asks it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import json

from etils import epath
import jax

from virl_jax import types
from virl_jax.data import images
from virl_jax.eval import harness
from virl_jax.eval import outcome
from virl_jax.rl import reward
from virl_jax.rollout import remote
from virl_jax.rollout import turns
from virl_jax.run import files
from virl_jax.run import hosts


@dataclasses.dataclass(frozen=True)
class Config:
  """How a policy is asked.

  Attributes:
    seed: of the sampling.
    temperature: 0 is greedy.
    samples: how many of each task.
    slots: tasks at a time, which is also how many are asked before their predictions are written.
  """

  seed: int = 0
  temperature: float = 0.0
  samples: int = 1
  slots: int = 64

  def __post_init__(self):
    for name, least in (("samples", 1), ("slots", 1), ("temperature", 0.0)):
      if not getattr(self, name) >= least:
        raise ValueError(f"{name} must be at least {least}. Received: {getattr(self, name)!r}")
    if self.samples > 1 and not self.temperature:
      raise ValueError("samples must be 1 at temperature 0: all would be the same. "
                       f"Received: {self.samples}")


# (policy, tasks, number of their chunk, number of the sample) -> (index in tasks, the judged trajectory, or why there
# is none), for this process's tasks.
Rollout = Callable[[turns.Policy, Sequence[types.Task], int, int], list[tuple[int, harness.Judged | str]]]


def by_engine(params: dict, cfg: Config, judged_by: reward.Config) -> Rollout:
  """Our own engine.

  Args:
    params: the policy's parameters, as rollouts need them.
    cfg: how it is asked.
    judged_by: the reward, for h0.
  """
  root = jax.random.key(cfg.seed)

  def rollout(policy, tasks, chunk, sample):
    del sample
    key = jax.random.fold_in(root, chunk)
    judged = harness.run(policy, params, list(tasks), key, cfg.slots, cfg.temperature, judged_by)
    return [(j.trajectory.index, j) for j in judged]

  return rollout


def by_endpoint(server: remote.Endpoint, cfg: Config, judged_by: reward.Config) -> Rollout:
  """An endpoint; see `by_engine`.  What is sampled for a task depends only on the seed, its uid and the sample."""
  def rollout(policy, tasks, chunk, sample):
    del chunk
    mine = [i for i in range(len(tasks)) if hosts.mine(i)]
    said = remote.attempts(policy, server, [tasks[i] for i in mine],
                           [remote.seed(cfg.seed, tasks[i].uid, sample) for i in mine], cfg.temperature)
    whole = [(i, t) for i, t in zip(mine, said) if not isinstance(t, str)]
    judged = harness.judge([t for _, t in whole], policy.rollout.max_rounds, judged_by)
    return [(i, why) for i, why in zip(mine, said) if isinstance(why, str)] + [
        (i, j) for (i, _), j in zip(whole, judged)]

  return rollout


def fingerprint(tasks: Sequence[types.Task]) -> str:
  """A hash of the questions, options, answers and boxes, in order; not of what is in the pictures."""
  digest = hashlib.blake2b(digest_size=16)
  for task in tasks:
    digest.update(json.dumps([task.uid, task.question, task.options, task.answers, task.boxes]).encode())
  return digest.hexdigest()


def ask(policy: turns.Policy, rollout: Rollout, tasks: Sequence[types.Task], folder: epath.Path, cfg: Config,
        meta: dict) -> list[dict]:
  """Asks all tasks that have no prediction yet.

  Args:
    policy: everything but the parameters.
    rollout: samples the answers.
    tasks: what to ask; pictures are decoded when they are needed.
    folder: where the predictions go.
    cfg: how it is asked.
    meta: ready for JSON: under "fixed" what else the predictions depend on; the rest is only written down.

  Returns:
    What predictions.jsonl holds: uid, sample, answer, text, options, boxes (where it looked), ious, classes, refused,
    stop, correct, score, seed and tokens; for a task that cannot be asked, uid, sample, answer (None) and skipped, the
    reason; for one that the endpoint gave no reply to, uid, sample, answer (None) and lost, the reason.  If it replied
    to no task of a chunk, the rest is not asked, and is missing.

  Raises:
    ValueError: the folder has predictions that were made with something else.
  """
  file = folder / "predictions.jsonl"
  meta = json.loads(json.dumps(meta | {"fixed": meta["fixed"] | dataclasses.asdict(cfg) | {
      "tasks": fingerprint(tasks), "n": len(tasks)}}))
  chunks = [(sample, at) for sample in range(cfg.samples) for at in range(0, len(tasks), cfg.slots)]
  sizes = [min(cfg.slots, len(tasks) - at) for _, at in chunks]
  found = hosts.first(lambda: _resume(folder, file, meta, sizes))
  if found:
    hosts.say(f"{file} has {len(found)} predictions; going on")
  for number, ((sample, at), size) in enumerate(zip(chunks, sizes)):
    start = sum(sizes[:number])
    wanted = [i for i in range(size) if start + i >= len(found) or "lost" in found[start + i]]
    if not wanted:
      continue
    entries = _chunk(policy, rollout, [tasks[at + i] for i in wanted], number, sample, cfg)
    if start < len(found):  # an earlier start wrote the chunk, and its endpoint lost some
      for i, entry in zip(wanted, entries):
        found[start + i] = entry
      hosts.first(lambda found=found: files.write_bytes(file, _lines(found)))
    else:
      hosts.first(lambda entries=entries: files.append(file, _lines(entries)))
      found += entries
    lost = sum("lost" in entry for entry in entries)
    hosts.say(f"{len(found)} of {sum(sizes)} predictions" + (f", {lost} of them lost" if lost else ""))
    if lost and len(entries) == size and all("lost" in entry or "skipped" in entry for entry in entries):
      break  # the endpoint is gone, or takes nothing
  return found


def outcomes(entries: Sequence[dict], tasks: Sequence[types.Task]) -> list[outcome.Outcome]:
  """The outcome of each prediction, for `outcome.summary`, which takes further samples of a task for separate tasks."""
  by_uid = {task.uid: task for task in tasks}
  found = []
  for e in entries:
    if "skipped" in e or "lost" in e:
      continue
    task = by_uid[e["uid"]]
    found.append(outcome.Outcome(
        uid=f"{e['uid']} {e['sample']}" if e["sample"] else e["uid"], correct=e["correct"], ious=tuple(e["ious"]),
        invalid_actions=e["refused"], has_boxes=bool(task.boxes), overlong=e["stop"] == types.StopReason.OVERLONG.value,
        kind=task.kind, answerable=bool(task.answers), answer=e["answer"], score=e["score"]))
  return found


def unsaid(entries: Sequence[dict]) -> dict[str, list[dict]]:
  """The tasks without a prediction: "skipped", those that cannot be asked, and "lost", those that the endpoint gave no
  reply to; each has uid, sample and why."""
  return {key: [{"uid": e["uid"], "sample": e["sample"], "why": e[key]} for e in entries if key in e]
          for key in ("skipped", "lost")}


def _resume(folder: epath.Path, file: epath.Path, meta: dict, sizes: list[int]) -> list[dict]:
  """The predictions of the whole chunks in the file; what follows them is removed from it."""
  about = folder / "meta.json"
  files.make(folder)
  if files.exists(about):
    old = json.loads(files.read_text(about)).get("fixed", {})
    differ = sorted(k for k in old.keys() | meta["fixed"].keys() if old.get(k) != meta["fixed"].get(k))
    if differ:
      told = ", ".join(f"{k} ({old.get(k)!r:.80} there, {meta['fixed'].get(k)!r:.80} now)" for k in differ)
      raise ValueError(f"{folder} must be for what is asked now; use another --out. Received: predictions with another "
                       f"{told}")
  elif files.exists(file):
    raise ValueError(f"{folder} must have a meta.json beside its predictions.jsonl; use another --out")
  else:
    files.write_text(about, json.dumps(meta, indent=1) + "\n")
  if not files.exists(file):
    return []
  whole, data = [], files.read_bytes(file)
  for line in data.splitlines(keepends=True):
    try:
      if not line.endswith(b"\n"):
        break
      whole.append((json.loads(line), line))
    except ValueError:
      break
  keep = 0
  for size in sizes:
    if keep + size > len(whole):
      break
    keep += size
  kept = b"".join(line for _, line in whole[:keep])
  if kept != data:
    files.write_bytes(file, kept)
  return [entry for entry, _ in whole[:keep]]


def _lines(entries: Sequence[dict]) -> bytes:
  return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def _chunk(policy, rollout, tasks, number, sample, cfg) -> list[dict]:
  """The predictions of some tasks, in their order."""
  why = {task.uid: unfit(policy, task) for task in tasks}
  fit = [task for task in tasks if why[task.uid] is None]
  said = {}
  if fit:
    bare = lambda i, why: {"uid": fit[i].uid, "sample": sample, "answer": None, "lost": why}
    mine = [(i, bare(i, it) if isinstance(it, str) else _entry(it, sample, cfg))
            for i, it in rollout(policy, fit, number, sample)]
    said = {entry["uid"]: entry for entry in hosts.in_order(mine)}
  return [said.get(task.uid) or {
      "uid": task.uid, "sample": sample, "answer": None, "skipped": why[task.uid]} for task in tasks]


def unfit(policy: turns.Policy, task: types.Task) -> str | None:
  """Why a task cannot be asked, or None.

  The decoded picture is not kept, but decoded again when the task is asked: those of a chunk would fill the memory.
  """
  try:
    turns.check(policy, dataclasses.replace(task, image=images.decode(task.image, policy.image.decode_max_pixels)))
  except ValueError as e:
    return str(e)
  return None


def _entry(judged: harness.Judged, sample: int, cfg: Config) -> dict:
  t = judged.trajectory
  said = [turn for turn in t.turns if turn.role == "assistant"]
  return {"uid": t.task.uid, "sample": sample, "answer": t.answer, "text": "\n".join(turn.text for turn in said),
          "options": list(t.task.options) if t.task.options else None,
          "boxes": [[float(v) for v in box] for box in t.regions], "ious": list(judged.ious),
          "classes": list(judged.classes), "refused": t.refused, "stop": t.stop.value if t.stop else None,
          "correct": bool(t.correct), "score": t.worth, "seed": cfg.seed,
          "tokens": sum(len(turn.ids) for turn in said)}
