"""Which groups are kept, what is drawn for them, and that nothing changes without further tries."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import lockstep
from virl_jax import types
from virl_jax.learner import state as state_lib
from virl_jax.learner import step as step_lib
from virl_jax.rl import advantage
from virl_jax.rollout import dynamic
from virl_jax.rollout import engine
from virl_jax.rollout import pack

G = 2


@pytest.fixture
def played(monkeypatch):
  """Plays rollouts that return their tasks, G of each; gives what they were asked for."""
  asked = []

  def run(policy, params, tasks, key, group_size):
    asked.append(jax.random.key_data(key).tolist())
    found = [types.Trajectory(t, i * G + g, np.zeros(1, np.int32), answer="x" if "one" in t.uid and g == 0 else None)
             for i, t in enumerate(tasks) for g in range(group_size)]
    return found, engine.Stats(seconds=1.0, sampled_tokens=len(found))

  monkeypatch.setattr(engine, "run", run)
  return asked


def informative(found):
  correct = np.array([t.correct for t in found]).reshape(-1, G)
  return (correct.min(1) != correct.max(1)).repeat(G)


def go(batches, tries, judge=None):
  """uids of the groups that were kept; "one" in a uid makes one of the group right, so that it is informative."""
  drawn = []

  def draw(attempt):
    drawn.append(attempt)
    return [types.Task(uid, b"", "?", ("x",)) for uid in batches[attempt]]

  found, took = dynamic.run(None, None, draw(0), draw, jax.random.key(3), G, tries, informative,
                            judge)
  assert [t.task.uid for t in found[::G]] == [t.task.uid for t in found[1::G]]
  further = took["rollout/further_batches"]
  assert took["time/rollout_tokens_s"] == sum(len(b) * G for b in batches[:further + 1]) / (further + 1)
  assert drawn == list(range(further + 1))
  return [t.task.uid for t in found[::G]], further


class Judge:
  """Finds the second rollouts of some tasks right."""

  def __init__(self, uids):
    self._uids, self.asked = uids, 0

  def __call__(self, wrong):
    self.asked += 1
    return [float(t.task.uid in self._uids and t.index % G == 1) for t in wrong]

  def metrics(self):
    return {"judge/answers": 2.0}


def test_a_judge_has_its_say_before_groups_are_looked_at(played):
  judge = Judge(("a", "one_b"))
  # one_b is right twice, and so not informative.
  assert go(BATCHES, 2, judge)[0] == ["a", "one_f", "one_g"] and judge.asked == 3
  found = dynamic.run(None, None, [types.Task("a", b"", "?", ("x",))], None, jax.random.key(3), G, 0, None, judge)
  assert [t.correct for t in found[0]] == [False, True] and found[1]["judge/answers"] == 2.0


BATCHES = [["a", "one_b", "c"], ["d", "e", "one_f"], ["one_g", "one_h", "i"], ["one_j", "k", "l"]]


@pytest.mark.parametrize("tries, kept, further", [
    (0, ["a", "one_b", "c"], 0),
    (1, ["one_f", "one_b", "c"], 1),   # in the first free place; a group that none replaces stays
    (2, ["one_f", "one_b", "one_g"], 2),
    (3, ["one_f", "one_b", "one_g"], 2)])  # tries that are not needed are not made
def test_informative_groups_are_kept(played, tries, kept, further):
  assert go(BATCHES, tries) == (kept, further)
  assert len({str(k) for k in played}) == len(played)  # each try has its own key
  assert played[0] == jax.random.key_data(jax.random.key(3)).tolist()  # the first, the step's


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("tries", [1, 2])
def test_the_batch_does_not_depend_on_the_number_of_processes(monkeypatch, processes, tries):
  batches = [["a", "one_b", "c", "d", "e", "one_f"], ["g", "one_h", "i", "j", "k", "one_l"], ["m", "one_n", *"opqr"]]
  world = lockstep.Lockstep(monkeypatch, processes)

  def run(policy, params, tasks, key, group_size):
    found = [types.Trajectory(t, i * G + g, np.zeros(1, np.int32), answer="x" if "one" in t.uid and g == 0 else None)
             for i, t in enumerate(tasks) if world.mine(i) for g in range(group_size)]
    return found, engine.Stats(seconds=1.0)

  monkeypatch.setattr(engine, "run", run)
  draw = lambda attempt: [types.Task(uid, b"", "?", ("x",)) for uid in batches[attempt]]
  parts = world.run(lambda _: dynamic.run(None, None, draw(0), draw, jax.random.key(3), G, tries, informative)[0])
  assert [len(part) for part in parts] == [6 * G // processes] * processes
  kept = [parts[i % processes][i // processes * G].task.uid for i in range(6)]
  assert kept == ["one_h", "one_b", "one_l", "one_n" if tries == 2 else "d", "e", "one_f"]
  assert all(part[i].task.uid == part[i + 1].task.uid for part in parts for i in range(0, len(part), G))


def test_an_informative_batch_is_left_alone(played):
  assert go([["one_a", "one_b"], ["one_c", "one_d"]], 5) == (["one_a", "one_b"], 0)


def test_what_is_informative_is_what_the_reward_says(small):
  box, other = types.Box(0, 0, 10, 10), types.Box(20, 20, 30, 30)
  task = types.Task("t", b"", "?", ("x",), (box,))

  def row(correct, *boxes):
    turns = [types.Turn("assistant", np.zeros(2, np.int32), np.zeros(2, np.float32), region=b) for b in boxes]
    return types.Trajectory(task, 0, np.zeros(1, np.int32), turns, [], types.StopReason.ANSWERED, correct=correct)

  rows = [row(True, box), row(True, box), row(True, box), row(True, other), row(False), row(True)]
  def groups(rows=rows, h0=0.4, mask=(), least_spread=0.1, spread_of="total", **kwargs):
    cfg = state_lib.Config(small.cfg, G, reward=state_lib.reward.Config(**kwargs),
                          advantage=advantage.Config(spread_of=spread_of, least_spread=least_spread))
    got = step_lib.informative(pack.boxes(rows, 3), *pack.outcomes(rows), pack.answerable(rows),
                               pack.counted(rows, mask), cfg.judge, jnp.float32(h0)).tolist()
    assert got[::2] == got[1::2]
    return got[::2]

  assert groups() == [False, True, True]
  assert groups(w_answer=0.0, w_fidelity=0.0) == [False, False, False]
  assert groups(spread_of="answer") == [False, False, True]
  assert groups(spread_of="fidelity") == [False, True, False]
  assert groups(least_spread=1.0) == [False, True, False]  # the third's two rows are 1 apart, by the answer
  # A row that is masked from the loss does not make its group informative.
  rows[3].stop = rows[4].stop = types.StopReason.OVERLONG
  assert groups(mask=(types.StopReason.OVERLONG,)) == [False, False, False]
  # The threshold is the step's: a box of IoU 0.5 is a hit at 0.4, and a miss like the other at 0.6.
  half = types.Box(0, 0, 10, 5)
  pair = [row(True, half), row(True, other)]
  assert [groups(pair, h0, lam=0.0) for h0 in (0.4, 0.6)] == [[True], [False]]
  # Without answers, or boxes, there is no such spread.
  free, bare = types.Task("f", b"", "?", (), (box,)), types.Task("b", b"", "?", ("x",))
  pair = [dataclasses.replace(r, task=free, correct=False) for r in (row(False, box), row(False, other))]
  assert groups(pair, spread_of="answer") == [True]
  pair = [dataclasses.replace(r, task=bare) for r in (row(True), row(False))]
  assert groups(pair, spread_of="fidelity") == [True]
