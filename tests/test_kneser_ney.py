"""Kneser-Ney in arrays against the formulas in dictionaries, and by hand."""

import collections
import functools
import itertools
import re

import numpy as np
import pytest

from experiments import harness, kneser_ney, training
from moejax import config as config_lib
from moejax import named
from moejax.data import packing
from moejax.data.vocab import END, START, UNKNOWN, Vocabulary

WORDS = ("a", "b", "c", "d", UNKNOWN)
# No sentence has more than 6 words, and so no 9-gram.
ORDERS = (1, 2, 3, 4, 5, 9)
VOCABULARY = Vocabulary([END, START, UNKNOWN, "a", "b", "c", "d", "never"])


def tokens(sentences):
  """Sentences, sequences of words, as ids."""
  closed = [
    [*VOCABULARY.encode(sentence), VOCABULARY.end] for sentence in sentences
  ]
  return packing.Tokens(
    {"target": np.array(list(itertools.chain(*closed)), np.int32)},
    {"target": np.array(list(map(len, closed)), np.int32)},
    digest="",
  )


@functools.cache
def habits():
  """Sentences of words with favourite followers; "never" does not occur."""
  rng = np.random.default_rng(0)
  follow = rng.dirichlet(np.full(len(WORDS), 0.4), size=len(WORDS))
  sentences = []
  for length in rng.integers(1, 7, size=40):
    place = rng.integers(len(WORDS))
    sentence = []
    for _ in range(length):
      sentence.append(WORDS[place])
      place = rng.choice(len(WORDS), p=follow[place])
    sentences.append(sentence)
  return sentences


class Reference:
  """Interpolated modified Kneser-Ney, n-gram by n-gram."""

  def __init__(self, sentences, order):
    self.order = order
    self.raw = collections.Counter()
    for sentence in sentences:
      words = (START, *sentence, END)
      for end in range(2, len(words) + 1):
        for begin in range(max(0, end - order), end):
          self.raw[words[begin:end]] += 1
    self.count = {gram: self.adjusted(gram) for gram in self.raw}
    self.discount = [self.discounts(n) for n in range(1, order + 1)]
    self.fell_back = [d[1:] == (0.5, 1.0, 1.5) for d in self.discount]

  def adjusted(self, gram):
    if len(gram) == self.order or gram[0] == START:
      return self.raw[gram]
    return len({g[0] for g in self.raw if g[1:] == gram})

  def discounts(self, order):
    counts = [c for gram, c in self.count.items() if len(gram) == order]
    n = [counts.count(i) for i in range(5)]
    if 0 in n[1:]:
      return (0, 0.5, 1.0, 1.5)
    y = n[1] / (n[1] + 2 * n[2])
    d = tuple(i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3))
    return (0, *d) if min(d) > 0 else (0, 0.5, 1.0, 1.5)

  def probability(self, word, context):
    """Of a word after all words of its sentence so far, <S> the first."""
    known = min(len(context), self.order - 1)
    return self.interpolated(word, context[len(context) - known :])

  def interpolated(self, word, context):
    shorter = (
      self.interpolated(word, context[1:])
      if context
      else 1 / (len(VOCABULARY) - 1)
    )
    after = {
      gram: count for gram, count in self.count.items() if gram[:-1] == context
    }
    total = sum(after.values())
    if not total:
      return shorter
    discount = self.discount[len(context)]
    rest = sum(discount[min(count, 3)] for count in after.values())
    own = after.get((*context, word), 0)
    return (own - discount[min(own, 3)] + rest * shorter) / total


CONTEXTS = [
  context
  for length in range(5)
  for context in itertools.product(("a", "d", UNKNOWN, "never"), repeat=length)
]


@functools.cache
def trained(order):
  return kneser_ney.train(tokens(habits()), VOCABULARY, order)


def probabilities(order, sentences):
  """An array a sentence."""
  flat = kneser_ney.probabilities(trained(order), tokens(sentences))
  ends = np.cumsum([len(sentence) + 1 for sentence in sentences])
  return np.split(flat, ends[:-1])


@pytest.mark.parametrize("order", ORDERS)
def test_agrees_with_the_formulas(order):
  reference = Reference(habits(), order)
  found = probabilities(order, CONTEXTS)
  for sentence, each in zip(CONTEXTS, found, strict=True):
    words = (START, *sentence, END)
    expected = [
      reference.probability(words[i], words[:i]) for i in range(1, len(words))
    ]
    np.testing.assert_allclose(each, expected, rtol=1e-12)


def test_the_corpus_has_discounts_of_its_own_and_fallbacks():
  assert set(Reference(habits(), 5).fell_back) == {True, False}


@pytest.mark.parametrize("order", ORDERS)
def test_sums_to_one_after_any_context(order):
  words = VOCABULARY.decode(range(len(VOCABULARY)))
  # That of </S> stands at the end of the context itself.
  next_words = [(w,) for w in words if w not in (START, END)] + [()]
  sentences = [c + w for c in CONTEXTS for w in next_words]
  found = iter(probabilities(order, sentences))
  for context in CONTEXTS:
    total = sum(next(found)[len(context)] for _ in next_words)
    assert total == pytest.approx(1, rel=1e-12)


def test_by_hand():
  # 7 words to choose from. Two single words of one predecessor and one of two
  # give no counts of counts, so 0.5 is taken of a 1 and 1 of a 2.
  train = tokens([["a", "a", "b"]])
  a, b, end, unseen = 1 / 4 + 1 / 14, 1 / 8 + 1 / 14, 1 / 8 + 1 / 14, 1 / 14
  assert a + b + end + 4 * unseen == pytest.approx(1)
  unigram = kneser_ney.train(train, VOCABULARY, 1)
  found = kneser_ney.perplexity(unigram, tokens([["a", "d", "b"]]))
  assert found == pytest.approx((a * unseen * b * end) ** (-1 / 4))

  # p(a | <S>), p(b | a), p(</S> | b): counts 1 of 1, 1 of 2 and 1 of 1.
  bigram = kneser_ney.train(train, VOCABULARY, 2)
  expected = (0.5 + a / 2) * (0.25 + b / 2) * (0.5 + end / 2)
  found = kneser_ney.perplexity(bigram, tokens([["a", "b"]]))
  assert found == pytest.approx(expected ** (-1 / 3))


def test_discounts():
  counts = np.repeat([0, 1, 2, 3, 4, 9], [5, 4, 3, 2, 1, 8])
  expected = [0, 0.4, 1.2, 2.2]  # Y = 4 / 10
  np.testing.assert_allclose(kneser_ney.discounts(counts), expected)


@pytest.mark.parametrize(
  ("counts", "times"),
  [
    ([1, 2, 3], [3, 2, 1]),  # n_4 is 0
    ([5, 6], [1, 2]),  # all are
    ([1, 2, 3, 4], [10, 1, 10, 1]),  # D_2 = 2 - 25
    ([0], [3]),
  ],
)
def test_discounts_of_few_counts_fall_back(counts, times):
  found = kneser_ney.discounts(np.repeat(counts, times))
  np.testing.assert_array_equal(found, [0, 0.5, 1, 1.5])


def test_refuses_order_0():
  with pytest.raises(ValueError, match="order must be 1 or more, got 0"):
    kneser_ney.train(tokens([["a"]]), VOCABULARY, 0)


def test_reads_any_config(corpus, tmp_path):
  config = training.load("tiny")
  config.data.update(
    {"kind": "text", "train": str(corpus), "data_dir": str(tmp_path)}
  )
  found = kneser_ney.perplexities(config, 3)
  assert set(found) == {"validation", "test"}
  assert found != kneser_ney.perplexities(config, 1)


def test_the_command_reads_any_config(corpus, tmp_path, capsys):
  argv = ["--quick", "--config=tiny", "--config.data.kind=text"]
  argv += [
    f"--config.data.train={corpus}",
    f"--config.data.data_dir={tmp_path}",
  ]
  about = {"config": "a config"}
  run = functools.partial(
    harness.main, "kneser_ney", kneser_ney.rows, kneser_ney.draw, **about
  )
  table = run(argv=[*argv, f"--out={tmp_path}"])
  assert (tmp_path / "kneser_ney_config.png").stat().st_size > 1000
  config = config_lib.load(
    "tiny",
    [
      ("config.data.kind", ["text"]),
      ("config.data.train", [str(corpus)]),
      ("config.data.data_dir", [str(tmp_path)]),
    ],
  )
  want = kneser_ney.perplexities(config, 2)
  found = {row["split"]: row["perplexity"] for row in table[-2:]}
  assert found == {split: round(value, 2) for split, value in want.items()}
  assert re.search(r"counting [\d,]+ words; .* GB", capsys.readouterr().out)
  with pytest.raises(SystemExit, match="the config translates"):
    run(argv=["--quick", "--config=translate_tiny"])
  for wrong in ("--confg=tiny", "--data.kind=text"):
    with pytest.raises(SystemExit):
      run(argv=["--quick", wrong])
  with pytest.raises(named.ReadError, match="nearest is"):
    run(argv=["--quick", "--config=tiny", "--config.data.kin=text"])
