"""Qwen2.5-VL's vision tower as pure functions over patches in fixed places.

Source: Qwen2.5-VL (arXiv 2502.13923), section 2.1: 2-D rotary embedding, RMSNorm, SwiGLU, windowed
attention with a few full-attention blocks, 2x2 patch merger.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp

from virl_jax import types
from virl_jax.model import attention
from virl_jax.model import layers
from virl_jax.model import params as params_lib
from virl_jax.model import patches
from virl_jax.model import remat as remat_lib
from virl_jax.model import rope
from virl_jax.model import sharding
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
           platform: str = "cpu", together: int = 0, kept: remat_lib.Kept = remat_lib.Kept(), gather: bool = False
           ) -> jax.Array:
  """Merged vision tokens of a bucket of images.

  Args:
    params: the tower's parameters.
    cfg: shapes.
    images_: laid out by `patches.layout`.
    dtype: of the matrix products.
    remat: recompute blocks in the backward pass.
    platform: see `config.Config`.
    together: most patch slots of a device that are encoded at a time, but at least one image; of each such part only
      the result is kept for the backward pass.  0 for all at once.
    kept: values of a block that are not recomputed while a part's backward pass runs.
    gather: with `together`, gather weights that are split over devices once for all parts, and reduce their gradient
      once; else both are done for each part, which takes less memory.

  Returns:
    [I, W * Q / merge^2, out] in `dtype`; `patches.layout` says which row is which token.
    Rows of padding slots are finite but meaningless.

  Source: Qwen2.5-VL, section 2.1.1.
  """
  some = functools.partial(_encode, cfg=cfg, dtype=dtype, remat=remat, platform=platform, kept=kept)
  if not together:
    return some(params, images_)
  I, W, Q, _ = images_.patches_IWQC.shape
  shards = sharding.shards("rows") if I % sharding.shards("rows") == 0 else 1
  if gather and shards > 1 and sharding.shards("tensor") == 1:  # each device on its own
    leaves, tree = jax.tree.flatten((params, images_))

    def alone(*leaves):
      params, images_ = tree.unflatten(leaves)
      return encode(params, cfg, images_, dtype, remat, platform, together, kept)

    rows = [("rows",)] * len(jax.tree.leaves(images_))
    return sharding.locally(alone, [()] * (len(leaves) - len(rows)) + rows, ("rows",), *leaves)
  each = I // shards
  n = max(n for n in range(1, each + 1) if each % n == 0 and (n == 1 or n * W * Q <= together))
  # A part has some images of each shard, so that no image moves to another device.
  cut = lambda a: sharding.constrain(
      a.reshape(shards, each // n, n, *a.shape[1:]).swapaxes(0, 1).reshape(each // n, shards * n, *a.shape[1:]),
      None, "rows")
  out = jax.lax.map(jax.checkpoint(functools.partial(some, params)), jax.tree.map(cut, images_))
  out = out.reshape(each // n, shards, n, *out.shape[2:]).swapaxes(0, 1)
  return sharding.constrain(out.reshape(I, *out.shape[3:]), "rows")


def _values(patches_IWQC: jax.Array, cfg: config.Vision) -> jax.Array:
  """float32[I, W, Q, C]: normalised values of all frames; bytes go by a table, to be exactly the reference's."""
  if patches_IWQC.dtype != jnp.uint8:
    return patches_IWQC
  x = patches_IWQC.reshape(*patches_IWQC.shape[:3], 3, 1, -1)
  table = jnp.asarray(patches.levels())
  x = jnp.stack([table[x[..., colour, :, :].astype(jnp.int32), colour] for colour in range(3)], axis=3)
  return jnp.broadcast_to(x, (*x.shape[:4], cfg.temporal, x.shape[-1])).reshape(*x.shape[:3], -1)


def _encode(params, images_, cfg, dtype, remat, platform, kept):
  """`encode` of all images at once."""
  I, W, Q, _ = images_.patches_IWQC.shape
  H, P = cfg.head_size, W * Q
  flat = lambda a: a.reshape(I, P, *a.shape[3:])
  x = flat(_values(images_.patches_IWQC, cfg)).astype(dtype)
  x = sharding.constrain(layers.dense(x, params["patch_embed"]), "rows")
  cos, sin = (flat(a) for a in rope.vision_rope(images_.rowcol_IWQ2, H))
  window_IP = flat(images_.window_IWQ)

  def run(x, blocks, cos, sin, see):
    """Blocks of one kind, one after the other; `see(q, k, v)` attends."""
    def block(x, p):
      h = layers.rms_norm(x, p["norm1"], cfg.eps)
      qkv = layers.dense(h, p["qkv_w"]) + p["qkv_b"].astype(dtype)[None, None]
      q, k, v = (sharding.constrain(qkv[:, :, i], "rows", None, "tensor") for i in range(3))
      q, k, v = (remat_lib.named(a, "qkv") for a in (rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v))
      out = see(q, k, v)
      x = x + layers.dense(out, p["proj_w"], 2) + p["proj_b"].astype(dtype)[None, None]
      x = sharding.constrain(x, "rows")
      return sharding.constrain(x + layers.swiglu(layers.rms_norm(x, p["norm2"], cfg.eps), p), "rows"), None

    return jax.lax.scan(remat_lib.layer(block, remat, kept), x, blocks)[0]

  # An image that is not cut has all its windows in one row.
  together = attention.rows_together(platform, Q, W)
  rows = (I * W // together, together * Q) if W > 1 else (I, Q)
  cut = lambda a: a.reshape(*rows, *a.shape[2:])
  # A window's patches come first in its slots.
  lengths = images_.mask_IWQ.sum(-1, dtype=jnp.int32).reshape(-1, 1) if W > 1 and together == 1 else None

  def see_windows(q, k, v):
    return attention.attend(cut(q), cut(k), cut(v), cut(window_IP), causal=False, lengths_BS=lengths,
                            platform=platform).reshape(q.shape)

  def see_all(q, k, v, lengths_I1=None):
    return attention.attend(q, k, v, whole_IP, causal=False, lengths_BS=lengths_I1, platform=platform)

  whole_IP = jnp.where(window_IP >= 0, 0, -1)
  end_to_end = attention.choose(platform, dtype, P, H, True) == "cudnn"
  if end_to_end:  # cuDNN allows no gaps between the patches of an image
    order_IP = jnp.argsort(window_IP < 0, axis=1, stable=True)
    back_IP = jnp.argsort(order_IP, axis=1)
    count_I1 = (window_IP >= 0).sum(1, dtype=jnp.int32)[:, None]
    moved = lambda a, to: jnp.take_along_axis(a, to.reshape(I, P, *[1] * (a.ndim - 2)), axis=1)

  def run_full(x, blocks):
    if not end_to_end:
      return run(x, blocks, cos, sin, see_all)
    x = run(moved(x, order_IP), blocks, moved(cos, order_IP), moved(sin, order_IP),
            functools.partial(see_all, lengths_I1=count_I1))
    return moved(x, back_IP)

  # A scan for each run of equal blocks, not a branch in one scan, whose gradient would hold what both sides need.
  runs = [(full, len(list(same))) for full, same in itertools.groupby(i in cfg.full_blocks for i in range(cfg.depth))]
  leaves, tree = jax.tree.flatten(params["blocks"])
  split = zip(*(jax.lax.split(leaf, [n for _, n in runs]) for leaf in leaves))
  for (full, _), blocks in zip(runs, split):
    blocks = tree.unflatten(blocks)
    x = run_full(x, blocks) if full else run(x, blocks, cos, sin, see_windows)

  m = params["merger"]
  x = layers.rms_norm(x, m["norm"], cfg.eps).reshape(I, P // cfg.merge ** 2, -1)
  x = layers.dense(x, m["in_w"]) + m["in_b"].astype(dtype)[None, None]
  x = jax.nn.gelu(sharding.constrain(x, "rows", None, "tensor"), approximate=False)
  return sharding.constrain(layers.dense(x, m["out_w"]) + m["out_b"].astype(dtype)[None, None], "rows")
