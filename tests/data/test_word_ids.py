"""Word ids and packings are made once, whole or not, and then only mapped."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from moejax.data import corpora, text, vocab, word_ids

LINES = [f"line {i} of many ." for i in range(40)]


@pytest.fixture
def splits(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("\n".join(LINES), encoding="utf-8")
  return corpora.open_corpus("text", tmp_path, train=[path])


@pytest.fixture
def records(splits):
  return splits["train"]


@pytest.fixture
def vocabulary(records):
  return vocab.Vocabulary.build(records, min_count=1)


@pytest.fixture
def made(monkeypatch):
  """The corpora whose word ids were made."""
  texts = []
  write = text.write_tokens

  def counted(some, *rest):
    texts.append(some)
    return write(some, *rest)

  monkeypatch.setattr(text, "write_tokens", counted)
  return texts


@pytest.fixture
def packed(monkeypatch):
  """The row lengths that were packed to."""
  row_lengths = []
  pack = text.pack

  def counted(lengths, row_length):
    row_lengths.append(row_length)
    return pack(lengths, row_length)

  monkeypatch.setattr(text, "pack", counted)
  return row_lengths


def folders(records):
  """What is kept, or left, beside a corpus."""
  return [p for p in (records.folder / "word_ids").iterdir() if p.is_dir()]


def assert_same(got, want):
  np.testing.assert_array_equal(got.ids, want.ids)
  np.testing.assert_array_equal(got.lengths, want.lengths)
  assert got.digest == want.digest


def assert_packed(got, want):
  for name in text.Packing._fields:
    found, expected = getattr(got, name), getattr(want, name)
    np.testing.assert_array_equal(found, expected, name)
    assert found.dtype == expected.dtype


def test_a_second_start_maps_what_the_first_one_made(records, vocabulary, made):
  want = text.tokenise(records, vocabulary)
  made.clear()
  for _ in range(2):
    got = word_ids.tokenise(records, vocabulary, vocab.words)
    assert_same(got, want)
    assert isinstance(got.ids.base, np.memmap) and not got.ids.flags.writeable
  assert made == [records]


def test_anything_else_is_made_anew(records, vocabulary, made):
  want = word_ids.tokenise(records, vocabulary, vocab.words)
  smaller = vocab.Vocabulary.build(records, min_count=1, max_size=5)
  got = word_ids.tokenise(records, smaller, vocab.words)
  assert (got.ids == smaller.unknown).any()
  got = word_ids.tokenise(records, vocabulary, vocab.tokens)
  assert_same(got, want)
  assert len(made) == 3
  file = next(path for path in records.folder.iterdir() if path.is_file())
  os.utime(file, (0, 0))
  got = word_ids.tokenise(records, vocabulary, vocab.words)
  assert_same(got, want)
  assert len(made) == 4


def test_every_split_has_its_own(splits, vocabulary):
  for records in splits.values():
    got = word_ids.tokenise(records, vocabulary, vocab.words)
    assert_same(got, text.tokenise(records, vocabulary))


def test_one_makes_while_the_others_wait(records, vocabulary, made, packed):
  barrier = threading.Barrier(4)

  def start():
    barrier.wait()
    tokens = word_ids.tokenise(records, vocabulary, vocab.words)
    barrier.wait()
    word_ids.pack(tokens, 8)

  threads = [threading.Thread(target=start) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert made == [records]
  assert packed == [8]


def test_what_a_killed_process_left_is_thrown_away(records, vocabulary):
  want = text.tokenise(records, vocabulary)
  word_ids.tokenise(records, vocabulary, vocab.words)
  (kept,) = folders(records)
  draft = kept.rename(f"{kept}.{socket.gethostname()}.draft")
  (draft / "ids").write_bytes(b"half")
  assert_same(word_ids.tokenise(records, vocabulary, vocab.words), want)
  assert folders(records) == [kept]


def test_another_machine_may_be_first(records, vocabulary, monkeypatch):
  want = word_ids.tokenise(records, vocabulary, vocab.words)
  (kept,) = folders(records)
  theirs = kept.rename(f"{kept}.theirs.draft")
  write = text.write_tokens

  def overtaken(*arguments):
    write(*arguments)
    shutil.copytree(theirs, kept)

  monkeypatch.setattr(text, "write_tokens", overtaken)
  assert_same(word_ids.tokenise(records, vocabulary, vocab.words), want)
  assert sorted(folders(records)) == sorted([kept, theirs])


def test_half_of_them_is_never_kept(records, vocabulary, monkeypatch):
  def interrupted(texts, vocabulary, split, ids, lengths):
    ids.write(b"half")
    raise KeyboardInterrupt

  monkeypatch.setattr(text, "write_tokens", interrupted)
  with pytest.raises(KeyboardInterrupt):
    word_ids.tokenise(records, vocabulary, vocab.words)
  assert not folders(records)


def test_a_disk_that_keeps_nothing_does_no_harm(
  records, vocabulary, monkeypatch, capfd
):
  def full(descriptor):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  got = word_ids.tokenise(records, vocabulary, vocab.words)
  assert_same(got, text.tokenise(records, vocabulary))
  assert re.search(
    r"36 sentences are made in memory, at every start \(.*No space left",
    capfd.readouterr().err,
  )
  assert not folders(records)


def test_a_second_start_only_maps(records, vocabulary, packed):
  want = word_ids.tokenise(records, vocabulary, vocab.words)
  rows = {length: word_ids.pack(want, length) for length in (8, 9)}
  assert packed == [8, 9]
  got = word_ids.tokenise(records, vocabulary, vocab.words)
  assert_same(got, want)
  for length in rows:
    found = word_ids.pack(got, length)
    assert_packed(found, rows[length])
    assert_packed(found, text.pack(want.lengths, length))
    assert isinstance(found.begin.base, np.memmap)
  assert packed == [8, 9] * 2


def test_packings_lie_with_their_word_ids(records, vocabulary, packed):
  for split in (vocab.words, vocab.tokens):
    tokens = word_ids.tokenise(records, vocabulary, split)
    for _ in range(2):
      word_ids.pack(tokens, 8)
  word_ids.pack(text.tokenise(records, vocabulary), 8)
  assert packed == [8] * 3


def test_a_packing_of_another_version_is_not_taken(
  records, vocabulary, packed, monkeypatch
):
  tokens = word_ids.tokenise(records, vocabulary, vocab.words)
  word_ids.pack(tokens, 8)
  monkeypatch.setattr(word_ids, "_PACKING_VERSION", 0)
  word_ids.pack(tokens, 8)
  assert packed == [8, 8]


def shorten(path):
  path.write_bytes(path.read_bytes()[:-4])


def change(path):
  content = path.read_bytes()
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def pipe(path):
  path.unlink()
  os.mkfifo(path)


@pytest.mark.parametrize("name", ["ids", "lengths", "record.json"])
@pytest.mark.parametrize("damage", [shorten, change, os.remove, pipe])
def test_damaged_word_ids_are_made_anew(
  records, vocabulary, made, capfd, name, damage
):
  want = word_ids.tokenise(records, vocabulary, vocab.words)
  word_ids.pack(want, 8)
  (kept,) = folders(records)
  whole = text.Tokens(*(np.copy(a) for a in want[:2]), *want[2:])
  damage(kept / name)
  for _ in range(2):
    got = word_ids.tokenise(records, vocabulary, vocab.words)
    assert_same(got, whole)
  assert len(made) == 2
  assert capfd.readouterr().err.count(f"{kept} is damaged; it is made") == 1


@pytest.mark.parametrize("name", [*text.Packing._fields, "record.json"])
@pytest.mark.parametrize("damage", [shorten, change, os.remove])
def test_a_damaged_packing_is_made_anew(
  records, vocabulary, packed, name, damage
):
  tokens = word_ids.tokenise(records, vocabulary, vocab.words)
  want = text.Packing(*map(np.copy, word_ids.pack(tokens, 8)))
  (folder,) = (p for p in tokens.folder.iterdir() if p.is_dir())
  damage(folder / name)
  for _ in range(2):
    assert_packed(word_ids.pack(tokens, 8), want)
  assert packed == [8, 8]


@pytest.fixture
def twins(tmp_path, vocabulary):
  """Two corpora whose word ids are of one size, and what they are."""
  texts = []
  for name, lines in (("b", LINES), ("c", LINES[::-1])):
    path = tmp_path / f"{name}.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    both = corpora.open_corpus("text", tmp_path / name, train=[path])
    texts.append(both["train"])
  return texts


@pytest.mark.parametrize("names", [["ids"], ["record.json"], []])
def test_those_of_another_text_are_not_taken(twins, vocabulary, names, made):
  want, kept = [], []
  for records in twins:
    tokens = word_ids.tokenise(records, vocabulary, vocab.words)
    want.append(text.tokenise(records, vocabulary))
    kept.append(tokens.folder)
  assert want[0].digest != want[1].digest
  assert len(want[0].ids) == len(want[1].ids)
  one, other = kept
  # All of the folder where no names are given.
  for a, b in [(one / n, other / n) for n in names] or [(one, other)]:
    spare = a.rename(f"{a}.spare")
    b.rename(a)
    spare.rename(b)
  made.clear()
  for records, expected in zip(twins, want, strict=True):
    got = word_ids.tokenise(records, vocabulary, vocab.words)
    assert_same(got, expected)
  assert made == twins


def test_the_packing_of_another_text_is_not_taken(twins, vocabulary, packed):
  both = [word_ids.tokenise(t, vocabulary, vocab.words) for t in twins]
  one, other = (tokens.folder / "packing_1_8" for tokens in both)
  word_ids.pack(both[0], 8)
  shutil.copytree(one, other)
  packed.clear()
  assert_packed(word_ids.pack(both[1], 8), text.pack(both[1].lengths, 8))
  assert packed == [8, 8]


def test_a_record_of_an_older_version_is_taken(records, vocabulary, made):
  tokens = word_ids.tokenise(records, vocabulary, vocab.words)
  record = tokens.folder / "record.json"
  content = json.loads(record.read_text())
  del content["of"]
  record.write_text(json.dumps(content))
  word_ids.tokenise(records, vocabulary, vocab.words)
  assert made == [records]


def test_a_file_that_cannot_be_read_is_not_thrown_away(
  records, vocabulary, monkeypatch, capfd
):
  want = word_ids.tokenise(records, vocabulary, vocab.words)

  def broken(*_):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(hashlib, "file_digest", broken)
  got = word_ids.tokenise(records, vocabulary, vocab.words)
  assert_same(got, want)
  assert got.folder is None
  said = capfd.readouterr().err
  assert "made in memory" in said and "Input/output error" in said
  assert "damaged" not in said and (want.folder / "ids").exists()


def read_only(*_):
  raise OSError(30, "Read-only file system")


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("beyond", [-1, 7, 2**31 - 1])
def test_ids_beyond_the_vocabulary_are_refused(
  records, vocabulary, monkeypatch, kept, beyond
):
  small = vocab.Vocabulary.build(records, min_count=1, max_size=7)
  monkeypatch.setattr(small, "encode", lambda words: [beyond for _ in words])
  if not kept:
    monkeypatch.setattr(os, "mkdir", read_only)
  with pytest.raises(ValueError, match=f"{beyond}.*of 7 entries has 0 to 6"):
    word_ids.tokenise(records, small, vocab.words)


def test_nothing_is_written_through_a_link(records, vocabulary, tmp_path):
  mine = tmp_path / "mine"
  mine.write_text("mine")
  (records.folder / "word_ids").mkdir()
  (records.folder / "word_ids" / "lock").symlink_to(mine)
  got = word_ids.tokenise(records, vocabulary, vocab.words)
  assert_same(got, text.tokenise(records, vocabulary))
  assert mine.read_text() == "mine"


def test_where_no_packing_can_be_kept_there_is_one(
  records, vocabulary, packed, monkeypatch, capfd
):
  tokens = word_ids.tokenise(records, vocabulary, vocab.words)

  def full(descriptor):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  for _ in range(2):
    got = word_ids.pack(tokens, 8)
    assert_packed(got, text.pack(tokens.lengths, 8))
  assert len(packed) == 4
  said = capfd.readouterr().err
  assert "36 sentences are packed in memory, at every start" in said
  assert not [p for p in tokens.folder.iterdir() if p.is_dir()]


STARTED = """
import sys
from moejax.data import corpora, vocab, word_ids

folder, path = sys.argv[1:]
texts = corpora.open_corpus("text", folder, train=[path])["train"]
vocabulary = vocab.Vocabulary.build(texts, min_count=1)
tokens = word_ids.tokenise(texts, vocabulary, vocab.words)
print(tokens.digest, word_ids.pack(tokens, 8).begin.tolist())
"""


def test_processes_that_start_at_once_do_each_other_no_harm(
  records, vocabulary, tmp_path
):
  command = [sys.executable, "-c", STARTED, tmp_path, tmp_path / "a.txt"]
  processes = [
    subprocess.Popen(
      command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for _ in range(2)
  ]
  outputs = [process.communicate() for process in processes]
  tokens = text.tokenise(records, vocabulary)
  begin = text.pack(tokens.lengths, 8).begin.tolist()
  assert [out for out, _ in outputs] == [f"{tokens.digest} {begin}\n"] * 2
  assert sum("into word ids" in said for _, said in outputs) == 1
  assert not any("in memory" in said for _, said in outputs)
