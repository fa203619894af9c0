"""How a command ends on an error, with a line or a traceback; its warnings at the start, and what it refuses there."""

import logging
import os

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from virl_jax import config as config_lib
from virl_jax.learner import optim
from virl_jax.run import setup


@pytest.mark.parametrize("raised, said", [
    (ValueError("config.steps must be 0 or more. Received: -1"), "config.steps must be 0 or more. Received: -1"),
    (OSError("No space left on device"), "OSError: No space left on device"),
    (RuntimeError("RESOURCE_EXHAUSTED: out of memory\n" + "and where it went\n" * 99),
     "RuntimeError: RESOURCE_EXHAUSTED: out of memory")])
def test_an_error_is_a_line(raised, said, monkeypatch):
  monkeypatch.delenv("VIRL_JAX_DEBUG", raising=False)
  with pytest.raises(SystemExit) as e, setup.told():
    raise raised
  assert str(e.value) == f"error: {said} (VIRL_JAX_DEBUG=1 shows where)"
  monkeypatch.setenv("VIRL_JAX_DEBUG", "1")
  with pytest.raises(type(raised)) as e, setup.told():
    raise raised
  assert e.value is raised


@pytest.mark.parametrize("raised", [SystemExit("error: as it is"), KeyboardInterrupt()])
def test_what_is_no_error_goes_through(raised):
  with pytest.raises(type(raised)) as e, setup.told():
    raise raised
  assert e.value is raised


@pytest.mark.parametrize("dtype, rate, said", [
    ("bfloat16", 1e-6, True), ("bfloat16", 9e-6, True), ("bfloat16", 1e-5, False), ("float32", 1e-6, False)])
def test_parameters_too_coarse_to_move_are_said(dtype, rate, said):
  c = config_lib.default()
  c.model.dtype, c.optim.learning_rate = dtype, rate
  found = setup.cautions(c)
  assert len(found) == said
  if said:
    assert f"at config.optim.learning_rate = {rate:g} such parameters hardly move" in found[0] and "LoRA" in found[0]


def test_such_parameters_do_not_move():
  """The warning is true of weights as large as a model's, at AdamW's first step."""
  weights = 0.02 * np.random.default_rng(0).standard_normal((256, 256))
  for rate, least, most in ((1e-6, 0.0, 0.02), (1e-5, 0.05, 0.3), (1e-3, 0.99, 1.0)):
    opt = optim.optimizer(optim.OptimConfig(learning_rate=rate))
    params = {"a_w": jnp.asarray(weights, jnp.bfloat16)}
    grads = {"a_w": jnp.asarray(np.random.default_rng(1).standard_normal((256, 256)), jnp.bfloat16)}
    updates, _ = opt.update(grads, opt.init(params), params)
    moved = np.mean(np.asarray(optax.apply_updates(params, updates)["a_w"] != params["a_w"]))
    assert least <= moved <= most, (rate, moved)


@pytest.mark.parametrize("key, value", [("model.remat_offload", ("mlp",)), ("learner.offload", ("optimizer",))])
def test_offloading_wants_a_host_s_memory(small, monkeypatch, key, value):
  c = config_lib.default()
  c.model.remat, c.mesh.fsdp, c.mesh.data = True, -1, 1
  c.update_from_flattened_dict({key: value})
  p = setup.assemble(c, small.cfg, None, "")
  assert p.step.offload == tuple(c.learner.offload) and p.step.model.remat_offload == tuple(c.model.remat_offload)
  monkeypatch.setattr(setup.sharding, "host_memory", lambda mesh: False)
  with pytest.raises(ValueError, match=rf"config.{key} must be \(\) on a cpu, which has no pinned memory of the host"):
    setup.assemble(c, small.cfg, None, "")


def test_libraries_only_warn(monkeypatch):
  monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "")
  monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS")
  for chatty in ("absl", "jax"):
    monkeypatch.setattr(logging.getLogger(chatty), "level", logging.INFO)
  setup.quiet()
  assert [logging.getLogger(chatty).level for chatty in ("absl", "jax")] == [logging.WARNING] * 2
  assert os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] == "1"
