"""Pairs packed into rows, kept, mixed and batched."""

import os
import re

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.data import pair_ids, pairs, text, translation
from moejax.data.pairs import Direction, Pairs
from moejax.data.pieces import Pieces
from moejax.data.translation import Mixture, PackedPairs, PairTokens, pack

EN_FR = Direction("en", "fr")
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


# -- ids ----------------------------------------------------------------------

SENTENCES = [(f"word{i} word{i + 1}", f"mot{i}") for i in range(30)]


def make_pairs(sentences, direction=EN_FR):
  sources, targets = map(list, zip(*sentences, strict=True))
  return Pairs(direction, "train", sources, targets)


def test_sources_begin_with_the_tag_of_the_target(pieces):
  tokens = pair_ids.tokenise(make_pairs(SENTENCES), pieces)
  source, target = SENTENCES[0]
  sources = [pieces.tag("fr"), *pieces.encode(source), END]
  targets = [*pieces.encode(target), END]
  assert tokens.source_ids[: len(sources)].tolist() == sources
  assert tokens.source_lengths[0] == len(sources)
  assert tokens.target_ids[: len(targets)].tolist() == targets
  assert tokens.target_lengths[0] == len(targets)
  assert len(tokens.target_lengths) == len(SENTENCES)
  with pytest.raises(ValueError, match="'es' was not trained"):
    pair_ids.tokenise(make_pairs(SENTENCES, Direction("en", "es")), pieces)


def test_one_target_language_needs_no_tag():
  plain = Pieces.train([f"word{i} mot{i}" for i in range(99)], 300)
  tokens = pair_ids.tokenise(make_pairs(SENTENCES), plain)
  sources = [*plain.encode(SENTENCES[0][0]), END]
  assert tokens.source_ids[: len(sources)].tolist() == sources


def test_blocks_of_pairs_follow_each_other(pieces, monkeypatch):
  whole = pair_ids.tokenise(make_pairs(SENTENCES), pieces)
  monkeypatch.setattr(translation, "_BLOCK", 7)
  parts = pair_ids.tokenise(make_pairs(SENTENCES), pieces)
  for one, two in zip(whole[:4], parts[:4], strict=True):
    np.testing.assert_array_equal(one, two)
  packing = pack(parts, 20, 20)
  assert len(packing.source_begin) == len(SENTENCES)
  assert len(set(packing.target_begin.tolist())) == len(SENTENCES)


def test_an_empty_side_empties_the_pair(pieces):
  sentences = [("word1", "mot1"), ("word2", " "), ("", "mot3")]
  tokens = pair_ids.tokenise(make_pairs(sentences), pieces)
  assert (tokens.source_lengths > 0).tolist() == [True, False, False]
  assert (tokens.target_lengths > 0).tolist() == [True, False, False]
  with pytest.raises(ValueError, match="en-fr train holds 0 pairs of which"):
    pair_ids.tokenise(make_pairs(sentences[1:]), pieces)


def test_another_text_has_another_digest(pieces):
  digests = {
    pair_ids.tokenise(make_pairs(sentences), pieces).digest
    for sentences in (
      SENTENCES,
      [("word5", "mot0"), *SENTENCES[1:]],
      [(SENTENCES[0][0], "mot7"), *SENTENCES[1:]],
      SENTENCES,
    )
  }
  assert len(digests) == 3


def test_what_is_too_long_is_reported(pieces, capfd):
  long = ("word1 " * 30, "mot1")
  mixture = pair_ids.rows([make_pairs([*SENTENCES, long])], pieces, 20, 20)
  assert re.fullmatch(
    r"en-fr train: 1 of 31 pairs left out: 0 with an empty side, 1 of more than"
    r" source_length=20 or row_length=20 word pieces\n",
    capfd.readouterr().err,
  )
  assert mixture.num_words == sum(
    len(pieces.encode(target)) + 1 for _, target in SENTENCES
  )


# -- keeping ------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path):
  path = tmp_path / "a.tsv"
  path.write_text("\n".join(map("\t".join, SENTENCES)), encoding="utf-8")
  files = {EN_FR: [path]}
  return pairs.open_pairs(files, {}, {}, tmp_path, both_directions=True)


@pytest.fixture
def made(monkeypatch):
  """The directions whose ids were made, and the rows that were packed to."""
  calls = []
  write, pack_rows = translation.write_tokens, translation.pack

  def counted(some, *rest):
    calls.append(str(some.direction))
    return write(some, *rest)

  def packed(tokens, *lengths):
    calls.append(lengths)
    return pack_rows(tokens, *lengths)

  monkeypatch.setattr(translation, "write_tokens", counted)
  monkeypatch.setattr(translation, "pack", packed)
  return calls


def test_ids_and_packings_are_made_once(pieces, made, tmp_path, capfd):
  path = tmp_path / "a.tsv"
  path.write_text("\n".join(map("\t".join, SENTENCES)), encoding="utf-8")
  open_train = pairs.open_pairs({EN_FR: [path]}, {}, {}, tmp_path)["train"]
  first = pair_ids.rows(open_train, pieces, 20, 20)
  assert made == ["en-fr", (20, 20)]
  assert "turning 27 pairs into word pieces (once)" in capfd.readouterr().err
  again = pair_ids.rows(open_train, pieces, 20, 20)
  assert made == ["en-fr", (20, 20)]
  assert capfd.readouterr().err == ""
  assert first.digest == again.digest
  assert len(first) == len(again)
  for one, two in zip(first, again, strict=True):
    assert_same([one], [two])
  in_memory = make_pairs(SENTENCES[:9] + SENTENCES[10:19] + SENTENCES[20:29])
  tokens = pair_ids.tokenise(open_train[0], pieces)
  want = pair_ids.tokenise(in_memory, pieces)
  assert tokens.digest == want.digest
  assert isinstance(tokens.source_ids.base, np.memmap)


def test_anything_else_is_made_anew(opened, pieces, made):
  there, back = opened["train"]
  other = Pieces.train([f"word{i} mot{i}" for i in range(9)], 290, ["fr", "en"])
  seen = []
  for some, by in ((there, pieces), (there, other), (back, other)):
    seen.append(pair_ids.tokenise(some, by).digest)
  assert made == ["en-fr", "en-fr", "fr-en"]
  assert len(set(seen)) == 3
  pair_ids.tokenise(opened["test"][0], pieces)
  assert len(made) == 4
  tokens = pair_ids.tokenise(there, pieces)
  for lengths in ((20, 20), (20, 24), (24, 20), (20, 20)):
    pair_ids.pack(tokens, *lengths)
  assert made[4:] == [(20, 20), (20, 24), (24, 20)]


@pytest.mark.parametrize("name", ["source_ids", "target_lengths"])
def test_damaged_ids_are_made_anew(opened, pieces, made, name):
  there = opened["train"][0]
  tokens = pair_ids.tokenise(there, pieces)
  want = [np.copy(array) for array in tokens[:4]]
  path = tokens.folder / name
  path.write_bytes(path.read_bytes()[:-4])
  again = pair_ids.tokenise(there, pieces)
  for one, two in zip(again[:4], want, strict=True):
    np.testing.assert_array_equal(one, two)
  assert made == ["en-fr", "en-fr"]


def test_a_disk_that_keeps_nothing_does_no_harm(
  opened, pieces, monkeypatch, capfd
):
  def full(descriptor):
    raise OSError(28, "No space left on device")

  want = pair_ids.rows(opened["train"][:1], pieces, 20, 20)
  monkeypatch.setattr(os, "fsync", full)
  got = pair_ids.rows(opened["train"][:1], pieces, 20, 24)
  assert got.digest == want.digest
  other = pair_ids.tokenise(opened["test"][0], pieces)
  assert other.folder is None
  said = capfd.readouterr().err
  assert "27 pairs are packed in memory, at every start" in said
  assert "ids of 1 pairs are made in memory, at every start" in said


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


def test_both_directions_have_orders_of_their_own(parts):
  mixture = Mixture([parts[0], parts[0]])
  rows = [row["targets"].tobytes() for row in take(iter(mixture.order(0)), 200)]
  assert len(set(rows[::2]) & set(rows[1::2])) < 90
  assert len(set(rows)) > 150


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
