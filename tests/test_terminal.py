"""What is printed can neither command the terminal nor fail in its encoding."""

import io
import sys

import pytest

from moejax import terminal


@pytest.mark.parametrize("print_line", [terminal.say, terminal.warn])
def test_text_of_users_is_escaped(monkeypatch, print_line):
  stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
  monkeypatch.setattr(sys, "stdout", stream)
  monkeypatch.setattr(sys, "stderr", stream)
  print_line("été 世界\x1b[2J\x9b1m\u202eabc\r\tx\ny")
  stream.seek(0)
  shown = "été \\u4e16\\u754c\\x1b[2J\\x9b1m\\u202eabc\\r\tx\ny\n"
  assert stream.read() == shown
