"""Which families of models there are: one plain table.

A family is a folder, and its `model` module is what the rest of the code calls.  That module has

    Config                  frozen; has model_type, platform, compute_dtype, remat, tuning, eos, image_token, banned,
                            text.vocab, text.hidden, text.tied, vision.grid, vision.merge
    config_from_hf, config_to_hf                        config.json
    released_name, transformers_name                    names of tensors, in files and in memory
    specs                   the table of the released parameters, with "vision" for the tower's
    embed, hidden, head     the forward pass
    new_cache, extend       the forward pass a chunk at a time, over a `cache.Cache`

as `qwen2_5.model` documents them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from virl_jax.model import params as params_lib
from virl_jax.model import sharding
from virl_jax.model import tuning
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
    where: the file's name in errors.

  Raises:
    ValueError: its family is unknown, or the family refuses it (a missing key, a value that is not implemented).
  """
  model_type = config.get("model_type")
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    known = " or ".join(map(repr, sorted(FAMILIES)))
    raise ValueError(f"{where}: model_type must be {known}. Received: {model_type!r}")
  return FAMILIES[model_type].config_from_hf(config, where)


def tables(cfg: Config) -> tuple[dict, dict]:
  """The tables of the parameters that are trained, and of those that are frozen."""
  return tuning.tables(of(cfg).specs(cfg), cfg.tuning)


def whole(trained: dict, frozen: dict, cfg: Config) -> dict:
  """All parameters, as the model takes them, from two trees like those of `tables`."""
  return tuning.join(trained, frozen, cfg.tuning)


def specs(cfg: Config) -> dict:
  """The table of all parameters, adapters included."""
  return whole(*tables(cfg), cfg)


def shardings(cfg: Config, mesh: jax.sharding.Mesh) -> dict:
  """The sharding of every parameter on a mesh."""
  return sharding.param_shardings(specs(cfg), mesh)


def abstract_params(cfg: Config, dtype: str = "float32") -> dict:
  """Shapes and dtypes of all parameters, nothing allocated."""
  return params_lib.abstract(specs(cfg), jnp.dtype(dtype))


def abstract(cfg: Config, dtype: str, mesh: jax.sharding.Mesh) -> tuple[dict, dict]:
  """Shapes, dtypes and shardings of the trained parameters, and of the frozen ones, nothing allocated.

  Args:
    cfg: the model.
    dtype: of the trained parameters.  Frozen ones have the compute dtype: they are cast to it wherever they are used,
      so that no result changes.
    mesh: the mesh that they lie on.
  """
  place = lambda table, dtype: jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params_lib.abstract(table, jnp.dtype(dtype)),
      sharding.param_shardings(table, mesh))
  trained, frozen = tables(cfg)
  return place(trained, dtype), place(frozen, cfg.compute_dtype)
