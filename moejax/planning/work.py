"""What a compiled program works: products, and bytes to and from memory.

`jax.stages.Compiled.cost_analysis()` counts the body of a loop once, however
often it goes round; here it counts each time.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from moejax.planning import hlo
from moejax.planning.hlo import Op, Program


class Work(NamedTuple):
  """What one device does in one run of a program.

  Attributes:
    flops: of products of matrices, which is what matrix units do; a
      multiplication and its addition are two.
    bytes: read from the device's memory and written to it. What a TPU keeps on
      the chip, `S(1)` in its layout, costs nothing, and no array is padded.
    is_bounded: whether all loops have a known length; the body of another
      counts once.
  """

  flops: int
  bytes: int
  is_bounded: bool


def read(text: str) -> Work:
  """Adds up what a compiled program works, on one of its devices.

  Both branches of a condition count. A fusion reads what it takes and writes
  what it makes; what lies between never leaves the chip. Of an array that is
  sliced only the slices are read, and of one that is changed in place only
  the changes are written, as in the scans of JAX. A kernel's products are
  those that it was declared with; where sorted rows travel to their experts,
  not of all that there is room for but of as many as come to each device if
  all experts are equally busy.

  Args:
    text: `jax.stages.Compiled.as_text()` of a CPU, GPU or TPU.
  """
  parts = list(instructions(text))
  return Work(
    sum(part.flops for part in parts),
    sum(part.bytes for part in parts),
    all(part.is_bounded for part in parts),
  )


def instructions(text: str) -> Iterator[Work]:
  """Yields what each instruction that runs on its own works, in all its runs.

  Args:
    text: as of `read`.
  """
  program = hlo.parse(text)
  filled = _filled(program)
  flops = moved = 0
  is_bounded = True
  for run in hlo.walk(program):
    if run.is_alone:
      yield Work(flops, moved, is_bounded)
      flops, is_bounded = 0, True
      moved = run.times * _moved(program, run.op)
    if of_op := _FLOPS.get(run.op.opcode):
      share = filled if _COST in run.op.rest else 1
      flops += run.times * round(share * of_op(run.op))
    is_bounded &= run.is_bounded
  yield Work(flops, moved, is_bounded)


# -- products -----------------------------------------------------------------


def _of_product(op: Op) -> int:
  """Two for each entry of the result and each contracted entry."""
  sizes = hlo.arrays(hlo.operands(op)[0].shape)[0].sizes
  over = re.search(r'lhs_contracting_dim\w+"?[=:][{\[]([^}\]]*)', op.rest)
  contracted = re.findall(r"\d+", over[1]) if over else []
  entries = math.prod(hlo.arrays(op.shape)[0].sizes)
  return 2 * entries * math.prod(sizes[int(axis)] for axis in contracted)


def _of_convolution(op: Op) -> int:
  """Two for each pair of entries that meet; a TPU writes all products so.

  A batch is a window there that meets one position only, all others being
  padding or the holes of a dilation, which nothing is multiplied by.
  """
  left, right = (hlo.arrays(each.shape)[0].sizes for each in hlo.operands(op))
  out = hlo.arrays(op.shape)[0].sizes
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest).groups()
  window = dict(re.findall(r"(\w+)=([-\d_x]+)", _braces(op.rest, "window")))
  pairs = right[labels[1].index("i")] * out[labels[2].index("f")]
  groups = re.search(r"batch_group_count=(\d+)", op.rest)
  pairs *= left[labels[0].index("b")] // (int(groups[1]) if groups else 1)
  for axis in range(len(out) - 2):
    at = [each.index(str(axis)) for each in labels]
    numbers = {
      name: [int(n) for n in text.split("x")[axis].split("_")]
      for name, text in window.items()
    }
    pairs *= _meetings(
      (left[at[0]], right[at[1]], out[at[2]]),
      numbers.get("stride", [1])[0],
      numbers.get("pad", [0])[0],
      numbers.get("lhs_dilate", [1])[0],
      numbers.get("rhs_dilate", [1])[0],
    )
  return 2 * pairs


def _braces(text: str, name: str) -> str:
  found = re.search(rf"\b{name}=\{{([^}}]*)\}}", text)
  return found[1] if found else ""


def _meetings(
  sizes: tuple[int, int, int], stride: int, pad: int, holes: int, step: int
) -> int:
  """Counts o * stride + k * step - pad = i * holes, one axis of a convolution.

  Args:
    sizes: how many i, k and o there are: inputs, window and outputs.
    stride: of the window.
    pad: before the first input.
    holes: the dilation of the inputs.
    step: the dilation of the window.
  """
  inputs, window, outputs = sizes
  common = math.gcd(stride, holes)
  # Every how many outputs one meets an input and no hole.
  every = holes // common
  inverse = pow(stride // common, -1, every)
  total = 0
  for k in range(window):
    ahead = k * step - pad
    if ahead % common:
      continue
    any_one = -ahead // common * inverse % every
    low = max(0, -(ahead // stride))
    high = min(outputs - 1, ((inputs - 1) * holes - ahead) // stride)
    first = low + (any_one - low) % every
    total += max(0, (high - first) // every + 1)
  return total


def _is_library(op: Op) -> bool:
  return 'custom_call_target="__cublas$' in op.rest


def _of_call(op: Op) -> int:
  """Of a GPU's library, or of a kernel that says how many."""
  if _is_library(op):
    return _of_product(op)
  said = re.search(_COST + r':\{[^}]*?"flops":"(\d+)"', op.rest)
  return int(said[1]) if said else 0


# What a kernel says of itself, in any order.
_COST = '"cost_estimate"'


def _filled(program: Program) -> float:
  """Returns how much of the room for sorted rows is taken, as a rule."""
  sides = [
    hlo.rows_and_room(op)
    for computation in program.values()
    for op in computation.ops.values()
    if op.opcode.removesuffix("-start") == "ragged-all-to-all"
  ]
  rows, room = map(sum, zip(*sides, strict=True)) if sides else (1, 1)
  return rows / room


# -- bytes --------------------------------------------------------------------


def _moved(program: Program, op: Op) -> int:
  """Returns the bytes that an instruction reads and writes."""
  if op.opcode in _FREE or op.opcode.endswith(("-done", "-update")):
    return 0
  is_fusion = op.opcode == "fusion"
  made_by = program[hlo.called(op)[0]].root if is_fusion else op
  if re.search(_NOTHING, made_by.rest):
    return 0
  reads = (
    min(_in_memory(operand.shape), _read(program, op, place))
    for place, operand in enumerate(hlo.operands(op))
  )
  return sum(reads) + _written(program, op)


def _in_memory(shape: str) -> int:
  return sum(each.bytes for each in hlo.arrays(shape) if not each.space)


def _read(program: Program, op: Op, place: int) -> int:
  """Returns how many bytes of an operand an instruction looks at."""
  if _is_unfinished(op) or _DONE in op.rest:
    return 0
  kind = op.opcode.removesuffix("-start")
  operands = hlo.operands(op)
  if kind in _SLICES and place == 0:
    return hlo.size(hlo.result(op))
  if kind in _IN_PLACE and place == _IN_PLACE[kind][0]:
    # A scatter may add to what is there.
    change = operands[_IN_PLACE[kind][1]]
    return hlo.size(change.shape) if kind == "scatter" else 0
  if kind == "ragged-all-to-all" and place == 0:
    return hlo.rows_and_room(op)[0]
  if kind == "fusion":
    inner = program[hlo.called(op)[0]]
    return _looked_at(program, inner.parameters[place])
  return hlo.size(operands[place].shape)


def _looked_at(program: Program, op: Op) -> int:
  """Returns how many bytes of an array its users in a fusion look at."""
  if op.is_root:
    return hlo.size(op.shape)
  total = 0
  for user, place in op.within.users[op.name]:
    if user.opcode in _VIEWS:
      total += _looked_at(program, user)
    elif user.opcode != "tuple":
      total += _read(program, user, place)
  return min(hlo.size(op.shape), total)


def _written(program: Program, op: Op) -> int:
  arrays = hlo.arrays(hlo.result(op))
  if _is_library(op):
    # The others are its scratch space.
    arrays = arrays[:1]
  changes = _changes(program, op)
  if len(changes) != len(arrays):
    changes = [None] * len(arrays)
  return sum(
    change[1] if change else array.bytes
    for array, change in zip(arrays, changes, strict=True)
    if not array.space
  )


def _changes(program: Program, op: Op) -> list[tuple[Op, int] | None]:
  """Returns the arrays that are changed in place, and how many bytes of each.

  One for each array of the result, None where all of it is new.
  """
  kind = op.opcode.removesuffix("-start")
  operands = hlo.operands(op)
  if kind == "parameter":
    return [(op, 0)]
  if _is_unfinished(op):
    return [(operands[0], 0)]
  if kind in _IN_PLACE:
    base, change = (operands[place] for place in _IN_PLACE[kind])
    # Of rows that travel home there is less than room for them.
    return [(base, min(hlo.size(base.shape), hlo.size(change.shape)))]
  if kind in _VIEWS:
    return _changes(program, operands[0])
  if kind != "fusion":
    return [None]
  root = program[hlo.called(op)[0]].root
  roots = hlo.operands(root) if root.opcode == "tuple" else [root]
  return [_outside(operands, _changes(program, each)) for each in roots]


def _outside(
  operands: list[Op], changes: list[tuple[Op, int] | None]
) -> tuple[Op, int] | None:
  """Returns which operand a fusion changes; what it makes itself is new."""
  if len(changes) != 1 or changes[0] is None:
    return None
  base, changed = changes[0]
  while base.opcode in _VIEWS:
    base = hlo.operands(base)[0]
  if base.opcode != "parameter":
    return None
  (place,) = (i for i, each in base.within.parameters.items() if each is base)
  return operands[place], changed


def _is_unfinished(op: Op) -> bool:
  """Whether a collective goes on in a later fusion, where it counts.

  A TPU spreads one over several fusions and rounds of loops, each of which
  takes and returns all of it.
  """
  if 'chain_id="' not in op.rest:
    return False
  return not any(_DONE in user.rest for user, _ in op.within.users[op.name])


_DONE = 'custom_call_target="AsyncCollectiveDone"'
_NOTHING = (
  r'custom_call_target="(AllocateBuffer|AsyncCollectiveStart|ConcatBitcast)"'
)
# Instructions that only say what is where, or that others run for.
_FREE = (
  "add-dependency",
  "after-all",
  "async-start",
  "bitcast",
  "call",
  "call-start",
  "conditional",
  "constant",
  "get-tuple-element",
  "opt-barrier",
  "parameter",
  "tuple",
  "while",
)
# They look at as much as they return.
_SLICES = ("dynamic-slice", "gather", "slice")
# Their operand that is changed, and the one that holds the change.
_IN_PLACE = {
  "dynamic-update-slice": (0, 1),
  "scatter": (0, 2),
  "ragged-all-to-all": (1, 0),
}
# The same bytes, seen in another way.
_VIEWS = ("bitcast", "reshape")
_FLOPS = {
  "convolution": _of_convolution,
  "custom-call": _of_call,
  "dot": _of_product,
}
