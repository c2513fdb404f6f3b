"""Lines of text in UTF-8, of files plain or compressed, and of standard input.

Lines end in line feeds, which may follow a carriage return. Byte order marks,
which come to stand within a text when files are joined, are left out.
"""

import bz2
import contextlib
import functools
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


def _open_zstd(file: io.BufferedIOBase) -> io.BufferedIOBase:
  import pyarrow  # late: it is large, and such files are few

  stream = pyarrow.input_stream(file, compression="zstd")
  return io.BufferedReader(stream)


# How compressed files begin, what opens them, and the command that does.
_COMPRESSED = (
  (rb"\x1f\x8b", gzip.open, "gzip -dc"),
  (rb"BZh[1-9](1AY&|\x17rE8)", bz2.open, "bzip2 -dc"),
  (rb"\xfd7zXZ\0|\x5d\0\0", lzma.open, "xz -dc"),  # .xz, .lzma
  (rb"\x28\xb5\x2f\xfd", _open_zstd, "zstd -dc"),
)
_SUFFIXES = (".gz", ".bz2", ".xz", ".lzma", ".zst")


def check_path(path: files_lib.Path) -> None:
  """Refuses what is no file.

  Raises:
    FileNotFoundError: it does not exist.
    ValueError: it is a directory.
  """
  if path.is_dir():
    raise ValueError(f"{path} is a directory; name the text files in it")
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist")


def check(path: files_lib.Path) -> tuple[str, Origin]:
  """Looks at how a file begins, as `formats.check`.

  Returns:
    The text that it begins with, and where that is from.

  Raises:
    FileNotFoundError, ValueError: as `check_path` and `formats.check`.
  """
  check_path(path)
  with _opened(path) as (file, origin):
    return formats.check(file.read(_HEAD), origin), origin


def numbered(path: files_lib.Path) -> Iterator[tuple[int, str]]:
  """Yields each line with its number, from 1, and without its line break.

  Raises:
    ValueError: the file is not UTF-8, or damaged.
  """
  for number, line in as_written(path):
    yield number, _plain(line)


def as_written(path: files_lib.Path) -> Iterator[tuple[int, str]]:
  """Yields each line with its number, from 1, and all that is in it.

  Raises:
    ValueError: as `numbered`.
  """
  with _opened(path) as (file, origin):
    yield from _decoded(file, origin)


def of_stdin(content: bytes) -> list[str]:
  """Returns the lines of what came in by standard input.

  Raises:
    ValueError: it is no text in UTF-8.
  """
  origin = Origin(formats.STDIN)
  formats.check(content[:_HEAD], origin)
  return [_plain(line) for _, line in _decoded(io.BytesIO(content), origin)]


def _plain(line: str) -> str:
  """Returns a line without its break, and without marks of byte order."""
  return line.replace("\ufeff", "").rstrip("\r\n")


@contextlib.contextmanager
def _opened(path: files_lib.Path) -> Iterator[tuple[io.BufferedIOBase, Origin]]:
  """Opens a file by what it begins with, whatever its name says."""
  with files_lib.open_regular(path) as file:
    begin = file.read(8)
    file.seek(0)
    found = [kind for kind in _COMPRESSED if re.match(kind[0], begin)]
    if begin and not found and path.suffix in _SUFFIXES:
      raise ValueError(
        f"{path} is damaged, or not compressed as its name says; copy it again,"
        f" or, if it is plain text, rename it to {path.with_suffix('')}"
      )
    try:
      if found:
        _, unpacked, command = found[0]
        with unpacked(file) as text:
          yield text, Origin(str(path), command)
      else:
        yield file, Origin(str(path))
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
      # Those of the operating system have a number.
      if getattr(error, "errno", None) is not None:
        raise
      raise ValueError(
        f"{path} is cut short or damaged ({error}); copy or compress it again"
      ) from None


def _decoded(
  file: io.BufferedIOBase, origin: Origin
) -> Iterator[tuple[int, str]]:
  more = functools.partial(file.read, _HEAD)
  lines = iter(functools.partial(file.readline, _LONGEST), b"")
  mixed = False
  for number, line in enumerate(lines, start=1):
    if len(line) == _LONGEST:
      raise ValueError(
        f"line {number} of {origin.name} is longer than {_LONGEST:,} bytes;"
        f" break it between sentences: {origin.cure(formats.BREAK)}"
      )
    text = formats.line_text(line, number, more, mixed, origin)
    mixed = mixed or not text.isascii()
    yield number, text


def fingerprint(files: Mapping[str, Sequence[files_lib.Path]]) -> str:
  """Digests which files make which split, and all that they contain."""
  digest = hashlib.blake2b(digest_size=12)
  for split, paths in files.items():
    for path in paths:
      with files_lib.open_regular(path) as file:
        content = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
      digest.update(f"{split}\n{path.name}\n{content}\n".encode())
  return digest.hexdigest()
