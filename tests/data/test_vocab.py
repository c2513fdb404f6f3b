"""Sentences, words, and the vocabulary that numbers them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.data.vocab import Vocabulary, sentences, tokens, words

TEXTS = ["b a a c", "the the the the a b", "d </S> <UNK>"]
SPECIALS = ["</S>", "<S>", "<UNK>"]


@pytest.mark.parametrize(
  "expected",
  [
    ["One ends.", "Two ends!", "Three?", "Four"],
    ["I met Mr. Polk and Mrs. Polk in St. Louis.", "He left."],
    ["The U.S. Army won.", "H. R. Haldeman of the U. S. A. spoke."],
    ["See No. 5 of it.", "No.", "We will not."],
    ['He said: "Go."', "(He went.)", "She stayed."],
    ["It cost 3.5 million.", "$5 was left."],
    ["1. First of all we go.", "2. Then we stay."],
    ["Wait... what is it?", "Nothing."],
    ["Dr. Jones, Esq. Gen. Grant."],
  ],
)
def test_sentences(expected):
  assert sentences(" ".join(expected)) == expected


def test_blank_lines_end_a_sentence():
  found = sentences("A HEADING\n\nto Mr.\n \nB\nc.\n\n\n")
  assert found == ["A HEADING", "to Mr.", "B c."]


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("I don't. He's", ["I", "don't", ".", "He's"]),
    ("twenty-one, it’s", ["twenty-one", ",", "it’s"]),
    ("then--so...", ["then", "--", "so", "..."]),
    ("the U.S. won $1,234.56.", ["the", "U.S.", "won", "$", "1,234.56", "."]),
    ("in 1776. (Yes!)", ["in", "1776", ".", "(", "Yes", "!", ")"]),
    ("the States' 'own'", ["the", "States", "'", "'", "own", "'"]),
    ("naïve e\u0301te\u0301 हिन्दी", ["naïve", "e\u0301te\u0301", "हिन्दी"]),
    ("</S>", ["<", "/", "S", ">"]),
    (" \t\n\u2028 ", []),
  ],
)
def test_words(text, expected):
  assert words(text) == expected


def test_tokens_are_cut_at_spaces_only():
  assert tokens("He said : 5\xa0% , don 't") == [
    *("He", "said", ":", "5\xa0%", ",", "don", "'t")
  ]
  assert tokens("  two  spaces ") == ["two", "spaces"]
  assert tokens("") == []


@given(st.text())
def test_words_keep_every_letter(text):
  assert "".join(words(text)) == "".join(text.split())


def test_build_numbers_by_falling_count_then_alphabet():
  vocabulary = Vocabulary.build(TEXTS, min_count=1)
  everything = vocabulary.decode(range(len(vocabulary)))
  assert everything[:6] == [*SPECIALS, "the", "a", "<"]
  assert (vocabulary.end, vocabulary.start, vocabulary.unknown) == (0, 1, 2)
  assert len(everything) == len(set(everything)) == len(vocabulary)


def test_build_keeps_frequent_words_only():
  vocabulary = Vocabulary.build(TEXTS, min_count=3)
  assert vocabulary.decode(range(3, len(vocabulary))) == ["the", "a"]
  assert vocabulary.encode(["a", "b", "the"]) == [4, 2, 3]


def test_build_refuses_when_nothing_is_frequent():
  with pytest.raises(ValueError, match="min_count=5 .* 4 times"):
    Vocabulary.build(TEXTS, min_count=5)
  with pytest.raises(ValueError, match="min_count=1 .* 0 times"):
    Vocabulary.build([], min_count=1)


def test_text_cannot_spell_a_special_symbol():
  vocabulary = Vocabulary.build(TEXTS, min_count=1)
  assert vocabulary.encode(SPECIALS) == [vocabulary.unknown] * 3
  assert vocabulary.start not in vocabulary.encode(words("<S> </S> a"))


@given(st.lists(st.text(), min_size=1), st.integers(1, 3))
def test_known_words_survive_encoding(texts, min_count):
  try:
    vocabulary = Vocabulary.build(texts, min_count)
  except ValueError:
    return
  for text in texts:
    for before, after in zip(
      words(text),
      vocabulary.decode(vocabulary.encode(words(text))),
      strict=True,
    ):
      assert after in (before, "<UNK>")


def test_save_and_load(tmp_path):
  saved = Vocabulary.build(["naïve 中文 \x1f a"], min_count=1)
  saved.save(tmp_path / "vocab.txt")
  loaded = Vocabulary.load(tmp_path / "vocab.txt")
  everything = range(len(saved))
  assert loaded.decode(everything) == saved.decode(everything)
  assert [path.name for path in tmp_path.iterdir()] == ["vocab.txt"]


def test_load_names_a_file_that_is_no_text(tmp_path):
  path = tmp_path / "vocab.txt.gz"
  path.write_bytes(b"\x1f\x8b")
  with pytest.raises(ValueError, match="vocab.txt.gz is cut short or dam"):
    Vocabulary.load(path)


def test_load_finds_the_specials_by_name(tmp_path):
  path = tmp_path / "vocab.txt"
  path.write_text("the\n<S>\n,\n<UNK>\n</S>\n", encoding="utf-8")
  vocabulary = Vocabulary.load(path)
  assert (vocabulary.end, vocabulary.start, vocabulary.unknown) == (4, 1, 3)
  assert vocabulary.encode(["the", ",", "of"]) == [0, 2, 3]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("</S>\n<S>\nthe\n", "3 entries lacks <UNK>"),
    ("</S>\n<S>\n<UNK>\nthe\nthe\n", "5 entries holds only 4 .* 'the'"),
    ("</S>\n<S>\n<UNK>\n<S>\n", "'<S>' occurs more than once"),
  ],
)
def test_load_refuses_bad_files(tmp_path, text, message):
  path = tmp_path / "vocab.txt"
  path.write_text(text, encoding="utf-8")
  with pytest.raises(ValueError, match=f"vocab.txt: .*{message}"):
    Vocabulary.load(path)
