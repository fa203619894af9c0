"""Makes sets of tasks from raw downloads, and from those smaller sets of the tasks that need a zoom.

    python -m virl_jax.curate build --source=gqa --data=RAW --out=SETS
    python -m virl_jax.curate build --source=gqa,textvqa --data=RAW/gqa,RAW/textvqa --boxes_from=RAW/visual_cot \\
      --out=SETS

reads a source's own files, looks at each image, repairs boxes and writes a finished set for training
(config.data.source = "set"), with counts of all that was read, repaired and rejected.  docs/data.md has what each
source needs.  Interrupt it at any time and start it again: it goes on where it was.  A source that fails is named, and
the others go on.  With Apache Beam (extra "curate") and --runner, Beam does the work:

    python -m virl_jax.curate build --source=gqa --data=RAW --out=DIR --runner=FlinkRunner \\
      --beam=--flink_master=HOST:8081

Then

    python -m virl_jax.curate --config=configs/curate.py --data=SETS --out=DIR [--endpoint=http://HOST:PORT/v1]

drops what needs no zoom, is hopeless, already solved, a near-duplicate or on a benchmark's picture: by rules, and by
what a policy says, with zooms and without.  It leaves sets for training, lists of what was kept and of what was dropped
and why, and report.html; see docs/curation.md.  It can be interrupted and started again as well.
"""

from __future__ import annotations

if __name__ == "__main__":
  from virl_jax.run import signals
  signals.install()

import os

from absl import app
from absl import flags
from ml_collections import config_flags

from virl_jax import config as config_lib
from virl_jax.data.curation import build as build_lib
from virl_jax.data.curation import funnel
from virl_jax.data.curation import parts as parts_lib
from virl_jax.data.curation import policy as policy_lib
from virl_jax.data.sources import table
from virl_jax.model import sharding
from virl_jax.model import weights
from virl_jax.rollout import remote
from virl_jax.rollout import sample
from virl_jax.run import hosts
from virl_jax.run import load
from virl_jax.run import setup
from virl_jax.run import signals

_FACTOR = 28  # pixels; sides of pictures that Qwen2.5-VL is shown are multiples of it.  For when no model is read


def build(args: flags.FlagValues) -> None:
  """The sub-command `build`: each source after the other.

  Raises:
    ValueError: a flag is missing or wrong, or sources failed; names all of these when the others are done.
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
  jobs = [parts_lib.Job(source, root, args.split, args.out, args.boxes_from if source in table.JOINED else "",
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


def curate(c: config_lib.ConfigDict, data: str, out: str, url: str = "", threads: int = 0) -> dict:
  """Curates finished sets; see `funnel`.

  Args:
    c: thresholds, and the policy that is asked, with how prompts are worded and images shown.
    data: a set, or a folder of sets.
    out: folder for the results.
    url: of an endpoint that is asked in place of the engine; "" for none.
    threads: how many threads read pictures; 0 for one a core.

  Returns:
    What counts.json holds.

  Raises:
    ValueError: a folder or file that is named does not exist, or no task is left.
    endpoint.Unreachable: the endpoint is gone.
  """
  s = setup.sections(c)
  u, factor = s.curate, _FACTOR
  told = lambda line: print(f"process {hosts.number()}: {line}" if hosts.several() else line, flush=True)
  asker = None
  if u.policy.is_on:
    about = {"model": c.model.path, **config_lib.flat({name: c[name].to_dict() for name in (
        "image", "prompt", "rollout")}), "dtype": [c.model.dtype, c.model.compute_dtype]}
    if url:
      p = setup.pieces(c)
      server = remote.Endpoint(url, s.endpoint, told)
      asker = policy_lib.by_endpoint(p.policy, server, u.policy, about | {"endpoint": s.endpoint.model})
    else:
      loaded = load.base(load.model_dir(c.model.path), c.model.dtype, sharding.make(fsdp=-1, data=1))
      p = setup.assemble(c, weights.read_config(loaded.hf_dir), load.codec(loaded.hf_dir, loaded.model), loaded.hf_dir)
      params = sample.weights(loaded.params, p.policy.model, p.policy.mesh)
      asker = policy_lib.by_engine(p.policy, params, u.policy, c.seed, about)
    factor = asker.policy.model.vision.grid.factor
  job = funnel.Job(data, out, u.shard_tasks, u.benchmarks, u.rules, u.policy, u.band, s.image, factor, c.seed)
  return funnel.run(job, asker, threads or os.cpu_count() or 1, told)


def told_counts(counts: dict) -> str:
  """What became of the tasks, in a few lines."""
  n = counts["read"]["all"]
  lines = [f"{n} tasks read"]
  for stage, left in counts["after"].items():
    lines += [f"  {it['n']['all']} {it['reason']}" for it in counts["dropped"] if it["stage"] == stage]
    lines.append(f"{left['all']} after {stage} ({left['all'] / n:.1%})")
  return "\n".join(lines)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the command's flags; not on import, because other commands have flags of the same names."""
  flags.DEFINE_list("source", [], f"Of build: one or more of {', '.join(table.SOURCES)}.", flag_values=values)
  flags.DEFINE_list("data", [], "Of build: raw folder; one, or one for each source. Else: a finished set, or a folder "
                    "of such.", flag_values=values)
  flags.DEFINE_string("out", None, "Folder to write to.", flag_values=values)
  flags.DEFINE_string("split", "train", "Which of the source's splits.", flag_values=values)
  flags.DEFINE_string("boxes_from", "", "Visual-CoT's raw folder, whose boxes are given to "
                      f"{', '.join(table.JOINED)}.", flag_values=values)
  flags.DEFINE_enum("images", "keep", ["keep", "embed"], "Whether image files stay where they are, or are copied into "
                    "the set.", flag_values=values)
  flags.DEFINE_enum("check", "header", ["header", "decode"], "What is read of each image: decode finds those that are "
                    "cut off, and takes longer.", flag_values=values)
  flags.DEFINE_integer("jobs", 0, "Processes of build, else threads that read pictures; 0 for one a core.",
                       lower_bound=0, flag_values=values)
  flags.DEFINE_float("max_rejects", 0.1, "Largest share of a source's records that may be rejected.", 0, 1,
                     flag_values=values)
  flags.DEFINE_string("endpoint", "", "Address of an OpenAI-compatible endpoint, http://HOST:PORT/v1, that is asked in "
                      "place of the engine.", flag_values=values)
  config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
  hosts.define_flags(values)
  flags.DEFINE_string("runner", "", "Beam's runner, such as DirectRunner, FlinkRunner, SparkRunner, DataflowRunner; "
                      "without one, processes do the work.", flag_values=values)
  flags.DEFINE_multi_string("beam", [], "An option for Beam; can be given several times.", flag_values=values)


def main(argv):
  args = flags.FLAGS
  if argv[1:] not in ([], ["build"]):
    raise app.UsageError(f"the first argument must be build, or there must be none. Received: {argv[1:]}")
  if argv[1:]:
    setup.quiet()
    with setup.told():
      build(args)
    return
  if args.config is None or len(args.data) != 1 or not args.out:
    raise app.UsageError("--config=FILE --data=SETS --out=DIR are needed")
  setup.begin()
  with setup.told():
    hosts.join(args.coordinator, args.num_processes, args.process_id, args.join_timeout_s, together=False)
    with signals.closing(lambda: hosts.fail("it was stopped; the same command goes on")):
      hosts.same("configuration", config_lib.flat(args.config.to_dict()))
      counts = curate(args.config, args.data[0], args.out, args.endpoint, args.jobs)
    hosts.say(f"{told_counts(counts)}\n{os.path.join(args.out, 'report.html')}")


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=setup.parse)
