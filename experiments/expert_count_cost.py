"""Question: what does a training step cost as experts are added at constant k?

Method: the model of configs/sotu/moe_32.py (width 64, experts of hidden 128,
4 a token), its layer flat and dropless, or of two levels (sqrt(E) groups of
sqrt(E), 2 of each, capacity 1.25 at each), for E from 4 to 16,384; whole
training steps with Adam on batches of 4096 random words, all cores. Beside them
in turns the dense twin moe_1_wide: `of_dense` is the ratio of medians. GB is
what XLA sets aside for state, batch and temporaries. ops/timestep and
parameters are `moejax.training.cost`'s, without embedding and softmax.

Result: two cores of an Intel Xeon, times of the dense step: flat 1.14 (E=4),
2.11 (256), 12.9 (4096), 46.7 (16,384); two levels 1.18, 1.94, 6.9, 15.6, the
faster from 256 on. What grows is the router (flat: 2 D E multiply-adds a word,
as many as all else at E=1024) and the traffic of weights, gradients and Adam's
moments, all E experts' a step (results/expert_count_cost.csv).
"""

import math

from experiments import figures, harness, training
from moejax import config as config_lib
from moejax.training import cost
from moejax.training import session as session_lib

SEED = 0
VOCABULARY = training.VOCABULARY
LAYERS = {"dense": "dense", "flat": "flat", "two_level": "two levels"}


def rows(quick: bool) -> figures.Rows:
  """Yields a row per number of experts and kind of layer."""
  for num_experts in (4,) if quick else (4**i for i in range(1, 8)):
    configs = {layer: config_of(layer, num_experts) for layer in LAYERS}
    if quick:
      for config in configs.values():
        small = {"data.batch_size": 2, "model.width": 8}
        config.update_from_flattened_dict(small)
        training.regroup(config, 2 * config.data.row_length)
    with training.roughly_compiled(quick):
      programs = {
        name: training.random_step(config) for name, config in configs.items()
      }
    times = harness.interleaved(programs, 2 if quick else 7)
    for name, each in programs.items():
      count = cost.count(config_lib.parse(configs[name]), VOCABULARY)
      yield {
        "E": num_experts,
        "layer": name,
        "ops": count.ops,
        "parameters": count.parameters,
        "ms": round(times[name].median, 1),
        "of_dense": round(times[name].median / times["dense"].median, 2),
        "GB": round(session_lib.bytes_needed(each.compiled) / 1e9, 3),
      }


def config_of(layer: str, num_experts: int) -> config_lib.Config:
  """Returns the config of the dense twin, a flat layer or two levels."""
  if layer == "dense":
    return training.load("sotu/moe_1_wide")
  config = training.load("sotu/moe_32")
  model, moe, data = config.model, config.model.moe.to_dict(), config.data
  shape = {"num_experts": num_experts}
  shape["group_size"] = data.batch_size * data.row_length
  if layer == "flat":
    model.moe = moe | shape | {"dispatch": "ragged", "capacity_factor": None}
    return config
  del model["moe"]
  router = moe["router"] | {"k": 2}
  model.layers = ("lstm", "hierarchical_moe", "lstm")
  model.hierarchical_moe = {
    **shape,
    "num_groups": math.isqrt(num_experts),
    "primary": router,
    "secondary": {"router": router, "experts": moe["experts"]},
  }
  return config


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  meanings = {
    "of_dense": "time of a training step / dense step",
    "GB": "memory of a training step, GB",
  }
  colors = (figures.DENSE, figures.SPARSE, figures.OTHERS[0])
  for axes, column in figures.panels(figure, 4, meanings):
    points = figures.points(table, "E", column, "layer", LAYERS)
    figures.lines(axes, points, colors)
    ticks = (4, 64, 1024, 16384), (0.1, 0.3, 1, 3, 10, 30)
    figures.scales(axes, "experts", "", *ticks)
  most = max(row["E"] for row in table)
  last = {row["layer"]: row["of_dense"] for row in table if row["E"] == most}
  return (
    f"With {most:,} experts a training step takes {last['flat']:.3g} times the"
    f" dense one's time, {last['two_level']:.3g} times in two levels"
  )


if __name__ == "__main__":
  harness.main("expert_count_cost", rows, draw, SEED)
