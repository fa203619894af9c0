"""The tiny protocol by supervised fine-tuning alone, beside the tiny base.

    python benchmarks/sft.py --out=runs/mute                 # from a base without words; resumable
    python benchmarks/sft.py --out=runs/nothing --of=nothing # from nothing, in three stages: as long as a warm start
    python benchmarks/sft.py --out=runs/base --of=base       # from the tiny base as it is, fifty updates
    python benchmarks/sft.py --out=runs/sft --only=data      # only the demonstrations
    python benchmarks/sft.py --out=runs/base --of=base --rl  # and then RL, 3 seeds from what came out and from the base

docs/sft.md says which of these were run.

Draws pictures, writes demonstrations as files of trajectories, and trains on them by `python -m virl_jax.sft`.

"mute" is the tiny base with new random word embeddings, which are also its output layer: it sees, but neither
understands a question nor says anything; one stage teaches it the protocol.  "nothing" is the tiny model with random
weights; it learns in the warm start's order, for the same reasons (`curriculum.STAGES`): reading (what a good crop
shows; zooms are only context), finding one (the only object's box), finding (which of several is asked for).  The
result of a stage is exported, and the next goes on from there.

Prints a table (of RL, means over seeds, with intervals over seeds and tasks), and as its last line one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import runpy
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import results  # of this folder

from virl_jax import export
from virl_jax import warmstart
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.model import params as params_lib
from virl_jax.model import weights
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.run import load
from virl_jax.run import serving
from virl_jax.tiny import curriculum
from virl_jax.tiny import demos
from virl_jax.tiny import needle

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = "configs/tiny_sft.py"
# By what it begins with, each stage: its demonstrations, how many updates, of how many demonstrations, learning rate.
STAGES = {"base": {"careful": ("finding", 50, 32, 1e-3)},
          "mute": {"protocol": ("finding", 1000, 32, 1e-3)},
          "nothing": {"reading": ("reading", 350, 96, 1.2e-3), "finding_one": ("finding_one", 550, 96, 1.2e-3),
                      "finding": ("finding", 1350, 96, 1.2e-3)}}
SHOWN = ("acc_ans", "acc_rat", "hit_rate", "rationale_count", "mean_iou")
SEEDS = (0, 1, 2)


def main(argv=None):
  args = _arguments().parse_args(argv)
  out = pathlib.Path(args.out).absolute()
  c = runpy.run_path(str(ROOT / CONFIG))["get_config"]()
  began = time.time()
  base = {"base": shipped, "mute": mute, "nothing": untrained}[args.of](c, out)
  demonstrations(c, base, out, args.pictures)
  if args.only == "data":
    return
  stages = STAGES[args.of]
  steps = dict(zip(stages, args.steps, strict=True)) if args.steps else {name: of[1] for name, of in stages.items()}
  for name, (data, _, batch, rate) in stages.items():
    base = stage(name, out, base, out / f"{data}.jsonl", steps[name], batch, rate, last=name == list(stages)[-1])
  found = {"ships": ships(out), "sft": evaluation(out / name, "after")}
  if args.rl:
    for seed in SEEDS:
      for arm, model in (("from_base", "@tiny"), ("from_sft", str(base))):
        command("train", "configs/tiny.py", out / arm / f"seed_{seed}", f"--config.model.path={model}",
                f"--config.seed={seed}")
    arms = results.read(out, ("from_base", "from_sft"), len(SEEDS))
    summaries = results.figures(arms)
    found |= {name: summaries[name] for name in arms} | {"difference": results.apart(arms, "from_sft", "from_base")}
  print(f"\n{'':16}" + "".join(f"{key:>26}" for key in SHOWN))
  for name, result in found.items():
    cells = (f"{v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for v in (result[key] for key in SHOWN))
    print(f"{name:16}" + "".join(f"{cell:>26}" for cell in cells))
  told = {name: {key: result[key] for key in SHOWN} for name, result in found.items()}
  print(json.dumps({"figures": told, "steps": steps, "pictures": args.pictures,
                    "command": " ".join(["python", "benchmarks/sft.py", *sys.argv[1:]]), "seconds": time.time() - began,
                    "versions": {"python": platform.python_version(), "jax": jax.__version__},
                    "device": jax.devices()[0].device_kind}))


def _arguments():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--out", required=True, help="folder for all of it")
  parser.add_argument("--only", choices=["data"], help="write the demonstrations and the untrained base, no more")
  parser.add_argument("--of", choices=STAGES, default="mute", help="what it begins with")
  parser.add_argument("--pictures", type=int, default=2000, help="pictures of a stage")
  parser.add_argument("--steps", type=int, nargs="+", help="updates of each stage")
  parser.add_argument("--rl", action="store_true", help="go on with RL, from what was learned and from the base")
  return parser


def untrained(c, out: pathlib.Path) -> pathlib.Path:
  """An HF folder with the tiny model, its weights random, and a tokenizer made for it."""
  folder = out / "untrained"
  if not (folder / "config.json").exists():
    out.mkdir(parents=True, exist_ok=True)
    files, cfg, params = warmstart.begin(c, None, out)
    weights.save_hf(str(folder), cfg, params, "float32", like=files, beside=serving.files(files, cfg, c))
  return folder


def shipped(c, out: pathlib.Path) -> pathlib.Path:
  """The HF folder of the tiny base."""
  del c, out
  return pathlib.Path(load.model_dir("@tiny"))


def mute(c, out: pathlib.Path) -> pathlib.Path:
  """An HF folder with the tiny base, its word embeddings random again."""
  folder, ships = out / "mute", load.model_dir("@tiny")
  if not (folder / "config.json").exists():
    cfg, params = weights.load_hf(ships)
    # Another seed than the base's: what that has learned is near what it began with.
    params["text"]["embed"] = params_lib.init(qwen.specs(cfg), jax.random.key(c.seed + 1), jnp.float32)["text"]["embed"]
    weights.save_hf(str(folder), cfg, params, "float32", like=ships, beside=serving.files(ships, cfg, c))
  return folder


def demonstrations(c, base: pathlib.Path, out: pathlib.Path, pictures: int) -> None:
  """Writes files of trajectories, and their pictures beside them."""
  cfg = weights.read_config(str(base))
  voice = demos.Voice(load.codec(str(base), cfg), prompt.Config(**c.prompt), images.Config(**c.image), cfg.vision.grid)
  for name, objects in (("finding", tuple(c.data.needle.objects)), ("finding_one", (1, 1))):
    if (out / f"{name}.jsonl").exists():
      continue
    (out / name).mkdir(exist_ok=True)
    lines = []
    for i in range(pictures):
      rng = np.random.default_rng([c.seed, *objects, i])
      # From the scene's pixels, so that the file is the picture of the demonstration.
      scene = needle.draw_scene(rng, "pattern", int(rng.integers(objects[0], objects[1] + 1)), c.data.needle.side_px)
      path = out / name / f"{i:05d}.jpg"
      path.write_bytes(needle.encode(scene.pixels))
      image = images.decode(str(path))
      shown = images.prepare(image, None, voice.image.min_pixels, voice.image.max_pixels, voice.grid)
      questions = min(curriculum.QUESTIONS, objects[1])
      for q, traj in enumerate(demos.lesson(demos.Picture(scene, image, shown), rng, questions, 0.0, "careful", voice,
                                            demos.Config())):
        lines.append(_line(traj, f"{name}_{i:05d}_{q}", f"{name}/{path.name}"))
    _write(out / f"{name}.jsonl", lines)
    if name == "finding":  # the same demonstrations, whose zooms are not learned
      for line in lines:
        for turn in line["turns"][:-1]:
          turn["learned"] = False
      _write(out / "reading.jsonl", lines)


def _line(traj, uid: str, image: str) -> dict:
  """A trajectory as a line of a file of rollouts, with a path for the picture."""
  task = traj.task
  said = [{"role": "assistant", "text": turn.text, "learned": True} for turn in traj.turns if turn.role == "assistant"]
  return {"uid": uid, "kind": task.kind, "question": task.question, "options": None, "answers": list(task.answers),
          "answer": traj.answer, "correct": traj.correct, "reward": None, "boxes_gt": [list(box) for box in task.boxes],
          "image": image, "turns": said}


def _write(file: pathlib.Path, lines: list[dict]) -> None:
  """Writes a file whole or not at all."""
  file.with_suffix(".tmp").write_text("".join(json.dumps(line) + "\n" for line in lines))
  os.replace(file.with_suffix(".tmp"), file)
  print(f"{len(lines)} demonstrations in {file}", flush=True)


def stage(name: str, out: pathlib.Path, base: pathlib.Path, data: pathlib.Path, steps: int, batch: int, rate: float,
          last: bool) -> pathlib.Path:
  """Trains a stage, or goes on with it; returns the resulting HF folder."""
  folder = out / f"{name}_hf"
  if (folder / "config.json").exists():
    return folder
  # The learning rate of the last stage falls to about half.
  more = [f"--config.optim.decay_steps={2 * steps - 20}"] if last else ["--config.eval.tasks=0"]
  command("sft", CONFIG, out / name, f"--data={data}", f"--config.model.path={base}", f"--config.steps={steps}",
          f"--config.sft.batch={batch}", f"--config.optim.learning_rate={rate}", *more)
  export.export(str(out / name), str(folder), None, "float32")
  return folder


def ships(out: pathlib.Path) -> dict:
  """The tiny base's evaluation by the same harness: that of `train` before its first step."""
  command("train", "configs/tiny.py", out / "ships", "--config.steps=0")
  return evaluation(out / "ships", "before")


def command(module: str, config: str, workdir: pathlib.Path, *options: str) -> None:
  """Runs one of the package's commands, which goes on where it stopped."""
  subprocess.run([sys.executable, "-m", f"virl_jax.{module}", f"--config={config}", f"--workdir={workdir}",
                  *options], cwd=ROOT, check=True)


def evaluation(workdir: pathlib.Path, when: str) -> dict:
  """A run's evaluation, "before" or "after" training."""
  return json.loads((workdir / f"eval_{when}.json").read_text())


if __name__ == "__main__":
  main()
