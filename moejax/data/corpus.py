"""A corpus as a run reads it: a vocabulary, and rows of ids for each split."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import NamedTuple, Protocol, runtime_checkable

from moejax import files, terminal
from moejax.data import corpora, mixture, pair_ids, text, vocab, word_ids
from moejax.data.pairs import Pairs
from moejax.data.pieces import Pieces

# A text of words in which more are unknown, or fewer known, is doubted.
_MANY_UNKNOWN = 0.25
_FEW_WORDS = 100


@runtime_checkable
class Words(Protocol):
  """A vocabulary.

  Attributes:
    FILE: what it is called where a run keeps it.
    unknown: id of all that it does not have.
    digest: a short name that another vocabulary would not have.
  """

  FILE: str
  unknown: int
  digest: str

  def __len__(self) -> int:
    """Returns the number of ids."""

  def save(self, path: files.Path) -> None:
    """Writes it to a file, whole or not at all."""


@runtime_checkable
class Corpus(Protocol):
  """What a run learns from, and is measured on.

  Attributes:
    vocabulary: gives the ids.
    splits: names of its parts.
    batch_size: rows B of a batch, over all devices.
  """

  vocabulary: Words
  splits: Sequence[str]
  batch_size: int

  def rows(self, split: str) -> text.Rows:
    """Reads a split as rows of ids."""


class Sentences(NamedTuple):
  """A corpus of sentences in one language, for language models.

  Attributes:
    vocabulary: the words of the training split.
    texts: split -> its sentences.
    row_length: words L of a row.
    batch_size: rows B of a batch, over all devices. The paper counts a batch in
      words: that is B x L, of which packing leaves less than one in a hundred
      empty where rows are longer than most sentences.
    split_words: cuts a sentence into words.
  """

  vocabulary: vocab.Vocabulary
  texts: Mapping[str, Iterable[str]]
  row_length: int
  batch_size: int
  split_words: Callable[[str], list[str]] = vocab.words

  @property
  def splits(self) -> tuple[str, ...]:
    """Names of the parts."""
    return tuple(self.texts)

  def tokens(self, split: str) -> text.Tokens:
    """Reads a split as word ids; those of a prepared corpus are kept."""
    texts = self.texts[split]
    if isinstance(texts, corpora.Records):
      return word_ids.tokenise(texts, self.vocabulary, self.split_words)
    return text.tokenise(texts, self.vocabulary, self.split_words)

  def rows(self, split: str) -> text.PackedRows:
    """Packs a split into rows of word ids; how is kept where they are.

    Warns of words that are too few, or too often unknown, to be words.
    """
    tokens, texts = self.tokens(split), self.texts[split]
    if isinstance(texts, Sized) and len(texts) > len(tokens.lengths):
      terminal.warn(
        f"{split}: {len(texts) - len(tokens.lengths):,} of {len(texts):,}"
        " sentences left out, which have no words"
      )
    packing = word_ids.pack(tokens, self.row_length)
    rows = text.PackedRows(tokens, self.vocabulary, self.row_length, packing)
    if rows.unknown > _MANY_UNKNOWN or len(self.vocabulary) < _FEW_WORDS:
      terminal.warn(
        f"{split}: {rows.unknown:.0%} of {rows.num_words:,} words are unknown"
        f" to the vocabulary of {len(self.vocabulary):,}, so that perplexity"
        " says little; see that the text has spaces between words and is in the"
        " language trained on, give more of it, or lower config.data.min_count"
      )
    return rows


class Translations(NamedTuple):
  """A corpus of sentences and their translations.

  Attributes:
    vocabulary: word pieces of both sides.
    pairs: split -> what there is for each direction.
    row_length: word pieces L of a row's targets.
    source_length: word pieces M of a row's sources.
    batch_size: rows B of a batch, over all devices. The paper counts a batch in
      words of the target: that is B x L, of which packing leaves less than one
      in a hundred empty if the target fills its rows before the source does.
    temperature: of sampling directions in training, see `mixture.Mixture`.
  """

  vocabulary: Pieces
  pairs: Mapping[str, Sequence[Pairs]]
  row_length: int
  source_length: int
  batch_size: int
  temperature: float = 1.0

  @property
  def splits(self) -> tuple[str, ...]:
    """Names of the parts."""
    return tuple(self.pairs)

  def rows(self, split: str) -> mixture.Mixture:
    """Packs a split into rows of word pieces; they are kept where it is."""
    return pair_ids.rows(
      self.pairs[split],
      self.vocabulary,
      self.row_length,
      self.source_length,
      self.temperature,
    )
