"""What the experiments that translate share: pairs, and a small GNMT."""

import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from experiments import training
from moejax import config as config_lib
from moejax.data import corpora
from moejax.data.packing import Direction

QUICK = {
  "data.vocab_size": 300,
  "data.row_length": 12,
  "data.source_length": 12,
  "data.batch_size": 8,
  "model.width": 16,
  "model.attention.width": 8,
  "train.steps": 4,
  "train.log_every": 1,
  "train.eval_every": 4,
}
PAIRS = "en-fr=FILE,en-fr=FILE,en-de=FILE in place of package_pairs' own"
SEED = 0
STEPS = 1200
# Of an expert.
HIDDEN = 128

Files = Mapping[Direction, Sequence[str]]


def flat(num_experts: int, k: int, router: str = "noisy_top_k") -> Any:
  """Returns a layer, a mixture that drops nothing, and its section."""
  return "moe", {
    "num_experts": num_experts,
    "router": {"kind": router, "k": k},
    "experts": {"kind": "feed_forward", "hidden": HIDDEN},
    "group_size": 1,
    "capacity_factor": None,
    "eval_capacity_factor": None,
  }


def two_levels(num_experts: int, num_groups: int) -> Any:
  """Returns the same of two levels, with slots for the mean."""
  router = {"kind": "noisy_top_k", "k": 2}
  slots = {"capacity_factor": 1.25, "eval_capacity_factor": 2.0}
  experts = {"kind": "feed_forward", "hidden": HIDDEN}
  return "hierarchical_moe", {
    "num_experts": num_experts,
    "num_groups": num_groups,
    "group_size": 1,
    "groups_together": 1,
    **slots,
    "primary": router,
    "secondary": {"router": router, "experts": experts, **slots},
  }


def one_expert(k: int) -> Any:
  """Returns the dense twin of a mixture with k experts a token."""
  return "one_expert", {"kind": "feed_forward", "hidden": k * HIDDEN}


# The layer between LSTMs, and its section.
MODELS = {
  "lstm": ("", {}),
  "dense": one_expert(4),
  "moe_32": flat(32, 4),
  "moe_32_balanced": flat(32, 4, "balanced"),
  "moe_512_h": two_levels(512, 16),
  "moe_2048_h": two_levels(2048, 32),
}


def pair_files(
  given: str, languages: Sequence[str], folder: pathlib.Path, quick: bool
) -> Files:
  """Returns the files of each direction, from English to the languages.

  They are `given` by --pairs, or else those of package_pairs; a quick run gets
  sentences in its folder whose translation is spelled backwards.

  Raises:
    ValueError: package_pairs has not written them.
  """
  if given and not quick:
    return corpora.named_files(given)
  names = languages[:1] if quick else languages
  parent = folder if quick else training.ROOT / "runs"
  paths = {name: parent / f"en_{name}.tsv" for name in names}
  if quick:
    words = ("red", "blue", "two", "car", "house", "of")
    lines = [" ".join(each) for each in itertools.product(words, repeat=3)]
    for name, path in paths.items():
      text = "".join(f"{line}\t{name} {line[::-1]}\n" for line in lines)
      path.write_text(text)
  if missing := [str(path) for path in paths.values() if not path.exists()]:
    raise ValueError(
      f"there is no {', '.join(missing)}; make it by `python -m"
      f" experiments.package_pairs --languages={','.join(languages)}`, or name"
      " files of your own: --pairs=en-fr=FILE"
    )
  return {Direction("en", name): [str(path)] for name, path in paths.items()}


def named(files: Files) -> str:
  """Names files as the fields of config.data do."""
  return ",".join(
    f"{direction}={path}" for direction in files for path in files[direction]
  )


def config(
  layer: str,
  section: Mapping[str, Any],
  steps: int,
  folder: pathlib.Path,
  quick: bool,
  **data: Any,
) -> config_lib.Config:
  """Returns configs/translate_tiny.py with a layer in place of its mixtures.

  Batches and the vocabulary are twice as large. All tokens of a batch are one
  group of the mixture. The rate rises in the first eighth of the steps, and
  falls after half of them. A quick run prepares its corpus in the folder.

  Args:
    layer: its name; "" leaves LSTMs alone.
    section: of the layer.
    steps: of training.
    folder: of the runs.
    quick: whether to make it as small as can be.
    **data: further fields of config.data.
  """
  config = training.load("translate_tiny", {"seed": SEED})
  config.data.update({"batch_size": 64, "vocab_size": 8000, **data})
  for side in ("encoder", "decoder"):
    names = ("lstm", "moe") if quick else config.model[side]
    layers = (layer if name == "moe" else name for name in names)
    config.model[side] = tuple(filter(None, layers))
  del config.model["moe"]
  if layer:
    config.model[layer] = section
  rises, holds = steps // 8, steps * 3 // 8
  config.optimizer.update({"warmup_steps": rises, "hold_steps": holds})
  config.train.update({"steps": steps, "eval_every": steps // 12})
  if quick:
    config.update_from_flattened_dict(QUICK)
    config.data.data_dir = str(folder)
    if layer == "hierarchical_moe":
      config.model[layer].update(num_experts=16, num_groups=4)
  tokens = config.data.batch_size * config.data.row_length
  # A quick run may find eight devices, each of which wants a group.
  training.regroup(config, tokens // 8 if quick else tokens)
  return config


def trained(
  names: Iterable[str], quick: bool, pairs: str = ""
) -> Iterator[tuple[str, str, training.Run]]:
  """Trains some of MODELS on each pair of languages by itself.

  Yields the pair, the name and the run, whose folder is there meanwhile.
  """
  with training.folder("translation_capacity", quick, pairs) as runs:
    wanted = {}
    for pair, files in pair_files(pairs, ["fr"], runs, quick).items():
      for name in names:
        train = named({pair: files})
        own = config(*MODELS[name], STEPS, runs, quick, train=train)
        if name == "moe_32_balanced":
          # Thresholds learn by a loss of their own.
          own.aux = {"importance": 0.01, "threshold": 1e-4}
        wanted[f"{pair}_{name}"] = own
    for both, run in training.train_all(runs, wanted, quick).items():
      pair, _, name = both.partition("_")
      yield pair, name, run
