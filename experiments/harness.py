"""What every experiment shares: the command line, the table, the files.

An experiment is one file: a docstring (Question, Method, Result), a generator
`rows(quick)` of dicts, a function `draw(figure, table)` that draws them and
returns the figure's title, and

  if __name__ == "__main__":
    harness.main("its_name", rows, draw)
"""

import argparse
import contextlib
import csv
import datetime
import json
import os
import pathlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import Any, NamedTuple

import jax
from absl import logging

from experiments import figures
from experiments.figures import RESULTS, Row
from moejax import __main__ as program_lib
from moejax import terminal

# Options that choose among an experiment's rows.
CHOICES = ("models", "factors", "grains")


class Milliseconds(NamedTuple):
  """The median of all repeats, and the one that was disturbed least."""

  median: float
  fastest: float


def interleaved(
  candidates: Mapping[Any, Callable[[], Any]], repeats: int, *, lead: int = 0
) -> dict[Any, Milliseconds]:
  """Times candidates in turn (A B C A B C ...), so that all see one machine.

  Each runs once before, untimed, and is waited for. In each turn `lead` runs
  come first, untimed too: steps of seconds leave each other's memory free for
  so long that a virtual machine gives it back to its host.
  """
  times = {name: [] for name in candidates}
  for _ in range(1 + repeats):
    for name, run in candidates.items():
      for _ in range(lead):
        jax.block_until_ready(run())
      begin = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(1e3 * (time.perf_counter() - begin))
  return {
    name: Milliseconds(statistics.median(each), min(each))
    for name, (_, *each) in times.items()
  }


@contextlib.contextmanager
def if_installed(what: str) -> Iterator[None]:
  """Says that there are no rows for `what` where a package of it is missing."""
  try:
    yield
  except ImportError as error:
    terminal.say(f"{error.name} is not installed: no rows for {what}")


def rounded(digits: int = 3, **values: float) -> Row:
  """Rounds the numbers of a row."""
  return {name: round(float(x), digits) for name, x in values.items()}


def main(
  name: str,
  rows: Callable[..., Iterable[Row]],
  draw: figures.Draw,
  seed: int = 0,
  argv: Sequence[str] | None = None,
  **options: str,
) -> list[Row]:
  """Runs an experiment: prints its table and writes `<name>.csv/.json/.png`.

  A quick run writes only where --out says: it never replaces a full one's
  results. With --add the rows of other first cells stay, and what was noted of
  them: an experiment of many long runs may be made in several calls. What is
  refused, by ValueError or OSError, ends in one sentence.

  Args:
    name: the experiment's module, and the stem of its files.
    rows: given whether to be quick, and the options by name, yields the rows.
    draw: draws the table, see `figures`.
    seed: recorded with the results, as are time and machine of this call.
    argv: the arguments; those of the command line by default.
    **options: further ones that take a text, and what they are. One that is
      given becomes part of the files' stem: its results are others; but with
      --add not one that chooses rows (`CHOICES`). Beside "config" there may be
      --config.FIELD=VALUE, the `changes` of `rows`.
  """
  if argv is None:
    program_lib.take_huge_pages()
    argv = sys.argv[1:]
  program = f"experiments.{name}"
  parser = argparse.ArgumentParser(f"python -m {program}", allow_abbrev=False)
  parser.add_argument("--quick", action="store_true", help="small and rough")
  folder = "folder for the files (full runs: experiments/results)"
  parser.add_argument("--out", type=pathlib.Path, help=folder)
  parser.add_argument(
    "--add", action="store_true", help="keep the other rows of the results"
  )
  for option, meaning in options.items():
    parser.add_argument(f"--{option}", default="", help=meaning)
  args, more = parser.parse_known_args(argv)
  given = {option: getattr(args, option) for option in options}
  stem = "_".join(
    [name, *(n for n in given if given[n] and not (args.add and n in CHOICES))]
  )
  fields = [w for w in more if w.startswith("--config.") and "config" in given]
  if more != fields:
    parser.error(f"what are {' '.join(more)}? --help lists the options")
  if fields:
    pairs = [word.removeprefix("--").split("=", 1) for word in fields]
    given["changes"] = [(field, said) for field, *said in pairs]
  # Orbax warns of what is no trouble.
  logging.set_verbosity(logging.ERROR)
  begin, table = time.perf_counter(), []
  try:
    for row in rows(args.quick, **given):
      table.append(row)
      cells = " ".join(f"{column}={value}" for column, value in row.items())
      terminal.say(f"[{time.perf_counter() - begin:5.0f} s] {cells}")
  except (OSError, ValueError) as error:
    raise SystemExit(f"{program}: {error}") from error
  seconds = time.perf_counter() - begin
  terminal.say(aligned(table))
  out = args.out or (None if args.quick else RESULTS)
  if out is None:
    terminal.say("quick run: no file written; --out writes them")
    return table
  about = {
    "command": shlex.join(["python", "-m", program, *argv]),
    "seed": seed,
    "machine": machine(),
    "jax": jax.__version__,
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "seconds": round(seconds, 1),
  }
  out.mkdir(parents=True, exist_ok=True)
  path = out / stem
  if args.add and path.with_suffix(".csv").exists():
    first = columns(table)[0]
    made = {str(row[first]) for row in table}
    before = figures.read(path.with_suffix(".csv"))
    table = [row for row in before if str(row[first]) not in made] + table
    about["before"] = json.loads(path.with_suffix(".json").read_text())
  with path.with_suffix(".csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, columns(table), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
  path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
  figures.write(path, draw)
  terminal.say(f"wrote {path}.csv, .json and .png")
  return table


def chosen(
  models: str, known: Collection[str], quick: Sequence[str]
) -> Sequence[str]:
  """Returns the names in --models; without it those of a quick run, or all.

  Raises ValueError where one of them is not known.
  """
  names = models.split(",") if models else quick or tuple(known)
  for name in names:
    if name not in known:
      raise ValueError(
        f"there is no model {name!r}; take of {', '.join(known)}"
      )
  return names


def machine() -> Row:
  """Returns the accelerator, or the CPU's model, cores and present load."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return {"accelerator": device.device_kind, "devices": jax.device_count()}
  model, info = platform.processor(), pathlib.Path("/proc/cpuinfo")
  if info.exists():
    lines = (line.partition(":") for line in info.read_text().splitlines())
    names = (value.strip() for key, _, value in lines if "model name" in key)
    model = next(names, model)
  load = round(os.getloadavg()[0], 2)
  return {"cpu": model, "cores": os.cpu_count(), "load_average_1_min": load}


def columns(table: list[Row]) -> list[str]:
  """Returns the keys of all rows, in the order they first appear."""
  return list(dict.fromkeys(key for row in table for key in row))


def aligned(table: list[Row]) -> str:
  """Formats rows as text: one line each, columns right-aligned."""
  names = columns(table)
  lines = [names]
  for row in table:
    cells = ["-" if row.get(name) is None else row[name] for name in names]
    lines.append([f"{x:.4g}" if type(x) is float else str(x) for x in cells])
  widths = [max(map(len, each)) for each in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(map(str.rjust, line, widths)).rstrip() for line in lines
  )
