"""Whether a real server gives the trajectories of our engine: greedy, the tiny base behind `transformers serve`.

    pip install 'transformers[serving]' torch torchvision
    python benchmarks/endpoint.py [--tasks=20] [--url=http://HOST:PORT/v1 --model=NAME]

Rolls out needle tasks by `rollout.remote` and by the engine, and compares them turn by turn.  Without --url it starts
the server, on this machine's CPU, with the base's folder.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import runpy
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import transformers

from virl_jax.data import answers
from virl_jax.data import endpoint
from virl_jax.rollout import engine
from virl_jax.rollout import remote
from virl_jax.rollout import sample
from virl_jax.run import load
from virl_jax.run import setup
from virl_jax.tiny import needle

ROOT = pathlib.Path(__file__).parents[1]


def serve(folder: str) -> tuple[subprocess.Popen, str]:
  """Starts the server and waits until it replies; returns the process and its address."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  code = "from transformers.cli.transformers import main; main()"
  how = (f"--port={port}", "--device=cpu", "--dtype=float32")
  run = subprocess.Popen([sys.executable, "-c", code, "serve", folder, *how])
  give_up = time.monotonic() + 300
  while run.poll() is None and time.monotonic() < give_up:
    try:
      urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
      return run, f"http://127.0.0.1:{port}/v1"
    except OSError:
      time.sleep(1)
  run.kill()
  raise SystemExit("the server does not reply; does it have transformers[serving]?")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tasks", type=int, default=20)
  parser.add_argument("--url")
  parser.add_argument("--model")
  args = parser.parse_args()
  c = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]()
  c.engine.slots = 8
  setup.begin()
  p = setup.pieces(c)
  cfg = needle.Config(families=("pattern", "pair_pattern"))
  tasks = [needle.draw(0, "endpoint", i, cfg)[0] for i in range(args.tasks)]
  run, url = (None, args.url) if args.url else serve(p.hf_dir)
  try:
    server = remote.Endpoint(url, endpoint.Config(args.model or p.hf_dir, in_flight=2, patience_s=120.0), print)
    began = time.perf_counter()
    theirs = remote.rollout(p.policy, server, tasks, range(len(tasks)), 1, 0.0)
    seconds = time.perf_counter() - began
  finally:
    if run is not None:
      run.terminate()
      run.wait()
  loaded = load.base(p.hf_dir, c.model.dtype, p.mesh)
  params = sample.weights(loaded.params, p.policy.model, p.policy.mesh)
  ours = engine.rollout(p.policy, params, tasks, jax.random.key(0), 1, 0.0)
  answers.grade([*ours, *theirs])
  same, differ = 0, []
  for a, b in zip(ours, theirs):
    said = [[turn.text for turn in t.turns] for t in (a, b)]
    same += said[0] == said[1] and a.stop == b.stop
    if said[0] != said[1]:
      at = next((i for i, (x, y) in enumerate(zip(*said)) if x != y), min(map(len, said)))
      differ.append({"uid": a.task.uid, "turn": at, "ours": said[0][at:at + 1], "theirs": said[1][at:at + 1]})
  right = [sum(t.correct for t in found) for found in (ours, theirs)]
  zooms = [sum(len(t.regions) for t in found) for found in (ours, theirs)]
  print(f"\n{same} of {len(tasks)} trajectories are the same, turn by turn\n\n| | ours | theirs |\n|---|---|---|\n"
        f"| right | {right[0]} | {right[1]} |\n| zooms | {zooms[0]} | {zooms[1]} |\n")
  for it in differ:
    print(f"{it['uid']}, turn {it['turn']}:\n  ours   {it['ours']}\n  theirs {it['theirs']}")
  print(json.dumps({"command": " ".join(sys.argv), "tasks": len(tasks), "same": same, "right": right, "zooms": zooms,
                    "differ": differ, "seconds": round(seconds), "retries": server.retries, "jax": jax.__version__,
                    "transformers": transformers.__version__, "device": platform.processor() or platform.machine()}))


if __name__ == "__main__":
  main()
