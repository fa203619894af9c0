"""The kernels of virl_jax.rl again, as slow loops in float64: what tests compare them with.

Written from the formulas of the docstrings, one action, one token, one group after another.  Everything is
lists and numbers; only the configurations are shared with the kernels.
"""

from __future__ import annotations

import math

import numpy as np

from virl_jax.rl import advantage as advantage_lib
from virl_jax.rl import credit


def overlap(a, b, mode: str) -> float:
  """One pair of boxes, by the table of `reward.overlap`."""
  a, b = ([float(v) for v in box] for box in (a, b))
  area = lambda x: max(0.0, x[2] - x[0]) * max(0.0, x[3] - x[1])
  if not area(a) or not area(b):
    return -1.0 if mode == "giou" else 0.0
  shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
  union = area(a) + area(b) - shared
  w, h = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
  if mode == "centre":
    dx, dy = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    return 1 - (dx * dx + dy * dy) / (w * w + h * h)
  return {"iou": shared / union, "giou": shared / union - (w * h - union) / (w * h), "coverage": shared / area(b),
          "tightness": shared / area(a)}[mode]


def pool(rewards, cfg) -> float:
  """`reward.pool`."""
  if not len(rewards):
    return 0.0
  return {"mean": sum(rewards) / len(rewards), "sum": sum(rewards), "best": max(rewards),
          "discounted": sum(cfg.discount ** k * r for k, r in enumerate(rewards))}[cfg.average]


def fidelity(boxes, box_mask, targets, gt_mask, cfg, h0=None) -> dict:
  """`reward.fidelity` by the formulas of the module docstring; keys as the fields of `reward.Fidelity`."""
  h0 = cfg.h0 if h0 is None else h0
  live = [j for j in range(len(targets)) if gt_mask[j]]
  rows, best = [], {}  # best: the best score so far of each target that has one
  for box, is_action in zip(boxes, box_mask):
    if not is_action or not live:
      rows.append((0.0, 0.0, 0.0, -1, False, False))
      continue
    scores = {j: overlap(box, targets[j], cfg.mode) for j in live}
    target = max(live, key=lambda j: (scores[j], -j))
    value = scores[target]
    hits = [j for j in live if scores[j] >= h0]
    news = [j for j in hits if best.get(j, -math.inf) < h0 or scores[j] > best[j] + cfg.refine_margin]
    redundant = bool(hits) and not news
    r = (cfg.w_sign * (1 if hits else -1) + cfg.lam * max(0.0, value - max(0.0, best.get(target, 0.0)))
         - (cfg.rho if redundant else 0))
    rows.append((r, max(overlap(box, targets[j], "iou") for j in live), value, target, redundant, bool(hits)))
    best = {j: max(scores[j], best.get(j, -math.inf)) for j in live}
  names = "reward_R", "iou_R", "score_R", "target_R", "redundant_R", "correct_R"
  found = dict(zip(names, (np.array(c) for c in zip(*rows)))) if rows else {n: np.zeros(0) for n in names}
  covered = sum(value >= h0 for value in best.values()) / len(live) if live else 0.0
  earned = [row[0] for row, is_action in zip(rows, box_mask) if is_action]
  mean = (pool(earned, cfg) + cfg.w_cover * covered if earned else cfg.no_action) if live else 0.0
  return found | {"mean": mean, "covered": covered}


def place(total, fid: dict, action, sampled, cfg) -> np.ndarray:
  """`reward.place`, an action at a time."""
  out = np.zeros(len(action))
  written = [t for t in range(len(action)) if sampled[t]]
  if not written:
    return out
  judged = [k for k in range(len(fid["target_R"])) if fid["target_R"][k] >= 0]
  for k in judged if cfg.average == "mean" else ():
    mine = [t for t in written if action[t] == k]
    if mine:
      share = cfg.w_fidelity * float(fid["reward_R"][k]) / len(judged)
      out[mine[-1]] += share
      total = total - share
  out[written[-1]] += total
  return out


def modulator(classes, advantage, cfg, margins) -> np.ndarray:
  """`credit.modulator`, by the table of the module docstring."""
  out = np.ones(len(classes))
  for k, c in enumerate(classes):
    if c == credit.NONE or advantage == 0 or cfg.kind in ("none", "additive"):
      continue
    praised = advantage > 0 or not cfg.mirror
    if cfg.kind == "hard":
      good, again, bad = ((cfg.h_good, cfg.h_redundant, cfg.h_bad) if praised else
                          (cfg.h_bad, 2 - cfg.h_redundant, cfg.h_good))
      out[k] = {credit.CORRECT: good, credit.REDUNDANT: again, credit.ERRONEOUS: bad}[c]
    else:
      up = 1 / (1 + math.exp(-float(margins[k]) / cfg.softness))
      good = cfg.h_bad + (cfg.h_good - cfg.h_bad) * (up if praised else 1 - up)
      if c == credit.REDUNDANT:
        good = min(good, cfg.h_redundant) if praised else max(good, 2 - cfg.h_redundant)
      out[k] = good
  return out


def token_advantages(advantage, modulators, action, sampled, steps=None) -> np.ndarray:
  """`credit.token_advantages`, a token at a time."""
  out = np.zeros(len(action))
  for t, k in enumerate(action):
    if sampled[t]:
      own = float(advantage if np.ndim(advantage) == 0 else advantage[t])
      out[t] = own * (float(modulators[k]) if k >= 0 else 1.0)
      out[t] += float(steps[k]) if k >= 0 and steps is not None else 0.0
  return out


def sizes(advantage, plain, mask) -> np.ndarray:
  """`credit.sizes`."""
  return np.array([sum(abs(float(v)) for v, m in zip(x.ravel(), mask.ravel()) if m) for x in (advantage, plain)])


def keep_scale(advantage, sizes) -> np.ndarray:
  """`credit.keep_scale`."""
  now, wanted = map(float, sizes)
  return np.asarray(advantage, np.float64) * (wanted / now if now else 1.0)


def moments(values, mask) -> advantage_lib.Moments:
  """`advantage.moments`."""
  seen = [float(v) for v, m in zip(values.ravel(), mask.ravel()) if m]
  return advantage_lib.Moments(len(seen), np.mean(seen) if seen else 0.0, len(seen) * np.var(seen) if seen else 0.0)


def standardize(values, mask, divide: bool, floor: float = 0.0) -> np.ndarray:
  """`advantage.standardize`."""
  out, seen = np.zeros(len(values)), [float(v) for v, m in zip(values, mask) if m]
  for i, v in enumerate(values):
    if mask[i]:
      out[i] = (float(v) - np.mean(seen)) / (math.sqrt(max(np.var(seen), floor ** 2) + 1e-12) if divide else 1.0)
  return out


def relative(rewards, group_size: int, cfg, mask) -> np.ndarray:
  """`advantage.relative`, a group at a time."""
  if cfg.kind == "batch":
    return standardize(rewards, mask, True, cfg.std_floor)
  out = np.zeros(len(rewards))
  for start in range(0, len(rewards), group_size):
    rows = slice(start, start + group_size)
    if cfg.kind == "group":
      out[rows] = standardize(rewards[rows], mask[rows], cfg.normalize_std, cfg.std_floor)
      continue
    seen = [i for i in range(start, start + group_size) if mask[i]]
    for i in seen if len(seen) > 1 else ():
      out[i] = float(rewards[i]) - np.mean([float(rewards[j]) for j in seen if j != i])
  return out


def steps(rewards, mask, group_size: int, floor: float = 0.0) -> np.ndarray:
  """`advantage.steps`, a group at a time."""
  out = np.zeros(rewards.shape)
  for start in range(0, len(rewards), group_size):
    rows = slice(start, start + group_size)
    out[rows] = standardize(rewards[rows].ravel(), mask[rows].ravel(), True, floor).reshape(out[rows].shape)
  return out


def informative(rewards, group_size: int, mask, least: float = 0.0) -> list[bool]:
  """`advantage.informative`."""
  out = []
  for i in range(len(rewards)):
    start = i // group_size * group_size
    seen = [float(rewards[j]) for j in range(start, start + group_size) if mask[j]]
    out.append(bool(seen) and max(seen) - min(seen) > least)
  return out


def gae(rewards, values, mask, cfg) -> tuple[np.ndarray, np.ndarray]:
  """`advantage.gae` by its definition: the discounted sum of all later one-step errors."""
  at = [t for t in range(len(rewards)) if mask[t]]
  errors = [float(rewards[t]) + cfg.gamma * (float(values[at[i + 1]]) if i + 1 < len(at) else 0.0) - float(values[t])
            for i, t in enumerate(at)]
  out, returns = np.zeros(len(rewards)), np.zeros(len(rewards))
  for i, t in enumerate(at):
    out[t] = sum((cfg.gamma * cfg.lam) ** n * e for n, e in enumerate(errors[i:]))
    returns[t] = out[t] + float(values[t])
  return out, returns


def aggregate(x, mask, cfg) -> float:
  """`loss.aggregate`, a row at a time."""
  rows = [[float(v) for v, m in zip(r, k) if m] for r, k in zip(x, mask)]
  rows = [r for r in rows if r]
  if not rows:
    return 0.0
  if cfg.aggregate == "token":
    return float(np.mean(sum(rows, [])))
  return float(np.mean([sum(r) / (len(r) if cfg.aggregate == "sequence" else cfg.norm_tokens) for r in rows]))


def log_ratio(logp, old, mask, cfg) -> np.ndarray:
  """`loss.log_ratio` on what the mask shows, 0 elsewhere."""
  out = np.zeros(logp.shape)
  for b in range(len(logp)):
    at = np.flatnonzero(mask[b])
    for t in at:
      out[b, t] = float(logp[b, t]) - float(old[b, t])
    if cfg.kind == "gspo" and len(at):
      out[b, at] = out[b, at].mean()
  return out


def surrogate(logp, old, advantage, mask, cfg) -> tuple[np.ndarray, np.ndarray]:
  """`loss.surrogate` on what the mask shows, 0 and False elsewhere."""
  gaps, out, clipped = log_ratio(logp, old, mask, cfg), np.zeros(logp.shape), np.zeros(logp.shape, bool)
  for index in zip(*np.nonzero(mask)):
    r, a = math.exp(gaps[index]), float(advantage[index])
    held = min(max(r, 1 - cfg.clip_low), 1 + cfg.clip_high)
    if cfg.kind == "cispo":
      out[index], clipped[index] = -held * a * float(logp[index]), held != r
      continue
    gain = min(r * a, held * a)
    clipped[index] = held * a < r * a
    if cfg.dual_clip and a < 0 and gain < cfg.dual_clip * a:
      gain, clipped[index] = cfg.dual_clip * a, True
    out[index] = -gain
  return out, clipped


def kl(logp: float, ref: float, estimator: str) -> float:
  """`loss.kl` of one token."""
  gap = float(ref) - float(logp)
  return {"k1": -gap, "k2": gap * gap / 2, "k3": min(math.exp(gap) - gap - 1, 10.0)}[estimator]


def sampler_weight(old: float, sampler: float, cfg) -> float:
  """`loss.sampler_weight` of one token."""
  return min(math.exp(float(old) - float(sampler)), cfg.sampler_cap) if cfg.sampler_cap else 1.0


def next_kl_coef(coef, kl_mean, rows: int, cfg) -> float:
  """`loss.next_kl_coef`."""
  if not cfg.kl_target:
    return float(coef)
  error = min(max(float(kl_mean) / cfg.kl_target - 1, -0.2), 0.2)
  return float(coef) * (1 + error * rows / cfg.kl_horizon)


def value_loss(value, old, returns, mask, cfg) -> tuple[float, dict]:
  """`loss.value_loss`, a token at a time."""
  errors, clipped, seen, left = [], [], [], []
  for index in zip(*np.nonzero(mask)):
    v, o, r = (float(x[index]) for x in (value, old, returns))
    free = (v - r) ** 2
    held = (o + min(max(v - o, -cfg.value_clip), cfg.value_clip) - r) ** 2 if cfg.value_clip else free
    errors.append(max(free, held))
    clipped.append(held > free)
    seen.append(r)
    left.append(r - v)
  mean = lambda x: float(np.mean(x)) if x else 0.0
  spread = float(np.var(seen)) if seen else 0.0
  found = 0.5 * mean(errors)
  return found, {"critic/loss": found, "critic/clip_frac": mean(clipped),
                 "critic/return_var": spread, "critic/explained": 1 - float(np.var(left)) / spread if spread else 0.0}


def policy_loss(logp, old, ref, entropy, advantage, mask, cfg, sampler=None, kl_coef=None) -> tuple[float, dict]:
  """`loss.policy_loss`, a token at a time."""
  each, clipped = surrogate(logp, old, advantage, mask, cfg)
  zeros = lambda: np.zeros(logp.shape)
  weighted, kls, back, ratios = zeros(), zeros(), zeros(), zeros()
  gaps = log_ratio(logp, old, mask, cfg)
  for index in zip(*np.nonzero(mask)):
    weighted[index] = each[index] * (sampler_weight(old[index], sampler[index], cfg) if cfg.sampler_cap else 1.0)
    kls[index] = kl(logp[index], ref[index], cfg.kl_estimator)
    back[index] = kl(old[index], logp[index], "k3")
    ratios[index] = math.exp(gaps[index])
  mean = lambda x: float(np.asarray(x, np.float64)[mask].mean()) if mask.any() else 0.0
  policy = aggregate(weighted, mask, cfg)
  coef = 0.0 if cfg.kl_in_reward else cfg.kl_coef if kl_coef is None else float(kl_coef)
  total = policy + coef * aggregate(kls, mask, cfg) - cfg.entropy_coef * aggregate(entropy, mask, cfg)
  return total, {"loss/total": total, "loss/policy": policy, "loss/kl": mean(kls), "loss/entropy": mean(entropy),
                 "ppo/clip_frac": mean(clipped), "ppo/kl_old": mean(back),
                 "ppo/ratio_max": float(ratios.max(initial=0.0))}
