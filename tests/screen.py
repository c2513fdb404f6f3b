"""A terminal, as far as the programs here command one."""

import io
import re

# Cursor up to a line's begin, and home; to a line's end is cleared, all below,
# and everything; colors.
_COMMAND = re.compile(r"(\n)|\x1b\[([\d;]*)([FHKJm])")


class Screen(io.TextIOBase):
  """In place of stdout: somebody looks at it.

  Attributes:
    text: all that was written.
    lines: what is to be seen, without colors.
  """

  encoding = "utf-8"

  def __init__(self, encoding="utf-8"):
    super().__init__()
    self.encoding = encoding
    self.text, self.lines, self._row = "", [""], 0

  def isatty(self):
    return True

  def flush(self):
    pass

  def write(self, text):
    self.text += text
    begin, at = 0, 0
    for match in [*_COMMAND.finditer(text), None]:
      said = text[begin : match.start() if match else None]
      line = self.lines[self._row]
      self.lines[self._row] = line[:at] + said + line[at + len(said) :]
      at += len(said)
      if match is None:
        return
      begin = match.end()
      newline, number, command = match.groups()
      if newline:
        self._row, at = self._row + 1, 0
        self.lines += [""] * (self._row == len(self.lines))
      elif command == "F":
        self._row, at = self._row - int(number), 0
        assert self._row >= 0
      elif command == "H":
        self._row = at = 0
      elif command == "K":
        self.lines[self._row] = self.lines[self._row][:at]
      elif command == "J" and number == "2":
        self.lines = [""] * len(self.lines)
      elif command == "J":
        self.lines[self._row] = self.lines[self._row][:at]
        del self.lines[self._row + 1 :]
