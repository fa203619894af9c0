"""README and docs/: documented commands are valid, links lead somewhere, named files and tests exist.

A block that follows `<!-- runs: OPTIONS -->` is run, in a short form, page by page from top to bottom; see
`test_marked_blocks_run`.  A command that is in no such block is listed in `NOT_RUN`, with the reason.
"""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap

from absl import flags
from PIL import Image
import pytest

from tests.data.sources.test_formats import gqa_folder
from tests.data.sources.test_formats import question
from tests.eval.test_benchmarks import pope_file
from virl_jax import config as config_lib
from virl_jax import types
from virl_jax.data.sources import table as sources
from virl_jax.eval.benchmarks import table as benchmarks
from virl_jax.report import benchmark
from virl_jax.report import gallery
from virl_jax.run import setup
from virl_jax.run import topologies

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# Commands that are not ours.
OUTSIDE = {"git", "hf", "docker", "gcloud", "sky", "ruff", "source", "mkdocs", "nvidia-smi", "cd", "jupyter"}
FIRST = OUTSIDE | {"python", "python3", "pip", "bash", "mkdir"}
NAMES = [*config_lib.flat(config_lib.default().to_dict())]
# Commands in no marked block, by how they begin, and why no test runs them unchanged.
NOT_RUN = {
    **dict.fromkeys(("git clone", "cd virl_jax", "python -m venv", "python3 -m venv", "source", "pip install"),
                    "benchmarks/newcomer.py and .ci/run do, in fresh environments"),
    **dict.fromkeys(("python -m pytest", "ruff check"), "this is it"),
    "hf download": "gigabytes from a hub",
    "jupyter lab": "it serves until it is stopped; tests/test_notebooks.py runs each notebook",
    **dict.fromkeys(("gcloud", "docker", "sky", "python -m virl_jax.train --config=configs/v",
                     "python -m virl_jax.sft --config=configs/v", "python -m virl_jax.export --workdir=runs/v"),
                    "machines, accounts or weights that are not here; tests/launch has the first with stand-ins"),
    "python -m virl_jax.plan --config=configs/v": "gigabytes of compilers, hours; tests/test_plan.py plans for CPUs",
    "python benchmarks/": "minutes to hours; docs/benchmarks.md and others have what they printed",
    "python -m virl_jax.warmstart": "45 minutes; tests/test_warmstart.py makes a short one",
    "python -m virl_jax.ask --model=runs/tiny --serve": "it serves until it is stopped; tests/asking",
    "python -m virl_jax.ask --model=runs/v7b --serve": "it serves until it is stopped; tests/asking",
    **dict.fromkeys(("python -m virl_jax.curate build --source=gqa --data=RAW/gqa",
                     "python -m virl_jax.curate --config=configs/curate.py --data=DIR",
                     "python -m virl_jax.curate --config=configs/curate.py --data=SETS --out=DIR"),
                    "README's block has the same, on small files"),
    "bash launch/local.sh": "tests/launch runs it",
    "python -c import numpy as np, sys": "it wants a bad batch; tests/run/test_bad.py looks into some",
    **dict.fromkeys(("python -m virl_jax.evaluate --model=runs/v7b", "python -m virl_jax.evaluate --endpoint"),
                    "public data, a server; tests/test_evaluate.py and tests/eval run both on small files"),
}


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[path.stem] = module  # where dataclasses look for it
  spec.loader.exec_module(module)
  return module


reader = load(ROOT / "docs" / "commands.py")


def written():
  """(where, words) of all commands, except those that tests/launch compares with what is printed."""
  for path in PAGES:
    for line, language, _, text in reader.blocks(path):
      first = text.split(maxsplit=1)[0] if text.strip() else ""
      if language == "bash" or language is None and first in FIRST:
        for words in reader.commands(text):
          yield f"{path.name}:{line}", words
    for code in re.findall(r"`(python -m virl_jax\.\w+ [^`]+|python benchmarks/[^`]+)`", path.read_text()):
      yield f"{path.name}: {code[:40]}", shlex.split(code.replace("...", ""))


WRITTEN = list(written())


@functools.cache
def options(script):
  """What a script's parser takes, without importing it."""
  calls = [n for n in ast.walk(ast.parse((ROOT / script).read_text()))
           if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "add_argument"]
  return {a.value for call in calls for a in call.args if isinstance(a, ast.Constant)}


def flag_values(module, words, monkeypatch):
  values = flags.FlagValues()
  found = importlib.import_module(module)
  if hasattr(found, "__path__"):  # a package's command
    found = importlib.import_module(f"{module}.__main__")
  found.define_flags(values)
  monkeypatch.setattr(sys, "argv", words)  # where `config_flags` looks for overrides
  values(words)
  return values


def check(words, monkeypatch):
  while "=" in words[0] and not words[0].startswith("-"):  # NAME=VALUE before a command
    words = words[1:]
  first, rest = words[0], words[1:]
  assert first in FIRST, f"{first} is no command that pages may name"
  if first == "pip":
    named = [re.search(r"\[([\w,]+)\]$", word) for word in rest]
    assert {extra for found in named if found for extra in found.group(1).split(",")} <= extras(), words
  elif first == "bash":
    assert (ROOT / rest[0]).is_file(), words
    if rest[1:] and rest[1].startswith("configs/"):
      assert (ROOT / rest[1]).is_file(), words
  elif first == "python" and rest[0] == "-m":
    module, given = rest[1], [word for word in rest[2:]]
    if not module.startswith("virl_jax."):
      assert module in ("venv", "pytest", "pip", "tests.model.agreement"), words
      return
    if not [word for word in given if word.startswith("--config=configs/")]:  # an inline mention may name a knob alone
      for word in given:
        if word.startswith("--config."):
          assert word[9:].partition("=")[0] in NAMES, words
      given = [word for word in given if not word.startswith("--config.")]
    values = flag_values(module, [module, *given], monkeypatch)
    if "config" in values and values["config"].present:
      setup.config_file(values)
      assert values.config.steps >= 0  # this reads the file and the overrides
    if module == "virl_jax.plan":
      topologies.parse(values.topology)
    for key, known in (("source", sources.SOURCES), ("benchmark", benchmarks.BENCHMARKS)):
      if key in values:
        assert {name for name in values[key].value if not name.isupper()} <= set(known), words
  elif first == "python" and rest[0] != "-c":
    assert (ROOT / rest[0]).is_file(), words
    asked = {word.partition("=")[0] for word in rest[1:] if word.startswith("--")}
    assert asked <= options(rest[0]), f"{words}: {asked - options(rest[0])}"


def extras():
  call = next(n for n in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
              if isinstance(n, ast.keyword) and n.arg == "extras_require")
  return {key.value for key in call.value.keys}


@pytest.mark.parametrize("where, words", WRITTEN, ids=[where for where, _ in WRITTEN])
def test_a_command_is_one_that_there_is(where, words, monkeypatch):
  monkeypatch.chdir(ROOT)
  check(words, monkeypatch)


def test_there_are_commands_and_all_of_ours_are_among_them():
  ours = {words[2] for _, words in WRITTEN if words[:2] == ["python", "-m"]}
  mains = {p.stem for p in (ROOT / "virl_jax").glob("*.py") if 'if __name__ == "__main__"' in p.read_text()}
  assert {f"virl_jax.{name}" for name in mains} <= ours and len(WRITTEN) > 50


@pytest.mark.parametrize("line, wrong", [
    ("python -m virl_jax.train --config=configs/nope.py", ValueError),
    ("python -m virl_jax.train --config=configs/tiny.py --workdirs=w", flags.Error),
    ("python -m virl_jax.train --config=configs/tiny.py --config.optim.learning_rat=1", AttributeError),
    ("python -m virl_jax.evaluate --model=w --benchmark=vstarr --data=d --out=o", AssertionError),
    ("python -m virl_jax.evaluate --model=w --zoom=maybe", flags.Error),
    ("python -m virl_jax.plan --config=configs/tiny.py --topology=h100", ValueError),
    ("python -m virl_jax.curate build --source=gqqa --data=d --out=o", AssertionError),
    ("python benchmarks/decode.py --row=1", AssertionError), ("python benchmarks/none.py", AssertionError),
    ("pip install -e '.[cuda11]'", AssertionError), ("bash launch/none.sh", AssertionError),
    ("wget x", AssertionError)])
def test_a_command_that_there_is_not_is_seen(line, wrong, monkeypatch):
  monkeypatch.chdir(ROOT)
  with pytest.raises(wrong):
    check(next(reader.commands(line)), monkeypatch)


RUNS = {path: [(marker, text) for _, _, marker, text in reader.blocks(path) if marker is not None] for path in PAGES}


def not_run(words):
  """The key of `NOT_RUN` that a command begins with, or None."""
  return next((begin for begin in NOT_RUN if " ".join(words).startswith(begin)), None)


def test_what_no_test_runs_is_known():
  """Each command is in a marked block or in the table, and the table has no others."""
  found = set()
  for path in PAGES:
    for line, language, marker, text in reader.blocks(path):
      first = text.split(maxsplit=1)[0] if text.strip() else ""
      if marker is None and (language == "bash" or language is None and first in FIRST):
        for words in reader.commands(text):
          assert not_run(words), f"{path.name}:{line}: mark the block, or say in NOT_RUN why it isn't run: {words}"
          found.add(not_run(words))
  assert found == set(NOT_RUN), f"in no page any more: {set(NOT_RUN) - found}"


def small_files(folder):
  """Writes small files that the pages' commands read."""
  for name in ("mine", "RAW/images"):
    (folder / name).mkdir(parents=True)
  for i in range(8):
    Image.new("RGB", (320, 240), (30 * i, 90, 160)).save(folder / "mine" / f"{i}.png")
  rows = [{"image": f"mine/{i}.png", "question": "Is it dark?", "answers": ["yes" if i < 4 else "no"],
           "boxes": [[20, 20, 120, 90]]} for i in range(8)]
  (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  thing = {"name": "camera", "x": 100, "y": 50, "w": 200, "h": 100, "attributes": [], "relations": []}
  gqa_folder(folder / "RAW", {f"{i}": question(question=f"What is number {i}?") for i in range(8)},
             {"7": {"width": 1000, "height": 500, "objects": {"11": thing, "12": thing | {"name": "light"}}}})
  Image.new("RGB", (1000, 500), "navy").save(folder / "RAW" / "images" / "7.jpg")
  pope_file(folder / "POPE" / "output" / "coco" / "coco_pope_random.json", [("cup", "yes"), ("dog", "no")])
  (folder / "answers.jsonl").write_text("".join(json.dumps(
      {"question_id": i, "prompt": f"Is there a {name} in the image?", "text": "Yes."}) + "\n"
      for i, name in ((1, "cup"), (2, "dog"))))
  (folder / "result_direct_attributes.jsonl").write_text(json.dumps(
      {"image": "1.jpg", "question": "What?", "answer": "It is red.", "pred_ans": "A. It is red.", "acc": 1.0,
       "prompt_text": "Question: What?\nOptions: \nA. It is red.\nB. It is blue.\n\nThink first."}) + "\n")
  Image.new("RGB", (200, 100), "olive").save(folder / "kitchen.jpg")
  return folder


def run(words, place):
  env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "VIRL_JAX_CACHE": str(place / "cache")}
  words = [sys.executable if words[0] == "python" else words[0], *words[1:]]
  done = subprocess.run(words, cwd=place, env=env, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def marked(path):
  """The commands of a page's marked blocks, in their short forms."""
  for marker, text in RUNS[path]:
    for words in reader.commands(text, with_optional=False):
      words = reader.shortened(words, marker)
      if not not_run(words):
        yield words


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """One folder for all pages, in which README's tiny run and its evaluation have been done."""
  folder = small_files(tmp_path_factory.mktemp("pages"))
  for name in ("configs", "docs", "launch"):
    (folder / name).symlink_to(ROOT / name)
  for words in marked(ROOT / "README.md"):
    if "--workdir=runs/tiny" in words and words[2] == "virl_jax.train" or "--model=runs/tiny" in words and (
        words[2] == "virl_jax.evaluate"):
      run(words, folder)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path, found in RUNS.items() if found], ids=lambda p: p.stem)
def test_marked_blocks_run(path, place):
  """Each page finds what README's tiny run has left, and each block what the blocks before it have left."""
  for words in marked(path):
    run(words, place)


def test_a_newcomer_s_path_is_install_train_export_evaluate_ask(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  newcomer = importlib.import_module("newcomer")
  path = newcomer.path_of(ROOT / "README.md", is_short=True)
  assert [words[:2] for words in path[:4]] == [["git", "clone"], ["cd", "virl_jax"], ["python3", "-m"],
                                               ["source", ".venv/bin/activate"]] and path[4][:2] == ["pip", "install"]
  assert [words[2] for words in path[5:]] == [f"virl_jax.{name}" for name in (
      "train", "export", "evaluate", "evaluate", "ask")]
  assert "--config.steps=2" in path[5] and "--config.steps=2" not in newcomer.path_of(ROOT / "README.md", False)[5]


def test_blocks_are_read_and_shortened(tmp_path):
  page = tmp_path / "page.md"
  page.write_text(textwrap.dedent("""\
      <!-- runs: @tests --limit=2 w->v -->
      ```bash
      python -m virl_jax.evaluate --model=w [--zoom=on] && mkdir w  # then
      ```

          pip install x
      """))
  (line, language, marker, text), (*_, unmarked, other) = reader.blocks(page)
  assert (line, language, marker, unmarked, other) == (3, "bash", "@tests --limit=2 w->v", None, "pip install x")
  first, second = reader.commands(text, with_optional=False)
  assert reader.shortened(first, marker) == ["python", "-m", "virl_jax.evaluate", "--model=v", "--limit=2"]
  assert reader.shortened(second, marker) == ["mkdir", "v"] and "--zoom=on" in next(reader.commands(text))
  with pytest.raises(ValueError, match="end each quotation"):
    list(reader.commands("echo 'x"))


def anchors(path):
  """The headings of a page, as GitHub and the site name them."""
  bare = [re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)]
  return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())
          for title in re.findall(r"^#+ (.+)$", bare[0], re.MULTILINE)}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
  text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    if re.match(r"\w+:", target):
      assert re.fullmatch(r"https://[\w.-]+\.\w+(/[\w./?=&%#~+-]*)?", target), f"{target} is no address"
      continue
    file, _, anchor = target.partition("#")
    there = path.parent / file if file else path
    assert there.is_file(), f"{target} leads nowhere"
    assert path.parent != ROOT / "docs" or there.resolve().parent == ROOT / "docs", f"{target} is not on the site"
    assert not anchor or anchor in anchors(there), f"{target}: no such heading"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_files_and_tests_that_are_named_are_there(path):
  named = re.findall(r"`(?:python )?((?:[\w.-]+/)+[\w-]+\.(?:py|sh|ipynb|j2))(?:::(\w+))?", path.read_text())
  for name, test in named:
    places = [ROOT / at / name for at in ("", "virl_jax", "virl_jax/data", "virl_jax/rollout", "launch")]
    there = [place for place in places if place.is_file()]
    assert there or "NAME" in name, f"{name} is not there"
    assert not test or f"def {test}(" in there[0].read_text(), f"{name} has no {test}"


def knobs():
  return load(ROOT / "docs" / "knobs.py")


def test_every_knob_has_words():
  sections, found = knobs().knobs()
  assert sorted(knob.key for knob in found) == sorted(NAMES)
  for knob in found:
    assert len(re.findall(r"[A-Za-z]{2,}", knob.words)) > 1, f"{knob.key} has no words in config.py"
  words = [knob.words for knob in found]
  twice = {word for word in words if words.count(word) > 1}
  assert not twice, f"the words of several knobs: {twice}"
  assert {knob.key.rpartition(".")[0] for knob in found} == set(sections)


def test_the_page_of_knobs_is_current():
  module = knobs()
  assert module.PAGE.read_text() == module.page(), "python docs/knobs.py writes it anew"


def defines(stem, name):
  """Whether a module of that name, or one in a folder of that name, has such a function, class or value."""
  return any(re.search(rf"^\s*(def|class) {name}\b|^{name}\b.* = ", path.read_text(), re.MULTILINE)
             for path in (ROOT / "virl_jax").rglob("*.py") if stem in (path.stem, path.parent.name))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_knobs_that_are_named_are_there(path):
  """`section.key`: a knob, the beginning of one, or what a module of the section's name defines."""
  sections = {name.partition(".")[0] for name in NAMES if "." in name}
  for section, rest in re.findall(r"`(?:config\.)?([a-z]+)\.([\w.]+)[^`\n]*`", path.read_text()):
    is_file = any((ROOT / folder / f"{section}.{rest}").is_file() for folder in ("virl_jax", "notebooks"))
    if section in sections and not is_file:
      key = f"{section}.{rest}".rstrip(".")
      begins = key if key.endswith("_") else f"{key}."  # of `image.crop_*`, of a section
      is_knob = key in NAMES or any(name.startswith(begins) for name in NAMES)
      assert is_knob or defines(section, rest.partition(".")[0]) or defines(*key.split(".")[-2:]), f"{key} is no knob"


def test_a_knob_without_words_of_its_own_is_seen(monkeypatch):
  module = knobs()
  lines = ["def _knobs():\n", "  c = ConfigDict()\n", "  c.a, c.b = 1, 2  # one for two\n"]
  monkeypatch.setattr(module.inspect, "getsourcelines", lambda of: (lines, 1))
  with pytest.raises(ValueError, match="config.py:3 must define one knob"):
    module.knobs()


def spoken():
  """All string literals of the package as one text; f-strings without their values."""
  found = []
  for path in (ROOT / "virl_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(node.value)
      elif isinstance(node, ast.JoinedStr):
        found.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
  return "\n".join(found)


def test_messages_on_the_page_of_troubles_are_ours():
  """The headings of the page's first part, which is about our own messages."""
  text = (ROOT / "docs" / "troubleshooting.md").read_text().partition("\n## Messages of others")[0]
  titles, ours = re.findall(r"^### `(.+)`$", text, re.MULTILINE), spoken()
  assert len(titles) > 15
  for title in titles:
    for part in title.split("..."):
      assert part.strip() in ours, f"nothing says {part!r} any more"


def test_the_picture_is_drawn_of_what_evaluations_show(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  picture = importlib.import_module("picture")
  Image.new("RGB", (40, 20), "navy").save(tmp_path / "a.png")
  task = types.Task("t", str(tmp_path / "a.png"), "Where?", ("x",), (types.Box(0, 0, 20, 20),))

  def entry(uid, score, iou):
    row = {"uid": uid, "sample": 0, "prediction": "y", "answers": ["x"], "score": score}
    said = {(uid, 0): {"text": "y", "boxes": [[10, 5, 30, 15]], "ious": [iou], "classes": ["correct"]}}
    return benchmark.entries([dataclasses.replace(task, uid=uid)], [row], said)[0]

  sides = [[entry("t", 0.0, 0.2), entry("u", 0.0, 0.2), entry("v", 1.0, 0.9)],
           [entry("t", 1.0, 0.5), entry("u", 1.0, 0.7), entry("v", 1.0, 0.9)]]
  for name, entries in zip("ab", sides):
    gallery.save(str(tmp_path / name / "shown.jsonl"), entries)
  before, after = picture.kept(tmp_path / "a"), picture.kept(tmp_path / "b")
  assert picture.flipped(before, after) == ["u", "t"], "best looks first"
  with pytest.raises(ValueError, match="must be folders that evaluate has written.*nothing"):
    picture.kept(tmp_path / "nothing")
  one, two = picture.draw([("x", before["t"])]), picture.draw([("x", before["t"]), ("y", after["t"])])
  assert two.width == one.width and two.height > one.height
  colours = {colour for _, colour in one.getcolors(one.width * one.height)}
  assert {(11, 128, 67), (217, 48, 37), (0, 0, 128)} <= colours  # the truth, the zoom, the picture


def test_how_to_cite():
  yaml = pytest.importorskip("yaml")
  cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  version = re.search(r'version="([^"]+)"', (ROOT / "setup.py").read_text()).group(1)
  assert cited["cff-version"] == "1.2.0" and cited["version"] == version and cited["authors"] and cited["message"]
  assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text() or "## Unreleased" in (
      ROOT / "CHANGELOG.md").read_text()
  for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
    assert yaml.safe_load(form.read_text()), form


def test_the_site_builds_and_needs_nothing_from_elsewhere(tmp_path):
  pytest.importorskip("material", reason="pip install -e '.[docs]'")
  done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}"], cwd=ROOT,
                        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  pages = sorted(tmp_path.rglob("*.html"))
  assert len(pages) >= len(list((ROOT / "docs").glob("*.md")))
  for page in pages:
    fetched = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"([^\"]+)\"|<link\b[^>]*\bhref=\"([^\"]+)\"",
                         page.read_text())
    for address in filter(None, sum(fetched, ())):
      assert not re.match(r"(https?:)?//", address), f"{page.name} fetches {address}"
  for sheet in tmp_path.rglob("*.css"):
    assert not re.findall(r"url\(\s*['\"]?(?:https?:)?//|@import\s+['\"]?http", sheet.read_text()), sheet
  index = json.loads((tmp_path / "search" / "search_index.json").read_text())
  assert any("rollout.group_size" in part["text"] for part in index["docs"])
