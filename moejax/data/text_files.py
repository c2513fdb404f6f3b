"""Text files as users name them, and their lines, in UTF-8.

Files are plain or compressed. Lines end in line feeds, which may follow a
carriage return. Byte order marks, which come to stand within a text when files
are joined, are left out.
"""

import bz2
import contextlib
import functools
import glob
import gzip
import hashlib
import io
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

from moejax import files as files_lib
from moejax.data import formats
from moejax.data.formats import Origin

Paths = Sequence[str | os.PathLike]

# Bytes that are looked at to tell what a file is.
_HEAD = 1 << 16
# Bytes of a line at most: what is longer has no lines.
_LONGEST = 1 << 26


def find(words: str | Sequence[str]) -> list[str]:
  """Finds the files that users name, by a config or words of a command line.

  Paths are parted by commas, with spaces around them or without, and may begin
  with languages, as in "en-fr=a.tsv". `~` is the home folder, as `files.local`
  has it, and patterns (`*`, `?`, `[ab]`) stand for the files that match, in
  order; FileNotFoundError where none does. A file whose own name has commas,
  brackets or "=" is meant by this name.
  """
  found = []
  for word in [words] if isinstance(words, str) else words:
    parts = word.split(",")
    while parts:
      # The longest that is the name of a file; else what comes before a comma.
      for end in range(len(parts), 0, -1):
        item = ",".join(parts[:end]).strip()
        readings = _readings(item)
        named = [mark + p for mark, p in readings if os.path.exists(p)]
        if named:
          break
      del parts[:end]
      if item:
        found += named[:1] or _matching(item, readings)
  return found


def _matching(item: str, readings: Sequence[tuple[str, str]]) -> list[str]:
  """Returns the files that match; the item, if it is no pattern."""
  for mark, path in readings:
    if matches := sorted(glob.glob(path, recursive=True)):
      return [mark + match for match in matches]
  mark, path = readings[-1]
  if glob.has_magic(path):
    raise FileNotFoundError(
      f"{item} matches no file; give the path of one, or another pattern."
    )
  return [mark + path]


def _readings(item: str) -> list[tuple[str, str]]:
  """Returns an item as a path, and as languages and a path, if it can be."""
  languages, equals, path = item.partition("=")
  readings = [("", item)]
  if equals and path and "/" not in languages:
    readings.append((f"{languages}=", path))
  # A path says by "./" that what follows is no language.
  return [
    (mark, ("./" if p.startswith("./") else "") + str(files_lib.local(p)))
    for mark, p in readings
  ]


# -- lines --------------------------------------------------------------------


def _open_zstd(file: io.BufferedIOBase) -> io.BufferedIOBase:
  import pyarrow  # late: it is large, and such files are few

  return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))


# Each of `formats.COMPRESSED`.
_OPEN = {
  "gzip": gzip.open,
  "bzip2": bz2.open,
  "xz": lzma.open,
  "zstd": _open_zstd,
}
_SUFFIXES = (".gz", ".bz2", ".xz", ".lzma", ".zst")


def check(path: files_lib.Path) -> tuple[str, Origin]:
  """Returns what text a file begins with, and where that is from.

  Raises what `formats.check` does.
  """
  with _opened(path) as (file, origin):
    return formats.check(file.read(_HEAD), origin), origin


def lines(path: files_lib.Path) -> Iterator[str]:
  """Yields each line without its line break; ValueError for no such text."""
  with _opened(path) as (file, origin):
    yield from _decoded(file, origin)


def of_stdin(content: bytes) -> list[str]:
  """Returns the lines of standard input; ValueError as `check` and `lines`."""
  origin = Origin(formats.STDIN)
  formats.check(content[:_HEAD], origin)
  return list(_decoded(io.BytesIO(content), origin))


def fingerprint(files: Mapping[str, Sequence[files_lib.Path]]) -> str:
  """Digests which files make which split, and all that they contain."""
  digest = hashlib.blake2b(digest_size=12)
  for split, paths in files.items():
    for path in paths:
      with files_lib.open_regular(path) as file:
        content = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
      digest.update(f"{split}\n{path.name}\n{content}\n".encode())
  return digest.hexdigest()


@contextlib.contextmanager
def _opened(path: files_lib.Path) -> Iterator[tuple[io.BufferedIOBase, Origin]]:
  """Opens a file by what it begins with, whatever its name says."""
  with files_lib.open_regular(path) as file:
    begin = file.read(10)
    file.seek(0)
    text, origin = file, Origin(str(path))
    for start, by, command in formats.COMPRESSED:
      if re.match(start, begin):
        text, origin = _OPEN[by](file), Origin(str(path), command)
    if begin and text is file and path.suffix in _SUFFIXES:
      raise ValueError(
        f"{path} is damaged, or not compressed as its name says; copy it again,"
        f" or, if it is plain text, rename it to {path.with_suffix('')}"
      )
    try:
      with text:
        yield text, origin
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
      # Those of the operating system have a number.
      if getattr(error, "errno", None) is not None:
        raise
      raise ValueError(
        f"{path} is cut short or damaged ({error}); copy or compress it again"
      ) from None


def _decoded(file: io.BufferedIOBase, origin: Origin) -> Iterator[str]:
  """Yields each line without its break; ValueError where it is no text."""
  mixed = False
  read = functools.partial(file.readline, _LONGEST)
  for number, line in enumerate(iter(read, b""), start=1):
    if len(line) == _LONGEST:
      raise ValueError(
        f"line {number} of {origin.name} is longer than {_LONGEST:,} bytes;"
        f" break it between sentences: {origin.cure(formats.BREAK)}"
      )
    if b"\0" in line:
      place = f"one at byte {line.index(0) + 1} of line {number}"
      raise origin.refused(f"text with NUL bytes, {place}", r"| tr -d '\000'")
    try:
      text = line.decode()
    except UnicodeDecodeError as error:
      cure = formats.cure_of(line + file.read(_HEAD), mixed, origin)
      raise ValueError(
        f"{origin.name} is not UTF-8: byte {error.start + 1} of line {number}"
        f" is 0x{line[error.start]:02x}; {cure}"
      ) from None
    if text.count("\r") > 100:
      raise origin.refused(*formats.OLD_LINES)
    mixed = mixed or not text.isascii()
    yield text.replace("\ufeff", "").rstrip("\r\n")
