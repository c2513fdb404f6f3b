"""Ids of sentences and pairs, their rows, and several directions mixed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.data import packing
from moejax.data.packing import (
  Direction,
  MultiDirection,
  PackedRows,
  Pairs,
  Tokens,
  pack,
  tokenize,
)
from moejax.data.pieces import Pieces
from moejax.data.vocab import Vocabulary

EN_FR = Direction("en", "fr")
START, END = 1, 2
SENTENCES = [(f"word{i} word{i + 1}", f"mot{i}") for i in range(30)]


def as_pairs(sentences, direction=EN_FR):
  return Pairs(direction, "train", *map(list, zip(*sentences, strict=True)))


def words_of(texts):
  return Pairs(None, "train", None, texts)


def rows_of_words(counts, row_length):
  """Rows of sentences of so many words; no two words are alike."""
  numbers = iter(range(sum(counts)))
  texts = [" ".join(f"w{next(numbers)}" for _ in range(n)) for n in counts]
  vocabulary = Vocabulary.build(texts, min_count=1)
  tokens = tokenize(words_of(texts), vocabulary)
  return PackedRows(tokens, vocabulary, row_length), vocabulary, texts


def tokens_of(counts, first=3):
  """Pairs of so many ids, the end counted; no two ids of a side are alike."""
  counts = np.array(counts, np.int32)
  lengths = {"source": counts[:, 0], "target": counts[:, 1]}
  ids = {}
  for side, own in lengths.items():
    ids[side] = np.arange(first, first + own.sum(), dtype=np.int32)
    ids[side][np.cumsum(own)[own > 0] - 1] = END
  return Tokens(ids, lengths, str(first))


def random_counts(number, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(2, 9, size=(number, 2)).tolist()


@pytest.fixture(scope="module")
def pieces():
  texts = [f"word{i} mot{i}" for i in range(99)]
  return Pieces.train(texts, 300, ["fr", "de"])


# -- ids ----------------------------------------------------------------------


def test_ids_of_sentences():
  vocabulary = Vocabulary.build(["a b"], min_count=1)
  tokens = tokenize(words_of(["a c", "", "b"]), vocabulary)
  unknown, end = vocabulary.unknown, vocabulary.end
  a, b = vocabulary.encode(["a", "b"])
  assert tokens.ids["target"].tolist() == [a, unknown, end, b, end]
  assert tokens.lengths["target"].tolist() == [3, 0, 2]
  rows = PackedRows(tokens, vocabulary, 4)
  assert rows.unknown == 1 / 5
  assert rows.left_out == "1 of 3 left out: 1 without words"
  with pytest.raises(ValueError, match="train holds 0 sentences that have wor"):
    tokenize(words_of(["", " \n"]), vocabulary)


def test_ids_of_pairs(pieces, monkeypatch):
  """A source begins with the tag of the target; blocks follow each other."""
  monkeypatch.setattr(packing, "_BLOCK", 7)
  plain = Pieces.train([f"word{i} mot{i}" for i in range(99)], 300)
  sentences = [*SENTENCES, ("word2", " "), ("", "mot3")]
  for by, tag in ((pieces, [pieces.tag("fr")]), (plain, [])):
    tokens = tokenize(as_pairs(sentences), by)
    for i, (side, first) in enumerate((("source", tag), ("target", []))):
      want = [[*first, *by.encode(pair[i]), END] for pair in SENTENCES]
      assert tokens.ids[side].tolist() == sum(want, [])
      # An empty side empties the pair.
      assert tokens.lengths[side].tolist() == [*map(len, want), 0, 0]
  found = pack(tokens, 20, 20)
  for side in ("source_begin", "target_begin"):
    assert len(set(found[side].tolist())) == len(found[side]) == len(SENTENCES)
  with pytest.raises(ValueError, match="en-fr train holds 0 pairs that have"):
    tokenize(as_pairs(sentences[-2:]), pieces)
  with pytest.raises(ValueError, match="'es' was not trained"):
    tokenize(as_pairs(SENTENCES, Direction("en", "es")), pieces)


def test_digests_are_those_that_runs_have_noted(pieces):
  """A run of an older version goes on only with the same."""
  vocabulary = Vocabulary.build(["a b", "b c d"], min_count=1)
  found = tokenize(words_of(["a b", "b c d"]), vocabulary).digest
  assert found == "5c00ed7dadf12462"
  parts = [
    PackedRows(tokenize(as_pairs(some), pieces), pieces, 20, 20)
    for some in (SENTENCES, SENTENCES[:3])
  ]
  assert MultiDirection(parts).digest == "354004fa45c04ba8"
  # Another text has another one.
  kinds = parts, parts[:1], parts[::-1]
  assert len({MultiDirection(each).digest for each in kinds}) == 3
  digests = {
    tokenize(as_pairs([pair, *SENTENCES[1:]]), pieces).digest
    for pair in (SENTENCES[0], ("word5", "mot0"), (SENTENCES[0][0], "mot7"))
  }
  assert len(digests) == 3


# -- rows of sentences --------------------------------------------------------


def spans_of(row):
  """Yields the (inputs, targets) of each span of a row."""
  used = int(row["mask"].sum())
  starts = np.flatnonzero(row["start"][:used])
  for begin, end in zip(starts, [*starts[1:], used], strict=True):
    yield row["inputs"][begin:end].tolist(), row["targets"][begin:end].tolist()


@given(
  st.lists(st.integers(1, 25), min_size=1, max_size=40), st.integers(1, 12)
)
def test_rows_give_the_sentences_back(counts, row_length):
  rows, vocabulary, texts = rows_of_words(counts, row_length)
  whole, begun, continued = [], [], {}
  for row in rows:
    used = int(row["mask"].sum())
    assert used > 0
    assert row["mask"].tolist() == [True] * used + [False] * (row_length - used)
    rest = [True, *[False] * row_length][: row_length - used]
    assert row["start"][used:].tolist() == rest
    assert not row["inputs"][used:].any() and not row["targets"][used:].any()
    for inputs, targets in spans_of(row):
      assert inputs[1:] == targets[:-1]
      if inputs[0] != vocabulary.start:
        continued[inputs[0]] = targets
      elif targets[-1] == vocabulary.end:
        whole.append(targets)
      else:
        begun.append(targets)
  for targets in begun:  # a cut sentence goes on after its last word
    while targets[-1] != vocabulary.end:
      assert len(targets) % row_length == 0
      targets = targets + continued.pop(targets[-1])
    whole.append(targets)
  assert not continued
  decoded = [" ".join(vocabulary.decode(targets[:-1])) for targets in whole]
  assert sorted(decoded) == sorted(texts)
  assert rows.num_words == sum(counts) + len(counts)


def test_a_row_of_sentences_by_hand():
  (row,), vocabulary, _ = rows_of_words([2, 1], row_length=7)
  a, b, c = vocabulary.encode(["w0", "w1", "w2"])
  end, start = vocabulary.end, vocabulary.start
  assert {name: values.tolist() for name, values in row.items()} == {
    "inputs": [start, a, b, start, c, 0, 0],
    "targets": [a, b, end, c, end, 0, 0],
    "mask": [True] * 5 + [False] * 2,
    "start": [True, False, False] + [True, False] * 2,
  }


# -- rows of pairs ------------------------------------------------------------


def pairs_of(row):
  """Yields the (source, inputs, targets) of each pair of a row."""
  for number in range(1, row["segment"].max() + 1):
    here = row["segment"] == number
    there = row["source_segment"] == number
    yield (
      row["source"][there].tolist(),
      row["inputs"][here].tolist(),
      row["targets"][here].tolist(),
    )


COUNTS = st.lists(
  st.one_of(st.tuples(st.integers(2, 14), st.integers(2, 14)), st.just((0, 0))),
  min_size=1,
  max_size=40,
)


@given(COUNTS, st.integers(2, 12), st.integers(2, 12))
def test_rows_hold_every_pair_that_fits_once(pieces, counts, row, source):
  tokens = tokens_of(counts)
  fit = [0 < s <= source and t <= row for s, t in counts]
  if not any(fit):
    with pytest.raises(ValueError, match=f"none of {len(counts)} pairs fits"):
      pack(tokens, row, source)
    return
  rows = PackedRows(tokens, pieces, row, source)
  sides = [
    np.split(tokens.ids[side], np.cumsum(lengths)[:-1])
    for side, lengths in tokens.lengths.items()
  ]
  want = [
    (s.tolist(), t.tolist())
    for s, t, fits in zip(*sides, fit, strict=True)
    if fits
  ]
  found = []
  for one in rows:
    assert one["segment"].max() == one["source_segment"].max() > 0
    np.testing.assert_array_equal(one["mask"], one["segment"] > 0)
    for ids, start, segment in (
      ("targets", "start", "segment"),
      ("source", "source_start", "source_segment"),
    ):
      assert not one[ids][one[segment] == 0].any()
      assert ids == "source" or not one["inputs"][one[segment] == 0].any()
      changes = np.diff(one[segment], prepend=-1) != 0
      np.testing.assert_array_equal(one[start], changes)
      # Padding is at the end.
      real = one[segment][one[segment] > 0]
      assert (one[segment][: len(real)] == np.sort(real)).all()
    for source_ids, inputs, targets in pairs_of(one):
      assert inputs == [START, *targets[:-1]]
      found.append((source_ids, targets))
  assert sorted(found) == sorted(want)
  assert rows.num_words == sum(len(targets) for _, targets in want)
  out, empty = len(fit) - sum(fit), counts.count((0, 0))
  said = (
    f"{out} of {len(fit)} left out: {empty} without words, {out - empty} of"
    f" more than source_length={source} or row_length={row} word pieces"
  )
  assert rows.left_out == (said if out else "")


# -- rows of both kinds -------------------------------------------------------


@pytest.mark.parametrize("kind", ["words", "pairs", "directions"])
def test_a_row_has_the_shapes_of_a_batch(kind, pieces):
  lengths = (10, 12)
  rows = PackedRows(tokens_of(random_counts(9)), pieces, *lengths)
  if kind == "words":
    rows, lengths = rows_of_words([2, 9, 4, 1, 7], 10)[0], (10,)
  elif kind == "directions":
    rows = MultiDirection([rows, rows])
  shapes = packing.batch_shapes(1, *lengths)
  for row in (*rows, rows.padding()):
    assert {n: (a.dtype, (1, *a.shape)) for n, a in row.items()} == {
      n: (each.dtype, each.shape) for n, each in shapes.items()
    }
  assert len(list(rows)) == len(rows)
  with pytest.raises(IndexError):
    rows[-1]
  for name, values in rows.padding().items():
    first = name.endswith("start")
    assert values.tolist() == [first, *[False] * (len(values) - 1)]


@pytest.mark.parametrize("sides", [1, 2])
def test_packing_wastes_little(sides):
  rng = np.random.default_rng(0)
  base = rng.gamma(2, 8, size=(9_999, 1)) + 2
  counts = np.minimum(base * rng.lognormal(0, 0.2, (9_999, 2)) + 2, 64)
  tokens = tokens_of(counts.astype(np.int32))
  if sides == 1:
    tokens.ids.pop("source")
    tokens.lengths.pop("source")
  found = pack(tokens, 64, 64 if sides == 2 else 0)
  for side, lengths in tokens.lengths.items():
    used = found[f"{side}_length"].sum()
    assert used == lengths.sum()
    assert 1 - used / (64 * (len(found["first"]) - 1)) < 0.04


# -- several directions -------------------------------------------------------


@pytest.fixture(scope="module")
def parts(pieces):
  """Two large directions and a small one, told apart by their ids."""
  return [
    PackedRows(tokens_of(counts, first), pieces, 16, 16)
    for counts, first in (
      (random_counts(400), 3),
      (random_counts(400), 100_000),
      (random_counts(50, 1), 100_000),
    )
  ]


def of_second(rows):
  """Targets of the first and of the second direction in each row."""
  # The end is alike in both.
  words = [row["targets"][row["targets"] > END] for row in rows]
  return np.array([[np.sum(w < 1e5), np.sum(w >= 1e5)] for w in words])


def take(order, count):
  return [order[i] for i in range(count)]


@pytest.mark.parametrize("temperature", [1, 2.5])
def test_shares_follow_the_temperature(parts, temperature):
  parts = [parts[0], parts[2]]
  mixed = MultiDirection(parts, float(temperature))
  powers = np.array([part.num_words for part in parts]) ** (1 / temperature)
  np.testing.assert_allclose(mixed.shares, powers / powers.sum())
  words = of_second(take(mixed.order(0), 400)).sum(0)
  np.testing.assert_allclose(words / words.sum(), mixed.shares, atol=0.02)


def test_directions_are_mixed_within_every_batch(parts, monkeypatch):
  """A microbatch is every n-th row of a batch (`step.train_step`)."""
  rows = take(MultiDirection(parts[:2]).order(0), 512)
  second = of_second(rows)[:, 1] > 0
  for count in (1, 2, 4):
    share = second.reshape(8, -1, count).mean(axis=(0, 1))
    assert (np.abs(share - 0.5) < 0.15).all()
  # Both have orders of their own: no row stays beside the row of the other.
  monkeypatch.setattr(packing, "_WINDOW", 2)
  mixed = MultiDirection([parts[0], parts[0]])
  rows = [row["targets"].tobytes() for row in take(mixed.order(0), 60)]
  assert len(set(rows[::2]) & set(rows[1::2])) < 15
  assert len(set(rows)) > 45


def test_temperatures_that_cannot_be(parts):
  for temperature in (0.0, -1.0, float("nan")):
    with pytest.raises(ValueError, match="temperature must be above 0, got"):
      MultiDirection(parts, temperature)
