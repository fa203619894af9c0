"""A recorded conversation as a trajectory: the assistant's turns in our protocol, each zoom carried out again.

Each turn goes through `turns.read` as if it had been sampled, so that a demonstration is a `types.Trajectory` like any
other: the same prompt, the same crops, the same budgets.  What can't be a rollout can't be learned.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from virl_jax import types
from virl_jax.data import answers
from virl_jax.data import images
from virl_jax.data import prompt
from virl_jax.data.recorded import script
from virl_jax.model import patches
from virl_jax.rollout import row as row_lib
from virl_jax.rollout import turns
from virl_jax.rollout.actions import zoom


def replay(policy: turns.Policy, found: script.Script) -> types.Trajectory:
  """A script as a trajectory.

  Args:
    policy: protocol, pixel limits and budgets.
    found: the script; its task has an image.

  Returns:
    The trajectory, with an answer; turns that are learned have log-probabilities, all 0, the others None.

  Raises:
    Unusable: it can't be one; the error says why.
  """
  try:
    picture = images.decode(found.task.image, policy.image.decode_max_pixels)
  except ValueError as e:
    raise script.Unusable("no readable image", e) from e
  try:
    row = turns.begin(policy, dataclasses.replace(found.task, image=picture)).row(0)
  except ValueError as e:
    raise script.Unusable("its prompt is too long", e) from e
  for said in found.said:
    _say(policy, row, said)
  traj = row.traj
  if traj.stop is None:
    raise script.Unusable("no answer")
  answers.grade([traj])
  return traj


def _say(policy: turns.Policy, row: row_lib.Row, said: script.Verbatim | script.Look | script.Answer) -> None:
  """Adds one turn, and what it leads to."""
  traj = row.traj
  if traj.stop is not None:
    raise script.Unusable("it goes on after its answer")
  ids = _ids(policy, row, said)
  if len(ids) > turns.left(policy, row):
    raise script.Unusable("too long", f"a turn of {len(ids)} tokens, where {turns.left(policy, row)} are left")
  row.hear(ids, np.zeros(len(ids), np.float32))
  reply, at = turns.read(policy, row), len(traj.turns) - 1
  turn = traj.turns[at if reply is None else at - 1]
  if turn.error is not None:
    raise script.Unusable("its call can't be carried out" if turn.called else "a turn neither calls nor answers",
                          turn.error)
  if traj.stop == types.StopReason.OVERLONG:
    raise script.Unusable("too long", "no room for what its call brings back")
  if traj.stop == types.StopReason.OUT_OF_ROUNDS:
    raise script.Unusable("more zooms than rollout.max_rounds", policy.rollout.max_rounds)
  if reply is not None:
    row.filled, row.next_pos = reply.start + len(reply.ids), reply.next_pos
  if isinstance(said, script.Verbatim) and not said.learned:
    turn.logp = None


def _ids(policy: turns.Policy, row: row_lib.Row, said: script.Verbatim | script.Look | script.Answer) -> np.ndarray:
  """The tokens of a turn and its end: those that were sampled, if this tokenizer gives them the same text."""
  codec = policy.codec
  if isinstance(said, script.Verbatim):
    ids = np.asarray(said.ids or (), np.int32)
    inside = len(ids) and ids.min() >= 0 and ids.max() < policy.model.text.vocab
    if inside and codec.decode(ids) == said.text and not np.isin(ids, policy.model.banned).any():
      return ids
    text = said.text.removesuffix(prompt.END)
  elif isinstance(said, script.Look):
    text = prompt.call_text(_call(policy, row, said), prompt.plain(said.thought))
  else:
    text = prompt.answer_text(prompt.plain(said.text), prompt.plain(said.thought))
  try:
    return codec.encode(text + prompt.END)
  except ValueError as e:
    raise script.Unusable("a turn holds an image's placeholder", e) from e


def _call(policy: turns.Policy, row: row_lib.Row, look: script.Look) -> dict:
  """The tool call for a look: whole pixels of the image that our policy names, as it was shown."""
  grid, shots = policy.model.vision.grid, row.traj.images
  if look.of >= len(shots):
    raise script.Unusable("its box names an unknown image", f"{look.of}, where there are {len(shots)}")
  base = shots[look.of]
  r, size = base.region, patches.shown_wh(base, grid)
  scale = {"share": (1, 1), "thousandths": (1000, 1000), "shown": size, "original": (r.x2 - r.x1, r.y2 - r.y1)}
  wh = scale[look.frame]
  x1, y1, x2, y2 = look.box
  inside = (max(x1, 0.0), max(y1, 0.0), min(x2, wh[0]), min(y2, wh[1]))
  if x1 >= x2 or y1 >= y2 or inside[0] >= inside[2] or inside[1] >= inside[3]:
    raise script.Unusable("its box is empty, or outside its image", f"{list(look.box)} of {wh[0]:g} x {wh[1]:g}")
  box, named = images.to_original(inside, r, wh), look.of if policy.prompt.zoom_into_crops else 0
  shown = patches.shown_wh(shots[named], grid)
  exact = images.to_shown(box, shots[named].region, shown)
  written = [round(v) for v in exact]
  for low in (0, 1):  # a box thinner than a pixel as shown gets the pixel that it is in
    if written[low] == written[low + 2]:
      written[low] = min(int(exact[low]), shown[low] - 1)
      written[low + 2] = written[low] + 1
  call = zoom.call(tuple(written))
  if named:
    call["arguments"]["target_image"] = named
  return call
