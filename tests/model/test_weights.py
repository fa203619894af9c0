"""HF folders: written and read back bit for bit, in every naming, and every way they can be broken."""

import json
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors import numpy as safetensors_numpy

from virl_jax.model import family
from virl_jax.model import sharding
from virl_jax.model import weights
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.model.qwen2_5 import text

SAME = np.testing.assert_array_equal


@pytest.fixture
def saved(small, tmp_path):
  """A folder with the small model in float32."""
  weights.save_hf(tmp_path / "hf", small.cfg, small.params, "float32")
  return tmp_path / "hf"


def tensors_of(folder):
  with safetensors.safe_open(folder / "model.safetensors", "np") as f:
    return {k: f.get_tensor(k) for k in f.keys()}


def rewrite(folder, change):
  """Passes the tensors through `change` and stores what it returns."""
  safetensors_numpy.save_file(change(tensors_of(folder)), folder / "model.safetensors")


def edit_config(folder, change):
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(change(config)))


def test_float32_comes_back_bit_for_bit(small, saved):
  cfg, params = weights.load_hf(saved)
  assert cfg == small.cfg
  jax.tree.map(SAME, params, small.params)
  weights.save_hf(saved.with_name("again"), cfg, params, "float32")
  assert (saved / "model.safetensors").read_bytes() == (saved.with_name("again") / "model.safetensors").read_bytes()


def test_bfloat16_comes_back_bit_for_bit(small, tmp_path):
  half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), small.params)
  weights.save_hf(tmp_path / "hf", small.cfg, half)
  assert all(a.dtype == ml_dtypes.bfloat16 for a in tensors_of(tmp_path / "hf").values())
  assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
  for dtype in ("bfloat16", "float32"):
    _, params = weights.load_hf(tmp_path / "hf", dtype)
    jax.tree.map(SAME, params, jax.tree.map(lambda a, to=dtype: a.astype(to), half))
    assert {a.dtype.name for a in jax.tree.leaves(params)} == {dtype}


NAMINGS = {
    "released": lambda k: k,
    "in memory": lambda k: (k.replace("model.", "model.language_model.", 1) if k.startswith("model.")
                            else k.replace("visual.", "model.visual.", 1)),
    "in between": lambda k: k.replace("model.", "language_model.model.", 1) if k.startswith("model.") else k,
    "in between, shorter": lambda k: k.replace("model.", "language_model.", 1) if k.startswith("model.") else k,
    "head inside": lambda k: "language_model." + k if k.startswith(("model.", "lm_head.")) else k,
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_is_read(small, saved, naming):
  renamed = {}
  rewrite(saved, lambda ts: renamed.update({NAMINGS[naming](k): v for k, v in ts.items()}) or renamed)
  assert {qwen.released_name(k) for k in renamed} == {
      n for _, s in weights.params_lib.leaves(qwen.specs(small.cfg)) for n in s.hf_names()}
  jax.tree.map(SAME, weights.load_hf(saved)[1], small.params)


def test_nested_flat_and_sparse_configs(small, saved):
  flat = json.loads((saved / "config.json").read_text())
  of_text = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "intermediate_size", "rms_norm_eps")
  nested = {k: v for k, v in flat.items() if k not in (*of_text, "rope_theta", "rope_scaling", "torch_dtype")}
  nested["text_config"] = {k: flat[k] for k in of_text} | {"rope_parameters": {
      "rope_type": "default", "rope_theta": flat["rope_theta"], "mrope_section": [1, 1, 2]}}
  assert weights.config_from_hf(flat) == weights.config_from_hf(nested) == small.cfg

  assert weights.config_from_hf(flat | {"eos_token_id": [3, 4]}).eos == (3, 4)
  bare = {k: v for k, v in flat.items() if k != "head_dim"} | {"rope_scaling": {"mrope_section": [1, 1, 1]}}
  assert weights.config_from_hf(bare).text.head_size == 24 // 4
  assert weights.config_from_hf(bare | {"head_dim": None, "num_key_value_heads": None}).text.kv_heads == 4
  # Keys that a released file lacks have the defaults of the reference's classes.
  sparse = {k: v for k, v in flat.items() if not k.endswith("_token_id") and k != "rms_norm_eps"}
  sparse["vision_config"] = {"out_hidden_size": 24}
  cfg = weights.config_from_hf(sparse)
  assert cfg.vision == qwen.Vision(hidden=3584, out=24) and cfg.text.eps == 1e-5
  assert (cfg.image_token, cfg.eos) == (151655, (151645,))


def test_shards(small, saved, tmp_path, monkeypatch):
  monkeypatch.setattr(weights, "SHARD_BYTES", 40_000)
  folder = tmp_path / "sharded"
  weights.save_hf(folder, small.cfg, small.params, "float32")
  files = sorted(p.name for p in folder.glob("*.safetensors"))
  assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
  index = json.loads((folder / "model.safetensors.index.json").read_text())
  whole = tensors_of(saved)
  assert index["weight_map"].keys() == whole.keys() and set(index["weight_map"].values()) == set(files)
  assert index["metadata"]["total_size"] == sum(a.nbytes for a in whole.values())
  # A file is its tensors and a header; one tensor alone may be larger than the limit.
  assert sum((folder / f).stat().st_size > 40_000 + 5_000 for f in files) <= sum(
      a.nbytes > 40_000 for a in whole.values())
  jax.tree.map(SAME, weights.load_hf(folder)[1], small.params)

  # A whole file takes precedence over an index, as in transformers: it was saved later, over a folder of shards.
  (folder / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
  (folder / files[1]).rename(folder / "elsewhere")
  jax.tree.map(SAME, weights.load_hf(folder)[1], small.params)
  (folder / "model.safetensors").unlink()
  with pytest.raises(ValueError, match=f"{re.escape(str(folder))}.*not there: {files[1]}"):
    weights.load_hf(folder)
  for content, message in (("{}", "weight_map"), ("[]", "must hold a JSON object. Received: list"),
                           ("{", "must be JSON"), ('{"weight_map": ["a"]}', "weight_map must be an object"),
                           ('{"weight_map": {"a": 3}}', "weight_map"), ('{"weight_map": {"a": ["b"]}}', "weight_map")):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}.*index.json.*{message}"):
      weights.load_hf(folder)


def test_a_tied_model_has_no_head(small, tmp_path):
  cfg = weights.config_from_hf(weights.config_to_hf(small.cfg, "float32") | {"tie_word_embeddings": True})
  params = {**small.params, "text": {k: v for k, v in small.params["text"].items() if k != "head"}}
  weights.save_hf(tmp_path / "hf", cfg, params, "float32")
  assert "lm_head.weight" not in tensors_of(tmp_path / "hf")
  found, again = weights.load_hf(tmp_path / "hf")
  assert found.text.tied
  jax.tree.map(SAME, again, params)
  SAME(text.head(again["text"]), np.asarray(params["text"]["embed"]).T)
  # Some files have a copy as a head nevertheless, and some only that copy.
  rewrite(tmp_path / "hf", lambda ts: ts | {"lm_head.weight": ts["model.embed_tokens.weight"]})
  jax.tree.map(SAME, weights.load_hf(tmp_path / "hf")[1], params)
  rewrite(tmp_path / "hf", lambda ts: {k: v for k, v in ts.items() if k != "model.embed_tokens.weight"})
  jax.tree.map(SAME, weights.load_hf(tmp_path / "hf")[1], params)


@pytest.mark.parametrize("strip", [200, 2 ** 20])
def test_a_head_of_its_own_is_not_tied(small, saved, strip, monkeypatch):
  """As after an adapter is merged: the config says tied, and the stored head differs in one number, the last."""
  monkeypatch.setattr(weights, "STRIP_BYTES", strip)
  edit_config(saved, lambda c: c | {"tie_word_embeddings": True})
  assert weights.read_config(saved) == small.cfg
  jax.tree.map(SAME, weights.load_hf(saved)[1], small.params)

  def almost(ts):
    head = ts["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1e-3
    return ts | {"lm_head.weight": head}

  rewrite(saved, almost)
  cfg, params = weights.load_hf(saved)
  assert not cfg.text.tied and weights.read_config(saved) == cfg
  SAME(text.head(params["text"])[-1, -1], np.float32(params["text"]["embed"][-1, -1] + np.float32(1e-3)))
  weights.save_hf(saved.with_name("again"), cfg, params, "float32")
  assert weights.config_to_hf(cfg, "float32")["tie_word_embeddings"] is False
  jax.tree.map(SAME, weights.load_hf(saved.with_name("again"))[1], params)


@pytest.mark.parametrize("strip", [40, 700, 4_000])
def test_reading_strip_by_strip_changes_nothing(small, saved, strip, monkeypatch):
  monkeypatch.setattr(weights, "STRIP_BYTES", strip)
  jax.tree.map(SAME, weights.load_hf(saved)[1], small.params)


@pytest.mark.parametrize("strip", [700, 2 ** 20])
def test_loading_onto_a_mesh(small, saved, strip, monkeypatch):
  monkeypatch.setattr(weights, "STRIP_BYTES", strip)
  mesh = sharding.make(-1, 2, 2)
  shardings = sharding.param_shardings(qwen.specs(small.cfg), mesh)
  _, params = weights.load_hf(saved, shardings=shardings)
  jax.tree.map(SAME, params, small.params)
  jax.tree.map(lambda a, s: SAME(a.sharding == s, True), params, shardings)
  weights.save_hf(saved.with_name("again"), small.cfg, params, "float32")
  assert (saved / "model.safetensors").read_bytes() == (saved.with_name("again") / "model.safetensors").read_bytes()


HEAD, NORM = "lm_head.weight", "model.norm.weight"
BROKEN = {
    "missing": (lambda ts: {k: v for k, v in ts.items() if "layers.1.mlp" not in k},
                r"Missing: model\.layers\.1\.mlp\.down_proj\.weight, .* \(3\)"),
    "missing head": (lambda ts: {k: v for k, v in ts.items() if k != HEAD}, r"Missing: lm_head\.weight \(1\)"),
    "extra": (lambda ts: ts | {"model.layers.2.mlp.bias": np.zeros(3, np.float32)},
              r"Not expected: model\.layers\.2\.mlp\.bias \(1\)"),
    "many extra": (lambda ts: ts | {f"x{i:02d}": np.zeros(1, np.float32) for i in range(12)},
                   r"Not expected: x00, .*x09, \.\.\. \(12 in all\)"),
    "misshapen": (lambda ts: ts | {NORM: np.ones((1, 24), np.float32)},
                  r"misshapen.*model\.norm\.weight \(wanted float\[24\], found F32\[1, 24\]\)"),
    "transposed": (lambda ts: ts | {HEAD: np.ascontiguousarray(ts[HEAD].T)},
                   r"lm_head\.weight \(wanted float\[64, 24\], found F32\[24, 64\]\)"),
    "quantised": (lambda ts: ts | {NORM: np.ones(24, np.int8)},
                  r"model\.norm\.weight.*found I8\[24\].*looks quantised"),
    "in eight bits": (lambda ts: ts | {NORM: np.ones(24, ml_dtypes.float8_e4m3fn)},
                      r"found F8_E4M3\[24\].*quantised"),
    "with scales": (lambda ts: ts | {"model.layers.0.mlp.up_proj.weight_scale": np.ones(1, np.float32)},
                    r"Not expected: .*weight_scale \(1\)\. It looks quantised"),
    "packed": (lambda ts: ts | {"model.layers.0.mlp.up_proj.qweight": np.ones(1, np.int32)}, "It looks quantised"),
    "twice": (lambda ts: ts | {"language_model.norm.weight": np.ones(24, np.float32)},
              r"each parameter once.*(model\.norm\.weight of model\.saf.*language_model\.norm\.weight of model\.saf"
              r"|language_model\.norm\.weight of model\.saf.* model\.norm\.weight of model\.saf)"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_tensors_are_named(saved, how):
  change, message = BROKEN[how]
  rewrite(saved, change)
  with pytest.raises(ValueError, match=re.escape(str(saved)) + ".*" + message):
    weights.load_hf(saved)


def test_one_parameter_in_two_files_is_refused(saved):
  (saved / "model.safetensors").rename(saved / "a.safetensors")
  safetensors_numpy.save_file({"model.visual.merger.ln_q.weight": np.ones(16, np.float32)}, saved / "b.safetensors")
  (saved / "model.safetensors.index.json").write_text(json.dumps(
      {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
  norm = r"visual\.merger\.ln_q\.weight"
  with pytest.raises(ValueError, match=rf"{norm} as {norm} of a\.safetensors and as model\.{norm} of b\.safetensors"):
    weights.load_hf(saved)


def test_buffers_of_old_versions_are_harmless(small, saved):
  old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
  rewrite(saved, lambda ts: ts | old | {"visual.rotary_pos_emb.inv_freq": np.ones(2, np.float32)})
  jax.tree.map(SAME, weights.load_hf(saved)[1], small.params)


YARN = {"type": "yarn", "mrope_section": [1, 1, 2], "factor": 4.0, "original_max_position_embeddings": 32768}
KINDS = ("yarn", "linear", "dynamic", "longrope", "su", "llama3", "proportional")
REFUSED = {
    "rope_scaling": [YARN, *({"rope_type": kind, "mrope_section": [1, 1, 2]} for kind in KINDS), {"type": 3},
                     {"type": []}, {"type": "mrope", "mrope_section": [1, 1, 2], "factor": 4.0}, [1], "yarn",
                     {"type": "mrope", "rope_type": "yarn", "mrope_section": [1, 1, 2]},
                     {"mrope_section": [1, 1, 2], "mrope_interleaved": True},
                     {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5},
                     {"mrope_section": [1, 1, 1]}, {"mrope_section": "112"}, {"mrope_section": 4},
                     {"mrope_section": [1, 1, 2.0]}],
    "rope_parameters": [YARN], "partial_rotary_factor": [0.5], "hidden_act": ["gelu", "gelu_new", 3],
    "use_sliding_window": ["no"], "max_window_layers": ["2", 1],
    "layer_types": [["full_attention", "sliding_attention"], "full_attention", []],
    "quantization_config": [{"quant_method": "awq", "bits": 4}, {"quant_method": "fp8"}, {"load_in_4bit": True},
                            "x"],
    "compression_config": [{"quant_method": "compressed-tensors"}],
    "hidden_size": ["64", 24.0, True, 0, -24, None, [], 25], "num_hidden_layers": [0, "2", None],
    "vocab_size": [0, "64"],
    "num_attention_heads": [0, None, "4"], "num_key_value_heads": [0, 3, "2", {}], "head_dim": [0, 7, "8"],
    "intermediate_size": [None, 40.5], "rms_norm_eps": ["1e-6", 0, -1, float("nan")],
    "rope_theta": ["1e6", 0, float("inf")], "tie_word_embeddings": ["false", 0], "image_token_id": [-1, "5", [5]],
    "eos_token_id": [[], "3", [3, None], -1, True], "vision_config": [[], "x", 3], "text_config": [[24], "x"],
    "model_type": [[], None, 3],
}
REFUSED_VISION = {
    "depth": [0, "2", 1.5], "num_heads": [0, 3], "hidden_size": [18, []], "patch_size": [0, [14, 14]],
    "window_size": [0, 27], "spatial_merge_size": [0], "temporal_patch_size": ["2"],
    "fullatt_block_indexes": [7, ["1"], [-1]], "hidden_act": ["gelu"], "in_channels": [1], "out_hidden_size": [25],
    "rope_parameters": [{"rope_theta": 5e4}, {"rope_type": "yarn"}, []],
    "quantization_config": [{"quant_method": "bitsandbytes"}],
}


@pytest.mark.parametrize("key, value", [(k, v) for k, vs in REFUSED.items() for v in vs])
def test_configs_that_are_not_implemented_or_make_no_sense_are_refused_by_name(small, key, value):
  flat = weights.config_to_hf(small.cfg, "float32") | (
      {"use_sliding_window": True} if key == "max_window_layers" else {})
  named = {"hidden_size": "hidden_size|num_attention_heads|mrope_section|out_hidden_size|head_dim",
           "head_dim": "head_dim|mrope_section", "rope_scaling": "rope_scaling|mrope_section",
           "layer_types": "use_sliding_window", "max_window_layers": "window", "quantization_config": "quantised",
           "compression_config": "quantised"}
  with pytest.raises(ValueError, match=f"^HERE.*({named.get(key, key)})"):
    family.config_from_hf(flat | {key: value}, "HERE")
  if key in ("rope_scaling", "hidden_act", "hidden_size", "use_sliding_window"):  # nested
    keys = ("image_token_id", "vision_config", "model_type")
    inner = {k: v for k, v in flat.items() if k not in keys} | {key: value}
    nested = {k: flat[k] for k in keys} | {"text_config": inner}
    with pytest.raises(ValueError, match=f"^HERE.*({named.get(key, key)})"):
      family.config_from_hf(nested, "HERE")


@pytest.mark.parametrize("key, value", [(k, v) for k, vs in REFUSED_VISION.items() for v in vs])
def test_vision_configs_that_make_no_sense_are_refused_by_name(small, key, value):
  flat = weights.config_to_hf(small.cfg, "float32")
  named = {"quantization_config": "quantised", "num_heads": "num_heads"}.get(key, key)
  with pytest.raises(ValueError, match=f"^HERE.*vision.*{named}" if named == key else f"^HERE.*{named}"):
    family.config_from_hf(flat | {"vision_config": flat["vision_config"] | {key: value}}, "HERE")


def test_what_quantised_a_checkpoint_is_named(small):
  flat = weights.config_to_hf(small.cfg, "float32")
  for found, name in ((({"quant_method": "awq"}), "awq"), ({"load_in_4bit": True}, "bitsandbytes"), ("gptq", "gptq")):
    with pytest.raises(ValueError, match=rf"quantised checkpoint \({name}\).*bfloat16"):
      weights.config_from_hf(flat | {"quantization_config": found})


@pytest.mark.parametrize("more", [
    {"sliding_window": 8, "max_window_layers": 0}, {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, {"attention_dropout": 0.1},
    {"layer_types": ["full_attention"] * 2}, {"max_position_embeddings": 7}, {"quantization_config": None},
    {"rope_parameters": {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 1e6}},
    {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}, "rope_theta": 1000000},
    {"hidden_act": "swish"}, {"some_trainer_s_own_key": {"x": 1}}, {"attention_bias": True},
    {"tie_word_embeddings": None}])
def test_keys_that_change_no_number_are_harmless(small, more):
  assert weights.config_from_hf(weights.config_to_hf(small.cfg, "float32") | more) == small.cfg


def test_either_place_may_say_that_the_head_is_tied(small):
  flat = weights.config_to_hf(small.cfg, "float32")
  keys = ("vision_config", "model_type", *(k for k in flat if k.endswith("token_id")))
  nested = {k: flat[k] for k in keys} | {"text_config": {k: v for k, v in flat.items() if k not in keys}}
  for root, inner, tied in ((True, False, True), (False, True, True), (False, False, False), (None, True, True)):
    nested["text_config"]["tie_word_embeddings"] = inner
    assert weights.config_from_hf(nested | {"tie_word_embeddings": root}).text.tied == tied


def test_a_turn_ends_with_the_ids_of_the_generation_config(small, saved):
  path = saved / "generation_config.json"
  for content, eos in (('{"eos_token_id": [3, 11]}', (3, 11)), ('{"eos_token_id": 11}', (11,)), ("{}", (3,)),
                       ('{"eos_token_id": null}', (3,)), ('{"eos_token_id": [11, 3, 11]}', (11, 3))):
    path.write_text(content)
    assert weights.read_config(saved).eos == weights.load_hf(saved)[0].eos == eos
    weights.save_hf(saved.with_name("again"), weights.read_config(saved), small.params, "float32")
    assert weights.read_config(saved.with_name("again")).eos == eos
  for content, message in (("[]", "must hold a JSON object"), ("{", "must be JSON"),
                           ('{"eos_token_id": "x"}', "eos_token_id"), ('{"eos_token_id": []}', "eos_token_id"),
                           ('{"eos_token_id": [1.5]}', "eos_token_id")):
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
      weights.read_config(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(saved, keep):
  file = saved / "model.safetensors"
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(ValueError, match=re.escape(str(file)) + ".*truncated or corrupt"):
    weights.load_hf(saved)


def test_folders_that_are_not_this_model(saved, tmp_path):
  here = re.escape(str(saved))
  with pytest.raises(ValueError, match="hf_dir must be a folder with a config.json.*nowhere"):
    weights.load_hf(tmp_path / "nowhere")
  edit_config(saved, lambda c: c | {"model_type": "qwen2_vl"})
  with pytest.raises(ValueError, match=f"{here}.*model_type must be 'qwen2_5_vl'. Received: 'qwen2_vl'"):
    weights.load_hf(saved)
  edit_config(saved, lambda c: c | {"model_type": "qwen2_5_vl", "vision_config": c["vision_config"] | {
      "out_hidden_size": 99}})
  with pytest.raises(ValueError, match=f"{here}.*out_hidden_size must be hidden_size = 24. Received: 99"):
    weights.load_hf(saved)
  edit_config(saved, lambda c: {k: v for k, v in c.items() if k != "num_hidden_layers"})
  with pytest.raises(ValueError, match=f"{here}.*'num_hidden_layers' is missing"):
    weights.load_hf(saved)
  (saved / "config.json").write_text('{"model_type": ')
  with pytest.raises(ValueError, match=f"{here}.*must be JSON"):
    weights.load_hf(saved)
  (saved / "config.json").write_text("[]")
  with pytest.raises(ValueError, match=f"{here}.*must hold a JSON object. Received: list"):
    weights.load_hf(saved)


def test_weights_that_stand_elsewhere_are_not_overlooked(saved):
  """transformers would read other files, or put an adapter on top."""
  edit_config(saved, lambda c: c | {"transformers_weights": "other.safetensors"})
  with pytest.raises(ValueError, match="transformers_weights must not name another.*Received: 'other.safetensors'"):
    weights.load_hf(saved)
  edit_config(saved, lambda c: c | {"transformers_weights": None})
  weights.load_hf(saved)
  (saved / "adapter_config.json").write_text("{}")
  with pytest.raises(ValueError, match="must hold a whole model, but has an adapter.*Merge it"):
    weights.load_hf(saved)


def test_a_folder_without_weights_says_what_it_holds(saved):
  (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
  with pytest.raises(ValueError, match=re.escape(str(saved)) + r".*must hold model\.safetensors.*pytorch_model\.bin"):
    weights.load_hf(saved)


def test_an_interrupted_save_leaves_the_old_folder_whole(small, saved, monkeypatch):
  before = {p.name: p.read_bytes() for p in saved.iterdir()}

  def fail(tensors, path, **kwargs):
    pathlib.Path(path).write_bytes(b"half")
    raise OSError("no space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(safetensors_numpy, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
      weights.save_hf(saved, small.cfg, jax.tree.map(lambda a: a + 1, small.params), "float32")
  assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
  # And the next save succeeds, whatever the interrupted one has left.
  weights.save_hf(saved, small.cfg, jax.tree.map(lambda a: a + 1, small.params), "float32")
  jax.tree.map(lambda a, b: SAME(a, b + 1), weights.load_hf(saved)[1], small.params)
  assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_saving_replaces_all_and_brings_the_tokenizer_along(tiny, small, saved):
  (saved / "stale.safetensors").write_bytes(b"")
  weights.save_hf(saved, small.cfg, small.params, "float32", like=tiny.folder)
  names = {p.name for p in saved.iterdir()}
  assert names == {"config.json", "model.safetensors", "virl_jax.json", *os.listdir(tiny.folder)}
  assert (saved / "tokenizer.json").read_bytes() == (tiny.folder / "tokenizer.json").read_bytes()
  # A folder may be saved over itself: its own files are copied.
  weights.save_hf(saved, small.cfg, small.params, "float32", like=saved)
  assert {p.name for p in saved.iterdir()} == names
  shutil.rmtree(saved)
