"""Where several processes meet before JAX connects them.

JAX waits for all in silence; where one does not come, or two have one id, it
aborts the others past all handlers of Python. So all first connect to the
address of process 0, say which they are, and hear for whom it waits.

A message is a line of JSON. Process 0 sends {"missing": [0]}, hears {"process":
id, "of": count, "host": name}, and sends who is missing time and again, at last
nobody, or {"refused": why}.
"""

import asyncio
import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from moejax import terminal

# Seconds after which a process gives up.
PATIENCE = 300.0
# Seconds between two lines about the processes that are missing.
WORD = 10.0
# Seconds between two messages, and after which one is missed.
_SIGN, _SILENCE = 0.5, 10.0
# The longest message, in bytes, and the most processes that are named.
_LONGEST, _NAMED = 100_000, 8


class _RefusedError(ConnectionError):
  """What no further attempt would change."""


def meet(
  address: str, number: int, count: int, say: Callable[[str], None]
) -> None:
  """Waits until all processes are there; ConnectionError where they are not.

  It says which did not come or do not fit each other, and what to do.

  Args:
    address: host:port of process 0.
    number: of this process.
    count: of all.
    say: is told, every few seconds, which processes are missing.
  """

  async def run() -> None:
    begun = time.monotonic()
    host = contextlib.nullcontext()
    if number == 0:
      host = _host(address, count, begun, say)
    async with host:
      # Process 0 too: it must find itself at the address.
      await _connect(address, number, count, begun, say)

  asyncio.run(run())


@contextlib.asynccontextmanager
async def _host(
  address: str, count: int, begun: float, say: Callable[[str], None]
) -> AsyncIterator[None]:
  """Answers all who connect to process 0; at the end all of them are told."""
  present: dict[int, str] = {}  # The machine of each process that is there.
  complete = False
  guests = set()

  async def attend(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
  ) -> None:
    nonlocal complete
    guests.add(asyncio.current_task())
    # Whoever sends something else is no process of ours.
    odd = OSError, ValueError, LookupError, TypeError
    with contextlib.suppress(*odd), contextlib.closing(writer):
      await _send(writer, {"missing": [0]})
      message = await _receive(reader)
      number, machine = message["process"], terminal.one_line(message["host"])
      refusal = ""
      if message["of"] != count:
        refusal = (
          f"process {number}, on {machine}, was started with --num_processes="
          f"{message['of']}, but process 0 with {count}; give all the same."
        )
      elif number in present:
        refusal = (
          f"two processes were started with --process_id={number}, on"
          f" {present[number]} and on {machine}; give each its own."
        )
      if refusal:
        say(f"a process was refused: {refusal}")
        await _send(writer, {"refused": refusal})
        return
      present[number] = machine
      try:
        while missing := [n for n in range(count) if n not in present]:
          # For good: some may be told, and have left, before others are told.
          if complete:
            break
          if time.monotonic() > begun + PATIENCE:
            who = f"{_named(missing)} of {count} did not come to {address}"
            await _send(writer, {"refused": _apart(who)})
            return
          await _send(writer, {"missing": missing})
          # It sends no more: what can be read is its end.
          with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(), _SIGN)
            raise ConnectionResetError
        complete = True
        await _send(writer, {"missing": []})
      except OSError:
        # It has left; started again, it may come again.
        del present[number]

  # Where JAX listens afterwards.
  bound = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
  name, port = _split(bound) if bound else ("", _split(address)[1])
  both = not name and socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both or ":" in name else socket.AF_INET
  try:
    listener = socket.create_server(
      (name, port), family=family, backlog=128, dualstack_ipv6=both
    )
  except OSError as error:
    why = os.strerror(error.errno) if error.errno else str(error)
    raise ConnectionError(
      f"process 0 cannot listen on port {port}, of --coordinator_address="
      f"{address} ({why}): another program does, or another process with"
      " --process_id=0; give each process its own id, and all of them a free"
      " port of the first one's machine."
    ) from None
  server = await asyncio.start_server(attend, sock=listener, limit=_LONGEST)
  try:
    yield
  finally:
    server.close()
    if guests:
      await asyncio.wait(guests, timeout=_SILENCE)


async def _connect(
  address: str,
  number: int,
  count: int,
  begun: float,
  say: Callable[[str], None],
) -> None:
  """Connects to process 0, again and again, and stays until all are there."""
  itself = "" if number else ", which is this one,"
  me = {"process": number, "of": count, "host": socket.gethostname()}
  said = begun

  def remind(text: str) -> None:
    nonlocal said
    if time.monotonic() > said + WORD:
      say(text)
      said = time.monotonic()

  while True:
    waits, missing = f"process 0{itself} does not answer at {address}", []
    try:
      link = await asyncio.to_thread(
        socket.create_connection, _split(address), _SILENCE
      )
      reader, writer = await asyncio.open_connection(sock=link, limit=_LONGEST)
      with contextlib.closing(writer):
        if link.getsockname() == link.getpeername():
          # A free port, by chance that of this very connection.
          raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody there")
        # It speaks first; of another program there may come no line.
        with contextlib.suppress(TimeoutError):
          missing = (await _receive(reader))["missing"]
        if not missing:
          raise ValueError("no greeting")
        await _send(writer, me)
        while missing := (await _receive(reader))["missing"]:
          waits = f"waiting for {_named(missing)} of {count} at {address}"
          remind(waits)
        return
    except _RefusedError:
      raise
    except (ValueError, LookupError):
      raise _RefusedError(
        f"what answers at --coordinator_address={address} does not wait for"
        " processes of a run: it is another program, or a run that has begun;"
        " give all a free port of the first one's machine."
      ) from None
    except OSError as error:
      waits = f"{waits} ({error.strerror or 'timed out'})"
    if time.monotonic() > begun + PATIENCE:
      raise ConnectionError(_apart(waits))
    remind(waits)
    await asyncio.sleep(_SIGN)


def _apart(why: str) -> str:
  return (
    f"the processes did not meet: {why}; start all of them within"
    f" {PATIENCE:.0f} seconds, each with its own --process_id, with one address"
    " that each can reach."
  )


def _named(numbers: Sequence[int]) -> str:
  more = len(numbers) - _NAMED
  named = ", ".join(map(str, numbers[:_NAMED]))
  several = "es" if len(numbers) > 1 else ""
  return f"process{several} {named}" + (f" and {more} more" if more > 0 else "")


def _split(address: str) -> tuple[str, int]:
  host, _, port = address.rpartition(":")
  return host.strip("[]"), int(port)


async def _send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
  writer.write(json.dumps(message).encode() + b"\n")
  await asyncio.wait_for(writer.drain(), _SILENCE)


async def _receive(reader: asyncio.StreamReader) -> dict[str, Any]:
  """Raises OSError where none comes, ValueError where it is none."""
  line = await asyncio.wait_for(reader.readline(), _SILENCE)
  if not line:
    raise ConnectionResetError(errno.ECONNRESET, "it ended")
  message = json.loads(line)
  if not isinstance(message, dict):
    raise ValueError("no message")
  if "refused" in message:
    raise _RefusedError(terminal.one_line(message["refused"]))
  return message
