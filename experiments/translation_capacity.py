"""Question: are translations better with more experts at equal ops/timestep?

Method: configs/translate_tiny.py (width 128) with four things where its
mixtures are: nothing, as in the paper; a dense layer of hidden width 512; 4 of
32 experts of hidden width 128; 2 of 32 experts of each of 2 of 16 groups, 512
in all. The last three take the same ops/timestep but for their routers. The
same steps on the same batches of 4096 word pieces (seed 0), gating noisy top-k,
balance losses 0.01, dropout 0.2. The flat mixture drops nothing; `dropped` is
what that of two levels did and `cv_load` the balance, means over the last tenth
of training. Perplexity is that of a word piece, `</s>` counted, so only models
of one pair of languages compare. BLEU and chrF are sacrebleu's, of a beam of 8.
Blocks of 100 lines are held out, 1 in 20 for validation and 1 in 20 for the
test. The text is what package_pairs makes of packages, or that of --pairs, one
pair of languages after the other.

Result: 32 experts lead the model with nothing there by 6.3 BLEU to French and
4.8 to German, as the paper's lead theirs, which has fewer ops too. Beside the
dense twin they are 1.7 behind to French and 0.4 ahead to German, and 512
experts 3.7 and 1.3 behind. Experts learn later, each from a part of the text:
trained on to step 2400, test perplexity and BLEU to French are 7.55 and 36.5
(dense), 7.55 and 36.1 (32), 7.65 and 35.1 (512). Documentation, one seed
(results/translation_capacity_pairs.csv).
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from experiments import figures, harness, training, translating
from moejax import config as config_lib

STEPS = 1200


def two_levels(num_experts: int, num_groups: int) -> dict[str, Any]:
  """Returns the section of a mixture of two levels, with slots for the mean."""
  return {
    "num_experts": num_experts,
    "num_groups": num_groups,
    "group_size": 1,
    "groups_together": 1,
    "capacity_factor": 1.25,
    "eval_capacity_factor": 2.0,
    "primary": {"kind": "noisy_top_k", "k": 2},
    "secondary": {
      "router": {"kind": "noisy_top_k", "k": 2},
      "experts": {"kind": "feed_forward", "hidden": translating.HIDDEN},
      "capacity_factor": 1.25,
      "eval_capacity_factor": 2.0,
    },
  }


# The layer between LSTMs, and its section.
MODELS = {
  "lstm": ("", {}),
  "dense": ("one_expert", translating.one_expert(4)),
  "moe_32": ("moe", translating.flat(32, 4)),
  "moe_512_h": ("hierarchical_moe", two_levels(512, 16)),
  "moe_2048_h": ("hierarchical_moe", two_levels(2048, 32)),
}
QUICK = ("moe_32",)


def rows(quick: bool, pairs: str = "") -> Iterator[figures.Row]:
  """Yields a row per pair of languages and model."""
  with training.folder("translation_capacity", quick, pairs) as runs:
    files = translating.pair_files(pairs, ["fr"], runs, quick)
    for direction in files:
      for name in QUICK if quick else MODELS:
        own = {direction: files[direction]}
        config, run = trained(name, own, runs, quick)
        about = {"pair": str(direction), "model": name}
        yield about | training.report(config, run)


def trained(
  name: str, files: translating.Files, folder: pathlib.Path, quick: bool
) -> tuple[config_lib.Config, training.Run]:
  """Trains a model on the files of one direction; returns its config too."""
  (direction,) = files
  config = config_of(name, files, folder, quick)
  return config, training.train(config, folder / f"{direction}_{name}")


def config_of(
  name: str, files: translating.Files, folder: pathlib.Path, quick: bool
) -> config_lib.Config:
  """Returns the config of a model that learns from files."""
  train = translating.named(files)
  return translating.config(*MODELS[name], STEPS, folder, quick, train=train)


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  """Draws BLEU and perplexity, a group of models for each pair."""
  labels = {
    "lstm": ("nothing", figures.LIGHT),
    "dense": ("dense layer", figures.DENSE),
    "moe_32": ("32 experts", figures.SPARSE),
    "moe_512_h": ("512 in two levels", figures.PALE_SPARSE),
    "moe_2048_h": ("2048 in two levels", figures.PALE_SPARSE),
  }
  names = [f"{row['pair']}, {labels[row['model']][0]}" for row in table]
  colors = [labels[row["model"]][1] for row in table]
  meanings = {"bleu": "test BLEU", "test": "test perplexity per word piece"}
  for axes, column in figures.panels(figure, 3.6, meanings, sharey=True):
    values = {column: [row[column] for row in table]}
    figures.bars(axes, names, values, colors)
  bleu = {(row["pair"], row["model"]): row["bleu"] for row in table}
  leads = {
    model: " and ".join(
      f"{bleu[pair, 'moe_32'] - score:+.1f} BLEU ({pair})"
      for (pair, other), score in bleu.items()
      if other == model
    )
    for model in labels
  }
  return (
    f"32 experts against nothing in their place: {leads['lstm']}; against a"
    f" dense layer: {leads['dense']}"
  )


if __name__ == "__main__":
  about = {"pairs": translating.PAIRS}
  harness.main("translation_capacity", rows, draw, translating.SEED, **about)
