"""The house stands on its floors: a file imports only from lower ones."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "virl_jax"
# The first entry that begins a module's path gives its floor; within a room some lie above others.
FLOORS = [(prefix, floor) for floor, prefixes in {
    0: "types host_memory user_cache model.params rl",
    0.5: "config",
    1: "data.images data.prompt data.answers data.order data.sources.needle_tfds data.sources model.rope model.layers "
       "mesh",
    1.5: "model.attention",
    2: "data.tiny_tokenizer data.demos data.batches model.vision model.text",
    3: "model.qwen",
    4: "model.weights rollout.sample rollout.pack learner.step learner.compiles",
    4.5: "rollout.turns rollout.plan",
    4.6: "rollout.chunks",
    5: "rollout.zoom learner.checkpoint learner.curriculum",
    5.5: "rollout.dynamic",
    6: "data.curation eval.metrics eval.monitors eval.benchmarks report.style report.curves report.log report.gallery",
    6.1: "report.trajectory",
    6.2: "report.html eval.harness",
    6.5: "setup_run",
    7: "train evaluate curate warmstart ask plan export",
}.items() for prefix in prefixes.split()]
# Read on first use only, because it takes seconds to import; it draws with what imports it.
LAZY = {("data.sources.needle", "data.sources.needle_tfds")}
BESIDE = {("data.sources.needle_tfds", "data.sources.needle")}
DEVICE_ONLY = {"__future__", "dataclasses", "flax", "jax"}

FILES = sorted(p for p in ROOT.rglob("*.py") if p.name != "__init__.py")
module = lambda path: ".".join(path.relative_to(ROOT).with_suffix("").parts)


def floor(name):
  found = [f for prefix, f in FLOORS if name == prefix or name.startswith(prefix + ".")]
  assert found, f"{name} stands on no floor: add it to FLOORS"
  return found[0]


def imports(path):
  """(what a file imports, whether inside a function), in dotted names."""
  tree = ast.parse(path.read_text())
  inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((alias.name, id(node) in inside) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: import by full name"
      yield from ((f"{node.module}.{alias.name}", id(node) in inside) for alias in node.names)


def is_module(name):
  path = ROOT.joinpath(*name.split("."))
  return path.with_suffix(".py").is_file() or path.is_dir()


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_go_down(path):
  me = module(path)
  for name, lazy in imports(path):
    if name.partition(".")[0] == "virl_jax":
      it = name.removeprefix("virl_jax.")
      assert is_module(it), f"{me}: import the module, not {name}"
      if (me, it) not in BESIDE and not (lazy and (me, it) in LAZY):
        assert floor(it) < floor(me), f"{me} ({floor(me)}) may not import {it} ({floor(it)})"


@pytest.mark.parametrize("path", [p for p in FILES if module(p).startswith("rl.")], ids=module)
def test_kernels_are_pure_jax(path):
  assert {name.partition(".")[0] for name, _ in imports(path)} <= DEVICE_ONLY


def test_packages_do_nothing():
  packages = {p.parent for p in FILES}
  assert len(packages) > 8 and all((p / "__init__.py").read_bytes() == b"" for p in packages)


def test_every_exception_is_used():
  for me, it in LAZY | BESIDE:
    assert f"virl_jax.{it}" in {name for name, _ in imports(ROOT.joinpath(*me.split(".")).with_suffix(".py"))}
