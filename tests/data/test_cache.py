"""Ids and packings are made once, whole or not, and then only mapped."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from moejax.data import cache, corpora, packing, tfds_corpora, vocab
from moejax.data.packing import Direction, Pairs
from moejax.data.pieces import Pieces

LINES = [f"line {i} of many ." for i in range(40)]


def opened(folder, lines=LINES):
  """The sentences of train of a text, prepared."""
  path = folder / "a.txt"
  path.parent.mkdir(exist_ok=True)
  path.write_text("\n".join(lines), encoding="utf-8")
  make = tfds_corpora.TextFiles({"train": [path]}, folder)
  builder = tfds_corpora.prepared(lambda: make)
  return Pairs(None, "train", None, tfds_corpora.Records(builder, "train"))


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


def assert_same(got, want):
  for one, other in zip(got[:2], want[:2], strict=True):
    assert one.keys() == other.keys()
    for side in one:
      np.testing.assert_array_equal(one[side], other[side])
  assert got.digest == want.digest


def assert_packed(got, want):
  np.testing.assert_array_equal(got.first, want.first)
  for side in want.begin:
    np.testing.assert_array_equal(got.begin[side], want.begin[side])
    np.testing.assert_array_equal(got.length[side], want.length[side])


def folders(pairs):
  """What is written, or left, beside a corpus."""
  return [p for p in (pairs.targets.folder / "ids").iterdir() if p.is_dir()]


def test_a_second_start_maps_what_the_first_one_made(
  words, vocabulary, made, capfd
):
  want = packing.tokenize(in_memory(words), vocabulary)
  assert want.folder is None and not made
  packings = {length: packing.pack(want, length) for length in (8, 9)}
  for _ in range(2):
    got = packing.tokenize(words, vocabulary)
    assert_same(got, want)
    ids = got.ids["target"]
    assert isinstance(ids.base, np.memmap) and not ids.flags.writeable
    for length, expected in packings.items():
      assert_packed(packing.pack(got, length), expected)
  assert made == [got.folder.name, "packing_2_8_0", "packing_2_9_0"]
  said = capfd.readouterr().err
  assert said.count("turning 36 sentences into ids (once), in ") == 1


def test_pairs_and_their_packings_are_made_once(tmp_path, made):
  pieces = Pieces.train([f"word{i} mot{i}" for i in range(99)], 300, ["a", "b"])
  other = Pieces.train([f"word{i} mot{i}" for i in range(9)], 290, ["a", "b"])
  path = tmp_path / "a.tsv"
  text = "".join(f"word{i} word{i + 1}\tmot{i}\n" for i in range(30))
  path.write_text(text, encoding="utf-8")
  files = {Direction("b", "a"): [path]}
  splits = corpora.open_pairs(files, {}, {}, tmp_path, both_directions=True)
  there, back = splits["train"]
  seen = []
  untagged = Pieces.train([f"word{i} mot{i}" for i in range(9)], 289)
  for pairs, by in (
    (there, untagged),
    (back, untagged),
    (there, pieces),
    (there, other),
    (back, other),
  ):
    for _ in range(2):
      tokens = packing.tokenize(pairs, by)
    assert_same(tokens, packing.tokenize(in_memory(pairs), by))
    seen.append(tokens.digest)
  packing.tokenize(splits["test"][0], pieces)
  assert len(set(seen)) == 5 and len(set(made)) == len(made) == 6
  for lengths in ((20, 20), (20, 24), (24, 20), (20, 20)):
    found = packing.pack(tokens, *lengths)
    assert_packed(found, packing.pack(tokens._replace(folder=None), *lengths))
  assert made[6:] == ["packing_2_20_20", "packing_2_20_24", "packing_2_24_20"]


def test_anything_else_is_made_anew(words, vocabulary, made, monkeypatch):
  want = packing.tokenize(words, vocabulary)
  entries = vocabulary.decode(range(len(vocabulary)))
  smaller = vocab.Vocabulary(entries[:5])
  got = packing.tokenize(words, smaller)
  assert (got.ids["target"] == smaller.unknown).any()
  assert_same(packing.tokenize(words, vocab.TokenizedVocabulary(entries)), want)
  file = next(p for p in words.targets.folder.iterdir() if p.is_file())
  os.utime(file, (0, 0))
  assert_same(packing.tokenize(words, vocabulary), want)
  packing.pack(want, 8)
  monkeypatch.setattr(packing, "_VERSION", 0)
  monkeypatch.setattr(packing, "_PACKING_VERSION", 0)
  assert_same(packing.tokenize(words, vocabulary), want)
  packing.pack(want, 8)
  assert len(made) == len(set(made)) == 7


STARTED = """
import pathlib, sys
sys.path.insert(0, sys.argv[2])
from data import test_cache
from moejax.data import packing, vocab
vocabulary = vocab.Vocabulary.build(test_cache.LINES, min_count=1)
words = test_cache.opened(pathlib.Path(sys.argv[1]))
tokens = packing.tokenize(words, vocabulary)
print(tokens.digest, packing.pack(tokens, 8).begin["target"].tolist())
"""


def test_one_makes_while_the_others_wait(words, vocabulary, made, tmp_path):
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
  # Processes that start at once, too.
  shutil.rmtree(words.targets.folder / "ids")
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  command = [sys.executable, "-c", STARTED, tmp_path, root]
  pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
  outputs = [process.communicate() for process in processes]
  tokens = packing.tokenize(in_memory(words), vocabulary)
  begin = packing.pack(tokens, 8).begin["target"].tolist()
  assert [out for out, _ in outputs] == [f"{tokens.digest} {begin}\n"] * 2
  assert sum("into ids" in said for _, said in outputs) == 1
  assert not any("in memory" in said for _, said in outputs)


def test_what_a_killed_process_left_is_thrown_away(words, vocabulary):
  packing.tokenize(words, vocabulary)
  (whole,) = folders(words)
  draft = whole.rename(f"{whole}.{socket.gethostname()}.draft")
  (draft / "target_ids").write_bytes(b"half")
  want = packing.tokenize(in_memory(words), vocabulary)
  assert_same(packing.tokenize(words, vocabulary), want)
  assert folders(words) == [whole]


def encoding(monkeypatch, vocabulary, then):
  """Lets something happen after sentences have become ids."""
  encode_all = vocabulary.encode_all

  def encode_and(texts):
    ids = encode_all(texts)
    return then(ids) or ids

  monkeypatch.setattr(vocabulary, "encode_all", encode_and)


def test_another_machine_may_be_first(words, vocabulary, monkeypatch):
  want = packing.tokenize(words, vocabulary)
  (whole,) = folders(words)
  theirs = whole.rename(f"{whole}.theirs.draft")

  def overtake(ids):
    shutil.copytree(theirs, whole)

  encoding(monkeypatch, vocabulary, overtake)
  assert_same(packing.tokenize(words, vocabulary), want)
  assert sorted(folders(words)) == sorted([whole, theirs])


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

  want = packing.tokenize(in_memory(words), vocabulary)
  if keeps_ids:
    packing.tokenize(words, vocabulary)
  monkeypatch.setattr(os, "fsync", full)
  got = packing.tokenize(words, vocabulary)
  assert_same(got, want)
  assert_packed(packing.pack(got, 8), packing.pack(want, 8))
  what = (
    "packing 36 sentences" if keeps_ids else "turning 36 sentences into ids"
  )
  said = capfd.readouterr().err
  assert f"{what} in memory, at every start" in said
  assert said.count("No space left") == 1
  left = [folder for folder in folders(words) if folder != got.folder]
  assert not left and len(folders(words)) == keeps_ids


def shorten(path):
  path.write_bytes(path.read_bytes()[:-4])


def change(path):
  content = path.read_bytes()
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def pipe(path):
  path.unlink()
  os.mkfifo(path)


@pytest.mark.parametrize("damage", [shorten, change, os.remove, pipe])
@pytest.mark.parametrize(
  "name",
  [
    *("target_ids", "target_lengths", "record.json"),
    *("packing_2_8_0/first", "packing_2_8_0/target_begin"),
    *("packing_2_8_0/target_length", "packing_2_8_0/record.json"),
  ],
)
def test_what_is_damaged_is_made_anew(
  words, vocabulary, made, capfd, name, damage
):
  want = packing.tokenize(in_memory(words), vocabulary)
  tokens = packing.tokenize(words, vocabulary)
  packing.pack(tokens, 8)
  damage(tokens.folder / name)
  for _ in range(2):
    got = packing.tokenize(words, vocabulary)
    assert_same(got, want)
    assert_packed(packing.pack(got, 8), packing.pack(want, 8))
  # A packing lies in the folder of its ids.
  assert len(made) == 3 if "/" in name else 4
  damaged = (tokens.folder / name).parent
  assert capfd.readouterr().err.count(f"{damaged} is damaged; it is made") == 1


@pytest.mark.parametrize("names", [["target_ids"], ["record.json"], []])
def test_those_of_another_text_are_not_taken(tmp_path, vocabulary, names, made):
  """Two corpora whose word ids are of one size."""
  twins = [
    opened(tmp_path / name, lines)
    for name, lines in (("b", LINES), ("c", LINES[::-1]))
  ]
  one, other = (packing.tokenize(words, vocabulary).folder for words in twins)
  # All of the folder where no names are given.
  for a, b in [(one / n, other / n) for n in names] or [(one, other)]:
    spare = a.rename(f"{a}.spare")
    b.rename(a)
    spare.rename(b)
  for words in twins:
    want = packing.tokenize(in_memory(words), vocabulary)
    assert_same(packing.tokenize(words, vocabulary), want)
  assert len(made) == 4


def test_the_packing_of_another_text_is_not_taken(tmp_path, vocabulary, made):
  one, other = (
    packing.tokenize(opened(tmp_path / name, lines), vocabulary)
    for name, lines in (("b", LINES), ("c", ["a", *LINES[::-1]]))
  )
  packing.pack(one, 8)
  shutil.copytree(one.folder / "packing_2_8_0", other.folder / "packing_2_8_0")
  want = packing.pack(other._replace(folder=None), 8)
  assert_packed(packing.pack(other, 8), want)
  assert len(made) == 4


def test_a_file_that_cannot_be_read_is_not_thrown_away(
  words, vocabulary, monkeypatch, capfd
):
  want = packing.tokenize(words, vocabulary)

  def broken(*_):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(hashlib, "file_digest", broken)
  got = packing.tokenize(words, vocabulary)
  assert_same(got, want)
  assert got.folder is None
  said = capfd.readouterr().err
  assert "in memory" in said and "Input/output error" in said
  assert "damaged" not in said and (want.folder / "target_ids").exists()


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("beyond", [-1, 7, 2**31 - 1])
def test_ids_beyond_the_vocabulary_are_refused(
  words, vocabulary, monkeypatch, prepared, beyond
):
  small = vocab.Vocabulary(vocabulary.decode(range(7)))
  encoding(monkeypatch, small, lambda ids: [[beyond] for _ in ids])
  with pytest.raises(ValueError, match=f"{beyond}.*of 7 entries has 0 to 6"):
    packing.tokenize(words if prepared else in_memory(words), small)


def test_nothing_is_written_through_a_link(words, vocabulary, tmp_path):
  mine = tmp_path / "mine"
  mine.write_text("mine")
  (words.targets.folder / "ids").mkdir()
  (words.targets.folder / "ids" / "lock").symlink_to(mine)
  got = packing.tokenize(words, vocabulary)
  assert_same(got, packing.tokenize(in_memory(words), vocabulary))
  assert mine.read_text() == "mine"


def test_digests_tell_contents_apart():
  ids = np.arange(99, dtype=np.int32)
  assert cache.digest(ids) == cache.digest(ids.copy())
  assert cache.digest(ids) != cache.digest(ids + np.int32(1))
