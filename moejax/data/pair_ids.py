"""Ids of pairs, and how they are packed, kept beside the corpus.

As for `moejax.data.word_ids`: made once, by one process, and then mapped.
"""

import functools
from collections.abc import Sequence

import numpy as np

from moejax import terminal
from moejax.data import kept, mixture, translation
from moejax.data.corpora import Records
from moejax.data.pairs import Pairs
from moejax.data.pieces import Pieces

_FOLDER = "pair_ids"
# To be raised with any change of the ids that a pair becomes: `Pieces.encode`,
# `translation.write_tokens`.
_VERSION = 1
_TYPES = dict.fromkeys(translation.PairTokens._fields[:4], np.int32)
# To be raised with any change of what `translation.pack` returns.
_PACKING_VERSION = 1
_PACKING_TYPES = {
  "source_begin": np.int64,
  "source_length": np.int32,
  "target_begin": np.int64,
  "target_length": np.int32,
  "first": np.int64,
}


def rows(
  parts: Sequence[Pairs],
  pieces: Pieces,
  row_length: int,
  source_length: int,
  temperature: float = 1.0,
) -> mixture.Mixture:
  """Returns the rows of a split; tells of each direction what is left out.

  A source begins with the tag of its target's language where `pieces` has tags.

  Args:
    parts: the split's directions.
    pieces: gives the ids.
    row_length: target places L of a row.
    source_length: source places M of a row.
    temperature: of sampling, see `mixture.Mixture`.

  Raises:
    ValueError: a language has no tag where others have, or a direction has no
      pair that fits, or temperature is not above 0.
  """
  packed = []
  for pairs in parts:
    tokens = tokenise(pairs, pieces)
    packing = pack(tokens, row_length, source_length)
    if said := translation.left_out(tokens, packing, row_length, source_length):
      terminal.warn(f"{pairs.direction} {pairs.split}: {said}")
    packed.append(
      translation.PackedPairs(
        tokens, pieces, row_length, source_length, packing
      )
    )
  return mixture.Mixture(packed, temperature)


def tokenise(pairs: Pairs, pieces: Pieces) -> translation.PairTokens:
  """Returns what `translation.tokenise` does; keeps it for prepared corpora.

  What is kept is found by the corpus, the split, the sides, the pieces and the
  tag. Else all is as for `word_ids.tokenise`.

  Args, raises: as `rows`, `translation.tokenise` and `word_ids.tokenise`.
  """
  language = pairs.direction.target
  tag = pieces.tag(language) if pieces.languages else None
  if not isinstance(pairs.sources, Records):
    return translation.tokenise(pairs, pieces, tag)

  def write(*files):
    terminal.warn(
      f"turning {len(pairs.sources):,} pairs into word pieces (once), in"
      f" {path}",
    )
    translation.write_tokens(pairs, pieces, tag, *files)

  sides = pairs.sources.field, pairs.targets.field
  folder = pairs.sources.folder
  try:
    name = kept.key(
      folder, _VERSION, pairs.sources.split, *sides, pieces.digest, tag
    )
    path = folder / _FOLDER / name
    arrays, digests = kept.keep(path, _TYPES, write)
  except OSError as error:
    kept.not_kept(f"ids of {len(pairs.sources):,} pairs are made", error)
    tokens = translation.tokenise(pairs, pieces, tag)
  else:
    digest = translation.joined(digests[side] for side in _TYPES)
    tokens = translation.PairTokens(**arrays, digest=digest, folder=path)
  for ids in (tokens.source_ids, tokens.target_ids):
    what = f"{pairs.direction} {pairs.split}"
    kept.check_ids(what, ids, len(pieces), tokens.folder)
  return tokens


def pack(
  tokens: translation.PairTokens, row_length: int, source_length: int
) -> translation.PairPacking:
  """Returns what `translation.pack` does; keeps it where the ids are.

  It is kept for each row_length and source_length.

  Args, raises: as `translation.pack`.
  """

  @functools.cache
  def make():
    return translation.pack(tokens, row_length, source_length)

  if tokens.folder is None:
    return make()

  def write(*files):
    for file, array in zip(files, make(), strict=True):
      file.write(array)

  name = f"packing_{_PACKING_VERSION}_{row_length}_{source_length}"
  try:
    arrays, _ = kept.keep(tokens.folder / name, _PACKING_TYPES, write)
  except OSError as error:
    kept.not_kept(f"{len(tokens.source_lengths):,} pairs are packed", error)
    return make()
  return translation.PairPacking(**arrays)
