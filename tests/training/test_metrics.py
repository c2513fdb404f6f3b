"""What is written is read again, and a crash loses one line at most."""

import fcntl
import json
import math
import os
import struct
import sys
import termios
import time

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from moejax.training import metrics


def write(workdir, step, lines):
  writer = metrics.Writer(workdir, step)
  for at, loss in lines:
    writer.write(at, "train", {"loss": loss})
  writer.close()


def test_lines_come_back_but_for_those_that_are_written_again(tmp_path):
  """Those after the step of a run that goes on, and the test."""
  path = tmp_path / metrics.METRICS_FILE
  assert metrics.read(path) == []
  write(tmp_path, 0, [(1, 0.5), (2, 0.25), (3, 0.1)])
  for loss in (0.125, 0.0625):
    writer = metrics.Writer(tmp_path, 2)
    writer.write(3, "train", {"loss": loss})
    writer.write(2, "test", {"loss": 1.0})
    writer.close()
  assert metrics.read(path) == [
    {"step": 1, "split": "train", "loss": 0.5},
    {"step": 2, "split": "train", "loss": 0.25},
    {"step": 3, "split": "train", "loss": 0.0625},
    {"step": 2, "split": "test", "loss": 1.0},
  ]


def test_a_line_cut_short_is_left_out(tmp_path):
  write(tmp_path, 0, [(1, 0.5), (2, 0.25)])
  path = tmp_path / metrics.METRICS_FILE
  path.write_text(path.read_text()[:-8])
  assert [line["step"] for line in metrics.read(path)] == [1]
  write(tmp_path, 2, [(2, 0.125)])
  for line in path.read_text().splitlines():
    json.loads(line)


def test_progress_tells_time_left_off_a_terminal(capsys, monkeypatch):
  progress = metrics.Progress(0, 10)
  values = {
    "loss": 1.0,
    "words_per_second": 1234.5,
    "tflops_per_device": 0.00123,
  }
  for step, now in ((1, 100.0), (3, 120.0)):
    monkeypatch.setattr(time, "monotonic", lambda now=now: now)
    progress.advance(step)
    progress.report(step, values)
    progress.validated(step, {"perplexity": 2.71, "words": 30.0})
  progress.close()
  first, scored, second, _ = capsys.readouterr().out.splitlines()
  assert first == (
    "step 1/10  loss 1.000  1,234 words/s  0.00123 TFLOPS a device"
    "  time left unknown yet"
  )
  assert scored == "step 1: validation perplexity 2.71 per word (30 words)"
  # The first step, which compiles, is left out.
  assert second.endswith("TFLOPS a device  validation 2.7  01:10 left")


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
  reader, writer = os.openpty()
  size = struct.pack("HHHH", 24, 100, 0, 0)
  fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
  with os.fdopen(writer, "w") as terminal:
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = metrics.Progress(0, 10)
    progress.advance(4)
    progress.report(4, {"loss": 1.5, "words_per_second": 1234.5})
    progress.close()
  seen = b""
  # A pseudo-terminal passes on what it has got when it likes.
  while b"loss 1.500  1,234 words/s" not in seen:
    seen += os.read(reader, 10_000)
  os.close(reader)
  assert b"4/10 [" in seen


def test_speed_leaves_the_first_step_out():
  speed, seen = metrics.Speed(), []
  for now, words in ((10.0, 1e9), (12.0, 8.0), (14.0, 12.0), (15.0, 1e9)):
    if now == 15:
      speed.restart()
    speed.add(words, 100 * words, now)
    seen.append(speed.read())
  assert seen == [(0.0, 0.0), (4.0, 400.0), (6.0, 600.0), (0.0, 0.0)]
  # Several steps between readings.
  for now, words in ((17.0, 2.0), (20.0, 8.0)):
    speed.add(words, words, now)
  assert speed.read() == (2.0, 2.0)


DAMAGED = [
  b"\0" * 40,
  b'{"step": 2, "split": "tr\xc3',
  b'{"step": 2, "split": "train", "loss": 0.2',
  b'{"step": 2, "split": "train"}{"step": 3, "split": "train"}',
  b'[2, "train"]',
  b"",
  b'{"split": "train", "loss": 1}',
  b'{"step": 2, "loss": 1}',
  b'{"step": "2", "split": "train"}',
  b'{"step": true, "split": "train"}',
  b'{"step": 2, "split": 3}',
  b'{"step": 2, "split": "train", "loss": "low"}',
  b'{"step": 2, "split": "train", "loss": [1]}',
  b'{"step": -2, "split": "train"}',
  b'{"step": 2, "split": "train", "loss": 1' + b"0" * 400 + b"}",
  b'{"step": 1' + b"0" * 5000 + b"}",
  b"[" * 100_000,
]


def test_damage_is_of_its_line_alone(tmp_path, capsys):
  write(tmp_path, 0, [(1, 0.5), (3, 0.125)])
  path = tmp_path / metrics.METRICS_FILE
  first, last = path.read_bytes().splitlines()
  path.write_bytes(b"\n".join([first, *DAMAGED, last, b""]))
  assert [found["step"] for found in metrics.read(path)] == [1, 3]
  left_out = f"{path}: {len(DAMAGED)} damaged line(s) left out"
  assert f"{left_out}." in capsys.readouterr().err
  write(tmp_path, 3, [(4, 0.0625)])
  (aside,) = tmp_path.glob("damaged-*")
  assert aside.read_bytes() == b"".join(line + b"\n" for line in DAMAGED)
  assert f"{left_out}, and kept in {aside.name}." in capsys.readouterr().err
  assert [found["step"] for found in metrics.read(path)] == [1, 3, 4]
  # Now all is well, and stays so.
  write(tmp_path, 4, [])
  assert not capsys.readouterr().err


# -- loads --------------------------------------------------------------------


def write_loads(workdir, start, steps, size=3):
  """As a run that goes on at a step does, of two mixtures."""
  writer = metrics.Writer(workdir, start)
  for step in steps:
    counts = [(step * i) % 7 for i in range(size)]
    writer.write_loads(step, {"layers_1": counts, "a/b": counts[::-1]})
  writer.close()


def stride_of(step, most):
  """The least power of two of which fewer than `most` lie before a step."""
  stride = 1
  while step // stride >= most:
    stride *= 2
  return stride


@pytest.mark.parametrize("log_every", [1, 10, 7])
@pytest.mark.parametrize("stops", [(), (30, 29, 500, 130, 600, 590)])
def test_few_loads_are_kept_and_spread_evenly(
  tmp_path, monkeypatch, log_every, stops
):
  """Whenever it was stopped, and from wherever it went on."""
  monkeypatch.setattr(metrics, "_STEPS", 20)
  logged, begin = range(log_every, 1001, log_every), 0
  for end, again in zip(stops[::2], stops[1::2], strict=True):
    write_loads(tmp_path, begin, [s for s in logged if begin < s <= end])
    begin = again
  write_loads(tmp_path, begin, [s for s in logged if s > begin])
  stride, want = stride_of(logged[-1], 20), []
  for step in logged:
    if not want or step // stride > want[-1] // stride:
      want.append(step)
  found = metrics.loads(tmp_path)
  assert list(found) == ["layers_1", "a/b"] and 10 <= len(want) <= 20
  for steps, counts in found.values():
    np.testing.assert_array_equal(steps, want)
    assert counts.shape == (len(want), 3) and counts.dtype == int
  for step, first, last in zip(
    want, found["layers_1"][1], found["a/b"][1], strict=True
  ):
    assert first.tolist() == [0, step % 7, 2 * step % 7] == last.tolist()[::-1]


def test_loads_of_many_experts_are_fewer(tmp_path, monkeypatch):
  """As many as have so many numbers, but some in any case."""
  for numbers, most in ((600, 50), (12, 16)):
    monkeypatch.setattr(metrics, "_NUMBERS", numbers)
    workdir = tmp_path / str(numbers)
    workdir.mkdir()
    write_loads(workdir, 0, range(1, 1001), size=6)
    steps, _ = metrics.loads(workdir)["a/b"]
    assert most / 2 <= len(steps) <= most
    assert len(set(np.diff(steps).tolist()[1:])) == 1


def test_damaged_loads_are_set_aside(tmp_path, capsys):
  write_loads(tmp_path, 0, [1, 2])
  path = tmp_path / metrics.LOADS_FILE
  first, *others = path.read_bytes().splitlines()
  damaged = [
    b'{"step": 2, "layer": "a/b", "count": [1, 2',
    b'{"step": 2, "layer": "a/b"}',
    b'{"step": 2, "layer": "a/b", "count": []}',
    b'{"step": 2, "layer": "a/b", "count": 3}',
    b'{"step": 2, "layer": "a/b", "count": [1.5, 2, 3]}',
    b'{"step": 2, "layer": 1, "count": [1, 2, 3]}',
    b'{"layer": "a/b", "count": [1, 2, 3]}',
    b'{"step": 2, "split": "train", "loss": 1.0}',
  ]
  other = b'{"step": 2, "layer": "a/b", "count": [1, 2]}'
  path.write_bytes(b"\n".join([first, *damaged, *others, other, b'{"st']))
  found = metrics.loads(tmp_path)
  assert {layer: steps.tolist() for layer, (steps, _) in found.items()} == {
    "layers_1": [1, 2],
    "a/b": [1, 2],
  }
  assert f"{len(damaged)} damaged line(s) left out." in capsys.readouterr().err
  write_loads(tmp_path, 2, [3])
  (aside,) = tmp_path.glob(f"damaged-{metrics.LOADS_FILE}-*")
  assert aside.read_bytes().splitlines() == damaged
  assert metrics.loads(tmp_path)["layers_1"][0].tolist() == [1, 2, 3]


def test_without_mixtures_there_are_no_loads(tmp_path):
  assert metrics.loads(tmp_path) == {}
  write(tmp_path, 0, [(1, 0.5)])
  assert metrics.loads(tmp_path) == {}


def test_what_is_no_finite_number_comes_back_from_strict_json(tmp_path):
  values = {"a": math.inf, "b": -math.inf, "c": math.nan, "d": 1e308}
  writer = metrics.Writer(tmp_path, 0)
  writer.write(1, "train", values)
  writer.close()
  path = tmp_path / metrics.METRICS_FILE

  def refuse(name):
    pytest.fail(f"{name} is no JSON")

  json.loads(path.read_text(), parse_constant=refuse)
  (line,) = metrics.read(path)
  np.testing.assert_equal(line, {"step": 1, "split": "train", **values})
  # Older versions wrote numbers that are no JSON.
  path.write_text('{"step": 1, "split": "train", "perplexity": Infinity}\n')
  assert metrics.read(path)[0]["perplexity"] == math.inf
  within = {"test": {"perplexity": math.inf}, "signatures": {"bleu": "NaN?"}}
  written = json.loads(metrics.as_json(within), parse_constant=refuse)
  assert metrics.numbers(written) == within


def events(folder):
  """What TensorBoard reads, in its order."""
  for path in sorted(folder.iterdir()):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack("<Q", content[:8])
      yield event_pb2.Event.FromString(content[12 : 12 + length])
      content = content[16 + length :]


def test_tensorboard_loses_nothing_by_the_clock(tmp_path, monkeypatch):
  """A clock set back, and two starts within one second."""
  for step, now in ((0, 2e9), (2, 1e9), (3, 1e9), (3, 3e9)):
    monkeypatch.setattr(time, "time", lambda now=now: now)
    write(tmp_path, step, [(step + 1, 0.5), (step + 2, float(step))])
  points = {}
  for event in events(tmp_path / "tensorboard"):
    if event.session_log.status == event_pb2.SessionLog.START:
      points = {at: v for at, v in points.items() if at < event.step}
    for value in event.summary.value:
      assert value.tag == "train/loss"
      points[event.step] = value.simple_value
  assert points == {1: 0.5, 2: 0.0, 3: 0.5, 4: 0.5, 5: 3.0}
