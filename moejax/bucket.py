"""A bucket of Google Cloud Storage where a run may live, at gs://BUCKET/FOLDER.

An object is there whole or not at all, is never appended to, and has a digest
that the bucket keeps. There are no folders, links or locks.
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
# Seconds without a sign of life after which a lock's owner counts as dead; it
# renews the lock, and who waits asks, so many times in that.
LEASE, _RENEWED, _ASKED = 60.0, 6, 30
# gcsfs and Orbax take them for patterns, or cut a path off there.
_ODD = re.compile(r"[#?*\[\]\x00-\x1f\x7f]|(?:^|/)\.\.(?:/|$)")


def path(text: str) -> epath.Path:
  """Returns the path of gs://BUCKET/FOLDER; ValueError where it cannot be one.

  ImportError where the packages that reach buckets are not installed.
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
  import fsspec

  # Else epath goes by TensorFlow where that is installed.
  os.environ["EPATH_USE_TF"] = "false"
  # Other processes write there too: a list of names is soon out of date.
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
  for library in ("fsspec", "gcsfs"):  # They log the errors that they raise.
    logging.getLogger(library).setLevel(logging.CRITICAL + 1)
  return epath.Path(text)


def is_in(path: pathlib.PurePath) -> bool:
  """Returns whether a path leads into a bucket."""
  return os.fspath(path).startswith(SCHEME)


class Unreachable(OSError):
  """A bucket does not answer, or not as it is asked."""

  def __init__(self, path: epath.Path, error: Exception):
    super().__init__(
      f"{path} cannot be reached ({terminal.brief(error)}); see that the bucket"
      " exists, that this machine may use it (`gcloud auth application-default"
      " login`, or a service account), and the network."
    )


@contextlib.contextmanager
def reaching(path: pathlib.PurePath) -> Iterator[None]:
  """Raises FileNotFoundError or Unreachable for errors of a bucket."""
  try:
    yield
  except Exception as error:  # Of many libraries and kinds.
    if not is_in(path):
      raise
    if isinstance(error, FileNotFoundError):
      raise FileNotFoundError(f"{path}: no such object, or bucket") from None
    raise Unreachable(path, error) from error


class _Object:
  """An object that is changed only from what it was, by its generation."""

  def __init__(self, path: epath.Path):
    import tensorstore

    bucket, _, self._name = os.fspath(path).removeprefix(SCHEME).partition("/")
    retries = {"max_retries": 4, "initial_delay": "1s", "max_delay": "8s"}
    self.path = path
    self._store = tensorstore.KvStore.open(
      {"driver": "gcs", "bucket": bucket, "gcs_request_retries": retries}
    ).result()

  def read(self) -> tuple[bytes | None, bytes]:
    """Returns the content, None where there is none, and the generation."""
    with reaching(self.path):
      found = self._store.read(self._name).result()
    content = None if found.state == "missing" else found.value
    return content, found.stamp.generation

  def write(self, content: bytes | None, generation: bytes) -> bytes:
    """Writes, or removes, where the generation is still the given one.

    Returns the new generation; nothing where the object was another one.
    """
    with reaching(self.path):
      written = self._store.write(self._name, content, if_equal=generation)
      if stamp := written.result().generation:
        return stamp
    # A request that was sent again may have met its own first try.
    found, generation = self.read()
    return generation if found == content else b""


class Growing(io.BytesIO):
  """Stands for a file that grows: an object, written anew as a whole.

  That is by `sync` and at the end, and only where nobody else has written it
  since. `keep` begins with the content that is there.
  """

  def __init__(self, path: epath.Path, keep: bool):
    super().__init__()
    self._object = _Object(path)
    content, self._generation = self._object.read()
    self._written = self.write(content or b"") if keep else 0

  def sync(self) -> None:
    """Writes the object, if anything has been added."""
    if self._written == self.tell():
      return
    self._written = self.tell()
    self._generation = self._object.write(self.getvalue(), self._generation)
    if not self._generation:
      raise OSError(
        f"{self._object.path} was written by another process; it is left as"
        " that wrote it."
      )

  def close(self) -> None:
    """Writes the object, once."""
    try:
      if not self.closed:
        self.sync()
    finally:
      super().close()


def digests(folder: epath.Path) -> dict[str, str]:
  """Returns the MD5 that the bucket keeps of each object below a folder.

  Their content is not read. An object composed of others has none; it is "".
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
def alone(
  lock: epath.Path, lease: float = LEASE
) -> Iterator[Callable[[], None]]:
  """Keeps others out by an object; BlockingIOError where another one has it.

  It is made only where there is none, and a thread renews it. Where that does
  not happen for a whole lease, in seconds, the owner is taken for dead, and who
  waited for that makes it its own; at once where the owner ran on this machine
  and has ended. By the object's generation only one of several succeeds, and no
  clock is compared with another machine's.

  An owner that did not run for a lease, as on a suspended machine, may be
  followed by another. What this yields raises OSError then, when it is called.
  """
  me = {
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "machine": _machine(),
    "began": _began(os.getpid()),
    "token": secrets.token_hex(8),
  }
  found = _Object(lock)
  # When it was last renewed, or that was tried, by a clock that goes on while
  # the machine sleeps; and the generation, nothing once it is another's.
  tried, generation = time.time(), b""
  one_at_a_time, stop = threading.Lock(), threading.Event()

  def write(before):
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return found.write(json.dumps(me | {"renewed": now}).encode(), before)

  def renew():
    nonlocal tried, generation
    with one_at_a_time:
      tried = time.time()
      # A bucket out of reach is no one else's; to save there fails by itself.
      with contextlib.suppress(Unreachable):
        generation = generation and write(generation)

  def keep_renewing():
    while not stop.wait(lease / _RENEWED):
      renew()

  def check() -> None:
    # The thread does not run on a machine that sleeps.
    if abs(time.time() - tried) > lease / 2:
      renew()
    if not generation:
      raise OSError(
        f"{lock} was removed, or taken over by another process while this one"
        " gave no sign of life; this one ends here."
      )

  content, before = found.read()
  owner = _owner(content)
  # A process of this machine that runs no longer, or began at another time.
  ended = me["machine"] and owner.get("machine") == me["machine"]
  ended = ended and _began(owner.get("pid")) != owner.get("began")
  if content is not None and not ended:
    terminal.warn(
      f"{lock} is held by process {owner.get('pid')} on {owner.get('host')};"
      f" looking for {lease:.0f} seconds whether that is alive"
    )
    end, now = time.monotonic() + lease, before
    while content is not None and now == before and time.monotonic() < end:
      time.sleep(lease / _ASKED)
      content, now = found.read()
    # Nothing where it is alive.
    before = now if content is None or now == before else b""
  generation = before and write(before)
  if not generation:
    owner = _owner(found.read()[0])
    raise BlockingIOError(
      f"another process, process {owner.get('pid')} on {owner.get('host')},"
      f" trains in {lock.parent}; wait for it, or give another --workdir."
    )
  thread = threading.Thread(target=keep_renewing, daemon=True)
  thread.start()
  try:
    yield check
  finally:
    stop.set()
    thread.join()
    if generation:
      with contextlib.suppress(Unreachable):
        found.write(None, generation)


def _owner(content: bytes | None) -> dict[str, Any]:
  with contextlib.suppress(ValueError):
    found = json.loads(content or b"{}")
    return found if isinstance(found, dict) else {}
  return {}


def _machine() -> str:
  """Names a start of a machine, or a container on it; nothing if unknown."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _began(pid: Any) -> str:
  """Returns when a process began, in ticks; nothing where it does not run."""
  try:
    about = pathlib.Path(f"/proc/{int(pid)}/stat").read_text()
  except (OSError, TypeError, ValueError):
    return ""
  state, *fields = about.rpartition(")")[2].split()
  return "" if state in "ZX" else fields[18]
