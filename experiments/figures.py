"""The figures of the experiments, and the command that draws them anew.

  python -m experiments.figures [STEM ...]

draws each results/STEM.png from the table beside it; no table changes. Every
experiment has a function draw(figure, table) that returns what the figure
shows, in one sentence out of the table's own numbers: it becomes the title.
"""

import argparse
import contextlib
import csv
import importlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moejax import terminal

# All of it is for the experiments too.
from moejax.analysis.colors import (  # noqa: F401
  DENSE,
  GRAY,
  LIGHT,
  OTHERS,
  PALE_DENSE,
  PALE_SPARSE,
  SPARSE,
)
from moejax.analysis.style import (  # noqa: F401
  label,
  level,
  number,
  picture,
  plain,
  save,
  scales,
  texts,
)

RESULTS = pathlib.Path(__file__).parent / "results"

Row = dict[str, Any]
Rows = Iterator[Row]
Draw = Callable[[Figure, list[Row]], str]


def write(stem: pathlib.Path, draw: Draw) -> None:
  """Draws the table stem.csv on stem.png."""
  figure = picture(draw, read(stem.with_suffix(".csv")))
  save(figure, stem.with_suffix(".png"))


def read(path: pathlib.Path) -> list[Row]:
  """Reads a table as it was before it was written; empty cells are None."""

  def value(text: str) -> Any:
    for kind in (int, float):
      with contextlib.suppress(ValueError):
        return kind(text)
    return {"": None, "True": True, "False": False}.get(text, text)

  with path.open(newline="") as file:
    rows = csv.DictReader(file)
    return [{name: value(text) for name, text in r.items()} for r in rows]


def experiment(stem: str) -> str:
  """Returns the name of the experiment that makes the results `stem`."""
  names = (path.stem for path in pathlib.Path(__file__).parent.glob("*.py"))
  return max(filter(stem.startswith, names), key=len)


# -- the parts of figures -----------------------------------------------------


def span(values: Sequence[float], form: str = "{:.2f}") -> str:
  """Formats the least and the largest of some numbers."""
  low, high = form.format(min(values)), form.format(max(values))
  return low if low == high else f"{low} to {high}"


def than(one: float, other: float) -> str:
  """Formats how far one number is from another, in percent of that."""
  percent = 100 * (one / other - 1)
  return f"{abs(percent):.0f} % {'lower' if percent < 0 else 'higher'}"


def paper_name(config: str) -> str:
  """Returns the paper's name for a model: MoE-256-h of lm1b/moe_256_h."""
  name = config.rpartition("/")[2].replace("_", "-")
  return name.replace("moe", "MoE").replace("lstm", "LSTM")


def points(
  table: list[Row],
  x: str,
  y: str,
  by: str,
  names: Mapping[Any, str],
  unit: float = 1,
  **where: Any,
) -> dict[str, list[tuple[float, float]]]:
  """Returns columns x (in units) and y by name, for `lines`.

  Of the rows `where` columns hold these values; `names` are those of what the
  column `by` holds.
  """
  rows = [row for row in table if where.items() <= row.items()]
  found = {
    name: [(row[x] / unit, row[y]) for row in rows if row[by] == value]
    for value, name in names.items()
  }
  return {name: each for name, each in found.items() if each}


def panels(
  figure: Figure, height: float, meanings: Mapping[Any, str], **options: Any
) -> Iterator[tuple[Axes, Any]]:
  """Yields axes side by side, each with its column, titled by what it means."""
  figure.set_size_inches(8, height)
  every = np.ravel(figure.subplots(1, len(meanings), **options))
  for axes, (column, meaning) in zip(every, meanings.items(), strict=True):
    axes.set_title(meaning)
    yield axes, column


def bars(
  axes: Axes,
  groups: Sequence[str],
  series: Mapping[str, Sequence[float | None]],
  colors: Sequence[Any],
  form: Callable[[float], str] = number,
) -> None:
  """Draws bars from the left with their numbers, from top to bottom.

  Every group has a bar of each series; those of the first group say which is
  which. Colors are those of the series, of a single one also of the groups.
  """
  height = 0.82 / len(series)
  for place, (name, values) in enumerate(series.items()):
    at = np.arange(len(groups)) + height * (place - (len(series) - 1) / 2)
    values = np.array(values, float)
    color = colors[place] if len(series) > 1 else colors
    drawn = axes.barh(at, values, 0.88 * height, color=color)
    labels = [form(value) for value in values]
    if len(series) > 1:
      labels[0] += f"  {name}"
    axes.bar_label(drawn, labels, padding=3, fontsize=8)
  axes.set_yticks(range(len(groups)), groups)
  axes.tick_params(axis="y", length=0)
  axes.set_ylim(len(groups) - 0.5, -0.5)
  axes.grid(visible=False)
  axes.set_xlim(0, 1.15 * (axes.dataLim.x1 or 1))
  plain(axes.xaxis)


def grid(
  axes: Axes,
  cells: Mapping[tuple[str, str], float],
  shades: Mapping[tuple[str, str], float],
) -> None:
  """Writes numbers by row and column, on shades between 0 and 1."""
  rows, columns = (
    list(dict.fromkeys(names)) for names in zip(*cells, strict=True)
  )
  image = [[shades.get((row, x), 0) for x in columns] for row in rows]
  axes.imshow(image, cmap="Blues", vmin=0, vmax=1, aspect="auto")
  for (row, column), value in cells.items():
    at, text = (columns.index(column), rows.index(row)), number(value)
    axes.text(*at, text, ha="center", va="center", fontsize=8)
  axes.set_xticks(range(len(columns)), columns)
  axes.set_yticks(range(len(rows)), rows)
  axes.grid(visible=False)


def lines(
  axes: Axes,
  points: Mapping[str, Sequence[tuple[float, float]]],
  colors: Sequence[str],
) -> None:
  """Draws a line with markers for each name, which stands at its end."""
  for (name, each), color in zip(points.items(), colors, strict=False):
    axes.plot(*zip(*each, strict=True), color=color, marker="o")
    label(axes, name, each[-1], color, beside=True)


def point(axes: Axes, name: str, x: float, y: float, sparse: bool) -> None:
  """Draws a model, a mixture or a dense one, and its name."""
  color = SPARSE if sparse else DENSE
  axes.plot(x, y, marker="o" if sparse else "s", color=color)
  label(axes, name, (x, y), color)


def spans(
  axes: Axes, table: Sequence[Row], about: Sequence[tuple[str, str, bool]]
) -> None:
  """Draws the mean test of each row and its span over seeds, one below another.

  Args:
    axes: where; perplexity is to the right.
    table: rows with `test`, `test_least` and `test_most`.
    about: of each row its name, its label, and whether its model is dense.
  """
  for place, (row, (_, text, dense)) in enumerate(
    zip(table, about, strict=True)
  ):
    color = DENSE if dense else SPARSE
    axes.plot([row["test_least"], row["test_most"]], [place] * 2, color=color)
    axes.plot(row["test"], place, "o", color=color)
    label(axes, text, (row["test_most"], place), color, beside=True)
  axes.set_yticks(range(len(table)), [name for name, _, _ in about])
  axes.set_ylim(len(table) - 0.5, -0.5)
  axes.margins(x=0.1)
  scales(axes, "test perplexity per word, mean and span of seeds")


def main(argv: Sequence[str] | None = None) -> None:
  """Draws the figures of results/ anew."""
  parser = argparse.ArgumentParser(prog="python -m experiments.figures")
  parser.add_argument("stems", nargs="*", help="of results/; all by default")
  stems = parser.parse_args(argv).stems
  for stem in stems or sorted(path.stem for path in RESULTS.glob("*.csv")):
    module = importlib.import_module(f"experiments.{experiment(stem)}")
    write(RESULTS / stem, module.draw)
    terminal.say(f"drew {RESULTS.name}/{stem}.png")


if __name__ == "__main__":
  main()
