"""A run's policy as an HF folder."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from virl_jax import config as config_lib
from virl_jax import export
from virl_jax.learner import checkpoint
from virl_jax.learner import optim
from virl_jax.learner import state as state_lib
from virl_jax.model import weights
from virl_jax.run import load

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A workdir with two checkpoints, and the parameters of each."""
  workdir = tmp_path_factory.mktemp("run")
  c = config_lib.default()
  c.model.path = "@tiny"
  (workdir / "config.json").write_text(config_lib.to_json(c))
  _, base = weights.load_hf(load.model_dir("@tiny"))
  saves, saved = checkpoint.Checkpoints(workdir / "checkpoints", 10, 5), {}
  for step, factor in ((10, 2.0), (20, 3.0)):
    saved[step] = jax.tree.map(lambda a, f=factor: f * a, base)
    saves.maybe_save(step, state_lib.init(saved[step], optim.OptimConfig()))
  saves.close()
  return workdir, saved


@pytest.mark.parametrize("step", [None, 10])
def test_the_policy_comes_out_bit_for_bit(run, step, tmp_path):
  workdir, saved = run
  assert export.export(str(workdir), str(tmp_path / "hf"), step, "float32") == (step or 20)
  cfg, params = weights.load_hf(tmp_path / "hf")
  assert cfg == weights.read_config(load.model_dir("@tiny"))
  jax.tree.map(np.testing.assert_array_equal, params, saved[step or 20])


def test_the_command_writes_what_transformers_loads(run, tmp_path):
  import transformers
  out = tmp_path / "hf"
  done = subprocess.run([sys.executable, "-m", "virl_jax.export", f"--workdir={run[0]}", f"--out={out}"], cwd=ROOT,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  report = json.loads(done.stdout.splitlines()[-1])
  assert (report["step"], report["dtype"], report["bytes"]) == (20, "bfloat16", sum(
      f.stat().st_size for f in out.iterdir()))
  assert transformers.AutoConfig.from_pretrained(out).text_config.hidden_size == weights.read_config(out).text.hidden
  assert transformers.AutoTokenizer.from_pretrained(out).encode("<|im_end|>") == list(weights.read_config(out).eos)
  # The base's limits are 3136 to 7056 pixels, the run's the defaults.
  limits = json.loads((out / "preprocessor_config.json").read_text())["size"]
  assert limits == {"shortest_edge": 3136, "longest_edge": config_lib.default().image.max_pixels}
  generation = transformers.GenerationConfig.from_pretrained(out)
  assert generation.eos_token_id == weights.read_config(out).eos[0] and generation.top_k == 0
  torch = pytest.importorskip("torch")
  model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
  want = np.asarray(run[1][20]["text"]["embed"]).astype("bfloat16").astype(np.float32)
  np.testing.assert_array_equal(model.get_input_embeddings().weight.detach().numpy(), want)


def test_what_is_missing_is_named(run, tmp_path):
  for workdir, step, message in [
      (tmp_path / "none", None, "must be a run's folder, with a config.json. Received: .*none"),
      (run[0], 15, r"must hold step 15. Received: steps \[10, 20\]")]:
    with pytest.raises(ValueError, match=message):
      export.export(str(workdir), str(tmp_path / "hf"), step)
  (tmp_path / "config.json").write_text((run[0] / "config.json").read_text())
  with pytest.raises(ValueError, match="must hold a checkpoint. Received: none"):
    export.export(str(tmp_path), str(tmp_path / "hf"))
  assert not (tmp_path / "hf").exists()


def test_nothing_is_written_over_a_run_or_its_base(run, tmp_path):
  workdir, _ = run
  before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
  for out in (workdir, workdir.parent, workdir / "checkpoints"):
    with pytest.raises(ValueError, match="nothing else is replaced"):
      export.export(str(workdir), str(out))
  assert before == {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
  base = tmp_path / "base"
  export.export(str(workdir), str(base))
  c = config_lib.default()
  c.model.path = str(base)
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text(config_lib.to_json(c))
  shutil.copytree(workdir / "checkpoints", tmp_path / "run" / "checkpoints")
  with pytest.raises(ValueError, match="base is in it"):
    export.export(str(tmp_path / "run"), str(base))
  assert (base / "model.safetensors").is_file()


def test_a_damaged_checkpoint_is_named_and_the_one_before_exported(run, tmp_path, capsys):
  workdir = tmp_path / "run"
  shutil.copytree(run[0], workdir)
  largest = max((p for p in (workdir / "checkpoints" / "20").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-1] + b"x")
  assert export.export(str(workdir), str(tmp_path / "hf"), None, "float32") == 10
  assert "checkpoint 20 in" in (said := capsys.readouterr().out) and "checkpoint 10, the one before, is used" in said
  with pytest.raises(ValueError, match="^checkpoint 20 in .* is damaged"):
    export.export(str(workdir), str(tmp_path / "hf"), 20)
