"""README and docs/: commands that are there are taken, links lead somewhere, named files and tests exist.

A block that follows `<!-- runs: OPTIONS -->` is run, page by page from top to bottom, with OPTIONS behind each of its
commands that is ours; see `test_marked_blocks_run`.
"""

import ast
import base64
import functools
import importlib
import importlib.util
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

from absl import flags
from PIL import Image
import pytest

from virl_jax import config as config_lib
from virl_jax.data.sources import table as sources
from virl_jax.eval.benchmarks import table as benchmarks
from virl_jax.run import setup
from virl_jax.run import topologies

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# Commands that are not ours.
OUTSIDE = {"git", "hf", "docker", "gcloud", "sky", "ruff", "source", "mkdocs", "nvidia-smi", "cd", "jupyter"}
FIRST = OUTSIDE | {"python", "pip", "bash", "mkdir"}
NAMES = [*config_lib.flat(config_lib.default().to_dict())]


def blocks(path):
  """(line, language or None if it is indented, marker or None, text) of each block of code."""
  found, marker, lines = [], None, path.read_text().splitlines()
  at = 0
  while at < len(lines):
    fence = re.match(r"(\s*)```(\w*)", lines[at])
    indented = lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip())
    start = at
    if fence:
      at += 1
      while not lines[at].strip().startswith("```"):
        at += 1
      found.append((start + 2, fence.group(2), marker, "\n".join(lines[start + 1:at])))
    elif indented:
      while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
        at += 1
      at -= 1
      found.append((start + 1, None, marker, "\n".join(line[4:] for line in lines[start:at + 1]).rstrip()))
    if lines[at].strip():
      marked = re.fullmatch(r"<!-- runs: ?(.*?) ?-->", lines[at].strip())
      marker = marked.group(1) if marked else None
    at += 1
  return found


def commands(text):
  """The words of each command of a block; what is optional, in brackets, is taken."""
  line = ""
  for more in re.sub(r"\[(--[^\]]*)\]", r"\1", text.replace("\\\n", " ")).splitlines():
    line += more
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
      found, line = list(lexer), ""
    except ValueError:  # a quotation that goes on in the next line
      line += "\n"
      continue
    words = []
    for word in found:
      if set(word) <= set("&|;"):
        yield words
        words = []
      else:
        words.append(word)
    if words:
      yield words
  assert not line, f"a quotation without an end: {line}"


def written():
  """(where, words) of all commands, but what tests/launch compares with what is printed."""
  for path in PAGES:
    for line, language, _, text in blocks(path):
      first = text.split(maxsplit=1)[0] if text.strip() else ""
      if language == "bash" or language is None and first in FIRST:
        for words in commands(text):
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
  monkeypatch.setattr(sys, "argv", words)  # where `config_flags` looks for what is overridden
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
      assert values.config.steps >= 0  # which reads the file and what is overridden
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
    check(next(commands(line)), monkeypatch)


RUNS = {path: [(marker, text) for _, _, marker, text in blocks(path) if marker is not None] for path in PAGES}


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path, marked in RUNS.items() if marked], ids=lambda p: p.stem)
def test_marked_blocks_run(path, tmp_path):
  """In a folder of their own, one after another: what one leaves, the next finds."""
  for name in ("configs", "docs", "launch"):
    (tmp_path / name).symlink_to(ROOT / name)
  env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "VIRL_JAX_CACHE": str(tmp_path / "cache")}
  for marker, text in RUNS[path]:
    text = text.replace("\\\n", " ")
    text = "\n".join(re.sub(r"^(python -m virl_jax\.[^#]*)", rf"\1 {marker} ", line) for line in text.split("\n"))
    ours = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}'
    done = subprocess.run(["bash", "-ec", f"{ours}\n{text}"], cwd=tmp_path, env=env, capture_output=True, text=True,
                          timeout=900)
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


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
  spec = importlib.util.spec_from_file_location("knobs", ROOT / "docs" / "knobs.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules["knobs"] = module  # where dataclasses look
  spec.loader.exec_module(module)
  return module


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


def test_a_knob_without_words_of_its_own_is_seen(monkeypatch):
  module = knobs()
  lines = ["def _knobs():\n", "  c = ConfigDict()\n", "  c.a, c.b = 1, 2  # one for two\n"]
  monkeypatch.setattr(module.inspect, "getsourcelines", lambda of: (lines, 1))
  with pytest.raises(ValueError, match="config.py:3 must define one knob"):
    module.knobs()


def spoken():
  """All texts of the package in one: f-strings without what is put into them."""
  found = []
  for path in (ROOT / "virl_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(node.value)
      elif isinstance(node, ast.JoinedStr):
        found.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
  return "\n".join(found)


def test_messages_on_the_page_of_troubles_are_ours():
  """Of headings in the first part, which is about our own messages."""
  text = (ROOT / "docs" / "troubleshooting.md").read_text().partition("\n## Messages of others")[0]
  titles, ours = re.findall(r"^### `(.+)`$", text, re.MULTILINE), spoken()
  assert len(titles) > 15
  for title in titles:
    for part in title.split("..."):
      assert part.strip() in ours, f"nothing says {part!r} any more"


def test_the_picture_is_drawn_of_what_a_run_keeps(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  picture = importlib.import_module("picture")
  kept = io.BytesIO()
  Image.new("RGB", (40, 20), "navy").save(kept, "PNG")
  uri = "data:image/png;base64," + base64.b64encode(kept.getvalue()).decode()
  turn = {"crop": uri, "box": [10, 5, 30, 15], "iou": 0.5}
  entry = {"uid": "t", "question": "Where?", "answer": None, "correct": False, "image": uri, "width": 40,
           "boxes_gt": [[0, 0, 20, 20]], "turns": [{"crop": None, "box": None, "iou": None}, turn]}
  (tmp_path / "rollouts").mkdir()
  (tmp_path / "rollouts" / "before.jsonl").write_text(json.dumps(entry) + "\n")
  with pytest.raises(ValueError, match="--uid must be one of t. Received: other"):
    picture.kept(tmp_path, "before", "other")
  with pytest.raises(ValueError, match="rollouts/after.jsonl"):
    picture.kept(tmp_path, "after", "t")
  found = picture.kept(tmp_path, "before", "t")
  one, two = picture.draw([("before", found)]), picture.draw([("before", found), ("after", found | {"turns": []})])
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
