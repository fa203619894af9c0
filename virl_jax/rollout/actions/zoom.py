"""The zoom: the policy names a region of an image and gets it back as a new, sharper image.

A visual action is a module with four names, and one line in `actions.table`:

    NAME                              how a tool call names it
    schema(cfg)                       its description for the system turn, ready for JSON; `cfg` is a `prompt.Config`
    parse(arguments, text, chars)     a tool call's arguments -> what it asks for, or what is wrong with them
    carry_out(policy, row, asked)     -> `types.Observation`, or what is wrong with it

What a call asks for is a type of the action's own, with the action's name in its field `name`.  What is wrong is a
short sentence for the policy.  `policy` is a `turns.Policy`, `row` a `row.Row`.  Nothing here raises on what a policy
wrote.
Source: the tool of DeepEyes (arXiv 2505.14362), in Qwen2.5's own format for tool calls.
"""

from __future__ import annotations

import dataclasses
import math
import re

from virl_jax import types
from virl_jax.data import images
from virl_jax.model import patches

NAME = "image_zoom_in_tool"
_BOX = re.compile(r'"bbox_2d"\s*:\s*(\[[^\]]*\])')


@dataclasses.dataclass(frozen=True)
class Zoom:
  """A zoom that a call asks for.

  Attributes:
    box: x1, y1, x2, y2 as written, in pixels of its image as shown.
    target_image: which image that is: 0 is the first, k the k-th that came back.
    call_chars: where the call is in the text, tags included, half-open.
    box_chars: where its four numbers are, brackets included; `call_chars` if the key is not written plainly.
    name: of the action.
  """

  box: tuple[float, float, float, float]
  target_image: int = 0
  call_chars: tuple[int, int] = dataclasses.field(default=(0, 0), compare=False)
  box_chars: tuple[int, int] = dataclasses.field(default=(0, 0), compare=False)
  name: str = NAME


def schema(cfg) -> dict:
  """The tool as the system turn describes it.

  Args:
    cfg: `prompt.Config`; with `zoom_into_crops`, a call may name another image than the first.
  """
  properties = {
      "bbox_2d": {
          "type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4,
          "description": "The region [x1, y1, x2, y2] in pixels of the image as shown.",
      },
      "label": {"type": "string", "description": "What the region holds (optional)."},
  }
  if cfg.zoom_into_crops:
    properties["target_image"] = {
        "type": "integer", "minimum": 0,
        "description": "Which image the region is of: 0 is the first, k the k-th that came back.",
    }
  return {
      "type": "function",
      "function": {
          "name": NAME,
          "description": "Zoom in on a region of the image. The region comes back as a new, sharper image.",
          "parameters": {"type": "object", "properties": properties, "required": ["bbox_2d"]},
      },
  }


def call(box: tuple[float, ...]) -> dict:
  """The tool call that asks for a box of the first image, for `prompt.call_text`."""
  return {"name": NAME, "arguments": {"bbox_2d": list(box)}}


def parse(arguments: object, text: str, chars: tuple[int, int]) -> Zoom | str:
  """Reads a call's arguments.

  Args:
    arguments: as read from JSON, of any type.
    text: the turn.
    chars: where the call is in it, tags included, half-open.

  Returns:
    The zoom that is asked for, or what is wrong with it; whether the box fits its image is for `carry_out` to check.
  """
  box = arguments.get("bbox_2d") if isinstance(arguments, dict) else None
  if not (isinstance(box, list) and len(box) == 4
          and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in box)):
    return "bbox_2d must be four numbers"
  # Integers beyond float's range would overflow below; no image is that wide.
  if any(abs(v) > 1e6 or not math.isfinite(v) for v in box):
    return "bbox_2d lies outside the image"
  target = arguments.get("target_image", 0)
  if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target <= 10 ** 6:
    return "target_image must be a whole number, 0 or more"
  found = _BOX.search(text, *chars)
  return Zoom(tuple(float(v) for v in box), target, chars, found.span(1) if found else chars)


def carry_out(policy, row, asked: Zoom) -> types.Observation | str:
  """Cuts the crop out of the original picture.

  Args:
    policy: pixel limits, and whether crops can be zoomed into.
    row: the picture, and the images so far.
    asked: what was asked for.

  Returns:
    The crop, the region of the original that the policy's box means, and the box as written; or what is wrong with the
    call.
  """
  grid, limits, shots = policy.model.vision.grid, policy.image, row.traj.images
  if asked.target_image and not policy.prompt.zoom_into_crops:
    return "target_image must be 0: only the first image can be zoomed into"
  if asked.target_image >= len(shots):
    return f"target_image must be below {len(shots)}, the number of images so far"
  shown = shots[asked.target_image]
  box = check(asked.box, shown.region, patches.shown_wh(shown, grid), limits)
  if isinstance(box, str):
    return box
  cut = expand(box, row.picture.size, limits) if limits.crop_expand else box
  crop = images.prepare(row.picture, cut, limits.crop_min_pixels, limits.crop_max_pixels, grid)
  return types.Observation(crop, region=box, written=asked.box, of_image=asked.target_image,
                           chars={"call": asked.call_chars, "box": asked.box_chars})


def check(box: tuple[float, ...], region: types.Box, shown: tuple[int, int], cfg: images.Config) -> types.Box | str:
  """What a zoom box means on the original, or what is wrong with it.

  Args:
    box: x1, y1, x2, y2 as the policy wrote them, in the shown image's frame; finite.
    region: the part of the original that the shown image shows.
    shown: its width and height as shown, pixels.
    cfg: limits.

  Returns:
    The box on the original, clamped to the shown region, or a short sentence for the policy.
  """
  x1, y1, x2, y2 = box
  if x2 <= x1 or y2 <= y1:
    return "bbox_2d must have x1 < x2 and y1 < y2"
  clamped = (max(x1, 0.0), max(y1, 0.0), min(x2, float(shown[0])), min(y2, float(shown[1])))
  if clamped[2] <= clamped[0] or clamped[3] <= clamped[1]:
    return f"bbox_2d lies outside the image of {shown[0]} x {shown[1]}"
  found = images.to_original(clamped, region, shown)
  w, h = found.x2 - found.x1, found.y2 - found.y1
  # A box can be too small for float64: added to the region's offset, it has no size left.
  if min(w, h) < (1e-3 if cfg.crop_expand else cfg.crop_min_side_px):
    return "bbox_2d is too small"
  if cfg.crop_expand:
    return found
  if max(w, h) > cfg.crop_max_aspect * min(w, h):
    return "bbox_2d is too long and thin"
  return found


def expand(box: types.Box, picture_wh: tuple[int, int], cfg: images.Config) -> types.Box:
  """What is cut for a box that is too small or too thin: a larger region about the same centre.

  A box that is too thin grows across until `cfg.crop_max_aspect` holds; one that is then too small grows along
  both sides alike until its short side has `cfg.crop_min_side_px`.

  Args:
    box: original pixels, inside the picture.
    picture_wh: the picture's width and height, pixels.
    cfg: limits.

  Returns:
    A region inside the picture that holds the box; it is moved away from the picture's edge, and if the picture
    itself is too small, it has the whole length of that side.
  """
  w, h = box.x2 - box.x1, box.y2 - box.y1
  w, h = max(w, h / cfg.crop_max_aspect), max(h, w / cfg.crop_max_aspect)
  scale = max(1.0, cfg.crop_min_side_px / min(w, h))

  def along(low, high, size, whole):
    size = min(size, float(whole))
    start = min(max((low + high - size) / 2, 0.0), whole - size)
    # Rounding must not cost the box its edge.
    return min(start, low), max(start + size, high)

  x1, x2 = along(box.x1, box.x2, w * scale, picture_wh[0])
  y1, y2 = along(box.y1, box.y2, h * scale, picture_wh[1])
  return types.Box(x1, y1, x2, y2)
