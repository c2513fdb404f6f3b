"""Word pieces: one vocabulary for source and target (sec. 5.3, app. E)."""

import io
import random
import re
from collections.abc import Iterable, Sequence

import sentencepiece

from moejax import files, terminal
from moejax.data import cache

# What it is trained on is at most so many sentences, drawn evenly, and of each
# so many letters: sentencepiece leaves out what is longer than 4192 bytes.
_SAMPLE = 1_000_000
_LETTERS = 1000
_TAG = re.compile(r"<2([^<>]+)>")
# sentencepiece reads U+2581 as a space and learns nothing from sentences with
# U+2585, or pieces with NUL. In their place it gets what Unicode keeps out of
# text.
_STAND_INS = {0: 0xFDD0, 0x2581: 0xFDD1, 0x2585: 0xFDD5}
_TEXTS = {inside: outside for outside, inside in _STAND_INS.items()}


class Pieces:
  """Pieces of words and their ids; any text becomes pieces and comes back.

  But for spaces: several become one, and those at the ends are dropped. What
  has no piece is spelt in bytes. No text turns into a special piece.

  Attributes:
    unknown: id of `<unk>`, 0, which no text becomes.
    start: id of `<s>`, 1, which comes before a target.
    end: id of `</s>`, 2, which ends a source or a target.
    languages: those that have a tag.
    special: ids that no text becomes.
    digest: a short name that other pieces would not have.
  """

  FILE = "pieces.model"
  UNIT = "word piece"

  def __init__(self, model: bytes):
    """Takes a model of sentencepiece; ValueError for other special pieces."""
    self._processor = processor = sentencepiece.SentencePieceProcessor()
    try:
      parsed = model and processor.LoadFromSerializedProto(model)
    except RuntimeError:
      parsed = False
    if not parsed:
      raise ValueError("this is no sentencepiece model")
    special = processor.unk_id(), processor.bos_id(), processor.eos_id()
    self.unknown, self.start, self.end = special
    if special != (0, 1, 2):
      raise ValueError(
        f"this sentencepiece model of {len(self)} pieces has <unk>, <s> and"
        f" </s> as {special}, where 0, 1 and 2 are wanted; train it by"
        " Pieces.train"
      )
    self._model = model
    self.digest = cache.digest(model)
    self._tags = {
      found[1]: i
      for i in filter(processor.is_control, range(len(self)))
      if (found := _TAG.fullmatch(processor.id_to_piece(i)))
    }
    self.languages = tuple(self._tags)
    self.special = frozenset([*special, *self._tags.values()])

  @classmethod
  def train(
    cls, texts: Iterable[str], size: int, languages: Sequence[str] = ()
  ) -> "Pieces":
    """Finds the pieces of raw texts, by byte pair encoding.

    Of more than a million texts a million are used, always the same, and of
    each the first thousand letters; it says so. The size counts special pieces,
    tags of languages and 256 bytes; ValueError where it is too large for the
    text, or too small for its letters.
    """
    sample, count, long, rng = [], 0, 0, random.Random(0)
    for text in texts:
      begin = text[:_LETTERS].translate(_STAND_INS)
      if not begin.strip():
        continue
      count += 1
      long += len(text) > _LETTERS
      if count <= _SAMPLE:
        sample.append(begin)
      elif (place := rng.randrange(count)) < _SAMPLE:
        sample[place] = begin
    if not sample:
      raise ValueError("word pieces are learned from text; got 0 sentences")
    if long or count > len(sample):
      terminal.warn(
        f"word pieces are learned from {len(sample):,} of {count:,} sentences,"
        f" and from the first {_LETTERS:,} letters of {long:,} that are longer"
      )
    model = io.BytesIO()
    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample),
        model_writer=model,
        vocab_size=size,
        # Counts, where unigram sums floats in an order that depends on threads.
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        control_symbols=[f"<2{language}>" for language in languages],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
      )
    except RuntimeError as error:
      # It says which size would do.
      said = str(error)
      if most := re.search(r"value <= (\d+)", said):
        said = f"the text is too little; give more, or {most[1]} or less"
      elif least := re.search(r"\d+ vs (\d+)", said):
        said = f"the text has too many letters; give {least[1]} or more"
      raise ValueError(f"vocab_size={size} word pieces: {said}") from None
    return cls(model.getvalue())

  @classmethod
  def load(cls, path: files.Path) -> "Pieces":
    """Reads a file that `save` wrote; ValueError where it is none."""
    try:
      return cls(files.read(path))
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from None

  def save(self, path: files.Path) -> None:
    """Writes the model, whole or not at all."""
    files.write_whole(path, self._model)

  def __len__(self) -> int:
    return len(self._processor)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text; no special one is among them."""
    return self._processor.encode(text.translate(_STAND_INS))

  def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns what `encode` does for each text, by all cores."""
    return self._processor.encode([t.translate(_STAND_INS) for t in texts])

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids; special ones are left out."""
    shown = [int(i) for i in ids if int(i) not in self.special]
    return self._processor.decode(shown).translate(_TEXTS)

  def spelt(self, id: int) -> str:
    """Returns what stands for a piece: "▁" for a space, "<0xE2>" for a byte."""
    return self._processor.id_to_piece(id).translate(_TEXTS)

  def tag(self, language: str) -> int:
    """Returns the id of the piece that asks for a language; "-" is as "_".

    ValueError where it was not trained.
    """
    found = self._tags.get(language, self._tags.get(language.replace("-", "_")))
    if found is None:
      trained = ", ".join(self.languages) or "none, as there was one target"
      raise ValueError(
        f"language {language!r} was not trained; those that were: {trained}"
      )
    return found
