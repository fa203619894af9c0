"""Conversations about an image, for supervised fine-tuning: ShareGPT's `conversations`, OpenAI's `messages`.

    {"conversations": [{"from": "human" | "gpt" | "function_call" | "observation" | "system", "value": ...}],
     "images": [path, ...]}                                           LLaMA-Factory's ShareGPT
    {"messages": [{"role": "user" | "assistant" | "tool" | "system", "content": text or parts}], "images": [...]}

In both, the first user turn is the question, with the image; then assistant turns alternate with what they are shown.
"""

from __future__ import annotations

import json
import os
import re

from virl_jax import types
from virl_jax.data.recorded import script

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "function_call": "assistant",
          "observation": "tool", "tool": "tool", "function": "tool", "system": "system"}
_IMAGE = re.compile(r"\s*<image>\s*")
_THINK = re.compile(r"</?think>")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def messages(record: dict) -> list[tuple[str, str]]:
  """(role, text) of each turn: "system", "user", "assistant" or "tool"; an assistant's calls are in its text, in
  <tool_call> tags.

  Raises:
    Unusable: the record has another layout.
  """
  turns = record.get("conversations", record.get("messages"))
  if isinstance(turns, str):  # parquet files hold it as text
    try:
      turns = json.loads(turns)
    except ValueError as e:
      raise script.Unusable("its conversation is not JSON", e) from e
  if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
    raise script.Unusable("its conversation is no list of turns")
  found: list[tuple[str, str]] = []
  for turn in turns:
    name = turn.get("from", turn.get("role"))
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
      raise script.Unusable("a turn has an unknown speaker", name)
    text = _text(turn.get("value", turn.get("content")))
    if name == "function_call" and "<tool_call>" not in text:
      text = f"<tool_call>\n{text.strip()}\n</tool_call>"
    for call in turn.get("tool_calls") or ():
      function = call.get("function", call) if isinstance(call, dict) else {}
      arguments = function.get("arguments")
      arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
      text += f'<tool_call>\n{{"name": {json.dumps(function.get("name"))}, "arguments": {arguments}}}\n</tool_call>'
    if found and role == "assistant" and found[-1][0] == "assistant":  # a thought, and its call as a separate turn
      found[-1] = role, f"{found[-1][1]}\n{text}"
    else:
      found.append((role, text))
  return found


def _text(content: object) -> str:
  """A turn's text; a part that is an image becomes <image>."""
  if isinstance(content, list):
    parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
    content = "".join("<image>" if str(part.get("type")).startswith("image") else str(part.get("text", ""))
                      for part in parts)
  if content is None:
    return ""
  if not isinstance(content, str):
    raise script.Unusable("a turn is no text", type(content).__name__)
  return content


def task(record: dict, turns: list[tuple[str, str]], folder: str, uid: str, answer: str) -> types.Task:
  """The task that a conversation is about.

  Args:
    record: the image is the first of `images`, or `image`: a path, or {"path": ..., "bytes": ...}.
    turns: what `messages` gave.
    folder: that paths are relative to.
    uid: of the task, if the record has no `id`.
    answer: the accepted answer if the record has none: the one that the conversation ends with.

  Raises:
    Unusable: there is no question, or not one image.
  """
  question = next((text for role, text in turns if role == "user"), "")
  shown = len(_IMAGE.findall(question))
  if shown > 1:
    raise script.Unusable("it is about several images", shown)
  words = _IMAGE.sub("\n", question).strip()
  if not words:
    raise script.Unusable("no question")
  given = record.get("images") or record.get("image")
  given = given[0] if isinstance(given, list) and given else given
  if isinstance(given, dict):
    given = given.get("bytes") or given.get("path")
  if isinstance(given, str) and given:
    image: bytes | str = os.path.join(folder, given)
    if not os.path.isfile(image):
      raise script.Unusable("no image file", given)
  elif isinstance(given, bytes):
    image = given
  else:
    raise script.Unusable("no image")
  truth = next((record[key] for key in ("answer", "solution", "ground_truth") if record.get(key)), answer)
  return types.Task(str(record.get("id", uid)), image, words, (str(truth),), kind="recorded")


def said(turns: list[tuple[str, str]]) -> list[str]:
  """The texts of the assistant's turns.

  Raises:
    Unusable: there are none, or the conversation does not begin with the user and end with the assistant.
  """
  spoken = [role for role, _ in turns if role != "system"]
  if "assistant" not in spoken:
    raise script.Unusable("no assistant turn")
  if spoken[0] != "user" or spoken[-1] != "assistant":
    raise script.Unusable("it does not begin with a question and end with an answer", " ".join(spoken))
  return [text for role, text in turns if role == "assistant"]


def seen(turns: list[tuple[str, str]]) -> None:
  """Makes sure that every call got an image back: then the i-th image that came back is the i-th call's.

  Raises:
    Unusable: what follows an assistant's turn has no image.
  """
  spoken = [turn for turn in turns if turn[0] != "system"]
  for (role, _), (_, told) in zip(spoken, spoken[1:]):
    if role == "assistant" and "<image>" not in told:
      raise script.Unusable("a call showed nothing", told[:80])


def thought(text: str) -> str:
  """The thought that a text is, without tags."""
  return _THINK.sub("", text).strip()


def answer(text: str) -> script.Answer:
  """A last turn: what is in answer tags, or else all that follows the thought.

  Raises:
    Unusable: there is no answer, or several.
  """
  found = _ANSWER.findall(text)
  if len(found) > 1:
    raise script.Unusable("several answers in a turn")
  if found:
    before, after = _ANSWER.split(text)[0], _ANSWER.split(text)[2]
    words, thinks = found[0].strip(), thought(f"{before} {after}")
  else:
    thinks, closed, words = text.rpartition("</think>")
    words, thinks = words.strip(), thought(thinks) if closed else ""
  if not words:
    raise script.Unusable("no answer")
  return script.Answer(thinks, words)
