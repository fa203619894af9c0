"""Agreement with the reference implementation, transformers' Qwen2.5-VL, on small random models."""

import json

import jax
import numpy as np
import pytest

from virl_jax.model import params as params_lib
from virl_jax.model import qwen
from virl_jax.model import text
from virl_jax.model import vision
from virl_jax.model import weights

torch = pytest.importorskip("torch", reason="the reference implementation needs torch: pip install 'virl-jax[parity]'")
transformers = pytest.importorskip("transformers")

IDS = {"image_token": 5, "video_token": 6, "vision_start": 7, "vision_end": 8, "vision_pad": 9, "eos": 3}
CONFIGS = {
    # Windows of 4 x 4 merged cells, tied head, one full block at the end.
    "tied": qwen.Config(
        text=text.Config(vocab=96, hidden=48, layers=2, heads=4, kv_heads=2, head_size=12, intermediate=64,
                         mrope_section=(2, 2, 2), tied=True),
        vision=vision.Config(depth=3, hidden=32, heads=2, intermediate=48, out=48, full_blocks=(1,)), **IDS),
    # Windows of 2 x 2, one key head for all, other constants throughout.
    "untied": qwen.Config(
        text=text.Config(vocab=80, hidden=32, layers=3, heads=4, kv_heads=1, head_size=8, intermediate=56,
                         mrope_section=(1, 1, 2), theta=5000.0, eps=1e-5, tied=False),
        vision=vision.Config(depth=2, hidden=24, heads=3, intermediate=40, out=32, full_blocks=(0,), window_px=56),
        **IDS),
}
# Patch rows and columns, not multiples of the window: ragged edges on both sides.
IMAGES = [(6, 6), (4, 10), (12, 18)]


def sequence(rng, parts):
  """Token ids of (number of words | image grid) parts."""
  out = []
  for part in parts:
    if isinstance(part, int):
      out += rng.integers(10, 80, part).tolist()
    else:
      out += [IDS["vision_start"]] + [IDS["image_token"]] * (part[0] * part[1] // 4) + [IDS["vision_end"]]
  return out


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_agree(name, tmp_path):
  cfg, rng = CONFIGS[name], np.random.default_rng(7)

  def draw(spec):
    x = 0.2 * rng.standard_normal(spec.shape, np.float32)
    return jax.numpy.asarray(1 + x if spec.init == "ones" else x)

  params = params_lib.map_specs(draw, qwen.specs(cfg))
  weights.save_hf(tmp_path / "hf", cfg, params, "float32")
  reference = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
  assert sum(p.numel() for p in reference.parameters()) == params_lib.count(qwen.specs(cfg))

  # Three rows: two images, padded on the left; one image, padded on the right; text alone.
  rows = [sequence(rng, [4, IMAGES[0], 5, IMAGES[1], 7]), sequence(rng, [3, IMAGES[2], 9]), sequence(rng, [20])]
  T = max(map(len, rows)) + 2
  ids, mask = np.zeros((3, T), np.int64), np.zeros((3, T), np.int64)
  for b, (row, start) in enumerate(zip(rows, (T - len(rows[0]), 0, 5))):
    ids[b, start:start + len(row)], mask[b, start:start + len(row)] = row, 1
  grids = np.array([[1, *hw] for hw in IMAGES])
  pixels = rng.standard_normal((grids.prod(1).sum(), cfg.vision.grid.values), np.float32)
  with torch.no_grad():
    want = reference.eval()(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), pixel_values=torch.tensor(pixels),
        image_grid_thw=torch.tensor(grids), mm_token_type_ids=torch.tensor(ids == IDS["image_token"]).int(),
    ).logits.numpy()
  got = np.asarray(qwen.logits_from_hf_inputs(params, cfg, ids, mask, pixels, grids))

  seen = mask.astype(bool)
  assert np.abs(want[seen]).max() > 1  # there is something to agree on
  np.testing.assert_allclose(got[seen], want[seen], atol=2e-4)


def test_a_folder_that_the_reference_wrote_is_read(tmp_path):
  cfg = CONFIGS["untied"]
  hf = transformers.Qwen2_5_VLConfig(**weights.config_to_hf(cfg, "float32"))
  torch.manual_seed(0)
  reference = transformers.Qwen2_5_VLForConditionalGeneration(hf)
  reference.save_pretrained(tmp_path)
  found, params = weights.load_hf(tmp_path)
  assert found == cfg
  state = {weights.released_name(k): v.numpy() for k, v in reference.state_dict().items()}
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
