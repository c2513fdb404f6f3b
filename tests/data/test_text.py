"""Packing, and batches whose order is a pure function."""

import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.data.text import (
  PackedRows,
  digest,
  eval_batches,
  pack,
  tokenise,
  train_batches,
)
from moejax.data.vocab import Vocabulary

NAMES = ("inputs", "targets", "mask", "start")


def make_rows(counts, row_length):
  """Rows of sentences of so many words; no two words are alike."""
  numbers = iter(range(sum(counts)))
  texts = [" ".join(f"w{next(numbers)}" for _ in range(n)) for n in counts]
  vocabulary = Vocabulary.build(texts, min_count=1)
  return PackedRows(tokenise(texts, vocabulary), vocabulary, row_length), (
    vocabulary,
    texts,
  )


@pytest.fixture(scope="module")
def rows():
  counts = np.random.default_rng(0).integers(1, 14, size=100).tolist()
  return make_rows(counts, 10)[0]


def pieces_of(row):
  """Yields the (inputs, targets) of each piece of a row."""
  used = int(row["mask"].sum())
  starts = np.flatnonzero(row["start"][:used])
  for begin, end in zip(starts, [*starts[1:], used], strict=True):
    yield row["inputs"][begin:end].tolist(), row["targets"][begin:end].tolist()


# -- packing ------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
  st.lists(st.integers(1, 25), min_size=1, max_size=40), st.integers(1, 12)
)
def test_rows_give_the_sentences_back(counts, row_length):
  rows, (vocabulary, texts) = make_rows(counts, row_length)
  whole, begun, continued = [], [], {}
  for row in (rows[i] for i in range(len(rows))):
    used = int(row["mask"].sum())
    assert used > 0
    assert row["mask"].tolist() == [True] * used + [False] * (row_length - used)
    assert (
      row["start"][used:].tolist()
      == [True, *[False] * row_length][: row_length - used]
    )
    assert not row["inputs"][used:].any() and not row["targets"][used:].any()
    for inputs, targets in pieces_of(row):
      assert inputs[1:] == targets[:-1]
      if inputs[0] != vocabulary.start:
        continued[inputs[0]] = targets
      elif targets[-1] == vocabulary.end:
        whole.append(targets)
      else:
        begun.append(targets)
  for targets in begun:  # a cut sentence goes on after its last word
    while targets[-1] != vocabulary.end:
      assert len(continued[targets[-1]]) <= row_length
      targets = targets + continued.pop(targets[-1])
    whole.append(targets)
  assert not continued
  decoded = [" ".join(vocabulary.decode(targets[:-1])) for targets in whole]
  assert sorted(decoded) == sorted(texts)
  assert rows.num_words == sum(counts) + len(counts)


def test_a_sentence_is_cut_only_where_it_must_be():
  rows, (vocabulary, _) = make_rows([5, 7, 2], row_length=4)
  found = [pieces for i in range(len(rows)) for pieces in pieces_of(rows[i])]
  lengths = sorted(len(targets) for _, targets in found)
  assert lengths == [2, 3, 4, 4, 4]  # 6 = 4 + 2, 8 = 4 + 4, 3
  assert sum(inputs[0] == vocabulary.start for inputs, _ in found) == 3


def test_a_row_by_hand():
  rows, (vocabulary, _) = make_rows([2, 1], row_length=7)
  row = rows[0]
  a, b, c = vocabulary.encode(["w0", "w1", "w2"])
  end, start = vocabulary.end, vocabulary.start
  assert len(rows) == 1
  assert row["inputs"].tolist() == [start, a, b, start, c, 0, 0]
  assert row["targets"].tolist() == [a, b, end, c, end, 0, 0]
  assert row["mask"].tolist() == [True] * 5 + [False] * 2
  assert row["start"].tolist() == [True, False, False] + [True, False] * 2
  kinds = {name: row[name].dtype for name in NAMES}
  assert kinds == dict(
    zip(NAMES, [np.int32, np.int32, bool, bool], strict=True)
  )


def test_packing_wastes_little():
  lengths = np.random.default_rng(0).geometric(0.05, size=5000) + 1
  packing = pack(lengths, 64)
  places = 64 * (len(packing.first) - 1)
  assert packing.length.sum() == lengths.sum()
  assert 1 - lengths.sum() / places < 0.03


def test_rows_end_where_a_sequence_ends(rows):
  assert len(list(rows)) == len(rows)
  with pytest.raises(IndexError):
    rows[-1]


def test_refusals():
  vocabulary = Vocabulary.build(["a"], min_count=1)
  with pytest.raises(ValueError, match="0 words"):
    tokenise(["", " \n"], vocabulary)
  with pytest.raises(ValueError, match="row_length must be 1 or more, got 0"):
    pack(np.array([3]), 0)


def test_sentences_without_words_are_left_out():
  vocabulary = Vocabulary.build(["a b"], min_count=1)
  tokens = tokenise(["a c", "", "b"], vocabulary)
  unknown, end = vocabulary.unknown, vocabulary.end
  a, b = vocabulary.encode(["a", "b"])
  assert tokens.ids.tolist() == [a, unknown, end, b, end]
  assert tokens.lengths.tolist() == [3, 2]


def test_a_digest_copies_nothing():
  ids = np.arange(2**20, dtype=np.int32)
  tracemalloc.start()
  found = digest(ids)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < ids.nbytes / 10
  assert found != digest(ids + np.int32(1))


# -- order --------------------------------------------------------------------


def take(iterator, steps):
  return [next(iterator) for _ in range(steps)]


def whole_batches(rows, batch_size, seed, process_count, steps):
  parts = [
    take(train_batches(rows, batch_size, seed, p, process_count), steps)
    for p in range(process_count)
  ]
  return [
    {n: np.concatenate([part[s][n] for part in parts]) for n in NAMES}
    for s in range(steps)
  ]


def assert_same(first, second):
  assert len(first) == len(second)
  for a, b in zip(first, second, strict=True):
    for name in NAMES:
      np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("process_count", [2, 4])
def test_order_does_not_depend_on_the_processes(rows, process_count):
  steps = 3 * len(rows) // 8  # across two ends of an epoch
  expected = whole_batches(rows, 8, 5, 1, steps)
  assert expected[0]["targets"].shape == (8, 10)
  assert_same(whole_batches(rows, 8, 5, process_count, steps), expected)


def test_resuming_continues_exactly(rows):
  steps = 2 * len(rows) // 8
  iterator = train_batches(rows, 8, seed=1)
  states, batches = [], []
  for _ in range(steps):
    states.append(json.loads(json.dumps(iterator.get_state())))
    batches.append(next(iterator))
  assert states == [{"next_index": step} for step in range(steps)]
  again = train_batches(rows, 8, seed=1)
  for step in (steps - 2, 0, 3, len(rows) // 8):
    again.set_state(states[step])
    assert_same(take(again, 2), batches[step : step + 2])


def test_a_state_serves_any_number_of_processes(rows):
  one = train_batches(rows, 8, seed=1)
  take(one, 5)
  two = [train_batches(rows, 8, 1, p, 2) for p in range(2)]
  for iterator in two:
    iterator.set_state(one.get_state())
  parts = [next(iterator) for iterator in two]
  whole = {n: np.concatenate([part[n] for part in parts]) for n in NAMES}
  assert_same([whole], [next(one)])


def keys(batches):
  return [targets.tobytes() for b in batches for targets in b["targets"]]


def test_every_epoch_holds_all_rows_in_an_order_of_its_own(rows):
  count = len(rows)
  visited = keys(take(train_batches(rows, count // 2, seed=0), 7))
  epochs = [visited[e * count : (e + 1) * count] for e in range(3)]
  everything = sorted(row["targets"].tobytes() for row in rows)
  for epoch in epochs:
    assert sorted(epoch) == everything
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_seeds_are_unrelated(rows):
  count = len(rows)
  zero = keys(take(train_batches(rows, count, seed=0), 2))
  one = keys(take(train_batches(rows, count, seed=1), 1))
  assert one != zero[:count]
  assert one != zero[count:]  # nor the same orders an epoch apart


def test_each_process_makes_its_own_rows_only():
  made = []

  class Counted(PackedRows):
    def __getitem__(self, row):
      made.append(row)
      return super().__getitem__(row)

  vocabulary = Vocabulary.build(["a b c"], min_count=1)
  rows = Counted(tokenise(["a b c"] * 200, vocabulary), vocabulary, 4)
  iterator = train_batches(rows, 40, 0, process_index=1, process_count=4)
  take(iterator, 3)
  iterator.close()
  ahead = 4
  assert 3 * 10 <= len(made) <= (3 + ahead) * 10 + 1


def test_batches_that_cannot_be(rows):
  with pytest.raises(ValueError, match="10 rows does not divide over 4 proc"):
    train_batches(rows, 10, 0, 0, process_count=4)
  with pytest.raises(ValueError, match="10 rows does not divide over 4 proc"):
    eval_batches(rows, 10, 0, process_count=4)
  message = f"1000 rows is more than the corpus has, {len(rows)} rows"
  with pytest.raises(ValueError, match=message):
    train_batches(rows, 1000, 0)


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [8, 12, 400])
def test_evaluation_counts_every_word_once(rows, batch_size, process_count):
  parts = [
    list(eval_batches(rows, batch_size, p, process_count))
    for p in range(process_count)
  ]
  steps = -(-len(rows) // batch_size)
  assert [len(part) for part in parts] == [steps] * process_count
  found = []
  for batch in (batch for step in zip(*parts, strict=True) for batch in step):
    assert batch["inputs"].shape == (batch_size // process_count, 10)
    assert batch["start"][:, 0].all()
    found.extend(batch["targets"][batch["mask"]].tolist())
  expected = [
    word for row in rows for word in row["targets"][row["mask"]].tolist()
  ]
  assert found == expected
  assert len(found) == rows.num_words


def test_nothing_is_left_running_at_exit():
  program = """
from moejax.data.text import PackedRows, eval_batches, tokenise, train_batches
from moejax.data.vocab import Vocabulary
vocabulary = Vocabulary.build(["a b c"], 1)
rows = PackedRows(tokenise(["a b c"] * 99, vocabulary), vocabulary, 8)
batches = train_batches(rows, 4, 0)
next(batches), next(eval_batches(rows, 4))
"""
  done = subprocess.run(
    [sys.executable, "-X", "dev", "-W", "error", "-c", program],
    capture_output=True,
    timeout=60,
    text=True,
  )
  assert (done.returncode, done.stderr) == (0, "")
