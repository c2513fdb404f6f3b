"""Question: what does each of the paper's memory tricks save (app. D)?

Method: the training step of configs/news/moe_131072_h.py, 137 B parameters, on
128 chips of a v5p (`moejax plan`, layout "expert"): compiled from shapes alone
with another optimizer, and with and without the hidden units of experts
computed again in the backward pass. GB are of one chip, which has 102;
`others_GB` is batch, gradients and activations. A plan that cannot fit is
refused, with what it would need.

Result: plain Adam needs 17.4 GB of each chip: 4.7 for parameters, 9.5 for its
two moments, 3.2 for all else. beta1 = 0 saves 4.7, the factored second moment
another 3.9, but 1.9 of it comes back as temporaries of the update. Recompute
saves 0.15 GB, with the factored update 0.6. With all of it 10.1 GB, less than
the 12 of the paper's GPUs (results/memory_137b.csv).
"""

import numpy as np

from experiments import figures, harness, training
from moejax import config as config_lib
from moejax.planning import chips, plan, search

TOPOLOGY, QUICK_TOPOLOGY = "v5p:4x4x8", "cpu:8"
CONFIG, QUICK_CONFIG = "news/moe_131072_h", "tiny"
OPTIMIZERS = {
  "Adam": {"config.optimizer.kind": "adam"},
  "Adam, beta1 = 0": {
    "config.optimizer.kind": "adam",
    "config.optimizer.b1": 0.0,
  },
  "factored": {"config.optimizer.kind": "factored_adam"},
}


def rows(quick: bool) -> figures.Rows:
  """Yields a row for each optimizer, with and without recompute."""
  config = training.load(QUICK_CONFIG if quick else CONFIG)
  topology = chips.find(QUICK_TOPOLOGY if quick else TOPOLOGY)
  experiment = config_lib.parse(config)
  vocab_size = 1000 if quick else config_lib.vocab_size(experiment)
  layer = "moe" if "moe" in config.model else "hierarchical_moe.secondary"
  optimizers = list(OPTIMIZERS)
  for name in optimizers[2:] if quick else optimizers:
    for recompute in (False,) if quick else (False, True):
      changes = {
        "config.layout": "expert",
        f"config.model.{layer}.recompute": recompute,
        **OPTIMIZERS[name],
      }
      with training.roughly_compiled(quick):
        outcome = search.attempt(experiment, vocab_size, topology, changes)
      row = {"optimizer": name, "recompute": recompute}
      if isinstance(outcome, plan.Refusal):
        needs = outcome.needs and round(outcome.needs / 1e9, 2)
        yield row | {"GB": needs, "fits": False}
        continue
      memory = outcome.memory
      yield row | {
        "GB": round(memory.needs / 1e9, 2),
        "fits": memory.fits,
        "parameters_GB": round(memory.parameters / 1e9, 2),
        "optimizer_GB": round(memory.optimizer / 1e9, 2),
        "others_GB": round(memory.rest / 1e9, 2),
      }


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  figure.set_size_inches(8, 3.2)
  axes, left = figure.subplots(), np.zeros(len(table))
  names = [
    f"{row['optimizer']}{', recompute' if row['recompute'] else ''}"
    for row in table
  ]
  # What is known of no part: a plan that is refused.
  whole = {"GB": [row["GB"] for row in table]}
  figures.bars(axes, names, whole, [figures.GRAY])
  parts = ("parameters", "parameters"), ("optimizer", "optimizer's state")
  parts += (("others", "batch, gradients, activations"),)
  for (part, meaning), color in zip(parts, figures.OTHERS[2:], strict=True):
    widths = np.array([row.get(f"{part}_GB") or 0.0 for row in table])
    axes.barh(names, widths, 0.73, left=left, color=color)
    axes.text(left[0], -0.5, meaning, color=color, va="bottom", fontsize=8.5)
    left += widths
  axes.set_xlabel("GB of each chip")
  most, least = table[0], min(table, key=lambda row: row["GB"] or np.inf)
  return (
    f"A chip holds {most['GB']:.1f} GB with {most['optimizer']},"
    f" {least['GB']:.1f} with all of the paper's tricks"
  )


if __name__ == "__main__":
  harness.main("memory_137b", rows, draw)
