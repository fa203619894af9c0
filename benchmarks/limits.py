"""What saturates first, from one host to 1,024 chips: the parts of a step of configs/v7b.py, by arithmetic.

    python benchmarks/limits.py                     # TPU v5p
    python benchmarks/limits.py --chip=v5e          # also v6e, h100

Only the host's work on a picture is run.  Operations are those that `plan` counts; bytes are the least of
benchmarks/scaling.py, times the excess that its compiled programs receive; speeds are those of the data sheets, times
the shares below.  The batch stays the same (strong scaling): that is what a user waits for.

A minibatch has a fixed number of rows.  Devices beyond that share rows (tensor parallelism), up to the number of
key/value heads; still more devices have no work in the update.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import pathlib
import runpy
import time

import numpy as np
from PIL import Image
import scaling  # of this folder
import timing  # of this folder

from virl_jax import config as config_lib
from virl_jax import plan
from virl_jax import types
from virl_jax.data import images
from virl_jax.model import family
from virl_jax.model import params as params_lib
from virl_jax.run import costs
from virl_jax.run import programs
from virl_jax.run import topologies

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Machine:
  """How chips of a kind are put together.

  Attributes:
    host_chips: chips of a host.
    slice_chips: most chips that are connected at the speed of `Chip.link`.
    between: bytes a second for each chip between slices, or between machines of GPUs.
    least_tensor: the fewest chips that a copy of the weights must be split over in rollouts; see docs/scaling.md.
  """

  host_chips: int
  slice_chips: int
  between: float
  least_tensor: int


# Google Cloud's pages of TPU v5e, v5p, v6e (largest slice; 200 Gbit/s for a host of four chips, assumed for all);
# NVIDIA's DGX H100 (a 400 Gbit/s adapter for each GPU).
MACHINES = {"v5e": Machine(4, 256, 6.25e9, 4), "v5p": Machine(4, 6144, 6.25e9, 1), "v6e": Machine(4, 256, 6.25e9, 2),
            "h100": Machine(8, 8, 50e9, 1)}
PRODUCTS = 0.40    # share of the peak: MaxText reports 0.455 for an 8B model on v6e-256, EasyR1 0.08 to 0.27
MEMORY = 0.70      # share of the bandwidth, while decoding
BEYOND = 1.25      # bytes received, divided by the least: the ratio of compiled programs (docs/scaling.md)
SUM_S = 10e-6      # seconds of a sum over a few chips, however small, while decoding: two for each layer
STORAGE = 1e9      # bytes a second that a host writes to a bucket
HOST_CORES = 100   # cores of a host that decode pictures
SLOTS = 8          # for each device; devices that share a copy of the weights also share theirs


@dataclasses.dataclass(frozen=True)
class Step:
  """Seconds of a step's parts; see `step`."""

  chips: int
  mesh: str
  over: int
  products: float
  links: float
  score: float
  prompts: float
  decode: float
  tail: float
  copy: float
  host: float
  checkpoint: float

  @property
  def total(self) -> float:
    """The sum of the parts; products and links of an update overlap, as do pictures and checkpoints with the rest."""
    return max(self.products, self.links) + self.score + self.prompts + self.decode + self.copy

  @property
  def slowest(self) -> str:
    parts = {"update: products": self.products, "update: links": self.links, "score": self.score,
             "prompts and crops": self.prompts, "decode: bandwidth": self.decode - self.tail,
             "decode: the longest": self.tail, "copy": self.copy, "pictures": self.host, "checkpoint": self.checkpoint}
    return max(parts, key=parts.get)


def step(c: config_lib.ConfigDict, kind: str, chips: int, picture_s: float) -> Step:
  """A step on so many chips.

  Args:
    c: the configuration.
    kind: of chip, a key of `MACHINES`.
    chips: how many.
    picture_s: seconds that one core takes for a trajectory's pictures.
  """
  cfg, chip, machine = plan.model_of(c), topologies.CHIPS[kind], MACHINES[kind]
  work, row = programs.work(c), c.learner.microbatch_tokens
  trajectories = c.rollout.prompts * c.rollout.group_size
  rows = math.ceil(trajectories * work.trajectory_tokens / row / c.ppo.minibatches)  # of a minibatch
  fsdp = min(chips, rows)
  tensor = min(chips // fsdp, cfg.text.kv_heads)
  micro = math.ceil(rows / fsdp)
  speed = chip.flops * PRODUCTS
  patches = lambda pixels: pixels / cfg.vision.grid.patch ** 2
  shown, crop = patches(c.image.max_pixels), patches(c.image.crop_max_pixels)
  own = row / work.trajectory_tokens  # trajectories in a row
  passes = costs.update_passes(cfg.tuning)[0]

  def of_row(passes: float) -> float:
    return costs.flops(cfg, costs.Work(row, work.trajectory_tokens / 2, row, own * (shown + work.crops * crop), shown,
                                       passes, passes))

  size = params_lib.count(family.of(cfg).specs(cfg))
  turns = c.ppo.minibatches * micro
  inside = min(fsdp, machine.slice_chips)
  if chip.platform == "gpu":  # layers are split over machines, too
    link = chip.link if chips <= machine.slice_chips else machine.between
    received = BEYOND * scaling.least_gib(cfg, row, fsdp, tensor) * plan.GIB / link
  else:  # slices are copies of each other: gradients are summed over them
    received = BEYOND * scaling.least_gib(cfg, row, inside, tensor) * plan.GIB / chip.link
    slices = math.ceil(chips / machine.slice_chips)
    received += 4 * size / inside / tensor * 2 * (slices - 1) / machine.between
  whole = 2 * size
  shown_tokens, crop_tokens = (n / cfg.vision.merge ** 2 for n in (shown, crop))
  prompt = shown_tokens + 300  # the question, and the tool's description
  sampled = work.trajectory_tokens - prompt - work.crops * crop_tokens
  longest = (c.rollout.max_rounds + 1) * c.rollout.max_turn_tokens
  a_token = 2 * 2 * cfg.text.layers * cfg.text.kv_heads * cfg.text.head_size  # bytes of the cache

  def rollout(over: int) -> tuple[float, float, int]:
    """Seconds of decoding, those of the longest trajectory beyond the mean, and how many chips a copy is split over."""
    each = trajectories / (chips / over)  # trajectories of a copy
    slots = min(SLOTS * over, math.ceil(each))
    token_s = ((whole + slots * work.trajectory_tokens / 2 * a_token) / over / (chip.bandwidth * MEMORY)
               + (2 * cfg.text.layers * SUM_S if over > 1 else 0.0))
    tail = max(0.0, longest - sampled) * token_s
    return each / slots * sampled * token_s + tail, tail, over

  decode, tail, over = min(rollout(over) for over in (1, 2, 4) if machine.least_tensor <= over <= chips)
  read = costs.flops(cfg, costs.Work(c.rollout.prompts * prompt, prompt / 2, 0, c.rollout.prompts * shown, shown)) + \
      costs.flops(cfg, costs.Work(trajectories * work.crops * crop_tokens, work.trajectory_tokens / 2, 0,
                                  trajectories * work.crops * crop, crop))
  hosts = math.ceil(chips / machine.host_chips)
  state = 3 * 4 * size
  return Step(
      chips, f"{fsdp} x {tensor}", over,
      turns * of_row(passes + c.model.remat) / tensor / speed, turns * received,
      0.0 if c.ppo.minibatches == 1 else turns * of_row(1.0) / tensor / speed, read / chips / speed, decode, tail,
      whole / over / chip.link, trajectories * picture_s / hosts / HOST_CORES,
      state / hosts / STORAGE / c.checkpoint.every)


def picture_seconds(c: config_lib.ConfigDict, grid) -> float:
  """Seconds that one core takes from a JPEG of 12 megapixels to the patches of the shown image and of two crops."""
  rng = np.random.default_rng(0)
  coarse = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).resize((4000, 3000), Image.BICUBIC)
  file = io.BytesIO()
  coarse.save(file, "JPEG", quality=90)

  def run():
    picture = images.decode(file.getvalue())
    images.prepare(picture, None, c.image.min_pixels, c.image.max_pixels, grid)
    for _ in range(2):
      images.prepare(picture, types.Box(1000, 1000, 2200, 1900), c.image.crop_min_pixels, c.image.crop_max_pixels, grid)

  seconds = []
  for _ in range(5):
    began = time.process_time()
    run()
    seconds.append(time.process_time() - began)
  return timing.median(seconds)


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--chip", default="v5p", choices=sorted(MACHINES))
  p.add_argument("--prompts", type=int, help="a step; the configuration's if it is not given")
  args = p.parse_args()
  c = runpy.run_path(str(ROOT / "configs" / "v7b.py"))["get_config"]()
  if args.prompts:
    c.rollout.prompts = args.prompts
  grid = plan.model_of(c).vision.grid
  picture_s = picture_seconds(c, grid)
  least = MACHINES[args.chip].host_chips
  steps = [step(c, args.chip, n, picture_s) for n in (least * 2 ** i for i in range(11)) if n <= 1024]
  first = steps[0]
  header = ["chips", "fsdp x tensor", "rollout.tensor", "products", "links", "score", "prompts, crops", "decode",
            "of it the longest", "copy", "pictures", "checkpoint", "step, s", "efficiency", "slowest"]
  shown = [[s.chips, s.mesh, s.over, f"{s.products:.1f}", f"{s.links:.1f}", f"{s.score:.1f}", f"{s.prompts:.1f}",
            f"{s.decode:.1f}", f"{s.tail:.1f}", f"{s.copy:.2f}", f"{s.host:.2f}", f"{s.checkpoint:.2f}",
            f"{s.total:.0f}", f"{first.total * first.chips / s.total / s.chips:.2f}", s.slowest] for s in steps]
  print(f"a trajectory's pictures: {picture_s:.3f} s of a core")
  print(timing.table(header, shown))
  print(timing.last_line({"chip": args.chip, "picture_s": picture_s,
                          "rows": [dataclasses.asdict(s) | {"total": s.total, "slowest": s.slowest} for s in steps]}))


if __name__ == "__main__":
  main()
