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
from typing import NamedTuple

import numpy as np

from moejax import files as files_lib
from moejax import terminal

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
  in place, and to read lm1b takes longer than all else at a start. Bytes that a
  disk has changed there array_record finds, by sums of its own, when it reads
  them.

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
) -> Kept:
  """Maps the arrays in a folder; makes them where they are not, or damaged.

  All of them are read, as a changed id would train as well as any: about a
  second for each GB. Of several processes one makes them while the others wait.

  Args:
    path: the folder.
    types: of each array, by name.
    write: writes the arrays, to a file each, in the order of `types`.

  Raises:
    OSError: they cannot be kept, or read.
  """
  found = _found(path, types)
  if found is None:
    path.parent.mkdir(exist_ok=True)
    with files_lib.locked(path.parent / "lock"):
      found = _found(path, types)
      if found is None:
        if path.exists():
          terminal.warn(f"{path} is damaged; it is made anew")
          shutil.rmtree(path)
        _make(path, types, write)
        found = _found(path, types)
  if found is None:
    raise OSError(f"{path} does not hold what was just written there")
  return found


def check_ids(
  what: str, ids: np.ndarray, count: int, folder: pathlib.Path | None
) -> None:
  """Refuses ids that a vocabulary does not have.

  A model would look them up as NaN, or as another word.

  Args:
    what: of what they are, for the message.
    ids: whole numbers.
    count: entries of the vocabulary.
    folder: where they are kept, if anywhere.

  Raises:
    ValueError: some are below 0, or not below count.
  """
  if ids.size and not 0 <= ids.min() <= ids.max() < count:
    cure = f"; remove {folder}, and they are made anew" if folder else ""
    raise ValueError(
      f"the ids of {what} are {ids.min()} to {ids.max()}, where the vocabulary"
      f" of {count:,} entries has 0 to {count - 1}{cure}"
    )


def _found(
  path: pathlib.Path, types: Mapping[str, type[np.generic]]
) -> Kept | None:
  """Maps the arrays; None where they are not there, or not as written.

  Raises:
    OSError: they cannot be read, which does not say that they are damaged.
  """
  try:
    # Any other kind of file may block whoever opens it.
    if not all((path / name).is_file() for name in (_RECORD, *types)):
      return None
    record = json.loads((path / _RECORD).read_bytes())
    # A record of an older version does not say whose it is.
    whole = record.get("of", _own_name(path)) == _own_name(path) and all(
      (path / name).stat().st_size == record[name]["bytes"]
      and _digest(path / name) == record[name]["digest"]
      for name in types
    )
    if not whole:
      return None
    return Kept(
      {name: _map(path / name, dtype) for name, dtype in types.items()},
      {name: record[name]["digest"] for name in types},
    )
  except (FileNotFoundError, ValueError, LookupError, TypeError):
    return None
  except AttributeError:  # The record is no dict.
    return None


def _own_name(path: pathlib.Path) -> str:
  """Returns what no other folder of this corpus is called."""
  return f"{path.parent.name}/{path.name}"


def _digest(path: pathlib.Path) -> str:
  """Returns `text.digest` of what a file holds.

  It is read and not mapped: where a disk fails, that is an error to tell.
  """
  with open(path, "rb") as file:
    found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8))
  return found.hexdigest()


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
    about = {
      name: {
        "bytes": (draft / name).stat().st_size,
        "digest": _digest(draft / name),
      }
      for name in types
    }
    record = json.dumps({"of": _own_name(path), **about})
    files_lib.write_whole(draft / _RECORD, record)
    draft.rename(path)
    files_lib.sync_folder(path.parent)
  except OSError:
    # Another machine may have been first.
    if not path.exists():
      raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)
