"""Batches whose order is a pure function, and lines that are translated."""

import collections
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.data.batches import (
  cut,
  eval_batches,
  num_batches,
  source_rows,
  train_batches,
)
from moejax.data.packing import MultiDirection, PackedRows, Pairs, tokenize
from moejax.data.pieces import Pieces
from moejax.data.vocab import Vocabulary, sentences

# -- training and evaluation --------------------------------------------------


def packed(counts, row_length=10):
  texts = [" ".join(f"w{i}{j}" for j in range(n)) for i, n in enumerate(counts)]
  vocabulary = Vocabulary.build(texts, min_count=1)
  tokens = tokenize(Pairs(None, "train", None, texts), vocabulary)
  return PackedRows(tokens, vocabulary, row_length)


@pytest.fixture(scope="module", params=["words", "directions"])
def rows(request):
  rng = np.random.default_rng(0)
  one, other = (packed(rng.integers(1, 14, size=n).tolist()) for n in (100, 20))
  return one if request.param == "words" else MultiDirection([one, other], 3.0)


def take(iterator, steps):
  return [next(iterator) for _ in range(steps)]


def whole(parts):
  """The batches of all processes, as those of one."""
  return [
    {n: np.concatenate([part[n] for part in step]) for n in step[0]}
    for step in zip(*parts, strict=True)
  ]


def assert_same(first, second):
  assert len(first) == len(second)
  for a, b in zip(first, second, strict=True):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("count", [2, 4])
def test_order_does_not_depend_on_the_processes(rows, count):
  steps = 3 * len(rows) // 8  # across two ends of an epoch
  want = take(train_batches(rows, 8, 5), steps)
  assert want[0]["targets"].shape == (8, 10)
  parts = [
    take(train_batches(rows, 8, 5, p, count), steps) for p in range(count)
  ]
  assert_same(whole(parts), want)


def test_resuming_continues_exactly(rows):
  iterator = train_batches(rows, 8, seed=1)
  states, want = [], []
  for _ in range(2 * len(rows) // 8):
    states.append(json.loads(json.dumps(iterator.get_state())))
    want.append(next(iterator))
  assert states == [{"next_index": step} for step in range(len(states))]
  again = train_batches(rows, 8, seed=1)
  # A state serves any number of processes.
  two = [train_batches(rows, 8, 1, p, 2) for p in range(2)]
  for step in (len(states) - 2, 0, 3, len(rows) // 8):
    for each in (again, *two):
      each.set_state(states[step])
    assert_same(take(again, 2), want[step : step + 2])
    assert_same(whole([take(each, 2) for each in two]), want[step : step + 2])


def test_every_epoch_holds_all_rows_in_an_order_of_its_own():
  rows = packed([3, 5, 8, 2, 7] * 12)
  count = len(rows)

  def visited(seed, epochs):
    taken = take(train_batches(rows, count, seed), epochs)
    return [[row.tobytes() for row in batch["targets"]] for batch in taken]

  epochs = visited(0, 3)
  everything = sorted(row["targets"].tobytes() for row in rows)
  assert all(sorted(epoch) == everything for epoch in epochs)
  # Nor has another seed the same orders an epoch apart.
  orders = epochs + visited(1, 1)
  assert len(set(map(tuple, orders))) == 4


class Numbered(PackedRows):
  """Rows that tell which they are."""

  def __init__(self, part, count):
    texts = Pairs(None, "train", None, ["a b c"] * count)
    vocabulary = Vocabulary.build(texts.targets, min_count=1)
    super().__init__(tokenize(texts, vocabulary), vocabulary, 4)
    self._part = part

  def __getitem__(self, row):
    return {"row": np.array([self._part, row])}


@pytest.mark.parametrize(
  "counts, temperature",
  [((90,), 1.0), ((3100, 90, 700), 1.0), ((90, 700), 3.0)],
)
@pytest.mark.parametrize("passes", [1, 2])
def test_no_row_is_read_more_often_than_promised(counts, temperature, passes):
  parts = [Numbered(part, count) for part, count in enumerate(counts)]
  rows = parts[0]
  if len(parts) > 1:
    rows = MultiDirection(parts, temperature)
  steps = num_batches(rows, 16, passes)
  two = [train_batches(rows, 16, 3, p, 2, passes=passes) for p in range(2)]
  batches = whole([list(each) for each in two])
  assert [len(batch["row"]) for batch in batches] == [16] * steps
  seen = collections.Counter(
    tuple(row) for batch in batches for row in batch["row"].tolist()
  )
  assert max(seen.values()) == passes
  # Hardly a row is left out, of all or of those that are read more often.
  read = [sum(n for (p, _), n in seen.items() if p == at) for at in range(9)]
  shares = np.array(read[: len(counts)]) / counts / passes
  assert shares.max() > 1 - 17 / min(counts)
  assert temperature > 1 or shares.min() > 1 - 17 / min(counts)
  # They come as without an end, but for those of the last window.
  endless = train_batches(rows, 16, 3)
  same = steps if len(parts) == 1 else steps * 16 // 1024 * 64
  assert_same(take(endless, same), batches[:same])
  # The state serves to go on.
  two[0].set_state({"next_index": steps - 1})
  np.testing.assert_array_equal(next(two[0])["row"], batches[-1]["row"][:8])
  with pytest.raises(StopIteration):
    next(two[0])


def test_each_process_makes_its_own_rows_only():
  made = []

  class Counted(PackedRows):
    def __getitem__(self, row):
      made.append(row)
      return super().__getitem__(row)

  vocabulary = Vocabulary.build(["a b c"], min_count=1)
  texts = Pairs(None, "train", None, ["a b c"] * 200)
  rows = Counted(tokenize(texts, vocabulary), vocabulary, 4)
  iterator = train_batches(rows, 40, 0, process_index=1, process_count=4)
  take(iterator, 3)
  iterator.close()
  ahead = 4
  assert 3 * 10 <= len(made) <= (3 + ahead) * 10 + 1


def test_batches_that_cannot_be(rows):
  message = "10 rows does not divide over 4 processes"
  with pytest.raises(ValueError, match=message):
    train_batches(rows, 10, 0, 0, process_count=4)
  with pytest.raises(ValueError, match=message):
    eval_batches(rows, 10, 0, process_count=4)
  message = f"1000 rows is more than the corpus has, {len(rows)} rows"
  with pytest.raises(ValueError, match=message):
    train_batches(rows, 1000, 0)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("batch_size", [8, 12, 400])
def test_evaluation_counts_every_word_once(rows, batch_size, count):
  parts = [list(eval_batches(rows, batch_size, p, count)) for p in range(count)]
  steps = -(-len(rows) // batch_size)
  assert [len(part) for part in parts] == [steps] * count
  for batch in (batch for part in parts for batch in part):
    assert batch["inputs"].shape == (batch_size // count, 10)
    assert batch["start"][:, 0].all()
  found, want = (
    [word for each in some for word in each["targets"][each["mask"]].tolist()]
    for some in (whole(parts), rows)
  )
  assert found == want and len(found) == rows.num_words


def test_nothing_is_left_running_at_exit():
  program = """
from moejax.data.batches import eval_batches, train_batches
from moejax.data.packing import PackedRows, Pairs, tokenize
from moejax.data.vocab import Vocabulary
vocabulary = Vocabulary.build(["a b c"], 1)
tokens = tokenize(Pairs(None, "train", None, ["a b c"] * 99), vocabulary)
rows = PackedRows(tokens, vocabulary, 8)
batches = train_batches(rows, 4, 0)
next(batches), next(eval_batches(rows, 4))
"""
  done = subprocess.run(
    [sys.executable, "-X", "dev", "-W", "error", "-c", program],
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stderr) == (0, "")


# -- lines to translate -------------------------------------------------------

WORDS = ["the", "cat", "sat", "on", "mat", "then", "ran", "small", "house"]
LETTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
LINES = st.lists(
  st.one_of(
    st.just(""),
    st.just(" \u3000"),
    LETTERS,
    st.lists(
      st.sampled_from([*WORDS, "cat.", "The", "▁", "😀" * 9]), max_size=40
    ).map(" ".join),
  ),
  max_size=12,
)


@pytest.fixture(scope="module")
def pieces():
  return Pieces.train([f"{a} {b}." for a in WORDS for b in WORDS], 310, ["fr"])


def squeezed(text):
  """The text without what is read as space."""
  return "".join(text.split())


@given(LINES, st.integers(7, 24), st.integers(1, 4), st.booleans())
def test_no_line_is_lost_or_reordered(pieces, lines, length, batch, tagged):
  tag = pieces.tag("fr") if tagged else None
  found = {}
  for rows in source_rows(pieces, lines, length, batch, tag):
    assert rows.source.shape[0] == batch
    for row in range(batch):
      ids = rows.source[row][rows.source_segment[row] == 1].tolist()
      if rows.line[row] < 0:
        assert not ids
        continue
      assert ids.pop() == pieces.end
      assert not tagged or ids.pop(0) == tag
      key = int(rows.line[row]), int(rows.part[row])
      assert ids and key not in found
      found[key] = pieces.decode(ids)
  for number, line in enumerate(lines):
    parts = [found[key] for key in sorted(found) if key[0] == number]
    assert squeezed("".join(parts)) == squeezed(line)


@given(LETTERS.map(str.strip), st.integers(5, 20))
def test_parts_are_the_line_again(pieces, line, limit):
  parts = cut(pieces, line, limit)
  assert squeezed("".join(parts)) == squeezed(line)
  assert all(0 < len(pieces.encode(part)) <= limit for part in parts)


def test_lines_are_cut_between_sentences_then_words(pieces):
  line = "The  cat sat. The cat ran. The cat then sat on the mat on the house."
  count = len(pieces.encode(line))
  assert cut(pieces, line, count) == [line]
  assert cut(pieces, line, count - 1) == [
    "The cat sat. The cat ran.",
    "The cat then sat on the mat on the house.",
  ]
  assert cut(pieces, line, 8) == [
    "The cat sat.",
    "The cat ran.",
    "The cat then sat on the",
    "mat on the house.",
  ]
  # An abbreviation ends nothing.
  assert cut(pieces, "The cat sat on Mr. Cat. The mat sat.", 9) == [
    "The cat sat on",
    "Mr. Cat.",
    "The mat sat.",
  ]
  assert cut(pieces, f"cat cat {'x' * 12}", 8) == ["cat cat", *["x" * 6] * 2]
  assert cut(pieces, " \u3000", 8) == []


@pytest.mark.parametrize(
  "whole, space",
  [
    (["Écoutez cette histoire.", "À table !", "Être ici ?", "Oui."], " "),
    (["Мы идём домой.", "Там тепло.", "А потом спать…", "Да."], " "),
    (["私は東京に住んでいます。", "行きますか？", "はい。"], ""),
  ],
)
def test_sentences_of_other_scripts_are_kept_whole(pieces, whole, space):
  limit = max(len(pieces.encode(sentence)) for sentence in whole)
  parts = cut(pieces, space.join(whole), limit)
  assert 1 < len(parts) <= len(whole)
  assert space.join(parts) == space.join(whole)
  ends = tuple(sentence[-2:] for sentence in whole)
  assert all(part.endswith(ends) for part in parts)


def test_rows_by_hand(pieces):
  lines = ["the cat", "", "the " * 20, "\tsat\tsat \r"]
  short, long = source_rows(pieces, lines, 32, 4)
  assert short.source.shape == (4, 16) and long.source.shape == (4, 32)
  assert short.line.tolist() == [0, 3, -1, -1]
  assert long.line.tolist() == [2, -1, -1, -1]
  assert short.part.tolist() == long.part.tolist() == [0] * 4
  # No text of pairs has a tab, nor space at its ends.
  for row, text in enumerate(["the cat", "sat sat"]):
    ids = [*pieces.encode(text), pieces.end]
    rest = [0] * (16 - len(ids))
    assert short.source[row].tolist() == ids + rest
    assert short.source_segment[row].tolist() == [1] * len(ids) + rest
    starts = np.flatnonzero(short.source_start[row])
    assert starts.tolist() == [0, len(ids)]
  assert np.flatnonzero(short.source_start[3]).tolist() == [0]
  assert not short.source[2:].any() and not short.source_segment[2:].any()


def test_shapes_are_few_and_batches_come_when_full(pieces):
  read = []

  def lines():
    for number in range(100):
      read.append(number)
      yield " ".join(["cat"] * (number % 60 + 1))

  found = source_rows(pieces, lines(), 48, 4)
  next(found)
  assert len(read) == 4
  assert {rows.source.shape for rows in found} == {(4, 16), (4, 32), (4, 48)}


def test_a_length_that_holds_no_letter(pieces):
  with pytest.raises(ValueError, match="must be 7 or more .* got 6"):
    next(source_rows(pieces, ["a"], 6, 1))
  (rows,) = source_rows(pieces, ["\U0001f600"], 7, 1, pieces.tag("fr"))
  assert rows.source.shape == (1, 7)


def test_a_long_line_of_numbers():
  """It takes a moment; of the square of its length, hours."""
  line = " ".join(f"{i}." for i in range(30_000))
  assert sentences(line) == [line]
