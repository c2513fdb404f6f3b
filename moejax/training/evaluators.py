"""What is measured of a run: at its validations, at its test, by `moejax eval`.

An evaluator takes (context, params, split, say), may say lines, and returns
values by name. Numbers among them go into the metrics. A new one is an entry in
`AT_VALIDATION` or `AT_TEST`.
"""

import collections
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from moejax import files, sharding, terminal
from moejax.data import batches as batches_lib
from moejax.data import corpora
from moejax.data.packing import Pairs, Rows
from moejax.data.pieces import Pieces
from moejax.training import bleu, decode, metrics, processes, session, step

TRANSLATIONS = "translations"
Values = dict[str, Any]
Say = Callable[[str], object]
Evaluator = Callable[["Context", Any, str, Say], Values]
# Sentences shown at a validation, and words that are worth a look.
_SHOWN = 3
_WORDS = 4


class Context:
  """What evaluators read; it costs nothing before somebody asks.

  ValueError where a model cannot be measured so.

  Attributes:
    session: an experiment on devices.
    data: its corpus.
    workdir: of the run.
    rows: split -> its rows, which are read once.
    size_of_text: split -> its words and bytes, which are counted once.
    translator: translates by beam search; None for a language model.
  """

  def __init__(
    self, built: session.Session, data: corpora.Corpus, workdir: files.Path
  ):
    self.session, self.data, self.workdir = built, data, workdir
    self.rows = functools.cache(data.rows)
    self.size_of_text = functools.cache(
      lambda split: data.size_of_text(split, self.rows(split))
    )
    self.translator = None
    if built.experiment.translates:
      self.translator = Translator(built, data.vocabulary)

  @functools.cached_property
  def losses(self) -> Callable[[Any, Rows], dict[str, float]]:
    """See `losses_of`; of as many rows at once as a microbatch has."""
    built = self.session
    rows = built.experiment.rows_at_once
    return losses_of(built.model, rows, built.layout, built.mesh)

  @functools.cached_property
  def identity(self) -> dict[str, str]:
    """The digest of each split of the text."""
    return {split: self.rows(split).digest for split in self.data.splits}


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
  """Returns what `losses_of` does of a split (docs/decisions.md, 22).

  And of a language model what compares models of other tokens: the perplexity
  per word and the bits per byte of UTF-8, of the same loss over all of the text
  (`Corpus.size_of_text`).
  """
  del say
  values = context.losses(params, context.rows(split))
  if not context.translator:
    words, num_bytes = context.size_of_text(split)
    # 1 exactly for words, so that both perplexities are the same.
    tokens_of_word = values["words"] / words
    nats = values["loss"] * values["words"]
    values["word_perplexity"] = exp(values["loss"] * tokens_of_word)
    values["bits_per_byte"] = nats / math.log(2) / num_bytes
  return values


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
  ValueError where the rows do not divide over the devices; FloatingPointError,
  when called, for a loss that is not finite.
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


class Translator:
  """Translates lines of text, whatever the parameters of the model.

  A line's translation depends on no other: the model's mixtures drop nothing
  here (`GNMT.for_decoding`). All processes give it the same lines, and each
  gets all of them.
  """

  def __init__(
    self, built: session.Session, pieces: Pieces, beam: int = 8, **search: Any
  ):
    """Compiles nothing yet; ValueError for rows or a beam too small.

    It follows as many hypotheses at once, in whole beams, as a microbatch has
    rows. Of `search` see `decode.beam_search`.
    """
    self._session, self._pieces = built, pieces
    self._source_length = built.shapes["source"].shape[1]
    # Here, as else training would only fail when it first shows examples.
    batches_lib.check_length(self._source_length)
    decode.check_beam(beam)
    devices = built.mesh.size
    at_once = -(-built.experiment.rows_at_once // (beam * devices)) * devices
    self._batch_size = at_once
    model = built.model.for_decoding()

    @sharding.zero3
    def run(params, source, segment, source_start):
      apply = functools.partial(model.apply, {"params": params})
      return decode.beam_search(
        functools.partial(apply, method="step"),
        apply(source, segment, source_start, method="encode"),
        model.begin(source.shape[0], decode.longest(source.shape[1])),
        segment > 0,
        start=pieces.start,
        end=pieces.end,
        beam=beam,
        **search,
      )

    # Compiled once for each shape of a batch.
    whole = sharding.whole_sharding(built.mesh)
    self._run = jax.jit(run, out_shardings=whole)

  def tag(self, language: str) -> int | None:
    """Returns what a source begins with to be translated into a language.

    ValueError where there are several languages, and it is none of them.
    """
    return self._pieces.tag(language) if self._pieces.languages else None

  def find(
    self, params: Any, batch: batches_lib.SourceRows
  ) -> decode.Hypotheses:
    """Returns the hypotheses of each row, on all devices."""
    layout, mesh = self._session.layout, self._session.mesh
    where = sharding.batch_sharding(layout, mesh, len(batch.source))
    source = (
      jax.make_array_from_callback(rows.shape, where, rows.__getitem__)
      for rows in (batch.source, batch.source_segment, batch.source_start)
    )
    with sharding.use(layout, mesh):
      return self._run(params, *source)

  def lines(
    self,
    params: Any,
    texts: Sequence[str],
    language: str,
    advance: Callable[[int], object] = lambda rows: None,
  ) -> list[str]:
    """Translates each line by itself, and keeps their order; errors as `tag`.

    One without words becomes "". `advance` is told after each batch how many
    parts of lines it had.
    """
    # Of each line its parts, which may come in any order.
    found: list[dict[int, str]] = [{} for _ in texts]
    for batch in batches_lib.source_rows(
      self._pieces,
      texts,
      self._source_length,
      self._batch_size,
      self.tag(language),
    ):
      best = jax.device_get(self.find(params, batch))
      real = np.flatnonzero(batch.line >= 0).tolist()
      for row in real:
        ids = best.ids[row, 0, : best.lengths[row, 0]].tolist()
        # A model may write a line break, which must not make two lines of one.
        text = " ".join(self._pieces.decode(ids).splitlines())
        found[batch.line[row]][int(batch.part[row])] = text
      advance(len(real))
    return [" ".join(text for _, text in sorted(of.items())) for of in found]


def examples(context: Context, params: Any, split: str, say: Say) -> Values:
  """Says a few sentences, always the same, with both translations.

  They are from all over the text, of some length, and of every direction.
  """
  parts = context.data.pairs[split] if context.translator else ()
  for pairs in parts:
    sources, count, places = pairs.sources, -(-_SHOWN // len(parts)), []
    for part in range(count):
      begin, end = (len(sources) * (part + n) // count for n in (0, 1))
      long = (i for i in range(begin, end) if len(sources[i].split()) >= _WORDS)
      if begin < end:
        places.append(next(long, begin))
    lines, direction = [sources[at] for at in places], pairs.direction
    found = context.translator.lines(params, lines, direction.target)
    for at, source, translation in zip(places, lines, found, strict=True):
      for side, line in (
        (direction.source, source),
        (direction.target, pairs.targets[at]),
        ("model", translation),
      ):
        say(f"  {side}: {terminal.one_line(line)}")
  return {}


def translation_eval(
  context: Context, params: Any, split: str, say: Say
) -> Values:
  """Translates a whole split and compares it with the references.

  The workdir gets the lines of each direction, for people and for `sacrebleu
  test.en-fr.reference -i test.en-fr.translation`, with the -tok of the
  signature.

  Returned are BLEU, chrF and BLEU of Moses tokens (`bleu.scores`), over several
  directions their means and those of each; and under "signatures" how each is
  counted. There is no mean of what one of the directions lacks.
  """
  if not context.translator:
    return {}
  say(f"translating the {split}")
  scores: dict[str, bleu.Scores] = {}
  for pairs in context.data.pairs[split]:
    direction, language = str(pairs.direction), pairs.direction.target
    lines = list(pairs.sources)
    found = context.translator.lines(params, lines, language)
    _write_lines(context.workdir, f"{split}.{direction}", pairs, found)
    scores[direction] = bleu.scores(found, list(pairs.targets), language)
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
  workdir: files.Path, name: str, pairs: Pairs, found: Sequence[str]
) -> None:
  folder = workdir / TRANSLATIONS
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
