"""Freed memory stays with the process on a CPU, and is left alone where an accelerator computes."""

import subprocess
import sys

import pytest

from virl_jax.run import memory

# Twice takes, touches and gives back 64 MiB; prints the page faults of the second time.
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
