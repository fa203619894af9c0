"""What a layer keeps for the backward pass instead of computing it again, by name.

    attention  its output, before the output projection, and what a kernel's backward pass needs; N x H numbers a token
    mlp        the outputs of the gate and of the up projection, both of which the backward pass needs; 2 x F
    qkv        queries and keys, rotated, and values; (N + 2 K) x H
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import jax
from jax import ad_checkpoint

NAMES = ("attention", "mlp", "qkv")
_CUDNN = "dot_product_attention_fwd"  # in the name of cuDNN's primitive, whose outputs have no checkpoint names


@dataclasses.dataclass(frozen=True)
class Kept:
  """What is kept of a layer that is computed again, besides its input.

  Attributes:
    device: names of values that are kept on the device.
    host: names of values that are kept in the host's pinned memory.

  Raises:
    ValueError: a name is unknown, or is in both.
  """

  device: tuple[str, ...] = ()
  host: tuple[str, ...] = ()

  def __post_init__(self):
    unknown = [name for name in (*self.device, *self.host) if name not in NAMES]
    if unknown:
      raise ValueError(f"what a layer keeps must be among {', '.join(NAMES)}. Received: {', '.join(map(str, unknown))}")
    both = set(self.device) & set(self.host)
    if both:
      raise ValueError(f"what a layer keeps must be on the device or in the host's memory. Received both for: "
                       f"{', '.join(sorted(both))}")


def named(x: jax.Array, name: str) -> jax.Array:
  """x, with a name by which `Kept` can keep it."""
  return ad_checkpoint.checkpoint_name(x, name)


def layer(fn: Callable, remat: bool, kept: Kept = Kept()) -> Callable:
  """A layer that is computed again in the backward pass, but for what is kept; `fn` itself unless `remat`."""
  if not remat:
    return fn
  policies = jax.checkpoint_policies
  if kept.host:
    policy = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(kept.device), names_which_can_be_offloaded=list(kept.host),
        offload_src="device", offload_dst="pinned_host")
  else:
    policy = policies.save_only_these_names(*kept.device) if kept.device else None
  return jax.checkpoint(fn, policy=_with_cudnn(policy) if policy else None)


def _with_cudnn(policy: Callable) -> Callable:
  """The policy, which also treats the outputs of cuDNN's attention as if they were named "attention"."""
  naming = jax.make_jaxpr(lambda x: named(x, "attention"))(0.0).eqns[0].primitive

  def decide(primitive, *avals, **params):
    if _CUDNN in primitive.name:
      return policy(naming, *avals, name="attention")
    return policy(primitive, *avals, **params)

  return decide
