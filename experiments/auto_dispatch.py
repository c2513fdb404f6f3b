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

import flax.linen as nn
import jax

from experiments import figures, harness, layer_speed

SEED = 0
TOKENS = (64, 128, 256, 512, 4096)
EXPERTS = (8, 64)
PARTS = {"forward": "forward", "both": "forward + backward"}
WIDTHS = ((128, 128), (256, 128), (256, 512))


def rows(quick: bool) -> figures.Rows:
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
    for part in PARTS:
      programs = {
        name: layer_speed.program(module, params, x, part)
        for name, module in modules.items()
      }
      times = harness.interleaved(programs, 2 if quick else 15)
      for name, time in times.items():
        row[f"{part}_{name}_ms"] = round(time.median, 3)
      ratio = times["ragged"].median / times["gather"].median
      row[f"{part}_of_gather"] = round(ratio, 2)
    yield row
    if quick:
      return


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  figure.set_size_inches(8, 5)
  widths = list(dict.fromkeys((row["D"], row["F"]) for row in table))
  names = {E: f"{E} experts" for E in sorted({row["E"] for row in table})}
  grid = figure.subplots(
    2, len(widths), sharex=True, sharey=True, squeeze=False
  )
  for (part, meaning), panels in zip(PARTS.items(), grid, strict=True):
    for axes, (D, F) in zip(panels, widths, strict=True):
      points = figures.points(
        table, "T", f"{part}_of_gather", "E", names, D=D, F=F
      )
      figures.lines(axes, points, figures.OTHERS)
      figures.scales(axes, x_ticks=(64, 256, 1024, 4096))
      axes.axhline(1, color=figures.GRAY, linewidth=1)
      axes.set_title(f"{meaning}, {D} x {F}")
      axes.set_ylim(0, 2.25)
  figure.supxlabel("tokens, 4 experts each")
  figure.supylabel("time with sorted rows / time with slots")
  most = max(row["T"] for row in table)
  keys = [f"{part}_of_gather" for part in PARTS]
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
