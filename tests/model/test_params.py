"""The parameter table: counts of the released models, HF layouts there and back, initial values."""

import jax
import numpy as np
import pytest

from virl_jax.model import params as params_lib
from virl_jax.model.qwen2_5 import model as qwen


@pytest.mark.parametrize("size, numbers", [
    ("3b", 3_754_622_976), ("7b", 8_292_166_656), ("32b", 33_452_718_336), ("72b", 73_410_777_344)])
def test_released_models_have_as_many_parameters_as_published(size, numbers):
  specs = qwen.specs(qwen.SIZES[size])
  assert params_lib.count(specs) == numbers
  shapes = jax.tree.leaves(params_lib.abstract(specs, "bfloat16"))
  assert sum(s.size for s in shapes) == numbers and {str(s.dtype) for s in shapes} == {"bfloat16"}


def test_hf_layout_there_and_back(small):
  for path, spec in params_lib.leaves(qwen.specs(small.cfg)):
    # Every element is its own index, so that any wrong order of axes shows.
    tensor = np.arange(np.prod(spec.hf_shape)).reshape(spec.hf_shape)
    ours = params_lib.from_hf(spec, tensor)
    assert ours.shape == spec.item_shape, path
    back = params_lib.to_hf(spec, ours)
    np.testing.assert_array_equal(back, tensor, err_msg=str(path))
    assert back.flags.c_contiguous, path


def test_matrices_mean_what_hf_s_mean(small):
  """y = x W^T in HF is x times our tensor, over all of its input axes and no others."""
  rng = np.random.default_rng(0)
  specs = qwen.specs(small.cfg)
  D, heads, size = small.cfg.text.hidden, small.cfg.text.heads, small.cfg.text.head_size
  block = specs["text"]["blocks"]
  tensor, x = rng.normal(size=(heads * size, D)), rng.normal(size=D)
  np.testing.assert_allclose(np.tensordot(x, params_lib.from_hf(block["q_w"], tensor), 1),
                             (tensor @ x).reshape(heads, size))
  tensor, x = rng.normal(size=(D, heads * size)), rng.normal(size=heads * size)
  np.testing.assert_allclose(np.tensordot(x.reshape(heads, size), params_lib.from_hf(block["o_w"], tensor), 2),
                             tensor @ x)
  D, heads, size = small.cfg.vision.hidden, small.cfg.vision.heads, small.cfg.vision.head_size
  tensor, x = rng.normal(size=(3 * D, D)), rng.normal(size=D)
  np.testing.assert_allclose(
      np.tensordot(x, params_lib.from_hf(specs["vision"]["blocks"]["qkv_w"], tensor), 1),
      (tensor @ x).reshape(3, heads, size))
  tensor, x = rng.normal(size=(D, 3, 2, 14, 14)), rng.normal(size=1176)
  np.testing.assert_allclose(x @ params_lib.from_hf(specs["vision"]["patch_embed"], tensor),
                             tensor.reshape(D, -1) @ x)


def test_names_are_the_released_ones(small):
  named = dict(params_lib.leaves(qwen.specs(small.cfg)))
  assert named["text", "blocks", "q_b"].hf_names() == [f"model.layers.{i}.self_attn.q_proj.bias" for i in (0, 1)]
  assert named["vision", "merger", "norm"].hf_names() == ["visual.merger.ln_q.weight"]
  names = [n for spec in named.values() for n in spec.hf_names()]
  assert len(set(names)) == len(names)


def test_initial_values_are_reproducible_and_independent():
  wide = lambda name: params_lib.ParamSpec((2, 20, 50), ("layers", None, None), "normal", name, (50, 20), (1, 0))
  specs = {"a": wide("a.{layer}"), "b": wide("b.{layer}"),
           "flat": params_lib.ParamSpec((800, 2), (None, None), "normal", "flat", (2, 10, 80), (1, 0)),
           "one": params_lib.ParamSpec((3,), (None,), "ones", "one", (3,)),
           "zero": params_lib.ParamSpec((3,), (None,), "zeros", "zero", (3,))}
  draw = lambda table, seed: params_lib.init(table, jax.random.key(seed), "float32")
  first, again, other = draw(specs, 0), draw(specs, 0), draw(specs, 1)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert not np.array_equal(first["a"], other["a"])
  assert abs(np.corrcoef(first["a"].ravel(), first["b"].ravel())[0, 1]) < 0.1
  assert abs(np.corrcoef(first["a"][0].ravel(), first["a"][1].ravel())[0, 1]) < 0.1

  longer = draw({"aa": wide("aa.{layer}"), **specs}, 0)
  longer.pop("aa")
  jax.tree.map(np.testing.assert_array_equal, first, longer)

  # One over the root of the inputs: 20 of each matrix, 10 * 80 of the patch projection.
  np.testing.assert_allclose([np.std(first["a"]), np.std(first["flat"])], [20 ** -0.5, 800 ** -0.5], rtol=0.06)
  assert first["one"].tolist() == [1, 1, 1] and first["zero"].tolist() == [0, 0, 0]
  assert draw(specs, 0)["a"].dtype == np.float32


def test_stack_puts_layers_first():
  spec = params_lib.ParamSpec((4, 2), ("embed", None), "normal", "a.{layer}.w", (2, 4), (1, 0))
  stacked = params_lib.stack(3, {"w": spec})["w"]
  assert stacked.shape == (3, 4, 2) and stacked.axes == ("layers", "embed", None) and stacked.item_shape == (4, 2)
  assert stacked.hf_names() == ["a.0.w", "a.1.w", "a.2.w"] and spec.hf_names() == ["a.{layer}.w"]


def test_bad_specs_are_named():
  with pytest.raises(ValueError, match=r"thing: axes must name every dimension of \(2, 3\)"):
    params_lib.ParamSpec((2, 3), (None,), "ones", "thing", (2, 3))
  with pytest.raises(ValueError, match=r"thing: hf_shape must have as many elements.*\(7,\)"):
    params_lib.ParamSpec((2, 3), (None, None), "ones", "thing", (7,))
  odd = params_lib.ParamSpec((2,), (None,), "twos", "thing", (2,))
  with pytest.raises(ValueError, match="thing: init must be.*'twos'"):
    params_lib.init({"odd": odd}, jax.random.key(0), "float32")


@pytest.mark.parametrize("split, hf", [((3, 4, 5, 7), (60, 7)), ((6, 5), (6, 5)), ((9,), (9,)), ((4, 6), (4, 2, 3))])
@pytest.mark.parametrize("most", [1, 3, 7, 20, 36, 1000])
def test_strips_are_whole_rows_and_miss_nothing(split, hf, most):
  tensor = np.arange(np.prod(hf)).reshape(hf)
  target, times = np.zeros(split, int), np.zeros(split, int)
  for index, rows in params_lib.strips(split, hf[0], most):
    assert tensor[rows].size <= max(most, tensor[0].size)
    target[index] = tensor[rows].reshape(target[index].shape)
    times[index] += 1
  assert (times == 1).all() and (target == tensor.reshape(split)).all()
