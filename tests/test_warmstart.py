"""The warm start: which stage a step belongs to, and going on from a base."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from virl_jax import config as config_lib
from virl_jax import warmstart
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.learner import checkpoint
from virl_jax.model import patches
from virl_jax.model import weights
from virl_jax.run import load
from virl_jax.run import setup
from virl_jax.tiny import curriculum

ROOT = pathlib.Path(__file__).parents[1]


def plan(steps, folder="nowhere", image_token=1, eos=(2,), vocab=3, **more):
  return curriculum.Course(folder, image_token, eos, vocab, prompt.Config(), images.Config(), patches.Grid(), 0, steps,
                           4, ("pattern",), 5, 252, **more)


def test_stages_follow_each_other_and_the_last_is_clumsy():
  p = plan(100)
  of = [curriculum.STAGES.index(curriculum.stage_of(step, p)) for step in range(100)]
  assert of == sorted(of) and set(of) == set(range(len(curriculum.STAGES)))
  assert curriculum.turning(p) == of.index(len(curriculum.STAGES) - 1) == 90
  from_base = plan(100, stages=curriculum.last((2, 0)))
  assert curriculum.turning(from_base) == 0
  assert {curriculum.stage_of(step, from_base) for step in (0, 50, 99)} == {curriculum.STAGES[-1]}


def test_counts_look_at_every_object_in_joined_rows():
  folder = load.model_dir("@tiny")
  cfg = weights.read_config(folder)
  of = lambda **more: curriculum.draw_batch(
      plan(10, folder, cfg.image_token, cfg.eos, cfg.text.vocab, stages=curriculum.last((3, 5)), **more), 3)
  plain, counting = of(), of(p_count=1.0)
  assert plain.rows.lengths_MUS.shape[2] == 1 and plain.gt_mask_BJ.sum(1).max() == 2
  assert (counting.rows.index_MUT >= 0).sum() == counting.valid_BT.sum()
  np.testing.assert_array_equal(counting.box_mask_BR.sum(1), counting.gt_mask_BJ.sum(1))
  assert set(counting.gt_mask_BJ.sum(1)) == {3, 4, 5}
  np.testing.assert_array_equal(of(p_count=1.0).tokens_BT, counting.tokens_BT)


def command(out, *more):
  return [sys.executable, "-m", "virl_jax.warmstart", "--config=configs/tiny.py", f"--out={out}",
          "--config.warmstart.base=@tiny", "--config.warmstart.workers=1", "--config.warmstart.pictures=4", *more]


def run(out, *more):
  return subprocess.run(command(out, *more), cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_going_on_from_a_base(tmp_path):
  out = tmp_path / "base"
  done = run(out, "--config.warmstart.steps=2", "--config.warmstart.p_direct=0.5")
  assert done.returncode == 0, done.stderr
  folder = load.model_dir("@tiny")
  (cfg, new), (base_cfg, base) = weights.load_hf(str(out)), weights.load_hf(folder)
  assert cfg == base_cfg
  assert (out / "tokenizer.json").read_bytes() == (pathlib.Path(folder) / "tokenizer.json").read_bytes()
  steps = [np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(new["text"].values(), base["text"].values())
           if hasattr(a, "shape")]
  assert 0 < max(steps) < 0.01  # two updates of a warm-up, from where the base was
  recipe = json.loads((out / "RECIPE.json").read_text())
  assert recipe["warmstart"]["base"] == "@tiny" and "--out=HF_DIR" in recipe["command"]
  assert 0.2 < recipe["final_nll_nats"] < 2.0  # a base that knows nothing has about 6
  # Its work folder belongs to this recipe.
  other = run(out, "--config.warmstart.steps=3", "--config.warmstart.p_direct=0.5")
  assert other.returncode == 1 and "warmstart.steps: 2 there, 3 now" in other.stderr, other.stderr
  assert "Traceback" not in other.stderr


@pytest.mark.parametrize("key, value, said", [
    ("p_direct", 1.5, "config.warmstart.p_direct must be a share in [0, 1]. Received: 1.5"),
    ("p_clumsy", 2.0, "config.warmstart.p_clumsy must be a share in [0, 1]. Received: 2.0"),
    ("p_count", -0.1, "config.warmstart.p_count must be a share in [0, 1]. Received: -0.1"),
    ("base", "/nowhere", "config.warmstart.base must be a folder with a Qwen2.5-VL checkpoint")])
def test_what_cannot_be_is_said(tmp_path, key, value, said):
  c = config_lib.default()
  c.warmstart.base = "@tiny"
  c.warmstart[key] = value
  with pytest.raises(SystemExit) as refused, setup.told():  # as the command does
    warmstart.warm_start(c, str(tmp_path / "base"), str(tmp_path / "base.work"), "the command")
  assert str(refused.value).startswith("error: ") and said in str(refused.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_saves_what_is_learned(tmp_path, number, status):
  """A signal to the whole group, as a terminal's Ctrl-C: the workers, which share the pipe, end too, and print nothing.
  """
  options = ("--config.warmstart.steps=60", "--config.warmstart.save_every=0")
  process = subprocess.Popen(command(tmp_path / "base", *options), cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, start_new_session=True)
  lines = []
  for line in process.stdout:
    lines.append(line)
    if line.startswith("step     0/60"):
      os.killpg(process.pid, number)
  assert process.wait(60) == status, "".join(lines)
  said = next(line for line in lines if line.startswith("stopped by"))
  assert not any(word in line for line in lines for word in ("Traceback", "Error", "leaked")), "".join(lines)
  step = int(said.removeprefix(f"stopped by {number.name}; step ").split()[0])
  assert 1 <= step < 60
  saves = checkpoint.Checkpoints(tmp_path / "base.work" / "checkpoints", 0, 2)
  assert saves.steps() == [step]


def test_what_would_be_overwritten_is_said_before_it_begins(tmp_path, monkeypatch):
  c = config_lib.default()
  monkeypatch.setattr(warmstart, "_warm_start", lambda *_: pytest.fail("it has begun"))
  (tmp_path / "thesis").mkdir()
  (tmp_path / "thesis" / "chapter_1.tex").write_text("")
  for out, workdir in ((tmp_path / "thesis", tmp_path / "work"), (tmp_path / "new", tmp_path / "new"),
                       (tmp_path / "new", tmp_path / "new" / "work")):
    with pytest.raises(ValueError, match="nothing else is replaced"):
      warmstart.warm_start(c, str(out), str(workdir), "the command")
  assert [p.name for p in tmp_path.iterdir()] == ["thesis"]
