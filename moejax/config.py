"""The only reader of ConfigDict: names in, objects out.

Nothing below this file has ever seen a config.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from moejax import losses, named, sharding
from moejax import workdir as workdir_lib
from moejax.data import corpora, corpus, lm1b, pairs, text, translation, vocab
from moejax.data.pieces import Pieces
from moejax.models.build import MODELS
from moejax.training import optim, step

Config = ConfigDict


class Train(NamedTuple):
  """The section `train`: how long, and how often to do what.

  Attributes:
    steps: updates in all.
    microbatches: parts of a batch whose gradients are added up; evaluation
      reads as many rows at once as one has.
    balance_over: what the balance losses are taken over, each "microbatch" or
      the whole "batch", see `step.train_step`.
    log_every: steps between lines of metrics.
    eval_every: steps between validations.
    checkpoint_every: steps between checkpoints.
    keep: how many of the last checkpoints to keep, besides the best.
  """

  steps: int
  microbatches: int = 1
  balance_over: str = "microbatch"
  log_every: int = 10
  eval_every: int = 100
  checkpoint_every: int = 100
  keep: int = 2


def check(config: ConfigDict) -> None:
  """Refuses sections that no builder here reads.

  Raises:
    ValueError: names the section and the nearest that exists.
  """
  kinds = dict.fromkeys(("data", "model", "aux", "optimizer", "train"), Mapping)
  kinds |= {"seed": int, "layout": str | Mapping}
  named.refuse_unknown(config.to_dict(), kinds, "config")
  for name, kind in kinds.items():
    if name not in config:
      raise ValueError(f"config.{name} is missing; give it a value.")
    named.typed(config[name], kind, f"config.{name}")
  for name, value in workdir_lib.flat(config.to_dict()).items():
    try:
      json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
      raise ValueError(
        f"{name} is {value!r}, which is not UTF-8; rename what it names."
      ) from None
  if translates(config) != (config.model.get("kind") == "gnmt"):
    raise ValueError(
      f"config.model.kind is {config.model.get('kind')!r}, but config.data.kind"
      f" is {config.data.get('kind')!r}: the model 'gnmt' translates, and pairs"
      " of sentences ('pairs', 'wmt14') are for it alone; change one of them."
    )
  losses.auxiliary([], *aux(config))
  if not 0 <= config.seed < 2**32:
    raise ValueError(
      f"config.seed is {config.seed}; give 0 or more, and less than 2**32."
    )
  named.sizes("config.data", vocab_size=config.data.get("vocab_size"))
  train(config)
  optimizer(config)
  layout(config)


def aux(config: ConfigDict) -> tuple[dict[str, float], str]:
  """Reads the section `aux`: weights of the balance losses, and their scope."""
  weights = config.aux.to_dict()
  scope = weights.pop("scope", "batch")
  for name, weight in weights.items():
    named.typed(weight, float, f"config.aux.{name}")
    if not 0 <= weight < math.inf:
      raise ValueError(f"config.aux.{name} is {weight}; give 0 or more.")
  return weights, scope


def train(config: ConfigDict) -> Train:
  """Reads the section `train`."""
  values = named.make(Train, config.train.to_dict(), "config.train")
  numbers = values._asdict()
  over = numbers.pop("balance_over")
  named.known(over, step.BALANCE_OVER, "config.train.balance_over")
  named.sizes("config.train", **numbers)
  return values


def data(
  config: ConfigDict, workdir: pathlib.Path | None, files: Sequence[str] = ()
) -> corpus.Corpus:
  """Opens the corpus; the vocabulary is the run's own once there is a run.

  Args:
    config: the whole config.
    workdir: of the run; None where there is to be none.
    files: text files to read, as the only split "data", in place of the corpus.
  """
  return named.choose(
    DATA, config.data.to_dict(), "config.data", workdir=workdir, files=files
  )


def batch_shapes(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes, [B, L] or [B, M], and types of a batch's arrays.

  Raises:
    ValueError: one of B, L and M is below 1.
  """
  for name in ("batch_size", "row_length", "source_length"):
    value = config.data.get(name, 1)
    named.typed(value, int, f"config.data.{name}")
    named.sizes("config.data", **{name: value})
  size, length = config.data.batch_size, config.data.row_length
  sides = [(length, text.TYPES)]
  if translates(config):
    sides = [(length, translation.TARGET_TYPES)]
    sides.append((config.data.source_length, translation.SOURCE_TYPES))
  return {
    name: jax.ShapeDtypeStruct((size, places), dtype)
    for places, types in sides
    for name, dtype in types.items()
  }


def unit(config: ConfigDict) -> str:
  """Names what the corpus is cut into."""
  return "word piece" if translates(config) else "word"


def translates(config: ConfigDict) -> bool:
  """Whether the corpus is one of translations."""
  return config.data.get("kind") in ("pairs", "wmt14")


def _prose(
  kind: str,
  workdir,
  files,
  row_length: int,
  batch_size: int,
  min_count: int = 3,
  data_dir: str = "",
  train: str = "",
  validation: str = "",
  test: str = "",
) -> corpus.Corpus:
  if files:
    texts = {"data": corpora.read_lines(files)}
  else:
    own = _files(kind, train=train, validation=validation, test=test)
    texts = corpora.open_corpus(kind, data_dir or None, **own)
  vocabulary = _of_run(vocab.Vocabulary, workdir)
  if vocabulary is None:
    vocabulary = vocab.Vocabulary.build(texts["train"], min_count)
  return corpus.Sentences(vocabulary, texts, row_length, batch_size)


def _lm1b(
  workdir,
  files,
  vocab_file: str,
  vocab_size: int,
  row_length: int,
  batch_size: int,
  data_dir: str = "",
  test: str = "",
) -> corpus.Corpus:
  vocabulary = _of_run(vocab.Vocabulary, workdir)
  if vocabulary is None:
    vocabulary = lm1b.load_vocabulary(vocab_file, vocab_size)
  if files:
    texts = {"data": corpora.read_lines(files)}
  else:
    texts = lm1b.open_lm1b(data_dir or None, test)
  return corpus.Sentences(
    vocabulary, texts, row_length, batch_size, vocab.tokens
  )


def _pairs(
  workdir,
  files,
  train: str,
  vocab_size: int,
  row_length: int,
  source_length: int,
  batch_size: int,
  validation: str = "",
  test: str = "",
  data_dir: str = "",
  both_directions: bool = False,
  temperature: float = 1.0,
  strict: bool = False,
) -> corpus.Corpus:
  named_files = {
    split: pairs.named_files(value)
    for split, value in (
      ("train", train),
      ("validation", validation),
      ("test", test),
    )
  }
  known = pairs.directions(named_files["train"], both_directions)
  parts = _given_pairs(files, known, strict) or pairs.open_pairs(
    **named_files,
    data_dir=data_dir or None,
    both_directions=both_directions,
    strict=strict,
  )
  pieces = _pieces(workdir, parts, vocab_size)
  return corpus.Translations(
    pieces, parts, row_length, source_length, batch_size, temperature
  )


def _wmt14(
  workdir,
  files,
  pair: str,
  vocab_size: int,
  row_length: int,
  source_length: int,
  batch_size: int,
  data_dir: str = "",
) -> corpus.Corpus:
  known = [pairs.wmt14_direction(pair)]
  parts = _given_pairs(files, known, strict=False) or pairs.open_wmt14(
    pair, data_dir or None
  )
  pieces = _pieces(workdir, parts, vocab_size)
  return corpus.Translations(
    pieces, parts, row_length, source_length, batch_size
  )


def _given_pairs(
  files: Sequence[str], known: Sequence[pairs.Direction], strict: bool
) -> dict[str, list[pairs.Pairs]]:
  """Reads the pairs of files as the only split; none where there are none."""
  found = []
  for direction, paths in pairs.named_files(",".join(files)).items():
    if direction not in known:
      if direction != pairs.NO_LANGUAGES or len(known) > 1:
        raise ValueError(
          f"{paths[0]}: pairs of {direction} were not trained, only of"
          f" {', '.join(map(str, known))}; name one, as in"
          f" {known[0]}={paths[0]}"
        )
      direction = known[0]
    found.append(pairs.read_pairs(paths, direction, strict))
  return {"data": found} if found else {}


def _pieces(
  workdir: pathlib.Path | None,
  parts: Mapping[str, Sequence[pairs.Pairs]],
  size: int,
) -> Pieces:
  """Returns the pieces of the run; of what is to be one, those of its text."""
  pieces = _of_run(Pieces, workdir)
  if pieces is not None:
    return pieces
  train = parts["train"]
  return Pieces.train(pairs.texts(train), size, pairs.target_languages(train))


def vocab_size(config: ConfigDict) -> int:
  """Returns the words of the vocabulary; reads the text only if it must."""
  if "vocab_size" in config.data:
    return config.data.vocab_size
  return len(data(config, None).vocabulary)


def _of_run(
  kind: type[workdir_lib.Vocabulary], workdir: pathlib.Path | None
) -> workdir_lib.Vocabulary | None:
  if workdir is not None and workdir_lib.is_run(workdir):
    return workdir_lib.vocabulary(kind, workdir)
  return None


DATA = {
  "sotu": functools.partial(_prose, "sotu"),
  "text": functools.partial(_prose, "text"),
  "lm1b": _lm1b,
  "pairs": _pairs,
  "wmt14": _wmt14,
}


def _files(kind: str, **splits: str) -> dict[str, list[str]]:
  """Splits comma-separated paths; only text corpora take any."""
  paths = {
    split: [path for path in value.split(",") if path]
    for split, value in splits.items()
  }
  if kind == "text":
    return paths
  for split in paths:
    if paths[split]:
      raise ValueError(
        f"config.data.{split} names files, but config.data.kind is {kind!r};"
        " set config.data.kind=text to read them."
      )
  return {}


def model(config: ConfigDict, vocab_size: int) -> nn.Module:
  """Builds the model for a vocabulary."""
  section = config.model.to_dict()
  return named.choose(MODELS, section, "config.model", vocab_size=vocab_size)


def optimizer(config: ConfigDict) -> tuple[optim.Schedule, optim.Update]:
  """Builds the learning rate's schedule and the update rule."""
  return named.choose(
    OPTIMIZERS, config.optimizer.to_dict(), "config.optimizer"
  )


def _scheduled(
  rule: Callable[..., optim.Update],
  peak: float,
  warmup_steps: int,
  hold_steps: int = 0,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  clip_norm: float | None = None,
) -> tuple[optim.Schedule, optim.Update]:
  schedule = optim.warmup_rsqrt(peak, warmup_steps, hold_steps)
  return schedule, rule(schedule, b1, b2, eps, clip_norm)


OPTIMIZERS = {
  "adam": functools.partial(_scheduled, optim.adam),
  "factored_adam": functools.partial(_scheduled, optim.factored_adam),
}


def layout(config: ConfigDict) -> sharding.Layout:
  """Finds the layout by name, or makes the one that the section describes.

  A section has a `mesh_shape`, as those of `sharding.LAYOUTS`; `rules`, what it
  changes of `sharding.RULES`, from a logical axis to a mesh axis, a list of
  them, or None; and a `name` for reports.

  Raises:
    ValueError: names what does not exist, and the nearest that does.
  """
  if isinstance(config.layout, str):
    return sharding.LAYOUTS[
      named.known(config.layout, sharding.LAYOUTS, "config.layout")
    ]
  section = config.layout.to_dict()
  name = section.pop("name", "own")
  return named.make(_layout, section, "config.layout", name=name)


def _layout(
  name,
  mesh_shape: Sequence[int],
  rules: Mapping[str, Any] | None = None,
) -> sharding.Layout:
  shape = tuple(mesh_shape)
  sound = all(isinstance(n, int) and (n > 0 or n == -1) for n in shape)
  if not sound or len(shape) != 3 or shape.count(-1) > 1:
    raise ValueError(
      f"config.layout.mesh_shape is {shape}; give the number of devices"
      f" along {', '.join(sharding.MESH_AXES)}, -1 for at most one."
    )
  rules = rules or {}
  named.refuse_unknown(rules, sharding.RULES, "config.layout.rules")
  changes = {}
  for axis, over in rules.items():
    # A config of JSON has lists.
    several = isinstance(over, list | tuple)
    changes[axis] = tuple(over) if several else over
    for mesh_axis in over if several else () if over is None else (over,):
      where = f"config.layout.rules.{axis}"
      named.known(mesh_axis, dict.fromkeys(sharding.MESH_AXES), where)
  return sharding.Layout(name, shape, sharding.rules(**changes))
