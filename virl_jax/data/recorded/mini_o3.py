"""Mini-o3's cold-start set: `Mini-o3-Coldstart.json`, a list of conversations with <grounding> turns.

    {"images": [path, ...], "conversations": [
       {"from": "system", "value": ...},
       {"from": "human", "value": "<image>\\nWhat colour is the coat?"},
       {"from": "gpt", "value": "<think>..</think><grounding>{\\"bbox_2d\\": [0.1, 0.2, 0.3, 0.4],
                                 \\"source\\": \\"original_image\\"}</grounding>"},
       {"from": "human", "value": "... (Observation 1): <image> ..."},
       {"from": "gpt", "value": "<think>..</think><answer>orange</answer>"}]}

A box is in shares of its source: the original image, or the i-th observation ("observation_i"), which is what the i-th
grounding showed.  A grounding is not always JSON: its keys may lack quotes.
Source: Mini-o3 (arXiv 2509.07969) and its data set, as its public tools read it.
"""

from __future__ import annotations

import re

from virl_jax.data.recorded import chat
from virl_jax.data.recorded import script

_CALL = re.compile(r"<grounding>(.*?)</grounding>", re.DOTALL)
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_BOX = re.compile(rf"""["']?bbox_2d["']?\s*:\s*\[\s*({_NUMBER}(?:\s*,\s*{_NUMBER})*)\s*\]""")
_OF = re.compile(r"""["']?source["']?\s*:\s*["']?(\w+)""")


def is_mine(record: dict) -> bool:
  """Whether a record is a conversation with groundings, or with a system turn that asks for them."""
  turns = record.get("conversations")
  return isinstance(turns, (list, str)) and "grounding>" in str(turns)


def read(record: dict, folder: str, uid: str, frame: str) -> script.Script:
  """A record, as a script.

  Args:
    record: of the file.
    folder: that images' paths are relative to.
    uid: of the task, if the record has no `id`.
    frame: not used: boxes are shares.

  Raises:
    Unusable: it can't be one; the error says why.
  """
  del frame
  turns = chat.messages(record)
  *calls, last = chat.said(turns)
  if _CALL.search(last):
    raise script.Unusable("it ends without an answer")
  ending = chat.answer(last)
  looks = tuple(_look(text) for text in calls)
  chat.seen(turns)
  return script.Script(chat.task(record, turns, folder, uid, ending.text), (*looks, ending))


def _look(text: str) -> script.Look:
  found = _CALL.findall(text)
  if len(found) != 1:
    raise script.Unusable("several calls in a turn" if found else "a turn neither calls nor answers", text[:80])
  box, of = _BOX.search(found[0]), _OF.search(found[0])
  numbers = [float(v) for v in box[1].split(",")] if box else []
  if len(numbers) != 4:
    raise script.Unusable("its box is not four numbers", found[0][:80])
  source = of[1] if of else "original_image"
  image = 0 if source == "original_image" else None
  if image is None:
    name, _, number = source.rpartition("_")
    if name != "observation" or not number.isdigit():
      raise script.Unusable("its box names an unknown image", source)
    image = int(number)
  return script.Look(chat.thought(_CALL.sub(" ", text)), tuple(numbers), "share", image)
