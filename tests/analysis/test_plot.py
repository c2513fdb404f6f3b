"""Training curves: what is drawn is what the run's lines tell."""

import json
import math

import matplotlib.image
import numpy as np
import pytest
from screen import Screen
from test_figures import faults

from moejax import terminal
from moejax.analysis import colors, plot, style
from moejax.main import main
from moejax.training import metrics

# Words of a word's tokens, where these are pieces.
PIECES = 1.5


def make_run(workdir, dense=False, pieces=1.0, pairs=False, steps=40, words=64):
  """A run of made-up numbers, which logs every 4 steps."""
  workdir.mkdir(parents=True)
  (workdir / "config.json").write_text(json.dumps({"train": {"steps": steps}}))
  writer = metrics.Writer(workdir, 0)
  for step in range(4, steps + 1, 4):
    loss = 2 + 6 / step
    line = {
      "sampled_loss": loss,
      "sampled_perplexity": math.exp(loss),
      "words": words + step % 3,
      "flops": 1e6 * (words + step % 3),
      "words_per_second": 0.0 if step % 20 == 4 else 10.0 * step,
      "grad_norm": 1 / step,
    }
    writer.write(step, "train", line if dense else line | {"cv_load": 0.5})
    if step % 20 == 0:
      loss = 3 + 10 / step
      scores = {"loss": loss, "perplexity": math.exp(loss)}
      if not pairs:
        scores["word_perplexity"] = math.exp(loss * pieces)
      writer.write(step, "validation", scores)
  if pairs:
    writer.write(steps, "test", {"bleu": 21.5})
  writer.close()
  return workdir


@pytest.fixture
def drawn(monkeypatch):
  """drawn(*workdirs, **options): the picture, and what lies in its lines."""
  caught = []
  monkeypatch.setattr(style, "save", lambda figure, path: caught.append(figure))

  def drawn(*workdirs, **options):
    plot.plot(workdirs, "picture.png", **options)
    (axes,) = caught[-1].axes
    found = [line.get_xydata() for line in axes.lines]
    found += [each.get_segments()[0] for each in axes.collections]
    return caught[-1], found

  return drawn


def read(workdir, split):
  lines = metrics.read(workdir / metrics.METRICS_FILE)
  return [line for line in lines if line["split"] == split]


@pytest.mark.parametrize("pieces", [1.0, PIECES])
def test_the_curves_are_those_of_the_metrics(tmp_path, drawn, pieces):
  """Perplexity is that of words, of training too."""
  workdir = make_run(tmp_path / "run", pieces=pieces)
  figure, (validation, train) = drawn(workdir)
  np.testing.assert_allclose(
    validation,
    [[v["step"], v["word_perplexity"]] for v in read(workdir, "validation")],
  )
  np.testing.assert_allclose(
    train,
    [
      [v["step"], math.exp(v["sampled_loss"] * pieces)]
      for v in read(workdir, "train")
    ],
  )
  assert figure.get_suptitle() == (
    "run: validation perplexity per word"
    f" {math.exp(3.25 * pieces):,.2f} at step 40"
  )
  said = [text.get_text() for text, _ in style.texts(figure)]
  assert {"validation", "train (sampled)", "steps"} <= set(said)
  assert faults(figure) == []


@pytest.mark.parametrize("along", ["words", "tokens", "flops", "hours"])
def test_what_curves_go_along(tmp_path, drawn, along):
  """A line stands for all the steps since the line before."""
  workdir = make_run(tmp_path / "run", pieces=PIECES)
  _, (train,) = drawn(workdir, along=along, metric="grad_norm")
  lines, total, want = read(workdir, "train"), 0.0, []
  speeds = [v["words_per_second"] for v in lines if v["words_per_second"]]
  for line in lines:
    each = line["flops"] if along == "flops" else line["words"]
    if along == "hours":
      each /= 3600 * (line["words_per_second"] or np.median(speeds))
    if along == "words":
      each /= PIECES
    total += 4 * each
    want.append(total)
  unit = 1e9 if along == "flops" else 1
  np.testing.assert_allclose(train[:, 0] * unit, want)
  np.testing.assert_allclose(train[:, 1], [1 / v["step"] for v in lines])


def test_runs_have_names_and_colors_of_their_own(tmp_path, drawn):
  runs = [
    make_run(tmp_path / name, dense)
    for name, dense in (
      ("a/x/run", False),
      ("b/x/run", True),
      ("$odd_1$\x1b[31m", False),
    )
  ]
  figure, _ = drawn(*runs, runs[0])
  (axes,) = figure.axes
  labels = {text.get_text(): text.get_color() for text in axes.texts}
  assert labels == {
    "a/x/run": colors.SPARSE,
    "b/x/run": colors.DENSE,
    r"\$odd_1\$\x1b[31m": colors.OTHERS[0],
  }
  assert figure.get_suptitle().startswith("Best validation perplexity per word")
  assert faults(figure) == []


def test_runs_of_pairs_have_bleu_and_the_perplexity_of_pieces(
  tmp_path, drawn, capsys
):
  pairs = make_run(tmp_path / "pairs", pairs=True)
  text = make_run(tmp_path / "text", pieces=PIECES)
  _, (point,) = drawn(pairs, text, metric="bleu")
  np.testing.assert_array_equal(point, [[40, 21.5]])
  said = capsys.readouterr()
  assert "text has no bleu; it is left out." in said.err
  assert "pairs: test bleu 21.50 at step 40" in said.out
  figure, (first, *_) = drawn(text, pairs)
  want = [[v["step"], v["perplexity"]] for v in read(text, "validation")]
  np.testing.assert_allclose(first, want)
  assert "per word" not in figure.get_suptitle()
  with pytest.raises(ValueError, match="of pairs do not tell words: .*--x=st"):
    drawn(pairs, along="words")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_pictures_are_files_of_their_kind(tmp_path, suffix, capsys):
  run, path = make_run(tmp_path / "run"), tmp_path / f"curves.{suffix}"
  argv = ["moejax", "plot", f"--workdir={run}", f"--out={path}"]
  assert main(argv) == 0
  assert f"wrote {path}: run: validation" in capsys.readouterr().out
  begin = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
  assert path.read_bytes().startswith(begin)
  if suffix == "png":
    assert matplotlib.image.imread(path).shape[:2] == (600, 1200)
    assert path.stat().st_size < 60_000


@pytest.mark.parametrize("kind", ["xterm-256color", "dumb"])
def test_a_terminal_shows_them_in_color(tmp_path, monkeypatch, kind):
  shown = Screen()
  monkeypatch.setattr("sys.stdout", shown)
  monkeypatch.setenv("TERM", kind)
  monkeypatch.delenv("COLORTERM", raising=False)
  monkeypatch.delenv("NO_COLOR", raising=False)
  plot.plot([make_run(tmp_path / "run")])
  blue = f"\x1b[38;5;{terminal.color(colors.SPARSE)}m"
  assert (blue in shown.text) == (kind != "dumb") == ("\x1b" in shown.text)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("columns", [40, 80, 130])
def test_it_is_as_wide_as_the_terminal(
  tmp_path, monkeypatch, columns, encoding
):
  shown = Screen(encoding)
  monkeypatch.setattr("sys.stdout", shown)
  monkeypatch.setenv("COLUMNS", str(columns))
  monkeypatch.setenv("LINES", "24")
  monkeypatch.setenv("TERM", "dumb")
  workdirs = [make_run(tmp_path / name) for name in ("one", "two")]
  plot.plot(workdirs)
  finding, _, *lines = shown.text.splitlines()
  assert finding.startswith("Best validation perplexity per word: one 25.79")
  assert max(len(line) for line in lines) <= columns
  assert len(lines) < 24
  legend = {line[-len("one, validation") :] for line in lines}
  assert {"one, validation", "two, validation"} <= legend
  assert shown.text.isascii() == (encoding == "ascii")


def test_what_is_refused(tmp_path, whole, capsys):
  run = make_run(tmp_path / "run")
  argv = ["moejax", "plot", f"--workdir={run}", "--metric=cvload"]
  assert main(argv) == 1
  said = capsys.readouterr().err
  assert "metric 'cvload'; the nearest is 'cv_load', there are cv_load" in said
  # Who only looks leaves nothing there.
  assert not (run / "traceback.txt").exists()
  path = run / metrics.METRICS_FILE
  path.write_text(path.read_text().replace("words", "others"))
  with pytest.raises(ValueError, match="of run do not tell flops|tell tokens"):
    plot.plot([run], along="tokens")
  path.unlink()
  with pytest.raises(ValueError, match="has logged no step yet"):
    plot.plot([run, whole[0]])
  with pytest.raises(FileNotFoundError, match="no run was made there"):
    plot.plot([tmp_path])
