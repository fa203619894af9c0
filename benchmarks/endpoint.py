"""Whether a real server gives the trajectories of our engine: greedy, the tiny base behind `transformers serve`.

    pip install 'transformers[serving]' torch torchvision
    python benchmarks/endpoint.py [--tasks=20] [--url=http://HOST:PORT/v1 --model=NAME] [--parts=rollouts,evaluate]

`rollouts` rolls out needle tasks by `rollout.remote` and by the engine, and compares turn by turn.  `evaluate` runs
the command of that name on held-out needle tasks, with zooms and without, with `--endpoint` and without, and compares
the predictions task by task; tasks that get no reply from the server are named, with the engine's answer.  Without
--url it starts the server, on this machine's CPU, with the base's folder.
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
import tempfile
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


def rollouts(url: str, model: str, n: int) -> dict:
  """Rolls out both ways, prints what differs, and returns the figures."""
  c = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]()
  c.engine.slots = 8
  p = setup.pieces(c)
  cfg = needle.Config(families=("pattern", "pair_pattern"))
  tasks = [needle.draw(0, "endpoint", i, cfg)[0] for i in range(n)]
  server = remote.Endpoint(url, endpoint.Config(model or p.hf_dir, in_flight=2, patience_s=120.0), print)
  began = time.perf_counter()
  theirs = remote.rollout(p.policy, server, tasks, range(len(tasks)), 1, 0.0)
  seconds = time.perf_counter() - began
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
  return {"tasks": len(tasks), "same": same, "right": right, "zooms": zooms, "differ": differ,
          "seconds": round(seconds), "retries": server.retries}


def evaluations(url: str, model: str, n: int) -> dict:
  """Evaluates both ways, prints what differs, and returns the figures, by folder."""
  with tempfile.TemporaryDirectory() as out:
    how = ["--model=@tiny", "--config=configs/tiny.py", "--benchmark=needle", "--data=-", f"--limit={n}", "--zoom=both"]
    ways = {"ours": [], "theirs": [f"--endpoint={url}", f"--served_model={model or load.model_dir('@tiny')}",
                                   "--config.endpoint.in_flight=2", "--config.endpoint.patience_s=120",
                                   "--config.endpoint.tries=3"]}
    seconds = {}
    for way, more in ways.items():
      began = time.perf_counter()
      ended = subprocess.run([sys.executable, "-m", "virl_jax.evaluate", *how, *more, f"--out={out}/{way}"], cwd=ROOT)
      if ended.returncode and way == "ours":  # theirs also ends so if something had no reply
        raise SystemExit("error: the engine's evaluation failed")
      seconds[way] = round(time.perf_counter() - began)
    found = {}
    for name in ("needle", "needle_without_zoom"):
      folders = [pathlib.Path(out, way, name) for way in ways]
      said = [[json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
              for folder in folders]
      results = [json.loads((folder / "results.json").read_text()) for folder in folders]
      pairs = list(zip(*said, strict=True))
      both = [(a, b) for a, b in pairs if "text" in a and "text" in b]
      differ = [{"uid": a["uid"], **{key: [a.get(key), b.get(key)] for key in sorted(a.keys() | b.keys())
                                     if a.get(key) != b.get(key)}} for a, b in both if a != b]
      lost = [{"uid": b["uid"], "lost": b["lost"], "ours": a["text"]} for a, b in pairs if "lost" in b]
      found[name] = {"tasks": len(pairs), "both": len(both), "same": len(both) - len(differ),
                     "right": [sum(e["correct"] for e in side) for side in zip(*both)],
                     "zooms": [sum(len(e["boxes"]) for e in side) for side in zip(*both)],
                     "same_results": None if lost else all(
                         results[0][key] == results[1][key]
                         for key in ("score", "figures", "intervals", "by_kind", "summary")),
                     "differ": differ, "lost": lost}
      print(f"\n{name}: of {len(pairs)} tasks {len(lost)} had no reply; {found[name]['same']} of the {len(both)} "
            "others are the same in every field")
      for it in (*differ, *lost):
        print(f"  {json.dumps(it)}")
    return found | {"seconds": seconds}


PARTS = {"rollouts": rollouts, "evaluate": evaluations}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tasks", type=int, default=20)
  parser.add_argument("--url")
  parser.add_argument("--model", default="")
  parser.add_argument("--parts", default=",".join(PARTS))
  args = parser.parse_args()
  parts = args.parts.split(",")
  if strange := set(parts) - set(PARTS):
    parser.error(f"--parts must be some of {', '.join(PARTS)}. Received: {', '.join(sorted(strange))}")
  setup.begin()
  run, url = (None, args.url) if args.url else serve(load.model_dir("@tiny"))
  try:
    found = {part: PARTS[part](url, args.model, args.tasks) for part in parts}
  finally:
    if run is not None:
      run.terminate()
      run.wait()
  print(json.dumps({"command": " ".join(sys.argv), **found, "jax": jax.__version__,
                    "transformers": transformers.__version__, "device": platform.processor() or platform.machine()}))


if __name__ == "__main__":
  main()
