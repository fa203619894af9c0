"""What the tiny base learns from, and when: stages of demonstrations, from easy to hard, drawn by worker processes.

A batch is a pure function of (course, step), so that a warm start can go on where it was.  Source: ours.
"""

from __future__ import annotations

import collections
import concurrent.futures
import concurrent.futures.process
import dataclasses
import functools
import multiprocessing
import os
import signal

import numpy as np

from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.model import patches
from virl_jax.rollout import pack
from virl_jax.tiny import demos


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of the curriculum.

  Attributes:
    until: share of all steps at which it ends.
    objects: fewest and most objects in a picture; 0 as the most is the configured most.
    whole_every: demonstrations are whole in every so-many-th step; in between they have only their first zoom.
    noise: share of clumsy zooms.
    learn: one of `demos.LEARN`.
  """

  until: float
  objects: tuple[int, int]
  whole_every: int
  noise: float
  learn: str


# What is on it?  Where is it?  Which one is it?  And last: how to zoom badly.  The order matters: fine textures are
# learned from scratch in 10,000 samples, and not at all by a vision tower that has first learned to find things.
# Finding the only object shows no progress for some 20,000 samples, and is then learned fast.
STAGES = (
    Stage(0.14, (2, 0), 1, 0.0, "reading"),
    Stage(0.36, (1, 1), 3, 0.0, "careful"),
    Stage(0.90, (2, 0), 3, 0.0, "careful"),
    Stage(1.00, (2, 0), 1, 1.0, "all"),
)
QUESTIONS = 3         # demonstrations a picture
_ROWS = {"first zooms": 96, "whole": 60, "counting": 24, "reading": 96}   # demonstrations an update


@dataclasses.dataclass(frozen=True)
class Course:
  """What a worker needs to draw any batch: a pure function of (course, step)."""

  tokenizer_dir: str
  image_token: int
  eos: tuple[int, ...]
  vocab: int
  prompt: prompt.Config
  image: images.Config
  grid: patches.Grid
  seed: int
  steps: int
  pictures: int
  marks: tuple[str, ...]
  most_objects: int
  side_px: int
  stages: tuple[Stage, ...] = STAGES
  p_direct: float = 0.0
  p_clumsy: float = 1.0
  p_count: float = 0.0


@functools.cache  # one tokenizer for each worker process
def _voice(course: Course) -> demos.Voice:
  import transformers
  tokenizer = transformers.AutoTokenizer.from_pretrained(course.tokenizer_dir)
  codec = prompt.Codec(tokenizer, course.image_token, course.eos, course.vocab)
  return demos.Voice(codec, course.prompt, course.image, course.grid)


@functools.lru_cache(maxsize=8192)  # about 3 GB
def _picture(course: Course, objects: tuple[int, int], index: int) -> demos.Picture:
  """Picture number `index` of a stage.  Drawing is slow: a worker keeps what it has drawn."""
  rng = np.random.default_rng([course.seed, *objects, index])
  return demos.picture(rng, course.marks, objects, course.side_px, _voice(course))


def last(objects: tuple[int, int]) -> tuple[Stage, ...]:
  """Only the last stage, for a base that has learned the others; `objects` are the fewest and most in a picture."""
  return (dataclasses.replace(STAGES[-1], objects=objects),)


def stage_of(step: int, course: Course) -> Stage:
  """The stage that a step belongs to."""
  ended = lambda stage: step >= round(stage.until * course.steps) and stage is not course.stages[-1]
  return next(stage for stage in course.stages if not ended(stage))


def draw_batch(course: Course, step: int):
  """The batch of one step, a `types.Batch` with numpy leaves."""
  stage = stage_of(step, course)
  manner, noise = demos.Config(), stage.noise
  if stage.learn == "all":
    manner, noise = demos.Config(p_direct=course.p_direct, p_count=course.p_count), noise * course.p_clumsy
  objects = (stage.objects[0], stage.objects[1] or course.most_objects)
  whole = step % stage.whole_every == 0
  kind = ("reading" if stage.learn == "reading" else "first zooms" if not whole else
          "counting" if manner.p_count else "whole")
  questions = min(QUESTIONS, objects[1])  # a picture with one object has only one question
  pictures, rows = _ROWS[kind] // questions, []
  for i in range(pictures):
    drawn = _picture(course, objects, (step * pictures + i) % course.pictures)
    rows += demos.lesson(drawn, np.random.default_rng([course.seed, step, i]), questions, noise,
                         stage.learn, _voice(course), manner, None if whole else 1)
  # Demonstrations of counting differ widely in length: joined and padded more coarsely, they need few programs.
  counting = kind == "counting"
  return pack.pack(rows, pack.Config(
      course.grid, course.image_token, max_rounds=max(4, course.most_objects), pad_tokens=64 if counting else 16,
      pad_images=64 if counting else 32, join=counting))


def batches(course: Course, start: int, workers: int):
  """Batches from step `start` on, drawn ahead by so many worker processes, in order.

  Raises:
    SystemExit: a worker was killed, probably because memory ran out.
  """
  # Fresh interpreters, because a fork of a process that has started JAX can hang.  They need no accelerator.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  context = multiprocessing.get_context("spawn")
  # Ctrl-C reaches the workers, too; they end with this process, which first saves a checkpoint.
  ignore = (signal.SIGINT, signal.SIG_IGN)
  with concurrent.futures.ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=ignore) as pool:
    ahead = collections.deque()
    try:
      for step in range(start, course.steps):
        ahead.append(pool.submit(draw_batch, course, step))
        if len(ahead) > 3 * workers:
          yield ahead.popleft().result()
      while ahead:
        yield ahead.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as e:  # the kernel kills without a message
      raise SystemExit(f"a process that draws pictures was killed, likely for want of memory: each of {workers} keeps "
                       f"up to {course.pictures} of 0.4 MB. Lower config.warmstart.pictures or workers, or just give "
                       "the same command again: it goes on from the last checkpoint") from e


def turning(course: Course) -> int:
  """The first step that learns to be clumsy."""
  return next(step for step in range(course.steps + 1) if step == course.steps or stage_of(step, course).learn == "all")
