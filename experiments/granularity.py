"""Question: few wide experts or many narrow ones, with a shared one or without?

Method: configs/transformer/noisy_top_k.py with 1 of 8 experts 256 wide to 16 of
128 experts 16 wide: as many parameters, and as many operations but for the
router's, the same 800 steps on the same batches, three seeds. With a shared
expert (2401.06066), which comes on top, a token visits one routed expert less.

Result: 8 wide experts (126.1; 125.0 to 127.8) trail 32 (121.6; 120.2 to 123.5)
and 128 narrow ones (122.4; 120.8 to 124.6) by more than seeds differ. These two
do not differ so, nor from themselves with a shared expert (122.0 and 121.1).
"""

from experiments import figures, harness, training

# Experts, those that a token visits, and width.
GRAINS = {str(n): (n, n // 8, 2048 // n) for n in (8, 32, 128)}
SHARED = {False: "without a shared expert", True: "with a shared expert"}


def rows(quick: bool, grains: str = "") -> figures.Rows:
  """Yields a row per number of experts, without and with a shared one."""
  with training.folder("granularity", quick) as runs:
    configs, abouts = {}, []
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
        configs[f"{num_experts}_{shared}"] = config
        about = {"experts": num_experts, "k": k, "hidden": hidden}
        abouts.append(about | {"shared": shared})
    found = training.over_seeds(runs, configs, quick)
    for about, row in zip(abouts, found, strict=True):
      yield about | row


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  axes = figure.subplots()
  table = sorted(table, key=lambda row: row["experts"])
  colors = {False: figures.SPARSE, True: figures.OTHERS[0]}
  # Side by side, so that both spans are seen.
  table = [
    row | {"at": row["experts"] * 1.04 ** row["shared"]} for row in table
  ]
  curves = figures.points(table, "at", "test", "shared", SHARED)
  figures.lines(axes, curves, tuple(colors.values()))
  for row in table:
    span = [row["test_least"], row["test_most"]]
    axes.plot([row["at"]] * 2, span, color=colors[row["shared"]])
  figures.scales(
    axes,
    "experts, of which an eighth is visited",
    "test perplexity per word",
    tuple(map(int, GRAINS)),
  )
  axes.margins(x=0.2)
  ends = (pick(table, key=lambda row: row["test"]) for pick in (max, min))
  return "Test perplexity, mean and span of seeds: " + ", ".join(
    f"{row['test']:.1f} with {row['experts']} experts {row['hidden']} wide"
    + " and a shared one" * row["shared"]
    for row in ends
  )


if __name__ == "__main__":
  grains = f"numbers of experts, of {', '.join(GRAINS)}, in place of all"
  harness.main("granularity", rows, draw, 0, grains=grains)
