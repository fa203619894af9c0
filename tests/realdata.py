"""Where real records lie, which are no part of the project: beside it, or where VIRL_JAX_REALDATA says."""

import json
import os
import pathlib

import pytest

ROOT = pathlib.Path(os.environ.get("VIRL_JAX_REALDATA") or
                    pathlib.Path(__file__).parents[1].parent / "shared" / "realdata")
NATIVE, FORMATS = ROOT / "native", ROOT / "formats"

needed = pytest.mark.skipif(not NATIVE.exists(), reason=f"no real records at {ROOT} (VIRL_JAX_REALDATA says where)")


def expected() -> dict:
  """The counts and scores that a right reading gives."""
  return json.loads((NATIVE / "expected.json").read_text())


def lines(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]
