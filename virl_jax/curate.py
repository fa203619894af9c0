"""Makes sets of tasks of raw downloads.

    python -m virl_jax.curate build --source=gqa --data=RAW --out=DIR
    python -m virl_jax.curate build --source=gqa,textvqa --data=RAW/gqa,RAW/textvqa --boxes_from=RAW/visual_cot \\
      --out=DIR

reads a source's own files, looks at each image, repairs boxes and writes a finished set for training
(config.data.source = "set"), with counts of all that was read, repaired and rejected.  docs/data.md has what each
source needs.  Interrupt it at any time and start it again: it goes on where it was.  A source that fails is named, and
the others go on.  With Apache Beam (extra "curate") and --runner, Beam does the work:

    python -m virl_jax.curate build --source=gqa --data=RAW --out=DIR --runner=FlinkRunner \\
      --beam=--flink_master=HOST:8081
"""

from __future__ import annotations

if __name__ == "__main__":
  from virl_jax.run import signals
  signals.install()

import os

from absl import app
from absl import flags

from virl_jax.data.curation import build as build_lib
from virl_jax.data.sources import table
from virl_jax.run import setup


def build(args: flags.FlagValues) -> None:
  """The sub-command `build`: each source after the other.

  Raises:
    ValueError: a flag is missing or wrong, or a source failed; names all that did, when the others are done.
  """
  for name in ("source", "data", "out"):
    if not getattr(args, name):
      raise ValueError(f"--{name} is missing: curate build --source=NAME --data=RAW --out=DIR")
  roots = args.data * len(args.source) if len(args.data) == 1 else args.data
  if len(roots) != len(args.source):
    raise ValueError(f"--data must be one folder, or one for each source. Received: {len(roots)} for "
                     f"{len(args.source)}")
  if args.beam and not args.runner:
    raise ValueError("--beam must be left out without --runner, which it is for")
  options = [f"--runner={args.runner}", *args.beam] if args.runner else None
  jobs = [build_lib.Job(source, root, args.split, args.out, args.boxes_from if source in table.JOINED else "",
                        args.images == "embed", args.check == "decode", args.max_rejects)
          for source, root in zip(args.source, roots)]
  failed = []
  for job in jobs:
    try:
      counts = build_lib.run(job, args.jobs or os.cpu_count() or 1, options, lambda line: print(line, flush=True))
      print(summary(job.folder.name, counts.to_dict()), flush=True)
    except ValueError as error:
      failed.append(job.source)
      print(f"error: {error}", flush=True)
  build_lib.gather(args.out)
  if failed:
    raise ValueError(f"{', '.join(failed)}: not built, for the reasons above; built: "
                     f"{', '.join(job.source for job in jobs if job.source not in failed) or 'none'}")


def summary(name: str, counts: dict) -> str:
  """A set's counts in a few lines."""
  listed = lambda some: ", ".join(f"{count} {what}" for what, count in some.items() if count) or "none"
  return (f"{name}: {counts['records']} records, {counts['tasks']} tasks\n  boxes: {listed(counts['boxes'])}\n"
          f"  rejects: {listed(counts['rejects'])}\n  notes: {listed(counts['notes'])}")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines what the command line takes; not on import, for other commands have flags of the same names."""
  flags.DEFINE_list("source", [], f"Of build: one or more of {', '.join(table.SOURCES)}.", flag_values=values)
  flags.DEFINE_list("data", [], "Raw folder; one, or one for each source.", flag_values=values)
  flags.DEFINE_string("out", None, "Folder to write to.", flag_values=values)
  flags.DEFINE_string("split", "train", "Which of the source's splits.", flag_values=values)
  flags.DEFINE_string("boxes_from", "", "Visual-CoT's raw folder, whose boxes are given to "
                      f"{', '.join(table.JOINED)}.", flag_values=values)
  flags.DEFINE_enum("images", "keep", ["keep", "embed"], "Whether image files stay where they are, or are copied into "
                    "the set.", flag_values=values)
  flags.DEFINE_enum("check", "header", ["header", "decode"], "What is read of each image: decode finds those that are "
                    "cut off, and takes longer.", flag_values=values)
  flags.DEFINE_integer("jobs", 0, "Processes; 0 for one a core.", lower_bound=0, flag_values=values)
  flags.DEFINE_float("max_rejects", 0.1, "Largest share of a source's records that may be rejected.", 0, 1,
                     flag_values=values)
  flags.DEFINE_string("runner", "", "Beam's runner, such as DirectRunner, FlinkRunner, SparkRunner, DataflowRunner; "
                      "without one, processes do the work.", flag_values=values)
  flags.DEFINE_multi_string("beam", [], "An option for Beam; can be given several times.", flag_values=values)


def main(argv):
  args = flags.FLAGS
  if argv[1:] != ["build"]:
    raise app.UsageError(f"the first argument must be build. Received: {argv[1:]}")
  with setup.told():
    build(args)


if __name__ == "__main__":
  define_flags()
  app.run(main)
