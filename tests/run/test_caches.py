"""Compiled programs are kept for later processes, where the user wants them."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax
from virl_jax.run import caches
caches.keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
print(jax.jit(lambda x: x * 3 + 1)(jax.numpy.arange(4)), hits.count("/jax/compilation_cache/cache_hits") > 0)
"""


@pytest.mark.parametrize("mine", [False, True])
def test_a_second_process_compiles_nothing_again(tmp_path, mine):
  env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"VIRL_JAX_CACHE": str(tmp_path)}
  env |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")} if mine else {}
  outs = [subprocess.run([sys.executable, "-c", PROGRAM], env=env, check=True, capture_output=True, text=True).stdout
          for _ in range(2)]
  assert outs == ["[ 1  4  7 10] False\n", "[ 1  4  7 10] True\n"]
  assert [p.name for p in tmp_path.iterdir()] == ["mine" if mine else "xla"]
