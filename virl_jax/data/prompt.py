"""What the policy reads and writes: chat text, tools, and strict parsing of its turns.

The protocol is Qwen2.5's own (Hermes style): a tool call is JSON inside <tool_call> tags, its result
comes back inside <tool_response> tags in a user turn, the final answer is inside <answer> tags.
Text becomes tokens once: the prompt when a trajectory starts, each tool turn when it is appended.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
import re
import threading
from typing import Any

import numpy as np

from virl_jax import checks
from virl_jax.rollout.actions import table

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
END = "<|im_end|>"
# A tool call longer than this is refused unread: no honest call comes near it.
MAX_CALL_CHARS = 2000


@dataclasses.dataclass(frozen=True)
class Config:
  """See `config.py`, section `prompt`."""

  system: str = "You are a helpful assistant."
  describe_tool: bool = True
  image_first: bool = True
  instruction: str = ""
  zoom_into_crops: bool = False
  last_notice: str = "No further zoom is possible. Answer now."

  def __post_init__(self):
    checks.section(vars(self), "prompt", system=checks.text, describe_tool=checks.flag, image_first=checks.flag,
                   instruction=checks.text, zoom_into_crops=checks.flag, last_notice=checks.text)


@dataclasses.dataclass(frozen=True)
class Answer:
  """A final answer."""

  text: str


@dataclasses.dataclass(frozen=True)
class ParseFailure:
  """A turn that is neither a well-formed tool call nor an answer.

  Attributes:
    message: what to tell the policy.
    is_call: whether the turn tried to call a tool: then the policy is told, and can try again.
  """

  message: str
  is_call: bool


def plain(text: str) -> str:
  """Text from outside with control tokens defused: a question can't open a turn or fake an image."""
  return text.replace("<|", "< |")


def question_text(question: str, options: tuple[str, ...] | None, cfg: Config) -> str:
  """The user's words: question, lettered options, instruction."""
  lines = [plain(question.strip())]
  if options:
    lines += [f"{chr(ord('A') + i)}. {plain(option)}" for i, option in enumerate(options)]
    lines.append("Answer with the option's letter.")
  if cfg.instruction:
    lines.append(cfg.instruction)
  return "\n".join(lines)


def render(question: str, options: tuple[str, ...] | None, cfg: Config,
           actions: Mapping[str, Any] = table.ACTIONS) -> str:
  """The whole prompt, ready for the assistant's first word.

  Args:
    question: what is asked.
    options: texts of the options, or None.
    cfg: system text and order.
    actions: the visual actions that the policy may take, by name.

  Returns:
    Chat text with one image placeholder, as the chat template renders it.
  """
  system = cfg.system
  if cfg.describe_tool:
    system += ("\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
               "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
               + "\n".join(json.dumps(action.schema(cfg)) for action in actions.values()) +
               "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
               'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
               "<args-json-object>}\n</tool_call>")
  words = question_text(question, options, cfg)
  user = IMAGE + words if cfg.image_first else words + IMAGE
  return f"<|im_start|>system\n{system}{END}\n<|im_start|>user\n{user}{END}\n<|im_start|>assistant\n"


def tool_turn(error: str | None = None, notice: str = "", image: bool = True, text: str = "") -> str:
  """What follows the assistant's end-of-turn token: an action's result or an error, and the start of the next turn.

  Args:
    error: what was wrong with the call; None if it was carried out.
    notice: a line after it, such as that no further zoom is possible.
    image: whether a picture comes back.
    text: what comes back in words, after the picture.
  """
  parts = ([IMAGE] if image else []) + ([plain(text)] if text else []) if error is None else [f"Error: {plain(error)}."]
  body = "\n".join(parts + ([notice] if notice else []))
  return (f"\n<|im_start|>user\n<tool_response>\n{body}\n</tool_response>{END}\n<|im_start|>assistant\n")


def call_text(call: dict, thought: str = "") -> str:
  """A well-formed assistant turn that calls a tool, {"name": ..., "arguments": ...}, without the end-of-turn token."""
  return f"{_think(thought)}<tool_call>\n{json.dumps(call)}\n</tool_call>"


def answer_text(answer: str, thought: str = "") -> str:
  """A well-formed assistant turn that answers, without the end-of-turn token."""
  return f"{_think(thought)}<answer>{answer}</answer>"


def _think(thought: str) -> str:
  return f"<think>{thought}</think>" if thought else ""


def _no_duplicates(pairs):
  keys = [k for k, _ in pairs]
  if len(set(keys)) != len(keys):
    raise ValueError("a key stands twice")
  return dict(pairs)


def _refuse_constant(name):
  raise ValueError(f"{name} is not a number")


def parse(text: str, actions: Mapping[str, Any] = table.ACTIONS) -> Any | Answer | ParseFailure:
  """Reads one assistant turn.  Never raises and never evaluates anything.

  Args:
    text: the decoded turn, with or without its end-of-turn token.
    actions: the visual actions that the policy may take, by name.

  Returns:
    An action's arguments (such as `zoom.Zoom`) if the turn holds exactly one well-formed tool call and no answer, an
    `Answer` if it holds exactly one answer and no call, else a `ParseFailure` that says why.
  """
  calls, answers = text.count("<tool_call>"), text.count("<answer>")
  if calls and answers:
    return ParseFailure("a tool call or an answer, not both in one turn", True)
  if calls == 1:
    asked = _parse_call(text, actions)
    return ParseFailure(asked, True) if isinstance(asked, str) else asked
  if calls > 1:
    return ParseFailure("one tool call a turn", True)
  if answers > 1:
    return ParseFailure("one answer a turn", False)
  if answers == 1:
    start = text.index("<answer>") + len("<answer>")
    end = text.find("</answer>", start)
    if end < 0:
      return ParseFailure("the answer tag is not closed", False)
    return Answer(text[start:end].strip())
  for tag in ("tool_call", "answer"):
    if f"</{tag}>" in text:
      return ParseFailure(f"the {tag} tag is closed but not opened", False)
  return ParseFailure("a turn must hold a tool call or an answer", False)


def _parse_call(text: str, actions: Mapping[str, Any]) -> Any | str:
  """An action's arguments, or what is wrong with the call."""
  start = text.index("<tool_call>") + len("<tool_call>")
  end = text.find("</tool_call>", start)
  if end < 0:
    return "the tool_call tag is not closed"
  if end - start > MAX_CALL_CHARS:
    return "the tool call is too long"
  try:
    call = json.loads(text[start:end], object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant)
  except (ValueError, RecursionError):
    return "the tool call is not valid JSON"
  name = call.get("name") if isinstance(call, dict) else None
  if not isinstance(name, str) or name not in actions:
    if not actions:
      return "there is no tool"
    return f"the only tool is {next(iter(actions))}" if len(actions) == 1 else f"the tools are {', '.join(actions)}"
  return actions[name].parse(call.get("arguments"), text, (start - len("<tool_call>"), end + len("</tool_call>")))


class Codec:
  """Text <-> token ids, with image placeholders spread to the image's size.

  Args:
    tokenizer: a transformers tokenizer.
    image_token: id of <|image_pad|>.
    eos: ids each of which ends a turn; that of <|im_end|>, `end`, is one of them.
    vocab: rows of the model's embedding.

  Raises:
    ValueError: if the tokenizer lacks the special tokens that the protocol needs, or has ids that the model lacks.
  """

  def __init__(self, tokenizer, image_token: int, eos: tuple[int, ...], vocab: int):
    found, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|image_pad|>", END))
    if found != image_token:
      raise ValueError(f"tokenizer must map <|image_pad|> to {image_token}, as config.json does. Received: {found}")
    if end not in eos:
      raise ValueError(f"tokenizer must map {END} to one of the ids that end a turn, {', '.join(map(str, eos))} "
                       f"(eos_token_id of generation_config.json or else of config.json). Received: {end}")
    last = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if last[1] >= vocab:
      raise ValueError(f"tokenizer must have no id beyond the model's embedding, which has {vocab} rows. "
                       f"Received: {last[0]!r} with id {last[1]}; it is another model's, or the embedding was not "
                       "resized with it")
    self.tokenizer, self.image_token, self.eos, self.end = tokenizer, image_token, tuple(eos), end
    # A fast tokenizer refuses a second thread while it sets its padding, which each call does.
    self._one_at_a_time = threading.Lock()

  def encode(self, text: str, vision_tokens: tuple[int, ...] = ()) -> np.ndarray:
    """Ids of chat text.

    Args:
      text: may hold image placeholders.
      vision_tokens: how many merged tokens each image has, in order.

    Returns:
      int32[T], each placeholder repeated for its image.

    Raises:
      ValueError: if placeholders and `vision_tokens` differ in number.
    """
    with self._one_at_a_time:
      ids = np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int32)
    at = ids == self.image_token
    if at.sum() != len(vision_tokens):
      raise ValueError(f"text must hold {len(vision_tokens)} image placeholders. Received: {int(at.sum())}")
    repeats = np.ones(len(ids), np.int64)
    repeats[at] = vision_tokens
    return np.repeat(ids, repeats)

  def decode(self, ids) -> str:
    """Text of ids, control tokens included; bytes that are not UTF-8 become U+FFFD."""
    with self._one_at_a_time:
      return self.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False,
                                   clean_up_tokenization_spaces=False)


def readable(text: str) -> str:
  """Chat text for people: a run of image placeholders becomes one."""
  return re.sub(r"(?:<\|image_pad\|>)+", "<|image_pad|>", text)
