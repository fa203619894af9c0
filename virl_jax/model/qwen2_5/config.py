"""Qwen2.5-VL's shapes: of the decoder, of the vision tower, of the released sizes; and its config.json."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from virl_jax.model import attention
from virl_jax.model import hf
from virl_jax.model import patches
from virl_jax.model import remat as remat_lib
from virl_jax.model import tuning

_PREFIXES = (("model.language_model.lm_head.", "lm_head."), ("model.language_model.", "model."),
             ("model.visual.", "visual."), ("language_model.lm_head.", "lm_head."),
             ("language_model.model.", "model."), ("language_model.", "model."))
_IDS = {"image_token": "image_token_id", "video_token": "video_token_id", "vision_start": "vision_start_token_id",
        "vision_end": "vision_end_token_id", "vision_pad": "vision_token_id"}
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "mrope_section", "partial_rotary_factor"}


@dataclasses.dataclass(frozen=True)
class Text:
  """Shapes of the text decoder.

  Attributes:
    vocab: V.
    hidden: D.
    layers: L.
    heads: N.
    kv_heads: K, divides N.
    head_size: H.
    intermediate: F.
    mrope_section: frequencies for time, height, width; adds up to H / 2.
    theta: rotary base.
    eps: of RMSNorm.
    tied: whether the output head is the embedding.
  """

  vocab: int = 152064
  hidden: int = 3584
  layers: int = 28
  heads: int = 28
  kv_heads: int = 4
  head_size: int = 128
  intermediate: int = 18944
  mrope_section: tuple[int, ...] = (16, 24, 24)
  theta: float = 1e6
  eps: float = 1e-6
  tied: bool = False


@dataclasses.dataclass(frozen=True)
class Vision:
  """Shapes of the vision tower.

  Attributes:
    depth: blocks.
    hidden: D.
    heads: N; H = hidden / heads must be a multiple of 4.
    intermediate: F.
    out: width of the merged tokens, the text decoder's D.
    full_blocks: indices of the blocks that attend over the whole image; the others attend within windows.
    patch, temporal, merge: see `patches.Grid`.
    window_px: side of an attention window, pixels.
    eps: of RMSNorm.
  """

  depth: int = 32
  hidden: int = 1280
  heads: int = 16
  intermediate: int = 3420
  out: int = 3584
  full_blocks: tuple[int, ...] = (7, 15, 23, 31)
  patch: int = 14
  temporal: int = 2
  merge: int = 2
  window_px: int = 112
  eps: float = 1e-6

  @property
  def head_size(self) -> int:
    return self.hidden // self.heads

  @property
  def grid(self) -> patches.Grid:
    return patches.Grid(self.patch, self.temporal, self.merge, self.window_px // self.merge // self.patch)


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything about the model that is not a parameter.

  Attributes:
    text: the decoder's shapes.
    vision: the tower's shapes.
    image_token, video_token, vision_start, vision_end, vision_pad: placeholder ids, never sampled.
    eos: ids each of which ends a turn.
    compute_dtype: of matrix products; norms, rotary embedding and softmax are float32 where the reference's are.
    remat: recompute layers in the backward pass.
    remat_keep: names of values that are kept of a recomputed layer, out of `remat.NAMES`.
    remat_offload: names of values that are kept of it in the host's memory.
    patches_together, gather_vision: `together` and `gather` of `vision.encode`.
    tuning: which parameters are trained, and which there are besides the released ones.
    platform: what the model is compiled for, one of `attention.PLATFORMS`.  It picks kernels, and model code asks
      nothing else about the machine: the caller knows the devices (`sharding.platform`).  What "cpu" picks runs
      anywhere.
  """

  model_type: ClassVar[str] = "qwen2_5_vl"  # of config.json; `family.FAMILIES` finds the module by it

  text: Text = Text()
  vision: Vision = Vision()
  image_token: int = 151655
  video_token: int = 151656
  vision_start: int = 151652
  vision_end: int = 151653
  vision_pad: int = 151654
  eos: tuple[int, ...] = (151645,)
  compute_dtype: str = "float32"
  remat: bool = False
  remat_keep: tuple[str, ...] = ()
  remat_offload: tuple[str, ...] = ()
  patches_together: int = 0
  gather_vision: bool = False
  tuning: tuning.Config = tuning.Config()
  platform: str = "cpu"

  def __post_init__(self):
    if self.platform not in attention.PLATFORMS:
      raise ValueError(f"platform must be one of {attention.PLATFORMS}. Received: {self.platform!r}")
    remat_lib.Kept(self.remat_keep, self.remat_offload)  # checks the names

  @property
  def kept(self) -> remat_lib.Kept:
    return remat_lib.Kept(self.remat_keep, self.remat_offload)

  @property
  def banned(self) -> tuple[int, ...]:
    """Ids that must never be sampled: a sampled placeholder has no image behind it."""
    return (self.image_token, self.video_token, self.vision_start, self.vision_end, self.vision_pad)


def _released(hidden, layers, heads, kv_heads, intermediate, vision_intermediate, vocab, tied) -> Config:
  return Config(
      text=Text(vocab=vocab, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads,
                intermediate=intermediate, tied=tied),
      vision=Vision(intermediate=vision_intermediate, out=hidden))


# Released shapes, from the published config.json files.
SIZES = {
    "3b": _released(2048, 36, 16, 2, 11008, 3420, 151936, True),
    "7b": _released(3584, 28, 28, 4, 18944, 3420, 152064, False),
    "32b": _released(5120, 64, 40, 8, 27648, 3456, 152064, False),
    "72b": _released(8192, 80, 64, 8, 29568, 3456, 152064, False),
}


def tiny(vocab: int, ids: dict) -> Config:
  """A Qwen2.5-VL of about two million parameters, for the needle task.

  Its rotary sections alternate (time, height, width, time, ...).  In three blocks, as released, the width axis
  of a head this small would get only frequencies that are too low to tell neighbouring columns apart.

  Args:
    vocab: rows of the embedding.
    ids: values for the token id fields of `Config`, by name.
  """
  return Config(
      text=Text(vocab=vocab, hidden=128, layers=4, heads=4, kv_heads=2, head_size=32, intermediate=320,
                mrope_section=(1,) * 12 + (2, 1, 1), theta=100.0, tied=True),
      vision=Vision(depth=3, hidden=128, heads=4, intermediate=256, out=128, full_blocks=(2,)),
      **ids)


def transformers_name(name: str) -> str:
  """The name that transformers has in memory for a tensor of the released layout."""
  for theirs, released in (("model.language_model.", "model."), ("model.visual.", "visual.")):
    if name.startswith(released):
      return theirs + name.removeprefix(released)
  return name


def released_name(name: str) -> str:
  """An HF tensor name in the released layout.

  Three namings exist: as released (`visual.*`, `model.layers.*`), as newer transformers have in memory
  (`model.visual.*`, `model.language_model.*`), and a mixture (`visual.*`, `language_model.*`).
  """
  for prefix, to in _PREFIXES:
    if name.startswith(prefix):
      return to + name[len(prefix):]
  return name


def from_hf(config: dict, where: str = "config.json") -> Config:
  """Reads a parsed config.json, flat or nested.

  Absent keys have the defaults of transformers' classes, if these fit any model.

  Args:
    config: the parsed file.
    where: the file's name in errors.

  Raises:
    ValueError: a key is missing or of another type, asks for what is not implemented here, or does not fit another.
  """
  t = hf.section(config, "text_config", where) or config
  v = hf.section(config, "vision_config", where)
  of_text, of_vision = where if t is config else f"{where}: text_config", f"{where}: vision_config"
  _refuse_quantised(where, config, t, v)
  rope = _rope(config, t, where, of_text)
  _refuse_other_numbers(t, of_text, v, of_vision)
  hidden, heads = (hf.whole(t, key, of_text) for key in ("hidden_size", "num_attention_heads"))
  txt = Text(
      vocab=hf.whole(t, "vocab_size", of_text), hidden=hidden, layers=hf.whole(t, "num_hidden_layers", of_text),
      heads=heads, kv_heads=hf.whole(t, "num_key_value_heads", of_text, heads if "num_key_value_heads" in t else None),
      head_size=hf.whole(t, "head_dim", of_text, hidden // heads if hidden % heads == 0 else None),
      intermediate=hf.whole(t, "intermediate_size", of_text),
      mrope_section=hf.wholes(rope, "mrope_section", of_text, Text.mrope_section),
      theta=hf.real(rope, "rope_theta", of_text, hf.real(t, "rope_theta", of_text, Text.theta)),
      eps=hf.real(t, "rms_norm_eps", of_text, 1e-5),
      tied=hf.flag(config, "tie_word_embeddings", where) or hf.flag(t, "tie_word_embeddings", of_text))
  whole = lambda key, default: hf.whole(v, key, of_vision, default)
  vis = Vision(
      depth=whole("depth", 32), hidden=whole("hidden_size", 3584), heads=whole("num_heads", 16),
      intermediate=whole("intermediate_size", 3420), out=whole("out_hidden_size", 3584),
      full_blocks=hf.wholes(v, "fullatt_block_indexes", of_vision, Vision.full_blocks), patch=whole("patch_size", 14),
      temporal=whole("temporal_patch_size", 2), merge=whole("spatial_merge_size", 2),
      window_px=whole("window_size", 112))
  _refuse_misfits(txt, vis, where)
  ids = {ours: hf.whole(config, theirs, where, hf.whole(t, theirs, of_text, getattr(Config, ours), 0), 0)
         for ours, theirs in _IDS.items()}
  eos = hf.ids(config, "eos_token_id", where, hf.ids(t, "eos_token_id", of_text, Config.eos))
  return Config(text=txt, vision=vis, eos=eos, **ids)


def _refuse_quantised(where: str, *sections: dict) -> None:
  for section in sections:
    found = section.get("quantization_config") or section.get("compression_config")
    if found:
      found = found if isinstance(found, dict) else {"quant_method": found}
      method = found.get("quant_method") or ("bitsandbytes" if any("bit" in key for key in found) else "unknown method")
      raise ValueError(f"{where} is of a quantised checkpoint ({method}), which can't be trained from. Take the one in "
                       "bfloat16 or float32 that it was made from")


def _rope(config: dict, t: dict, where: str, of_text: str) -> dict:
  """The rotary embedding's keys, from any of the sections that may hold them; other kinds than M-RoPE are refused."""
  found = {}
  for section, place in ((config, where), (t, of_text)):
    for key in ("rope_parameters", "rope_scaling"):  # the second counts if both are there
      rope = hf.section(section, key, place)
      kinds = [rope[k] for k in ("rope_type", "type") if rope.get(k) is not None]
      more = sorted(k for k in rope if k not in _ROPE_KEYS and rope[k] not in (None, False))
      if more or not all(kind in ("default", "mrope") for kind in kinds):
        raise ValueError(f"{place}: {key} must be of type 'default' or 'mrope', with no other keys than "
                         f"{', '.join(sorted(_ROPE_KEYS))}: nothing else is implemented. Received: {rope}")
      _refuse_unless(rope.get("partial_rotary_factor", 1.0) in (None, 1.0), place, f"{key}.partial_rotary_factor", 1.0,
                     rope.get("partial_rotary_factor"))
      found = rope if rope and section is t else found
  return found


def _refuse_other_numbers(t: dict, of_text: str, v: dict, of_vision: str) -> None:
  """Refuses keys that ask for other numbers than the forward pass computes.

  These are among the keys that transformers reads; the others are harmless: the tensors show which biases there are,
  dropout is for training, and `max_position_embeddings` has no effect on this kind of rotary embedding.
  """
  for section, where in ((t, of_text), (v, of_vision)):
    act = section.get("hidden_act")
    _refuse_unless(act in (None, "silu", "swish"), where, "hidden_act", "silu", act)
  factor = t.get("partial_rotary_factor")
  _refuse_unless(factor in (None, 1), of_text, "partial_rotary_factor", 1.0, factor)
  slides = hf.flag(t, "use_sliding_window", of_text) and t.get("sliding_window", 4096) is not None
  layers = hf.whole(t, "num_hidden_layers", of_text)
  if t.get("layer_types") is not None:
    slides = t["layer_types"] != ["full_attention"] * layers
  else:
    slides = slides and hf.whole(t, "max_window_layers", of_text, 80, 0) < layers
  _refuse_unless(not slides, of_text, "use_sliding_window", "false, or max_window_layers as many as there are layers",
                 t.get("layer_types") or True)
  channels = v.get("in_channels", v.get("in_chans"))
  _refuse_unless(channels in (None, 3), of_vision, "in_channels", 3, channels)
  rope = hf.section(v, "rope_parameters", of_vision)
  plain = rope.get("rope_type", "axial") in ("axial", "default") and rope.get("rope_theta", 1e4) == 1e4
  _refuse_unless(plain, of_vision, "rope_parameters", "of type 'axial', with rope_theta 10000", rope)


def _refuse_misfits(t: Text, v: Vision, where: str) -> None:
  need = lambda ok, key, wanted, got: _refuse_unless(ok, where, key, wanted, got)
  need(t.heads % t.kv_heads == 0, "num_key_value_heads", f"a divisor of num_attention_heads = {t.heads}", t.kv_heads)
  need(t.head_size % 2 == 0 and sum(t.mrope_section) == t.head_size // 2, "mrope_section",
       f"numbers that add up to half of head_dim = {t.head_size}", list(t.mrope_section))
  need(v.hidden % (4 * v.heads) == 0, "vision hidden_size", f"a multiple of 4 x num_heads = {4 * v.heads}", v.hidden)
  need(v.window_px >= v.merge * v.patch, "vision window_size",
       f"at least spatial_merge_size x patch_size = {v.merge * v.patch}", v.window_px)
  need(v.out == t.hidden, "vision out_hidden_size", f"hidden_size = {t.hidden}", v.out)


def _refuse_unless(ok: bool, where: str, key: str, wanted, got) -> None:
  if not ok:
    raise ValueError(f"{where}: {key} must be {wanted}. Received: {got!r}"[:400])


def to_hf(cfg: Config, dtype: str) -> dict:
  """config.json in the released (flat) layout."""
  t, v = cfg.text, cfg.vision
  return {
      "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": Config.model_type, "torch_dtype": dtype,
      "vocab_size": t.vocab, "hidden_size": t.hidden, "num_hidden_layers": t.layers,
      "num_attention_heads": t.heads, "num_key_value_heads": t.kv_heads, "head_dim": t.head_size,
      "intermediate_size": t.intermediate, "hidden_act": "silu", "rms_norm_eps": t.eps, "rope_theta": t.theta,
      "rope_scaling": {"type": "mrope", "mrope_section": list(t.mrope_section)},
      "tie_word_embeddings": t.tied, "use_sliding_window": False, "attention_dropout": 0.0,
      "max_position_embeddings": 128000, "initializer_range": 0.02, "use_cache": True,
      "eos_token_id": cfg.eos[0] if len(cfg.eos) == 1 else list(cfg.eos) or None,
      "bos_token_id": None,  # there is none; without the key, readers assume the released vocabulary's
      **{theirs: getattr(cfg, ours) for ours, theirs in _IDS.items()},
      "vision_config": {
          "model_type": Config.model_type, "depth": v.depth, "hidden_size": v.hidden, "num_heads": v.heads,
          "intermediate_size": v.intermediate, "out_hidden_size": v.out, "hidden_act": "silu", "in_chans": 3,
          "in_channels": 3, "patch_size": v.patch, "spatial_patch_size": v.patch, "spatial_merge_size": v.merge,
          "temporal_patch_size": v.temporal, "window_size": v.window_px, "tokens_per_second": 2,
          "fullatt_block_indexes": list(v.full_blocks)},
  }
