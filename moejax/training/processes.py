"""Several processes that train one model: how they start, agree and end.

Every process runs the same program on its own devices and reads its own rows;
arrays are global. Only the first one talks and writes the small files of a run;
checkpoints are written by all.
"""

import atexit
import contextlib
import glob
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from moejax import bucket, files, sharding, terminal
from moejax.training import rendezvous

_Made = TypeVar("_Made")

# Seconds without a sign of life after which a process counts as dead, where no
# broken connection tells sooner.
_SILENCE = 30
# JAX aborts a process that has lost its coordinator, past all handlers of
# Python. Then this little program, beside it, prints the last line it was told.
_WATCH = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
  signal.signal(number, signal.SIG_IGN)
*_, last = ["", *sys.stdin]
if last.strip():
  print(last, end="", file=sys.stderr, flush=True)
"""
_WATCHERS: list[subprocess.Popen] = []
# The most that a process tells the others, in bytes.
_MESSAGE = 2000


def join(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Connects with the other processes; ConnectionError where they do not come.

  What is not given is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID; under SLURM and on a TPU pod JAX finds all three by itself.
  Without any of that there is one process; ValueError where some are missing,
  or do not fit each other. To be called before any other use of JAX.
  """
  given = {
    "coordinator_address": coordinator_address,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  for name, value in given.items():
    text = os.environ.get(f"JAX_{name.upper()}")
    if value is None and text is not None:
      try:
        given[name] = text if name == "coordinator_address" else int(text)
      except ValueError:
        raise ValueError(
          f"JAX_{name.upper()} is {text!r}; give a whole number."
        ) from None
  missing = [name for name, value in given.items() if value is None]
  slurm = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
  if len(missing) == len(given):
    given = {}
    on_tpu = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    if slurm == "1" and not on_tpu:
      return
  elif missing:
    raise ValueError(
      f"--{missing[0]} is missing: to train by several processes give all of"
      f" {', '.join('--' + name for name in given)} (or JAX_"
      f"{missing[0].upper()} and so on); give none to train by one."
    )
  else:
    address, count, number = given.values()
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
      raise ValueError(
        f"--coordinator_address is {address!r}; give the first process's host"
        " and a free port of it, as in localhost:12345."
      )
    if not 0 <= number < count:
      raise ValueError(
        f"--process_id={number}, but the {count} processes are numbered from 0"
        f" to {count - 1}."
      )
    rendezvous.meet(
      address, number, count, lambda text: terminal.warn(f"moejax: {text}")
    )

  # Under SLURM JAX gives every process one GPU of those that it sees: right
  # where the processes of a machine see the same, but not where SLURM made
  # devices a process's own. [] are all that it sees.
  nodes = os.environ.get("SLURM_STEP_NUM_NODES")
  own = slurm == nodes or "SLURM_GPUS_PER_TASK" in os.environ
  own = own and not os.environ.get("JAX_LOCAL_DEVICE_IDS")
  atexit.register(_dismiss)
  _last_word(
    f"the processes did not meet within {rendezvous.PATIENCE:.0f} seconds;"
    " start all of them within that time, with one address that each can reach."
  )
  try:
    jax.distributed.initialize(
      **given,
      local_device_ids=[] if own else None,
      initialization_timeout=int(rendezvous.PATIENCE),
      heartbeat_timeout_seconds=_SILENCE,
      shutdown_timeout_seconds=_SILENCE,
    )
  except ValueError:
    # A single TPU machine may know nothing of a cluster.
    if given or slurm != "1":
      raise
  if not several():
    _dismiss()
    return
  # JAX takes it for a notice that nobody here reads: until training listens
  # (`signals.asked`), SIGTERM shall end the process.
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  _last_word(
    f"process {jax.process_index()} of {jax.process_count()} was ended from"
    " outside or lost another one; start all of them again: they go on from the"
    " last checkpoint."
  )


def _last_word(text: str) -> None:
  """Tells the watcher what to print should JAX abort this process."""
  if not _WATCHERS:
    command = [sys.executable, "-c", _WATCH]
    _WATCHERS.append(subprocess.Popen(command, stdin=subprocess.PIPE))
  _WATCHERS[0].stdin.write(f"moejax: {text}\n".encode())
  _WATCHERS[0].stdin.flush()


def _dismiss() -> None:
  while _WATCHERS:
    # An empty last line: all is well.
    _WATCHERS.pop().communicate(b"\n")


def leave(status: int, alike: bool = False) -> NoReturn:
  """Ends this process at once; a closed connection tells the others.

  Not by sys.exit, at which JAX waits for them, and they may wait for this one.
  With `alike` it waits a little for others that fail, too: each finds a wrong
  config on its own, and the first one to leave would end the others, above all
  process 0, before they have said what is wrong.
  """
  if alike:
    # Imported late: only several processes need it.
    from orbax.checkpoint import multihost

    _dismiss()
    # Where the others work on, they notice that this one leaves.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      multihost.get_barrier_sync_fn()(key="moejax fails", timeout_ms=10_000)
      part()
  terminal.stop_waiting()
  with contextlib.suppress(OSError):
    terminal.finish()
  _dismiss()
  os._exit(status)


def part() -> None:
  """Waits until all processes are done; after it each may `leave`."""
  if several():
    jax.distributed.shutdown()


def several() -> bool:
  """Says whether there are other processes."""
  return jax.process_count() > 1


def first() -> bool:
  """Says whether this process is the one that talks and writes."""
  return jax.process_index() == 0


def _tell_all(text: str) -> list[str]:
  """Returns the text of each process, cut to `_MESSAGE` bytes."""
  if not several():
    return [text]
  code = text.encode(errors="backslashreplace")[:_MESSAGE]
  code = np.frombuffer(code.ljust(_MESSAGE, b"\0"), np.uint8)
  codes = multihost_utils.process_allgather(code)
  return [bytes(c).rstrip(b"\0").decode(errors="ignore") for c in codes]


def any_of_us(here: bool) -> bool:
  """Says whether it is so on any process; all must ask."""
  return any(_tell_all("so" if here else ""))


def check_same(text: str, what: str) -> None:
  """Raises ValueError on all processes where a text is not the same on all."""
  digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
  if len(set(_tell_all(digest))) > 1:
    raise ValueError(
      f"the {what} is not the same on all {jax.process_count()} processes;"
      " start them by the same command, but for --process_id."
    )


def first_does(action: Callable[[], None]) -> None:
  """Runs `action` on the first process; what it raises, all raise."""
  error, text = None, ""
  if first():
    try:
      action()
    except (OSError, ValueError) as caught:
      error, text = caught, str(caught) or type(caught).__name__
  text = _tell_all(text)[0]
  if error:
    raise error
  if text:
    raise ValueError(f"the first process said: {text}")


def first_then_others(make: Callable[[], _Made]) -> _Made:
  """Calls `make` on every process, but on the first before all others.

  What it leaves on a disk is then there already for those who share it.
  """
  made = []
  first_does(lambda: made.append(make()))
  return made[0] if first() else make()


def vote(here: int, mesh: jax.sharding.Mesh) -> jax.Array:
  """Makes a global array, an entry a device, of what each process has to say.

  A step that takes it along costs no exchange of its own.
  """
  like = votes(mesh)
  own = np.full(1, here, like.dtype)
  return jax.make_array_from_callback(like.shape, like.sharding, lambda _: own)


def votes(mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
  """Returns the shape, type and sharding of what `vote` makes."""
  one_a_device = sharding.device_sharding(mesh)
  return jax.ShapeDtypeStruct((mesh.size,), np.int32, sharding=one_a_device)


@contextlib.contextmanager
def ends_with_the_others(goes_on_from: Callable[[], str]) -> Iterator[None]:
  """Ends this process, at once, where another one is lost.

  Waiting for it, in whatever would be tidied up, could take forever. The
  message says what a new start `goes_on_from`.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not several():
      raise
    terminal.warn(
      f"moejax: process {jax.process_index()} of {jax.process_count()} lost"
      f" another one ({terminal.brief(error)}); start all of them again: they"
      f" go on from {goes_on_from()}.",
    )
    leave(1)


@contextlib.contextmanager
def alone_in(workdir: files.Path) -> Iterator[Callable[[], None]]:
  """Keeps a second training out of a workdir, where it gets BlockingIOError.

  A workdir that it makes is removed if nothing else comes to lie there. Yields
  a function that raises OSError where another trains there all the same, as can
  happen in a bucket (`bucket.alone`).
  """
  lock = workdir / files.LOCK_FILE
  if bucket.is_in(workdir):
    with bucket.alone(lock) as check:
      yield check
    return
  made = not workdir.exists()
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(files.locked(lock, wait=False))
    except BlockingIOError as error:
      raise BlockingIOError(
        f"another process trains in {workdir}; wait for it, or give another"
        " --workdir."
      ) from error
    except OSError as error:
      if error.errno not in files.NO_LOCKS:
        raise
      terminal.warn(
        f"{lock} cannot be locked on its file system ({error.strerror}): a"
        f" second run in {workdir} would not be kept out; start none."
      )
    try:
      yield lambda: None
    finally:
      with contextlib.suppress(OSError):
        if made and list(workdir.iterdir()) == [lock]:
          lock.unlink()
          workdir.rmdir()
