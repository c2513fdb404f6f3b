"""Question: how do experts pay as more of the source is read (Fig. 4)?

Method: perplexity of the validation text at twelve points of the runs of
translation_capacity, over the words of the source that the model has read by
then: nothing, 32, 512 and 2048 experts in place of the mixtures. Without any a
model has fewer ops/timestep, as in the paper. A text is read several times.

Result: to be measured.
"""

from collections.abc import Iterator

from experiments import (
  figures,
  harness,
  training,
  translating,
  translation_capacity,
)
from moejax import config as config_lib

NAMES = {
  "lstm": "no mixture",
  "moe_32": "32 experts",
  "moe_512_h": "512 in two levels",
  "moe_2048_h": "2048 in two levels",
}
QUICK = ("moe_32",)


def rows(
  quick: bool, pairs: str = "", models: str = ""
) -> Iterator[figures.Row]:
  """Yields a row per pair of languages, model and validation."""
  names = harness.chosen(models, NAMES, QUICK if quick else ())
  with training.folder("translation_capacity", quick, pairs) as runs:
    files = translating.pair_files(pairs, ["fr"], runs, quick)
    for direction in files:
      for name in names:
        config, run = translation_capacity.trained(
          name, {direction: files[direction]}, runs, quick
        )
        words = source_words(config)
        for line in run.lines:
          if line["split"] == "validation":
            yield {
              "pair": str(direction),
              "model": name,
              "step": line["step"],
              "source_words": round(words * line["step"]),
              "perplexity": round(line["perplexity"], 2),
            }


def source_words(config: config_lib.Config) -> float:
  """Returns how many words of the source a step reads, in the mean."""
  data = config_lib.open_corpus(config_lib.parse(config))
  (tokens,) = data.tokens("train")
  words = data.vocabulary.decode(tokens.ids["source"].tolist()).split()
  return len(words) * data.batch_size / len(data.rows("train"))


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  """Draws perplexity over source words, a panel for each pair."""
  pairs = {row["pair"]: row["pair"].replace("-", " to ") for row in table}
  colors = (figures.GRAY, figures.SPARSE, *figures.OTHERS)
  for axes, pair in figures.panels(figure, 3.8, pairs, squeeze=False):
    points = {
      label: [
        (row["source_words"] / 1e6, row["perplexity"])
        for row in table
        if (row["pair"], row["model"]) == (pair, name)
      ]
      for name, label in NAMES.items()
    }
    points = {label: each for label, each in points.items() if each}
    figures.lines(axes, points, colors)
    axes.set_yscale("log")
    figures.plain(axes.yaxis, (8, 10, 15, 20, 30, 50, 100, 200, 400))
    axes.set_xlabel("million source words read")
  figure.supylabel("validation perplexity per word piece")
  last = {name: row["perplexity"] for row in table for name in [row["model"]]}
  return "Perplexity at the end: " + ", ".join(
    f"{last[name]:.1f} with {label}"
    for name, label in NAMES.items()
    if name in last
  )


if __name__ == "__main__":
  about = {
    "pairs": translating.PAIRS,
    "models": f"comma-separated, of {', '.join(NAMES)}, in place of all",
  }
  harness.main("translation_curve", rows, draw, translating.SEED, **about)
