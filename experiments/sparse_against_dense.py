"""Question: does a mixture beat a dense layer of the same ops/timestep?

Method: configs/sotu/moe_32.py and its twin moe_1_wide.py, the same steps on
the same batches, once per seed. Perplexity per word, `</S>` counted, by the
full softmax; the test is that of the checkpoint of lowest validation
perplexity.

Result: test perplexity 79.77 against 82.15, ahead from the first validation on
(seed 0, two cores of an AMD EPYC, results/sparse_against_dense.csv; one core,
which cuts sums otherwise, gives 79.73 and 82.05). The peak rate, 2e-2, is the
better of 1e-2 and 2e-2 for both.
"""

from collections.abc import Iterator

from experiments import figures, harness, training

CONFIGS = {"moe_32": "4 of 32 experts", "moe_1_wide": "dense twin"}
SEEDS = (0,)


def rows(quick: bool) -> Iterator[figures.Row]:
  """Yields a row per validation, and one per test."""
  with training.folder("sparse_against_dense", quick) as runs:
    for seed in SEEDS[:1] if quick else SEEDS:
      for name in CONFIGS:
        config = training.load(f"sotu/{name}")
        config.seed = seed
        if quick:
          training.shrink(config, runs)
        run = training.train(config, runs / f"{name}_{seed}")
        for row in training.perplexities(run):
          yield {"config": name, "seed": seed, **row}


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  """Draws the validation curves."""
  axes = figure.subplots()
  seeds = sorted({row["seed"] for row in table})
  tests = []
  for (name, label), color in zip(
    CONFIGS.items(), (figures.SPARSE, figures.DENSE), strict=True
  ):
    mine = [row for row in table if row["config"] == name]
    for seed in seeds:
      curve = [
        (row["step"], row["perplexity"])
        for row in mine
        if (row["seed"], row["split"]) == (seed, "validation")
      ]
      figures.lines(axes, {label if seed == seeds[0] else "": curve}, [color])
    tests.append([r["perplexity"] for r in mine if r["split"] == "test"])
  axes.set_xlabel("training step")
  axes.set_ylabel("validation perplexity per word")
  axes.margins(x=0.1)
  sparse, dense = (sum(each) / len(each) for each in tests)
  return (
    f"With 32 experts test perplexity is {sparse:.1f}, with the dense twin"
    f" {dense:.1f}: {figures.than(sparse, dense)} at equal ops/timestep"
  )


if __name__ == "__main__":
  harness.main("sparse_against_dense", rows, draw)
