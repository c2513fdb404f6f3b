"""The text of a compiled program: its instructions, and how often each runs."""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple


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
    """Without what a TPU pads it by."""
    bits = re.search(r"\d+", self.dtype)
    width = int(bits[0]) if bits else 8 * (self.dtype == "pred")
    return math.ceil(math.prod(self.sizes) * width / 8)


class Computation:
  """Instructions under one name, with its root and parameters."""

  def __init__(self, name: str):
    self.name = name
    self.ops: dict[str, Op] = {}
    self.parameters: dict[int, Op] = {}
    self.root: Op | None = None


class Op:
  """An instruction: %name = shape opcode(inputs), rest.

  Attributes:
    name: of what it makes.
    shape: the text of its shape.
    opcode: as written.
    kind: the opcode; that of an asynchronous start is the whole operation's.
    inputs: the text between the brackets.
    rest: the text of the attributes.
    within: its computation.
    program: all computations by name.
    operands: the instructions whose results it reads, in order.
    users: the instructions that read its result, and as which operand.
  """

  def __init__(
    self, line: str, within: Computation, program: dict[str, Computation]
  ):
    self.within, self.program = within, program
    root, self.name, self.shape, self.opcode, line = re.match(
      r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)", line
    ).groups()
    self.kind = self.opcode.removesuffix("-start")
    # Shapes of inputs and constants have brackets of their own.
    depth, end = 1, len(line)
    for bracket in re.finditer(r"[()]", line):
      depth += 1 if bracket[0] == "(" else -1
      if not depth:
        end = bracket.start()
        break
    self.inputs, self.rest = line[:end], line[end:]
    # What an instruction reads stands above it.
    self.operands = [within.ops[name] for name in _names(self.inputs)]
    self.users: list[tuple[Op, int]] = []
    for position, operand in enumerate(self.operands):
      operand.users.append((self, position))
    within.ops[self.name] = self
    if self.opcode == "parameter":
      within.parameters[int(self.inputs)] = self
    if root:
      within.root = self

  @functools.cached_property
  def called(self) -> list[Computation]:
    """The computations that it runs."""
    found = re.findall(
      r"\b(?:calls|to_apply|body|condition|\w+_computations?)="
      r"(\{[^}]*\}|%[\w.-]+)",
      self.rest,
    )
    return [self.program[name] for name in _names(" ".join(found))]

  @functools.cached_property
  def arrays(self) -> list[ArrayShape]:
    """What it makes: one array, or those of a tuple."""
    return [
      ArrayShape(
        dtype,
        tuple(int(size) for size in re.findall(r"\d+", sizes)),
        int(space or 0),
      )
      for dtype, sizes, space in re.findall(
        r"([a-z]\w*)\[([\d,<=]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?", self.shape
      )
    ]

  @functools.cached_property
  def results(self) -> list[ArrayShape]:
    """What comes out in the end: a start makes more than its operation."""
    if self.opcode != self.kind:
      for user, _ in self.users:
        if user.opcode.endswith("-done"):
          return user.arrays
    return self.arrays

  @functools.cached_property
  def bytes(self) -> int:
    """Of all that it makes."""
    return sum(each.bytes for each in self.arrays)


class Run(NamedTuple):
  """An instruction that runs, as often as it does.

  Attributes:
    op: the instruction.
    times: how often.
    is_bounded: whether that is known; what runs in a loop of unknown length
      counts once a round.
    is_part: whether it runs within another, as in a fusion or a reduction.
  """

  op: Op
  times: int
  is_bounded: bool
  is_part: bool


# Whole numbers that a computation takes: a loop's are elements of its tuple, by
# position; a fusion's are parameters, by name.
_Numbers = Mapping[int | str, int]
# Instructions that run the instructions of others one by one.
_CALLS = ("while", "conditional", "call", "async-start", "call-start")
# Instructions that return the number they take.
_SAME = (
  "bitcast",
  "convert",
  "copy",
  "copy-done",
  "copy-start",
  "opt-barrier",
  "reshape",
)


@functools.lru_cache(maxsize=1)
def runs(text: str) -> list[Run]:
  """Lists what runs: all branches of a condition, loops in all their rounds.

  An asynchronous computation runs where it starts. The last list is kept, as
  several readers ask for it.

  Args:
    text: `jax.stages.Compiled.as_text()` of a CPU, GPU or TPU.
  """
  program: dict[str, Computation] = {}
  for line in text.splitlines():
    if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{\s*$", line):
      within = program[head[2]] = Computation(head[2])
      if head[1]:
        entry = within
    elif re.match(r"\s+(ROOT )?%?[\w.-]+ = ", line):
      Op(line, within, program)
  return list(_walk(entry, {}, 1, True, False))


def _walk(
  computation: Computation,
  known: _Numbers,
  times: int,
  is_bounded: bool,
  is_part: bool,
) -> Iterator[Run]:
  for op in computation.ops.values():
    yield Run(op, times, is_bounded, is_part)
    if op.opcode.endswith(("-update", "-done")):
      continue
    rounds, inner = 1, {}
    if op.opcode == "while":
      rounds, inner = _loop(op, known)
    for called in op.called:
      yield from _walk(
        called,
        inner,
        times * (1 if rounds is None else rounds),
        is_bounded and rounds is not None,
        is_part or op.opcode not in _CALLS,
      )


def _loop(op: Op, known: _Numbers) -> tuple[int | None, _Numbers]:
  """Returns how often a loop goes round, and the numbers that it never changes.

  The text of a CPU or GPU says how often. That of a TPU does not: the loop's
  numbers, where they are easily told, are followed for two rounds, and it ends
  where what the same step is added to reaches what stays the same.
  """
  body, condition = (
    op.program[re.search(rf"{part}=%([\w.-]+)", op.rest)[1]]
    for part in ("body", "condition")
  )
  before = _elements(op.operands[0], known)
  after = _elements(body.root, before)
  later = _elements(body.root, after)
  same = {i: n for i, n in before.items() if n == after.get(i) == later.get(i)}
  if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', op.rest):
    return int(said[1]), same
  sides = [_compared(condition.root, each) for each in (before, after, later)]
  if None in sides:
    return None, same
  (first, end), (second, _), (third, _) = sides
  step = second - first
  if step < 1 or third - second != step or {side[1] for side in sides} != {end}:
    return None, same
  return max(0, math.ceil((end - first) / step)), same


def _compared(test: Op, known: _Numbers) -> tuple[int, int] | None:
  """Returns both sides of left < right, where a loop goes on by that."""
  while test.opcode == "fusion":
    test, known = _inside(test, known)
  if test.opcode != "compare" or "direction=LT" not in test.rest:
    return None
  sides = _all_known(test.operands, known)
  return (sides[0], sides[1]) if len(sides) == 2 else None


def _elements(op: Op, known: _Numbers) -> _Numbers:
  """Returns the known numbers of a tuple by position."""
  while op.opcode in _SAME:
    op = op.operands[0]
  return _all_known(op.operands, known) if op.opcode == "tuple" else {}


def _inside(fusion: Op, known: _Numbers) -> tuple[Op, _Numbers]:
  """Returns what a fusion ends with, and the numbers that it takes."""
  inner, taken = fusion.called[0], _all_known(fusion.operands, known)
  return inner.root, {inner.parameters[i].name: n for i, n in taken.items()}


def _all_known(ops: list[Op], known: _Numbers) -> dict[int, int]:
  # Each is told once, however many paths lead to it.
  told: dict[str, int | None] = {}
  numbers = {
    i: _number(op, known, told)
    for i, op in enumerate(ops)
    if re.match(r"[su]\d+\[\]", op.shape)
  }
  return {i: number for i, number in numbers.items() if number is not None}


def _number(op: Op, known: _Numbers, told: dict[str, int | None]) -> int | None:
  """Returns the whole number that an instruction makes, if easily told."""
  if op.name in told:
    return told[op.name]
  value = None
  if op.opcode == "constant" and re.fullmatch(r"-?\d+", op.inputs):
    value = int(op.inputs)
  elif op.opcode == "parameter":
    value = known.get(op.name)
  elif op.opcode == "get-tuple-element":
    if op.operands[0].opcode == "parameter":
      value = known.get(int(re.search(r"index=(\d+)", op.rest)[1]))
  elif op.opcode in _SAME:
    value = _number(op.operands[0], known, told)
  elif op.opcode == "add":
    terms = [_number(each, known, told) for each in op.operands]
    value = None if None in terms else sum(terms)
  elif op.opcode == "fusion":
    value = _number(*_inside(op, known), {})
  told[op.name] = value
  return value


def _names(text: str) -> list[str]:
  return re.findall(r"%([\w.-]+)", text)


def rows_and_buffer(op: Op) -> tuple[int, int]:
  """Returns the bytes of the two sides of a ragged all-to-all.

  One side is the rows of this device, the other the buffer for all that could
  come, in whichever direction they are sent.
  """
  rows, buffer = sorted(each.bytes for each in op.operands[:2])
  return rows, buffer
