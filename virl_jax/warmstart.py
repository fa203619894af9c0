"""Makes the tiny base model: a Qwen2.5-VL of about two million parameters that speaks the zoom protocol.

    python -m virl_jax.warmstart --config=configs/tiny.py --out=HF_DIR

Supervised learning on demonstrations, from easy to hard: one object in the picture, then two, then all;
careful zooms first, clumsy ones at the end, so that the base reads marks well and zooms badly.  Worker
processes draw the pictures.  Interrupt it at any time and start it again: it goes on where it was.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np

from virl_jax import config as config_lib
from virl_jax.data import demos
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.data import tiny_tokenizer
from virl_jax.learner import checkpoint
from virl_jax.learner import step as step_lib
from virl_jax.model import params as params_lib
from virl_jax.model import qwen
from virl_jax.model import weights
from virl_jax.rollout import pack

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_OUT = flags.DEFINE_string("out", None, "HF folder to write.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints and log; OUT.work by default.")


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a worker needs to draw any batch: a pure function of (plan, step)."""

  tokenizer_dir: str
  ids: tuple[tuple[str, int], ...]
  prompt: prompt.Config
  image: images.Config
  grid: images.Grid
  seed: int
  steps: int
  rows: int
  marks: tuple[str, ...]
  objects: tuple[int, int]
  stages: tuple[float, float, float]
  side_px: int


_VOICE: dict[str, demos.Voice] = {}  # one tokenizer a worker process


def _voice(plan: Plan) -> demos.Voice:
  if plan.tokenizer_dir not in _VOICE:
    import transformers
    ids = dict(plan.ids)
    codec = prompt.Codec(transformers.AutoTokenizer.from_pretrained(plan.tokenizer_dir), ids["image_token"], ids["eos"])
    _VOICE[plan.tokenizer_dir] = demos.Voice(codec, plan.prompt, plan.image, plan.grid)
  return _VOICE[plan.tokenizer_dir]


def draw_batch(plan: Plan, step: int):
  """The batch of one step (numpy leaves)."""
  voice, progress = _voice(plan), step / plan.steps
  two, every, clumsy = plan.stages
  most = plan.objects[1]
  objects = (1, 1) if progress < two else (1, 2) if progress < every else (2, most)
  # Before the clumsy stage some zooms are clumsy already, but only looked at: reading what a poor crop
  # shows, and saying "unclear", is learned all along.
  learn_noise = progress >= clumsy
  noise = 1.0 if learn_noise else 0.15
  # As many questions as there are objects to ask about: new pictures teach more than old ones.
  questions = min(objects[1], 3)
  rows = []
  for i in range(plan.rows // questions):
    rng = np.random.default_rng([plan.seed, step, i])
    rows += demos.lesson(rng, plan.marks, objects, questions, noise, learn_noise, plan.side_px, voice,
                         demos.Config())
  return pack.pack(rows, pack.Config(plan.grid, dict(plan.ids)["image_token"], max_rounds=4, pad_tokens=16,
                                     pad_images=plan.rows // 3))


def _batches(plan: Plan, start: int, workers: int):
  """Batches from `start` on, drawn ahead by worker processes, in order."""
  # Fresh interpreters: a fork of a process that has started JAX can hang.  They draw, they don't compute.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
    ahead = collections.deque()
    for step in range(start, plan.steps):
      ahead.append(pool.submit(draw_batch, plan, step))
      if len(ahead) > 3 * workers:
        yield ahead.popleft().result()
    while ahead:
      yield ahead.popleft().result()


def optim_config(c, clumsy: bool) -> step_lib.OptimConfig:
  """AdamW for the careful or the clumsy stage."""
  first = round(c.warmstart.stages[2] * c.warmstart.steps)
  steps = c.warmstart.steps - first if clumsy else first
  return step_lib.OptimConfig(
      learning_rate=c.warmstart.clumsy_learning_rate if clumsy else c.warmstart.learning_rate,
      warmup_steps=100 if not clumsy else 20, decay_steps=steps, b2=0.98, clip_norm=1.0)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  c, out = _CONFIG.value, _OUT.value
  if not out:
    raise app.UsageError("--out=HF_DIR is missing")
  workdir = pathlib.Path(_WORKDIR.value or out.rstrip("/") + ".work")
  workdir.mkdir(parents=True, exist_ok=True)
  u = c.warmstart
  platforms = os.environ.get("JAX_PLATFORMS")
  jax.devices()  # settle on a platform before the environment is changed for the workers
  tokenizer = tiny_tokenizer.build(workdir / "tokenizer", c.prompt.system)
  ids = tiny_tokenizer.token_ids(tokenizer)
  cfg = qwen.tiny(-(-len(tokenizer) // 64) * 64, ids)
  plan = Plan(str(workdir / "tokenizer"), tuple(ids.items()), prompt.Config(**c.prompt), images.Config(**c.image),
              cfg.vision.grid, c.seed, u.steps, u.rows, tuple(u.marks),
              tuple(c.data.needle.objects), tuple(u.stages), c.data.needle.side_px)
  careful, clumsy = (step_lib.Config(cfg, 1, optim=optim_config(c, k)) for k in (False, True))
  params = params_lib.init(qwen.specs(cfg), jax.random.key(c.seed), jnp.float32)
  state = step_lib.init_state(params, careful.optim)
  print(f"{params_lib.count(qwen.specs(cfg)):,} parameters, {len(tokenizer)} tokens, {jax.devices()[0]}", flush=True)

  saves = checkpoint.Checkpoints(workdir / "checkpoints", u.save_every, 2)
  start = saves.latest() or 0
  if start:
    state = saves.restore(start, state)
    print(f"going on from step {start}", flush=True)
  turning = round(u.stages[2] * u.steps)
  began, log = time.time(), open(workdir / "metrics.jsonl", "a")
  for step, batch in enumerate(_batches(plan, start, u.workers), start):
    if step == turning:  # a new optimiser: the careful stage's schedule has run out
      state = step_lib.init_state(state.params, clumsy.optim)
    state, metrics = step_lib.imitate_step(state, batch, careful if step < turning else clumsy)
    if step % 25 == 0 or step + 1 == u.steps:
      nll = float(metrics["loss/total"])
      if not np.isfinite(nll):
        raise SystemExit(f"step {step}: the loss is {nll}; try a lower config.warmstart.learning_rate")
      left = (time.time() - began) / (step - start + 1) * (u.steps - step - 1)
      print(f"step {step:5d}/{u.steps}  nll {nll:.4f} nats a token  left {left / 60:.1f} min", flush=True)
      log.write(json.dumps({"step": step, "loss/total": nll}) + "\n")
      log.flush()
    saves.maybe_save(step + 1, state, last=step + 1 == u.steps)
  saves.close()
  if platforms is None:
    os.environ.pop("JAX_PLATFORMS", None)
  weights.save_hf(out, cfg, state.params, "bfloat16", like=str(workdir / "tokenizer"))
  (pathlib.Path(out) / "RECIPE.json").write_text(json.dumps({
      "command": "python -m virl_jax.warmstart --config=configs/tiny.py --out=HF_DIR", "seed": c.seed,
      "device": str(jax.devices()[0].device_kind), "jax": jax.__version__,
      "warmstart": json.loads(u.to_json()), "final_nll_nats": nll}, indent=1) + "\n")
  print(f"wrote {out}", flush=True)


if __name__ == "__main__":
  app.run(main)
