"""Runs on tokens other than words: trained, measured, evaluated, sampled."""

import json
import math
import re
import shutil

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moejax.data import vocab
from moejax.main import main
from moejax.training import run

FLAGS = {
  "model.num_samples": 0,
  "train.steps": 2,
  "train.eval_every": 2,
  "data.min_count": 1,
}


@pytest.fixture(scope="module", params=["pieces", "file"])
def trained(request, small_flags, corpus, tmp_path_factory):
  """A workdir, the flags that it was made with, and its tokenizer's file."""
  folder = tmp_path_factory.mktemp(request.param)
  tokens = {"kind": "pieces", "vocab_size": 400}
  if request.param == "file":
    own = tokenizers.Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
      vocab_size=400,
      special_tokens=["<|endoftext|>"],
      initial_alphabet=alphabet,
      show_progress=False,
    )
    own.train([str(corpus)], trainer)
    own.save(str(folder / "given.json"))
    tokens = {"kind": "file", "path": str(folder / "given.json")}
  fields = FLAGS | {"data.tokens": tokens}
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  flags = [*small_flags, *flags, f"--workdir={folder / 'run'}"]
  assert main(["moejax", "train", *flags]) == 0
  return folder / "run", flags, folder / "given.json"


def test_the_numbers_are_of_the_text(trained):
  """Counted by hand, of the same loss: per token, per word, per byte."""
  workdir, _, _ = trained
  context = run.open_run(workdir)
  test = json.loads((workdir / "result.json").read_text())["test"]
  lines = list(context.data.pairs["test"][0].targets)
  own = context.data.vocabulary
  tokens = sum(len(own.encode(line)) + 1 for line in lines)
  words = sum(len(vocab.words(line)) + 1 for line in lines)
  size = sum(len(line.encode()) for line in lines)
  assert test["words"] == tokens > words
  nats = test["loss"] * tokens
  assert test["perplexity"] == pytest.approx(math.exp(nats / tokens))
  assert test["word_perplexity"] == pytest.approx(math.exp(nats / words))
  assert test["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
  logged = (workdir / "metrics.jsonl").read_text().splitlines()
  found = [json.loads(line) for line in logged if '"validation"' in line]
  assert found and all(line["bits_per_byte"] > 0 for line in found)


def test_a_run_keeps_its_tokenizer(trained, tmp_path, capsys):
  """It goes on, and is measured, without the file that it was given."""
  workdir, flags, given = trained
  if given.exists():
    content = (workdir / "tokenizer.json").read_bytes()
    assert content == given.read_bytes()
    given.unlink()
  own = shutil.copytree(workdir, tmp_path / "run")
  more = [*flags[:-1], f"--workdir={own}", "--config.train.steps=3"]
  assert main(["moejax", "train", *more]) == 0
  out = capsys.readouterr().out
  unit = run.recall(own).unit
  assert unit in ("token", "word piece")
  number = r"[\d.,]+"
  said = rf"perplexity {number} per {unit} \({number} {unit}s\),"
  said += rf" {number} per word, {number} bits per byte"
  assert re.search(f"validation {said}", out)
  assert re.search(f"test {said}, by the best", out)
  text = tmp_path / "a.txt"
  text.write_text("Les États-Unis, 漢字\n", encoding="utf-8")
  argv = ["moejax", "eval", f"--workdir={own}", f"--data={text}"]
  assert main(argv) == 0
  assert re.search(rf"^{said} \(checkpoint", capsys.readouterr().out)


def test_texts_are_written(trained, capsys):
  argv = ["moejax", "sample", f"--workdir={trained[0]}", "--length=12"]
  assert main([*argv, "--prompt=The é漢", "--num=2"]) == 0
  lines = capsys.readouterr().out
  assert lines.startswith("The é漢") and lines.count("The é漢") == 2
  assert main([*argv, "--prompt=The é", "--show_experts"]) == 0
  shown = capsys.readouterr().out.splitlines()
  assert any(line.startswith("▁") for line in shown)
  for line in shown[:-2]:
    assert re.fullmatch(r"\S+ +\d \(\d.\d\d\), .*", line), line
