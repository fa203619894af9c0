"""The notebooks: what each begins with, and that it runs from top to bottom on a CPU and shows what it promises.

A run takes the notebook as it is, but adds a cell after the one tagged `parameters`, which sets the sizes of `RUNS`.
"""

import ast
import importlib
import importlib.util
import json
import os
import pathlib
import re
import runpy
import sys

import huggingface_hub
import jax
import nbclient
import nbformat
import pytest

from virl_jax import plan
from virl_jax.model import family
from virl_jax.model import params
from virl_jax.run import load
from virl_jax.run import setup

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_LINES = 18  # of a cell, without imports

# For each notebook: smaller sizes, and the fewest pictures and pages that it shows.
_TINY = {"PROMPTS": 4, "GROUP": 2, "STEPS": 1}
RUNS = {
    "curate": (_TINY | {"GOOD": 20, "WITH_ZOOM": 4, "WITHOUT": 2}, 4),
    "evaluate": (_TINY | {"TASKS": 8}, 3),
    "lora": (_TINY | {"TASKS": 4}, 4),
    "quickstart": (_TINY | {"TASKS": 4}, 5),
    "reward_and_credit": ({"POINTS": 33}, 6),
    "trajectories": ({"TASKS": 2, "GROUP": 2}, 6),
}


@pytest.fixture(scope="module")
def badges():
  spec = importlib.util.spec_from_file_location("badges", FOLDER / "badges.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def read(path):
  return nbformat.read(path, as_version=4)


def plain(source):
  """A cell's Python, without the lines that only IPython understands, each of which is in place of a statement."""
  if source.startswith("%%bash"):
    return ""
  return re.sub(r"(?m)^(\s*)[!%].*$", r"\1pass", source)


def backend_choices(source):
  """The conditions of a cell that depend on the device, as code."""
  asks = ("default_backend", "platform", "accelerated")
  return [ast.unparse(node.test) for node in ast.walk(ast.parse(plain(source)))
          if isinstance(node, (ast.If, ast.IfExp, ast.While)) and any(word in ast.unparse(node.test) for word in asks)]


def test_there_is_a_run_of_each():
  assert {path.stem for path in NOTEBOOKS} == set(RUNS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_structure(path, badges):
  notebook = read(path)
  nbformat.validate(notebook)
  cells = {cell.id: cell for cell in notebook.cells}
  ids = list(cells)
  assert ids[:4] == ["badge", "title", "install", "device"], "the badge, what it is about, how to install, the device"
  assert cells["title"].source.startswith("# ")
  for name, text in badges.common(path.name).items():
    assert cells[name].source == text, "run `python notebooks/badges.py`"
  assert "device_kind" in cells["device"].source, "it says what it runs on"
  assert [cell.id for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())] == ["parameters"]
  for before, cell in zip(notebook.cells, notebook.cells[1:]):
    if cell.cell_type != "code":
      assert cell.source.strip() and len(cell.source) < 700, f"{cell.id}: words are few"
      continue
    assert not cell.outputs and cell.execution_count is None, f"{cell.id}: committed without outputs"
    lines = [line for line in cell.source.splitlines() if not line.startswith(("import ", "from "))]
    assert len(lines) <= MOST_LINES, f"{cell.id}: what is longer belongs in the package"
    assert max(map(len, cell.source.splitlines())) <= 120, f"{cell.id}: lines have at most 120 characters"
    assert not backend_choices(cell.source), f"{cell.id}: cells do the same on every device"
    assert cell.id in ("device", "parameters") or before.cell_type == "markdown" or before.id == cell.id.removesuffix(
        "-plot"), f"{cell.id}: a sentence before it says what one sees"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_sizes_of_a_run_are_parameters(path):
  source = next(cell.source for cell in read(path).cells if cell.id == "parameters")
  names = {name.id for node in ast.parse(source).body for target in node.targets for name in ast.walk(target)
           if isinstance(name, ast.Name)}
  assert set(RUNS[path.stem][0]) <= names, "else a run would be as long as a user's"
  assert path.stem in ("reward_and_credit", "trajectories") or "OUT" in names, "where it writes can be chosen"


def missing(sources):
  """Names that cells use of this package's modules and that these don't have."""
  trees = [ast.parse(plain(source)) for source in sources]
  modules = {alias.asname or alias.name: importlib.import_module(f"{node.module}.{alias.name}")
             for tree in trees for node in ast.walk(tree)
             if isinstance(node, ast.ImportFrom) and node.module.startswith("virl_jax") for alias in node.names}
  taken = {(node.value.id, node.attr) for tree in trees for node in ast.walk(tree)
           if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules}
  return [f"{name}.{attribute}" for name, attribute in sorted(taken) if not hasattr(modules[name], attribute)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_called_is_there(path):
  assert not missing([cell.source for cell in read(path).cells if cell.cell_type == "code"])


def test_what_is_not_there_is_seen():
  found = missing(["from virl_jax.rl import reward", "!ls\nreward.iou(1)\nfor x in y:\n    reward.iuo(x)"])
  assert found == ["reward.iuo"]


def test_a_branch_for_one_device_is_seen():
  assert backend_choices("x = 1 if jax.default_backend() == 'cpu' else 2")
  assert backend_choices("!ls\nif device.platform == 'cpu':\n    %cd -q ..\n    skip = True")
  assert not backend_choices("%%bash\nif cpu; then ls; fi")
  assert not backend_choices("if RECORDS:\n    x = {'cpu': 1}[jax.default_backend()]")


def test_badges_take_the_address_from_one_place(badges):
  notebook = json.loads(NOTEBOOKS[0].read_text())
  cells = badges.common("a.ipynb", "someone/somewhere", "release")
  found = {cell["id"]: "".join(cell["source"]) for cell in badges.written(notebook, cells)["cells"]}
  assert "https://colab.research.google.com/github/someone/somewhere/blob/release/notebooks/a.ipynb" in found["badge"]
  assert "https://github.com/someone/somewhere virl_jax" in found["install"] and "=release " in found["install"]
  assert "once the repository is public" not in found["badge"] and "OWNER" not in "".join(found.values())
  assert {k: v for k, v in found.items() if k not in cells} == {
      cell["id"]: "".join(cell["source"]) for cell in notebook["cells"] if cell["id"] not in cells}
  with pytest.raises(ValueError, match="must have cells badge, install.*none with id install"):
    badges.written({"cells": [{"id": "badge"}]}, cells)


@pytest.mark.parametrize("backend, trained, frozen", [
    ("cpu", 198_656, 1_738_752), ("gpu", 29_933_568, 3_754_622_976), ("tpu", 29_933_568, 3_754_622_976)])
def test_the_device_chooses_a_configuration_that_holds(backend, trained, frozen, monkeypatch):
  """The cells of `lora` up to the count, as they run on each device, without the download and the weights."""
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: f"weights/{name.split('/')[1]}")
  cells = {cell.id: cell.source for cell in read(FOLDER / "lora.ipynb").cells}
  names = {"jax": jax, "huggingface_hub": huggingface_hub, "runpy": runpy}
  for name in ("parameters", "choice", "config"):
    exec(cells[name], names)
  c = names["c"]
  setup.sections(c)
  assert (c.data.source, c.rollout.prompts, c.lora.rank) == ("needle", names["PROMPTS"], 16)
  assert c.optim.learning_rate == pytest.approx(1e-3 if backend == "cpu" else 1e-4)
  tables = family.tables(load.of_config(c, plan.model_of(c)))
  assert tuple(params.count(table) for table in tables) == (trained, frozen)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, monkeypatch, tmp_path):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  # The environment of the kernel, and of the commands that it starts.
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.setenv("PATH", f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
  sizes, pictures = RUNS[path.stem]
  notebook = read(path)
  at = next(i for i, cell in enumerate(notebook.cells) if cell.id == "parameters")
  smaller = "\n".join(f"{name} = {value!r}" for name, value in (sizes | {"OUT": str(tmp_path / "out")}).items())
  notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(smaller))
  nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3",
                          resources={"metadata": {"path": str(FOLDER)}}).execute()
  outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
  assert "(cpu)" in outputs["device"][0].text
  told = "".join(out.get("text", "") for found in outputs.values() for out in found)
  assert not re.search(r"Traceback|^error:|command not found", told, re.M), told  # commands fail without an exception
  shown = [name for name, found in outputs.items() if any(
      {"image/png", "text/html"} & set(out.get("data", {})) for out in found)]
  assert len(shown) >= pictures, shown
  sources = {cell.id: cell.source for cell in notebook.cells}
  for name, found in outputs.items():
    of_pages = any(call in sources[name] for call in ("notebook.page(", "notebook.trajectories("))
    for page in (out.data["text/html"] for out in found if "text/html" in out.get("data", {})):
      assert page.startswith("<iframe") == of_pages, f"{name}: a page of ours is in a frame, and nothing else is"
      assert "<svg" in page or "Content-Security-Policy" in page or "<span" in page, f"{name} shows something"
