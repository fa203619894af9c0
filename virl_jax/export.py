"""Writes a run's policy as an HF folder, which transformers and vLLM load as it is.

    python -m virl_jax.export --workdir=runs/tiny --out=HF_DIR
    python -m virl_jax.export --workdir=runs/tiny --out=HF_DIR --step=40 --dtype=float32

Only the parameters are read.  The tokenizer, chat template and processor files come from the base.
"""

from __future__ import annotations

import json
import logging
import pathlib

from absl import app
from absl import flags
import jax

from virl_jax import config as config_lib
from virl_jax.learner import checkpoint
from virl_jax.model import sharding
from virl_jax.model import weights
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.run import setup


def export(workdir: str, out: str, step: int | None = None, dtype: str = "bfloat16") -> int:
  """Exports a checkpoint.

  Args:
    workdir: of a run.
    out: the HF folder to write, all of it or nothing.
    step: which checkpoint; None for the newest.
    dtype: of the stored tensors.

  Returns:
    The step that was exported.

  Raises:
    ValueError: if the workdir holds no run or no such checkpoint, or its base is gone.
  """
  file = pathlib.Path(workdir) / "config.json"
  if not file.is_file():
    raise ValueError(f"--workdir must be a run's folder, with a config.json. Received: {workdir}")
  c = config_lib.from_json(file.read_text(), str(file))
  hf_dir = setup.model_dir(c.model.path)
  cfg = weights.read_config(hf_dir)
  folder = pathlib.Path(workdir) / "checkpoints"
  saves = checkpoint.Checkpoints(folder, c.checkpoint.every, c.checkpoint.keep) if folder.is_dir() else None
  steps = saves.steps() if saves else []
  step = steps[-1] if step is None and steps else step
  if step not in steps:
    raise ValueError(f"{folder} must hold {'a checkpoint' if step is None else f'step {step}'}. Received: "
                     f"{f'steps {steps}' if steps else 'none'}")
  shardings = sharding.param_shardings(qwen.specs(cfg), sharding.make(fsdp=-1, data=1))
  wanted = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
                        qwen.abstract_params(cfg, c.model.dtype), shardings)
  weights.save_hf(out, cfg, saves.restore_params(step, wanted), dtype, like=hf_dir)
  saves.close()
  return step


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  args = flags.FLAGS
  logging.getLogger("absl").setLevel(logging.WARNING)
  with setup.told():
    step = export(args.workdir, args.out, args.step, args.dtype)
  files = list(pathlib.Path(args.out).iterdir())
  print(json.dumps({"out": args.out, "step": step, "dtype": args.dtype, "files": len(files),
                    "bytes": sum(f.stat().st_size for f in files)}))


if __name__ == "__main__":
  # Here and not above: another entry point's flags have the same names, and both can be imported.
  flags.DEFINE_string("workdir", None, "The run.", required=True)
  flags.DEFINE_string("out", None, "HF folder to write; replaced whole if it exists.", required=True)
  flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.")
  flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the stored tensors.")
  app.run(main)
