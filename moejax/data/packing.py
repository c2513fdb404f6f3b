"""Text as ids, and ids packed into rows of one length.

A pair is a target and its source; a language model's sentence is a pair without
a source. A row of several pairs trains as they would alone.
"""

import array
import collections
import functools
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Int32, Int64

from moejax.data import cache
from moejax.data.pieces import Pieces
from moejax.data.tokenizer_file import TokenizerFile
from moejax.data.vocab import Vocabulary

Tokenizer = Vocabulary | Pieces | TokenizerFile

# Pairs that become ids at once, and that are packed into rows of their own.
_BLOCK = 10_000
# Rows that change places with each other; that of a batch or of many.
_WINDOW = 1024
# To be raised with any change of the ids that a text becomes, here or in
# `vocab` and `pieces`.
_VERSION = 3
# To be raised with any change of what `pack` returns.
_PACKING_VERSION = 2


class Direction(NamedTuple):
  """Which language is translated into which; subtags as in "pt_BR"."""

  source: str
  target: str

  def __str__(self) -> str:
    return f"{self.source}-{self.target}"


class Pairs(NamedTuple):
  """Sentences of a split, and what they translate: None for language models.

  They are lists, or `tfds_corpora.Records`. Of those that were read from files
  `files` has how many each of them holds, in order.
  """

  direction: Direction | None
  split: str
  sources: Sequence[str] | None
  targets: Sequence[str]
  files: Mapping[str, int] = {}

  def __str__(self) -> str:
    return f"{self.direction} {self.split}" if self.direction else self.split

  @property
  def sides(self) -> dict[str, Sequence[str]]:
    """The sides that there are, by name."""
    sides = {"source": self.sources, "target": self.targets}
    return {name: texts for name, texts in sides.items() if texts is not None}


class Tokens(NamedTuple):
  """Sentences as ids, by side: "target", and "source" where there is one.

  Attributes:
    ids: all sentences one after the other. The tokenizer's `end` closes each;
      a tag is before a source where there are several target languages.
    lengths: ids of each sentence, tag and end counted; 0 on both sides where a
      side has no words.
    digest: a short name that another text would not have.
    folder: of the cache, if they are of a prepared corpus.
  """

  ids: dict[str, Int32[np.ndarray, "ids"]]
  lengths: dict[str, Int32[np.ndarray, "sentences"]]
  digest: str
  folder: pathlib.Path | None = None


def batch_shapes(
  batch_size: int, row_length: int, source_length: int = 0
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes, [B, L] or [B, M], and types of a batch's arrays."""
  types = {"inputs": np.int32, "targets": np.int32}
  types |= {"mask": np.bool_, "start": np.bool_}
  if source_length:
    types |= {"segment": np.int32, "source": np.int32}
    types |= {"source_start": np.bool_, "source_segment": np.int32}
  return {
    name: jax.ShapeDtypeStruct(
      (batch_size, source_length if "source" in name else row_length), dtype
    )
    for name, dtype in types.items()
  }


def tokenize(pairs: Pairs, tokenizer: Tokenizer) -> Tokens:
  """Returns the ids of a split; those of a prepared corpus are made once.

  A source begins with the tag of its target's language where the tokenizer has
  tags. ValueError where no pair has words on all sides, the language has no
  tag, or the tokenizer not one of the ids.
  """
  sides, noun = pairs.sides, "pairs" if pairs.direction else "sentences"
  tag = []
  if tokenizer.languages:
    tag.append(tokenizer.tag(pairs.direction.target))

  def write(*files):
    empty = True
    texts = zip(*sides.values(), strict=True)
    while block := list(itertools.islice(texts, _BLOCK)):
      by_side = map(tokenizer.encode_all, zip(*block, strict=True))
      encoded = list(zip(*by_side, strict=True))
      empty &= not any(map(all, encoded))
      for i, name in enumerate(sides):
        # A pair without words on one side has no ids on the other either.
        first = tag if name == "source" else []
        closed = [
          [*first, *ids[i], tokenizer.end] if all(ids) else []
          for ids in encoded
        ]
        flat = itertools.chain.from_iterable(closed)
        files[2 * i].write(array.array("i", flat))
        files[2 * i + 1].write(array.array("i", map(len, closed)))
    if empty:
      raise ValueError(
        f"{pairs} holds 0 {noun} that have words, on both sides if there are"
        " two; give more text"
      )

  # Texts in memory have no folder.
  path = getattr(pairs.targets, "folder", None)
  if path:
    parts = [_VERSION, pairs.targets.split, *(t.field for t in sides.values())]
    parts += [type(tokenizer).__name__, tokenizer.digest, *tag]
    path = path / "ids" / cache.key(path, *parts)
  names = [f"{side}_{what}" for side in sides for what in ("ids", "lengths")]
  what = f"turning {len(pairs.targets):,} {noun} into ids"
  found = cache.cached(path, dict.fromkeys(names, np.int32), write, what)
  # A language model's digest is that of its ids, as runs have noted it.
  digest = found.digests["target_ids"]
  if "source" in sides:
    digest = cache.joined(found.digests.values())
  ids, lengths = (
    {side: found.arrays[f"{side}_{what}"] for side in sides}
    for what in ("ids", "lengths")
  )
  for some in ids.values():
    # A model would look them up as NaN, or as another word.
    if some.size and not 0 <= some.min() <= some.max() < len(tokenizer):
      cure = f"; remove {path}, and they are made anew" if path else ""
      raise ValueError(
        f"the ids of {pairs} are {some.min()} to {some.max()}, where the"
        f" vocabulary of {len(tokenizer):,} entries has 0 to"
        f" {len(tokenizer) - 1}{cure}"
      )
  return Tokens(ids, lengths, digest, found.folder)


# -- packing ------------------------------------------------------------------


def pack(
  tokens: Tokens, row_length: int, source_length: int = 0
) -> Mapping[str, np.ndarray]:
  """Lays sentences or whole pairs out in rows; caches how where ids are cached.

  A sentence without a source that is longer than a row is cut into spans of
  `row_length` and a rest; all are placed in order. A pair stays whole; pairs
  that are empty or too long are left out, and ValueError says that all are. Of
  every 10,000 pairs the long ones are placed first, as there is room for the
  short ones beside them.

  Returns:
    "first", int64 [rows + 1]: row r has the spans first[r] to first[r + 1]. Of
    these "target_begin", int64 [spans], among the ids, and "target_length",
    int32 [spans]; the same of "source".
  """

  def write(*files):
    packed = _pack(tokens, row_length, source_length)
    for file, values in zip(files, packed, strict=True):
      file.write(values)

  types = {"first": np.int64}
  for side in tokens.ids:
    types |= {f"{side}_begin": np.int64, f"{side}_length": np.int32}
  name = f"packing_{_PACKING_VERSION}_{row_length}_{source_length}"
  folder = tokens.folder and tokens.folder / name
  what = f"packing {len(tokens.lengths['target']):,} sentences"
  return cache.cached(folder, types, write, what).arrays


def _pack(
  tokens: Tokens, row_length: int, source_length: int
) -> Iterator[np.ndarray]:
  """Yields first, and begin and length of each side."""
  lengths = tokens.lengths
  begins = {
    side: np.cumsum(own, dtype=np.int64) - own for side, own in lengths.items()
  }
  targets = lengths["target"]
  if "source" in lengths:
    sources = lengths["source"]
    fits = (sources > 0) & (sources <= source_length) & (targets <= row_length)
    if not fits.any():
      raise ValueError(
        f"none of {len(fits):,} pairs fits in row_length={row_length} and"
        f" source_length={source_length} word pieces; raise them"
      )
    where = np.flatnonzero(fits)
    blocks = [where[i : i + _BLOCK] for i in range(0, len(where), _BLOCK)]
    filled = sources / source_length + targets / row_length
    blocks = [b[np.argsort(-filled[b], kind="stable")] for b in blocks]
  else:
    # Cut: span n of a sentence begins n rows after it.
    spans = -(-targets // row_length)
    of = np.repeat(np.arange(len(targets)), spans)
    offset = np.arange(len(of)) - (np.cumsum(spans) - spans)[of]
    offset *= row_length
    begins = {"target": begins["target"][of] + offset}
    targets = np.minimum(targets[of] - offset, row_length).astype(np.int32)
    lengths = {"target": targets}
    sources = np.zeros_like(targets)
    blocks = [np.arange(len(targets))]
  order, counts = [], [[0]]
  for block in blocks:
    row_of = _assign(sources[block], targets[block], source_length, row_length)
    order.append(block[np.argsort(row_of, kind="stable")])
    counts.append(np.bincount(row_of))
  order = np.concatenate(order)
  yield np.cumsum(np.concatenate(counts), dtype=np.int64)
  for side, own in lengths.items():
    yield begins[side][order]
    yield own[order]


def _assign(
  source_lengths: Int32[np.ndarray, "spans"],
  target_lengths: Int32[np.ndarray, "spans"],
  source_length: int,
  row_length: int,
) -> Int64[np.ndarray, "spans"]:
  """Puts each span in a row with room on both sides, or in a new row.

  It is the row whose target is fullest, of these the one whose source is.
  """
  # Rows with room, by free target places and free source places. Bit s of
  # sides[t] is set where there are any at (t, s), bit t of targets where
  # sides[t] is not 0.
  open_rows = collections.defaultdict(list)
  sides, targets = [0] * (row_length + 1), 0
  row_of, rows = array.array("q"), 0
  least = int(target_lengths.min(initial=row_length))
  for source, target in zip(
    memoryview(source_lengths), memoryview(target_lengths), strict=True
  ):
    free, left, row = row_length, source_length, rows
    # The lowest bit is the fullest row; those with too little room are cleared.
    room = targets >> target << target
    while room:
      lowest = (room & -room).bit_length() - 1
      if fits := sides[lowest] >> source:
        free, left = lowest, source + (fits & -fits).bit_length() - 1
        row = open_rows[free, left].pop()
        if not open_rows[free, left]:
          sides[free] ^= 1 << left
          targets ^= (not sides[free]) << free
        break
      room &= room - 1
    rows += row == rows
    row_of.append(row)
    free, left = free - target, left - source
    if free >= least:
      open_rows[free, left].append(row)
      sides[free] |= 1 << left
      targets |= 1 << free
  return np.frombuffer(row_of, np.int64)


# -- rows ---------------------------------------------------------------------


class PackedRows:
  """The rows of a language model's split, or of one direction of translation.

  Shapes are in `batch_shapes`. A sentence y1 .. yn has the inputs <s> y1 .. yn
  and the targets y1 .. yn </s>; the later spans of a sentence that was cut
  begin with the word before them as input. `mask` marks targets that are real.
  `start` marks where the recurrent state is zero: the first place of a span and
  of the padding. Padding is 0.

  With source places, the source is x1 .. xm </s>, after a tag where there is
  one, and `segment` and `source_segment` number the pairs of a row from 1.

  Attributes:
    row_length: L.
    num_words: real targets in all rows, `</s>` counted.
    unknown: fraction of the targets that the tokenizer does not have.
    has_ids: bool [sentences], which sentences have words; those of a language
      model are in the rows then.
    digest: that of the tokens.
    left_out: says how many sentences are in no row, and why; "" if all are.
  """

  def __init__(
    self,
    tokens: Tokens,
    tokenizer: Tokenizer,
    row_length: int,
    source_length: int = 0,
  ):
    self.row_length, self._source_length = row_length, source_length
    self.digest = tokens.digest
    self._ids, self._lengths = tokens.ids, tokens.lengths
    self._start, self._end = tokenizer.start, tokenizer.end
    self._packing = pack(tokens, row_length, source_length)
    self.num_words = int(self._packing["target_length"].sum(dtype=np.int64))
    targets = tokens.ids["target"]
    # In parts, as those of lm1b are a billion.
    parts = np.array_split(targets, targets.size // 1_000_000 + 1)
    unknown = sum(np.count_nonzero(p == tokenizer.unknown) for p in parts)
    self.unknown = unknown / targets.size
    self.has_ids = tokens.lengths["target"] > 0
    count = len(self.has_ids)
    out = empty = count - np.count_nonzero(self.has_ids)
    why = f"{empty:,} without words"
    if source_length:
      out = count - len(self._packing["source_begin"])
      why += (
        f", {out - empty:,} of more than source_length={source_length} or"
        f" row_length={row_length} word pieces"
      )
    self.left_out = f"{out:,} of {count:,} left out: {why}" if out else ""

  def __len__(self) -> int:
    return len(self._packing["first"]) - 1

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    if not 0 <= row < len(self):
      raise IndexError(f"row {row} of {len(self)}")
    return self._row(slice(*self._packing["first"][row : row + 2].tolist()))

  def sentences(self, side: str) -> Int64[np.ndarray, "places"]:
    """Returns the number of its sentence for every real place of a side."""
    ends = np.cumsum(self._lengths[side], dtype=np.int64)
    begins = self._packing[f"{side}_begin"]
    number = np.searchsorted(ends, begins, side="right")
    return np.repeat(number, self._packing[f"{side}_length"])

  def padding(self) -> dict[str, np.ndarray]:
    """Returns a row without a real target, which fills up a batch."""
    return self._row(slice(0))

  def order(self, seed: int, passes: int | None = None) -> grain.MapDataset:
    """Returns all rows, in an order of its own in each pass of so many."""
    # grain shuffles epoch e of seed s as epoch e - 1 of seed s + 1.
    unrelated = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.source(self).shuffle(seed=unrelated).repeat(passes)

  def _row(self, spans: slice) -> dict[str, np.ndarray]:
    def side(name, places):
      """Returns the ids, starts and segments of one side."""
      ids, segment = np.zeros((2, places), np.int32)
      start = np.zeros(places, np.bool_)
      lengths = self._packing[f"{name}_length"][spans]
      used = lengths.sum()
      first = np.cumsum(lengths) - lengths
      # A place of span n is so far from the id that it gets.
      ahead = self._packing[f"{name}_begin"][spans] - first
      ids[:used] = self._ids[name][np.repeat(ahead, lengths) + np.arange(used)]
      segment[:used] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
      start[first] = True
      start[used : used + 1] = True
      return ids, start, segment

    targets, start, segment = side("target", self.row_length)
    mask = segment > 0
    inputs = np.roll(targets, 1)
    # The last id of all is an end, too.
    before = self._ids["target"][self._packing["target_begin"][spans] - 1]
    inputs[start & mask] = np.where(before == self._end, self._start, before)
    inputs[~mask] = 0
    row = {"inputs": inputs, "targets": targets, "mask": mask, "start": start}
    if self._source_length:
      names = ("source", "source_start", "source_segment")
      source = side("source", self._source_length)
      row |= {"segment": segment, **dict(zip(names, source, strict=True))}
    return row


class MultiDirection:
  """The rows of several directions of translation, of one after the other.

  In training, the share of a direction in all target words is proportional to
  its own words to the power of 1 / temperature: above 1 small directions come
  more often.

  Attributes:
    row_length: target places of a row.
    num_words: real targets in all rows.
    unknown: 0, as word pieces spell all.
    digest: a short name that other rows would not have.
    shares: of the target words of training, by direction.
  """

  unknown = 0.0

  def __init__(self, parts: Sequence[PackedRows], temperature: float = 1.0):
    """Takes rows of one shape; ValueError for a temperature not above 0."""
    if not temperature > 0:
      raise ValueError(f"temperature must be above 0, got {temperature}")
    self._parts = tuple(parts)
    self.row_length = parts[0].row_length
    words = np.array([part.num_words for part in parts], np.float64)
    self.num_words = sum(part.num_words for part in parts)
    self.digest = cache.joined(part.digest for part in parts)
    powers = (words / words.max()) ** (1 / temperature)
    self.shares = tuple((powers / powers.sum()).tolist())

  def __len__(self) -> int:
    return sum(map(len, self._parts))

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    for part in self._parts:
      if row < len(part):
        return part[row]
      row -= len(part)
    raise IndexError(f"row {row} beyond the last of {len(self)}")

  def sentences(self, side: str) -> Int64[np.ndarray, "places"]:
    """Returns the number of its sentence for every real place of a side.

    Those of a direction follow those of the one before.
    """
    sizes = [part.has_ids.size for part in self._parts]
    firsts = np.cumsum([0, *sizes[:-1]])
    numbers = (part.sentences(side) for part in self._parts)
    return np.concatenate(
      [n + first for n, first in zip(numbers, firsts, strict=True)]
    )

  def padding(self) -> dict[str, np.ndarray]:
    """Returns a row without a real target, which fills up a batch."""
    return self._parts[0].padding()

  def order(self, seed: int, passes: int | None = None) -> grain.MapDataset:
    """Mixes the orders of the directions.

    It ends where one of them has been read so many times: above temperature 1
    a small one, before the others are through.
    """
    count = len(self._parts) + 1
    *seeds, last = np.random.SeedSequence(seed).generate_state(count)
    orders = [
      part.order(int(own), passes)
      for part, own in zip(self._parts, seeds, strict=True)
    ]
    if len(orders) == 1:
      return orders[0]
    words_of_row = [part.num_words / len(part) for part in self._parts]
    weights = np.array(self.shares) / words_of_row
    mixed = grain.MapDataset.mix(orders, (weights / weights.sum()).tolist())
    # They take turns there: of two directions every other row, as one of two
    # microbatches is, would be of the same.
    seed = int(last) >> 1
    shuffled = functools.partial(
      grain.experimental.WindowShuffleMapDataset,
      window_size=_WINDOW,
      seed=seed,
    )
    if passes is None:
      return shuffled(mixed)
    # Grain fills up the last window with rows of the next pass.
    full = len(mixed) // _WINDOW * _WINDOW
    parts = [shuffled(mixed[:full]), mixed[full:].shuffle(seed=seed)]
    return grain.MapDataset.concatenate([part for part in parts if len(part)])


Rows = PackedRows | MultiDirection
