"""The text of a compiled program: its instructions, and how often each runs."""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class ArrayShape(NamedTuple):
  """An array's shape."""

  dtype: str  # Of its entries.
  sizes: tuple[int, ...]  # Of its axes.
  space: int  # The memory that it lies in; 0 is the large one.

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

  Its kind is the opcode; that of an asynchronous start is the whole
  operation's. Operands are the instructions whose results it reads, in order;
  users those that read its own, and as which operand.
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
  """An instruction that runs, as often as it does."""

  op: Op  # The instruction.
  times: int  # How often.
  # Whether that is known; what runs in a loop of unknown length counts once a
  # round.
  is_bounded: bool
  # Whether it runs within another, as in a fusion or a reduction.
  is_part: bool


# What is known of the numbers that a computation takes, by parameter: a whole
# number, or those of a tuple by position.
_Known = Mapping[str, Any]
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
  """Lists what runs by the text of a program compiled for a CPU, GPU or TPU.

  All branches of a condition run, loops in all their rounds, an asynchronous
  computation where it starts. The last list is kept, as several ask for it.
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
  known: _Known,
  times: int,
  is_bounded: bool,
  is_part: bool,
) -> Iterator[Run]:
  for op in computation.ops.values():
    yield Run(op, times, is_bounded, is_part)
    if op.opcode.endswith(("-update", "-done")):
      continue
    rounds, same = 1, {}
    if op.opcode == "while":
      rounds, same = _loop(op, known)
    for called in op.called:
      yield from _walk(
        called,
        {called.parameters[0].name: same} if same else {},
        times * (1 if rounds is None else rounds),
        is_bounded and rounds is not None,
        is_part or op.opcode not in _CALLS,
      )


def _loop(op: Op, known: _Known) -> tuple[int | None, dict[int, int]]:
  """Returns how often a loop goes round, and the numbers that it never changes.

  The text of a CPU or GPU says how often. That of a TPU does not: the loop's
  numbers, where they are easily told, are followed for two rounds, and it ends
  where what the same step is added to reaches what stays the same.
  """
  body, condition = (
    op.program[re.search(rf"{part}=%([\w.-]+)", op.rest)[1]]
    for part in ("body", "condition")
  )
  rounds = [_value(op.operands[0], known, {}) or {}]
  for _ in range(2):
    taken = {body.parameters[0].name: rounds[-1]}
    rounds.append(_value(body.root, taken, {}) or {})
  before, after, later = rounds
  same = {i: n for i, n in before.items() if n == after.get(i) == later.get(i)}
  if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', op.rest):
    return int(said[1]), same
  name = condition.parameters[0].name
  sides = [_value(condition.root, {name: each}, {}) for each in rounds]
  if not all(isinstance(each, tuple) for each in sides):
    return None, same
  (first, end), (second, _), (third, _) = sides
  step = second - first
  if step < 1 or third - second != step or {side[1] for side in sides} != {end}:
    return None, same
  return max(0, math.ceil((end - first) / step)), same


def _value(op: Op, known: _Known, told: dict[str, Any]) -> Any:
  """Returns the whole number that an instruction makes, if easily told.

  Of a tuple, the numbers that are, by position; of left < right, both sides.
  Each is told once, however many paths lead to it.
  """
  if op.name in told or not re.match(r"[su]\d+\[\]|pred\[\]|\(", op.shape):
    return told.get(op.name)
  value = None
  if op.opcode == "constant":
    value = int(op.inputs) if re.fullmatch(r"-?\d+", op.inputs) else None
  elif op.opcode == "parameter":
    value = known.get(op.name)
  elif op.opcode in (*_SAME, *_TOLD):
    taken = [_value(each, known, told) for each in op.operands]
    if op.opcode == "tuple":
      value = {i: n for i, n in enumerate(taken) if isinstance(n, int)}
    elif op.opcode == "get-tuple-element":
      index = int(re.search(r"index=(\d+)", op.rest)[1])
      value = (taken[0] or {}).get(index)
    elif op.opcode == "fusion":
      inner = op.called[0]
      within = {inner.parameters[i].name: n for i, n in enumerate(taken)}
      value = _value(inner.root, within, {})
    elif op.opcode in _SAME:
      value = taken[0]
    elif None not in taken:
      if op.opcode == "add":
        value = sum(taken)
      elif "direction=LT" in op.rest:
        value = tuple(taken)
  told[op.name] = value
  return value


_TOLD = ("add", "compare", "fusion", "get-tuple-element", "tuple")


def _names(text: str) -> list[str]:
  return re.findall(r"%([\w.-]+)", text)


def rows_and_buffer(op: Op) -> tuple[int, int]:
  """Returns the bytes of the two sides of a ragged all-to-all.

  The rows of this device, and the buffer for all that could come.
  """
  rows, buffer = sorted(each.bytes for each in op.operands[:2])
  return rows, buffer
