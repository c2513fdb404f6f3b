"""Question: does perplexity fall as experts are added at equal ops/timestep?

Method: the rows of configs/lm1b (Table 7) with an eighth of every width: those
of about 8 M ops/timestep (Fig. 2, left), which that makes about 0.13 M, and the
larger ones (Fig. 2, right). All take the same steps on the same batches of
16,384 words (seed 0), dropout of 0.1, optimizer and sampled softmax those of
configs/sotu/moe_32.py. The paper searches dropout for each model and takes 0.2
to 0.4 for the largest; a model an eighth as wide cannot spare that. `dropped`
and `cv_load` are means over the last tenth of training. Perplexity per word,
`</S>` counted, by the full softmax. Beside them stands the interpolated
Kneser-Ney 5-gram of the same words. `paper` is Table 7's. The text is the
presidents' messages, or that of --text, of which words seen 20 times are known.
With --recipe=today all have what sotu/moe_32_muon has: Muon, gates without
noise, another balance loss, no sigmoid behind mixtures.

Result: it does, if batches are large and training is long. On 12 M words of
technical documentation and 2400 steps the test perplexity is 53.3 with 4
experts, 48.9 with 256: 8 % lower, 11 % after 4800 steps; in the paper 21 %, at
100 times the words. By today's recipe it is 51.1 of the dense model, and 50.3,
46.3 and 43.0 with 4, 32 and 256 experts: 14.6 % lower after 2400 steps. More in
docs/results.md (results/capacity_curve*.csv).
"""

from collections.abc import Sequence
from typing import Any

from experiments import figures, harness, kneser_ney, paper_tables, training
from moejax import config as config_lib

SEED = 0
STEPS = 2400
# Of 64 words: so that an expert of MoE-256 is sent 256 words a batch.
BATCH_SIZE = 256
# The files of configs/lm1b.
NAMES = {
  "lstm_512_512": "LSTM of 512",
  "lstm_1024_512": "LSTM of 1,024",
  "lstm_2048_512": "LSTM of 2,048",
  "two_lstm_8192_1024": "two LSTMs of 8,192",
  "four_lstm_512": "four LSTMs",
  "moe_1_wide": "dense, wide",
  "moe_1_deep": "dense, deep",
  "moe_4": "4 experts",
  "moe_32": "32 experts",
  "moe_256": "256 experts",
  "moe_256_h": "256, two levels",
  "moe_1024_h": "1,024, two levels",
  "moe_4096_h": "4,096, two levels",
  "moe_34m": "1,024 wide ones",
  "moe_143m": "256 wider ones",
}
# The two lines of Fig. 2, right.
LARGER = ("lstm_512_512", "lstm_1024_512", "lstm_2048_512")
LARGER += ("two_lstm_8192_1024", "moe_4096_h", "moe_34m", "moe_143m")
QUICK = ("moe_256_h",)
TEXT = "comma-separated files (.txt, .gz, .xz) in place of the messages"
OPTIONS = {
  "text": TEXT,
  "models": f"comma-separated, of {', '.join(NAMES)}, in place of all",
  "batch_size": f"of 64 words, of a batch, in place of {BATCH_SIZE}",
  "steps": f"of the parameters, in place of {STEPS}",
  "recipe": "'today', in place of the paper's",
}


def rows(
  quick: bool,
  text: str = "",
  models: str = "",
  batch_size: str = "",
  steps: str = "",
  recipe: str = "",
) -> figures.Rows:
  """Yields a row per model.

  Raises ValueError where there is no such recipe.
  """
  if recipe not in ("", "today"):
    raise ValueError(f"there is no recipe {recipe!r}; take 'today', or none.")
  how = (int(batch_size or BATCH_SIZE), int(steps or STEPS), recipe)
  names = harness.chosen(models, NAMES, QUICK if quick else ())
  for row in trained([(name, 8) for name in names], text, quick, *how):
    yield row | {"paper": paper(row["model"])}
  with training.folder("curves", quick, text) as runs:
    # Of a config it reads the text alone, and that is the same in all.
    config = scaled("lm1b/moe_32", 8, text)
    if quick:
      training.shrink(config, runs)
    counted = harness.rounded(2, **kneser_ney.perplexities(config))
  name = "kneser_ney_5"
  yield {"model": name, **counted, "paper": paper(name)}


def paper(name: str) -> float:
  """Returns the perplexity of Table 7 after 10 epochs, or the final one."""
  after_10_epochs, final, *_ = paper_tables.TABLE_7[name]
  return float(after_10_epochs or final)


def trained(
  sized: Sequence[tuple[str, int]],
  text: str,
  quick: bool,
  batch_size: int = BATCH_SIZE,
  steps: int = STEPS,
  recipe: str = "",
) -> figures.Rows:
  """Trains rows of configs/lm1b; yields what each costs and how good it is.

  Args:
    sized: names, and by what the widths are divided.
    text: comma-separated files to read; "" is the presidents' messages.
    quick: whether to make them as small as can be.
    batch_size: of 64 words, of a batch.
    steps: of training.
    recipe: "today", or "" for the paper's.
  """
  with training.folder("curves", quick, text) as runs:
    wanted = {}
    for name, smaller in sized:
      config = scaled(f"lm1b/{name}", smaller, text, batch_size, steps, recipe)
      if quick:
        training.shrink(config, runs)
      about = (name, smaller, batch_size, steps, *filter(None, [recipe]))
      wanted["_".join(map(str, about))] = config
    found = training.train_all(runs, wanted, quick).values()
    for (name, _), run in zip(sized, found, strict=True):
      yield {"model": name, **training.report(run)}


def scaled(
  name: str,
  smaller: int,
  text: str,
  batch_size: int = BATCH_SIZE,
  steps: int = STEPS,
  recipe: str = "",
) -> config_lib.Config:
  """Returns a config such as lm1b/moe_32 for a laptop; else as `trained`."""
  config = training.load("sotu/moe_32", {"seed": SEED})

  def shrunk(key: str, value: Any) -> Any:
    if isinstance(value, dict):
      return {key: shrunk(key, each) for key, each in value.items()}
    if key == "hidden" and isinstance(value, tuple):
      return tuple(width // smaller for width in value)
    return value // smaller if key in ("width", "hidden") else value

  model = shrunk("", training.load(name).model.to_dict())
  ours = ("num_samples", "dropout")
  model |= {name: config.model[name] for name in ours} | {"vocab_multiple": 1}
  if recipe:
    model["sigmoid"] = False
    two = model.get("hierarchical_moe", {})
    gates = model.get("moe", {}).get("router"), two.get("primary")
    for gate in (*gates, two.get("secondary", {}).get("router")):
      if gate:
        gate["kind"] = "top_k"
    today = training.load("sotu/moe_32_muon")
    config.aux, config.optimizer = today.aux, today.optimizer
  config.model = model
  config.data.batch_size = batch_size
  training.regroup(config, batch_size * config.data.row_length)
  config.train.update({"steps": steps, "eval_every": STEPS // 2})
  # 2e-2 is the better of two rates at width 64, 1e-2 at 128.
  config.optimizer.peak *= 64 / config.model.width
  if text:
    config.data.update({"kind": "text", "train": text, "min_count": 20})
  return config


def draw(figure: figures.Figure, table: list[figures.Row]) -> str:
  models = {row["model"]: row for row in table if row["model"] in NAMES}
  counted = [row["test"] for row in table if row["model"] not in models]
  shown = {
    "parameters": set(NAMES) - set(LARGER) | {"lstm_2048_512", "moe_4096_h"},
    "ops": set(LARGER),
  }
  meanings = {"parameters": "at equal ops/timestep", "ops": "larger models"}
  if models.keys() <= shown["parameters"]:
    del meanings["ops"]
  for axes, column in figures.panels(figure, 4, meanings, sharey=True):
    if counted and column == "parameters":
      figures.level(axes, "5-gram,\nKneser-Ney", *counted)
    for name in filter(shown[column].__contains__, models):
      row = models[name]
      sparse = row["cv_load"] is not None
      figures.point(axes, NAMES[name], row[column] / 1e6, row["test"], sparse)
    unit = {"parameters": "parameters", "ops": "ops/timestep"}[column]
    about = f"million {unit} outside embedding and softmax"
    ticks = {
      "parameters": (0.1, 0.3, 1, 3, 10, 30),
      "ops": (0.04, 0.07, 0.15, 0.5, 1, 3),
    }
    figures.scales(axes, about, x_ticks=ticks[column])
    axes.margins(x=0.2, y=0.12)
  figure.supylabel("test perplexity per word")
  flat = {
    NAMES[name]: row["test"]
    for name, row in models.items()
    if row["cv_load"] is not None and not name.endswith(("_h", "m"))
  }
  falls = list(flat.values()) == sorted(flat.values(), reverse=True)
  return (
    "At equal ops/timestep test perplexity"
    f" {'falls' if falls else 'does not always fall'} as experts are added: "
    + ", ".join(f"{value:.1f} with {name}" for name, value in flat.items())
  )


if __name__ == "__main__":
  harness.main("capacity_curve", rows, draw, SEED, **OPTIONS)
