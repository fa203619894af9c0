"""What a run keeps of its steps: metrics that are not finite end it with advice, and skipped updates don't end it."""

import json
import math

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from virl_jax import config as config_lib
from virl_jax import types
from virl_jax.learner import pooled
from virl_jax.model import patches
from virl_jax.model.qwen2_5 import config as qwen
from virl_jax.report import html
from virl_jax.rollout import pack
from virl_jax.run import bad
from virl_jax.run import goodput
from virl_jax.run import log
from virl_jax.run import pace
from virl_jax.run import record


def test_what_is_not_finite_is_named_with_a_way_on(tmp_path):
  record._check_finite({"step": 7, "loss/policy": 0.5}, tmp_path, 2e-4)
  with pytest.raises(SystemExit) as e:
    record._check_finite({"step": 7, "loss/policy": math.nan, "optim/grad_norm": math.inf, "kl": 0.0}, tmp_path, 2e-4)
  said = str(e.value)
  assert said.startswith("error: step 7: loss/policy, optim/grad_norm not finite. ") and "\n" not in said
  assert "--config.optim.learning_rate=0.0001 --resume-with-changes. It continues from the last checkpoint" in said


def part(group, size=2):
  """A minibatch's trajectories, and their scores."""
  task = types.Task(f"task {group}", Image.new("RGB", (60, 40)), "?", ("x",))
  ids = np.arange(5, dtype=np.int32)
  found = [types.Trajectory(task, i, ids[:2], [types.Turn("assistant", ids, np.zeros(5, np.float32), "<answer>")],
                            stop=types.StopReason.ANSWERED, answer="", correct=False) for i in range(size)]
  batch = pack.pack(found, pack.Config(patches.Grid(), 99, max_rounds=2, pad_tokens=8))
  zeros = lambda *shape: jnp.zeros((size, *shape))
  T = batch.tokens_BT.shape[1]
  return found, types.ScoredBatch(batch, None, None, zeros(T), zeros(2), zeros(2).astype(jnp.int32), zeros(2),
                                  zeros() + group, zeros())


def update(loss=1.0, norm=2.0, skipped=0, spikes=0):
  return {"loss/total": pooled.Mean(jnp.float32(loss)), "optim/grad_norm": pooled.Mean(jnp.float32(norm)),
          "optim/skipped": pooled.Sum(jnp.float32(skipped)), "optim/spikes": pooled.Sum(jnp.float32(spikes))}


FAILED = update(np.nan, np.nan, 1)


@pytest.fixture
def run(tmp_path):
  """Records steps of two minibatches, each given as its updates; each call is a new process."""
  c = config_lib.default()
  c.log.tensorboard, c.log.gallery_every, c.log.bad_batches = False, 0, 2
  c.optim.skip_above, c.optim.skip_window, c.optim.learning_rate = 4.0, 4, 2e-4

  def steps(start, *updates, reward=1.0):
    recorder = record.Recorder(tmp_path, c, start, {"config": {}}, pace.Learner(qwen.SIZES["3b"], 3.0, 3.0, 8, None),
                               goodput.Clock(None, 0.0))
    limits = []
    for step, those in enumerate(updates, start):
      trajectories, scored = zip(part(0), part(1))
      limits.append(float(recorder.limit))
      recorder.begin()
      recorder.step(step, trajectories, scored, ([{"reward/total": pooled.Mean(reward)}] * 2, those), {})
    return recorder, limits

  return steps, tmp_path, c


def test_what_training_made_of_each_token():
  """Advantage, modulator and gap of tokens come from the batch's rows, in whatever order these are."""
  found, scored = part(0)
  T = scored.advantage_BT.shape[1]
  action_BT = np.full((2, T), -1)
  action_BT[1, 3], action_BT[1, 4:6] = 0, 1
  scored = scored.replace(
      advantage_BT=jnp.arange(2 * T, dtype=jnp.float32).reshape(2, T), modulator_BR=jnp.float32([[2, 3], [4, 5]]),
      logp_old_BT=jnp.full((2, T), 0.5), batch=scored.batch.replace(action_BT=action_BT, order_B=np.int32([1, 0])))
  first, second = record.entries(found, scored, (0, 1), lambda ids: " ".join(map(str, ids)))
  tokens = first["turns"][0]["tokens"]
  assert tokens["text"] == ["0", "1", "2", "3", "4"] and (tokens["logp"], tokens["gap"]) == (0.0, 0.5)
  assert tokens["advantage"] == [T + 2, T + 3, T + 4, T + 5, T + 6] and tokens["modulator"] == [1, 4, 5, 5, 1]
  assert second["turns"][0]["tokens"]["modulator"] == 1.0 and second["turns"][0]["tokens"]["advantage"][0] == 2
  assert "tokens" not in record.entries(found, scored, (0,))[0]["turns"][0]
  alone = record.entries(found, scored.replace(logp_old_BT=None), (0,), lambda ids: "x")[0]["turns"][0]["tokens"]
  assert "gap" not in alone and "advantage" in alone


def test_a_skipped_update_is_said_kept_and_no_end(run, capsys):
  steps, folder, _ = run
  recorder, _ = steps(0, [update(), update()], [update(), FAILED], [update(), update()])
  assert recorder.stuck is None and recorder.last["optim/skipped"] == 0
  lines = [text for text in capsys.readouterr().out.splitlines() if not text.startswith("step ")]
  assert lines == [f"skipped: 1 of 2 updates, 1 not finite (loss/total, optim/grad_norm); see {folder}/bad_batches/"
                   "step_000001"]
  _, line, _ = log.read(str(folder / "metrics.jsonl"))
  assert (line["loss/total"], line["optim/skipped"]) == (1.0, 1)
  (at, entries), = [(path, (path / "trajectories.jsonl").read_text().splitlines()) for _, path in bad.kept(folder)]
  assert [json.loads(e)["uid"] for e in entries] == ["task 1"] * 2 and (at / "minibatch_1.npz").is_file()
  assert json.loads(entries[0])["advantage"] == 1.0 and json.loads(entries[0])["image"].startswith("data:image/png")
  html.write(str(folder))
  page = (folder / "report.html").read_text()
  assert '"when":"Skipped, step 1"' in page and "task 1" in page


def test_steps_in_a_row_end_a_run_in_whatever_process(run, capsys):
  steps, folder, c = run
  recorder, _ = steps(0, [update(), update()], [FAILED, update()], [FAILED, FAILED])
  assert recorder.stuck is None and math.isnan(recorder.last["loss/total"])
  recorder, _ = steps(3, [update(), FAILED])
  assert recorder.stuck.startswith("error: 3 steps in a row, from step 1 on,")
  assert [step for step, _ in bad.kept(folder)] == [1, 2], "no more than asked for"
  assert capsys.readouterr().out.count("skipped: ") == 3
  recorder, _ = steps(4, [update(), update()])
  assert recorder.stuck is None
  recorder, _ = steps(2, [update(), update()])  # from an earlier step
  assert recorder.stuck is None
  c.optim.stop_after = 1
  assert steps(3, [update(), FAILED])[0].stuck


def test_what_no_update_was_skipped_for_ends_a_run_at_once(run):
  steps, *_ = run
  steps(0, [FAILED, FAILED], reward=math.nan)
  for updates in ([update(), update()], [update(), update(norm=50.0, skipped=1, spikes=1)]):
    with pytest.raises(SystemExit, match="step 1: reward/total not finite"):
      steps(1, updates, reward=math.nan)


def test_the_limit_follows_from_the_log(run, capsys):
  """A process that goes on has the same limit; a spike's batch is kept, and the median includes its norm."""
  steps, folder, _ = run
  spike = update(norm=100.0, skipped=1, spikes=1)
  history = [[update(norm=n)] * 2 for n in (1.0, 1.5, 2.5, 3.0, 4.0)] + [[update(norm=2.0), spike], [update()] * 2]
  _, whole = steps(0, *history)
  assert whole == [math.inf, math.inf, 5.0, 6.0, 8.0, 11.0, 14.0]
  assert "1 with a gradient longer than 11; see" in capsys.readouterr().out
  assert [line.get("optim/limit") for line in log.read(str(folder / "metrics.jsonl"))] == [
      None if math.isinf(v) else v for v in whole]
  assert steps(3, *history[3:])[1] == whole[3:]
  assert [step for step, _ in bad.kept(folder)] == [5]


def test_boards_get_the_numbers_and_the_kept_trajectories(run, monkeypatch):
  """Pictures of the trajectories kept for the report, at the same step; and what an earlier process logged is known."""
  steps, folder, c = run
  told, opened = [], []

  class Board:
    def write(self, step, line):
      told.append((step, line["reward/total"]))

    def pictures(self, step, pictures):
      told.append((step, [type(p).__name__ for p in pictures]))

    def close(self):
      told.append("closed")

  monkeypatch.setattr(log, "wandb_writer", lambda *how: opened.append(how) or Board())
  c.log.gallery_every, c.log.gallery, c.log.wandb = 2, 3, "p"
  fine = [update(), update()]
  steps(0, fine, fine, fine)
  assert told == [(0, 1.0), (1, 1.0), (2, 1.0), (2, ["Image"] * 2)] and (folder / "rollouts/step_000002.jsonl").exists()
  recorder, _ = steps(1, fine)
  recorder.close()
  assert told[4:] == [(1, 1.0), "closed"]
  assert opened == [(str(folder), "p", 0, {}), (str(folder), "p", 3, {})], "steps 0 to 2 had been logged"
