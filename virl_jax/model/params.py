"""One declaration a parameter: shape, logical axes, initialiser, and its name and layout in HF files.

A model's parameters are a nested dict of `ParamSpec`.  Initial values, shapes for `eval_shape`,
shardings, HF import and HF export all follow from that one table.  Layers are stacked: a spec whose
first axis is "layers" stands for one HF tensor a layer, and its `hf_name` contains "{layer}".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import dataclasses
import math
import zlib

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Params = dict


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """How one parameter looks here and in an HF checkpoint.

  Attributes:
    shape: our shape, the "layers" axis included.
    axes: one logical axis name (or None) for each dimension; `sharding.RULES` maps them to mesh axes.
    init: "normal" (variance 1 / fan-in, from `hf_shape`), "ones" or "zeros".
    hf_name: tensor name in the released layout, with "{layer}" where stacked.
    hf_shape: shape of one HF tensor.
    perm: our (unstacked) dimension i is dimension perm[i] of the HF tensor after its dimensions are split
      (`hf_split`); None if the HF tensor only needs a reshape.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  init: str
  hf_name: str
  hf_shape: tuple[int, ...]
  perm: tuple[int, ...] | None = None

  def __post_init__(self):
    if len(self.shape) != len(self.axes):
      raise ValueError(f"{self.hf_name}: axes must name every dimension of {self.shape}. Received: {self.axes}")
    if math.prod(self.item_shape) != math.prod(self.hf_shape):
      raise ValueError(f"{self.hf_name}: hf_shape must have as many elements as {self.item_shape}. "
                       f"Received: {self.hf_shape}")

  @property
  def stacked(self) -> bool:
    return bool(self.axes) and self.axes[0] == "layers"

  @property
  def layer_matrix(self) -> bool:
    """Whether it is a matrix of every layer."""
    return self.stacked and len(self.hf_shape) == 2

  @property
  def item_shape(self) -> tuple[int, ...]:
    """Our shape without the layers axis."""
    return self.shape[1:] if self.stacked else self.shape

  def hf_names(self) -> list[str]:
    """The HF tensors that this parameter is made of, in layer order."""
    return [self.hf_name.format(layer=i) for i in range(self.shape[0])] if self.stacked else [self.hf_name]


@flax.struct.dataclass
class LowRank:
  """A matrix with an adapter: base + scale * a b, a sum that is never computed while the model runs.

  Attributes:
    base: [..., in, out], as `layers.dense` takes it, with or without a leading axis of layers.
    a: [..., in, r].
    b: [..., r, out].
    scale: what the product a b is multiplied by.

  Source: LoRA (arXiv 2106.09685), section 4.1.
  """

  base: jax.Array
  a: jax.Array
  b: jax.Array
  scale: float = flax.struct.field(pytree_node=False)


def stack(n_layers: int, specs: dict) -> dict:
  """The same parameters once for each of `n_layers` layers, on a leading "layers" axis."""
  return map_specs(lambda s: dataclasses.replace(s, shape=(n_layers, *s.shape), axes=("layers", *s.axes)), specs)


def map_specs(fn: Callable, specs: dict, *rest):
  """`jax.tree.map` over the specs of a table."""
  return jax.tree.map(fn, specs, *rest, is_leaf=lambda x: isinstance(x, ParamSpec))


def leaves(specs: dict) -> Iterator[tuple[tuple[str, ...], ParamSpec]]:
  """Each parameter's path in the table, with its spec."""
  for path, spec in jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda x: isinstance(x, ParamSpec))[0]:
    yield tuple(getattr(entry, "key", None) or entry.name for entry in path), spec


def count(specs: dict) -> int:
  """How many numbers the parameters hold."""
  return sum(math.prod(spec.shape) for _, spec in leaves(specs))


def abstract(specs: dict, dtype) -> Params:
  """Shapes and dtypes, nothing allocated."""
  return map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), specs)


def init(specs: dict, key: jax.Array, dtype) -> Params:
  """Fresh parameters.

  Args:
    specs: the table.
    key: each parameter draws from `key` folded with a hash of its HF name, so that adding a parameter
      changes no other.
    dtype: parameter dtype.

  Returns:
    The nested dict of arrays.

  Source: ours.  Variance 1 / fan-in is close to the released `initializer_range` (0.02) at released
  widths, and lets a model 128 wide learn to see, which 0.02 does not.
  """
  def draw(spec: ParamSpec):
    if spec.init == "normal":
      k = jax.random.fold_in(key, zlib.crc32(spec.hf_name.encode()))
      fan_in = math.prod(spec.hf_shape[1:])
      return (fan_in ** -0.5 * jax.random.normal(k, spec.shape, jnp.float32)).astype(dtype)
    if spec.init == "ones":
      return jnp.ones(spec.shape, dtype)
    if spec.init == "zeros":
      return jnp.zeros(spec.shape, dtype)
    raise ValueError(f"{spec.hf_name}: init must be 'normal', 'ones' or 'zeros'. Received: {spec.init!r}")

  return map_specs(draw, specs)


def hf_split(spec: ParamSpec) -> tuple[int, ...]:
  """The shape of one HF tensor with its dimensions split, so that each is one of ours; see `ParamSpec.perm`."""
  if spec.perm is None:
    return spec.hf_shape
  return tuple(spec.item_shape[spec.perm.index(i)] for i in range(len(spec.perm)))


def hf_rows(spec: ParamSpec) -> int:
  """How many of `hf_split`'s dimensions make up the rows of an HF matrix, its outputs; the others are its inputs."""
  split = hf_split(spec)
  return next(n for n in range(1, len(split)) if math.prod(split[:n]) == spec.hf_shape[0])


def from_hf(spec: ParamSpec, tensor: np.ndarray) -> np.ndarray:
  """One HF tensor in our (unstacked) layout."""
  if spec.perm is None:
    return tensor.reshape(spec.item_shape)
  return tensor.reshape(hf_split(spec)).transpose(spec.perm)


def strips(split: tuple[int, ...], rows: int, most: int) -> Iterator[tuple[tuple, slice]]:
  """Cuts a tensor into strips of whole rows.

  Args:
    split: the tensor's shape after its dimensions are split; the first few make up the rows.
    rows: how many rows the unsplit tensor has.
    most: most numbers in a strip, which has at least one row even if that has more.

  Yields:
    The strip's index into the split tensor, and its rows of the unsplit one.
  """
  def cut(shape, rows, start, prefix):
    inner = math.prod(shape[1:])
    if inner > most and rows > shape[0]:  # one entry is too large, and holds several rows
      for i in range(shape[0]):
        yield from cut(shape[1:], rows // shape[0], start + i * (rows // shape[0]), (*prefix, i))
      return
    step, per = max(1, most // inner), rows // shape[0]
    for i in range(0, shape[0], step):
      end = min(i + step, shape[0])
      yield (*prefix, slice(i, end)), slice(start + i * per, start + end * per)

  yield from cut(split, rows, 0, ())


def to_hf(spec: ParamSpec, array: np.ndarray) -> np.ndarray:
  """The inverse of `from_hf`."""
  if spec.perm is None:
    return array.reshape(spec.hf_shape)
  return np.ascontiguousarray(array.transpose(np.argsort(spec.perm))).reshape(spec.hf_shape)
