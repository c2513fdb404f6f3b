"""Where numbers go: JSON lines, TensorBoard, and the person who waits."""

import json
import math
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

import tqdm
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from moejax import files, terminal

METRICS_FILE = "metrics.jsonl"
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

  Opened again at `step`, it first drops what a run resumed there writes again:
  the lines after that step, and the test, which comes last of all. Lines that
  are damaged it sets aside. TensorBoard forgets what was after that step.
  """

  def __init__(self, workdir: files.Path, step: int):
    path = workdir / METRICS_FILE
    sound, damaged = _lines(path)
    if damaged:
      aside = path.with_name(f"damaged-{path.name}-{time.time_ns()}")
      files.write_whole(aside, b"".join(line + b"\n" for line in damaged))
      _warn(path, len(damaged), f", and kept in {aside.name}")
    kept = [
      as_json(line) + "\n"
      for line in sound
      if line["step"] <= step and line["split"] != "test"
    ]
    files.write_whole(path, "".join(kept))
    self._file = files.open_regular(path, "ab")
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
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(step=step + 1, session_log=start)

  def _add(self, **fields: Any) -> None:
    """Adds an event: its length and itself, each with its checksum."""
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
      summary_pb2.Summary.Value(
        tag=terminal.printable(f"{split}/{name}"), simple_value=value
      )
      for name, value in values.items()
    ]
    self._add(step=step, summary=summary_pb2.Summary(value=points))

  def flush(self) -> None:
    """Puts on the disk what is written so far."""
    files.sync(self._file)
    files.sync(self._events)

  def close(self) -> None:
    """Flushes and closes both files."""
    self._file.close()
    self._events.close()


def read(path: files.Path) -> list[dict[str, Any]]:
  """Reads a run's metrics, but for a last line that a crash cut short.

  Lines that are damaged are left out, with a warning.
  """
  sound, damaged = _lines(path)
  if damaged:
    _warn(path, len(damaged), "")
  return sound


def _warn(path: files.Path, count: int, more: str) -> None:
  name = terminal.one_line(path)
  terminal.warn(f"{name}: {count:,} damaged line(s) left out{more}.")


def _lines(path: files.Path) -> tuple[list[dict[str, Any]], list[bytes]]:
  """Returns the sound lines of a file and the damaged ones."""
  try:
    *whole, last = files.read(path).split(b"\n")
  except FileNotFoundError:
    return [], []
  parsed = [_parsed(line) for line in (*whole, last)]
  # A damaged last one was cut short by a crash, or is being written just now.
  damaged = [line for line, v in zip(whole, parsed, strict=False) if v is None]
  return [values for values in parsed if values is not None], damaged


def _parsed(line: bytes) -> dict[str, Any] | None:
  """Reads a line; None where it is none that `Writer` writes."""
  try:
    values = numbers(json.loads(line))
    step, split = values["step"], values["split"]
  except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
    return None
  # An int of more digits than a float has cannot be drawn.
  sound = isinstance(split, str) and type(step) is int and step >= 0
  sound = sound and all(
    type(value) is float or (type(value) is int and abs(value) < 2**63)
    for name, value in values.items()
    if name != "split"
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
    # Sampled losses are lower: a few words are easier to tell apart than all.
    name = "loss" if "loss" in values else "sampled_loss"
    text = (
      f"{name.replace('_', ' ')} {values[name]:.3f}"
      f"  {values['words_per_second']:,.0f} {self._unit}s/s"
    )
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


def describe(values: Mapping[str, float], unit: str) -> str:
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
