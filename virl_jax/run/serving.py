"""The files of an HF folder that tell a server how images are shown, what ends a turn, and how to sample.

They make transformers, vLLM and SGLang use a policy as it was trained and evaluated, not as its base was.
"""

from __future__ import annotations

import pathlib

from virl_jax import config as config_lib
from virl_jax.model import family
from virl_jax.model import hf
from virl_jax.model import patches


def files(base: str, model: family.Config, c: config_lib.ConfigDict) -> dict[str, dict]:
  """The JSON files, by name, that go with a policy in place of its base's.

  Args:
    base: the HF folder of its base; what its files say of anything else stays.
    model: the policy's shapes and ids.
    c: the run's configuration.

  Raises:
    ValueError: a file of the base is damaged.
  """
  folder = pathlib.Path(base)
  read = lambda name: hf.read(folder / name) if (folder / name).is_file() else {}
  whole = read("processor_config.json")
  found = {"preprocessor_config.json": preprocessor(read("preprocessor_config.json"), model, c),
           "generation_config.json": generation(read("generation_config.json"), model, c)}
  if isinstance(whole.get("image_processor"), dict):  # if it is there, readers use this section
    found["processor_config.json"] = {**whole, "image_processor": preprocessor(whole["image_processor"], model, c)}
  return found


def preprocessor(base: dict, model: family.Config, c: config_lib.ConfigDict) -> dict:
  """preprocessor_config.json: how an image becomes patches, as `images.prepare` does for a shown image.

  The file has one pair of pixel limits.  Crops have limits of their own, `image.crop_min_pixels` and
  `image.crop_max_pixels`: the program that carries out zooms resizes them.
  """
  low, high, grid = c.image.min_pixels, c.image.max_pixels, model.vision.grid
  return {
      "image_processor_type": "Qwen2VLImageProcessor", **base, "do_convert_rgb": True, "do_resize": True, "resample": 3,
      "size": {"shortest_edge": low, "longest_edge": high}, "min_pixels": low, "max_pixels": high, "do_rescale": True,
      "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [round(float(v), 8) for v in patches.MEAN],
      "image_std": [round(float(v), 8) for v in patches.STD], "patch_size": grid.patch,
      "temporal_patch_size": grid.temporal, "merge_size": grid.merge}


def generation(base: dict, model: family.Config, c: config_lib.ConfigDict) -> dict:
  """generation_config.json: how a turn is sampled, as in the run's evaluation, and which ids end it.

  Every key that a reader has a default for is written, and none is the base's, such as a repetition penalty, which
  training did not have.  Greedy sampling is `top_k` 1, because servers don't read `do_sample`.
  """
  keep = {key: base[key] for key in ("bos_token_id", "pad_token_id") if base.get(key) is not None}
  if c.eval.temperature == 0:
    sampled = {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
  else:
    sampled = {"temperature": c.eval.temperature, "top_k": c.rollout.top_k, "top_p": c.rollout.top_p,
               **({"min_p": c.rollout.min_p} if c.rollout.min_p else {})}
  eos = model.eos[0] if len(model.eos) == 1 else list(model.eos)
  return {**keep, "eos_token_id": eos, "do_sample": True, **sampled, "repetition_penalty": 1.0,
          "max_new_tokens": c.rollout.max_turn_tokens}
