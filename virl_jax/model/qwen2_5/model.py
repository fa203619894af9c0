"""Qwen2.5-VL: sizes, parameter table, and the forward pass that joins pictures and text."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from virl_jax import types
from virl_jax.model import layers
from virl_jax.model import params as params_lib
from virl_jax.model import patches
from virl_jax.model import rope
from virl_jax.model.qwen2_5 import text
from virl_jax.model.qwen2_5 import vision


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything about the model that is not a parameter.

  Attributes:
    text: the decoder's shapes.
    vision: the tower's shapes.
    image_token, video_token, vision_start, vision_end, vision_pad: placeholder ids, never sampled.
    eos: id that ends a turn.
    compute_dtype: of matrix products; norms, rotary and softmax stay float32 where the reference has them.
    remat: recompute layers in the backward pass.
  """

  text: text.Config = text.Config()
  vision: vision.Config = vision.Config()
  image_token: int = 151655
  video_token: int = 151656
  vision_start: int = 151652
  vision_end: int = 151653
  vision_pad: int = 151654
  eos: int = 151645
  compute_dtype: str = "float32"
  remat: bool = False

  @property
  def banned(self) -> tuple[int, ...]:
    """Ids that must never be sampled: a sampled placeholder has no image behind it."""
    return (self.image_token, self.video_token, self.vision_start, self.vision_end, self.vision_pad)


def _released(hidden, layers, heads, kv_heads, intermediate, vision_intermediate, vocab, tied) -> Config:
  return Config(
      text=text.Config(vocab=vocab, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads,
                       intermediate=intermediate, tied=tied),
      vision=vision.Config(intermediate=vision_intermediate, out=hidden))


# Released shapes, from the published config.json files.
SIZES = {
    "3b": _released(2048, 36, 16, 2, 11008, 3420, 151936, True),
    "7b": _released(3584, 28, 28, 4, 18944, 3420, 152064, False),
    "32b": _released(5120, 64, 40, 8, 27648, 3456, 152064, False),
    "72b": _released(8192, 80, 64, 8, 29568, 3456, 152064, False),
}


def tiny(vocab: int, ids: dict[str, int]) -> Config:
  """A Qwen2.5-VL of about two million parameters, for the needle task.

  Its rotary sections take turns (time, height, width, time, ...).  In three blocks, as released, the width
  of a head this small would get only frequencies too low to tell neighbouring columns apart.

  Args:
    vocab: rows of the embedding.
    ids: values for the token id fields of `Config`, by name.
  """
  return Config(
      text=text.Config(vocab=vocab, hidden=128, layers=4, heads=4, kv_heads=2, head_size=32, intermediate=320,
                       mrope_section=(1,) * 12 + (2, 1, 1), theta=100.0, tied=True),
      vision=vision.Config(depth=3, hidden=128, heads=4, intermediate=256, out=128, full_blocks=(2,)),
      **ids)


def specs(cfg: Config) -> dict:
  """The whole model's parameter table."""
  return {"text": text.specs(cfg.text), "vision": vision.specs(cfg.vision)}


def embed(params: dict, cfg: Config, tokens_BT: jax.Array, vision_BT: jax.Array,
          image_batches: tuple[types.ImageBatch, ...]) -> jax.Array:
  """Input embeddings: the token's, or the vision token that stands in its place.

  Args:
    params: the model's parameters.
    cfg: the model.
    tokens_BT: int32 ids.
    vision_BT: int32 index into the merged tokens of all `image_batches` put end to end; -1 on text.
    image_batches: buckets of images, possibly none.

  Returns:
    [B, T, D] in the compute dtype.
  """
  dtype = jnp.dtype(cfg.compute_dtype)
  x = params["text"]["embed"].astype(dtype)[tokens_BT]
  if not image_batches:
    return x
  merged = [vision.encode(params["vision"], cfg.vision, b, dtype, cfg.remat).reshape(-1, x.shape[-1])
            for b in image_batches]
  merged = jnp.concatenate(merged)[jnp.maximum(vision_BT, 0)]
  return jnp.where(vision_BT[..., None] >= 0, merged, x)


def hidden(params: dict, cfg: Config, tokens_BT: jax.Array, pos_BXT: jax.Array, valid_BT: jax.Array,
           vision_BT: jax.Array, image_batches: tuple[types.ImageBatch, ...], right_padded: bool = False,
           group_BT: jax.Array | None = None) -> jax.Array:
  """Final hidden states [B, T, D] of whole sequences; arguments as in `embed` and `text.apply`."""
  x = embed(params, cfg, tokens_BT, vision_BT, image_batches)
  return text.apply(params["text"], cfg.text, x, pos_BXT, valid_BT, cfg.remat, right_padded, group_BT)


def logits(params: dict, cfg: Config, hidden_BTD: jax.Array) -> jax.Array:
  """float32[B, T, V]."""
  return layers.dense(hidden_BTD, text.head(params["text"])).astype(jnp.float32)


def policy_logits(params: dict, cfg: Config, hidden_BTD: jax.Array, temperature: float) -> jax.Array:
  """float32[B, T, V]: what is sampled from, and what the loss is about: placeholders out, temperature in."""
  x = logits(params, cfg, hidden_BTD) / temperature
  banned_V = np.isin(np.arange(cfg.text.vocab), cfg.banned)
  # Finite, so that entropy and its gradient stay finite; exp(-1e30) is 0 all the same.
  return jnp.where(banned_V[None, None], -1e30, x)


def token_logp(params: dict, cfg: Config, hidden_BTD: jax.Array, targets_BT: jax.Array, temperature: float,
               chunk: int = 128) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each target and entropy of the distribution that it came from.

  The logits of only `chunk` positions a row exist at a time, forward and backward.

  Args:
    params: the model's parameters.
    cfg: the model.
    hidden_BTD: hidden states at the positions that predict the targets.
    targets_BT: int32 ids; a banned id gets -1e30.
    temperature: of sampling.
    chunk: positions at a time.

  Returns:
    logp_BT, entropy_BT: float32, nats.
  """
  B, T, D = hidden_BTD.shape
  pad = -T % chunk if T > chunk else 0
  chunk = min(chunk, T)
  h = jnp.pad(hidden_BTD, ((0, 0), (0, pad), (0, 0))).reshape(B, -1, chunk, D).swapaxes(0, 1)
  y = jnp.pad(targets_BT, ((0, 0), (0, pad))).reshape(B, -1, chunk).swapaxes(0, 1)

  def one(args):
    h_BCD, y_BC = args
    x = policy_logits(params, cfg, h_BCD, temperature)
    logp = jax.nn.log_softmax(x)
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    return jnp.take_along_axis(logp, y_BC[..., None], axis=-1)[..., 0], entropy

  # A single chunk's logits may stay for the backward pass; more than one would add up.
  logp, entropy = jax.lax.map(jax.checkpoint(one) if len(h) > 1 else one, (h, y))
  join = lambda a: a.swapaxes(0, 1).reshape(B, -1)[:, :T]
  return join(logp), join(entropy)


def hf_inputs(cfg: Config, input_ids, attention_mask, pixel_values=None, image_grid_thw=None) -> tuple:
  """The arguments of `hidden` for inputs as transformers' processor makes them.

  Args:
    cfg: the model.
    input_ids: int[B, T], padded on either side.
    attention_mask: int[B, T], 1 on tokens.
    pixel_values: float[P, C], the patches of all images in order, or None.
    image_grid_thw: int[I, 3], (frames, patch rows, patch columns) of each image, or None.

  Returns:
    tokens_BT, pos_BXT, valid_BT, vision_BT and the image batches, as numpy arrays.

  Raises:
    ValueError: if placeholders and images don't match, or an image has more than one frame.
  """
  input_ids, valid = np.asarray(input_ids), np.asarray(attention_mask).astype(bool)
  grids = [] if image_grid_thw is None else np.asarray(image_grid_thw).tolist()
  if any(t != 1 for t, _, _ in grids):
    raise ValueError(f"image_grid_thw must have one frame an image. Received: {grids}")
  grid, at, inputs = cfg.vision.grid, 0, []
  for _, h, w in grids:
    these = np.asarray(pixel_values[at:at + h * w], np.float32)
    inputs.append(types.ImageInput(these, (h, w), types.Box(0, 0, w, h)))
    at += h * w
  batches, index = (), []
  if inputs:
    batch, index = patches.layout(inputs, grid)
    batches = (batch,)
  vision_BT = np.full(input_ids.shape, -1, np.int32)
  pos_BXT = np.zeros((len(input_ids), 3, input_ids.shape[1]), np.int32)
  used = 0
  for b, (ids, ok) in enumerate(zip(input_ids, valid)):
    here = (ids == cfg.image_token) & ok
    mine, need = [], int(here.sum())
    while sum(h * w for h, w in mine) < need and used < len(inputs):
      mine.append(patches.merged_hw(inputs[used], grid))
      used += 1
    pos_BXT[b][:, ok], _ = rope.positions(ids[ok], cfg.image_token, mine)
    if mine:
      vision_BT[b, here] = np.concatenate(index[used - len(mine):used])
  if used != len(inputs):
    raise ValueError(f"input_ids must have placeholders for {len(inputs)} images. Received: for {used}")
  return input_ids.astype(np.int32), pos_BXT, valid, vision_BT, batches


def logits_from_hf_inputs(params: dict, cfg: Config, input_ids, attention_mask, pixel_values=None,
                          image_grid_thw=None) -> jax.Array:
  """float32[B, T, V]: logits for inputs as transformers' processor makes them; see `hf_inputs`."""
  inputs = hf_inputs(cfg, input_ids, attention_mask, pixel_values, image_grid_thw)
  return logits(params, cfg, hidden(params, cfg, *jax.tree.map(jnp.asarray, inputs)))


def abstract_params(cfg: Config, dtype="float32") -> dict:
  """Shapes and dtypes of the parameters, nothing allocated."""
  return params_lib.abstract(specs(cfg), jnp.dtype(dtype))
