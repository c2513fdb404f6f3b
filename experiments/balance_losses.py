"""Question: what do the balance losses do, and does it cost quality (Table 6)?

Method: configs/sotu/moe_32.py with the six pairs of weights of the paper's
appendix A, the same 1200 steps on the same batches (seed 0), dropless. Balance
is the mean over the last tenth of the training batches: CV(Importance); CV and
max/mean of the smooth Load (eq. 10), as in the table; max/mean of tokens
counted, which is what a device waits for. Of 32 experts of which 4 are chosen,
CV can be at most 2.65 and max/mean 8. `paper` columns are Table 6's, of MoE-256
(at most 7.94 and 64) on another text.

Result: either loss alone brings max/mean of the load from 4.8 to 1.3 or less,
nearly the paper's balance. Without losses the gate collapses on few experts,
which costs 1 % of perplexity here, 12 % in the paper. One seed, one core of an
Intel Xeon each (results/balance_losses.csv).
"""

from experiments import figures, harness, training
from experiments.paper_tables import TABLE_6

STEPS = 1200
SEED = 0
REPORTED = ("cv_importance", "cv_load", "max_over_mean_load")
PAPERS = ("paper", *(f"paper_{name}" for name in REPORTED))


def rows(quick: bool) -> figures.Rows:
  """Yields a row per pair of weights."""
  with training.folder("balance_losses", quick) as runs:
    for weights in list(TABLE_6)[3:4] if quick else TABLE_6:
      fields = {"seed": SEED, "train.steps": STEPS}
      config = training.load("sotu/moe_32", fields)
      if quick:
        training.shrink(config, runs)
      dropless = dict.fromkeys(("capacity_factor", "eval_capacity_factor"))
      config.model.moe.update(dispatch="ragged", **dropless)
      config.aux = dict(zip(("importance", "load"), weights, strict=True))
      run = training.train(config, runs / "_".join(map(str, weights)))
      reported = (*REPORTED, "max_over_mean_count")
      yield {
        "w_importance": weights[0],
        "w_load": weights[1],
        "test_perplexity": round(run.result["test"]["perplexity"], 2),
        **harness.rounded(**{name: run.last(name) for name in reported}),
        "minutes": round(run.result["seconds"] / 60, 1),
        **dict(zip(PAPERS, TABLE_6[weights], strict=True)),
      }


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  meanings = {
    "max_over_mean_load": "busiest expert's load / mean",
    "cv_importance": "variation of importance (CV)",
    "test_perplexity": "test perplexity",
  }
  groups = [f"{row['w_importance']:g}, {row['w_load']:g}" for row in table]
  for axes, name in figures.panels(figure, 4.6, meanings, sharey=True):
    paper = "paper" if name == "test_perplexity" else f"paper_{name}"
    series = {
      "ours": [row[name] for row in table],
      "the paper's": [row[paper] for row in table],
    }
    figures.bars(axes, groups, series, (figures.SPARSE, figures.LIGHT))
  figure.supylabel("weights of importance and load loss")
  values = [row["max_over_mean_load"] for row in table]
  load = dict(zip(groups, values, strict=True))
  without = load.pop("0, 0", None)
  perplexity = figures.span([row["test_perplexity"] for row in table], "{:.1f}")
  return (
    f"The busiest expert takes {figures.span(load.values())} times the mean"
    f" load with balance losses, {figures.number(without)} times without;"
    f" perplexity is {perplexity}"
  )


if __name__ == "__main__":
  harness.main("balance_losses", rows, draw, SEED)
