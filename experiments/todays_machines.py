"""Question: what would the paper's training runs take on today's machines?

Method: trained models of Tables 7 and 8 and the translation models, on H100 and
H200, TPU v5e and v5p: the training step, compiled for the fewest of 8, 16, 32
or 64 chips that hold it (`moejax plan`; 8 GPUs are a node). Hours are the
estimate of a step times the steps of the run, as the config has them: of
translation the paper gives the time alone. The configs are changed in three
ways. Activations are bfloat16, as today's chips multiply. Experts have slots
for 1.25 of their mean share where the config drops no token: how many rows come
is known too late for an estimate. There are no more microbatches than groups of
tokens allow. Beside them stand the paper's hours and devices (Tables 1 to 3),
or `paper_hours_by_TFLOPS`, those of the model's FLOPs at the paper's rate.
--models=timed are those whose hours the paper gives, or table_7, table_8,
translation; --machines=H100,v5e takes of the machines. Plans are kept in
runs/todays_machines, and a run goes on from there.

Result: none; a full run has not been made. docs/planning.md has two of the
models.
"""

import json

from experiments import figures, harness, paper_tables, training
from moejax import config as config_lib
from moejax.planning import chips, plan, search

# From the fewest chips on.
MACHINES = {
  "H100": ("h100:8", "h100:2x8", "h100:4x8", "h100:8x8"),
  "v5e": ("v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8"),
  "H200": ("h200:8", "h200:2x8", "h200:4x8", "h200:8x8"),
  "v5p": ("v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4"),
}
COLORS = dict(zip(MACHINES, figures.OTHERS[1:], strict=False))
# Hours and devices, as printed; of four models of Table 7 they are in Table 1.
TIMES = {f"lm1b/{name}": each for name, each in paper_tables.TABLE_1.items()}
TIMES |= {
  "lm1b/moe_4": ("18", "16"),
  "wmt14/en_fr_moe_2048_h": ("72", "64"),
  "wmt14/en_fr_gnmt": ("144", "96"),
  "wmt14/en_de_moe_2048_h": ("24", "64"),
  "wmt14/en_de_gnmt": ("24", "96"),
}
RATES = {
  f"{folder}/{name}": each[-1]
  for folder, table in (
    ("lm1b", paper_tables.TABLE_7),
    ("news", paper_tables.TABLE_8),
  )
  for name, each in table.items()
  if "kneser_ney" not in name
}
MODELS = {
  "timed": list(TIMES),
  "table_7": [name for name in RATES if name.startswith("lm1b")],
  "table_8": [name for name in RATES if name.startswith("news")],
  "translation": [
    f"wmt14/{pair}_{name}"
    for pair in ("en_fr", "en_de")
    for name in ("moe_2048_h", "gnmt", "moe_512_h", "moe_32", "lstm")
  ],
}


def devices(name: str) -> int | None:
  """Returns on how many GPUs the paper trained a model, if it says."""
  folder, _, model = name.partition("/")
  if name in TIMES:
    return int(TIMES[name][1])
  if folder == "news":
    return {"moe_65536_h": 64, "moe_131072_h": 128}.get(model, 32)
  # Those that Table 7 quotes were trained by others.
  return 16 if RATES.get(name) else None


def changes(experiment: config_lib.Experiment, count: int) -> dict[str, object]:
  """Returns what makes a config one for so many of today's chips."""
  model, found = experiment.values["model"], {"config.model.dtype": "bfloat16"}
  for path in ("moe", "hierarchical_moe", "hierarchical_moe.secondary"):
    layer = model
    for part in path.split("."):
      layer = (layer or {}).get(part)
    if layer and layer.get("capacity_factor", 0) is None:
      found[f"config.model.{path}.capacity_factor"] = 1.25
  microbatches = experiment.train.microbatches
  if (groups := search.groups(experiment)) > 1:
    most = max(1, groups * microbatches // count)
    found["config.train.microbatches"] = min(microbatches, most)
  return found


def fewest(name: str, machine: str) -> figures.Row:
  """Plans a model for the fewest chips of a machine that hold it."""
  experiment = config_lib.parse(training.load(name))
  vocab_size = 1000 if name == "tiny" else config_lib.vocab_size(experiment)
  row = {"model": name, "machine": machine}
  for topology in map(chips.find, MACHINES.get(machine, [machine])):
    count = len(topology.devices)
    made = changes(experiment, count)
    found = search.attempt(experiment, vocab_size, topology, made)
    if isinstance(found, plan.Plan) and found.memory.fits:
      break
  else:
    return row | {"fits": False}
  hours = None
  if found.estimate:
    hours = experiment.train.steps * found.estimate.seconds / 3600
  by_rate = None
  if rate := RATES.get(name):
    flops = found.model_flops * count * experiment.train.steps
    by_rate = flops / (float(rate) * 1e12 * devices(name) * 3600)
  return row | {
    "topology": topology.name,
    "devices": count,
    "fits": True,
    "microbatches": made.get("config.train.microbatches"),
    "GB": round(found.memory.needs / 1e9, 2),
    "ms": found.estimate and round(1e3 * found.estimate.seconds, 1),
    "bound": found.estimate and found.estimate.bound,
    "launches": found.launches,
    "is_bounded": found.is_bounded,
    "steps": experiment.train.steps,
    "hours": hours and round(hours, 2),
    "paper_hours": float(TIMES[name][0]) if name in TIMES else None,
    "paper_devices": devices(name),
    "paper_hours_by_TFLOPS": by_rate and round(by_rate, 1),
    "compile_s": round(found.compile_seconds),
  }


def rows(quick: bool, models: str = "", machines: str = "") -> figures.Rows:
  """Yields a row for each model and machine, planned now or before."""
  groups = harness.chosen(models, MODELS, ())
  kinds = harness.chosen(machines, MACHINES, ())
  names = dict.fromkeys(name for group in groups for name in MODELS[group])
  if quick:
    names, kinds = ["tiny"], ["cpu:8"]
  with training.folder("todays_machines", quick) as folder:
    for name in names:
      for machine in kinds:
        path = folder / f"{name.replace('/', '_')}_{machine}.json"
        if not path.exists():
          row = fewest(name, machine)
          folder.mkdir(parents=True, exist_ok=True)
          path.write_text(json.dumps(row))
        yield json.loads(path.read_text())


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  names = list(dict.fromkeys(row["model"] for row in table))
  figure.set_size_inches(8, 1.5 + 0.25 * len(names))
  axes = figure.subplots()
  axes.set_yticks(range(len(names)), names)
  axes.set_ylim(len(names) - 0.5, -0.5)
  axes.set_xlabel("device-hours")
  spent = {name: [] for name in (*COLORS, "paper")}
  for row in table:
    at = names.index(row["model"])
    hours = row.get("paper_hours") or row.get("paper_hours_by_TFLOPS")
    if hours:
      spent["paper"].append((hours * row["paper_devices"], at))
    if row.get("hours"):
      spent[row["machine"]].append((row["hours"] * row["devices"], at))
  for name, each in spent.items():
    if each:
      color = COLORS.get(name, figures.GRAY)
      axes.plot(*zip(*each, strict=True), "o", color=color, label=name)
  if any(spent.values()):
    axes.set_xscale("log")
    axes.legend()
  planned = sum(bool(row.get("fits")) for row in table)
  return f"{planned} of {len(table)} plans fit on at most 64 chips"


if __name__ == "__main__":
  harness.main(
    "todays_machines",
    rows,
    draw,
    models=f"of {', '.join(MODELS)}; all by default",
    machines=f"of {', '.join(MACHINES)}; all by default",
  )
