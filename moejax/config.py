"""The only reader of ConfigDict: names in, objects out.

Nothing below this file has ever seen a config.
"""

import functools
import inspect
import itertools
import json
import os
import runpy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from moejax import files as files_lib
from moejax import losses, named, options, sharding
from moejax import workdir as workdir_lib
from moejax.data import (
  corpora,
  corpus,
  file_names,
  lm1b,
  pairs,
  text,
  translation,
  vocab,
)
from moejax.data.pieces import Pieces
from moejax.models.build import MODELS
from moejax.named import Names, Range, Section, Size
from moejax.options import Paths
from moejax.training import optim, step

Config = ConfigDict

# -- files and flags ----------------------------------------------------------


def load(path: str) -> ConfigDict:
  """Runs a config file, of configs/ or a user's own.

  Args:
    path: of the file; what follows a colon is the argument of its get_config.

  Raises:
    options.ReadError: it is none; says why.
  """
  file, _, argument = path.partition(":")
  file = os.path.expanduser(file)
  if not os.path.isfile(file) or os.path.exists(os.path.expanduser(path)):
    file, argument = str(files_lib.local(path)), ""
  if not os.path.isfile(file):
    raise options.ReadError(
      f"--config={path}: there is no such file; give one of configs/ or your"
      " own."
    )
  try:
    get_config = runpy.run_path(file)["get_config"]
    config = get_config(*([argument] if argument else []))
    config.to_dict()
    return config.lock()
  except Exception as error:  # Whatever the file's own code raises.
    raise options.ReadError(
      f"--config={path} cannot be read ({type(error).__name__}: {error}); it"
      " must define get_config() -> ConfigDict."
    ) from error


def fields(config: ConfigDict) -> Iterator[options.Field]:
  """Yields all that a config can hold, also what it leaves out.

  Raises:
    ValueError: a section is of an unknown kind.
  """
  whole = Annotated[Any, Section(Sections)]
  # The first is the config as a whole.
  return itertools.islice(
    options.fields(whole, "config", config.to_dict()), 1, None
  )


def override(
  config: ConfigDict, changes: Sequence[tuple[str, Sequence[str]]]
) -> None:
  """Sets fields to what a command line says, see `options.override`."""
  options.override(config, changes, fields)


# -- sections -----------------------------------------------------------------


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

  steps: Size
  microbatches: Size = 1
  balance_over: Annotated[str, Names(step.BALANCE_OVER)] = "microbatch"
  log_every: Size = 10
  eval_every: Size = 100
  checkpoint_every: Size = 100
  keep: Size = 2


def check(config: ConfigDict) -> None:
  """Refuses what no builder here reads, and values that cannot be.

  Raises:
    ValueError: names the field and what may be in its place, or the nearest
      that exists.
  """
  kinds = [
    section.get("kind") if hasattr(section, "keys") else None
    for section in (config.get("model"), config.get("data"))
  ]
  if all(kinds) and translates(config) != (kinds[0] == "gnmt"):
    raise ValueError(
      f"config.model.kind is {kinds[0]!r}, but config.data.kind is"
      f" {kinds[1]!r}: the model 'gnmt' translates, and pairs of sentences"
      " ('pairs', 'wmt14') are for it alone; change one of them."
    )
  named.typed(config.to_dict(), Annotated[Any, Section(Sections)], "config")
  for name, value in workdir_lib.flat(config.to_dict()).items():
    try:
      json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
      raise ValueError(
        f"{name} is {value!r}, which is not UTF-8; rename what it names."
      ) from None
  optimizer(config)
  layout(config)


def _build(config: ConfigDict, name: str, **given: Any) -> Any:
  """Builds what a section describes."""
  section = named.section_of(Sections.__annotations__[name])
  return named.make(
    section.factory, config[name].to_dict(), f"config.{name}", **given
  )


def aux(config: ConfigDict) -> tuple[dict[str, float], str]:
  """Reads the section `aux`: weights of the balance losses, and their scope."""
  return _build(config, "aux")


@named.fields_of(
  **{
    name: Annotated[
      float, Range(0), f"weight of {options.sentence(fn.__doc__)}"
    ]
    | None
    for name, fn in losses.LOSSES.items()
  }
)
def _aux(
  scope: Annotated[str, Names(losses.SCOPES)] = "batch", **weights: float | None
) -> tuple[dict[str, float], str]:
  """Reads weights.

  Args:
    scope: what is to be balanced, the "batch" or every "group" by itself.
  """
  return {n: w for n, w in weights.items() if w is not None}, scope


def train(config: ConfigDict) -> Train:
  """Reads the section `train`."""
  return _build(config, "train")


def data(
  config: ConfigDict, workdir: files_lib.Path | None, files: Sequence[str] = ()
) -> corpus.Corpus:
  """Opens the corpus; the vocabulary is the run's own once there is a run.

  Args:
    config: the whole config.
    workdir: of the run; None where there is to be none.
    files: text files to read, as the only split "data", in place of the corpus.
  """
  return _build(config, "data", workdir=workdir, files=file_names.find(files))


def batch_shapes(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes, [B, L] or [B, M], and types of a batch's arrays."""
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
  row_length: Size,
  batch_size: Size,
  min_count: int = 3,
  data_dir: str = "",
  train: Paths = "",
  validation: Paths = "",
  test: Paths = "",
) -> corpus.Corpus:
  """Opens text.

  Args:
    row_length: words of a row; of pairs, word pieces of the target.
    batch_size: rows of a batch.
    min_count: words that the text has less often are unknown.
    data_dir: where prepared corpora lie; "" is TFDS's own place.
    train: files to learn from.
    validation: files to find the best checkpoint by; "" takes a part of train.
    test: files to measure that one by; "" takes a part of train.
  """
  if files:
    texts = {"data": corpora.read_lines(files)}
  else:
    own = _files(kind, train=train, validation=validation, test=test)
    texts = corpora.open_corpus(kind, _data_dir(data_dir), **own)
  vocabulary = _of_run(vocab.Vocabulary, workdir)
  if vocabulary is None:
    vocabulary = vocab.Vocabulary.build(texts["train"], min_count)
  return corpus.Sentences(vocabulary, texts, row_length, batch_size)


def _lm1b(
  workdir,
  files,
  vocab_file: str,
  vocab_size: Size,
  row_length: Size,
  batch_size: Size,
  data_dir: str = "",
  test: str = "",
) -> corpus.Corpus:
  """Opens the One Billion Word benchmark.

  Args:
    vocab_file: one word a line, the most frequent first.
    vocab_size: entries of the vocabulary.
    test: path of news.en.heldout-00000-of-00050; "" is what TFDS holds out.
  """
  vocabulary = _of_run(vocab.Vocabulary, workdir)
  if vocabulary is None:
    vocabulary = lm1b.load_vocabulary(_local(vocab_file), vocab_size)
  if files:
    texts = {"data": corpora.read_lines(files)}
  else:
    texts = lm1b.open_lm1b(_data_dir(data_dir), _local(test))
  return corpus.Sentences(
    vocabulary, texts, row_length, batch_size, vocab.tokens
  )


def _pairs(
  workdir,
  files,
  train: Paths,
  vocab_size: Size,
  row_length: Size,
  source_length: Size,
  batch_size: Size,
  validation: Paths = "",
  test: Paths = "",
  data_dir: str = "",
  both_directions: bool = False,
  temperature: float = 1.0,
  strict: bool = False,
) -> corpus.Corpus:
  """Opens pairs of sentences.

  Args:
    source_length: word pieces of a row of the source.
    both_directions: whether each pair is read both ways.
    temperature: above 1 small pairs of languages are read more often.
    strict: whether to refuse lines that are no pair, or else leave them out.
  """
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
    data_dir=_data_dir(data_dir),
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
  vocab_size: Size,
  row_length: Size,
  source_length: Size,
  batch_size: Size,
  data_dir: str = "",
) -> corpus.Corpus:
  """Opens pairs of WMT'14.

  Args:
    pair: of languages, such as "en-fr".
  """
  known = [pairs.wmt14_direction(pair)]
  parts = _given_pairs(files, known, strict=False) or pairs.open_wmt14(
    pair, _data_dir(data_dir)
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
  for direction, paths in pairs.named_files(files).items():
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
  workdir: files_lib.Path | None,
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
  kind: type[workdir_lib.Vocabulary], workdir: files_lib.Path | None
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


def _local(path: str) -> str:
  """Returns the path on a disk that is meant, if any is."""
  return path and str(files_lib.local(path))


def _data_dir(path: str) -> str | None:
  """Returns where prepared corpora lie; None for the home folder, by TFDS."""
  return _local(path or os.environ.get("TFDS_DATA_DIR", "")) or None


def _files(kind: str, **splits: str) -> dict[str, list[str]]:
  """Lists the files of each split; only text corpora take any."""
  if kind == "text":
    return {split: file_names.find(value) for split, value in splits.items()}
  for split, value in splits.items():
    if value:
      raise ValueError(
        f"config.data.{split} names files, but config.data.kind is {kind!r};"
        " set config.data.kind=text to read them."
      )
  return {}


def model(config: ConfigDict, vocab_size: int) -> nn.Module:
  """Builds the model for a vocabulary."""
  return _build(config, "model", vocab_size=vocab_size)


def optimizer(config: ConfigDict) -> tuple[optim.Schedule, optim.Update]:
  """Builds the learning rate's schedule and the update rule."""
  return _build(config, "optimizer")


@named.fields_of(optim.warmup_rsqrt, optim.factored_adam)
def _scheduled(
  rule: Callable[..., optim.Update], **fields: Any
) -> tuple[optim.Schedule, optim.Update]:
  """Makes a schedule and the rule that follows it.

  Args:
    warmup_steps: in which the rate rises to the peak.
    hold_steps: in which it stays there; then it falls as 1/sqrt.
    clip_norm: largest norm of the gradient; None clips nothing.
  """
  of_schedule = inspect.signature(optim.warmup_rsqrt).parameters
  schedule = optim.warmup_rsqrt(
    **{n: fields.pop(n) for n in of_schedule if n in fields}
  )
  return schedule, rule(schedule, **fields)


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
    named.known(config.layout, sharding.LAYOUTS, "config.layout")
    return sharding.LAYOUTS[config.layout]
  return _build(config, "layout")


_Axis = Annotated[str, Names(sharding.MESH_AXES)]
_Axes = (
  _Axis | Annotated[Sequence[_Axis], "mesh axes that it is split over"] | None
)


def _rules(**changes: sharding.Over) -> tuple[tuple[str, sharding.Over], ...]:
  # A config of JSON has lists.
  return sharding.rules(
    **{n: tuple(v) if isinstance(v, list) else v for n, v in changes.items()}
  )


_rules.__signature__ = inspect.Signature(
  [
    inspect.Parameter(
      axis,
      inspect.Parameter.KEYWORD_ONLY,
      default=over,
      annotation=_Axes,
    )
    for axis, over in sharding.RULES.items()
  ]
)


def _layout(
  mesh_shape: Sequence[int],
  rules: Annotated[Callable, Section(_rules)] | None = None,
  name: str = "own",
) -> sharding.Layout:
  """Makes a layout.

  Args:
    mesh_shape: devices along data, expert, model; -1 takes what is left.
    rules: what to change of `sharding.RULES`.
    name: what reports call it.
  """
  shape = tuple(mesh_shape)
  sound = all(n > 0 or n == -1 for n in shape)
  if not sound or len(shape) != 3 or shape.count(-1) > 1:
    raise ValueError(
      f"config.layout.mesh_shape is {shape}; give the number of devices"
      f" along {', '.join(sharding.MESH_AXES)}, -1 for at most one."
    )
  return sharding.Layout(name, shape, rules())


class Sections(NamedTuple):
  """A whole config.

  Attributes:
    seed: of the first parameters, of noise, dropout, samples, and of the order
      in which text is read.
    layout: name of how arrays lie over the devices, or a section of its own.
    data: what is read.
    model: what is trained.
    aux: weights of the balance losses.
    optimizer: how it is trained.
    train: how long it is trained, and how often what is done.
  """

  seed: Annotated[int, Range(0, 2**32)]
  layout: (
    Annotated[str, Names(sharding.LAYOUTS)] | Annotated[Any, Section(_layout)]
  )
  data: Annotated[Any, Section(DATA)]
  model: Annotated[Any, Section(MODELS)]
  aux: Annotated[Any, Section(_aux)]
  optimizer: Annotated[Any, Section(OPTIMIZERS)]
  train: Annotated[Any, Section(Train)]
