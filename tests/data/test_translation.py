"""Pairs packed into rows, mixed and batched."""

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.data import mixture as mixture_lib
from moejax.data import text, translation
from moejax.data.mixture import Mixture
from moejax.data.pieces import Pieces
from moejax.data.translation import PackedPairs, PairTokens, pack

NAMES = (*translation.TARGET_TYPES, *translation.SOURCE_TYPES)
START, END = 1, 2


def make_tokens(counts, first=3):
  """Pairs of so many ids, `</s>` counted; no two ids of a side are alike."""
  ids, lengths = [], np.array(counts, np.int32).reshape(-1, 2)
  for side in lengths.T:
    own = np.arange(first, first + side.sum(), dtype=np.int32)
    own[np.cumsum(side)[side > 0] - 1] = END
    ids.append(own)
  return PairTokens(ids[0], lengths[:, 0], ids[1], lengths[:, 1], str(first))


@pytest.fixture(scope="module")
def pieces():
  texts = [f"word{i} mot{i}" for i in range(99)]
  return Pieces.train(texts, 300, ["fr", "de"])


def make_rows(counts, pieces, row_length, source_length, first=3):
  tokens = make_tokens(counts, first)
  return PackedPairs(tokens, pieces, row_length, source_length)


def random_counts(number, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(2, 9, size=(number, 2)).tolist()


def pairs_of(row):
  """Yields the (source, inputs, targets) of each pair of a row."""
  for number in range(1, row["segment"].max() + 1):
    here, there = (
      row["segment"] == number,
      row["source_segment"] == number,
    )
    yield tuple(
      row[name][places].tolist()
      for name, places in (
        ("source", there),
        ("inputs", here),
        ("targets", here),
      )
    )


# -- packing ------------------------------------------------------------------


@given(
  st.lists(
    st.one_of(
      st.tuples(st.integers(2, 14), st.integers(2, 14)), st.just((0, 0))
    ),
    min_size=1,
    max_size=40,
  ),
  st.integers(2, 12),
  st.integers(2, 12),
)
def test_rows_hold_every_pair_that_fits_once(pieces, counts, row, source):
  tokens = make_tokens(counts)
  fit = [0 < s <= source and t <= row for s, t in counts]
  if not any(fit):
    with pytest.raises(ValueError, match=f"none of {len(counts)} pairs fits"):
      pack(tokens, row, source)
    return
  rows = PackedPairs(tokens, pieces, row, source)
  sides = [
    np.split(ids, np.cumsum(lengths)[:-1])
    for ids, lengths in (tokens[0:2], tokens[2:4])
  ]
  want = [
    (s.tolist(), t.tolist())
    for s, t, fits in zip(*sides, fit, strict=True)
    if fits
  ]
  found = []
  for i in range(len(rows)):
    for source_ids, inputs, targets in pairs_of(rows[i]):
      assert inputs == [START, *targets[:-1]]
      found.append((source_ids, targets))
  assert sorted(found) == sorted(want)
  assert rows.num_words == sum(len(targets) for _, targets in want)


@given(
  st.lists(
    st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=30
  )
)
def test_the_two_sides_of_a_row_agree(pieces, counts):
  rows = make_rows(counts, pieces, 12, 10)
  for row in rows:
    assert {name: row[name].shape for name in NAMES} == {
      **dict.fromkeys(translation.TARGET_TYPES, (12,)),
      **dict.fromkeys(translation.SOURCE_TYPES, (10,)),
    }
    assert row["segment"].max() == row["source_segment"].max() > 0
    np.testing.assert_array_equal(row["mask"], row["segment"] > 0)
    for ids, start, segment in (
      ("targets", "start", "segment"),
      ("source", "source_start", "source_segment"),
    ):
      used = row[segment] > 0
      assert not row[ids][~used].any()
      changes = np.diff(row[segment], prepend=-1) != 0
      np.testing.assert_array_equal(row[start], changes)


def test_a_row_by_hand(pieces):
  rows = make_rows([(3, 2), (2, 4)], pieces, 7, 6)
  assert len(rows) == 1
  row, at = rows[0], rows[0]["segment"].tolist().index
  one, two = pairs_of(row)
  assert sorted([one, two]) == [
    ([3, 4, END], [START, 3], [3, END]),
    ([6, END], [START, 5, 6, 7], [5, 6, 7, END]),
  ]
  assert at(1) < at(2) < at(0) == 6
  assert row["mask"].tolist() == [True] * 6 + [False]
  assert row["source_segment"].tolist().count(0) == 1
  types = translation.TARGET_TYPES | translation.SOURCE_TYPES
  assert {name: row[name].dtype.type for name in row} == types


def test_padding_holds_no_pair(pieces):
  padding = make_rows([(3, 2)], pieces, 4, 5).padding()
  assert padding["start"].tolist() == [True, False, False, False]
  assert padding["source_start"].tolist() == [True, *[False] * 4]
  for name in set(NAMES) - {"start", "source_start"}:
    assert not padding[name].any()


def test_packing_wastes_little():
  rng = np.random.default_rng(0)
  base = rng.gamma(2, 8, size=(20_000, 1)) + 2
  counts = np.minimum(base * rng.lognormal(0, 0.2, (20_000, 2)) + 2, 64)
  tokens = make_tokens(counts.astype(np.int32))
  packing = pack(tokens, 64, 64)
  rows = len(packing.first) - 1
  for length in (packing.source_length, packing.target_length):
    assert len(length) == 20_000
    assert 1 - length.sum() / (64 * rows) < 0.04


def test_packing_depends_on_the_pairs_alone():
  tokens = make_tokens(random_counts(300))
  for one, two in zip(pack(tokens, 16, 12), pack(tokens, 16, 12), strict=True):
    np.testing.assert_array_equal(one, two)


def test_what_is_left_out_is_counted():
  tokens = make_tokens([(3, 3), (0, 0), (6, 3), (3, 6), (5, 5), (0, 0)])
  packing = pack(tokens, 5, 5)
  assert translation.left_out(tokens, packing, 5, 5) == (
    "4 of 6 pairs left out: 2 with an empty side, 2 of more than"
    " source_length=5 or row_length=5 word pieces"
  )
  fits = make_tokens([(3, 3)])
  assert translation.left_out(fits, pack(fits, 5, 5), 5, 5) == ""


def test_rows_end_where_a_sequence_ends(pieces):
  rows = make_rows(random_counts(9), pieces, 10, 10)
  for some in (rows, Mixture([rows, rows])):
    assert len(list(some)) == len(some)
    with pytest.raises(IndexError):
      some[-1]


# -- mixing -------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(pieces):
  """A large direction and a small one, told apart by their ids."""
  return [
    make_rows(random_counts(800), pieces, 16, 16),
    make_rows(random_counts(50, seed=1), pieces, 16, 16, first=100_000),
  ]


def take(iterator, steps):
  return [next(iterator) for _ in range(steps)]


def assert_same(first, second):
  assert len(first) == len(second)
  for a, b in zip(first, second, strict=True):
    for name in NAMES:
      np.testing.assert_array_equal(a[name], b[name], name)


@pytest.mark.parametrize("temperature", [1, 2, 5.0, 100.0])
def test_shares_follow_the_temperature(parts, temperature):
  mixture = Mixture(parts, float(temperature))
  powers = np.array([part.num_words for part in parts]) ** (1 / temperature)
  np.testing.assert_allclose(mixture.shares, powers / powers.sum())
  words = np.zeros(2)
  for batch in take(text.train_batches(mixture, 50, seed=0), 40):
    targets = batch["targets"][batch["mask"]]
    small = np.count_nonzero(targets >= 100_000)
    # `</s>` is alike in both; it is as frequent in either.
    large = np.count_nonzero(targets > END) - small
    words += [large, small]
  np.testing.assert_allclose(words / words.sum(), mixture.shares, atol=0.01)


@pytest.mark.parametrize("process_count", [2, 4])
def test_order_does_not_depend_on_the_processes(parts, process_count):
  mixture = Mixture(parts, 3.0)
  want = take(text.train_batches(mixture, 8, 5), 60)
  processes = [
    take(text.train_batches(mixture, 8, 5, p, process_count), 60)
    for p in range(process_count)
  ]
  got = [
    {n: np.concatenate([part[n] for part in step]) for n in NAMES}
    for step in zip(*processes, strict=True)
  ]
  assert_same(got, want)


def test_resuming_continues_exactly(parts):
  mixture = Mixture(parts, 2.0)
  want = take(text.train_batches(mixture, 8, 1), 50)
  for step in (0, 7, 44):
    iterator = text.train_batches(mixture, 8, 1)
    iterator.set_state({"next_index": step})
    assert_same(take(iterator, 3), want[step : step + 3])
  other = take(text.train_batches(mixture, 8, 2), 50)
  with pytest.raises(AssertionError):
    assert_same(other, want)


def test_both_directions_have_orders_of_their_own(parts, monkeypatch):
  # So that a row of one stays beside the row of the other.
  monkeypatch.setattr(mixture_lib, "_WINDOW", 2)
  mixture = Mixture([parts[0], parts[0]])
  rows = [row["targets"].tobytes() for row in take(iter(mixture.order(0)), 200)]
  assert len(set(rows[::2]) & set(rows[1::2])) < 90
  assert len(set(rows)) > 150


def test_every_microbatch_has_both_directions(pieces):
  """A microbatch is every n-th row of a batch (`step.train_step`)."""
  counts = random_counts(400)
  mixture = Mixture(
    [
      make_rows(counts, pieces, 16, 16, first=first)
      for first in (1000, 100_000)
    ]
  )
  is_second = np.array(
    [
      (batch["targets"] >= 100_000).any(axis=1)
      for batch in take(text.train_batches(mixture, 64, seed=0), 8)
    ]
  )
  for count in (1, 2, 4):
    share = is_second.reshape(8, -1, count).mean(axis=(0, 1))
    assert (np.abs(share - 0.5) < 0.15).all()


def test_one_direction_is_visited_whole(parts):
  order = iter(Mixture(parts[:1]).order(0))
  count = len(parts[0])
  seen = [row["targets"].tobytes() for row in take(order, 2 * count)]
  everything = sorted(row["targets"].tobytes() for row in parts[0])
  assert sorted(seen[:count]) == sorted(seen[count:]) == everything
  assert seen[:count] != seen[count:]


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_reads_every_pair_once(parts, process_count):
  mixture = Mixture(parts, 5.0)
  batches = [
    list(text.eval_batches(mixture, 24, p, process_count))
    for p in range(process_count)
  ]
  found = [
    target
    for step in zip(*batches, strict=True)
    for batch in step
    for target in batch["targets"][batch["mask"]].tolist()
  ]
  assert found == [
    target
    for part in parts
    for row in part
    for target in row["targets"][row["mask"]].tolist()
  ]
  assert len(found) == mixture.num_words


def test_mixtures_that_cannot_be(parts):
  with pytest.raises(ValueError, match="1 direction or more, got 0"):
    Mixture([])
  for temperature in (0.0, -1.0, float("nan")):
    with pytest.raises(ValueError, match="temperature must be above 0, got"):
      Mixture(parts, temperature)
  with pytest.raises(ValueError, match="a batch of 5000 rows is more than"):
    text.train_batches(Mixture(parts), 5000, 0)


def test_rows_of_both_kinds_are_rows(parts):
  for rows in (parts[0], Mixture(parts)):
    assert isinstance(rows, text.Rows)
    assert isinstance(rows.order(0), grain.MapDataset)
  digests = {Mixture(some).digest for some in (parts, parts[:1], parts[::-1])}
  assert len(digests) == 3
