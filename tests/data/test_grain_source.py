"""Grain reads our sources: in its own order, and in ours."""

import pytest

from tests.data.test_batches import names
from tests.data.test_batches import Source
from virl_jax.data import batches
from virl_jax.data import grain_source


def test_tasks_have_a_length_and_an_index():
  tasks = grain_source.Tasks(Source(5, bad=(3,)))
  assert len(tasks) == 5 and tasks[2].uid == "2" and tasks[2].image.size == (4, 4)
  with pytest.raises(ValueError, match="3: image must be a decodable file"):
    tasks[3]


def test_steps_are_training_s():
  source = Source(10, bad=(3,))
  steps = grain_source.Steps(source, 3, 4, 6)
  assert len(steps) == 6
  for step in (4, 0, 5):
    assert names(steps[step]) == names(batches.train(source, 3, step, 4, 10 ** 6).tasks)


def test_grain_takes_them():
  grain = pytest.importorskip("grain", reason="Grain is not installed: pip install 'virl-jax[grain]'")
  shuffled = grain.MapDataset.source(grain_source.Tasks(Source(12))).shuffle(seed=1)[:12]
  assert sorted(map(int, names(shuffled))) == list(range(12)) and names(shuffled) != sorted(names(shuffled), key=int)
  source = Source(10, bad=(3,))
  steps = grain.MapDataset.source(grain_source.Steps(source, 3, 4, 6)).to_iter_dataset(
      grain.ReadOptions(num_threads=3, prefetch_buffer_size=4))
  assert [names(step) for step in steps] == [names(batches.train(source, 3, step, 4, 10 ** 6).tasks)
                                             for step in range(6)]
