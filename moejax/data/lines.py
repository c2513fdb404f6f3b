"""Lines of files in UTF-8, plain or compressed (`.gz`, `.xz`)."""

import gzip
import hashlib
import lzma
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence

Paths = Sequence[str | os.PathLike]

_OPEN = {".gz": gzip.open, ".xz": lzma.open}


def check_path(path: pathlib.Path) -> None:
  """Refuses what is no file.

  Raises:
    FileNotFoundError: it does not exist.
    ValueError: it is a directory.
  """
  if path.is_dir():
    raise ValueError(f"{path} is a directory; name the text files in it")
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist")


def numbered(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """Yields each line with its number, from 1, and without its line break.

  Raises:
    ValueError: the file is not UTF-8, or damaged.
  """
  open_file = _OPEN.get(path.suffix, open)
  encoding = "utf-8-sig"  # a byte order mark may come first
  try:
    with open_file(path, "rb") as file:
      for number, line in enumerate(file, start=1):
        try:
          text = line.decode(encoding)
        except UnicodeDecodeError as error:
          # The error's place is one in what follows a byte order mark.
          place = error.start + len(line) - len(error.object)
          raise ValueError(
            f"{path} is not UTF-8: byte {place + 1} of line {number} is"
            f" 0x{line[place]:02x}; convert it, for example with"
            " iconv -f latin1 -t utf-8"
          ) from None
        yield number, text.rstrip("\r\n")
        encoding = "utf-8"
  except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
    raise ValueError(
      f"{path} is cut short or damaged ({error}); copy or compress it again"
    ) from None


def fingerprint(files: Mapping[str, Sequence[pathlib.Path]]) -> str:
  """Digests which files make which split, and all that they contain."""
  digest = hashlib.blake2b(digest_size=12)
  for split, paths in files.items():
    for path in paths:
      with open(path, "rb") as file:
        content = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
      digest.update(f"{split}\n{path.name}\n{content}\n".encode())
  return digest.hexdigest()
