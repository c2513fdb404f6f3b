"""Translation batches: whole pairs packed into rows.

A target place attends to the source places of its own pair only, so a row of
several pairs trains as they would alone, and all batches are of one shape.
"""

import array
import hashlib
import io
import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int32, Int64

from moejax.data import text
from moejax.data.pairs import Pairs
from moejax.data.pieces import Pieces

# The arrays of a row, see `PackedPairs`: of row_length and of source_length.
TARGET_TYPES = text.TYPES | {"segment": np.int32}
SOURCE_TYPES = {
  "source": np.int32,
  "source_start": np.bool_,
  "source_segment": np.int32,
}

# Pairs that become ids at once, and that are packed into rows of their own.
_BLOCK = 10_000
# A piece and `</s>`, the least that a pair takes on either side.
_LEAST = 2


class PairTokens(NamedTuple):
  """Pairs as ids of pieces, four bytes each.

  Attributes:
    source_ids: all sources one after the other, each after its tag where there
      is one and closed by `</s>`.
    source_lengths: ids of each, tag and `</s>` counted. 0 where either side of
      the pair is empty; it then has no ids at all.
    target_ids: all targets, each closed by `</s>`.
    target_lengths: ids of each, as above.
    digest: of all ids, a short name that other pairs would not have.
    folder: where they are kept, and what is made of them may be; None if not.
  """

  source_ids: Int32[np.ndarray, "source_pieces"]
  source_lengths: Int32[np.ndarray, "pairs"]
  target_ids: Int32[np.ndarray, "target_pieces"]
  target_lengths: Int32[np.ndarray, "pairs"]
  digest: str
  folder: pathlib.Path | None = None


class PairPacking(NamedTuple):
  """Which pairs make which row.

  Attributes:
    source_begin: where the source of each pair begins among all ids; rows in
      order.
    source_length: ids of it.
    target_begin: where its target begins.
    target_length: ids of it.
    first: row r is made of the pairs first[r] to first[r + 1].
  """

  source_begin: Int64[np.ndarray, "pairs"]
  source_length: Int32[np.ndarray, "pairs"]
  target_begin: Int64[np.ndarray, "pairs"]
  target_length: Int32[np.ndarray, "pairs"]
  first: Int64[np.ndarray, "rows_1"]


def tokenise(pairs: Pairs, pieces: Pieces, tag: int | None) -> PairTokens:
  """Turns pairs into ids.

  Args:
    pairs: sentences and their translations.
    pieces: gives the ids.
    tag: the id that comes first in each source, if any.

  Raises:
    ValueError: every pair has an empty side.
  """
  written = [io.BytesIO() for _ in range(4)]
  write_tokens(pairs, pieces, tag, *written)
  arrays = [np.frombuffer(each.getbuffer(), np.int32) for each in written]
  return PairTokens(*arrays, digest=joined(map(text.digest, arrays)))


def joined(digests: Iterable[str]) -> str:
  """Returns one digest for several."""
  everything = "\n".join(digests).encode()
  return hashlib.blake2b(everything, digest_size=8).hexdigest()


def write_tokens(
  pairs: Pairs,
  pieces: Pieces,
  tag: int | None,
  source_ids: io.BufferedIOBase,
  source_lengths: io.BufferedIOBase,
  target_ids: io.BufferedIOBase,
  target_lengths: io.BufferedIOBase,
) -> None:
  """Writes what `tokenise` returns to four files, holding little of it."""
  first = [] if tag is None else [tag]
  empty = True
  for sources, targets in _blocks(pairs):
    encoded = map(pieces.encode_all, (sources, targets))
    for source, target in zip(*encoded, strict=True):
      if source and target:
        source, target = [*first, *source, pieces.end], [*target, pieces.end]
        empty = False
      else:
        source, target = [], []
      source_ids.write(array.array("i", source))
      source_lengths.write(array.array("i", [len(source)]))
      target_ids.write(array.array("i", target))
      target_lengths.write(array.array("i", [len(target)]))
  if empty:
    raise ValueError(
      f"{pairs.direction} {pairs.split} holds 0 pairs of which both sides have"
      " words; give more text"
    )


def _blocks(pairs: Pairs) -> Iterator[tuple[list[str], list[str]]]:
  sources, targets = iter(pairs.sources), iter(pairs.targets)
  while block := list(itertools.islice(sources, _BLOCK)):
    yield block, list(itertools.islice(targets, _BLOCK))


def _assign(
  source_lengths: Int32[np.ndarray, "pairs"],
  target_lengths: Int32[np.ndarray, "pairs"],
  source_length: int,
  row_length: int,
) -> Int64[np.ndarray, "pairs"]:
  """Puts each pair in a row with room on both sides, or in a new row.

  It is the row whose target is fullest, of these the one whose source is.
  """
  row_of = array.array("q")
  rows = 0
  # By free target places and free source places. Bit s of sides[t] is set
  # where there are any at (t, s), and bit t of targets where sides[t] is not 0.
  open_rows: dict[tuple[int, int], list[int]] = {}
  sides = [0] * (row_length + 1)
  targets = 0
  for source, target in zip(
    memoryview(source_lengths), memoryview(target_lengths), strict=True
  ):
    free, left, row = row_length, source_length, rows
    room = targets >> target << target
    while room:
      lowest = (room & -room).bit_length() - 1
      if fits := sides[lowest] >> source:
        free, left = lowest, source + (fits & -fits).bit_length() - 1
        here = open_rows[free, left]
        row = here.pop()
        if not here:
          sides[free] ^= 1 << left
          targets ^= (not sides[free]) << free
        break
      room &= room - 1
    rows += row == rows
    row_of.append(row)
    free, left = free - target, left - source
    if min(free, left) >= _LEAST:
      open_rows.setdefault((free, left), []).append(row)
      sides[free] |= 1 << left
      targets |= 1 << free
  return np.frombuffer(row_of, np.int64)


def pack(
  tokens: PairTokens, row_length: int, source_length: int
) -> PairPacking:
  """Lays whole pairs out in rows; leaves out those that are empty or too long.

  Of every 10,000 pairs the long ones are placed first, as there is room for the
  short ones beside them. The result depends on the arguments alone.

  Args:
    tokens: the pairs.
    row_length: target places L of a row.
    source_length: source places M of a row.

  Raises:
    ValueError: no pair fits.
  """
  sources = tokens.source_lengths
  fits = (sources > 0) & (sources <= source_length)
  fits &= tokens.target_lengths <= row_length
  if not fits.any():
    raise ValueError(
      f"none of {len(fits):,} pairs fits in row_length={row_length} and"
      f" source_length={source_length} word pieces; raise them"
    )
  where = np.flatnonzero(fits)
  filled = sources / source_length + tokens.target_lengths / row_length
  rows, counts = [], []
  for begin in range(0, len(where), _BLOCK):
    block = where[begin : begin + _BLOCK]
    block = block[np.argsort(-filled[block], kind="stable")]
    row_of = _assign(
      sources[block], tokens.target_lengths[block], source_length, row_length
    )
    rows.append(block[np.argsort(row_of, kind="stable")])
    counts.append(np.bincount(row_of))
  order = np.concatenate(rows)
  columns = []
  for lengths in (sources, tokens.target_lengths):
    begins = np.cumsum(lengths, dtype=np.int64) - lengths
    columns += [begins[order], lengths[order]]
  first = np.cumsum(np.concatenate([[0], *counts]), dtype=np.int64)
  return PairPacking(*columns, first)


def left_out(
  tokens: PairTokens, packing: PairPacking, row_length: int, source_length: int
) -> str:
  """Says how many pairs are in no row, and why; "" where there are none."""
  count = len(tokens.source_lengths)
  empty = count - int(np.count_nonzero(tokens.source_lengths))
  long = count - empty - len(packing.source_begin)
  if not empty + long:
    return ""
  return (
    f"{empty + long:,} of {count:,} pairs left out: {empty:,} with an empty"
    f" side, {long:,} of more than source_length={source_length} or"
    f" row_length={row_length} word pieces"
  )


class PackedPairs:
  """The rows of one direction, made when asked for.

  A row of L target places and M source places is {"inputs": int32 [L],
  "targets": int32 [L], "mask": bool [L], "start": bool [L], "segment": int32
  [L], "source": int32 [M], "source_start": bool [M], "source_segment": int32
  [M]}. A pair x1 .. xm, y1 .. yn has the inputs <s> y1 .. yn, the targets
  y1 .. yn </s> and the source x1 .. xm </s>, after a tag where there is one.
  `mask` marks targets that are real. `start` and `source_start` mark where
  recurrent state is zero: the first place of a pair and of the padding.
  `segment` and `source_segment` number the pairs of a row from 1. Padding is 0.

  They are packed by `pack`, unless it is given what that returned before.

  Attributes:
    row_length: L.
    source_length: M.
    num_words: real targets in all rows, `</s>` counted.
    unknown: 0, as word pieces spell all.
    digest: that of the tokens.
  """

  unknown = 0.0

  def __init__(
    self,
    tokens: PairTokens,
    pieces: Pieces,
    row_length: int,
    source_length: int,
    packing: PairPacking | None = None,
  ):
    self.row_length, self.source_length = row_length, source_length
    self.digest = tokens.digest
    self._tokens, self._start_id = tokens, pieces.start
    self._packing = packing or pack(tokens, row_length, source_length)
    self.num_words = int(self._packing.target_length.sum(dtype=np.int64))

  def __len__(self) -> int:
    return len(self._packing.first) - 1

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    if not 0 <= row < len(self):
      raise IndexError(f"row {row} of {len(self)}")
    return self._row(range(*self._packing.first[row : row + 2].tolist()))

  def padding(self) -> dict[str, np.ndarray]:
    """Returns a row without a real target, which fills up a batch."""
    return self._row(range(0))

  def order(self, seed: int) -> grain.MapDataset:
    """Visits all rows in every epoch, each time in an order of its own."""
    return text.shuffled(self, seed)

  def _row(self, pairs: range) -> dict[str, np.ndarray]:
    some = slice(pairs.start, pairs.stop)
    packing = self._packing
    targets, start, segment = _lay_out(
      self._tokens.target_ids,
      packing.target_begin[some],
      packing.target_length[some],
      self.row_length,
    )
    source, source_start, source_segment = _lay_out(
      self._tokens.source_ids,
      packing.source_begin[some],
      packing.source_length[some],
      self.source_length,
    )
    mask = segment > 0
    inputs = np.where(start, np.int32(self._start_id), np.roll(targets, 1))
    return {
      "inputs": inputs * mask,
      "targets": targets,
      "mask": mask,
      "start": start,
      "segment": segment,
      "source": source,
      "source_start": source_start,
      "source_segment": source_segment,
    }


def _lay_out(
  ids: Int32[np.ndarray, "pieces"],
  begins: Int64[np.ndarray, "pairs"],
  lengths: Int32[np.ndarray, "pairs"],
  places: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the ids, starts and segments of one side of a row."""
  laid = np.zeros(places, np.int32)
  start = np.zeros(places, np.bool_)
  segment = np.zeros(places, np.int32)
  place = 0
  spans = zip(begins.tolist(), lengths.tolist(), strict=True)
  for number, (begin, length) in enumerate(spans, start=1):
    stop = place + length
    laid[place:stop] = ids[begin : begin + length]
    segment[place:stop] = number
    start[place] = True
    place = stop
  start[place : place + 1] = True
  return laid, start, segment
