"""Every item once an epoch, whatever the batch size, and nothing but (seed, step) matters."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from virl_jax.data import order


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 70))
def test_every_epoch_is_a_permutation(seed, n_items, batch):
  steps = -(-3 * n_items // batch)
  walked = np.concatenate([order.batch_indices(seed, step, n_items, batch) for step in range(steps)])
  assert walked.dtype == np.int64 and len(walked) == steps * batch
  for epoch in range(3):
    assert sorted(walked[epoch * n_items:(epoch + 1) * n_items]) == list(range(n_items))


def test_the_walk_does_not_depend_on_the_batch():
  whole = order.batch_indices(5, 0, 7, 42)
  for batch in (1, 3, 6, 14):
    pieces = [order.batch_indices(5, step, 7, batch) for step in range(42 // batch)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_pure_and_seeded():
  first = order.batch_indices(0, 1000, 50, 8)
  np.random.seed(3)
  order.batch_indices(0, 999, 50, 8)
  np.testing.assert_array_equal(order.batch_indices(0, 1000, 50, 8), first)
  assert (order.batch_indices(1, 1000, 50, 8) != first).any()
  epochs = order.batch_indices(0, 0, 50, 100).reshape(2, 50)
  assert (epochs[0] != epochs[1]).any()


def test_golden():
  # A changed order would change what a resumed run sees.
  assert order.batch_indices(0, 0, 5, 12).tolist() == [2, 4, 3, 0, 1, 1, 4, 3, 0, 2, 4, 2]


def test_a_further_try_is_no_step_of_another_try():
  """Nor a step of another seed: if any two of the three numbers have the same sum, the orders still differ."""
  walks = {(seed, attempt): order.batch_indices(seed, 0, 64, 64 * 40, attempt).reshape(40, 64).tolist()
           for seed in (0, 1, 2) for attempt in (0, 1, 2)}
  epochs = [tuple(epoch) for walk in walks.values() for epoch in walk]
  assert len(set(epochs)) == len(epochs) == 9 * 40


def test_a_seed_of_more_than_a_word_is_refused():
  with pytest.raises(ValueError, match=r"seed must be below 2\^32. Received: 4294967296"):
    order.batch_indices(2 ** 32, 0, 5, 2)


@pytest.mark.parametrize("name, arguments", [
    ("seed", (-1, 0, 5, 2)), ("step", (0, -1, 5, 2)), ("n_items", (0, 0, 0, 2)), ("batch", (0, 0, 5, 0)),
    ("attempt", (0, 0, 5, 2, -1))])
def test_bad_input_is_named(name, arguments):
  with pytest.raises(ValueError, match=f"{name} must be at least"):
    order.batch_indices(*arguments)
