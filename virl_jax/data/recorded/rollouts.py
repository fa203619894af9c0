"""Our own rollouts, as a workdir keeps them in rollouts/step_*.jsonl (`report.gallery`), and demonstrations like them.

A line has the turns word for word, and the ids that were sampled.  Its picture is the original only if it is small;
otherwise, or if there is none, the original is looked up by the task's uid in the run's own data.  A demonstration may
name an image file instead, relative to its own file, and a turn of it may say `"learned": false`: then the turn is part
of the context but not trained on.
"""

from __future__ import annotations

import base64
import io
import os

from PIL import Image

from virl_jax import types
from virl_jax.data.recorded import script

_PNG = "data:image/png;base64,"  # what was not shrunk is stored without loss


def is_mine(record: dict) -> bool:
  """Whether a record is a line of such a file: it has turns and a uid."""
  return "turns" in record and "uid" in record


def read(record: dict, folder: str, uid: str, frame: str) -> script.Script:
  """A record, as a script.

  Args:
    record: of the file.
    folder: that images' paths are relative to.
    uid: not used: a line has its own.
    frame: not used: boxes are in the turns, in the policy's own frame.

  Raises:
    Unusable: it can't be one; the error says why.
  """
  del uid, frame
  try:
    turns = [turn for turn in record["turns"] if turn["role"] == "assistant"]
    said = tuple(script.Verbatim(turn["text"], tuple(turn["ids"]) if turn.get("ids") else None,
                                 turn.get("learned", True)) for turn in turns)
    options = record["options"]
    task = types.Task(str(record["uid"]), _image(record, folder), record["question"], tuple(record["answers"]),
                      tuple(types.Box(*box) for box in record["boxes_gt"]), None if options is None else tuple(options),
                      record.get("kind") or "")
    reward, correct = record.get("reward"), record.get("correct")
  except (KeyError, TypeError, AttributeError) as e:
    raise script.Unusable("it is no trajectory as a run writes it", f"{type(e).__name__}: {e}") from e
  if not said:
    raise script.Unusable("no assistant turn")
  return script.Script(task, said, None if reward is None else float(reward),
                       None if correct is None else bool(correct), "" if task.image else folder)


def _image(record: dict, folder: str) -> bytes | str:
  """The original picture; "" if it is kept elsewhere."""
  given = record.get("image")
  if not given:
    return ""
  if given.startswith(_PNG):
    found = base64.b64decode(given.removeprefix(_PNG))
    with Image.open(io.BytesIO(found)) as picture:
      return found if picture.size == (record["width"], record["height"]) else ""
  if given.startswith("data:"):
    return ""
  path = os.path.join(folder, given)
  if not os.path.isfile(path):
    raise script.Unusable("no image file", given)
  return path
