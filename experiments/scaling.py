"""Question: what are experts worth, by size, text and number of experts?

Method: language models of configs/sotu/moe_32_muon.py, widths 32, 64 and 128,
with 4 of 16, 64, 256 and 1,024 experts and the dense twin (moe_1_wide_muon.py):
of 4, 16, 64 and 256 experts a token meets one. Nothing is dropped, there is no
dropout, and the peak of the rate falls as the width grows. The rate falls with
the square root of the steps, as in the paper: it knows no end, so that each
validation of a run is the end of a shorter one. `loss` is that of 1 in 200
sentences, held out, in nats a word. The text is the presidents' messages, which
is read many times, or better that of --text.

The law of `moejax plan --quality` (moejax/planning/quality.py) is fitted to all
points: least squares of the logarithm of the loss, where what is far off counts
less. `left_out` is by how many percent a run's loss is missed by the fit to the
other runs.

Result: to be measured.
"""

import itertools
import lzma
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.optimize

from experiments import capacity_curve, figures, harness, training
from moejax import config as config_lib
from moejax.data import text_files
from moejax.planning import quality
from moejax.planning.quality import TRANSFORMERS, Law
from moejax.training import cost

K = 4
# Of 4,096 words: validations are at each of these, and at those in between.
STEPS = (250, 500, 1000, 2000, 4000)
GRID = tuple(
  (width, ratio)
  for width in (32, 64, 128)
  for ratio in (1, 4, 16, 64, 256)
  if width * ratio <= 128 * 128
)
# One sentence of so many is held out for validation, and one for the test.
HELD_OUT = 200


def rows(quick: bool, text: str = "") -> figures.Rows:
  """Yields a row per model and number of steps."""
  grid = GRID[:2] if quick else GRID
  steps = (2, 4) if quick else STEPS
  with training.folder("scaling", quick, text) as runs:
    table = list(points(grid, steps, runs, text, quick))
  for run in dict.fromkeys(map(named, table)):
    law = fit([row for row in table if named(row) != run])
    for row in table:
      if named(row) == run:
        missed = law.loss(*about(row)) / row["loss"] - 1
        yield row | harness.rounded(2, left_out=100 * missed)


def points(
  grid: Sequence[tuple[int, int]],
  steps: Sequence[int],
  runs: pathlib.Path,
  text: str,
  quick: bool,
) -> figures.Rows:
  """Trains models of widths and ratios; yields their losses at these steps."""
  files = split(text, runs)
  wanted = {}
  for width, ratio in grid:
    config = config_of(width, ratio)
    config.data.update({"min_count": 20, **files})
    if quick:
      training.shrink(config, runs)
    config.train.update({"steps": steps[-1], "eval_every": steps[0]})
    wanted[f"{width}_{ratio}"] = config
  found = training.train_all(runs, wanted, quick)
  for (width, ratio), run in zip(grid, found.values(), strict=True):
    data, losses = run.config.data, {}
    experiment = config_lib.parse(run.config)
    counted = cost.count(experiment, config_lib.vocab_size(experiment))
    for line in run.lines:
      if line["split"] == "validation":
        losses[line["step"]] = math.log(line["perplexity"])
    for step in steps:
      yield {
        "width": width,
        "ratio": ratio,
        "step": step,
        "tokens": step * data.batch_size * data.row_length,
        "parameters": quality.active(counted),
        "loss": round(losses[step], 4),
      }


def config_of(width: int, ratio: int) -> Any:
  """Returns a model of so many experts for each that a token meets."""
  name = "moe_1_wide_muon" if ratio == 1 else "moe_32_muon"
  config = training.load(f"sotu/{name}", {"model.dropout": 0.0})
  if ratio == 1:
    config.model.one_expert.hidden = K * 2 * width
  else:
    config.model.moe.update(
      num_experts=K * ratio,
      experts={"kind": "feed_forward", "hidden": 2 * width},
      capacity_factor=None,
      eval_capacity_factor=None,
    )
    training.regroup(config, config.data.batch_size * config.data.row_length)
  config.optimizer.peak *= 64 / width
  config.model.width = width
  return config


def split(text: str, folder: pathlib.Path) -> dict[str, str]:
  """Writes a text's splits to files of a folder; returns fields of config.data.

  Without a text those of the presidents' messages.
  """
  if not text:
    return {}
  paths = {n: folder / f"{n}.txt.xz" for n in ("train", "validation", "test")}
  if not all(path.exists() for path in paths.values()):
    parts = {name: [] for name in paths}
    lines = itertools.chain(*map(text_files.lines, text_files.find(text)))
    for number, line in enumerate(lines):
      name = {0: "validation", 1: "test"}.get(number % HELD_OUT, "train")
      parts[name].append(f"{line}\n")
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
      path.write_bytes(lzma.compress("".join(parts[name]).encode()))
  return {"kind": "text", **{n: str(path) for n, path in paths.items()}}


def named(row: figures.Row) -> tuple[int, int]:
  """Returns of which run a row is."""
  return row["width"], row["ratio"]


def about(row: figures.Row) -> tuple[float, float, float]:
  """Returns what `Law.loss` takes."""
  return row["parameters"], row["tokens"], row["ratio"]


def fit(table: Sequence[figures.Row], starts: int = 8) -> Law:
  """Fits the law to rows, from several starts; returns the best."""
  sizes, tokens, ratios = np.array([about(row) for row in table], float).T
  losses = np.array([row["loss"] for row in table])
  n, d, r = np.log(sizes), np.log(tokens), np.log(ratios)

  def missed(x):
    log_a, delta, alpha, gamma, log_b, omega, beta, zeta, c = x
    of_size = np.exp(log_a + delta * r + (alpha + gamma * r) * n)
    of_text = np.exp(log_b + omega * r + (beta + zeta * r) * d)
    return np.log((of_size + of_text + c) / losses)

  best = None
  rng = np.random.default_rng(0)
  published = np.array(TRANSFORMERS[1:10])
  published[[0, 4]] = np.log(published[[0, 4]])
  least = np.array([-20, -2, -2, -0.2, -20, -2, -2, -0.2, 0])
  most = np.array([20, 2, 0, 0.2, 20, 2, 0, 0.2, 5])
  for start in range(starts):
    first = published * rng.uniform(0.5, 1.5, 9) ** (start > 0)
    found = scipy.optimize.least_squares(
      missed, first, bounds=(least, most), loss="huber", f_scale=1e-3
    )
    if best is None or found.cost < best.cost:
      best = found
  coefficients = best.x.copy()
  coefficients[[0, 4]] = np.exp(coefficients[[0, 4]])
  spans = [(float(min(x)), float(max(x))) for x in (sizes, tokens, ratios)]
  return Law("experiments.scaling", *map(float, coefficients), *spans)


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  law = fit(table)
  lead, even = figure.subplots(1, 2)
  loss = {(*named(row), row["step"]): row["loss"] for row in table}
  sparse = [row for row in table if row["ratio"] > 1]
  ratios = sorted({row["ratio"] for row in sparse})
  widths = sorted({row["width"] for row in sparse})
  middle = widths[len(widths) // 2]
  shown = [row for row in sparse if row["width"] == middle]
  for ratio, color in zip(ratios, figures.OTHERS, strict=False):
    if mine := [row for row in shown if row["ratio"] == ratio]:
      x = [row["tokens"] / 1e6 for row in mine]
      more = [row["loss"] - loss[middle, 1, row["step"]] for row in mine]
      lead.plot(x, [-100 * math.expm1(each) for each in more], "o", color=color)
      along = np.geomspace(x[0], x[-1], 50)
      of_law = [
        law.lead(mine[0]["parameters"], 1e6 * each, ratio) for each in along
      ]
      y = [-100 * math.expm1(-each) for each in of_law]
      lead.plot(along, y, color=color)
      name = f"{K} of {K * ratio:,}"
      figures.label(lead, name, (along[-1], y[-1]), color, beside=True)
  lead.axhline(0, color=figures.GRAY, linewidth=1)
  lead.set_title(f"width {middle}: runs, and the law's lines")
  figures.scales(
    lead, "million words read", "perplexity lower by, %", (1, 2, 4, 8, 16)
  )
  least = {}
  for width, color in zip(widths, figures.OTHERS, strict=False):
    size = next(r["parameters"] for r in sparse if r["width"] == width)
    along = np.geomspace(ratios[0], ratios[-1], 50)
    found = [(each, law.break_even(size, each)) for each in along]
    # Where experts never lead there is nothing to draw.
    if there := [(each, tokens / 1e6) for each, tokens in found if tokens]:
      even.plot(*zip(*there, strict=True), color=color)
      figures.label(even, f"width {width}", there[-1], color, beside=True)
      least[width] = there[0][1]
  even.set_title("where experts lead from, by the law")
  figures.scales(
    even, "experts of which a token meets one", "million words", ratios
  )
  figures.plain(even.yaxis)
  begin = figures.number(least.get(middle))
  return f"At width {middle} {K} of {K * ratios[0]} experts " + (
    f"lead from {begin} million words on" if begin else "never lead"
  )


if __name__ == "__main__":
  harness.main("scaling", rows, draw, text=capacity_curve.TEXT)
