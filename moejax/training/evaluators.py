"""What is measured of a run: at its validations, at its test, by `moejax eval`.

An evaluator takes (context, params, split, say), may say lines, and returns
values by name. Numbers among them go into the metrics. A new one is an entry in
`AT_VALIDATION` or `AT_TEST`.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from moejax import files, sharding, terminal
from moejax.data import batches as batches_lib
from moejax.data import corpora
from moejax.data.packing import Pairs, Rows
from moejax.data.pieces import Pieces
from moejax.models import gnmt
from moejax.training import bleu, metrics, processes, session, step
from moejax.training.translate import Translator

TRANSLATIONS = "translations"
Values = dict[str, Any]
Say = Callable[[str], object]
Evaluator = Callable[["Context", Any, str, Say], Values]
# Sentences shown at a validation, and words that are worth a look.
_SHOWN = 3
_WORDS = 4


class Context:
  """What evaluators read: an experiment on devices, its corpus, its workdir.

  What takes long, rows and compiled programs, is made once, when first asked
  for. No more rows are in memory at once than a microbatch has.
  """

  def __init__(
    self, built: session.Session, data: corpora.Corpus, workdir: files.Path
  ):
    self.session, self.data, self.workdir = built, data, workdir
    self.rows = functools.cache(data.rows)

  @functools.cached_property
  def losses(self) -> Callable[[Any, Rows], dict[str, float]]:
    """See `losses_of`."""
    built = self.session
    rows = built.experiment.rows_at_once
    return losses_of(built.model, rows, built.layout, built.mesh)

  @functools.cached_property
  def translator(self) -> Translator:
    """Translates by beam search."""
    return translator(self.session, self.data.vocabulary)

  @functools.cached_property
  def identity(self) -> dict[str, str]:
    """Returns the digest of each split of the text."""
    return {split: self.rows(split).digest for split in self.data.splits}

  def check(self) -> None:
    """Refuses what could not be measured, before training begins."""
    _ = self.losses
    if self.session.experiment.translates:
      _ = self.translator


def measure(
  evaluators: Mapping[str, Evaluator],
  context: Context,
  params: Any,
  split: str,
  say: Say,
) -> Values:
  """Returns what all of them return."""
  values = {}
  for evaluator in evaluators.values():
    values |= evaluator(context, params, split, say)
  return values


def numbers(values: Values) -> dict[str, float]:
  """Returns those that go into the metrics."""
  return {n: v for n, v in values.items() if isinstance(v, float | int)}


def perplexity(context: Context, params: Any, split: str, say: Say) -> Values:
  """Returns what `losses_of` does of a split (docs/decisions.md, 22)."""
  del say
  return context.losses(params, context.rows(split))


def losses_of(
  model: nn.Module,
  batch_size: int,
  layout: sharding.Layout,
  mesh: jax.sharding.Mesh,
) -> Callable[[Any, Rows], dict[str, float]]:
  """Returns a function (params, rows) -> loss (nats), perplexity, words, ...

  It is compiled once and counts every word of the rows once, with the full
  softmax. What the routing reports (`losses.balance`) is the mean over words of
  each batch's. All else is the same for any batch_size where groups have a
  `group_size`: rows follow each other, so a group holds the same ones.

  Of batch_size rows at once, over all devices, the full softmax of one time
  step has a number for each word of the vocabulary.

  Raises:
    ValueError: the rows do not divide over the devices.
    FloatingPointError: when called, the loss is not a finite number.
  """
  eval_fn = jax.jit(functools.partial(step.eval_step, model=model))
  where = sharding.batch_sharding(layout, mesh, batch_size)

  def evaluate(params, rows):
    sums: collections.Counter[str] = collections.Counter()
    batches = batches_lib.eval_batches(
      rows, batch_size, jax.process_index(), jax.process_count()
    )
    with sharding.use(layout, mesh):
      for batch in batches:
        part = jax.device_get(eval_fn(params, step.place(batch, where)))
        sums.update({name: float(value) for name, value in part.items()})
    words = sums.pop("words")
    means = {name: value / words for name, value in sums.items()}
    if not math.isfinite(means["loss"]):
      raise FloatingPointError(f"the loss of the evaluation is {means['loss']}")
    return {"perplexity": exp(means["loss"]), "words": words, **means}

  return evaluate


def exp(loss: float) -> float:
  """exp, and infinity where it overflows."""
  return math.inf if loss > 700 else math.exp(loss)


def translator(
  built: session.Session, pieces: Pieces, **search: Any
) -> Translator:
  """Returns what translates as many hypotheses as a microbatch has rows."""
  return Translator(
    gnmt.for_decoding(built.model),
    pieces,
    built.shapes["source"].shape[1],
    built.experiment.rows_at_once,
    built.layout,
    built.mesh,
    **search,
  )


def examples(context: Context, params: Any, split: str, say: Say) -> Values:
  """Says a few sentences, always the same, with both translations.

  Each direction gives at least one.
  """
  parts = context.data.pairs[split] if _translates(context) else ()
  for pairs in parts:
    places = list(_spread(pairs.sources, -(-_SHOWN // len(parts))))
    lines = [pairs.sources[place] for place in places]
    found = context.translator.lines(params, lines, pairs.direction.target)
    for place, source, translation in zip(places, lines, found, strict=True):
      for side, line in (
        (pairs.direction.source, source),
        (pairs.direction.target, pairs.targets[place]),
        ("model", translation),
      ):
        say(f"  {side}: {terminal.one_line(line)}")
  return {}


def _spread(sources: Sequence[str], count: int) -> Iterator[int]:
  """Yields places all over the text, of sentences rather than of words."""
  for part in range(count):
    begin, end = (len(sources) * (part + more) // count for more in (0, 1))
    inside = range(begin, end)
    long = (i for i in inside if len(sources[i].split()) >= _WORDS)
    if inside:
      yield next(long, begin)


def _translates(context: Context) -> bool:
  return context.session.experiment.translates


def translation_eval(
  context: Context, params: Any, split: str, say: Say
) -> Values:
  """Translates a whole split and compares it with the references.

  The workdir gets the lines of each direction, for people and for `sacrebleu
  test.en-fr.reference -i test.en-fr.translation`, with the -tok of the
  signature.

  Returns:
    BLEU, chrF and BLEU of Moses tokens (`bleu.scores`), over several directions
    their means and those of each; and under "signatures" how each is counted,
    in sacrebleu's words. No mean of what one of the directions lacks.
  """
  if not _translates(context):
    return {}
  say(f"translating the {split}")
  scores: dict[str, bleu.Scores] = {}
  for pairs in context.data.pairs[split]:
    direction, language = str(pairs.direction), pairs.direction.target
    lines = list(pairs.sources)
    found = context.translator.lines(params, lines, language)
    _write_lines(
      context.workdir / TRANSLATIONS, f"{split}.{direction}", pairs, found
    )
    scores[direction] = bleu.scores(found, list(pairs.targets), language)
    if scores[direction].doubt and processes.first():
      terminal.warn(f"{direction}: {scores[direction].doubt}")
  means, each, signatures = {}, {}, {}
  for name in ("bleu", "chrf", "moses_bleu"):
    values = {to: getattr(score, name) for to, score in scores.items()}
    if None not in values.values():
      means[name] = sum(values.values()) / len(values)
    each |= {f"{name}_{to}": v for to, v in values.items() if v is not None}
    how = {to: getattr(s, f"{name}_signature") for to, s in scores.items()}
    (signatures[name], *others) = dict.fromkeys(how.values())
    # Directions differ in theirs where languages are cut differently.
    if others:
      signatures[name] = ", ".join(f"{to} {said}" for to, said in how.items())
  if len(scores) > 1:
    for direction, score in scores.items():
      say(f"{direction}: {metrics.describe_scores(score._asdict())}")
    means |= each
  for name, signature in signatures.items():
    say(f"{name}: {signature}")
  return means | {"signatures": signatures}


def _write_lines(
  folder: files.Path, name: str, pairs: Pairs, found: Sequence[str]
) -> None:
  """Writes sources, references and translations, line by line."""
  sides = {
    "source": pairs.sources,
    "reference": pairs.targets,
    "translation": found,
  }

  def write():
    files.refuse_odd_in(folder, written=True)
    folder.mkdir(exist_ok=True)
    for side, lines in sides.items():
      # A break within a line of some corpus must not make two of it.
      content = "".join(" ".join(line.splitlines()) + "\n" for line in lines)
      files.write_whole(folder / f"{name}.{side}", content)

  processes.first_does(write)


AT_VALIDATION = {"perplexity": perplexity, "examples": examples}
AT_TEST = {"perplexity": perplexity, "translation": translation_eval}
