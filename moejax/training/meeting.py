"""Where several processes meet before JAX connects them.

JAX waits for all in silence; where one does not come, or two have one id, it
aborts the others past all handlers of Python. So they meet here first: all come
to the address of process 0, say which they are, and hear whom they wait for.

A message is a line of JSON. Process 0 sends _GREETING, hears {"process": id,
"of": count, "host": name}, and then sends {"missing": ids} time and again. The
last it sends is {"all": true}, or {"refused": why}.
"""

import contextlib
import errno
import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moejax import terminal

# Seconds after which a process gives up.
PATIENCE = 300.0
# Seconds between two words about whom it waits for.
WORD = 10.0
# Seconds between two messages, and after which one is missed.
_SIGN, _SILENCE = 0.5, 10.0
_GREETING = {"moejax": "meeting"}
# The longest message, in bytes, and the most processes that are named.
_LONGEST, _NAMED = 100_000, 8


def meet(
  address: str, number: int, count: int, say: Callable[[str], None]
) -> None:
  """Waits until all processes have come.

  Args:
    address: host:port of process 0.
    number: of this process.
    count: of all.
    say: is told, every few seconds, whom this one waits for.

  Raises:
    ConnectionError: they did not come, or do not fit each other, or the address
      is another program's; says which, and what to do.
  """
  deadline = time.monotonic() + PATIENCE
  with contextlib.ExitStack() as stack:
    if number == 0:
      stack.enter_context(_Host(address, count, deadline, say).listening())
    # Process 0 too: it must find itself at the address.
    _come(address, number, count, deadline, say)


class _Host:
  """Process 0, as those see it who come."""

  def __init__(
    self,
    address: str,
    count: int,
    deadline: float,
    say: Callable[[str], None],
  ):
    self._address, self._count, self._deadline = address, count, deadline
    self._say = say
    self._lock = threading.Lock()
    # Of those who are here: id -> name of its machine.
    self._here: dict[int, str] = {}
    self._complete = False
    self._ended = threading.Event()

  @contextlib.contextmanager
  def listening(self) -> Iterator[None]:
    """Attends to all who come, until it ends; then all are told."""
    guests: list[threading.Thread] = []

    def accept() -> None:
      # Until the listener is shut down.
      with contextlib.suppress(OSError):
        while True:
          guest, _ = listener.accept()
          attend = threading.Thread(
            target=self._attend, args=(guest,), daemon=True
          )
          attend.start()
          guests.append(attend)

    with self._listener() as listener:
      accepting = threading.Thread(target=accept, daemon=True)
      accepting.start()
      try:
        yield
      finally:
        self._ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()
        for attend in guests:
          attend.join(_SILENCE)

  def _listener(self) -> socket.socket:
    # Where JAX listens afterwards.
    bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    host, port = _split(bound) if bound else ("", _split(self._address)[1])
    both = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
    try:
      return socket.create_server(
        (host, port), family=family, backlog=128, dualstack_ipv6=both
      )
    except OSError as error:
      why = os.strerror(error.errno) if error.errno else str(error)
      raise ConnectionError(
        f"process 0 cannot listen on port {port}, of --coordinator_address="
        f"{self._address} ({why}): another program does, or another"
        " process with --process_id=0; give each process its own id, and all"
        " of them a free port of the first one's machine."
      ) from None

  def _attend(self, guest: socket.socket) -> None:
    """Tells one that has come whom all wait for, until that is nobody."""
    odd = OSError, ValueError, LookupError, TypeError
    guest.settimeout(_SILENCE)
    with (
      guest,
      contextlib.suppress(*odd),
      guest.makefile("rwb") as stream,
    ):
      _send(stream, _GREETING)
      message = _receive(stream)
      number, count, machine = (message[n] for n in ("process", "of", "host"))
      refusal = self._admit(number, count, terminal.one_line(machine))
      if refusal:
        self._say(f"a process was sent away: {refusal}")
        _send(stream, {"refused": refusal})
        return
      try:
        while missing := self._missing():
          if time.monotonic() > self._deadline:
            who = f"{_named(missing)} of {self._count}"
            apart = _apart(f"{who} did not come to {self._address}")
            _send(stream, {"refused": apart})
            return
          if self._ended.is_set():
            return
          _send(stream, {"missing": missing})
          self._ended.wait(_SIGN)
        _send(stream, {"all": True})
      except OSError:
        # It has left; started again, it may come again.
        with self._lock:
          del self._here[number]

  def _admit(self, number: int, count: int, machine: str) -> str:
    """Notes who has come; returns why it cannot stay, or nothing."""
    if count != self._count:
      return (
        f"process {number}, on {machine}, was started with --num_processes="
        f"{count}, but process 0 with {self._count}; give all the same."
      )
    with self._lock:
      if number in self._here:
        return (
          f"two processes were started with --process_id={number}, on"
          f" {self._here[number]} and on {machine}; give each its own."
        )
      self._here[number] = machine
    return ""

  def _missing(self) -> list[int]:
    with self._lock:
      missing = [n for n in range(self._count) if n not in self._here]
      # For good: some may be told, and gone, before others are.
      self._complete |= not missing
      return [] if self._complete else missing


def _come(
  address: str,
  number: int,
  count: int,
  deadline: float,
  say: Callable[[str], None],
) -> None:
  """Comes to process 0, again and again, and stays until all are there."""
  me = {"process": number, "of": count, "host": socket.gethostname()}
  word = time.monotonic() + WORD
  while True:
    itself = "" if number else ", which is this one,"
    waits = f"process 0{itself} does not answer at {address}"
    try:
      with (
        socket.create_connection(_split(address), _SILENCE) as host,
        host.makefile("rwb") as stream,
      ):
        if host.getsockname() == host.getpeername():
          # A free port, by chance that of this very connection.
          raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody there")
        _greeted(stream, address)
        _send(stream, me)
        while True:
          message = _receive(stream)
          if message.get("all"):
            return
          if "refused" in message:
            raise _Refused(terminal.one_line(message["refused"]))
          missing = message["missing"]
          waits = f"waiting for {_named(missing)} of {count} at {address}"
          if time.monotonic() > word:
            say(waits)
            word = time.monotonic() + WORD
    except _Refused:
      raise
    except (OSError, ValueError, LookupError) as error:
      why = f"{waits} ({getattr(error, 'strerror', None) or error})"
    if time.monotonic() > deadline:
      raise ConnectionError(_apart(why))
    if time.monotonic() > word:
      say(why)
      word = time.monotonic() + WORD
    time.sleep(_SIGN)


class _Refused(ConnectionError):
  """What no further attempt would change."""


def _greeted(stream: io.BufferedIOBase, address: str) -> None:
  """Refuses who is no moejax that waits for others."""
  with contextlib.suppress(TimeoutError, ValueError):
    if _receive(stream) == _GREETING:
      return
  raise _Refused(
    f"what answers at --coordinator_address={address} does not wait for"
    " processes of a run: it is another program, or a run that has begun; give"
    " all a free port of the first one's machine."
  )


def _apart(why: str) -> str:
  return (
    f"the processes did not meet: {why}; start all of them within"
    f" {PATIENCE:.0f} seconds, each with its own --process_id, with one address"
    " that each can reach."
  )


def _named(numbers: Sequence[int]) -> str:
  if len(numbers) == 1:
    return f"process {numbers[0]}"
  named = ", ".join(str(number) for number in numbers[:_NAMED])
  more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
  return f"processes {named}{more}"


def _split(address: str) -> tuple[str, int]:
  host, _, port = address.rpartition(":")
  return host.strip("[]"), int(port)


def _send(stream: io.BufferedIOBase, message: dict[str, Any]) -> None:
  stream.write(json.dumps(message).encode() + b"\n")
  stream.flush()


def _receive(stream: io.BufferedIOBase) -> dict[str, Any]:
  """Raises OSError or ValueError where none comes."""
  line = stream.readline(_LONGEST)
  if not line:
    raise ConnectionResetError(errno.ECONNRESET, "it went away")
  message = json.loads(line)
  if not isinstance(message, dict):
    raise ValueError("no message")
  return message
