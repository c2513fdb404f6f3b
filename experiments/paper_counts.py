"""Question: are our models those of the paper, parameter by parameter?

Method: `moejax.training.cost` counts every config of configs/lm1b and
configs/news that is a row of Table 7 or 8: parameters without embedding and
softmax, and ops/timestep, in millions to one digit as the tables print them.
The totals, in billions, stand beside: those of Table 8 depend on a vocabulary
that the paper does not give (100,000 here). The rows of translation (Tables 2
to 5) give ops/timestep in whole millions and only totals. The ops are reached
with the softmax counted, and neither gates nor attention, of one word of the
source and one of the target. `experts_percent` is the experts' part of a
timestep's operations, the softmax counted as training samples it (8192 draws
are of 4585 words in the mean); `ops_per_io` what an expert computes for each
number that it reads or returns (sec. 3.2).

Result: 45 of the 46 cells agree. The other is ops/timestep of MoE-256:
8,650,752, which is 8.7 where the table prints 8.6, as if 8.65 were cut off. The
paper's numbers are so those of matrices alone, W_g and W_noise of every gate
among them and no bias. Of the 23 totals 22 agree; that of MoE-34M is 5.9 where
the table has 6.0, as it has for MoE-143M with its 57 million more. All 6 cells
of the paper's own translation models agree, with 32,768 wordpieces. So do the
214 million ops/timestep of GNMT, which Table 5 gives as 212. Its 278 million
parameters are not ours, 283: they are reached with 32,000 wordpieces and
without attention and biases, 278.7, whose ops would be 213.
"""

import numpy as np

from experiments import figures, harness, training
from experiments.paper_tables import TABLE_7, TABLE_8
from moejax import config as config_lib
from moejax import terminal
from moejax.training import cost

# Config -> parameters and ops/timestep in millions, total in billions, as
# printed in Table 7 (lm1b) and Table 8 (news).
PAPER = {
  f"{folder}/{name}": (parameters, ops, total)
  for folder, table in (("lm1b", TABLE_7), ("news", TABLE_8))
  for name, (_, _, ops, parameters, total, *_) in table.items()
  if parameters  # n-grams have none of the kind
}
# The same of Tables 2 and 4, 3, and 5, which give no parameters of the kind.
TRANSLATION = {
  "wmt14/en_fr_moe_2048_h": ("", "85", "8.7"),
  "wmt14/en_de_moe_2048_h": ("", "85", "8.7"),
  "multilingual/moe_512": ("", "102", "8.7"),
  "wmt14/en_fr_gnmt": ("", "214", "0.278"),
  "wmt14/en_de_gnmt": ("", "214", "0.278"),
  "multilingual/gnmt": ("", "212", "0.278"),
}


def rows(quick: bool) -> figures.Rows:
  """Yields a row per model."""
  # What a table prints to the last digit, by its place: of language models not
  # totals, which depend on a vocabulary that the paper does not give.
  of_tables = (PAPER, {"parameters": 0, "ops": 1})
  for table, cells in of_tables, (TRANSLATION, {"ops": 1, "total": 2}):
    names, differ = list(table)[:1] if quick else list(table), []
    for name in names:
      paper = table[name]
      config = training.load(name)
      about = config_lib.parse(config), config.data.vocab_size
      count = cost.count(*about)
      ops, digits = count.ops, 1
      if table is TRANSLATION:
        ops, digits = ops + count.softmax - count.gates - count.attention, 0
      ours = (
        f"{count.parameters / 1e6:.1f}",
        f"{ops / 1e6:.{digits}f}",
        # Billions, of GNMT in thousandths.
        f"{count.total / 1e9:.{len(paper[2].partition('.')[2])}f}",
      )
      unlike = [cell for cell, i in cells.items() if ours[i] != paper[i]]
      differ += [
        f"; {name}: {cell} {ours[cells[cell]]} for {paper[cells[cell]]}"
        for cell in unlike
      ]
      yield {
        "config": name,
        "parameters": count.parameters,
        "ours_M": ours[0],
        "paper_M": paper[0],
        "ops": ops,
        "ours_ops_M": ours[1],
        "paper_ops_M": paper[1],
        "total": count.total,
        "ours_B": ours[2],
        "paper_B": paper[2],
        "unlike": " ".join(unlike),
        "experts_percent": round(100 * cost.experts_share(*about, count), 1),
        "ops_per_io": count.ops_per_io and round(count.ops_per_io),
      }
    size = len(cells) * len(names)
    agree = f"{size - len(differ)} of {size} cells are the paper's"
    terminal.say(agree + "".join(differ))


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  axes = figure.subplots()
  models = [row for row in table if row["config"] in PAPER]
  seen = []
  for row in models:
    sparse = "moe_1_" not in row["config"] and "lstm" not in row["config"]
    color = figures.SPARSE if sparse else figures.DENSE
    at = (row["parameters"] / 1e6, row["ops"] / 1e6)
    axes.plot(*at, "o", mfc="none", color=color, markersize=9)
    axes.plot(row["paper_M"], row["paper_ops_M"], "x", color=color)
    # Many lie on each other: the first is named.
    if not any(abs(np.log(at) - np.log(other)).max() < 0.1 for other in seen):
      figures.label(axes, figures.paper_name(row["config"]), at, color)
      seen.append(at)
  figures.scales(
    axes,
    "million parameters without embedding and softmax",
    "million ops/timestep",
    (1, 10, 100, 1000, 10_000, 100_000),
    (3, 10, 30, 100),
  )
  axes.margins(x=0.12, y=0.12)
  cells = 2 * len(models)
  unlike = sum(len((row["unlike"] or "").split()) for row in models)
  return (
    f"{cells - unlike} of {cells} counts of parameters and ops/timestep are"
    " those of the paper: rings are ours, crosses the paper's"
  )


if __name__ == "__main__":
  harness.main("paper_counts", rows, draw)
