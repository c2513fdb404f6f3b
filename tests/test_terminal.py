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
def test_text_of_users_is_escaped(monkeypatch, print_line):
  stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
  monkeypatch.setattr(sys, "stdout", stream)
  monkeypatch.setattr(sys, "stderr", stream)
  print_line("été 世界\x1b[2J\x9b1m\u202eabc\r\tx\ny")
  stream.seek(0)
  shown = "été \\u4e16\\u754c\\x1b[2J\\x9b1m\\u202eabc\\r\tx\ny\n"
  assert stream.read() == shown


@pytest.mark.parametrize(
  "text, shown",
  [
    ("a\nb\tc\u2028", "a\\nb\\tc\u2028"),
    ("x" * 2_000_000, "x" * 1000 + "... (2,000,000 characters)"),
  ],
)
def test_text_of_users_stays_one_line(text, shown):
  assert terminal.one_line(text) == shown


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "utf-8"])
def test_nothing_fails_in_an_encoding(monkeypatch, encoding):
  stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
  monkeypatch.setattr(sys, "stdout", stream)
  # As file names that are not UTF-8 are read.
  terminal.say(b"x\xff".decode("utf-8", "surrogateescape") + "世\u2028█")
  stream.seek(0)
  assert stream.read().startswith("x\\udcff")


def test_without_a_stream_nothing_is_printed(monkeypatch):
  monkeypatch.setattr(sys, "stdout", None)
  terminal.say("nobody hears it")
  terminal.hand_over(b"nor this")
  monkeypatch.setattr(sys, "stderr", None)
  terminal.warn("nor that")
  assert not terminal.Live().isatty()


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
  reader, writer = pipe
  code = (
    "live = terminal.Live()\n"
    "for i in range(10_000): live.write('a bar that draws over itself\\r')\n"
    "terminal.say('went on')"
  )
  process = start(code, stdout=subprocess.PIPE, stderr=writer)
  os.close(writer)
  assert process.stdout.readline() == b"went on\n"
  assert len(read(reader)) < 10_000
  assert process.wait() == 0
  process.stdout.close()


def test_the_end_waits_for_no_reader_where_it_must_not(pipe):
  reader, writer = pipe
  code = (
    "for i in range(1000): terminal.say(f'line {i}')\nterminal.stop_waiting()"
  )
  assert start(code, stdout=writer).wait() == 0
  for end in (reader, writer):
    os.close(end)


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


def command_line(shell):
  """Runs `moejax`, $moejax, in a line of the shell."""
  environment = os.environ | {"moejax": f"{sys.executable} -m moejax"}
  command = ["bash", "-c", f"set -o pipefail; {shell}"]
  return subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True
  )


def test_help_ends_quietly_before_a_reader_that_has_enough():
  done = command_line("$moejax --help | head -1")
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == "usage: moejax COMMAND [FLAGS]\n"


def test_a_full_disk_is_told():
  done = command_line("$moejax --help > /dev/full")
  assert done.returncode == 1
  assert "standard output could not be written (No space left" in done.stderr


def test_streams_that_are_closed_are_no_files_of_ours():
  """Else a file of the run would get what libraries print."""
  code = (
    "import os, sys; from moejax import terminal; terminal.occupy();"
    "assert os.open('setup.py', os.O_RDONLY) > 2; terminal.say('unheard')"
  )
  shell = f'{sys.executable} -c "{code}"'
  assert command_line(f"{shell} >&-").returncode == 0
  assert command_line(f"{shell} <&- >&- 2>&-").returncode == 0
  assert command_line("$moejax --help <&- >&- 2>&-").returncode == 0
