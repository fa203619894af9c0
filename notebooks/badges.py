"""Writes into every notebook what they have in common: the badge that opens it on Colab, and the cell that installs.

    python notebooks/badges.py

The repository's address stands here and nowhere else: change `REPOSITORY`, run this, and commit the notebooks.
"""

from __future__ import annotations

import json
import pathlib

REPOSITORY = "OWNER/virl_jax"  # on GitHub.  OWNER: there is no public address yet
BRANCH = "main"
FOLDER = pathlib.Path(__file__).parent

_BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({})"
_NOT_YET = """

*The link works once the repository is public: `REPOSITORY` in `notebooks/badges.py` is its address.*"""
_INSTALL = """\
# On a fresh Colab: gets the code and what Colab lacks; its JAX and numpy stay.  In a clone: goes to its root.
import pathlib
from importlib.metadata import version

if pathlib.Path("../configs/tiny.py").exists():
    %cd -q ..
elif not pathlib.Path("configs/tiny.py").exists():
    !git clone --quiet --depth=1 --branch={branch} https://github.com/{repository} virl_jax
    %cd -q virl_jax
    %pip install --quiet '.[benchmarks]' jax=={{version("jax")}} numpy=={{version("numpy")}}"""


def common(name: str, repository: str = REPOSITORY, branch: str = BRANCH) -> dict[str, str]:
  """The text of the cells that all notebooks have, by the cell's id.

  Args:
    name: of the notebook's file.
    repository: OWNER/NAME on GitHub.
    branch: which Colab opens and installs.
  """
  link = f"https://colab.research.google.com/github/{repository}/blob/{branch}/notebooks/{name}"
  return {"badge": _BADGE.format(link) + (_NOT_YET if repository.startswith("OWNER/") else ""),
          "install": _INSTALL.format(repository=repository, branch=branch)}


def written(notebook: dict, cells: dict[str, str]) -> dict:
  """A notebook with these cells' text.

  Args:
    notebook: as JSON has it.
    cells: text by the cell's id.

  Raises:
    ValueError: it lacks one of them.
  """
  ids = [cell.get("id") for cell in notebook["cells"]]
  if missing := sorted(cells.keys() - set(ids)):
    raise ValueError(f"the notebook must have cells {', '.join(cells)}. Received: none with id {', '.join(missing)}")
  return notebook | {"cells": [
      cell | {"source": cells[cell["id"]].splitlines(keepends=True)} if cell.get("id") in cells else cell
      for cell in notebook["cells"]]}


def main() -> None:
  for path in sorted(FOLDER.glob("*.ipynb")):
    notebook = written(json.loads(path.read_text(encoding="utf-8")), common(path.name))
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
