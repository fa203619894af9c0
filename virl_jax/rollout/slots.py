"""How the engine uses the device: its slots, the sizes that programs are compiled for, its threads."""

from __future__ import annotations

import dataclasses

from virl_jax import checks


@dataclasses.dataclass(frozen=True)
class Config:
  """See `config.py`, section `engine`.  None of it changes what is sampled, apart from rounding in another order.

  Attributes:
    slots: rows of the cache on all devices; 0 for as many as trajectories.
    segment_tokens: most tokens that are decoded before the host looks at which turns have ended.
    serve_share: share of the slots; the host looks sooner when the turns of so many have ended.
    decode_ratio: between the numbers of rows that decoding is compiled for.
    append_ratio: the same for rows that something is appended to.
    token_steps: sizes of a tool turn for each power of two.
    pad_tokens: prompts are padded to multiples of this.
    threads: of the host, that read turns.
  """

  slots: int = 0
  segment_tokens: int = 32
  serve_share: float = 0.125
  decode_ratio: float = 4.0
  append_ratio: float = 4.0
  token_steps: int = 1
  pad_tokens: int = 64
  threads: int = 2

  def __post_init__(self):
    checks.section(vars(self), "engine", slots=checks.whole(0), segment_tokens=checks.whole(1),
                   serve_share=checks.real(0, 1), decode_ratio=checks.real(above=1), append_ratio=checks.real(above=1),
                   token_steps=checks.one_of((1, 2, 4)), pad_tokens=checks.whole(1), threads=checks.whole(1))
