"""What bytes are: each kind is named, and the command that is told cures it."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
import subprocess
import tarfile
import zipfile

import pytest

from moejax.data import corpora, text_files
from moejax.data.vocab import Vocabulary

ENGLISH = "".join(
  f"The cat {i} sat on the mat; it said no.\n" for i in range(60)
)
FRENCH = "".join(f"Le café {i} était fermé, déjà.\n" for i in range(60))
RUSSIAN = "".join(f"Кошка {i} сидела на коврике.\n" for i in range(60))
HINDI = "".join(f"बिल्ली {i} पुरानी चटाई पर बैठी थी।\n" for i in range(60))
CHINESE = "".join(f"今天天气很好，第{i}只猫坐在垫子上。\n" for i in range(60))
KOREAN = "".join(f"고양이 {i} 마리가 매트 위에 앉아서\n" for i in range(60))
THAI = "".join(f"แมวตัวที่ {i} นั่งอยู่บนเสื่อเก่า\n" for i in range(60))


def zipped(**files):
  """A zip archive of files, whose names have "__" for "/"."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    for name, text in files.items():
      archive.writestr(name.replace("__", "/") + ".xml", text)
  return file.getvalue()


def tar(text):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w:gz") as archive:
    info = tarfile.TarInfo("a.txt")
    info.size = len(text.encode())
    archive.addfile(info, io.BytesIO(text.encode()))
  return file.getvalue()


def cured(said, folder):
  """Runs the command that a message ends with; returns the new file."""
  command = said.strip().splitlines()[-1].rsplit(": ", 1)[1]
  if not shutil.which(command.split()[0]):
    pytest.skip(f"no {command.split()[0]} here")
  subprocess.run(command, shell=True, cwd=folder, check=False)
  return folder / "new.txt"


def as_read(path):
  return "".join(f"{line}\n" for line in corpora.read_lines([path]))


# -- refused ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("what", "content", "text"),
  [
    ("text in UTF-16,", CHINESE.encode("utf-16"), CHINESE),
    (
      "text in UTF-16,",
      codecs.BOM_UTF16_BE + FRENCH.encode("utf-16-be"),
      FRENCH,
    ),
    ("text in UTF-32,", FRENCH.encode("utf-32"), FRENCH),
    *(
      (f"text in {name} without a mark", text.encode(name), text)
      for text in (ENGLISH, RUSSIAN, HINDI, CHINESE, KOREAN, THAI)
      for name in ("UTF-16LE", "UTF-16BE", "UTF-32BE")
    ),
    (
      "text in UTF-16,",
      gzip.compress(FRENCH.encode("utf-16"), mtime=0),
      FRENCH,
    ),
    ("text in ISO-2022-JP", "今日は。\n".encode("iso-2022-jp"), "今日は。\n"),
    (
      "NUL bytes, one at byte 5 of line 1,",
      b"The \0" + ENGLISH[4:].encode(),
      ENGLISH,
    ),
    ("NUL bytes", CHINESE.replace("\n", "\0\n").encode(), CHINESE),
    (
      "lines end in carriage returns",
      ENGLISH.replace("\n", "\r").encode(),
      ENGLISH,
    ),
    (
      "lines end in carriage returns",
      (ENGLISH * 40 + ENGLISH.replace("\n", "\r") * 2).encode(),
      ENGLISH * 42,
    ),
    (
      "compressed by gzip",
      lzma.compress(gzip.compress(b"word\n", mtime=0)),
      "word\n",
    ),
    ("a tar archive", tar(ENGLISH), ENGLISH),
    (
      "compressed by gzip that was converted from Latin-1 by mistake",
      gzip.compress(ENGLISH.encode(), mtime=0).decode("latin-1").encode(),
      ENGLISH,
    ),
    (
      "a document of Word",
      zipped(types="", word__document="<w:p><w:t>One</w:t></w:p><w:p>2</w:p>"),
      "One\n2\n",
    ),
    (
      "an OpenDocument text",
      zipped(
        mimetype="application/vnd.oasis.opendocument.text",
        content="<text:p>One</text:p><text:p>2</text:p>",
      ),
      "One\n2\n",
    ),
  ],
)
def test_what_is_no_text_is_named_with_the_cure(tmp_path, what, content, text):
  path = tmp_path / "a b's.txt"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=what) as caught:
    corpora.read_lines([path])
  said = str(caught.value)
  assert str(path) in said and "\n" not in said
  assert as_read(cured(said, tmp_path)) == text


@pytest.mark.parametrize(
  ("encoding", "python", "text"),
  [
    ("CP1252", "latin-1", FRENCH),
    ("CP1251", "cp1251", RUSSIAN),
    ("KOI8-R", "koi8-r", RUSSIAN),
    ("GBK", "gbk", CHINESE),
    ("CP949", "euc-kr", KOREAN),
    ("TIS-620", "tis-620", THAI),
  ],
)
def test_of_other_encodings_the_right_one_is_among_the_named(
  tmp_path, encoding, python, text
):
  path = tmp_path / "a.txt"
  path.write_bytes(b"plain\n" + text.encode(python))
  with pytest.raises(ValueError, match="a.txt is not UTF-8: byte") as caught:
    corpora.read_lines([path])
  said = str(caught.value)
  assert "of line 2 is 0x" in said and encoding in said
  new = cured(said.replace("-f ENCODING", f"-f {encoding}"), tmp_path)
  assert as_read(new) == "plain\n" + text


@pytest.mark.parametrize(
  ("content", "what"),
  [
    (FRENCH.encode() + b"d\xc3\xa9j\xff\n", "the rest of the line is"),
    (FRENCH.encode() + b"\xff\n", "other lines are"),
    (FRENCH.encode() + FRENCH.encode("latin-1"), "other lines are"),
    (FRENCH.encode() + "é".encode()[:1], "it ends within a letter"),
  ],
)
def test_utf8_with_a_fault_is_not_taken_for_latin1(tmp_path, content, what):
  path = tmp_path / "a.txt"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f"line 61 is 0x.*{what}") as caught:
    corpora.read_lines([path])
  said = str(caught.value).replace('"ENCODING"', '"CP1252"')
  text = as_read(cured(said, tmp_path))
  # What was UTF-8 stays as it was.
  assert text.startswith(FRENCH)
  if content.endswith(FRENCH.encode("latin-1")):
    assert text == FRENCH * 2


@pytest.mark.parametrize(
  ("content", "what"),
  [
    (b"PK\x03\x04" + bytes(30), "a zip archive"),
    (b"%PDF-1.7\n", "a PDF document"),
    (b"PAR1\x15\0", "a Parquet table"),
    (b"\x89PNG\r\n", "a picture"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document"),
    (b"{\\rtf1 words}", "an RTF document"),
    (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    (random.Random(0).randbytes(5000), "binary"),
    (random.Random(0).randbytes(5000).replace(b"\0", b""), "binary"),
    (bytes(5000), "NUL bytes"),
  ],
)
def test_what_is_named_alone(tmp_path, content, what):
  path = tmp_path / "a.txt"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f"a.txt is .*{what}"):
    corpora.read_lines([path])


def test_a_line_without_end(tmp_path, monkeypatch):
  monkeypatch.setattr(text_files, "_LONGEST", 1000)
  path = tmp_path / "a.txt"
  path.write_bytes(b"short\n" + ENGLISH.replace("\n", " ").encode())
  with pytest.raises(ValueError, match="line 2 of .* is longer than 1,000 b"):
    corpora.read_lines([path])


def test_what_cannot_be_read_twice(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(OSError, match="pipe is a pipe where"):
    corpora.read_lines([tmp_path / "pipe"])


# -- read ---------------------------------------------------------------------


@pytest.mark.parametrize(
  "name, compress",
  [
    ("a.txt", gzip.compress),
    ("a.gz", bz2.compress),
    ("a.bz2", lambda content: bz2.compress(content) * 2),
    ("a.xz", lambda content: lzma.compress(content, lzma.FORMAT_ALONE)),
    ("a.txt", bytes),
  ],
)
def test_compression_is_told_by_the_bytes(tmp_path, capsys, name, compress):
  path = tmp_path / name
  path.write_bytes(compress(FRENCH.encode()))
  assert as_read(path).startswith(FRENCH)
  assert capsys.readouterr() == ("", "")


def test_zstd(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  content = pyarrow.compress(FRENCH.encode(), "zstd", asbytes=True)
  path = tmp_path / "a.txt"
  path.write_bytes(content)
  assert as_read(path) == FRENCH
  path.write_bytes(content[:-9])
  with pytest.raises(ValueError, match="a.txt is cut short or damaged"):
    as_read(path)


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
    b"one word\n",
    b"{curly\n",
  ],
)
def test_sound_text_is_not_doubted(tmp_path, capsys, content):
  path = tmp_path / "a.txt"
  path.write_bytes(content)
  assert corpora.read_lines([path])
  assert capsys.readouterr() == ("", "")


def test_marks_within_joined_files_are_left_out(tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\nthree\xef\xbb\xbffour\n")
  assert corpora.read_lines([path]) == ["one", "two", "threefour"]
  assert text_files.of_stdin(path.read_bytes()) == ["one", "two", "threefour"]


def test_standard_input_is_read_as_files_are():
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


def test_a_vocabulary_may_be_marked_and_must_be_text(tmp_path):
  path = tmp_path / "vocab.txt"
  path.write_bytes(b"\xef\xbb\xbf</S>\r\n<S>\r\n<UNK>\r\nword\r\n")
  assert Vocabulary.load(path).encode(["word"]) == [3]
  path.write_text("</S>\n<S>\n<UNK>\nword\n", encoding="utf-16")
  with pytest.raises(ValueError, match="vocab.txt is text in UTF-16"):
    Vocabulary.load(path)


# -- doubted ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("what", "content", "text"),
  [
    (
      "is a page in HTML",
      f"<!DOCTYPE html>\n<p>{ENGLISH}</p>",
      "\n" + ENGLISH,
    ),
    ("is XML", f"<?xml version='1.0'?>\n<a>{ENGLISH}</a>", "\n" + ENGLISH),
    (
      "is JSON",
      "".join(
        json.dumps({"id": "a", "my text": line}) + "\n"
        for line in ENGLISH.splitlines()
      ),
      ENGLISH,
    ),
    ("is JSON", '{"translation": {"en": "One", "fr": "Un"}}\n', "One\nUn\n"),
    (
      "was UTF-8 already when it was converted from CP1252",
      FRENCH.replace("à", "é").encode().decode("cp1252"),
      FRENCH.replace("à", "é"),
    ),
    (
      "was UTF-8 already when it was converted from LATIN1",
      RUSSIAN.encode().decode("latin-1"),
      RUSSIAN,
    ),
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
    (
      "has words of 2. letters",
      "The_cat_sat_on_the_old_mat\n" * 9,
      "The cat sat on the old mat\n" * 9,
    ),
    (
      "has words of 2. letters",
      "ឆ្មា\u200bអង្គុយ\u200bលើ\u200bកន្ទេល\u200bចាស់\n",
      "ឆ្មា អង្គុយ លើ កន្ទេល ចាស់\n",
    ),
  ],
)
def test_what_may_not_be_meant_is_warned_of(
  tmp_path, capsys, what, content, text
):
  path = tmp_path / "a.txt"
  path.write_text(content, encoding="utf-8")
  assert corpora.read_lines([path])
  said = capsys.readouterr().err
  assert re.search(f"^{re.escape(str(path))} .*{what}", said)
  new = cured(said, tmp_path)
  assert as_read(new).strip() == text.strip()
  # It is cured of what it was told of.
  assert what.split("(")[0].strip("\\") not in capsys.readouterr().err


def test_letters_that_were_lost(tmp_path, capsys):
  path = tmp_path / "a.txt"
  path.write_text(RUSSIAN.encode("ascii", "replace").decode().replace("?", "�"))
  corpora.read_lines([path])
  assert "has lost letters where it was converted" in capsys.readouterr().err
