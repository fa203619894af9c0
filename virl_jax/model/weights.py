"""HF folders <-> parameters, through the `ParamSpec` table.  No torch.

Reads and writes safetensors, single and sharded.  The family's module knows the names of its tensors and its
config.json.  Folders are written in the released layout, which transformers and vLLM load.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
import dataclasses
import functools
import gc
import json
import math
import pathlib
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from virl_jax.model import family
from virl_jax.model import hf
from virl_jax.model import outdir
from virl_jax.model import params as params_lib
from virl_jax.model import tuning

SHARD_BYTES = 5 * 1024 ** 3
# Tensors are read in strips of this size; stacks of at most this size are put together on the host.
STRIP_BYTES = 32 * 1024 ** 2
# Files that travel with a model beside its weights and config.
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
              "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
              "generation_config.json")
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"  # in the released layout
_FLOATS = ("BF16", "F16", "F32", "F64")
_NO_PARAMETERS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")  # old files store these, which config.json implies
_QUANTISED = ("qweight", "qzeros", "g_idx", "weight_scale", "weight_scale_inv", "absmax", "quant_map", "weight_packed")
_LOOKS_QUANTISED = (" It looks quantised, which can't be trained from. Take the checkpoint in bfloat16 or float32 "
                    "that it was made from")


config_from_hf = family.config_from_hf


def config_to_hf(cfg: family.Config, dtype: str) -> dict:
  """config.json in the family's released layout, for weights stored in `dtype`."""
  return family.of(cfg).config_to_hf(cfg, dtype)


def _listing(names) -> str:
  names = sorted(names)
  return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else f" ({len(names)})")


def read_config(hf_dir: str) -> family.Config:
  """The model configuration of an HF folder.

  As in transformers, two things override its config.json: the end-of-turn ids of generation_config.json, if it names
  any, and a stored head that differs from the embedding, which is then not tied to it.

  Raises:
    ValueError: the folder or its config.json is missing, unreadable or of another architecture, an adapter is yet to be
      merged, or a file of weights that has to be read for this is damaged.
  """
  folder = pathlib.Path(hf_dir)
  path = folder / "config.json"
  try:
    config = hf.read(path)
  except FileNotFoundError as e:
    raise ValueError(f"hf_dir must be a folder with a config.json. Received: {hf_dir}") from e
  cfg = config_from_hf(config, str(path))
  if config.get("transformers_weights") is not None:
    raise ValueError(f"{path}: transformers_weights must not name another file than is read by default. "
                     f"Received: {config['transformers_weights']!r}")
  if (folder / "adapter_config.json").exists():
    raise ValueError(f"{folder} must hold a whole model, but has an adapter beside it (adapter_config.json). Merge it "
                     "first, with peft's merge_and_unload")
  generation = folder / "generation_config.json"
  if generation.is_file():
    cfg = dataclasses.replace(cfg, eos=hf.ids(hf.read(generation), "eos_token_id", str(generation), cfg.eos))
  if cfg.text.tied and _files(folder) and not _is_tied(_open_tensors(folder, family.of(cfg).released_name)):
    cfg = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, tied=False))
  return cfg


def _files(folder: pathlib.Path) -> list[str]:
  """The files of weights in a folder, the same that transformers reads; none if none can be read here.

  model.safetensors takes precedence over an index, which may be left from an earlier save.
  """
  index = folder / "model.safetensors.index.json"
  if (folder / "model.safetensors").is_file():
    return ["model.safetensors"]
  if not index.is_file():
    return []
  of_tensors = hf.section(hf.read(index), "weight_map", str(index))
  if not of_tensors or not all(isinstance(name, str) for name in of_tensors.values()):
    raise ValueError(f"{index} must be a safetensors index: a weight_map from tensors to file names")
  files = sorted(set(of_tensors.values()))
  absent = [f for f in files if not (folder / f).is_file()]
  if absent:
    raise ValueError(f"{index} names files that are not there: {_listing(absent)}. Download the folder again")
  return files


def _open_tensors(folder: pathlib.Path, released_name: Callable[[str], str]) -> dict:
  """Released name -> (open file, name in the file), for every parameter of the folder."""
  files = _files(folder)
  if not files:
    raise ValueError(f"{folder} must hold model.safetensors or model.safetensors.index.json. Received: "
                     f"{_listing(p.name for p in folder.iterdir())}")
  tensors, stands = {}, {}
  for name in files:
    try:
      file = safetensors.safe_open(folder / name, framework="np")
    except (safetensors.SafetensorError, OSError, struct.error) as e:
      raise ValueError(f"{folder / name} is truncated or corrupt ({e}). Download it again") from e
    for key in (key for key in file.keys() if not key.endswith(_NO_PARAMETERS)):
      released = released_name(key)
      if released in tensors:
        raise ValueError(f"{folder} must hold each parameter once. Received: {released} as {stands[released]} and as "
                         f"{key} of {name}")
      tensors[released], stands[released] = (file, key), f"{key} of {name}"
  return tensors


def _is_tied(tensors: dict) -> bool:
  """Whether the head is the embedding, or is not stored."""
  if _HEAD not in tensors or _EMBED not in tensors:
    return True
  head, embed = (file.get_slice(key) for file, key in (tensors[_HEAD], tensors[_EMBED]))
  shape = head.get_shape()
  if shape != embed.get_shape() or len(shape) != 2 or {head.get_dtype(), embed.get_dtype()} - set(_FLOATS):
    return False
  rows = max(1, STRIP_BYTES // (4 * max(1, shape[1])))
  return all(np.array_equal(*(piece[i:min(i + rows, shape[0])].astype(np.float32) for piece in (head, embed)))
             for i in range(0, shape[0], rows))


def load_hf(hf_dir: str, dtype: str | dict = "float32", shardings: dict | None = None,
            parts: Collection[str] | None = None, tell: Callable[[int], object] = lambda count: None
            ) -> tuple[family.Config, dict]:
  """Loads an HF folder.

  Args:
    hf_dir: folder with config.json and safetensors, single or sharded.
    dtype: "float32" or "bfloat16", of all parameters, or a tree of these like the parameters.
    shardings: a tree of shardings like the parameters; None for the default device.
    parts: which of the model's parts are read, such as "vision"; None for all.  The trees `dtype` and `shardings` have
      only these.
    tell: called with how many numbers each tensor has, as it is read.

  Returns:
    The configuration and the parameters.

  Raises:
    ValueError: names the folder and the first ten missing, extra or misshapen tensors.
  """
  folder = pathlib.Path(hf_dir)
  cfg = read_config(hf_dir)
  specs = family.of(cfg).specs(cfg)
  tensors = _open_tensors(folder, family.of(cfg).released_name)
  if cfg.text.tied and _HEAD in tensors:  # the two are equal, or only one is there
    head = tensors.pop(_HEAD)
    tensors.setdefault(_EMBED, head)
  wanted = {name: spec for _, spec in params_lib.leaves(specs) for name in spec.hf_names()}
  missing, extra = set(wanted) - set(tensors), set(tensors) - set(wanted)
  if missing or extra:
    raise ValueError(f"{folder} does not fit its config.json."
                     + (f" Missing: {_listing(missing)}." if missing else "")
                     + (f" Not expected: {_listing(extra)}." if extra else "")
                     + (_LOOKS_QUANTISED if any(name.endswith(_QUANTISED) for name in extra) else ""))
  wrong, no_floats = [], False
  for name, spec in wanted.items():
    file, key = tensors[name]
    piece = file.get_slice(key)
    if tuple(piece.get_shape()) != spec.hf_shape or piece.get_dtype() not in _FLOATS:
      wrong.append(f"{name} (wanted float{list(spec.hf_shape)}, found {piece.get_dtype()}{piece.get_shape()})")
      no_floats |= piece.get_dtype() not in _FLOATS
  if wrong:
    raise ValueError(f"{folder} has misshapen or wrongly typed tensors: {_listing(wrong)}"
                     + ("." + _LOOKS_QUANTISED if no_floats else ""))

  def put(array, sharding):
    """Waits, and has the host's array freed before the next is read: JAX frees it when Python collects garbage."""
    array = jax.device_put(array, sharding).block_until_ready()
    gc.collect(0)
    return array

  def read(spec, piece, dtype):
    tell(math.prod(spec.hf_shape))
    return _read(spec, *piece, dtype)

  def load(spec, dtype, sharding=None):
    np_dtype = jnp.dtype(dtype)
    pieces = [tensors[name] for name in spec.hf_names()]
    if not spec.stacked:
      return put(read(spec, pieces[0], np_dtype), sharding)
    if math.prod(spec.shape) * np_dtype.itemsize <= STRIP_BYTES:
      return jax.device_put(np.stack([read(spec, piece, np_dtype) for piece in pieces]), sharding)
    # Layer by layer into an array that is already on its devices: the host holds one layer at a time.
    stack = jnp.zeros(spec.shape, np_dtype, device=sharding)
    for i, piece in enumerate(pieces):
      stack = _set_layer(stack, put(read(spec, piece, np_dtype), _without_layers(sharding)), i)
      stack.block_until_ready()
    return stack

  chosen = {part: table for part, table in specs.items() if parts is None or part in parts}
  dtypes = dtype if isinstance(dtype, dict) else params_lib.map_specs(lambda _: dtype, chosen)
  return cfg, params_lib.map_specs(load, chosen, dtypes, *([shardings] if shardings is not None else []))


_set_layer = jax.jit(lambda stack, layer, i: jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0),
                     donate_argnums=0)


def _without_layers(sharding):
  """The sharding of one layer of a stack with this sharding."""
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return sharding
  return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))


def _read(spec: params_lib.ParamSpec, file, key: str, dtype: np.dtype) -> np.ndarray:
  """One tensor of a file in our layout and dtype, a strip of rows at a time."""
  piece, out = file.get_slice(key), np.empty(spec.item_shape, dtype)
  if not spec.hf_shape:
    out[...] = file.get_tensor(key)
    return out
  split = params_lib.hf_split(spec)
  target = out.reshape(split) if spec.perm is None else out.transpose(np.argsort(spec.perm))
  for index, rows in params_lib.strips(split, spec.hf_shape[0], STRIP_BYTES // max(4, dtype.itemsize)):
    target[index] = piece[rows].reshape(target[index].shape).astype(dtype)
  return out


def _files_of(specs: dict, itemsize: int) -> tuple[list[dict], int]:
  """Files of at most `SHARD_BYTES`, each HF name -> (path in the parameters, spec, layer or None); and total bytes."""
  shards, size, total = [{}], 0, 0
  for path, spec in params_lib.leaves(specs):
    for i, name in enumerate(spec.hf_names()):
      nbytes = math.prod(spec.hf_shape) * itemsize
      if size + nbytes > SHARD_BYTES and shards[-1]:
        shards.append({})
        size = 0
      shards[-1][name] = (path, spec, i if spec.stacked else None)
      size, total = size + nbytes, total + nbytes
  return shards, total


def save_hf(hf_dir: str, cfg: family.Config, params: dict, dtype: str = "bfloat16", like: str | None = None,
            beside: Mapping[str, dict] | None = None, tell: Callable[[int], object] = lambda count: None) -> None:
  """Writes an HF folder that transformers loads, all of it or nothing.

  Args:
    hf_dir: where; replaced whole if it is empty or was written by this function.
    cfg: the model.
    params: its parameters; adapters are merged into their base.
    dtype: of the stored tensors.
    like: a folder whose tokenizer, chat template and processor files are copied; None for none.
    beside: JSON files, by name, that are written instead of those of `like`.
    tell: called with how many numbers each tensor has, as it is prepared.

  Raises:
    ValueError: something else is there; see `outdir.check`.
  """
  with outdir.writing(hf_dir) as folder:
    if like is not None:
      for name in SIDE_FILES:
        if (pathlib.Path(like) / name).is_file():
          shutil.copyfile(pathlib.Path(like) / name, folder / name)
    for name, content in {**(beside or {}), "config.json": config_to_hf(cfg, dtype)}.items():
      _write_json(folder / name, content)
    np_dtype = jnp.dtype(dtype)
    shards, total = _files_of(family.of(cfg).specs(cfg), np_dtype.itemsize)
    names = (["model.safetensors"] if len(shards) == 1 else
             [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))])
    for file, shard in zip(names, shards):  # only one shard at a time is on the host
      _write_tensors(folder / file, ((name, spec, tuning.merged(_at(params, path), i))
                                     for name, (path, spec, i) in shard.items()), np_dtype, tell)
    if len(shards) > 1:
      _write_json(folder / "model.safetensors.index.json", {
          "metadata": {"total_size": total},
          "weight_map": {key: name for name, shard in zip(names, shards) for key in shard}})


def save_adapters(folder: str, cfg: family.Config, trained: dict, base: str) -> None:
  """Writes adapters as PEFT does, in their own dtype, all of it or nothing.

  Args:
    folder: where; replaced whole if it is empty or was written by this module.
    cfg: the model.
    trained: the adapters.
    base: the HF folder, or the name, of the adapters' base.

  Raises:
    ValueError: the model has no adapters, or something else is there; see `outdir.check`.
  """
  how, rename = cfg.tuning, family.of(cfg).transformers_name
  if not how.rank:
    raise ValueError("adapters must be of a run that trained them. Received: one with config.lora.rank = 0")
  tensors = [(f"base_model.model.{name}", spec, _at(trained, path)[i])
             for path, spec in params_lib.leaves(family.tables(cfg)[0])
             for i, name in enumerate(map(rename, spec.hf_names()))]
  modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name, *_ in tensors}
  with outdir.writing(folder) as tmp:
    _write_json(tmp / "adapter_config.json", {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": how.rank, "lora_alpha": how.alpha,
        "target_modules": sorted(modules), "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "use_rslora": False, "use_dora": False, "modules_to_save": None, "inference_mode": True, "task_type": None})
    _write_tensors(tmp / "adapter_model.safetensors", tensors, jax.tree.leaves(trained)[0].dtype)


def _at(tree: dict, path: tuple[str, ...]):
  return functools.reduce(lambda tree, key: tree[key], path, tree)


def _write_json(path: pathlib.Path, content: dict) -> None:
  path.write_text(json.dumps(content, indent=2) + "\n")


def _write_tensors(path: pathlib.Path, tensors: Iterable[tuple], dtype: np.dtype,
                   tell: Callable[[int], object] = lambda count: None) -> None:
  """Writes one file of (name, spec, array in our layout); each array is needed only until the next is asked for."""
  arrays = {}
  for name, spec, array in tensors:
    arrays[name] = np.ascontiguousarray(params_lib.to_hf(spec, np.asarray(array).astype(dtype)))
    tell(arrays[name].size)
  safetensors_numpy.save_file(arrays, path, metadata={"format": "pt"})
