"""Question: what does more computation a word buy, dense and sparse?

Method: MoE-256-h of configs/lm1b and its dense twin MoE-1-Wide (Fig. 2, right,
at a laptop's size) with widths a sixteenth, an eighth and a quarter of the
paper's: the ops/timestep of both grow four-fold from one to the next. Steps,
batches, optimiser and text as in capacity_curve.py, whose runs of an eighth
are the same; the peak of the learning rate falls as the width grows. Runs lie
under runs/curves and are resumed there.

Result: not run to its end yet.
"""

from collections.abc import Iterator

import matplotlib.figure

from experiments import capacity_curve, harness

MODELS = {"moe_1_wide": "dense", "moe_256_h": "4 of 256 experts"}


def rows(quick: bool, text: str = "") -> Iterator[harness.Row]:
  """Yields a row per width and model."""
  for smaller in (16,) if quick else (16, 8, 4):
    for name in MODELS:
      yield capacity_curve.row(name, smaller, text, quick)


def draw(figure: matplotlib.figure.Figure, table: list[harness.Row]) -> None:
  """Draws test perplexity over ops/timestep."""
  axes = figure.subplots()
  for name, label in MODELS.items():
    points = [row for row in table if row["model"] == name]
    ops = [row["ops"] for row in points]
    axes.plot(ops, [row["test"] for row in points], "o-", label=label)
  axes.set_xscale("log")
  axes.set_yscale("log")
  axes.set_xlabel("ops/timestep outside embedding and softmax")
  axes.set_ylabel("test perplexity per word")
  axes.legend()


if __name__ == "__main__":
  harness.main(
    "compute_curve",
    rows,
    draw,
    capacity_curve.SEED,
    text=capacity_curve.TEXT,
  )
