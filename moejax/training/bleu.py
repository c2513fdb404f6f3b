"""BLEU and chrF, as the `sacrebleu` command computes and signs them.

And the paper's BLEU, of Moses tokens (`multi-bleu.perl`), by `sacremoses`.
"""

import importlib.metadata
import re
from collections.abc import Sequence
from typing import NamedTuple

from sacrebleu import metrics

from moejax.data import vocab


class Scores(NamedTuple):
  """How close translations come to their references, each from 0 to 100.

  A signature says in sacrebleu's words how a score was computed, or why there
  is none; the doubt, what speaks against the tokenizer that was taken.
  """

  bleu: float
  chrf: float
  bleu_signature: str
  chrf_signature: str
  doubt: str
  moses_bleu: float | None
  moses_bleu_signature: str


_DEFAULT = "13a"
# Of what is written without spaces what sacrebleu cuts it by: languages by ISO
# 639-1 and 639-3, scripts by ISO 15924. For Japanese it has better, which takes
# a dictionary. Korean has spaces.
_LANGUAGES = {
  "zh": "zh zho chi cmn yue wuu hak nan gan hsn cdo cjy cpx mnp czh czo lzh",
  "char": "ja jpn th tha tts nod sou lo lao km khm my mya bur shn mnw ksw rki"
  " bo bod tib dz dzo",
}
_SCRIPTS = {
  "zh": "hans hant hani",
  "char": "jpan hira kana hrkt thai laoo khmr mymr tibt lana talu tale java",
}
_OF_LANGUAGE, _OF_SCRIPT = (
  {name: cut for cut, names in table.items() for name in names.split()}
  for table in (_LANGUAGES, _SCRIPTS)
)


def tokenizer(language: str, references: Sequence[str]) -> tuple[str, str]:
  """Chooses what cuts text into words: "13a", "zh" or "char" of sacrebleu.

  The script decides that a language names, then the language, and where neither
  is known to go without spaces, that of most letters of the references.

  A language is called "zh", "zho", "zh_tw", "zh-Hans" or "cmn_Hant", or "" if
  it is not known. Returned is also what speaks against the tokenizer, or "".
  """
  first, *subtags = re.split("[-_]", language.lower())
  named = [tag for tag in subtags if len(tag) == 4 and tag.isalpha()]
  if named:
    cut = _OF_SCRIPT.get(named[0], _DEFAULT)
  else:
    cut = _OF_LANGUAGE.get(first, "")
  script = vocab.main_script("\n".join(references))
  chosen = cut or {"": _DEFAULT, "Han": "zh"}.get(script, "char")
  if script and cut in ("", _DEFAULT):
    has = f"are {script}, which is written without spaces"
  elif cut == "char" and not script:
    has = "are of a script with spaces"
  else:
    return chosen, ""
  return chosen, (
    f"the language is called {language!r}, but most letters of the references"
    f" {has}; BLEU cuts them by {chosen!r}"
  )


def scores(
  hypotheses: Sequence[str], references: Sequence[str], language: str = ""
) -> Scores:
  """Scores lines of plain text, one reference each; ValueError without any.

  sacrebleu cuts both into words by its "13a"; where there are no spaces between
  them, by what `tokenizer` chooses. The paper's BLEU (sec. 5.3) is another
  number, `moses_bleu`: Moses' tokenizer cuts both before, by the rules of the
  language, and sacrebleu takes what it finds between spaces.
  """
  if len(hypotheses) != len(references) or not references:
    raise ValueError(
      f"{len(hypotheses)} translations cannot be scored against"
      f" {len(references)} references; give one reference for each line"
    )
  cut, doubt = tokenizer(language, references)
  found, signatures = [], []
  for metric in (metrics.BLEU(tokenize=cut), metrics.CHRF()):
    score = metric.corpus_score(list(hypotheses), [list(references)])
    found.append(score.score)
    signatures.append(str(metric.get_signature()))
  return Scores(
    *found, *signatures, doubt, *_moses(hypotheses, references, language, cut)
  )


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
