"""Which families of models there are: one plain table.

A family is a folder, and its `model` module is what the rest of the code calls.  That module has

    Config                  frozen; has model_type, platform, compute_dtype, remat, eos, image_token, banned,
                            text.vocab, text.hidden, text.tied, vision.grid, vision.merge
    config_from_hf, config_to_hf, released_name          config.json, and names of tensors
    specs                   the parameter table
    embed, hidden, head     the forward pass
    new_cache, extend       the same, a chunk at a time over a `cache.Cache`

as `qwen2_5.model` documents them.
"""

from __future__ import annotations

import jax.numpy as jnp

from virl_jax.model import params as params_lib
from virl_jax.model.qwen2_5 import model as qwen2_5

FAMILIES = {"qwen2_5_vl": qwen2_5}  # by the model_type of config.json

Config = qwen2_5.Config  # of any family


def of(cfg: Config):
  """The module of a model's family."""
  return FAMILIES[cfg.model_type]


def config_from_hf(config: dict, where: str = "config.json") -> Config:
  """Reads a parsed config.json of any family.

  Args:
    config: the parsed file.
    where: named in errors.

  Raises:
    ValueError: if it is of no family that is known, or lacks a key.
  """
  model_type = config.get("model_type")
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    known = " or ".join(map(repr, sorted(FAMILIES)))
    raise ValueError(f"{where}: model_type must be {known}. Received: {model_type!r}")
  return FAMILIES[model_type].config_from_hf(config, where)


def abstract_params(cfg: Config, dtype: str = "float32") -> dict:
  """Shapes and dtypes of the parameters, nothing allocated."""
  return params_lib.abstract(of(cfg).specs(cfg), jnp.dtype(dtype))
