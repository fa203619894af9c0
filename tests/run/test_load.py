"""A policy from an HF folder, or from a run."""

import dataclasses
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from virl_jax import config as config_lib
from virl_jax.learner import checkpoint
from virl_jax.learner import optim
from virl_jax.learner import state as state_lib
from virl_jax.model import sharding
from virl_jax.model import weights
from virl_jax.run import load


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A workdir with one checkpoint, and its parameters."""
  workdir = tmp_path_factory.mktemp("run")
  c = config_lib.default()
  c.model.path = "@tiny"
  (workdir / "config.json").write_text(config_lib.to_json(c))
  params = jax.tree.map(lambda a: 2 * a, load.base(load.model_dir("@tiny")).params)
  saves = checkpoint.Checkpoints(workdir / "checkpoints", 10, 5)
  saves.maybe_save(10, state_lib.init(params, optim.OptimConfig()))
  saves.close()
  return workdir, params


def test_one_way_in(run):
  workdir, doubled = run
  mesh = sharding.make(data=1, fsdp=-1)
  base, trained = load.policy("@tiny", mesh=mesh), load.policy(str(workdir))
  assert (base.step, base.config, trained.step, trained.config.model.path) == (None, None, 10, "@tiny")
  assert base.model == trained.model == weights.read_config(base.hf_dir) and base.hf_dir == trained.hf_dir
  for a, b, d in zip(*map(jax.tree.leaves, (base.params, trained.params, doubled))):
    assert a.sharding == b.sharding and len(a.sharding.device_set) == jax.device_count()
    np.testing.assert_array_equal(2 * np.asarray(a), b)
    np.testing.assert_array_equal(b, d)


def test_the_best_policy_of_a_run_may_be_asked_for(run, tmp_path):
  _, params = run
  c = config_lib.default()
  c.model.path, c.model.freeze_vision = "@tiny", False
  (tmp_path / "config.json").write_text(config_lib.to_json(c))
  saves = checkpoint.Checkpoints(tmp_path / "checkpoints", 1, 1, best=True)
  for step, score in ((1, 0.5), (2, 0.9), (3, 0.1)):
    saves.maybe_save(step, state_lib.init(jax.tree.map(lambda a, by=step: by * a, params), optim.OptimConfig()),
                     score=score)
  saves.close()
  assert load.trained(str(tmp_path)).step == 3
  best = load.trained(str(tmp_path), "best")
  assert best.step == 2
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * np.asarray(b)), best.params, params)
  with pytest.raises(ValueError, match="must hold a checkpoint with a score, .* Received: steps .10., none with one"):
    load.trained(str(run[0]), "best")


@pytest.mark.parametrize("changes", [{"lora.rank": 2}, {"model.freeze_vision": True}], ids=["adapters", "frozen tower"])
def test_of_the_base_only_what_is_frozen_is_read_again(tmp_path, changes):
  """Trained parameters come from the checkpoint."""
  c = config_lib.default()
  c.model.path = "@tiny"
  c.update_from_flattened_dict(changes)
  (tmp_path / "config.json").write_text(config_lib.to_json(c))
  hf_dir = load.model_dir("@tiny")
  base = load.base(hf_dir, model=load.of_config(c, weights.read_config(hf_dir)))
  moved = jax.tree.map(lambda a: a + 1, base.trained)
  saves = checkpoint.Checkpoints(tmp_path / "checkpoints", 1, 1)
  saves.maybe_save(1, state_lib.init(moved, optim.OptimConfig()))
  saves.close()
  found = load.trained(str(tmp_path))
  jax.tree.map(np.testing.assert_array_equal, found.trained, moved)
  jax.tree.map(np.testing.assert_array_equal, found.frozen, base.frozen)
  _, read = weights.load_hf(hf_dir, parts=found.frozen)
  assert set(read) == ({"text", "vision"} if "lora.rank" in changes else {"vision"})


def test_a_tokenizer_that_is_damaged_or_another_model_s_is_named(tmp_path):
  folder = pathlib.Path(load.model_dir("@tiny"))
  model = weights.read_config(folder)
  assert load.codec(str(folder), model).end in model.eos
  fewer = dataclasses.replace(model, text=dataclasses.replace(model.text, vocab=300))
  with pytest.raises(ValueError, match="no id beyond the model's embedding, which has 300 rows"):
    load.codec(str(folder), fewer)
  for name, content in (("tokenizer.json", "{"), ("tokenizer.json", "[]"), ("tokenizer_config.json", "[]"),
                        ("tokenizer.json", None)):
    hf_dir = tmp_path / f"{name}-{content}"
    shutil.copytree(folder, hf_dir)
    (hf_dir / name).unlink() if content is None else (hf_dir / name).write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(hf_dir))} must hold a tokenizer that transformers reads"):
      load.codec(str(hf_dir), model)


def test_what_is_no_policy_is_named(run, tmp_path):
  with pytest.raises(ValueError, match=r"must hold step 3. Received: steps \[10\]"):
    load.policy(str(run[0]), step=3)
  with pytest.raises(ValueError, match="must be a folder with a Qwen2.5-VL checkpoint"):
    load.policy(str(tmp_path))
  with pytest.raises(ValueError, match="step 3 can be chosen only in a run's folder"):
    load.policy("@tiny", step=3)
