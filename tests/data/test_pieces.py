"""Word pieces: text comes back, special pieces stay apart, training is one."""

import random
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moejax.data import pieces as pieces_lib
from moejax.data.pieces import Pieces

WORDS = ["the", "cat", "sat", "on", "mat", "then", "ran", "small", "house"]
RNG = random.Random(0)
TEXTS = [" ".join(RNG.choices(WORDS, k=8)) for _ in range(200)]


@pytest.fixture(scope="module")
def pieces():
  return Pieces.train(TEXTS, 300, ["fr", "de"])


# -- encoding -----------------------------------------------------------------


# Noncharacters stand in for what sentencepiece takes for its own.
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"])))
@example("▁▂▃▄▅▆▇█ ▁ ▁▁ \0<0x00>")
def test_text_comes_back(pieces, text):
  ids = pieces.encode(text)
  assert all(i > pieces.tag("de") for i in ids)
  assert pieces.decode(ids) == " ".join(filter(None, text.split(" ")))


def test_words_that_were_seen_are_few_pieces(pieces):
  assert len(pieces.encode("the cat sat")) <= 4
  assert len(pieces.encode("日")) == 4  # a space and three bytes


def test_special_pieces_are_no_text(pieces):
  special = [pieces.unknown, pieces.start, pieces.end]
  assert special == [0, 1, 2]
  special += [pieces.tag("fr"), pieces.tag("de")]
  assert len(set(special)) == 5
  text = "<s> </s> <unk> <2fr> <2de>"
  assert not set(pieces.encode(text)) & set(special)
  assert pieces.decode(pieces.encode(text)) == text
  ids = pieces.encode("the cat")
  assert pieces.decode([*special, *ids, *special]) == "the cat"


def test_many_texts_are_as_each_alone(pieces):
  texts = [*TEXTS[:20], "", "  "]
  assert pieces.encode_all(texts) == [pieces.encode(text) for text in texts]
  assert pieces.encode("") == pieces.encode("  ") == []


def test_a_language_that_was_not_trained(pieces):
  assert pieces.languages == ("fr", "de")
  with pytest.raises(ValueError, match="'es' was not trained; .*: fr, de"):
    pieces.tag("es")
  with pytest.raises(ValueError, match="'fr' was not trained; .*: none"):
    Pieces.train(TEXTS, 300).tag("fr")


def test_a_language_with_subtags():
  pieces = Pieces.train(TEXTS, 300, ["pt_BR", "zh_Hans"])
  assert pieces.languages == ("pt_BR", "zh_Hans")
  assert pieces.tag("pt_BR") == pieces.tag("pt-BR") != pieces.tag("zh-Hans")


# -- training -----------------------------------------------------------------


def test_training_is_quiet_and_always_the_same(pieces, capfd):
  again = Pieces.train(iter(TEXTS), 300, ["fr", "de"])
  other = Pieces.train(TEXTS[:50], 300, ["fr", "de"])
  assert len(again) == 300
  assert again.digest == pieces.digest != other.digest
  assert capfd.readouterr() == ("", "")


def test_of_many_texts_some_are_drawn_evenly(monkeypatch):
  monkeypatch.setattr(pieces_lib, "_SAMPLE", 50)
  texts = [*["abab"] * 500, *["cdcd"] * 500]
  pieces = Pieces.train(texts, 266)
  assert len(pieces.encode("abab")) < 4 and len(pieces.encode("cdcd")) < 4
  assert Pieces.train(iter(texts), 266).digest == pieces.digest


def test_what_is_not_used_is_told(monkeypatch, capsys):
  monkeypatch.setattr(pieces_lib, "_SAMPLE", 150)
  long = " ".join(TEXTS)
  pieces = Pieces.train([*TEXTS[:198], long, "  ", long], 300)
  assert len(pieces.encode("the cat")) <= 4
  assert capsys.readouterr().err == (
    "word pieces are learned from 150 of 200 sentences, and from the first"
    " 1,000 letters of 2 that are longer\n"
  )


# What sentencepiece logs of sentences with every letter, and of long ones.
EVERY_LETTER = """
import sentencepiece
from moejax.data.pieces import Pieces
train = sentencepiece.SentencePieceTrainer.train
sentencepiece.SentencePieceTrainer.train = (
  lambda **k: train(**k | dict(minloglevel=0))
)
letters = [chr(i) for i in range(0x3000)]
texts = [f"the cat {letter} {letter}" for letter in letters]
texts += ["<s> </s> <unk> <2fr> <0x41>", "\U0001d11e" * 2000, " x" * 2000]
print(len(texts))
Pieces.train(texts, 20_000, ["fr"])
"""


def test_no_sentence_is_left_out():
  done = subprocess.run(
    [sys.executable, "-c", EVERY_LETTER],
    capture_output=True,
    text=True,
    check=True,
  )
  count = done.stdout.strip()
  assert f"Loaded all {count} sentences" in done.stderr
  assert f"preprocessed {count} sentences" in done.stderr
  for fault in ("kipped", "eserved", "null character"):
    assert fault not in done.stderr


def test_progress_bars_are_learnt():
  bars = [f"{'▅' * i} {'▁' * (9 - i % 9)} {i}%" for i in range(1, 60)]
  pieces = Pieces.train(bars, 300)
  assert len(pieces.encode(bars[40])) < 15
  assert pieces.decode(pieces.encode(bars[40])) == bars[40]


@pytest.mark.parametrize(
  ("texts", "size", "message"),
  [
    (["▅", "\0"], 300, "300 word pieces|too little"),
    ([], 300, "word pieces are learned from text; got 0 sentences"),
    (["  ", ""], 300, "got 0 sentences"),
    (["abc abd"], 5000, "too little for 5,000 word pieces.* of 2[67]. or less"),
    (TEXTS, 100, "100 word pieces are too few.* vocab_size of 27. or more"),
  ],
)
def test_sizes_that_cannot_be(texts, size, message, capfd):
  with pytest.raises(ValueError, match=message) as caught:
    Pieces.train(texts, size)
  assert "\n" not in str(caught.value)
  assert capfd.readouterr() == ("", "")


def test_the_size_that_would_do_does():
  with pytest.raises(ValueError) as caught:
    Pieces.train(TEXTS, 5000)
  size = int(str(caught.value).split("vocab_size of ")[1].split()[0])
  assert len(Pieces.train(TEXTS, size)) == size


# -- files --------------------------------------------------------------------


def test_a_file_gives_the_pieces_back(pieces, tmp_path):
  path = tmp_path / Pieces.FILE
  pieces.save(path)
  assert [file.name for file in tmp_path.iterdir()] == ["pieces.model"]
  again = Pieces.load(path)
  assert again.digest == pieces.digest
  assert again.encode(TEXTS[0]) == pieces.encode(TEXTS[0])
  assert again.tag("de") == pieces.tag("de")


@pytest.mark.parametrize("content", [b"", b"</S>\n<S>\n<UNK>\nword\n"])
def test_a_file_that_is_no_model(tmp_path, content, capfd):
  path = tmp_path / "pieces.model"
  path.write_bytes(content)
  with pytest.raises(
    ValueError, match="pieces.model: this .*sentencepiece mod"
  ):
    Pieces.load(path)
  assert capfd.readouterr() == ("", "")
  with pytest.raises(FileNotFoundError):
    Pieces.load(tmp_path / "nowhere.model")
