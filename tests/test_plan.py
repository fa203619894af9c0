"""Compiling for a machine: the figures of each program, that nothing is gathered whole, and what is proposed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax import config as config_lib
from virl_jax import plan
from virl_jax import train
from virl_jax import types
from virl_jax.model import attention
from virl_jax.model import family
from virl_jax.model import sharding
from virl_jax.model.qwen2_5 import config as qwen
from virl_jax.model.qwen2_5 import vision
from virl_jax.run import loop
from virl_jax.run import memory
from virl_jax.run import programs
from virl_jax.run import setup
from virl_jax.run import topologies

CPU = topologies.parse("cpu:8")


def made(**changes):
  c = config_lib.default()
  c.model.path, c.model.compute_dtype, c.model.remat = "somewhere/Qwen2.5-VL-7B-Instruct", "bfloat16", True
  c.rollout.prompts, c.rollout.group_size, c.rollout.max_total_tokens, c.rollout.max_turn_tokens = 8, 4, 256, 64
  c.engine.slots = 16
  c.image.max_pixels = c.image.crop_max_pixels = 56 * 56
  c.pack.join_rows, c.learner.microbatch_tokens = True, 256
  c.mesh.data, c.mesh.fsdp = 1, -1
  for key, value in changes.items():
    section, _, knob = key.partition("__")
    c[section][knob] = value
  return c


@pytest.fixture
def of_small(small, monkeypatch):
  monkeypatch.setattr(plan, "model_of", lambda c: small.cfg)
  return small.cfg


@pytest.fixture(scope="module")
def rows(small):
  """Each program, compiled for eight devices."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plan, "model_of", lambda c: small.cfg)
    return plan.plan(made(), CPU)


def test_what_is_said(rows):
  assert tuple(rows["programs"]) == programs.NAMES and rows["fits"] and rows["advice"] == []
  assert rows["topology"] == "cpu:8" and rows["config"]["rollout"]["prompts"] == 8
  for name, row in rows["programs"].items():
    assert row["ok"] and not row["error"] and row["compile_s"] > 0 and row["peak_gib"] > 0, name
    assert {"arguments_gib", "temporaries_gib", "collective_gib", "attention"} <= set(row)
  assert rows["kinds"]["optimizer"] == pytest.approx(2 * rows["kinds"]["parameters"], rel=1e-3)  # Adam's two
  json.dumps(rows)
  said = plan.table(rows)
  assert all(name in said for name in programs.NAMES) and "XLA" in said


@pytest.mark.slow
def test_what_waits_on_the_host_is_not_the_device_s(of_small, rows):
  """Moments and reference, in the programs' figures and in `kinds`."""
  devices = topologies.devices(CPU)
  c = made(learner__offload=("optimizer", "reference"), loss__kl_coef=0.1)
  row = plan.compiled(c, CPU, devices, "update")
  assert row.ok, row.error
  p = plan.setup.assemble(c, of_small, None, "", devices)
  state = programs._state(c, p)
  kinds = {a.sharding.memory_kind for a in jax.tree.leaves(state.opt_state) if a.ndim}
  assert kinds == {"pinned_host"} and {a.sharding.memory_kind for a in jax.tree.leaves(state.params)} == {"device"}
  assert {a.sharding.memory_kind for a in jax.tree.leaves(programs._reference(c, p))} == {"pinned_host"}
  found = programs.kinds(c, p, programs.work(c))
  assert found["optimizer"] * plan.GIB < 100 and found["reference"] == 0  # counters
  assert found["parameters"] == rows["kinds"]["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(optim__kind="adafactor"), dict(optim__kind="muon"),
                                     dict(model__remat_keep=("attention", "mlp"), model__remat_offload=("qkv",))])
def test_every_recipe_compiles_for_a_mesh(of_small, changes):
  row = plan.compiled(made(**changes), CPU, topologies.devices(CPU), "update")
  assert row.ok, row.error


def test_nothing_is_gathered_whole(rows, small):
  """No collective is larger than a parameter: neither the batch, nor images, the cache or logits are gathered."""
  biggest = max(a.size * a.dtype.itemsize for a in jax.tree.leaves(family.abstract_params(small.cfg)))
  for name, row in rows["programs"].items():
    assert row["largest_gib"] * plan.GIB <= biggest, name
  for name in ("prefill", "append", "decode", "restart"):  # each device has all that it needs
    kept = {k: v for k, v in rows["programs"][name]["collectives"].items() if k != "all-reduce"}
    assert sum(kept.values()) * plan.GIB < 4096, (name, kept)


@pytest.mark.slow
def test_the_tower_comes_once_for_all_parts_of_the_pictures(of_small, rows):
  """And its gradient is reduced once."""
  c = made(model__patches_together=16, model__gather_vision=True)
  row = plan.compiled(c, CPU, topologies.devices(CPU), "update")
  assert row.ok, row.error
  tower = sum(a.size for a in jax.tree.leaves(family.abstract_params(of_small)["vision"])) * 4 / plan.GIB
  assert row.collective_gib < rows["programs"]["update"]["collective_gib"] + tower


def test_weights_do_not_move_between_tokens(of_small):
  devices = topologies.devices(CPU)
  for tensor in (1, 2):
    row = plan.compiled(made(rollout__tensor=tensor), CPU, devices, "decode")
    weights = sum(a.size for a in jax.tree.leaves(family.abstract_params(of_small))) * 2
    assert row.collective_gib * plan.GIB < weights / 8


@pytest.mark.parametrize("path, hidden", [("w/Qwen2.5-VL-7B-Instruct", 3584), ("w/Qwen2.5-VL-3B-Instruct/", 2048)])
def test_shapes_come_from_the_name_where_there_is_no_folder(path, hidden):
  assert plan.model_of(made(model__path=path)).text.hidden == hidden
  with pytest.raises(ValueError, match="config.model.path must be a checkpoint's folder, or have one of the released"):
    plan.model_of(made(model__path="w/mine"))


@pytest.mark.parametrize("changes, said", [
    (dict(mesh__tensor=4, mesh__fsdp=2), "config.mesh.tensor must be a divisor of the model's 2 key/value heads"),
    (dict(rollout__tensor=4), "config.rollout.tensor must be a divisor of the model's 2 key/value heads. Received: 4"),
    (dict(mesh__fsdp=3), "must multiply to the 8 devices"),
    (dict(learner__microbatch_tokens=255), "config.learner.microbatch_tokens must be 0, or at least the 256 tokens"),
    (dict(learner__row_crops=5), "config.learner.row_crops must be at least config.rollout.max_rounds = 6"),
    (dict(rollout__prompts=1), "must be a multiple of the mesh's data x fsdp = 8")])
def test_what_does_not_divide_is_said(of_small, changes, said):
  with pytest.raises(ValueError, match=said):
    plan.plan(made(**changes), CPU)


def stand_in(monkeypatch, fits):
  """A stand-in for the compiler, which decides by the configuration what fits."""
  asked = []

  def compiled(c, topology, devices, name):
    asked.append(name)
    return plan.Row(fits(c, name), 1.0, error="" if fits(c, name) else "needs 99.0 GiB of 15.8")

  monkeypatch.setattr(plan, "compiled", compiled)
  return asked


def test_what_is_proposed_was_compiled_and_fits(of_small, monkeypatch):
  asked = stand_in(monkeypatch, lambda c, name: name != "update" or 0 < c.model.patches_together <= 16384)
  found = plan.plan(made(), CPU)
  assert not found["fits"] and not found["programs"]["update"]["ok"]
  assert found["advice"] == ["--config.model.patches_together=16384"]
  assert asked == [*programs.NAMES, "update", "update"]


def test_training_and_rollouts_are_helped_apart(of_small, monkeypatch):
  stand_in(monkeypatch, lambda c, name: {"decode": c.rollout.tensor > 1, "score": c.model.patches_together > 0,
                                         "append": c.engine.slots < 16}.get(name, True))
  assert plan.plan(made(), CPU)["advice"] == [
      "--config.model.patches_together=32768", "--config.rollout.tensor=4", "--config.engine.slots=8"]


def test_what_nothing_helps_is_said(of_small, monkeypatch):
  stand_in(monkeypatch, lambda c, name: name != "update")
  [said] = plan.plan(made(), CPU)["advice"]
  assert said == ("update: nothing that was tried fits (model.patches_together=8192, lora.rank=64): take more devices")


def test_microbatches_of_a_row_are_proposed(of_small, monkeypatch):
  stand_in(monkeypatch, lambda c, name: name != "update" or c.learner.microbatch_tokens == 256)
  assert plan.plan(made(learner__microbatch_tokens=0), CPU)["advice"] == ["--config.learner.microbatch_tokens=256"]


def test_what_waits_beside_a_program_counts(rows, of_small):
  """During an update, the other minibatches and the reference; during a rollout, the optimizer."""
  kinds, of = rows["kinds"], rows["programs"]
  state = kinds["parameters"] + kinds["optimizer"]
  assert of["update"]["waiting_gib"] < 0.2 * kinds["batch"]  # there is one minibatch and no reference
  assert of["append"]["waiting_gib"] == pytest.approx(state, rel=0.05)
  assert state < of["decode"]["waiting_gib"] < state + kinds["rollout weights"]  # decoding does not need the tower
  assert of["score"]["waiting_gib"] > kinds["optimizer"]  # a single update computes log-probabilities itself
  assert of["restart"]["waiting_gib"] == pytest.approx(state + kinds["rollout weights"], rel=0.05)
  small_chip = lambda gib: dataclasses.replace(CPU, chip=dataclasses.replace(CPU.chip, memory_gib=gib))
  peak, waits = of["restart"]["peak_gib"], of["restart"]["waiting_gib"]
  for share, ok in ((0.9, False), (1.1, True)):
    assert plan.compiled(made(), small_chip(peak + share * waits), topologies.devices(CPU), "restart").ok == ok


def test_all_minibatches_wait_for_an_update(of_small):
  """All are on the device at the same time: they are scored before the first update."""
  found = []
  for minibatches in (1, 2):
    c = made(ppo__minibatches=minibatches, rollout__prompts=8 * minibatches)  # of the same size
    p = setup.assemble(c, of_small, None, "", topologies.devices(CPU))
    found.append((programs.live(c, p, "update", programs.work(c)), programs.kinds(c, p, programs.work(c))["batch"]))
  (one, batch), (two, again) = found
  assert batch == again > 0 and two - one == pytest.approx(batch)


def test_training_is_refused_where_it_does_not_fit_before_weights_are_loaded(small, of_small, monkeypatch, tmp_path):
  """The refusal proposes what was compiled and fits; nothing is refused if the backend reports no memory, as here."""
  c = made()
  p = setup.assemble(c, small.cfg, None, "")
  plan.check(c, p)
  asked = stand_in(monkeypatch, lambda c, name: c.model.patches_together == 32768)
  monkeypatch.setattr(memory, "limit_gib", lambda devices: 1.0)
  with pytest.raises(ValueError, match="must fit 8 x cpu of 1.0 GiB each; update: needs 99.0 GiB of 15.8. Try "
                     "--config.model.patches_together=32768$"):
    plan.check(c, p)
  assert asked == ["update", "update"]
  monkeypatch.setattr(memory, "limit_gib", lambda devices: 1e-4)
  with pytest.raises(ValueError, match="update: what lies on a device is 0.0 GiB. Try --config.model.patches_together"):
    plan.check(c, p)
  c.model.path = "@tiny"
  monkeypatch.setattr(loop.load, "base", lambda *args: pytest.fail("weights were loaded"))
  with pytest.raises(ValueError, match="^config must fit 8 x cpu"):
    train.train(c, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_more_than_a_chip_has_does_not_fit(of_small):
  small_chip = dataclasses.replace(CPU, chip=dataclasses.replace(CPU.chip, memory_gib=1e-6))
  row = plan.compiled(made(), small_chip, topologies.devices(CPU), "restart")
  assert not row.ok and row.error.startswith("needs ") and row.error.endswith("that wait, of 0.0")


def test_a_compiler_s_complaint_is_a_line(of_small, monkeypatch):
  def refuses(*args):
    raise RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
                       "(27.76G) exceeds available HBM (15.75G).\n\n" + "x" * 5000)

  monkeypatch.setattr(programs, "lowered", lambda *args: refuses)
  row = plan.compiled(made(), CPU, topologies.devices(CPU), "update")
  assert row.error == ("Ran out of memory on HBM, the total memory required for HLO temporaries (27.76G) exceeds "
                       "available HBM (15.75G)")


# --- kernels, for machines that are not here ------------------------------------------------------------------


def elsewhere(name):
  """A (1, n, 1) mesh of a topology, if its compiler is installed."""
  topology = topologies.parse(name)
  module = {"gpu": "jax_plugins.xla_cuda12", "tpu": "libtpu"}[topology.chip.platform]
  if not topologies._found(module):
    pytest.skip(f"{module} is not installed")
  return sharding.make(1, -1, 1, topologies.devices(topology)), topology.chip.platform


@pytest.mark.parametrize("name, kernel", [("h100:2", "cudnn"), ("v5e:2x2", "splash")])
def test_causal_and_vision_attention_take_kernels(name, kernel):
  mesh, platform = elsewhere(name)
  put = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(mesh))
  options = {"xla_gpu_enable_triton_gemm": False} if platform == "gpu" else {}

  def causal(q, k, v, lengths):
    with sharding.context(mesh):
      return attention.attend(q, k, v, attention.segments(lengths, 512), True, lengths, platform=platform)

  q, kv = put((4, 512, 4, 128), jnp.bfloat16), put((4, 512, 2, 128), jnp.bfloat16)
  text = jax.jit(causal).lower(q, kv, kv, put((4, 3), jnp.int32)).compile(compiler_options=options).as_text()
  assert kernel in plan.hlo.kernels(text)

  cfg = qwen.Vision(depth=2, hidden=160, heads=2, intermediate=64, out=64, full_blocks=(1,))
  specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding.replicated(mesh)),
                       family.params_lib.abstract(vision.specs(cfg), jnp.float32))
  images = types.ImageBatch(put((4, 8, 64, cfg.grid.bytes), np.uint8), put((4, 8, 64), np.int32),
                            put((4, 8, 64, 2), np.int32))

  def encode(params, images):
    with sharding.context(mesh):
      return vision.encode(params, cfg, images, jnp.bfloat16, platform=platform)

  text = jax.jit(encode).lower(specs, images).compile(compiler_options=options).as_text()
  marks = plan.hlo.KERNELS[kernel]
  assert sum(line.count("custom-call(") > 0 and any(mark in line for mark in marks)
             for line in text.splitlines()) >= 2, "windows, and whole images"


@pytest.mark.parametrize("name", ["h100:2", "v5e:2x2"])
def test_rollouts_attend_to_their_cache_by_a_kernel_and_copy_none_of_it(name, small, monkeypatch):
  elsewhere(name)
  topology = topologies.parse(name)
  text = dataclasses.replace(small.cfg.text, head_size=128, mrope_section=(16, 24, 24))
  monkeypatch.setattr(plan, "model_of", lambda c: dataclasses.replace(small.cfg, text=text))
  c, devices = made(), topologies.devices(topology)
  p = setup.assemble(c, plan.model_of(c), None, "", devices)
  stack = f"[{text.layers},{c.engine.slots // topology.count},{text.kv_heads},256,128]"
  for program in ("decode", "append"):
    options = {"xla_gpu_enable_triton_gemm": False} if topology.chip.platform == "gpu" else {}
    lines = programs.lowered(c, p, program, programs.work(c))().compile(compiler_options=options).as_text().splitlines()
    assert "cache" in plan.hlo.kernels("\n".join(lines)), program
    of_cache = [line for line in lines if stack in line]
    assert of_cache and not [line for line in of_cache if " copy(" in line], program
