"""The only reader of ConfigDict: names in, objects out.

Nothing below this file has ever seen a config.
"""

import functools
import inspect
import itertools
import json
import os
import runpy
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from moejax import files as files_lib
from moejax import losses, named, options, sharding
from moejax import workdir as workdir_lib
from moejax.data import corpora, packing
from moejax.models.build import MODELS
from moejax.named import Names, Range, Section, Size
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
) -> corpora.Corpus:
  """Opens the corpus; the vocabulary is the run's own once there is a run.

  Args:
    config: the whole config.
    workdir: of the run; None where there is to be none.
    files: text files to read, as the only split "data", in place of the corpus.
  """

  def of_run(kind):
    if workdir is not None and workdir_lib.is_run(workdir):
      return workdir_lib.vocabulary(kind, workdir)
    return None

  return _build(config, "data", of_run=of_run, files=files)


def batch_shapes(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes, [B, L] or [B, M], and types of a batch's arrays."""
  lengths = (config.data.row_length, config.data.get("source_length", 0))
  return packing.batch_shapes(config.data.batch_size, *lengths)


def unit(config: ConfigDict) -> str:
  """Names what the corpus is cut into."""
  return "word piece" if translates(config) else "word"


def translates(config: ConfigDict) -> bool:
  """Whether the corpus is one of translations."""
  return config.data.get("kind") in ("pairs", "wmt14")


def vocab_size(config: ConfigDict) -> int:
  """Returns the words of the vocabulary; reads the text only if it must."""
  if "vocab_size" in config.data:
    return config.data.vocab_size
  return len(data(config, None).vocabulary)


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
  data: Annotated[Any, Section(corpora.DATA)]
  model: Annotated[Any, Section(MODELS)]
  aux: Annotated[Any, Section(_aux)]
  optimizer: Annotated[Any, Section(OPTIMIZERS)]
  train: Annotated[Any, Section(Train)]
