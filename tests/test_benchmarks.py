"""Scripts under benchmarks/, most of which take too long to run here: the names that they use are there."""

import ast
import importlib
import importlib.util
import pathlib
import types

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(path for folder in ("benchmarks", "docs") for path in (ROOT / folder).glob("*.py"))


def missing(text: str) -> list[str]:
  """The names MODULE.NAME in a script that a module of the package lacks."""
  tree, modules = ast.parse(text), {}
  roots = {alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
           for alias in node.names} | {(node.module or "").partition(".")[0] for node in ast.walk(tree)
                                       if isinstance(node, ast.ImportFrom)}
  # Folders that no installation has, and that are found only from where the tests run.
  if gone := roots & {path.name for path in ROOT.iterdir() if path.is_dir()} - {"virl_jax"}:
    return sorted(gone)
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "virl_jax":
      for alias in node.names:
        parent = importlib.import_module(node.module)
        if importlib.util.find_spec(f"{node.module}.{alias.name}") if hasattr(parent, "__path__") else False:
          modules[alias.asname or alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
        elif not hasattr(parent, alias.name):
          return [f"{node.module}.{alias.name}"]
  stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
  stored |= {arg.arg for arg in ast.walk(tree) if isinstance(arg, ast.arg)}
  found = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
  return sorted({f"{node.value.id}.{node.attr}" for node in found
                 if isinstance(modules.get(node.value.id), types.ModuleType) and node.value.id not in stored
                 and not hasattr(modules[node.value.id], node.attr)})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_script_names_is_there(path):
  assert missing(path.read_text()) == []


def test_a_name_that_is_gone_is_found():
  assert missing("from virl_jax.data import images\nimages.decode(1)\nimages.check_zoom(2)\n") == ["images.check_zoom"]
  assert missing("from configs import tiny\n") == missing("import configs.tiny\n") == ["configs"]
  assert missing("from virl_jax.data.images import nothing\n") == ["virl_jax.data.images.nothing"]
  assert missing("from virl_jax.data import images\nfor images in ():\n  images.what()\n") == []  # a variable
