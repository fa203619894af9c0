"""Checkpoints: bit for bit, only when due, the newest few, and a clear word about damaged ones."""

import gc
import logging
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax.learner import checkpoint
from virl_jax.learner import step as step_lib
from virl_jax.model import sharding

OPTIM = step_lib.OptimConfig()


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
  """Orbax logs at length, and drops its half-done reads when one fails, for which Python scolds it."""
  logging.getLogger("absl").setLevel(logging.ERROR)
  monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
  yield
  gc.collect()


def make_state(seed=0, update=3, sharding=None, critic_width=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jax.device_put(rng.standard_normal(shape, np.float32), sharding)
  params = {"a_w": draw(8, 4), "inner": {"b_b": draw(8), "half_w": draw(8, 8).astype(jnp.bfloat16)}}
  state = step_lib.init_state(params, OPTIM, 0.1 * update, critic_width)
  filled = lambda tree: jax.tree.map(lambda a: a + (1 if a.dtype == jnp.int32 else 0.1), tree)
  return state.replace(update=jnp.int32(update), opt_state=filled(state.opt_state), critic=filled(state.critic),
                       critic_opt_state=filled(state.critic_opt_state))


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
  jax.tree.map(lambda x, y: np.testing.assert_equal((x.dtype, x.sharding), (y.dtype, y.sharding)), a, b)


@pytest.mark.parametrize("critic_width", [0, 5])
def test_a_state_comes_back_bit_for_bit(tmp_path, critic_width):
  state = make_state(critic_width=critic_width)
  saves = checkpoint.Checkpoints(tmp_path / "new" / "checkpoints", 2, 2)
  assert saves.latest() is None and saves.maybe_save(4, state)
  saves.close()
  again = checkpoint.Checkpoints(tmp_path / "new" / "checkpoints", 2, 2)
  assert again.latest() == 4
  found = again.restore(4, make_state(seed=1, update=0, critic_width=critic_width))
  same(found, state)
  assert type(found) is step_lib.TrainState and int(found.update) == 3
  again.close()


def test_a_sharded_state_comes_back_sharded(tmp_path):
  mesh = sharding.make()
  state = make_state(sharding=sharding.rows(mesh))
  saves = checkpoint.Checkpoints(tmp_path, 1, 1)
  saves.maybe_save(1, state)
  same(saves.restore(1, make_state(seed=1, sharding=sharding.rows(mesh))), state)
  # Or placed otherwise, on however many devices there are now.
  other = sharding.make(devices=jax.devices()[:2])
  placed = saves.restore(1, make_state(seed=1, sharding=sharding.replicated(other)))
  jax.tree.map(np.testing.assert_array_equal, placed, state)
  assert placed.params["a_w"].sharding.device_set == set(jax.devices()[:2])
  saves.close()


def test_only_due_steps_are_saved_and_the_newest_are_kept(tmp_path):
  saves, state = checkpoint.Checkpoints(tmp_path, 3, 2), make_state()
  saved = [step for step in range(1, 11) if saves.maybe_save(step, state)]
  assert saved == [3, 6, 9]
  assert not saves.maybe_save(9, state) and not saves.maybe_save(9, state, last=True)  # it is there already
  assert saves.maybe_save(10, state, last=True) and saves.latest() == 10
  saves.wait()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "9"]
  saves.close()


def test_a_step_that_is_donated_after_its_save_is_saved_as_it_was(tmp_path):
  """Saving goes on in the background while training overwrites the state."""
  state, want = make_state(), make_state()
  saves = checkpoint.Checkpoints(tmp_path, 1, 1)
  saves.maybe_save(1, state)
  state = jax.jit(lambda s: jax.tree.map(lambda a: a * 0, s), donate_argnums=0)(state)
  saves.wait()
  jax.tree.map(np.testing.assert_array_equal, saves.restore(1, make_state(seed=1)), want)
  saves.close()


def damage(kind, folder):
  files = sorted(p for p in folder.rglob("*") if p.is_file())
  if kind == "gone":
    shutil.rmtree(folder / "default")
  elif kind == "emptied":
    for p in files:
      p.write_bytes(b"")
  else:  # cut: the largest file loses its second half
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:largest.stat().st_size // 2])


@pytest.mark.parametrize("kind", ["gone", "emptied", "cut"])
def test_a_damaged_checkpoint_is_named(tmp_path, kind):
  saves = checkpoint.Checkpoints(tmp_path, 1, 2)
  for step in (1, 2):
    saves.maybe_save(step, make_state(seed=step))
  saves.close()
  damage(kind, tmp_path / "2")
  saves = checkpoint.Checkpoints(tmp_path, 1, 2)
  assert saves.latest() == 2
  with pytest.raises(ValueError, match=f"(?s)checkpoint 2 in {tmp_path} does not fit.*damaged.*Delete that step"):
    saves.restore(2, make_state())
  saves.close()
  shutil.rmtree(tmp_path / "2")  # as it says
  saves = checkpoint.Checkpoints(tmp_path, 1, 2)
  same(saves.restore(saves.latest(), make_state()), make_state(seed=1))
  saves.close()


def test_a_checkpoint_of_another_model_is_named(tmp_path):
  saves = checkpoint.Checkpoints(tmp_path, 1, 1)
  saves.maybe_save(1, make_state())
  saves.wait()
  wider = step_lib.init_state({"a_w": jnp.ones((8, 5)), "inner": {"b_b": jnp.ones(8), "half_w": jnp.ones((8, 8))}},
                              OPTIM)
  longer = step_lib.init_state({"a_w": jnp.ones((8, 4)), "new_w": jnp.ones(3)}, OPTIM)
  for other in (wider, longer):
    with pytest.raises(ValueError, match=f"(?s)checkpoint 1 in {tmp_path} does not fit this model"):
      saves.restore(1, other)
  with pytest.raises(ValueError, match="checkpoint 7"):
    saves.restore(7, make_state())
  saves.close()


def test_what_a_killed_save_leaves_behind_does_not_count(tmp_path):
  saves = checkpoint.Checkpoints(tmp_path, 1, 5)
  saves.maybe_save(1, make_state())
  saves.close()
  shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
  saves = checkpoint.Checkpoints(tmp_path, 1, 5)
  assert saves.latest() == 1
  assert saves.maybe_save(2, make_state(seed=2)) and saves.latest() == 2
  saves.wait()
  same(saves.restore(2, make_state()), make_state(seed=2))
  saves.close()
