"""Words of raw text, and the word vocabulary with its three special symbols."""

import collections
import hashlib
import re
from collections.abc import Iterable, Sequence

from moejax import files
from moejax.data import lines, scripts
from moejax.data.formats import Origin

END, START, UNKNOWN = "</S>", "<S>", "<UNK>"

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
  """Splits text that is tokenised, at spaces only; case is kept.

  A no-break space, at which `str.split` would cut too, is part of a word.
  """
  found = text.split(" ")
  return found if all(found) else [token for token in found if token]


# Letters of a word on average; more than in any language with spaces.
_LONG = 20


def doubt(text: str, origin: Origin) -> None:
  """Warns of text without spaces between what should be words.

  Args:
    text: what the origin begins with.
    origin: of the text.
  """
  script = scripts.main_script(text)
  if script and not scripts.is_cut(text, script):
    origin.doubted(
      f"is in a script without spaces between words ({script}), so whole"
      " sentences are taken for words",
      r"| perl -CSD -pe 's/\X/$& /g'",
    )
    return
  found = [word for word in words(text) if word[0].isalnum()]
  letters = sum(map(len, found)) / max(1, len(found))
  if letters > _LONG:
    joint = max("_-'’\u200b", key=text.count)
    origin.doubted(
      f"has words of {letters:.0f} letters on average",
      f"| perl -CSD -pe 's/\\x{{{ord(joint):x}}}/ /g'"
      if text.count(joint) >= len(found)
      else "put spaces between its words",
    )


class Vocabulary:
  """Words and their ids.

  Sampling classes log-uniformly (app. C.1) needs ids that fall with frequency,
  which those of `build` do.

  Attributes:
    end: id of `</S>`, which ends a sentence.
    start: id of `<S>`, which comes before a sentence.
    unknown: id of `<UNK>`, which every other word is read as.
    digest: a short name that another vocabulary would not have.
  """

  # What it is called where a run keeps it.
  FILE = "vocab.txt"

  def __init__(self, entries: Sequence[str]):
    """Makes the vocabulary whose entry i has id i.

    Args:
      entries: `</S>`, `<S>`, `<UNK>` and the words, in any order.

    Raises:
      ValueError: a special symbol is missing or an entry occurs twice.
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
      counts = collections.Counter(self._entries)
      twice = next(entry for entry in counts if counts[entry] > 1)
      raise ValueError(
        f"the vocabulary of {len(self._entries)} entries holds only"
        f" {len(ids)} different ones; {twice!r} occurs more than once"
      )
    # Text that spells out a special symbol must not turn into one.
    self.end, self.start = ids.pop(END), ids.pop(START)
    self.unknown = ids.pop(UNKNOWN)
    self._ids = ids
    everything = "\n".join(self._entries).encode()
    self.digest = hashlib.blake2b(everything, digest_size=8).hexdigest()

  @classmethod
  def build(
    cls, texts: Iterable[str], min_count: int, max_size: int | None = None
  ) -> "Vocabulary":
    """Counts the words of raw texts and numbers them by falling count.

    `</S>` is 0, `<S>` is 1, `<UNK>` is 2; words of equal count are in
    alphabetical order.

    Args:
      texts: raw prose.
      min_count: words seen less often become `<UNK>`.
      max_size: entries to keep at most, the three special ones counted.

    Raises:
      ValueError: no word is frequent enough.
    """
    counts = collections.Counter()
    for text in texts:
      counts.update(words(text))
    for special in (END, START, UNKNOWN):
      counts.pop(special, None)
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    kept = [word for word, count in ranked if count >= min_count]
    if not kept:
      most = ranked[0][1] if ranked else 0
      raise ValueError(
        f"no word occurs min_count={min_count} times, the most frequent one"
        f" {most} times; lower min_count or give more text"
      )
    return cls([END, START, UNKNOWN, *kept][:max_size])

  @classmethod
  def load(cls, path: files.Path) -> "Vocabulary":
    """Reads a file of one entry a line; the line number is the id.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no text in UTF-8, or a special symbol is missing or an
        entry occurs twice.
    """
    lines.check(path)
    # Marks of byte order inside are of entries, as an older text has them.
    entries = [
      line.removesuffix("\n").removesuffix("\r")
      for _, line in lines.as_written(path)
    ]
    entries[:1] = [entry.removeprefix("\ufeff") for entry in entries[:1]]
    try:
      return cls(entries)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from None

  def save(self, path: files.Path) -> None:
    """Writes one entry a line, whole or not at all."""
    text = "".join(f"{entry}\n" for entry in self._entries)
    files.write_whole(path, text)

  def encode(self, words: Iterable[str]) -> list[int]:
    """Returns the id of each word; no word becomes `</S>` or `<S>`."""
    ids, unknown = self._ids, self.unknown
    return [ids.get(word, unknown) for word in words]

  def decode(self, ids: Iterable[int]) -> list[str]:
    """Returns the entry of each id."""
    return [self._entries[i] for i in ids]

  def __len__(self) -> int:
    return len(self._entries)
