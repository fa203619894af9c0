"""Which parameters are trained: all, all but the vision tower, or low-rank adapters on top of frozen ones.

All are transforms of the parameter table: a table is cut into what is trained and what is frozen, and two such trees
are joined into what the model takes.  Adapters are parameters like others, with initial values, axes, and names in
files.  Source: LoRA (arXiv 2106.09685); names of targets and files as in PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import math

import jax
import jax.numpy as jnp

from virl_jax.model import params as params_lib

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Config:
  """What is trained.

  Attributes:
    rank: r of the adapters; 0 for none, and then the parameters themselves are trained.
    alpha: an adapter's output is multiplied by alpha / rank.
    targets: modules that get an adapter, by the last part of their names in HF files.
    freeze_vision: whether nothing of the vision tower is trained; it gets no adapters either.
  """

  rank: int = 0
  alpha: float = 32.0
  targets: tuple[str, ...] = TARGETS
  freeze_vision: bool = False

  @property
  def scale(self) -> float:
    """What an adapter's product is multiplied by."""
    return self.alpha / self.rank


def tables(specs: dict, cfg: Config) -> tuple[dict, dict]:
  """A parameter table cut in two: what is trained, and what is frozen.  An adapter has the path of its matrix.

  Args:
    specs: the whole model's table.
    cfg: what is trained.

  Raises:
    ValueError: a target names no matrix of the layers.
  """
  if not cfg.rank:
    return cut(specs, cfg)
  adapters, found = {}, set()
  for path, spec in params_lib.leaves(specs):
    module = _module(spec)
    if module in cfg.targets and not _is_frozen(path, cfg):
      _put(adapters, path, _adapter(spec, cfg.rank))
      found.add(module)
  if missing := [name for name in cfg.targets if name not in found]:
    there = sorted({_module(spec) for path, spec in params_lib.leaves(specs) if not _is_frozen(path, cfg)} - {None})
    raise ValueError(f"config.lora.targets must name matrices of the model's layers that are not frozen, such as "
                     f"{', '.join(there)}. Received: {', '.join(map(repr, missing))}")
  return adapters, specs


def cut(params: dict, cfg: Config) -> tuple[dict, dict]:
  """A tree like the released parameters, without adapters, cut into what is trained and what is frozen."""
  if cfg.rank:
    return {}, params
  if cfg.freeze_vision:
    return {k: v for k, v in params.items() if k != "vision"}, {"vision": params["vision"]}
  return params, {}


def join(trained: dict, frozen: dict, cfg: Config) -> dict:
  """The inverse of `tables`, for tables and for trees like them: what the model takes."""
  def put(trained, frozen):
    if not isinstance(frozen, dict):
      return params_lib.LowRank(frozen, trained["a"], trained["b"], cfg.scale)
    return frozen | {key: put(value, frozen[key]) if key in frozen else value for key, value in trained.items()}

  return put(trained, frozen)


def reference(trained: dict, frozen: dict, cfg: Config) -> dict:
  """The policy as it is now, before training; `trained` is copied.  Adapters begin at zero, and are left out."""
  if cfg.rank:
    return frozen
  copy = lambda a: a if isinstance(a, jax.ShapeDtypeStruct) else a.copy()
  return join(jax.tree.map(copy, trained), frozen, cfg)


def merged(w, layer: int | None = None):
  """A parameter, or one layer of it, with its adapter merged into it, in float32; without an adapter, as it is."""
  take = lambda a: a if layer is None else a[layer]
  if not isinstance(w, params_lib.LowRank):
    return take(w)
  base, a, b = (take(part).astype(jnp.float32) for part in (w.base, w.a, w.b))
  return base + w.scale * jnp.tensordot(a, b, 1)


def adapters(specs: dict) -> Iterator[tuple[tuple[str, ...], params_lib.ParamSpec]]:
  """Path and spec of each adapter's two parameters in a table."""
  return ((path, spec) for path, spec in params_lib.leaves(specs) if path[-1] in ("a", "b"))


def _is_frozen(path: tuple[str, ...], cfg: Config) -> bool:
  return cfg.freeze_vision and path[0] == "vision"


def _module(spec: params_lib.ParamSpec) -> str | None:
  """The module's name, "q_proj" of "model.layers.{layer}.self_attn.q_proj.weight"; None if not a layers' matrix."""
  return spec.hf_name.split(".")[-2] if spec.layer_matrix else None


def _adapter(spec: params_lib.ParamSpec, rank: int) -> dict:
  """The specs of a matrix's adapter: [layers, in ..., r] and [layers, r, out ...]."""
  n_out = params_lib.hf_rows(spec)
  ins, outs = ([(size, axis, at) for size, axis, at in zip(spec.item_shape, spec.axes[1:], spec.perm) if keep(at)]
               for keep in (lambda at: at >= n_out, lambda at: at < n_out))
  name = spec.hf_name.removesuffix("weight")

  def one(sizes, axes, init, part, hf_shape, perm):
    return params_lib.ParamSpec((spec.shape[0], *sizes), ("layers", *axes), init, f"{name}lora_{part}.weight", hf_shape,
                                perm)

  (in_sizes, in_axes, in_at), (out_sizes, out_axes, out_at) = zip(*ins), zip(*outs)
  return {"a": one((*in_sizes, rank), (*in_axes, None), "normal", "A", (rank, math.prod(in_sizes)),
                   (*(at - n_out + 1 for at in in_at), 0)),
          "b": one((rank, *out_sizes), (None, *out_axes), "zeros", "B", (math.prod(out_sizes), rank),
                   (n_out, *out_at))}


def _put(tree: dict, path: tuple[str, ...], value) -> None:
  *inner, last = path
  for key in inner:
    tree = tree.setdefault(key, {})
  tree[last] = value
