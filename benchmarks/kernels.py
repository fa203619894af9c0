"""The reward, credit and advantage kernels, against NumPy loops and torch; and their share of a training step.

    python benchmarks/kernels.py --peer=torch
    python benchmarks/kernels.py --step    # what share of a training step of the bench model they are

4,096 trajectories of 6 actions and 4 targets each, rows of 16,384 tokens, groups of 8.  All sides compute the
rewards of the actions, their classes, the group-relative advantage and an advantage for each token, and must agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import policy as policy_bench  # of this folder
import timing  # of this folder

from virl_jax.model import params as params_lib
from virl_jax.model import sharding
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.rl import advantage
from virl_jax.rl import credit
from virl_jax.rl import judge
from virl_jax.rl import reward
from virl_jax.run import memory

REWARD, CREDIT, ADVANTAGE = reward.Config(), credit.Config(), advantage.Config()


def draw(rows: int, actions: int, targets: int, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
  """Boxes that often hit, some of them masked; each action of a row has a run of tokens, one after the other."""
  rng = np.random.default_rng(seed)

  def boxes(n):
    corner, side = rng.uniform(0, 300, (rows, n, 2)), rng.uniform(60, 200, (rows, n, 2))
    return np.concatenate([corner, corner + side], -1).astype(np.float32)

  gt = boxes(targets)
  looked = gt[np.arange(rows)[:, None], rng.integers(0, targets, (rows, actions))]
  box = np.where(rng.random((rows, actions, 1)) < 0.6, looked + rng.normal(0, 15, looked.shape), boxes(actions))
  count = rng.integers(0, actions + 1, rows)
  length = tokens // (actions + 2)
  action = np.arange(tokens) // length - 1  # a prompt, the actions, an answer
  action = np.where((action >= 0) & (action < count[:, None]), action, -1).astype(np.int32)
  return {"box": box.astype(np.float32), "box_mask": np.arange(actions) < count[:, None], "gt": gt,
          "gt_mask": np.arange(targets) < rng.integers(1, targets + 1, rows)[:, None],
          "answer": (rng.random(rows) < 0.5).astype(np.float32), "action": action,
          "sampled": np.broadcast_to(np.arange(tokens) >= length, (rows, tokens)).copy()}


@functools.partial(jax.jit, static_argnames="group")
def ours(d: dict, group: int):
  """This project's kernels, combined as in `learner.step.score`."""
  cfg = judge.Config(group, REWARD, CREDIT, ADVANTAGE)
  looks = judge.looks((d["box"], d["box_mask"], d["gt"], d["gt_mask"]), REWARD)
  total = judge.rewards(looks, d["answer"], jnp.ones_like(d["answer"]), REWARD)
  tokens = d["action"], d["sampled"], jnp.ones(total.shape, bool), cfg
  return total, judge.credits(looks, judge.returns(looks, total, *tokens), *tokens).advantage_BT


def _iou(a, b):
  w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
  if w <= 0 or h <= 0:
    return 0.0
  return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def loops(d: dict, group: int):
  """One action after the other, one run of tokens after the other: what a first version looks like."""
  rows, actions = d["box_mask"].shape
  total, classes = np.zeros(rows), np.full((rows, actions), credit.NONE)
  for b in range(rows):
    best, earned = [-1.0] * len(d["gt"][b]), []
    for k in range(actions):
      if not d["box_mask"][b, k]:
        continue
      ious = [_iou(d["box"][b, k].tolist(), g.tolist()) if ok else -1.0 for g, ok in zip(d["gt"][b], d["gt_mask"][b])]
      j = int(np.argmax(ious))
      value = ious[j]
      hits = [i for i, v in enumerate(ious) if v >= REWARD.h0]
      again = bool(hits) and all(best[i] >= REWARD.h0 and ious[i] <= best[i] + REWARD.refine_margin for i in hits)
      earned.append((1 if hits else -1) + REWARD.lam * max(0.0, value - max(best[j], 0.0)) - REWARD.rho * again)
      classes[b, k] = credit.REDUNDANT if again else credit.CORRECT if hits else credit.ERRONEOUS
      best = list(map(max, best, ious))
    mean = np.mean(earned) if earned else REWARD.no_action
    total[b] = REWARD.w_answer * d["answer"][b] + REWARD.w_format + REWARD.w_fidelity * mean
  table = {1: (CREDIT.h_good, CREDIT.h_redundant, CREDIT.h_bad),
           -1: (CREDIT.h_bad, 2 - CREDIT.h_redundant, CREDIT.h_good)}
  out = np.zeros(d["action"].shape, np.float32)
  for start in range(0, rows, group):
    mine = total[start:start + group]
    for b in range(start, start + group):
      adv = (total[b] - mine.mean()) / np.sqrt(max(mine.var(), ADVANTAGE.std_floor ** 2) + 1e-12)
      out[b] = adv
      for k in range(actions):
        if classes[b, k] != credit.NONE and adv:
          out[b, d["action"][b] == k] = adv * table[int(np.sign(adv))][classes[b, k]]
      out[b, ~d["sampled"][b]] = 0
  return total, out


class Torch:
  """The same in torch: vectorised over rows, a loop over actions."""

  def __init__(self, d: dict, group: int):
    import os

    import torch
    torch.set_num_threads(os.cpu_count())
    self.torch, self.group = torch, group
    self.d = {k: torch.tensor(v) for k, v in d.items()}

  def run(self):
    torch, d = self.torch, self.d
    with torch.inference_mode():
      low = torch.maximum(d["box"][:, :, None, :2], d["gt"][:, None, :, :2])
      high = torch.minimum(d["box"][:, :, None, 2:], d["gt"][:, None, :, 2:])
      shared = (high - low).clamp(min=0).prod(-1)
      area = lambda x: (x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1)
      iou = shared / (area(d["box"])[:, :, None] + area(d["gt"])[:, None] - shared)
      iou = torch.where(d["gt_mask"][:, None], iou, -1.0)
      rows, actions = d["box_mask"].shape
      best, earned = torch.full(d["gt_mask"].shape, -1.0), torch.zeros(rows)
      classes = torch.full((rows, actions), 3)
      for k in range(actions):
        value, j = iou[:, k].max(-1, keepdim=True)
        before, judged = best.gather(1, j), d["box_mask"][:, k, None]
        correct, score = judged & (value >= REWARD.h0), iou[:, k]
        stale = (best >= REWARD.h0) & (score <= best + REWARD.refine_margin)
        again = correct & ((score < REWARD.h0) | stale).all(-1, keepdim=True)
        r = (torch.where(correct, 1.0, -1.0) + REWARD.lam * (value - before.clamp(min=0)).clamp(min=0)
             - REWARD.rho * again.float())
        earned += torch.where(judged, r, 0.0)[:, 0]
        kind = torch.where(again, 1, torch.where(correct, 0, 2))
        classes[:, k] = torch.where(judged, kind, 3)[:, 0]
        best = torch.where(judged, torch.maximum(best, score), best)
      count = d["box_mask"].sum(-1)
      mean = torch.where(count > 0, earned / count.clamp(min=1), REWARD.no_action)
      total = REWARD.w_answer * d["answer"] + REWARD.w_format + REWARD.w_fidelity * mean
      grouped = total.reshape(-1, self.group)
      centred = grouped - grouped.mean(-1, keepdim=True)
      var = centred.square().mean(-1, keepdim=True).clamp(min=ADVANTAGE.std_floor ** 2)
      adv = (centred / (var + 1e-12).sqrt()).reshape(-1)
      praise = torch.tensor([CREDIT.h_good, CREDIT.h_redundant, CREDIT.h_bad, 1.0])
      blame = torch.tensor([CREDIT.h_bad, 2 - CREDIT.h_redundant, CREDIT.h_good, 1.0])
      m = torch.where(adv[:, None] > 0, praise[classes], torch.where(adv[:, None] < 0, blame[classes], 1.0))
      m = torch.cat([m, torch.ones(rows, 1)], 1)
      at = torch.where(d["action"] < 0, actions, d["action"]).long()
      self.out = total, torch.where(d["sampled"], adv[:, None] * m.gather(1, at), 0.0)


def seconds_a_token(repeat: int) -> float:
  """Seconds a token of the bench model's training step (forward, backward, AdamW): 8 rows of 128 tokens, images too."""
  cfg = dataclasses.replace(policy_bench.BENCH, platform=sharding.platform(jax.devices()[0]))
  params = jax.jit(lambda key: params_lib.init(qwen.specs(cfg), key, jnp.float32))(jax.random.key(0))
  side = policy_bench.Ours(cfg, params, policy_bench.inputs(cfg, 8, 128, 224), 1)
  return timing.median(timing.interleaved({"": side.train}, repeat)[""]) / (8 * 128)


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--peer", choices=["none", "torch"], default="none")
  p.add_argument("--rows", type=int, default=4096)
  p.add_argument("--actions", type=int, default=6)
  p.add_argument("--targets", type=int, default=4)
  p.add_argument("--tokens", type=int, default=16384)
  p.add_argument("--group", type=int, default=8)
  p.add_argument("--step", action="store_true", help="time a training step of the bench model, too, on fewer tokens")
  p.add_argument("--repeat", type=int, default=5)
  args = p.parse_args()
  memory.keep_when_on_cpu()
  host = draw(args.rows, args.actions, args.targets, args.tokens)
  placed, found = jax.device_put(host), {}
  sides = {"ours": lambda: found.update(ours=jax.block_until_ready(ours(placed, args.group))),
           "NumPy loops": lambda: found.update(loops=loops(host, args.group))}
  if args.peer == "torch":
    peer = Torch(host, args.group)
    sides["torch"] = peer.run
  seconds = timing.interleaved(sides, args.repeat)
  others = {"NumPy loops": found["loops"]} | ({"torch": peer.out} if args.peer == "torch" else {})
  apart = {name: max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(found["ours"], other))
           for name, other in others.items()}
  base = timing.median(seconds["ours"])
  table = [[name, timing.spread(seconds[name]), f"{timing.median(seconds[name]) / base:.1f}",
            f"{apart[name]:.1g}" if name in apart else ""] for name in sides]
  print(timing.table(["", "s", "times ours", "largest difference"], table) + "\n")
  figures = {name: timing.median(seconds[name]) for name in sides} | {"largest_difference": apart}
  if args.step:
    a_token = seconds_a_token(args.repeat)
    figures["step_s_a_token"], figures["share_of_step"] = a_token, base / (a_token * args.rows * args.tokens)
    print(f"a training step of the bench model takes {a_token * 1e6:.0f} us a token; the kernels, for as many tokens "
          f"as here, {100 * figures['share_of_step']:.2g} % of it\n")
  print(timing.last_line(vars(args) | {"seconds": figures}, ("torch",) if args.peer == "torch" else ()))


if __name__ == "__main__":
  main()
