"""Files of runs and corpora, on a disk or in a bucket.

Folders come from anywhere, with links, pipes and devices in them. Nothing but a
regular file is opened, and nothing is written through a link. A crash leaves
the old content or the new, never half.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import pathlib
import re
import secrets
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath

from moejax import bucket

# Of a disk, or of a bucket.
Path = pathlib.Path | epath.Path

# Ends the name of what is being written; a kill may leave it.
_DRAFT = ".draft"
# Of a run; held by who trains it.
LOCK_FILE = "lock"
# What a file system answers that has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:)/")


def _refuse_odd(path, found: os.stat_result, wanted: str = "regular file"):
  kinds = {stat.S_IFREG: "regular file", stat.S_IFDIR: "folder"}
  kinds |= {stat.S_IFLNK: "link", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
  kind = kinds.get(stat.S_IFMT(found.st_mode), "device")
  if kind != wanted:
    raise OSError(
      f"{path} is a {kind} where a {wanted} is wanted; give another path, or"
      " put one there."
    )


def open_regular(path: Path, mode: str = "rb") -> BinaryIO | io.BytesIO:
  """Opens a regular file; OSError says what is there in place of one.

  Mode "rb" reads, through a link too; "ab" writes, through none; "xb" makes the
  file. An object of a bucket is written by `sync` and at the end.
  """
  writes = mode != "rb"
  if bucket.is_in(path):
    if writes:
      return bucket.Growing(path, keep=mode != "xb")
    with bucket.reaching(path):
      return io.BytesIO(path.read_bytes())

  def opener(name: str, flags: int) -> int:
    # To open a pipe may wait forever, and to open a device may set it going.
    with contextlib.suppress(FileNotFoundError):
      _refuse_odd(path, os.lstat(name) if writes else os.stat(name))
    if writes:
      flags |= os.O_NOFOLLOW
    number = os.open(name, flags | os.O_NONBLOCK, 0o666)
    try:
      # It may be another one by now.
      _refuse_odd(path, os.fstat(number))
    except OSError:
      os.close(number)
      raise
    return number

  return open(path, mode, opener=opener)


def path(text: str) -> Path:
  """Returns the path that a user's text means; ValueError says what to write.

  A leading ~ or ~USER is a home folder, gs:// leads into a bucket.
  """
  scheme = bucket.SCHEME
  if text.lower().startswith(scheme):
    return bucket.path(scheme + text[len(scheme) :])
  if "\0" in text:
    raise ValueError(f"{text!r} holds a NUL, which no path can.")
  if url := _URL.match(text):
    raise ValueError(
      f"{text} is no place that can be read or written; give a path, or for a"
      f" run {scheme}BUCKET/FOLDER (Orbax writes to no other buckets); a folder"
      f" of the name {url[1]} is written ./{url[1]}"
    )
  expanded = os.path.expanduser(text)
  if expanded == text and text.startswith("~"):
    raise ValueError(
      f"{text} begins with a home folder that this machine does not know; write"
      f" it in full, or ./{text} for a folder of that name."
    )
  return pathlib.Path(expanded)


def local(text: str) -> pathlib.Path:
  """Returns the path of something other than a run: as `path`, on a disk."""
  if text.lower().startswith(bucket.SCHEME):
    raise ValueError(
      f"{text} lies in a bucket, where a run can live (--workdir), but text,"
      " configs, plans and prepared copies cannot; give a path on a disk (to"
      f" copy it there: gcloud storage cp -r {text} FOLDER)."
    )
  return path(text)


def exists(path: Path) -> bool:
  """Returns whether something is there; raises OSError if it cannot know."""
  with bucket.reaching(path):
    return path.exists()


def read(path: Path) -> bytes:
  """Reads a file, as `open_regular`."""
  with open_regular(path) as file:
    return file.read()


def read_json(path: Path) -> dict[str, Any]:
  """Reads a file of one JSON object; raises ValueError if it holds none."""
  content = read(path)
  try:
    found = json.loads(content.decode())
  except (ValueError, RecursionError) as error:
    what = f"is no JSON ({error})" if content.strip() else "is empty"
    raise ValueError(f"{path} {what}") from None
  if not isinstance(found, dict):
    raise ValueError(f"{path} holds {type(found).__name__}, not an object")
  return found


def write_whole(path: Path, content: str | bytes) -> None:
  """Writes bytes, or text in UTF-8, to a draft, then renames it to the path.

  It replaces what was there, a link too. An object of a bucket needs no draft.
  """
  content = content.encode() if isinstance(content, str) else content
  if bucket.is_in(path):
    with bucket.reaching(path):
      path.write_bytes(content)
    return
  # Two that write at once must not share a draft.
  draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_DRAFT}")
  try:
    with open_regular(draft, "xb") as file:
      file.write(content)
      sync(file)
    draft.replace(path)
  except BaseException as error:
    draft.unlink(missing_ok=True)
    if isinstance(error, OSError) and error.errno:
      # It names the draft, or nothing.
      raise OSError(error.errno, error.strerror, str(path)) from None
    raise
  sync_folder(path.parent)


@contextlib.contextmanager
def locked(path: pathlib.Path, wait: bool = True) -> Iterator[None]:
  """Holds the lock of a file, which it makes and never writes to.

  Where another process holds it, this one waits or raises BlockingIOError;
  OSError where the file system has no locks.
  """
  how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
  with contextlib.ExitStack() as stack:
    # One that ends may remove the file before it lets go, another make it anew.
    while True:
      try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(open_regular(path, "a+b"))
        fcntl.flock(file, how)
        if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
          break
      except FileNotFoundError:
        pass
      except FileExistsError:
        raise NotADirectoryError(
          f"{path.parent} is no folder; give another path."
        ) from None
      except OSError as error:
        if error.errno and not error.filename:
          raise OSError(error.errno, error.strerror, str(path)) from None
        raise
      stack.close()
    yield


def is_locked(path: pathlib.Path) -> bool:
  """Returns whether another process holds a file's lock, or may hold it."""
  try:
    with open_regular(path) as file:
      # Shared, and only for this moment.
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return False
  except FileNotFoundError:
    return False
  except BlockingIOError:
    return True
  except OSError as error:
    if error.errno not in NO_LOCKS:
      raise
    return True


def remove_drafts(folder: Path) -> None:
  """Removes what a kill left, where nobody else writes whole files now."""
  if not bucket.is_in(folder):
    for draft in folder.glob(f"*.{'[0-9a-f]' * 8}{_DRAFT}"):
      draft.unlink()


def sync(file: BinaryIO | io.BytesIO) -> None:
  """Writes to the disk: to be called before a file is renamed to its path."""
  file.flush()
  if isinstance(file, bucket.Growing):
    file.sync()
  else:
    os.fsync(file.fileno())


def sync_folder(folder: pathlib.Path) -> None:
  """Writes the names in a folder to the disk, where the file system can."""
  number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
  try:
    os.fsync(number)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
      raise
  finally:
    os.close(number)


def refuse_odd_in(folder: Path, written: bool) -> None:
  """Raises OSError where a folder, if it is there, holds a pipe or a device.

  Libraries would open it. Links are odd too, where they write.
  """
  if bucket.is_in(folder):
    return
  look = os.lstat if written else os.stat
  try:
    _refuse_odd(folder, look(folder), "folder")
  except FileNotFoundError:
    return
  seen = set()
  for name, folders, others in os.walk(folder, followlinks=not written):
    for entry in (pathlib.Path(name, each) for each in (*folders, *others)):
      # A run that trains meanwhile removes its old checkpoints.
      with contextlib.suppress(FileNotFoundError):
        found = look(entry)
        if not stat.S_ISDIR(found.st_mode):
          _refuse_odd(entry, found)
        elif (found.st_dev, found.st_ino) in seen:
          # A link to a folder above it has no end.
          folders.remove(entry.name)
        seen.add((found.st_dev, found.st_ino))
