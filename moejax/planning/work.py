"""What a compiled program works: products, and bytes to and from memory.

`jax.stages.Compiled.cost_analysis()` counts the body of a loop once, however
often it goes round; here it counts each time.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from moejax.planning import hlo
from moejax.planning.hlo import Op


class Work(NamedTuple):
  """What one device does by an instruction, in all its runs."""

  flops: int  # Of products of matrices; a multiply-add is two.
  # Read from the device's memory and written to it. What a TPU keeps on the
  # chip, `S(1)` in its layout, costs nothing, and no array is padded.
  bytes: int
  is_bounded: bool  # As of `hlo.Run`.
  # Kernels, copies and collectives that a GPU's host starts; a sort, or a
  # library, counts as one.
  launches: int = 0


def instructions(text: str, busiest: float = 1.0) -> Iterator[Work]:
  """Yields the work of each instruction that is not a part of another.

  Both branches of a condition count. A fusion reads what it takes and writes
  what it makes; what lies between never leaves the chip. Of an array that is
  sliced only the slices are read, and of one that is changed in place only
  the changes are written, as in the scans of JAX. A kernel's products are
  those that it was declared with; where sorted rows are sent to their experts,
  they count, as do its bytes, not for the whole buffer but for the rows that
  are `filled`.
  """
  runs = hlo.runs(text)
  rows = filled(text, busiest)
  flops = moved = launches = 0
  is_bounded = True
  for run in runs:
    of_op, rest = _FLOPS.get(run.op.opcode), run.op.rest
    is_kernel = of_op and (_COST in rest or _NAMED in rest)
    part = rows if is_kernel else 1.0
    if not run.is_part:
      yield Work(flops, moved, is_bounded, launches)
      flops, is_bounded = 0, True
      moved = run.times * _moved(run.op, part)
      launches = 0 if _is_free(run.op) else run.times
    if of_op:
      flops += run.times * round(part * of_op(run.op))
    is_bounded &= run.is_bounded
  yield Work(flops, moved, is_bounded, launches)


def filled(text: str, busiest: float = 1.0) -> float:
  """Returns the part of the buffers for sorted rows that a device fills.

  That is 1 where no rows are sent. Each device gets as many rows as it has, the
  busiest so many times as many.
  """
  sides = [
    hlo.rows_and_buffer(run.op)
    for run in hlo.runs(text)
    if run.op.kind == "ragged-all-to-all"
  ]
  rows, buffer = map(sum, zip(*sides, strict=True)) if sides else (1, 1)
  return min(1.0, busiest * rows / buffer)


# -- products -----------------------------------------------------------------


def _of_product(op: Op) -> int:
  """Two for each entry of the result and each contracted entry."""
  sizes = op.operands[0].arrays[0].sizes
  over = re.search(r'lhs_contracting_dim\w+"?[=:][{\[]([^}\]]*)', op.rest)
  contracted = re.findall(r"\d+", over[1]) if over else []
  entries = math.prod(op.arrays[0].sizes)
  return 2 * entries * math.prod(sizes[int(axis)] for axis in contracted)


def _of_convolution(op: Op) -> int:
  """Two for each pair of entries that meet; a TPU writes all products so.

  A batch is a window there that meets one position only, all others being
  padding or the holes of a dilation, which nothing is multiplied by.
  """
  left, right = (each.arrays[0].sizes for each in op.operands)
  out = op.arrays[0].sizes
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest).groups()
  window = re.search(r"\bwindow=\{([^}]*)\}", op.rest)
  fields = re.findall(r"(\w+)=([-\d_x]+)", window[1]) if window else []
  groups = re.search(r"batch_group_count=(\d+)", op.rest)
  pairs = right[labels[1].index("i")] * out[labels[2].index("f")]
  pairs *= left[labels[0].index("b")] // (int(groups[1]) if groups else 1)
  for axis in range(len(out) - 2):
    inputs, taps, outputs = (
      sizes[names.index(str(axis))]
      for sizes, names in zip((left, right, out), labels, strict=True)
    )
    # Of padding the number before the first input.
    of = {name: int(n.split("x")[axis].split("_")[0]) for name, n in fields}
    stride, pad = of.get("stride", 1), of.get("pad", 0)
    holes, step = of.get("lhs_dilate", 1), of.get("rhs_dilate", 1)
    # Output o and tap k meet input i where o * stride + k * step - pad is
    # i * holes: for a tap, if at all, one output in so many.
    common = math.gcd(stride, holes)
    every = holes // common
    inverse = pow(stride // common, -1, every)
    meetings = 0
    for k in range(taps):
      ahead = k * step - pad
      if ahead % common:
        continue
      # The outputs whose taps lie between the first and the last input.
      low = max(0, -(ahead // stride))
      high = min(outputs - 1, ((inputs - 1) * holes - ahead) // stride)
      any_one = -ahead // common * inverse
      first = low + (any_one - low) % every
      meetings += len(range(first, high + 1, every))
    pairs *= meetings
  return 2 * pairs


def _of_call(op: Op) -> int:
  """Of a GPU's library, or of a kernel that says how many."""
  if _LIBRARY in op.rest:
    return _of_product(op)
  if said := re.search(_COST + r':\{[^}]*?"flops":"(\d+)"', op.rest):
    return int(said[1])
  sizes = re.search(_NAMED + r"(\d+)_I(\d+)_O(\d+)", op.rest)
  return 2 * math.prod(map(int, sizes.groups())) if sizes else 0


_LIBRARY = 'custom_call_target="__cublas$'
# What a kernel says of itself, in any order; of one for a GPU its name is left.
_COST = '"cost_estimate"'
_NAMED = "grouped_dot_N"
_FLOPS = {
  "convolution": _of_convolution,
  "custom-call": _of_call,
  "dot": _of_product,
}

# -- bytes --------------------------------------------------------------------

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
# They read as much as they return.
_SLICES = ("dynamic-slice", "gather", "slice")
# Their operand that is changed, and the one that holds the change.
_IN_PLACE = {
  "dynamic-update-slice": (0, 1),
  "scatter": (0, 2),
  "ragged-all-to-all": (1, 0),
}
# The same bytes under another shape.
_VIEWS = ("bitcast", "reshape")


def _is_free(op: Op) -> bool:
  return op.opcode in _FREE or op.opcode.endswith(("-done", "-update"))


def _moved(op: Op, part: float = 1.0) -> int:
  """Returns the bytes that an instruction reads and writes.

  A kernel reads and writes a part of its rows, which have no axis of experts.
  """

  def size(array):
    if array.space:
      return 0
    return round((part if len(array.sizes) == 2 else 1) * array.bytes)

  if _is_free(op):
    return 0
  made_by = op.called[0].root if op.kind == "fusion" else op
  if re.search(_NOTHING, made_by.rest):
    return 0
  total = 0
  for position, operand in enumerate(op.operands):
    total += min(sum(map(size, operand.arrays)), _read(op, position))
  # All but the first result of a library is its scratch space.
  results = op.results[:1] if _LIBRARY in op.rest else op.results
  changes = _changes(op)
  if len(changes) != len(results):
    changes = [None] * len(results)
  for array, change in zip(results, changes, strict=True):
    if not array.space:
      total += change[1] if change else size(array)
  return total


def _read(op: Op, position: int) -> int:
  """Returns how many bytes of an operand an instruction reads."""
  if _is_unfinished(op) or _DONE in op.rest:
    return 0
  if op.kind in _SLICES and position == 0:
    return sum(each.bytes for each in op.results)
  if op.kind in _IN_PLACE and position == _IN_PLACE[op.kind][0]:
    # A scatter may add to what is there.
    change = op.operands[_IN_PLACE[op.kind][1]]
    return change.bytes if op.kind == "scatter" else 0
  if op.kind == "ragged-all-to-all" and position == 0:
    return hlo.rows_and_buffer(op)[0]
  if op.kind == "fusion":
    return _read_inside(op.called[0].parameters[position])
  return op.operands[position].bytes


def _read_inside(op: Op) -> int:
  """Returns how many bytes of an array the users in a fusion read."""
  total = op.bytes if op is op.within.root else 0
  for user, position in op.users:
    if user.opcode in _VIEWS:
      total += _read_inside(user)
    elif user.opcode != "tuple":
      total += _read(user, position)
  return min(op.bytes, total)


def _changes(op: Op) -> list[tuple[Op, int] | None]:
  """Returns the arrays that are changed in place, and how many bytes of each.

  One for each array of the result, None where all of it is new.
  """
  if op.kind == "parameter":
    return [(op, 0)]
  if _is_unfinished(op):
    return [(op.operands[0], 0)]
  if op.kind in _IN_PLACE:
    base, change = (op.operands[position] for position in _IN_PLACE[op.kind])
    # Rows that come back from experts have a smaller buffer than those sent.
    return [(base, min(base.bytes, change.bytes))]
  if op.kind in _VIEWS:
    return _changes(op.operands[0])
  if op.kind != "fusion":
    return [None]
  root = op.called[0].root
  found = []
  for each in root.operands if root.opcode == "tuple" else [root]:
    changes = _changes(each)
    base, changed = changes[0] or (each, 0) if len(changes) == 1 else (each, 0)
    while base.opcode in _VIEWS:
      base = base.operands[0]
    # Which operand of the fusion it is; what the fusion makes itself is new.
    is_outside = base.opcode == "parameter"
    found.append(
      (op.operands[int(base.inputs)], changed) if is_outside else None
    )
  return found


def _is_unfinished(op: Op) -> bool:
  """Whether a collective goes on in a later fusion, where it counts.

  A TPU spreads one over several fusions and rounds of loops, each of which
  takes and returns all of it.
  """
  if 'chain_id="' not in op.rest:
    return False
  return not any(_DONE in user.rest for user, _ in op.users)
