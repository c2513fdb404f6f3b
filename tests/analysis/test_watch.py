"""Following a run: what is shown is what its files tell, until it ends."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import program
import pytest
from screen import Screen

from moejax import files
from moejax.analysis import watch
from moejax.main import main
from moejax.training import metrics

STEPS = 40
LOADS = {"layers_1": [0, 10, 30, 40], "blocks/layers_3/block_0": [7] * 64}
TEST = {"perplexity": 12.5, "words": 100.0, "bits_per_byte": 2.0}


class Run:
  """A run that writes when it is told to, and holds its lock."""

  def __init__(self, workdir):
    self.workdir, self.training = workdir, contextlib.ExitStack()
    workdir.mkdir()
    self.training.enter_context(files.locked(workdir / files.LOCK_FILE))

  def begin(self, step=0):
    config = json.dumps({"train": {"steps": STEPS}})
    (self.workdir / "config.json").write_text(config)
    self.writer = metrics.Writer(self.workdir, step)

  def log(self, *steps, loads=LOADS):
    for step in steps:
      line = {"loss": 9 - step / 10, "words_per_second": 50.0, "words": 100.0}
      self.writer.write(step, "train", line)
      self.writer.write_loads(step, loads)

  def validate(self, step, perplexity):
    values = {"perplexity": perplexity, "word_perplexity": perplexity}
    scores = {"words": 5.0, "bits_per_byte": 1.0}
    self.writer.write(step, "validation", values | scores)

  def end(self):
    test = TEST | {"word_perplexity": TEST["perplexity"]}
    result = {"test": test, "best_step": 20, "steps": STEPS, "seconds": 1.0}
    (self.workdir / "result.json").write_text(json.dumps(result))
    self.die()

  def die(self):
    self.training.close()


@pytest.fixture
def run(tmp_path):
  return Run(tmp_path / "run")


@pytest.fixture
def follow(run, monkeypatch):
  """follow(*actions): watches; between the looks the run does these."""

  def follow(*actions):
    left = iter(actions)
    monkeypatch.setattr(time, "sleep", lambda seconds: next(left)())
    watch.watch(run.workdir, 1.0)
    assert next(left, None) is None

  return follow


@pytest.fixture
def screen(monkeypatch):
  """screen(columns, rows, **environment): what stdout then is."""

  def screen(columns=80, rows=24, encoding="utf-8", **environment):
    shown = Screen(encoding)
    environment = {"TERM": "xterm-256color", "NO_COLOR": "1"} | environment
    environment |= {"COLUMNS": str(columns), "LINES": str(rows)}
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", shown)
    return shown

  return screen


def test_elsewhere_each_step_is_a_line(run, follow, capsys):
  """Of those before the first look the last one."""

  def at_once():
    run.log(15, 20)
    run.validate(20, 33.3)

  follow(
    lambda: run.begin(),
    lambda: run.log(5),
    lambda: run.log(10),
    lambda: None,
    at_once,
    lambda: run.log(40),
    run.end,
  )
  first, *lines, last = capsys.readouterr().out.splitlines()
  assert first.startswith(f"watching {run.workdir}; Ctrl-C ends this")
  # 100 words a step, of which a second has 50.
  assert lines == [
    "step 5/40  loss 8.500  50 words/s  01:10 left",
    "step 10/40  loss 8.000  50 words/s  01:00 left",
    "step 15/40  loss 7.500  50 words/s  00:40 left",
    "step 20/40  loss 7.000  50 words/s  00:40 left",
    "step 20/40  validation perplexity 33.30 per word (5 words), 1.000 bits per"
    " byte",
    "step 40/40  loss 5.000  50 words/s  00:00 left",
  ]
  assert last == (
    "ended: test perplexity 12.50 per word (100 words), 2.000 bits per byte, by"
    " the best checkpoint (step 20 of 40)"
  )


def test_a_run_that_was_there_before_is_followed_from_its_end(
  run, follow, capsys
):
  run.begin()
  run.log(*range(1, 11))

  def go_on():
    """It goes on from a checkpoint, and writes two lines again."""
    run.writer.close()
    run.begin(8)
    run.log(9)

  follow(go_on, lambda: run.log(10, 11), run.end)
  said = capsys.readouterr().out
  assert re.findall(r"^step (\d+)", said, re.MULTILINE) == [
    "10", *map(str, range(1, 10)), "10", "11"
  ]  # fmt: skip


def shades(counts, width, letters):
  """The strip of a mixture, one cell after the other."""
  strip, together, wide = "", 1, 1
  while len(counts) / together > width:
    together += 1
  while wide < 3 and (wide + 1) * len(counts) <= width:
    wide += 1
  for begin in range(0, len(counts), together):
    share = np.mean(counts[begin : begin + together]) / np.mean(counts)
    quarters = int(share / 0.25) if share > 0 else -1
    strip += wide * letters[min(quarters, 7) + 1]
  return strip


def view(shown):
  """The lines below the first one, without spaces at their ends."""
  lines = [line.rstrip() for line in shown.lines]
  return [line for line in lines if line and not line.startswith("watching")]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_on_a_terminal_one_view_is_drawn_in_its_place(
  run, follow, screen, encoding
):
  shown, seen = screen(100, encoding=encoding), []
  letters = "·▁▂▃▄▅▆▇█" if encoding == "utf-8" else "x.-:=+*#@"
  full, empty = "█░" if encoding == "utf-8" else "#-"

  def look(action):
    def then():
      seen.append(view(shown))
      action()

    return then

  def some():
    run.log(10)
    run.validate(10, 44.0)
    run.log(20, loads=LOADS | {"layers_1": [20, 20, 20, 20]})
    run.validate(20, 55.0)

  follow(look(run.begin), look(lambda: run.log(2)), look(some), look(run.end))
  assert seen[0] == seen[1]
  assert seen[0] == ["no step is logged yet: it reads its text, or compiles"]
  # So much is left beside names and numbers.
  strips = [shades(counts, 50, letters) for counts in LOADS.values()]
  assert [line.split() for line in seen[2][-2:]] == [
    ["layers_1", strips[0], "max/mean", "2.00", "1", "unused"],
    ["blocks/layers_3/block_0", strips[1], "max/mean", "1.00", "0", "unused"],
  ]
  *lines, _, even, _ = seen[3]
  assert lines == [
    f"step 20 of 40  {full * 10}{empty * 10}  00:40 left",
    "step 20: loss 7.000  50 words/s",
    "validation perplexity 55.00 per word at step 20; best 44.00 at step 10",
  ]
  assert even.split()[1] == 12 * letters[5]
  assert seen[3][3].startswith("load at step 20, up to 2 experts a cell: ")
  assert view(shown)[-1].startswith("ended: test perplexity 12.50")
  assert len(view(shown)) == len(seen[3]) + 1
  assert shown.text.isascii() == (encoding == "ascii")


@pytest.mark.parametrize("columns", [20, 40, 60, 90, 200])
@pytest.mark.parametrize("rows", [8, 30])
def test_a_view_fits_its_terminal(
  run, follow, screen, monkeypatch, columns, rows
):
  """Also one that is wider now; experts share cells if they must."""
  shown, seen = screen(columns, rows), []
  loads = {f"blocks/layers_{i}/mixture": list(range(300)) for i in range(20)}
  run.begin()
  run.log(3, loads=loads)
  run.validate(3, 5.0)
  run.log(4, loads=loads)

  def look():
    seen.append(view(shown))
    monkeypatch.setenv("COLUMNS", str(columns + 10))

  follow(look, look, run.end)
  for lines, width in zip(seen, (columns, columns + 10), strict=True):
    assert len(lines) == min(24, rows - 2)
    assert max(map(len, lines)) < width
    assert lines[0].startswith("step 4 of 40")
    assert lines[-1].startswith("and ") == (rows == 8)
  assert view(shown)[:-1] == seen[1]


@pytest.mark.parametrize(
  "environment, code",
  [
    ({"COLORTERM": "truecolor"}, "\x1b[48;2;"),
    ({"COLORTERM": ""}, "\x1b[48;5;"),
    ({"COLORTERM": "truecolor", "NO_COLOR": "1"}, ""),
    ({"TERM": "dumb"}, ""),
  ],
)
def test_loads_have_as_many_colors_as_there_are(
  run, follow, screen, environment, code
):
  shown = screen(**({"NO_COLOR": ""} | environment))
  run.begin()
  run.log(5)
  follow(lambda: run.log(6), run.end)
  assert ("\x1b[48" in shown.text) == bool(code) and code in shown.text
  # A dumb terminal gets views one after the other.
  assert ("\x1b" in shown.text) == (environment.get("TERM") != "dumb")
  if code == "\x1b[48;2;":
    # None, less and more than an even share, which is gray.
    found = re.findall(r"\x1b\[48;2;(\d+);(\d+);(\d+)m ", shown.text)
    grays = {(r, g, b) for r, g, b in found if r == g == b}
    assert len(grays) == 1 and len(set(found)) > 2
    assert "·" in shown.text


def test_a_run_that_stops_is_told_with_the_way_on(run, follow, capsys):
  run.begin()
  run.log(5, 10)
  with pytest.raises(
    ValueError, match="stopped at step 15 of 40 .* goes on fr"
  ):
    follow(lambda: run.log(15), run.die)
  argv = ["moejax", "watch", f"--workdir={run.workdir}"]
  assert main(argv) == 1
  assert "moejax: nobody trains the run in" in capsys.readouterr().err
  assert not (run.workdir / "traceback.txt").exists()


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_damaged_file_is_named(run, follow, name):
  run.begin()
  (run.workdir / name).write_text("{")
  with pytest.raises(ValueError, match=f"{name} is no JSON"):
    follow()
  (run.workdir / name).write_text("{}")
  with pytest.raises(ValueError, match=f"{name} is damaged"):
    follow()


def test_ctrl_c_ends_it_and_no_jax_is_loaded(environment, whole, run):
  """Before it ends, and where it has ended."""
  run.begin()
  run.log(5)
  argv = [sys.executable, "-m", "moejax", "watch", f"--workdir={run.workdir}"]
  process = subprocess.Popen(
    argv,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert "watching" in process.stdout.readline()
  assert process.stdout.readline().startswith("step 5/40")
  process.send_signal(signal.SIGINT)
  _, error = process.communicate(timeout=program.PATIENCE)
  assert process.returncode == 128 + signal.SIGINT
  assert error == "moejax: interrupted\n"
  code = (
    "import sys; from moejax.main import main; assert main(sys.argv) == 0;"
    " assert not {'jax', 'matplotlib'} & set(sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, "watch", f"--workdir={whole[0]}"],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  perplexity = program.result(whole[0])["test"]["perplexity"]
  assert f"ended: test perplexity {perplexity:,.2f} per word" in done.stdout
