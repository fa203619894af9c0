"""What processes agree on; whole runs of several are in tests/test_processes.py."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

from virl_jax.run import hosts

ROOT = pathlib.Path(__file__).parents[2]


TOGETHER = """
import json, os, signal, sys, time
from virl_jax.run import signals
signals.install()
import jax, numpy as np
from virl_jax import types
from virl_jax.model import sharding
from virl_jax.run import hosts
from virl_jax.run import placement

me = int(sys.argv[1])
hosts.join(f"127.0.0.1:{sys.argv[2]}", 2, me, 60.0)
mesh, found = sharding.make(data=2, fsdp=2), {}

def error(do):
  try:
    do()
  except Exception as e:
    return [type(e).__name__, str(e)]

found["reads programs"] = jax.config.jax_enable_compilation_cache
found["who"] = [hosts.number(), hosts.leads(), [i for i in range(5) if hosts.mine(i)], list(placement.row_lanes(mesh))]
found["agree"] = hosts.agree([[1 + me, 2 - me], [0, 7]]).tolist()
found["everyone"] = hosts.everyone({"me": me, "long": "x" * 1000 * me})  # of different sizes
large = hosts.everyone(bytes([me]) * (2 ** 21 + 9 - me))  # in pieces
found["large"] = [[len(b), sorted(set(b))] for b in large]
found["in_order"] = hosts.in_order([(2 * i + me, chr(97 + 2 * i + me)) for i in (1, 0)])
found["first"] = hosts.first(lambda: f"made by {me}")
def fails():
  raise ValueError(f"no room on {me}")
found["fails"] = error(lambda: hosts.first(fails))
hosts.same("colour", "red")
found["odd"] = error(lambda: hosts.same("colours", {"a": 1, "b": 2 + me}))

rows = np.arange(6.0).reshape(2, 3) + 100 * me
placed = placement.place_rows(rows, mesh)
found["global"] = list(placed.shape)
found["back"] = placement.fetch_rows(placed).tolist()
whole = jax.jit(lambda a: a + 1, out_shardings=sharding.replicated(mesh))(placed)
found["of what is whole"] = placement.fetch_rows(whole).tolist()
found["rows in the second axis"] = list(placement.place(np.zeros((3, 2)), mesh, 1).shape)
fields = {name: np.zeros((2, 2), np.float32) for name in types.Batch.__dataclass_fields__}
batch = placement.place_batch(types.Batch(**fields | {"rows": None, "order_B": np.array([1, 0], np.int32)}), mesh)
whole = jax.jit(lambda a: a, out_shardings=sharding.replicated(mesh))(batch.order_B)
found["order"] = placement.fetch_rows(whole).tolist()

before = hosts.waited()
time.sleep(1.5 * me)
hosts.agree([0])
found["waited"] = hosts.waited() - before
before = hosts.waited()
time.sleep(2.5 * (1 - me))
hosts.meet()
found["met"] = hosts.waited() - before
if me:
  os.kill(os.getpid(), signal.SIGTERM)
  while not signals.noted():
    time.sleep(0.01)
found["not ended by it"] = hosts.everyone(me)
try:
  hosts.agree([0])
except signals.Stopped as e:
  found["stopped"] = [str(e), e.code, isinstance(e, Exception)]
print(json.dumps(found), flush=True)
"""


def test_two_processes_agree(tmp_path):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  env = dict(os.environ, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="2")
  processes = [subprocess.Popen([sys.executable, "-c", TOGETHER, str(i), str(port)], cwd=ROOT, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(2)]
  try:
    ends = [p.communicate(timeout=150) for p in processes]
  finally:
    for p in processes:
      p.kill()
  assert [p.returncode for p in processes] == [0, 0], ends
  a, b = (json.loads(out.strip().splitlines()[-1]) for out, _ in ends)
  assert a["who"] == [0, True, [0, 2, 4], [0, 1]] and b["who"] == [1, False, [1, 3], [2, 3]]
  assert a["fails"] == ["ValueError", "no room on 0"] and b["fails"] == ["Failed", "no room on 0"]
  said = "all processes must have the same colours (b). Received: 3 on process 1, 2 on process 0"
  assert a["odd"] == ["Failed", said] and b["odd"] == ["ValueError", said]
  for it in (a, b):
    assert it["agree"] == [[2, 2], [0, 7]] and it["first"] == "made by 0" and it["in_order"] == list("abcd")
    assert [(x["me"], len(x["long"])) for x in it["everyone"]] == [(0, 0), (1, 1000)]
    assert it["large"] == [[2 ** 21 + 9, [0]], [2 ** 21 + 8, [1]]]
    assert it["global"] == [4, 3] and it["rows in the second axis"] == [3, 4]
    assert not it["reads programs"], "on CPUs, what is read and what is compiled sum in different orders"
    assert it["not ended by it"] == [0, 1] and it["stopped"] == ["stopped by SIGTERM", 0, False]
  rows = np.arange(6.0).reshape(2, 3)
  assert a["back"] == rows.tolist() and b["back"] == (rows + 100).tolist()
  assert a["of what is whole"] == (rows + 1).tolist() and b["of what is whole"] == (rows + 101).tolist()
  assert a["order"] == [1, 0] and b["order"] == [3, 2], "places in the whole batch"
  assert a["waited"] > 1.0 and a["waited"] > b["waited"]
  assert b["met"] > 1.5 and b["met"] > a["met"], "for longer than it asks at a time"


def test_one_process_agrees_with_itself():
  assert hosts.number() == 0 and hosts.leads() and all(map(hosts.mine, range(3)))
  assert hosts.everyone("a") == ["a"] and hosts.in_order([(1, "b"), (0, "a")]) == ["a", "b"]
  assert hosts.first(lambda: 3) == 3 and hosts.same("thing", 1) is None and hosts.meet() is None
  hosts.fail("nobody is there to hear")
