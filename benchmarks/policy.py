"""Forward pass, training step and greedy generation of a Qwen2.5-VL, here and in a peer, in one run.

    python benchmarks/policy.py --peer=transformers                    # CPU: the bench model, against torch
    python benchmarks/policy.py --size=7b --dtype=bfloat16 --batch=4 --tokens=2048 --ops=forward,train  # an accelerator
    python benchmarks/policy.py --size=7b --dtype=bfloat16 --batch=64 --tokens=512 --ops=generate

Both sides run the same weights on the same inputs, one after the other within each repetition; medians are
compared.  The first runs, which compile, are reported separately.  On an accelerator, speeds are also reported as
shares of what a matrix product and a copy reach in the same run (MFU, decode bandwidth).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import timing  # of this folder

from virl_jax import shapes
from virl_jax import types
from virl_jax.learner import optim
from virl_jax.learner import state as state_lib
from virl_jax.learner import step as step_lib
from virl_jax.model import cache as cache_lib
from virl_jax.model import params as params_lib
from virl_jax.model import sharding
from virl_jax.model import weights
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.rollout import pack
from virl_jax.rollout import sample
from virl_jax.run import memory

# 50.5 million parameters, large enough for matrix products to dominate.
BENCH = qwen.Config(
    text=qwen.Text(vocab=8192, hidden=512, layers=12, heads=8, kv_heads=2, head_size=64, intermediate=1408,
                     mrope_section=(8, 12, 12), tied=False),
    vision=qwen.Vision(depth=8, hidden=256, heads=4, intermediate=688, out=512, full_blocks=(3, 7)),
    image_token=8000, video_token=8001, vision_start=8002, vision_end=8003, vision_pad=8004, eos=(8005,))


def inputs(cfg: qwen.Config, batch: int, tokens: int, image_px: int) -> list[types.Trajectory]:
  """Trajectories of `tokens` tokens: an image, followed by words that are trained on."""
  rng, grid, side = np.random.default_rng(0), cfg.vision.grid, image_px // cfg.vision.patch
  cells = (side // grid.merge) ** 2
  if cells + 2 >= tokens:
    raise SystemExit(f"--tokens must be above the image's {cells + 2}. Received: {tokens}")
  rows = []
  for i in range(batch):
    image = types.ImageInput(rng.standard_normal((side * side, grid.values), np.float32), (side, side),
                             types.Box(0, 0, image_px, image_px))
    prompt = np.array([cfg.vision_start] + [cfg.image_token] * cells + [cfg.vision_end], np.int32)
    words = rng.integers(10, 7000, tokens - len(prompt)).astype(np.int32)
    task = types.Task(str(i), b"", "", ("",), (), None, "bench")
    turn = types.Turn("assistant", words, np.zeros(len(words), np.float32))
    rows.append(types.Trajectory(task, i, prompt, [turn], [image]))
  return rows


class Ours:
  """This project's side."""

  def __init__(self, cfg, params, rows, new_tokens):
    self.params, self.new_tokens, self.tokens_BT = params, new_tokens, np.stack([r.ids for r in rows])
    self.cfg = dataclasses.replace(cfg, eos=())  # generation goes on to its limit
    self.batch = jax.device_put(pack.pack(rows, pack.Config(cfg.vision.grid, cfg.image_token, 1, 1, 1)))
    self.step = state_lib.Config(cfg, 1, optim=optim.OptimConfig(learning_rate=1e-5))
    b = self.batch
    ones = np.full(len(rows), self.tokens_BT.shape[1], np.int32)
    images = jax.tree.map(lambda a: a[0], b.rows.images)
    self.chunk = jax.device_put(sample.Chunk(b.tokens_BT, ones, b.pos_BXT, np.asarray(b.pos_BXT).max((1, 2)) + 1,
                                             b.vision_BT, images))
    self._logits = jax.jit(lambda p, b: qwen.logits(p, cfg, qwen.hidden(
        p, cfg, b.tokens_BT, b.pos_BXT, b.valid_BT, b.vision_BT, images, b.rows.lengths_MUS[0])))
    self.state = None

  def forward(self):
    self.logits = jax.block_until_ready(self._logits(self.params, self.batch))

  def train(self):
    if self.state is None:
      self.state = state_lib.init(jax.tree.map(jnp.copy, self.params), self.step.optim)
    self.state, metrics = step_lib.imitate_step(self.state, self.batch, self.step)
    self.loss = float(metrics["loss/total"])

  def generate(self):
    B, T = self.tokens_BT.shape
    state = sample.start(self.cfg, B, shapes.up(T + self.new_tokens, cache_lib.BLOCK))
    state = sample.append(self.params, self.cfg, state, self.chunk)
    none = jnp.zeros(B, jnp.int32)
    turns = sample.Writers(jnp.arange(B), none, none, none + self.new_tokens)
    _, out, _, _ = sample.decode(self.params, self.cfg, state, turns, jax.random.key(0), jnp.float32(0),
                                 self.new_tokens)
    self.out = np.asarray(out)


class Transformers:
  """The reference implementation, in torch, with its fastest attention."""

  def __init__(self, cfg, params, rows, new_tokens):
    import torch
    import transformers
    torch.set_num_threads(os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
      weights.save_hf(f"{folder}/hf", cfg, params, "float32")
      make = lambda: transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
          f"{folder}/hf", dtype=torch.float32, attn_implementation="sdpa").eval()
      self.model, self.trained = make(), make()
    self.torch, self.cfg, self.new_tokens = torch, cfg, new_tokens
    ids = torch.tensor(np.stack([r.ids for r in rows]).astype(np.int64))
    side = rows[0].images[0].grid_hw
    self.inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.tensor(np.concatenate([r.images[0].patches_PC for r in rows])),
        "image_grid_thw": torch.tensor([(1, *side)] * len(rows)), "mm_token_type_ids": (ids == cfg.image_token).int()}
    self.labels = ids.clone()
    self.labels[:, :len(rows[0].prompt_ids)] = -100
    self.optimizer = torch.optim.AdamW(self.trained.parameters(), lr=1e-5, weight_decay=0.0)

  def forward(self):
    with self.torch.no_grad():
      self.logits = self.model(**self.inputs).logits

  def train(self):
    self.optimizer.zero_grad()
    loss = self.trained(**self.inputs, labels=self.labels).loss
    loss.backward()
    self.torch.nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
    self.optimizer.step()
    self.loss = loss.item()

  def generate(self):
    cfg = self.cfg
    with self.torch.no_grad():
      out = self.model.generate(**self.inputs, max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens,
                                do_sample=False, suppress_tokens=list(cfg.banned), eos_token_id=list(cfg.eos),
                                pad_token_id=0)
    self.out = out[:, self.inputs["input_ids"].shape[1]:].numpy()


def agreement(ours: Ours, peer: Transformers, ops: list[str]) -> dict:
  """How far apart the two sides' results are, so that no side is fast by being wrong."""
  found = {}
  if "forward" in ops:
    found["logits_max_difference"] = float(np.abs(np.asarray(ours.logits) - peer.logits.numpy()).max())
  if "train" in ops:
    found["loss_difference_after_all_steps"] = abs(ours.loss - peer.loss)
  if "generate" in ops:
    found["same_tokens_share"] = float((ours.out == peer.out).mean())
  return found


# --- accelerators: shares of what the device reaches --------------------------------------------------------


def ceilings(dtype=jnp.bfloat16) -> tuple[float, float]:
  """FLOP/s of a large matrix product in `dtype`, and bytes/s read and written by a copy, both measured now."""
  n = 8192 if jax.default_backend() != "cpu" else 1536
  a = jnp.ones((n, n), dtype)
  product = jax.jit(lambda a: a @ a)
  copy = jax.jit(lambda x: x + 1)
  x = jnp.ones((2 ** 28 if n == 8192 else 2 ** 24,), jnp.float32)
  seconds = timing.interleaved({"product": lambda: product(a).block_until_ready(),
                                "copy": lambda: copy(x).block_until_ready()}, 5)
  return 2 * n ** 3 / timing.median(seconds["product"]), 2 * x.nbytes / timing.median(seconds["copy"])


def flops_forward(cfg: qwen.Config, batch: int, tokens: int, image_px: int) -> float:
  """FLOPs of a forward pass, counted by hand: 2 for each weight and token, and the two products of causal attention."""
  t, v = cfg.text, cfg.vision
  block = t.hidden * t.head_size * (2 * t.heads + 2 * t.kv_heads) + 3 * t.hidden * t.intermediate
  words = 2 * (t.layers * block + t.hidden * t.vocab) + 2 * t.layers * tokens * t.heads * t.head_size
  patches = (image_px // v.patch) ** 2
  v_block = 4 * v.hidden ** 2 + 3 * v.hidden * v.intermediate
  merger = (v.merge ** 2 * v.hidden) * (v.merge ** 2 * v.hidden + v.out)
  seen = sum(patches if i in v.full_blocks else min(patches, (v.window_px // v.patch) ** 2) for i in range(v.depth))
  tower = patches * (2 * (v.depth * v_block + v.grid.values * v.hidden) + 4 * seen * v.hidden) + (
      2 * patches // v.merge ** 2 * merger)
  return batch * (tokens * words + tower)


def shares(args, cfg, seconds: dict) -> dict:
  """MFU of forward and training step, and the share of the copy's bandwidth that decoding reaches."""
  peak, bandwidth = ceilings()
  forward = flops_forward(cfg, args.batch, args.tokens, args.image_px)
  found = {"ceiling_tflops": peak / 1e12, "ceiling_gb_s": bandwidth / 1e9}
  if "forward" in args.ops:
    found["forward_mfu"] = forward / timing.median(seconds["forward"]) / peak
  if "train" in args.ops:
    found["train_mfu"] = 3 * forward / timing.median(seconds["train"]) / peak  # recomputation is not counted
  if "generate" in args.ops:
    size = jnp.dtype(args.dtype).itemsize
    t = cfg.text
    read = params_lib.count(qwen.specs(cfg)["text"]) * size
    kv = 2 * t.layers * t.kv_heads * t.head_size * size * args.batch * (args.tokens + args.new_tokens / 2)
    found["decode_tokens_s"] = args.batch * args.new_tokens / timing.median(seconds["generate"])
    # The time includes the prompt's prefill.
    found["decode_bandwidth_share"] = args.new_tokens * (read + kv) / timing.median(seconds["generate"]) / bandwidth
  return found


def main():
  p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  p.add_argument("--peer", choices=["none", "transformers"], default="none")
  p.add_argument("--size", choices=["bench", *qwen.SIZES], default="bench")
  p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
  p.add_argument("--batch", type=int, default=8)
  p.add_argument("--tokens", type=int, default=128, help="a row, its image's included")
  p.add_argument("--image-px", type=int, default=224)
  p.add_argument("--new-tokens", type=int, default=128)
  p.add_argument("--ops", type=lambda s: s.split(","), default=["forward", "train", "generate"])
  p.add_argument("--repeat", type=int, default=5)
  args = p.parse_args()
  if args.peer != "none" and (args.size, args.dtype) != ("bench", "float32"):
    p.error("--peer=transformers compares the bench model in float32")

  memory.keep_when_on_cpu()  # for both sides: they share the process
  cfg = BENCH if args.size == "bench" else qwen.SIZES[args.size]
  cfg = dataclasses.replace(cfg, compute_dtype=args.dtype, remat=args.size != "bench",
                            platform=sharding.platform(jax.devices()[0]))
  params = jax.jit(lambda key: params_lib.init(qwen.specs(cfg), key, jnp.dtype(args.dtype)))(jax.random.key(0))
  rows = inputs(cfg, args.batch, args.tokens, args.image_px)
  print(f"{params_lib.count(qwen.specs(cfg)):,} parameters; {args.batch} rows of {args.tokens} tokens with one image "
        f"of {args.image_px} px; {args.new_tokens} new tokens; {jax.devices()[0].device_kind}", flush=True)
  ours = Ours(cfg, params, rows, args.new_tokens)
  peer = Transformers(cfg, params, rows, args.new_tokens) if args.peer == "transformers" else None

  table, seconds, figures = [], {}, {}
  for op in args.ops:
    sides = {"ours": getattr(ours, op)} | ({"peer": getattr(peer, op)} if peer else {})
    found = timing.interleaved(sides, args.repeat)
    seconds[op] = found["ours"]
    row = [op, timing.spread(found["ours"]), f"{found['ours/first'][0]:.1f}"]
    figures[op] = {"ours_s": timing.median(found["ours"]), "ours_first_s": found["ours/first"][0]}
    if peer:
      ratio = timing.median(found["peer"]) / timing.median(found["ours"])
      row[2:2] = [timing.spread(found["peer"]), f"{ratio:.2f}"]
      figures[op] |= {"peer_s": timing.median(found["peer"]), "ratio": ratio}
    table.append(row)
    print(f"{op} done", flush=True)
  header = ["", "ours, s"] + ([f"{args.peer}, s", "times faster"] if peer else []) + ["first run, compiling, s"]
  print("\n" + timing.table(header, table) + "\n")
  if peer:
    figures["agreement"] = agreement(ours, peer, args.ops)
  elif jax.default_backend() != "cpu":
    figures["shares"] = shares(args, cfg, seconds)
  for name in ("agreement", "shares"):
    for k, v in figures.get(name, {}).items():
      print(f"{k}: {v:.4g}")
  print(timing.last_line({"size": args.size, "dtype": args.dtype, "batch": args.batch, "tokens": args.tokens,
                          "image_px": args.image_px, "new_tokens": args.new_tokens, "repeat": args.repeat, **figures},
                         ("transformers", "torch") if peer else ()))


if __name__ == "__main__":
  main()
