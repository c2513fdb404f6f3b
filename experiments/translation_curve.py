"""Question: how do experts pay as more of the source is read (Fig. 4)?

Method: perplexity of the validation text at twelve points of the runs of
translation_capacity, over the words of the source that the model has read by
then: nothing, 32, 512 and 2048 experts in place of the mixtures. Without any a
model has fewer ops/timestep, as in the paper. A text is read several times.

Result: to be measured.
"""

from experiments import figures, harness, training, translating
from moejax import config as config_lib

NAMES = {
  "lstm": "no mixture",
  "moe_32": "32 experts",
  "moe_512_h": "512 in two levels",
  "moe_2048_h": "2048 in two levels",
}


def rows(quick: bool, pairs: str = "", models: str = "") -> figures.Rows:
  """Yields a row per pair of languages, model and validation."""
  names = harness.chosen(models, NAMES, ("moe_512_h",) if quick else ())
  for pair, name, run in translating.trained(names, quick, pairs):
    words = source_words(run)
    for line in run.lines:
      if line["split"] == "validation":
        yield {
          "pair": pair,
          "model": name,
          "step": line["step"],
          "source_words": round(words * line["step"]),
          "perplexity": round(line["perplexity"], 2),
        }


def source_words(run: training.Run) -> float:
  """Returns how many words of the source a step reads, in the mean."""
  data = config_lib.open_corpus(config_lib.parse(run.config))
  (tokens,) = data.tokens("train")
  words = data.vocabulary.decode(tokens.ids["source"].tolist()).split()
  return len(words) * data.batch_size / len(data.rows("train"))


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  pairs = {row["pair"]: row["pair"].replace("-", " to ") for row in table}
  colors = (figures.GRAY, figures.SPARSE, *figures.OTHERS)
  for axes, pair in figures.panels(figure, 3.8, pairs, squeeze=False):
    points = figures.points(
      table, "source_words", "perplexity", "model", NAMES, 1e6, pair=pair
    )
    figures.lines(axes, points, colors)
    ticks = (8, 10, 15, 20, 30, 50, 100, 200, 400)
    figures.scales(axes, "million source words read", y_ticks=ticks)
  figure.supylabel("validation perplexity per word piece")
  last = {row["model"]: row["perplexity"] for row in table}
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
