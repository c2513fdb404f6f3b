"""Question: what is the best recipe for ten minutes on two cores?

Method: the rules. The text is the presidents' messages, as configs/sotu reads
them; a model takes 2,400 batches of 4,096 words, with at most 200,000
ops/timestep, its softmax not counted; its training ends within ten minutes on
two cores, and it is measured by the full softmax on whole words. A row is one
command, `moejax train` with the config and the flags in the table; three seeds.
`minutes` is 2,400 times the median step of recipes that take turns on all cores
of the machine. Each row but the first changes one thing of another one.

Result: of nine LSTM recipes that of `make train` is the best: 75.41 (75.11 to
75.90), 8.7 % below the paper's dense twin, where the paper's mixture is 2.6 %
below it. Muon is worth 3.9, leaving out the sigmoid behind the mixture 2.5, and
leaving out the noise 0.2, less than the seeds differ. The Transformers have not
been run (results/speedrun.csv, docs/speedrun.md).
"""

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments import figures, harness, training
from moejax import config as config_lib
from moejax.training import cost

OPS = 200_000


class Recipe(NamedTuple):
  """A config, what is changed in it, and what that is in a few words."""

  config: str
  changes: Mapping[str, Any]
  line: str


_TOP_K = {"model.moe.router.kind": "top_k", "aux.load": None}
_PLAIN = {"model.sigmoid": False}
_NOISE = {
  "model.moe.router.kind": "noisy_top_k",
  "aux.load": 0.1,
  "aux.switch_balance": None,
}
_MUON = {"optimizer.kind": "muon", "optimizer.scale": 0.1}
RECIPES = {
  "dense": Recipe("sotu/moe_1_wide", {}, "the paper's dense twin"),
  "paper": Recipe("sotu/moe_32", {}, "the paper's mixture"),
  "no_noise": Recipe("sotu/moe_32", _TOP_K, "without noise"),
  "no_sigmoid": Recipe(
    "sotu/moe_32", _TOP_K | _PLAIN, "without noise and sigmoid"
  ),
  "muon": Recipe("sotu/moe_32_muon", {}, "Muon, two losses"),
  "muon_noise": Recipe("sotu/moe_32_muon", _NOISE, "Muon, with noise"),
  "muon_sigmoid": Recipe(
    "sotu/moe_32_muon", {"model.sigmoid": True}, "Muon, with sigmoid"
  ),
  "muon_importance": Recipe(
    "sotu/moe_32_muon", {"aux.switch_balance": None}, "Muon, importance alone"
  ),
  "muon_dense": Recipe("sotu/moe_1_wide_muon", {}, "dense, Muon"),
  "transformer": Recipe("transformer/top_k", {}, "Transformer"),
  "transformer_muon": Recipe("transformer/top_k", _MUON, "Transformer, Muon"),
  "transformer_dense_muon": Recipe(
    "transformer/dense", _MUON, "dense Transformer, Muon"
  ),
}


def rows(quick: bool, models: str = "") -> figures.Rows:
  """Yields a row per recipe.

  Raises ValueError where one takes more ops than the rules allow.
  """
  names = harness.chosen(models, RECIPES, ("muon",) if quick else ())
  with training.folder("speedrun", quick) as runs:
    configs = {}
    for name in names:
      config, changes, _ = RECIPES[name]
      configs[name] = training.load(config, changes)
      if quick:
        training.shrink(configs[name], runs)
      ops = cost.count(config_lib.parse(configs[name]), 1).ops
      if ops > OPS:
        raise ValueError(
          f"the recipe {name} takes {ops:,} ops/timestep; the rules allow"
          f" {OPS:,}."
        )
    with training.roughly_compiled(quick):
      steps = {n: training.random_step(c) for n, c in configs.items()}
    times = harness.interleaved(steps, 2 if quick else 9)
    del steps
    seeds = training.over_seeds(runs, configs, quick)
    for (name, config), found in zip(configs.items(), seeds, strict=True):
      # The cores' time of all seeds is no time of one.
      del found["minutes"]
      minutes = times[name].median * config.train.steps / 60_000
      yield {
        "recipe": name,
        **found,
        "minutes": round(minutes, 1),
        "flags": flags(name),
      }


def flags(name: str) -> str:
  """Returns what `moejax train` is given for a recipe."""
  config, changes, _ = RECIPES[name]
  fields = (f"--config.{n}={value}" for n, value in changes.items())
  return shlex.join([f"--config={config}", *fields])


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  axes = figure.subplots()
  table = sorted(table, key=lambda row: row["test"])
  about = [
    (
      RECIPES[row["recipe"]].line,
      f"{row['test']:.1f}, {row['minutes']:.1f} min",
      "dense" in row["recipe"],
    )
    for row in table
  ]
  figures.spans(axes, table, about)
  best = table[0]
  found = (
    f"The best recipe ({RECIPES[best['recipe']].line}) reaches a test"
    f" perplexity of {best['test']:.1f}"
  )
  for row in table:
    if row["recipe"] in ("paper", "dense"):
      found += f", {RECIPES[row['recipe']].line} {row['test']:.1f}"
  return found


if __name__ == "__main__":
  models = f"recipes, comma-separated, of {', '.join(RECIPES)}"
  harness.main("speedrun", rows, draw, models=models)
