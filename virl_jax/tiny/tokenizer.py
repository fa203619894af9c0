"""The tiny base's tokenizer: byte-level BPE with Qwen's special tokens, digits one token each.

The vocabulary is learned from the protocol's fixed text as whole strings and from the needle task's
words one by one, so that boilerplate costs one token, and coordinates cost one for each digit.
"""

from __future__ import annotations

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from virl_jax.data import prompt
from virl_jax.rollout.actions import zoom
from virl_jax.tiny import needle

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
           "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
# Added tokens that are text and not control tokens: decoding keeps them, as in Qwen2.5.
ADDED = ("<tool_call>", "</tool_call>")

# Qwen2.5's chat format in our own words: roles, tools in the system turn, calls and responses in tags, and images
# as in Qwen2.5-VL.
CHAT_TEMPLATE = """\
{%- macro words(content) -%}
  {%- if content is string -%}{{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- else -%}{{- part.text -}}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set given = messages[0].role == 'system' -%}
{%- set first = messages[0] if given else {'content': 'You are a helpful assistant.'} -%}
{{- '<|im_start|>system\\n' + words(first.content) -}}
{%- if tools -%}
  {{- '\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' -}}
  {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
  {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments ' -}}
  {{- 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' -}}
  {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for message in messages[(1 if given else 0):] -%}
  {%- if message.role == 'tool' -%}
    {%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\\n<tool_response>\\n' + words(message.content) + '\\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
  {%- else -%}
    {{- '<|im_start|>' + message.role -}}
    {%- if message.content -%}{{- '\\n' + words(message.content) -}}{%- endif -%}
    {%- for call in message.tool_calls or [] -%}
      {%- set function = call.function or call -%}
      {{- '\\n<tool_call>\\n{"name": "' + function.name + '", "arguments": ' -}}
      {{- function.arguments | tojson -}}
      {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def _corpus(system: str) -> list[str]:
  """Strings to learn merges from; no merge goes across two of them."""
  call = prompt.call_text(zoom.call((0, 0, 0, 0)))
  fixed = [f"system\n{system}", "user\n", "assistant\n", "user\n<tool_response>\n", "\n</tool_response>", "\n",
           *call.replace("<tool_call>", "0").replace("</tool_call>", "0").replace("2", "0").split("0"),
           ", ", "<answer>", "</answer>", "<think>", "</think>", "Error: "]
  sentences = [q.format("") for q in needle.QUESTIONS.values()]
  sentences += [f"Do the and the carry the same {n}?" for n in needle.NOUNS.values()]
  words = {w.strip("?.,") for s in sentences for w in s.split()}
  words |= {*needle.COLOURS, *needle.SHAPES, *needle.PATTERNS, *needle.DOTS, "yes", "no", "unclear"}
  words |= {w for s in ("bbox_2d must have x1 < x2 and y1 < y2", "bbox_2d is too small",
                        "a turn must hold a tool call or an answer", "the tool call is not valid JSON")
            for w in s.split()}
  return 50 * [s for s in fixed if s] + 10 * sorted(w for word in words for w in (word, " " + word))


def build(folder: str | pathlib.Path, system: str, vocab: int = 1024):
  """Trains the tokenizer and writes its files.

  Args:
    folder: where tokenizer.json, tokenizer_config.json, chat_template.jinja and
      preprocessor_config.json go.
    system: the system turn that the tiny policy is shown.
    vocab: most tokens in the vocabulary.

  Returns:
    The transformers tokenizer, read back from the folder.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tok = tokenizers.Tokenizer(models.BPE())
  tok.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  tok.decoder = decoders.ByteLevel()
  tok.train_from_iterator(_corpus(system), trainers.BpeTrainer(
      vocab_size=vocab, special_tokens=list(SPECIAL), show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  tok.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in ADDED])
  tok.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({
      "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
      "additional_special_tokens": list(SPECIAL[1:]), "clean_up_tokenization_spaces": False,
      "model_max_length": 4096}, indent=2) + "\n")
  (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
  (folder / "preprocessor_config.json").write_text(json.dumps({
      "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 7056, "patch_size": 14,
      "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
      "image_std": [0.26862954, 0.26130258, 0.27577711]}, indent=2) + "\n")
  import transformers  # takes seconds to import
  return transformers.AutoTokenizer.from_pretrained(str(folder))


def token_ids(tokenizer) -> dict:
  """The ids that `qwen.Config` needs, by its field names."""
  names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start": "<|vision_start|>",
           "vision_end": "<|vision_end|>", "vision_pad": "<|vision_pad|>"}
  ids = {field: tokenizer.convert_tokens_to_ids(token) for field, token in names.items()}
  return {**ids, "eos": (tokenizer.convert_tokens_to_ids("<|im_end|>"),)}
