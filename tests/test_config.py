"""Configurations: as JSON and back, and every value that can't work is named."""

import pathlib
import runpy

import pytest

from virl_jax import config as config_lib
from virl_jax.rollout import slots
from virl_jax.run import setup

FILES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_json_there_and_back(path):
  c = runpy.run_path(str(path))["get_config"]()
  again = config_lib.from_json(config_lib.to_json(c))
  assert again == c and config_lib.to_json(again) == config_lib.to_json(c)


def test_a_key_that_an_older_run_lacks_keeps_its_default():
  c = config_lib.default()
  c.steps = 3
  assert config_lib.from_json('{"steps": 3}') == c


@pytest.mark.parametrize("text, message", [
    ("{", "Expecting property name"), ("[]", "no attribute"), ('{"stepz": 1}', "stepz"),
    ('{"steps": "x"}', "steps"), ('{"model": 3}', "no attribute")])
def test_what_is_no_configuration_is_named(text, message):
  with pytest.raises(ValueError, match=f"^W/config.json must be a configuration.*{message}"):
    config_lib.from_json(text, "W/config.json")


@pytest.mark.parametrize("changes, message", [
    ({"advantage.kind": "gae", "credit.kind": "additive"}, "credit.kind must be hard, soft or none.*action by action"),
    ({"advantage.kind": "gae", "advantage.drop_equal": True}, "advantage.drop_equal must be False.*critic learns"),
    ({"loss.kind": "cispo", "loss.dual_clip": 3.0}, "loss.dual_clip must be 0 with loss.kind = 'cispo'"),
    ({"loss.kind": "gspo"}, "loss.aggregate must be 'sequence'.*Received: 'token'"),
    ({"loss.kl_in_reward": True, "loss.kl_coef": 0.1}, "loss.kl_estimator must be 'k1' with loss.kl_in_reward.*'k3'"),
    ({"loss.kl_in_reward": True, "loss.kl_coef": 0.1, "loss.kl_estimator": "k2"}, "loss.kl_estimator must be 'k1'"),
    ({"loss.kl_in_reward": True, "loss.kl_estimator": "k1"}, "loss.kl_in_reward must be False while loss.kl_coef is 0"),
    ({"loss.kl_target": 0.1}, "loss.kl_target must be 0 while loss.kl_coef is 0"),
    ({"loss.kl_coef": 0.1, "loss.kl_estimator": "k1"}, "loss.kl_estimator must be k2 or k3 in the loss"),
    ({"loss.dual_clip": 1.1}, "loss.dual_clip must be 0, or above 1"),
    ({"rollout.group_size": 1, "advantage.kind": "rloo"}, "group_size must be at least 2.*no siblings"),
    ({"loss.kind": "trpo"}, "loss.kind must be one of ppo, gspo, cispo. Received: 'trpo'"),
    ({"credit.scope": "word"}, "credit.scope must be one of turn, call, box"),
    ({"optim.kind": "lion"}, "optim.kind must be one of adamw, adafactor, muon. Received: 'lion'"),
    ({"optim.skip_above": 0.5}, "optim.skip_above must be 0, or above 1: in medians. Received: 0.5"),
    ({"optim.skip_above": 1.0}, "optim.skip_above must be 0, or above 1"),
    ({"optim.kind": "adafactor", "optim.first_moment": "bfloat16"}, "optim.first_moment must be 'param'"),
    ({"model.remat_keep": ("mlp",)}, r"model.remat_keep must be \(\) while model.remat is False"),
    ({"model.remat_offload": ("mlp",)}, r"model.remat_offload must be \(\) while model.remat is False"),
    ({"model.remat": True, "model.remat_keep": ("mlp", "out")}, "remat_keep must be names out of attention, mlp, qkv"),
    ({"model.remat": True, "model.remat_keep": ("mlp",), "model.remat_offload": ("qkv", "mlp")},
     r"remat_offload must be names that are not in config.model.remat_keep = \('mlp',\)"),
    ({"learner.offload": ("reference",)}, "learner.offload must be without 'reference' while loss.kl_coef is 0"),
    ({"learner.offload": ("params",)}, "learner.offload must be names out of optimizer, reference. Received"),
    ({"reward.mode": "dice"}, "reward.mode must be one of iou, giou"),
    ({"reward.discount": 0.0}, "reward.discount must be above 0")])
def test_algorithms_that_make_no_sense_are_refused_with_the_reason(changes, message):
  c = config_lib.default()
  c.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    setup.sections(c)


@pytest.mark.parametrize("changes", [
    {"advantage.kind": "gae", "credit.kind": "soft"}, {"loss.kind": "gspo", "loss.aggregate": "sequence"},
    {"loss.kind": "cispo", "loss.aggregate": "constant"}, {"loss.dual_clip": 3.0, "loss.sampler_cap": 2.0},
    {"loss.kl_coef": 0.1, "loss.kl_estimator": "k1", "loss.kl_in_reward": True, "loss.kl_target": 0.05},
    {"loss.kl_coef": 0.1, "learner.offload": ("reference", "optimizer")}, {"optim.kind": "muon"},
    {"model.remat": True, "model.remat_keep": ("qkv",), "model.remat_offload": ("attention", "mlp")},
    {"rollout.group_size": 1, "advantage.kind": "batch"}, {"rollout.group_size": 1, "advantage.normalize_std": False}])
def test_algorithms_that_make_sense_are_not(changes):
  c = config_lib.default()
  c.update_from_flattened_dict(changes)
  setup.sections(c)


@pytest.mark.parametrize("key, value, message", [
    ("steps", -1, "steps must be 0 or more"), ("rollout.group_size", 0, "rollout.group_size must be at least 1"),
    ("rollout.group_size", 1, "at least 2"), ("data.source", "web", "data.source must be 'needle' or 'jsonl'"),
    ("data.eval_path", "DIR", "'' while config.data.source is 'needle'"),
    ("data.source", "jsonl", "data.path must be the path"), ("data.eval_fraction", 1.0, "between 0 and 1"),
    ("reward.h0", 1.5, "an IoU"), ("rollout.temperature", 0.0, "positive"), ("eval.temperature", -1.0, "greedy"),
    ("rollout.top_p", 0.0, "above 0"), ("rollout.min_p", 2.0, "between 0 and 1"), ("engine.slots", -1, "0 or more"),
    ("rollout.max_images", 1, "the shown image is one"), ("rollout.max_turn_tokens", 16384, "below config.rollout"),
    ("checkpoint.every", -1, "checkpoint.every must be 0 or more"), ("engine.decode_ratio", 1.0, "above 1"),
    ("engine.token_steps", 3, "one of 1, 2, 4"), ("rollout.stop_strings", ("",), "non-empty strings"),
    ("monitor.window", 0, "monitor.window must be at least 1"), ("monitor.past", 0, "at least 1"),
    ("monitor.explosion_ratio", 0.5, "at least 1"), ("monitor.collapse_acc_ans", 1.5, "between 0 and 1"),
    ("monitor.entropy_share", -0.1, "between 0 and 1"), ("monitor.drift_max_nats", -1.0, "0 or more"),
    ("monitor.stop", ("entropy_collapse", "entropy"), "visual_thinking_collapse.*box_size_hacking.*sampler_drift"),
    ("ppo.minibatches", 3, "a divisor of config.rollout.prompts = 16"), ("model.dtype", "float8", "'float32' or"),
    ("image.max_pixels", 1000, "image.min_pixels must be at least 784 and at most image.max_pixels = 1000")])
def test_values_that_cannot_work_are_named(key, value, message):
  c = config_lib.default()
  setup.sections(c)
  with c.unlocked():
    c.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message) as e:
    setup.sections(c)
  assert repr(value) in str(e.value) or key in ("image.max_pixels", "data.source")


# Knobs for which these wrong-looking values are valid.
FINE = {"reward.no_action": (-1, -1e9),                      # any fidelity
        "sft.least_reward": (-1, -1e9),                      # any reward
        "mesh.data": (-1,), "mesh.fsdp": (-1,), "mesh.tensor": (-1,)}  # all devices that are left


def wrong(value):
  """Values that are wrong for a knob with such a default."""
  if isinstance(value, bool):
    return float("nan"), -1, "yes", None, 1
  if isinstance(value, (int, float)):
    return float("nan"), float("-inf"), float("inf"), -1, -1e9, "much", None, True, (1,)
  return float("nan"), -1, -1e9, None, True, (1,), (None,)


@pytest.mark.parametrize("key", sorted(config_lib.flat(config_lib.default().to_dict())))
def test_every_knob_has_a_range(key):
  *sections, last = key.split(".")
  c = at = config_lib.default()
  for section in sections:
    at = at[section]
  for bad in wrong(at[last]):
    del at[last]  # or a ConfigDict converts the value to the old type
    at[last] = bad
    if bad in FINE.get(key, ()):
      setup.sections(c)
      continue
    with pytest.raises(ValueError, match=rf"^config\.{key} must be .*Received: "):
      setup.sections(c)


def test_every_knob_says_once_whether_it_may_change():
  known, free = config_lib.flat(config_lib.default().to_dict()), config_lib.free_keys()
  assert free < set(known) and not any("_Free" in repr(v) for v in known.values())
  assert {"steps", "checkpoint.keep", "checkpoint.every", "log.gallery", "engine.threads", "eval.bootstrap",
          "optim.stop_after", "log.bad_batches"} <= free
  assert not {"seed", "optim.learning_rate", "engine.slots", "pack.pad_tokens", "reward.h0", "model.path",
              "optim.skip_above", "optim.skip_window"} & free
  assert {k for k in known if k.startswith(("warmstart.", "monitor.", "log.", "checkpoint."))} <= free


def test_defaults_of_the_engine_are_the_configuration_s():
  assert slots.Config(**config_lib.default().engine) == slots.Config()


def test_config_needs_nothing_of_ours():
  text = pathlib.Path(config_lib.__file__).read_text()
  assert "import ml_collections" in text and "from virl_jax" not in text
