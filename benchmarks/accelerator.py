"""All that needs an accelerator, in one script: are the kernels right, and how fast is what a run compiles?

    python benchmarks/accelerator.py --out=accelerator.jsonl                          # about 20 minutes on one H100
    python benchmarks/accelerator.py --parts=check_cache,check_attention,update_7b --out=FILE
    python benchmarks/accelerator.py --smoke --out=FILE                               # tiny shapes, on a CPU

Weights are random, shapes are real.  Each part has its own process and time limit, and the most valuable come first.
What a part finds, or its error, is appended to --out as a line of JSON as soon as it is known.  Programs are those of
`virl_jax.run.programs`, which `virl_jax.plan` compiles.  docs/benchmarks.md says what the figures mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import re
import runpy
import subprocess
import sys
import time
import traceback

import decode as decode_bench  # of this folder
import jax
import jax.numpy as jnp
import numpy as np
import policy as policy_bench  # of this folder
import rollout as rollout_bench  # of this folder
import timing  # of this folder

from virl_jax import config as config_lib
from virl_jax import plan
from virl_jax.learner import pooled
from virl_jax.model import attention
from virl_jax.model import cache as cache_lib
from virl_jax.model import cache_kernels
from virl_jax.model import family
from virl_jax.model import sharding
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.rollout import sample
from virl_jax.rollout import slots as slots_lib
from virl_jax.run import costs
from virl_jax.run import hlo
from virl_jax.run import memory
from virl_jax.run import programs
from virl_jax.run import setup
from virl_jax.run import topologies

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
DTYPE = jnp.bfloat16
STD = 0.02           # of random weights
MEMORY_SHARE = 0.92  # of a GPU's memory that JAX may take; its own default is 0.75
# The largest errors of a kernel against float32 that rounding to bfloat16 explains, relative to the values' size: of an
# array as a whole, and of its worst token.  A token more or less under the mask makes the second far larger.
WHOLE, WORST = 0.006, 0.02
# --smoke: changes that make a configuration's shapes as small as they can be.
SMOKE = {
    "model.patches_together": 0, "image.max_pixels": 56 * 56, "image.crop_max_pixels": 56 * 56,
    "image.crop_min_pixels": 28 * 28, "rollout.prompts": 2, "rollout.group_size": 4, "rollout.max_turn_tokens": 16,
    "rollout.max_total_tokens": 128, "rollout.max_rounds": 2, "ppo.minibatches": 1, "pack.pad_tokens": 32,
    "learner.microbatch_tokens": 128, "learner.row_shown": 1, "learner.row_crops": 2, "engine.slots": 4,
    "engine.pad_tokens": 32}


# --- random arrays ---------------------------------------------------------------------------------------------


def _bell(shape, dtype, seed: jax.Array, std: float) -> jax.Array:
  """Nearly normal numbers, in one pass and without temporary arrays: the sum of four bytes of a hash of each place."""
  at = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = math.prod(shape[axis + 1:]) % 2 ** 32
    at = at + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
  h = at * np.uint32(0x9E3779B1)
  for shift, odd in ((15, 0x2C1B3C6D), (13, 0x297A2D39), (16, 0x9E3779B1)):
    h = (h ^ (h >> shift)) * np.uint32(odd) + seed  # in each round: else another seed would only shift the numbers
  h = h ^ (h >> 15)
  if dtype == jnp.uint8:
    return (h >> 24).astype(dtype)
  total = sum(((h >> shift) & 255).astype(jnp.float32) for shift in (0, 8, 16, 24))
  return ((total - 4 * 127.5) * np.float32(std / math.sqrt(4 * (256 ** 2 - 1) / 12))).astype(dtype)


def arrays(specs, std: float = 0.0, seed: int = 0):
  """Arrays for a tree of shapes, on the device: random floats, bytes of any value, all else zeros.

  Norms' weights are ones: with small ones, layers would add next to nothing, and a wrong kernel would not show.

  Args:
    specs: `jax.ShapeDtypeStruct`s; other leaves stay as they are.
    std: standard deviation of the floats; 0 for zeros only.
    seed: of what is random.
  """
  named, tree = jax.tree_util.tree_flatten_with_path(specs)
  names, leaves = [str(getattr(path[-1], "key", "")) if path else "" for path, _ in named], [a for _, a in named]
  wanted = [i for i, a in enumerate(leaves) if isinstance(a, jax.ShapeDtypeStruct)]

  def one(i, seed):
    a = leaves[i]
    if not std or not (jnp.issubdtype(a.dtype, jnp.floating) or a.dtype == jnp.uint8):
      return jnp.zeros(a.shape, a.dtype)
    if names[i].startswith("norm"):
      return jnp.ones(a.shape, a.dtype)
    return _bell(a.shape, a.dtype, seed + np.uint32(i * 0x85EBCA6B % 2 ** 32), std)

  def make(seed):
    return [one(i, seed) for i in wanted]

  where = [leaves[i].sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0]) for i in wanted]
  # The seed is an argument, so that the compiler cannot compute the numbers in advance.
  for i, a in zip(wanted, jax.jit(make, out_shardings=where)(np.uint32(seed))):
    leaves[i] = a
  return jax.block_until_ready(tree.unflatten(leaves))


def like(spec: jax.ShapeDtypeStruct, value) -> jax.Array:
  """A value as an array of this shape, dtype and sharding."""
  return jax.device_put(np.broadcast_to(np.asarray(value, spec.dtype), spec.shape), spec.sharding)


# --- a configuration's programs --------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
  """A configuration on one device.

  Attributes:
    c: the configuration.
    p: what `setup.assemble` makes of it.
  """

  c: config_lib.ConfigDict
  p: setup.Pieces

  @property
  def work(self) -> programs.Work:
    return programs.work(self.c)

  def program(self, name: str) -> programs.Program:
    return programs.program(self.c, self.p, name, self.work)


def case(config: str, smoke: bool, **changes) -> Case:
  """A configuration of the folder `configs` for the first device; `rollout__prompts=8` sets `rollout.prompts`."""
  c = runpy.run_path(str(CONFIGS / f"{config}.py"))["get_config"]()
  model = plan.model_of(c)
  if smoke:
    ids = {name: 500 + i for i, name in enumerate(
        ("image_token", "video_token", "vision_start", "vision_end", "vision_pad"))}
    model = qwen.tiny(512, ids | {"eos": (505,)})
    changes = {key.replace(".", "__"): value for key, value in SMOKE.items()} | changes
    if c.lora.rank:
      changes["lora__rank"] = 4
  for key, value in changes.items():
    section, knob = key.split("__")
    c[section][knob] = value
  return Case(c, setup.assemble(c, model, None, "", jax.devices()[:1]))


@dataclasses.dataclass
class Made:
  """A compiled program.

  Attributes:
    run: the compiled program; takes its arrays.
    compile_s: seconds of tracing and compiling.
    plan_gib: peak of a device's memory that `virl_jax.plan` states for it.
    arguments_gib: the part of this that its arguments take.
    kernels: which of `hlo.KERNELS` it calls.
  """

  run: Callable
  compile_s: float
  plan_gib: float
  arguments_gib: float
  kernels: list[str]


def made(program: programs.Program) -> Made:
  """Compiles a program as a run does."""
  began = time.perf_counter()
  done = program.lower().compile()
  seconds, held = time.perf_counter() - began, done.memory_analysis()
  return Made(done, seconds, plan.peak_gib(held, sharding.platform(jax.devices()[0])),
              held.argument_size_in_bytes / plan.GIB, hlo.kernels(done.as_text()))


@contextlib.contextmanager
def attending(kind: str) -> Iterator[None]:
  """Programs that are traced in this context attend to their cache in this way, whatever `cache.choose` would take."""
  chosen, cache_lib.choose = cache_lib.choose, lambda *args: kind
  jax.clear_caches()  # of traces with another kind
  try:
    yield
  finally:
    cache_lib.choose = chosen
    jax.clear_caches()


def ways(model: family.Config, smoke: bool) -> list[str]:
  """How to attend to a cache: by the kernel of this platform, if there is one, and by XLA's loop."""
  kind = cache_lib.choose(model.platform, jnp.dtype(model.compute_dtype), model.text.head_size)
  if smoke and kind == "loop" and cache_kernels.has_triton():
    kind = "triton"  # interpreted
  return list(dict.fromkeys((kind, "loop")))


# --- figures ---------------------------------------------------------------------------------------------------


@functools.cache
def chip() -> topologies.Chip:
  """The device's data sheet; speeds are NaN if there is none."""
  return topologies.here(jax.devices()[:1], math.inf).chip


@functools.cache
def ceilings() -> tuple[float, float]:
  """Operations a second of a large matrix product, bytes a second of a copy, in `DTYPE`; measured once a process."""
  return policy_bench.ceilings(DTYPE)


def peak_gib() -> float | None:
  """The most of the device's memory that this process has held, or None if the device does not say."""
  stats = jax.devices()[0].memory_stats()
  return stats["peak_bytes_in_use"] / plan.GIB if stats and "peak_bytes_in_use" in stats else None


def speed(seconds: list[float], turns: float, tokens: float, operations: float, read: float) -> dict:
  """Seconds and what follows from them.

  Args:
    seconds: of each run.
    turns: how many units (microbatches, tokens of a row) a run has; the rest is for one unit.
    tokens: how many tokens.
    operations: of its matrix products.
    read: bytes of the device's memory that it has to read or write.
  """
  each = timing.median(seconds) / turns
  product, copy = ceilings()
  known = not math.isnan(chip().flops)
  best = chip().flops if known else product
  return {"seconds": each, "fastest_s": min(seconds) / turns, "slowest_s": max(seconds) / turns,
          "tokens_s": tokens / each, "flop": operations, "mfu": operations / each / best, "peak_flop_s": best,
          "peak_from": "data sheet" if known else "measured", "product_flop_s": product,
          "share_of_product": operations / each / product, "floor_s": read / copy, "copy_bytes_s": copy,
          "share_of_floor": read / copy / each}


def held(sides: list[Made], given, before: float | None) -> dict:
  """Peak memory, by the device and by `plan`.

  Args:
    sides: the programs that ran.
    given: all arrays that are on the device for them.
    before: `peak_gib` when these were there and nothing had run.
  """
  beside = max(0.0, memory.device_gib(given) - min(s.arguments_gib for s in sides))  # what a program does not use
  return {"peak_gib": peak_gib(), "peak_before_gib": before, "plan_gib": max(s.plan_gib for s in sides) + beside}


def versions() -> dict[str, str]:
  """Versions of the CUDA or TPU packages that are installed, and of the platform."""
  found = {"platform": " ".join(jax.devices()[0].client.platform_version.split())}
  pattern = re.compile(r"nvidia-(cudnn|cublas|cuda-(runtime|nvcc))(-cu\d+)?|jax-cuda\d+-p\w+|libtpu")
  for dist in importlib.metadata.distributions():
    name = dist.metadata["Name"] or ""
    if pattern.fullmatch(name.lower()):
      found[name] = dist.version
  return found


# --- are the kernels right? ------------------------------------------------------------------------------------


def apart(got, want, here) -> dict[str, float]:
  """How far an array is from the right one, over the tokens that count.

  Args:
    got, want: [B, T, N, H].
    here: bool[B, T], which tokens count.
  """
  got, want = (np.asarray(a, np.float32)[np.asarray(here)] for a in (got, want))
  off, size = (np.sqrt(np.square(a).sum((1, 2), dtype=np.float64)) for a in (got - want, want))
  usual = np.sqrt(np.square(size).mean())
  return {"max_abs": float(np.abs(got - want).max()), "whole": float(np.sqrt(np.square(off).mean()) / usual),
          "worst": float((off / np.maximum(size, usual)).max())}


def within(error: dict[str, float]) -> bool:
  """Whether rounding explains an error; False if anything is NaN."""
  return error["whole"] <= WHOLE and error["worst"] <= WORST


def normal(rng, *shape) -> jax.Array:
  return jnp.asarray(rng.standard_normal(shape, np.float32), DTYPE)


def check_cache(args) -> dict:
  """Attention over a cache: the platform's kernel and the loop in bfloat16, each against the loop in float32."""
  platform = sharding.platform(jax.devices()[0])
  # Layers, rows, new tokens, key heads, query heads for each key head, head size, slots.  The last but one is a
  # stack with more elements than 31 bits can count, as in a run; most of them come before its last layer.
  cases = [(2, 8, 1, 4, 7, 128, 2304), (2, 64, 1, 2, 8, 128, 1088), (2, 4, 17, 4, 7, 128, 2304),
           (2, 4, 300, 2, 8, 128, 4096), (2, 3, 130, 8, 5, 128, 640), (2, 5, 33, 3, 1, 128, 512),
           (28, 10, 1, 4, 7, 128, 16384), (2, 2, 64, 2, 4, 256, 576)]
  if args.smoke:
    cases = [(2, 3, 1, 2, 7, 32, 192), (2, 2, 17, 1, 3, 32, 128)]
  rng, found = np.random.default_rng(0), []
  for L, A, T, K, G, H, S in cases:
    kind = cache_lib.choose(platform, DTYPE, H)
    if args.smoke and cache_kernels.has_triton():
      kind = "triton"
    stack = jax.ShapeDtypeStruct((L, A + 1, K, S, H), DTYPE)
    q, (k, v) = normal(rng, A, T, K * G, H), arrays((stack, stack), 1.0, seed=len(found))
    length = rng.integers(0, S - T + 1, A + 1)
    length[:3] = 0, S - T, min(63, S - T)  # an empty cache, no room left, across a block's end
    new = np.maximum(1, rng.integers(T // 2, T + 1, A))
    new[-1] = T
    row = rng.permutation(A + 1)[:A].astype(np.int32)

    def attend(q, k, v, layer, length, new, row, kind, T=T):
      at = cache_lib.places(cache_lib.Cache(k, v, length), new, T, row)
      return cache_lib.attend(q, k, v, layer, at, platform, kind)

    run = jax.jit(attend, static_argnames="kind")
    last, others = np.int32(L - 1), (length.astype(np.int32), new.astype(np.int32), row)
    compiled = run.lower(q, k, v, last, *others, kind=kind).compile()
    kernel, loop = compiled(q, k, v, last, *others), run(q, k, v, last, *others, kind="loop")
    with jax.default_matmul_precision("highest"):
      right = run(*(a.astype(jnp.float32) for a in (q, k[-1:], v[-1:])), np.int32(0), *others, kind="loop")
    here = np.arange(T)[None] < new[:, None]
    errors = {"kernel": apart(kernel, right, here), "loop": apart(loop, right, here)}
    called = kind == "loop" or args.smoke or "cache" in hlo.kernels(compiled.as_text())
    found.append({"layers": L, "rows": A, "tokens": T, "kv_heads": K, "queries_a_head": G, "head_size": H, "slots": S,
                  "kind": kind, "kernel_against_loop": apart(kernel, loop, here)["max_abs"], **errors,
                  "called": called, "ok": within(errors["kernel"]) and called})
    print(f"  {json.dumps(found[-1])}", flush=True)
  return verdict(found)


def check_attention(args) -> dict:
  """Attention over sequences, forward and backward: the kernel and XLA in bfloat16, each against XLA in float32."""
  platform, small = sharding.platform(jax.devices()[0]), 16 if args.smoke else 1
  # Tokens, query heads, key heads, head size, causal, lengths of each row's segments.
  cases = {
      "causal, one segment": (2048, 16, 2, 128, True, [[2048], [1500]]),
      "causal, joined": (2048, 28, 4, 128, True, [[700, 500, 300, 200, 100, 40, 8, 0], [1024, 1024, *[0] * 6],
                                                  [2048, *[0] * 7], [256] * 8]),
      "causal, joined, 3B": (4096, 16, 2, 128, True, [[2500, 1500, 64, 0], [1365, 1365, 1300, 0]]),
      "windows of vision": (64, 16, 16, 80, False, [[n] for n in (64, 64, 48, 32, 16, 4, 0, 64)]),
      "whole pictures": (4096, 16, 16, 80, False, [[4096], [2500]])}
  rng, found = np.random.default_rng(0), []
  for name, (T, N, K, H, causal, lengths) in cases.items():
    if args.smoke:
      T, N, K, H = T // small, N // K * min(K, 2), min(K, 2), H // 8 * 2
      lengths = [[n // small for n in row] for row in lengths]
    lengths = jnp.asarray(lengths, jnp.int32)
    B = len(lengths)
    segment = attention.segments(lengths, T)
    kind = "cudnn" if args.smoke else attention.choose(platform, DTYPE, T, H, True)
    q, k, v, by = normal(rng, B, T, N, H), normal(rng, B, T, K, H), normal(rng, B, T, K, H), normal(rng, B, T, N, H)
    by = jnp.where((segment >= 0)[..., None, None], by, 0)

    def gradients(q, k, v, by, segment, lengths, kind, causal=causal):
      def loss(q, k, v):
        out = attention.attend(q, k, v, segment, causal, lengths, kind, platform)
        return (out.astype(jnp.float32) * by.astype(jnp.float32)).sum(), out

      by_qkv, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
      return {"out": out, **dict(zip(("dq", "dk", "dv"), by_qkv))}

    run = jax.jit(gradients, static_argnames="kind")
    xla = attention.choose("cpu", DTYPE, T, H, True)
    compiled = run.lower(q, k, v, by, segment, lengths, kind=kind).compile()
    kernel, other = compiled(q, k, v, by, segment, lengths), run(q, k, v, by, segment, lengths, kind=xla)
    with jax.default_matmul_precision("highest"):
      right = run(*(a.astype(jnp.float32) for a in (q, k, v, by)), segment, lengths, kind=xla)
    here, all_of_it = np.asarray(segment >= 0), np.ones((B, T), bool)
    errors = {side: {part: apart(got[part], right[part], here if part == "out" else all_of_it) for part in right}
              for side, got in (("kernel", kernel), ("xla", other))}
    called = kind in ("plain", "blocks") or args.smoke or kind in hlo.kernels(compiled.as_text())
    found.append({"case": name, "tokens": T, "rows": B, "heads": N, "kv_heads": K, "head_size": H, "kind": kind,
                  "xla_kind": xla, **errors, "called": called,
                  "ok": all(map(within, errors["kernel"].values())) and called})
    print(f"  {json.dumps(found[-1])}", flush=True)
  return verdict(found)


def verdict(cases: list[dict]) -> dict:
  """The cases, whether all of them are right, and the tolerance."""
  return {"ok": all(found["ok"] for found in cases), "tolerance": {"whole": WHOLE, "worst": WORST}, "cases": cases}


# --- how fast is it? -------------------------------------------------------------------------------------------


def update(args, config: str) -> dict:
  """An update of so many full microbatches; empty ones take memory but no time."""
  this = case(config, args.smoke)
  program = this.program("update")
  batch, filled = minibatch(this, program, args.microbatches)
  state, scored, frozen, limit = program.arrays
  state = arrays(state).replace(params=arrays(state.params, STD))
  sign = np.where(np.arange(len(batch.row_mask_B)) % 2, -0.5, 1.0)
  usual = -math.log(this.p.step.model.text.vocab)  # about the log-probability that random weights give a token
  given = {"advantage_B": sign, "advantage_BT": sign[:, None]} | {
      name: usual for name in ("logp_old_BT", "logp_ref_BT") if getattr(scored, name) is not None}
  fresh = arrays(scored.replace(batch=None, **dict.fromkeys(given)))
  scored = fresh.replace(batch=batch, **{name: like(getattr(scored, name), value) for name, value in given.items()})
  frozen = arrays(frozen, STD, seed=1)
  before, side = peak_gib(), made(program)
  metrics = None

  def run():
    nonlocal state, metrics
    state, metrics = jax.block_until_ready(side.run(state, scored, frozen, limit))

  run()  # besides the first run, which `interleaved` does not count
  seconds = timing.interleaved({"": run}, args.repeat)[""]
  memory_ = held([side], (state, scored, frozen), before)
  work = programs.cost(this.c, this.p, "update", this.work)
  said = {name: value for name, value in pooled.merge([metrics]).items() if name in ("loss/total", "optim/grad_norm")}
  if not all(map(math.isfinite, said.values())) or not said["optim/grad_norm"]:
    raise ValueError(f"an update must give finite metrics and gradients. Received: {said}")
  return {"microbatches": filled, "tokens": work.tokens, "whole_update_s": timing.median(seconds), **said,
          **speed(seconds, filled, work.tokens, costs.flops(this.p.step.model, work), work.bytes_device), **memory_,
          "compile_s": side.compile_s, "kernels": side.kernels}


def minibatch(this: Case, program: programs.Program, most: int):
  """A batch on the device whose first microbatches are full and the others empty.

  Args:
    this: the configuration.
    program: its update.
    most: microbatches to fill.

  Returns:
    The batch, and how many microbatches of it are full.
  """
  spec = program.args[1].batch
  (B, T), (M, U, S) = spec.tokens_BT.shape, spec.rows.lengths_MUS.shape
  each = min(this.work.trajectory_tokens, T)
  joined = min(T // each, S)
  cells = sum(math.prod(b.window_IWQ.shape[1:]) for b in spec.rows.images) // this.p.pack.grid.merge ** 2
  cells_each = min(cells // (U * joined), each // 2)
  index, lengths = np.full((M, U, T), -1, np.int32), np.zeros((M, U, S), np.int32)
  vision = np.full((B, T), -1, np.int32)
  filled = min(most, M, B // (U * joined))
  for b in range(filled * U * joined):
    m, place = divmod(b, U * joined)
    u, j = divmod(place, joined)
    index[m, u, j * each:(j + 1) * each] = b * T + np.arange(each)
    lengths[m, u, j] = each
    vision[b, :cells_each] = place * cells_each + np.arange(cells_each)
  at = np.arange(T)
  images = arrays(spec.rows.images, 1.0)
  tokens = np.random.default_rng(0).integers(0, this.p.step.model.text.vocab, (B, T))
  given = {"tokens_BT": tokens, "valid_BT": at < each, "sampled_BT": (at >= each // 2) & (at < each), "pos_BXT": at,
           "vision_BT": vision, "action_BT": -1, "answerable_B": True, "row_mask_B": True}
  batch = arrays(spec.replace(rows=None, **dict.fromkeys(given)))
  batch = batch.replace(**{name: like(getattr(spec, name), value) for name, value in given.items()})
  rows = spec.rows.replace(index_MUT=like(spec.rows.index_MUT, index),
                           lengths_MUS=like(spec.rows.lengths_MUS, lengths), images=images)
  return batch.replace(rows=rows), filled


def decode(args, rows: int) -> dict:
  """Decodes so many rows whose caches are filled to the same length, by the kernel and by the loop in turns."""
  filled, steps = (64, 4) if args.smoke else (2048, 32)
  this = case("v7b", args.smoke, engine__slots=rows, engine__segment_tokens=steps,
              rollout__max_total_tokens=filled + steps)
  model, program = this.p.policy.model, this.program("decode")
  weights, spec, writers, key, temperature, _ = program.arrays
  weights, state = arrays(weights, STD), arrays(spec, 1.0, seed=1)
  key = arrays_key(key)
  hidden, before, outs = np.asarray(state.hidden_BD), peak_gib(), {}
  sides = {kind: made_attending(this, "decode", kind) for kind in ways(model, args.smoke)}
  number = np.arange(rows)
  writers = sample.Writers(like(writers.index_A, number), like(writers.turn_A, 0), like(writers.said_A, 0),
                           like(writers.left_A, steps))

  def run(kind):
    nonlocal state
    cache = state.cache.replace(len_B=like(spec.cache.len_B, filled))
    state = state.replace(cache=cache, pos_B=like(spec.pos_B, filled), hidden_BD=like(spec.hidden_BD, hidden))
    state, *out = sides[kind].run(weights, state, writers, key, temperature, np.int32(2 ** 30))
    outs[kind] = jax.device_get(out)

  seconds = timing.interleaved({kind: functools.partial(run, kind) for kind in sides}, args.repeat)
  memory_ = held(list(sides.values()), (weights, state, writers), before)
  context = filled + steps / 2
  read, _ = decode_bench.least(model, rows, context, jnp.dtype(model.compute_dtype).itemsize)
  operations = costs.flops(model, costs.Work(rows, context, rows))
  first = next(iter(sides))
  tokens, logp, _ = outs[first]
  if not np.isfinite(logp).all():
    raise ValueError("log-probabilities of decoding must be finite")
  # If a row ends by chance, the others go on.
  of = {kind: speed(seconds[kind], outs[kind][2].max(), rows, operations, read) for kind in sides}
  return {"rows": rows, "filled": filled, "steps": int(outs[first][2].max()), "kind": first, **of[first],
          "loop_s": of["loop"]["seconds"], "times_as_fast_as_loop": of["loop"]["seconds"] / of[first]["seconds"],
          "same_tokens": float((tokens == outs["loop"][0]).mean()), **memory_,
          "compile_s": sides[first].compile_s, "loop_compile_s": sides["loop"].compile_s,
          "kernels": sides[first].kernels}


def arrays_key(spec) -> jax.Array:
  """A key, after checking that the program takes one here."""
  if not jnp.issubdtype(spec.dtype, jax.dtypes.prng_key):
    raise ValueError(f"decode must take a key. Received: {spec.dtype}")
  return jax.random.key(0)


def made_attending(this: Case, name: str, kind: str) -> Made:
  """A program that attends to its cache in this way."""
  with attending(kind):
    return made(this.program(name))


def chunk(args, name: str) -> dict:
  """Appends prompts, or crops to half-full rows, in all slots of a GPU's share of v7b on eight: kernel and loop."""
  this = case("v7b", args.smoke, engine__slots=4 if args.smoke else 8)
  model, program = this.p.policy.model, this.program(name)
  weights, spec, given = program.arrays
  A, T = given.tokens_AT.shape
  start = 0 if name == "prefill" else this.c.rollout.max_total_tokens // 2
  T_real = min(T, this.c.rollout.max_total_tokens - start)
  cells = math.prod(given.images[0].window_IWQ.shape[1:]) // model.vision.merge ** 2
  at = np.arange(T)
  vision = np.where(at < min(cells, T_real), np.arange(A)[:, None] * cells + at, -1)
  images = arrays(given.images, 1.0)
  given = dataclasses.replace(
      given, tokens_AT=like(given.tokens_AT, at % model.text.vocab), n_new_A=like(given.n_new_A, T_real),
      pos_AXT=like(given.pos_AXT, start + at), next_pos_A=like(given.next_pos_A, start + T_real),
      vision_AT=like(given.vision_AT, vision), images=images, row_A=like(given.row_A, np.arange(A)),
      start_A=like(given.start_A, start))
  weights, state = arrays(weights, STD), arrays(spec, 1.0, seed=1)
  before, last = peak_gib(), {}
  sides = {kind: made_attending(this, name, kind) for kind in ways(model, args.smoke)}

  def run(kind):
    nonlocal state
    state = jax.block_until_ready(sides[kind].run(weights, state, given))
    last[kind] = np.asarray(state.hidden_BD[:A], np.float32)

  seconds = timing.interleaved({kind: functools.partial(run, kind) for kind in sides}, args.repeat)
  memory_ = held(list(sides.values()), (weights, state, given), before)
  work = programs.cost(this.c, this.p, name, this.work)
  first = next(iter(sides))
  if not np.isfinite(last[first]).all():
    raise ValueError(f"hidden states of {name} must be finite")
  operations = costs.flops(model, work)
  of = {kind: speed(seconds[kind], 1, work.tokens, operations, work.bytes_device) for kind in sides}
  return {"rows": A, "tokens": T, "context": start, "kind": first, **of[first], "loop_s": of["loop"]["seconds"],
          "times_as_fast_as_loop": of["loop"]["seconds"] / of[first]["seconds"],
          "hidden_max_difference": float(np.abs(last[first] - last["loop"]).max()), **memory_,
          "compile_s": sides[first].compile_s, "loop_compile_s": sides["loop"].compile_s,
          "kernels": sides[first].kernels}


def copy(args) -> dict:
  """Copies float32 weights to bfloat16, as a run does once a step."""
  this = case("v7b", args.smoke)
  program = this.program("copy")
  weights = arrays(program.arrays[0], STD)
  before, side = peak_gib(), made(program)
  seconds = timing.interleaved({"": lambda: jax.block_until_ready(side.run(weights))}, args.repeat)[""]
  count = sum(a.size for a in weights)
  size = jnp.dtype(this.c.model.compute_dtype).itemsize
  figures = speed(seconds, 1, 0, 0, sum(a.nbytes for a in weights) + count * size)
  kept = ("seconds", "fastest_s", "slowest_s", "floor_s", "copy_bytes_s", "share_of_floor")
  return {"parameters": count, **{name: figures[name] for name in kept}, **held([side], weights, before),
          "compile_s": side.compile_s}


def rollout(args) -> dict:
  """A step's rollouts through the engine; a script says when turns end and what comes back."""
  this = case("v7b", args.smoke)
  model = this.p.policy.model
  shape = dict(prompts=8, group=8, rounds=(2, 5), tokens=(64, 256), first_px=1008, crop_px=(448, 448))
  slots = 32
  if args.smoke:
    shape, slots = dict(prompts=2, group=2, rounds=(2, 3), tokens=(4, 8), first_px=56, crop_px=(56, 56)), 2
  scripts = rollout_bench.draw(model, **shape, pixels=True)
  params = arrays(family.whole(*family.abstract(model, model.compute_dtype, this.p.policy.mesh), model), STD)
  side = rollout_bench.Ours(model, params, scripts, shape["group"], slots_lib.Config(
      slots=slots, segment_tokens=32, serve_share=0.125, token_steps=4))
  found = timing.interleaved({"": side.run}, max(1, args.repeat - 1))
  seconds, first, stats = found[""], found["/first"][0], side.stats
  memory_ = {"peak_gib": peak_gib(), "weights_gib": memory.device_gib(params)}
  merged, patches = model.vision.merge ** 2, []
  for i, script in enumerate(scripts):  # a group shares its prompt
    patches += [script.prompt[1]] * (i % shape["group"] == 0) + [crop for _, crop in script.replies]
  counts = [len(image.patches_PC) for image in patches]
  tokens = stats.prompt_tokens + stats.appended_tokens + stats.sampled_tokens
  context = float(np.mean([rollout_bench.tokens_of(s) for s in scripts])) / 2
  operations = costs.flops(model, costs.Work(tokens, context, stats.sampled_tokens, sum(counts),
                                             sum(n * n for n in counts) / sum(counts)))
  size = jnp.dtype(model.compute_dtype).itemsize
  read, _ = decode_bench.least(model, 0, 0, size)
  of_row, _ = decode_bench.least(model, 1, context, size)
  written = sum(sum(s.lengths) for s in scripts)
  figures = speed(seconds, 1, written, operations, stats.steps * read + stats.sampled_tokens * (of_row - read))
  return {"trajectories": len(scripts), "slots": slots, "written": written, "vision_tokens": sum(counts) // merged,
          "trajectories_s": len(scripts) / figures["seconds"], **figures, **memory_, "first_s": first,
          "compile_s": first - figures["seconds"], "stats": dataclasses.asdict(stats),
          "idle_share": stats.idle_s / stats.seconds}


# --- parts -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of the script, which runs in its own process.

  Attributes:
    run: from the command line's arguments to the figures.
    expect_s: a guess of what it takes on one H100, with compilation.
    limit_s: after this long it is stopped.
  """

  run: Callable[[argparse.Namespace], dict]
  expect_s: float
  limit_s: float


PARTS = {  # the most valuable first
    "check_cache": Part(check_cache, 60, 180),
    "check_attention": Part(check_attention, 60, 240),
    "update_7b": Part(functools.partial(update, config="v7b_lora"), 150, 420),
    "decode_64": Part(functools.partial(decode, rows=64), 60, 180),
    "update_3b": Part(functools.partial(update, config="v3b_lora"), 120, 360),
    "rollout_7b": Part(rollout, 240, 480),
    "append_7b": Part(functools.partial(chunk, name="append"), 70, 240),
    "decode_1": Part(functools.partial(decode, rows=1), 50, 180),
    "decode_256": Part(functools.partial(decode, rows=256), 60, 180),
    "decode_16": Part(functools.partial(decode, rows=16), 50, 180),
    "prefill_7b": Part(functools.partial(chunk, name="prefill"), 60, 240),
    "copy_7b": Part(copy, 40, 150),
}


def write(out: str | None, line: dict) -> None:
  """Prints a line and appends it to a file, on the disk before anything else happens."""
  text = json.dumps(line)
  print(text, flush=True)
  if out:
    with open(out, "a") as f:
      f.write(text + "\n")
      f.flush()
      os.fsync(f.fileno())


def run_here(args, name: str) -> bool:
  """Runs a part in this process and writes what it found; returns whether it succeeded."""
  memory.keep_when_on_cpu()
  began = time.perf_counter()
  try:
    found = PARTS[name].run(args)
    found = {"ok": True, **found}
  except Exception as e:  # a part that fails is written with its error, and the others go on
    traceback.print_exc()
    found = {"ok": False, "error": f"{type(e).__name__}: {' '.join(str(e).split())}"[:1000]}
  made_by = timing.made_by()
  made_by["versions"] |= versions()
  write(args.out, {"part": name, **found, "part_s": time.perf_counter() - began, **made_by})
  return found["ok"]


def lines(out: str) -> int:
  """How many lines a file has; 0 if there is none."""
  return pathlib.Path(out).read_text().count("\n") if os.path.exists(out) else 0


def run_apart(args, name: str, limit_s: float) -> bool:
  """Runs a part in its own process and returns whether it succeeded; if it wrote nothing, its error is written here."""
  env = dict(os.environ)
  env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_SHARE))
  there, began = lines(args.out), time.perf_counter()
  command = [sys.executable, sys.argv[0], f"--parts={name}", "--here", f"--out={args.out}", f"--repeat={args.repeat}",
             f"--microbatches={args.microbatches}", *["--smoke"] * args.smoke]
  try:
    code = subprocess.run(command, env=env, timeout=limit_s).returncode
    error = f"the process ended with status {code} and said nothing"
  except subprocess.TimeoutExpired:
    code, error = None, f"stopped after its {limit_s:.0f} s"
  if lines(args.out) == there:
    write(args.out, {"part": name, "ok": False, "error": error, "part_s": time.perf_counter() - began,
                     "command": " ".join(["python", *command[1:]])})
    return False
  return code == 0


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--parts", type=lambda s: s.split(","), default=list(PARTS), help=", ".join(PARTS))
  p.add_argument("--out", default="accelerator.jsonl", help="a line of JSON a part is appended to it")
  p.add_argument("--budget", type=float, default=math.inf, help="seconds; parts that may not fit are not begun")
  p.add_argument("--repeat", type=int, default=3, help="runs that are timed")
  p.add_argument("--microbatches", type=int, default=3, help="of an update")
  p.add_argument("--smoke", action="store_true", help="tiny shapes, to see whether it runs; the speeds mean nothing")
  p.add_argument("--here", action="store_true", help="in this process, without time limits")
  args = p.parse_args()
  if unknown := [name for name in args.parts if name not in PARTS]:
    p.error(f"--parts must be among {', '.join(PARTS)}. Received: {', '.join(unknown)}")
  if min(args.repeat, args.microbatches) < 1:
    p.error(f"--repeat and --microbatches must be at least 1. Received: {args.repeat} and {args.microbatches}")
  if args.here:
    sys.exit(not all([run_here(args, name) for name in args.parts]))

  began, bad, took, expected, pace = time.perf_counter(), [], 0.0, 0.0, 1.0
  for i, name in enumerate(args.parts):
    part, gone = PARTS[name], time.perf_counter() - began
    rest = args.budget - gone
    if pace * part.expect_s > rest:
      write(args.out, {"part": name, "ok": False, "error": f"not begun: {rest:.0f} s are left of the budget"})
      bad.append(name)
      continue
    well = run_apart(args, name, min(part.limit_s, rest))
    before, gone = gone, time.perf_counter() - began
    if well:  # a part that failed says nothing about speed
      took, expected = took + gone - before, expected + part.expect_s
      pace = took / expected
    else:
      bad.append(name)
    left = sum(PARTS[other].expect_s for other in args.parts[i + 1:])
    print(f"{name}: {'done' if well else 'failed'} after {gone:.0f} s in all; {len(args.parts) - i - 1} parts "
          f"are left, about {pace * left / 60:.0f} minutes", flush=True)
  print(f"{args.out}: {len(args.parts) - len(bad)} of {len(args.parts)} parts went well"
        + (f"; not so {', '.join(bad)}" if bad else ""), flush=True)
  sys.exit(bool(bad))


if __name__ == "__main__":
  main()
