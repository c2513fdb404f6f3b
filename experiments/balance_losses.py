"""Question: what do the balance losses do, and does it cost quality (Table 6)?

Method: configs/sotu/moe_32.py with the six pairs of weights of the paper's
appendix A, the same 1200 steps on the same batches (seed 0), dropless: an
overloaded expert serves all its tokens and only the choice of experts counts.
Balance is the mean over the last tenth of the training batches, as the layer
reports it: CV(Importance); CV and max/mean of the smooth Load (eq. 10), as in
the table; max/mean of tokens counted, which is what a device waits for. `paper`
are Table 6's own test perplexities, of MoE-256 on another text. Runs lie under
runs/balance_losses and are resumed there.

Result: not run to its end yet.
"""

from collections.abc import Iterator

import matplotlib.figure

from experiments import harness, training

STEPS = 1200
SEED = 0
# (w_importance, w_load) -> the paper's test perplexity.
PAPER = {
  (0.0, 0.0): 39.8,
  (0.2, 0.0): 35.6,
  (0.0, 0.2): 35.7,
  (0.1, 0.1): 35.6,
  (0.01, 0.01): 35.7,
  (1.0, 1.0): 35.7,
}
REPORTED = (
  "cv_importance",
  "cv_load",
  "max_over_mean_load",
  "max_over_mean_count",
)


def rows(quick: bool) -> Iterator[harness.Row]:
  """Yields a row per pair of weights."""
  with training.folder("balance_losses", quick) as runs:
    for weights in list(PAPER)[3:4] if quick else PAPER:
      config = training.load("sotu/moe_32")
      config.seed = SEED
      config.train.steps = STEPS
      if quick:
        config.update_from_flattened_dict(training.QUICK)
      moe = config.model.moe.to_dict()
      del config.model["moe"]
      with config.unlocked():
        config.model.moe = moe | {
          "dispatch": "ragged",
          "capacity_factor": None,
          "eval_capacity_factor": None,
        }
      config.aux = dict(zip(("importance", "load"), weights, strict=True))
      run = training.train(config, runs / "_".join(map(str, weights)))
      yield {
        "w_importance": weights[0],
        "w_load": weights[1],
        "test_perplexity": round(run.result["test"]["perplexity"], 2),
        **{name: round(run.last(name), 3) for name in REPORTED},
        "paper": PAPER[weights],
      }


def draw(figure: matplotlib.figure.Figure, table: list[harness.Row]) -> None:
  """Draws quality beside balance."""
  quality, balance = figure.subplots(1, 2)
  names = [f"{row['w_importance']}, {row['w_load']}" for row in table]
  quality.bar(names, [row["test_perplexity"] for row in table])
  lowest = min(row["test_perplexity"] for row in table)
  quality.set_ylim(bottom=0.95 * lowest)
  quality.set_ylabel("test perplexity per word")
  for name in REPORTED:
    balance.plot(names, [row[name] for row in table], "o-", label=name)
  balance.set_yscale("log")
  balance.legend(fontsize=7)
  for axes in (quality, balance):
    axes.tick_params(axis="x", labelsize=7, rotation=30)
    axes.set_xlabel("w_importance, w_load")


if __name__ == "__main__":
  harness.main("balance_losses", rows, draw, SEED)
