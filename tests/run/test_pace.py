"""Tokens a second and model FLOPs utilisation, against counts by hand."""

import dataclasses

import jax
import numpy as np
import pytest

from virl_jax import config as config_lib
from virl_jax import types
from virl_jax.learner import pooled
from virl_jax.model import tuning
from virl_jax.run import pace

LAPS = {"time/checkpoint_s": 0.25, "time/data_s": 0.25, "time/weights_s": 0.5, "time/rollout_s": 5.0,
        "time/score_s": 0.5, "time/update_s": 1.5}
OTHER = {"time/compile_s": 99.0, "time/rollout_tokens_s": 1e6, "time/rollout_idle_share": 0.5}


def image(rows, columns):
  return types.ImageInput(np.zeros((0, 0)), (rows, columns), types.Box(0, 0, 1, 1))


def trajectory(prompt, turns=(), images=()):
  ids = lambda n: np.zeros(n, np.int32)
  said = [types.Turn("tool" if i % 2 else "assistant", ids(n)) for i, n in enumerate(turns)]
  return types.Trajectory(None, 0, ids(prompt), said, list(images))


def test_what_a_step_holds():
  """Of 3 tokens, a token sees 2 on average; each picture's patches count once a minibatch."""
  shown, crop, other = image(4, 6), image(2, 2), image(2, 4)
  mine = [[trajectory(1, (2,), [shown, crop]), trajectory(2, (1, 1, 1), [shown])], [trajectory(1, (), [shown])]]
  theirs = [[trajectory(4, (), [other])], []]
  found = pooled.merge([pace.work(mine), pace.work(theirs)])
  assert found == {"tokens/total": 3 + 5 + 1 + 4, "tokens/context": pytest.approx((6 + 15 + 1 + 10) / 13),
                   "patches/total": 24 + 4 + 24 + 8,
                   "patches/of_image": pytest.approx((24 ** 2 + 4 ** 2 + 24 ** 2 + 8 ** 2) / 60)}
  assert pooled.merge([pace.work([[], []])]) == {"tokens/total": 0, "tokens/context": 0, "patches/total": 0,
                                                 "patches/of_image": 0}


def line():
  """A step of one trajectory of two tokens, one of which is a picture of four patches."""
  return LAPS | OTHER | pooled.merge([pace.work([[trajectory(2, (), [image(2, 2)])]])])


# Multiplications of the model `small`.  Decoder, for a token: queries and outputs 24 x 32 each, keys and values 24 x 16
# each, and three times 24 x 40, in each of two layers; the head 24 x 64.  For a token that is seen: 32 for its key and
# 32 for its value, in each layer; the two tokens see three.  Tower, for a patch: the patch embedding 1176 x 16; four
# times 16 x 16 and three times 16 x 24 in each of two blocks; in each, all four patches are seen, 16 for a key and 16
# for a value.  The four are merged by 64 x 64 and 64 x 24.
TEXT = 2 * (2 * (2 * 24 * 32 + 2 * 24 * 16 + 3 * 24 * 40) + 24 * 64) + 3 * 2 * 64
VISION = 4 * (1176 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 24 + 4 * 32)) + 64 * 64 + 64 * 24


def test_operations_and_mfu_by_hand(small):
  of = pace.Learner(small.cfg, passes=3.0, vision_passes=3.0, devices=8, peak_flops=1e5)
  assert pace.operations(line(), of) == 3 * 2 * (TEXT + VISION) == 741120
  assert pace.mfu(line(), of) == pytest.approx(741120 / (2.0 * 8 * 1e5)) == pytest.approx(0.4632)
  of = dataclasses.replace(of, passes=8.0, vision_passes=4.0)
  assert pace.operations(line(), of) == 2 * (8 * TEXT + 4 * VISION)


def test_a_step_s_pace(small):
  of = pace.Learner(small.cfg, 3.0, 3.0, 4, 1e5)
  assert pace.metrics(line(), of) == {"speed/tokens_s": 0.25, "speed/tokens_s_device": 0.0625,
                                      "speed/mfu": pytest.approx(2 * 0.4632)}
  assert pace.metrics(line(), dataclasses.replace(of, peak_flops=None)).keys() == {"speed/tokens_s",
                                                                                   "speed/tokens_s_device"}


@pytest.mark.parametrize("knobs, tuned, passes", [
    ({}, {}, (3, 3)),                                                    # the only update's pass also scores
    ({"loss.kl_coef": 0.1}, {}, (4, 4)),                                 # and the reference's
    ({"ppo.minibatches": 2}, {}, (4, 4)),                                # one update for each minibatch
    ({"ppo.epochs": 2}, {}, (7, 7)),
    ({"advantage.kind": "gae"}, {}, (4, 4)),
    ({"loss.kl_in_reward": True, "loss.kl_coef": 0.1}, {}, (5, 5)),
    ({"ppo.epochs": 2, "loss.kl_coef": 0.1}, {"rank": 4, "freeze_vision": True}, (6, 4)),
    ({"model.remat": True}, {"rank": 4}, (2, 2))])                       # recomputation does not count
def test_passes(small, knobs, tuned, passes):
  c = config_lib.default()
  for key, value in ({"ppo.epochs": 1, "ppo.minibatches": 1, "loss.kl_coef": 0.0} | knobs).items():
    section, _, name = key.partition(".")
    c[section][name] = value
  found = pace.learner(c, dataclasses.replace(small.cfg, tuning=tuning.Config(**tuned)), jax.devices())
  assert (found.passes, found.vision_passes, found.devices, found.peak_flops) == (*passes, 8, None)


class Device:
  """A device whose name is in the table."""

  device_kind = "TPU v5 lite"

  def __init__(self, peak):
    self.memory_stats = lambda: {"bytes_limit": 1, "peak_bytes_in_use": peak}


def test_the_peak_is_the_devices_or_given(small):
  c = config_lib.default()
  assert pace.learner(c, small.cfg, [Device(0)]).peak_flops == 197e12
  c.log.peak_flops = 2e12
  assert pace.learner(c, small.cfg, [Device(0)]).peak_flops == 2e12


def test_the_fullest_device_of_all():
  found = [pace.device_memory([Device(2 ** 30), Device(3 * 2 ** 30)]), pace.device_memory([Device(2 ** 31)])]
  assert pooled.merge(found) == {"memory/device_peak_gib": 3.0}
  assert pace.device_memory(jax.devices()) == {}, "a CPU does not say"
