"""Qwen2.5-VL's shapes: of the decoder, of the vision tower, of the released sizes; and its config.json."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from virl_jax.model import attention
from virl_jax.model import patches

_PREFIXES = (("model.language_model.lm_head.", "lm_head."), ("model.language_model.", "model."),
             ("model.visual.", "visual."), ("language_model.lm_head.", "lm_head."),
             ("language_model.model.", "model."), ("language_model.", "model."))
_IDS = {"image_token": "image_token_id", "video_token": "video_token_id", "vision_start": "vision_start_token_id",
        "vision_end": "vision_end_token_id", "vision_pad": "vision_token_id"}


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
    full_blocks: indexes of the blocks that attend over the whole image; the others stay in windows.
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
    eos: id that ends a turn.
    compute_dtype: of matrix products; norms, rotary and softmax stay float32 where the reference has them.
    remat: recompute layers in the backward pass.
    platform: what the model is compiled for, one of `attention.PLATFORMS`.  It picks kernels, and model code asks
      nothing else about the machine: whoever knows the devices says so (`sharding.platform`).  What "cpu" picks runs
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
  eos: int = 151645
  compute_dtype: str = "float32"
  remat: bool = False
  platform: str = "cpu"

  def __post_init__(self):
    if self.platform not in attention.PLATFORMS:
      raise ValueError(f"platform must be one of {attention.PLATFORMS}. Received: {self.platform!r}")

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


def tiny(vocab: int, ids: dict[str, int]) -> Config:
  """A Qwen2.5-VL of about two million parameters, for the needle task.

  Its rotary sections take turns (time, height, width, time, ...).  In three blocks, as released, the width
  of a head this small would get only frequencies too low to tell neighbouring columns apart.

  Args:
    vocab: rows of the embedding.
    ids: values for the token id fields of `Config`, by name.
  """
  return Config(
      text=Text(vocab=vocab, hidden=128, layers=4, heads=4, kv_heads=2, head_size=32, intermediate=320,
                mrope_section=(1,) * 12 + (2, 1, 1), theta=100.0, tied=True),
      vision=Vision(depth=3, hidden=128, heads=4, intermediate=256, out=128, full_blocks=(2,)),
      **ids)


def released_name(name: str) -> str:
  """An HF tensor name in the released layout.

  Three namings exist: as released (`visual.*`, `model.layers.*`), in newer transformers' memory (`model.visual.*`,
  `model.language_model.*`), and in between (`visual.*`, `language_model.*`).
  """
  for prefix, to in _PREFIXES:
    if name.startswith(prefix):
      return to + name[len(prefix):]
  return name


def from_hf(config: dict, where: str = "config.json") -> Config:
  """Reads a parsed config.json, flat or nested.

  Args:
    config: the parsed file.
    where: named in errors.

  Raises:
    ValueError: if it lacks a key, or its parts don't fit each other.
  """
  t, v = config.get("text_config") or config, config.get("vision_config") or {}
  try:
    rope = t.get("rope_parameters") or {"rope_theta": t["rope_theta"], **(t.get("rope_scaling") or {})}
    tied = config.get("tie_word_embeddings", t.get("tie_word_embeddings", False))
    txt = Text(
        vocab=t["vocab_size"], hidden=t["hidden_size"], layers=t["num_hidden_layers"],
        heads=t["num_attention_heads"], kv_heads=t["num_key_value_heads"],
        head_size=t.get("head_dim") or t["hidden_size"] // t["num_attention_heads"],
        intermediate=t["intermediate_size"], mrope_section=tuple(rope["mrope_section"]),
        theta=float(rope["rope_theta"]), eps=t.get("rms_norm_eps", 1e-5), tied=bool(tied))
    vis = Vision(
        depth=v.get("depth", 32), hidden=v.get("hidden_size", 3584), heads=v.get("num_heads", 16),
        intermediate=v.get("intermediate_size", 3420), out=v.get("out_hidden_size", 3584),
        full_blocks=tuple(v.get("fullatt_block_indexes", (7, 15, 23, 31))), patch=v.get("patch_size", 14),
        temporal=v.get("temporal_patch_size", 2), merge=v.get("spatial_merge_size", 2),
        window_px=v.get("window_size", 112))
    ids = {ours: config.get(theirs, t.get(theirs, getattr(Config, ours))) for ours, theirs in _IDS.items()}
    eos = config.get("eos_token_id", t.get("eos_token_id", Config.eos))
  except KeyError as e:
    raise ValueError(f"{where}: key {e} is missing for a {Config.model_type} model") from e
  if vis.out != txt.hidden:
    raise ValueError(f"{where}: vision out_hidden_size must be hidden_size = {txt.hidden}. Received: {vis.out}")
  return Config(text=txt, vision=vis, eos=eos[0] if isinstance(eos, list) else eos, **ids)


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
      "max_position_embeddings": 128000, "initializer_range": 0.02, "use_cache": True, "eos_token_id": cfg.eos,
      "bos_token_id": None,  # no text begins with it; left out, readers assume the released vocabulary's
      **{theirs: getattr(cfg, ours) for ours, theirs in _IDS.items()},
      "vision_config": {
          "model_type": Config.model_type, "depth": v.depth, "hidden_size": v.hidden, "num_heads": v.heads,
          "intermediate_size": v.intermediate, "out_hidden_size": v.out, "hidden_act": "silu", "in_chans": 3,
          "in_channels": 3, "patch_size": v.patch, "spatial_patch_size": v.patch, "spatial_merge_size": v.merge,
          "temporal_patch_size": v.temporal, "window_size": v.window_px, "tokens_per_second": 2,
          "fullatt_block_indexes": list(v.full_blocks)},
  }
