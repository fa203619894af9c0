"""Conversations with tool calls in Qwen2.5's own format (Hermes): JSON in <tool_call> tags, or in turns of their own.

`chat` has the record's layout.  The only tool is the zoom, by the name that our policy and DeepEyes have for it, with
`bbox_2d` and perhaps `target_image`.  What its numbers mean differs by data set: pixels of the image file, pixels of
the image as it was shown, shares of its sides, or thousandths of them; the file does not say which, so the user has to.
"""

from __future__ import annotations

import json
import math
import re

from virl_jax.data.recorded import chat
from virl_jax.data.recorded import script

_ZOOM = "image_zoom_in_tool"
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def is_mine(record: dict) -> bool:
  """Whether a record is any conversation."""
  return "conversations" in record or "messages" in record


def read(record: dict, folder: str, uid: str, frame: str) -> script.Script:
  """A record, as a script.

  Args:
    record: of the file.
    folder: that images' paths are relative to.
    uid: of the task, if the record has no `id`.
    frame: how boxes are to be read, one of `script.FRAMES`.

  Raises:
    Unusable: it can't be one; the error says why.
  """
  turns = chat.messages(record)
  *calls, last = chat.said(turns)
  if _CALL.search(last):
    raise script.Unusable("it ends without an answer")
  ending = chat.answer(last)
  looks = tuple(_look(text, frame) for text in calls)
  chat.seen(turns)
  return script.Script(chat.task(record, turns, folder, uid, ending.text), (*looks, ending))


def _look(text: str, frame: str) -> script.Look:
  found = _CALL.findall(text)
  if len(found) != 1:
    raise script.Unusable("several calls in a turn" if found else "a turn neither calls nor answers", text[:80])
  try:
    call = json.loads(found[0])
  except (ValueError, RecursionError) as e:
    raise script.Unusable("its call is not JSON", found[0].strip()[:80]) from e
  name, arguments = (call.get(key) for key in ("name", "arguments")) if isinstance(call, dict) else (None, None)
  if name != _ZOOM:
    raise script.Unusable("an unknown action", name)
  if isinstance(arguments, str):
    try:
      arguments = json.loads(arguments)
    except (ValueError, RecursionError) as e:
      raise script.Unusable("its call is not JSON", arguments[:80]) from e
  arguments = arguments if isinstance(arguments, dict) else {}
  box, image = arguments.get("bbox_2d"), arguments.get("target_image", 0)
  if not (isinstance(box, list) and len(box) == 4 and all(
      isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in box)):
    raise script.Unusable("its box is not four numbers", box)
  if not isinstance(image, int) or isinstance(image, bool) or image < 0:
    raise script.Unusable("its box names an unknown image", image)
  return script.Look(chat.thought(_CALL.sub(" ", text)), tuple(map(float, box)), frame, image)
