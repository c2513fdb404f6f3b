"""The style of all figures: colors, labels that make way, numbers, titles."""

import pathlib
import textwrap
from collections.abc import Callable, Sequence
from numbers import Real
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

from moejax.analysis.colors import GRAY

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


def picture(draw: Callable[[Figure, Any], str], about: Any) -> Figure:
  """Returns the figure that draw(figure, about) draws.

  Its title is what that returns: what the figure shows, in one sentence.
  """
  with rc_context(STYLE):
    # Not by pyplot: without its global state a figure is always drawn by Agg.
    figure = Figure(figsize=(8, 4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    finding = draw(figure, about)
    width = int(figure.get_figwidth() * 10.3)
    title = textwrap.fill(finding, width, break_on_hyphens=False)
    figure.suptitle(title, x=0.01, ha="left")
    settle(figure)
  return figure


def save(figure: Figure, path: pathlib.Path) -> None:
  """Writes a figure; its size is that of 150 dots an inch."""
  figure.set_dpi(150)
  if path.suffix != ".png":
    figure.savefig(path)
    return
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  image = PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
  # Few colors make a file of a third of the size.
  image.quantize(96).save(path, optimize=True)


def number(value: Real | None) -> str:
  """Formats a number of a figure: three digits, thousands apart."""
  if value is None or np.isnan(value):
    return ""
  return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def scales(
  axes: Axes,
  x: str = "",
  y: str = "",
  x_ticks: Sequence[Real] = (),
  y_ticks: Sequence[Real] = (),
) -> None:
  """Names the axes; one that has ticks is logarithmic."""
  axes.set(xlabel=x, ylabel=y)
  if x_ticks:
    axes.set_xscale("log")
    plain(axes.xaxis, x_ticks)
  if y_ticks:
    axes.set_yscale("log")
    plain(axes.yaxis, y_ticks)


def plain(axis: Any, ticks: Sequence[Real] = ()) -> None:
  """Writes numbers as they are, 0.2 and 4,096, at the ticks if given."""
  if ticks:
    axis.set_major_locator(FixedLocator(ticks))
  axis.set_major_formatter(lambda x, _: number(x))
  axis.set_minor_locator(NullLocator())


def level(axes: Axes, name: str, y: Real, color: str = GRAY) -> None:
  """Draws a dashed line from left to right, with its name at the end."""
  axes.axhline(y, color=color, linestyle="--", linewidth=1)
  across = axes.get_yaxis_transform()
  label(axes, name, (1, y), color, beside=True, xycoords=across)


def label(
  axes: Axes,
  text: str,
  at: Sequence[Real],
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
