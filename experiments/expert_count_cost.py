"""Question: what does a training step cost as experts are added at constant k?

Method: the model of configs/sotu/moe_32.py (width 64, experts of hidden 128,
4 a token), its layer flat and dropless, or of two levels (sqrt(E) groups of
sqrt(E), 2 of each, capacity 1.25 at each), for E from 4 to 16,384; whole
training steps with Adam on batches of 4096 random words, all cores. Beside them
in turns the dense twin moe_1_wide: `of_dense` is the ratio of medians. GB is
what XLA sets aside for state, batch and temporaries. ops/timestep and
parameters are `moejax.planning.cost`'s, without embedding and softmax.

Result: two cores of an Intel Xeon, times of the dense step: flat 1.14 (E=4),
1.45 (64), 2.11 (256), 5.0 (1024), 12.9 (4096), 46.7 (16,384); two levels 1.18,
1.61, 1.94, 3.4, 6.9, 15.6, the faster from 256 on. The dense step takes 71 to
82 ms, but 101 and 158 in turns with programs of gigabytes: over 79 ms the last
two are 16.4 and 93 flat, 8.8 and 31 in two levels. At constant k what grows is
the router (flat: 2 D E multiply-adds a word, as many as all else at E=1024) and
the traffic of weights, gradients and Adam's moments, all E experts' a step for
4096 words: 0.6 GB of state at E=1024, 9 GB at E=16,384. Before, flat took 4.5
(256), 18.6 (1024) and 81 (4096): XLA sorted all logits for the k largest and
computed the router's kernel gradient along the columns of a transposed copy;
both are cured (results/expert_count_cost.csv).
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure

from experiments import figures, harness, training
from moejax import config as config_lib
from moejax import sharding
from moejax.planning import cost
from moejax.training import session as session_lib
from moejax.training import state, step

SEED = 0
VOCABULARY = 10_000
KINDS = ("flat", "two_level")


def rows(quick: bool) -> Iterator[harness.Row]:
  """Yields a row per number of experts and kind of layer."""
  for num_experts in (4,) if quick else (4**i for i in range(1, 8)):
    configs = {"dense": dense()}
    configs |= {kind: mixture(kind, num_experts) for kind in KINDS}
    if quick:
      for config in configs.values():
        shrink(config)
    programs = {name: program(config) for name, config in configs.items()}
    times = harness.interleaved(
      {name: run for name, (run, _, _) in programs.items()}, 2 if quick else 7
    )
    for name, (_, gigabytes, count) in programs.items():
      yield {
        "E": num_experts,
        "layer": name,
        "ops": count.ops,
        "parameters": count.parameters,
        "ms": round(times[name].median, 1),
        "of_dense": round(times[name].median / times["dense"].median, 2),
        "GB": round(gigabytes, 3),
      }


def dense() -> config_lib.Config:
  """Returns the config of the dense twin."""
  return training.load("sotu/moe_1_wide")


def mixture(kind: str, num_experts: int) -> config_lib.Config:
  """Returns the config of a flat layer, or of one of two levels."""
  config = training.load("sotu/moe_32")
  moe = config.model.moe.to_dict()
  del config.model["moe"]
  del config.model["layers"]
  tokens = training.tokens_of_batch(config)
  with config.unlocked():
    if kind == "flat":
      config.model.layers = ("lstm", "moe", "lstm")
      config.model.moe = moe | {
        "num_experts": num_experts,
        "group_size": tokens,
        "dispatch": "ragged",
        "capacity_factor": None,
      }
    else:
      router = moe["router"] | {"k": 2}
      config.model.layers = ("lstm", "hierarchical_moe", "lstm")
      config.model.hierarchical_moe = {
        "num_experts": num_experts,
        "num_groups": math.isqrt(num_experts),
        "group_size": tokens,
        "primary": router,
        "secondary": {"router": router, "experts": moe["experts"]},
      }
  return config


def shrink(config: config_lib.Config) -> None:
  """Makes a model small and rough, for a quick run."""
  config.update_from_flattened_dict({"data.batch_size": 2, "model.width": 8})
  training.regroup(config, 2 * config.data.row_length)


def program(
  config: config_lib.Config,
) -> tuple[Callable[[], Any], float, cost.Count]:
  """Compiles a training step on a batch of random words.

  Returns:
    What runs it once, on the state that the turn before left; the gigabytes it
    takes; the model's cost.
  """
  shape = (config.data.batch_size, config.data.row_length)
  words = jax.random.randint(jax.random.key(SEED), shape, 0, VOCABULARY)
  mask = jnp.ones(shape, bool)
  batch = {"inputs": words, "targets": words, "mask": mask, "start": ~mask}
  model = config_lib.model(config, VOCABULARY)
  _, tx = config_lib.optimizer(config)
  layout = config_lib.layout(config)
  mesh = sharding.make_mesh(layout, jax.devices()[:1])
  shapes = jax.eval_shape(lambda: batch)
  current = state.create(model, tx, shapes, SEED, layout, mesh)
  aux, _ = config_lib.aux(config)
  train_step = functools.partial(
    step.train_step, model=model, tx=tx, aux_weights=aux, seed=SEED
  )
  compiled = (
    jax.jit(train_step, donate_argnums=0).lower(current, batch).compile()
  )

  def run():
    nonlocal current
    current, metrics = compiled(current, batch)
    return metrics

  count = cost.count(config, VOCABULARY)
  return run, session_lib.bytes_needed(compiled) / 1e9, count


def draw(figure: matplotlib.figure.Figure, table: list[harness.Row]) -> str:
  """Draws time and memory over the number of experts."""
  labels = {"dense": "dense", "flat": "flat", "two_level": "two levels"}
  panels = {
    "of_dense": "time of a training step / dense step",
    "GB": "memory of a training step, GB",
  }
  colors = (figures.DENSE, figures.SPARSE, figures.OTHERS[0])
  for axes, (name, meaning) in zip(
    figure.subplots(1, 2), panels.items(), strict=True
  ):
    points = {
      label: [(row["E"], row[name]) for row in table if row["layer"] == layer]
      for layer, label in labels.items()
    }
    figures.lines(axes, points, colors)
    axes.set_xscale("log", base=4)
    axes.set_yscale("log")
    figures.plain(axes.xaxis, (4, 64, 1024, 16384))
    figures.plain(axes.yaxis, (0.1, 0.3, 1, 3, 10, 30))
    axes.set_xlabel("experts")
    axes.set_title(meaning)
  most = max(row["E"] for row in table)
  last = {row["layer"]: row["of_dense"] for row in table if row["E"] == most}
  return (
    f"With {most:,} experts a training step takes {last['flat']:.3g} times the"
    f" dense one's time, {last['two_level']:.3g} times in two levels"
  )


if __name__ == "__main__":
  harness.main("expert_count_cost", rows, draw, SEED)
