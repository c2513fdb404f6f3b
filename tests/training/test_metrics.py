"""What is written is read again, and a crash loses one line at most."""

import fcntl
import json
import os
import re
import struct
import sys
import termios

from moejax.training import metrics


def write(workdir, step, lines):
  writer = metrics.Writer(workdir, step)
  for at, loss in lines:
    writer.write(at, "train", {"loss": loss})
  writer.close()


def test_lines_come_back(tmp_path):
  write(tmp_path, 0, [(1, 0.5), (2, 0.25)])
  assert metrics.read(tmp_path / metrics.METRICS_FILE) == [
    {"step": 1, "split": "train", "loss": 0.5},
    {"step": 2, "split": "train", "loss": 0.25},
  ]
  assert list((tmp_path / "tensorboard").iterdir())


def test_resuming_drops_the_lines_after_its_step(tmp_path):
  write(tmp_path, 0, [(1, 0.5), (2, 0.25), (3, 0.1)])
  write(tmp_path, 2, [(3, 0.125)])
  lines = metrics.read(tmp_path / metrics.METRICS_FILE)
  assert [(line["step"], line["loss"]) for line in lines] == [
    (1, 0.5),
    (2, 0.25),
    (3, 0.125),
  ]


def test_the_test_is_written_again(tmp_path):
  for _ in range(2):
    writer = metrics.Writer(tmp_path, 2)
    writer.write(2, "test", {"loss": 0.5})
    writer.close()
  assert len(metrics.read(tmp_path / metrics.METRICS_FILE)) == 1


def test_a_line_cut_short_is_left_out(tmp_path):
  write(tmp_path, 0, [(1, 0.5), (2, 0.25)])
  path = tmp_path / metrics.METRICS_FILE
  path.write_text(path.read_text()[:-8])
  assert [line["step"] for line in metrics.read(path)] == [1]
  write(tmp_path, 2, [(2, 0.125)])
  for line in path.read_text().splitlines():
    json.loads(line)


def test_no_file_is_no_metrics(tmp_path):
  assert metrics.read(tmp_path / "nothing") == []


def test_progress_tells_time_left_off_a_terminal(capsys):
  progress = metrics.Progress(0, 10)
  values = {"loss": 1.0, "words_per_second": 1234.5}
  progress.advance(1)
  progress.report(1, values)
  progress.validated(1, {"perplexity": 2.71, "words": 30.0})
  progress.advance(2)
  progress.report(2, values)
  progress.close()
  first, scored, second = capsys.readouterr().out.splitlines()
  assert "unknown" in first
  assert scored == "step 1: validation perplexity 2.71 per word (30 words)"
  assert re.search(
    r"step 2/10 .*1,234 words/s  validation 2\.7  \d+:\d+ left", second
  )


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
    seen = os.read(reader, 10_000).decode()
  os.close(reader)
  assert "4/10 [" in seen
  assert "loss 1.500  1,234 words/s" in seen


def test_speed_leaves_the_first_step_out():
  speed = metrics.Speed()
  assert speed.read() == 0
  speed.add(1e9)
  assert speed.read() == 0
  speed.add(10.0)
  assert 0 < speed.read() < 1e8
  speed.restart()
  speed.add(1e9)
  assert speed.read() == 0


def test_clock():
  assert metrics.clock(61.0) == "01:01"
