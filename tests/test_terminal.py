"""What is printed can neither command the terminal nor fail, nor hold up."""

import fcntl
import io
import os
import pathlib
import subprocess
import sys

import pytest

from moejax import terminal

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("print_line", [terminal.say, terminal.warn])
@pytest.mark.parametrize(
  "encoding, text, shown",
  [
    (
      "latin-1",
      "été 世界\x1b[2J\x9b1m\u202eabc\r\tx\ny",
      "été \\u4e16\\u754c\\x1b[2J\\x9b1m\\u202eabc\\r\tx\ny\n",
    ),
    # As file names that are not UTF-8 are read.
    *(
      (encoding, "x\udcff\u2028", "x\\udcff\\u2028\n")
      for encoding in ("ascii", "cp437", "utf-8")
    ),
  ],
)
def test_text_of_users_is_escaped(
  monkeypatch, print_line, encoding, text, shown
):
  stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
  monkeypatch.setattr(sys, "stdout", stream)
  monkeypatch.setattr(sys, "stderr", stream)
  print_line(text)
  stream.seek(0)
  assert stream.read() == shown


def test_text_of_users_stays_one_line():
  assert terminal.one_line("a\nb\tc\u2028") == "a\\nb\\tc\u2028"
  shown = "x" * 1000 + "... (2,000,000 characters)"
  assert terminal.one_line("x" * 2_000_000) == shown


def test_without_a_stream_nothing_is_printed(monkeypatch):
  monkeypatch.setattr(sys, "stdout", None)
  terminal.say("nobody hears it")
  terminal.hand_over(b"nor this")
  monkeypatch.setattr(sys, "stderr", None)
  terminal.warn("nor that")
  assert not terminal.Live().isatty()


# -- readers ------------------------------------------------------------------


def start(code, **streams):
  """Runs code in a process that has standard streams of its own."""
  command = [sys.executable, "-c", "from moejax import terminal\n" + code]
  return subprocess.Popen(command, cwd=ROOT, **streams)


@pytest.fixture
def pipe():
  """The ends of a pipe that is soon full."""
  reader, writer = os.pipe()
  fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
  return reader, writer


def read(reader):
  with os.fdopen(reader) as content:
    return content.read()


def test_a_reader_that_stops_holds_nothing_up(pipe):
  """What it did not read waits for it; what warns does not wait behind it."""
  reader, writer = pipe
  code = (
    "for i in range(1000): terminal.say(f'line {i}')\nterminal.warn('went on')"
  )
  process = start(code, stdout=writer, stderr=subprocess.PIPE)
  os.close(writer)
  assert process.stderr.readline() == b"went on\n"
  assert process.poll() is None
  assert read(reader) == "".join(f"line {i}\n" for i in range(1000))
  assert process.wait() == 0
  process.stderr.close()


def test_a_bar_is_left_out_while_its_reader_is_late(pipe):
  """Nor does the end wait for it, where it must not."""
  reader, writer = pipe
  code = (
    "live = terminal.Live()\n"
    "for i in range(10_000): live.write('a bar that draws over itself\\r')\n"
    "terminal.warn('after')\nterminal.say('went on')\nterminal.stop_waiting()"
  )
  process = start(code, stdout=subprocess.PIPE, stderr=writer)
  assert process.communicate()[0] == b"went on\n"
  assert process.returncode == 0
  os.close(writer)
  assert len(read(reader)) < 10_000


def test_a_reader_that_ends_is_no_error(pipe):
  reader, writer = pipe
  os.close(reader)
  code = "terminal.say('line')\nterminal.hand_over(b'content')"
  process = start(code, stdout=writer, stderr=subprocess.PIPE)
  os.close(writer)
  assert process.communicate()[1] == b""
  assert process.returncode == 0


def test_a_stream_that_does_not_block_is_written_whole(pipe):
  """A shell or another program that shares it may have made it so."""
  reader, writer = pipe
  os.set_blocking(writer, False)
  process = start("terminal.hand_over(b'x' * 200_000)", stdout=writer)
  os.close(writer)
  assert len(read(reader)) == 200_000
  assert process.wait() == 0


# -- the command line ---------------------------------------------------------


@pytest.mark.parametrize(
  "line, status, out, error",
  [
    # A reader that has enough.
    ("$moejax --help | head -1", 0, "usage: moejax COMMAND [FLAGS]\n", ""),
    (
      "$moejax --help > /dev/full",
      1,
      "",
      "standard output could not be written (No space left",
    ),
    ("$moejax --help <&- >&- 2>&-", 0, "", ""),
    # Else a file of the run would get what libraries print.
    ("$python -c '$closed' >&-", 0, "", ""),
    ("$python -c '$closed' <&- >&- 2>&-", 0, "", ""),
  ],
)
def test_streams_of_a_shell(line, status, out, error):
  closed = (
    "import os; from moejax import terminal; terminal.occupy();"
    ' assert os.open("setup.py", os.O_RDONLY) > 2; terminal.say("unheard")'
  )
  line = line.replace("$moejax", "$python -m moejax")
  line = line.replace("$python", sys.executable).replace("$closed", closed)
  command = ["bash", "-c", f"set -o pipefail; {line}"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (status, out)
  assert error in done.stderr and bool(error) == bool(done.stderr)
