"""BLEU and chrF, as the `sacrebleu` command computes and signs them."""

from collections.abc import Sequence
from typing import NamedTuple

from sacrebleu import metrics


class Scores(NamedTuple):
  """How close translations come to their references, each from 0 to 100.

  Attributes:
    bleu: of the corpus.
    chrf: chrF2 of the corpus.
    bleu_signature: how it was computed, in sacrebleu's words.
    chrf_signature: the same of chrF.
  """

  bleu: float
  chrf: float
  bleu_signature: str
  chrf_signature: str


# Of languages written without spaces what sacrebleu cuts them by; it has better
# for Japanese, which takes a dictionary.
_TOKENIZERS = {"zh": "zh"} | dict.fromkeys(
  ("ja", "th", "lo", "km", "my"), "char"
)


def scores(
  hypotheses: Sequence[str], references: Sequence[str], language: str = ""
) -> Scores:
  """Scores lines of plain text, one reference each.

  sacrebleu cuts both into words by its "13a"; where a language has no spaces
  between them, by "zh" or "char". The paper's tokenised BLEU (multi-bleu.pl) is
  another number: that of text which has been tokenised before, with sacrebleu's
  tokenize="none".

  Args:
    hypotheses: translations.
    references: what they should be, line by line.
    language: of both, as "zh" or "zh_cn".

  Raises:
    ValueError: there are no lines, or not equally many.
  """
  if len(hypotheses) != len(references) or not references:
    raise ValueError(
      f"{len(hypotheses)} translations cannot be scored against"
      f" {len(references)} references; give one reference for each line"
    )
  tokenizer = _TOKENIZERS.get(language.lower().partition("_")[0], "13a")
  bleu, chrf = metrics.BLEU(tokenize=tokenizer), metrics.CHRF()
  found = [
    metric.corpus_score(list(hypotheses), [list(references)]).score
    for metric in (bleu, chrf)
  ]
  return Scores(*found, str(bleu.get_signature()), str(chrf.get_signature()))
