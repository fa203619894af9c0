"""Where compiled programs and drawn pictures are kept between runs; deleting them only costs time."""

from __future__ import annotations

import os
import pathlib

import jax


def folder(name: str = "") -> pathlib.Path:
  """$VIRL_JAX_CACHE/NAME, or ~/.cache/virl_jax/NAME."""
  base = os.environ.get("VIRL_JAX_CACHE")
  return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache" / "virl_jax") / name


def keep_programs() -> None:
  """Keeps what XLA compiles in this process for later ones; $JAX_COMPILATION_CACHE_DIR, if set, says where.

  JAX identifies a program by its code, shapes, options, version and device, so that none is taken for another.
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ and not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(folder("xla")))
