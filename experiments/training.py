"""What the experiments that train share: configs, runs that go on, the rest."""

import contextlib
import importlib.util
import itertools
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import harness
from moejax import config as config_lib
from moejax import cost
from moejax.data import pairs
from moejax.training import loop, metrics

ROOT = pathlib.Path(__file__).parents[1]
QUICK = {
  "data.row_length": 16,
  "data.batch_size": 256,
  "data.min_count": 100,
  "model.width": 16,
  "model.num_samples": 64,
  "train.steps": 10,
  "train.eval_every": 5,
}
# The same of a translation.
QUICK_PAIRS = {
  "data.vocab_size": 300,
  "data.row_length": 24,
  "data.source_length": 24,
  "data.batch_size": 8,
  "model.width": 16,
  "model.attention.width": 8,
  "train.steps": 4,
  "train.log_every": 1,
  "train.eval_every": 4,
}
PAIRS = "files in place of package_pairs': en-fr=FILE,en-fr=FILE,en-de=FILE"
# Of an expert of translation.
HIDDEN = 128


class Run(NamedTuple):
  """A run that came to its end.

  Attributes:
    result: what `loop.train` returns.
    lines: the lines of its metrics, of all splits.
  """

  result: dict[str, Any]
  lines: list[dict[str, Any]]

  def last(self, name: str) -> float:
    """Returns a metric's mean over the last tenth of the training lines."""
    lines = [line for line in self.lines if line["split"] == "train"]
    last = lines[-max(1, len(lines) // 10) :]
    return float(np.mean([line[name] for line in last]))


def load(name: str) -> config_lib.Config:
  """Reads a file of configs/, such as "sotu/moe_32"."""
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def regroup(config: config_lib.Config, tokens: int) -> None:
  """Makes groups of so many tokens, of whichever mixture the model has.

  Each is one at the second level too, if there is one.
  """
  for name in ("moe", "hierarchical_moe"):
    if name in config.model:
      config.model[name].group_size = tokens
      if "groups_together" in config.model[name]:
        config.model[name].groups_together = 1


@contextlib.contextmanager
def folder(name: str, quick: bool) -> Iterator[pathlib.Path]:
  """Gives the folder for an experiment's runs; a quick one's goes away."""
  if quick:
    with tempfile.TemporaryDirectory() as scratch:
      yield pathlib.Path(scratch)
  else:
    yield ROOT / "runs" / name


def train(config: config_lib.Config, workdir: pathlib.Path) -> Run:
  """Trains, or goes on where the workdir left off.

  Raises:
    SystemExit: a signal stopped it.
  """
  result = loop.train(config, workdir)
  if not result:
    raise SystemExit("stopped; the same command goes on from there")
  return Run(result, metrics.read(workdir / metrics.METRICS_FILE))


def report(config: config_lib.Config, run: Run) -> harness.Row:
  """Returns what a model costs and how good it is."""
  count = cost.count(config, 1)
  validations = [ln for ln in run.lines if ln["split"] == "validation"]
  test = run.result["test"]
  row = {
    "ops": count.ops,
    "parameters": count.parameters,
    "validation": round(min(ln["perplexity"] for ln in validations), 2),
    "test": round(test["perplexity"], 2),
    **{name: round(test[name], 2) for name in ("bleu", "chrf") if name in test},
    "cv_load": None,
    "dropped": None,
    "minutes": round(run.result["seconds"] / 60, 1),
  }
  if "cv_load" in run.lines[0]:
    row["cv_load"] = round(run.last("cv_load"), 3)
    row["dropped"] = round(run.last("dropped_fraction"), 3)
  return row


# -- translation --------------------------------------------------------------


def pair_files(
  given: str, languages: Sequence[str], folder: pathlib.Path, quick: bool
) -> dict[pairs.Direction, list[str]]:
  """Returns the files of each direction.

  Args:
    given: what --pairs is; if "", they are those of package_pairs.
    languages: to translate into from English.
    folder: of the runs, where a quick one gets a few invented sentences.
    quick: whether it is one.

  Raises:
    SystemExit: package_pairs has not written them.
  """
  if quick:
    given = ",".join(_invent(folder, name) for name in languages[:2])
  if given:
    return pairs.named_files(given)
  paths = {name: ROOT / "runs" / f"en_{name}.tsv" for name in languages}
  if missing := [str(path) for path in paths.values() if not path.exists()]:
    raise SystemExit(
      f"there is no {', '.join(missing)}; make it by `python -m"
      f" experiments.package_pairs --languages={','.join(languages)}`, or name"
      " files of your own: --pairs=en-fr=FILE"
    )
  return {
    pairs.Direction("en", name): [str(path)] for name, path in paths.items()
  }


def _invent(folder: pathlib.Path, language: str) -> str:
  """Writes sentences whose translation is spelt backwards."""
  words = ("red", "blue", "two", "car", "house", "of")
  lines = map(" ".join, itertools.product(words, repeat=3))
  path = folder / f"{language}.tsv"
  path.write_text("".join(f"{x}\t{language} {x[::-1]}\n" for x in lines))
  return f"en-{language}={path}"


def train_value(files: Mapping[pairs.Direction, Sequence[str]]) -> str:
  """Writes files of directions as config.data.train has them."""
  return ",".join(
    f"{direction}={path}" for direction in files for path in files[direction]
  )


def flat(num_experts: int, k: int, **fields: Any) -> dict[str, Any]:
  """Returns the section of a mixture that drops nothing, or as fields say."""
  return {
    "num_experts": num_experts,
    "router": {"kind": "noisy_top_k", "k": k},
    "experts": {"kind": "feed_forward", "hidden": HIDDEN},
    "group_size": 1,
    "capacity_factor": None,
    "eval_capacity_factor": None,
    **fields,
  }


def one_expert(k: int) -> dict[str, Any]:
  """Returns the section of the dense twin of a mixture with k experts a place.

  It takes the same ops/timestep but for the router's.
  """
  return {"kind": "feed_forward", "hidden": k * HIDDEN}


def translation(
  layer: str, section: Mapping[str, Any], steps: int, quick: bool, **data: Any
) -> config_lib.Config:
  """Returns configs/translate_tiny.py with a layer in place of its mixtures.

  Batches are twice as large, and the vocabulary. All tokens of a batch are one
  group of the mixture.

  Args:
    layer: its name; "" leaves LSTMs alone.
    section: of the layer.
    steps: of training; the rate rises in the first eighth, and falls after half
      of them.
    quick: whether to make it as small as can be.
    **data: further fields of config.data.
  """
  config = load("translate_tiny")
  config.data.update({"batch_size": 64, "vocab_size": 8000, **data})
  for side in ("encoder", "decoder"):
    layers = (layer if n == "moe" else n for n in config.model[side])
    config.model[side] = tuple(filter(None, layers))
  with config.unlocked():
    del config.model["moe"]
    if layer:
      config.model[layer] = dict(section)
  config.optimizer.warmup_steps = steps // 8
  config.optimizer.hold_steps = steps * 3 // 8
  config.train.update({"steps": steps, "eval_every": steps // 4})
  if quick:
    config.update_from_flattened_dict(QUICK_PAIRS)
  tokens = config.data.batch_size * config.data.row_length
  # A quick run may find eight devices, each of which wants a group.
  regroup(config, tokens // 8 if quick else tokens)
  return config
