"""Qwen2.5-VL as the rest of the code sees it: what `family` requires, and inputs as transformers makes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from virl_jax import types
from virl_jax.model import attention
from virl_jax.model import cache as cache_lib
from virl_jax.model import layers
from virl_jax.model import patches
from virl_jax.model import rope
from virl_jax.model import sharding
from virl_jax.model.qwen2_5 import config
from virl_jax.model.qwen2_5 import text
from virl_jax.model.qwen2_5 import vision

Config, Text, Vision, SIZES, tiny = config.Config, config.Text, config.Vision, config.SIZES, config.tiny
config_from_hf, config_to_hf = config.from_hf, config.to_hf
released_name, transformers_name = config.released_name, config.transformers_name


def specs(cfg: Config) -> dict:
  """The whole model's parameter table."""
  return {"text": text.specs(cfg.text), "vision": vision.specs(cfg.vision)}


def embed(params: dict, cfg: Config, tokens_BT: jax.Array, vision_BT: jax.Array,
          image_batches: tuple[types.ImageBatch, ...]) -> jax.Array:
  """Input embeddings: the token's, or in its place a merged vision token.

  Args:
    params: the model's parameters.
    cfg: the model.
    tokens_BT: int32 ids.
    vision_BT: int32 index into the merged tokens of all `image_batches` put end to end; -1 on text.  Under a mesh it
      counts the tokens of the row's own shard: images are on the devices of their rows, and no device sees another's.
    image_batches: buckets of images, possibly none.

  Returns:
    [B, T, D] in the compute dtype.
  """
  dtype = jnp.dtype(cfg.compute_dtype)
  x = layers.lookup(params["text"]["embed"], tokens_BT, dtype)
  if not image_batches:
    return x
  merged = [vision.encode(params["vision"], cfg.vision, b, dtype, cfg.remat, cfg.platform, cfg.patches_together,
                          cfg.kept, cfg.gather_vision)
            for b in image_batches]

  def put(x_BTD, vision_BT, *merged):
    merged_MD = jnp.concatenate([m.reshape(-1, m.shape[-1]) for m in merged])
    return jnp.where(vision_BT[..., None] >= 0, merged_MD[jnp.maximum(vision_BT, 0)], x_BTD)

  return sharding.locally(put, (("rows",),) * (2 + len(merged)), ("rows",), x, vision_BT, *merged)


def hidden(params: dict, cfg: Config, tokens_BT: jax.Array, pos_BXT: jax.Array, valid_BT: jax.Array,
           vision_BT: jax.Array, image_batches: tuple[types.ImageBatch, ...], lengths_BS: jax.Array | None = None
           ) -> jax.Array:
  """Final hidden states [B, T, D] of whole sequences.

  Args:
    params: the model's parameters.
    cfg: the model.
    tokens_BT, vision_BT, image_batches: as in `embed`.
    pos_BXT: int32 M-RoPE positions.
    valid_BT: bool, False on padding, on either side.
    lengths_BS: int32, where rows hold several sequences end to end, their lengths, the longest first; 0 for none.
      Give it for single sequences too: kernels that allow no padding before the tokens are used only with it.
  """
  x = embed(params, cfg, tokens_BT, vision_BT, image_batches)
  segment_BT = (jnp.where(valid_BT, 0, -1) if lengths_BS is None else
                attention.segments(lengths_BS, tokens_BT.shape[1]))
  return text.apply(params["text"], cfg.text, x, pos_BXT, segment_BT, cfg.remat, lengths_BS, cfg.platform, cfg.kept)


def new_cache(cfg: Config, rows: int, slots: int) -> cache_lib.Cache:
  """An empty cache in the compute dtype; see `cache.new`."""
  return text.new_cache(cfg.text, rows, slots, jnp.dtype(cfg.compute_dtype))


def extend(params: dict, cfg: Config, x_ATD: jax.Array, pos_AXT: jax.Array, n_new_A: jax.Array, cache: cache_lib.Cache,
           row_A: jax.Array | None = None) -> tuple[jax.Array, cache_lib.Cache]:
  """Appends a chunk of embeddings to rows of a cache; see `text.extend`."""
  return text.extend(params["text"], cfg.text, x_ATD, pos_AXT, n_new_A, cache, row_A, cfg.platform)


def head(params: dict) -> jax.Array:
  """[D, V]: the matrix from final hidden states to logits, in the parameters' dtype."""
  return text.head(params["text"])


def logits(params: dict, cfg: Config, hidden_BTD: jax.Array) -> jax.Array:
  """float32[B, T, V]; see `head`."""
  return layers.logits(hidden_BTD, head(params))


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
  h_BTD = hidden(params, cfg, *jax.tree.map(jnp.asarray, inputs))
  return logits(params, cfg, h_BTD)
