"""Batches of rows: to train on, to evaluate on, and of lines to translate.

All rows are random access, so the batch of a step is a function of (seed, step)
and a position in the data is one integer, whatever the number of processes.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Int32, Int64

from moejax.data.packing import Rows
from moejax.data.pieces import Pieces
from moejax.data.vocab import sentences

# Batches made ahead of the one asked for, and the threads that make them.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


def train_batches(
  rows: Rows,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  passes: int | None = None,
) -> grain.DatasetIterator:
  """Iterates over this process's part of the training batches.

  Rows come as their `order` has them: without end, or until one would be read
  more than `passes` times. Batches run across the end of an epoch. The parts of
  all processes, each array [batch_size / process_count, L], one after the
  other, are the same batch for any process_count. The iterator's state is
  {"next_index": step}, from `get_state()` and for `set_state()`. ValueError
  where batch_size does not divide, or there are fewer rows.
  """
  order = rows.order(seed, passes)
  if min(len(rows), len(order)) < batch_size:
    raise ValueError(
      f"a batch of {batch_size} rows is more than the corpus has,"
      f" {min(len(rows), len(order))} rows of {rows.row_length} words; lower"
      " batch_size or give more text"
    )
  if passes is not None:
    order = order[: len(order) // batch_size * batch_size]
  return _iterate(order, batch_size, process_index, process_count)


def num_batches(rows: Rows, batch_size: int, passes: int) -> int:
  """Returns after how many batches a row has been read `passes` times."""
  return len(rows.order(0, passes)) // batch_size


def eval_batches(
  rows: Rows, batch_size: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
  """Iterates once, in order, over this process's part of the batches.

  The last batch is filled up with rows of padding, so all processes see the
  same number of batches of the same shape, and every word counts once.
  ValueError where batch_size does not divide over the processes.
  """
  full = -(-len(rows) // batch_size) * batch_size
  order = grain.MapDataset.range(full).map(
    lambda row: rows[row] if row < len(rows) else rows.padding()
  )
  return _iterate(order, batch_size, process_index, process_count)


def _iterate(rows, batch_size, process_index, process_count):
  """Batches this process's share: of each P consecutive shares the p-th."""
  if batch_size % process_count:
    raise ValueError(
      f"a batch of {batch_size} rows does not divide over {process_count}"
      f" processes; make batch_size a multiple of {process_count}"
    )
  shares = rows.batch(batch_size // process_count)
  return iter(shares[process_index::process_count].to_iter_dataset(_READ))


# -- lines to translate -------------------------------------------------------

# Each length is a compilation; shorter rows save little.
_SHORTEST = 16
# A letter that is spelt in four bytes, the space before it, a tag and `</s>`.
_LEAST = 7
# Between sentences that begin with other letters than those of English, which
# `sentences` knows better, and where no space comes between.
_STOPS = "。！？"
_SENTENCE = re.compile(
  rf"(?<=[.!?…؟।])\s+(?=\W*[^\W\d_a-zA-Zà-öø-ÿа-я])|(?<=[{_STOPS}])"
)


class SourceRows(NamedTuple):
  """A batch of source rows, one part of a line in each.

  Attributes:
    source: `</s>` closes each; 0 is padding.
    source_segment: 1 where there is a source, 0 at padding.
    source_start: first place of the source and of the padding.
    line: number of the line in each row, from 0; -1 in rows of padding.
    part: number of the part of that line, from 0.
  """

  source: Int32[np.ndarray, "N M"]
  source_segment: Int32[np.ndarray, "N M"]
  source_start: Bool[np.ndarray, "N M"]
  line: Int64[np.ndarray, "N"]
  part: Int64[np.ndarray, "N"]


def check_length(source_length: int) -> None:
  """Raises ValueError for rows that are too short for some letter."""
  if source_length < _LEAST:
    raise ValueError(
      f"source_length must be {_LEAST} or more to hold any letter, got"
      f" {source_length}"
    )


def source_rows(
  pieces: Pieces,
  lines: Iterable[str],
  source_length: int,
  batch_size: int,
  tag: int | None = None,
) -> Iterator[SourceRows]:
  """Yields lines as N rows for decoding, those of like length together.

  A source is its tag, if there is one, the line, and `</s>`. A line that does
  not fit is cut by `cut`; one without words yields nothing. Rows are as long as
  the next power of 2, 16 or more and source_length (see `check_length`) at
  most, so that there are few shapes to compile. Batches of one length come as
  they get full. Lines lose tabs and space at their ends, as no pair has them.
  """

  def batch(rows, places):
    source = np.zeros((batch_size, places), np.int32)
    segment = np.zeros_like(source)
    start = np.zeros(source.shape, np.bool_)
    start[:, 0] = True
    line = np.full(batch_size, -1, np.int64)
    part = np.zeros(batch_size, np.int64)
    for row, (line[row], part[row], ids) in enumerate(rows):
      source[row, : len(ids)] = ids
      segment[row, : len(ids)] = 1
      start[row, len(ids) : len(ids) + 1] = True
    return SourceRows(source, segment, start, line, part)

  first = [] if tag is None else [tag]
  waiting: dict[int, list[tuple[int, int, list[int]]]] = {}
  for number, line in enumerate(lines):
    parts = cut(
      pieces, line.strip().replace("\t", " "), source_length - len(first) - 1
    )
    for part, text in enumerate(parts):
      ids = [*first, *pieces.encode(text), pieces.end]
      power = 1 << (len(ids) - 1).bit_length()
      places = min(max(power, _SHORTEST), source_length)
      rows = waiting.setdefault(places, [])
      rows.append((number, part, ids))
      if len(rows) == batch_size:
        yield batch(waiting.pop(places), places)
  for places, rows in sorted(waiting.items()):
    yield batch(rows, places)


def cut(pieces: Pieces, line: str, limit: int) -> list[str]:
  """Cuts a line into the longest parts of at most `limit` pieces, 5 or more.

  It is cut between sentences, of whatever script; a sentence that is too long
  alone, between words; a word that is, anywhere. Joined, the parts are the line
  again, up to spaces.
  """
  length = len(pieces.encode(line))
  if not length or not line.strip():
    return []
  if length <= limit:
    return [line]
  parts = sentences(line)
  if len(parts) == 1:
    parts = [part for part in _SENTENCE.split(line) if part.strip()]
  if len(parts) == 1:
    parts = line.split()
  if len(parts) == 1:
    (word,) = parts
    groups = [word[: len(word) // 2], word[len(word) // 2 :]]
  else:
    # Neighbors stay together while they fit, by spaces but after a full stop
    # of Chinese and Japanese.
    groups = parts[:1]
    for part in parts[1:]:
      space = "" if groups[-1][-1] in _STOPS else " "
      together = f"{groups[-1]}{space}{part}"
      if len(pieces.encode(together)) <= limit:
        groups[-1] = together
      else:
        groups.append(part)
  return [part for group in groups for part in cut(pieces, group, limit)]
