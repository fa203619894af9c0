"""Freed memory stays with the process on a CPU, and is left alone where an accelerator computes; a cache's size."""

import dataclasses
import subprocess
import sys

import pytest

from virl_jax.model import sharding
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.run import memory

# Allocates, touches and frees 64 MiB twice; prints the page faults of the second time.
FAULTS = """
import ctypes, resource, sys
from virl_jax.run import memory
if sys.argv[1] == "keep":
  assert memory.keep_when_on_cpu()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for _ in range(2):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  block = libc.malloc(ctypes.c_size_t(2 ** 26))
  ctypes.memset(block, 1, 2 ** 26)
  libc.free(ctypes.c_void_p(block))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
gnu = pytest.mark.skipif(sys.platform != "linux", reason="needs the GNU C library")


@gnu
def test_freed_memory_is_used_again():
  faults = {how: int(subprocess.run([sys.executable, "-c", FAULTS, how], env={"JAX_PLATFORMS": "cpu"}, check=True,
                                    capture_output=True, text=True).stdout) for how in ("keep", "leave")}
  assert faults["keep"] < 100 < faults["leave"], faults


@pytest.mark.parametrize("platforms", ["cuda", "tpu", "cuda,cpu"])
def test_accelerators_are_left_alone(platforms, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", platforms)
  assert not memory.keep_when_on_cpu()


def test_the_cache_of_7b():
  """57,344 bytes a token: 28 layers x 2 (keys, values) x 4 heads x 128 x 2 bytes."""
  mesh = sharding.make(data=4, fsdp=1, tensor=2)
  cfg = dataclasses.replace(qwen.SIZES["7b"], compute_dtype="bfloat16")
  p = memory.cache_size(cfg, 16384, 64, 2048, mesh, free_bytes=20 * 2 ** 30)
  assert (p.bytes_token, p.tokens_row, p.slots) == (57344, 16384, 64)
  assert p.bytes_row == 57344 * 16384 // 2 and p.bytes_device == 16 * p.bytes_row
  assert p.slots_that_fit == 4 * int(18 * 2 ** 30 // p.bytes_row)
  assert "64 slots for 2048 trajectories" in str(p) and "0.44 GiB a row" in str(p) and "164 slots fit" in str(p)
  tight = memory.cache_size(cfg, 16384, 0, 2048, mesh, free_bytes=20 * 2 ** 30)
  assert tight.slots == 2048 and "set config.engine.slots=164" in str(tight)
  small = memory.cache_size(cfg, 100, 3, 3, mesh)
  assert small.tokens_row == 128 and small.slots == 4 and "fit" not in str(small)


class Device:
  """A device that reports the memory statistics that it is given."""

  def __init__(self, **stats):
    self.memory_stats = lambda: stats or None


def test_the_most_that_a_device_has_held():
  gib = 2 ** 30
  told = [Device(bytes_limit=80 * gib, bytes_in_use=gib, peak_bytes_in_use=peak * gib) for peak in (3, 7, 5)]
  assert memory.peak_gib(told) == 7.0
  assert memory.peak_gib([*told, Device()]) is None, "as of a CPU"
  assert memory.peak_gib([*told, Device(bytes_limit=gib, bytes_in_use=0)]) is None
