"""A continuous-batching engine: the policy decodes to the end of a turn, the host replies, the policy goes on.

A fixed number of decode slots serves any number of trajectories.  The device decodes a segment of tokens in
all slots that have a turn to write; meanwhile threads read the turns that ended in the segment before, and carry
out their calls; between two segments the replies are appended and freed slots are filled from the queue.  A
prompt is prefilled once for its group.  Sampled tokens are kept exactly as sampled, and depend only on (key,
trajectory, turn): not on slots, neighbours or order.  The order of work does not depend on how fast the threads
are, so that a rollout can be repeated bit for bit.

What a turn leads to is decided by `protocol` (`turns`, except in tests and benchmarks that use another).

Several processes run this in lock-step, each with its own rows and pictures: before each call to the
device they agree on its shape, which is all they need to know about each other.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
import concurrent.futures
import dataclasses
import itertools
import time

import jax
import numpy as np

from virl_jax import shapes
from virl_jax import types
from virl_jax.model import cache as cache_lib
from virl_jax.model import sharding
from virl_jax.rollout import chunks
from virl_jax.rollout import row as row_lib
from virl_jax.rollout import sample
from virl_jax.rollout import turns
from virl_jax.run import hosts
from virl_jax.run import placement
from virl_jax.run import progress


@dataclasses.dataclass
class Stats:
  """What a rollout did.

  Attributes:
    seconds: from start to end.
    idle_s: how many of these the device had nothing to do.
    prompt_tokens, appended_tokens, sampled_tokens: how many were prefilled, appended after turns, sampled.
    steps: decode steps.
    slot_steps: rows decoded, summed over steps; `sampled_tokens` of them gave a token.
    appends: calls that appended prompts or tool turns.
  """

  seconds: float = 0.0
  idle_s: float = 0.0
  prompt_tokens: int = 0
  appended_tokens: int = 0
  sampled_tokens: int = 0
  steps: int = 0
  slot_steps: int = 0
  appends: int = 0

  def metrics(self) -> dict[str, float]:
    """For the log."""
    return {"time/rollout_idle_share": self.idle_s / max(self.seconds, 1e-9),
            "time/rollout_tokens_s": self.sampled_tokens / max(self.seconds, 1e-9),
            "rollout/slot_use": self.sampled_tokens / max(self.slot_steps, 1)}


@dataclasses.dataclass
class _Group:
  """A task, its prompt (a future of `row.Prompt`), and the indexes of those of its rollouts that wait for a slot."""

  task: types.Task
  waiting: collections.deque
  prompt: concurrent.futures.Future | None = None

  @property
  def reply(self) -> row_lib.Reply:
    """The prompt's tokens."""
    return self.prompt.result().reply

  def row(self) -> row_lib.Row:
    """The next rollout, at the end of the prompt."""
    return self.prompt.result().row(self.waiting.popleft())


@dataclasses.dataclass
class _Lane:
  """The slots of one part of the mesh and what waits for them.

  Attributes:
    rows: the row in each slot, or None.
    holds: the group whose prompt each slot's cache begins with, or None.
    queue: groups that are not prefilled yet.
  """

  rows: list[row_lib.Row | None]
  holds: list[_Group | None]
  queue: collections.deque


@dataclasses.dataclass(frozen=True)
class _Restart:
  lane: int
  to: int
  source: int
  tokens: int
  pos: int


def rollout(policy: turns.Policy, params: dict, tasks: list[types.Task], key: jax.Array, group_size: int = 1,
            temperature: float | None = None) -> list[types.Trajectory]:
  """Rolls out every task `group_size` times; see `run`."""
  return run(policy, params, tasks, key, group_size, temperature)[0]


def run(policy: turns.Policy, params: dict, tasks: list[types.Task], key: jax.Array, group_size: int = 1,
        temperature: float | None = None, protocol=turns, seeds: Sequence[int] | None = None
        ) -> tuple[list[types.Trajectory], Stats]:
  """Rolls out every task `group_size` times.

  Args:
    policy: everything but the parameters.
    params: the policy's parameters.
    tasks: prompts, the same on all processes, except that the pictures of other processes' tasks (`hosts.mine`)
      may be missing.  Rollout g of task i has the index i * group_size + g.
    key: of the step.  A trajectory's samples depend on (key, index, turn) and nothing else.
    group_size: G.
    temperature: overrides `policy.rollout.temperature`; 0 is greedy.
    protocol: says what a turn leads to: has `begin`, `left`, `hear` and `read`, like `turns`.
    seeds: int32 for each trajectory, which its samples depend on in place of its index: then the samples of a task do
      not depend on which other tasks are asked.

  Returns:
    The trajectories by index, groups together, each with a stop reason; with several processes, only this
    process's.  And what the rollout took.

  Raises:
    ValueError: if there are no tasks, an image can't be decoded, or a prompt leaves no room to answer.
  """
  if not tasks:
    raise ValueError("tasks must not be empty")
  with concurrent.futures.ThreadPoolExecutor(policy.engine.threads) as pool:
    try:
      return _Loop(policy, params, tasks, key, group_size, temperature, protocol, pool, seeds).run()
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


class _Loop:
  """One rollout in progress."""

  def __init__(self, policy, params, tasks, key, group_size, temperature, protocol, pool, seeds):
    cfg = policy.engine
    self.seeds = range(len(tasks) * group_size) if seeds is None else seeds
    self.policy, self.params, self.key, self.protocol, self.pool = policy, params, key, protocol, pool
    self.temperature = np.float32(policy.rollout.temperature if temperature is None else temperature)
    self.shards, self.n_lanes = sharding.row_shards(policy.mesh), len(placement.row_lanes(policy.mesh))
    self.slots = -(-(cfg.slots or len(tasks) * group_size) // self.shards)
    self.group_size = group_size
    self.lanes = []
    groups_of = [_Group(task, collections.deque(range(i * group_size, (i + 1) * group_size)))
                 for i, task in enumerate(tasks) if hosts.mine(i)]
    for lane in range(self.n_lanes):
      groups = groups_of[lane::self.n_lanes]
      self.lanes.append(_Lane([None] * self.slots, [None] * self.slots, collections.deque(groups)))
    # By lane and slot: turns that are being read, from the last segment and from the one before.
    self.reading: dict[tuple[int, int], concurrent.futures.Future] = {}
    self.read_before: dict[tuple[int, int], concurrent.futures.Future] = {}
    self.done: list[types.Trajectory] = []
    self.stats = Stats()
    self.length = shapes.up(policy.rollout.max_total_tokens, cache_lib.BLOCK)
    self.state = sample.start(policy.model, self.slots * self.shards, self.length, policy.mesh)
    # The few shapes that programs are compiled for.
    self.decode_rows = shapes.row_sizes(self.slots, cfg.decode_ratio)
    self.append_rows = shapes.row_sizes(self.slots, cfg.append_ratio)
    self.prompt_rows = shapes.row_sizes(-(-self.slots // group_size), cfg.append_ratio)
    self.tool_tokens = shapes.token_sizes(cfg.token_steps)

  def run(self) -> tuple[list[types.Trajectory], Stats]:
    began = self.rested = time.perf_counter()
    count = self.group_size * sum(len(lane.queue) for lane in self.lanes)
    with progress.bar(count, "rollouts", "trajectory", shown=count > 1 and hosts.leads()) as bar:
      while self._round():
        bar.update(len(self.done) - bar.n)
    self.stats.seconds = time.perf_counter() - began
    return sorted(self.done, key=lambda t: t.index), self.stats

  # --- one round: replies and prompts are appended, then a segment is decoded --------------------------------

  def _round(self) -> bool:
    ready = self._ready()
    old, prompts, new = self._fill()
    by_size = [[e for e in ready if shapes.least(len(e.reply.ids), self.tool_tokens) == size]
               for size in self.tool_tokens]
    writers = self._writers()
    most = max(collections.Counter(lane for lane, _ in writers).values(), default=0)
    grid = self.policy.model.vision.grid
    # This is all that processes have to know about each other.
    old_moves, new_moves, (running, left, *_), *needs = hosts.agree(np.array([
        _extent(old), _extent(new), (most, self._left(), 0, 0),
        *(chunks.shape(entries, grid) for entries in (prompts, *by_size))])).tolist()
    self._restart(old, *old_moves)
    self._append(prompts, needs[0], prompt=True)
    self._restart(new, *new_moves)
    for entries, need in zip(by_size, needs[1:], strict=True):
      self._append(entries, need, prompt=False)
    if running:
      self._decode(writers, running)
    return bool(running or left)

  def _ready(self) -> list[chunks.Entry]:
    """Replies to turns that have been read; trajectories that have stopped leave their slots.

    Threads have the time of one segment to read a turn; then the loop waits for them, and at once if no other row can
    write.
    """
    taken, self.read_before, self.reading = self.read_before, self.reading, {}
    if not self._writers():
      taken, self.read_before = taken | self.read_before, {}
    entries = []
    for (lane, slot), future in taken.items():
      row, reply = self.lanes[lane].rows[slot], future.result()
      if reply is None:
        self.done.append(row.traj)
        self.lanes[lane].rows[slot] = None
      else:
        row.filled, row.next_pos = reply.start + len(reply.ids), reply.next_pos
        entries.append(chunks.Entry(lane, slot, reply))
    return entries

  def _fill(self) -> tuple[list[_Restart], list[chunks.Entry], list[_Restart]]:
    """What moves into free slots: copies of prompts that some slot holds, new prompts, and copies of these."""
    old, prompts, new = [], [], []
    for number, lane in enumerate(self.lanes):
      ahead = -(-self.slots // self.group_size) + 1
      for group in itertools.islice(lane.queue, ahead):
        group.prompt = group.prompt or self.pool.submit(self.protocol.begin, self.policy, group.task)
      fresh, origin = set(), {}  # in this round: slots with new prompts, and by slot where its copy is from
      for slot in (s for s, row in enumerate(lane.rows) if row is None):
        group = lane.holds[slot]
        source = slot
        if group is None or not group.waiting:
          # Only a slot whose group has no rollouts waiting gets here: the last copy of a needed prompt is never lost.
          source = next((s for s, g in enumerate(lane.holds) if g is not None and g.waiting), None)
          group = None if source is None else lane.holds[source]
          source = origin.get(source, source)
        if group is None:
          if not lane.queue:
            break
          group, source = lane.queue.popleft(), None
          prompts.append(chunks.Entry(number, slot, group.reply))
          fresh.add(slot)
        else:
          origin[slot] = source
          (new if source in fresh else old).append(
              _Restart(number, slot, source, len(group.reply.ids), group.reply.next_pos))
        lane.rows[slot], lane.holds[slot] = group.row(), group
    return old, prompts, new

  def _writers(self) -> list[tuple[int, int]]:
    """Lane and slot of each row that has a turn to write: all but those whose last turn is still being read."""
    return [(number, slot) for number, lane in enumerate(self.lanes) for slot, row in enumerate(lane.rows)
            if row is not None and (number, slot) not in self.reading and (number, slot) not in self.read_before]

  def _left(self) -> int:
    """Number of turns that are being read, plus groups with rollouts in the queue."""
    waits = lambda lane: len(lane.queue) + sum(g is not None and len(g.waiting) > 0 for g in lane.holds)
    return len(self.reading) + len(self.read_before) + sum(map(waits, self.lanes))

  # --- calls to the device ----------------------------------------------------------------------------------

  def _dispatch(self) -> None:
    """To be called before each call to the device: ends its idle time, if it has been idle."""
    if self.rested is not None:
      self.stats.idle_s += time.perf_counter() - self.rested
      self.rested = None

  def _restart(self, moves: list[_Restart], rows: int, tokens: int, *_) -> None:
    if not rows:
      return
    self._dispatch()
    each = shapes.least(rows, self.append_rows)
    arrays = np.zeros((4, self.n_lanes, each), np.int32)
    arrays[0] = self.slots
    used = [0] * self.n_lanes
    for m in moves:
      arrays[:, m.lane, used[m.lane]] = m.to, m.source, m.tokens, m.pos
      used[m.lane] += 1
    width = shapes.least(tokens, (self.length // 4, self.length))
    self.state = sample.restart(self.state, *placement.place_rows(tuple(arrays.reshape(4, -1)), self.policy.mesh),
                                width, mesh=self.policy.mesh)

  def _append(self, entries: list[chunks.Entry], need: tuple[int, ...], prompt: bool) -> None:
    rows, tokens, windows, cells = need
    if not rows:
      return
    self._dispatch()
    tokens = shapes.up(tokens, self.policy.engine.pad_tokens) if prompt else shapes.least(tokens, self.tool_tokens)
    shape = chunks.Shape(shapes.least(rows, self.prompt_rows if prompt else self.append_rows), tokens, windows, cells)
    chunk = chunks.build(entries, shape, self.n_lanes, self.slots, self.policy)
    self.state = sample.append(self.params, self.policy.model, self.state,
                               placement.place_rows(chunk, self.policy.mesh), prompt, mesh=self.policy.mesh)
    self.stats.appends += 1
    added = sum(len(e.reply.ids) for e in entries)
    if prompt:
      self.stats.prompt_tokens += added
    else:
      self.stats.appended_tokens += added

  def _decode(self, writers: list[tuple[int, int]], most: int) -> None:
    """Decodes a segment, and has threads read the turns that ended in it."""
    cfg, policy = self.policy.engine, self.policy
    self._dispatch()
    each = shapes.least(most, self.decode_rows)
    whole = each == self.slots  # then every row is in its place, and the cache is read in slices
    asked, who = np.zeros((5, self.n_lanes, each), np.int32), {}
    asked[4] = self.slots
    used = [0] * self.n_lanes
    for number, slot in writers:
      row, a = self.lanes[number].rows[slot], slot if whole else used[number]
      asked[:, number, a] = self.seeds[row.traj.index], row.turn, row.said, self.protocol.left(policy, row), slot
      used[number] += 1
      who[number * each + a] = number, slot
    asked = asked.reshape(5, -1)
    asked = placement.place_rows(sample.Writers(*asked[:4], None if whole else asked[4]), policy.mesh)
    serve = max(1, int(cfg.serve_share * self.slots * self.shards))
    self.state, *sampled = sample.decode(self.params, policy.model, self.state, asked, self.key, self.temperature,
                                         cfg.segment_tokens, np.int32(serve), policy.rollout.keep,
                                         mesh=policy.mesh)
    tokens_AT, logp_AT, count_A = placement.fetch_rows(sampled)
    self.rested = time.perf_counter()
    steps = int(count_A.max())
    self.stats.steps += steps
    self.stats.slot_steps += steps * len(count_A)
    self.stats.sampled_tokens += int(count_A.sum())
    for a, at in who.items():
      n, row = count_A[a], self.lanes[at[0]].rows[at[1]]
      if self.protocol.hear(policy, row, tokens_AT[a, :n], logp_AT[a, :n]):
        self.reading[at] = self.pool.submit(self.protocol.read, policy, row)


def _extent(moves: list[_Restart]) -> tuple[int, int, int, int]:
  """Most moves in one lane, the longest prompt, and two zeros."""
  most = max(collections.Counter(m.lane for m in moves).values(), default=0)
  return most, max((m.tokens for m in moves), default=0), 0, 0
