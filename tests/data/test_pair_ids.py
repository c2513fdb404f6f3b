"""Ids of pairs: tags, empty and long pairs, and what is kept of them."""

import os
import re

import numpy as np
import pytest

from moejax.data import pair_ids, pairs, translation
from moejax.data.pairs import Direction, Pairs
from moejax.data.pieces import Pieces

EN_FR = Direction("en", "fr")
END = 2


@pytest.fixture(scope="module")
def pieces():
  texts = [f"word{i} mot{i}" for i in range(99)]
  return Pieces.train(texts, 300, ["fr", "de"])


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
  packing = translation.pack(parts, 20, 20)
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
    for name in one:
      np.testing.assert_array_equal(one[name], two[name], name)
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


def shorten(content):
  return content[:-4]


def flip_a_bit(content):
  return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [shorten, flip_a_bit])
@pytest.mark.parametrize("name", ["source_ids", "target_lengths"])
def test_damaged_ids_are_made_anew(opened, pieces, made, name, damage):
  there = opened["train"][0]
  tokens = pair_ids.tokenise(there, pieces)
  want = [np.copy(array) for array in tokens[:4]]
  path = tokens.folder / name
  path.write_bytes(damage(path.read_bytes()))
  again = pair_ids.tokenise(there, pieces)
  for one, two in zip(again[:4], want, strict=True):
    np.testing.assert_array_equal(one, two)
  assert made == ["en-fr", "en-fr"]


def test_ids_beyond_the_pieces_are_refused(opened, pieces, monkeypatch):
  def beyond(texts):
    return [[len(pieces)] for _ in texts]

  monkeypatch.setattr(pieces, "encode_all", beyond)
  with pytest.raises(ValueError, match="ids of en-fr train.*300 entries has 0"):
    pair_ids.tokenise(opened["train"][0], pieces)


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
