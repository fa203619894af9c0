"""One of several processes that roll out together; run by test_engine.py.

    python -m tests.rollout.lockstep PROCESS PROCESSES PORT OUT
"""

import pickle
import sys

import jax


def main(process, processes, port, out):
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", 4 // int(processes))
  jax.config.update("jax_disable_most_optimizations", True)
  from virl_jax.run import hosts
  hosts.join(f"127.0.0.1:{port}", int(processes), int(process))
  from tests.rollout import test_engine
  from virl_jax.model import sharding
  from virl_jax.rollout import engine
  mesh = sharding.make(data=2, fsdp=2)
  policy, params = test_engine.load(mesh, slots=8, segment_tokens=7)
  got = engine.rollout(policy, params, test_engine.draw_tasks(5), jax.random.key(8), group_size=3)
  with open(out, "wb") as f:
    pickle.dump([(t.index, t.ids, t.stop, len(t.images)) for t in got], f)


if __name__ == "__main__":
  main(*sys.argv[1:])
