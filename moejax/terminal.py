"""The terminal: the one place that prints.

What users wrote can neither command the terminal nor fail in its encoding. And
the program waits for no reader that stops, as a pager, or has ended.
"""

import atexit
import contextlib
import errno
import io
import os
import queue
import re
import select
import sys
import threading
from typing import Any

# Control characters, of terminals (C0 but tab and line feed, DEL, C1), of lines
# and of the direction of text.
_CONTROL = re.compile(
  "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e"
  "\u2066-\u2069]"
)
# The most that is shown of a text that users wrote, in characters.
_LONGEST = 1000
# Seconds that a line may wait for its reader before the program goes on.
_PATIENCE = 1.0
# What a stream says whose reader has ended.
_NO_READER = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET)


def printable(text: str, encoding: str | None = None) -> str:
  """Escapes what a terminal would obey or, in its encoding, cannot show."""
  text = _CONTROL.sub(lambda c: c[0].encode("unicode_escape").decode(), text)
  encoding = encoding or "utf-8"
  return text.encode(encoding, "backslashreplace").decode(encoding)


def brief(error: Exception) -> str:
  """Returns the kind of an error, and the first line of what it says."""
  first_line = (str(error).strip().splitlines() or [""])[0]
  return f"{type(error).__name__}: {first_line:.300}"


def one_line(text: object) -> str:
  """Makes a text that users wrote a part of one line, and cuts a long one."""
  text = str(text)
  if len(text) > _LONGEST:
    text = f"{text[:_LONGEST]}... ({len(text):,} characters)"
  return text.replace("\t", "\\t").replace("\n", "\\n")


def say(text: str, end: str = "\n") -> None:
  """Prints a line of what a command is asked for, or a part, on stdout."""
  _print(f"{text}{end}", sys.stdout)


def warn(text: str) -> None:
  """Prints a line about what happens meanwhile, or went wrong, on stderr."""
  _print(f"{text}\n", sys.stderr)


def draw(text: str) -> None:
  """Writes on stdout what may command a terminal; what users wrote must not."""
  encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
  _write(text.encode(encoding, "backslashreplace"), sys.stdout)


def colors() -> int:
  """Returns how many colors stdout shows: 2**24, 256, or 0.

  0 also where NO_COLOR is set (no-color.org), and of terminals that are dumb.
  """
  if os.environ.get("NO_COLOR") or not obeys():
    return 0
  many = os.environ.get("COLORTERM") in ("truecolor", "24bit")
  return 2**24 if many else 256


def color(name: str) -> tuple[int, int, int] | int:
  """Returns a color "#rrggbb" as stdout takes it, one of 256 by its number."""
  rgb = tuple(int(name[i : i + 2], 16) for i in (1, 3, 5))
  if colors() > 256:
    return rgb
  levels = (0, 95, 135, 175, 215, 255)
  red, green, blue = (
    min(range(6), key=lambda i, part=part: abs(levels[i] - part))
    for part in rgb
  )
  return 16 + 36 * red + 6 * green + blue


def on(text: str, ground: str) -> str:
  """Returns a text on a ground of a color "#rrggbb"."""
  found = color(ground)
  parts = (5, found) if isinstance(found, int) else (2, *found)
  code = ";".join(map(str, parts))
  return f"\x1b[48;{code}m{text}\x1b[0m"


def is_live() -> bool:
  """Returns whether somebody looks at stdout on a terminal."""
  return sys.stdout is not None and sys.stdout.isatty()


def obeys() -> bool:
  """Returns whether stdout is a terminal that colors, and moves its cursor."""
  return is_live() and os.environ.get("TERM", "dumb") != "dumb"


def shows(text: str) -> bool:
  """Returns whether stdout can show these letters."""
  return printable(text, getattr(sys.stdout, "encoding", None)) == text


def hand_over(content: bytes) -> None:
  """Writes what is for other programs as it is, but to a terminal as `say`."""
  if is_live():
    say(content.decode(errors="replace").removesuffix("\n"))
  else:
    _write(content, sys.stdout)


class Live:
  """stderr for a bar that draws over itself: left out if its reader is late."""

  def __init__(self):
    self._stream = sys.stderr
    self.encoding = getattr(self._stream, "encoding", None) or "utf-8"

  def isatty(self) -> bool:
    """Says whether there is a terminal that shows a bar."""
    return self._stream is not None and self._stream.isatty()

  def fileno(self) -> int:
    """Returns what is asked for the width."""
    return self._stream.fileno()

  def write(self, text: str) -> int:
    """Draws."""
    outlet = _outlet(self._stream)
    if not outlet or outlet.last.is_set():
      _write(text.encode(self.encoding, "backslashreplace"), self._stream)
    return len(text)

  def flush(self) -> None:
    """Does nothing: what is written is flushed."""


def bar(total: int | None, unit: str, what: str = "", **options: Any) -> Any:
  """Returns a bar that a terminal shows, and nothing else; none of 0.

  Of a total that is not known it counts. Options are those of tqdm.
  """
  import tqdm

  live = Live()
  shown = live.isatty() and total != 0
  return tqdm.tqdm(
    total=total,
    unit=unit,
    desc=what or None,
    file=live,
    disable=not shown,
    **options,
  )


def _print(text: str, stream: io.TextIOBase | None) -> None:
  encoding = getattr(stream, "encoding", None) or "utf-8"
  _write(printable(text, encoding).encode(encoding), stream)


def _write(content: bytes, stream: io.TextIOBase | None) -> None:
  # There is none where it was closed before the start.
  if stream is None or stream.closed:
    return
  if outlet := _outlet(stream):
    # What others printed comes first; a thread must not wait for their lock.
    if threading.current_thread() is threading.main_thread():
      with contextlib.suppress(OSError):
        stream.flush()
    outlet.write(content)
  else:
    stream.write(content.decode(stream.encoding or "utf-8", "replace"))
    stream.flush()


class _Outlet:
  """Writes to a file descriptor, in a thread of its own.

  Not to Python's stream, whose lock would be held by who waits.
  """

  def __init__(self, number: int):
    self.error: OSError | None = None
    # Set once all is written.
    self.last = threading.Event()
    self.last.set()
    self._number = number
    self._waiting = queue.SimpleQueue()  # of content and of an Event
    self._thread = threading.Thread()

  def write(self, content: bytes) -> None:
    """Writes; waits for that, but neither long nor where others wait."""
    late = not self.last.is_set()
    # The first time, or after a fork, which takes no threads along.
    if not self._thread.is_alive():
      self._thread = threading.Thread(target=self._write_all, daemon=True)
      self._thread.start()
    self.last = written = threading.Event()
    self._waiting.put((content, written))
    if not late:
      written.wait(_PATIENCE)

  def _write_all(self) -> None:
    while True:
      content, written = self._waiting.get()
      while content and self.error is None:
        try:
          content = content[os.write(self._number, content) :]
        except BlockingIOError:
          # Somebody who has the stream too wants it so.
          select.select([], [self._number], [])
        except OSError as error:
          self.error = error
      written.set()


_outlets: dict[io.TextIOBase, _Outlet] = {}


def _outlet(stream: io.TextIOBase | None) -> _Outlet | None:
  """Returns that of the process's own stdout or stderr; others have none."""
  if stream is None or stream not in (sys.__stdout__, sys.__stderr__):
    return None
  if stream not in _outlets:
    _outlets[stream] = _Outlet(stream.fileno())
  return _outlets[stream]


_readers_wanted = threading.Event()
_readers_wanted.set()


def stop_waiting() -> None:
  """Lets the end of the process no longer wait for readers."""
  _readers_wanted.clear()


def finish() -> None:
  """Waits until all is printed: as long as it takes, but see `stop_waiting`.

  OSError where stdout cannot be written, though somebody reads it: a full disk.
  """
  for outlet in _outlets.values():
    while not outlet.last.wait(_PATIENCE) and _readers_wanted.is_set():
      pass
  stdout = _outlets.get(sys.__stdout__)
  if stdout and stdout.error and stdout.error.errno not in _NO_READER:
    error, stdout.error = stdout.error, OSError(errno.EPIPE, "was told")
    raise OSError(
      f"standard output could not be written ({error.strerror}); what it lacks"
      " is lost."
    )


@atexit.register
def _finish() -> None:
  with contextlib.suppress(OSError, KeyboardInterrupt):
    finish()


def occupy() -> None:
  """Gives the null device to standard streams that are closed.

  Else the next file that is opened would get what libraries print.
  """
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
