"""Question: how far is a mixture ahead of its dense twin, both tuned alike?

Method: 32 experts between two LSTMs (configs/sotu/moe_32.py, with the gate
top_k and without the sigmoid on the mixture) and the dense twin of the same
ops/timestep (moe_1_wide.py, without it too). Both get the same trials of
optimizers and rates, half the steps each, seed 0; the one of lowest validation
perplexity is trained with three seeds. `test` is the mean test perplexity of
these, `test_least` and `test_most` their span.

Result: the mixture's test perplexity is 75.58 (75.37 to 75.85), the twin's
80.51 (80.19 to 80.75): 6.1 % lower. The same trial is the best for both, Muon
at half its usual scale. By Adam, tuned too, the mixture leads by 3.5 % after
half the steps, by Muon by 6.7 %: Adam's steps make experts, each of which sees
an eighth of the text, learn late (results/tuned_alike.csv).
"""

from collections.abc import Mapping
from typing import Any

from experiments import figures, harness, training

# Of a model: its config, what is changed in it, and its colors.
MODELS: Mapping[str, tuple[str, dict[str, Any], str]] = {
  "4 of 32 experts": (
    "sotu/moe_32",
    {
      "model.sigmoid": False,
      "model.moe.router": {"kind": "top_k", "k": 4},
      "aux": {"importance": 0.1},
    },
    figures.SPARSE,
  ),
  "dense twin": (
    "sotu/moe_1_wide",
    {"model.sigmoid": False},
    figures.DENSE,
  ),
}


def _adam(peak: float, experts: float = 1.0) -> dict[str, Any]:
  groups = {"experts": {"rate": experts}}
  return {"optimizer.peak": peak, "optimizer.groups": groups}


def _muon(peak: float, scale: float) -> dict[str, Any]:
  return {
    "optimizer.kind": "muon",
    "optimizer.peak": peak,
    "optimizer.scale": scale,
  }


TRIALS: Mapping[str, dict[str, Any]] = {
  "adam 0.01": _adam(1e-2),
  "adam 0.02": _adam(2e-2),
  "adam 0.02, experts half": _adam(2e-2, 0.5),
  "muon 0.01 x 0.1": _muon(1e-2, 0.1),
  "muon 0.01 x 0.2": _muon(1e-2, 0.2),
  "muon 0.02 x 0.05": _muon(2e-2, 0.05),
  "muon 0.02 x 0.1": _muon(2e-2, 0.1),
  "muon 0.02 x 0.2": _muon(2e-2, 0.2),
}


def rows(quick: bool) -> figures.Rows:
  """Yields a row per trial, and one per model of the best one's seeds."""
  with training.folder("tuned_alike", quick) as runs:

    def config_of(model: str, trial: str) -> Any:
      name, changes, _ = MODELS[model]
      changed = training.load(name, changes | TRIALS[trial])
      if quick:
        training.shrink(changed, runs)
      return changed

    trials = list(TRIALS)[-2:] if quick else list(TRIALS)
    wanted = {}
    for model in MODELS:
      for trial in trials:
        config = config_of(model, trial)
        config.train.steps //= 2
        wanted[f"{model} {trial}".replace(" ", "_")] = config
    found = iter(training.train_all(runs, wanted, quick).values())
    best = {}
    for model in MODELS:
      of_trials = {}
      for trial in trials:
        row = training.report(next(found))
        of_trials[trial] = row["validation"]
        names = "ops", "parameters", "validation", "cv_load", "dropped"
        row = {name: row[name] for name in names}
        yield {"model": model, "trial": trial, "stage": "search", **row}
      best[model] = min(of_trials, key=of_trials.get)
    for model, trial in best.items():
      folder = runs / f"{model} best".replace(" ", "_")
      row = training.over_seeds(config_of(model, trial), folder, quick)
      yield {"model": model, "trial": trial, "stage": "seeds", **row}


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  search, seeds = figure.subplots(1, 2, width_ratios=(3, 2))
  trials = list(dict.fromkeys(row["trial"] for row in table))
  for model, (_, _, color) in MODELS.items():
    mine = [row for row in table if row["model"] == model]
    tried = [row for row in mine if row["stage"] == "search"]
    places = [trials.index(row["trial"]) for row in tried]
    search.plot([row["validation"] for row in tried], places, "o", color=color)
    (best,) = [row for row in mine if row["stage"] == "seeds"]
    place = list(MODELS).index(model)
    seeds.plot(
      [best["test_least"], best["test_most"]], [place] * 2, color=color
    )
    seeds.plot(best["test"], place, "o", color=color)
    at = (best["test"], place - 0.12)
    text = f"{model}: {best['test']:.1f}"
    seeds.annotate(text, at, ha="center", va="bottom", color=color)
  search.set_yticks(range(len(trials)), trials)
  search.set_ylim(len(trials) - 0.5, -0.5)
  seeds.set_yticks([])
  seeds.set_ylim(len(MODELS) - 0.5, -0.5)
  seeds.margins(x=0.7)
  about = "optimizer, peak rate, scale of Muon"
  figures.scales(search, "validation perplexity, half the steps", about)
  figures.scales(seeds, "test perplexity, span of seeds")
  sparse, dense = (
    next(r for r in table if r["model"] == model and r["stage"] == "seeds")
    for model in MODELS
  )
  return (
    f"Tuned alike, 32 experts have a test perplexity"
    f" {figures.than(sparse['test'], dense['test'])} than their dense twin"
  )


if __name__ == "__main__":
  harness.main("tuned_alike", rows, draw)
