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
    # It takes a moment; of the square of its length, hours.
    [" ".join(f"{i}." for i in range(30_000))],
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
    ("I don't. He's", "I|don't|.|He's"),
    ("twenty-one, it’s", "twenty-one|,|it’s"),
    ("then--so...", "then|--|so|..."),
    ("the U.S. won $1,234.56.", "the|U.S.|won|$|1,234.56|."),
    ("in 1776. (Yes!)", "in|1776|.|(|Yes|!|)"),
    ("the States' 'own'", "the|States|'|'|own|'"),
    ("naïve e\u0301te\u0301 हिन्दी", "naïve|e\u0301te\u0301|हिन्दी"),
    ("</S>", "<|/|S|>"),
  ],
)
def test_words(text, expected):
  assert words(text) == expected.split("|")


def test_tokens_are_cut_at_spaces_only():
  text = "  He said : 5\xa0%  , don 't "
  assert tokens(text) == ["He", "said", ":", "5\xa0%", ",", "don", "'t"]
  assert tokens("") == []


def test_build_numbers_by_falling_count_then_alphabet():
  vocabulary = Vocabulary.build(TEXTS, min_count=1)
  everything = vocabulary.decode(range(len(vocabulary)))
  want = [*SPECIALS, "the", "a", *("<", ">", "b", "/", "S", "UNK", "c", "d")]
  assert everything == want
  assert (vocabulary.end, vocabulary.start, vocabulary.unknown) == (0, 1, 2)
  # Text cannot spell a special symbol.
  assert vocabulary.encode(SPECIALS) == [vocabulary.unknown] * 3
  frequent = Vocabulary.build(TEXTS, min_count=3)
  assert frequent.decode(range(3, len(frequent))) == ["the", "a"]
  assert frequent.encode(["a", "b", "the"]) == [4, 2, 3]
  for texts, count, most in ((TEXTS, 5, 4), ([], 1, 0)):
    with pytest.raises(ValueError, match=f"min_count={count} .* {most} times"):
      Vocabulary.build(texts, min_count=count)


@given(st.lists(st.text(), min_size=1), st.integers(1, 3))
def test_known_words_survive_encoding(texts, min_count):
  for text in texts:
    assert "".join(words(text)) == "".join(text.split())
  try:
    vocabulary = Vocabulary.build(texts, min_count)
  except ValueError:
    return
  for text in texts:
    after = vocabulary.decode(vocabulary.encode(words(text)))
    for before, word in zip(words(text), after, strict=True):
      assert word in (before, "<UNK>")


# -- files --------------------------------------------------------------------


def test_save_and_load(tmp_path):
  saved = Vocabulary.build(["naïve 中文 \x1f a"], min_count=1)
  saved.save(tmp_path / "vocab.txt")
  loaded = Vocabulary.load(tmp_path / "vocab.txt")
  everything = range(len(saved))
  assert loaded.decode(everything) == saved.decode(everything)
  assert loaded.digest == saved.digest
  assert [path.name for path in tmp_path.iterdir()] == ["vocab.txt"]


def test_load_finds_the_specials_by_name(tmp_path):
  path = tmp_path / "vocab.txt"
  path.write_text("the\n<S>\n,\n<UNK>\n</S>\n", encoding="utf-8")
  vocabulary = Vocabulary.load(path)
  assert (vocabulary.end, vocabulary.start, vocabulary.unknown) == (4, 1, 3)
  assert vocabulary.encode(["the", ",", "of"]) == [0, 2, 3]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"</S>\n<S>\nthe\n", ": the .* 3 entries lacks <UNK>"),
    (b"</S>\n<S>\n<UNK>\nthe\nthe\n", ": 'the' occurs more than once in .* 5"),
    (b"</S>\n<S>\n<UNK>\n<S>\n", ": '<S>' occurs more than once"),
    (b"\x1f\x8b", " is cut short or dam"),
  ],
)
def test_load_refuses_bad_files(tmp_path, content, message):
  path = tmp_path / "vocab.txt"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f"vocab.txt{message}"):
    Vocabulary.load(path)
