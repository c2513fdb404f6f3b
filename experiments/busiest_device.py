"""Question: how much longer does the busiest device take than all on average?

Method: the load of every expert as `experiments.router_zoo` left it in its runs
(--runs=FOLDER, three seeds), over the last tenth of training, and of the
noisy gate over the first tenth, too. With it `moejax plan` takes the training
step of configs/transformer/noisy_top_k.py, made 1024 wide, in bfloat16, with
sorted rows and without a capacity, on 8 chips of a v5e, 4 experts on each;
"even" is without. `busiest` is that device's load over the mean, of steps,
mixtures and seeds; ms is an estimate. It needs libtpu.

Result: with the paper's gate the busiest chip has 1.06 times the mean load, and
a step takes 1.01 times as long as with even experts; with softmax_top_k 1.28
and 1.06, with hash 1.33 and 1.08 (results/busiest_device_runs.csv).
"""

import pathlib

from experiments import figures, harness, training
from moejax import config as config_lib
from moejax.planning import chips, plan
from moejax.planning.load import Load
from moejax.training import metrics

GATES = ("noisy_top_k", "softmax_top_k", "hash")
LARGE = (
  "transformer/noisy_top_k",
  {
    "data.batch_size": 1024,
    "model.dtype": "bfloat16",
    "model.width": 1024,
    "model.blocks.attention.num_heads": 16,
    "model.blocks.dense.hidden": 4096,
    "model.blocks.moe.experts.hidden": 1024,
    "model.blocks.moe.dispatch": "ragged",
    "model.blocks.moe.capacity_factor": None,
  },
)
FIRST = "noisy_top_k, at first"
DEVICES = 8


def rows(quick: bool, runs: str = "") -> figures.Rows:
  """Yields a row for even experts, and one for those of each gate.

  A quick one trains a small run, and plans nothing.
  """
  with training.folder(f"router_zoo_{training.STEPS}", quick) as folder:
    folder = pathlib.Path(runs or folder)
    if quick:
      small = training.load("sotu/moe_32")
      training.shrink(small, folder)
      training.train(small, folder / "noisy_top_k_0")
    loads = {"even": None} | loads_of(folder)
  if not quick:
    topology = chips.find("v5e:2x4")
    experiment = config_lib.parse(training.load(*LARGE))
    vocab_size = config_lib.vocab_size(experiment)
    program = plan.program(experiment, vocab_size, topology)
  for gate, load in loads.items():
    busiest = load.busiest(DEVICES) if load else 1.0
    row = {"gate": gate, "devices": DEVICES, "busiest": round(busiest, 2)}
    if not quick:
      got = plan.read(program, load=load)
      times = got.estimate._asdict() | {"step": got.estimate.seconds}
      row |= {f"{n}_ms": round(1e3 * each, 2) for n, each in times.items()}
      row["filled"] = round(got.filled, 3)
    yield row


def loads_of(folder: pathlib.Path) -> dict[str, Load]:
  """Returns the load of each gate that a run in the folder is of."""
  found = {}
  for name in (*GATES, FIRST):
    gate, _, first = name.partition(", ")
    edges = {}
    for workdir in sorted(folder.glob(f"{gate}_[0-9]")):
      for layer, (_, counts) in metrics.loads(workdir).items():
        tenth = max(1, len(counts) // 10)
        own = counts[:tenth] if first else counts[-tenth:]
        edges[f"{workdir.name}/{layer}"] = own
    if edges:
      found[name] = Load(str(folder), edges)
  if not found:
    raise ValueError(
      f"there are no runs of {', '.join(GATES)} in {folder}; train them by"
      " python -m experiments.router_zoo, or give --runs=FOLDER."
    )
  return found


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  names = [row["gate"].replace("_", " ") for row in table]
  meanings = {
    "busiest": f"load of the busiest of {DEVICES} chips / mean",
    "step_ms": "ms a step, estimated",
  }
  shown = {key: each for key, each in meanings.items() if key in table[0]}
  colors = [figures.DENSE] + [figures.SPARSE] * (len(table) - 1)
  for axes, column in figures.panels(figure, 3.6, shown, sharey=True):
    values = {column: [row[column] for row in table]}
    figures.bars(axes, names, values, colors)
  worst = max(table, key=lambda row: row["busiest"])
  title = (
    f"The busiest of {DEVICES} chips has up to {worst['busiest']:.1f} times the"
    " mean load"
  )
  if "step_ms" in worst:
    title += f"; a step takes {worst['step_ms'] / table[0]['step_ms']:.2f}"
    title += " times as long as with even experts"
  return title


if __name__ == "__main__":
  runs = "folder of the runs that experiments.router_zoo trained"
  harness.main("busiest_device", rows, draw, 0, runs=runs)
