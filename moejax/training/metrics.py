"""Where numbers go: JSON lines, TensorBoard, and the person who waits."""

import io
import json
import math
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import tqdm

from moejax import files, terminal

METRICS_FILE = "metrics.jsonl"
LOADS_FILE = "loads.jsonl"
# How many steps of loads are kept at most, and how many numbers of them; though
# some steps in any case.
_STEPS, _NUMBERS, _SOME = 500, 2**22, 16
_EVENTS = "events.out.tfevents."
# JSON has no numbers for them; the strings are those of Protobuf's JSON, and
# pandas takes them for what they are.
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def as_json(values: Any, indent: int | None = None) -> str:
  """Returns strict JSON; of what is not finite, a string."""

  def strict(value):
    if isinstance(value, Mapping):
      return {name: strict(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
      return [strict(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
      return json.dumps(value)
    return value

  try:
    return json.dumps(values, indent=indent, allow_nan=False)
  except ValueError:
    return json.dumps(strict(values), indent=indent, allow_nan=False)


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

  And loads, a JSON line for each mixture. Opened again at `step`, it first
  drops what a run resumed there writes again: the lines after that step, and
  the test, which comes last of all. Lines that are damaged it sets aside.
  TensorBoard forgets what was after that step.
  """

  def __init__(self, workdir: files.Path, step: int):
    def before(line):
      return line["step"] <= step and line.get("split") != "test"

    self._file = _go_on(workdir / METRICS_FILE, before)
    self._loads_path = workdir / LOADS_FILE
    self._loads = _go_on(self._loads_path, before)
    self._stride = self._window = 0
    # TensorBoard reads the files of a run by their names, in which the time
    # stands, and what the later says counts. So the name of this one is later
    # than all that are there, whatever the clock says now.
    folder = workdir / "tensorboard"
    folder.mkdir(exist_ok=True)
    there = folder.glob(f"{_EVENTS}*")
    stamps = [f.name.removeprefix(_EVENTS)[:10] for f in there]
    last = max((int(stamp) for stamp in stamps if stamp.isdecimal()), default=0)
    stamp = max(int(time.time()), last + 1)
    path = folder / f"{_EVENTS}{stamp:010}.{socket.gethostname()}"
    self._events = files.open_regular(path, "xb")
    self._add(file_version="brain.Event:2")
    self._add(step=step + 1, session_log={"status": "START"})

  def _add(self, **fields: Any) -> None:
    """Adds an event: its length and itself, each with its checksum."""
    # late: it may bring the packages of a cloud, and only runs that train write
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    event = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
    for part in (struct.pack("<Q", len(event)), event):
      self._events.write(part + struct.pack("<I", masked_crc32c(part)))
    self._events.flush()

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    """Writes the values of a split ("train", "validation", ...) at a step."""
    line = {"step": step, "split": split, **values}
    self._file.write(as_json(line).encode() + b"\n")
    self._file.flush()
    # Names hold those of languages, which users gave.
    points = [
      {"tag": terminal.printable(f"{split}/{name}"), "simple_value": value}
      for name, value in values.items()
    ]
    self._add(step=step, summary={"value": points})

  def write_loads(self, step: int, loads: Mapping[str, Sequence[int]]) -> None:
    """Writes the edges that each expert of each mixture got at a step.

    Kept is the first step of every stride, a power of two that doubles where
    more than `_STEPS` strides, or `_NUMBERS` numbers, would lie behind the run.
    Strides begin at 0: what is kept depends on the steps alone, and not on
    where the run was stopped.
    """
    if not loads:
      return
    entries = sum(map(len, loads.values()))
    most = max(_SOME, min(_STEPS, _NUMBERS // entries))
    stride = 1 << (step // most).bit_length()
    if stride != self._stride:
      first: dict[int, int] = {}

      def opens_one(line):
        at = line["step"]
        return first.setdefault(at // stride, at) == at

      self._loads.close()
      self._loads = _go_on(self._loads_path, opens_one)
      self._stride, self._window = stride, max(first, default=-1)
    if step // stride > self._window:
      self._window = step // stride
      for layer, count in loads.items():
        line = {"step": step, "layer": layer, "count": count}
        self._loads.write(as_json(line).encode() + b"\n")
      self._loads.flush()

  def flush(self) -> None:
    """Puts on the disk what is written so far."""
    for file in (self._file, self._loads, self._events):
      files.sync(file)

  def close(self) -> None:
    """Flushes and closes all files."""
    for file in (self._file, self._loads, self._events):
      file.close()


def read(path: files.Path) -> list[dict[str, Any]]:
  """Reads a run's metrics, but for a last line that a crash cut short.

  Lines that are damaged are left out, with a warning.
  """
  sound, damaged = _lines(path)
  if damaged:
    _warn(path, len(damaged), "")
  return sound


def loads(
  workdir: files.Path,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Reads which experts took how much as a run trained.

  Returns of each mixture the steps [T] that are kept, and the edges [T, E] of
  the whole batch to each expert at them, before any was dropped. Mixtures are
  named by their paths in the model, blocks one by one; of two levels expert j
  of group i is i * Q + j.

  Empty where there are none: without mixtures, before the first is logged, or
  of a run of a version that kept none. Damaged lines are left out, as by
  `read`.
  """
  found: dict[str, tuple[list[int], list[list[int]]]] = {}
  for line in read(workdir / LOADS_FILE):
    steps, counts = found.setdefault(line["layer"], ([], []))
    # Of another number of experts is none but what somebody has put there.
    if not counts or len(line["count"]) == len(counts[0]):
      steps.append(line["step"])
      counts.append(line["count"])
  return {
    layer: (np.array(steps), np.array(counts))
    for layer, (steps, counts) in found.items()
  }


def _warn(path: files.Path, count: int, more: str) -> None:
  name = terminal.one_line(path)
  terminal.warn(f"{name}: {count:,} damaged line(s) left out{more}.")


def _go_on(
  path: files.Path, is_kept: Callable[[dict[str, Any]], bool]
) -> BinaryIO | io.BytesIO:
  """Opens a file to add lines, of which it first keeps some."""
  sound, damaged = _lines(path)
  if damaged:
    aside = path.with_name(f"damaged-{path.name}-{time.time_ns()}")
    files.write_whole(aside, b"".join(line + b"\n" for line in damaged))
    _warn(path, len(damaged), f", and kept in {aside.name}")
  kept = [as_json(line) + "\n" for line in sound if is_kept(line)]
  files.write_whole(path, "".join(kept))
  return files.open_regular(path, "ab")


def _lines(path: files.Path) -> tuple[list[dict[str, Any]], list[bytes]]:
  """Returns the sound lines of a file and the damaged ones."""
  try:
    *whole, last = files.read(path).split(b"\n")
  except FileNotFoundError:
    return [], []
  of_loads = path.name == LOADS_FILE
  parsed = [parsed_line(line, of_loads) for line in (*whole, last)]
  # A damaged last one was cut short by a crash, or is being written just now.
  damaged = [line for line, v in zip(whole, parsed, strict=False) if v is None]
  return [values for values in parsed if values is not None], damaged


def parsed_line(line: bytes, of_loads: bool = False) -> dict[str, Any] | None:
  """Reads a line; None where it is none that `Writer` writes."""
  try:
    values = numbers(json.loads(line))
    step, name = values["step"], values["layer" if of_loads else "split"]
    found = [value for key, value in values.items() if key != "split"]
    found = list(values["count"]) if of_loads else found
  except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
    return None
  # An int of more digits than a float has cannot be drawn.
  sound = isinstance(name, str) and type(step) is int and step >= 0 and found
  sound = sound and all(
    (type(value) is float and not of_loads)
    or (type(value) is int and abs(value) < 2**63)
    for value in found
  )
  return values if sound else None


class Progress:
  """A live bar on a terminal, plain lines elsewhere; time left on both."""

  def __init__(self, step: int, steps: int, unit: str = "word"):
    self._steps, self._unit = steps, unit
    self._bar = terminal.bar(steps, "step", initial=step, dynamic_ncols=True)
    self._live = not self._bar.disable
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
    text = describe_step(values, self._unit)
    if self._live:
      # A bar has no room for more.
      self._bar.set_postfix_str(text + self._validation)
      return
    text += f"  {values['tflops_per_device']:.3g} TFLOPS a device"
    left = "time left unknown yet"
    begin, first = self._begin or (0.0, step)
    if step > first:
      seconds = (time.monotonic() - begin) / (step - first)
      left = f"{clock((self._steps - step) * seconds)} left"
    self.say(f"step {step}/{self._steps}  {text}{self._validation}  {left}")

  def validated(self, step: int, values: Mapping[str, float]) -> None:
    """Shows a validation, and keeps it in sight."""
    self._validation = f"  validation {values['perplexity']:,.1f}"
    self.say(f"step {step}: validation {describe(values, self._unit)}")

  def say(self, text: str) -> None:
    """Prints a line without breaking the bar."""
    self._bar.clear()
    terminal.say(text)
    self._bar.refresh()

  def close(self) -> None:
    """Leaves the bar as it stands."""
    self._bar.close()


class Silent:
  """In place of Writer and Progress on all processes but the first."""

  def __getattr__(self, name: str) -> Callable[..., None]:
    return lambda *args: None


class Speed:
  """Words and FLOPs per second; the first step, which compiles, is left out."""

  def __init__(self):
    self.restart()

  def restart(self) -> None:
    """Forgets the time that something else has taken."""
    self._since, self._work = None, (0.0, 0.0)

  def add(self, words: float, flops: float, ended: float) -> None:
    """Counts a step that ended at a time of `time.monotonic`."""
    if self._since is None:
      self._since = ended
    else:
      self._work = self._work[0] + words, self._work[1] + flops
    self._ended = ended

  def read(self) -> tuple[float, float]:
    """Returns both of the steps since the last reading; 0 if there is none."""
    seconds, (words, flops) = self._ended - self._since, self._work
    self._since, self._work = self._ended, (0.0, 0.0)
    return (words / seconds, flops / seconds) if words else (0.0, 0.0)


def describe_step(values: Mapping[str, Any], unit: str) -> str:
  """Returns a step's loss and speed in words."""
  # Sampled losses are lower: a few words are easier to tell apart than all.
  name = "loss" if "loss" in values else "sampled_loss"
  return (
    f"{name.replace('_', ' ')} {values[name]:.3f}"
    f"  {values['words_per_second']:,.0f} {unit}s/s"
  )


def describe(values: Mapping[str, Any], unit: str) -> str:
  """Returns an evaluation in words, whose perplexity is that of a unit."""
  said = (
    f"perplexity {values['perplexity']:,.2f} per {unit}"
    f" ({values['words']:,.0f} {unit}s)"
  )
  # Not of translations, nor in results of older versions.
  if "bits_per_byte" in values:
    if unit != "word":
      said += f", {values['word_perplexity']:,.2f} per word"
    said += f", {values['bits_per_byte']:.3f} bits per byte"
  return said + (f", {describe_scores(values)}" if "bleu" in values else "")


def describe_scores(values: Mapping[str, Any]) -> str:
  """Returns scores of translations in words, those that there are."""
  said = f"BLEU {values['bleu']:.2f}, chrF {values['chrf']:.2f}"
  if values.get("moses_bleu") is not None:
    said += f", BLEU of Moses tokens {values['moses_bleu']:.2f}"
  return said


def clock(seconds: float) -> str:
  """Returns seconds as [hours:]minutes:seconds."""
  return tqdm.tqdm.format_interval(seconds)
