"""Operations counted by hand are the compiler's, where it can count."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from virl_jax import types
from virl_jax.model import family
from virl_jax.model import layers
from virl_jax.model import patches
from virl_jax.model import tuning
from virl_jax.model.qwen2_5 import model as qwen
from virl_jax.run import costs
from virl_jax.run import topologies


def counted(fn, *args):
  found = jax.jit(fn).lower(*args).compile().cost_analysis()
  return (found[0] if isinstance(found, list) else found)["flops"]


@pytest.fixture(scope="module")
def wide(small):
  """A model of one layer and three vision blocks (window, full, window), so wide that products are nearly all of it."""
  text = dataclasses.replace(small.cfg.text, layers=1, hidden=256, heads=4, kv_heads=2, head_size=64, intermediate=512,
                             mrope_section=(8, 12, 12), vocab=512)
  vision = dataclasses.replace(small.cfg.vision, depth=3, hidden=256, heads=4, intermediate=512, out=256,
                               full_blocks=(1,))
  cfg = dataclasses.replace(small.cfg, text=text, vision=vision)
  return cfg, family.abstract_params(cfg)


def test_the_decoder_and_its_head(wide):
  cfg, params = wide
  B, T = 2, 128
  tokens, pos = np.zeros((B, T), np.int32), np.zeros((B, 3, T), np.int32)

  def run(params):
    h = qwen.hidden(params, cfg, tokens, pos, tokens == 0, tokens - 1, ())
    return layers.logits(h, qwen.head(params))

  # No kernel here leaves out what a token does not see, so that all of a row's products are computed.
  work = costs.Work(tokens=B * T, context=T, head_tokens=B * T)
  assert counted(run, params) == pytest.approx(costs.flops(cfg, work), rel=0.1)
  assert costs.flops(cfg, dataclasses.replace(work, passes=3)) == 3 * costs.flops(cfg, work)


def test_the_vision_tower(wide):
  cfg, params = wide
  grid = cfg.vision.grid
  windows, Q = 16, grid.window ** 2 * grid.merge ** 2
  shape = 2, windows, Q
  images = types.ImageBatch(*(jax.ShapeDtypeStruct(s, d) for s, d in (
      ((*shape, grid.values), np.float32), (shape, np.int32), ((*shape, 2), np.int32))))
  ids = np.zeros((2, 1), np.int32)
  run = lambda params, images: qwen.embed(params, cfg, ids, ids, (images,))
  work = costs.Work(tokens=0, patches=2 * windows * Q, of_image=windows * Q)
  assert counted(run, params, images) == pytest.approx(costs.flops(cfg, work), rel=0.1)
  assert patches.bucket((windows, windows * grid.window ** 2), grid)[0] == windows


def test_a_patch_sees_no_more_than_its_image(wide):
  """A picture smaller than a window is seen whole, by every block: 2 products of 256 for each patch and block."""
  cfg, _ = wide
  flops = lambda of_image: costs.flops(cfg, costs.Work(tokens=0, patches=1, of_image=of_image))
  window = (cfg.vision.grid.window * cfg.vision.merge) ** 2
  assert flops(5) - flops(4) == 3 * 2 * 2 * 256
  assert flops(window + 1) - flops(window) == 1 * 2 * 2 * 256, "one block of three sees all of a larger one"


@pytest.mark.parametrize("tuned, passes", [
    (tuning.Config(), (3, 3)), (tuning.Config(rank=4), (2, 2)), (tuning.Config(freeze_vision=True), (3, 1)),
    (tuning.Config(rank=4, freeze_vision=True), (2, 1))])
def test_what_an_update_is_worth(tuned, passes):
  assert costs.update_passes(tuned) == passes


def test_the_released_7b():
  """Two operations a parameter and token, if no token sees another; the embedding is no product."""
  cfg = qwen.SIZES["7b"]
  multiplied = 7.6e9 - 152064 * 3584
  assert costs.flops(cfg, costs.Work(tokens=1, head_tokens=1)) == pytest.approx(2 * multiplied, rel=0.01)


def test_the_slowest_of_three_decides():
  chip = dataclasses.replace(topologies.CHIPS["h100"], flops=100.0, bandwidth=10.0, link=1.0)
  assert costs.seconds(chip, 2, 2000.0, 50.0, 3.0) == 10.0
  assert costs.seconds(chip, 2, 200.0, 50.0, 3.0) == 5.0
  assert costs.seconds(chip, 2, 200.0, 5.0, 3.0) == 3.0
  assert math.isnan(costs.seconds(topologies.CHIPS["cpu"], 8, 1.0, 1.0, 1.0))
