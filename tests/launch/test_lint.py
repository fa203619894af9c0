"""Linters, for scripts and files that no other test runs as a whole, and rules of our own."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def tool(name: str) -> str:
  """A linter beside this Python, or on the path; the extra `test` installs both linters."""
  found = shutil.which(name, path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
  if not found:
    pytest.skip(f"needs {name}")
  return found


def lint(*command, text: str | None = None) -> None:
  done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stdout + done.stderr


def skypilot() -> dict:
  return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck(script):
  lint(tool("shellcheck"), "--external-sources", script.relative_to(ROOT))


@pytest.mark.parametrize("section", ["setup", "run"])
def test_shellcheck_of_skypilots_scripts(section):
  lint(tool("shellcheck"), "--shell=bash", "-", text=skypilot()[section])


@pytest.mark.parametrize("script", [p for p in SCRIPTS if p.name != "words.sh"], ids=lambda p: p.name)
def test_scripts_stop_at_the_first_error(script):
  lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
  assert lines[0] == "set -euo pipefail" and script.read_text().startswith("#!/usr/bin/env bash\n")


def test_hadolint():
  lint(tool("hadolint"), "launch/Dockerfile")


def dockerfile() -> list[tuple[str, str]]:
  """The Dockerfile's instructions, without comments, continued lines joined."""
  text = "\n".join(line for line in (LAUNCH / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
  return [tuple(line.split(maxsplit=1)) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_image_is_pinned_small_and_not_roots():
  lines = dockerfile()
  assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", lines[0][1]) and lines[0][0] == "FROM"
  assert [what for name, what in lines if name == "USER"] == ["1000"] and lines[-2][0] == "USER"
  copied = [word for name, what in lines if name == "COPY" for word in what.split()[:-1]]
  # And never the whole folder, with whatever is in it.
  assert "virl_jax" in copied and all((ROOT / word).exists() and (ROOT / word) != ROOT for word in copied)
  assert not [what for name, what in lines if name in ("ENV", "ARG") and "=" in what]


@pytest.mark.parametrize("accelerator, package", [
    ("cpu", ".[gcs]"), ("tpu", ".[tpu,gcs]"), ("cuda12", ".[cuda12,gcs]"),
    ("cuda13", ".[cuda13,gcs]"), ("", None), ("rocm", None)])
def test_the_accelerator_becomes_the_extra(accelerator, package, stand_in):
  [step] = [what for name, what in dockerfile() if name == "RUN" and "pip" in what]
  path = stand_in(pip='echo "$@"')
  done = subprocess.run(["bash", "-o", "pipefail", "-c", step], capture_output=True, text=True,
                        env={"ACCELERATOR": accelerator, "PATH": f"{path}:{os.environ['PATH']}"})
  if package:
    assert done.stdout == f"install --no-cache-dir {package}\n" and f'"{accelerator}":' in (
        (ROOT / "setup.py").read_text() + '"cpu":')
  else:
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"ACCELERATOR must be tpu, cuda12, cuda13 or cpu. Received: '{accelerator}'\n"


@pytest.mark.parametrize("nodes, processes", [
    (1, ""), (2, " --coordinator=10.0.0.7:8476 --num_processes=2 --process_id=1")])
def test_skypilots_run(nodes, processes, tmp_path):
  home = tmp_path / "virl_jax_venv" / "bin"
  home.mkdir(parents=True)
  (home / "python").write_text('#!/usr/bin/env bash\necho "$JAX_PLATFORMS $@"\n')
  (home / "python").chmod(0o755)
  done = subprocess.run(["bash", "-c", skypilot()["run"]], cwd=ROOT, capture_output=True, text=True, env=os.environ | {
      "HOME": str(tmp_path), "SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
      "SKYPILOT_NODE_RANK": "1", "CONFIG": "configs/tiny.py", "ARGS": "--config.steps=3 --config.seed=1"})
  assert done.returncode == 0 and done.stdout == (
      f"cuda,cpu -m virl_jax.train --config=configs/tiny.py --workdir=/mnt/gcs/runs/tiny{processes} --config.steps=3 "
      "--config.seed=1\n"), done.stderr


def test_skypilots_file():
  task = skypilot()
  assert set(task) <= {"name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run"}
  assert task["num_nodes"] > 1 and task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
  assert task["envs"]["BUCKET"] is None  # SkyPilot refuses to start without one
  assert task["file_mounts"] == {"/mnt/gcs": {"source": "gs://${BUCKET}", "mode": "MOUNT"}}
