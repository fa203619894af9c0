"""Rollouts of several rounds, here and in two loops over transformers, by a script that all sides follow.

    python benchmarks/rollout.py --peer=transformers     # trajectories a second, against both loops
    python benchmarks/rollout.py --scale                 # against group size, rounds, slots and crop size
    python benchmarks/rollout.py --size=7b --dtype=bfloat16 --repeat=2                         # on an accelerator

The script is drawn from a seed: 8 prompts x 8 samples, a 448 px first image, 1 to 6 rounds of 16 to 64 tokens, and a
crop of 112 to 224 px between two rounds.  The script says when a row stops; the model decides which tokens are
written, greedily, so that the sides can be compared id for id.  The peers run all rows of a batch in lock-step, and
drop rows whose script has ended at the end of each round:
    reprefill  gives the whole conversation with all its images to the model again in each round,
    continue   keeps past_key_values and gives only what is new.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import policy as policy_bench  # of this folder
import timing  # of this folder

from virl_jax import types
from virl_jax.model import params as params_lib
from virl_jax.model import patches
from virl_jax.model import rope
from virl_jax.model import sharding
from virl_jax.model import weights
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.rollout import engine
from virl_jax.rollout import row as row_lib
from virl_jax.rollout import slots as slots_lib
from virl_jax.rollout import turns
from virl_jax.run import memory

WORDS_IN_PROMPT, WORDS_IN_REPLY = 30, 14


@dataclasses.dataclass(frozen=True)
class Script:
  """One trajectory: its prompt and, for each round, how much is written and what comes back.

  Attributes:
    prompt: ids, and the shown image.
    lengths: tokens of each round.
    replies: ids and image that come back after each round but the last.
  """

  prompt: tuple[np.ndarray, types.ImageInput]
  lengths: tuple[int, ...]
  replies: tuple[tuple[np.ndarray, types.ImageInput], ...]


def draw(cfg: qwen.Config, prompts: int, group: int, rounds: tuple[int, int], tokens: tuple[int, int], first_px: int,
         crop_px: tuple[int, int], seed: int = 0, pixels: bool = False) -> list[Script]:
  """Draws the workload, with rows of one group next to each other.

  Args:
    cfg: for the ids of placeholders and the grid of patches.
    prompts, group: how many prompts, and trajectories of each.
    rounds, tokens, crop_px: fewest and most rounds of a trajectory, tokens of a round, and pixels of a crop's side.
    first_px: side of the shown image.
    seed: of the draw.
    pixels: whether images are bytes, as in this project, or float numbers, which transformers takes, too.
  """
  rng, grid = np.random.default_rng(seed), cfg.vision.grid

  def picture(h, w):
    shape = (h // grid.patch, w // grid.patch)
    P = shape[0] * shape[1]
    patches_PC = rng.integers(0, 256, (P, grid.bytes), np.uint8) if pixels else (
        rng.standard_normal((P, grid.values), np.float32))
    return types.ImageInput(patches_PC, shape, types.Box(0, 0, w, h))

  def around(image, words):
    cells = image.grid_hw[0] * image.grid_hw[1] // grid.merge ** 2
    before, after = np.split(rng.integers(10, min(7000, *cfg.banned), words), [words // 2])
    ids = [before, [cfg.vision_start], [cfg.image_token] * cells, [cfg.vision_end], after]
    return np.concatenate(ids).astype(np.int32)

  scripts = []
  for _ in range(prompts):
    shown = picture(first_px, first_px)
    prompt = around(shown, WORDS_IN_PROMPT), shown
    for _ in range(group):
      n = int(rng.integers(rounds[0], rounds[1] + 1))
      side = lambda: int(rng.integers(crop_px[0] // grid.factor, crop_px[1] // grid.factor + 1)) * grid.factor
      crops = [picture(side(), side()) for _ in range(n - 1)]
      scripts.append(Script(prompt, tuple(rng.integers(tokens[0], tokens[1] + 1, n).tolist()),
                            tuple((around(c, WORDS_IN_REPLY), c) for c in crops)))
  return scripts


def many_sizes(slots: int, segment: int, serve: float) -> slots_lib.Config:
  """An engine that pads little and compiles many programs to do so."""
  return slots_lib.Config(slots=slots, segment_tokens=segment, serve_share=serve, threads=1, pad_tokens=32,
                          decode_ratio=1.25, append_ratio=2.0, token_steps=4)


class Ours:
  """This project's engine, playing the script."""

  def __init__(self, cfg: qwen.Config, params, scripts: list[Script], group: int, engine_cfg: slots_lib.Config):
    self.params, self.scripts, self.group = params, scripts, group
    longest = max(map(tokens_of, scripts))
    model = dataclasses.replace(cfg, eos=(), platform=sharding.platform(jax.devices()[0]))  # the script ends turns
    self.policy = turns.Policy(model, None, None, None, turns.Config(max_total_tokens=longest),
                               sharding.make(devices=jax.devices()[:1]), engine_cfg)
    self.tasks = [types.Task(str(i), b"", "") for i in range(len(scripts) // group)]

  def run(self):
    trajectories, self.stats = engine.run(self.policy, self.params, self.tasks, jax.random.key(0), self.group, 0.0,
                                          self)
    self.ids = [t.ids for t in trajectories]

  def begin(self, policy, task):
    ids, shown = self.scripts[int(task.uid) * self.group].prompt
    return row_lib.prompt(policy.model, task, None, ids, shown)

  def left(self, policy, row):
    return self.scripts[row.traj.index].lengths[row.turn] - row.said

  def hear(self, policy, row, ids, logp):
    row.hear(ids, logp)
    return not self.left(policy, row)

  def read(self, policy, row):
    (ids, logp), script = row.take(), self.scripts[row.traj.index]
    row.traj.turns.append(types.Turn("assistant", ids, logp))
    if row.turn == len(script.replies):
      row.traj.stop = types.StopReason.ANSWERED
      return None
    heard, crop = script.replies[row.turn]
    row.traj.turns.append(types.Turn("tool", heard))
    row.turn += 1
    return row_lib.reply(policy.model, heard, crop, row.filled + len(ids), row.next_pos + len(ids))


def tokens_of(script: Script) -> int:
  """How many tokens the whole trajectory has."""
  return len(script.prompt[0]) + sum(script.lengths) + sum(len(ids) for ids, _ in script.replies)


class Transformers:
  """Lock-step loops over transformers' own model, in torch, with its fastest attention."""

  def __init__(self, cfg: qwen.Config, params, scripts: list[Script], batch: int):
    import torch
    import transformers
    torch.set_num_threads(os.cpu_count())
    self.torch, self.cfg, self.scripts, self.batch = torch, cfg, scripts, batch
    with tempfile.TemporaryDirectory() as folder:
      weights.save_hf(f"{folder}/hf", cfg, params, "float32")
      self.model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
          f"{folder}/hf", dtype=torch.float32, attn_implementation="sdpa").eval()
    self.ban = torch.zeros(cfg.text.vocab)
    self.ban[list(cfg.banned)] = -torch.inf

  def reprefill(self):
    self._run(keep=False)

  def go_on(self):
    self._run(keep=True)

  def _run(self, keep: bool):
    with self.torch.inference_mode():
      done = {}
      for at in range(0, len(self.scripts), self.batch):
        self._batch(range(at, min(at + self.batch, len(self.scripts))), keep, done)
    self.ids = [done[i] for i in range(len(self.scripts))]

  def _batch(self, rows, keep: bool, done: dict):
    """All rows of a batch, round by round.

    Rows share the cache's columns: a column for which a row has no token is masked in that row.
    """
    torch, grid = self.torch, self.cfg.vision.grid
    ids = {i: self.scripts[i].prompt[0] for i in rows}
    shots = {i: [self.scripts[i].prompt[1]] for i in rows}
    new = {i: (self.scripts[i].prompt[0], [self.scripts[i].prompt[1]]) for i in rows}
    next_pos = dict.fromkeys(rows, 0)
    live, cache, mask, turn = list(rows), None, torch.zeros(len(rows), 0, dtype=torch.long), 0
    while live:
      if not keep:
        cache, mask = None, torch.zeros(len(live), 0, dtype=torch.long)
        new, next_pos = {i: (ids[i], shots[i]) for i in live}, dict.fromkeys(live, 0)
      T = max(len(new[i][0]) for i in live)
      tokens, pos = np.zeros((len(live), T), np.int64), np.zeros((3, len(live), T), np.int64)
      here = np.zeros((len(live), T), np.int64)
      for b, i in enumerate(live):
        n = len(new[i][0])
        tokens[b, T - n:], here[b, T - n:] = new[i][0], 1
        grids = [patches.merged_hw(im, grid) for im in new[i][1]]
        pos[:, b, T - n:], next_pos[i] = rope.positions(new[i][0], self.cfg.image_token, grids, next_pos[i])
      pixels = [im for i in live for im in new[i][1]]
      mask = torch.cat([mask, torch.tensor(here)], 1)
      out = self.model(input_ids=torch.tensor(tokens), attention_mask=mask, position_ids=torch.tensor(pos),
                       past_key_values=cache, use_cache=True, logits_to_keep=1,
                       pixel_values=torch.tensor(np.concatenate([im.patches_PC for im in pixels])),
                       image_grid_thw=torch.tensor([(1, *im.grid_hw) for im in pixels]),
                       mm_token_type_ids=torch.tensor((tokens == self.cfg.image_token).astype(np.int32)))
      cache = out.past_key_values
      lengths = torch.tensor([self.scripts[i].lengths[turn] for i in live])
      said, at = [], torch.tensor([next_pos[i] for i in live])
      for t in range(int(lengths.max())):
        token = (out.logits[:, -1] + self.ban).argmax(-1)
        said.append(token)
        if t + 1 == int(lengths.max()) and not keep:
          break  # the next round starts over
        # A row that has ended its turn runs along, masked.
        mask = torch.cat([mask, (t < lengths).long()[:, None]], 1)
        out = self.model(input_ids=token[:, None], attention_mask=mask, past_key_values=cache, use_cache=True,
                         position_ids=(at + t)[None, :, None].expand(3, -1, 1))
      said = torch.stack(said, 1).numpy()
      going = []
      for b, i in enumerate(live):
        script, n = self.scripts[i], int(lengths[b])
        ids[i] = np.concatenate([ids[i], said[b, :n]])
        next_pos[i] += n
        if turn == len(script.replies):
          done[i] = ids[i]
          continue
        heard, crop = script.replies[turn]
        ids[i] = np.concatenate([ids[i], heard])
        shots[i] = shots[i] + [crop]
        new[i] = heard, [crop]
        going.append(b)
      if keep and len(going) < len(live):
        cache.batch_select_indices(torch.tensor(going, dtype=torch.long))
        mask = mask[going]
      live, turn = [live[b] for b in going], turn + 1


def compare(args, cfg, params):
  """Times ours against both loops, interleaved."""
  scripts = draw(cfg, args.prompts, args.group, (1, 6), (16, 64), 448, (112, 224))
  ours = Ours(cfg, params, scripts, args.group, many_sizes(args.slots, args.segment, args.serve))
  sides, peers = {"ours": ours.run}, {}
  if args.peer == "transformers":
    for batch in args.peer_batch:
      peer = Transformers(cfg, params, scripts, batch)
      for name, run in (("reprefill", peer.reprefill), ("continue", peer.go_on)):
        if name in args.loops:
          sides[f"{name}, batch {batch}"] = run
          peers[f"{name}, batch {batch}"] = peer
  written = sum(sum(s.lengths) for s in scripts)
  print(f"{len(scripts)} trajectories, {written:,} tokens written, "
        f"{sum(len(s.replies) for s in scripts)} crops; {params_lib.count(qwen.specs(cfg)):,} parameters", flush=True)
  # Each side's ids are kept right after it ran.
  seen = {}

  def watched(name, run):
    def once():
      run()
      seen[name] = (peers[name] if name in peers else ours).ids
      print(f"  {name} done", flush=True)
    return once

  found = timing.interleaved({name: watched(name, run) for name, run in sides.items()}, args.repeat)
  rows, figures = [], {}
  for name in sides:
    seconds = timing.median(found[name])
    same = float(np.mean([np.array_equal(a, b) for a, b in zip(seen[name], seen["ours"])]))
    ratio = seconds / timing.median(found["ours"])
    rows.append([name, timing.spread(found[name]), f"{len(scripts) / seconds:.2f}", f"{written / seconds:.0f}",
                 f"{ratio:.2f}", f"{100 * same:.0f} %", f"{found[name + '/first'][0]:.1f}"])
    figures[name] = {"s": seconds, "trajectories_s": len(scripts) / seconds, "times_slower_than_ours": ratio,
                     "same_trajectories": same, "first_s": found[f"{name}/first"][0]}
  header = ["", "s", "trajectories/s", "tokens/s", "ours is faster by", "same ids", "first run, s"]
  print("\n" + timing.table(header, rows))
  print("ours: " + ", ".join(f"{k} {v:.3g}" for k, v in ours.stats.metrics().items()) + "\n")
  return figures | {"ours_stats": dataclasses.asdict(ours.stats)}


def scale(args, cfg, params):
  """Trajectories a second against one setting at a time; the values of a sweep take turns."""
  base = {"group": 8, "rounds": 3, "slots": 16, "crop_px": 168}
  sweeps = {"group": (1, 2, 4, 8, 16), "rounds": (1, 2, 3, 4, 5, 6), "slots": (4, 8, 16, 32),
            "crop_px": (112, 168, 224)}
  table, figures = [], []
  for knob in args.sweeps:
    sides, scripts = {}, {}
    for value in sweeps[knob]:
      c = base | {knob: value}
      prompts, rounds, crop_px = max(1, 32 // c["group"]), (c["rounds"],) * 2, (c["crop_px"],) * 2
      scripts[value] = draw(cfg, prompts, c["group"], rounds, (32, 32), 448, crop_px)
      sides[value] = Ours(cfg, params, scripts[value], c["group"], many_sizes(c["slots"], args.segment, args.serve))
    found = timing.interleaved({value: side.run for value, side in sides.items()}, args.repeat)
    for value, side in sides.items():
      seconds, n, s = timing.median(found[value]), len(scripts[value]), side.stats
      table.append([f"{knob} {value}", n, timing.spread(found[value]), f"{n / seconds:.2f}", s.prompt_tokens,
                    s.appended_tokens, s.sampled_tokens])
      figures.append({"knob": knob, "value": value, "trajectories": n, "s": seconds, "trajectories_s": n / seconds,
                      "prompt_tokens": s.prompt_tokens, "appended_tokens": s.appended_tokens,
                      "sampled_tokens": s.sampled_tokens})
    print(f"  {knob} done", flush=True)
  header = ["", "trajectories", "s", "trajectories/s", "tokens prefilled", "appended", "sampled"]
  print("\n" + timing.table(header, table))
  return {"base": base, "rows": figures}


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--peer", choices=["none", "transformers"], default="none")
  p.add_argument("--size", choices=["bench", *qwen.SIZES], default="bench")
  p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
  p.add_argument("--loops", type=lambda s: s.split(","), default=["reprefill", "continue"])
  p.add_argument("--peer-batch", type=lambda s: [int(v) for v in s.split(",")], default=[8, 64])
  p.add_argument("--prompts", type=int, default=8)
  p.add_argument("--group", type=int, default=8)
  p.add_argument("--slots", type=int, default=32)
  p.add_argument("--segment", type=int, default=16)
  p.add_argument("--serve", type=float, default=0.125)
  p.add_argument("--repeat", type=int, default=5)
  p.add_argument("--scale", action="store_true")
  p.add_argument("--sweeps", type=lambda s: s.split(","), default=["group", "rounds", "slots", "crop_px"])
  args = p.parse_args()
  if args.peer != "none" and (args.size, args.dtype) != ("bench", "float32"):
    p.error("--peer=transformers compares the bench model in float32")
  memory.keep_when_on_cpu()
  cfg = policy_bench.BENCH if args.size == "bench" else qwen.SIZES[args.size]
  cfg = dataclasses.replace(cfg, compute_dtype=args.dtype, eos=())  # nothing the model writes ends a turn
  params = jax.jit(lambda key: params_lib.init(qwen.specs(cfg), key, jnp.dtype(args.dtype)))(jax.random.key(0))
  figures = scale(args, cfg, params) if args.scale else compare(args, cfg, params)
  print(timing.last_line({"size": args.size, "dtype": args.dtype, "prompts": args.prompts, "group": args.group,
                          "slots": args.slots, "segment": args.segment, "serve": args.serve, "repeat": args.repeat,
                          **figures}, ("transformers", "torch") if args.peer == "transformers" else ()))


if __name__ == "__main__":
  main()
