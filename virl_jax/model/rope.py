"""Rotary positions: which position a token has (numpy, host) and the rotation itself (jax).

Qwen2.5-VL gives each token three positions (time, height, width).  Text advances all three together;
an image's merged cells share one time and spread over rows and columns; what follows continues one past
the largest position so far.  Source: Qwen2-VL (arXiv 2409.12191), section 2.1, "M-RoPE".
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def positions(ids_T: np.ndarray, image_token: int, grids_hw: list[tuple[int, int]], start: int = 0
              ) -> tuple[np.ndarray, int]:
  """M-RoPE positions of a stretch of tokens.

  Args:
    ids_T: int[T] token ids; every image is a run of `image_token`.
    image_token: id of the image placeholder.
    grids_hw: merged rows and columns of each image in the stretch, in order.
    start: position of the first token: 0 for a prompt; for what follows, the position that the last call returned.

  Returns:
    int32[3, T] positions (time, height, width), and the position of the next token.

  Raises:
    ValueError: the placeholders don't match the images.
  """
  ids_T = np.asarray(ids_T)
  pos_XT = np.empty((3, len(ids_T)), np.int32)
  wanted = sum(h * w for h, w in grids_hw)
  found = int((ids_T == image_token).sum())
  if wanted != found:
    raise ValueError(f"ids_T must hold {wanted} image placeholders for grids {grids_hw}. Received: {found}")
  t, images = 0, iter(grids_hw)
  while t < len(ids_T):
    if ids_T[t] == image_token:
      h, w = next(images)
      n = h * w
      if not (ids_T[t:t + n] == image_token).all():
        raise ValueError(f"ids_T must hold {n} image placeholders in a row for grid {(h, w)} at token {t}")
      pos_XT[0, t:t + n] = start
      pos_XT[1, t:t + n] = start + np.repeat(np.arange(h), w)
      pos_XT[2, t:t + n] = start + np.tile(np.arange(w), h)
      start += max(h, w)
      t += n
    else:
      pos_XT[:, t] = start
      start += 1
      t += 1
  return pos_XT, start


def _inv_freq(n: int, theta: float) -> np.ndarray:
  """float32[n]: theta^(-i/n)."""
  return (1.0 / (theta ** (np.arange(n, dtype=np.float32) / np.float32(n)))).astype(np.float32)


def mrope(pos_BXT: jax.Array, head_size: int, sections: tuple[int, ...], theta: float
          ) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of the text decoder's rotary embedding.

  Args:
    pos_BXT: int32[B, 3, T].
    head_size: H; `sections` must add up to H / 2.
    sections: how many frequencies, in order, belong to time, height, width, time, ...
    theta: base.

  Returns:
    Two float32[B, T, H].

  Raises:
    ValueError: if the sections don't add up.
  """
  if 2 * sum(sections) != head_size:
    raise ValueError(f"sections must add up to head_size / 2 = {head_size / 2}. Received: {sections}")
  axis = np.repeat(np.arange(len(sections)) % 3, sections)
  inv = _inv_freq(head_size // 2, theta)
  angle = pos_BXT[:, axis, :].swapaxes(1, 2).astype(jnp.float32) * inv[None, None]
  angle = jnp.concatenate([angle, angle], axis=-1)
  return jnp.cos(angle), jnp.sin(angle)


def vision_rope(rowcol: jax.Array, head_size: int, theta: float = 10000.0) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of the vision tower's 2-D rotary embedding.

  Args:
    rowcol: int32[..., 2] patch row and column.
    head_size: H, a multiple of 4: H/4 frequencies for rows, H/4 for columns, each used twice.
    theta: base; Qwen2.5-VL fixes it at 10,000.

  Returns:
    Two float32[..., H].
  """
  inv = _inv_freq(head_size // 4, theta)
  angle = rowcol[..., None].astype(jnp.float32) * inv.reshape((1,) * rowcol.ndim + (-1,))
  angle = angle.reshape(*rowcol.shape[:-1], head_size // 2)
  angle = jnp.concatenate([angle, angle], axis=-1)
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates pairs (i, i + H/2) of each head, in float32, and casts back.

  Args:
    x: [..., heads, H].
    cos: float32[..., H]; a heads axis is inserted.
    sin: like `cos`.
  """
  x32 = x.astype(jnp.float32)
  a, b = jnp.split(x32, 2, axis=-1)
  turned = jnp.concatenate([-b, a], axis=-1)
  return (x32 * cos[..., None, :] + turned * sin[..., None, :]).astype(x.dtype)
