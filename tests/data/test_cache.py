"""Ids and packings are made once, whole or not, and then only mapped."""

import hashlib
import os
import shutil
import socket
import threading

import numpy as np
import pytest

from moejax.data import cache, packing, vocab
from moejax.data.packing import Direction, Pairs
from moejax.data.pieces import Pieces

LINES = [f"line {i} of many ." for i in range(36)]


class Prepared(list):
  """Texts of a prepared copy, as `tfds_corpora.Records` are."""

  def __init__(self, texts, folder, split="train", field="text"):
    super().__init__(texts)
    self.folder, self.split, self.field = folder, split, field


def opened(folder, lines=LINES):
  folder.mkdir(exist_ok=True)
  if not (folder / "data").exists():
    (folder / "data").write_text("\n".join(lines))
  return Pairs(None, "train", None, Prepared(lines, folder))


@pytest.fixture
def words(tmp_path):
  """Sentences of a prepared text."""
  return opened(tmp_path)


@pytest.fixture(scope="module")
def vocabulary():
  return vocab.Vocabulary.build(LINES, min_count=1)


@pytest.fixture
def made(monkeypatch):
  """The names of the folders that were made."""
  names = []
  make = cache._make

  def counted(folder, *rest):
    names.append(folder.name)
    return make(folder, *rest)

  monkeypatch.setattr(cache, "_make", counted)
  return names


def in_memory(pairs):
  """The same sentences, of no prepared corpus."""
  sides = [side and list(side) for side in (pairs.sources, pairs.targets)]
  return pairs._replace(sources=sides[0], targets=sides[1])


def assert_same(pairs, by, *lengths):
  """What is cached is what is made in memory; returns it."""
  got, want = (packing.tokenize(p, by) for p in (pairs, in_memory(pairs)))
  assert got.digest == want.digest and want.folder is None
  both = [(got.ids, want.ids), (got.lengths, want.lengths)]
  if lengths:
    both.append(tuple(packing.pack(each, *lengths) for each in (got, want)))
  for one, other in both:
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])
  return got


def folders(pairs):
  """What is written, or left, beside a corpus."""
  return [p for p in (pairs.targets.folder / "ids").iterdir() if p.is_dir()]


# -- what is made -------------------------------------------------------------


def test_a_second_start_maps_what_the_first_one_made(
  words, vocabulary, made, capfd
):
  for _ in range(2):
    for length in (8, 9):
      got = assert_same(words, vocabulary, length)
    ids = got.ids["target"]
    assert isinstance(ids.base, np.memmap) and not ids.flags.writeable
  assert made == [got.folder.name, "packing_2_8_0", "packing_2_9_0"]
  said = capfd.readouterr().err
  assert said.count("turning 36 sentences into ids (once), in ") == 1


def test_pairs_and_their_packings_are_made_once(tmp_path, made):
  texts = [f"word{i} mot{i}" for i in range(99)]
  pieces = Pieces.train(texts, 300, ["a", "b"])
  untagged = Pieces.train(texts[:9], 289)
  opened(tmp_path)
  source, target, test = (
    Prepared([f"{word}{i}" for i in range(30)], tmp_path, split, field)
    for word, split, field in (
      ("word", "train", "source"),
      ("mot", "train", "target"),
      ("word", "test", "source"),
    )
  )
  there = Pairs(Direction("b", "a"), "train", source, target)
  back = Pairs(Direction("a", "b"), "train", target, source)
  seen = {
    assert_same(pairs, by).digest
    for pairs in (there, back)
    for by in (untagged, pieces)
    for _ in range(2)
  }
  packing.tokenize(there._replace(sources=test, targets=test), pieces)
  assert len(seen) == 4 and len(set(made)) == len(made) == 5
  for lengths in ((20, 20), (20, 24), (24, 20), (20, 20)):
    assert_same(back, pieces, *lengths)
  assert made[5:] == ["packing_2_20_20", "packing_2_20_24", "packing_2_24_20"]


def test_anything_else_is_made_anew(words, vocabulary, made, monkeypatch):
  tokens = assert_same(words, vocabulary, 8)
  entries = vocabulary.decode(range(len(vocabulary)))
  assert_same(words, vocab.Vocabulary(entries[:5]))
  assert_same(words, vocab.TokenizedVocabulary(entries))
  os.utime(words.targets.folder / "data", (0, 0))
  assert_same(words, vocabulary)
  monkeypatch.setattr(packing, "_VERSION", 0)
  monkeypatch.setattr(packing, "_PACKING_VERSION", 0)
  assert_same(words, vocabulary)
  packing.pack(tokens, 8)
  assert len(made) == len(set(made)) == 7


# -- several that make --------------------------------------------------------


def test_one_makes_while_the_others_wait(words, vocabulary, made):
  barrier = threading.Barrier(4)

  def start():
    barrier.wait()
    tokens = packing.tokenize(words, vocabulary)
    barrier.wait()
    packing.pack(tokens, 8)

  threads = [threading.Thread(target=start) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(made) == 2


def encoding(monkeypatch, vocabulary, then):
  """Lets something happen after sentences have become ids."""
  encode_all = vocabulary.encode_all

  def encode_and(texts):
    ids = encode_all(texts)
    return then(ids) or ids

  monkeypatch.setattr(vocabulary, "encode_all", encode_and)


def test_another_machine_may_be_first(words, vocabulary, monkeypatch):
  packing.tokenize(words, vocabulary)
  (whole,) = folders(words)
  theirs = whole.rename(f"{whole}.theirs.draft")

  def overtake(ids):
    if not whole.exists():
      shutil.copytree(theirs, whole)

  encoding(monkeypatch, vocabulary, overtake)
  assert_same(words, vocabulary)
  assert sorted(folders(words)) == sorted([whole, theirs])


# -- what goes wrong ----------------------------------------------------------


def test_half_of_them_is_never_kept(words, vocabulary, monkeypatch):
  def interrupt(ids):
    raise KeyboardInterrupt

  encoding(monkeypatch, vocabulary, interrupt)
  with pytest.raises(KeyboardInterrupt):
    packing.tokenize(words, vocabulary)
  assert not folders(words)


@pytest.mark.parametrize("keeps_ids", [False, True])
def test_a_disk_that_keeps_nothing_does_no_harm(
  words, vocabulary, monkeypatch, capfd, keeps_ids
):
  def full(*_):
    raise OSError(28, "No space left on device")

  if keeps_ids:
    packing.tokenize(words, vocabulary)
  monkeypatch.setattr(os, "fsync", full)
  got = assert_same(words, vocabulary, 8)
  what = "packing 36" if keeps_ids else "turning 36 sentences into ids"
  said = capfd.readouterr().err
  assert what in said and "in memory, at every start" in said
  assert said.count("No space left") == 1
  assert folders(words) == ([got.folder] if keeps_ids else [])


def shorten(path):
  path.write_bytes(path.read_bytes()[:-4])


def change(path):
  content = path.read_bytes()
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def pipe(path):
  path.unlink()
  os.mkfifo(path)


def of_another_text(path):
  """Puts there what belongs to one whose word ids are of one size."""
  twin = opened(
    path.parents[path.parts[::-1].index("ids")] / "twin", LINES[::-1]
  )
  other = assert_same(twin, vocab.Vocabulary.build(LINES, 1), 8).folder
  other /= path.name if "packing" in str(path) or path.is_file() else ""
  path.rename(path.parent / "spare")
  other.rename(path)


PACKING = "packing_2_8_0"
DAMAGES = [
  *(("target_ids", each) for each in (shorten, change, os.remove, pipe)),
  *((f"{PACKING}/first", each) for each in (shorten, change, os.remove)),
  ("target_lengths", change),
  ("record.json", shorten),
  ("record.json", pipe),
  (f"{PACKING}/target_begin", change),
  (f"{PACKING}/target_length", change),
  (f"{PACKING}/record.json", os.remove),
  *((n, of_another_text) for n in ("target_ids", "record.json", "", PACKING)),
]


@pytest.mark.parametrize("name, damage", DAMAGES)
def test_what_is_damaged_is_made_anew(words, vocabulary, capfd, name, damage):
  tokens = assert_same(words, vocabulary, 8)
  damage(tokens.folder / name)
  capfd.readouterr()
  for _ in range(2):
    assert_same(words, vocabulary, 8)
  damaged = tokens.folder / PACKING if PACKING in name else tokens.folder
  said = capfd.readouterr().err
  assert said.count(f"{damaged} is damaged; it is made") == 1
  # A packing lies in the folder of its ids.
  assert said.count("(once)") == (1 if PACKING in name else 2)


def test_what_a_killed_process_left_is_thrown_away(words, vocabulary):
  packing.tokenize(words, vocabulary)
  (whole,) = folders(words)
  draft = whole.rename(f"{whole}.{socket.gethostname()}.draft")
  (draft / "target_ids").write_bytes(b"half")
  assert_same(words, vocabulary)
  assert folders(words) == [whole]


def test_a_file_that_cannot_be_read_is_not_thrown_away(
  words, vocabulary, monkeypatch, capfd
):
  tokens = packing.tokenize(words, vocabulary)

  def broken(*_):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(hashlib, "file_digest", broken)
  assert assert_same(words, vocabulary).folder is None
  said = capfd.readouterr().err
  assert "in memory" in said and "Input/output error" in said
  assert "damaged" not in said and (tokens.folder / "target_ids").exists()


@pytest.mark.parametrize("beyond", [-1, 7])
def test_ids_beyond_the_vocabulary_are_refused(
  words, vocabulary, monkeypatch, beyond
):
  small = vocab.Vocabulary(vocabulary.decode(range(7)))
  encoding(monkeypatch, small, lambda ids: [[beyond] for _ in ids])
  for pairs in (words, in_memory(words)):
    with pytest.raises(ValueError, match=f"{beyond}.*of 7 entries has 0 to 6"):
      packing.tokenize(pairs, small)
