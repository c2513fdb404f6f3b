"""Word pieces: text comes back, special pieces stay apart, training is one."""

import random

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from moejax.data import pieces as pieces_lib
from moejax.data.pieces import Pieces

WORDS = ["the", "cat", "sat", "on", "mat", "then", "ran", "small", "house"]
RNG = random.Random(0)
TEXTS = [" ".join(RNG.choices(WORDS, k=8)) for _ in range(200)]


@pytest.fixture(scope="module")
def pieces():
  return Pieces.train(TEXTS, 300, ["fr", "pt_BR"])


# -- encoding -----------------------------------------------------------------


# Noncharacters stand in for what sentencepiece takes for its own.
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"])))
@example("▁▂▃▄▅▆▇█ ▁ ▁▁ \0<0x00>")
@example("<s> </s> <unk> <2fr> <2pt_BR>")
def test_text_comes_back(pieces, text):
  ids = pieces.encode(text)
  assert all(i > pieces.tag("pt_BR") for i in ids)
  assert pieces.decode(ids) == " ".join(filter(None, text.split(" ")))
  assert pieces.encode_all([text, "the"]) == [ids, pieces.encode("the")]


def test_special_pieces_are_no_text(pieces):
  special = [pieces.unknown, pieces.start, pieces.end]
  special += [pieces.tag("fr"), pieces.tag("pt_BR")]
  assert special == [0, 1, 2, 3, 4]
  ids = pieces.encode("the cat")
  assert len(ids) <= 3
  assert pieces.decode([*special, *ids, *special]) == "the cat"


def test_languages_that_were_trained(pieces):
  assert pieces.languages == ("fr", "pt_BR")
  assert pieces.tag("pt_BR") == pieces.tag("pt-BR") != pieces.tag("fr")
  with pytest.raises(ValueError, match="'es' was not trained; .*: fr, pt_BR"):
    pieces.tag("es")
  with pytest.raises(ValueError, match="'fr' was not trained; .*: none"):
    Pieces.train(TEXTS, 300).tag("fr")


# -- training -----------------------------------------------------------------


def test_training_is_quiet_and_always_the_same(pieces, capfd):
  again = Pieces.train(iter(TEXTS), 300, ["fr", "pt_BR"])
  other = Pieces.train(TEXTS[:50], 300, ["fr", "pt_BR"])
  assert len(again) == 300
  assert again.digest == pieces.digest != other.digest
  assert capfd.readouterr() == ("", "")


def test_of_many_texts_some_are_drawn_evenly(monkeypatch, capsys):
  monkeypatch.setattr(pieces_lib, "_SAMPLE", 50)
  long = "abab " * 300
  texts = [*["abab"] * 498, long, "  ", long, *["cdcd"] * 500]
  pieces = Pieces.train(texts, 266)
  assert len(pieces.encode("abab")) < 4 and len(pieces.encode("cdcd")) < 4
  assert Pieces.train(iter(texts), 266).digest == pieces.digest
  assert capsys.readouterr().err.splitlines()[1:] == [
    "word pieces are learned from 50 of 1,000 sentences, and from the first"
    " 1,000 letters of 2 that are longer"
  ]


def test_no_sentence_is_left_out(monkeypatch, capfd):
  """Neither those with letters that sentencepiece reserves, nor long ones."""
  train = sentencepiece.SentencePieceTrainer.train
  monkeypatch.setattr(
    sentencepiece.SentencePieceTrainer,
    "train",
    lambda **fields: train(**fields | {"minloglevel": 0}),
  )
  texts = [f"the cat {chr(i)} {chr(i)}" for i in range(0x3000)]
  texts += ["<s> </s> <unk> <2fr> <0x41>", "\U0001d11e" * 2000, " x" * 2000]
  texts += [f"{'▅' * i} {'▁' * (9 - i % 9)} {i}%" for i in range(1, 60)]
  pieces = Pieces.train(texts, 13_000, ["fr"])
  said = capfd.readouterr().err
  assert f"Loaded all {len(texts)} sentences" in said
  assert f"preprocessed {len(texts)} sentences" in said
  for fault in ("kipped", "eserved", "null character"):
    assert fault not in said
  # Progress bars are learned.
  assert len(pieces.encode(texts[-20])) < 15


@pytest.mark.parametrize(
  ("texts", "size", "message"),
  [
    ([], 300, "word pieces are learned from text; got 0 sentences"),
    (["  ", ""], 300, "got 0 sentences"),
    (["abc abd"], 5000, "size=5000 word pieces: .* little; .* 2[67]. or less"),
    (TEXTS, 100, "size=100 word pieces: .* many letters; give 27. or more"),
  ],
)
def test_sizes_that_cannot_be(texts, size, message, capfd):
  with pytest.raises(ValueError, match=message) as caught:
    Pieces.train(texts, size)
  said = str(caught.value)
  assert "\n" not in said
  assert capfd.readouterr() == ("", "")
  if "give" in said:
    # The size that would do does.
    would = int(said.split(" or ")[-2].split()[-1])
    assert len(Pieces.train(texts, would)) == would


# -- files --------------------------------------------------------------------


def test_a_file_gives_the_pieces_back(pieces, tmp_path):
  path = tmp_path / Pieces.FILE
  pieces.save(path)
  assert [file.name for file in tmp_path.iterdir()] == ["pieces.model"]
  again = Pieces.load(path)
  assert again.digest == pieces.digest
  assert again.encode(TEXTS[0]) == pieces.encode(TEXTS[0])
  assert again.tag("fr") == pieces.tag("fr")


@pytest.mark.parametrize("content", [b"", b"</S>\n<S>\n<UNK>\nword\n"])
def test_a_file_that_is_no_model(tmp_path, content, capfd):
  path = tmp_path / "pieces.model"
  path.write_bytes(content)
  with pytest.raises(ValueError, match="pieces.model: this .*sentencepiece"):
    Pieces.load(path)
  assert capfd.readouterr() == ("", "")
