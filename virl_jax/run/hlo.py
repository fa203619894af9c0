"""What a compiled program does, from its text: which collectives, how often, and which attention kernels."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
          "u64": 8, "f64": 8}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
          "collective-broadcast")
_SHAPE = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf"\s({'|'.join(_KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:to_apply|body|condition|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_GROUPS = re.compile(r"replica_groups=(?:\[(\d+),(\d+)\]|\{\{([\d,]*)\})")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_ELEMENT = re.compile(r"get-tuple-element\(.*\), index=(\d+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_WINDOWED = "windowed_dot_general"  # a product that is computed while its parts arrive, in a loop of its own
KERNELS = {"cudnn": ("__cudnn$fmha", "cudnn$fmhaSoftmax", "__cudnn$fhma"), "splash": ("splash",),
           "cache": ("cache_attend",)}


@dataclasses.dataclass
class Traffic:
  """Bytes that a device receives.

  Attributes:
    kinds: by kind of collective, of the whole program; a loop whose length is not known counts once.
    open_kinds: the part of `kinds` that is within such a loop, for one pass of it.
    largest: bytes of the largest array that is the result of a collective.
  """

  kinds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  open_kinds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  largest: int = 0

  @property
  def total(self) -> int:
    """Bytes of all kinds."""
    return sum(self.kinds.values())


def traffic(text: str) -> Traffic:
  """The collectives of a compiled module.

  Args:
    text: as `jax.stages.Compiled.as_text` gives it.
  """
  bodies, entry = _computations(text)
  own: dict[str, dict] = {}
  fused: dict[str, set] = {}
  found: dict[tuple, Traffic] = {}

  def direct(name: str) -> dict[tuple, tuple[str, int, int]]:
    """Collectives of a computation and of its fusions, by channel, as a TPU's asynchronous ones appear in several."""
    if name not in own:
      own[name], fused[name] = {}, set()
      for i, line in enumerate(bodies.get(name, ())):
        kind, received, result = _received(line)
        if kind:
          channel = _CHANNEL.search(line)
          own[name][(channel.group(1), kind, result) if channel else (name, i)] = kind, received, result
        if " fusion(" in line or " call(" in line:
          for other in _called(line):
            own[name] |= direct(other)
            fused[name] |= direct(other).keys()
    return own[name]

  def of(name: str, begun: frozenset = frozenset()) -> Traffic:
    """What a computation receives, without the collectives that began elsewhere and only continue in it."""
    if (name, begun) in found:
      return found[name, begun]
    sums = found[name, begun] = Traffic()
    for key, (kind, received, result) in direct(name).items():
      if key not in begun:
        sums.kinds[kind] += received
        sums.largest = max(sums.largest, result)
    going = set(fused[name])
    for line in bodies.get(name, ()):
      loop, called = " while(" in line, _called(line)
      trips = _trips(line, bodies) if loop else 1
      if not loop and (" fusion(" in line or " call(" in line):  # `direct` has their collectives, except in loops
        called = [other for other in called if any(" while(" in one for one in bodies.get(other, ()))]
      for other in called:
        direct(other)
        # Such a product's loop also names the collectives that are under way meanwhile.
        windowed = loop and _WINDOWED in other
        inner = of(other, frozenset(going & fused[other]) if windowed else frozenset())
        going |= fused[other] if windowed else set()
        for key, value in inner.kinds.items():
          sums.kinds[key] += (trips or 1) * value
        for key, value in (inner.kinds if trips is None else inner.open_kinds).items():
          sums.open_kinds[key] += (trips or 1) * value
        sums.largest = max(sums.largest, inner.largest)
    return sums

  return of(entry)


def _called(line: str) -> list[str]:
  """The computations that an instruction calls."""
  return _CALLED.findall(line) + [b.strip().lstrip("%") for bs in _BRANCHES.findall(line) for b in bs.split(",")]


def _trips(line: str, bodies: dict[str, list[str]]) -> int | None:
  """How often a while loop runs, or None: a GPU's text says it, a TPU's compares a counter with a constant."""
  if said := _TRIPS.search(line):
    return int(said.group(1))
  condition = _CONDITION.search(line)
  lines = bodies.get(condition.group(1), []) if condition else []
  bounds = [int(n) for one in lines for n in _BOUND.findall(one)]
  if len(bounds) == 1 and sum("compare(" in one for one in lines) == 1 and not any(" and(" in one for one in lines):
    return math.ceil(bounds[0] / _step(line, lines, bodies))
  return None


def _step(line: str, condition: list[str], bodies: dict[str, list[str]]) -> int:
  """What a loop's counter grows by in each pass: more than 1 where the compiler has unrolled the loop."""
  counter = [_ELEMENT.search(one) for one in condition]
  body = bodies.get(_BODY.search(line).group(1), [])
  root = next((_COMMENT.sub("", one) for one in body if one.lstrip().startswith("ROOT") and " tuple(" in one), "")
  given = root.rpartition(" tuple(")[2].partition(")")[0].split(",")
  for index in (int(found.group(1)) for found in counter if found):
    name = given[index].strip() if index < len(given) else ""
    grown = next((one for one in body if one.lstrip().startswith(f"{name} = ") and " add(" in one), "")
    for term in grown.rpartition(" add(")[2].partition(")")[0].split(","):
      constant = next((_BOUND.search(one) for one in body if one.lstrip().startswith(f"{term.strip()} = ")), None)
      if constant:
        return max(1, int(constant.group(1)))
  return 1


def kernels(text: str) -> list[str]:
  """Which of `KERNELS` a compiled module calls; an interpreted kernel leaves its name in the text, but no call."""
  calls = [line for line in text.splitlines() if "custom-call(" in line]
  return [name for name, marks in KERNELS.items() if any(mark in line for line in calls for mark in marks)]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """The lines of each computation by its name, and the name of the entry."""
  bodies, entry, here = {}, "", None
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      here = bodies.setdefault(head.group(2), [])
      entry = head.group(2) if head.group(1) else entry
    elif line.rstrip() == "}":
      here = None
    elif here is not None and _INSTRUCTION.match(line):
      here.append(line)
  return bodies, entry


def _received(line: str) -> tuple[str | None, int, int]:
  """The kind of a line's collective, bytes that a device receives, and bytes of its largest result.

  The kind is None if the line has no collective.
  """
  what = _INSTRUCTION.match(line).group(2)
  found = _COLLECTIVE.search(" " + what)
  if not found:
    return None, 0, 0
  kind, started = found.group(1), found.group(2)
  shapes = [_BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d)
            for dtype, dims in _SHAPE.findall((" " + what)[:found.start()])]
  if started and kind != "all-reduce" and len(shapes) > 1:  # the result holds the operands as well
    shapes = shapes[1:2] if kind == "collective-permute" else shapes[len(shapes) // 2:]
  result = sum(shapes)
  n = _group_size(what)
  share = (n - 1) / n if n > 1 else 0.0
  received = {"all-gather": result * share, "all-reduce": 2 * result * share, "reduce-scatter": result * (n - 1),
              "all-to-all": result * share, "ragged-all-to-all": result * share}.get(kind, result)
  return kind, int(received), max(shapes, default=0)


def _group_size(what: str) -> int:
  """Over how many devices a collective goes."""
  if mesh := _MESH.search(what):
    sizes = dict(axis.split("=") for axis in mesh.group(1).split(","))
    return math.prod(int(sizes[name.strip()]) for name in mesh.group(2).split(",") if name.strip())
  groups = _GROUPS.search(what)
  if not groups:
    return 2
  return int(groups.group(2)) if groups.group(2) else len((groups.group(3) or "0").split(","))
