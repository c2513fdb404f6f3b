"""Question: what is a mixture worth in place of an LSTM's matrices?

Method: the paper proposes it (sec. 3.1) and has no experiment. A model of it,
configs/sotu/recurrent_moe.py, is trained beside configs/sotu/moe_32.py, the
paper's mixture between LSTMs, of exactly as many ops/timestep and parameters,
and beside four LSTMs, the paper's 4xLSTM, of as many ops/timestep but for those
of the router: the same steps on the same batches. Perplexity per word, `</S>`
counted, by the full softmax; the test is that of the checkpoint of lowest
validation perplexity.

Result: test perplexity 75.99 with the recurrent mixture, 79.73 with the mixture
between LSTMs and 79.97 with LSTMs alone (one seed, one core of an AMD EPYC that
others used too, results/recurrent_mixture.csv). It is behind at the first
validation and ahead from the second on. The peak rate, 2e-2, is the one found
for moe_32.py and its twin; it was not searched for the others. Where the two
others read 11,100 and 11,400 words a second, it reads 8,000: its time steps
come one after the other, and each is run twice.
"""

from collections.abc import Iterator

from experiments import figures, harness, training
from moejax import config as config_lib
from moejax.training import cost

# Of each model the config, the layers, what it is called and drawn in.
MODELS = {
  "recurrent_moe": (
    "sotu/recurrent_moe",
    ("lstm", "recurrent_moe", "lstm"),
    "mixture of matrices",
    figures.OTHERS[0],
  ),
  "moe_32": (
    "sotu/moe_32",
    ("lstm", "moe", "lstm"),
    "mixture between LSTMs",
    figures.SPARSE,
  ),
  "four_lstm": ("sotu/moe_32", ("lstm",) * 4, "LSTMs alone", figures.DENSE),
}


def rows(quick: bool) -> Iterator[figures.Row]:
  """Yields a row per validation, and one per test."""
  with training.folder("recurrent_mixture", quick) as runs:
    for name, (file, layers, *_) in MODELS.items():
      config = training.load(file, {"model.layers": layers})
      if quick:
        training.shrink(config, runs)
      count = cost.count(config_lib.parse(config), 1)
      run = training.train(config, runs / name)
      for row in training.perplexities(run):
        sizes = {"ops": count.ops, "parameters": count.parameters}
        yield {"model": name, **sizes, **row}


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  """Draws the validation curves."""
  axes, tests = figure.subplots(), {}
  for name, (_, _, label, color) in MODELS.items():
    mine = [row for row in table if row["model"] == name]
    (tests[name],) = (r["perplexity"] for r in mine if r["split"] == "test")
    curve = [
      (row["step"], row["perplexity"])
      for row in mine
      if row["split"] == "validation"
    ]
    figures.lines(axes, {label: curve}, [color])
  axes.set_xlabel("training step")
  axes.set_ylabel("validation perplexity per word")
  axes.margins(x=0.1)
  recurrent, between, alone = tests.values()
  return (
    f"Test perplexity is {recurrent:.1f} with a mixture of an LSTM's matrices,"
    f" {between:.1f} with one between LSTMs and {alone:.1f} with LSTMs alone,"
    " at equal ops/timestep"
  )


if __name__ == "__main__":
  harness.main("recurrent_mixture", rows, draw)
