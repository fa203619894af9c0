"""All commands can be imported in one process, and each takes its own flags."""

import ast
import importlib
import pathlib
import subprocess
import sys

from absl import flags
import pytest

from virl_jax.run import setup

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = {
    "ask": ["--model=m", "--image=i.png", "--question=q", "--options=red,blue", "--out=o", "--seed=3"],
    "train": ["--config=configs/ablations/arms.py:rho_1.0", "--config.steps=3", "--workdir=w", "--resume-with-changes"],
    "sft": ["--config=configs/tiny_sft.py", "--config.sft.batch=8", "--data=a.json,runs/b", "--workdir=w"],
    "warmstart": ["--config=configs/tiny.py", "--config.warmstart.steps=3", "--workdir=w", "--out=o"],
    "plan": ["--config=configs/tiny.py", "--topology=cpu:8", "--programs=update,decode", "--json=f"],
    "curate": ["build", "--source=gqa,textvqa", "--data=a,b", "--out=o", "--runner=DirectRunner", "--beam=--x=1",
               "--max_rejects=0.2", "--config=configs/curate.py", "--config.curate.rules.per_picture=3",
               "--endpoint=http://h/v1"],
    "evaluate": ["--score=p", "--benchmark=pope", "--data=d", "--out=o", "--judge=http://h/v1", "--judge_model=m"],
    "export": ["--workdir=w", "--out=o", "--step=4", "--dtype=float32"],
}


def test_the_commands_are_these():
  mains = {p.stem for p in (ROOT / "virl_jax").glob("*.py") if 'if __name__ == "__main__"' in p.read_text()}
  assert mains == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_is_heard_before_the_slow_imports(name):
  """Signals are installed first of all, but not where another program imports the command."""
  first, *_ = [node for node in ast.parse((ROOT / "virl_jax" / f"{name}.py").read_text()).body
               if not isinstance(node, ast.Expr) and ast.unparse(node) != "from __future__ import annotations"]
  assert ast.unparse(first) == "\n    ".join((
      "if __name__ == '__main__':", "from virl_jax.run import signals", "signals.install()"))
  code = ("import sys\nfrom virl_jax.run import signals\n"
          "assert not {'jax', 'absl', 'numpy'} & set(sys.modules), 'it is quick to import'")
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_importing_them_defines_no_flag():
  modules = [importlib.import_module(f"virl_jax.{name}") for name in COMMANDS]
  assert not {"config", "workdir", "out", "resume-with-changes"} & set(flags.FLAGS)
  assert all(callable(m.main) for m in modules)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_takes_its_flags(name, monkeypatch):
  monkeypatch.chdir(ROOT)
  values = flags.FlagValues()
  importlib.import_module(f"virl_jax.{name}").define_flags(values)
  monkeypatch.setattr(sys, "argv", [name, *COMMANDS[name]])  # where `config_flags` looks for overrides
  values(sys.argv)
  assert name in ("ask", "plan", "curate", "evaluate") or values.workdir == "w"
  if name == "train":
    assert (values.config.steps, values.config.reward.rho, values["resume-with-changes"].value) == (3, 1.0, True)
    assert setup.config_file(values) == "configs/ablations/arms.py"
  if name == "sft":
    assert (values.config.sft.batch, values.data) == (8, ["a.json", "runs/b"])
  if name == "warmstart":
    assert values.config.warmstart.steps == 3 and values.out == "o"
  if name == "plan":
    assert (values.topology, values.programs, values.json) == ("cpu:8", ["update", "decode"], "f")
  if name == "curate":
    assert (values.source, values.data, values.out) == (["gqa", "textvqa"], ["a", "b"], "o")
    assert (values.runner, values.beam, values.max_rejects) == ("DirectRunner", ["--x=1"], 0.2)
    assert (values.config.curate.rules.per_picture, values.endpoint) == (3, "http://h/v1")
  if name == "evaluate":
    assert (values.score, values.benchmark, values.data, values.judge_model) == ("p", ["pope"], ["d"], "m")
  if name == "ask":
    assert (values.model, values.image, values.options, values.seed, values.serve) == (
        "m", "i.png", ["red", "blue"], 3, False)
  if name == "export":
    assert (values.step, values.dtype) == ("4", "float32")


@pytest.mark.parametrize("options, said", [
    ((), "error: --config must be a configuration's file, such as configs/tiny.py. Received: nothing "),
    (("--config=configs/nope.py",), "such as configs/tiny.py. Received: configs/nope.py "),
    (("--config=configs/tiny.py", "--config.optim.learning_rat=1"),
     "error: --config has no such knob: 'learning_rat' Did you mean \"learning_rate\" instead of")])
@pytest.mark.parametrize("name", ["train", "sft", "warmstart"])
def test_a_slip_of_the_pen_is_a_line(name, options, said, tmp_path):
  more = (f"--out={tmp_path / 'out'}",) if name == "warmstart" else ()
  done = subprocess.run([sys.executable, "-m", f"virl_jax.{name}", f"--workdir={tmp_path / 'w'}", *options, *more],
                        cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
  assert not list(tmp_path.iterdir())


def test_a_command_says_what_it_takes():
  done = subprocess.run([sys.executable, "-m", "virl_jax.train", "--helpshort"], cwd=ROOT, capture_output=True,
                        text=True)
  assert "--config:" in done.stdout and "resume-with-changes:" in done.stdout and "--workdir:" in done.stdout
