"""Where numbers go: JSON lines, TensorBoard, and the person who waits."""

import json
import sys
import time
from collections.abc import Mapping

import tensorboardX
import tqdm

from moejax import files

METRICS_FILE = "metrics.jsonl"


class Writer:
  """Writes one JSON line and one TensorBoard event per step and split.

  Opened again at `step`, it first drops what a run resumed there writes again:
  the lines after that step, and the test, which comes last of all.
  """

  def __init__(self, workdir: files.Path, step: int):
    path = workdir / METRICS_FILE
    kept = [
      line
      for line in read(path)
      if line["step"] <= step and line["split"] != "test"
    ]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    files.write_whole(path, text)
    self._file = files.open_regular(path, "ab")
    self._board = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"), purge_step=step + 1
    )

  def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
    """Writes the values of a split ("train", "validation", ...) at a step."""
    line = {"step": step, "split": split, **values}
    self._file.write(json.dumps(line).encode() + b"\n")
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(f"{split}/{name}", value, step)

  def flush(self) -> None:
    """Puts on the disk what is written so far."""
    files.sync(self._file)
    self._board.flush()

  def close(self) -> None:
    """Flushes and closes both."""
    self._file.close()
    self._board.close()


def read(path: files.Path) -> list[dict]:
  """Reads a run's metrics, but for a last line that a crash cut short."""
  if not files.exists(path):
    return []
  lines = []
  for line in files.read(path).decode().splitlines():
    try:
      lines.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return lines


class Progress:
  """A live bar on a terminal, plain lines elsewhere; time left on both."""

  def __init__(self, step: int, steps: int, unit: str = "word"):
    self._steps, self._unit = steps, unit
    self._live = sys.stderr.isatty()
    self._bar = tqdm.tqdm(
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
    text = (
      f"loss {values['loss']:.3f}  {values['words_per_second']:,.0f}"
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
    self._bar.write(text, file=sys.stdout)
    sys.stdout.flush()

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
