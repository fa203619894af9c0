"""A file imports only from lower floors of the package."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "virl_jax"
# A module's floor is that of the first entry that its path begins with.
FLOORS = [(prefix, floor) for floor, prefixes in enumerate((
    "checks config shapes types data.exact data.official data.tables "
    "data.order eval.outcome learner.pooled model.hf "
    "model.cache_kernels model.outdir model.params model.remat model.rope report.curves report.drawn report.trajectory "
    "run.caches run.compiles run.files run.hlo run.progress run.signals",
    "data.choice data.endpoint data.mixture data.quantity data.recorded.script data.sources.set_files "
    "eval.figures "
    "eval.monitors model.patches "
    "model.sharding model.tuning report.gallery report.page rl.advantage rl.credit rl.loss rl.reward rollout.slots "
    "run.log tiny.needle",
    "asking.desk data.answers data.images data.judge_model data.recorded.chat data.recorded.rollouts eval.compare "
    "learner.optim "
    "model.attention model.cache model.layers run.goodput run.hosts run.placement rl.judge tiny.store",
    "data.batches data.curation.facts data.recorded.mini_o3 data.recorded.sharegpt data.sources.records "
    "data.sources.sets eval.benchmarks.rows learner.checkpoint model.qwen2_5.config report.benchmark report.html "
    "rollout.actions.zoom rollout.pack run.bad run.topologies run.verdicts run.watch "
    "run.workdir tiny.source",
    "data.curation.rules data.grain_source data.recorded.table data.sources.fields data.sources.jsonl "
    "data.sources.stream eval.benchmarks.choices "
    "eval.benchmarks.docvqa eval.benchmarks.mme_realworld eval.benchmarks.needle eval.benchmarks.pope "
    "eval.benchmarks.textvqa eval.benchmarks.visualprobe model.qwen2_5.text model.qwen2_5.vision report.__main__ "
    "report.notebook report.sieve rollout.actions.table run.ending",
    "data.curation.band data.prompt data.sources.deepeyes data.sources.gqa data.sources.hf_parquet data.sources.lines "
    "data.sources.mini_o3 data.sources.pixel_reasoner data.sources.treevgr data.sources.visual7w "
    "data.sources.visual_cot eval.benchmarks.hrbench eval.benchmarks.infographicsvqa eval.benchmarks.records "
    "eval.benchmarks.treebench eval.benchmarks.vstar model.qwen2_5.model run.sources",
    "data.curation.stages data.sources.grit data.sources.textvqa eval.benchmarks.table eval.predictions model.family "
    "model.qwen tiny.demos tiny.tokenizer",
    "data.sources.docvqa eval.scoring learner.state model.head model.weights rollout.row run.costs run.memory "
    "tiny.curriculum",
    "data.sources.infographicsvqa learner.microbatch rollout.sample run.load run.pace run.serving",
    "data.sources.table learner.step rollout.turns run.record",
    "data.curation.parts rollout.chunks rollout.remote rollout.replay rollout.told run.setup",
    "asking.site data.curation.build export warmstart rollout.engine run.lessons run.programs",
    "ask eval.harness plan rollout.dynamic",
    "eval.asked run.loop",
    "data.curation.policy evaluate sft train",
    "data.curation.funnel",
    "curate",
)) for prefix in prefixes.split()]
DEVICE_ONLY = {"__future__", "dataclasses", "flax", "jax", "virl_jax.checks", "virl_jax.rl"}

FILES = sorted(p for p in ROOT.rglob("*.py") if p.name != "__init__.py")
module = lambda path: ".".join(path.relative_to(ROOT).with_suffix("").parts)


def floor(name):
  found = [f for prefix, f in FLOORS if name == prefix or name.startswith(prefix + ".")]
  assert found, f"{name} stands on no floor: add it to FLOORS"
  return found[0]


def imports(path):
  """What a file imports, at its top or inside a function, in dotted names."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: import by full name"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_module(name):
  path = ROOT.joinpath(*name.split("."))
  return path.with_suffix(".py").is_file() or path.is_dir()


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_go_down(path):
  me = module(path)
  for name in imports(path):
    if name.partition(".")[0] == "virl_jax":
      it = name.removeprefix("virl_jax.")
      assert is_module(it), f"{me}: import the module, not {name}"
      assert floor(it) < floor(me), f"{me} ({floor(me)}) may not import {it} ({floor(it)})"


@pytest.mark.parametrize("path", [p for p in FILES if module(p).startswith("model.")], ids=module)
def test_the_model_looks_at_itself_and_at_nouns(path):
  ours = [name.removeprefix("virl_jax.") for name in imports(path) if name.startswith("virl_jax")]
  assert all(name in ("types", "shapes") or name.startswith("model.") for name in ours)


@pytest.mark.parametrize("path", [p for p in FILES if module(p).startswith("rl.")], ids=module)
def test_kernels_are_pure_jax(path):
  assert all(any(name == it or name.startswith(it + ".") for it in DEVICE_ONLY) for name in imports(path))


def test_packages_do_nothing():
  packages = {p.parent for p in FILES}
  assert len(packages) > 8 and all((p / "__init__.py").read_bytes() == b"" for p in packages)
