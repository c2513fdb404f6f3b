"""BLEU and chrF, as the `sacrebleu` command computes and signs them."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from sacrebleu import metrics

from moejax.data import vocab


class Scores(NamedTuple):
  """How close translations come to their references, each from 0 to 100.

  Attributes:
    bleu: of the corpus.
    chrf: chrF2 of the corpus.
    bleu_signature: how it was computed, in sacrebleu's words.
    chrf_signature: the same of chrF.
    doubt: what speaks against the tokenizer that was taken; "" if nothing.
  """

  bleu: float
  chrf: float
  bleu_signature: str
  chrf_signature: str
  doubt: str


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
  """Scores lines of plain text, one reference each.

  sacrebleu cuts both into words by its "13a"; where there are no spaces between
  them, by what `tokenizer` chooses. The paper's tokenized BLEU (multi-bleu.pl)
  is another number: that of text which has been tokenized before, with
  sacrebleu's tokenize="none".

  Raises:
    ValueError: there are no lines, or not equally many.
  """
  if len(hypotheses) != len(references) or not references:
    raise ValueError(
      f"{len(hypotheses)} translations cannot be scored against"
      f" {len(references)} references; give one reference for each line"
    )
  cut, doubt = tokenizer(language, references)
  bleu, chrf = metrics.BLEU(tokenize=cut), metrics.CHRF()
  found = [
    metric.corpus_score(list(hypotheses), [list(references)]).score
    for metric in (bleu, chrf)
  ]
  signatures = str(bleu.get_signature()), str(chrf.get_signature())
  return Scores(*found, *signatures, doubt)
