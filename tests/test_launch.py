"""launch/local.sh, with a stand-in for Python that prints how it was called."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "local.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def launch(tmp_path):
  """Runs the script; the stand-in prints its arguments, and finds no module that it is asked for."""
  fake = tmp_path / "fake_python"
  fake.write_text('#!/usr/bin/env bash\n[[ $1 == -c ]] && exit 1\nfor a in "$@"; do echo "<$a>"; done\n'
                  'echo "$JAX_PLATFORMS|${XLA_FLAGS:-}"\n')
  fake.chmod(0o755)

  def run(*args, **env):
    clean = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run(["bash", SCRIPT, *args], cwd=ROOT, env=clean | {"PYTHON": str(fake)} | env,
                          capture_output=True, text=True, timeout=60)

  return run


def test_arguments_go_through_as_they_stand(launch):
  done = launch("configs/tiny.py", "--workdir=a b", "--config.steps=3")
  lines = done.stdout.splitlines()
  assert done.returncode == 0, done.stderr
  assert lines[0].startswith("config configs/tiny.py, JAX_PLATFORMS=cpu")  # no plugin to be found: CPU
  assert lines[1:-1] == ["<-m>", "<virl_jax.train>", "<--config=configs/tiny.py>", "<--workdir=a b>",
                         "<--config.steps=3>"]


@pytest.mark.parametrize("platforms, flagged", [("cpu", False), ("cuda", True), ("cuda,cpu", True), ("tpu", False)])
def test_each_platform_gets_its_settings(launch, platforms, flagged):
  done = launch("configs/tiny.py", JAX_PLATFORMS=platforms, XLA_FLAGS="--mine")
  chosen, flags = done.stdout.splitlines()[-1].split("|")
  assert chosen == platforms and flags.endswith("--mine")
  assert ("--xla_gpu_enable_latency_hiding_scheduler=true" in flags) == flagged


@pytest.mark.parametrize("args, message", [
    ((), "first argument must be a config file"), (("--workdir=x",), "first argument must be a config file"),
    (("configs/none.py",), "There is no config file 'configs/none.py'")])
def test_a_missing_config_is_named(launch, args, message):
  done = launch(*args)
  assert done.returncode == 2 and message in done.stderr and "usage:" in done.stderr and not done.stdout


def test_a_missing_python_is_named(launch):
  done = launch("configs/tiny.py", PYTHON="no-such-python")
  assert done.returncode == 2 and "There is no Python at 'no-such-python'" in done.stderr
