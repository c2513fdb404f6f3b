"""Question: which gate is best in a small Transformer at equal operations?

Method: the recipes of configs/transformer and every other gate of
`moejax.router.ROUTERS` in the same blocks, all at the ops/timestep of the dense
one but for their routers, the same 800 steps on the same batches, three seeds;
or --steps of them. `test` is the mean test perplexity per word, `test_least`
and `test_most` its span over seeds; load and drops are means over the last
tenth of training. `of_dense` is the time of a training step, of the dense
model's, as medians of steps that take turns. A gate that looks ahead, also in
evaluation, sees what it is to predict: its perplexity tells nothing. Of
sigmoid_quantile, balanced_quantile and expert_threshold, thresholds or biases
follow quantiles of the batch; these three have not been run.

Result: of the ten gates that predict and were run, after 800 steps, top_k
(111.2), balanced, softmax_top_k, hash, gshard_top_2, sigmoid and switch (118.0)
are ahead of the dense model (123.2; 120.4 to 125.8) by more than the seeds
differ; loss_free_shared, noisy_top_k (121.6) and softmax are not
(results/router_zoo.csv). expert_choice, which looks ahead, reads 115.0. With
--models=dense,loss_free_shared --steps=2400 80.19 (80.12 to 80.34) against
83.58 (82.28 to 84.59), the dense one (results/router_zoo_models_steps.csv).
"""

from collections.abc import Mapping
from typing import Any

from experiments import figures, harness, training
from moejax import config as config_lib

_QUANTILE = {"learned_by": "quantile"}
_BALANCE = {"importance": 0.1, "load": 0.1}
# Gate -> its recipe; or how many experts it sends a token to, what else it is
# given, and the losses' weights.
GATES: Mapping[str, tuple[int, dict[str, Any], dict[str, float]] | None] = {
  "dense": None,
  "softmax": (32, {}, _BALANCE),
  "top_k": None,
  "noisy_top_k": None,
  "balanced": None,
  "switch": None,
  "gshard_top_2": None,
  "expert_choice": None,
  "hash": (1, {"k": 1}, {}),
  "sigmoid": (4, {"k": 4}, {"bias": 1.0}),
  "sigmoid_quantile": (4, {"k": 4, **_QUANTILE}, {"quantile": 1.0}),
  "balanced_quantile": (4, {"k": 4, **_QUANTILE}, {"quantile": 0.1}),
  "expert_threshold": (4, {"k": 4}, {"quantile": 0.1}),
  "loss_free_shared": None,
  "softmax_top_k": (4, {"k": 4}, {"switch_balance": 1e-2}),
}


def rows(quick: bool, models: str = "", steps: str = "") -> figures.Rows:
  """Returns a row per gate.

  Raises ValueError where the steps are no positive number.
  """
  if steps and not (steps.isdecimal() and int(steps)):
    raise ValueError(f"--steps is {steps}; choose a number from 1.")
  names = harness.chosen(models, GATES, ("switch",) if quick else ())
  configs = {name: config_of(name) for name in names}
  steps = int(steps or training.STEPS)
  return training.beside_dense("router_zoo", "gate", configs, quick, steps)


def config_of(gate: str) -> config_lib.Config:
  """Returns the config of a gate."""
  if GATES[gate] is None:
    return training.load(f"transformer/{gate}")
  active, fields, weights = GATES[gate]
  config = training.load("transformer/switch", {"aux": weights})
  moe = config.model.blocks.moe
  moe.router = {"kind": gate.removesuffix("_quantile"), **fields}
  moe.experts.hidden //= active
  return config


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  axes = figure.subplots()
  honest = [row for row in table if row["gate"] != "expert_choice"]
  honest.sort(key=lambda row: row["test"])
  about = [
    (
      row["gate"].replace("_", " "),
      figures.number(row["test"]),
      row["gate"] == "dense",
    )
    for row in honest
  ]
  figures.spans(axes, honest, about)
  best = honest[0]
  other = next((row for row in honest if row["gate"] == "dense"), honest[-1])
  names = [row["gate"].replace("_", " ") for row in (best, other)]
  return (
    f"At equal ops/timestep the best, {names[0]}, has a test perplexity"
    f" {figures.than(best['test'], other['test'])} than {names[1]}"
  )


if __name__ == "__main__":
  models = f"comma-separated, of {', '.join(GATES)}, in place of all"
  steps = f"of training, in place of {training.STEPS}"
  harness.main("router_zoo", rows, draw, 0, models=models, steps=steps)
