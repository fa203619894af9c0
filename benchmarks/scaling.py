"""What a device receives in an update, by the compiled programs, as the number of devices grows; and the least it must.

    python benchmarks/scaling.py                                             # 1, 2, 4, 8 CPU devices; minutes
    python benchmarks/scaling.py --topologies=v5e:2x4,v5e:4x4,v5e:8x8,v5e:16x16 --out=runs/scaling   # an hour and more

Seconds can't be measured on devices that are not there, but bytes can be counted: an update of a microbatch is
compiled, ahead of time, for a mesh of so many devices, with the same rows for each device (weak scaling), and its
collectives are read from the program.  The model has the widths of 7B and few layers: what a layer moves does not
depend on their number.

The least that a device of `fsdp` x `tensor` receives, for parameters of P elements with 2 bytes each in the forward and
backward pass, and as many for gradients, except the head's, which are summed in 4 bytes:

    fsdp    weights of layers arrive for the forward pass and again for the backward pass, which computes layers again:
            2 x 2 P (fsdp - 1) / fsdp; the head's arrive once; gradients once: 2 P (fsdp - 1) / fsdp, and 4 bytes for
            the head's; all divided by tensor.  The embedding need not move
    tensor  two sums of [tokens, D] for each layer in either direction, and two more in what is computed again:
            6 x 2 D tokens x 2 (tensor - 1) / tensor, for the decoder

Sources: ZeRO (arXiv 1910.02054), section 7; Megatron-LM (arXiv 1909.08053), section 3.  The least does not include the
sums of the vision tower.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib

import timing  # of this folder

from virl_jax import config as config_lib
from virl_jax import plan
from virl_jax.model import family
from virl_jax.model import params as params_lib
from virl_jax.model.qwen2_5 import config as qwen
from virl_jax.run import topologies

LAYERS, BLOCKS = 2, 2  # of the decoder and of the vision tower
ROW_TOKENS = 1024


def model() -> family.Config:
  """The shapes of 7B with few layers."""
  whole = qwen.SIZES["7b"]
  return dataclasses.replace(
      whole, text=dataclasses.replace(whole.text, layers=LAYERS),
      vision=dataclasses.replace(whole.vision, depth=BLOCKS, full_blocks=(BLOCKS - 1,)))


def config(fsdp: int, tensor: int) -> config_lib.ConfigDict:
  """A configuration with one row for each device and microbatch."""
  c = config_lib.default()
  c.model.path, c.model.compute_dtype, c.model.remat = "Qwen2.5-VL-7B-Instruct", "bfloat16", True
  c.rollout.prompts, c.rollout.group_size = max(8, fsdp), 4
  c.rollout.max_total_tokens, c.rollout.max_turn_tokens = ROW_TOKENS, 256
  c.image.max_pixels, c.image.crop_max_pixels = 256 * 28 * 28, 64 * 28 * 28
  c.pack.join_rows, c.pack.pad_tokens, c.learner.microbatch_tokens = True, ROW_TOKENS // 4, ROW_TOKENS
  c.learner.row_shown, c.learner.row_crops = 1, 6
  c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, fsdp, tensor
  return c


def least_gib(cfg: family.Config, row_tokens: int, fsdp: int, tensor: int) -> float:
  """The least that a device must receive for a microbatch, in GiB; see the module.

  Args:
    cfg: shapes.
    row_tokens: tokens of a microbatch on the device and those that it shares layers with.
    fsdp, tensor: the mesh.
  """
  one = cfg.text.hidden * cfg.text.vocab  # the embedding, and the head
  layers = params_lib.count(family.of(cfg).specs(cfg)) - 2 * one
  sharded = ((2 * 2 + 2) * layers + (2 + 4) * one) * (fsdp - 1) / fsdp / tensor
  sums = 6 * cfg.text.layers * 2 * cfg.text.hidden * row_tokens * 2 * (tensor - 1) / tensor
  return (sharded + sums) / plan.GIB


def meshes(count: int) -> list[tuple[int, int]]:
  """The meshes, (fsdp, tensor), for so many devices."""
  return [(count, 1), *([(count // 2, 2)] if count % 2 == 0 else [])]


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--topologies", default="cpu:1,cpu:2,cpu:4,cpu:8")
  p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs") / "scaling",
                 help="what is compiled is kept there, and not compiled again")
  args = p.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  plan.model_of = lambda c: model()
  rows, wanted = [], [topologies.parse(name) for name in args.topologies.split(",")]
  for topology in sorted(wanted, key=lambda t: t.count):  # the largest last: it sets how many devices a CPU has
    topologies.prepare(topology)
  for topology in wanted:
    name, devices = topology.name, topologies.devices(topology)
    for fsdp, tensor in meshes(topology.count):
      file = args.out / f"{name.replace(':', '_')}_{fsdp}x{tensor}.json"
      if not file.exists():
        row = plan.compiled(config(fsdp, tensor), topology, devices, "update")
        if not row.compile_s or row.error and not row.peak_gib:
          raise SystemExit(f"error: {name}, fsdp {fsdp} x tensor {tensor}: {row.error}")
        file.write_text(json.dumps(dataclasses.asdict(row)))
      found, least = json.loads(file.read_text()), least_gib(model(), ROW_TOKENS, fsdp, tensor)
      rows.append({"topology": name, "fsdp": fsdp, "tensor": tensor, "least_gib": least,
                   "received_gib": found["collective_gib"], "kinds": found["collectives"],
                   "compile_s": found["compile_s"]})
      print(f"{name} {fsdp} x {tensor}: {found['collective_gib']:.3f} GiB, least {least:.3f}", flush=True)
  shown = [[r["topology"], f"{r['fsdp']} x {r['tensor']}", f"{r['received_gib']:.3f}", f"{r['least_gib']:.3f}",
            f"{r['received_gib'] / r['least_gib']:.2f}" if r["least_gib"] else "-",
            ", ".join(f"{kind} {gib:.2f}" for kind, gib in sorted(r["kinds"].items()) if gib > 0.005) or "-"]
           for r in rows]
  print("\n" + timing.table(["machine", "fsdp x tensor", "received, GiB", "least, GiB", "ratio", "by kind"], shown))
  print(timing.last_line({"rows": rows}))


if __name__ == "__main__":
  main()
