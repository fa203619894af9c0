"""Which module a model belongs to, and what it is compiled for."""

import dataclasses
import types as python_types

import jax
import numpy as np
import pytest

from virl_jax import config
from virl_jax import types
from virl_jax.model import attention
from virl_jax.model import cache as cache_lib
from virl_jax.model import family
from virl_jax.model import head
from virl_jax.model import patches
from virl_jax.model import sharding
from virl_jax.model import tuning
from virl_jax.model import weights
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.run import setup


def test_a_model_knows_its_family(small):
  assert family.of(small.cfg) is qwen and set(family.FAMILIES) == {qwen.Config.model_type}


def test_a_family_is_its_module_and_a_line_in_the_table(small, tmp_path, monkeypatch):
  """Another family that only the table knows is read and written, and its own forward pass runs."""
  @dataclasses.dataclass(frozen=True)
  class Config(qwen.Config):
    model_type = "other"

  asked = []
  other = python_types.SimpleNamespace(
      specs=qwen.specs, released_name=qwen.released_name,
      config_from_hf=lambda config, where: Config(**{f.name: getattr(small.cfg, f.name) for f in
                                                     dataclasses.fields(Config)}),
      config_to_hf=lambda cfg, dtype: {"model_type": "other", "dtype": dtype},
      head=lambda params: asked.append(params) or qwen.head(params))
  cfg = other.config_from_hf({}, "")
  with pytest.raises(ValueError, match="model_type must be 'qwen2_5_vl'. Received: 'other'"):
    family.config_from_hf({"model_type": "other"})
  monkeypatch.setitem(family.FAMILIES, "other", other)
  weights.save_hf(str(tmp_path / "hf"), cfg, small.params, "float32")
  found, params = weights.load_hf(str(tmp_path / "hf"))
  assert type(found) is Config and family.of(found) is other
  jax.tree.map(np.testing.assert_array_equal, params, small.params)
  head.policy_logits(params, found, jax.numpy.ones((1, 1, found.text.hidden)), 1.0)
  assert len(asked) == 1 and asked[0] is params
  with pytest.raises(ValueError, match="model_type must be 'other' or 'qwen2_5_vl'. Received: None"):
    family.config_from_hf({})


def test_shapes_without_arrays(small):
  got = family.abstract_params(small.cfg, "bfloat16")
  jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), got, small.params)
  assert {str(a.dtype) for a in jax.tree.leaves(got)} == {"bfloat16"}


def test_what_is_frozen_has_the_compute_dtype(small):
  cfg = dataclasses.replace(small.cfg, compute_dtype="bfloat16", tuning=tuning.Config(rank=2))
  mesh = sharding.make(1, 4, 2)
  trained, frozen = family.abstract(cfg, "float32", mesh)
  assert {str(a.dtype) for a in jax.tree.leaves(trained)} == {"float32"}
  assert {str(a.dtype) for a in jax.tree.leaves(frozen)} == {"bfloat16"}
  jax.tree.map(lambda a, p: np.testing.assert_equal(a.shape, p.shape), frozen, small.params)
  want = family.shardings(cfg, mesh)
  assert jax.tree.structure(family.whole(trained, frozen, cfg)) == jax.tree.structure(want)
  assert [a.sharding for a in jax.tree.leaves(family.whole(trained, frozen, cfg))] == jax.tree.leaves(want)


@pytest.mark.parametrize("device, want", [("cpu", "cpu"), ("gpu", "gpu"), ("cuda", "gpu"), ("rocm", "gpu"),
                                          ("tpu", "tpu"), ("METAL", "cpu")])
def test_platforms_of_devices(device, want, small):
  assert sharding.platform(python_types.SimpleNamespace(platform=device)) == want
  assert dataclasses.replace(small.cfg, platform=want).platform == want


def test_a_platform_is_one_that_kernels_know(small):
  with pytest.raises(ValueError, match="platform must be one of .*'tpu'.*Received: 'cuda'"):
    dataclasses.replace(small.cfg, platform="cuda")


@pytest.mark.parametrize("platform", attention.PLATFORMS)
def test_kernels_are_told_what_they_are_compiled_for(small, platform, monkeypatch):
  whole, cached = [], []
  monkeypatch.setattr(attention, "choose", lambda *args: whole.append(args[0]) or "plain")
  monkeypatch.setattr(cache_lib, "_slots_together", lambda T, S, platform: cached.append(platform) or 64)
  cfg = dataclasses.replace(small.cfg, platform=platform)
  grid, (tokens, vision, pos) = cfg.vision.grid, np.zeros((3, 1, 4), np.int32)
  picture = types.ImageInput(np.zeros((4, grid.values), np.float32), (2, 2), types.Box(0, 0, 1, 1))
  batch, _ = patches.layout([picture], grid)
  pos = np.repeat(pos[:, None], 3, 1)
  jax.eval_shape(lambda p: qwen.hidden(p, cfg, tokens, pos, tokens == 0, vision, (batch,)), small.params)
  assert len(whole) >= 3 and set(whole) == {platform} and not cached  # two kinds of vision blocks, and the decoder's
  cache = qwen.new_cache(cfg, 1, 64)
  x = jax.ShapeDtypeStruct((1, 4, cfg.text.hidden), "float32")
  jax.eval_shape(lambda p, x: qwen.extend(p, cfg, x, pos, np.array([4]), cache), small.params, x)
  assert cached and set(cached) == {platform}


def test_a_run_is_compiled_for_its_mesh(monkeypatch):
  asked = []
  monkeypatch.setattr(sharding, "platform", lambda device: asked.append(device) or "tpu")
  c = config.default()
  c.model.path, c.rollout.prompts, c.rollout.group_size = "@tiny", 2, 4
  p = setup.pieces(c)
  assert asked == [p.mesh.devices.flat[0]] and p.policy.model.platform == p.step.model.platform == "tpu"
