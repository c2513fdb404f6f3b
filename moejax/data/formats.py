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
from collections.abc import Callable
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
# Converts the lines that are not UTF-8 yet.
_LINE_BY_LINE = (
  '| perl -MEncode -pe \'$_ = encode("UTF-8", decode("ENCODING", $_))'
  ' unless eval { decode("UTF-8", my $line = $_, 1); 1 }\''
)
_TO_UTF8 = "| iconv -f {} -t UTF-8".format
_NO_TAGS = r"perl -0777 -pe 's/<[^>]*>//g'"
_PARAGRAPHS = rf"perl -pe 's/<\/\w+:p>/\n/g' | {_NO_TAGS} > new.txt"
_SAVE = "save it as plain text in UTF-8, by the program that wrote it"
_OTHER = "name a file of text"

# How compressed files begin, by what, and the command that decompresses them.
COMPRESSED = (
  (rb"\x1f\x8b", "gzip", "gzip -dc"),
  (rb"\x1f\x9d", "compress", "gzip -dc"),
  (rb"BZh[1-9](1AY&SY|\x17rE8P)", "bzip2", "bzip2 -dc"),
  (rb"\xfd7zXZ\0|\x5d\0\0", "xz", "xz -dc"),  # .xz, .lzma
  (rb"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
  (rb"\x04\x22\x4d\x18", "lz4", "lz4 -dc"),
  (rb"LZIP\x01", "lzip", "lzip -dc"),
)
# How what else is no text begins, what it is, and the cure.
_SIGNATURES = tuple(
  (re.compile(begin, re.DOTALL), what, how)
  for begin, what, how in (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "text in UTF-32", _TO_UTF8("UTF-32")),
    (rb"\xff\xfe|\xfe\xff", "text in UTF-16", _TO_UTF8("UTF-16")),
    *(
      (begin, f"compressed by {by}", f"| {how}")
      for begin, by, how in COMPRESSED
    ),
    (rb".{257}ustar", "a tar archive", "| tar -xOf -"),
    (
      rb"PK\x03\x04.*word/document\.xml",
      "a document of Word",
      f"unzip -p {{}} word/document.xml | {_PARAGRAPHS}",
    ),
    (
      rb"PK\x03\x04.*opendocument\.text",
      "an OpenDocument text",
      f"unzip -p {{}} content.xml | {_PARAGRAPHS}",
    ),
    (rb"PK\x03\x04", "a zip archive", "unzip {}; then name the text in it"),
    (rb"7z\xbc\xaf|Rar!\x1a", "an archive", "unpack it, and name the text"),
    (rb"%PDF-\d", "a PDF document", "pdftotext {} new.txt"),
    (rb"\{\\rtf", "an RTF document", _SAVE),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document", _SAVE),
    (
      rb"PAR1[^ -~]",
      "a Parquet table",
      'python -c "import sys, pandas;'
      " print(*pandas.read_parquet(sys.argv[1])['text'], sep='\\n')\""
      " {} > new.txt",
    ),
    (
      rb"version https://git-lfs",
      "a pointer of Git LFS to a file that is not here",
      "git lfs pull",
    ),
    (
      rb"\x89(PNG|HDF)|\xff\xd8\xff|GIF8[79]a|\x7fELF|SQLite format|\x93NUMPY"
      rb"|\x80[\2-\5]",
      "a picture, a program or data",
      _OTHER,
    ),
  )
)
_OLD_LINES = "text whose lines end in carriage returns", r"| tr '\r' '\n'"

# Of letters in two or four bytes, without a mark that says so; as iconv has it.
_WIDE = {
  f"utf_{bits}_{order}": f"UTF-{bits}{order.upper()}"
  for bits in (32, 16)
  for order in ("le", "be")
}
# Those that text is in where it is not in UTF-8, as Python and iconv name them:
# such as have few letters beyond ASCII, and such as have many.
_OF_FEW = ("CP1252", "CP1250", "CP1254", "CP850", "MACINTOSH")
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
  if found := _signature(head):
    raise origin.refused(*found)
  text = _begun("UTF-8", head, "replace")
  # What Latin-1 makes of bytes that never were of it.
  as_was = text[:1024].encode("latin-1", "replace")
  if found := _signature(as_was):
    raise origin.refused(
      f"{found[0]} that was converted from Latin-1 by mistake",
      "| iconv -f UTF-8 -t LATIN1",
    )
  if b"\0" in head and (name := _wide(head)):
    raise origin.refused(f"text in {name} without a mark", _TO_UTF8(name))
  # Text with stray NUL bytes can be cured, see `line_text`, and letters that
  # were converted twice, see `_doubt`, may look like control characters.
  if not _twice(text) and _controls(text.replace("\0", "")) > 0.1:
    raise origin.refused("binary, with many control characters", _OTHER)
  if re.search(rb"\x1b\$[@B]", head):
    raise origin.refused("text in ISO-2022-JP", _TO_UTF8("ISO-2022-JP"))
  alone = head.count(b"\r") - head.count(b"\r\n")
  if alone > head.count(b"\n"):
    raise origin.refused(*_OLD_LINES)
  if "\ufffd".encode() in head or "\ufffd" not in text:
    _doubt(text, origin)
  return text


def line_text(
  line: bytes,
  number: int,
  more: Callable[[], bytes],
  mixed: bool,
  origin: Origin,
) -> str:
  """Decodes a line with its break; ValueError where it is no text in UTF-8.

  Args:
    line: with its break.
    number: counted from 1.
    more: reads some of the bytes that follow.
    mixed: whether lines before it have letters beyond ASCII, in UTF-8.
    origin: the file that it is of.
  """
  if b"\0" in line:
    raise origin.refused(
      f"text with NUL bytes, one at byte {line.index(0) + 1} of line {number}",
      r"| tr -d '\000'",
    )
  try:
    text = line.decode()
  except UnicodeDecodeError as error:
    place = error.start
    raise ValueError(
      f"{origin.name} is not UTF-8: byte {place + 1} of line {number} is"
      f" 0x{line[place]:02x}; {_encodings(line, more(), mixed, origin)}"
    ) from None
  if text.count("\r") > 100:
    raise origin.refused(*_OLD_LINES)
  return text


def _signature(head: bytes) -> tuple[str, str] | None:
  """Returns what begins like this, and the cure."""
  found = ((what, how) for begin, what, how in _SIGNATURES if begin.match(head))
  return next(found, None)


def _begun(encoding: str, head: bytes, errors: str = "strict") -> str | None:
  """Decodes bytes that may end within a letter; None if they cannot be."""
  try:
    return codecs.getincrementaldecoder(encoding)(errors).decode(head)
  except UnicodeDecodeError:
    return None


def _controls(text: str) -> float:
  """Returns the share of control characters, white space excepted."""
  return len(_CONTROL.findall(text)) / max(1, len(text))


def _wide(head: bytes) -> str:
  """Names the encoding of letters of two or four bytes, or returns ""."""
  found = charset_normalizer.from_bytes(head, cp_isolation=[*_WIDE]).best()
  return _WIDE[found.encoding] if found else ""


def _encodings(line: bytes, more: bytes, mixed: bool, origin: Origin) -> str:
  """Says what to do about a line that is not UTF-8, and those after it."""
  leave_out = origin.cure("| iconv -f UTF-8 -t UTF-8 -c")
  if not more and "\ufffd" not in _begun("UTF-8", line, "replace"):
    return (
      f"it ends within a letter; copy it again, or leave that out: {leave_out}"
    )
  if _mostly_utf8(line):
    return f"the rest of the line is; to leave out what is not: {leave_out}"
  how, whose = _TO_UTF8("ENCODING"), "find out its"
  if mixed or _mostly_utf8(more):
    how, whose, more = _LINE_BY_LINE, "other lines are; find out its", b""
  block = line + more
  high = sum(byte > 0x7F for byte in block)
  known = _OF_FEW if high < 0.4 * len(block) else _OF_MANY
  names = [name for name in known if _fits(name, block)]
  if not names:
    return f"nor is it text in an encoding that is known here; {_OTHER}"
  return (
    f"{whose} encoding, which may be {' or '.join(names)}, and see that"
    f" this makes text of it: {origin.cure(how)}"
  )


def _mostly_utf8(block: bytes) -> bool:
  """Returns whether most of the letters beyond ASCII are in UTF-8."""
  text = _begun("UTF-8", block, "replace")
  # In other encodings a few bytes look as if they were.
  beyond = sum(letter > "\x7f" for letter in text)
  return beyond > 1.8 * text.count("\ufffd")


def _fits(encoding: str, block: bytes) -> bool:
  """Returns whether bytes are words in an encoding."""
  if (text := _begun(encoding, block)) is None:
    return False
  beyond = [unicodedata.category(letter) for letter in text if letter > "\x7f"]
  words = sum(kind[0] in "LMP" for kind in beyond)
  # Capitals come first in a word.
  turned = sum(pair == ("Ll", "Lu") for pair in itertools.pairwise(beyond))
  return (
    words >= 0.9 * len(beyond)
    and turned <= 0.1 * len(beyond)
    and not _CONTROL.search(text)
  )


def _doubt(text: str, origin: Origin) -> None:
  """Warns of what is text, but may not be the one that is meant."""
  if re.match(r"\s*<(!doctype html|html|head|body)\b", text, re.IGNORECASE):
    origin.doubted("is a page in HTML, tags and all", f"| {_NO_TAGS}")
  elif re.match(r"\s*<\?xml\b", text):
    origin.doubted("is XML, tags and all", f"| {_NO_TAGS}")
  elif strings := _strings(text):
    origin.doubted("is JSON, names and all", f"| jq -r '{strings}'")
  if encoding := _twice(text):
    origin.doubted(
      f"was UTF-8 already when it was converted from {encoding}",
      f"| iconv -f UTF-8 -t {encoding}",
    )
  if len(text) > _LONG and "\n" not in text[:_LONG]:
    origin.doubted(
      f"begins with a line of more than {_LONG:,} letters, where a line should"
      " be a sentence",
      BREAK,
    )
  lost = text.count("\ufffd")
  if lost > 0.001 * len(text):
    origin.doubted(
      f"has lost letters where it was converted: {lost:,} of the first"
      f" {len(text):,} are U+FFFD",
      "convert it anew, or delete them by"
      r" perl -CSD -pe 's/\x{fffd}//g' {} > new.txt",
    )


def _strings(text: str) -> str:
  """Returns jq's word for the strings where lines are JSON, or ""."""
  record = None
  with contextlib.suppress(ValueError):
    record = json.loads(text.partition("\n")[0])
  if not isinstance(record, dict):
    return ""
  lengths = {
    name: len(value)
    for name, value in record.items()
    if isinstance(value, str) and re.fullmatch(r"[\w -]+", name)
  }
  return f'."{max(lengths, key=lengths.get)}"' if lengths else ".. | strings"


def _twice(text: str) -> str:
  """Names the encoding that UTF-8 was taken for, as in "Ã©", or returns ""."""
  lines = [line for line in text.split("\n")[:-1] if not line.isascii()]
  for encoding in ("CP1252", "LATIN1"):
    undone = 0
    for line in lines:
      with contextlib.suppress(UnicodeError):
        undone += line.encode(encoding).decode() != line
    if undone > len(lines) / 2:
      return encoding
  return ""
