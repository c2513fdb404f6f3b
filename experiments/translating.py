"""What the experiments that translate share: pairs, and a small GNMT."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import training
from moejax import config as config_lib
from moejax.data import corpora
from moejax.data.packing import Direction

QUICK = {
  "data.vocab_size": 300,
  "data.row_length": 16,
  "data.source_length": 16,
  "data.batch_size": 8,
  "model.width": 16,
  "model.attention.width": 8,
  "train.steps": 4,
  "train.log_every": 1,
  "train.eval_every": 4,
}
PAIRS = "en-fr=FILE,en-fr=FILE,en-de=FILE in place of package_pairs' own"
SEED = 0
# Of an expert of translation.
HIDDEN = 128


def pair_files(
  given: str, languages: Sequence[str], folder: pathlib.Path, quick: bool
) -> dict[Direction, list[str]]:
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
    return corpora.named_files(given)
  made = training.ROOT / "runs"
  paths = {name: made / f"en_{name}.tsv" for name in languages}
  if missing := [str(path) for path in paths.values() if not path.exists()]:
    raise SystemExit(
      f"there is no {', '.join(missing)}; make it by `python -m"
      f" experiments.package_pairs --languages={','.join(languages)}`, or name"
      " files of your own: --pairs=en-fr=FILE"
    )
  return {Direction("en", name): [str(path)] for name, path in paths.items()}


def _invent(folder: pathlib.Path, language: str) -> str:
  """Writes sentences whose translation is spelt backwards."""
  words = ("red", "blue", "two", "car", "house", "of")
  lines = map(" ".join, itertools.product(words, repeat=3))
  path = folder / f"{language}.tsv"
  path.write_text("".join(f"{x}\t{language} {x[::-1]}\n" for x in lines))
  return f"en-{language}={path}"


def named(files: Mapping[Direction, Sequence[str]]) -> str:
  """Names files as the fields of config.data do."""
  return ",".join(
    f"{direction}={path}" for direction in files for path in files[direction]
  )


def flat(num_experts: int, k: int) -> dict[str, Any]:
  """Returns the section of a mixture that drops nothing."""
  return {
    "num_experts": num_experts,
    "router": {"kind": "noisy_top_k", "k": k},
    "experts": {"kind": "feed_forward", "hidden": HIDDEN},
    "group_size": 1,
    "capacity_factor": None,
    "eval_capacity_factor": None,
  }


def one_expert(k: int) -> dict[str, Any]:
  """Returns the section of the dense twin of a mixture with k experts a place.

  It takes the same ops/timestep but for the router's.
  """
  return {"kind": "feed_forward", "hidden": k * HIDDEN}


def config(
  layer: str,
  section: Mapping[str, Any],
  steps: int,
  folder: pathlib.Path,
  quick: bool,
  **data: Any,
) -> config_lib.Config:
  """Returns configs/translate_tiny.py with a layer in place of its mixtures.

  Batches are twice as large, and the vocabulary. All tokens of a batch are one
  group of the mixture.

  Args:
    layer: its name; "" leaves LSTMs alone.
    section: of the layer.
    steps: of training; the rate rises in the first eighth, and falls after half
      of them.
    folder: of the runs, where a quick one prepares its corpus.
    quick: whether to make it as small as can be.
    **data: further fields of config.data.
  """
  config = training.load("translate_tiny")
  config.seed = SEED
  config.data.update({"batch_size": 64, "vocab_size": 8000, **data})
  for side in ("encoder", "decoder"):
    names = ("lstm", "moe") if quick else config.model[side]
    layers = (layer if name == "moe" else name for name in names)
    config.model[side] = tuple(filter(None, layers))
  with config.unlocked():
    del config.model["moe"]
    if layer:
      config.model[layer] = dict(section)
  config.optimizer.warmup_steps = steps // 8
  config.optimizer.hold_steps = steps * 3 // 8
  config.train.update({"steps": steps, "eval_every": steps // 4})
  if quick:
    config.update_from_flattened_dict(QUICK)
    config.data.data_dir = str(folder)
  tokens = training.tokens_of_batch(config)
  # A quick run may find eight devices, each of which wants a group.
  training.regroup(config, tokens // 8 if quick else tokens)
  return config
