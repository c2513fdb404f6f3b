"""Signals: they end a command at once, and training once it has saved.

Python runs handlers in the midst of whatever the main thread does: what they
print may meet a print, what they raise may be caught by who expects it least,
and while a program is compiled they wait. So they do nothing here. Python also
writes the number of each signal into a pipe, the moment it comes, and a thread
that reads there does what is to be done.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from moejax import terminal

# Ctrl-C, what `kill`, timeout and schedulers send, and the end of a terminal.
_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds in which two are one: the terminal, make and timeout may each send it.
_AT_ONCE = 0.3


class _Request:
  """A request to training to stop."""

  def __init__(self, say: Callable[[str], None]):
    self._say = say
    self._unsaid = ["stopping after this step; Ctrl-C again leaves at once"]
    self._since = 0.0
    self.number = 0
    self.read = False

  def take(self, number: int) -> bool:
    """Notes a signal; returns whether it is a second Ctrl-C."""
    now = time.monotonic()
    if self.number and now - self._since > _AT_ONCE:
      return number == signal.SIGINT
    # Of several at once Ctrl-C was the first: make and timeout pass it on.
    if not self.number or number == signal.SIGINT:
      self.number, self._since = int(number), now
    terminal.stop_waiting()
    return False

  def announce(self) -> None:
    """Says it, once, whichever thread comes first."""
    with contextlib.suppress(IndexError):
      self._say(self._unsaid.pop())

  def __call__(self) -> int:
    """Returns the number of the signal that came, or 0."""
    if self.number:
      self.read = True
      self.announce()
    return self.number


# Of the training that runs, if one does.
_requests: list[_Request] = []
_guarded = False


def guard() -> None:
  """Lets Ctrl-C end this process wherever it is, unless it trains.

  The status is 130. To be called once, as the first thing that a program does.
  """
  global _guarded
  _guarded = True
  reader, writer = os.pipe()

  def watch() -> None:
    while True:
      for number in os.read(reader, 1):
        request = _requests[-1] if _requests else None
        if not request or request.take(number):
          terminal.stop_waiting()
          terminal.warn("moejax: interrupted")
          # Not by an exception: who is called by C++ cannot pass it on.
          os._exit(128 + number)
        request.announce()

  os.set_blocking(writer, False)
  threading.Thread(target=watch, daemon=True).start()
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  signal.signal(signal.SIGINT, _handle)


def _handle(number: int, frame: object) -> None:
  del frame
  if not _guarded and _requests and _requests[-1].take(number):
    raise KeyboardInterrupt


@contextlib.contextmanager
def asked(say: Callable[[str], None]) -> Iterator[Callable[[], int]]:
  """Turns SIGTERM, SIGHUP and Ctrl-C into a question to ask between two steps.

  The answer is the number of the signal that came, or 0. What came too late
  for an answer ends the process afterwards. A second Ctrl-C ends it at once.
  `say` prints, in any thread.
  """
  request = _Request(say)
  # Python lets only the main thread set handlers; elsewhere nothing stops it.
  if threading.current_thread() is not threading.main_thread():
    yield request
    return
  before = {number: signal.getsignal(number) for number in _NUMBERS}
  if before[signal.SIGHUP] is signal.SIG_IGN:  # By nohup.
    del before[signal.SIGHUP]
  _requests.append(request)
  for number in before:
    signal.signal(number, _handle)
  try:
    yield request
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
    _requests.remove(request)
  if request.number and not request.read:
    signal.raise_signal(request.number)
