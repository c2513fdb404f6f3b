"""Question: how far is a mixture ahead of its dense twin, both tuned alike?

Method: 32 experts between two LSTMs (configs/sotu/moe_32.py, with the gate
top_k and without the sigmoid on the mixture) and the dense twin of the same
ops/timestep (moe_1_wide.py, without it too). Both get the same trials of
optimizers and rates, half the steps each, seed 0; the one of lowest validation
perplexity is trained with three seeds. `test` is the mean test perplexity of
these, `test_least` and `test_most` their span; of BLEU alike. With --pairs it
is that of translating each of these pairs of languages, by the models of
experiments/translating.py, changed in the same way.

Result: the mixture's test perplexity is 75.52 (75.10 to 75.91), the twin's
80.51 (80.19 to 80.75): 6.2 % lower. The same trial is the best for both, Muon
at half its usual scale. By Adam, tuned too, the mixture leads by 3.5 % after
half the steps, by Muon by 6.6 %: Adam's steps make experts, each of which sees
an eighth of the text, learn late (results/tuned_alike.csv).
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from experiments import figures, harness, training, translating
from moejax import config as config_lib

SPARSE, DENSE = "4 of 32 experts", "dense twin"
COLORS = {SPARSE: figures.SPARSE, DENSE: figures.DENSE}
# Of a language model: its config, and what is changed in it.
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
  SPARSE: (
    "sotu/moe_32",
    {
      "model.sigmoid": False,
      "model.moe.router": {"kind": "top_k", "k": 4},
      "aux": {"importance": 0.1},
    },
  ),
  DENSE: ("sotu/moe_1_wide", {"model.sigmoid": False}),
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
# Of translation: twice as wide, and word vectors of both languages.
TRANSLATION: Mapping[str, dict[str, Any]] = {
  "adam 0.003": _adam(3e-3),
  "muon 0.003 x 0.2": _muon(3e-3, 0.2),
  "muon 0.006 x 0.1": _muon(6e-3, 0.1),
  "muon 0.006 x 0.2": _muon(6e-3, 0.2),
}


def rows(quick: bool, pairs: str = "") -> figures.Rows:
  """Yields a row per trial, and one per model of the best one's seeds."""
  trials = TRANSLATION if pairs else TRIALS
  if quick:
    trials = dict(list(trials.items())[-2:])
  with training.folder("tuned_alike", quick, pairs) as runs:
    for about, configs in tasks(quick, pairs, runs):
      # Named as the runs are.
      start = "".join(f"{value} " for value in about.values())

      def config_of(model, trial, configs=configs):
        config = configs[model].copy_and_resolve_references()
        config.update_from_flattened_dict(trials[trial])
        return config

      wanted = {}
      for model in configs:
        for trial in trials:
          config = config_of(model, trial)
          config.train.steps //= 2
          wanted[f"{start}{model} {trial}".replace(" ", "_")] = config
      found = iter(training.train_all(runs, wanted, quick).values())
      best = {}
      for model in configs:
        of_trials = {}
        for trial in trials:
          row = training.report(next(found))
          of_trials[trial] = row["validation"]
          names = "ops", "parameters", "validation", "cv_load", "dropped"
          row = {name: row[name] for name in names}
          yield (
            about | {"model": model, "trial": trial, "stage": "search"} | row
          )
        best[model] = min(of_trials, key=of_trials.get)
      final = {
        f"{start}{model} best".replace(" ", "_"): config_of(model, trial)
        for model, trial in best.items()
      }
      seeds = training.over_seeds(runs, final, quick)
      for (model, trial), row in zip(best.items(), seeds, strict=True):
        yield about | {"model": model, "trial": trial, "stage": "seeds"} | row


def tasks(
  quick: bool, pairs: str, runs: pathlib.Path
) -> Iterator[tuple[figures.Row, dict[str, config_lib.Config]]]:
  """Yields what each task is called, and the config of each model."""
  if not pairs:
    configs = {n: training.load(*about) for n, about in MODELS.items()}
    for config in configs.values() if quick else ():
      training.shrink(config, runs)
    yield {}, configs
    return
  layers = {
    SPARSE: translating.flat(32, 4, "top_k"),
    DENSE: translating.one_expert(4),
  }
  for pair, files in translating.pair_files(pairs, ["fr"], runs, quick).items():
    about = translating.STEPS, runs, quick
    train = translating.named({pair: files})
    configs = {
      name: translating.config(*layer, *about, train=train)
      for name, layer in layers.items()
    }
    for config in configs.values():
      config.model.sigmoid = False
    configs[SPARSE].aux = {"importance": 0.01, "switch_balance": 0.01}
    yield {"pair": str(pair)}, configs


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  pairs = list(dict.fromkeys(row.get("pair") for row in table))
  figure.set_size_inches(8, 4 * len(pairs))
  every = figure.subplots(len(pairs), 2, width_ratios=(3, 2), squeeze=False)
  found = []
  for (search, seeds), pair in zip(every, pairs, strict=True):
    mine = [row for row in table if row.get("pair") == pair]
    trials = list(dict.fromkeys(row["trial"] for row in mine))
    tests = []
    for place, (model, color) in enumerate(COLORS.items()):
      of_model = [row for row in mine if row["model"] == model]
      tried = [row for row in of_model if row["stage"] == "search"]
      at = [trials.index(row["trial"]) for row in tried]
      search.plot([row["validation"] for row in tried], at, "o", color=color)
      (best,) = [row for row in of_model if row["stage"] == "seeds"]
      span = [best["test_least"], best["test_most"]]
      seeds.plot(span, [place] * 2, color=color)
      seeds.plot(best["test"], place, "o", color=color)
      text = f"{model}: {best['test']:.1f}"
      if best.get("bleu") is not None:
        text += f", BLEU {best['bleu']:.1f}"
      at = (best["test"], place - 0.12)
      seeds.annotate(text, at, ha="center", va="bottom", color=color)
      tests.append(best["test"])
    search.set_yticks(range(len(trials)), trials)
    search.set_ylim(len(trials) - 0.5, -0.5)
    seeds.set_yticks([])
    seeds.set_ylim(len(COLORS) - 0.5, -0.5)
    seeds.margins(x=0.7)
    of_pair = f"{pair}: " if pair else ""
    name = f"{of_pair}validation perplexity, half the steps"
    figures.scales(search, name, "optimizer, peak rate, scale of Muon")
    figures.scales(seeds, f"{of_pair}test perplexity, span of seeds")
    found.append(figures.than(*tests) + (f" ({pair})" if pair else ""))
  return (
    "Tuned alike, 32 experts have a test perplexity"
    f" {' and '.join(found)} than their dense twin"
  )


if __name__ == "__main__":
  harness.main("tuned_alike", rows, draw, pairs=translating.PAIRS)
