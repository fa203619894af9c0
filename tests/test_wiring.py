"""What train.py passes to which piece: the pieces are stand-ins that note their arguments."""

import types as std_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from virl_jax import config as config_lib
from virl_jax import train
from virl_jax import types
from virl_jax.eval import harness
from virl_jax.learner import pooled
from virl_jax.run import goodput
from virl_jax.run import load
from virl_jax.run import log
from virl_jax.run import loop
from virl_jax.run import pace
from virl_jax.run import sources

STEPS, EPOCHS, MINIBATCHES, PROMPTS, G = 4, 2, 2, 8, 4


def data(key):
  return tuple(jax.random.key_data(key).ravel().tolist())


def uids(tasks):
  return tuple(t.uid for t in tasks)


def finished(task, index=0):
  ids = np.arange(3, dtype=np.int32)
  return types.Trajectory(task, index, ids, [types.Turn("assistant", ids, np.zeros(3, np.float32))],
                          stop=types.StopReason.ANSWERED, answer="", correct=False)


def stage(monkeypatch, failing=()):
  """A run of four steps without a model: its configuration, and what each piece is given, in order.

  Args:
    failing: the updates, counted from 0 over the run, that are not finite.
  """
  c = config_lib.default()
  c.model.path, c.steps, c.seed = "@tiny", STEPS, 3
  c.image.max_pixels = 84 * 84
  c.data.needle.train_size, c.data.needle.test_size, c.eval.tasks = 64, 12, 8
  c.rollout.prompts, c.rollout.group_size, c.rollout.resample = PROMPTS, G, 2
  c.ppo.epochs, c.ppo.minibatches, c.loss.kl_coef = EPOCHS, MINIBATCHES, 0.1
  c.reward.h0, c.reward.h0_start, c.reward.h0_steps = 0.4, 0.2, 2
  c.checkpoint.every, c.log.gallery, c.log.gallery_every, c.log.tensorboard = 2, 0, 0, False
  c.log.peak_flops = 1e9
  c.eval.bootstrap, c.log.bad_batches = 10, 0
  c.optim.skip_above, c.optim.skip_window = 2.0, 2
  seen = std_types.SimpleNamespace(c=c, evaluated=[], rolled=[], further={}, informative=[], scored=[], updates=[],
                                   limits=[], judges=[])

  def rolls(policy, params, tasks, draw, key, group_size, tries, informative, judge):
    seen.judges.append(judge)
    step = len(seen.rolled)
    seen.rolled.append((float(params["marker"]), uids(tasks), data(key), group_size, tries))
    seen.further[step] = [uids(draw(attempt)) for attempt in (1, 2)]
    found = [finished(task, i * G + g) for i, task in enumerate(tasks) for g in range(G)]
    informative(found)
    return found, {"time/rollout_s": 0.0}

  def informative(boxes, answer_B, format_B, answerable_B, row_mask_B, cfg, h0):
    seen.informative.append(float(h0))
    return np.ones(len(answer_B), bool)

  def scores(state, ref_params, batches, cfg, h0, frozen):
    seen.scored.append((float(state.params["marker"]), float(ref_params["marker"]), tuple(batches), float(h0)))
    metrics = {"reward/total": pooled.Mean(jnp.float32(0))}
    return [(std_types.SimpleNamespace(batch=batch), metrics) for batch in batches]

  def update(state, minibatch, cfg, frozen, limit):
    bad = len(seen.updates) in failing
    seen.updates.append(minibatch.batch)
    seen.limits.append(limit)
    params = {"marker": state.params["marker"] + 1 - bad}
    return state.replace(params=params, update=state.update + 1 - bad), {
        "loss/total": pooled.Mean(jnp.float32(jnp.nan if bad else 0)), "optim/grad_norm": pooled.Mean(jnp.float32(3)),
        "optim/skipped": pooled.Sum(jnp.float32(bad)), "optim/spikes": pooled.Sum(jnp.float32(0))}

  def evaluate(policy, params, tasks, key, slots, temperature, cfg, judge):
    seen.judges.append(judge)
    seen.evaluated.append((float(params["marker"]), uids(tasks), data(key)))
    return [harness.Judged(finished(task), (), ()) for task in tasks]

  base = {"marker": jnp.float32(100.0)}
  monkeypatch.setattr(loop.load, "base", lambda hf_dir, dtype, mesh, model, seed: load.Loaded(
      model, base, {}, hf_dir))
  monkeypatch.setattr(train.dynamic, "run", rolls)
  monkeypatch.setattr(train.step_lib, "informative", informative)
  monkeypatch.setattr(train.step_lib, "score", scores)
  monkeypatch.setattr(train.step_lib, "update_step", update)
  monkeypatch.setattr(loop.harness, "run", evaluate)
  monkeypatch.setattr(loop.verdicts, "judge", lambda cfg, workdir: (cfg.model, workdir.name))
  monkeypatch.setattr(train.placement, "place_batch", lambda batch, mesh: batch)
  monkeypatch.setattr(train.sample, "weights", lambda params, cfg, mesh: {"marker": params["marker"] + 0.5})
  monkeypatch.setattr(train.pack, "pack", lambda part, cfg: tuple((t.task.uid, t.index) for t in part))
  monkeypatch.setattr(loop.html, "write", lambda workdir: "report")
  return seen


@pytest.fixture
def played(tmp_path, monkeypatch):
  """Such a run, played to its end."""
  seen = stage(monkeypatch)
  train.train(seen.c, str(tmp_path / "run"))
  return seen


def saves(tmp_path):
  return sorted(int(f.name) for f in (tmp_path / "run" / "checkpoints").iterdir() if f.name.isdigit())


def test_everything_gets_what_it_should(played):
  c = played.c
  names = {split: {t.uid for t in map(sources.load(c, split).task, range(len(sources.load(c, split))))}
           for split in ("train", "test")}
  assert not names["train"] & names["test"]

  # The base before and the trained policy after, on the same tasks of the test split with the same key.
  assert played.judges == [("", "run")] * (2 + STEPS), "evaluations and steps have the same judge"
  (before, asked, key), (after, again, key_again) = played.evaluated
  assert before == 100.5 and after == 100.5 + STEPS * EPOCHS * MINIBATCHES  # in the layout of rollouts
  assert asked == again and key == key_again and len(asked) == 8 and set(asked) <= names["test"]

  # Each step rolls out with the policy as it then is, on its own training tasks, with its own key.
  assert [p for p, *_ in played.rolled] == [100.5 + s * EPOCHS * MINIBATCHES for s in range(STEPS)]
  assert all(set(tasks) <= names["train"] and len(tasks) == PROMPTS for _, tasks, *_ in played.rolled)
  assert len({tasks for _, tasks, *_ in played.rolled}) == STEPS
  root = jax.random.key(c.seed)
  assert [k for *_, k, _, _ in played.rolled] == [data(jax.random.fold_in(root, s)) for s in range(STEPS)]
  assert key not in {k for *_, k, _, _ in played.rolled}
  assert {(g, tries) for *_, g, tries in played.rolled} == {(G, 2)}

  # Resampling draws other tasks, and others in each step.
  drawn = [tasks for tries in played.further.values() for tasks in tries] + [tasks for _, tasks, *_ in played.rolled]
  assert len(set(drawn)) == 3 * STEPS and all(set(tasks) <= names["train"] for tasks in drawn)

  # The threshold is the step's, where groups are judged and where they are scored.
  np.testing.assert_allclose(played.informative, [0.2, 0.3, 0.4, 0.4], rtol=1e-6)
  np.testing.assert_allclose([h0 for *_, h0 in played.scored], [0.2, 0.3, 0.4, 0.4], rtol=1e-6)

  # Scored once a step, all minibatches together, with the policy that rolled out and the base as reference.
  assert [(p, ref) for p, ref, *_ in played.scored] == [(p - 0.5, 100.0) for p, *_ in played.rolled]
  for step, (_, _, batches, _) in enumerate(played.scored):
    rows = [row for batch in batches for row in batch]
    assert len(batches) == MINIBATCHES
    assert sorted(rows) == sorted((uid, i * G + g) for i, uid in enumerate(played.rolled[step][1]) for g in range(G))
    each = EPOCHS * MINIBATCHES
    assert played.updates[step * each:(step + 1) * each] == EPOCHS * list(batches), "every minibatch, every epoch"
    # The limit of gradients follows from the steps before, and is the same in a step's updates.
    assert [(type(v), v) for v in played.limits[step * each:(step + 1) * each]] == each * [
        (np.float32, 6.0 if step else np.inf)]


def test_what_is_left_of_it(played, tmp_path):
  assert saves(tmp_path) == [2, 4]
  assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1 + STEPS


def test_a_run_that_is_stuck_ends_saved_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
  each = EPOCHS * MINIBATCHES
  seen = stage(monkeypatch, failing={1, *range(2 * each, 3 * each)} | {each + 3})  # some, some, all
  seen.c.optim.stop_after = 3
  with pytest.raises(SystemExit, match="^error: 3 steps in a row, from step 0 on,.* delete the checkpoints 0 to 3,"):
    train.train(seen.c, str(tmp_path / "run"))
  assert saves(tmp_path) == [2, 3] and len(seen.evaluated) == 1
  said = capsys.readouterr().out
  assert said.count("skipped: 1 of 4 updates, 1 not finite (loss/total)\n") == 2 and "report: report" in said
  train.train(seen.c, str(tmp_path / "run"))
  assert "going on from step 3\n" in capsys.readouterr().out and saves(tmp_path) == [3, 4]
  assert len(seen.rolled) == STEPS, "no step was done again"
  assert [p for p, *_ in seen.rolled] == [100.5, 103.5, 106.5, 106.5]


def test_what_it_took(played, tmp_path):
  """The pace of each step, and what all time was spent on, in order."""
  for line in log.read(str(tmp_path / "run" / "metrics.jsonl")):
    assert line["tokens/total"] == PROMPTS * G * 6 and line["tokens/context"] == 3.5 and line["patches/total"] == 0
    seconds = sum(line[f"time/{phase}_s"] for phase in pace.PHASES)
    assert line["speed/tokens_s"] == pytest.approx(PROMPTS * G * 6 / seconds)
    assert line["speed/tokens_s_device"] == pytest.approx(line["speed/tokens_s"] / 8)
    assert line["speed/mfu"] > 0 and 0 <= line["speed/goodput"] <= 1 and "memory/device_peak_gib" not in line
  events = goodput.read(str(tmp_path / "run" / "wallclock.jsonl"))
  assert [event["spent"] for event in events] == [
      "stopped", "startup", "evaluation", "startup", *["step"] * STEPS, "checkpoint", "evaluation"]
  assert events[3]["resumed"] == 0 and [event["step"] for event in events[4:-2]] == list(range(STEPS))
  line = log.read(str(tmp_path / "run" / "metrics.jsonl"))[-1]
  assert line["speed/goodput"] == pytest.approx(goodput.share(goodput.split(events[:-2])), abs=1e-9)
