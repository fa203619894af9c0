"""The memory of a run with 7B's widths and two layers, on a CPU that pretends to be eight devices.

    python benchmarks/wide.py                  # adapters beside frozen bfloat16 weights
    python benchmarks/wide.py --recipe=full    # all weights in bfloat16, with Adafactor

Everything that a run does is done, by the commands that users have, each in its own process: a folder is made with
random weights and the whole vocabulary; `train` loads it, rolls out, makes two updates and saves; `train` goes on from
there; `export` writes the result.  What is printed is the most host memory that each process held.

All eight devices are in this memory, and what each of them holds for itself counts eight times.  The copy of the
weights for rollouts takes as many whole models as there are replicas: `rollout.tensor=4` makes two of eight devices.
The head, gathered for an update, is on each device, and so is its gradient in float32, unless the vocabulary is split:
`mesh.tensor=4` leaves a quarter.  In float32 with AdamW, the state alone would take 12 bytes a parameter, 20 GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).parents[1]
BASE = ("--config=configs/tiny.py", "--config.rollout.prompts=4",
        "--config.rollout.group_size=4", "--config.rollout.max_turn_tokens=8", "--config.ppo.minibatches=2",
        "--config.eval.tasks=0", "--config.checkpoint.every=1", "--config.checkpoint.keep=1",
        "--config.log.tensorboard=False", "--config.log.gallery_every=0", "--config.data.needle.train_size=32",
        "--config.data.needle.test_size=8", "--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=4",
        "--config.rollout.tensor=4", "--config.model.remat=True")
RECIPES = {"lora": ("--config.lora.rank=16",),
           "full": ("--config.model.dtype=bfloat16", "--config.optim.kind=adafactor")}


def make(folder: pathlib.Path, layers: int, divide: int) -> int:
  """Writes an HF folder of random weights with the tiny base's tokenizer; returns how many parameters it has."""
  import ml_dtypes
  import numpy as np

  from virl_jax.model import params as params_lib
  from virl_jax.model import weights
  from virl_jax.model.qwen2_5 import model as qwen
  from virl_jax.run import load
  tiny = load.model_dir("@tiny")
  told, size = weights.read_config(tiny), qwen.SIZES["7b"]
  text, vision = size.text, size.vision
  cfg = dataclasses.replace(
      told, text=dataclasses.replace(text, layers=layers, hidden=text.hidden // divide, vocab=text.vocab // divide,
                                     intermediate=text.intermediate // divide),
      vision=dataclasses.replace(vision, depth=layers, out=text.hidden // divide, full_blocks=(layers - 1,)))
  specs, rng = qwen.specs(cfg), np.random.default_rng(0)

  def draw(spec):  # one at a time, to save memory
    if spec.init == "normal":
      fan_in = np.prod(spec.hf_shape[1:])
      return (rng.standard_normal(spec.shape, np.float32) * np.float32(fan_in ** -0.5)).astype(ml_dtypes.bfloat16)
    return np.full(spec.shape, float(spec.init == "ones"), ml_dtypes.bfloat16)

  weights.save_hf(str(folder), cfg, params_lib.map_specs(draw, specs), "bfloat16", like=tiny)
  return params_lib.count(specs)


def watched(name: str, command: list[str]) -> dict:
  """Runs a command to its end; returns its seconds, and the most memory that it held, in GiB.

  Raises:
    SystemExit: it failed.
  """
  env = dict(os.environ, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="8", PYTHONPATH=str(ROOT))
  began, said = time.perf_counter(), []
  process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  reader = threading.Thread(target=lambda: said.extend(process.stdout))
  reader.start()
  peak = 0
  while process.poll() is None:
    try:
      status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
      peak = max(peak, int(status.split("VmHWM:")[1].split()[0]))
    except (OSError, IndexError):  # it has just ended
      pass
    time.sleep(0.2)
  reader.join()
  if process.returncode:
    raise SystemExit(f"{name} ended with {process.returncode}:\n" + "".join(said[-20:]))
  found = {"s": round(time.perf_counter() - began, 1), "peak_gib": round(peak / 2 ** 20, 2)}
  print(f"{name}: {found['s']:.0f} s, at most {found['peak_gib']:.2f} GiB", flush=True)
  return found


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--recipe", choices=tuple(RECIPES), default="lora")
  p.add_argument("--layers", type=int, default=2)
  p.add_argument("--divide", type=int, default=1, help="the decoder's widths and the vocabulary by this, to try it out")
  p.add_argument("--make", type=pathlib.Path, help=argparse.SUPPRESS)  # for the process that makes the folder
  args = p.parse_args()
  if args.make:
    print(make(args.make, args.layers, args.divide))
    return
  python, figures = [sys.executable], {}
  with tempfile.TemporaryDirectory() as folder:
    hf, run, out = (os.path.join(folder, name) for name in ("hf", "run", "out"))
    sizes = [f"--layers={args.layers}", f"--divide={args.divide}"]
    figures["make"] = watched("making the folder", [*python, __file__, f"--make={hf}", *sizes])
    train = [*python, "-m", "virl_jax.train", *BASE, *RECIPES[args.recipe], f"--config.model.path={hf}",
             f"--workdir={run}"]
    figures["train"] = watched("training, two updates", [*train, "--config.steps=1"])
    figures["resume"] = watched("going on, two more", [*train, "--config.steps=2"])
    figures["export"] = watched("exporting", [*python, "-m", "virl_jax.export", f"--workdir={run}", f"--out={out}"])
    lines = [json.loads(line) for line in pathlib.Path(run, "metrics.jsonl").read_text().splitlines()[1:]]
    steps = [line["step"] for line in lines if "step" in line]
    if steps != [0, 1] or not pathlib.Path(out, "config.json").is_file():
      raise SystemExit(f"steps 0 and 1 must be in the log, and a folder exported. Received: {steps}")
    figures["logp_gap_max"] = max(line["rollout/logp_gap_max"] for line in lines if "step" in line)
    figures["bytes"] = sum(f.stat().st_size for f in pathlib.Path(out).iterdir())
  print(json.dumps({"command": " ".join(["python", *sys.argv]), "recipe": args.recipe, "layers": args.layers,
                    "divide": args.divide, "cores": os.cpu_count(), **figures}))


if __name__ == "__main__":
  main()
