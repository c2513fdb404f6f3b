"""How well a run translates what its corpus holds out, and how it looks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moejax import files, terminal
from moejax.data.packing import Pairs
from moejax.training import bleu, processes
from moejax.training.translate import Translator

# Sentences shown at a validation, and words that are worth a look.
_SHOWN = 3
_WORDS = 4


def examples(
  translator: Translator, params: Any, parts: Sequence[Pairs]
) -> Iterator[str]:
  """Yields a few sentences, always the same, with both translations.

  Args:
    translator: of the run.
    params: of the model.
    parts: the directions of a split; each gives at least one.
  """
  each = -(-_SHOWN // len(parts))
  for pairs in parts:
    chosen = list(_spread(pairs.sources, each))
    sources = [pairs.sources[index] for index in chosen]
    found = translator.lines(params, sources, pairs.direction.target)
    for index, source, translation in zip(chosen, sources, found, strict=True):
      for side, line in (
        (pairs.direction.source, source),
        (pairs.direction.target, pairs.targets[index]),
        ("model", translation),
      ):
        yield f"  {side}: {terminal.one_line(line)}"


def _spread(sources: Sequence[str], count: int) -> Iterator[int]:
  """Yields places all over the text, of sentences rather than of words."""
  for part in range(count):
    begin, end = (len(sources) * (part + more) // count for more in (0, 1))
    inside = range(begin, end)
    long = (i for i in inside if len(sources[i].split()) >= _WORDS)
    if inside:
      yield next(long, begin)


def scores(
  translator: Translator,
  params: Any,
  parts: Sequence[Pairs],
  stem: files.Path,
) -> tuple[dict[str, float], Mapping[str, str]]:
  """Translates whole splits and compares them with the references.

  Args:
    translator: of the run.
    params: of the model.
    parts: the directions of a split.
    stem: of the files that keep the lines of each direction, for people and
      for `sacrebleu STEM.en-fr.reference -i STEM.en-fr.translation`, with
      the -tok of the signature.

  Returns:
    BLEU and chrF, over several directions their means and those of each; and
    the signatures of both, which say how they are counted.
  """
  values: dict[str, float] = {}
  signatures: dict[str, dict[str, str]] = {"bleu": {}, "chrf": {}}
  for pairs in parts:
    language = pairs.direction.target
    found = translator.lines(params, list(pairs.sources), language)
    _keep(stem.with_name(f"{stem.name}.{pairs.direction}"), pairs, found)
    score = bleu.scores(found, list(pairs.targets), language)
    values[f"bleu_{pairs.direction}"] = score.bleu
    values[f"chrf_{pairs.direction}"] = score.chrf
    signatures["bleu"][str(pairs.direction)] = score.bleu_signature
    signatures["chrf"][str(pairs.direction)] = score.chrf_signature
    if score.doubt and processes.first():
      terminal.warn(f"{pairs.direction}: {score.doubt}")
  means = {
    name: sum(v for n, v in values.items() if n.startswith(name)) / len(parts)
    for name in signatures
  }
  said = {}
  for name, of in signatures.items():
    (said[name], *others) = dict.fromkeys(of.values())
    # Directions differ in theirs where languages are cut differently.
    if others:
      said[name] = ", ".join(f"{way} {how}" for way, how in of.items())
  return (means | values if len(parts) > 1 else means), said


def _keep(stem: files.Path, pairs: Pairs, found: Sequence[str]) -> None:
  """Writes sources, references and translations, line by line."""
  sides = {
    "source": pairs.sources,
    "reference": pairs.targets,
    "translation": found,
  }

  def write():
    files.refuse_odd_in(stem.parent, written=True)
    stem.parent.mkdir(exist_ok=True)
    for side, lines in sides.items():
      # A break within a line of some corpus must not make two of it.
      content = "".join(" ".join(line.splitlines()) + "\n" for line in lines)
      files.write_whole(stem.with_name(f"{stem.name}.{side}"), content)

  processes.first_does(write)
