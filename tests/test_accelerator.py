"""benchmarks/accelerator.py, on tiny shapes: what its lines hold, and that it goes on if a part fails."""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
ABOUT = {"part", "ok", "part_s", "command", "device", "versions"}
SPEED = {"seconds", "tokens_s", "flop", "mfu", "share_of_floor", "floor_s", "compile_s", "plan_gib"}
MEMORY = {"peak_gib", "peak_before_gib"}  # which a CPU does not report


@pytest.fixture(scope="module")
def accelerator():
  sys.path.insert(0, str(ROOT / "benchmarks"))
  try:
    spec = importlib.util.spec_from_file_location("accelerator", ROOT / "benchmarks" / "accelerator.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["accelerator"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
  finally:
    sys.path.remove(str(ROOT / "benchmarks"))


def run(out, *args):
  """The lines that the script wrote, and what it printed."""
  done = subprocess.run([sys.executable, "benchmarks/accelerator.py", "--smoke", "--repeat=1", f"--out={out}", *args],
                        cwd=ROOT, capture_output=True, text=True)
  return [json.loads(line) for line in out.read_text().splitlines()], done


def numbers(tree):
  """All numbers of a line, except those that a CPU lacks."""
  for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
    if isinstance(value, dict | list):
      yield from numbers(value)
    elif key in MEMORY:
      assert value is None
    elif isinstance(value, int | float):
      yield value


def finite(line):
  assert line["ok"] and "error" not in line, line
  assert line.keys() >= ABOUT and all(map(math.isfinite, numbers(line))), line


def test_a_decode_step_and_the_copy(tmp_path):
  [decode, copy], done = run(tmp_path / "out.jsonl", "--parts=decode_1,copy_7b")
  assert done.returncode == 0 and "2 of 2 parts went well" in done.stdout, done.stderr[-2000:]
  assert (decode["part"], copy["part"]) == ("decode_1", "copy_7b")
  finite(decode)
  assert decode.keys() >= SPEED | MEMORY and decode["rows"] == 1 and decode["steps"] == 4
  assert decode["tokens_s"] == pytest.approx(1 / decode["seconds"]) and decode["loop_s"] > 0
  assert 0 < decode["mfu"] < 1 and decode["peak_from"] == "measured"
  assert decode["kind"] == "triton" and decode["same_tokens"] > 0.9
  finite(copy)
  assert copy["share_of_floor"] > 0 and copy["plan_gib"] * 2 ** 30 >= 4 * copy["parameters"]
  assert "--parts=decode_1 --here" in decode["command"] and "jax" in decode["versions"]


@pytest.mark.long
def test_every_part(tmp_path, accelerator):
  found, done = run(tmp_path / "out.jsonl")
  assert done.returncode == 0, done.stderr[-2000:]
  assert [line["part"] for line in found] == list(accelerator.PARTS)
  for line in found:
    finite(line)
    if line["part"].startswith("check"):
      assert len(line["cases"]) > 1 and all(case["ok"] for case in line["cases"])
    elif line["part"].startswith("rollout"):
      assert line.keys() >= SPEED - {"plan_gib"} and line["written"] == line["stats"]["sampled_tokens"]
    elif not line["part"].startswith("copy"):
      assert line.keys() >= SPEED | MEMORY
    if line["part"].startswith("update"):
      assert line["microbatches"] == 3 and line["loss/total"] and line["optim/grad_norm"] > 0
      assert line["whole_update_s"] == pytest.approx(3 * line["seconds"])


def test_a_part_that_fails_leaves_a_line_and_the_others_go_on(accelerator, tmp_path, monkeypatch, capsys):
  out = tmp_path / "out.jsonl"
  ends = iter([subprocess.TimeoutExpired("python", 180), subprocess.CompletedProcess([], -11)])

  def ended(command, env, timeout):
    assert env["XLA_PYTHON_CLIENT_MEM_FRACTION"] and timeout <= 240
    result = next(ends)
    if isinstance(result, Exception):
      raise result
    return result

  monkeypatch.setattr(accelerator, "subprocess", types.SimpleNamespace(
      run=ended, TimeoutExpired=subprocess.TimeoutExpired))
  monkeypatch.setattr(sys, "argv", ["accelerator.py", "--parts=check_cache,check_attention,update_7b", f"--out={out}",
                                    "--budget=140"])
  with pytest.raises(SystemExit) as e:
    accelerator.main()
  assert e.value.code == 1
  first, second, third = map(json.loads, out.read_text().splitlines())
  assert first["part"] == "check_cache" and first["error"].startswith("stopped after its 140 s")
  assert second["part"] == "check_attention" and second["error"].startswith("the process ended with status -11")
  assert third["part"] == "update_7b" and third["error"] == "not begun: 140 s are left of the budget"
  assert "2 parts are left, about" in capsys.readouterr().out


def test_what_a_part_raises_is_its_line(accelerator, tmp_path, monkeypatch):
  def fails(args):
    raise RuntimeError("RESOURCE_EXHAUSTED:\n  out of memory")

  monkeypatch.setitem(accelerator.PARTS, "copy_7b", accelerator.Part(fails, 1, 1))
  out = tmp_path / "out.jsonl"
  assert not accelerator.run_here(types.SimpleNamespace(out=str(out)), "copy_7b")
  line = json.loads(out.read_text())
  assert line["error"] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory" and line.keys() >= ABOUT


def test_rounding_is_forgiven_and_a_token_too_many_is_not(accelerator):
  """One token of two thousand, as with a mask that is off by one."""
  rng = np.random.default_rng(0)
  v = rng.standard_normal((2000, 4, 64), np.float32)
  right = np.stack([v[:n].mean(0) for n in range(1990, 2000)])[None]
  more = np.stack([v[:n + 1].mean(0) for n in range(1990, 2000)])[None]
  here = np.ones(right.shape[:2], bool)
  assert accelerator.within(accelerator.apart(np.asarray(jnp.asarray(right, jnp.bfloat16), np.float32), right, here))
  assert not accelerator.within(accelerator.apart(more, right, here))
  assert not accelerator.within(accelerator.apart(right * np.nan, right, here))
  here[0, 3] = False
  spoilt = right.copy()
  spoilt[0, 3] = np.nan
  assert accelerator.within(accelerator.apart(spoilt, right, here))  # padding means nothing


def test_weights_are_about_normal_and_seeds_differ(accelerator):
  spec = jax.ShapeDtypeStruct
  tree = {"norm1": spec((64,), jnp.float32), "w": spec((300, 400), jnp.bfloat16), "n": spec((3,), jnp.int32),
          "other": spec((300, 400), jnp.bfloat16), "pixels": spec((5000,), jnp.uint8)}
  first, second = accelerator.arrays(tree, 0.02), accelerator.arrays(tree, 0.02, seed=1)
  assert {name: (a.shape, a.dtype) for name, a in first.items()} == {
      name: (a.shape, a.dtype) for name, a in tree.items()}
  assert (first["norm1"] == 1).all() and not first["n"].any() and 120 < np.asarray(first["pixels"]).mean() < 135
  w, other, later = (np.asarray(a, np.float32).ravel() for a in (first["w"], first["other"], second["w"]))
  assert abs(w.mean()) < 2e-4 and w.std() == pytest.approx(0.02, rel=0.01)
  # A normal variable is this often within one and within two deviations.
  assert (abs(w) < 0.02).mean() == pytest.approx(0.683, abs=0.02)
  assert (abs(w) < 0.04).mean() == pytest.approx(0.954, abs=0.02)
  for a, b in ((w, other), (w, later), (w[1:], w[:-1]), (w[400:], w[:-400]), (w[1:], later[:-1])):
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
  assert not any(a.any() for a in accelerator.arrays(tree).values())
