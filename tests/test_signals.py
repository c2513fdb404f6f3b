"""Ctrl-C ends a process wherever it is, and training once it has saved."""

import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

from moejax import signals

ROOT = pathlib.Path(__file__).parents[1]


def start(code, *command):
  """Runs code that says "ready" on stdout; returns once it has."""
  whole = "import signal, time\nfrom moejax import signals, terminal\n"
  process = subprocess.Popen(
    [*command, sys.executable, "-c", whole + textwrap.dedent(code)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "ready\n"
  return process


def test_no_code_swallows_an_interruption():
  process = start("""
    signals.guard()
    terminal.say("ready")
    while True:
      try:
        time.sleep(600)
      except BaseException:
        pass
  """)
  process.send_signal(signal.SIGINT)
  output, error = process.communicate()
  assert process.returncode == 130
  assert (output, error) == ("", "moejax: interrupted\n")


TRAINING = """
  signals.guard()
  with signals.asked(terminal.say) as stopped:
    terminal.say("ready")
    # Says so by itself, long before the step ends that is at hand.
    while not stopped.number:
      time.sleep(0.001)
    terminal.say(f"asked by {stopped()}")
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_leaves_at_once(number):
  code = f"signals._AT_ONCE = 0\n{textwrap.dedent(TRAINING)}"
  process = start(code)
  process.send_signal(number)
  said = [process.stdout.readline() for _ in range(2)]
  assert sorted(said) == [
    f"asked by {int(number)}\n",
    "stopping after this step; Ctrl-C again leaves at once\n",
  ]
  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGHUP)
  process.send_signal(signal.SIGINT)
  assert process.communicate() == ("", "moejax: interrupted\n")
  assert process.returncode == 130


def test_what_comes_several_times_at_once_is_one_request():
  """As of the terminal, make and timeout, which each send it."""
  with signals.asked(lambda text: None) as stopped:
    assert stopped() == 0
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
      signal.raise_signal(number)
    assert stopped() == signal.SIGINT


def test_elsewhere_a_second_ctrl_c_is_an_interruption(monkeypatch):
  """Where moejax is no program but a part of one."""
  monkeypatch.setattr(signals, "_AT_ONCE", 0)
  said = []
  with (
    pytest.raises(KeyboardInterrupt),
    signals.asked(said.append) as stopped,
  ):
    signal.raise_signal(signal.SIGINT)
    # Not in the handler, which may have come in the midst of a print.
    assert not said
    assert stopped() == signal.SIGINT
    assert len(said) == 1
    signal.raise_signal(signal.SIGINT)


def test_what_comes_too_late_for_an_answer_is_not_lost():
  came = []
  before = signal.signal(signal.SIGTERM, lambda *about: came.append(about[0]))
  try:
    for read in (False, True):
      with signals.asked(lambda text: None) as stopped:
        assert stopped() == 0
        signal.raise_signal(signal.SIGTERM)
        assert not read or stopped()
    assert came == [signal.SIGTERM]
  finally:
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("nohup", [False, True])
def test_the_end_of_the_terminal_asks_too_but_under_nohup(nohup):
  before = signal.getsignal(signal.SIGHUP)
  try:
    if nohup:
      signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.asked(lambda text: None) as stopped:
      signal.raise_signal(signal.SIGHUP)
      assert stopped() == (0 if nohup else signal.SIGHUP)
  finally:
    signal.signal(signal.SIGHUP, before)
