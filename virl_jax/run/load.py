"""A policy's weights and what goes with them: out of an HF folder, or out of a run."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import os
import pathlib

import jax

from virl_jax import config as config_lib
from virl_jax.data import prompt
from virl_jax.learner import checkpoint
from virl_jax.model import family
from virl_jax.model import sharding
from virl_jax.model import weights
from virl_jax.run import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A policy that can be used.

  Attributes:
    model: its shapes, the ids of its special tokens, and the platform it is on.
    params: placed on the mesh.
    hf_dir: the folder with its tokenizer, chat template and processor.
    config: of the run that trained it; None for an HF folder.
    step: of that run; None for an HF folder.
  """

  model: family.Config
  params: dict
  hf_dir: str
  config: config_lib.ConfigDict | None = None
  step: int | None = None


def model_dir(path: str, key: str = "model.path") -> str:
  """The HF folder that a key of the configuration, most often `model.path`, means.

  Raises:
    ValueError: says what is missing and how to get it.
  """
  if path == "@tiny":
    return str(importlib.resources.files("virl_jax") / "assets" / "tiny_base")
  if not path or not os.path.isfile(os.path.join(path, "config.json")):
    raise ValueError(
        f"config.{key} must be a folder with a Qwen2.5-VL checkpoint, but {path or 'nothing'!r} is not one: get "
        "it with `hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir=weights/Qwen2.5-VL-7B-Instruct`, or name "
        f"another folder with --config.{key}=HF_DIR")
  return path


def policy(path: str, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None, step: int | None = None) -> Loaded:
  """The policy of an HF folder ("@tiny" is the base that ships) or of a run.

  Args:
    path: either of them.
    dtype: of an HF folder's parameters; a run's are of the type that it trained.
    mesh: where they go; None for all devices, each with a part.
    step: of a run; None for the newest.

  Raises:
    ValueError: there is no policy at that path.
  """
  if path != "@tiny" and _is_run(path):
    return trained(path, step, mesh)
  if step is not None:
    raise ValueError(f"step {step} must be of a run's folder. Received: {path}")
  return base(model_dir(path), dtype, mesh or sharding.make(fsdp=-1, data=1))


def base(hf_dir: str, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None) -> Loaded:
  """The policy of an HF folder.

  Args:
    hf_dir: the folder.
    dtype: of the parameters.
    mesh: where they go; None for whole on one device.

  Raises:
    ValueError: files are missing, damaged, or of another model.
  """
  model = weights.read_config(hf_dir)
  where = None if mesh is None else sharding.param_shardings(family.of(model).specs(model), mesh)
  model, params = weights.load_hf(hf_dir, dtype, where)
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  return Loaded(dataclasses.replace(model, platform=sharding.platform(device)), params, hf_dir)


def codec(hf_dir: str, model: family.Config) -> prompt.Codec:
  """An HF folder's tokenizer, for a model.

  Raises:
    ValueError: its files are missing or damaged, or it is another model's.
  """
  import transformers  # seconds to import
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_dir)
  except Exception as e:  # its readers raise anything, bare exceptions of Rust's included
    why = (str(e).splitlines() or [type(e).__name__])[0]
    raise ValueError(f"{hf_dir} must hold a tokenizer that transformers reads ({why}). Download it again") from e
  return prompt.Codec(tokenizer, model.image_token, model.eos, model.text.vocab)


def trained(workdir: str, step: int | None = None, mesh: jax.sharding.Mesh | None = None) -> Loaded:
  """The policy of a run; of a checkpoint, only the parameters are read.

  Args:
    workdir: of the run.
    step: which checkpoint; None for the newest that is whole.
    mesh: where the parameters go; None for all devices, each with a part.

  Raises:
    ValueError: the workdir holds no run or no such checkpoint, or its base is gone.
  """
  c = workdir_lib.config(workdir)
  hf_dir = model_dir(c.model.path)
  model = weights.read_config(hf_dir)
  folder = pathlib.Path(workdir) / "checkpoints"
  saves = checkpoint.Checkpoints(folder, c.checkpoint.every, c.checkpoint.keep) if folder.is_dir() else None
  steps = saves.steps() if saves else []
  if not steps or step is not None and step not in steps:
    raise ValueError(f"{folder} must hold {'a checkpoint' if step is None else f'step {step}'}. Received: "
                     f"{f'steps {steps}' if steps else 'none'}")
  mesh = mesh or sharding.make(fsdp=-1, data=1)
  model = dataclasses.replace(model, platform=sharding.platform(mesh.devices.flat[0]))
  shardings = sharding.param_shardings(family.of(model).specs(model), mesh)
  wanted = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
                        family.abstract_params(model, c.model.dtype), shardings)
  read = lambda step: saves.restore_params(step, wanted)
  step, params = saves.newest(read) if step is None else (step, read(step))
  saves.close()
  return Loaded(model, params, hf_dir, c, step)


def _is_run(path: str) -> bool:
  """Whether a folder's config.json is a run's, not a model's."""
  try:
    found = json.loads((pathlib.Path(path) / "config.json").read_text())
  except (OSError, ValueError):
    return False
  return isinstance(found, dict) and "rollout" in found and "model_type" not in found
