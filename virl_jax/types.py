"""The nouns of the project, and the legend of the axis letters in array names.

An array's name ends in its axes, one capital letter each: `tokens_BT`, `box_BR4`.

    B trajectories (rows)      G rollouts of one prompt     R rounds (visual actions)
    T tokens                   S cache slots                D model width
    N query heads              K key/value heads            H head size
    F MLP width                V vocabulary                 L layers
    I images                   W attention windows          Q patch slots in a window
    P patches                  C values in a patch          M merged vision tokens
    J ground-truth boxes       X rotary axes (time, height, width)
    M also microbatches          U rows of a microbatch      S also trajectories of a row

Host data (`Task`, `Turn`, `Trajectory`, `ImageInput`) are plain dataclasses of numpy and Python
values.  Device data (`ImageBatch`, `Batch`, `ScoredBatch`) are pytrees with static, padded shapes.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple

import flax.struct
import jax
import numpy as np
from PIL import Image


class Box(NamedTuple):
  """A region in pixels of the *original* image: half-open, x1 <= x < x2 and y1 <= y < y2."""

  x1: float
  y1: float
  x2: float
  y2: float


@dataclasses.dataclass(frozen=True)
class Task:
  """One question about one image.

  Attributes:
    uid: name of the record, unique within its source.
    image: the encoded image file's bytes, its path, or the decoded picture (PIL, RGB).
    question: what is asked, without options.
    answers: accepted answers; empty if the task is only to find the box.
    boxes: ground-truth rationale boxes, pixels of the original image; may be empty.
    options: the texts of the options A, B, C ... or None for a free answer.
    kind: the family the task belongs to, for metrics by kind.
    match: the rule by which an answer is judged; see `data.answers.rule`.
    source: the set that the record is from, such as "gqa"; "" if unknown.
    split: the side of its publisher's split, such as "train".
    licence: of the record, as its publisher states it; "" if unknown.
    provenance: what the task is made of, as a hash: of the image file's bytes, the question, the answers, the options,
      the boxes and the rule; see `data.sources.records`.  The same task has the same wherever it lies; "" if unknown.
  """

  uid: str
  image: bytes | str | Image.Image
  question: str
  answers: tuple[str, ...] = ()
  boxes: tuple[Box, ...] = ()
  options: tuple[str, ...] | None = None
  kind: str = ""
  match: str = "exact"
  source: str = ""
  split: str = ""
  licence: str = ""
  provenance: str = ""


@dataclasses.dataclass(frozen=True)
class ImageInput:
  """An image as the vision tower sees it, on the host.

  Attributes:
    patches_PC: patches in merge-block order: uint8[P, C] pixels of one frame (see `patches.patchify`), or float32[P, C]
      normalised values of all frames, as transformers' processor makes them.
    grid_hw: patch rows and columns; P = rows * columns.
    region: which part of the original image this shows, in original pixels.
  """

  patches_PC: np.ndarray
  grid_hw: tuple[int, int]
  region: Box


class StopReason(str, enum.Enum):
  """Why a trajectory ended."""

  ANSWERED = "answered"            # a well-formed answer
  OUT_OF_ROUNDS = "out_of_rounds"  # asked for a zoom when no round was left
  OVERLONG = "overlong"            # ran out of tokens in a turn or in all
  MALFORMED = "malformed"          # neither a tool call nor an answer


@dataclasses.dataclass(frozen=True)
class Observation:
  """The result of a visual action.

  Attributes:
    image: the picture that comes back, or None.
    text: what comes back in words; "" for nothing.
    region: the region of the original that the action was about, which is what it is judged by; None: not judged.
    written: the region's numbers as the policy wrote them, in pixels of image `of_image` as it was shown, or None.
    of_image: index of that image among the trajectory's.
    chars: where in the turn's text credit goes, half-open, by scope: "call" the tool call, "box" what in it names the
      region.
  """

  image: ImageInput | None = None
  text: str = ""
  region: Box | None = None
  written: tuple[float, ...] | None = None
  of_image: int = 0
  chars: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Turn:
  """A stretch of the token stream that one side wrote.

  Attributes:
    role: "assistant" (sampled, trained on) or "tool" (observed, carries no loss).
    ids: int32[T] token ids, exactly as sampled or as appended to the cache.
    logp: float32[T] nats under the sampling distribution; None for tool turns.
    text: the ids, decoded.
    action: name of the visual action that this turn took and that was carried out, or None.
    region, written, of_image: of that action; see `Observation`.
    spans: which of the ids credit goes to, half-open, by scope; see `Observation.chars`.
    called: whether it called a tool, well-formed or not.
    error: what was wrong with the turn, or None; the policy is told if the turn was a call.
    image_index: which of the trajectory's images this (tool) turn carries, or None.
  """

  role: str
  ids: np.ndarray
  logp: np.ndarray | None = None
  text: str = ""
  action: str | None = None
  region: Box | None = None
  written: tuple[float, ...] | None = None
  of_image: int = 0
  spans: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
  called: bool = False
  error: str | None = None
  image_index: int | None = None


@dataclasses.dataclass
class Trajectory:
  """A prompt and one rollout of it.

  Attributes:
    task: the question.
    index: which of a step's trajectories this is; seeds the sampling of this one alone.
    prompt_ids: int32[T] the prompt's tokens, placeholders of the first image included.
    turns: what came after the prompt, in order.
    images: the shown image, then what visual actions brought back.
    stop: why it ended.
    answer: the text inside the answer tag, or None.
    correct: whether `answer` is right by the task's rule; None until `data.answers.grade` has looked.
    score: what the rule gives, in [0, 1]; None: as `correct` says.
  """

  task: Task
  index: int
  prompt_ids: np.ndarray
  turns: list[Turn] = dataclasses.field(default_factory=list)
  images: list[ImageInput] = dataclasses.field(default_factory=list)
  stop: StopReason | None = None
  answer: str | None = None
  correct: bool | None = None
  score: float | None = None

  @property
  def worth(self) -> float:
    """How right the answer is, in [0, 1]."""
    return float(self.correct if self.score is None else self.score)

  @property
  def ids(self) -> np.ndarray:
    """int32[T]: the whole token stream."""
    return np.concatenate([self.prompt_ids, *(turn.ids for turn in self.turns)])

  @property
  def refused(self) -> int:
    """How many of its calls were not carried out because something was wrong with them."""
    return sum(turn.called and turn.error is not None for turn in self.turns)

  @property
  def regions(self) -> list[Box]:
    """The regions that visual actions were about, in order, in original pixels: those that can be judged."""
    return [turn.region for turn in self.turns if turn.region is not None]


@flax.struct.dataclass
class ImageBatch:
  """Images of one bucket, cut by attention window (W > 1), or each in one piece (W = 1).

  Attributes:
    patches_IWQC: uint8 or float32, as in `ImageInput`; zero where masked.
    window_IWQ: int32, which attention window of its image the patch belongs to; -1 where there is none.
    rowcol_IWQ2: int32, the patch's row and column, for 2-D rotary embedding.
  """

  patches_IWQC: jax.Array
  window_IWQ: jax.Array
  rowcol_IWQ2: jax.Array

  @property
  def mask_IWQ(self) -> jax.Array:
    """bool, True where a slot holds a patch."""
    return self.window_IWQ >= 0


@flax.struct.dataclass
class Rows:
  """A batch as the model takes it: microbatches of rows, each of which holds one trajectory or several end to end.

  Under a mesh the rows of a microbatch, and its images, are split over shards as the batch's trajectories are, and
  indices count within a shard.  Microbatches without tokens are padding.

  Attributes:
    index_MUT: int32, which token is here, as an index into the shard's part of the batch's [B, T], flattened; -1 on
      padding.
    lengths_MUS: int32, tokens of the trajectories of each row, the longest first; 0 for none.
    images: one `ImageBatch` a bucket, whose arrays have M as their first axis.
  """

  index_MUT: jax.Array
  lengths_MUS: jax.Array
  images: tuple[ImageBatch, ...]


@flax.struct.dataclass
class Batch:
  """Trajectories as the learner sees them: those of one group are neighbours, unless `order_B` says otherwise.

  Attributes:
    tokens_BT: int32, right-padded.
    valid_BT: bool, True on tokens.
    sampled_BT: bool, True on tokens that the policy wrote.
    pos_BXT: int32 M-RoPE positions (time, height, width).
    vision_BT: int32 index into the merged vision tokens of its microbatch's (and shard's) images, all buckets put end
      to end; -1 on text.
    logp_sampler_BT: float32 nats, as sampled; 0 elsewhere.
    action_BT: int32, the visual action that the token belongs to; -1 outside actions.
    box_BR4: float32, boxes of the actions in original pixels.
    box_mask_BR: bool.
    gt_BJ4: float32, ground-truth boxes in original pixels.
    gt_mask_BJ: bool.
    answer_B: float32 in [0, 1], how right the answer is: 1 or 0 by most rules; see `data.answers`.
    format_B: float32, 1 if every turn was well formed and the last is an answer.
    answerable_B: bool, True if the task has accepted answers.
    row_mask_B: bool, False on rows that are padding or are left out of the loss.
    rows: how the model takes them.
    order_B: int32, the rows of the trajectories in the order that puts groups together, for batches whose trajectories
      are dealt to shards by length, so that shards have equal work.  None: groups are together.
  """

  tokens_BT: jax.Array
  valid_BT: jax.Array
  sampled_BT: jax.Array
  pos_BXT: jax.Array
  vision_BT: jax.Array
  logp_sampler_BT: jax.Array
  action_BT: jax.Array
  box_BR4: jax.Array
  box_mask_BR: jax.Array
  gt_BJ4: jax.Array
  gt_mask_BJ: jax.Array
  answer_B: jax.Array
  format_B: jax.Array
  answerable_B: jax.Array
  row_mask_B: jax.Array
  rows: Rows
  order_B: jax.Array | None = None

  @property
  def trained_BT(self) -> jax.Array:
    """bool[B, T]: the tokens that the loss is about."""
    return self.sampled_BT & self.row_mask_B[:, None]


@flax.struct.dataclass
class ScoredBatch:
  """A batch, scored with the policy as it is before the update.

  Attributes:
    batch: the trajectories.
    logp_old_BT: float32 nats, the trainer's own log-probabilities before the update; None if the batch serves one
      update only, whose forward pass computes them.
    logp_ref_BT: float32 nats under the frozen reference; equal to logp_old_BT if there is none.
    advantage_BT: float32, per token, after credit assignment; 0 off sampled tokens.
    iou_BR: float32, best IoU of each action with a ground-truth box.
    class_BR: int32, class of each action (`rl.credit`).
    modulator_BR: float32, what the advantage of the action's tokens was multiplied by.
    advantage_B: float32, per trajectory.
    reward_B: float32, total reward.
    value_old_BT: float32, what the critic expected before each token; None if there is no critic.
    return_BT: float32, the critic's targets; None if there is no critic.
  """

  batch: Batch
  logp_old_BT: jax.Array | None
  logp_ref_BT: jax.Array | None
  advantage_BT: jax.Array
  iou_BR: jax.Array
  class_BR: jax.Array
  modulator_BR: jax.Array
  advantage_B: jax.Array
  reward_B: jax.Array
  value_old_BT: jax.Array | None = None
  return_BT: jax.Array | None = None
