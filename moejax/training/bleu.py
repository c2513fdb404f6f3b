"""BLEU and chrF, as the `sacrebleu` command computes and signs them.

And the paper's BLEU, of Moses tokens (`multi-bleu.perl`), by `sacremoses`.
"""

import importlib.metadata
import re
from collections.abc import Sequence
from typing import NamedTuple

from sacrebleu import metrics

from moejax.data import vocab

_DEFAULT = "13a"


class Scores(NamedTuple):
  """How close translations come to their references, each from 0 to 100.

  A signature says in sacrebleu's words how a score was computed, or why there
  is none.
  """

  bleu: float
  chrf: float
  bleu_signature: str
  chrf_signature: str
  moses_bleu: float | None
  moses_bleu_signature: str


def scores(
  hypotheses: Sequence[str], references: Sequence[str], language: str = ""
) -> Scores:
  """Scores lines of plain text, one reference each; ValueError without any.

  sacrebleu cuts both into words by its "13a"; where most letters of the
  references are of a script without spaces, by its "zh" or "char". The paper's
  BLEU (sec. 5.3) is another number, `moses_bleu`: Moses' tokenizer cuts both
  before, by the rules of the language ("fr", "fr_CA"), and sacrebleu takes what
  it finds between spaces.
  """
  if len(hypotheses) != len(references) or not references:
    raise ValueError(
      f"{len(hypotheses)} translations cannot be scored against"
      f" {len(references)} references; give one reference for each line"
    )
  # For Japanese it has better, which takes a dictionary.
  script = vocab.main_script("\n".join(references))
  cut = {"": _DEFAULT, "Han": "zh"}.get(script, "char")
  found, signatures = [], []
  for metric in (metrics.BLEU(tokenize=cut), metrics.CHRF()):
    score = metric.corpus_score(list(hypotheses), [list(references)])
    found.append(score.score)
    signatures.append(str(metric.get_signature()))
  moses = _moses(hypotheses, references, language, cut)
  return Scores(*found, *signatures, *moses)


def _moses(
  hypotheses: Sequence[str], references: Sequence[str], language: str, cut: str
) -> tuple[float | None, str]:
  """Returns the BLEU of Moses tokens and its signature, or why there is none.

  It is unsmoothed, as that of `multi-bleu.perl`.
  """
  if cut != _DEFAULT:
    return None, "none, as Moses cuts words by spaces, which are not written"
  try:
    # Imported late: it is an extra.
    import sacremoses
  except ImportError:
    return None, "none, as sacremoses is not installed; see the extra 'moses'"
  # It knows languages by ISO 639-1, and takes those that it does not know for
  # English.
  code = re.split("[-_]", language.lower())[0] or "en"
  split = sacremoses.MosesTokenizer(code).tokenize
  translated, wanted = (
    [split(line, return_str=True) for line in lines]
    for lines in (hypotheses, references)
  )
  # By force, or it would warn that the text looks tokenized.
  bleu = metrics.BLEU(tokenize="none", smooth_method="none", force=True)
  score = bleu.corpus_score(translated, [wanted]).score
  version = importlib.metadata.version("sacremoses")
  return score, f"{bleu.get_signature()} on sacremoses {version}, {code!r}"
