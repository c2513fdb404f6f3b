"""Lines for decoding: none lost, none reordered, cut between words."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.data import sources
from moejax.data.corpora import sentences
from moejax.data.pieces import Pieces
from moejax.data.sources import cut, source_rows

WORDS = ["the", "cat", "sat", "on", "mat", "then", "ran", "small", "house"]


@pytest.fixture(scope="module")
def pieces():
  return Pieces.train([f"{a} {b}." for a in WORDS for b in WORDS], 310, ["fr"])


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


def test_a_long_line_of_numbers():
  """It takes a moment; of the square of its length, hours."""
  line = " ".join(f"{i}." for i in range(30_000))
  assert sentences(line) == [line]


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
  "sentences, space",
  [
    (["Écoutez cette histoire.", "À table !", "Être ici ?", "Oui."], " "),
    (["Мы идём домой.", "Там тепло.", "А потом спать…", "Да."], " "),
    (["私は東京に住んでいます。", "行きますか？", "はい。"], ""),
  ],
)
def test_sentences_of_other_scripts_are_kept_whole(pieces, sentences, space):
  limit = max(len(pieces.encode(sentence)) for sentence in sentences)
  parts = cut(pieces, space.join(sentences), limit)
  assert 1 < len(parts) <= len(sentences)
  assert space.join(parts) == space.join(sentences)
  ends = tuple(sentence[-2:] for sentence in sentences)
  assert all(part.endswith(ends) for part in parts)


def test_rows_by_hand(pieces):
  lines = ["the cat", "", "the " * 20, "sat"]
  short, long = source_rows(pieces, lines, 32, 4)
  assert short.source.shape == (4, 16) and long.source.shape == (4, 32)
  assert short.line.tolist() == [0, 3, -1, -1]
  assert long.line.tolist() == [2, -1, -1, -1]
  assert short.part.tolist() == long.part.tolist() == [0] * 4
  ids = [*pieces.encode("the cat"), pieces.end]
  count = len(ids)
  assert short.source[0].tolist() == ids + [0] * (16 - count)
  assert short.source_segment[0].tolist() == [1] * count + [0] * (16 - count)
  assert np.flatnonzero(short.source_start[0]).tolist() == [0, count]
  assert np.flatnonzero(short.source_start[3]).tolist() == [0]
  assert not short.source[2:].any() and not short.source_segment[2:].any()


def test_what_no_text_of_pairs_has_is_space(pieces):
  rows, bare = (
    next(source_rows(pieces, [line], 16, 1)).source
    for line in ("\tthe\tcat \r", "the cat")
  )
  assert rows.tolist() == bare.tolist()


def test_shapes_are_few_and_batches_come_when_full(pieces):
  read = []

  def lines():
    for number in range(100):
      read.append(number)
      yield " ".join(["cat"] * (number % 60 + 1))

  batches = source_rows(pieces, lines(), 48, 4)
  next(batches)
  assert len(read) == 4
  shapes = {rows.source.shape for rows in batches}
  assert shapes <= {(4, 16), (4, 32), (4, 48)} and len(shapes) == 3


def test_a_length_that_holds_no_letter(pieces):
  with pytest.raises(ValueError, match="must be 7 or more .* got 6"):
    next(source_rows(pieces, ["a"], 6, 1))
  letter = "\U0001f600"
  (rows,) = source_rows(pieces, [letter], sources._LEAST, 1, pieces.tag("fr"))
  assert rows.source.shape == (1, 7)
