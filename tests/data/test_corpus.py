"""A corpus as a run reads it: what in its words is doubted."""

import pytest

from moejax.data.corpus import Sentences
from moejax.data.vocab import Vocabulary

WORDS = [f"word{i}" for i in range(120)]


def corpus(**texts):
  vocabulary = Vocabulary.build(texts["train"], min_count=3)
  return Sentences(vocabulary, texts, 16, 2)


def test_few_unknown_words_are_no_trouble(capsys):
  train = [" ".join(WORDS)] * 3 + ["rare"]
  rows = corpus(train=train).rows("train")
  assert rows.unknown == pytest.approx(1 / (3 * 121 + 2))
  assert capsys.readouterr() == ("", "")


def test_many_unknown_words_are_warned_of(capsys):
  train = [" ".join(WORDS)] * 3
  both = corpus(train=train, test=["none of these", WORDS[0], "", " "])
  assert both.rows("test").unknown == 3 / 6
  said = capsys.readouterr().err
  assert "test: 2 of 4 sentences left out, which have no words" in said
  assert "test: 50% of 6 words are unknown to the vocabulary of 123" in said
  both.rows("train")
  assert capsys.readouterr().err == ""


def test_a_vocabulary_of_letters_is_warned_of(capsys):
  corpus(train=["a b c a b c a b c"]).rows("train")
  assert "unknown to the vocabulary of 6, so" in capsys.readouterr().err
