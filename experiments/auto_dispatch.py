"""Question: where are sorted rows the faster dispatch, and where slots?

Method: the layer of layer_speed.py with slots for 1.25 of all edges, 4 experts
a token, float32: forward, and forward+backward, by `gather` and by `ragged`, in
turns, medians of the repeats, all cores; T tokens, E experts of a D x F and an
F x D matrix. `of_gather` is the time of ragged over that of gather.

Result: on two cores of an AMD EPYC slots are as fast or faster up to 512
tokens: forward, where sorting and the loop over experts show most, ragged takes
0.95 to 2.1 of gather's time (1.2 to 2.1 at 64 tokens), forward and backward 0.9
to 1.9. At 4096 tokens it is 0.74 to 1.01 and 0.76 to 1.06. Hence
`dispatch.fastest` takes slots for few edges, such as those of decoding
(results/auto_dispatch.csv).
"""

import itertools
from collections.abc import Iterator

import flax.linen as nn
import jax
import matplotlib.figure

from experiments import harness, layer_speed

SEED = 0
TOKENS = (64, 128, 256, 512, 4096)
EXPERTS = (8, 64)
WIDTHS = ((128, 128), (256, 128), (256, 512))


def rows(quick: bool) -> Iterator[harness.Row]:
  """Yields a row per shape."""
  shapes = itertools.product(TOKENS, EXPERTS, WIDTHS)
  for tokens, num_experts, (width, hidden) in shapes:
    yield compare(tokens, num_experts, width, hidden, 2 if quick else 15)
    if quick:
      return


def compare(
  tokens: int, num_experts: int, width: int, hidden: int, repeats: int
) -> harness.Row:
  """Times both ways to dispatch."""
  x = jax.random.normal(jax.random.key(SEED), (1, tokens, width))
  modules = {
    name: layer_speed.layer(num_experts, hidden, **layer_speed.CANDIDATES[name])
    for name in ("gather", "ragged")
  }
  params = jax.jit(modules["gather"].init)(jax.random.key(1), x)["params"]
  row = {"T": tokens, "E": num_experts, "D": width, "F": hidden}
  makes = {"forward": layer_speed.forward, "both": layer_speed.backward}
  for part, make in makes.items():
    times = harness.interleaved(
      {n: make(m, nn.unbox(params), x).run for n, m in modules.items()}, repeats
    )
    for name, time in times.items():
      row[f"{part}_{name}_ms"] = round(time.median, 3)
    ratio = times["ragged"].median / times["gather"].median
    row[f"{part}_of_gather"] = round(ratio, 2)
  return row


def draw(figure: matplotlib.figure.Figure, table: list[harness.Row]) -> None:
  """Draws the ratio over the number of tokens, a line for each layer."""
  titles = {"forward": "forward", "both": "forward + backward"}
  for axes, part in zip(
    figure.subplots(1, 2, sharey=True), titles, strict=True
  ):
    layers = dict.fromkeys((row["E"], row["D"], row["F"]) for row in table)
    for E, D, F in layers:
      line = [
        (row["T"], row[f"{part}_of_gather"])
        for row in table
        if (row["E"], row["D"], row["F"]) == (E, D, F)
      ]
      label = f"{E} experts, {D} x {F}"
      axes.plot(*zip(*line, strict=True), marker="o", label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens, 4 experts each")
    axes.set_title(titles[part], fontsize=9)
  figure.axes[0].set_ylabel("time of ragged over that of gather")
  lines, labels = figure.axes[0].get_legend_handles_labels()
  figure.legend(lines, labels, loc="outside lower center", ncols=3, fontsize=7)


if __name__ == "__main__":
  harness.main("auto_dispatch", rows, draw, SEED)
