"""Ids of sentences and pairs, their rows, and several directions mixed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.data import batches, packing
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
  ids = {}
  lengths = dict(
    zip(("source", "target"), np.array(counts, np.int32).T, strict=True)
  )
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


def test_sources_begin_with_the_tag_of_the_target(pieces):
  plain = Pieces.train([f"word{i} mot{i}" for i in range(99)], 300)
  for by, tag in ((pieces, [pieces.tag("fr")]), (plain, [])):
    tokens = tokenize(as_pairs(SENTENCES), by)
    both = zip(tokens.ids, SENTENCES[0], (tag, []), strict=True)
    for side, text, first in both:
      want = [*first, *by.encode(text), END]
      assert tokens.ids[side][: len(want)].tolist() == want
      assert tokens.lengths[side][0] == len(want)
      assert len(tokens.lengths[side]) == len(SENTENCES)
  with pytest.raises(ValueError, match="'es' was not trained"):
    tokenize(as_pairs(SENTENCES, Direction("en", "es")), pieces)


def test_an_empty_side_empties_the_pair(pieces):
  sentences = [("word1", "mot1"), ("word2", " "), ("", "mot3")]
  tokens = tokenize(as_pairs(sentences), pieces)
  for lengths in tokens.lengths.values():
    assert (lengths > 0).tolist() == [True, False, False]
  with pytest.raises(ValueError, match="en-fr train holds 0 pairs that have"):
    tokenize(as_pairs(sentences[1:]), pieces)


def test_another_text_has_another_digest(pieces):
  digests = {
    tokenize(as_pairs(sentences), pieces).digest
    for sentences in (
      SENTENCES,
      [("word5", "mot0"), *SENTENCES[1:]],
      [(SENTENCES[0][0], "mot7"), *SENTENCES[1:]],
      SENTENCES,
    )
  }
  assert len(digests) == 3


def test_digests_are_those_that_runs_have_noted(pieces):
  """A run of an older version goes on only with the same."""
  vocabulary = Vocabulary.build(["a b", "b c d"], min_count=1)
  found = tokenize(words_of(["a b", "b c d"]), vocabulary).digest
  assert found == "5c00ed7dadf12462"
  mixed = MultiDirection(
    [
      PackedRows(tokenize(as_pairs(some), pieces), pieces, 20, 20)
      for some in (SENTENCES, SENTENCES[:3])
    ]
  )
  assert mixed.digest == "354004fa45c04ba8"


def test_blocks_of_pairs_follow_each_other(pieces, monkeypatch):
  whole = tokenize(as_pairs(SENTENCES), pieces)
  monkeypatch.setattr(packing, "_BLOCK", 7)
  parts = tokenize(as_pairs(SENTENCES), pieces)
  assert whole.digest == parts.digest
  found = pack(parts, 20, 20)
  for begin in found.begin.values():
    assert len(set(begin.tolist())) == len(begin) == len(SENTENCES)


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


def test_a_sentence_is_cut_only_where_it_must_be():
  rows, vocabulary, _ = rows_of_words([5, 7, 2], row_length=4)
  found = [span for row in rows for span in spans_of(row)]
  lengths = sorted(len(targets) for _, targets in found)
  assert lengths == [2, 3, 4, 4, 4]  # 6 = 4 + 2, 8 = 4 + 4, 3
  assert sum(inputs[0] == vocabulary.start for inputs, _ in found) == 3


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
      changes = np.diff(one[segment], prepend=-1) != 0
      np.testing.assert_array_equal(one[start], changes)
    for source_ids, inputs, targets in pairs_of(one):
      assert inputs == [START, *targets[:-1]]
      found.append((source_ids, targets))
  assert sorted(found) == sorted(want)
  assert rows.num_words == sum(len(targets) for _, targets in want)
  empty = counts.count((0, 0))
  said = f"{empty} without words, {len(fit) - sum(fit) - empty} of more than so"
  assert (said in rows.left_out) or all(fit)


def test_a_row_of_pairs_by_hand(pieces):
  (row,) = PackedRows(tokens_of([(3, 2), (2, 4)]), pieces, 7, 6)
  one, two = pairs_of(row)
  assert sorted([one, two]) == [
    ([3, 4, END], [START, 3], [3, END]),
    ([6, END], [START, 5, 6, 7], [5, 6, 7, END]),
  ]
  at = row["segment"].tolist().index
  assert at(1) < at(2) < at(0) == 6
  assert row["source_segment"].tolist().count(0) == 1


def test_what_is_left_out_is_said(pieces):
  counts = [(3, 3), (0, 0), (6, 3), (3, 6), (5, 5), (0, 0)]
  assert PackedRows(tokens_of(counts), pieces, 5, 5).left_out == (
    "4 of 6 left out: 2 without words, 2 of more than source_length=5 or"
    " row_length=5 word pieces"
  )
  assert PackedRows(tokens_of([(3, 3)]), pieces, 5, 5).left_out == ""


# -- rows of both kinds -------------------------------------------------------


@pytest.fixture(scope="module", params=["words", "pairs", "directions"])
def rows(request, pieces):
  if request.param == "words":
    return rows_of_words([2, 9, 4, 1, 7], 10)[0]
  rows = PackedRows(tokens_of(random_counts(9)), pieces, 10, 12)
  return rows if request.param == "pairs" else MultiDirection([rows, rows])


def test_a_row_has_the_shapes_of_a_batch(rows):
  lengths = (10, 12) if "source" in rows[0] else (10,)
  shapes = packing.batch_shapes(1, *lengths)
  for row in (*rows, rows.padding()):
    assert {n: (a.dtype, (1, *a.shape)) for n, a in row.items()} == {
      n: (each.dtype, each.shape) for n, each in shapes.items()
    }
  assert len(list(rows)) == len(rows)
  with pytest.raises(IndexError):
    rows[-1]


def test_padding_holds_nothing(rows):
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
  for side, length in found.length.items():
    assert length.sum() == tokens.lengths[side].sum()
    assert 1 - length.sum() / (64 * (len(found.first) - 1)) < 0.04


# -- several directions -------------------------------------------------------


@pytest.fixture(scope="module")
def parts(pieces):
  """A large direction and a small one, told apart by their ids."""
  return [
    PackedRows(tokens_of(random_counts(400)), pieces, 16, 16),
    PackedRows(tokens_of(random_counts(50, 1), 100_000), pieces, 16, 16),
  ]


def take(order, count):
  return [order[i] for i in range(count)]


@pytest.mark.parametrize("temperature", [1, 2.5, 100.0])
def test_shares_follow_the_temperature(parts, temperature):
  mixed = MultiDirection(parts, float(temperature))
  powers = np.array([part.num_words for part in parts]) ** (1 / temperature)
  np.testing.assert_allclose(mixed.shares, powers / powers.sum())
  words = np.zeros(2)
  for row in take(mixed.order(0), 800):
    targets = row["targets"][row["mask"]]
    # The end is alike in both.
    words += [np.sum((targets > END) & (targets < 1e5)), np.sum(targets >= 1e5)]
  np.testing.assert_allclose(words / words.sum(), mixed.shares, atol=0.015)


def test_both_directions_have_orders_of_their_own(parts, monkeypatch):
  # So that a row of one stays beside the row of the other.
  monkeypatch.setattr(packing, "_WINDOW", 2)
  mixed = MultiDirection([parts[0], parts[0]])
  rows = [row["targets"].tobytes() for row in take(mixed.order(0), 80)]
  assert len(set(rows[::2]) & set(rows[1::2])) < 20
  assert len(set(rows)) > 60


def test_every_microbatch_has_both_directions(pieces):
  """A microbatch is every n-th row of a batch (`step.train_step`)."""
  counts = random_counts(400)
  mixed = MultiDirection(
    [
      PackedRows(tokens_of(counts, first), pieces, 16, 16)
      for first in (1000, 100_000)
    ]
  )
  rows = take(mixed.order(0), 512)
  second = np.array([(row["targets"] >= 100_000).any() for row in rows])
  for count in (1, 2, 4):
    share = second.reshape(8, -1, count).mean(axis=(0, 1))
    assert (np.abs(share - 0.5) < 0.15).all()


def test_one_direction_is_visited_whole(parts):
  count = len(parts[0])
  order = take(MultiDirection(parts[:1]).order(0), 2 * count)
  seen = [row["targets"].tobytes() for row in order]
  everything = sorted(row["targets"].tobytes() for row in parts[0])
  assert sorted(seen[:count]) == sorted(seen[count:]) == everything
  assert seen[:count] != seen[count:]


def test_directions_that_cannot_be(parts):
  for temperature in (0.0, -1.0, float("nan")):
    with pytest.raises(ValueError, match="temperature must be above 0, got"):
      MultiDirection(parts, temperature)
  with pytest.raises(ValueError, match="a batch of 5000 rows is more than"):
    batches.train_batches(MultiDirection(parts), 5000, 0)
  some = (parts, parts[:1], parts[::-1])
  assert len({MultiDirection(each).digest for each in some}) == 3
