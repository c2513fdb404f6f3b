"""Question: where are sorted rows the faster dispatch, and where slots?

Method: the layer of layer_speed.py with slots for 1.25 of all edges, 4 experts
a token, float32: forward, and forward+backward, by `gather` and by `ragged`, in
turns, medians of the repeats, all cores; T tokens, E experts of a D x F and an
F x D matrix. `of_gather` is the time of ragged over that of gather.

Result: slots are as fast or faster up to 512 tokens, sorted rows at 4096 (two
cores of an AMD EPYC, results/auto_dispatch.csv). Hence `dispatch.fastest` takes
slots for few edges, such as those of decoding.
"""

import itertools
from collections.abc import Iterator

import flax.linen as nn
import jax

from experiments import figures, harness, layer_speed

SEED = 0
TOKENS = (64, 128, 256, 512, 4096)
EXPERTS = (8, 64)
WIDTHS = ((128, 128), (256, 128), (256, 512))


def rows(quick: bool) -> Iterator[figures.Row]:
  """Yields a row per shape."""
  for T, E, (D, F) in itertools.product(TOKENS, EXPERTS, WIDTHS):
    x = jax.random.normal(jax.random.key(SEED), (1, T, D))
    modules = {
      name: layer_speed.layer(E, F, **layer_speed.CANDIDATES[name])
      for name in ("gather", "ragged")
    }
    params = jax.jit(modules["gather"].init)(jax.random.key(1), x)["params"]
    params = nn.unbox(params)
    row = {"T": T, "E": E, "D": D, "F": F}
    for part in layer_speed.PARTS:
      programs = {
        name: layer_speed.program(module, params, x, part)
        for name, module in modules.items()
      }
      runs = {name: program.run for name, program in programs.items()}
      times = harness.interleaved(runs, 2 if quick else 15)
      for name, time in times.items():
        row[f"{part}_{name}_ms"] = round(time.median, 3)
      ratio = times["ragged"].median / times["gather"].median
      row[f"{part}_of_gather"] = round(ratio, 2)
    yield row
    if quick:
      return


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  """Draws the ratio over the number of tokens, a panel for each width."""
  figure.set_size_inches(8, 5)
  parts = {"forward": "forward", "both": "forward + backward"}
  widths = list(dict.fromkeys((row["D"], row["F"]) for row in table))
  grid = figure.subplots(
    2, len(widths), sharex=True, sharey=True, squeeze=False
  )
  for (part, meaning), panels in zip(parts.items(), grid, strict=True):
    for axes, (D, F) in zip(panels, widths, strict=True):
      mine = [row for row in table if (row["D"], row["F"]) == (D, F)]
      points = {
        f"{E} experts": [
          (r["T"], r[f"{part}_of_gather"]) for r in mine if r["E"] == E
        ]
        for E in dict.fromkeys(row["E"] for row in mine)
      }
      figures.lines(axes, points, figures.OTHERS)
      axes.axhline(1, color=figures.GRAY, linewidth=1)
      axes.set_title(f"{meaning}, {D} x {F}")
      axes.set_xscale("log", base=2)
      figures.plain(axes.xaxis, (64, 256, 1024, 4096))
      axes.set_ylim(0, 2.25)
  figure.supxlabel("tokens, 4 experts each")
  figure.supylabel("time with sorted rows / time with slots")
  most = max(row["T"] for row in table)
  keys = [f"{part}_of_gather" for part in parts]
  long, short = (
    [row[key] for row in table if (row["T"] == most) == same for key in keys]
    for same in (True, False)
  )
  return (
    f"Sorted rows take {figures.span(long)} of the time of slots at"
    f" {most:,} tokens, {figures.span(short or long)} at fewer"
  )


if __name__ == "__main__":
  harness.main("auto_dispatch", rows, draw, SEED)
