"""Question: what is a mixture worth in place of an LSTM's matrices?

Method: the paper proposes it (sec. 3.1) and has no experiment. A model of it,
configs/sotu/recurrent_moe.py, is trained beside configs/sotu/moe_32.py, the
paper's mixture between LSTMs, of exactly as many ops/timestep and parameters,
and beside four LSTMs, the paper's 4xLSTM, of as many ops/timestep but for those
of the router. All else is as in sparse_against_dense.

Result: test perplexity 75.99 with the recurrent mixture, 79.73 with the mixture
between LSTMs and 79.97 with LSTMs alone (one seed, one core of an AMD EPYC that
others used too, results/recurrent_mixture.csv). It is behind at the first
validation and ahead from the second on. The peak rate, 2e-2, is the one found
for moe_32.py and its twin; it was not searched for the others. Where the two
others read 11,100 and 11,400 words a second, it reads 8,000: its time steps
come one after the other, and each is run twice.
"""

from experiments import figures, harness, training
from moejax import config as config_lib
from moejax.training import cost

MODELS = {
  "recurrent_moe": ("mixture of matrices", figures.OTHERS[0]),
  "moe_32": ("mixture between LSTMs", figures.SPARSE),
  "four_lstm": ("LSTMs alone", figures.DENSE),
}


def rows(quick: bool) -> figures.Rows:
  """Yields a row per validation, and one per test."""
  with training.folder("recurrent_mixture", quick) as runs:
    for name in MODELS:
      if name == "four_lstm":
        config = training.load("sotu/moe_32", {"model.layers": ("lstm",) * 4})
      else:
        config = training.load(f"sotu/{name}")
      if quick:
        training.shrink(config, runs)
      count = cost.count(config_lib.parse(config), 1)
      run = training.train(config, runs / name)
      for row in training.perplexities(run):
        sizes = {"ops": count.ops, "parameters": count.parameters}
        yield {"model": name, **sizes, **row}


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  recurrent, between, alone = training.draw_perplexities(
    figure, table, "model", MODELS
  )
  return (
    f"Test perplexity is {recurrent:.1f} with a mixture of an LSTM's matrices,"
    f" {between:.1f} with one between LSTMs and {alone:.1f} with LSTMs alone,"
    " at equal ops/timestep"
  )


if __name__ == "__main__":
  harness.main("recurrent_mixture", rows, draw)
