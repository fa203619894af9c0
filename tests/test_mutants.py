"""The bugs of benchmarks/mutants.py can be planted: their lines and the tests that should find them are there."""

import pathlib
import runpy
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def mutants():
  sys.path.insert(0, str(ROOT / "benchmarks"))
  try:
    return runpy.run_path(str(ROOT / "benchmarks" / "mutants.py"))
  finally:
    sys.path.remove(str(ROOT / "benchmarks"))


def test_every_bug_can_be_planted(mutants, tmp_path):
  assert len(mutants["MUTANTS"]) >= 60
  for mutant in mutants["MUTANTS"]:
    file = tmp_path / "virl_jax" / mutant.file
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = (ROOT / "virl_jax" / mutant.file).read_text()
    file.write_text(whole)
    mutants["plant"](mutant, tmp_path)
    compile(file.read_text(), mutant.file, "exec")  # a bug, not a syntax error
    assert file.read_text() != whole
    assert all((ROOT / test).is_file() for test in mutant.tests), mutant.tests
  with pytest.raises(ValueError, match="rl/loss.py must hold 'no such line' once. Received: 0 times"):
    mutants["plant"](mutants["Mutant"]("rl/loss.py", "no such line", "", ""), ROOT)
