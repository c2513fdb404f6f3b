"""Batches whose order is a pure function, and lines that are translated."""

import collections
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.data.batches import (
  check_length,
  cut,
  eval_batches,
  num_batches,
  source_rows,
  train_batches,
)
from moejax.data.packing import MultiDirection, PackedRows, Pairs, tokenize
from moejax.data.pieces import Pieces
from moejax.data.vocab import Vocabulary

# -- training and evaluation --------------------------------------------------


def packed(counts, row_length=10, kind=PackedRows):
  texts = [" ".join(f"w{i}{j}" for j in range(n)) for i, n in enumerate(counts)]
  vocabulary = Vocabulary.build(texts, min_count=1)
  tokens = tokenize(Pairs(None, "train", None, texts), vocabulary)
  return kind(tokens, vocabulary, row_length)


@pytest.fixture(scope="module", params=["words", "directions"])
def rows(request):
  rng = np.random.default_rng(0)
  one, other = (packed(rng.integers(1, 14, size=n).tolist()) for n in (50, 14))
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


@pytest.mark.parametrize("count", [1, 4])
def test_a_state_continues_exactly_by_any_number_of_processes(rows, count):
  iterator = train_batches(rows, 8, seed=1)
  states, want = [], []
  for _ in range(3 * len(rows) // 8):  # across two ends of an epoch
    states.append(json.loads(json.dumps(iterator.get_state())))
    want.append(next(iterator))
  assert want[0]["targets"].shape == (8, 10)
  assert states == [{"next_index": step} for step in range(len(states))]
  parts = [train_batches(rows, 8, 1, p, count) for p in range(count)]
  assert_same(whole([take(part, len(want)) for part in parts]), want)
  for step in (len(states) - 2, 0, len(rows) // 8):
    for part in parts:
      part.set_state(states[step])
    assert_same(whole([take(part, 2) for part in parts]), want[step : step + 2])


def test_every_epoch_holds_all_rows_in_an_order_of_its_own():
  rows = packed([3, 5, 8, 2, 7] * 12)

  def visited(seed, epochs):
    taken = take(train_batches(rows, len(rows), seed), epochs)
    return [[row.tobytes() for row in batch["targets"]] for batch in taken]

  epochs = visited(0, 3)
  everything = sorted(row["targets"].tobytes() for row in rows)
  assert all(sorted(epoch) == everything for epoch in epochs)
  # Nor has another seed the same orders an epoch apart.
  orders = epochs + visited(1, 1)
  assert len(set(map(tuple, orders))) == 4


class Numbered(PackedRows):
  """Rows that tell which they are, and note that they are made."""

  part, made = 0, ()

  def __getitem__(self, row):
    self.made = (*self.made, row)
    return {"row": np.array([self.part, row])}


def numbered(*counts):
  parts = [packed([3] * count, 4, Numbered) for count in counts]
  for part, rows in enumerate(parts):
    rows.part = part
  return parts


@pytest.mark.parametrize(
  "counts, temperature, passes",
  [((90,), 1.0, 2), ((2100, 90, 700), 1.0, 1), ((90, 700), 3.0, 2)],
)
def test_no_row_is_read_more_often_than_promised(counts, temperature, passes):
  parts = numbered(*counts)
  rows = parts[0] if len(parts) == 1 else MultiDirection(parts, temperature)
  steps = num_batches(rows, 16, passes)
  assert steps <= passes * len(rows) // 16
  two = [train_batches(rows, 16, 3, p, 2, passes=passes) for p in range(2)]
  batches = whole([list(itertools.islice(each, steps + 1)) for each in two])
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


def test_each_process_makes_its_own_rows_only():
  (rows,) = numbered(200)
  iterator = train_batches(rows, 40, 0, process_index=1, process_count=4)
  take(iterator, 3)
  iterator.close()
  ahead = 4
  assert 3 * 10 <= len(rows.made) <= (3 + ahead) * 10 + 1


def test_batches_that_cannot_be(rows):
  message = "10 rows does not divide over 4 processes"
  with pytest.raises(ValueError, match=message):
    train_batches(rows, 10, 0, 0, process_count=4)
  with pytest.raises(ValueError, match=message):
    eval_batches(rows, 10, 0, process_count=4)
  message = f"1000 rows is more than the corpus has, {len(rows)} rows"
  with pytest.raises(ValueError, match=message):
    train_batches(rows, 1000, 0)


@pytest.mark.parametrize("batch_size, count", [(8, 4), (12, 1), (400, 4)])
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


# -- lines to translate -------------------------------------------------------

WORDS = ["the", "cat", "sat", "on", "mat", "then", "ran", "small", "house"]
LETTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
MIXED = [*WORDS, "cat.", "The", "▁", "😀" * 9, "\tsat\tsat"]
SENTENCES = st.lists(st.sampled_from(MIXED), max_size=40).map(" ".join)
LINES = st.lists(st.sampled_from(["", " \u3000"]) | LETTERS | SENTENCES)


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
      real = rows.source_segment[row] == 1
      ids = rows.source[row][real].tolist()
      assert not rows.source[row][~real].any()
      starts = {0, len(ids)} & set(range(rows.source.shape[1]))
      assert set(np.flatnonzero(rows.source_start[row]).tolist()) == starts
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
    # As no text of pairs has them.
    assert not any("\t" in part or part.strip() != part for part in parts)


@given(LETTERS.map(str.strip), st.integers(5, 20))
def test_parts_are_the_line_again(pieces, line, limit):
  parts = cut(pieces, line, limit)
  assert squeezed("".join(parts)) == squeezed(line)
  assert all(0 < len(pieces.encode(part)) <= limit for part in parts)


def test_lines_are_cut_between_sentences_then_words(pieces):
  line = "The  cat sat. The cat ran. The cat then sat on the mat on the house."
  count = len(pieces.encode(line))
  for text, limit, want in (
    (line, count, line),
    (
      line,
      count - 1,
      "The cat sat. The cat ran.|The cat then sat on the mat on the house.",
    ),
    (
      line,
      8,
      "The cat sat.|The cat ran.|The cat then sat on the|mat on the house.",
    ),
    # An abbreviation ends nothing.
    (
      "The cat sat on Mr. Cat. The mat sat.",
      9,
      "The cat sat on|Mr. Cat.|The mat sat.",
    ),
    (f"cat cat {'x' * 12}", 8, "cat cat|xxxxxx|xxxxxx"),
  ):
    assert cut(pieces, text, limit) == want.split("|")


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
    check_length(6)
  (rows,) = source_rows(pieces, ["\U0001f600"], 7, 1, pieces.tag("fr"))
  assert rows.source.shape == (1, 7)
