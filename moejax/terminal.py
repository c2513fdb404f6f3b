"""The terminal: the one place that prints, whatever users wrote."""

import io
import re
import sys

# Control characters, of terminals (C0 but tab and line feed, DEL, C1) and of
# the direction of text: shown as they are they would command the terminal, or
# show another text than there is.
_CONTROL = re.compile(
  "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def say(text: str) -> None:
  """Prints a line of what a command is asked for, on stdout."""
  _print(text, sys.stdout)


def warn(text: str) -> None:
  """Prints a line about what happens meanwhile, or went wrong, on stderr."""
  _print(text, sys.stderr)


def printable(text: str, encoding: str | None = None) -> str:
  """Escapes what a terminal would obey or, in its encoding, cannot show."""
  text = _CONTROL.sub(lambda c: c[0].encode("unicode_escape").decode(), text)
  encoding = encoding or "utf-8"
  return text.encode(encoding, "backslashreplace").decode(encoding)


def _print(text: str, stream: io.TextIOBase) -> None:
  print(printable(text, stream.encoding), file=stream, flush=True)
