"""Question: how fast is our LSTM on a CPU, beside flax's and torch's?

Method: forward and backward of one layer, float32, gradients of the input and
of all weights, B=64, all cores. "flax" is `nn.RNN(nn.OptimizedLSTMCell)`, a
scan that JAX differentiates; "moejax" is `models.layers.lstm`; "torch" is
`torch.nn.LSTM` (oneDNN), left out where torch is not installed. The three take
turns in one process; ms is the median of the repeats, fastest_ms the least
disturbed one, from which the ratios come.

Result: of torch's time, flax took 1.57 and moejax 1.15 at L=32, D=128; 2.04 and
1.23 at L=64, D=128; 1.43 and 1.02 at L=32, D=512 (two cores of an AMD EPYC,
results/lstm_speed.csv). Expected was that adding up the weight gradient step by
step costs most; hoisting it alone brought 5 to 15 %. The rest came from the
backward loop: local derivatives taken in the forward pass, buffers written in
place, and its product in the form that XLA copies less for, which counts where
rows are few for the width (61 against 99 GFLOP/s a core at 32 rows of 512
units). At D=128 what is left is the product inside the loop, too small to keep
two cores busy.
"""

import os
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from experiments import figures, harness
from moejax import terminal
from moejax.models import layers

SEED = 0


def rows(quick: bool) -> Iterator[harness.Row]:
  """Yields one row per implementation and size."""
  batch, repeats = (4, 2) if quick else (64, 20)
  sizes = [(8, 16)] if quick else [(32, 128), (64, 128), (32, 512)]
  for length, width in sizes:
    rng = np.random.default_rng(SEED)
    x = rng.normal(size=(batch, length, width)).astype(np.float32)
    candidates = {"flax": flax_lstm(x), "moejax": moejax_lstm(x)}
    try:
      candidates["torch"] = torch_lstm(x)
    except ImportError:
      terminal.say("torch is not installed: no row for it, no ratio to it")
    times = harness.interleaved(candidates, repeats)
    before, theirs = times["flax"], times.get("torch")
    for name, ours in times.items():
      yield {
        "length": length,
        "width": width,
        "lstm": name,
        "ms": round(ours.median, 2),
        "fastest_ms": round(ours.fastest, 2),
        "of_torch": theirs and round(ours.fastest / theirs.fastest, 2),
        "speedup": round(before.fastest / ours.fastest, 2),
      }


def flax_lstm(x: np.ndarray) -> Callable[[], object]:
  """Returns the run before: everything in the scan, differentiated by JAX."""
  module = nn.RNN(nn.OptimizedLSTMCell(x.shape[-1], parent=None))
  # Flax adds its biases by rank promotion, which our tests forbid.
  with jax.numpy_rank_promotion("allow"):
    return compiled(module, x)


def moejax_lstm(x: np.ndarray) -> Callable[[], object]:
  """Returns the run after: `models.layers.lstm`."""
  start = jnp.zeros(x.shape[:2], bool).at[:, 0].set(True)
  return compiled(layers.LSTM(x.shape[-1]), x, start)


def compiled(
  module: nn.Module, x: np.ndarray, *args: jax.Array
) -> Callable[[], object]:
  """Returns one forward and backward run of a module, compiled."""
  x = jnp.asarray(x)
  params = nn.unbox(module.init(jax.random.key(SEED), x, *args))

  def loss(params, x):
    return jnp.square(module.apply(params, x, *args)).mean()

  step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(params, x).compile()
  return lambda: step(params, x)


def torch_lstm(x: np.ndarray) -> Callable[[], object]:
  """Returns the same run by torch.

  Raises:
    ImportError: torch is not installed.
  """
  import torch

  torch.set_num_threads(os.cpu_count() or 1)
  module = torch.nn.LSTM(x.shape[-1], x.shape[-1], batch_first=True)
  x = torch.tensor(x, requires_grad=True)

  def run():
    module.zero_grad()
    x.grad = None
    module(x)[0].square().mean().backward()

  return run


def draw(figure: matplotlib.figure.Figure, table: list[harness.Row]) -> str:
  """Draws the fastest times, a panel for each size."""
  figure.set_size_inches(8, 2.6)
  sizes = list(dict.fromkeys((row["length"], row["width"]) for row in table))
  colors = {
    "flax": figures.OTHERS[0],
    "moejax": figures.SPARSE,
    "torch": figures.GRAY,
  }
  all_axes = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
  for axes, size in zip(all_axes, sizes, strict=True):
    mine = [row for row in table if (row["length"], row["width"]) == size]
    names = [row["lstm"] for row in mine]
    times = {"time": [row["fastest_ms"] for row in mine]}
    figures.bars(axes, names, times, [colors[name] for name in names])
    axes.set_title("{} steps of {} units".format(*size))
    axes.set_xlabel("ms, forward + backward")
  found = []
  for name in ("moejax", "flax"):
    ratios = [r["of_torch"] for r in table if r["lstm"] == name]
    if None in ratios:
      ratios = [1 / r["speedup"] for r in table if r["lstm"] == name]
    found.append(figures.span(ratios))
  return (
    "Our LSTM takes {} of torch's time, flax's {}".format(*found)
    if "torch" in names
    else "Our LSTM takes {} of flax's time".format(*found)
  )


if __name__ == "__main__":
  harness.main("lstm_speed", rows, draw, SEED)
