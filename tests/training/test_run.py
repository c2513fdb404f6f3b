"""Runs that translate, from the command line: train, show, score, translate."""

import functools
import io
import re
import shutil
import sys
import types

import numpy as np
import program
import pytest

from moejax.data.pieces import Pieces
from moejax.main import main
from moejax.training import bleu, cost, metrics, run

pytestmark = pytest.mark.usefixtures("one_device")

COLORS = {
  "red": "rouge",
  "blue": "bleu",
  "green": "vert",
  "white": "blanc",
  "black": "noir",
}
THINGS = {"car": "auto", "house": "logis", "cup": "bol", "bird": "merle"}
FLAGS = [
  "--config=configs/translate_tiny.py",
  "--config.data.vocab_size=300",
  "--config.data.row_length=24",
  "--config.data.source_length=24",
  "--config.data.batch_size=16",
  "--config.model.width=32",
  "--config.model.dropout=0.0",
  "--config.model.attention.width=16",
  "--config.model.moe.num_experts=8",
  "--config.model.moe.experts.hidden=16",
  "--config.model.moe.group_size=48",
  "--config.optimizer.peak=0.02",
  "--config.optimizer.warmup_steps=20",
  "--config.train.steps=150",
  "--config.train.eval_every=75",
  "--config.train.checkpoint_every=50",
]


def pairs(count, turn=False):
  """Sentences whose adjectives change places."""
  rng = np.random.default_rng(0)
  for _ in range(count):
    colors, things = rng.choice(list(COLORS), 2), rng.choice(list(THINGS), 2)
    both = list(zip(colors, things, strict=True))
    english = " and ".join(f"the {c} {t}" for c, t in both)
    french = " et ".join(f"le {THINGS[t]} {COLORS[c]}" for c, t in both)
    yield (french, english) if turn else (english, french)


@pytest.fixture(scope="module")
def environment(environment):
  """So many steps are worth to be optimized."""
  return environment | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}


@pytest.fixture(scope="module")
def files(shared):
  def write(folder):
    lines = [f"{a}\t{b}" for a, b in pairs(600)]
    lines.insert(3, "no tab at all")
    (folder / "en_fr.tsv").write_text("\n".join(lines) + "\n")

  return shared("pairs", write)


@pytest.fixture(scope="module")
def flags(files):
  path, prepared = files / "en_fr.tsv", files / "tfds"
  own = [
    f"--config.data.train=en-fr={path}",
    f"--config.data.data_dir={prepared}",
  ]
  return [*FLAGS, *own]


@pytest.fixture(scope="module")
def trained(environment, flags, shared):
  """A run in a process of its own: its workdir and what it printed."""

  def train(folder):
    start = program.start(environment, flags, folder / "run")
    (output,) = program.end_well(start)
    (folder / "output.txt").write_text(output)

  folder = shared("translated", train)
  return folder / "run", (folder / "output.txt").read_text()


def translate(monkeypatch, capsys, workdir, text, *more):
  """What `moejax translate` writes, and its status."""
  content = text if isinstance(text, bytes) else text.encode()
  stdin = types.SimpleNamespace(buffer=io.BytesIO(content))
  monkeypatch.setattr(sys, "stdin", stdin)
  status = main(["moejax", "translate", f"--workdir={workdir}", *more])
  said = capsys.readouterr()
  return (said.out, said.err, status)


def test_a_run_learns_to_translate_and_shows_it(trained):
  workdir, output = trained
  assert "1 of 601 lines left out: line 4 without exactly one tab" in output
  shown = re.findall(r"  en: (.*)\n  fr: (.*)\n  model: (.*)\n", output)
  assert len(shown) == 6
  assert all(got.startswith("le ") for _, _, got in shown[3:])
  test = program.result(workdir)["test"]
  assert test["bleu"] > 50 and test["chrf"] > 50
  assert f"BLEU {test['bleu']:.2f}, chrF {test['chrf']:.2f}" in output
  assert "per word piece" in output
  signatures = program.result(workdir)["signatures"]
  assert "tok:13a" in signatures["bleu"] and "nc:6" in signatures["chrf"]
  assert "'fr'" in signatures["moses_bleu"] and test["moses_bleu"] > 50
  assert f"moses_bleu: {signatures['moses_bleu']}" in output
  found, want = (
    (workdir / f"translations/test.en-fr.{side}").read_text().splitlines()
    for side in ("translation", "reference")
  )
  assert bleu.scores(found, want).bleu == pytest.approx(test["bleu"])
  lines = metrics.read(workdir / metrics.METRICS_FILE)
  assert lines[-1]["split"] == "test" and lines[-1]["bleu"] == test["bleu"]
  assert {"cv_importance", "dropped_fraction"} <= set(lines[0])
  # Both sides of a batch count.
  built = run.open_run(workdir)
  about = built.session.experiment, len(built.data.vocabulary)
  of_target, of_source = cost.flops_per_word(*about, cost.count(*about))
  for line in lines[:-1]:
    if line.get("words_per_second"):
      # The run has one device.
      flops = 1e12 * line["tflops_per_device"] / line["words_per_second"]
      source = flops - of_target
      # A word of the source is about one of the target, as French is English.
      assert 0.3 < source / of_source < 3


def test_eval_scores_what_translate_writes(
  monkeypatch, capsys, trained, tmp_path
):
  sources, targets = zip(*pairs(40), strict=True)
  tsv = tmp_path / "held_out.tsv"
  lines = zip(sources, targets, strict=True)
  tsv.write_text("".join(f"{a}\t{b}\n" for a, b in lines))
  workdir = trained[0]
  assert main(["moejax", "eval", f"--workdir={workdir}", f"--data={tsv}"]) == 0
  said = capsys.readouterr().out
  text = "".join(f"{line}\n" for line in sources)
  found, _, _ = translate(monkeypatch, capsys, workdir, text)
  want = bleu.scores(found.splitlines(), targets, "fr")
  assert f"BLEU {want.bleu:.2f}, chrF {want.chrf:.2f}, BLEU of Moses" in said
  assert f"bleu: {want.bleu_signature}" in said


def test_lines_stay_where_they_are(monkeypatch, capsys, trained):
  sources = [a for a, _ in pairs(5)]
  long = " and ".join(sources)
  text = f"{sources[0]}\n\n  \n{long}\n{sources[1]}"
  run = functools.partial(translate, monkeypatch, capsys, trained[0])
  found, _, status = run(text)
  lines = found.split("\n")
  assert status == 0 and len(lines) == 6 and lines[5] == ""
  assert lines[1] == lines[2] == "" and lines[0] and lines[4]
  alone = [run(a, "--beam=1")[0].strip() for a in sources[:2]]
  greedy, _, _ = run(text, "--beam=1")
  # A translation depends on no other line.
  assert [greedy.split("\n")[0], greedy.split("\n")[4]] == alone
  assert alone[0] != alone[1]
  # Longer than a row: in parts, which all are there.
  assert len(lines[3].split()) > 20
  assert run("")[0] == ""


def test_what_it_refuses(monkeypatch, capsys, trained, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / "run")
  _, said, status = translate(monkeypatch, capsys, workdir, b"caf\xe9\n")
  assert status == 1 and "byte 4 of line 1 is 0xe9" in said
  marked = b"\xef\xbb\xbfcaf\xc3\xa9\n\xe9\n"
  _, said, status = translate(monkeypatch, capsys, workdir, marked)
  assert status == 1 and "byte 1 of line 2 is 0xe9" in said
  named = tmp_path / "other.tsv"
  named.write_text("a\tb\n")
  argv = ["moejax", "eval", f"--workdir={workdir}", f"--data=de-fr={named}"]
  assert main(argv) == 1
  assert "pairs of de-fr were not trained, only of en-fr" in (
    capsys.readouterr().err
  )
  texts = (text for pair in pairs(300, turn=True) for text in pair)
  Pieces.train([*texts, "an end"], 300).save(workdir / Pieces.FILE)
  _, said, status = translate(monkeypatch, capsys, workdir, "the red car")
  assert status == 1 and "is not the one that the run was trained with" in said


def test_two_ways_at_once(flags, monkeypatch, capsys, tmp_path):
  """By a small GNMT."""
  workdir = tmp_path / "both"
  both = ["--config.data.both_directions=True", "--config.data.temperature=2.0"]
  few = ["--config.train.steps=40", "--config.train.eval_every=40"]
  own = ["encoder=bidirectional_lstm,lstm,lstm", "decoder=lstm,lstm,lstm"]
  own += ["residual_from=3", "attention.wiring=every_layer"]
  own += ["attention.form=sum"]
  own = [f"--config.model.{each}" for each in own]
  argv = [*flags, *both, *few, *own, f"--workdir={workdir}"]
  assert main(["moejax", "train", *argv]) == 0
  output = "".join(capsys.readouterr())
  assert "  en: " in output and "  fr: " in output
  test = program.result(workdir)["test"]
  assert {"bleu_en-fr", "bleu_fr-en", "bleu"} <= set(test)
  each = [test[f"moses_bleu_{to}"] for to in ("en-fr", "fr-en")]
  assert test["moses_bleu"] == pytest.approx(sum(each) / 2)
  _, said, status = translate(monkeypatch, capsys, workdir, "the red car")
  assert status == 1 and "ask for one by --language: en, fr" in said
  _, said, status = translate(
    monkeypatch, capsys, workdir, "the red car", "--language=de"
  )
  assert status == 1 and "'de' was not trained; those that were: en, fr" in said
  found, _, status = translate(
    monkeypatch, capsys, workdir, "the red car", "--language=fr"
  )
  assert status == 0 and found.endswith("\n")


def test_a_language_model_cannot_translate(capsys):
  argv = ["moejax", "train", "--config=configs/tiny.py", "--workdir=unused"]
  assert main([*argv, "--config.data.kind=pairs"]) == 1
  said = capsys.readouterr().err
  assert (
    "config.model.kind is 'lstm_lm', but config.data.kind is 'pairs'" in said
  )
