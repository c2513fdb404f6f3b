"""Question: do more experts pay on more unseen text (Fig. 3, Table 8)?

Method: the rows of configs/news with an eighth of every width, on text that is
read once: no word comes twice, and there is no dropout. `test_of_tenth` is the
test perplexity after a tenth of the text, `test` after all of it, in batches of
8192 words; widths, optimizer and sampled softmax are those of capacity_curve.
`dropped` and `cv_load` are means over the last tenth of training. The 5-gram
has the same sentences, of which a tenth is drawn by chance. The text is the
presidents' messages, or that of --text.

Result: on 12 million words of documentation 32 experts are 3 % ahead of four
LSTMs after a tenth of the text, and 5 % after all of it; more experts do not
pay yet: with 256 the lead is 3 %, with 1,024 and 4,096 perplexity is 5 and 11 %
higher, as 4 of 4,096 experts see 12,000 words each. As in Fig. 3 the gap closes
with more text: with 256 experts from 1 % behind to 3 % ahead, where the paper
has 8,000 times the words. The text repeats itself, so that a 5-gram is
ahead of all. One seed, a core of an AMD EPYC (results/unseen_text_text.csv).
"""

from pathlib import Path

import numpy as np

from experiments import capacity_curve, figures, harness, kneser_ney, training
from moejax import config as config_lib
from moejax.data import batches

SEED = 0
BATCH_SIZE = 128
PARTS = {"test_of_tenth": 0.1, "test": 1.0}
NAMES = {
  "four_lstm_512": "four LSTMs",
  "moe_32": "32 experts",
  "moe_256_h": "256",
  "moe_1024_h": "1,024",
  "moe_4096_h": "4,096",
}
QUICK = ("moe_256_h",)


def rows(quick: bool, text: str = "", models: str = "") -> figures.Rows:
  """Yields a row per model."""
  names = harness.chosen(models, NAMES, QUICK if quick else ())
  with training.folder("unseen_text", quick, text) as runs:
    wanted = {}
    for name in names:
      for part in PARTS.values():
        config = scaled(name, text, part, quick, runs)
        wanted[f"{name}_{config.train.steps}"] = config
    found = iter(training.train_all(runs, wanted, quick).values())
    for name in names:
      row = {"model": name}
      for column in PARTS:
        run = next(found)
        row[column] = round(run.result["test"]["perplexity"], 2)
      # The last is that of all the text.
      data, steps = run.config.data, run.config.train.steps
      words = steps * data.batch_size * data.row_length
      yield row | training.report(run) | {"words": words}
    # The 5-gram of each part of the text.
    vocabulary, tokens = kneser_ney.read(scaled(QUICK[0], text, 1, quick, runs))
    rng, found, own = np.random.default_rng(SEED), {}, tokens["train"]
    ids, lengths = own.ids["target"], own.lengths["target"]
    for column, part in PARTS.items():
      chosen = rng.random(lengths.size) < part
      some = {"target": ids[np.repeat(chosen, lengths)]}
      some = own._replace(ids=some, lengths={"target": lengths[chosen]})
      model = kneser_ney.train(some, vocabulary, 5)
      found[column] = kneser_ney.perplexity(model, tokens["test"])
    yield {"model": "kneser_ney_5", **harness.rounded(2, **found)}


def scaled(
  name: str, text: str, part: float, quick: bool, runs: Path
) -> config_lib.Config:
  """Returns a row of configs/news for a laptop, and for a part of the text."""
  config = capacity_curve.scaled(f"news/{name}", 8, text, BATCH_SIZE)
  config.model.dropout = 0.0
  if quick:
    training.shrink(config, runs)
  data = config_lib.open_corpus(config_lib.parse(config))
  steps = batches.num_batches(data.rows("train"), data.batch_size, passes=1)
  if quick:
    steps = min(steps, 4)
  # Validations are for the curve: as a rule the last is the best.
  every, steps = max(1, int(0.1 * steps)), max(1, int(part * steps))
  config.train.update(passes=1, steps=steps, eval_every=every)
  return config


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  axes = figure.subplots()
  models = [row for row in table if row["model"] in NAMES]
  sparse = [row for row in models if row["cv_load"] is not None]
  dense = [row for row in models if row["cv_load"] is None]
  colors = (figures.PALE_SPARSE, figures.SPARSE)
  labels = ("a tenth of the text", "all of it")
  leads = []
  for column, color, amount in zip(PARTS, colors, labels, strict=True):
    curve = [(row["parameters"] / 1e6, row[column]) for row in sparse]
    figures.lines(axes, {amount: curve}, (color,))
    for row in models if column == "test" else dense:
      at = (NAMES[row["model"]], row["parameters"] / 1e6, row[column])
      figures.point(axes, *at, row["cv_load"] is not None)
    for row in table:
      if row["model"] not in NAMES:
        figures.level(axes, f"5-gram, {amount}", row[column])
    if dense:
      best = min(sparse, key=lambda row: row[column])
      than = figures.than(best[column], dense[0][column])
      name = NAMES[best["model"]].removesuffix(" experts")
      leads.append(f"{than} with {name} experts")
  figures.scales(
    axes,
    "million parameters outside embedding and softmax",
    "test perplexity per word",
    (0.1, 0.3, 1, 3, 10, 30),
    (40, 50, 60, 80, 100, 150, 200, 300, 400),
  )
  axes.margins(x=0.12, y=0.12)
  if not dense:
    return "Perplexity after a tenth of the text, and after all of it"
  return (
    f"After a tenth of the text perplexity is {leads[0]} than with four LSTMs,"
    f" after all of it {leads[1]}"
  )


if __name__ == "__main__":
  about = {
    "text": capacity_curve.TEXT,
    "models": f"comma-separated, of {', '.join(NAMES)}, in place of all",
  }
  harness.main("unseen_text", rows, draw, SEED, **about)
