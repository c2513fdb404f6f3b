"""Files as users name them: lists, patterns, the home folder."""

import glob
import os
from collections.abc import Sequence

from moejax import files


def find(words: str | Sequence[str]) -> list[str]:
  """Finds the files that users name.

  Paths are parted by commas, with spaces around them or without, and may begin
  with languages, as in "en-fr=a.tsv". `~` is the home folder, as `files.local`
  has it, and patterns (`*`, `?`, `[ab]`) stand for the files that match, in
  order. A file whose own name has commas, brackets or "=" is meant by this
  name.

  Args:
    words: a value of a config; several words of a command line.

  Raises:
    FileNotFoundError: no file matches a pattern.
    ValueError: as `files.local`.
  """
  found = []
  for word in [words] if isinstance(words, str) else words:
    parts = word.split(",")
    while parts:
      # The longest that is the name of a file; else what comes before a comma.
      for end in range(len(parts), 0, -1):
        item = ",".join(parts[:end]).strip()
        if end == 1 or any(os.path.exists(p) for _, p in _readings(item)):
          break
      del parts[:end]
      found += _matches(item) if item else []
  return found


def _readings(item: str) -> list[tuple[str, str]]:
  """Returns an item as a path, and as languages and a path, if it can be."""

  def expanded(path: str) -> str:
    # A path says by "./" that what follows is no language.
    here = "./" if path.startswith("./") else ""
    return here + str(files.local(path))

  languages, equals, path = item.partition("=")
  readings = [("", expanded(item))]
  if equals and path and "/" not in languages:
    readings.append((f"{languages}=", expanded(path)))
  return readings


def _matches(item: str) -> list[str]:
  readings = _readings(item)
  for languages, path in readings:
    if os.path.exists(path):
      return [languages + path]
  for languages, path in readings:
    if matches := sorted(glob.glob(path, recursive=True)):
      return [languages + match for match in matches]
  languages, path = readings[-1]
  if glob.has_magic(path):
    raise FileNotFoundError(
      f"{item} matches no file; give the path of one, or another pattern."
    )
  return [languages + path]
