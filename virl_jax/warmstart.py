"""Makes the tiny base model: a Qwen2.5-VL of about two million parameters that speaks the zoom protocol.

    python -m virl_jax.warmstart --config=configs/tiny.py --out=HF_DIR

Supervised learning on demonstrations, from easy to hard (`curriculum.STAGES`): finding the only object, finding the one
that is asked for, reading its mark, and at the end zooming clumsily, so that the base reads marks well and zooms
badly.  Worker processes draw the pictures.  Interrupt it at any time and start it again: it goes on where it was.

    python -m virl_jax.warmstart --config=configs/tiny.py --config.warmstart.base=@tiny --config.warmstart.steps=200 \\
      --config.warmstart.p_direct=0.3 --out=HF_DIR

goes on from a base, in the clumsy stage alone: here, until it answers three questions in ten without looking.
"""

from __future__ import annotations

if __name__ == "__main__":
  from virl_jax.run import signals
  signals.install()

import dataclasses
import json
import os
import pathlib
import shlex
import sys
import tempfile
import time

from absl import app
from absl import flags
from etils import epath
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np

from virl_jax import config as config_lib
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.learner import checkpoint
from virl_jax.learner import optim
from virl_jax.learner import state as state_lib
from virl_jax.learner import step as step_lib
from virl_jax.model import outdir
from virl_jax.model import params as params_lib
from virl_jax.model import sharding
from virl_jax.model import weights
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.run import ending
from virl_jax.run import files
from virl_jax.run import load
from virl_jax.run import log as log_lib
from virl_jax.run import serving
from virl_jax.run import setup
from virl_jax.run import workdir as workdir_lib
from virl_jax.tiny import curriculum
from virl_jax.tiny import tokenizer as tiny_tokenizer

# Which knobs may change between starts of a warm start: those that it does not read, and these two.
_READS = ("warmstart.", "prompt.", "image.", "data.needle.objects", "data.needle.side_px", "seed")
_FREE = frozenset(k for k in config_lib.flat(config_lib.default().to_dict()) if not k.startswith(_READS)) | {
    "warmstart.workers", "warmstart.save_every"}


def optim_config(c, turn: int, clumsy: bool) -> optim.OptimConfig:
  """AdamW for the steps before `turn` or from there on."""
  return optim.OptimConfig(
      learning_rate=c.warmstart.clumsy_learning_rate if clumsy else c.warmstart.learning_rate,
      warmup_steps=20 if clumsy else 50, decay_steps=c.warmstart.steps - turn if clumsy else turn, b2=0.98)


def begin(c, folder: str | None, workdir: epath.Path):
  """What training starts from, a base's folder or nothing: (folder with the tokenizer, model, parameters)."""
  if folder:
    return folder, *weights.load_hf(folder)
  # Other libraries read the tokenizer from a folder on disk, which a bucket is not; its files are the same each time.
  kept = pathlib.Path(workdir if files.is_local(workdir) else tempfile.mkdtemp()) / "tokenizer"
  tokenizer = tiny_tokenizer.build(kept, c.prompt.system)
  cfg = qwen.tiny(-(-len(tokenizer) // 64) * 64, tiny_tokenizer.token_ids(tokenizer))
  return str(kept), cfg, params_lib.init(qwen.specs(cfg), jax.random.key(c.seed), jnp.float32)


def warm_start(c, out: str, workdir: str, command: str) -> None:
  """Trains and writes a base, from the start or from the last checkpoint.

  Args:
    c: the configuration.
    out: HF folder to write; see `outdir.check`.
    workdir: where checkpoints and the log go.
    command: the command line, for RECIPE.json.

  Raises:
    ValueError: if the configuration, the base, the workdir or `out` cannot be used.
  """
  setup.sections(c)
  base = load.model_dir(c.warmstart.base, "warmstart.base") if c.warmstart.base else None  # before anything is written
  outdir.check(out, (workdir, base) if base else (workdir,))
  with workdir_lib.claim(workdir, c, free=_FREE) as claimed:
    _warm_start(c, base, out, claimed.folder, command)


def _warm_start(c, base: str | None, out: str, workdir: epath.Path, command: str) -> None:
  u = c.warmstart
  platforms = os.environ.get("JAX_PLATFORMS")
  jax.devices()  # settle on a platform before the environment is changed for the workers
  folder, cfg, params = begin(c, base, workdir)
  cfg = dataclasses.replace(cfg, platform=sharding.platform(jax.devices()[0]))
  course = curriculum.Course(
      tokenizer_dir=folder, image_token=cfg.image_token, eos=cfg.eos, vocab=cfg.text.vocab,
      prompt=prompt.Config(**c.prompt), image=images.Config(**c.image), grid=cfg.vision.grid, seed=c.seed,
      steps=u.steps, pictures=u.pictures,
      marks=tuple(u.marks), most_objects=c.data.needle.objects[1], side_px=c.data.needle.side_px,
      stages=curriculum.last(tuple(c.data.needle.objects)) if base else curriculum.STAGES, p_direct=u.p_direct,
      p_clumsy=u.p_clumsy, p_count=u.p_count)
  turn = curriculum.turning(course)
  careful, clumsy = (state_lib.Config(cfg, 1, optim=optim_config(c, turn, k)) for k in (False, True))
  state = state_lib.init(params, careful.optim)
  print(f"{params_lib.count(qwen.specs(cfg)):,} parameters, {jax.devices()[0]}", flush=True)

  saves = checkpoint.Checkpoints(workdir / "checkpoints", u.save_every, 2)
  start, state = saves.resume(state)
  if start:
    print(f"going on from step {start}", flush=True)
  began, log, nll = time.time(), log_lib.MetricsLog(str(workdir / "metrics.jsonl"), start), None
  skips = []  # of each update since the last line, whether it was skipped
  with ending.Kept(saves, start, state) as kept:
    for step, batch in enumerate(curriculum.batches(course, start, u.workers), start):
      with kept.changing():
        if step == turn:  # a new optimizer: the careful stage's schedule has run out
          state = state_lib.init(state.params, clumsy.optim)
        state, metrics = step_lib.imitate_step(state, batch, careful if step < turn else clumsy)
        skips.append(metrics["optim/skipped"].value)
        last = step + 1 == u.steps
        if step % 25 == 0 or last or saves.due(step + 1):
          nll = float(metrics["loss/total"].value)
          said, skips = jax.device_get(skips), []
          if np.all(said) and (last or len(said) > 1):  # one alone may be an accident
            raise SystemExit(f"error: step {step}: the loss is {nll}, and no update since the last line was finite. "
                             "Begin again with a lower config.warmstart.learning_rate or clumsy_learning_rate, and "
                             "another --workdir")
          skipped = f"  {np.sum(said):.0f} updates skipped: not finite" if np.any(said) else ""
          left = (time.time() - began) / (step - start + 1) * (u.steps - step - 1)
          print(f"step {step:5d}/{u.steps}  nll {nll:.4f} nats a token  left {left / 60:.1f} min{skipped}", flush=True)
          log.write(step, {"loss/total": nll, "optim/skipped": np.sum(said)})
        kept.finished(step + 1, state, last)
  if platforms is None:
    os.environ.pop("JAX_PLATFORMS", None)
  weights.save_hf(out, cfg, state.params, "bfloat16", like=folder, beside=serving.files(folder, cfg, c))
  (pathlib.Path(out) / "RECIPE.json").write_text(json.dumps({
      "command": command, "seed": c.seed, "device": str(jax.devices()[0].device_kind), "jax": jax.__version__,
      "warmstart": json.loads(u.to_json()), "final_nll_nats": nll}, indent=1) + "\n")
  print(f"wrote {out}", flush=True)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the command's flags; not on import, because other commands have flags of the same names."""
  config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
  flags.DEFINE_string("out", None, "HF folder to write.", flag_values=values)
  flags.DEFINE_string("workdir", None, "Checkpoints and log; OUT.work by default.", flag_values=values)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  args = flags.FLAGS
  out = args.out
  if not out:
    raise app.UsageError("--out=HF_DIR is missing")
  setup.begin()
  given = {out: "HF_DIR", f"--out={out}": "--out=HF_DIR"}  # the folder is not part of the recipe
  command = shlex.join(["python", "-m", "virl_jax.warmstart", *(given.get(arg, arg) for arg in sys.argv[1:])])
  with setup.told():
    setup.config_file(args)
    warm_start(args.config, out, args.workdir or out.rstrip("/") + ".work", command)


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=setup.parse)
