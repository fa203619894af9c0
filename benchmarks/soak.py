"""Thousands of trajectories in one process: does memory stay flat, is nothing compiled again, do all come back?

    python benchmarks/soak.py --records=RECORDS.jsonl --count=2000

Half of the tasks are from the records (photographs of any size), half from the needle task; the tiny base answers them.
Rounds after the first ones should need no new programs; each round that compiles some is printed.
"""

from __future__ import annotations

import argparse
import collections
import gc
import os
import pathlib
import time

import jax
import numpy as np
import timing  # of this folder

from virl_jax import config as config_lib
from virl_jax.data import batches
from virl_jax.data.sources import jsonl
from virl_jax.rollout import engine
from virl_jax.run import compiles
from virl_jax.run import load
from virl_jax.run import memory
from virl_jax.run import setup
from virl_jax.tiny import needle
from virl_jax.tiny import source


def resident() -> int:
  """Bytes of host memory that this process holds now."""
  return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def policy(prompts: int, group: int, slots: int):
  """The tiny base as a policy with a budget of 1,024 tokens, and its parameters."""
  c = config_lib.default()
  c.model.path, c.mesh.data = "@tiny", jax.device_count()
  c.image.max_pixels = 84 * 84
  c.image.crop_min_pixels, c.image.crop_max_pixels = 5 * 28 * 28, 10 * 28 * 28
  c.prompt.describe_tool, c.prompt.image_first, c.prompt.last_notice = False, False, ""
  r = c.rollout
  r.prompts, r.group_size, r.max_rounds = prompts, group, 6
  r.max_turn_tokens, r.max_total_tokens = 32, 1024
  c.engine.slots, c.engine.segment_tokens, c.engine.pad_tokens = slots, 16, 256
  p = setup.pieces(c)
  return p.policy, load.base(p.hf_dir, "float32", p.mesh).params


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--records", help="a jsonl file, see virl_jax/data/sources/jsonl.py; without it, only the needle task")
  p.add_argument("--count", type=int, default=2000)
  p.add_argument("--prompts", type=int, default=16, help="a round")
  p.add_argument("--group", type=int, default=4)
  p.add_argument("--slots", type=int, default=32)
  p.add_argument("--warmup", type=int, default=20, help="rounds before memory and compilations are watched")
  args = p.parse_args()
  memory.keep_when_on_cpu()
  compiled, (pol, params) = compiles.Counter(), policy(args.prompts, args.group, args.slots)
  sources = [source.load("", "train", needle.Config())]
  if args.records:
    sources.append(jsonl.load(args.records, "all", 0.2, 0))
  each = args.prompts * args.group
  rounds = args.warmup + -(-args.count // each)
  stops, mib, late, total, began = collections.Counter(), [], 0, 0, time.perf_counter()
  for r in range(rounds):
    before, watched = compiled.count, r >= args.warmup
    drawn = batches.train(sources[r % len(sources)], 0, r // len(sources), args.prompts, pol.image.decode_max_pixels)
    got, stats = engine.run(pol, params, drawn.tasks, jax.random.fold_in(jax.random.key(0), r), args.group)
    assert [t.index for t in got] == list(range(each)), "every trajectory comes back, once"
    if watched:
      stops.update(t.stop.value for t in got)
      total += len(got)
      late += compiled.count - before
    if compiled.count > before:
      print(f"  round {r}: {compiled.count - before} programs compiled", flush=True)
    del got, drawn
    gc.collect()
    if watched:
      mib.append(resident())
    if r % 5 == 4:
      passed = time.perf_counter() - began
      print(f"  round {r + 1} of {rounds}: {resident() / 2 ** 20:.0f} MiB, about "
            f"{passed / (r + 1) * (rounds - r - 1):.0f} s left; "
            + ", ".join(f"{k} {v:.3g}" for k, v in stats.metrics().items()), flush=True)
  slope = np.polyfit(np.arange(len(mib)) * each, mib, 1)[0]
  print("\n" + timing.table(["stop reason", "trajectories"], stops.most_common()) + "\n")
  print(f"{total} trajectories, {sum(stops.values())} with a stop reason; host memory {mib[0] / 2 ** 20:.0f} MiB, "
        f"then {mib[-1] / 2 ** 20:.0f} MiB: {slope / 1024:+.2f} KiB a trajectory; {late} compilations after warm-up")
  print(timing.last_line({"count": total, "stops": dict(stops), "first_mib": mib[0] / 2 ** 20,
                          "last_mib": mib[-1] / 2 ** 20, "kib_a_trajectory": slope / 1024, "late_compilations": late,
                          "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
  main()
