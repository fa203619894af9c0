"""docs/launch.md says what the launchers print."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "launch.md").read_text()
BLOCKS = re.findall(r"```console\n\$ (.+)\n((?:.*\n)*?)```", PAGE)
OURS = ("TMPDIR", "PYTHON", "RESTARTS", "SLURM")  # what would change the output


@pytest.mark.parametrize("command, output", BLOCKS, ids=[f"{i}" for i in range(len(BLOCKS))])
def test_the_block_is_what_is_printed(command, output):
  assert " --dry-run" in command
  words = ["bash", "-c", re.sub(r"^python ", f"{sys.executable} ", command)]
  done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60,
                        env={k: v for k, v in os.environ.items() if not k.startswith(OURS)})
  assert done.returncode == 0 and not done.stderr, done.stderr
  assert done.stdout == output


def test_each_launcher_is_there_with_all_its_commands():
  commands = " ".join(command for command, _ in BLOCKS)
  for name in ("create", "install", "run", "status", "stop", "collect", "delete"):
    assert f"launch/tpu_vm.sh {name} " in commands
  assert "launch/gke/jobset.py" in commands and "launch/slurm.sbatch" in commands
  for file in (ROOT / "launch").rglob("*"):
    if file.is_file() and file.suffix != ".pyc" and file.name != "words.sh":
      assert file.name in PAGE, f"{file.name} is not in docs/launch.md"


def test_printed_commands_are_whole_for_a_shell():
  """Bash accepts every line that is printed."""
  for command, output in BLOCKS:
    if "jobset.py" not in command:
      assert output
      for line in output.splitlines():
        subprocess.run(["bash", "-n", "-c", line], check=True)
