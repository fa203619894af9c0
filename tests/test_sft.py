"""Whole runs of supervised fine-tuning, small."""

import json
import pathlib
import runpy
import types

import jax
import numpy as np
import pytest

from tests import recorded
from virl_jax import export
from virl_jax import sft
from virl_jax.run import load
from virl_jax.run import log
from virl_jax.run import setup
from virl_jax.run import workdir as workdir_lib

ROOT = pathlib.Path(__file__).parents[1]


def config(data, **knobs):
  c = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]()
  c.steps, c.eval.tasks, c.checkpoint.every, c.log.gallery_every, c.log.tensorboard = 4, 0, 1, 2, False
  c.sft.data, c.sft.batch = (str(data),), 8
  c.optim.learning_rate, c.optim.warmup_steps = 3e-3, 0
  c.pack.joined_share = c.pack.crops_share = 1.0  # few programs
  c.update(knobs)
  return c


def timeless(workdir):
  lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()[1:]]
  return [{k: v for k, v in line.items() if not k.startswith(log.MEASURED)} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted run of four steps."""
  folder = tmp_path_factory.mktemp("sft")
  data = recorded.write(folder / "data", 12)
  sft.sft(config(data), str(folder / "whole"))
  return data, folder / "whole"


def test_a_run_learns_and_leaves_what_it_should(whole):
  _, workdir = whole
  lines = timeless(workdir)
  assert [line["step"] for line in lines] == [0, 1, 2, 3]
  assert {"loss/nll", "loss/accuracy", "tokens/trained", "tokens/total", "tokens/padding_share", "optim/grad_norm",
          "optim/skipped"} <= lines[0].keys()
  assert not {"rollout/logp_gap_max", "loss/entropy", "acc_ans", "ppo/clip_frac"} & lines[0].keys(), (
      "what would be an alarm, or a figure of the policy's, where nothing was rolled out")
  assert lines[-1]["loss/nll"] < 0.7 * lines[0]["loss/nll"] and lines[-1]["loss/accuracy"] > lines[0]["loss/accuracy"]
  for name in ("config.json", "data.json", "left_out.json", "report.html", "rollouts/step_000002.jsonl"):
    assert (workdir / name).is_file(), name
  assert "Nats a token" in (workdir / "report.html").read_text()
  item = json.loads((workdir / "rollouts" / "step_000002.jsonl").read_text().splitlines()[0])
  assert item["uid"].startswith("demo ") and item["turns"][0]["iou"] > 0


def test_stopped_and_started_again_ends_the_same(whole, tmp_path):
  data, workdir = whole
  halves = tmp_path / "halves"
  for steps in (2, 4):
    sft.sft(config(data, steps=steps), str(halves))
  assert timeless(halves) == timeless(workdir)
  jax.tree.map(np.testing.assert_array_equal, *(load.trained(str(w)).params for w in (workdir, halves)))


def test_it_belongs_to_its_demonstrations(whole, tmp_path):
  data, workdir = whole
  c = config(data)
  c.sft.batch = 16
  with pytest.raises(ValueError, match="sft.batch: 8 there, 16 now"):
    sft.sft(c, str(workdir))
  with pytest.raises(ValueError, match="holds a run on other data"):
    sft.sft(config(recorded.write(tmp_path / "other", 9)), str(workdir))
  drawn = types.SimpleNamespace(fingerprint=lambda: "needle-0", describe=lambda: "needle")
  with pytest.raises(ValueError, match="holds a run on other data"):  # as `train` claims it
    workdir_lib.claim(str(workdir), config(data), drawn, True)
  c.sft.batch = 12
  with pytest.raises(ValueError, match="^config.sft.batch must be a multiple of the mesh's data x fsdp = 8. Received"):
    sft.sft(c, str(tmp_path / "w"))
  assert not (tmp_path / "w").exists()


def test_reward_goes_on_from_what_comes_out(whole, tmp_path):
  """As in docs/sft.md: export, and train from there."""
  assert export.export(str(whole[1]), str(tmp_path / "hf"), None, "float32") == 4
  c = config(whole[0])
  c.model.path = str(tmp_path / "hf")
  found = load.base(setup.pieces(c).hf_dir)
  jax.tree.map(np.testing.assert_array_equal, found.params, load.trained(str(whole[1])).params)


@pytest.mark.slow
def test_adapters_learn_by_example(tmp_path):
  c = config(recorded.write(tmp_path / "data", 3), steps=2)
  c.lora.rank, c.optim.learning_rate = 4, 1e-2
  sft.sft(c, str(tmp_path / "w"))
  first, second = timeless(tmp_path / "w")
  assert second["loss/nll"] < first["loss/nll"]
  assert load.trained(str(tmp_path / "w")).params["text"]["blocks"]["q_w"].b.any()


def test_a_configuration_of_rollouts_will_do(tmp_path):
  """Its rewards, groups and references play no part, and without an evaluation its records need not exist."""
  c = config(recorded.write(tmp_path / "data", 3))
  c.advantage.kind, c.loss.kl_coef, c.loss.kl_in_reward, c.loss.kl_estimator = "gae", 0.1, True, "k1"
  c.learner.offload, c.ppo.epochs, c.data.source = ("reference",), 2, "jsonl"
  p = setup.pieces(sft.by_example(c))
  assert p.step.single_update and p.step.loss.kl_coef == 0 and not p.step.offload
  assert (p.pack.pad_shown, p.step.group_size, c.advantage.kind) == (8, 1, "gae")
