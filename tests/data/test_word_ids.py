"""Word ids are made once, whole or not at all, and then only mapped."""

import os
import re
import shutil
import socket
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


def folders(records):
  """What is kept, or left, beside a corpus."""
  return [p for p in (records.folder / "word_ids").iterdir() if p.is_dir()]


def assert_same(got, want):
  np.testing.assert_array_equal(got.ids, want.ids)
  np.testing.assert_array_equal(got.lengths, want.lengths)


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


def test_one_makes_while_the_others_wait(records, vocabulary, made):
  threads = [
    threading.Thread(
      target=word_ids.tokenise, args=(records, vocabulary, vocab.words)
    )
    for _ in range(4)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert made == [records]


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
