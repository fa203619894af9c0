"""Eight CPU devices, strict shapes, no writes outside temporary folders; a tiny model to share."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import tempfile
from typing import Any

# Before JAX starts: a GPU on this host stays out of the tests unless someone asks for it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling, which takes half as long without XLA's fusion emitters (CPU: 62 s to 30 s for
# test_scripted.py::test_no_work_twice), and a tenth less if a program is not split for several threads, because
# pytest's other process uses the cores.  Newer versions have no switch for the emitters, and end the process if one is
# set.
_FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most tests run each program a few times: compiling it costs more than running it unoptimised.
jax.config.update("jax_disable_most_optimizations", True)
# Compiling can take longer than hypothesis's deadline for an example; CI draws the same examples each time.
hypothesis.settings.register_profile("house", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("house")


def pytest_collection_modifyitems(items):
  """Whole runs first, which take the longest: last, they would leave pytest's other process without work."""
  here = pathlib.Path(__file__).parent
  items.sort(key=lambda item: item.path.parent != here)


@dataclasses.dataclass(frozen=True)
class Model:
  """A model to test with.

  Attributes:
    cfg: `qwen.Config`.
    params: float32, with a variance so large that every part of the model affects the logits.
    folder: of the tokenizer's files, or None.
    tokenizer: the tokenizer, or None.
  """

  cfg: Any
  params: dict
  folder: pathlib.Path | None = None
  tokenizer: Any = None


def _draw(cfg, scale: float) -> dict:
  """Parameters from numpy: nothing to compile."""
  from virl_jax.model import params as params_lib
  from virl_jax.model.qwen2_5 import model as qwen
  rng = np.random.default_rng(0)

  def one(spec):
    x = scale * rng.standard_normal(spec.shape, np.float32)
    return jax.numpy.asarray(1 + x if spec.init == "ones" else x)

  return params_lib.map_specs(one, qwen.specs(cfg))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
  """Generated sets go to a folder of this test run, not to the user's cache.

  So do the compiled programs of the processes that tests start: what one has compiled, later ones read, whichever of
  pytest's processes started them.  They run few steps, and so don't optimise either.
  """
  ours = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    ours = ours.parent  # shared by all workers
  with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
    patch.setenv("VIRL_JAX_CACHE", folder)
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(ours / "programs"))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    yield


_MANY_MAPS, _MANY_PROGRAMS = 20_000, 100
_compiled = 0


def _count(event: str, seconds: float, **_) -> None:
  global _compiled
  _compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
  """What a module compiled is of no use to the next, and holds memory maps: see `_few_maps`."""
  yield
  jax.clear_caches()


@pytest.fixture(autouse=True)
def _few_maps():
  """Clears JAX's caches before memory maps run out.

  Each program compiled for the CPU holds some, Linux allows a process 65,530, and beyond that XLA crashes.  Counting
  them takes a while, and is done after every hundred programs.
  """
  global _compiled
  yield
  if _compiled < _MANY_PROGRAMS:
    return
  _compiled = 0
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPS:
    jax.clear_caches()


@pytest.fixture(scope="session")
def _bucket():
  if importlib.util.find_spec("gcsfs") is None:  # it reads the environment when it is imported
    pytest.skip("needs the extra gcs")
  from tests import bucket
  with pytest.MonkeyPatch.context() as patch, bucket.serve(patch) as found:
    yield found


@pytest.fixture
def bucket(_bucket):
  """An empty bucket, gs://my-bucket, for this process and those that it starts: see `tests/bucket.py`."""
  _bucket.objects.clear()
  yield _bucket
  _bucket.refuse = lambda method, path: None


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
  """A path for a workdir, as a user writes it: once on a disk, once in a bucket."""
  if request.param == "disk":
    return str(tmp_path / "run")
  request.getfixturevalue("bucket")
  return "gs://my-bucket/team/run"


@pytest.fixture
def optimized():
  """Turns optimisation on, for tests that run one program many times."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def small() -> Model:
  """Two layers of each kind and 24 channels, without a tokenizer: compiles in no time."""
  from virl_jax.model.qwen2_5 import model as qwen
  cfg = qwen.Config(
      text=qwen.Text(vocab=64, hidden=24, layers=2, heads=4, kv_heads=2, head_size=8, intermediate=40,
                     mrope_section=(1, 1, 2), tied=False),
      vision=qwen.Vision(depth=2, hidden=16, heads=2, intermediate=24, out=24, full_blocks=(1,)),
      image_token=5, video_token=6, vision_start=7, vision_end=8, vision_pad=9, eos=(3,))
  return Model(cfg, _draw(cfg, 0.2))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Model:
  """The shape of the tiny base, untrained, with its tokenizer."""
  from virl_jax.model.qwen2_5 import model as qwen
  from virl_jax.tiny import tokenizer as tiny_tokenizer
  folder = tmp_path_factory.mktemp("tokenizer")
  tokenizer = tiny_tokenizer.build(folder, "You are a helpful assistant.")
  cfg = qwen.tiny(-(-len(tokenizer) // 64) * 64, tiny_tokenizer.token_ids(tokenizer))
  return Model(cfg, _draw(cfg, 0.05), folder, tokenizer)
