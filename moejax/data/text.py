"""Language-model batches: sentences packed into rows, rows in a pure order.

All is random access, so the batch of a step is a function of (seed, step) and
a position in the data is one integer, whatever the number of processes.
"""

import array
import hashlib
import io
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int, Int32, Int64

from moejax.data.vocab import Vocabulary, words

# Batches made ahead of the one asked for, and the threads that make them.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)

# Words that are looked through at once.
_BLOCK = 1 << 20
# The arrays of a row, see `PackedRows`.
TYPES = {
  "inputs": np.int32,
  "targets": np.int32,
  "mask": np.bool_,
  "start": np.bool_,
}


class Tokens(NamedTuple):
  """A corpus as word ids, four bytes a word.

  Attributes:
    ids: the words of all sentences one after the other, each sentence closed by
      `</S>`, which occurs nowhere else.
    lengths: words of each sentence, its `</S>` counted.
    digest: of the ids, a short name that another text would not have.
    folder: where they are kept, and what is made of them may be; None if not.
  """

  ids: Int32[np.ndarray, "words"]
  lengths: Int32[np.ndarray, "sentences"]
  digest: str
  folder: pathlib.Path | None = None


class Packing(NamedTuple):
  """Which pieces of a stream of words make which row.

  Attributes:
    begin: where each piece begins in the stream; rows in order.
    length: words of each piece.
    first: row r is made of the pieces first[r] to first[r + 1].
  """

  begin: Int64[np.ndarray, "pieces"]
  length: Int32[np.ndarray, "pieces"]
  first: Int64[np.ndarray, "rows_1"]


def tokenise(
  texts: Iterable[str],
  vocabulary: Vocabulary,
  split: Callable[[str], list[str]] = words,
) -> Tokens:
  """Turns sentences into ids; leaves out those without words.

  Args:
    texts: sentences.
    vocabulary: gives the ids.
    split: cuts a sentence into words.

  Raises:
    ValueError: there are no words at all.
  """
  ids, lengths = io.BytesIO(), io.BytesIO()
  write_tokens(texts, vocabulary, split, ids, lengths)
  own = np.frombuffer(ids.getbuffer(), np.int32)
  return Tokens(own, np.frombuffer(lengths.getbuffer(), np.int32), digest(own))


def digest(array: np.ndarray) -> str:
  """Returns a short name that another content would not have."""
  return hashlib.blake2b(array, digest_size=8).hexdigest()


def write_tokens(
  texts: Iterable[str],
  vocabulary: Vocabulary,
  split: Callable[[str], list[str]],
  ids: io.BufferedIOBase,
  lengths: io.BufferedIOBase,
) -> None:
  """Writes what `tokenise` returns to two files, holding little of it."""
  empty = True
  for text in texts:
    sentence = vocabulary.encode(split(text))
    if sentence:
      sentence.append(vocabulary.end)
      ids.write(array.array("i", sentence))
      lengths.write(array.array("i", [len(sentence)]))
      empty = False
  if empty:
    raise ValueError("the corpus holds 0 words; give more text")


def _cut(
  lengths: Int[np.ndarray, "sentences"], row_length: int
) -> tuple[Int64[np.ndarray, "pieces"], Int32[np.ndarray, "pieces"]]:
  """Cuts sentences into pieces that fit a row; returns begins and lengths."""
  lengths = lengths.astype(np.int64)
  pieces = -(-lengths // row_length)
  sentence = np.repeat(np.arange(len(lengths)), pieces)
  number = np.arange(len(sentence)) - (np.cumsum(pieces) - pieces)[sentence]
  offset = number * row_length
  begin = (np.cumsum(lengths) - lengths)[sentence] + offset
  length = np.minimum(lengths[sentence] - offset, row_length)
  return begin, length.astype(np.int32)


def _assign(
  lengths: Int32[np.ndarray, "pieces"], row_length: int
) -> Int64[np.ndarray, "pieces"]:
  """Puts each piece in the fullest row that has room, or in a new row."""
  row_of = array.array("q")
  rows = 0
  open_rows = [[] for _ in range(row_length + 1)]  # by free places
  open_bits = 0  # bit f is set where open_rows[f] is not empty
  for length in memoryview(lengths):
    room = open_bits >> length
    if room:
      free = length + (room & -room).bit_length() - 1
      row = open_rows[free].pop()
      if not open_rows[free]:
        open_bits ^= 1 << free
    else:
      free, row = row_length, rows
      rows += 1
    row_of.append(row)
    free -= length
    if free:
      open_rows[free].append(row)
      open_bits |= 1 << free
  return np.frombuffer(row_of, np.int64)


def pack(lengths: Int[np.ndarray, "sentences"], row_length: int) -> Packing:
  """Lays sentences out in rows of `row_length` words.

  A sentence that fits stays whole; a longer one is cut into pieces of
  `row_length` and a rest. Pieces are placed in order, each in the open row that
  it fills best. The result depends on the arguments alone.

  Raises:
    ValueError: row_length is below 1.
  """
  if row_length < 1:
    raise ValueError(f"row_length must be 1 or more, got {row_length}")
  begin, length = _cut(lengths, row_length)
  row_of = _assign(length, row_length)
  order = np.argsort(row_of, kind="stable")
  first = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
  return Packing(begin[order], length[order], first.astype(np.int64))


@runtime_checkable
class Rows(Protocol):
  """Rows of equal shapes, made when asked for.

  Attributes:
    row_length: places L of a row.
    num_words: real targets in all rows.
    unknown: fraction of them that the vocabulary does not have.
    digest: a short name that other rows would not have.
  """

  row_length: int
  num_words: int
  unknown: float
  digest: str

  def __len__(self) -> int:
    """Returns the number of rows."""

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    """Returns the arrays of a row, among them "mask", true at real targets."""

  def padding(self) -> dict[str, np.ndarray]:
    """Returns a row without a real target, which fills up a batch."""

  def order(self, seed: int) -> grain.MapDataset:
    """Returns the rows as training visits them, without end.

    Args:
      seed: 0 or more; seeds give unrelated orders.
    """


class PackedRows:
  """The rows of a corpus, made when asked for.

  A row of L places is {"inputs": int32 [L], "targets": int32 [L], "mask":
  bool [L], "start": bool [L]}. A sentence w1 .. wn has the inputs <S> w1 .. wn
  and the targets w1 .. wn </S>. The later pieces of a sentence that was cut
  begin with the word before them as input. `start` marks where the recurrent
  state is zero: the first place of a piece and of the padding. `mask` marks
  targets that are real; padding is id 0.

  They are packed by `pack`, unless it is given what that returned before.

  Attributes:
    row_length: L.
    num_words: real targets in all rows, `</S>` counted.
    unknown: fraction of them that is `<UNK>`.
    digest: of the words, see `Tokens`.
  """

  def __init__(
    self,
    tokens: Tokens,
    vocabulary: Vocabulary,
    row_length: int,
    packing: Packing | None = None,
  ):
    self.row_length = row_length
    self.num_words = len(tokens.ids)
    blocks = range(0, self.num_words, _BLOCK)
    unknown = sum(
      np.count_nonzero(tokens.ids[begin : begin + _BLOCK] == vocabulary.unknown)
      for begin in blocks
    )
    self.unknown = unknown / self.num_words
    self.digest = tokens.digest
    self._ids = tokens.ids
    self._end_id, self._start_id = vocabulary.end, vocabulary.start
    packing = packing or pack(tokens.lengths, row_length)
    self._begin, self._length, self._first = packing

  def __len__(self) -> int:
    return len(self._first) - 1

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    if not 0 <= row < len(self):
      raise IndexError(f"row {row} of {len(self)}")
    return self._row(range(*self._first[row : row + 2].tolist()))

  def padding(self) -> dict[str, np.ndarray]:
    """Returns a row without a real target, which fills up a batch."""
    return self._row(range(0))

  def order(self, seed: int) -> grain.MapDataset:
    """Visits all rows in every epoch, each time in an order of its own."""
    return shuffled(self, seed)

  def _row(self, pieces: range) -> dict[str, np.ndarray]:
    inputs = np.zeros(self.row_length, np.int32)
    targets = np.zeros(self.row_length, np.int32)
    start = np.zeros(self.row_length, np.bool_)
    place = 0
    for piece in pieces:
      begin, length = int(self._begin[piece]), int(self._length[piece])
      end, stop = begin + length, place + length
      before = self._ids[begin - 1] if begin else self._end_id
      inputs[place] = self._start_id if before == self._end_id else before
      inputs[place + 1 : stop] = self._ids[begin : end - 1]
      targets[place:stop] = self._ids[begin:end]
      start[place] = True
      place = stop
    start[place : place + 1] = True
    mask = np.arange(self.row_length) < place
    return {"inputs": inputs, "targets": targets, "mask": mask, "start": start}


def shuffled(rows: Rows, seed: int) -> grain.MapDataset:
  """Returns all rows again and again, in every epoch in an order of its own."""
  # grain shuffles epoch e of seed s as epoch e - 1 of seed s + 1.
  unrelated = int(np.random.SeedSequence(seed).generate_state(1)[0])
  return grain.MapDataset.source(rows).shuffle(seed=unrelated).repeat()


def _iterate(
  rows: grain.MapDataset,
  batch_size: int,
  process_index: int,
  process_count: int,
) -> grain.DatasetIterator:
  """Batches this process's share: of each P consecutive shares the p-th."""
  if batch_size % process_count:
    raise ValueError(
      f"a batch of {batch_size} rows does not divide over {process_count}"
      f" processes; make batch_size a multiple of {process_count}"
    )
  shares = rows.batch(batch_size // process_count)
  return iter(shares[process_index::process_count].to_iter_dataset(_READ))


def train_batches(
  rows: Rows,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """Iterates without end over this process's part of the training batches.

  Rows come as their `order` has them: those of a `PackedRows` all in every
  epoch, in an order of its own. Batches run across the end of an epoch, so no
  row is left out. The batch of a step is a function of (rows, batch_size, seed,
  step): the parts of all processes, one after the other, are the same batch for
  any process_count. The iterator's state is {"next_index": step}, from
  `get_state()` and for `set_state()`.

  Args:
    rows: the training split.
    batch_size: rows of the whole batch, all processes together.
    seed: 0 or more; seeds give unrelated orders.
    process_index: which part to make.
    process_count: how many parts there are.

  Returns:
    An iterator of batches, each array [batch_size / process_count, L].

  Raises:
    ValueError: batch_size does not divide, or there are fewer rows.
  """
  if len(rows) < batch_size:
    raise ValueError(
      f"a batch of {batch_size} rows is more than the corpus has,"
      f" {len(rows)} rows of {rows.row_length} words; lower batch_size or"
      " give more text"
    )
  return _iterate(rows.order(seed), batch_size, process_index, process_count)


def eval_batches(
  rows: Rows,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator:
  """Iterates once, in order, over this process's part of the batches.

  The last batch is filled up with rows of padding, so all processes see the
  same number of batches of the same shape, and every word counts once.

  Args, returns: as `train_batches`.

  Raises:
    ValueError: batch_size does not divide over the processes.
  """
  full = -(-len(rows) // batch_size) * batch_size
  order = grain.MapDataset.range(full).map(
    lambda row: rows[row] if row < len(rows) else rows.padding()
  )
  return _iterate(order, batch_size, process_index, process_count)
