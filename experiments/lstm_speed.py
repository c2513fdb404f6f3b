"""Question: how fast is our LSTM on a CPU, beside flax's and torch's?

Method: forward and backward of one layer, float32, gradients of the input and
of all weights, B=64, all cores. "flax" is `nn.RNN(nn.OptimizedLSTMCell)`, a
scan that JAX differentiates; "moejax" is `models.layers.lstm`; "torch" is
`torch.nn.LSTM` (oneDNN), left out where torch is not installed. The three take
turns in one process; ms is the median of the repeats, fastest_ms the least
disturbed one, from which the ratios come.

Result: of torch's time, flax takes 1.57 and moejax 1.15 at L=32, D=128; 2.04
and 1.23 at L=64, D=128; 1.43 and 1.02 at L=32, D=512 (two cores of an AMD EPYC,
results/lstm_speed.csv). At D=128 what is left is the product inside the loop,
too small to keep two cores busy.
"""

import os
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures, harness
from moejax.models import layers

SEED = 0


def rows(quick: bool) -> figures.Rows:
  """Yields one row per implementation and size."""
  batch, repeats = (4, 2) if quick else (64, 20)
  for length, width in (
    ((8, 16),) if quick else ((32, 128), (64, 128), (32, 512))
  ):
    rng = np.random.default_rng(SEED)
    x = rng.normal(size=(batch, length, width)).astype(np.float32)
    start = jnp.zeros(x.shape[:2], bool).at[:, 0].set(True)
    candidates = {}
    # Flax adds its biases by rank promotion, which our tests forbid.
    with jax.numpy_rank_promotion("allow"):
      module = nn.RNN(nn.OptimizedLSTMCell(width, parent=None))
      candidates["flax"] = compiled(module, x)
    candidates["moejax"] = compiled(layers.LSTM(width), x, start)
    with harness.if_installed("torch's LSTM"):
      candidates["torch"] = torch_lstm(x)
    times = harness.interleaved(candidates, repeats)
    theirs = times.get("torch")
    for name, ours in times.items():
      yield {
        "length": length,
        "width": width,
        "lstm": name,
        "ms": round(ours.median, 2),
        "fastest_ms": round(ours.fastest, 2),
        "of_torch": theirs and round(ours.fastest / theirs.fastest, 2),
        "speedup": round(times["flax"].fastest / ours.fastest, 2),
      }


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
  """Returns the same run by torch; raises ImportError where it is missing."""
  import torch

  torch.set_num_threads(os.cpu_count() or 1)
  module = torch.nn.LSTM(x.shape[-1], x.shape[-1], batch_first=True)
  x = torch.tensor(x, requires_grad=True)

  def run():
    module.zero_grad()
    x.grad = None
    module(x)[0].square().mean().backward()

  return run


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  colors = {"flax": figures.OTHERS[0], "moejax": figures.SPARSE}
  sizes = dict.fromkeys((row["length"], row["width"]) for row in table)
  meanings = {size: "{} steps of {} units".format(*size) for size in sizes}
  panels = figures.panels(figure, 2.6, meanings, sharey=True, squeeze=False)
  ratios = {"moejax": [], "flax": []}
  for axes, size in panels:
    mine = [row for row in table if (row["length"], row["width"]) == size]
    times = {row["lstm"]: row["fastest_ms"] for row in mine}
    own = [colors.get(name, figures.LIGHT) for name in times]
    figures.bars(axes, list(times), {"time": list(times.values())}, own)
    axes.set_xlabel("ms, forward + backward")
    other = "torch" if "torch" in times else "flax"
    for name, each in ratios.items():
      each.append(times[name] / times[other])
  return (
    f"Our LSTM takes {figures.span(ratios['moejax'])} of {other}'s time, flax's"
    f" {figures.span(ratios['flax'])}"
  )


if __name__ == "__main__":
  harness.main("lstm_speed", rows, draw, SEED)
