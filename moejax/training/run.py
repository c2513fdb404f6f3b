"""What can be done with a run, even while it trains: measure, translate."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from moejax import config as config_lib
from moejax import files as files_lib
from moejax import terminal
from moejax import workdir as workdir_lib
from moejax.data.pieces import Pieces
from moejax.data.vocab import Vocabulary
from moejax.training import (
  checkpoint,
  evaluate,
  judge,
  metrics,
  session,
  translate,
)
from moejax.training.state import TrainState

CHECKPOINTS = "checkpoints"
TRANSLATIONS = "translations"
# Folders of a workdir that a run writes to.
FOLDERS = (CHECKPOINTS, TRANSLATIONS, "tensorboard")


class Loaded(NamedTuple):
  """A run, for use in Python.

  Attributes:
    model: the module; model.apply({"params": params}, ...).
    params: of the best checkpoint, as they lie between uses.
    tokenizer: the run's own vocabulary, of words or of pieces.
    config: what the run was made with.
  """

  model: nn.Module
  params: Any
  tokenizer: Any
  config: config_lib.Config


def load(workdir: str | files_lib.Path, layout: str = "") -> Loaded:
  """Loads a run by its best checkpoint, even while it trains.

  Args:
    workdir: of the run.
    layout: name of one to take in place of the run's own.

  Raises:
    FileNotFoundError: there is no run in the workdir.
    ValueError: the run has no checkpoint yet, or its vocabulary is another.
  """
  workdir = files_lib.path(str(workdir))
  config = _recall(workdir, layout)
  kind = Pieces if config_lib.translates(config) else Vocabulary
  tokenizer = workdir_lib.vocabulary(kind, workdir)
  parts = session.build(config, len(tokenizer))
  params = best(workdir, parts).params
  return Loaded(parts.model, params, tokenizer, config)


def evaluate_run(
  workdir: files_lib.Path,
  split: str,
  files: Sequence[str] = (),
  layout: str = "",
) -> dict[str, Any]:
  """Evaluates the best checkpoint of a run, which may still be training.

  Args:
    workdir: of the run; it remembers config and vocabulary.
    split: of the run's own corpus.
    files: files to read instead of a split, of text or of pairs.
    layout: name of one to take in place of the run's own.

  Returns:
    What `evaluate.evaluator` does, and the checkpoint's step. Of a language
    model also the fraction of words that are unknown to the run's vocabulary;
    of translations, where none is, what `judge.scores` returns, which keeps
    the lines in the workdir.

  Raises:
    FileNotFoundError: there is no run in the workdir, or no such file.
    ValueError: the run has no checkpoint yet, or the files no text, or the
      vocabulary or the split's text is not the run's.
  """
  config = _recall(workdir, layout)
  data = config_lib.data(config, workdir, files)
  split = "data" if files else split
  rows = data.rows(split)
  if not files:
    workdir_lib.check_text({split: rows.digest}, workdir)
  parts = session.build(config, len(data.vocabulary))
  state = best(workdir, parts)
  values: dict[str, Any] = evaluator(config, parts)(state.params, rows)
  values["step"] = int(state.step)
  if config_lib.translates(config):
    translator = make_translator(config, parts, data.vocabulary)
    found, values["signatures"] = judge.scores(
      translator,
      state.params,
      data.pairs[split],
      workdir / TRANSLATIONS / split,
    )
    return values | found
  return values | {"unknown": rows.unknown}


def described(values: dict[str, Any]) -> Iterator[str]:
  """Yields what `evaluate_run` returned, in words."""
  signatures = values.get("signatures", {})
  said = metrics.describe(values, "word piece" if signatures else "word")
  if "unknown" in values:
    said += f", {values['unknown']:.1%} of them unknown to the vocabulary"
  yield f"{said} (checkpoint of step {values['step']})"
  for name in values:
    if name.startswith("bleu_"):
      direction = name.removeprefix("bleu_")
      chrf = values[f"chrf_{direction}"]
      yield f"{direction}: BLEU {values[name]:.2f}, chrF {chrf:.2f}"
  for name, signature in signatures.items():
    yield f"{name}: {signature}"


def translate_run(
  workdir: files_lib.Path,
  lines: Sequence[str],
  language: str = "",
  advance: Callable[[int], object] = lambda rows: None,
  layout: str = "",
  **search: Any,
) -> list[str]:
  """Translates lines by the best checkpoint of a run.

  Args:
    workdir: of the run.
    lines: of text. One without words becomes ""; one that is too long for the
      model is translated in parts.
    language: to translate into, where the run has learnt several; else "".
    advance: is told how many more parts of lines are done.
    layout: name of one to take in place of the run's own.
    **search: how, see `decode.beam_search`.

  Returns:
    A translation of each line.

  Raises:
    FileNotFoundError: there is no run in the workdir.
    ValueError: the run has no checkpoint yet, or is none of translations, or
      did not learn the language, or learnt several and none is given, or the
      vocabulary is not the run's.
  """
  config = _recall(workdir, layout)
  if not config_lib.translates(config):
    raise ValueError(
      f"the run in {workdir} is a language model, it cannot translate; give the"
      " --workdir of one with config.model.kind 'gnmt'."
    )
  pieces = workdir_lib.vocabulary(Pieces, workdir)
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
  parts = session.build(config, len(pieces))
  translator = make_translator(config, parts, pieces, **search)
  translator.tag(language)
  params = best(workdir, parts).params
  return translator.lines(params, lines, language, advance)


def _recall(workdir: files_lib.Path, layout: str) -> config_lib.Config:
  config = workdir_lib.recall(workdir)
  try:
    config_lib.check(config)
  except ValueError as error:
    raise ValueError(
      f"{workdir / workdir_lib.CONFIG_FILE} is no config of this version:"
      f" {error}"
    ) from None
  if layout:
    with config.ignore_type():
      config.layout = layout
  return config


def evaluator(
  config: config_lib.Config, parts: session.Session
) -> evaluate.Evaluator:
  """Evaluates by rows of a microbatch: what is in memory at once is no more."""
  rows = config.data.batch_size // config_lib.train(config).microbatches
  return evaluate.evaluator(parts.model, rows, parts.layout, parts.mesh)


def make_translator(
  config: config_lib.Config,
  parts: session.Session,
  pieces: Pieces,
  **search: Any,
) -> translate.Translator:
  """Translates by as many hypotheses at once as a microbatch has rows."""
  rows = config.data.batch_size // config_lib.train(config).microbatches
  return translate.Translator(
    parts.model,
    pieces,
    config.data.source_length,
    rows,
    parts.layout,
    parts.mesh,
    **search,
  )


def best(workdir: files_lib.Path, parts: session.Session) -> TrainState:
  """Restores the best checkpoint of a run, which may still be training.

  Says so where a better one is damaged or gone.

  Args:
    workdir: of the run.
    parts: what its config builds.

  Raises:
    OSError: something among them is neither a folder nor a regular file.
    ValueError: it has no checkpoint yet, or none that can be read.
  """
  files_lib.refuse_odd_in(workdir / CHECKPOINTS, written=False)
  checkpoints = checkpoint.Checkpoints(workdir / CHECKPOINTS, read_only=True)
  with contextlib.closing(checkpoints):
    found = checkpoints.best(parts.abstract_state)
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

  Args:
    workdir: of the run, whose metrics tell.
    left: the best checkpoint that can be read.
    newest: step of the newest one; what comes after it may not be saved yet.
  """
  bar = math.inf if left.perplexity is None else left.perplexity
  measured = [
    (line["perplexity"], -line["step"])
    for line in metrics.read(workdir / metrics.METRICS_FILE)
    if line["split"] == "validation" and line["step"] <= newest
  ]
  perplexity, step = min(measured, default=(bar, 0))
  return -step if perplexity < bar else None
