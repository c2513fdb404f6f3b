"""Arrays in files: made once, whole or not at all, and from then on mapped.

A folder holds a file for each array, and a record of their sizes and digests.
"""

import contextlib
import hashlib
import json
import pathlib
import shutil
import socket
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from moejax import files as files_lib
from moejax import terminal
from moejax.data import text

_RECORD = "record.json"


class Kept(NamedTuple):
  """What lies in a folder.

  Attributes:
    arrays: by name, of one axis; mapped into memory.
    digests: of each, see `text.digest`, from when it was written.
  """

  arrays: Mapping[str, np.ndarray]
  digests: Mapping[str, str]


def key(folder: pathlib.Path, *parts: object) -> str:
  """Digests all that something made of a prepared corpus depends on.

  Of the prepared files only names, sizes and times: TFDS never changes a copy
  in place, and to read lm1b takes longer than all else at a start.

  Args:
    folder: where the corpus lies.
    *parts: all else.
  """
  found = list(parts)
  for path in sorted(folder.iterdir()):
    if path.is_file():
      found += [path.name, path.stat().st_size, path.stat().st_mtime_ns]
  everything = "\n".join(map(str, found)).encode()
  return hashlib.blake2b(everything, digest_size=12).hexdigest()


def not_kept(what: str, error: OSError) -> None:
  """Says that something is made in memory."""
  terminal.warn(f"{what} in memory, at every start ({error})")


def keep(
  path: pathlib.Path,
  types: Mapping[str, type[np.generic]],
  write: Callable[..., None],
  thorough: bool = False,
) -> Kept:
  """Maps the arrays in a folder; makes them where they are not, or damaged.

  Of several processes one makes them while the others wait.

  Args:
    path: the folder.
    types: of each array, by name.
    write: writes the arrays, to a file each, in the order of `types`.
    thorough: whether damage is looked for by reading all of them. Else a file
      that is as long as it was written passes.

  Raises:
    OSError: they cannot be kept.
  """
  if not _sound(path, types, thorough):
    path.parent.mkdir(exist_ok=True)
    with files_lib.locked(path.parent / "lock"):
      if not _sound(path, types, thorough):
        if path.exists():
          terminal.warn(f"{path} is damaged; it is made anew")
          shutil.rmtree(path)
        _make(path, types, write)
  record = _read(path)
  return Kept(
    {name: _map(path / name, dtype) for name, dtype in types.items()},
    {name: record[name]["digest"] for name in types},
  )


def _sound(
  path: pathlib.Path, types: Mapping[str, type[np.generic]], thorough: bool
) -> bool:
  try:
    record = _read(path)
    return all(
      (path / name).stat().st_size == record[name]["bytes"]
      and (
        not thorough
        or text.digest(_map(path / name, dtype)) == record[name]["digest"]
      )
      for name, dtype in types.items()
    )
  except (OSError, ValueError, LookupError, TypeError):
    # No folder, no file, or a record that is none.
    return False


def _read(path: pathlib.Path) -> Any:
  return json.loads((path / _RECORD).read_text(encoding="utf-8"))


def _map(path: pathlib.Path, dtype: type[np.generic]) -> np.ndarray:
  return np.memmap(path, dtype, mode="r").view(np.ndarray)


def _make(
  path: pathlib.Path,
  types: Mapping[str, type[np.generic]],
  write: Callable[..., None],
) -> None:
  # By machine: a lock may not reach another one. On this one, a draft that is
  # there is what a killed process left.
  draft = path.with_suffix(f".{socket.gethostname()}.draft")
  shutil.rmtree(draft, ignore_errors=True)
  draft.mkdir()
  try:
    with contextlib.ExitStack() as stack:
      files = [stack.enter_context(open(draft / name, "wb")) for name in types]
      write(*files)
      for file in files:
        files_lib.sync(file)
    record = {
      name: {
        "bytes": (draft / name).stat().st_size,
        "digest": text.digest(_map(draft / name, dtype)),
      }
      for name, dtype in types.items()
    }
    files_lib.write_whole(draft / _RECORD, json.dumps(record))
    draft.rename(path)
    files_lib.sync_folder(path.parent)
  except OSError:
    # Another machine may have been first.
    if not path.exists():
      raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)
