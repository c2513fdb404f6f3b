"""What bytes are: each kind is named, and the command that is told cures it."""

import bz2
import gzip
import json
import lzma
import os
import random
import re
import shutil
import subprocess

import pytest

from moejax.data import corpora, text_files
from moejax.data.vocab import Vocabulary


def many(text):
  return "".join(f"{text.format(i)}\n" for i in range(60))


ENGLISH = many("The cat {} sat on the mat; it said no.")
FRENCH = many("Le café {} était fermé, déjà.")
RUSSIAN = many("Кошка {} сидела на коврике.")
HINDI = many("बिल्ली {} पुरानी चटाई पर बैठी थी।")
CHINESE = many("今天天气很好，第{}只猫坐在垫子上。")
KOREAN = many("고양이 {} 마리가 매트 위에 앉아서")
THAI = many("แมวตัวที่ {} นั่งอยู่บนเสื่อเก่า")
SEVERAL = (ENGLISH, RUSSIAN, HINDI, CHINESE, KOREAN)


@pytest.fixture
def path(tmp_path):
  return tmp_path / "a b's.txt"


def refused(path, content, what):
  """What is said of a file with this content."""
  path.write_bytes(content)
  with pytest.raises(ValueError, match=what) as caught:
    corpora.read_lines([path])
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)
  return str(caught.value)


def as_read(path):
  return "".join(f"{line}\n" for line in corpora.read_lines([path]).targets)


def cured(said, folder):
  """The text that the command makes with which a message ends."""
  command = said.strip().splitlines()[-1].rsplit(": ", 1)[1]
  if not shutil.which(command.split()[0]):
    pytest.skip(f"no {command.split()[0]} here")
  subprocess.run(command, shell=True, cwd=folder, check=False)
  return as_read(folder / "new.txt")


# -- refused ------------------------------------------------------------------


def encoded(what, name, *texts):
  return ((what, text.encode(name), text) for text in texts)


def other(encoding, python, text):
  """The right encoding is among those that are named."""
  what = f"is not UTF-8: byte .* of line 2 is 0x.*[ ]{encoding}"
  return what, b"plain\n" + text.encode(python), "plain\n" + text


OLD = ENGLISH.replace("\n", "\r")
PK = b"PK\x03\x04" + bytes(30)
KINDS = [
  *encoded("text in UTF-16,", "utf-16", CHINESE),
  *encoded("text in UTF-32,", "utf-32", FRENCH),
  *encoded("UTF-16LE without a mark", "utf-16-le", *SEVERAL),
  *encoded("UTF-16BE without a mark", "utf-16-be", THAI),
  *encoded("UTF-32BE without a mark", "utf-32-be", ENGLISH),
  *encoded("text in ISO-2022-JP", "iso-2022-jp", "今日は。\n"),
  ("UTF-16,", gzip.compress(FRENCH.encode("utf-16"), mtime=0), FRENCH),
  (
    "NUL bytes, one at byte 5 of line 1,",
    b"The \0" + ENGLISH[4:].encode(),
    ENGLISH,
  ),
  ("end in carriage returns", OLD.encode(), ENGLISH),
  ("end in carriage returns", (ENGLISH * 40 + OLD * 2).encode(), ENGLISH * 42),
  ("by gzip", lzma.compress(gzip.compress(b"word\n", mtime=0)), "word\n"),
  other("CP1252", "latin-1", FRENCH),
  other("CP1251", "cp1251", RUSSIAN),
  other("KOI8-R", "koi8-r", RUSSIAN),
  other("GBK", "gbk", CHINESE),
  other("CP949", "euc-kr", KOREAN),
  other("TIS-620", "tis-620", THAI),
  # What is named alone.
  ("a tar archive", bytes(257) + b"ustar", None),
  ("a zip archive", PK, None),
  ("document of an office", PK + b"word/document.xml", None),
  ("document of an office", b"{\\rtf1 words}", None),
  ("a PDF document", b"%PDF-1.7\n", None),
  ("a picture", b"\x89PNG\r\n", None),
  ("pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\n", None),
  ("binary", random.Random(0).randbytes(5000), None),
  ("NUL bytes", bytes(5000), None),
]


@pytest.mark.parametrize(("what", "content", "text"), KINDS)
def test_what_is_no_text_is_named_with_the_cure(path, what, content, text):
  said = refused(path, content, what)
  if text:
    said = said.replace("-f ENCODING", f"-f {what.rpartition(']')[2]}")
    assert cured(said, path.parent) == text


@pytest.mark.parametrize("fault", [b"d\xc3\xa9j\xff\n", b"\xff\n", b"\xc3"])
def test_utf8_with_a_fault_is_not_taken_for_latin1(path, fault):
  content = FRENCH.encode() + fault
  said = refused(path, content, "line 61 is 0x.*other letters are")
  assert cured(said, path.parent).startswith(FRENCH)


def test_what_has_no_lines(path, monkeypatch):
  monkeypatch.setattr(text_files, "_LONGEST", 1000)
  content = b"short\n" + ENGLISH.replace("\n", " ").encode()
  refused(path, content, "line 2 of .* is longer than 1,000 b")
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(OSError, match=f"{path} is a pipe where"):
    corpora.read_lines([path])


# -- read ---------------------------------------------------------------------


def zstd(content):
  return pytest.importorskip("pyarrow").compress(content, "zstd", asbytes=True)


@pytest.mark.parametrize(
  "name, compress",
  [
    ("a.txt", gzip.compress),
    ("a.gz", bz2.compress),
    ("a.bz2", lambda content: bz2.compress(content) * 2),
    ("a.xz", lambda content: lzma.compress(content, lzma.FORMAT_ALONE)),
    ("a.txt", zstd),
  ],
)
def test_compression_is_told_by_the_bytes(tmp_path, capsys, name, compress):
  path, content = tmp_path / name, compress(FRENCH.encode())
  path.write_bytes(content)
  assert as_read(path).startswith(FRENCH)
  assert capsys.readouterr() == ("", "")
  refused(path, content[:-9], "is cut short or damaged")


@pytest.mark.parametrize(
  "content",
  [
    *(text.encode() for text in (ENGLISH, FRENCH, RUSSIAN, HINDI, KOREAN)),
    ENGLISH.replace("\n", "\r\n").encode(),
    ENGLISH.replace("\n", "\r\r\n").encode(),
    ENGLISH.replace("cat", "\x1b[31mcat\x1b[0m").encode(),
    b"\xef\xbb\xbf" + ENGLISH.encode(),
    re.sub(r"(\w\w)", r"\1 ", CHINESE).encode(),  # as a segmenter leaves it
    b"Ming said \xe4\xbd\xa0\xe5\xa5\xbd.\n" * 9,
    b"PAR1 GIF8 BZh are words.\n",
    b"{curly\n",
  ],
)
def test_sound_text_is_not_doubted(path, capsys, content):
  path.write_bytes(content)
  assert corpora.read_lines([path]).targets
  assert capsys.readouterr() == ("", "")


def test_standard_input_and_vocabularies_are_read_as_files_are(path):
  """Marks within joined files are left out."""
  content = b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\nthree\xef\xbb\xbffour\n"
  path.write_bytes(content)
  assert corpora.read_lines([path]).targets == ["one", "two", "threefour"]
  assert text_files.of_stdin(content) == ["one", "two", "threefour"]
  assert text_files.of_stdin(b"one\r\n\n two") == ["one", "", " two"]
  assert text_files.of_stdin(b"") == []
  for content, said in [
    (gzip.compress(b"word", mtime=0), "standard input is compressed by gzip"),
    (FRENCH.encode("utf-16"), "iconv -f UTF-16 -t UTF-8 < FILE > new.txt"),
    (b"\xef\xbb\xbfcaf\xc3\xa9\n\xe9\n", "byte 1 of line 2 is 0xe9"),
    (b"one\rtwo\rthree", "carriage returns"),
  ]:
    with pytest.raises(ValueError, match=said):
      text_files.of_stdin(content)
  path.write_bytes(b"\xef\xbb\xbf</S>\r\n<S>\r\n<UNK>\r\nword\r\n")
  assert Vocabulary.load(path).encode(["word"]) == [3]
  path.write_text("</S>\n<S>\n<UNK>\nword\n", encoding="utf-16")
  with pytest.raises(ValueError, match="txt is text in UTF-16"):
    Vocabulary.load(path)


# -- doubted ------------------------------------------------------------------

UNCUT = "The_cat_sat_on_the_old_mat\n" * 9


@pytest.mark.parametrize(
  ("what", "content", "text"),
  [
    ("is HTML", f"<!DOCTYPE html>\n<p>{ENGLISH}</p>", ENGLISH),
    ("or XML", f"<?xml version='1.0'?>\n<a>{ENGLISH}</a>", ENGLISH),
    ("is JSON", f"{json.dumps({'a': {'b': 'One', 'c': '2'}})}\n", "One\n2\n"),
    (
      "begins with a line of more than 10,000 letters",
      ENGLISH.replace("\n", " ") * 9,
      ENGLISH * 9,
    ),
    (
      r"without spaces between words \(Han\)",
      "今天天气好。\n" * 9,
      "今 天 天 气 好 。\n" * 9,
    ),
    (r"without spaces between words \(Thai\)", "ที่นั่งอยู่\n", "ที่ นั่ ง อ ยู่\n"),
    ("has words of 2. letters", UNCUT, None),
  ],
)
def test_what_may_not_be_meant_is_warned_of(path, capsys, what, content, text):
  path.write_text(content, encoding="utf-8")
  assert corpora.read_lines([path]).targets
  said = capsys.readouterr().err
  assert re.search(f"^{re.escape(str(path))} .*{what}", said)
  if text:
    assert cured(said, path.parent).strip() == text.strip()
    # It is cured of what it was told of.
    assert what.split("(")[0].strip("\\") not in capsys.readouterr().err
