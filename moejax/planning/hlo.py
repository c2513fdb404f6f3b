"""The text of a compiled program: its instructions, and how often each runs."""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Op(NamedTuple):
  """An instruction: %name = shape opcode(operands)rest."""

  shape: str
  opcode: str
  operands: str
  rest: str
  name: str
  is_root: bool
  within: "Computation"


class Computation:
  """Instructions under one name, the last of which is its result."""

  def __init__(self, name: str):
    self.name = name
    self.ops: dict[str, Op] = {}
    # What numbers are, see `_value`: one number leads to many others.
    self.values: dict[Any, _Value | None] = {}

  @functools.cached_property
  def root(self) -> Op:
    return next(op for op in self.ops.values() if op.is_root)

  @functools.cached_property
  def parameters(self) -> dict[int, Op]:
    return {
      int(op.operands.strip("()")): op
      for op in self.ops.values()
      if op.opcode == "parameter"
    }

  @functools.cached_property
  def users(self) -> dict[str, list[tuple[Op, int]]]:
    """Who takes what each instruction makes, and as which operand."""
    found: dict[str, list[tuple[Op, int]]] = {name: [] for name in self.ops}
    for op in self.ops.values():
      for place, operand in enumerate(operands(op)):
        found[operand.name].append((op, place))
    return found


# The entry is "".
Program = Mapping[str, Computation]
# Numbers among the elements of the tuple that a computation takes, by place.
_Known = Mapping[int, int]
# An element of that tuple, or None of them, plus a number.
_Value = tuple[int | None, int]


class Run(NamedTuple):
  """An instruction that runs, as often as it does.

  Attributes:
    op: it.
    times: how often.
    is_bounded: whether that is known; in a loop of unknown length it counts
      once a time round.
    is_alone: not as a part of another, as in a fusion or a reduction.
  """

  op: Op
  times: int
  is_bounded: bool
  is_alone: bool


class ArrayShape(NamedTuple):
  """An array's shape.

  Attributes:
    dtype: of its entries.
    sizes: of its axes.
    space: the memory that it lies in; 0 is the large one.
  """

  dtype: str
  sizes: tuple[int, ...]
  space: int

  @property
  def bytes(self) -> int:
    bits = re.search(r"\d+", self.dtype)
    width = int(bits[0]) if bits else 8 * (self.dtype == "pred")
    return math.ceil(math.prod(self.sizes) * width / 8)


def parse(text: str) -> Program:
  """Reads `jax.stages.Compiled.as_text()` of a CPU, GPU or TPU."""
  program: dict[str, Computation] = {}
  within = Computation("")
  for line in text.splitlines():
    if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{\s*$", line):
      within = Computation(head[2])
      program["" if head[1] else head[2]] = within
    elif found := re.match(r"\s+(ROOT )?%?([\w.-]+) = (.*)", line):
      is_root, name, rest = found.groups()
      shape, rest = _cut(rest) if rest[0] == "(" else rest.split(" ", 1)
      opcode, bracket, rest = rest.strip().partition("(")
      inputs, rest = _cut(bracket + rest)
      within.ops[name] = Op(
        shape, opcode, inputs, rest, name, bool(is_root), within
      )
  return program


def walk(program: Program) -> Iterator[Run]:
  """Yields what runs: all branches of a condition, loops as often as they go.

  An asynchronous computation runs where it starts.
  """
  yield from _walk(program, program[""], 1, True, True, {})


def operands(op: Op) -> list[Op]:
  """Returns the instructions whose results one reads, in order."""
  return [op.within.ops[name] for name in _names(op.operands)]


def called(op: Op) -> list[str]:
  """Names the computations that an instruction runs."""
  found = re.findall(
    r"\b(?:calls|to_apply|body|condition|\w+_computations?)="
    r"(\{[^}]*\}|%[\w.-]+)",
    op.rest,
  )
  return _names(" ".join(found))


def result(op: Op) -> str:
  """Returns the shape of what comes out; that of a start holds more."""
  if op.opcode.endswith("-start"):
    for user, _ in op.within.users[op.name]:
      if user.opcode.endswith("-done"):
        return user.shape
  return op.shape


def arrays(shape: str) -> list[ArrayShape]:
  """Lists the arrays of a shape, one or those of a tuple."""
  return [
    ArrayShape(
      dtype,
      tuple(int(size) for size in re.findall(r"\d+", sizes)),
      int(space or 0),
    )
    for dtype, sizes, space in re.findall(
      r"([a-z]\w*)\[([\d,<=]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?", shape
    )
  ]


def size(shape: str) -> int:
  """Returns the bytes of a shape, without what a TPU pads it by."""
  return sum(each.bytes for each in arrays(shape))


def rows_and_room(op: Op) -> tuple[int, int]:
  """Returns the bytes of the two sides of a ragged all-to-all.

  One side is the rows of this device, the other room for all that could come,
  whichever way they go.
  """
  rows, room = sorted(size(each.shape) for each in operands(op)[:2])
  return rows, room


def _cut(text: str) -> tuple[str, str]:
  """Splits a text after the bracket that closes its first."""
  depth = 0
  for bracket in re.finditer(r"[()]", text):
    depth += 1 if bracket[0] == "(" else -1
    if not depth:
      return text[: bracket.end()], text[bracket.end() :]
  return text, ""


def _names(text: str) -> list[str]:
  return re.findall(r"%([\w.-]+)", text)


def _walk(
  program: Program,
  computation: Computation,
  times: int,
  is_bounded: bool,
  is_alone: bool,
  known: _Known,
) -> Iterator[Run]:
  """Yields what runs of a computation, given the numbers that it takes."""
  for op in computation.ops.values():
    yield Run(op, times, is_bounded, is_alone)
    if op.opcode.endswith(("-update", "-done")):
      continue
    rounds, inner = 1, {}
    if op.opcode == "while":
      rounds, inner = _loop(program, op, known)
    for name in called(op):
      yield from _walk(
        program,
        program[name],
        times * (1 if rounds is None else rounds),
        is_bounded and rounds is not None,
        is_alone and op.opcode in _CALLS,
        inner,
      )


# What runs the instructions of others one by one.
_CALLS = ("while", "conditional", "call", "async-start", "call-start")

# -- how often a loop goes round ----------------------------------------------


def _loop(
  program: Program, op: Op, known: _Known
) -> tuple[int | None, dict[int, int]]:
  """Returns how often a loop goes round, and the numbers that it never changes.

  CPUs and GPUs say so; for a TPU count from where the loop begins to where it
  ends, by what it adds each time.
  """
  condition, body = (
    program[re.search(rf"{part}=%([\w.-]+)", op.rest)[1]]
    for part in ("condition", "body")
  )
  first = _numbers(program, operands(op)[0])
  after = _numbers(program, body.root)
  start = {i: _number(value, known) for i, value in first.items()}
  start = {i: number for i, number in start.items() if number is not None}
  same = {i: n for i, n in start.items() if after.get(i) == (i, 0)}
  if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', op.rest):
    return int(said[1]), same
  test, arguments = _inside(program, condition.root, None)
  if test.opcode != "compare" or "direction=LT" not in test.rest:
    return None, same
  left, right = (_value(program, each, arguments) for each in operands(test))
  end = _number(right, same)
  place, ahead = left or (None, 0)
  counter, step = after.get(place) or (None, 0)
  if end is None or place not in start or counter != place or step < 1:
    return None, same
  return max(0, math.ceil((end - ahead - start[place]) / step)), same


def _numbers(program: Program, op: Op) -> dict[int, _Value]:
  """Returns the whole numbers in a tuple, by place."""
  while op.opcode in _SAME:
    op = operands(op)[0]
  if op.opcode != "tuple":
    return {}
  found = {
    place: _value(program, each, None)
    for place, each in enumerate(operands(op))
    if re.match(r"[su]\d+\[\]", each.shape)
  }
  return {place: value for place, value in found.items() if value}


def _number(value: _Value | None, known: _Known) -> int | None:
  if value is None:
    return None
  place, number = value
  base = 0 if place is None else known.get(place)
  return None if base is None else base + number


def _value(
  program: Program, op: Op, arguments: tuple[_Value | None, ...] | None
) -> _Value | None:
  """Returns what a number is, where that is easily told.

  Args:
    program: all of it.
    op: makes the number.
    arguments: of its computation; None where that takes a tuple.
  """
  known, key = op.within.values, (op.name, arguments)
  if key not in known:
    known[key] = _derived(program, *_inside(program, op, arguments))
  return known[key]


def _derived(
  program: Program, op: Op, arguments: tuple[_Value | None, ...] | None
) -> _Value | None:
  if op.opcode == "constant":
    number = re.fullmatch(r"\((-?\d+)\)", op.operands)
    return (None, int(number[1])) if number else None
  if op.opcode == "parameter":
    return arguments[int(op.operands.strip("()"))] if arguments else None
  if op.opcode == "get-tuple-element":
    is_argument = operands(op)[0].opcode == "parameter" and not arguments
    place = int(re.search(r"index=(\d+)", op.rest)[1])
    return (place, 0) if is_argument else None
  if op.opcode in _SAME:
    return _value(program, operands(op)[0], arguments)
  if op.opcode != "add":
    return None
  one, other = (_value(program, each, arguments) for each in operands(op))
  if one is None or other is None or None not in (one[0], other[0]):
    return None
  place = one[0] if other[0] is None else other[0]
  return place, one[1] + other[1]


def _inside(
  program: Program, op: Op, arguments: tuple[_Value | None, ...] | None
) -> tuple[Op, tuple[_Value | None, ...] | None]:
  """Returns what a fusion ends with and the fusion's arguments."""
  while op.opcode == "fusion":
    taken = operands(op)
    arguments = tuple(_value(program, each, arguments) for each in taken)
    op = program[called(op)[0]].root
  return op, arguments


_SAME = (
  "bitcast",
  "convert",
  "copy",
  "copy-done",
  "copy-start",
  "opt-barrier",
  "reshape",
)
