"""Checkpoints: bit for bit, only when due, the newest few, and a clear word about damaged ones."""

import dataclasses
import gc
import json
import logging
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax.learner import checkpoint
from virl_jax.learner import optim
from virl_jax.learner import state as state_lib
from virl_jax.model import params as params_lib
from virl_jax.model import sharding

OPTIM = optim.OptimConfig()


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
  state = state_lib.init(params, OPTIM, 0.1 * update, critic_width)
  filled = lambda tree: jax.tree.map(lambda a: a + (1 if a.dtype == jnp.int32 else 0.1), tree)
  return state.replace(update=jnp.int32(update), opt_state=filled(state.opt_state), critic=filled(state.critic),
                       critic_opt_state=filled(state.critic_opt_state))


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
  jax.tree.map(lambda x, y: np.testing.assert_equal((x.dtype, x.sharding), (y.dtype, y.sharding)), a, b)


def test_what_takes_long_is_said(tmp_path, monkeypatch, capsys):
  """Of a large state, and of no small one; its size is that of all its leaves."""
  saves = checkpoint.Checkpoints(tmp_path, 1, 3)
  saves.maybe_save(1, make_state(1))
  saves.resume(make_state())
  assert not capsys.readouterr().out
  monkeypatch.setattr(checkpoint, "_TOLD_BYTES", 1)
  state = make_state(2)
  gib = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state)) / 2 ** 30
  monkeypatch.setattr(saves._manager, "is_saving_in_progress", lambda: True)
  saves.maybe_save(2, state)
  capsys.readouterr()
  saves.wait()
  assert capsys.readouterr().out.splitlines() == [f"saving step 2 ({gib:.2f} GiB)", "saving step 2: 0 s"]
  monkeypatch.undo()
  monkeypatch.setattr(checkpoint, "_TOLD_BYTES", 1)
  same(saves.resume(make_state())[1], state)
  assert capsys.readouterr().out.splitlines() == [f"restoring step 2 ({gib:.2f} GiB)", "restoring step 2: 0 s"]
  saves.close()
  assert not capsys.readouterr().out, "there is nothing to wait for"


def test_the_best_is_kept_beside_the_newest(tmp_path):
  """Whoever asks for it later, and though a worse one is newer."""
  saves = checkpoint.Checkpoints(tmp_path, 1, 2, best=True)
  for step, score in enumerate((0.1, 0.9, None, 0.3, 0.2), start=1):
    assert saves.maybe_save(step, make_state(step), score=score)
  saves.wait()
  assert saves.steps() == [2, 4, 5] and saves.best() == 2 and saves.latest() == 5
  saves.close()
  again = checkpoint.Checkpoints(tmp_path, 1, 2, best=True)
  assert again.best() == 2
  step, state = again.resume(make_state())
  assert step == 5, "a run goes on from the newest"
  same(state, make_state(5))
  again.maybe_save(6, make_state(6), score=1.0)
  again.wait()
  assert again.steps() == [5, 6] and again.best() == 6
  again.close()
  plain = checkpoint.Checkpoints(tmp_path / "plain", 1, 1)
  plain.maybe_save(1, make_state())
  plain.wait()
  assert plain.best() is None
  plain.close()


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
  assert type(found) is state_lib.TrainState and int(found.update) == 3
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


def recipe_state(seed, kind="adamw", offload=()):
  """A state on a mesh, its moments drawn."""
  mesh, rng = sharding.make(1, 4, 2), np.random.default_rng(seed)
  where = {"blocks": {"q_w": sharding.rows(mesh, 1), "q_b": sharding.replicated(mesh)}}
  shapes = {"blocks": {"q_w": (2, 128, 256), "q_b": (2, 256)}}
  spec = params_lib.ParamSpec((2, 128, 256), ("layers", "embed", None), "normal", "q.{layer}", (256, 128), (1, 0))
  draw = lambda shape, s: jax.device_put(rng.standard_normal(shape, np.float32), s)
  params = jax.tree.map(draw, shapes, where, is_leaf=lambda x: isinstance(x, tuple))
  state = state_lib.init(params, dataclasses.replace(OPTIM, kind=kind), offload=offload,
                              specs={"blocks": {"q_w": spec}})
  return state.replace(opt_state=jax.tree.map(lambda a: draw(a.shape, a.sharding) if a.ndim else a, state.opt_state))


@pytest.mark.parametrize("kind", optim.KINDS)
@pytest.mark.parametrize("offload", [(), ("optimizer",)])
def test_every_recipe_comes_back_where_it_was(tmp_path, kind, offload):
  state = recipe_state(0, kind, offload)
  kinds = {a.sharding.memory_kind for a in jax.tree.leaves(state.opt_state)}
  assert ("pinned_host" in kinds) == bool(offload)
  saves = checkpoint.Checkpoints(tmp_path, 1, 1)
  saves.maybe_save(1, state)
  same(saves.restore(1, recipe_state(1, kind, offload)), state)
  # Offloading is no part of what was saved: a run may go on without, or with.
  other = recipe_state(1, kind, () if offload else ("optimizer",))
  found = saves.restore(1, other)
  jax.tree.map(np.testing.assert_array_equal, found, state)
  jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding.memory_kind, b.sharding.memory_kind), found, other)
  saves.close()


def test_another_optimizer_s_checkpoint_is_named(tmp_path):
  saves = checkpoint.Checkpoints(tmp_path, 1, 1)
  saves.maybe_save(1, recipe_state(0, "adamw"))
  for kind in ("adafactor", "muon"):
    with pytest.raises(ValueError, match="(?s)does not fit this model and optimizer"):
      saves.restore(1, recipe_state(1, kind))
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
  else:
    largest = max(files, key=lambda p: p.stat().st_size)
    content = largest.read_bytes()
    half = len(content) // 2
    largest.write_bytes(content[:half] + (bytes(255 - b for b in content[half:half + 64]) + content[half + 64:]
                                          if kind == "inverted" else b""))


def two(folder, **kwargs):
  """A folder with two checkpoints, and of each the state."""
  saves, states = checkpoint.Checkpoints(folder, 1, 2), {step: make_state(seed=step) for step in (1, 2)}
  for step, state in states.items():
    saves.maybe_save(step, state)
  saves.close()
  return states


@pytest.mark.parametrize("kind", ["gone", "emptied", "cut", "inverted"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, kind, capsys):
  folder = tmp_path / "checkpoints"
  states = two(folder)
  damage(kind, folder / "2")
  saves = checkpoint.Checkpoints(folder, 1, 2)
  assert saves.latest() == 2
  with pytest.raises(checkpoint.Damaged, match=f"^checkpoint 2 in {folder} is damaged: "):
    saves.restore(2, make_state())
  with pytest.raises(checkpoint.Damaged, match=f"^checkpoint 2 in {folder} is damaged: "):
    saves.restore_params(2, make_state().params)
  assert saves.newest(lambda step: saves.restore(step, make_state()))[0] == 1
  assert saves.steps() == [1, 2], "it only reads"
  capsys.readouterr()
  step, state = saves.resume(make_state())
  assert step == 1
  same(state, states[1])
  said = capsys.readouterr().out.splitlines()
  assert said[0].startswith(f"WARNING: checkpoint 2 in {folder} is damaged: ")
  assert said[1:] == ["WARNING: checkpoint 1, the one before, is used instead", f"put aside: {folder}_damaged/2"]
  # The step is done again, and saved again.
  assert (tmp_path / "checkpoints_damaged" / "2").is_dir() and saves.steps() == [1] and saves.latest() == 1
  assert saves.maybe_save(2, states[2])
  saves.wait()
  step, state = saves.resume(make_state())
  assert step == 2
  same(state, states[2])
  saves.close()


def test_if_all_are_damaged_nothing_is_made_up(tmp_path):
  two(tmp_path)
  for step in "12":
    damage("inverted", tmp_path / step)
  saves = checkpoint.Checkpoints(tmp_path, 1, 2)
  with pytest.raises(ValueError, match=f"none of the checkpoints can be used: checkpoint 2 in .* is damaged.*another "
                                       f"--workdir, or delete {tmp_path} to begin again"):
    saves.resume(make_state())
  assert saves.steps() == [1, 2], "and nothing is put aside"
  saves.close()


def test_every_checkpoint_has_its_checksums_before_it_has_its_name(tmp_path, monkeypatch):
  named, seal = [], checkpoint.Checkpoints._seal
  monkeypatch.setattr(checkpoint.Checkpoints, "_seal",
                      lambda self: (named.append((tmp_path / str(self._saving)).exists()), seal(self)))
  two(tmp_path)
  assert named == [False, False]
  sums = json.loads((tmp_path / "1" / "checksums.json").read_text())
  assert sums.keys() == {p.relative_to(tmp_path / "1").as_posix() for p in (tmp_path / "1" / "default").rglob("*")
                         if p.is_file()}


def test_a_checkpoint_of_before_the_checksums_is_taken_at_its_word(tmp_path, capsys):
  states = two(tmp_path)
  (tmp_path / "2" / "checksums.json").unlink()
  saves = checkpoint.Checkpoints(tmp_path, 1, 2)
  step, state = saves.resume(make_state())
  assert step == 2 and "without checksums: whether it is whole is not known" in capsys.readouterr().out
  same(state, states[2])
  damage("cut", tmp_path / "2")  # Orbax sees that
  step, state = saves.resume(make_state())
  assert step == 1 and "does not fit this model and optimizer, or is damaged" in capsys.readouterr().out
  saves.close()


def test_without_a_rhythm_only_the_last_is_saved(tmp_path):
  saves = checkpoint.Checkpoints(tmp_path, 0, 2)
  assert not any(saves.maybe_save(step, make_state()) for step in range(5)) and saves.maybe_save(5, make_state(), True)
  saves.close()


def test_a_checkpoint_of_another_model_is_named(tmp_path):
  saves = checkpoint.Checkpoints(tmp_path, 1, 1)
  saves.maybe_save(1, make_state())
  saves.wait()
  wider = state_lib.init({"a_w": jnp.ones((8, 5)), "inner": {"b_b": jnp.ones(8), "half_w": jnp.ones((8, 8))}},
                              OPTIM)
  longer = state_lib.init({"a_w": jnp.ones((8, 4)), "new_w": jnp.ones(3)}, OPTIM)
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


def test_in_a_bucket_checkpoints_are_kept_verified_and_put_aside(bucket, capsys):
  """The same as on a disk, with Orbax and TensorStore as they are."""
  folder, states = "gs://my-bucket/run/checkpoints", two("gs://my-bucket/run/checkpoints")
  kept = bucket.files("run/checkpoints")
  sums = json.loads(kept["2/checksums.json"])
  assert sums.keys() == {name.removeprefix("2/") for name in kept if name.startswith("2/default/")} and sums
  saves = checkpoint.Checkpoints(folder, 1, 2)
  assert saves.steps() == [1, 2]
  same(saves.restore(2, make_state()), states[2])
  other = checkpoint.Checkpoints(folder, 1, 2)
  jax.tree.map(np.testing.assert_array_equal, other.restore_params(2, make_state().params), states[2].params)
  other.close()
  largest = max((name for name in kept if name.startswith("2/default/")), key=lambda name: len(kept[name]))
  bucket.put(f"run/checkpoints/{largest}", bytes(255 - b for b in kept[largest]))
  capsys.readouterr()
  step, state = saves.resume(make_state())
  assert step == 1 and saves.steps() == [1]
  same(state, states[1])
  said = capsys.readouterr().out.splitlines()
  assert said[0] == f"WARNING: checkpoint 2 in {folder} is damaged: {largest[2:]} is not what was written"
  assert said[1:] == ["WARNING: checkpoint 1, the one before, is used instead", f"put aside: {folder}_damaged/2"]
  assert set(bucket.files("run/checkpoints_damaged")) == {name for name in kept if name.startswith("2/")}
  for step in (2, 3):
    assert saves.maybe_save(step, states[2])
  saves.wait()
  same(saves.restore(3, make_state()), states[2])
  assert saves.steps() == [2, 3] and not any(name.startswith("1/") for name in bucket.files("run/checkpoints"))
  saves.close()


@pytest.mark.parametrize("gone", [pytest.param("commit_success.txt", marks=pytest.mark.slow), "checksums.json"])
def test_in_a_bucket_what_a_killed_save_leaves_behind_does_not_count(bucket, gone):
  """Nothing can be renamed there: what is being written has its name already, but is not said to be whole."""
  folder, _ = "gs://my-bucket/run/checkpoints", two("gs://my-bucket/run/checkpoints")
  del bucket.objects["run/checkpoints/2/commit_success.txt"]
  bucket.objects.pop(f"run/checkpoints/2/{gone}", None)
  saves = checkpoint.Checkpoints(folder, 1, 5)
  assert saves.steps() == [1] and saves.latest() == 1
  step, _ = saves.resume(make_state())
  assert step == 1
  assert saves.maybe_save(2, make_state(seed=5))
  saves.wait()
  assert saves.steps() == [1, 2]
  same(saves.restore(2, make_state()), make_state(seed=5))
  saves.close()


def test_in_a_bucket_checksums_come_before_a_checkpoint_counts(bucket, monkeypatch):
  whole, seal = [], checkpoint.Checkpoints._seal
  monkeypatch.setattr(checkpoint.Checkpoints, "_seal", lambda self: (whole.append(
      f"run/checkpoints/{self._saving}/commit_success.txt" in bucket.objects), seal(self)))
  two("gs://my-bucket/run/checkpoints")
  assert whole == [False, False]
