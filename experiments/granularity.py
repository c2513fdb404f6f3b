"""Question: few wide experts or many narrow ones, with a shared one or without?

Method: configs/transformer/noisy_top_k.py with 1 of 8 experts 256 wide to 16 of
128 experts 16 wide: as many parameters, and as many operations but for the
router's, the same 800 steps on the same batches, three seeds. With a shared
expert (2401.06066), which comes on top, a token visits one routed expert less.

Result: to be measured.
"""

from experiments import figures, harness, training

# Experts, those that a token visits, and width.
GRAINS = {str(n): (n, n // 8, 2048 // n) for n in (8, 32, 128)}
SHARED = {False: "without a shared expert", True: "with one"}


def rows(quick: bool, grains: str = "") -> figures.Rows:
  """Yields a row per number of experts, without and with a shared one."""
  with training.folder("granularity", quick) as runs:
    for name in harness.chosen(grains, GRAINS, ("32",) if quick else ()):
      num_experts, k, hidden = GRAINS[name]
      for shared in SHARED:
        # Of a single expert that a token visits there is none to share.
        if shared and k == 1:
          continue
        changes = {"train.steps": training.STEPS}
        config = training.load("transformer/noisy_top_k", changes)
        experts = {"kind": "feed_forward", "hidden": hidden}
        moe = config.model.blocks.moe
        moe.update({"num_experts": num_experts, "experts": experts})
        moe.router.k = k - shared
        if shared:
          moe.shared = {"num_experts": 1, **experts}
        if quick:
          training.shrink(config, runs)
        folder = runs / f"{num_experts}_{shared}"
        found = training.over_seeds(config, folder, quick)
        about = {"experts": num_experts, "k": k, "hidden": hidden}
        yield about | {"shared": shared} | found


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  axes = figure.subplots()
  curves = figures.points(table, "experts", "test", "shared", SHARED)
  figures.lines(axes, curves, (figures.SPARSE, figures.OTHERS[0]))
  for row in table:
    span = [row["test_least"], row["test_most"]]
    color = figures.OTHERS[0] if row["shared"] else figures.SPARSE
    axes.plot([row["experts"]] * 2, span, color=color, linewidth=1)
  figures.scales(
    axes,
    "experts, of which an eighth is visited",
    "test perplexity per word",
    tuple(map(int, GRAINS)),
  )
  axes.margins(x=0.2)
  best = min(table, key=lambda row: row["test"])
  return (
    f"Of {best['experts']} experts {best['hidden']} wide,"
    f" {SHARED[best['shared']]}, test perplexity is the lowest,"
    f" {best['test']:.1f}"
  )


if __name__ == "__main__":
  grains = f"numbers of experts, of {', '.join(GRAINS)}, in place of all"
  harness.main("granularity", rows, draw, 0, grains=grains)
