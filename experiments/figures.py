"""The style of all figures, and the command that draws them anew.

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
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, NullLocator
from matplotlib.transforms import Bbox

from moejax import terminal

RESULTS = pathlib.Path(__file__).parent / "results"
# Distinct for the color-blind, too. What is neither sparse nor dense takes the
# others in turn, and what is not ours is pale or gray.
SPARSE, DENSE = "#0072b2", "#d55e00"
OTHERS = ("#009e73", "#cc79a7", "#b8860b", "#56a4d8", "#5b4a9c")
PALE_SPARSE, PALE_DENSE = "#a3cde6", "#f2bf9d"
GRAY, LIGHT = "#707070", "#b5b5b5"
STYLE = {
  "axes.axisbelow": True,
  "axes.grid": True,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 9.5,
  "axes.ymargin": 0.08,
  "figure.labelsize": 9,
  "figure.titlesize": 11.5,
  "figure.titleweight": "bold",
  "font.size": 9,
  "grid.color": "#e4e4e4",
  "lines.markersize": 5,
}
# Where a label may stand, in points from what it names, the best place first.
_BESIDE = [(7.0, 1.5 * sign * i) for i in range(40) for sign in (-1, 1)]
_AROUND = [
  (distance * x, distance * y)
  for distance in (6.0, 15.0, 22.0, 30.0, 40.0, 50.0)
  for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1))
  + ((0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8))
]

Row = dict[str, Any]
Rows = Iterator[Row]
Draw = Callable[[Figure, list[Row]], str]


def picture(draw: Draw, table: list[Row]) -> Figure:
  """Returns the figure of a table."""
  with rc_context(STYLE):
    # Not by pyplot: without its global state a figure is always drawn by Agg.
    figure = Figure(figsize=(8, 4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    finding = draw(figure, table)
    width = int(figure.get_figwidth() * 10.3)
    title = textwrap.fill(finding, width, break_on_hyphens=False)
    figure.suptitle(title, x=0.01, ha="left")
    settle(figure)
  return figure


def write(stem: pathlib.Path, draw: Draw) -> None:
  """Draws the table stem.csv on stem.png."""
  figure = picture(draw, read(stem.with_suffix(".csv")))
  figure.set_dpi(150)
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  image = PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
  # Few colors make a file of a third of the size.
  image.quantize(96).save(stem.with_suffix(".png"), optimize=True)


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


def number(value: float | None) -> str:
  """Formats a number of a figure: three digits, thousands apart."""
  if value is None or np.isnan(value):
    return ""
  return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


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


def scales(
  axes: Axes,
  x: str = "",
  y: str = "",
  x_ticks: Sequence[float] = (),
  y_ticks: Sequence[float] = (),
) -> None:
  """Names the axes; one that has ticks is logarithmic."""
  axes.set(xlabel=x, ylabel=y)
  if x_ticks:
    axes.set_xscale("log")
    plain(axes.xaxis, x_ticks)
  if y_ticks:
    axes.set_yscale("log")
    plain(axes.yaxis, y_ticks)


def plain(axis: Any, ticks: Sequence[float] = ()) -> None:
  """Writes numbers as they are, 0.2 and 4,096, at the ticks if given."""
  if ticks:
    axis.set_major_locator(FixedLocator(ticks))
  axis.set_major_formatter(lambda x, _: number(x))
  axis.set_minor_locator(NullLocator())


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


def level(axes: Axes, name: str, y: float, color: str = GRAY) -> None:
  """Draws a dashed line from left to right, with its name at the end."""
  axes.axhline(y, color=color, linestyle="--", linewidth=1)
  across = axes.get_yaxis_transform()
  label(axes, name, (1, y), color, beside=True, xycoords=across)


def label(
  axes: Axes,
  text: str,
  at: tuple[float, float],
  color: str,
  beside: bool = False,
  xycoords: Any = "data",
) -> None:
  """Names a point: to the right of it, or wherever there is space around it."""
  axes.annotate(
    text,
    at,
    _BESIDE[0],
    xycoords,
    "offset points",
    {"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkB": 3},
    annotation_clip=False,
    color=color,
    fontsize=8.5,
    gid="beside" if beside else "around",
  )


def settle(figure: Figure) -> None:
  """Moves labels to where they cover no text, marker or line.

  One is nearer to its own point than to others, or a line joins them.
  """
  # Twice: the layout makes room for labels where they stand.
  for _ in range(2):
    figure.draw_without_rendering()
    moving = [t for axes in figure.axes for t in axes.texts if t.get_gid()]
    moving.sort(key=lambda note: -note.get_window_extent().y0)
    drawn = {axes: _drawn(axes) for axes in figure.axes}
    taken = [box for text, box in texts(figure) if text not in moving]
    taken += sum(drawn.values(), [])
    for note in moving:
      beside = note.get_gid() == "beside"
      own = note.axes.transData.transform(note.xy)
      centers = [(box.p0 + box.p1) / 2 for box in drawn[note.axes]]
      others = [p for p in centers if np.hypot(*(p - own)) > 2]
      for x, y in _BESIDE if beside else _AROUND:
        note.xyann = (x, y)
        note.set_ha("left" if x > 0 else "right" if x < 0 else "center")
        middle = beside or y == 0
        note.set_va("center" if middle else "bottom" if y > 0 else "top")
        far = not beside and np.hypot(x, y) > 12
        note.arrow_patch.set_visible(far)
        box = Text.get_window_extent(note).padded(1)
        if any(box.overlaps(other) for other in taken):
          continue
        to_own, *gaps = (
          np.hypot(*np.max([box.p0 - point, point - box.p1, [0, 0]], 0))
          for point in (own, *others)
        )
        if beside or far or to_own + 3 < min(gaps, default=99):
          break
      taken.append(box)


def texts(figure: Figure) -> list[tuple[Text, Bbox]]:
  """Returns every text that a drawn figure shows, with its box in pixels."""
  hidden = set()
  for axis in (a for axes in figure.axes for a in (axes.xaxis, axes.yaxis)):
    low, high = sorted(axis.get_view_interval())
    for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
      # A tick beyond the axes has a text that nobody sees.
      if not low <= tick.get_loc() <= high:
        hidden |= {tick.label1, tick.label2}
  return [
    (text, Text.get_window_extent(text))
    for text in dict.fromkeys(figure.findobj(Text))
    if text.get_visible() and text.get_text().strip() and text not in hidden
  ]


def _drawn(axes: Axes) -> list[Bbox]:
  """Returns boxes around the markers of axes, and along their lines."""
  boxes = []
  for line in axes.lines:
    points = line.get_transform().transform(line.get_xydata())
    if line.get_linestyle() != "None":
      steps = np.linspace(0, 1, 50)[:, None, None]
      between = points[None, :-1] + steps * np.diff(points, axis=0)[None]
      points = np.concatenate([points, between.reshape(-1, 2)])
    size = 4.0 if line.get_marker() != "None" else 1.0
    boxes += [Bbox([p - size, p + size]) for p in points]
  return boxes


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
