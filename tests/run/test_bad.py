"""Skipped updates: what a line of the log says, the limit, which batches are kept, and when a run should end."""

import json
import math
import pathlib

import numpy as np
import pytest

from virl_jax import types
from virl_jax.learner import pooled
from virl_jax.report import gallery
from virl_jax.run import bad

NAN = float("nan")


def update(loss=1.0, norm=2.0, skipped=0, spikes=0):
  return {"loss/total": pooled.Mean(loss), "loss/kl": pooled.Weighted(loss, 4.0), "ppo/ratio_max": pooled.Max(loss),
          "optim/grad_norm": pooled.Mean(norm), "optim/skipped": pooled.Sum(skipped),
          "optim/spikes": pooled.Sum(spikes)}


FAILED = update(NAN, NAN, 1)
SPIKE = update(5.0, 80.0, 1, 1)


def line(step, skipped=0.0, spikes=0.0, norm=1.0):
  return {"step": step, "optim/skipped": skipped, "optim/spikes": spikes, "optim/grad_norm": norm}


def scored(B=4, T=6, order=None, **more):
  """A minibatch without a model; rows are dealt as `order` says."""
  zeros = lambda *shape: np.zeros((B, *shape), np.float32)
  valid = np.arange(T)[None] < 4 + np.arange(B)[:, None] % 2
  batch = types.Batch(
      tokens_BT=np.ones((B, T), np.int32), valid_BT=valid, sampled_BT=valid, pos_BXT=np.zeros((B, 3, T), np.int32),
      vision_BT=np.full((B, T), -1, np.int32), logp_sampler_BT=zeros(T), action_BT=np.full((B, T), -1, np.int32),
      box_BR4=zeros(2, 4), box_mask_BR=zeros(2) > 0, gt_BJ4=zeros(1, 4), gt_mask_BJ=zeros(1) > 0, answer_B=zeros(),
      format_B=zeros(), answerable_B=zeros() > 0, row_mask_B=zeros() == 0,
      rows=types.Rows(np.zeros((1, B, T), np.int32), np.full((1, B, 1), T, np.int32), ()),
      order_B=None if order is None else np.array(order, np.int32))
  fields = dict(logp_old_BT=None, logp_ref_BT=None, advantage_BT=zeros(T), iou_BR=zeros(2),
                class_BR=np.zeros((B, 2), np.int32), modulator_BR=zeros(2), advantage_B=zeros(), reward_B=zeros())
  return types.ScoredBatch(batch, **fields | more)


def test_one_of_several_does_not_poison_the_line():
  found = bad.merge([update(1.0), FAILED, update(3.0), SPIKE])
  assert found == {"loss/total": 3.0, "loss/kl": 3.0, "ppo/ratio_max": 5.0, "optim/grad_norm": 28.0, "optim/skipped": 2,
                   "optim/spikes": 1}
  assert bad.failures(found) == 1
  assert bad.merge([update(1.0), update(3.0)]) == pooled.merge([update(1.0), update(3.0)])
  scores = [{"reward/total": pooled.Mean(NAN)}, {"reward/total": pooled.Mean(1.0)}]
  assert math.isnan(bad.merge(scores)["reward/total"]), "no update, and no reason to hide it"


def test_where_none_is_finite_the_line_holds_what_came():
  found = bad.merge([FAILED, FAILED])
  assert math.isnan(found["loss/total"]) and math.isnan(found["optim/grad_norm"]) and found["optim/skipped"] == 2


def test_the_limit_is_so_many_medians_of_steps_that_have_a_norm():
  of = lambda norms, above=3.0, window=8: bad.limit([line(i, norm=n) for i, n in enumerate(norms)], above, window)
  assert of([1, 2, 3, 4]) == 7.5 and of([1, 2, 3, 4]).dtype == np.float32
  assert of([1, 2, 3]) == np.inf and of([1, 2, 3, NAN, 0.0, math.inf]) == np.inf, "too few say anything"
  assert of([100] * 9 + [1] * 8) == 3 and of([1] * 7 + [1000]) == 3
  assert of([1] * 20, above=0.0) == np.inf and bad.limit([], 3.0, 8) == np.inf
  assert bad.limit([{"step": i} for i in range(9)], 3.0, 8) == np.inf, "as older logs are"
  assert np.isfinite(of([3e38] * 8))
  # A larger scale that lasts is followed after half a window, and not before.
  assert of([1] * 5 + [50] * 3) == 3 and of([1] * 3 + [50] * 5) == 150


def test_a_row_of_steps_ends_a_run_with_a_way_on():
  at = pathlib.Path("runs/a")
  good, spiked = line(0), line(1, 1.0, 1.0)
  row = [line(i, 2.0, 1.0) for i in (7, 8, 9)]
  assert bad.advice([good, *row[:2]], 3, 2e-4, at) is None and bad.advice([], 3, 2e-4, at) is None
  assert bad.advice([*row[:2], good, row[2]], 3, 2e-4, at) is None, "not in a row"
  assert bad.advice([spiked] * 5, 3, 2e-4, at) is None, "spikes are no reason"
  assert bad.advice([good, *row], 0, 2e-4, at) is None and bad.advice([good, *row[:1]], 1, 2e-4, at)
  said = bad.advice([good, *row], 3, 2e-4, at)
  assert said.startswith("error: 3 steps in a row, from step 7 on,") and "\n" not in said
  assert "runs/a/bad_batches" in said and "in runs/a/checkpoints delete the checkpoints 7 to 10," in said
  assert "--config.optim.learning_rate=0.0001 --resume-with-changes" in said


def test_what_is_said_of_a_step():
  whole = line(3, 2.0, 1.0) | {"optim/limit": 12.5}
  assert bad.said(whole, [update(), FAILED, SPIKE], pathlib.Path("w/bad_batches/step_000003")) == (
      "skipped: 2 of 3 updates, 1 not finite (loss/kl, loss/total, optim/grad_norm, ppo/ratio_max) and "
      "1 with a gradient longer than 12.5; see w/bad_batches/step_000003")
  assert bad.said(line(3, 1.0), [update(norm=NAN, skipped=1)], None) == (
      "skipped: 1 of 1 updates, 1 not finite (optim/grad_norm)")


def test_a_folder_holds_what_a_person_needs(tmp_path):
  """Only minibatches with a skipped update are kept; trajectories with values that are not finite come first."""
  advantage = np.zeros((4, 6), np.float32)
  advantage[0, 5], advantage[3, 1] = NAN, NAN  # the first is on padding, which does not count
  parts = [scored(), scored(order=[1, 0, 3, 2], advantage_BT=advantage)]
  asked = []

  def entries(i, which):
    asked.append((i, list(which)))
    return [{"uid": f"{i}/{k}"} for k in which]

  updates = [update(), update(), update(), FAILED]
  at = bad.save(tmp_path, 4, line(12, 2.0) | {"loss/total": NAN}, updates, parts, entries)
  assert at == tmp_path / "bad_batches" / "step_000012" and bad.kept(tmp_path) == [(12, at)]
  assert asked == [(1, [2, 0, 1, 3])]  # row 3 is trajectory 2
  assert [e["uid"] for e in gallery.load(str(at / "trajectories.jsonl"))] == ["1/2", "1/0", "1/1", "1/3"]
  told = json.loads((at / "step.json").read_text())
  assert told["line"]["step"] == 12 and told["line"]["loss/total"] == "nan"
  assert [(u["minibatch"], u["epoch"], u["optim/skipped"]) for u in told["updates"]] == [
      (0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 1)]
  assert sorted(p.name for p in at.iterdir()) == ["minibatch_1.npz", "step.json", "trajectories.jsonl"]
  arrays = np.load(at / "minibatch_1.npz")
  np.testing.assert_array_equal(arrays["advantage_BT"], advantage)
  assert {"tokens_BT", "sampled_BT", "logp_sampler_BT", "row_mask_B", "order_B", "index_MUT"} <= set(arrays)
  assert "logp_old_BT" not in arrays and "images" not in arrays


def keep(tmp_path, step, most, failed=True):
  whole, one = (line(step, 1.0), FAILED) if failed else (line(step, 1.0, 1.0), SPIKE)
  return bad.save(tmp_path, most, whole, [one], [scored()], lambda i, which: [{"uid": str(k)} for k in which])


def steps(tmp_path):
  return [step for step, _ in bad.kept(tmp_path)]


def test_the_first_are_kept_and_what_is_not_finite_before_spikes(tmp_path):
  assert keep(tmp_path, 0, 0) is None and steps(tmp_path) == []
  assert keep(tmp_path, 1, 2, failed=False) and keep(tmp_path, 2, 2, failed=False)
  assert keep(tmp_path, 3, 2, failed=False) is None and steps(tmp_path) == [1, 2]
  assert keep(tmp_path, 4, 2) and steps(tmp_path) == [1, 4]
  assert keep(tmp_path, 5, 2) and steps(tmp_path) == [4, 5]
  assert keep(tmp_path, 6, 2) is None and keep(tmp_path, 7, 2, failed=False) is None and steps(tmp_path) == [4, 5]
  (tmp_path / "bad_batches" / "step_000004" / "minibatch_0.npz").unlink()
  assert keep(tmp_path, 4, 2), "a run that was resumed comes to it again"
  assert (tmp_path / "bad_batches" / "step_000004" / "minibatch_0.npz").is_file() and steps(tmp_path) == [4, 5]
  (tmp_path / "bad_batches" / "step_000005" / "step.json").write_text("{")
  assert keep(tmp_path, 8, 2) is None, "whatever that is, it stays"


def test_few_trajectories_are_enough(tmp_path):
  parts = [scored(B=40), scored(B=40)]
  at = bad.save(tmp_path, 1, line(0, 2.0), [FAILED, FAILED], parts, lambda i, which: [{"of": i} for _ in which])
  assert len(gallery.load(str(at / "trajectories.jsonl"))) == 16


@pytest.mark.parametrize("skipped, spikes, failed", [(0, 0, 0), (3, 1, 2), (2, 2, 0)])
def test_failures_are_what_is_no_spike(skipped, spikes, failed):
  assert bad.failures(line(0, float(skipped), float(spikes))) == failed
  assert bad.failures({"step": 0}) == 0
