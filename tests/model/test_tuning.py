"""What is trained: cuts of the parameter table, and adapters as PEFT has them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import agreement
from virl_jax.model import family
from virl_jax.model import layers
from virl_jax.model import params as params_lib
from virl_jax.model import sharding
from virl_jax.model import tuning
from virl_jax.model import weights
from virl_jax.model.qwen2_5 import model as qwen

LORA = tuning.Config(rank=3, alpha=6.0)
EVERY = (*tuning.TARGETS, "qkv", "proj")


def tuned(cfg, how):
  return dataclasses.replace(cfg, tuning=how)


def drawn(table, seed=0, scale=0.3):
  rng = np.random.default_rng(seed)
  return params_lib.map_specs(lambda s: jnp.asarray(scale * rng.standard_normal(s.shape), jnp.float32), table)


def paths(table):
  return {"/".join(path) for path, _ in params_lib.leaves(table)}


def test_all_is_trained_unless_said_otherwise(small):
  trained, frozen = family.tables(small.cfg)
  assert frozen == {} and trained == qwen.specs(small.cfg) == family.specs(small.cfg)


def test_a_frozen_tower(small):
  cfg = tuned(small.cfg, tuning.Config(freeze_vision=True))
  trained, frozen = family.tables(cfg)
  assert set(trained) == {"text"} and set(frozen) == {"vision"} and family.specs(cfg) == qwen.specs(cfg)
  a, b = tuning.cut(small.params, cfg.tuning)
  jax.tree.map(np.testing.assert_array_equal, family.whole(a, b, cfg), small.params)


def test_adapters_of_the_released_size():
  cfg = tuned(qwen.SIZES["7b"], tuning.Config(rank=64, freeze_vision=True))
  trained, frozen = family.tables(cfg)
  # A layer: q and o 3584 + 3584 each, k and v 3584 + 512, three of 3584 + 18944; times the rank.
  assert params_lib.count(trained) == 28 * 64 * (2 * 7168 + 2 * 4096 + 3 * 22528)
  assert frozen == qwen.specs(cfg)
  block = trained["text"]["blocks"]
  assert set(block) == {"q_w", "k_w", "v_w", "o_w", "gate_w", "up_w", "down_w"}
  assert block["q_w"]["a"].shape == (28, 3584, 64) and block["q_w"]["b"].shape == (28, 64, 28, 128)
  assert block["o_w"]["a"].shape == (28, 28, 128, 64) and block["o_w"]["b"].shape == (28, 64, 3584)
  assert block["o_w"]["a"].axes == ("layers", "heads", None, None)
  assert block["o_w"]["b"].axes == ("layers", None, "embed")
  assert block["q_w"]["b"].hf_name == "model.layers.{layer}.self_attn.q_proj.lora_B.weight"
  assert {spec.init for path, spec in params_lib.leaves(trained) if path[-1] == "b"} == {"zeros"}
  # They are split as their matrices are.
  where = sharding.param_shardings(trained, sharding.make(1, 4, 2))["text"]["blocks"]
  assert where["q_w"]["a"].spec[1] == "fsdp" and where["q_w"]["b"].spec[2] == "tensor"


def test_the_tower_gets_adapters_too(small):
  names = paths(family.tables(tuned(small.cfg, dataclasses.replace(LORA, targets=EVERY)))[0])
  assert {"vision/blocks/qkv_w/a", "vision/blocks/proj_w/b", "vision/blocks/gate_w/a", "text/blocks/down_w/b"} <= names
  assert not any("merger" in name or "embed" in name for name in names)
  frozen = dataclasses.replace(LORA, freeze_vision=True)
  assert all(name.startswith("text/") for name in paths(family.tables(tuned(small.cfg, frozen))[0]))


@pytest.mark.parametrize("targets, how", [(("q_proj", "lm_head"), {}), (("qkv",), {"freeze_vision": True}),
                                          (("embed_tokens",), {})])
def test_a_target_that_is_none(small, targets, how):
  cfg = tuned(small.cfg, dataclasses.replace(LORA, targets=targets, **how))
  with pytest.raises(ValueError, match=f"config.lora.targets must name .*q_proj.*Received: '{targets[-1]}'$"):
    family.tables(cfg)


def test_the_product_is_that_of_the_merged_matrix(small):
  """Of each kind of matrix, with one and two axes of inputs."""
  cfg = tuned(small.cfg, dataclasses.replace(LORA, targets=EVERY))
  params = family.whole(drawn(family.tables(cfg)[0]), small.params, cfg)
  for part, name, n_in in [("text", "q_w", 1), ("text", "o_w", 2), ("text", "down_w", 1), ("vision", "qkv_w", 1),
                           ("vision", "proj_w", 2)]:
    w = jax.tree.map(lambda a: a[1], params[part]["blocks"][name])
    assert isinstance(w, params_lib.LowRank) and w.scale == 2.0
    one = tuning.merged(params[part]["blocks"][name], 1)
    assert one.shape == w.base.shape and float(jnp.abs(one - w.base).max()) > 0.1
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, *w.base.shape[:n_in])), jnp.float32)
    np.testing.assert_allclose(layers.dense(x, w, n_in), layers.dense(x, one, n_in), atol=2e-4)


def inputs(cfg):
  rng = np.random.default_rng(4)
  return agreement.batch_of([agreement.draw_part(cfg, rng, n) for n in (2, 1)], rng)


def test_fresh_adapters_add_nothing(small):
  """To the last bit: only zeros are added."""
  cfg = tuned(small.cfg, LORA)
  adapters = params_lib.init(family.tables(cfg)[0], jax.random.key(0), jnp.float32)
  assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(adapters)[::2])  # each a
  ids, mask, pixels, grids = inputs(cfg)
  run = lambda params, cfg: qwen.logits_from_hf_inputs(params, cfg, ids, mask, pixels, grids)
  np.testing.assert_array_equal(run(family.whole(adapters, small.params, cfg), cfg), run(small.params, small.cfg))


@pytest.mark.parametrize("how", [{"targets": EVERY}, {"freeze_vision": True}], ids=["everywhere", "text"])
def test_peft_reads_and_runs_what_is_written(how, tmp_path):
  """Our adapters in PEFT's file, on the reference implementation: its logits are ours; merged on export, too."""
  torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
  transformers = pytest.importorskip("transformers")
  cfg = tuned(agreement.draw_config(np.random.default_rng(0)), dataclasses.replace(LORA, **how))
  base = agreement.draw_params(cfg, np.random.default_rng(1))
  trained = drawn(family.tables(cfg)[0])
  params = family.whole(trained, base, cfg)
  weights.save_hf(tmp_path / "base", cfg, base, "float32")
  weights.save_hf(tmp_path / "merged", cfg, params, "float32")
  weights.save_adapters(tmp_path / "adapters", cfg, trained, str(tmp_path / "base"))
  ids, mask, pixels, grids = inputs(cfg)

  def theirs(model):
    with torch.no_grad():
      out = model.double()(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask),
                           pixel_values=torch.tensor(pixels).double(), image_grid_thw=torch.tensor(grids),
                           mm_token_type_ids=torch.tensor(ids == cfg.image_token).int())
    return out.logits.numpy()[mask.astype(bool)]

  load = lambda name: transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
      tmp_path / name, dtype=torch.float64).eval()
  plain, merged = theirs(load("base")), theirs(load("merged"))
  adapted = peft.PeftModel.from_pretrained(load("base"), tmp_path / "adapters").eval()
  got = theirs(adapted)
  ours = np.asarray(qwen.logits_from_hf_inputs(params, cfg, ids, mask, pixels, grids))[mask.astype(bool)]
  scale = np.abs(got).max()
  assert np.abs(got - plain).max() > 0.05 * scale  # they do something
  np.testing.assert_allclose(ours, got, atol=2e-4 * scale)
  np.testing.assert_allclose(merged, got, atol=2e-5 * scale)


def test_no_adapters_no_file(small, tmp_path):
  with pytest.raises(ValueError, match="config.lora.rank = 0"):
    weights.save_adapters(tmp_path / "adapters", small.cfg, small.params, "base")
  assert not (tmp_path / "adapters").exists()


def test_the_reference_outlives_the_policy(small):
  """It has a copy of what is trained, because updates are donated the arrays, and shares what is frozen."""
  how = tuning.Config(freeze_vision=True)
  trained, frozen = tuning.cut(small.params, how)
  kept = tuning.reference(trained, frozen, how)
  jax.tree.map(np.testing.assert_array_equal, kept, small.params)
  assert kept["vision"] is frozen["vision"] and kept["text"]["norm"] is not trained["text"]["norm"]
  assert tuning.reference({}, small.params, LORA) is small.params
