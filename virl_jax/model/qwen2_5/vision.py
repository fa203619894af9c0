"""Qwen2.5-VL's vision tower as pure functions over patches in fixed places.

Source: Qwen2.5-VL (arXiv 2502.13923), section 2.1: 2-D rotary embedding, RMSNorm, SwiGLU, windowed
attention with a few full-attention blocks, 2x2 patch merger.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from virl_jax import types
from virl_jax.model import attention
from virl_jax.model import layers
from virl_jax.model import params as params_lib
from virl_jax.model import rope
from virl_jax.model.qwen2_5 import config

Spec = params_lib.ParamSpec


def specs(cfg: config.Vision) -> dict:
  """The tower's parameter table."""
  D, N, H, F, C, M = cfg.hidden, cfg.heads, cfg.head_size, cfg.intermediate, cfg.grid.values, cfg.merge ** 2
  b = "visual.blocks.{layer}."
  block = {
      "norm1": Spec((D,), (None,), "ones", b + "norm1.weight", (D,)),
      "qkv_w": Spec((D, 3, N, H), ("embed", None, "heads", None), "normal", b + "attn.qkv.weight",
                    (3 * D, D), (3, 0, 1, 2)),
      "qkv_b": Spec((3, N, H), (None, "heads", None), "zeros", b + "attn.qkv.bias", (3 * D,)),
      "proj_w": Spec((N, H, D), ("heads", None, "embed"), "normal", b + "attn.proj.weight", (D, D), (1, 2, 0)),
      "proj_b": Spec((D,), (None,), "zeros", b + "attn.proj.bias", (D,)),
      "norm2": Spec((D,), (None,), "ones", b + "norm2.weight", (D,)),
      "gate_w": Spec((D, F), ("embed", "mlp"), "normal", b + "mlp.gate_proj.weight", (F, D), (1, 0)),
      "gate_b": Spec((F,), ("mlp",), "zeros", b + "mlp.gate_proj.bias", (F,)),
      "up_w": Spec((D, F), ("embed", "mlp"), "normal", b + "mlp.up_proj.weight", (F, D), (1, 0)),
      "up_b": Spec((F,), ("mlp",), "zeros", b + "mlp.up_proj.bias", (F,)),
      "down_w": Spec((F, D), ("mlp", "embed"), "normal", b + "mlp.down_proj.weight", (D, F), (1, 0)),
      "down_b": Spec((D,), (None,), "zeros", b + "mlp.down_proj.bias", (D,)),
  }
  m = "visual.merger."
  return {
      "patch_embed": Spec((C, D), (None, "embed"), "normal", "visual.patch_embed.proj.weight",
                          (D, 3, cfg.temporal, cfg.patch, cfg.patch), (1, 0)),
      "blocks": params_lib.stack(cfg.depth, block),
      "merger": {
          "norm": Spec((D,), (None,), "ones", m + "ln_q.weight", (D,)),
          "in_w": Spec((M * D, M * D), ("embed", "mlp"), "normal", m + "mlp.0.weight", (M * D, M * D), (1, 0)),
          "in_b": Spec((M * D,), ("mlp",), "zeros", m + "mlp.0.bias", (M * D,)),
          "out_w": Spec((M * D, cfg.out), ("mlp", "embed"), "normal", m + "mlp.2.weight",
                        (cfg.out, M * D), (1, 0)),
          "out_b": Spec((cfg.out,), (None,), "zeros", m + "mlp.2.bias", (cfg.out,)),
      },
  }


def encode(params: dict, cfg: config.Vision, images_: types.ImageBatch, dtype=jnp.float32, remat: bool = False,
           platform: str = "cpu") -> jax.Array:
  """Merged vision tokens of a bucket of images.

  Args:
    params: the tower's parameters.
    cfg: shapes.
    images_: laid out by `patches.layout`.
    dtype: of the matrix products.
    remat: recompute blocks in the backward pass.
    platform: see `config.Config`.

  Returns:
    [I, W * Q / merge^2, out] in `dtype`; `patches.layout` says which row is which token.
    Rows of padding slots hold finite nonsense.

  Source: Qwen2.5-VL, section 2.1.1.
  """
  I, W, Q, _ = images_.patches_IWQC.shape
  N, H = cfg.heads, cfg.head_size
  x = layers.dense(images_.patches_IWQC.astype(dtype), params["patch_embed"])
  cos, sin = rope.vision_rope(images_.rowcol_IWQ2, H)

  def run(x, blocks, full):
    """Blocks of one kind, one after the other."""
    rows_and_length = (I, W * Q) if full else (I * W, Q)  # attention stays within a row
    together = (*rows_and_length, N, H)
    mask = images_.mask_IWQ.reshape(rows_and_length)
    # An image that is not cut has all its windows in a row.
    windows = images_.window_IWQ[:, 0] if W == 1 and not full else None

    def block(x, p):
      h = layers.rms_norm(x, p["norm1"], cfg.eps)
      qkv = layers.dense(h, p["qkv_w"]) + p["qkv_b"].astype(dtype)[None, None, None]
      q, k, v = (qkv[..., i, :, :] for i in range(3))
      q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
      out = attention.attend(q.reshape(together), k.reshape(together), v.reshape(together), mask, causal=False,
                             group_BT=windows, platform=platform)
      out = out.reshape(I, W, Q, N, H)
      x = x + layers.dense(out, p["proj_w"], 2) + p["proj_b"].astype(dtype)[None, None, None]
      return x + layers.swiglu(layers.rms_norm(x, p["norm2"], cfg.eps), p), None

    return jax.lax.scan(jax.checkpoint(block) if remat else block, x, blocks)[0]

  # Runs of equal blocks are known beforehand: no branch, whose gradient would hold what both sides need.
  runs = [(full, len(list(same))) for full, same in itertools.groupby(i in cfg.full_blocks for i in range(cfg.depth))]
  leaves, tree = jax.tree.flatten(params["blocks"])
  split = zip(*(jax.lax.split(leaf, [n for _, n in runs]) for leaf in leaves))
  for (full, _), blocks in zip(runs, split):
    x = run(x, tree.unflatten(blocks), full)

  m = params["merger"]
  x = layers.rms_norm(x, m["norm"], cfg.eps).reshape(I, W * Q // cfg.merge ** 2, -1)
  x = layers.dense(x, m["in_w"]) + m["in_b"].astype(dtype)[None, None]
  x = jax.nn.gelu(x, approximate=False)
  return layers.dense(x, m["out_w"]) + m["out_b"].astype(dtype)[None, None]
