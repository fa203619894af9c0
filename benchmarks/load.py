"""Host memory that loading a checkpoint takes beyond what the devices hold, and how fast it goes.

    python benchmarks/load.py --layers=4

Writes a random checkpoint with 7B's shapes but only `--layers` text layers to a temporary folder, and loads it.  A
thread reads the process's anonymous memory all the while; on a CPU it includes the devices' arrays, so those that are
live or being copied at that moment are subtracted.  Mapped file pages don't count: the kernel can drop them.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import tempfile
import threading
import time

import jax
import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors_numpy
import timing  # of this folder

from virl_jax.model import params as params_lib
from virl_jax.model import weights
from virl_jax.model.qwen2_5 import model as qwen


def anonymous_bytes() -> int:
  """RssAnon of this process."""
  with open("/proc/self/status") as f:
    return next(int(line.split()[1]) for line in f if line.startswith("RssAnon:")) * 1024


class Watch:
  """The largest of (anonymous memory - live device arrays) while it is open, relative to when it was opened."""

  def __enter__(self):
    self._on_host, self._coming = jax.default_backend() == "cpu", 0
    self._put, self._set_layer = jax.device_put, weights._set_layer
    self.base, self.peak, self._stop = anonymous_bytes() - self._held(), 0, threading.Event()
    # An array that is being copied, or written in place, belongs to its device, but is not among the live ones yet.
    jax.device_put, weights._set_layer = self._counted(self._put), self._counted(self._set_layer)
    self._thread = threading.Thread(target=self._run)
    self._thread.start()
    return self

  def __exit__(self, *_):
    jax.device_put, weights._set_layer = self._put, self._set_layer
    self._stop.set()
    self._thread.join()

  def _counted(self, call):
    def run(x, *args, **kwargs):
      self._coming = x.nbytes if self._on_host else 0
      try:
        return call(x, *args, **kwargs).block_until_ready()
      finally:
        self._coming = 0

    return run

  def _held(self):
    return (sum(a.nbytes for a in jax.live_arrays()) if self._on_host else 0) + self._coming

  def _run(self):
    while not self._stop.wait(0.002):
      self.peak = max(self.peak, anonymous_bytes() - self._held() - self.base)


def write(folder: str, cfg: qwen.Config) -> int:
  """Writes a random bf16 checkpoint in shards of about 1 GB; returns its bytes."""
  weights.SHARD_BYTES = 2 ** 30
  rng, made = np.random.default_rng(0), {}

  def leaf(spec):
    key = spec.shape
    if key not in made:
      made[key] = rng.standard_normal(spec.shape, np.float32).astype(ml_dtypes.bfloat16)
    return made[key]

  weights.save_hf(folder, cfg, params_lib.map_specs(leaf, qwen.specs(cfg)), "bfloat16")
  return 2 * params_lib.count(qwen.specs(cfg))


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--layers", type=int, default=4)
  p.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
  p.add_argument("--repeat", type=int, default=3)
  args = p.parse_args()
  seven = qwen.SIZES["7b"]
  cfg = dataclasses.replace(seven, text=dataclasses.replace(seven.text, layers=args.layers, vocab=65536))
  largest = max(int(np.prod(s.hf_shape)) for _, s in params_lib.leaves(qwen.specs(cfg)))
  largest *= np.dtype(ml_dtypes.bfloat16 if args.dtype == "bfloat16" else args.dtype).itemsize
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    size = write(f"{folder}/hf", cfg)
    try:
      naive = lambda: jax.tree.map(jax.device_put, safetensors_whole(f"{folder}/hf"))
      ours = lambda: weights.load_hf(f"{folder}/hf", args.dtype)[1]
      for name, load in {"load_hf": ours, "whole files": naive}.items():
        for _ in range(args.repeat):
          with Watch() as watch:
            began = time.perf_counter()
            params = jax.block_until_ready(load())
            seconds = time.perf_counter() - began
          del params
          rows.append((name, watch.peak / largest, seconds, size / 1e9 / seconds))
    finally:
      jax.clear_caches()
  median = lambda name, i: timing.median([r[i] for r in rows if r[0] == name])
  names = dict.fromkeys(r[0] for r in rows)
  print(f"checkpoint {size / 1e9:.2f} GB, largest tensor {largest / 1e9:.3f} GB as {args.dtype}\n")
  print(timing.table(["", "peak host memory / largest tensor", "seconds", "GB/s"],
                     [[n, *(f"{median(n, i):.2f}" for i in (1, 2, 3))] for n in names]) + "\n")
  print(timing.last_line({"checkpoint_gb": size / 1e9, "largest_tensor_gb": largest / 1e9, "dtype": args.dtype, **{
      n.replace(" ", "_"): {"peak_over_largest": median(n, 1), "seconds": median(n, 2)} for n in names}}))


def safetensors_whole(folder: str) -> dict:
  """All tensors of a folder at once, as safetensors gives them."""
  tensors = {}
  for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
    tensors |= safetensors_numpy.load_file(file)
  return tensors


if __name__ == "__main__":
  main()
