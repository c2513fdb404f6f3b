"""Where numbers go: JSON lines, TensorBoard, and the person who waits."""

import json
import math
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

import tqdm
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from moejax import files, terminal

METRICS_FILE = "metrics.jsonl"
BOARD = "tensorboard"
# What training lowers: the second is of a few words drawn at each step, against
# which it is easier to guess right than against all.
LOSSES = ("loss", "sampled_loss")
# JSON has no numbers for them; the strings are those of Protobuf's JSON, and
# pandas takes them for what they are.
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def as_json(values: Any, indent: int | None = None) -> str:
  """Returns strict JSON; of what is not finite, a string."""
  return json.dumps(_strict(values), indent=indent, allow_nan=False)


def _strict(values: Any) -> Any:
  if isinstance(values, Mapping):
    return {name: _strict(value) for name, value in values.items()}
  if isinstance(values, float) and not math.isfinite(values):
    return next(n for n in _NOT_FINITE if str(float(n)) == str(float(values)))
  return values


def numbers(values: dict[str, Any]) -> dict[str, Any]:
  """Returns what was read, with the numbers that `as_json` wrote as strings."""
  found = values.copy()
  for name, value in values.items():
    if isinstance(value, dict):
      found[name] = numbers(value)
    elif value in _NOT_FINITE:
      found[name] = float(value)
  return found


class Writer:
  """Writes one JSON line and one TensorBoard event per step and split.

  Opened again at `step`, it first drops what a run resumed there writes again:
  the lines after that step, and the test, which comes last of all. Lines that
  are damaged it sets aside.
  """

  def __init__(self, workdir: files.Path, step: int):
    path = workdir / METRICS_FILE
    sound, damaged = _lines(path)
    if damaged:
      aside = path.with_name(f"damaged-{path.name}-{time.time_ns()}")
      files.write_whole(aside, b"".join(line + b"\n" for line in damaged))
      terminal.warn(
        f"{terminal.one_line(path)}: {_count(damaged)} damaged; what is there"
        f" now lies in {aside.name}, all other lines are kept."
      )
    kept = [
      as_json(line) + "\n"
      for line in sound
      if line["step"] <= step and line["split"] != "test"
    ]
    files.write_whole(path, "".join(kept))
    self._file = files.open_regular(path, "ab")
    self._board = _Board(workdir / BOARD, step + 1)

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    """Writes the values of a split ("train", "validation", ...) at a step."""
    line = {"step": step, "split": split, **values}
    self._file.write(as_json(line).encode() + b"\n")
    self._file.flush()
    self._board.add(step, {f"{split}/{n}": v for n, v in values.items()})

  def flush(self) -> None:
    """Puts on the disk what is written so far."""
    files.sync(self._file)
    self._board.flush()

  def close(self) -> None:
    """Flushes and closes both."""
    self._file.close()
    self._board.close()


class _Board:
  """A file of events for TensorBoard, which forgets what was from `step` on.

  TensorBoard reads the files of a run by their names, in which the time stands,
  and what the later says counts. So the name of this one is later than all that
  are there, whatever the clock says now.
  """

  def __init__(self, folder: files.Path, step: int):
    folder.mkdir(exist_ok=True)
    stem = "events.out.tfevents."
    stamps = [f.name.removeprefix(stem)[:10] for f in folder.glob(f"{stem}*")]
    last = max((int(stamp) for stamp in stamps if stamp.isdecimal()), default=0)
    stamp = max(int(time.time()), last + 1)
    path = folder / f"{stem}{stamp:010}.{socket.gethostname()}"
    self._file = files.open_regular(path, "xb")
    self._write(file_version="brain.Event:2")
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step=step, session_log=start)

  def add(self, step: int, values: Mapping[str, float]) -> None:
    """Adds a point to the curve of each name."""
    points = [
      # Names hold those of languages, which users gave.
      summary_pb2.Summary.Value(tag=terminal.printable(n), simple_value=value)
      for n, value in values.items()
    ]
    self._write(step=step, summary=summary_pb2.Summary(value=points))

  def flush(self) -> None:
    """Puts on the disk what is written so far."""
    files.sync(self._file)

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def _write(self, **what: Any) -> None:
    event = event_pb2.Event(wall_time=time.time(), **what).SerializeToString()
    length = struct.pack("<Q", len(event))
    for part in (length, event):
      self._file.write(part + struct.pack("<I", masked_crc32c(part)))
    self._file.flush()


def read(path: files.Path) -> list[dict[str, Any]]:
  """Reads a run's metrics, but for a last line that a crash cut short.

  Lines that are damaged are left out, and told.
  """
  sound, damaged = _lines(path)
  if damaged:
    terminal.warn(
      f"{terminal.one_line(path)}: {_count(damaged)} damaged and left out."
    )
  return sound


def _count(lines: list[bytes]) -> str:
  return "1 line is" if len(lines) == 1 else f"{len(lines):,} lines are"


def _lines(path: files.Path) -> tuple[list[dict[str, Any]], list[bytes]]:
  """Returns the sound lines of a file and the damaged ones."""
  try:
    content = files.read(path)
  except FileNotFoundError:
    return [], []
  sound, damaged = [], []
  *whole, last = content.split(b"\n")
  for line in whole:
    values = _parsed(line)
    if values is None:
      damaged.append(line)
    else:
      sound.append(values)
  # Cut short by a crash, or being written just now: it is no damage.
  values = _parsed(last)
  return sound + ([values] if values else []), damaged


def _parsed(line: bytes) -> dict[str, Any] | None:
  """Reads a line; None where it is none that `Writer` writes."""
  try:
    values = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(values, dict):
    return None
  values = numbers(values)
  step, split = values.get("step"), values.get("split")
  others = [v for n, v in values.items() if n not in ("step", "split")]
  sound = (
    type(step) is int
    and 0 <= step < 2**63
    and isinstance(split, str)
    and all(type(value) in (int, float) for value in others)
    # An int of more digits than a float has cannot be drawn.
    and all(type(v) is float or abs(v) < 2**63 for v in others)
  )
  return values if sound else None


class Progress:
  """A live bar on a terminal, plain lines elsewhere; time left on both."""

  def __init__(self, step: int, steps: int, unit: str = "word"):
    self._steps, self._unit = steps, unit
    live = terminal.Live()
    self._live = live.isatty()
    self._bar = tqdm.tqdm(
      file=live,
      initial=step,
      total=steps,
      unit="step",
      disable=not self._live,
      dynamic_ncols=True,
    )
    self._begin: tuple[float, int] | None = None
    self._validation = ""

  def advance(self, step: int) -> None:
    """Tells that a step is done."""
    # The first step compiles: the time left must not count it.
    if self._begin is None:
      self._begin = (time.monotonic(), step)
    self._bar.update(step - self._bar.n)

  def report(self, step: int, values: Mapping[str, float]) -> None:
    """Shows a step's loss and speed, and the last validation."""
    name = next(name for name in LOSSES if name in values)
    text = (
      f"{name.replace('_', ' ')} {values[name]:.3f}"
      f"  {values['words_per_second']:,.0f}"
      f" {self._unit}s/s{self._validation}"
    )
    if self._live:
      self._bar.set_postfix_str(text)
    else:
      self.say(f"step {step}/{self._steps}  {text}  {self._left(step)}")

  def validated(self, step: int, values: Mapping[str, float]) -> None:
    """Shows a validation, and keeps it in sight."""
    self._validation = f"  validation {values['perplexity']:,.1f}"
    said = describe(values, self._unit)
    self.say(f"step {step}: validation {said}")

  def say(self, text: str) -> None:
    """Prints a line without breaking the bar."""
    self._bar.clear()
    terminal.say(text)
    self._bar.refresh()

  def close(self) -> None:
    """Leaves the bar as it stands."""
    self._bar.close()

  def _left(self, step: int) -> str:
    begin, first = self._begin or (0.0, step)
    if step <= first:
      return "time left unknown yet"
    seconds = (time.monotonic() - begin) / (step - first)
    return f"{clock((self._steps - step) * seconds)} left"


class Silent:
  """In place of Writer and Progress on all processes but the first."""

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    """Writes nothing."""

  def flush(self) -> None:
    """Has nothing to flush."""

  def advance(self, step: int) -> None:
    """Shows nothing."""

  def report(self, step: int, values: Mapping[str, float]) -> None:
    """Shows nothing."""

  def validated(self, step: int, values: Mapping[str, float]) -> None:
    """Shows nothing."""

  def say(self, text: str) -> None:
    """Says nothing."""

  def close(self) -> None:
    """Has nothing to close."""


class Speed:
  """Words per second; the first step, which compiles, is left out."""

  def __init__(self):
    self._words = 0.0
    self._since: float | None = None

  def add(self, words: float) -> None:
    """Counts the words of a step that has just ended."""
    if self._since is None:
      self._since = time.monotonic()
    else:
      self._words += words

  def read(self) -> float:
    """Returns the speed since the last reading, 0 before there is one."""
    if self._since is None or not self._words:
      return 0.0
    speed = self._words / (time.monotonic() - self._since)
    self._words, self._since = 0.0, time.monotonic()
    return speed

  def restart(self) -> None:
    """Forgets the time that something else has taken."""
    self._words, self._since = 0.0, None


def describe(values: Mapping[str, float], unit: str) -> str:
  """Returns an evaluation in words, whose perplexity is that of a unit."""
  said = (
    f"perplexity {values['perplexity']:,.2f} per {unit}"
    f" ({values['words']:,.0f} {unit}s)"
  )
  if "bleu" in values:
    said += f", BLEU {values['bleu']:.2f}, chrF {values['chrf']:.2f}"
  return said


def clock(seconds: float) -> str:
  """Returns seconds as [hours:]minutes:seconds."""
  return tqdm.tqdm.format_interval(seconds)
