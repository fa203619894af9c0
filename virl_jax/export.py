"""Writes a run's policy as an HF folder, which transformers and vLLM load as it is.

    python -m virl_jax.export --workdir=runs/tiny --out=HF_DIR
    python -m virl_jax.export --workdir=runs/tiny --out=HF_DIR --step=40 --dtype=float32
    python -m virl_jax.export --workdir=runs/lora --adapters=DIR

Only the parameters are read.  Of a run that trained adapters, --out has them merged into the weights and rounded with
them, and --adapters has them alone, as they are, in PEFT's format.  The tokenizer and chat template come from the base.
preprocessor_config.json has the run's pixel limits, and generation_config.json what ends a turn and how the run's
evaluation samples, so that a server shows the policy pictures as in training and samples as the evaluation did.
"""

from __future__ import annotations

if __name__ == "__main__":
  from virl_jax.run import signals
  signals.install()

import json
import pathlib

from absl import app
from absl import flags

from virl_jax.model import family
from virl_jax.model import outdir
from virl_jax.model import params as params_lib
from virl_jax.model import weights
from virl_jax.run import load
from virl_jax.run import progress
from virl_jax.run import serving
from virl_jax.run import setup


def export(workdir: str, out: str | None, step: int | str | None = None, dtype: str = "bfloat16",
           adapters: str | None = None) -> int:
  """Exports a checkpoint.

  Args:
    workdir: of a run.
    out: the HF folder to write, all of it or nothing; see `outdir.check`.  None for none.
    step: which checkpoint; None for the newest, "best" for the one with the best score.
    dtype: of the stored tensors in `out`.
    adapters: the folder to write adapters to, in the same way; None for none.

  Returns:
    The step that was exported.

  Raises:
    ValueError: if the workdir holds no run or no such checkpoint, its base is gone, a folder is not to be replaced, or
      it has no adapters.
  """
  folders = [folder for folder in (out, adapters) if folder]
  for folder in folders:
    outdir.check(folder, (workdir,))
  policy = load.trained(workdir, step)
  for folder in folders:
    outdir.check(folder, (policy.hf_dir,))
  if adapters:
    weights.save_adapters(adapters, policy.model, policy.trained, policy.config.model.path)
  if out:
    beside = serving.files(policy.hf_dir, policy.model, policy.config)
    with progress.bar(params_lib.count(family.of(policy.model).specs(policy.model)), f"writing {out}",
                      "parameter") as bar:
      weights.save_hf(out, policy.model, policy.params, dtype, policy.hf_dir, beside, bar.update)
  return policy.step


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the command's flags; not on import, because other commands have flags of the same names."""
  flags.DEFINE_string("workdir", None, "The run.", required=True, flag_values=values)
  flags.DEFINE_string("out", None, "HF folder to write: absent, empty, or an earlier export, which is replaced.",
                      flag_values=values)
  flags.DEFINE_string("adapters", None, "Folder for adapters, as PEFT has them; absent, empty, or an earlier export.",
                      flag_values=values)
  flags.DEFINE_string("step", None, "Which checkpoint: a number, or best, by config.checkpoint.best; default: newest.",
                      flag_values=values)
  flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Dtype of the stored tensors.", flag_values=values)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  args = flags.FLAGS
  if not args.out and not args.adapters:
    raise app.UsageError("--out=HF_DIR or --adapters=DIR is missing")
  if args.step and args.step != "best" and not args.step.isdigit():
    raise app.UsageError(f"--step must be a number, or best. Received: {args.step}")
  setup.quiet()
  with setup.told():
    step = int(args.step) if args.step and args.step.isdigit() else args.step
    step = export(args.workdir, args.out, step, args.dtype, args.adapters)
  for folder in filter(None, (args.adapters, args.out)):
    files = list(pathlib.Path(folder).iterdir())
    print(json.dumps({"out": folder, "step": step, **({"dtype": args.dtype} if folder == args.out else {}),
                      "files": len(files), "bytes": sum(f.stat().st_size for f in files)}))


if __name__ == "__main__":
  define_flags()
  app.run(main)
