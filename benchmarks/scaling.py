"""What a device receives in an update as there are more of them, by the compiled programs, against the least it must.

    python benchmarks/scaling.py                                             # 1, 2, 4, 8 CPU devices; minutes
    python benchmarks/scaling.py --topologies=v5e:2x4,v5e:4x4,v5e:8x8,v5e:16x16 --out=runs/scaling   # an hour and more

Seconds can't be had from devices that are not there, but bytes can: each update of a microbatch is compiled, ahead of
time, for a mesh of so many devices, with the same rows a device whatever their number (weak scaling), and its
collectives are read off.  The model has the widths of the 7B, and few layers: what a layer moves does not depend on how
many there are.

The least, received by a device of `fsdp` x `tensor`, for parameters of P elements, 2 bytes each as they are computed
with, gradients too, but for the head's, which are added up in 4:

    fsdp    weights of layers come for the forward pass and again for the backward pass, which computes layers again:
            2 x 2 P (fsdp - 1) / fsdp; the head's once; gradients go once: 2 P (fsdp - 1) / fsdp, 4 of the head; all
            over tensor.  The embedding need not move
    tensor  two sums of [tokens, D] a layer each way, and two more in what is computed again: 6 x 2 D tokens x
            2 (tensor - 1) / tensor, of the decoder

Sources: ZeRO (arXiv 1910.02054), section 7; Megatron-LM (arXiv 1909.08053), section 3.  The vision tower's own sums are
not in the least.
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
  """The 7B's widths."""
  whole = qwen.SIZES["7b"]
  return dataclasses.replace(
      whole, text=dataclasses.replace(whole.text, layers=LAYERS),
      vision=dataclasses.replace(whole.vision, depth=BLOCKS, full_blocks=(BLOCKS - 1,)))


def config(fsdp: int, tensor: int) -> config_lib.ConfigDict:
  """A row a device and microbatch."""
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
  """What a device must receive for a microbatch, GiB; see above.

  Args:
    cfg: shapes.
    row_tokens: of a microbatch, that the device and those it shares its layers with compute.
    fsdp, tensor: the mesh.
  """
  one = cfg.text.hidden * cfg.text.vocab  # the embedding, and the head
  layers = params_lib.count(family.of(cfg).specs(cfg)) - 2 * one
  sharded = ((2 * 2 + 2) * layers + (2 + 4) * one) * (fsdp - 1) / fsdp / tensor
  sums = 6 * cfg.text.layers * 2 * cfg.text.hidden * row_tokens * 2 * (tensor - 1) / tensor
  return (sharded + sums) / plan.GIB


def meshes(count: int) -> list[tuple[int, int]]:
  """(fsdp, tensor) of so many devices."""
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
  for topology in sorted(wanted, key=lambda t: t.count):  # the largest last: a CPU has as many devices as it asks for
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
