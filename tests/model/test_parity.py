"""Agreement with the reference implementation, transformers' Qwen2.5-VL, on small random models."""

import dataclasses
import json
import shutil
from unittest import mock

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from tests.model import agreement
from virl_jax.model import params as params_lib
from virl_jax.model import weights
from virl_jax.model.qwen2_5 import model as qwen

torch = pytest.importorskip("torch", reason="the reference implementation needs torch: pip install 'virl-jax[parity]'")
transformers = pytest.importorskip("transformers")

UNTIED = qwen.Config(
    text=qwen.Text(vocab=80, hidden=32, layers=3, heads=4, kv_heads=1, head_size=8, intermediate=56,
                     mrope_section=(1, 1, 2), theta=5000.0, eps=1e-5, tied=False),
    vision=qwen.Vision(depth=2, hidden=24, heads=3, intermediate=40, out=32, full_blocks=(0,), window_px=56),
    **agreement.IDS)


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 12)),
                                  *(pytest.param(s, marks=pytest.mark.long) for s in range(12, 72))])
def test_the_model_agrees(seed, tmp_path):
  """Positions, vision tokens, hidden states, logits, NLL, gradients, and greedy turns over a growing cache."""
  found = agreement.compare(seed, str(tmp_path / "hf"))
  print(found)
  assert {k: found[k] for k, limit in agreement.LIMITS.items() if found.get(k, 0) > limit} == {}, found
  assert found["scale"] > 1 and found["sampled"] > 6  # there is something to agree on


def test_half_precision_rounds_as_the_reference_s_does(tmp_path):
  """Our bfloat16 results are about as far from float32 as the reference's, and nearer to the reference's."""
  rng = np.random.default_rng(3)
  cfg = agreement.draw_config(np.random.default_rng(0))
  folder = tmp_path / "hf"
  weights.save_hf(folder, cfg, agreement.draw_params(cfg, rng), "bfloat16")
  ids, mask, pixels, grids = agreement.batch_of([agreement.draw_part(cfg, rng, n) for n in (2, 1)], rng)
  logits = {}
  for dtype in ("float32", "bfloat16"):
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
      out = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), pixel_values=torch.tensor(pixels),
                  image_grid_thw=torch.tensor(grids), mm_token_type_ids=torch.tensor(ids == cfg.image_token).int())
    logits["theirs", dtype] = out.logits.float().numpy()[mask.astype(bool)]
    _, params = weights.load_hf(folder, dtype)
    ours = qwen.logits_from_hf_inputs(params, dataclasses.replace(cfg, compute_dtype=dtype), ids, mask, pixels, grids)
    logits["ours", dtype] = np.asarray(ours)[mask.astype(bool)]
  error = lambda a, b: np.sqrt(np.mean((logits[a] - logits[b]) ** 2))
  theirs = error(("theirs", "bfloat16"), ("theirs", "float32"))
  ours = error(("ours", "bfloat16"), ("ours", "float32"))
  assert 0.003 < theirs and 0.6 * theirs < ours < 1.4 * theirs, (ours, theirs)


def test_a_folder_that_the_reference_wrote_is_read(tmp_path):
  cfg = UNTIED
  hf = transformers.Qwen2_5_VLConfig(**weights.config_to_hf(cfg, "float32"))
  torch.manual_seed(0)
  reference = transformers.Qwen2_5_VLForConditionalGeneration(hf)
  reference.save_pretrained(tmp_path)
  found, params = weights.load_hf(tmp_path)
  assert found == cfg
  state = {qwen.released_name(k): v.numpy() for k, v in reference.state_dict().items()}
  for path, spec in params_lib.leaves(qwen.specs(cfg)):
    leaf = params
    for key in path:
      leaf = leaf[key]
    for i, name in enumerate(spec.hf_names()):
      np.testing.assert_array_equal(params_lib.to_hf(spec, np.asarray(leaf[i] if spec.stacked else leaf)), state[name])
  assert "text_config" in json.loads((tmp_path / "config.json").read_text())  # the nested form


def test_configs_are_read_as_the_reference_reads_them():
  """Released shapes, written by us and read by transformers, keep every number."""
  for cfg in qwen.SIZES.values():
    hf = transformers.Qwen2_5_VLConfig(**weights.config_to_hf(cfg, "bfloat16"))
    assert weights.config_from_hf(hf.to_dict()) == cfg
    assert (hf.text_config.hidden_size, hf.vision_config.out_hidden_size) == (cfg.text.hidden, cfg.text.hidden)
    assert list(hf.text_config.rope_parameters["mrope_section"]) == [16, 24, 24]


def _logits(folder, ids):
  """The reference's in float64 and ours in float32, of words without images."""
  reference = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
  with torch.no_grad():
    theirs = reference(input_ids=torch.tensor(ids), attention_mask=torch.ones_like(torch.tensor(ids))).logits.numpy()
  cfg, params = weights.load_hf(folder)
  return theirs, np.asarray(qwen.logits_from_hf_inputs(params, cfg, ids, np.ones_like(ids)))


@pytest.mark.parametrize("stored", ["another head", "the same head", "the head alone", "the embedding alone"])
def test_a_head_is_tied_where_the_reference_ties_it(stored, tmp_path):
  """The config says tied; what is stored decides, as in the reference."""
  folder = tmp_path / "hf"
  params = agreement.draw_params(UNTIED, np.random.default_rng(5))
  weights.save_hf(folder, UNTIED, params, "float32")
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
  tensors = safetensors_numpy.load_file(folder / "model.safetensors")
  if stored != "another head":
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  if stored.endswith("alone"):
    del tensors["lm_head.weight" if "embedding" in stored else "model.embed_tokens.weight"]
  safetensors_numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  theirs, ours = _logits(folder, np.arange(10, 30)[None])
  np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())
  assert weights.read_config(folder).text.tied == (stored != "another head")


def test_a_whole_file_goes_before_a_stale_index_as_in_the_reference(tmp_path):
  """transformers leaves the index and shards of an earlier save behind when the model fits in one file."""
  rng = np.random.default_rng(6)
  old, new = (agreement.draw_params(UNTIED, rng) for _ in range(2))
  with mock.patch.object(weights, "SHARD_BYTES", 20_000):
    weights.save_hf(tmp_path / "old", UNTIED, old, "float32")
  weights.save_hf(tmp_path / "new", UNTIED, new, "float32")
  shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path / "old")
  ids = np.arange(10, 30)[None]
  theirs, ours = _logits(tmp_path / "old", ids)
  np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())
  np.testing.assert_array_equal(ours, _logits(tmp_path / "new", ids)[1])
