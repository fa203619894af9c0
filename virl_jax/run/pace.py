"""How fast a run is on its devices: tokens per second, and model FLOPs utilisation.

`work` counts on the host what a step's trajectories hold; `metrics` is computed from that, from the step's seconds, and
from `costs.flops`.  All of these are in a line of metrics.jsonl, so that the metrics can be computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math

import jax

from virl_jax import config as config_lib
from virl_jax import types
from virl_jax.learner import pooled
from virl_jax.model import family
from virl_jax.run import costs
from virl_jax.run import memory
from virl_jax.run import topologies

PHASES = ("checkpoint", "data", "weights", "rollout", "score", "update")  # time/*_s of a step, one after the other


@dataclasses.dataclass(frozen=True)
class Learner:
  """What turns a step's trajectories into operations.

  Attributes:
    model: shapes.
    passes: matrix products that a step's score and updates need for each token, in forward passes.
    vision_passes: `passes` for each patch.
    devices: how many there are, in all processes.
    peak_flops: dense bfloat16 operations a second of each device; None if that is not known.
  """

  model: family.Config
  passes: float
  vision_passes: float
  devices: int
  peak_flops: float | None


def learner(c: config_lib.ConfigDict, model: family.Config, devices: Sequence[jax.Device]) -> Learner:
  """What a run's steps take.

  Args:
    c: the configuration.
    model: shapes, and what is trained.
    devices: all there are.

  Source: ours, from what `learner.step` does, with nothing computed twice.  Scoring is a forward pass, unless the only
  update makes it, and another one of the reference for the KL term.
  """
  alone = c.ppo.minibatches * c.ppo.epochs == 1 and c.advantage.kind != "gae" and not c.loss.kl_in_reward
  scored = (not alone) + (c.loss.kl_coef > 0)
  text, vision = costs.update_passes(model.tuning)
  return Learner(model, scored + c.ppo.epochs * text, scored + c.ppo.epochs * vision, len(devices),
                 c.log.peak_flops or topologies.peak_flops(devices[0].device_kind))


def work(parts: Sequence[Sequence[types.Trajectory]]) -> pooled.Metrics:
  """What this process's trajectories of a step hold, without padding; to be pooled with the other processes'.

  Args:
    parts: the trajectories of each minibatch.

  Returns:
    tokens/total: tokens of prompts (placeholders of images included), of sampled turns and of tool turns.
    tokens/context: how many tokens each of them sees, itself included, on average: n (n + 1) / 2 of n tokens.
    patches/total: patches of the images; an image that a minibatch shows several times, as a group's, counts once.
    patches/of_image: how many patches a patch's image has, on average over patches.
  """
  lengths = [len(t.prompt_ids) + sum(len(turn.ids) for turn in t.turns) for part in parts for t in part]
  images = [{id(image): math.prod(image.grid_hw) for t in part for image in t.images} for part in parts]
  sizes = [patches for part in images for patches in part.values()]
  tokens, patches = sum(lengths), sum(sizes)
  return {"tokens/total": pooled.Sum(tokens),
          "tokens/context": pooled.Ratio(sum(n * (n + 1) // 2 for n in lengths), tokens),
          "patches/total": pooled.Sum(patches),
          "patches/of_image": pooled.Ratio(sum(n * n for n in sizes), patches)}


def device_memory(devices: Sequence[jax.Device]) -> pooled.Metrics:
  """memory/device_peak_gib: the most that the fullest of these devices has held since this process began, GiB.

  Left out where a device does not report it, as a CPU does not.
  """
  peak = memory.peak_gib(devices)
  return {} if peak is None else {"memory/device_peak_gib": pooled.Max(peak)}


def metrics(line: Mapping[str, float], of: Learner) -> dict[str, float]:
  """How fast a step was.

  Args:
    line: a step's metrics: its seconds by phase (time/*_s), and what `work` counts, of all processes.
    of: what it ran on, and what it takes.

  Returns:
    speed/tokens_s: tokens/total over the seconds of the whole step, from the end of the one before it: saving, data,
      weights, rollout, score and update.  It counts the time that dynamic sampling spends on trajectories that it
      drops, but not their tokens.
    speed/tokens_s_device: speed/tokens_s over the number of devices.
    speed/mfu: model FLOPs utilisation of score and update, see `mfu`; left out where the peak is not known.
  """
  seconds = sum(line.get(f"time/{phase}_s", 0.0) for phase in PHASES)
  rate = line["tokens/total"] / max(seconds, 1e-9)
  found = {"speed/tokens_s": rate, "speed/tokens_s_device": rate / of.devices}
  if of.peak_flops is not None:
    found["speed/mfu"] = mfu(line, of)
  return found


def operations(line: Mapping[str, float], of: Learner) -> float:
  """Floating-point operations that a step's score and updates need, on all devices together.

  Counted are real tokens and patches once each: no padding, nothing that is recomputed to save memory, no image twice
  because several devices encode it.  Logits are counted for every token, as they are computed.

  Args:
    line: what `work` counts, of all processes.
    of: model and passes.

  Source: `costs.flops`.
  """
  tokens = line["tokens/total"]
  return costs.flops(of.model, costs.Work(tokens, line["tokens/context"], tokens, line["patches/total"],
                                          line["patches/of_image"], of.passes, of.vision_passes))


def mfu(line: Mapping[str, float], of: Learner) -> float:
  """Model FLOPs utilisation of the learner: operations needed, over those that the devices could do in the same time.

      mfu = operations / ((time/score_s + time/update_s) * devices * peak_flops)

  Args:
    line: time/score_s and time/update_s, seconds, and what `work` counts, of all processes.
    of: the learner; its peak must be known.

  Source: PaLM (arXiv 2204.02311), appendix B: observed throughput over the peak's, recomputation not counted.
  """
  seconds = line["time/score_s"] + line["time/update_s"]
  return operations(line, of) / (max(seconds, 1e-9) * of.devices * of.peak_flops)
