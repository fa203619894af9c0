"""How far the model is from transformers' Qwen2.5-VL on configurations and conversations drawn from a seed.

The model computes in float32, the reference in float64: what is measured is our rounding, not the sum of both.

    python -m tests.model.agreement --first=1000 --count=200

prints each seed's figures, then the worst of each kind and its seed.  With JAX_DISABLE_MOST_OPTIMIZATIONS=1, as in the
tests, it compiles two to three times as fast.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from virl_jax import types
from virl_jax.model import cache as cache_lib
from virl_jax.model import params as params_lib
from virl_jax.model import patches
from virl_jax.model import rope
from virl_jax.model import weights
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.model.qwen2_5 import text
from virl_jax.rollout import sample

IDS = {"image_token": 5, "video_token": 6, "vision_start": 7, "vision_end": 8, "vision_pad": 9, "eos": (3, 11)}
LIMITS = {"positions": 0, "deltas": 0, "vision": 1e-4, "hidden": 1e-4, "logits": 2e-4, "nll": 1e-5, "gradients": 1e-3,
          "tokens": 0}
MARGIN = 1e-3   # where the reference's two best logits are closer than this, either may be sampled
MAX_NEW = 6


def draw_config(rng: np.random.Generator) -> qwen.Config:
  """A small configuration; every shape and constant that a checkpoint may change is drawn."""
  heads = int(rng.choice([2, 3, 4, 6]))
  kv_heads = int(rng.choice([k for k in range(1, heads + 1) if heads % k == 0]))
  head_size = int(rng.choice([8, 10, 12, 16, 24]))
  cuts = np.sort(rng.choice(np.arange(1, head_size // 2), 2, replace=False))
  section = tuple(int(n) for n in np.diff([0, *cuts, head_size // 2]))
  depth, v_heads, v_head_size = int(rng.integers(1, 5)), int(rng.integers(1, 4)), int(rng.choice([8, 12, 16, 20]))
  full = tuple(int(i) for i in np.flatnonzero(rng.random(depth) < 0.4))
  return qwen.Config(
      text=qwen.Text(
          vocab=int(rng.integers(60, 160)), hidden=heads * head_size, layers=int(rng.integers(1, 4)), heads=heads,
          kv_heads=kv_heads, head_size=head_size, intermediate=int(rng.integers(20, 90)), mrope_section=section,
          theta=float(np.round(10 ** rng.uniform(2, 6))), eps=float(rng.choice([1e-6, 1e-5])),
          tied=bool(rng.random() < 0.5)),
      vision=qwen.Vision(
          depth=depth, hidden=v_heads * v_head_size, heads=v_heads, intermediate=int(rng.integers(16, 60)),
          out=heads * head_size, full_blocks=full, window_px=int(rng.choice([56, 84, 112, 140]))),
      **IDS)


def draw_params(cfg: qwen.Config, rng: np.random.Generator) -> dict:
  """Parameters with a variance so large that every part of the model affects the logits."""
  def one(spec):
    x = rng.standard_normal(spec.shape, np.float32)
    fan_in = float(np.prod(spec.hf_shape[1:]))
    return jnp.asarray(1 + 0.2 * x if spec.init == "ones" else 0.2 * x if spec.init == "zeros" else
                       x * (0.3 if "embed_tokens" in spec.hf_name else 1.2 * fan_in ** -0.5))

  return params_lib.map_specs(one, qwen.specs(cfg))


@dataclasses.dataclass(frozen=True)
class Part:
  """A stretch of a conversation: ids, with the patch grids and pixels of the images among them."""

  ids: np.ndarray
  grids: tuple[tuple[int, int], ...]
  pixels: tuple[np.ndarray, ...]


def draw_part(cfg: qwen.Config, rng: np.random.Generator, n_images: int, largest: int = 14) -> Part:
  """Words and images alternately, words at both ends."""
  words = lambda: rng.integers(10, cfg.text.vocab, int(rng.integers(1, 8))).tolist()
  ids, grids, pixels = words(), [], []
  for _ in range(n_images):
    h, w = (2 * int(n) for n in rng.integers(1, largest // 2 + 1, 2))
    grids.append((h, w))
    pixels.append(rng.standard_normal((h * w, cfg.vision.grid.values), np.float32))
    ids += [cfg.vision_start] + [cfg.image_token] * (h * w // 4) + [cfg.vision_end] + words()
  return Part(np.array(ids, np.int64), tuple(grids), tuple(pixels))


def batch_of(rows: list[Part], rng: np.random.Generator | None = None) -> tuple:
  """ids and mask [B, T], pixels and grids of rows; `rng` draws the side that each is padded on, right without it."""
  T = max(len(r.ids) for r in rows) + (3 if rng is not None else 0)
  ids, mask = np.zeros((len(rows), T), np.int64), np.zeros((len(rows), T), np.int64)
  for b, row in enumerate(rows):
    at = 0 if rng is None else int(rng.choice([0, T - len(row.ids), rng.integers(0, T - len(row.ids) + 1)]))
    ids[b, at:at + len(row.ids)], mask[b, at:at + len(row.ids)] = row.ids, 1
  grids = [(1, *hw) for r in rows for hw in r.grids]
  if not grids:
    return ids, mask, None, None
  return ids, mask, np.concatenate([p for r in rows for p in r.pixels]), np.array(grids)


# --- the whole conversation at once ------------------------------------------------------------------------


def _nll(logits_BTV, tokens_BT, valid_BT, image_token):
  """Mean NLL of every token that follows another and is not a placeholder."""
  logp = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV[:, :-1]), tokens_BT[:, 1:, None], -1)[..., 0]
  mask = valid_BT[:, 1:] & valid_BT[:, :-1] & (tokens_BT[:, 1:] != image_token)
  return -jnp.sum(logp * mask) / jnp.sum(mask)


@functools.partial(jax.jit, static_argnums=1)
def _ours(params, cfg, tokens_BT, pos_BXT, valid_BT, vision_BT, batches):
  def loss(params):
    x = qwen.embed(params, cfg, tokens_BT, vision_BT, batches)
    stream = text.every_layer(params["text"], cfg.text, x, pos_BXT, jnp.where(valid_BT, 0, -1))
    logits = qwen.logits(params, cfg, stream[-1])
    return _nll(logits, tokens_BT, valid_BT, cfg.image_token), (stream, logits)

  (nll, (stream, logits)), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return nll, stream, logits, grads


def compare_forward(cfg, params, model, rows, rng) -> dict:
  """Positions, vision tokens, every layer, logits, NLL and gradients of a padded batch."""
  import torch
  ids, mask, pixels, grids = batch_of(rows, rng)
  inputs = qwen.hf_inputs(cfg, ids, mask, pixels, grids)
  nll, stream, logits, grads = jax.device_get(_ours(params, cfg, *jax.tree.map(jnp.asarray, inputs)))
  seen, found = mask.astype(bool), {}

  kinds = torch.tensor(ids == cfg.image_token).int()
  t = lambda a: None if a is None else torch.tensor(a)
  want_pos, want_delta = model.model.get_rope_index(
      torch.tensor(ids), mm_token_type_ids=kinds, image_grid_thw=t(grids), attention_mask=torch.tensor(mask))
  found["positions"] = int(np.abs(want_pos.numpy().transpose(1, 0, 2) - inputs[1]).max(1)[seen].max())
  delta = inputs[1].max((1, 2)) + 1 - mask.sum(1)
  found["deltas"] = int(np.abs(want_delta.numpy().ravel() - delta).max())

  out = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), pixel_values=t(pixels),
              image_grid_thw=t(grids), mm_token_type_ids=kinds, output_hidden_states=True)
  if pixels is not None:
    tokens = torch.cat(model.model.get_image_features(t(pixels), t(grids)).pooler_output).detach().numpy()
    found["vision"] = np.abs(tokens - stream[0][(ids == cfg.image_token) & seen]).max()
  found["hidden"] = max(np.abs(h.detach().numpy() - ours)[seen].max() for h, ours in zip(out.hidden_states, stream))
  assert len(out.hidden_states) == len(stream)
  found["scale"] = np.abs(logits[seen]).max()
  found["logits"] = np.abs(out.logits.detach().numpy() - logits)[seen].max()
  logp = torch.log_softmax(out.logits[:, :-1], -1).gather(-1, torch.tensor(ids)[:, 1:, None])[..., 0]
  counted = torch.tensor((mask[:, 1:] & mask[:, :-1]) * (ids[:, 1:] != cfg.image_token))
  want_nll = -(logp * counted).sum() / counted.sum()
  found["nll"] = abs(want_nll.item() - float(nll))

  model.zero_grad()
  want_nll.backward()
  want = {qwen.released_name(k): p.grad for k, p in model.named_parameters()}
  largest = max(float(g.abs().max()) for g in want.values() if g is not None)
  found["gradients"] = 0.0
  for path, spec in params_lib.leaves(qwen.specs(cfg)):
    leaf = functools.reduce(lambda tree, key: tree[key], path, grads)
    for i, name in enumerate(spec.hf_names()):
      ours = params_lib.to_hf(spec, leaf[i] if spec.stacked else leaf)
      theirs = np.zeros_like(ours) if want[name] is None else want[name].numpy()
      # Relative to the tensor's largest gradient, or to the model's if the tensor's are nearly 0.
      scale = max(np.abs(theirs).max(), 0.01 * largest)
      found["gradients"] = max(found["gradients"], float(np.abs(ours - theirs).max() / scale))
  return {k: float(v) for k, v in found.items()}


# --- turn by turn ------------------------------------------------------------------------------------------


def _reference_turn(model, cfg, row: Part) -> tuple[list[int], list[float]]:
  """Greedy tokens of a turn and the margin at each; the whole conversation is run again for every token."""
  import torch
  ids, out, margins = row.ids, [], []
  pixels = torch.tensor(np.concatenate(row.pixels)) if row.pixels else None
  grids = torch.tensor([(1, *hw) for hw in row.grids]) if row.grids else None
  while len(out) < MAX_NEW and (not out or out[-1] not in cfg.eos):
    now = torch.tensor(np.concatenate([ids, out]).astype(np.int64))[None]
    with torch.no_grad():
      logits = model(input_ids=now, attention_mask=torch.ones_like(now), pixel_values=pixels, image_grid_thw=grids,
                     mm_token_type_ids=(now == cfg.image_token).int()).logits[0, -1].numpy().copy()
    logits[list(cfg.banned)] = -np.inf
    best = np.argsort(logits)[::-1]
    out.append(int(best[0]))
    margins.append(float(logits[best[0]] - logits[best[1]]))
  return out, margins


def _chunk(cfg, parts: list[Part | None], starts: list[int], T: int, n_images: int) -> sample.Chunk:
  grid = cfg.vision.grid
  inputs = [types.ImageInput(px, hw, types.Box(0, 0, 1, 1)) for p in parts if p for px, hw in zip(p.pixels, p.grids)]
  batch, where = patches.layout(inputs, grid, n_images)
  B = len(parts)
  c = sample.Chunk(np.zeros((B, T), np.int32), np.zeros(B, np.int32), np.zeros((B, 3, T), np.int32),
                   np.zeros(B, np.int32), np.full((B, T), -1, np.int32), (batch,))
  at = 0
  for b, (part, start) in enumerate(zip(parts, starts)):
    if part is None:
      continue
    n = len(part.ids)
    c.tokens_AT[b, :n], c.n_new_A[b] = part.ids, n
    c.pos_AXT[b, :, :n], c.next_pos_A[b] = rope.positions(
        part.ids, cfg.image_token, [(h // 2, w // 2) for h, w in part.grids], start)
    if part.grids:
      c.vision_AT[b, :n][part.ids == cfg.image_token] = np.concatenate(where[at:at + len(part.grids)])
      at += len(part.grids)
  return c


def compare_turns(cfg, params, model, turns: list[list[Part]]) -> dict:
  """Greedy tokens over several turns: the sampler keeps its cache, the reference starts over each time.

  Args:
    turns: for each turn, the part that each row is given before it answers.

  Returns:
    "tokens": how many differ where the reference's margin is above `MARGIN`; "sampled": how many agree.
  """
  B = len(turns[0])
  T = 1 + max(len(p.ids) for row in turns for p in row)
  n_images = max(sum(len(p.grids) for p in row) for row in turns)
  slots = -(-(len(turns) * (T + MAX_NEW)) // cache_lib.BLOCK) * cache_lib.BLOCK
  state = sample.start(cfg, B, slots)
  rows = [Part(np.zeros(0, np.int64), (), ()) for _ in range(B)]
  starts, last, alive = [0] * B, [np.zeros(0, np.int64)] * B, [True] * B
  differ = compared = 0
  for given in turns:
    # The next chunk begins with a turn's last token, which is in the cache only if it is not the end of turn.
    kept = jnp.asarray([len(row.ids) - len(tail) for row, tail in zip(rows, last)], jnp.int32)
    parts = [Part(np.concatenate([tail, p.ids]), p.grids, p.pixels) if ok else None
             for tail, p, ok in zip(last, given, alive)]
    chunk = _chunk(cfg, parts, starts, T, max(1, n_images)).replace(start_A=kept)
    state = sample.append(params, cfg, state, jax.tree.map(jnp.asarray, chunk))
    none = jnp.zeros(B, jnp.int32)
    writes = sample.Writers(jnp.arange(B), none, none, MAX_NEW * jnp.asarray(alive))
    state, out, _, count = sample.decode(params, cfg, state, writes, jax.random.key(0), jnp.float32(0), MAX_NEW)
    for b in range(B):
      if not alive[b]:
        continue
      rows[b] = Part(np.concatenate([rows[b].ids, given[b].ids]), rows[b].grids + given[b].grids,
                     rows[b].pixels + given[b].pixels)
      want, margins = _reference_turn(model, cfg, rows[b])
      got = np.asarray(out[b, :count[b]]).tolist()
      same = [g == w for g, w in zip(got, want)]
      first = len(want) if got == want else same.index(False) if False in same else min(len(got), len(want))
      compared += first
      if got != want:
        alive[b] = False  # from here on the two conversations differ
        differ += margins[min(first, len(margins) - 1)] > MARGIN
        continue
      rows[b] = dataclasses.replace(rows[b], ids=np.concatenate([rows[b].ids, want]).astype(np.int64))
      starts[b], last[b] = int(chunk.next_pos_A[b]) + len(want) - 1, np.array(want[-1:], np.int64)
  return {"tokens": int(differ), "sampled": compared}


def compare(seed: int, folder: str) -> dict:
  """All comparisons, on what `seed` draws.

  Args:
    seed: draws the configuration, the parameters, how they are stored, and the conversations.
    folder: for the checkpoint that both sides load.

  Returns:
    Differences by name, whose limits are `LIMITS`; "scale" is the largest logit.
  """
  import torch
  import transformers
  rng = np.random.default_rng([seed, 5])
  cfg, storage = draw_config(rng), str(rng.choice(["float32", "bfloat16"]))
  weights.save_hf(folder, cfg, draw_params(cfg, rng), storage)
  found, params = weights.load_hf(folder)
  assert found == cfg
  model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
  # At least one row has an image, and one has none.
  rows = [draw_part(cfg, rng, int(n)) for n in (rng.integers(1, 4), 0, rng.integers(0, 3))]
  rng.shuffle(rows)
  # These pictures are small: every other seed cuts them by window, as large ones are.
  with mock.patch.object(patches, "ONE_PIECE_CELLS", patches.ONE_PIECE_CELLS if seed % 2 else 0):
    result = compare_forward(cfg, params, model, rows, rng)
    turns = [[draw_part(cfg, rng, int(rng.integers(0, 3)), 10) for _ in range(2)]]
    turns += [[draw_part(cfg, rng, int(rng.random() < 0.7), 10) for _ in range(2)] for _ in range(2)]
    result |= compare_turns(cfg, params, model, turns)
  jax.clear_caches()  # every seed compiles its own programs, and a process can hold only so many
  return result


def main():
  args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  args.add_argument("--first", type=int, default=0)
  args.add_argument("--count", type=int, default=10)
  args = args.parse_args()
  worst, sampled, scales = {k: (0.0, None) for k in LIMITS}, 0, []
  for seed in range(args.first, args.first + args.count):
    with tempfile.TemporaryDirectory() as folder:
      found = compare(seed, str(pathlib.Path(folder) / "hf"))
    sampled, scales = sampled + found["sampled"], scales + [found["scale"]]
    for k in LIMITS:
      if found.get(k, 0) > worst[k][0] or worst[k][1] is None:
        worst[k] = (found.get(k, 0), seed)
    bad = {k: found[k] for k in LIMITS if found.get(k, 0) > LIMITS[k]}
    figures = " ".join(f"{k} {v:.2g}" for k, v in found.items())
    print(f"seed {seed}: " + (f"OUT OF LIMITS {bad}" if bad else f"agrees ({figures})"), flush=True)
  print(json.dumps({"configurations": args.count, "first": args.first, "tokens_compared": sampled,
                    "largest_logit_median": float(np.median(scales)),
                    "worst": {k: {"difference": v, "seed": s, "limit": LIMITS[k]} for k, (v, s) in worst.items()}}))


if __name__ == "__main__":
  main()
