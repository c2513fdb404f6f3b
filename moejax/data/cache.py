"""Arrays made once of a prepared corpus, written beside it and then mapped.

A folder holds a file for each array, and a record of their digests.
"""

import contextlib
import hashlib
import io
import json
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from moejax import files as files_lib
from moejax import terminal

_RECORD = "record.json"


class Cached(NamedTuple):
  """Arrays of one axis and their digests, by name; their folder, if any."""

  arrays: Mapping[str, np.ndarray]
  digests: Mapping[str, str]
  folder: pathlib.Path | None


def digest(content: np.ndarray | bytes) -> str:
  """Returns a short name that another content would not have."""
  return hashlib.blake2b(content, digest_size=8).hexdigest()


def joined(parts: Iterable[object]) -> str:
  """Returns one digest for several, or for several texts."""
  return digest("\n".join(map(str, parts)).encode())


def key(folder: pathlib.Path, *parts: object) -> str:
  """Digests all that something made of a prepared corpus depends on.

  Of the prepared files only names, sizes and times: TFDS never changes a copy
  in place, and array_record finds changed bytes by sums of its own.
  """
  found = list(parts)
  for path in sorted(folder.iterdir()):
    if path.is_file():
      found += [path.name, path.stat().st_size, path.stat().st_mtime_ns]
  return joined(found)


def cached(
  folder: pathlib.Path | None,
  types: Mapping[str, type[np.generic]],
  write: Callable[..., None],
  what: str,
) -> Cached:
  """Maps the arrays in a folder; makes them where they are not, or damaged.

  All of them are read, as a changed id would train as well as any: about a
  second for each GB. Of several processes one makes them while the others wait.
  They are made in memory where nothing can be written or read, or without a
  folder.

  Args:
    folder: of these arrays alone.
    types: of each array, by name.
    write: writes the arrays, to a file each, in the order of `types`.
    what: is done, to tell.
  """
  if folder is not None:
    try:
      if found := _found(folder, types):
        return found
      with files_lib.locked(folder.parent / "lock"):
        # Another process may have made them meanwhile.
        return _found(folder, types) or _make(folder, types, write, what)
    except OSError as error:
      terminal.warn(f"{what} in memory, at every start ({error})")
  drafts = [io.BytesIO() for _ in types]
  write(*drafts)
  arrays = {
    name: np.frombuffer(draft.getbuffer(), types[name])
    for name, draft in zip(types, drafts, strict=True)
  }
  return Cached(arrays, {n: digest(a) for n, a in arrays.items()}, None)


def _found(folder, types) -> Cached | None:
  """Maps the arrays; None where they are not there, or not as written."""
  try:
    # Any other kind of file may block whoever opens it.
    if not all((folder / name).is_file() for name in (_RECORD, *types)):
      return None
    record = json.loads((folder / _RECORD).read_bytes())
    if record != _record(folder, types, folder):
      return None
    arrays = {
      name: np.memmap(folder / name, dtype, mode="r").view(np.ndarray)
      for name, dtype in types.items()
    }
  except (FileNotFoundError, ValueError):
    return None
  return Cached(arrays, {name: record[name] for name in types}, folder)


def _record(folder, types, at) -> dict[str, str]:
  """Digests the files of a folder, and says `at` which place they belong."""
  record = {"of": f"{at.parent.name}/{at.name}"}
  for name in types:
    # Read and not mapped: where a disk fails, that is an error to tell.
    with open(folder / name, "rb") as file:
      found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8))
    record[name] = found.hexdigest()
  return record


def _make(folder, types, write, what) -> Cached:
  """Writes the arrays into a draft, renames it to the folder and maps it."""
  if folder.exists():
    terminal.warn(f"{folder} is damaged; it is made anew")
    shutil.rmtree(folder)
  terminal.warn(f"{what} (once), in {folder}")
  # By machine: a lock may not reach another one. On this one, a draft that is
  # there is what a killed process left.
  draft = folder.with_suffix(f".{socket.gethostname()}.draft")
  shutil.rmtree(draft, ignore_errors=True)
  draft.mkdir()
  try:
    with contextlib.ExitStack() as stack:
      files = [stack.enter_context(open(draft / name, "wb")) for name in types]
      write(*files)
      for file in files:
        files_lib.sync(file)
    record = json.dumps(_record(draft, types, folder))
    files_lib.write_whole(draft / _RECORD, record)
    draft.rename(folder)
    files_lib.sync_folder(folder.parent)
  except OSError:
    # Another machine may have been first.
    if not folder.exists():
      raise
  finally:
    shutil.rmtree(draft, ignore_errors=True)
  if found := _found(folder, types):
    return found
  raise OSError(f"{folder} does not hold what was just written there")
