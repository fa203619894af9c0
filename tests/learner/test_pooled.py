"""How metrics of minibatches become one: by hand, and equal to those of a batch that was not split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax.learner import pooled


def test_each_kind_by_hand():
  one = {"r": pooled.Ratio(1.0, 1.0), "w": pooled.Weighted(0.5, 10.0), "m": pooled.Mean(1.0), "s": pooled.Sum(3.0),
         "x": pooled.Max(-2.0)}
  two = {"r": pooled.Ratio(0.0, 3.0), "w": pooled.Weighted(1.0, 30.0), "m": pooled.Mean(4.0), "s": pooled.Sum(4.0),
         "x": pooled.Max(-5.0)}
  assert pooled.merge([one, two]) == {"r": 0.25, "w": 0.875, "m": 2.5, "s": 7.0, "x": -2.0}
  assert pooled.merge([one]) == {"r": 1.0, "w": 0.5, "m": 1.0, "s": 3.0, "x": -2.0}


def test_nothing_counted_is_nothing():
  """A minibatch without zooms does not lower the share of right zooms."""
  none, some = {"r": pooled.Ratio(0.0, 0.0)}, {"r": pooled.Ratio(2.0, 4.0)}
  assert pooled.merge([none]) == {"r": 0.0} and pooled.merge([none, some]) == {"r": 0.5}
  one = {"r": pooled.Ratio(1.0, 1.0)}  # the only zoom of three minibatches
  assert pooled.merge([none, one, none]) == {"r": 1.0}
  assert pooled.merge([{"w": pooled.Weighted(0.0, 0.0)}]) == {"w": 0.0}


def test_what_is_not_finite_stays_so():
  assert np.isnan(pooled.merge([{"m": pooled.Mean(np.nan)}, {"m": pooled.Mean(1.0)}])["m"])
  assert np.isnan(pooled.merge([{"r": pooled.Ratio(np.nan, 2.0)}])["r"])


@pytest.mark.parametrize("cuts", [(), (1,), (3, 4)])
def test_split_anyhow_a_mean_is_the_whole_one(cuts):
  rng = np.random.default_rng(0)
  x, mask = rng.normal(size=8).astype(np.float32), rng.random(8) < 0.6
  of = jax.jit(lambda x, m: {"mean": pooled.mean_of(x, m), "known": pooled.Weighted(
      jnp.where(m, x, 0).sum() / jnp.maximum(m.sum(), 1), m.sum())})
  parts = [of(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(np.split(x, cuts), np.split(mask, cuts))]
  got = pooled.merge(parts)
  np.testing.assert_allclose([got["mean"], got["known"]], x[mask].mean(), rtol=1e-6)


def test_another_kind_is_refused():
  with pytest.raises(ValueError, match="must be a Ratio, Weighted, Mean, Sum or Max. Received: 3"):
    pooled.merge([{"x": 3.0}])
