"""Lines of text as the source rows that decoding takes, and back in order."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from moejax.data.corpora import sentences
from moejax.data.pieces import Pieces

# Each length is a compilation; shorter rows save little.
_SHORTEST = 16
# A letter that is spelt in four bytes, the space before it, a tag and `</s>`.
_LEAST = 7


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
  """Refuses rows that are too short for some letter.

  Raises:
    ValueError: source_length is below 7.
  """
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
  """Yields lines as rows for decoding, those of like length together.

  A line that does not fit is cut by `cut`. One without words yields nothing.
  Rows are as long as the next power of 2, 16 or more and source_length at most,
  so that there are few shapes to compile. Batches of one length come as they
  get full; the last of each is filled with rows of padding. As no text of pairs
  has a tab, nor space at its ends (`moejax.data.pairs`), lines lose these: a
  tab becomes a space.

  Args:
    pieces: gives the ids.
    lines: of text, as many as there are.
    source_length: places M at most, tag and `</s>` counted.
    batch_size: rows N of every batch.
    tag: the id that comes first in each source, if any.

  Raises:
    ValueError: as `check_length`.
  """
  check_length(source_length)
  first = [] if tag is None else [tag]
  limit = source_length - len(first) - 1
  waiting: dict[int, list[tuple[int, int, list[int]]]] = {}
  for number, line in enumerate(lines):
    line = line.strip().replace("\t", " ")
    for part, some in enumerate(cut(pieces, line, limit)):
      ids = [*first, *pieces.encode(some), pieces.end]
      places = _places(len(ids), source_length)
      rows = waiting.setdefault(places, [])
      rows.append((number, part, ids))
      if len(rows) == batch_size:
        yield _batch(waiting.pop(places), places, batch_size)
  for places, rows in sorted(waiting.items()):
    yield _batch(rows, places, batch_size)


def _places(length: int, source_length: int) -> int:
  power = 1 << (length - 1).bit_length()
  return min(max(power, _SHORTEST), source_length)


def _batch(
  rows: list[tuple[int, int, list[int]]], places: int, batch_size: int
) -> SourceRows:
  shape = (batch_size, places)
  source = np.zeros(shape, np.int32)
  segment = np.zeros(shape, np.int32)
  start = np.zeros(shape, np.bool_)
  start[:, 0] = True
  line = np.full(batch_size, -1, np.int64)
  part = np.zeros(batch_size, np.int64)
  for row, (line[row], part[row], ids) in enumerate(rows):
    source[row, : len(ids)] = ids
    segment[row, : len(ids)] = 1
    start[row, len(ids) : len(ids) + 1] = True
  return SourceRows(source, segment, start, line, part)


def cut(pieces: Pieces, line: str, limit: int) -> list[str]:
  """Cuts a line into the longest parts of at most `limit` pieces.

  It is cut between sentences, of whatever script; a sentence that is too long
  alone, between words; a word that is, anywhere. Joined, the parts are the line
  again, up to spaces.

  Args:
    pieces: counts.
    line: text of any length. One without words has no part.
    limit: 5 or more, as one letter may take.
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
    middle = len(word) // 2
    groups = [word[:middle], word[middle:]]
  else:
    groups = _grouped(pieces, parts, limit)
  return [part for group in groups for part in cut(pieces, group, limit)]


# Between sentences that begin with other letters than those of English, which
# `sentences` knows better, and where no space comes between.
_STOPS = "。！？"
_SENTENCE = re.compile(
  rf"(?<=[.!?…؟।])\s+(?=\W*[^\W\d_a-zA-Zà-öø-ÿа-я])|(?<=[{_STOPS}])"
)


def _grouped(pieces: Pieces, parts: list[str], limit: int) -> list[str]:
  """Joins neighbours while they fit, by spaces but after a full stop of CJK."""
  groups = parts[:1]
  for part in parts[1:]:
    space = "" if groups[-1][-1] in _STOPS else " "
    together = f"{groups[-1]}{space}{part}"
    if len(pieces.encode(together)) <= limit:
      groups[-1] = together
    else:
      groups.append(part)
  return groups
