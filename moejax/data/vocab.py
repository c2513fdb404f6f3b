"""Sentences and words of raw text, and the word vocabulary."""

import collections
import re
from collections.abc import Iterable, Sequence

from moejax import files
from moejax.data import cache, text_files
from moejax.data.formats import Origin

END, START, UNKNOWN = "</S>", "<S>", "<UNK>"

# -- sentences ----------------------------------------------------------------

_BOUNDARY = re.compile(r"""[.!?]["'”’)\]]*\s+(?=["'“‘(\[]*[A-Z0-9$])""")
# Looked for in the last letters of a candidate, with the one that comes after:
# in all of them it would take the square of the length.
_TAIL = 100
_ABBREVIATION = re.compile(
  r"\b(?:(?:Mr|Mrs|Ms|Messrs|Dr|Prof|Rev|Hon|St|Jr|Sr|Gen|Brig|Maj|Col|Capt"
  r"|Lieut|Lt|Gov|Sen|Rep|Esq|vs|[^\W\d_](?:\.[^\W\d_])*)\.\s+\S"
  r"|(?:[Nn]os?|[Aa]rt|[Ss]ecs?)\.\s+\d)$"
)


def sentences(text: str) -> list[str]:
  """Splits prose into sentences; a blank line always ends one."""
  found = []
  for paragraph in re.split(r"\n\s*\n", text):
    paragraph = " ".join(paragraph.split())
    begin = seen = 0
    lettered = False
    for boundary in _BOUNDARY.finditer(paragraph):
      end = boundary.end()
      # "1." and "(2)" number what follows them.
      lettered |= any(letter.isalpha() for letter in paragraph[seen:end])
      seen = end
      last = paragraph[max(begin, end - _TAIL) : end + 1]
      if not lettered or _ABBREVIATION.search(last):
        continue
      found.append(paragraph[begin:end].rstrip())
      begin, lettered = end, False
    if begin < len(paragraph):
      found.append(paragraph[begin:])
  return found


# -- words --------------------------------------------------------------------

# Told by what is no letter, so that combining marks, which \w leaves out, stay
# inside their word.
_PUNCTUATION = (
  r"\x00-/:-@\[-`{-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf\xd7\xf7"
  r"\u2010-\u205f\u20a0-\u20cf\u2190-\u2bff\u3000-\u303f\uff01-\uff0f"
)
_LETTERS = rf"[^\s{_PUNCTUATION}]+"
_WORD = re.compile(
  r"(?:[^\W\d_]\.){2,}"  # U.S.
  r"|\d+(?:[.,]\d+)+"  # 1,234.56
  rf"|{_LETTERS}(?:['’_-]{_LETTERS})*"  # don't, twenty-one
  r"|\.{2,}|-{2,}"
  r"|\S"
)


def words(text: str) -> list[str]:
  """Splits raw prose into words and punctuation marks; case is kept."""
  return _WORD.findall(text)


def tokens(text: str) -> list[str]:
  """Splits text that is tokenized, at spaces only; case is kept.

  A no-break space, at which `str.split` would cut too, is part of a word.
  """
  return [token for token in text.split(" ") if token]


# -- scripts without spaces between words -------------------------------------

# Letters of each by Unicode's blocks; marks on letters are among them.
_BLOCKS = {
  "Han": "々〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af",
  "Kana": "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f",
  "Thai": "\u0e01-\u0e3a\u0e40-\u0e4e",
  "Lao": "\u0e81-\u0edf",
  "Tibetan": "\u0f00-\u0fff",
  "Burmese": "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f",
  "Khmer": "\u1780-\u17ff",
  "Tai": "\u1950-\u19df\u1a20-\u1aaf",
  "Javanese": "\ua980-\ua9df",
}
_RUN = re.compile("|".join(f"(?P<{n}>[{b}]+)" for n, b in _BLOCKS.items()))
# Letters of a word on average; more than in any language with spaces.
_LONG = 20


def main_script(text: str) -> str:
  """Names the script of most letters, if it goes without spaces; else "".

  Japanese is "Kana", though most of its letters may be Han.
  """
  counts: collections.Counter[str] = collections.Counter()
  for run in _RUN.finditer(text):
    counts[run.lastgroup or ""] += len(run[0])
  # Marks are letters above, and none to \w.
  others = len(re.findall(r"[^\W\d_]", _RUN.sub("", text)))
  if not counts or counts.total() <= others:
    return ""
  if counts["Kana"] > 0.1 * counts.total():
    return "Kana"
  return counts.most_common(1)[0][0]


def doubt(text: str, origin: Origin) -> None:
  """Warns of a text's begin without spaces between what should be words."""
  if script := main_script(text):
    # Words of Han and Kana have one letter or two; those of the others, with
    # their marks, about five.
    most = 3 if script in ("Han", "Kana") else 8
    runs = re.findall(f"[{''.join(_BLOCKS.values())}]+", text)
    if sum(map(len, runs)) > most * len(runs):
      origin.doubted(
        f"is in a script without spaces between words ({script}), so whole"
        " sentences are taken for words",
        r"| perl -CSD -pe 's/\X/$& /g'",
      )
      return
  found = [word for word in words(text) if word[0].isalnum()]
  letters = sum(map(len, found)) / max(1, len(found))
  if letters > _LONG:
    origin.doubted(
      f"has words of {letters:.0f} letters on average",
      "put spaces between its words",
    )


# -- vocabulary ---------------------------------------------------------------


class Vocabulary:
  """Words and their ids.

  Sampling classes log-uniformly (app. C.1) needs ids that fall with frequency,
  which those of `build` do.

  Attributes:
    end: id of `</S>`, which ends a sentence.
    start: id of `<S>`, which comes before a sentence.
    unknown: id of `<UNK>`, which every other word is read as.
    special: ids that no word becomes.
    digest: a short name that another vocabulary would not have.
  """

  FILE = "vocab.txt"  # where a run keeps it
  UNIT = "word"  # what a token is
  languages = ()  # tags, as pieces may have
  split = staticmethod(words)

  def __init__(self, entries: Sequence[str]):
    """Makes the vocabulary whose entry i has id i, special symbols included.

    ValueError where a special symbol is missing or an entry occurs twice.
    """
    self._entries = tuple(entries)
    ids = {entry: i for i, entry in enumerate(self._entries)}
    for special in (END, START, UNKNOWN):
      if special not in ids:
        raise ValueError(
          f"the vocabulary of {len(self._entries)} entries lacks {special};"
          " add it as an entry of its own"
        )
    if len(ids) < len(self._entries):
      ((twice, _),) = collections.Counter(self._entries).most_common(1)
      raise ValueError(
        f"{twice!r} occurs more than once in the vocabulary of"
        f" {len(self._entries)} entries"
      )
    # Text that spells out a special symbol must not turn into one.
    self.end, self.start = ids.pop(END), ids.pop(START)
    self.unknown = ids.pop(UNKNOWN)
    self.special = frozenset([self.end, self.start])
    self._ids = ids
    self.digest = cache.joined(self._entries)

  @classmethod
  def build(cls, texts: Iterable[str], min_count: int) -> "Vocabulary":
    """Numbers the words of raw texts by falling count, then by the alphabet.

    `</S>` is 0, `<S>` is 1, `<UNK>` is 2, as words are that are seen less than
    min_count times; ValueError where no word is frequent enough.
    """
    counts = collections.Counter(w for text in texts for w in words(text))
    for special in (END, START, UNKNOWN):
      counts.pop(special, None)
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    frequent = [word for word, count in ranked if count >= min_count]
    if not frequent:
      most = ranked[0][1] if ranked else 0
      raise ValueError(
        f"no word occurs min_count={min_count} times, the most frequent one"
        f" {most} times; lower min_count or give more text"
      )
    return cls([END, START, UNKNOWN, *frequent])

  @classmethod
  def load(cls, path: files.Path) -> "Vocabulary":
    """Reads a file of one entry a line; the line number is the id.

    ValueError where it is no text in UTF-8, or no vocabulary.
    """
    text_files.check(path)
    entries = list(text_files.lines(path))
    try:
      return cls(entries)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from None

  def save(self, path: files.Path) -> None:
    """Writes one entry a line, whole or not at all."""
    files.write_whole(path, "".join(f"{entry}\n" for entry in self._entries))

  def encode(self, words: Iterable[str]) -> list[int]:
    """Returns the id of each word; no word becomes `</S>` or `<S>`."""
    ids, unknown = self._ids, self.unknown
    return [ids.get(word, unknown) for word in words]

  def encode_all(self, texts: Iterable[str]) -> list[list[int]]:
    """Returns the ids of the words of each text."""
    return [self.encode(self.split(text)) for text in texts]

  def decode(self, ids: Iterable[int]) -> list[str]:
    """Returns the entry of each id."""
    return [self._entries[i] for i in ids]

  def spelt(self, id: int) -> str:
    """Returns the entry of an id."""
    return self._entries[id]

  def __len__(self) -> int:
    return len(self._entries)


class TokenizedVocabulary(Vocabulary):
  """A vocabulary of text that is tokenized, as that of lm1b is."""

  split = staticmethod(tokens)
