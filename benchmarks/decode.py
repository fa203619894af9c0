"""How near a decode step comes to the speed of the memory.

    python benchmarks/decode.py                                                        # the bench model, float32
    python benchmarks/decode.py --size=7b --dtype=bfloat16 --rows=1,16,64,256          # on an accelerator

A step has to read every weight of the decoder once, and each row's keys and values.  The memory floor is the time
that this takes at the bandwidth of a copy, measured in the same run; many rows also have to be multiplied, and the
compute floor is the time that this takes at the speed of a large matrix product in the same dtype.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import policy as policy_bench  # of this folder
import timing  # of this folder

from virl_jax import shapes
from virl_jax.model import cache as cache_lib
from virl_jax.model import params as params_lib
from virl_jax.model import sharding
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.rollout import sample
from virl_jax.run import memory


class Step:
  """Decoding from a cache that is filled to the same length in all rows."""

  def __init__(self, cfg: qwen.Config, params: dict, rows: int, filled: int, steps: int):
    self.cfg, self.params, self.rows, self.filled, self.steps = cfg, params, rows, filled, steps
    self.state = sample.start(cfg, rows, shapes.up(filled + steps, cache_lib.BLOCK))

  def run(self):
    length = jnp.full((self.rows,), self.filled, jnp.int32)
    state = self.state.replace(cache=self.state.cache.replace(len_B=length))
    none = jnp.zeros(self.rows, jnp.int32)
    turns = sample.Writers(jnp.arange(self.rows), none, none, none + self.steps)
    self.state, _, _, count = sample.decode(self.params, self.cfg, state, turns, jax.random.key(0), jnp.float32(0),
                                            self.steps)
    assert int(count.min()) == self.steps


def least(cfg: qwen.Config, rows: int, filled: float, size: int) -> tuple[float, float]:
  """The least work of a step: bytes that it reads, and operations of its matrix products.

  Args:
    cfg: shapes.
    rows: how many decode.
    filled: tokens in each row's cache.
    size: bytes of a number.
  """
  t = cfg.text
  weights = params_lib.count(qwen.specs(cfg)["text"]) - (0 if t.tied else t.vocab * t.hidden)  # few embeddings are read
  cache = 2 * t.layers * t.kv_heads * t.head_size * filled * rows
  return (weights + cache) * size, rows * (2 * weights + 4 * t.layers * t.heads * t.head_size * filled)


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--size", choices=["bench", *qwen.SIZES], default="bench")
  p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
  p.add_argument("--rows", type=lambda s: [int(v) for v in s.split(",")], default=[1, 4, 16, 64])
  p.add_argument("--filled", type=int, default=512, help="tokens in each row's cache")
  p.add_argument("--steps", type=int, default=32)
  p.add_argument("--repeat", type=int, default=5)
  args = p.parse_args()
  memory.keep_when_on_cpu()
  cfg = policy_bench.BENCH if args.size == "bench" else qwen.SIZES[args.size]
  here = sharding.platform(jax.devices()[0])
  cfg = dataclasses.replace(cfg, compute_dtype=args.dtype, eos=(), platform=here)  # nothing ends a turn
  params = jax.jit(lambda key: params_lib.init(qwen.specs(cfg), key, jnp.dtype(args.dtype)))(jax.random.key(0))
  size = jnp.dtype(args.dtype).itemsize
  flops, bandwidth = policy_bench.ceilings(jnp.dtype(args.dtype))
  print(f"{least(cfg, 0, 0, size)[0] / 1e9:.2f} GB of weights; a copy moves {bandwidth / 1e9:.0f} GB/s, a product does "
        f"{flops / 1e9:.0f} GFLOP/s", flush=True)
  table, figures = [], []
  for rows in args.rows:
    read, operations = least(cfg, rows, args.filled + args.steps / 2, size)
    floor, work = read / bandwidth, operations / flops
    seconds = timing.interleaved({"": Step(cfg, params, rows, args.filled, args.steps).run}, args.repeat)[""]
    step = timing.median(seconds) / args.steps
    table.append([rows, f"{step * 1e3:.2f}", f"{floor * 1e3:.2f}", f"{work * 1e3:.2f}", f"{floor / step:.2f}",
                  f"{max(floor, work) / step:.2f}", f"{rows / step:.0f}"])
    figures.append({"rows": rows, "step_s": step, "memory_floor_s": floor, "compute_floor_s": work,
                    "share_of_memory_floor": floor / step, "share_of_higher_floor": max(floor, work) / step,
                    "tokens_s": rows / step})
    print(f"  {rows} rows done", flush=True)
  print("\n" + timing.table(["rows", "ms a step", "memory floor, ms", "compute floor, ms", "share of memory floor",
                             "of the higher floor", "tokens/s"], table) + "\n")
  print(timing.last_line({"size": args.size, "dtype": args.dtype, "filled": args.filled, "steps": args.steps,
                          "repeat": args.repeat, "copy_bytes_s": bandwidth, "product_flop_s": flops, "rows": figures}))


if __name__ == "__main__":
  main()
