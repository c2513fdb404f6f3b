"""What can be done with a run, even while it trains: measure, use."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from moejax import config as config_lib
from moejax import files as files_lib
from moejax import terminal
from moejax import workdir as workdir_lib
from moejax.models.transformer import Transformer
from moejax.training import checkpoint, evaluators, metrics, sample, session
from moejax.training.state import TrainState

CHECKPOINTS = "checkpoints"
# Folders of a workdir that a run writes to.
FOLDERS = (CHECKPOINTS, evaluators.TRANSLATIONS, "tensorboard")


def recall(workdir: files_lib.Path, layout: str = "") -> config_lib.Experiment:
  """Reads what a run trains, its layout replaced if one is named.

  FileNotFoundError where there is no run in the workdir; ValueError where its
  config is damaged, or of another version.
  """
  values = workdir_lib.recall(workdir)
  try:
    experiment = config_lib.parse(values)
  except ValueError as error:
    raise ValueError(
      f"{workdir / workdir_lib.CONFIG_FILE} is no config of this version:"
      f" {error}"
    ) from None
  changes = {"config.layout": layout} if layout else {}
  return config_lib.changed(experiment, changes)


def open_run(
  workdir: files_lib.Path, layout: str = "", files: Sequence[str] = ()
) -> evaluators.Context:
  """Opens a run: what it trains, on devices, and its corpus.

  Files are read as the only split "data", in place of the corpus. Errors as of
  `recall`; FileNotFoundError where a file, and ValueError where the run's own
  vocabulary is missing.
  """
  experiment = recall(workdir, layout)
  data = config_lib.open_corpus(experiment, workdir, files)
  built = session.build(experiment, len(data.vocabulary))
  return evaluators.Context(built, data, workdir)


class Loaded(NamedTuple):
  """A run, for use in Python.

  Attributes:
    model: the module; model.apply({"params": params}, ...).
    params: of the best checkpoint, as they lie between uses.
    tokenizer: the run's own, of words, of pieces, or of a tokenizer.json; None
      of a model that was imported without any.
    config: what the run was made with, as plain values.
  """

  model: nn.Module
  params: Any
  tokenizer: Any
  config: dict[str, Any]


def load(workdir: str | files_lib.Path, layout: str = "") -> Loaded:
  """Loads a run by its best checkpoint, even while it trains.

  FileNotFoundError where there is no run in the workdir; ValueError where the
  run has no checkpoint yet, or its vocabulary is another.
  """
  workdir = files_lib.path(str(workdir))
  experiment = recall(workdir, layout)
  tokenizer = None
  if workdir_lib.knows_words(workdir):
    tokenizer = experiment.own_tokenizer(workdir)
  size = len(tokenizer) if tokenizer else config_lib.vocab_size(experiment)
  built = session.build(experiment, size)
  params = best(workdir, built).params
  return Loaded(built.model, params, tokenizer, experiment.values)


def evaluate_run(
  workdir: files_lib.Path,
  split: str,
  files: Sequence[str] = (),
  layout: str = "",
) -> dict[str, Any]:
  """Evaluates the best checkpoint on a split, or on files in its place.

  Errors as of `open_run` and `load`; ValueError also where the split's text is
  not the run's.
  Returned is what the evaluators of the test return, and the checkpoint's step;
  of a language model also the fraction of words unknown to its vocabulary.
  """
  context = open_run(workdir, layout, files)
  split = "data" if files else split
  rows = context.rows(split)
  if not files:
    workdir_lib.check_text({split: rows.digest}, workdir)
  state = best(workdir, context.session)
  values = evaluators.measure(
    evaluators.AT_TEST, context, state.params, split, terminal.say
  )
  said = metrics.describe(values, context.session.experiment.unit)
  values["step"] = int(state.step)
  if not context.translator:
    values["unknown"] = rows.unknown
    if rows.unknown:
      unit = context.data.vocabulary.UNIT
      said += f", {rows.unknown:.1%} of the {unit}s unknown to the vocabulary"
  terminal.say(f"{said} (checkpoint of step {values['step']})")
  return values


def translate_run(
  workdir: files_lib.Path,
  lines: Sequence[str],
  language: str = "",
  advance: Callable[[int], object] = lambda rows: None,
  layout: str = "",
  **search: Any,
) -> list[str]:
  """Translates lines by the best checkpoint of a run; errors as of `load`.

  ValueError also where the run does not translate, or not into the language.

  A line without words becomes ""; one that is too long for the model is
  translated in parts, of which `advance` is told how many more are done. Of
  `search` see `decode.beam_search`.
  """
  experiment = recall(workdir, layout)
  if not experiment.translates:
    raise ValueError(
      f"the run in {workdir} is a language model, it cannot translate; give the"
      " --workdir of one with config.model.kind 'gnmt' or 'pair_transformer'."
    )
  pieces = experiment.own_tokenizer(workdir)
  if language and not pieces.languages:
    raise ValueError(
      f"the run in {workdir} translates into one language alone, it cannot be"
      f" asked for {language!r}; leave --language out."
    )
  if pieces.languages and not language:
    raise ValueError(
      f"the run in {workdir} translates into several languages; ask for one by"
      f" --language: {', '.join(pieces.languages)}."
    )
  built = session.build(experiment, len(pieces))
  translator = evaluators.Translator(built, pieces, **search)
  # Before a checkpoint is read, which takes long.
  translator.tag(language)
  params = best(workdir, built).params
  return translator.lines(params, lines, language, advance)


def sample_run(
  workdir: files_lib.Path,
  prompt: str = "",
  length: int = 0,
  seed: int = 0,
  layout: str = "",
  **options: Any,
) -> Iterator[Iterator[tuple[str, list[list[tuple[int, float]]]]]]:
  """Yields texts of the best checkpoint of a language model, without end.

  A text comes in parts, which are to be joined: of each token what it adds, and
  who has read it, as of `sample.Token`; a letter of several tokens comes with
  the last of them. With show_experts a part is what its token looks like.
  Errors as of `load`; ValueError also where the run translates, the prompt has
  no tokens, or an option is out of its range.

  Args:
    workdir: of the run.
    prompt: what every text begins with.
    length: tokens of a text at most, the prompt's counted; 0 is the length of
      the rows that the model was trained on.
    seed: of the draws.
    layout: name of one to take in place of the run's own.
    **options: see `sample.Sampler`.
  """
  experiment = recall(workdir, layout)
  if experiment.translates:
    raise ValueError(
      f"the run in {workdir} translates, it cannot go on with a text; give the"
      " --workdir of a language model, or translate by moejax translate."
    )
  vocabulary = experiment.own_tokenizer(workdir)
  built = session.build(experiment, len(vocabulary))
  longest = built.shapes["inputs"].shape[1]
  if length > longest and isinstance(built.model, Transformer):
    raise ValueError(
      f"a text of {length} tokens is longer than the rows of {longest} that the"
      " model was trained on, and it knows no places beyond; give a --length of"
      f" {longest} or less."
    )
  (own,) = vocabulary.encode_all([prompt])
  if prompt and not own:
    raise ValueError(
      f"the prompt {prompt!r} has no {vocabulary.UNIT}s; give one with letters,"
      " or leave --prompt out."
    )
  if unknown := own.count(vocabulary.unknown):
    terminal.warn(
      f"{unknown} of the prompt's {len(own)} {vocabulary.UNIT}s are unknown to"
      " the model."
    )
  start, end = vocabulary.start, vocabulary.end
  sampler = sample.Sampler(
    built.model.for_decoding(),
    built.layout,
    built.mesh,
    # No text has these, or says anything by them.
    never={*vocabulary.special, vocabulary.unknown} - {end},
    **options,
  )
  params = best(workdir, built).params
  texts = sampler.texts(params, [start, *own], length or longest, end, seed)

  show = sample.spelt if options.get("show_experts") else sample.written
  return (show(text, vocabulary) for text in texts)


def best(workdir: files_lib.Path, built: session.Session) -> TrainState:
  """Restores the best checkpoint of a run, which may still be training.

  Says so where a better one is damaged or gone; ValueError where there is no
  checkpoint yet, or none that can be read.
  """
  files_lib.refuse_odd_in(workdir / CHECKPOINTS, written=False)
  checkpoints = checkpoint.Checkpoints(workdir / CHECKPOINTS, read_only=True)
  with contextlib.closing(checkpoints):
    found = checkpoints.best(built.abstract_state)
    newest = checkpoints.newest()
  if found is None:
    raise ValueError(f"the run in {workdir} has no checkpoint yet; train on.")
  if lost := lost_best(workdir, found, newest):
    terminal.warn(
      f"the best checkpoint in {workdir}, of step {lost}, is damaged or gone;"
      f" the best that is left is of step {int(found.state.step)}."
    )
  return found.state


def lost_best(
  workdir: files_lib.Path, left: checkpoint.Restored, newest: int
) -> int | None:
  """Returns the step of the best validation, if its checkpoint is lost.

  `left` is the best that can be read; what the metrics in the workdir tell of
  steps after the `newest` checkpoint may not be saved yet.
  """
  bar = math.inf if left.perplexity is None else left.perplexity
  measured = [
    (line["perplexity"], -line["step"])
    for line in metrics.read(workdir / metrics.METRICS_FILE)
    if line["split"] == "validation" and line["step"] <= newest
  ]
  perplexity, step = min(measured, default=(bar, 0))
  return -step if perplexity < bar else None
