"""Training curves of runs, as a picture or in the terminal."""

import itertools
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moejax import bucket, config_fields, files, terminal
from moejax import workdir as workdir_lib
from moejax.analysis import colors
from moejax.training import metrics

# What a curve may go along, by name: how it is called under a picture.
ALONG = {
  "steps": "steps",
  "words": "words of training",
  "tokens": "tokens of training",
  "flops": "FLOPs of training, by the model's formula",
  "hours": "hours of training steps",
}
# What is better the lower, and the higher, by parts of the name; of the rest
# only the end counts.
_LOWER, _HIGHER = ("perplexity", "loss", "bits_per_byte"), ("bleu", "chrf")
# Runs that a title has room for; a curve of more points has no markers.
_NAMED, _MARKED = 4, 60
_MARKS = "ox+*#@%&"


class Curve(NamedTuple):
  """A metric of one split of a run.

  Attributes:
    run: its name.
    sparse: whether the run has mixtures.
    split: "train", "train (sampled)", "validation" or "test".
    steps, x, y: of each point the step, where it lies, and the value.
    best: which point that is, or the last one.
  """

  run: str
  sparse: bool
  split: str
  steps: list[int]
  x: np.ndarray
  y: list[float]
  best: int


def plot(
  workdirs: Sequence[files.Path],
  out: str = "",
  metric: str = "perplexity",
  along: str = "steps",
) -> None:
  """Draws a metric of runs, on a file or else in the terminal.

  Perplexities of language models are those per word, whatever their tokens.
  Words and FLOPs are those of the steps that were logged, for all until then;
  the same of hours, which leave compiling, validations and saving out.

  Args:
    workdirs: of the runs.
    out: of a picture, whose suffix says what kind it is.
    metric: a name in the lines of `metrics.jsonl`.
    along: a name in `ALONG`.

  FileNotFoundError where there is no run; ValueError where one has no metrics
  yet, or none has the one asked for or what it is to go along, or for a file
  that cannot be written.
  """
  config_fields.one_of(along, ALONG, "--x")
  path = files.local(out) if out else None
  if path:
    # Imported late: only pictures need it.
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if (kind := path.suffix.lower().removeprefix(".")) not in kinds:
      raise ValueError(
        f"--out={out} would be a picture of kind {kind!r}, which Matplotlib"
        f" cannot write; the nearest is .{config_fields.nearest(kind, kinds)},"
        " good ones are .png, .svg and .pdf."
      )
    if not path.parent.is_dir():
      raise FileNotFoundError(
        f"--out={out}: there is no folder {path.parent}; make it, or give"
        " another file."
      )
  curves, name = _curves(_read(workdirs), metric, along)
  finding = _finding(curves, name, _sign(metric))
  if path is None:
    terminal.say(f"{finding}\n")
    terminal.draw(_text(curves, name, along) + "\n")
    return
  from moejax.analysis import style

  figure = style.picture(
    lambda figure, _: _draw(figure, curves, name, along, finding), None
  )
  style.save(figure, path)
  terminal.say(f"wrote {path}: {finding}")


# -- what is drawn ------------------------------------------------------------


def _read(workdirs: Sequence[files.Path]) -> dict[str, list[dict[str, Any]]]:
  """Returns the metrics of runs by their names."""
  paths = {}
  for workdir in workdirs:
    own = os.fspath(workdir)
    own = own if bucket.is_in(workdir) else os.path.abspath(own)
    paths[tuple(part for part in own.split("/") if part)] = workdir
  found = {}
  for parts, workdir in paths.items():
    lines = metrics.read(workdir / metrics.METRICS_FILE)
    if not lines:
      workdir_lib.recall(workdir)
      raise ValueError(
        f"the run in {workdir} has logged no step yet; wait, or give another."
      )
    # As much of the path as tells it from the others.
    count = 1
    while count < len(parts) and any(
      other != parts and other[-count:] == parts[-count:] for other in paths
    ):
      count += 1
    name = terminal.one_line("/".join(parts[-count:]) or "/")
    found[terminal.printable(name)] = lines
  return found


def _curves(
  runs: Mapping[str, list[dict[str, Any]]], metric: str, along: str
) -> tuple[list[Curve], str]:
  """Returns the curves, and what the metric is called."""
  tokens_of_word = {run: _tokens_of_word(lines) for run, lines in runs.items()}
  per_word = metric == "perplexity" and all(tokens_of_word.values())
  curves, sign = [], _sign(metric)
  for run, lines in runs.items():
    where, before = _places(run, lines, along, tokens_of_word[run]), len(curves)
    for split in ("train", "validation", "test"):
      steps, y, said = [], [], split
      for line in lines:
        if line["split"] != split:
          continue
        value = line.get(metric)
        if value is None and f"sampled_{metric}" in line:
          # The softmax of few words, from which these are easier to tell.
          value, said = line[f"sampled_{metric}"], f"{split} (sampled)"
        if value is not None and per_word:
          nats = line.get("loss", line.get("sampled_loss"))
          value = math.exp(min(700.0, nats * tokens_of_word[run]))
        if value is not None and math.isfinite(value):
          steps.append(line["step"])
          y.append(value)
      if steps and (split != "test" or len(curves) == before):
        best = int(np.argmin(sign * np.array(y))) if sign else len(y) - 1
        sparse = any("cv_load" in line for line in lines)
        x = np.interp(steps, *where)
        curves.append(Curve(run, sparse, said, steps, x, y, best))
  if not curves:
    known = {name for lines in runs.values() for line in lines for name in line}
    known -= {"step", "split"}
    raise ValueError(
      f"no run has the metric {metric!r}; the nearest is"
      f" {config_fields.nearest(metric, known)!r}, there are"
      f" {', '.join(sorted(known))}."
    )
  for run in runs.keys() - {curve.run for curve in curves}:
    terminal.warn(f"{run} has no {metric}; it is left out.")
  name = terminal.printable(metric.replace("_", " "))
  return curves, f"{name} per word" if per_word else name


def _sign(metric: str) -> int:
  """Returns -1 where the higher is better, 1 the lower, 0 where neither is."""
  if any(part in metric for part in _HIGHER):
    return -1
  return int(any(part in metric for part in _LOWER))


def _tokens_of_word(lines: list[dict[str, Any]]) -> float | None:
  """Returns the tokens of a word of the validation; None if it is not told."""
  for line in lines:
    nats, of_word = line.get("loss", 0), line.get("word_perplexity", math.inf)
    if nats > 0 and math.isfinite(of_word):
      return math.log(of_word) / nats
  return None


def _places(
  run: str,
  lines: list[dict[str, Any]],
  along: str,
  tokens_of_word: float | None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns steps, and where they lie; the places between go in proportion."""
  end = max(line["step"] for line in lines)
  if along == "steps":
    return np.array([0, end + 1]), np.array([0, end + 1])
  name = "flops" if along == "flops" else "words"
  logged = [line for line in lines if line["split"] == "train"]
  rates = np.array([line.get(name, math.nan) for line in logged])
  if along == "hours":
    speeds = np.array([line.get("words_per_second", 0.0) for line in logged])
    # A line after a validation may have had no time to take.
    timed = speeds > 0
    usual = np.median(speeds[timed]) if timed.any() else math.nan
    rates = rates / np.where(timed, speeds, usual) / 3600
  if along == "words":
    rates = rates / (tokens_of_word or math.nan)
  if not rates.size or not np.isfinite(rates).all():
    raise ValueError(
      f"the metrics of {run} do not tell {along}: those of older versions tell"
      " none, words are known after a validation of a language model, hours"
      " after some steps; choose --x=steps."
    )
  steps = np.array([0, *(line["step"] for line in logged), end + 1])
  each = np.append(rates, rates[-1])
  return steps, np.append(0.0, np.cumsum(np.diff(steps) * each))


def _finding(curves: Sequence[Curve], name: str, sign: int) -> str:
  """Returns in one sentence what the curves show."""
  told = {}
  # What is measured tells more than a batch of the training.
  for curve in curves:
    told[curve.run] = curve

  def value(curve):
    return f"{_number(curve.y[curve.best])} at step {curve.steps[curve.best]:,}"

  if len(told) == 1:
    (curve,) = told.values()
    return f"{curve.run}: {curve.split} {name} {value(curve)}"
  splits = " or ".join(dict.fromkeys(each.split for each in told.values()))
  head = f"{'Best' if sign else 'Last'} {splits} {name}"
  in_order = sorted(told.values(), key=lambda curve: sign * curve.y[curve.best])
  said = ", ".join(f"{each.run} {value(each)}" for each in in_order[:_NAMED])
  more = len(in_order) - _NAMED
  return f"{head}: {said}" + (f", and {more} more" if more > 0 else "")


def _number(value: float) -> str:
  digits = 0 if abs(value) >= 1000 else 2 if abs(value) >= 1 else 4
  return f"{value:,.{digits}f}"


def _scaled(curves: Sequence[Curve], along: str) -> tuple[float, str]:
  """Returns the unit of what curves go along, and its name."""
  most = max(max(curve.x) for curve in curves)
  power = 3 * int(math.log10(max(most, 1)) // 3)
  if along in ("steps", "hours") or power < 6:
    return 1.0, ALONG[along]
  return 10.0**power, f"{ALONG[along]}, in 1e{power}"


def _colors(curves: Sequence[Curve]) -> Iterator[tuple[Curve, str]]:
  """Yields the curves in the colors of their runs, the first of a kind its."""
  own, others = {}, itertools.cycle(colors.OTHERS)
  for curve in curves:
    if curve.run not in own:
      color = colors.SPARSE if curve.sparse else colors.DENSE
      own[curve.run] = next(others) if color in own.values() else color
    yield curve, own[curve.run]


# -- how it is drawn ----------------------------------------------------------


def _draw(figure, curves, name, along, finding) -> str:
  """Draws curves on a figure; returns its title."""
  from matplotlib.collections import LineCollection
  from matplotlib.ticker import MaxNLocator

  from moejax.analysis import style

  axes = figure.subplots()
  unit, x_name = _scaled(curves, along)
  runs = dict.fromkeys(curve.run for curve in curves)
  # A name must not be read as a formula.
  plain = {run: run.replace("$", r"\$") for run in runs}
  ends = {}
  for curve, color in _colors(curves):
    points = np.column_stack([curve.x / unit, curve.y])
    background = curve.split.startswith("train")
    if len(points) > _MARKED or background:
      alpha = 0.5 if background else 1
      axes.add_collection(
        LineCollection([points], colors=color, alpha=alpha, linewidths=1)
      )
    else:
      axes.plot(*points.T, color=color, marker="o")
    label = curve.split if len(runs) == 1 else plain[curve.run]
    # Of several runs one label each, where the last of its curves ends.
    ends[label] = (points[-1], color)
  axes.autoscale_view()
  for label, (at, color) in ends.items():
    style.label(axes, label, tuple(at), color, beside=True)
  style.scales(axes, x_name, name)
  style.plain(axes.xaxis)
  if "perplexity" in name:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    style.plain(axes.yaxis, _ticks(low, high))
  else:
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.6g}")
  splits = dict.fromkeys(curve.split for curve in curves)
  if len(runs) > 1 and len(splits) > 1:
    axes.set_title("with markers: validation; pale: train")
  return finding.replace("$", r"\$")


def _ticks(low: float, high: float) -> list[float]:
  """Returns ticks of a logarithmic axis: 1, 2, 5, 10, ..., or closer ones."""
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
    ticks = [m * 10.0**p for p in powers for m in steps]
    ticks = [each for each in ticks if low <= each <= high]
    if len(ticks) > 2:
      return ticks
  return [float(f"{each:.3g}") for each in np.geomspace(low, high, 5)[1:-1]]


def _text(curves: Sequence[Curve], name: str, along: str) -> str:
  """Returns a picture of letters, as wide and high as the terminal."""
  import plotille

  columns, rows = shutil.get_terminal_size()
  figure = plotille.Figure()
  figure.with_colors = terminal.colors() > 0
  figure.color_mode = "rgb" if terminal.colors() > 256 else "byte"
  figure.height = max(5, min(rows - 12, 24))
  figure.origin = False
  log = "perplexity" in name
  unit, x_name = _scaled(curves, along)
  figure.x_label = x_name.replace(ALONG[along], along)
  figure.width = max(10, columns - 19 - len(figure.x_label))
  figure.y_label = name
  values = np.concatenate([curve.y for curve in curves])
  values = np.log(values) if log else values
  margin = 0.03 * np.ptp(values) or 0.1 * abs(values[0]) or 1.0
  figure.set_y_limits(values.min() - margin, values.max() + margin)
  last = max(max(curve.x) for curve in curves) / unit
  # There is a tick every ten letters: at round numbers.
  between = 10 * (last or 1) / figure.width
  power = 10.0 ** math.floor(math.log10(between))
  rounds = (power * each for each in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10))
  between = next(each for each in rounds if each >= 0.999 * between)
  figure.set_x_limits(0.0, between * figure.width / 10)
  figure.x_ticks_fkt = lambda x, _: f"{x:,.4g}" if x < 1e4 else f"{x:,.0f}"
  figure.y_ticks_fkt = lambda y, _: _number(math.exp(y) if log else y)
  splits = dict.fromkeys(curve.split for curve in curves)
  runs = list(dict.fromkeys(curve.run for curve in curves))
  can_show_dots = terminal.shows("⣿")
  for curve, color in _colors(curves):
    is_train = curve.split.startswith("train") and len(splits) > 1
    number = 2 * runs.index(curve.run) + 1 - is_train
    if can_show_dots:
      number = runs.index(curve.run)
    mark = _MARKS[number % len(_MARKS)]
    figure.plot(
      (curve.x / unit).tolist(),
      np.log(curve.y).tolist() if log else list(curve.y),
      lc=terminal.color(color),
      interp="linear" if can_show_dots else None,
      label=f"{curve.run}, {curve.split}",
      marker=None if is_train and can_show_dots else mark,
    )
  said = figure.show(legend=True)
  # Empty dots, and those of the legend's lines.
  return said if can_show_dots else said.replace("⠀", " ").replace("⠤", "-")
