"""Word ids, and how they are packed, kept beside the corpus they are made of.

They are made once, by one process, which holds no more than a sentence of the
ids; every start after that, and every other process, maps them into memory.
"""

import functools
from collections.abc import Callable

import numpy as np

from moejax import terminal
from moejax.data import kept, text
from moejax.data.corpora import Records
from moejax.data.vocab import Vocabulary

_FOLDER = "word_ids"
# To be raised with any change of the ids that a text becomes: `vocab.words`,
# `vocab.tokens`, `Vocabulary.encode`, `text.write_tokens`.
_VERSION = 1
_TYPES = {"ids": np.int32, "lengths": np.int32}
# To be raised with any change of what `text.pack` returns.
_PACKING_VERSION = 1
_PACKING_TYPES = {"begin": np.int64, "length": np.int32, "first": np.int64}


def tokenise(
  texts: Records, vocabulary: Vocabulary, split: Callable[[str], list[str]]
) -> text.Tokens:
  """Returns what `text.tokenise` does; makes it where it is not kept.

  What is kept is found by the corpus, the split, the vocabulary and the name of
  `split`. It is whole or not there at all, and of several processes one makes
  it while the others wait. It is made anew where it is no more what was
  written, and in memory where nothing can be written or read.

  Args: as `text.tokenise`.

  Raises:
    ValueError: as `text.tokenise`, or an id is none of the vocabulary's.
  """

  def write(ids, lengths):
    terminal.warn(
      f"turning {len(texts):,} sentences into word ids (once), in {path}",
    )
    text.write_tokens(texts, vocabulary, split, ids, lengths)

  try:
    path = texts.folder / _FOLDER / _key(texts, vocabulary, split)
    arrays, digests = kept.keep(path, _TYPES, write)
  except OSError as error:
    kept.not_kept(f"word ids of {len(texts):,} sentences are made", error)
    tokens = text.tokenise(texts, vocabulary, split)
  else:
    tokens = text.Tokens(**arrays, digest=digests["ids"], folder=path)
  kept.check_ids(texts.split, tokens.ids, len(vocabulary), tokens.folder)
  return tokens


def pack(tokens: text.Tokens, row_length: int) -> text.Packing:
  """Returns what `text.pack` does; makes it where it is not kept.

  It is kept where word ids are, for each row_length. Else all is as for
  `tokenise`.

  Args, raises: as `text.pack`.
  """

  @functools.cache
  def make():
    return text.pack(tokens.lengths, row_length)

  if tokens.folder is None:
    return make()

  def write(*files):
    for file, array in zip(files, make(), strict=True):
      file.write(array)

  path = tokens.folder / f"packing_{_PACKING_VERSION}_{row_length}"
  try:
    arrays, _ = kept.keep(path, _PACKING_TYPES, write)
  except OSError as error:
    kept.not_kept(f"{len(tokens.lengths):,} sentences are packed", error)
    return make()
  return text.Packing(**arrays)


def _key(
  texts: Records, vocabulary: Vocabulary, split: Callable[[str], list[str]]
) -> str:
  words = vocabulary.decode(range(len(vocabulary)))
  return kept.key(texts.folder, _VERSION, texts.split, split.__name__, *words)
