"""An exported folder makes a server do what the policy was trained and evaluated with."""

import dataclasses
import json

import numpy as np
from PIL import Image
import pytest
import transformers

from virl_jax import config as config_lib
from virl_jax.data import images
from virl_jax.model import patches
from virl_jax.model import weights
from virl_jax.run import load
from virl_jax.run import serving

RELEASED = {"bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
            "repetition_penalty": 1.05, "temperature": 1e-6, "top_p": 0.001, "top_k": 1, "some": "thing"}


def written(folder, base, c, model=None):
  """The files of a policy whose base had these files, written into a folder."""
  (folder / "base").mkdir()
  for name, content in base.items():
    (folder / "base" / name).write_text(json.dumps(content))
  model = model or weights.read_config(load.model_dir("@tiny"))
  found = serving.files(str(folder / "base"), model, c)
  for name, content in (base | found).items():  # as `weights.save_hf` does
    (folder / name).write_text(json.dumps(content))
  return found


KIND = {"image_processor_type": "Qwen2VLImageProcessor"}
TINY = {"min_pixels": 3136, "max_pixels": 7056}
BASES = {
    "released": {"preprocessor_config.json": {**TINY, **KIND, "patch_size": 14}},
    "none": {},
    "by size": {"preprocessor_config.json": {"size": {"shortest_edge": 3136, "longest_edge": 7056, "min_pixels": 1,
                                                      "max_pixels": 7056}, **KIND}},
    "another's numbers": {"preprocessor_config.json": {**TINY, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
                                                       "resample": 2, "do_resize": False, "rescale_factor": 1 / 127.5}},
    "in one file": {"processor_config.json": {"processor_class": "Qwen2_5_VLProcessor", "image_processor": TINY,
                                              "video_processor": {"max_pixels": 7}}},
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("low, high", [(3136, 1003520), (20_000, 87_808), (784, 784 * 6)])
def test_an_image_is_shown_as_in_training(base, low, high, tmp_path):
  c = config_lib.default()
  c.image.min_pixels, c.image.max_pixels = low, high
  found, model = written(tmp_path, BASES[base], c), weights.read_config(load.model_dir("@tiny"))
  reference = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
  processor = reference.Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
  rng = np.random.default_rng(0)
  for w, h in ((400, 224), (30, 30), (90, 300), (1500, 1200), (28, 29)):
    image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
    theirs = processor(image, return_tensors="np")
    ours = images.prepare(image, None, low, high, model.vision.grid)
    assert theirs["image_grid_thw"].tolist() == [[1, *ours.grid_hw]], (w, h)
    ours_PC = patches.normalised(ours.patches_PC, model.vision.grid)
    np.testing.assert_allclose(theirs["pixel_values"], ours_PC, atol=1e-5)
  alone = found["preprocessor_config.json"]  # readers differ in which of the two files they use
  assert alone["size"] == {"shortest_edge": low, "longest_edge": high}
  assert (alone["min_pixels"], alone["max_pixels"]) == (low, high)
  whole = found.get("processor_config.json")
  assert whole is None or whole["video_processor"] == {"max_pixels": 7} and "processor_class" in whole


@pytest.mark.parametrize("base", [RELEASED, {}])
def test_a_turn_is_sampled_as_in_evaluation(base, tmp_path):
  c = config_lib.default()
  c.eval.temperature, c.rollout.top_p, c.rollout.max_turn_tokens = 0.7, 0.9, 77
  model = dataclasses.replace(weights.read_config(load.model_dir("@tiny")), eos=(2, 0))
  written(tmp_path, {"generation_config.json": base}, c, model)
  found = transformers.GenerationConfig.from_pretrained(tmp_path)
  assert (found.eos_token_id, found.pad_token_id, found.bos_token_id) == (
      [2, 0], base.get("pad_token_id"), base.get("bos_token_id"))
  assert (found.do_sample, found.temperature, found.top_k, found.top_p) == (True, 0.7, 0, 0.9)
  assert (found.repetition_penalty, found.max_new_tokens, getattr(found, "some", None)) == (1.0, 77, None)


def test_greedy_evaluation_is_greedy_for_servers(tmp_path):
  c = config_lib.default()
  c.eval.temperature, c.rollout.top_k, c.rollout.top_p, c.rollout.min_p = 0.0, 5, 0.5, 0.1
  found = written(tmp_path, {}, c)["generation_config.json"]
  assert (found["top_k"], found["temperature"], found["eos_token_id"]) == (1, 1.0, 2) and "min_p" not in found


def test_a_damaged_file_of_the_base_is_named(tmp_path):
  (tmp_path / "preprocessor_config.json").write_text("[")
  with pytest.raises(ValueError, match="preprocessor_config.json must be JSON"):
    serving.files(str(tmp_path), weights.read_config(load.model_dir("@tiny")), config_lib.default())
