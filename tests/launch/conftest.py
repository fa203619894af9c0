"""Stand-ins for commands."""

import os
import pathlib
import shutil

import pytest


@pytest.fixture
def stand_in(tmp_path):
  """Makes a folder of commands, each a bash script, and returns its path, to be put on PATH."""
  def make(**scripts: str) -> str:
    folder = tmp_path / "stand_in"
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
      (folder / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
      (folder / name).chmod(0o755)
    return str(folder)

  return make


@pytest.fixture
def bare_path(tmp_path):
  """Makes a PATH with what a shell script needs, but without the tools of any cloud."""
  def make() -> str:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("bash", "dirname", "seq", "sed", "python3"):
      os.symlink(pathlib.Path(shutil.which(name)).resolve(), folder / name)
    return str(folder)

  return make
