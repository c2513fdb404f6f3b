"""Configs: files and flags in, one `Experiment` out, which all else takes.

Nothing below this file has ever seen a config.
"""

import ast
import copy
import functools
import inspect
import os
import pathlib
import runpy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from moejax import config_fields, losses, sharding
from moejax import files as files_lib
from moejax import workdir as workdir_lib
from moejax.config_fields import Names, Range, Section, Size
from moejax.data import corpora, packing, vocab
from moejax.models.build import MODELS, TRANSLATORS
from moejax.training import optim, step

Config = ConfigDict

# -- files and flags ----------------------------------------------------------


def packaged() -> dict[str, pathlib.Path]:
  """Returns the files of configs/ by name, such as "sotu/moe_32"."""
  here = pathlib.Path(__file__).parent
  # In a wheel they lie inside the package, in a checkout beside it.
  folder = here / "configs"
  if not folder.is_dir():
    folder = here.parent / "configs"
  return {
    str(path.relative_to(folder).with_suffix("")): path
    for path in sorted(folder.rglob("*.py"))
    if path.stem not in ("common", "__init__")
  }


def described() -> Iterator[str]:
  """Yields a line about each packaged config."""
  known = packaged()
  width = max(map(len, known))
  for name, path in known.items():
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    yield f"{name:{width}}  {doc.splitlines()[0]}"


def load(
  name: str, changes: Sequence[tuple[str, Sequence[str]]] = ()
) -> ConfigDict:
  """Runs a config file of a user's own or, by its name, of configs/.

  Or reads the config.json of a run.

  `config_fields.ReadError` says why it is none, or why a change cannot be.

  Args:
    name: path of the file, or "sotu/moe_32"; what follows a colon is the
      argument of its get_config.
    changes: what a command line says of its fields, see `override`.
  """
  file, _, argument = name.partition(":")
  if os.path.exists(os.path.expanduser(name)):
    file, argument = name, ""
  known, path = packaged(), os.path.expanduser(file)
  if not os.path.isfile(path):
    path = known.get(file.removesuffix(".py"), files_lib.local(file))
  if not os.path.isfile(path):
    raise config_fields.ReadError(
      f"--config={name}: there is no such file, and none of that name comes"
      f" with moejax; the nearest is {config_fields.nearest(file, known)}, all"
      " are listed by `moejax configs`."
    )
  try:
    if str(path).endswith(".json"):
      config = ConfigDict(files_lib.read_json(pathlib.Path(path)))
    else:
      get_config = runpy.run_path(str(path))["get_config"]
      config = get_config(argument) if argument else get_config()
    config.to_dict()
    config.lock()
  except Exception as error:  # Whatever the file's own code raises.
    raise config_fields.ReadError(
      f"--config={name} cannot be read ({type(error).__name__}: {error}); it"
      " must define get_config() -> ConfigDict, or be the config.json of a run."
    ) from error
  override(config, changes)
  return config


def fields(
  config: ConfigDict | Mapping[str, Any],
) -> Iterator[config_fields.Field]:
  """Yields all that a config can hold, also what it leaves out.

  ValueError where a section is of an unknown kind.
  """
  whole = Annotated[Any, Section(_experiment)]
  found = config_fields.fields(whole, "config", ConfigDict(config).to_dict())
  next(found)  # The config as a whole.
  return found


def override(
  config: ConfigDict, changes: Sequence[tuple[str, Sequence[str]]]
) -> None:
  """Sets fields to what a command line says, see `config_fields.override`."""
  with config.unlocked(), config.ignore_type():
    config_fields.override(config, changes, fields)


# -- what a config describes --------------------------------------------------


class Annealing(NamedTuple):
  """Experts a token visits at first, until it visits the config's own k.

  Of mixtures of one level. Training begins dense where the first k is the
  number of experts (2112.14397, sec. 3.2: from all to a few).

  Attributes:
    k: experts a token, one number after the other.
    until: the step at which each ends; these rise.
  """

  k: Sequence[Size]
  until: Sequence[Size]


class Train(NamedTuple):
  """The section `train`: how long, and how often to do what.

  Attributes:
    steps: updates in all, should the text not end before.
    passes: how often the text may be read, which is then the end of training:
      1 is for a text that is never seen twice. None reads it again and again.
    microbatches: parts of a batch whose gradients are added up; evaluation
      reads as many rows at once as one has.
    balance_over: what the balance losses are taken over, each "microbatch" or
      the whole "batch", see `step.train_step`.
    log_every: steps between lines of metrics.
    eval_every: steps between validations.
    checkpoint_every: steps between checkpoints.
    keep: how many of the last checkpoints to keep, besides the best.
    annealing: experts a token visits at first; evaluation has the k of the end.
  """

  steps: Size
  passes: Size | None = None
  microbatches: Size = 1
  balance_over: Annotated[str, Names(step.BALANCE_OVER)] = "microbatch"
  log_every: Size = 10
  eval_every: Size = 100
  checkpoint_every: Size = 100
  keep: Size = 2
  annealing: Annotated[Any, Section(Annealing, optional=True)] | None = None


class Experiment(NamedTuple):
  """What a config describes.

  Attributes:
    values: the config itself, as plain values: what a run remembers.
    data: opens the corpus, see `open_corpus`.
    shapes: [B, L] or [B, M], and types of a batch's arrays.
    model: size of the vocabulary -> the model.
    aux_weights: weights of the balance losses.
    aux_scope: what they are taken over, see `losses.SCOPES`.
    schedule: of the learning rate.
    tx: the update rule.
    phases: what is trained until some steps, and then from the last on this
      one itself; they differ in how many experts a token visits.
  """

  values: dict[str, Any]
  seed: int
  layout: sharding.Layout
  data: Callable[..., corpora.Corpus]
  shapes: Mapping[str, jax.ShapeDtypeStruct]
  model: Callable[..., nn.Module]
  aux_weights: Mapping[str, float]
  aux_scope: str
  schedule: optim.Schedule
  tx: optim.Update
  train: Train
  phases: "Sequence[tuple[int, Experiment]]" = ()

  @property
  def batch_size(self) -> int:
    """Rows of a batch, over all devices."""
    return self.shapes["mask"].shape[0]

  @property
  def rows_at_once(self) -> int:
    """Rows of a microbatch: evaluation has no more in memory."""
    return self.batch_size // self.train.microbatches

  @property
  def translates(self) -> bool:
    """Whether the corpus is one of translations."""
    return "source" in self.shapes

  @property
  def tokenizer(self) -> type[packing.Tokenizer]:
    """What cuts the corpus, of which a run keeps its own."""
    return corpora.kept(self.values["data"])[0]

  @property
  def unit(self) -> str:
    """What the corpus is cut into."""
    return self.tokenizer.UNIT

  def own_tokenizer(self, workdir: files_lib.Path) -> packing.Tokenizer:
    """Reads the tokenizer of a run, see `workdir.vocabulary`."""
    kind, named = corpora.kept(self.values["data"])
    return workdir_lib.vocabulary(kind, workdir, **named)


def parse(config: ConfigDict | Mapping[str, Any]) -> Experiment:
  """Builds what a config describes.

  ValueError names a field that no builder reads, or a value that cannot be, and
  what may be in its place.
  """
  values = ConfigDict(config).to_dict()
  sections = (values.get("model"), values.get("data"))
  model, data = (s.get("kind") if hasattr(s, "keys") else "" for s in sections)
  if model and data and (model in TRANSLATORS) != (data in _PAIRS):
    raise ValueError(
      f"config.model.kind is {model!r}, but config.data.kind is {data!r}: pairs"
      f" of sentences ({', '.join(_PAIRS)}) are for models that translate"
      f" ({', '.join(TRANSLATORS)}), and these for them; change one of the two."
    )
  experiment = config_fields.build(_experiment, values, "config", values=values)
  if not issubclass(experiment.tokenizer, vocab.Vocabulary):
    if samples := values["model"].get("num_samples"):
      raise ValueError(
        f"config.model.num_samples is {samples}, but samples are drawn as if"
        " ids fell with frequency, as those of words do, and config.data.tokens"
        " are others; set config.model.num_samples=0, the full softmax."
      )
    if words := values["data"].get("vocab_file"):
      raise ValueError(
        f"config.data.vocab_file, {words}, has words, but config.data.tokens"
        " are others; leave one of them out."
      )
  annealing = experiment.train.annealing
  return experiment._replace(phases=_phases(values, annealing and annealing()))


def _phases(
  values: dict[str, Any], annealing: Annealing | None
) -> Sequence[tuple[int, Experiment]]:
  """Returns the phases before the last, by the step at which each ends."""
  if annealing is None:
    return ()
  k, until = annealing
  ends = [*until, values["train"]["steps"]]
  if len(k) != len(until) or ends != sorted({*ends}):
    raise ValueError(
      f"config.train.annealing has k = {k} until the steps {until}; give as"
      f" many of both, and steps that rise to less than the {ends[-1]} of"
      " config.train.steps."
    )

  found = []
  for each, end in zip(k, until, strict=True):
    phase = copy.deepcopy(values)
    del phase["train"]["annealing"]
    routers = 0
    for name, mixture in mixtures(phase):
      if "k" not in mixture.get("router", {}):
        continue
      if each > mixture["num_experts"]:
        raise ValueError(
          f"config.train.annealing has k = {each} experts a token, but {name}"
          f" has {mixture['num_experts']}; give at most so many."
        )
      mixture["router"]["k"], routers = each, routers + 1
    if not routers:
      raise ValueError(
        f"config.train.annealing has k = {k}, but no mixture of one level has a"
        " router with a k; leave it out, or choose such a router."
      )
    found.append((end, parse(phase)))
  return tuple(found)


def mixtures(values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields the names and sections of mixtures, of a config's plain values.

  Those within experts of others, too.
  """

  def within(section, where):
    for name, part in section.items():
      if isinstance(part, Mapping):
        there = f"{where}.{name}"
        if "num_experts" in part and {"router", "primary"} & part.keys():
          yield there, part
        yield from within(part, there)

  yield from within(values["model"], "config.model")


# Kinds of data that are to be translated.
_PAIRS = ("pairs", "wmt14")


def changed(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
  """Returns one with other values of fields such as "config.train.steps"."""
  values = copy.deepcopy(experiment.values)
  for name, value in changes.items():
    config_fields.set_field(values, name, value)
  return parse(values)


def open_corpus(
  experiment: Experiment,
  workdir: files_lib.Path | None = None,
  files: Sequence[str] = (),
) -> corpora.Corpus:
  """Opens the corpus, with the vocabulary of the run if there is one.

  Files are read as the only split "data", in place of the corpus.
  """
  own = None
  if workdir is not None and workdir_lib.is_run(workdir):
    own = experiment.own_tokenizer(workdir)
  return experiment.data(own=own, files=files)


def vocab_size(experiment: Experiment) -> int:
  """Returns the size of the vocabulary; reads the text only if it must."""
  data = experiment.values["data"]
  tokens = data.get("tokens", {})
  if tokens.get("kind") == "file" and not tokens.get("vocab_size"):
    where, given = "config.data.tokens", {"texts": None, "words": None}
    return len(config_fields.build(corpora.TOKENS, tokens, where, **given))
  size = tokens.get("vocab_size", data.get("vocab_size"))
  return size or len(open_corpus(experiment).vocabulary)


# -- sections -----------------------------------------------------------------


@config_fields.fields_of(
  **{
    name: Annotated[
      float, Range(0), f"weight of {config_fields.sentence(fn.__doc__)}"
    ]
    | None
    for name, fn in losses.LOSSES.items()
  }
)
def _aux(
  scope: Annotated[str, Names(losses.SCOPES)] = "batch", **weights: float | None
) -> tuple[dict[str, float], str]:
  """Reads the weights of the balance losses.

  Args:
    scope: what is to be balanced, the "batch" or every "group" by itself.
  """
  given = {n: w for n, w in weights.items() if w is not None}
  losses.check(given, scope)
  return given, scope


_Group = Annotated[Callable, Section(optim.Group, optional=True)] | None


def _groups(
  experts: _Group = None, router: _Group = None, rest: _Group = None
) -> dict[str, optim.Group]:
  """Makes groups of parameters.

  Args:
    experts: the rates of experts, of all mixtures; shared ones are of the rest.
    router: those of routers, at both levels.
    rest: those of all other parameters.
  """
  groups = {"experts": experts, "router": router, "rest": rest}
  return {name: group() for name, group in groups.items() if group}


def _optimizer(rule: Callable[..., optim.Update]) -> Callable[..., Any]:
  @config_fields.fields_of(optim.warmup_rsqrt, rule)
  def scheduled(
    groups: Annotated[Callable, Section(_groups)] | None = None, **fields: Any
  ) -> tuple[optim.Schedule, optim.Update]:
    """Makes a schedule and the rule that follows it.

    Args:
      warmup_steps: in which the rate rises to the peak.
      hold_steps: in which it stays there; then it falls as 1/sqrt.
      clip_norm: largest norm of the gradient; None clips nothing.
      groups: parameters whose rate or weight decay is their own.
    """
    of_schedule = inspect.signature(optim.warmup_rsqrt).parameters
    of_schedule = {n: fields.pop(n) for n in {*of_schedule} & {*fields}}
    schedule = optim.warmup_rsqrt(**of_schedule)
    return schedule, rule(schedule, groups=groups(), **fields)

  return scheduled


OPTIMIZERS = {
  "adam": _optimizer(optim.adam),
  "factored_adam": _optimizer(optim.factored_adam),
  "muon": _optimizer(optim.muon),
}


_Axis = Annotated[str, Names(sharding.MESH_AXES)]
_Axes = (
  _Axis | Annotated[Sequence[_Axis], "mesh axes that it is split over"] | None
)


def _rules(**changes: sharding.Over) -> tuple[tuple[str, sharding.Over], ...]:
  return sharding.rules(**changes)


_keyword = functools.partial(
  inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY, annotation=_Axes
)
_rules.__signature__ = inspect.Signature(
  _keyword(axis, default=over) for axis, over in sharding.RULES.items()
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
  fixed = [n for n in mesh_shape if n != -1]
  if len(mesh_shape) != 3 or len(fixed) < 2 or min(fixed) < 1:
    raise ValueError(
      f"config.layout.mesh_shape is {mesh_shape}; give the number of devices"
      f" along {', '.join(sharding.MESH_AXES)}, -1 for at most one."
    )
  return sharding.Layout(name, mesh_shape, rules())


def _experiment(
  values,
  seed: Annotated[int, Range(0, 2**32)],
  layout: Annotated[str, Names(sharding.LAYOUTS)]
  | Annotated[Any, Section(_layout)],
  data: Annotated[Any, Section(corpora.DATA)],
  model: Annotated[Any, Section(MODELS)],
  aux: Annotated[Any, Section(_aux)],
  optimizer: Annotated[Any, Section(OPTIMIZERS)],
  train: Annotated[Any, Section(Train)],
) -> Experiment:
  """Makes an experiment.

  Args:
    seed: of the first parameters, of noise, dropout, samples, and of the order
      in which text is read.
    layout: name of how arrays lie over the devices, or a section of its own.
    data: what is read.
    model: what is trained.
    aux: weights of the balance losses.
    optimizer: how it is trained.
    train: how long it is trained, and how often what is done.
  """
  sizes = "batch_size", "row_length", "source_length"
  weights, scope = aux()
  schedule, tx = optimizer()
  return Experiment(
    values,
    seed,
    sharding.LAYOUTS[layout] if isinstance(layout, str) else layout(),
    data,
    packing.batch_shapes(*(values["data"].get(n, 0) for n in sizes)),
    lambda vocab_size: model(vocab_size=vocab_size),
    weights,
    scope,
    schedule,
    tx,
    train(),
  )
