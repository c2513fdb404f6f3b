"""A bucket of Google Cloud Storage where a run may live, at gs://BUCKET/FOLDER.

An object is there whole or not at all, is never appended to, and has a digest
that the bucket keeps. There are no folders, links or locks: what keeps a second
training out is an object that its owner renews.
"""

import base64
import contextlib
import importlib.util
import io
import json
import logging
import os
import pathlib
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from moejax import terminal

SCHEME = "gs://"
# Seconds without a sign of life after which a lock's owner counts as dead.
_LEASE = 60.0
_RENEWED = 6  # times in a lease
_ASKED = 30  # times in a lease
# gcsfs and Orbax take them for patterns, or cut a path off there.
_ODD = re.compile(r"[#?*\[\]\x00-\x1f\x7f]|(?:^|/)\.\.(?:/|$)")


def path(text: str) -> epath.Path:
  """Returns the place in a bucket that gs://BUCKET/FOLDER names.

  Raises:
    ValueError: it cannot be one.
    ImportError: the packages that reach buckets are not installed.
  """
  name, _, folder = text.removeprefix(SCHEME).partition("/")
  if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", name):
    raise ValueError(
      f"{text} names no bucket; write {SCHEME}BUCKET/FOLDER, with a bucket of"
      " small letters, digits, dots and dashes."
    )
  if odd := _ODD.search(folder):
    raise ValueError(
      f"{text} holds {odd[0]!r}, which the libraries that reach buckets do not"
      " take for a name; give a folder without it."
    )
  if importlib.util.find_spec("gcsfs") is None:
    raise ImportError(
      f"{text} is reached by the package gcsfs, which is not installed; pip"
      " install gcsfs."
    )
  _set_up()
  return epath.Path(text)


def _set_up() -> None:
  """Makes the libraries that reach buckets do it alike wherever we run."""
  import fsspec

  # epath would go by TensorFlow where that is installed.
  os.environ["EPATH_USE_TF"] = "false"
  # Other processes write there too.
  settings = fsspec.config.conf.setdefault("gcs", {})
  settings.setdefault("use_listings_cache", False)
  for name in ("fsspec", "gcsfs"):  # They log the errors that they raise.
    logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def is_in(place: pathlib.PurePath) -> bool:
  """Whether a path leads into a bucket."""
  return os.fspath(place).startswith(SCHEME)


def exists(place: epath.Path) -> bool:
  """Returns whether there is an object, or are some below.

  Raises:
    Unreachable: the bucket is.
  """
  with reaching(place):
    return place.exists()


def read(place: epath.Path) -> bytes:
  """Reads an object.

  Raises:
    FileNotFoundError: there is none.
    Unreachable: the bucket is.
  """
  with reaching(place):
    return place.read_bytes()


def write(place: epath.Path, content: bytes) -> None:
  """Writes an object; what was there before stays until all of it is.

  Raises:
    OSError: there is no such bucket, or it is unreachable.
  """
  with reaching(place):
    place.write_bytes(content)


class _Object:
  """An object that is changed only from what it was, by its generation."""

  def __init__(self, place: epath.Path):
    import tensorstore

    bucket, _, self._name = os.fspath(place).removeprefix(SCHEME).partition("/")
    retries = {"max_retries": 4, "initial_delay": "1s", "max_delay": "8s"}
    self.place = place
    self._store = tensorstore.KvStore.open(
      {"driver": "gcs", "bucket": bucket, "gcs_request_retries": retries}
    ).result()

  def read(self) -> tuple[bytes | None, bytes]:
    """Returns the content, None where there is none, and the generation."""
    with reaching(self.place):
      found = self._store.read(self._name).result()
    content = None if found.state == "missing" else found.value
    return content, found.stamp.generation

  def write(self, content: bytes | None, generation: bytes) -> bytes:
    """Writes, or removes; returns the new generation.

    Where there is another generation than given it does nothing, and returns
    none.
    """
    with reaching(self.place):
      stamp = self._store.write(
        self._name, content, if_equal=generation
      ).result()
    if stamp.generation:
      return stamp.generation
    # A request that was sent again may have met its own first try.
    found, generation = self.read()
    return generation if found == content else b""


class Growing(io.BytesIO):
  """Stands for a file that grows: an object, written anew as a whole.

  It is written by `sync` and at the end, and only where nobody else has written
  it since.

  Args:
    place: of the object.
    keep: begin with the content that is there.

  Raises:
    Unreachable: the bucket is.
  """

  def __init__(self, place: epath.Path, keep: bool):
    super().__init__()
    self._object = _Object(place)
    content, self._generation = self._object.read()
    self._written = self.write(content or b"") if keep else 0

  def sync(self) -> None:
    """Writes the object, if anything has been added.

    Raises:
      OSError: another process has, or the bucket is unreachable.
    """
    if self._written == self.tell():
      return
    self._written = self.tell()
    generation = self._object.write(self.getvalue(), self._generation)
    if not generation:
      raise OSError(
        f"{self._object.place} was written by another process; it is left as"
        " that wrote it."
      )
    self._generation = generation

  def close(self) -> None:
    """Writes the object, once."""
    try:
      if not self.closed:
        self.sync()
    finally:
      super().close()


def digests(folder: epath.Path) -> dict[str, str]:
  """Returns the MD5 that the bucket keeps of each object below a folder.

  One request for a thousand objects, whose content is not read. Of one that was
  put together of others there is none; it is "".

  Raises:
    Unreachable: the bucket is.
  """
  import fsspec

  with reaching(folder):
    found = fsspec.filesystem("gcs").find(os.fspath(folder), detail=True)
  start = len(os.fspath(folder).removeprefix(SCHEME)) + 1
  return {
    name[start:]: base64.b64decode(about.get("md5Hash", "")).hex()
    for name, about in found.items()
  }


@contextlib.contextmanager
def reaching(place: epath.Path) -> Iterator[None]:
  """Turns what the libraries raise into one sentence that names the place."""
  try:
    yield
  except FileNotFoundError:
    raise FileNotFoundError(f"{place}: no such object, or bucket") from None
  except Exception as error:  # Of many libraries and kinds.
    raise Unreachable(place, error) from error


class Unreachable(OSError):
  """A bucket does not answer, or not as it is asked."""

  def __init__(self, place: epath.Path, error: Exception):
    first_line = (str(error).splitlines() or [""])[0]
    super().__init__(
      f"{place} cannot be reached ({type(error).__name__}: {first_line:.300});"
      " see that the bucket exists, that this machine may use it (`gcloud auth"
      " application-default login`, or a service account), and the network."
    )


@contextlib.contextmanager
def alone(
  lock: epath.Path, lease: float = _LEASE
) -> Iterator[Callable[[], None]]:
  """Keeps others out by an object that is made only where there is none.

  A thread renews it. Where it is not renewed for a whole lease, its owner is
  taken for dead, and whoever waited for that makes the object its own; at once
  where the owner ran on this machine and is gone. Making, renewing and taking
  over depend on the object's generation, so that of several only one succeeds,
  and no clock is compared with that of another machine.

  An owner that did not run for a lease, as on a suspended machine, may be
  followed by another. It notices when it next calls what this yields, and until
  then may write what it was about to.

  Args:
    lock: the object.
    lease: in seconds.

  Yields:
    A function that raises OSError once the object is another's.

  Raises:
    BlockingIOError: another process holds it.
    Unreachable: the bucket is.
  """
  held = _Held(lock, lease)
  stop = threading.Event()

  def renew():
    while not stop.wait(lease / _RENEWED):
      held.renew()

  thread = threading.Thread(target=renew, daemon=True)
  thread.start()
  try:
    yield held.check
  finally:
    stop.set()
    thread.join()
    held.release()


class _Held:
  """A lock that is this process's own, until it turns out to be another's."""

  def __init__(self, lock: epath.Path, lease: float):
    self._lock, self._lease = lock, lease
    self._object = _Object(lock)
    self._one_at_a_time = threading.Lock()
    self._lost = False
    self._me = {
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "machine": _machine(),
      "began": _began(os.getpid()),
      "token": secrets.token_hex(8),
    }
    self._tried = time.time()
    self._generation = self._take()

  def _take(self) -> bytes:
    content, before = self._object.read()
    if content is not None and not _is_gone(_owner(content)):
      terminal.warn(
        f"{self._lock} is held by {_described(content)}; looking for"
        f" {self._lease:.0f} seconds whether that is alive"
      )
      end, generation = time.monotonic() + self._lease, before
      while time.monotonic() < end and generation == before:
        time.sleep(self._lease / _ASKED)
        content, generation = self._object.read()
      if content is not None and generation != before:
        raise self._taken(content)
      before = generation
    if generation := self._write(before):
      return generation
    raise self._taken(self._object.read()[0])

  def _taken(self, content: bytes | None) -> BlockingIOError:
    return BlockingIOError(
      f"another process, {_described(content)}, trains in {self._lock.parent};"
      " wait for it, or give another --workdir."
    )

  def _write(self, generation: bytes) -> bytes:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    content = json.dumps(self._me | {"renewed": now}).encode()
    return self._object.write(content, generation)

  def renew(self) -> None:
    with self._one_at_a_time:
      self._tried = time.time()
      if self._lost:
        return
      # A bucket out of reach is no one else's; to save there fails by itself.
      with contextlib.suppress(Unreachable):
        self._generation = self._write(self._generation)
        self._lost = not self._generation

  def check(self) -> None:
    # The thread does not run on a machine that sleeps.
    if abs(time.time() - self._tried) > self._lease / 2:
      self.renew()
    if self._lost:
      raise OSError(
        f"{self._lock} was removed, or taken over by another process while this"
        " one gave no sign of life; this one ends here."
      )

  def release(self) -> None:
    if not self._lost:
      with contextlib.suppress(Unreachable):
        self._object.write(None, self._generation)


def _owner(content: bytes | None) -> dict[str, Any]:
  try:
    found = json.loads(content or b"{}")
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}


def _described(content: bytes | None) -> str:
  owner = _owner(content)
  return f"process {owner.get('pid')} on {owner.get('host')}"


def _is_gone(owner: dict[str, Any]) -> bool:
  """Whether a lock's owner ran on this machine, and does no longer."""
  here = _machine()
  return bool(
    here
    and owner.get("machine") == here
    and _began(owner.get("pid")) != owner.get("began")
  )


def _machine() -> str:
  """Names what numbers processes: a start of a machine, or a container on it.

  Nothing where that cannot be known.
  """
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _began(pid: Any) -> str:
  """Returns when a process began, in ticks; nothing where it does not run."""
  if not isinstance(pid, int):
    return ""
  try:
    about = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return ""
  state, *fields = about.rpartition(")")[2].split()
  return "" if state in "ZX" else fields[18]
