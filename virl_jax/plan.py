"""Says whether a configuration fits a machine and what it costs there, by compiling the real programs for it.

    python -m virl_jax.plan --config=configs/v7b.py --topology=h100:8
    python -m virl_jax.plan --config=configs/v7b.py --topology=v5e:8x8 --config.rollout.tensor=4 --json=plan.json

Neither the machine nor the weights are needed: the model's shapes come from its folder, or from its name where there is
no folder yet.  TPU topologies need the package libtpu, GPU ones the CUDA plugin (pip install 'virl-jax[plan]'); cpu:8
needs nothing.  A compilation takes from seconds to many minutes, and much memory: run one at a time.

Where something does not fit, a few overrides are tried, and those are proposed that were compiled and fit.
"""

from __future__ import annotations

if __name__ == "__main__":
  from virl_jax.run import signals
  signals.install()

import copy
import dataclasses
import gc
import json
import os
import re
import time

from absl import app
from absl import flags
from ml_collections import config_flags

from virl_jax import config as config_lib
from virl_jax.model import family
from virl_jax.model import weights
from virl_jax.model.qwen2_5 import config as qwen
from virl_jax.run import costs
from virl_jax.run import hlo
from virl_jax.run import load
from virl_jax.run import memory
from virl_jax.run import programs
from virl_jax.run import progress
from virl_jax.run import setup
from virl_jax.run import topologies

GIB = 2 ** 30
# What to try where a program does not fit, one after the other, each on top of the ones before.
_TRAINING = (("model.remat", True), ("learner.microbatch_tokens", programs.width), ("model.patches_together", 32768),
             ("model.patches_together", 16384), ("model.patches_together", 8192), ("lora.rank", 64))
_ROLLOUTS = (("rollout.tensor", 2), ("rollout.tensor", 4), ("engine.slots", 0.5), ("engine.slots", 0.25),
             ("lora.rank", 64))
_TRIES = {"update": _TRAINING, "score": _TRAINING} | dict.fromkeys(
    ("copy", "prefill", "append", "decode", "restart"), _ROLLOUTS)


@dataclasses.dataclass
class Row:
  """The result of compiling a program; bytes are a device's.

  Attributes:
    ok: whether it compiles and fits beside what waits.
    peak_gib, arguments_gib, temporaries_gib: of the device's own memory, as the compiler reports them.
    waiting_gib: what else lies on the device meanwhile, such as the optimizer's state during a rollout.
    host_gib: of the host's pinned memory, for one device: what is offloaded.
    collective_gib: received from other devices.  A loop whose length the compiler does not know counts once, so that
      `update` and `score` show one microbatch, and `decode` one token.
    largest_gib: of any one collective's result.
    collectives: `collective_gib` by kind.
    attention: which kernels it calls; empty for XLA's own products.
    flops, bytes_read: of one pass of such a loop: operations of all devices, bytes of one device's memory.
    seconds, tokens_s, mfu: by the slowest of products, memory and links; None where speeds are not known.
    compile_s: how long it took.
    error: why it is not ok, or "".
  """

  ok: bool
  peak_gib: float = 0.0
  arguments_gib: float = 0.0
  temporaries_gib: float = 0.0
  waiting_gib: float = 0.0
  host_gib: float = 0.0
  collective_gib: float = 0.0
  largest_gib: float = 0.0
  collectives: dict = dataclasses.field(default_factory=dict)
  attention: list = dataclasses.field(default_factory=list)
  flops: float = 0.0
  bytes_read: float = 0.0
  seconds: float | None = None
  tokens_s: float | None = None
  mfu: float | None = None
  compile_s: float = 0.0
  error: str = ""


def model_of(c: config_lib.ConfigDict) -> family.Config:
  """The base's shapes: from its folder, or by the size in its name.

  Raises:
    ValueError: there is neither.
  """
  path = c.model.path
  if path == "@tiny" or os.path.isfile(os.path.join(path, "config.json")):
    return weights.read_config(load.model_dir(path))
  size = re.search(r"(\d+b)\b", os.path.basename(path.rstrip("/")).lower())
  if not size or size.group(1) not in qwen.SIZES:
    raise ValueError(f"config.model.path must be a checkpoint's folder, or have one of the released sizes in its name "
                     f"({', '.join(qwen.SIZES)}), so that its shapes are known. Received: {path!r}")
  return qwen.SIZES[size.group(1)]


def compiled(c: config_lib.ConfigDict, topology: topologies.Topology, devices: list, name: str) -> Row:
  """Compiles one program of a configuration.

  Args:
    c: the configuration.
    topology: what it is compiled for.
    devices: of `topologies.devices`.
    name: one of `programs.NAMES`.

  Raises:
    ValueError: the configuration does not fit the model or the devices.
  """
  p = setup.assemble(c, model_of(c), None, "", devices)
  began = time.perf_counter()
  # To choose tiles Triton runs them, and the GPU is not here.
  options = {"xla_gpu_enable_triton_gemm": False} if topology.chip.platform == "gpu" and topology.shape else {}
  try:
    done = programs.lowered(c, p, name, programs.work(c))().compile(compiler_options=options)
  except Exception as e:  # a TPU's compiler raises if the program does not fit
    return Row(False, compile_s=time.perf_counter() - began, error=_reason(e))
  held, text = done.memory_analysis(), done.as_text()
  traffic = hlo.traffic(text)
  work = programs.cost(c, p, name, programs.work(c))
  operations = costs.flops(p.step.model, work)
  least = costs.seconds(topology.chip, topology.count, operations, work.bytes_device, traffic.total)
  known = least == least and least > 0
  host = (held.host_argument_size_in_bytes + held.host_temp_size_in_bytes + held.host_output_size_in_bytes
          - held.host_alias_size_in_bytes) / GIB
  peak = peak_gib(held, topology.chip.platform)
  waiting = max(0.0, programs.live(c, p, name, programs.work(c)) - held.argument_size_in_bytes / GIB)
  fits = peak + waiting <= topology.chip.memory_gib
  return Row(
      ok=fits, peak_gib=peak, arguments_gib=held.argument_size_in_bytes / GIB,
      temporaries_gib=held.temp_size_in_bytes / GIB, waiting_gib=waiting, host_gib=host,
      collective_gib=traffic.total / GIB,
      largest_gib=traffic.largest / GIB, collectives={k: v / GIB for k, v in traffic.kinds.items()},
      attention=hlo.kernels(text), flops=operations, bytes_read=work.bytes_device, seconds=least if known else None,
      tokens_s=work.tokens / least if known and work.tokens else None,
      mfu=operations / topology.count / topology.chip.flops / least if known else None,
      compile_s=time.perf_counter() - began,
      error="" if fits else f"needs {peak:.1f} GiB, beside {waiting:.1f} that wait, of {topology.chip.memory_gib:.1f}")


def peak_gib(held, platform: str) -> float:
  """What a compiled program takes of a device's own memory while it runs, its arguments included.

  Args:
    held: `jax.stages.Compiled.memory_analysis` of it.
    platform: what it is compiled for.
  """
  given = held.argument_size_in_bytes + held.temp_size_in_bytes
  if platform == "cpu":  # its compiler reports too low a peak
    return given / GIB
  # The compiler's peak is of all memories together, and arguments in the host's memory are there all the time.
  return min(held.peak_memory_in_bytes - held.host_argument_size_in_bytes,
             given + held.output_size_in_bytes - held.alias_size_in_bytes) / GIB


def plan(c: config_lib.ConfigDict, topology: topologies.Topology, names: tuple[str, ...] = programs.NAMES,
         tell=lambda name, row: None) -> dict:
  """Compiles the programs, and looks for what helps where one does not fit.

  Args:
    c: the configuration.
    topology: the machine.
    names: which programs.
    tell: called with each program's name and `Row` as it comes.

  Returns:
    What --json writes: "programs" by name, "fits", "advice", "kinds" (GiB of a device by what they are), "topology",
    "config".

  Raises:
    ValueError: the configuration does not fit the model or the devices.
  """
  devices = topologies.devices(topology)
  p = setup.assemble(c, model_of(c), None, "", devices)
  rows, advice = {}, []
  for name in progress.over(names, len(names), "compiling", "program"):
    rows[name] = compiled(c, topology, devices, name)
    tell(name, rows[name])
    gc.collect()
  bad = [name for name in names if not rows[name].ok]
  for group in (_TRAINING, _ROLLOUTS):
    failing = [name for name in bad if _TRIES[name] is group]
    if failing:
      advice += _helps(c, topology, devices, failing, group)
  return {"topology": topology.name, "config": c.to_dict(), "fits": not bad,
          "programs": {name: dataclasses.asdict(row) for name, row in rows.items()},
          "kinds": programs.kinds(c, p, programs.work(c)), "advice": advice}


def check(c: config_lib.ConfigDict, p: setup.Pieces) -> None:
  """Refuses a configuration that does not fit the devices that are here, before any weights are loaded.

  What is certain to lie on a device is counted first, at no cost.  Then the update is compiled, as training would do
  later.  Nothing is checked where the backend does not say how much memory there is, as a CPU's does not.

  Args:
    c: the configuration.
    p: its pieces.

  Raises:
    ValueError: it does not fit; proposes overrides that were compiled and fit.
  """
  limit = memory.limit_gib(p.mesh.local_devices)
  if limit is None:
    return
  devices = list(p.mesh.devices.flat)
  topology = topologies.here(devices, limit)
  for name in ("update", "decode"):
    if (lies := programs.live(c, p, name, programs.work(c))) > limit:
      raise ValueError(_told(c, topology, devices, name, f"what lies on a device is {lies:.1f} GiB"))
  print("compiling the update to see whether it fits: minutes, once", flush=True)
  row = compiled(c, topology, devices, "update")
  if not row.ok:
    raise ValueError(_told(c, topology, devices, "update", row.error))


def _told(c, topology, devices, name: str, why: str) -> str:
  """A refusal, with what was compiled and fits."""
  print(f"{name} does not fit: {why}; looking for what does", flush=True)
  helps = " ".join(_helps(c, topology, devices, [name], _TRIES[name]))
  # JAX takes three quarters of a GPU's memory unless it is told otherwise.
  share = " (what XLA_PYTHON_CLIENT_MEM_FRACTION leaves)" if topology.chip.platform == "gpu" else ""
  room = f"{topology.name} of {topology.chip.memory_gib:.1f} GiB{share} each"
  return f"config must fit {room}; {name}: {why}. Try {helps}"


def _helps(c, topology, devices, failing: list[str], tries) -> list[str]:
  """Overrides with which these programs compile and fit, or a line that says that none of those tried does."""
  found, trial = {}, copy.deepcopy(c)
  for key, value in tries:
    section, _, knob = key.partition(".")
    if isinstance(value, float):  # a share of the knob's value
      value = int(trial[section][knob] * value)
    value = value(trial) if callable(value) else value
    if value == c[section][knob] or isinstance(value, int) and value < 1:
      continue
    trial[section][knob] = found[key] = value
    try:
      if all(compiled(trial, topology, devices, name).ok for name in failing):
        return [f"--config.{k}={v}" for k, v in found.items()]
    except ValueError:  # such as heads that the devices do not divide
      trial[section][knob] = c[section][knob]
      found.pop(key)
  tried = ", ".join(f"{k}={v}" for k, v in found.items())
  return [f"{' and '.join(failing)}: nothing that was tried fits ({tried}): take more devices"]


def _reason(e: Exception) -> str:
  """A compiler's complaint in a line."""
  text = " ".join(str(e).split())
  found = re.search(r"Ran out of memory.*?exceeds available \w+ \([^)]*\)", text)
  return (found.group(0) if found else f"{type(e).__name__}: {text}")[:300]


def table(result: dict) -> str:
  """The result for people."""
  lines = [f"{'program':8s} {'peak':>7s} {'args':>7s} {'temps':>7s} {'waiting':>7s} {'coll':>8s}  {'least s':>8s} "
           f"{'tokens/s':>9s} {'MFU':>5s} {'compiled':>9s}  attention"]
  for name, r in result["programs"].items():
    if r["error"] and not r["peak_gib"]:
      lines.append(f"{name:8s} does not compile: {r['error']}")
      continue
    number = lambda value, form: format(value, form) if value is not None else "-"
    lines.append(f"{name:8s} {r['peak_gib']:7.2f} {r['arguments_gib']:7.2f} {r['temporaries_gib']:7.2f} "
                 f"{r['waiting_gib']:7.2f} "
                 f"{r['collective_gib']:8.3f}  {number(r['seconds'], '.4f'):>8s} {number(r['tokens_s'], ',.0f'):>9s} "
                 f"{number(r['mfu'], '.2f'):>5s} {r['compile_s']:7.0f} s  {', '.join(r['attention']) or 'XLA'}"
                 + (f"  {r['host_gib']:.2f} GiB wait in the host's memory" if r["host_gib"] else "")
                 + (f"  {r['error']}" if r["error"] else ""))
  return "\n".join(lines)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the command's flags; not on import, because other commands have flags of the same names."""
  config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
  flags.DEFINE_string("topology", None, "Machine to compile for, such as h100:8, v5e:8x8, v5p:2x2x4, v6e:4x4, cpu:8.",
                      required=True, flag_values=values)
  flags.DEFINE_string("json", None, "A file for the figures.", flag_values=values)
  flags.DEFINE_list("programs", list(programs.NAMES), "Which programs to compile.", flag_values=values)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  args = flags.FLAGS
  setup.quiet()
  with setup.told():
    setup.config_file(args)
    topology = topologies.parse(args.topology)
    unknown = sorted(set(args.programs) - set(programs.NAMES))
    if unknown:
      raise ValueError(f"--programs must be among {', '.join(programs.NAMES)}. Received: {', '.join(unknown)}")
    topologies.prepare(topology)
    for caution in setup.cautions(args.config):
      print(f"WARNING: {caution}", flush=True)
    chip = topology.chip
    print(f"{topology.count} x {chip.kind}, {chip.memory_gib} GiB each; assumed: {chip.flops:.3g} operations/s, "
          f"{chip.bandwidth:.3g} bytes/s of memory, {chip.link:.3g} bytes/s over links", flush=True)
    result = plan(args.config, topology, tuple(args.programs),
                  lambda name, row: progress.say(f"  {name}: {'fits' if row.ok else row.error}, {row.compile_s:.0f} s"))
    print("\n" + table(result) + "\n\n" + "  ".join(f"{k} {v:.2f} GiB" for k, v in result["kinds"].items()))
    print("fits" if result["fits"] else "does not fit: try " + " ".join(result["advice"]), flush=True)
    if args.json:
      with open(args.json, "w") as f:
        json.dump(result, f, indent=1)


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=setup.parse)
