"""From a ConfigDict to the frozen pieces that a run is made of, and the workdir that it owns."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.resources
import json
import logging
import os
import pathlib
import platform

import jax

from virl_jax import config as config_lib
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.data.sources import jsonl
from virl_jax.learner import step as step_lib
from virl_jax.model import sharding
from virl_jax.model import weights
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.rl import advantage
from virl_jax.rl import credit
from virl_jax.rl import loss
from virl_jax.rl import reward
from virl_jax.rollout import pack
from virl_jax.rollout import sample
from virl_jax.rollout import turns
from virl_jax.run import caches
from virl_jax.run import memory
from virl_jax.tiny import needle
from virl_jax.tiny import source as tiny_source


def begin() -> None:
  """What a program that trains does before all else: quiet libraries, memory that is kept, compiled programs too."""
  for chatty in ("absl", "jax"):  # Orbax tells of every file it writes, JAX of every accelerator it does not find
    logging.getLogger(chatty).setLevel(logging.WARNING)
  memory.keep_when_on_cpu()
  caches.keep_programs()


@contextlib.contextmanager
def told():
  """Ends the program with a ValueError's message alone, or with all of it if VIRL_JAX_DEBUG is set.

  Raises:
    SystemExit: in place of the ValueError.
  """
  try:
    yield
  except ValueError as e:
    if os.environ.get("VIRL_JAX_DEBUG"):
      raise
    raise SystemExit(f"error: {e}\n(VIRL_JAX_DEBUG=1 shows where)") from e


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


@dataclasses.dataclass(frozen=True)
class Pieces:
  """Everything of a run that is fixed.

  Attributes:
    policy: for rollouts.
    step: static argument of the learner's steps.
    pack: how batches are padded.
    mesh: where arrays go.
    hf_dir: the folder that the base came from.
  """

  policy: turns.Policy
  step: step_lib.Config
  pack: pack.Config
  mesh: jax.sharding.Mesh
  hf_dir: str


def pieces(c: config_lib.ConfigDict) -> Pieces:
  """Builds them, reading only the base's config and tokenizer.

  Raises:
    ValueError: if something that the configuration names is missing or does not fit.
  """
  config_lib.validate(c)
  hf_dir = model_dir(c.model.path)
  model = dataclasses.replace(weights.read_config(hf_dir), compute_dtype=c.model.compute_dtype, remat=c.model.remat)
  import transformers  # seconds to import
  codec = prompt.Codec(transformers.AutoTokenizer.from_pretrained(hf_dir), model.image_token, model.eos)
  mesh = sharding.make(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
  rows = c.rollout.prompts * c.rollout.group_size // c.ppo.minibatches
  shards = sharding.row_shards(mesh)
  if rows % shards:
    raise ValueError(f"config.rollout.prompts * group_size / ppo.minibatches must be a multiple of the mesh's "
                     f"data x fsdp = {shards}. Received: {rows}")
  r = c.rollout
  return Pieces(
      policy=turns.Policy(model, codec, prompt.Config(**c.prompt), images.Config(**c.image),
                          turns.Config(keep=sample.Filter(r.top_k, r.top_p, r.min_p), **_fields(turns.Config, r)),
                          mesh),
      step=step_lib.Config(model, r.group_size, r.temperature, reward.Config(**c.reward), credit.Config(**c.credit),
                           advantage.Config(**c.advantage), loss.Config(**c.loss), step_lib.OptimConfig(**c.optim),
                           mesh, single_update=c.ppo.minibatches * c.ppo.epochs == 1),
      pack=pack.Config(model.vision.grid, model.image_token, r.max_rounds, r.pad_tokens,
                       pad_images=pack.up(rows // 2, shards), pad_shown=max(shards, rows // r.group_size),
                       mask_overlong=r.mask_overlong, scope=c.credit.scope, join=r.join_rows,
                       pad_joined=pack.up(rows // 8, shards)),
      mesh=mesh, hf_dir=hf_dir)


def _fields(kind, section) -> dict:
  """What of a section of the configuration a dataclass has fields for."""
  return {f.name: section[f.name] for f in dataclasses.fields(kind) if f.name in section}


def source(c: config_lib.ConfigDict, split: str):
  """The tasks of "train" or "test"."""
  if c.data.source == "needle":
    return tiny_source.load(c.data.path, split, needle.Config(**c.data.needle))
  return jsonl.load(c.data.path, split, c.data.eval_fraction, c.seed)


def load_params(p: Pieces, dtype: str) -> dict:
  """The base's parameters, placed on the mesh."""
  _, params = weights.load_hf(p.hf_dir, dtype, sharding.param_shardings(qwen.specs(p.policy.model), p.mesh))
  return params


def claim_workdir(path: str, c: config_lib.ConfigDict) -> pathlib.Path:
  """Makes the folder, or makes sure that it belongs to this configuration.

  Args:
    path: the workdir.
    c: the run's configuration; only `steps` and `monitor`, which change no step, may differ from what the folder holds.

  Raises:
    ValueError: names the keys that differ; nothing in the folder is touched.
  """
  folder = pathlib.Path(path)
  file = folder / "config.json"
  text = config_lib.to_json(c)
  if file.exists():
    try:
      found = json.loads(file.read_text())
    except ValueError as e:
      raise ValueError(f"{file} must be JSON ({e}); use another --workdir") from e
    old, new = _flat(found), _flat(json.loads(text))
    differ = sorted(k for k in old.keys() | new.keys()
                    if old.get(k) != new.get(k) and k != "steps" and not k.startswith("monitor."))
    if differ:
      shown = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in differ[:5])
      raise ValueError(f"{folder} holds a run with another configuration ({shown}"
                       f"{f'; {len(differ) - 5} more' if len(differ) > 5 else ''}); use another --workdir")
  elif folder.exists() and any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints")):
    raise ValueError(f"{folder} holds a run but no config.json to tell whose; use another --workdir")
  (folder / "rollouts").mkdir(parents=True, exist_ok=True)
  write_text(file, text)
  return folder


def header(c: config_lib.ConfigDict) -> dict:
  """What a run's figures are made with, for the first line of metrics.jsonl; no clock, so that runs can be compared.

  Args:
    c: the run's configuration.

  Returns:
    "config", the whole of it; "versions" by package, and of Python; "device", its kind; "devices", how many.
  """
  packages = ("jax", "jaxlib", "flax", "optax", "numpy", "virl_jax")
  return {"config": json.loads(config_lib.to_json(c)),
          "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
          "device": jax.devices()[0].device_kind, "devices": jax.device_count()}


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:  # virl_jax, run from its folder
    return "not installed"


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file whole or not at all."""
  tmp = path.with_name(path.name + ".tmp")
  tmp.write_text(text)
  os.replace(tmp, path)


def _flat(tree, prefix: str = "") -> dict:
  if not isinstance(tree, dict):
    return {prefix: tree}
  return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{name}" if prefix else name).items()}
