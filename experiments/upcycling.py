"""Question: is a mixture out of a trained dense model worth what that cost?

Method: the dense recipe of configs/transformer is trained for 800 steps, and
then goes on for `extra` ones, as it is or as the mixture that `moejax upcycle`
makes of it: of copies (2212.05055), or of copies with half of their hidden
units drawn anew (2502.19261). Beside them the mixture is trained from scratch,
for the extra steps alone, and for all of them. All have the same ops/timestep,
but for the routers. The mixtures send a token to 4 of 32 experts, which are 8
copies of 4 parts of the dense layer, by sigmoids balanced without a loss, and
drop nothing in training either.

What goes on does so at the dense run's step, with its moments and its rate,
which falls as 1/sqrt and has no end: what is measured on the way is what a
shorter run would reach. A new warm-up to the peak would undo much of what is
there: 300 steps after 600 dense ones the mixture of copies was at a perplexity
of 137 with one, of 115 without. `validation` is the mean validation perplexity
per word over three seeds, `least` and `most` are its span.

Result: no, not after 400 steps more: the mixture of copies is where the dense
model is trained on, at 103.63 (101.61 to 105.44) and 103.62 (101.81 to 105.29);
with half of them drawn anew it has caught up from 1 % behind, at 103.93 (102.06
to 105.63). It is worth it against these steps alone from scratch, at 182.32. A
mixture of all 1,200 steps from scratch is 5 % ahead, at 98.59 (98.16 to 99.16):
copies that begin alike, at a rate that has fallen, part slowly
(results/upcycling.csv).
"""

import copy
import shutil
import statistics

from experiments import figures, harness, training
from moejax import config as config_lib
from moejax import workdir as workdir_lib
from moejax.training import upcycle

# Steps of the dense run, those after it, and from one validation to the next.
STEPS, QUICK = (training.STEPS, 400, 100), (4, 4, 2)
STARTS = {
  "dense": ("dense, trained on", figures.DENSE),
  "copies": ("of copies", figures.SPARSE),
  "drawn_anew": ("of copies, half drawn anew", figures.OTHERS[0]),
  "scratch": ("from scratch, these steps alone", figures.OTHERS[1]),
  "scratch_all": ("from scratch, all steps", figures.OTHERS[4]),
}
# The share of a copy's hidden units that is drawn anew.
DROP = {"copies": 0.0, "drawn_anew": 0.5}


def rows(quick: bool) -> figures.Rows:
  """Yields a row per start and number of extra steps."""
  before, extra, every = QUICK if quick else STEPS
  drops = {"copies": DROP["copies"]} if quick else DROP
  runs = {start: [] for start in STARTS if start not in DROP or start in drops}
  with training.folder("upcycling", quick) as folder:
    for seed in range(1 if quick else training.SEEDS):
      configs = {start: config_of(start) for start in runs}
      for config in configs.values():
        if quick:
          training.shrink(config, folder)
        config.seed = seed
        config.train.update({"steps": before + extra, "eval_every": every})
      workdirs = {start: folder / f"{start}_{seed}" for start in runs}
      for start, drop in drops.items():
        if workdir_lib.is_run(workdirs[start]):
          continue
        # Validated once, a run has its best checkpoint at its last step.
        first = copy.deepcopy(configs["dense"])
        first.train.update({"steps": before, "eval_every": before})
        training.train(first, workdirs["dense"])
        # What an interrupted call may have left.
        shutil.rmtree(workdirs[start], ignore_errors=True)
        about = config_lib.parse(configs[start]), workdirs[start]
        upcycle.upcycle(workdirs["dense"], *about, 0.0, drop, "carry")
      # A run of all steps was one of the first of them.
      workdirs["scratch"] = workdirs["scratch_all"]
      for start in runs:
        runs[start].append(training.train(configs[start], workdirs[start]))
  for start, each in runs.items():
    report = training.report(each[0])
    for more in range(every, extra + 1, every):
      at = more if start == "scratch" else before + more
      values = [
        line["perplexity"]
        for run in each
        for line in run.lines
        if line["split"] == "validation" and line["step"] == at
      ]
      yield {
        "start": start,
        "extra": more,
        "seeds": len(each),
        "ops": report["ops"],
        "parameters": report["parameters"],
        **harness.rounded(
          2,
          validation=statistics.mean(values),
          least=min(values),
          most=max(values),
        ),
      }


def config_of(start: str) -> config_lib.Config:
  """Returns the config of what a start is trained as."""
  if start == "dense":
    return training.load("transformer/dense")
  config = training.load("transformer/noisy_top_k", {"aux": {"bias": 1.0}})
  moe = config.model.blocks.moe
  moe.router = {"kind": "sigmoid", "k": 4}
  factors = ("capacity_factor", "eval_capacity_factor")
  moe.update({"dispatch": "auto", **dict.fromkeys(factors)})
  return config


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  shown = {
    ("scratch", "scratch_all"): "mixtures from scratch",
    ("dense", *DROP, "scratch_all"): "as many steps in all",
  }
  for axes, starts in figures.panels(figure, 4, shown):
    labels = {start: STARTS[start][0] for start in starts}
    colors = [STARTS[start][1] for start in starts]
    curves = figures.points(table, "extra", "validation", "start", labels)
    figures.lines(axes, curves, colors)
    for row in table:
      if row["start"] in starts:
        span, color = [row["least"], row["most"]], STARTS[row["start"]][1]
        axes.plot([row["extra"]] * 2, span, color=color, linewidth=1)
    axes.margins(x=0.3)
  figure.supxlabel("steps after the dense training")
  figure.supylabel("validation perplexity per word")
  last = {row["start"]: row["validation"] for row in table}
  copies, steps = last["copies"], table[-1]["extra"]
  return (
    f"After {steps} more steps a mixture of copies is at {copies:.1f}, the"
    f" dense model at {last['dense']:.1f}; a mixture that was trained from"
    f" scratch as long as both is at {last['scratch_all']:.1f}"
  )


if __name__ == "__main__":
  harness.main("upcycling", rows, draw)
