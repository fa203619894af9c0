"""The stage `rules`: what is decided about a task without a policy.  Pure functions of facts.

`alone` looks at each task by itself, `together` at what it shares with others: pictures of benchmarks, near-duplicates,
caps.  Which of several near-duplicates stays does not depend on their order: it is the one whose content hash, mixed
with the seed, is least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
from typing import NamedTuple

from virl_jax import checks
from virl_jax.data.curation import facts as facts_lib

# The reasons, in the order in which they are looked for.
ALONE = ("unusable picture", "no box", "too many boxes", "box that cannot be zoomed into", "box too small as shown",
         "boxes cover too little", "boxes cover too much", "kind of answer", "answer too long", "question too long",
         "answer that its rule refuses")
TOGETHER = ("on a benchmark's picture", "near-duplicate", "too many on one picture", "over its source's cap")


class Drop(NamedTuple):
  """Why a task is dropped: a few fixed words, and what was wanted and what came."""

  reason: str
  detail: str = ""


@dataclasses.dataclass(frozen=True)
class Config:
  """Thresholds; see `config.py`, section `curate.rules`."""

  least_coverage: float = 0.0
  most_coverage: float = 0.3
  keep_whole: bool = False
  whole_from: float = 0.9
  least_box_px: float = 36.0
  need_boxes: bool = True
  most_boxes: int = 8
  answer_types: tuple[str, ...] = ("option", "yes_no", "number", "text")
  most_answer_chars: int = 80
  most_question_chars: int = 600
  hash_distance: int = 8
  pixel_difference: float = 6.0
  question_similarity: float = 0.9
  per_picture: int = 0
  caps: tuple[str, ...] = ()

  def __post_init__(self):
    share = checks.real(0, 1, wanted="a share in [0, 1]")
    checks.section(vars(self), "curate.rules", least_coverage=share, most_coverage=share, keep_whole=checks.flag,
                   whole_from=share, least_box_px=checks.real(0), need_boxes=checks.flag, most_boxes=checks.whole(1),
                   answer_types=checks.some_of(facts_lib.ANSWER_TYPES, 1), most_answer_chars=checks.whole(1),
                   most_question_chars=checks.whole(1), hash_distance=checks.whole(0, 16),
                   pixel_difference=checks.real(0, 255), question_similarity=share, per_picture=checks.whole(0),
                   caps=(_is_caps, '"SOURCE=COUNT" each'))
    checks.need(self.least_coverage <= self.most_coverage, "curate.rules.least_coverage",
                f"at most config.curate.rules.most_coverage = {self.most_coverage}", self.least_coverage)
    for name in ("answer_types", "caps"):
      object.__setattr__(self, name, tuple(getattr(self, name)))

  def is_whole(self, task: facts_lib.Facts) -> bool:
    """Whether the task's rationale box is the whole picture, and such tasks are kept."""
    return self.keep_whole and task.coverage >= self.whole_from


def alone(task: facts_lib.Facts, cfg: Config) -> Drop | None:
  """Why a task is dropped by itself; None if it stays."""
  too_much = task.coverage > cfg.most_coverage and not cfg.is_whole(task)
  found = (
      (task.problem, task.problem),
      (cfg.need_boxes and not task.n_boxes, "curate.rules.need_boxes"),
      (task.n_boxes > cfg.most_boxes, f"{task.n_boxes}, at most {cfg.most_boxes}"),
      (task.box_problem, task.box_problem),
      (task.n_boxes and task.least_box_px < cfg.least_box_px,
       f"{task.least_box_px:.0f} px, at least {cfg.least_box_px:g}"),
      (task.n_boxes and task.coverage < cfg.least_coverage, f"{task.coverage:.4f}, at least {cfg.least_coverage:g}"),
      (too_much, f"{task.coverage:.3f}, at most {cfg.most_coverage:g}"),
      (task.answer_type not in cfg.answer_types, task.answer_type),
      (task.answer_chars > cfg.most_answer_chars, f"{task.answer_chars} characters, at most {cfg.most_answer_chars}"),
      (len(task.question) > cfg.most_question_chars,
       f"{len(task.question)} characters, at most {cfg.most_question_chars}"),
      (not task.attainable, "no accepted answer is right by the task's own rule"))
  return next((Drop(reason, detail) for reason, (is_so, detail) in zip(ALONE, found, strict=True) if is_so), None)


def together(tasks: Sequence[facts_lib.Facts], benchmarks: Sequence[tuple[str, facts_lib.Look]], cfg: Config, seed: int
             ) -> dict[int, Drop]:
  """Which tasks are dropped because of others.

  Args:
    tasks: those that `alone` keeps.
    benchmarks: pictures that nobody may train on, each with the name of its benchmark.
    cfg: thresholds.
    seed: draws which of several stay.

  Returns:
    Why each is dropped, by its number in `tasks`.
  """
  drops = _leaked(tasks, benchmarks, cfg)
  left = sorted((i for i in range(len(tasks)) if i not in drops), key=lambda i: _rank(tasks[i], seed))
  group = _groups(tasks, left, cfg)
  asked: dict[int, list[tuple[int, frozenset]]] = {}
  for i in left:
    words = frozenset(facts_lib.words(tasks[i].question))
    before = asked.setdefault(group[i], [])
    same = next((j for j, other in before if similarity(words, other) >= cfg.question_similarity), None)
    if same is not None:
      drops[i] = Drop("near-duplicate", f"of {tasks[same].source} {tasks[same].uid}")
    elif cfg.per_picture and len(before) == cfg.per_picture:
      drops[i] = Drop("too many on one picture", f"at most {cfg.per_picture}")
    else:
      before.append((i, words))
  caps, used = {name: int(count) for name, _, count in (cap.rpartition("=") for cap in cfg.caps)}, {}
  for i in (i for i in left if i not in drops):
    source = tasks[i].source
    used[source] = used.get(source, 0) + 1
    if used[source] > caps.get(source, len(tasks)):
      drops[i] = Drop("over its source's cap", f"{source}: at most {caps[source]}")
  return drops


def similarity(a: frozenset, b: frozenset) -> float:
  """Share of the words of two questions that both have, in [0, 1]; 1 if neither has any."""
  return len(a & b) / len(a | b) if a | b else 1.0


def _leaked(tasks, benchmarks, cfg) -> dict[int, Drop]:
  """Tasks on a picture that a benchmark has, whatever the question."""
  looks, numbers = _pictures(tasks, range(len(tasks)))
  names: dict[int, str] = {}
  for first, second in facts_lib.near([*looks, *(it for _, it in benchmarks)], cfg.hash_distance, cfg.pixel_difference):
    if first < len(looks) <= second:
      names.setdefault(first, benchmarks[second - len(looks)][0])
  return {i: Drop("on a benchmark's picture", name) for picture, name in names.items() for i in numbers[picture]}


def _groups(tasks, left, cfg) -> dict[int, int]:
  """For each task, the group of near-duplicate pictures that its own belongs to: the least number of these pictures."""
  looks, numbers = _pictures(tasks, left)
  parent = list(range(len(looks)))

  def root(i):
    while parent[i] != i:
      parent[i] = i = parent[parent[i]]
    return i

  for first, second in facts_lib.near(looks, cfg.hash_distance, cfg.pixel_difference):
    a, b = sorted((root(first), root(second)))
    parent[b] = a
  return {i: root(picture) for picture, on_it in enumerate(numbers) for i in on_it}


def _pictures(tasks, left) -> tuple[list[facts_lib.Look], list[list[int]]]:
  """The different image files of some tasks, and which tasks are on each."""
  places: dict[int, int] = {}
  looks, numbers = [], []
  for i in left:
    place = places.setdefault(tasks[i].image, len(looks))
    if place == len(looks):
      looks.append(tasks[i].look)
      numbers.append([])
    numbers[place].append(i)
  return looks, numbers


def _rank(task: facts_lib.Facts, seed: int) -> bytes:
  return hashlib.blake2b(f"{seed} {task.provenance} {task.uid}".encode(), digest_size=16).digest()


def _is_caps(value) -> bool:
  texts: Callable = checks.texts[0]
  return texts(value) and all(cap.rpartition("=")[0] and cap.rpartition("=")[2].isdigit() for cap in value)
