"""Question: does a mixture beat a dense layer of the same ops/timestep?

Method: configs/sotu/moe_32.py and its twin moe_1_wide.py, the same steps on
the same batches. Perplexity per word, `</S>` counted, by the full softmax; the
test is that of the checkpoint of lowest validation perplexity.

Result: test perplexity 79.77 against 82.15, ahead from the first validation on
(seed 0, two cores of an AMD EPYC, results/sparse_against_dense.csv; one core,
which cuts sums otherwise, gives 79.73 and 82.05). The peak rate, 2e-2, is the
better of 1e-2 and 2e-2 for both.
"""

from experiments import figures, harness, training

SEED = 0
MODELS = {
  "moe_32": ("4 of 32 experts", figures.SPARSE),
  "moe_1_wide": ("dense twin", figures.DENSE),
}


def rows(quick: bool) -> figures.Rows:
  """Yields a row per validation, and one per test."""
  with training.folder("sparse_against_dense", quick) as runs:
    for name in MODELS:
      config = training.load(f"sotu/{name}", {"seed": SEED})
      if quick:
        training.shrink(config, runs)
      run = training.train(config, runs / f"{name}_{SEED}")
      for row in training.perplexities(run):
        yield {"config": name, "seed": SEED, **row}


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  sparse, dense = training.draw_perplexities(figure, table, "config", MODELS)
  return (
    f"With 32 experts test perplexity is {sparse:.1f}, with the dense twin"
    f" {dense:.1f}: {figures.than(sparse, dense)} at equal ops/timestep"
  )


if __name__ == "__main__":
  harness.main("sparse_against_dense", rows, draw, SEED)
