"""Follows a run in a terminal, by the files that it writes: takes no JAX."""

import shutil
import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax import bucket, files, terminal
from moejax import workdir as workdir_lib
from moejax.analysis import colors
from moejax.training import metrics

# Shades of a load over an even share, without colors: of nothing, then a
# quarter of a share each, up to twice the share and more.
_SHADES, _PLAIN_SHADES = "·▁▂▃▄▅▆▇█", "x.-:=+*#@"
_OF_RESULT = ("test", "best_step", "steps")
# Steps whose time says how long the rest takes.
_TIMED = 9


def watch(workdir: files.Path, every: float = 2.0) -> None:
  """Shows how a run is doing until it has its result.

  On a terminal that is one view, drawn anew in its place; elsewhere a line for
  each step that is logged meanwhile. Only reads.

  Args:
    workdir: of the run.
    every: seconds between two looks.

  FileNotFoundError where no run was made, and none begins; ValueError where a
  file is damaged, or where nobody trains the run any longer.
  """
  run, screen = _Run(workdir), _Screen()
  if not run.is_alive():
    workdir_lib.recall(workdir)
  terminal.say(f"watching {workdir}; Ctrl-C ends this, not the run")
  while True:
    # First: what ends after this look has written all by the next.
    alive = run.is_alive()
    run.read()
    screen.show(run)
    if run.result:
      test = metrics.describe(run.result["test"], _unit(run.result["test"]))
      terminal.say(
        f"ended: test {test}, by the best checkpoint (step"
        f" {run.result['best_step']:,} of {run.result['steps']:,})"
      )
      return
    if not alive:
      raise ValueError(
        f"nobody trains the run in {workdir}, which stopped at step"
        f" {run.step:,} of {run.steps or 0:,} or soon after; the same `moejax"
        " train` goes on from its last checkpoint."
      )
    time.sleep(every)


class _Run:
  """What the files of a run tell.

  Attributes:
    steps: how many it has; None before it begins.
    lines: its metrics; those before `news` were there at the last look.
    loads: of each mixture the step and the edges to each expert, the last.
    result: of its end; empty before that.
    quiet: seconds since something was new.
  """

  def __init__(self, workdir: files.Path):
    self._workdir, self._content = workdir, b""
    # The last sign of life, in a bucket, and when it was first seen.
    self._sign, self._since = b"", time.monotonic()
    self._changed = time.monotonic()
    self.steps: int | None = None
    self.lines: list[dict[str, Any]] = []
    self.loads: dict[str, tuple[int, np.ndarray]] = {}
    self.result: dict[str, Any] = {}
    self.news = 0

  @property
  def quiet(self) -> float:
    return time.monotonic() - self._changed

  @property
  def step(self) -> int:
    """The last step that is known."""
    return self.lines[-1]["step"] if self.lines else 0

  def is_alive(self) -> bool:
    """Returns whether somebody trains it, or may."""
    lock = self._workdir / files.LOCK_FILE
    if not bucket.is_in(lock):
      return files.is_locked(lock)
    sign = _content(lock)
    if sign != self._sign:
      self._sign, self._since = sign, time.monotonic()
    return bool(sign) and time.monotonic() - self._since < bucket.LEASE

  def read(self) -> None:
    """Looks again."""
    folder = self._workdir
    try:
      name = workdir_lib.CONFIG_FILE
      if files.exists(folder / name):
        self.steps = int(workdir_lib.recall(folder)["train"]["steps"])
      # Before the metrics, which then are whole.
      name = workdir_lib.RESULT_FILE
      if files.exists(folder / name):
        found = metrics.numbers(files.read_json(folder / name))
        self.result = {each: found[each] for each in _OF_RESULT}
    except (LookupError, TypeError):
      raise ValueError(
        f"{folder / name} is damaged; put it back from a copy."
      ) from None
    content = _content(folder / metrics.METRICS_FILE)
    # Another line may be in writing.
    content = content[: content.rfind(b"\n") + 1]
    if not content.startswith(self._content):
      # A run that goes on has dropped some.
      self._content, self.lines = b"", []
    self.news = len(self.lines)
    if content == self._content:
      return
    parsed = map(
      metrics.parsed_line, content[len(self._content) :].splitlines()
    )
    self.lines += [line for line in parsed if line]
    self._content, self._changed = content, time.monotonic()
    lines = []
    for text in reversed(_content(folder / metrics.LOADS_FILE).splitlines()):
      line = metrics.parsed_line(text, of_loads=True)
      if line and lines and line["step"] < lines[0]["step"]:
        break
      lines += [line] if line else []
    # Who sent the run here may have written any name.
    self.loads = {
      terminal.printable(terminal.one_line(line["layer"])): (
        line["step"],
        np.array(line["count"]),
      )
      for line in reversed(lines)
    }

  def last(self, split: str) -> Mapping[str, Any]:
    """Returns the last line of a split; empty if there is none."""
    own = (line for line in reversed(self.lines) if line["split"] == split)
    return next(own, {})

  def left(self) -> str:
    """Says how long the steps that are left take, in words."""
    times = [
      line["words"] / line["words_per_second"]
      for line in self.lines[-3 * _TIMED :]
      if line.get("words_per_second") and "words" in line
    ]
    if not times or not self.steps:
      return "time left unknown yet"
    seconds = statistics.median(times[-_TIMED:])
    return f"{metrics.clock((self.steps - self.step) * seconds)} left"


class _Screen:
  """Shows a run, in place where the terminal can."""

  def __init__(self):
    # Of the last view.
    self._height, self._columns = 0, 0
    self._looked = False

  def show(self, run: _Run) -> None:
    """Draws, or prints what is new."""
    columns, rows = shutil.get_terminal_size()
    if not terminal.is_live():
      self._print_news(run)
      return
    view = _view(run, columns - 1)
    if not terminal.obeys():
      if run.news < len(run.lines):
        terminal.draw("\n".join(view) + "\n")
      return
    if len(view) > rows - 2:
      more = len(view) - rows + 3
      said = f"and {more} more, in a higher terminal"[: columns - 1]
      view = [*view[: rows - 3], said]
    back = f"\x1b[{self._height}F" if self._height else ""
    # Lines that were drawn for another width are broken now.
    if self._height and columns != self._columns:
      back = "\x1b[H\x1b[2J"
    lines = "".join(f"{line}\x1b[K\n" for line in view)
    terminal.draw(f"{back}{lines}\x1b[J")
    self._height, self._columns = len(view), columns

  def _print_news(self, run: _Run) -> None:
    new = run.lines[run.news :]
    # Of what was before the first look, the end.
    new, self._looked = new if self._looked else new[-1:], True
    for line in new:
      if line["split"] == "train":
        said = f"{metrics.describe_step(line, 'word')}  {run.left()}"
      elif line["split"] == "validation":
        said = f"validation {metrics.describe(line, _unit(line))}"
      else:
        continue
      terminal.say(f"step {line['step']:,}/{run.steps or 0:,}  {said}")


def _content(path: files.Path) -> bytes:
  try:
    return files.read(path)
  except FileNotFoundError:
    return b""


def _unit(values: Mapping[str, Any]) -> str:
  of_words = values.get("word_perplexity") == values["perplexity"]
  return "word" if of_words else "token"


def _view(run: _Run, columns: int) -> list[str]:
  """Returns lines of so many columns at most."""
  train = run.last("train")
  if not run.steps or not train:
    return ["no step is logged yet: it reads its text, or compiles"]
  full, empty = "█░" if terminal.shows("█░") else "#-"
  done = round(20 * min(1.0, run.step / run.steps))
  head = (
    f"step {run.step:,} of {run.steps:,}  {full * done}{empty * (20 - done)}"
  )
  head += f"  {run.left()}"
  if run.quiet > 10:
    head += f"  nothing new for {metrics.clock(run.quiet)}"
  view = [
    head,
    f"step {train['step']:,}: {metrics.describe_step(train, 'word')}",
  ]
  if validation := run.last("validation"):
    every = (line for line in run.lines if line["split"] == "validation")
    best = min(every, key=lambda line: line["perplexity"])
    view.append(
      f"validation perplexity {validation['perplexity']:,.2f} per"
      f" {_unit(validation)} at step {validation['step']:,}; best"
      f" {best['perplexity']:,.2f} at step {best['step']:,}"
    )
  view = [line[:columns] for line in view]
  if not run.loads:
    return view
  step = max(step for step, _ in run.loads.values())
  told = {
    layer: (
      f"max/mean {counts.max() / max(counts.mean(), 1e-10):.2f}"
      f"  {int((counts == 0).sum())} unused"
    )
    for layer, (_, counts) in run.loads.items()
  }
  # Names give way, then what is told, then the strip.
  of_name = min(max(map(len, run.loads)), columns // 3)
  of_told = max(map(len, told.values())) + 2
  of_told = of_told if columns - of_name - of_told > 20 else 0
  width = max(1, columns - of_name - of_told - 1)
  most = max(counts.size for _, counts in run.loads.values())
  together = -(-most // width)
  whose = "an expert" if together == 1 else f"up to {together} experts"
  # Shares of what would be even.
  said = f"load at step {step:,}, {whose} a cell: "
  scale = {"none": 0.0, "half": 0.5, "even": 1.0, "twice": 2.0}
  view.append(said[:columns])
  used = len(view[-1])
  for name, share in scale.items():
    # Colors have no width.
    if (used := used + len(name) + 3) <= columns:
      view[-1] += f"{_cell(share)} {name} "
  for layer, (_, counts) in run.loads.items():
    size = counts.size
    shares = counts / max(counts.mean(), 1e-10)
    together = -(-size // width)
    cells = [
      _cell(float(shares[i : i + together].mean()))
      for i in range(0, size, together)
    ]
    # A few experts have wider cells.
    wide = max(1, min(3, width // size))
    strip = "".join(cell for cell in cells for _ in range(wide))
    strip += " " * (width - wide * len(cells))
    name = layer if len(layer) <= of_name else f"~{layer[1 - of_name :]}"
    about = f"{told[layer]:>{of_told}}" if of_told else ""
    view.append(f"{name:<{of_name}} {strip}{about}")
  return view


def _cell(share: float) -> str:
  """Returns a letter, colored where that can be, for a load."""
  if terminal.colors() and share > 0:
    ends = (colors.SPARSE, "#d8d8d8", colors.DENSE)
    at = min(share, 1.999)
    low, high = (
      [int(name[i : i + 2], 16) for i in (1, 3, 5)]
      for name in ends[int(at) : int(at) + 2]
    )
    mixed = (
      round(a + (b - a) * (at % 1)) for a, b in zip(low, high, strict=True)
    )
    return terminal.on(" ", "#" + "".join(f"{each:02x}" for each in mixed))
  shades = _SHADES if terminal.shows(_SHADES) else _PLAIN_SHADES
  # What is not nothing does not look like it.
  return shades[0 if share == 0 else min(8, 1 + int(4 * share))]
