"""Bytes that are no text in UTF-8: what they are, and the command that cures.

What cannot be meant is refused, what may be is warned of. A command reads the
file and writes another one, new.txt.
"""

import codecs
import contextlib
import itertools
import json
import re
import shlex
import unicodedata
from typing import NamedTuple

import charset_normalizer

from moejax import terminal

STDIN = "standard input"


class Origin(NamedTuple):
  """Where bytes come from, for messages."""

  name: str  # Of the file, or STDIN.
  unpack: str = ""  # The command that decompresses it, such as "gzip -dc".

  def cure(self, how: str) -> str:
    """Returns what to type, or to do.

    "| COMMAND" is one that the content goes through; else {} is the path.
    """
    path = "FILE" if self.name == STDIN else shlex.quote(self.name)
    command = how.removeprefix("| ")
    if command == how:
      return how.replace("{}", path)
    if self.unpack:
      return f"{self.unpack} {path} | {command} > new.txt"
    return f"{command} < {path} > new.txt"

  def refused(self, what: str, how: str) -> ValueError:
    """Returns the error that says what it is, and the cure."""
    return ValueError(
      f"{self.name} is {what}, where plain text in UTF-8 is wanted:"
      f" {self.cure(how)}"
    )

  def doubted(self, what: str, how: str) -> None:
    """Warns of what it may not be meant to be, with the cure."""
    terminal.warn(f"{self.name} {what}; if that is not meant: {self.cure(how)}")


# Breaks lines of any length between sentences.
BREAK = (
  "| perl -CSD -Mutf8 -pe"
  r" 'BEGIN { $/ = \65536 } s/([.!?])\s+|([。！？])/$+\n/g'"
)
_TO_UTF8 = "| iconv -f {} -t UTF-8".format
_NO_TAGS = r"| perl -0777 -pe 's/<[^>]*>//g'"
_SAVE = "save it as plain text in UTF-8, by the program that wrote it"
_OTHER = "name a file of text"
OLD_LINES = "text whose lines end in carriage returns", r"| tr '\r' '\n'"

# How compressed files begin, by what, and the command that decompresses them.
COMPRESSED = (
  (rb"\x1f\x8b", "gzip", "gzip -dc"),
  (rb"BZh[1-9](1AY&SY|\x17rE8P)", "bzip2", "bzip2 -dc"),
  (rb"\xfd7zXZ\0|\x5d\0\0", "xz", "xz -dc"),  # .xz, .lzma
  (rb"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
)
# How what else is no text begins, what it is, and the cure.
_SIGNATURES = (
  (rb"\xff\xfe\0\0|\0\0\xfe\xff", "text in UTF-32", _TO_UTF8("UTF-32")),
  (rb"\xff\xfe|\xfe\xff", "text in UTF-16", _TO_UTF8("UTF-16")),
  # Within another compression.
  *(
    (begin, f"compressed by {by}", f"| {how}") for begin, by, how in COMPRESSED
  ),
  (rb".{257}ustar", "a tar archive", "| tar -xOf -"),
  (rb"PK\x03\x04.*(word/|opendocument)", "a document of an office", _SAVE),
  (rb"PK\x03\x04", "a zip archive", "unzip {}; then name the text in it"),
  (rb"7z\xbc\xaf|Rar!\x1a", "an archive", "unpack it, and name the text"),
  (rb"%PDF-\d", "a PDF document", "pdftotext {} new.txt"),
  (rb"\{\\rtf|\xd0\xcf\x11\xe0\xa1\xb1", "a document of an office", _SAVE),
  (rb"version https://git-lfs", "a pointer of Git LFS", "git lfs pull"),
  (
    rb"\x89(PNG|HDF)|\xff\xd8\xff|GIF8[79]a|\x7fELF|SQLite format|\x93NUMPY"
    rb"|\x80[\2-\5]|PAR1[^ -~]",
    "a picture, a program or data",
    _OTHER,
  ),
)
# Of letters in two or four bytes, without a mark that says so; as iconv has it.
_WIDE = {
  f"utf_{bits}_{order}": f"UTF-{bits}{order.upper()}"
  for bits in (32, 16)
  for order in ("le", "be")
}
# Those that text is in where it is not in UTF-8: such as have few letters
# beyond ASCII, and such as have many.
_OF_FEW = ("CP1252", "CP1250", "CP1254", "CP850")
_OF_MANY = (
  *("CP1251", "KOI8-R", "CP1253", "CP1255", "CP1256", "TIS-620"),
  *("CP932", "EUC-JP", "GBK", "BIG5", "CP949"),
)
_CONTROL = re.compile("[\0-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f]")
# Letters without a line break that are no sentence.
_LONG = 10_000


def check(head: bytes, origin: Origin) -> str:
  """Looks at the first bytes of what should be text, and returns their text.

  ValueError where they are no text in UTF-8, or have line ends of another kind.
  """
  for begin, what, how in _SIGNATURES:
    if re.match(begin, head, re.DOTALL):
      raise origin.refused(what, how)
  if b"\0" in head:
    found = charset_normalizer.from_bytes(head, cp_isolation=[*_WIDE]).best()
    if found:
      name = _WIDE[found.encoding]
      raise origin.refused(f"text in {name} without a mark", _TO_UTF8(name))
  text = head.decode(errors="replace")
  # Text with stray NUL bytes can be cured, line by line.
  if len(_CONTROL.findall(text.replace("\0", ""))) > 0.1 * len(text):
    raise origin.refused("binary, with many control characters", _OTHER)
  if re.search(rb"\x1b\$[@B]", head):
    raise origin.refused("text in ISO-2022-JP", _TO_UTF8("ISO-2022-JP"))
  if head.count(b"\r") - head.count(b"\r\n") > head.count(b"\n"):
    raise origin.refused(*OLD_LINES)
  # What is text, but may not be the one that is meant.
  if re.match(r"(?i)\s*<(\?xml|!doctype html|html|head|body)\b", text):
    origin.doubted("is HTML or XML, tags and all", _NO_TAGS)
  with contextlib.suppress(ValueError):
    if isinstance(json.loads(text.partition("\n")[0]), dict):
      origin.doubted("is JSON, names and all", "| jq -r '.. | strings'")
  if len(text) > _LONG and "\n" not in text[:_LONG]:
    origin.doubted(
      f"begins with a line of more than {_LONG:,} letters, where a line should"
      " be a sentence",
      BREAK,
    )
  return text


def cure_of(block: bytes, mixed: bool, origin: Origin) -> str:
  """Says what to do about bytes that are not UTF-8, as a line begins.

  Mixed is whether lines before it have letters beyond ASCII, in UTF-8.
  """
  likely = block.decode(errors="replace")
  beyond = sum(letter > "\x7f" for letter in likely)
  # In other encodings a few bytes look as if they were of UTF-8.
  if mixed or beyond > 1.8 * likely.count("\ufffd"):
    how = origin.cure("| iconv -f UTF-8 -t UTF-8 -c")
    return f"other letters are; leave this out: {how}"
  if names := _encodings(block):
    return (
      f"find out its encoding, which may be {' or '.join(names)}, and see that"
      f" this makes text of it: {origin.cure(_TO_UTF8('ENCODING'))}"
    )
  return f"nor is it text in an encoding that is known here; {_OTHER}"


def _encodings(block: bytes) -> list[str]:
  """Names the encodings in which bytes are words."""
  many = sum(byte > 0x7F for byte in block) >= 0.4 * len(block)
  found = []
  for name in _OF_MANY if many else _OF_FEW:
    try:
      # The end may be within a letter.
      text = codecs.getincrementaldecoder(name)().decode(block)
    except UnicodeDecodeError:
      continue
    beyond = [unicodedata.category(each) for each in text if each > "\x7f"]
    words = sum(kind[0] in "LMP" for kind in beyond)
    # Capitals come first in a word.
    turned = sum(pair == ("Ll", "Lu") for pair in itertools.pairwise(beyond))
    sound = words >= 0.9 * len(beyond) and turned <= 0.1 * len(beyond)
    if sound and not _CONTROL.search(text):
      found.append(name)
  return found
