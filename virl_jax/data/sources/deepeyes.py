"""DeepEyes-47k: parquet files of verl's schema, with the pictures inside.

    *.parquet    data_source, prompt: [{role, content}], images: [{bytes, path}], ability, env_name,
                 reward_model: {style, ground_truth}, extra_info: {question, answer, id ...}

The question is that of extra_info or, if there is none, that of the last user turn.  There are no boxes.
"""

from __future__ import annotations

from collections.abc import Iterator
import functools

from virl_jax.data.sources import fields
from virl_jax.data.sources import records
from virl_jax.data.sources import stream

NAME = "deepeyes"
SPLITS = ("train", "val")
LICENCE = ""
WANTED = "*.parquet (data_source, prompt, images, reward_model, extra_info)"
_COLUMNS = ("data_source", "prompt", "images", "reward_model")


def files(root: str, split: str) -> list[str]:
  """The parquet files: all of them for "train", those with "val" in their name for "val".

  Raises:
    ValueError: there are none.
  """
  return stream.splits(root, split, "parquet", "DeepEyes' rows")


def read(root: str, split: str) -> Iterator[records.Raw | records.Reject]:
  """The rows.

  Raises:
    ValueError: there are no files, or one has another schema.
  """
  for path in files(root, split):
    yield from fields.raws(stream.rows(path, _COLUMNS), functools.partial(_record, split))


def _record(split, row, where):
  info, reward = row.get("extra_info") or {}, row["reward_model"] or {}
  asked = info.get("question")
  if not asked:
    asked = [turn["content"] for turn in row["prompt"] if turn["role"] == "user"][-1:]
    asked = asked[0] if asked else None
  question, options = fields.question(asked)
  answers = reward.get("ground_truth")
  family = row["data_source"]
  name = info.get("id", info.get("index"))
  return records.Raw(
      uid=f"{family}/{name}" if name is not None else where, image=fields.picture(row["images"]), question=question,
      answers=fields.answer(info.get("answer") if answers is None else answers, options), options=options,
      kind=f"deepeyes_{family}" if family else NAME, source=NAME, split=split, licence=LICENCE)
