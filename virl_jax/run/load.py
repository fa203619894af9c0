"""A policy's weights and what belongs to them, from an HF folder or from a run."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import os

import jax
import jax.numpy as jnp

from virl_jax import config as config_lib
from virl_jax.data import prompt
from virl_jax.learner import checkpoint
from virl_jax.model import family
from virl_jax.model import params as params_lib
from virl_jax.model import sharding
from virl_jax.model import tuning
from virl_jax.model import weights
from virl_jax.run import files
from virl_jax.run import hosts
from virl_jax.run import progress
from virl_jax.run import workdir as workdir_lib

_ADAPTERS = 2 ** 31 - 2  # folded into the run's key; no step has this number


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A policy that can be used.

  Attributes:
    model: its shapes, the ids of its special tokens, which parameters are trained, and its platform.
    trained, frozen: its parameters, placed on the mesh; see `family.tables`.
    hf_dir: the folder with its tokenizer, chat template and processor.
    config: of the run that trained it; None for an HF folder.
    step: of the checkpoint; None for an HF folder.
  """

  model: family.Config
  trained: dict
  frozen: dict
  hf_dir: str
  config: config_lib.ConfigDict | None = None
  step: int | None = None

  @property
  def params(self) -> dict:
    """All parameters, as the model takes them."""
    return family.whole(self.trained, self.frozen, self.model)


def model_dir(path: str, key: str = "model.path") -> str:
  """The HF folder that a key of the configuration names.

  Args:
    path: the key's value; "@tiny" is the base that ships with the package.
    key: its name, for the error.

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
  """The policy of an HF folder ("@tiny" is the tiny base) or of a run.

  Args:
    path: the HF folder, or the run's.
    dtype: of an HF folder's parameters; a run's parameters keep their own.
    mesh: where parameters go; None for all devices, each with a part.
    step: which checkpoint of a run; None for the newest.

  Raises:
    ValueError: there is no policy at that path.
  """
  if is_run(path):
    return trained(path, step, mesh)
  if step is not None:
    raise ValueError(f"step {step} can be chosen only in a run's folder. Received: {path}")
  return base(model_dir(path), dtype, mesh or sharding.make(fsdp=-1, data=1))


def base(hf_dir: str, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None,
         model: family.Config | None = None, seed: int = 0) -> Loaded:
  """The policy of an HF folder.

  Args:
    hf_dir: the folder.
    dtype: of the parameters that are trained.
    mesh: where parameters go; None for whole on one device.
    model: says which parameters are trained; the others have its compute dtype.  None trains all.
    seed: of the initial values of adapters, if there are any; at first adapters add nothing.

  Raises:
    ValueError: files are missing, damaged, or of another model.
  """
  if model is None:
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    model = dataclasses.replace(weights.read_config(hf_dir), platform=sharding.platform(device))
  specs, how = family.of(model).specs(model), model.tuning
  where = None if mesh is None else sharding.param_shardings(specs, mesh)
  trained, frozen = tuning.cut(specs, how)
  dtypes = (params_lib.map_specs(lambda _: dtype, trained)
            | params_lib.map_specs(lambda _: model.compute_dtype, frozen))
  with progress.bar(params_lib.count(specs), f"loading {hf_dir}", "parameter", hosts.leads()) as bar:
    trained, frozen = tuning.cut(weights.load_hf(hf_dir, dtypes, where, tell=bar.update)[1], how)
  if how.rank:
    trained = _adapters(model, dtype, mesh, seed)
  return Loaded(model, trained, frozen, hf_dir)


def _adapters(model: family.Config, dtype: str, mesh: jax.sharding.Mesh | None, seed: int) -> dict:
  """Fresh adapters."""
  table = family.tables(model)[0]
  where = None if mesh is None else sharding.param_shardings(table, mesh)
  draw = jax.jit(lambda key: params_lib.init(table, key, jnp.dtype(dtype)), out_shardings=where)
  return draw(jax.random.fold_in(jax.random.key(seed), _ADAPTERS))


def codec(hf_dir: str, model: family.Config) -> prompt.Codec:
  """An HF folder's tokenizer, for a model.

  Raises:
    ValueError: its files are missing or damaged, or it does not belong to the model.
  """
  import transformers  # seconds to import
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf_dir)
  except Exception as e:  # transformers' readers raise anything, even bare exceptions of Rust code
    why = (str(e).splitlines() or [type(e).__name__])[0]
    raise ValueError(f"{hf_dir} must hold a tokenizer that transformers reads ({why}). Download it again") from e
  return prompt.Codec(tokenizer, model.image_token, model.eos, model.text.vocab)


def trained(workdir: str, step: int | str | None = None, mesh: jax.sharding.Mesh | None = None) -> Loaded:
  """The policy of a run; only the parameters of a checkpoint are read.

  Args:
    workdir: of the run.
    step: which checkpoint; None for the newest that is whole, "best" for the one with the best score.
    mesh: where the parameters go; None for all devices, each with a part.

  Raises:
    ValueError: the workdir holds no run or no such checkpoint, or its base is gone.
  """
  c = workdir_lib.config(workdir)
  hf_dir = model_dir(c.model.path)
  model = of_config(c, weights.read_config(hf_dir))
  folder = files.path(workdir) / "checkpoints"
  saves = None
  if files.is_dir(folder):
    saves = checkpoint.Checkpoints(folder, c.checkpoint.every, c.checkpoint.keep, step == "best")
  steps = saves.steps() if saves else []
  if step == "best" and steps:
    step = saves.best()
    if step is None:
      raise ValueError(f"{folder} must hold a checkpoint with a score, as runs with config.checkpoint.best leave them. "
                       f"Received: steps {steps}, none with one")
  if not steps or step is not None and step not in steps:
    raise ValueError(f"{folder} must hold {'a checkpoint' if step is None else f'step {step}'}. Received: "
                     f"{f'steps {steps}' if steps else 'none'}")
  mesh = mesh or sharding.make(fsdp=-1, data=1)
  model = dataclasses.replace(model, platform=sharding.platform(mesh.devices.flat[0]))
  read = lambda step: saves.restore_params(step, family.abstract(model, c.model.dtype, mesh)[0])
  step, params = saves.newest(read) if step is None else (step, read(step))
  saves.close()
  frozen = family.tables(model)[1]
  if frozen:  # from the base, of which nothing else is read
    where = sharding.param_shardings(frozen, mesh)
    with progress.bar(params_lib.count(frozen), f"loading {hf_dir}", "parameter", hosts.leads()) as bar:
      frozen = weights.load_hf(hf_dir, model.compute_dtype, where, frozen, bar.update)[1]
  return Loaded(model, params, frozen, hf_dir, c, step)


def of_config(c: config_lib.ConfigDict, model: family.Config) -> family.Config:
  """A model with what a configuration says of it: which parameters are trained, and how it is computed."""
  return dataclasses.replace(
      model, compute_dtype=c.model.compute_dtype, remat=c.model.remat, remat_keep=tuple(c.model.remat_keep),
      remat_offload=tuple(c.model.remat_offload), patches_together=c.model.patches_together,
      gather_vision=c.model.gather_vision,
      tuning=tuning.Config(c.lora.rank, c.lora.alpha, tuple(c.lora.targets), c.model.freeze_vision))


def is_run(path: str) -> bool:
  """Whether a folder's config.json is a run's, not a model's."""
  try:
    found = json.loads(files.read_text(files.path(path) / "config.json"))
  except (OSError, ValueError):
    return False
  return isinstance(found, dict) and "rollout" in found and "model_type" not in found
