"""What a run keeps of its steps: the stop for what is not finite can be followed."""

import math

import pytest

from virl_jax.run import record


def test_what_is_not_finite_is_named_with_a_way_on(tmp_path):
  record._check_finite({"step": 7, "loss/policy": 0.5}, tmp_path, 2e-4)
  with pytest.raises(SystemExit) as e:
    record._check_finite({"step": 7, "loss/policy": math.nan, "optim/grad_norm": math.inf, "kl": 0.0}, tmp_path, 2e-4)
  said = str(e.value)
  assert said.startswith("error: step 7: loss/policy, optim/grad_norm not finite. ") and "\n" not in said
  assert "--config.optim.learning_rate=0.0001 --resume-with-changes. It goes on from the last checkpoint" in said
