"""Kneser-Ney in arrays against the formulas in dictionaries."""

import collections
import functools
import itertools

import numpy as np
import pytest

from experiments import harness, kneser_ney
from moejax.data import packing
from moejax.data.vocab import END, START, UNKNOWN, Vocabulary

WORDS = ("a", "b", "c", "d", UNKNOWN)
# No sentence has more than 6 words, and so no 9-gram.
ORDERS = (1, 2, 3, 4, 5, 9)
VOCABULARY = Vocabulary([END, START, UNKNOWN, "a", "b", "c", "d", "never"])
CONTEXTS = [
  context
  for length in range(5)
  for context in itertools.product(("a", "d", UNKNOWN, "never"), repeat=length)
]


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
  if order == 5:
    # Both discounts of its own, and fallbacks.
    assert set(reference.fell_back) == {True, False}
  found = probabilities(order, CONTEXTS)
  for sentence, each in zip(CONTEXTS, found, strict=True):
    words = (START, *sentence, END)
    expected = [
      reference.probability(words[i], words[:i]) for i in range(1, len(words))
    ]
    np.testing.assert_allclose(each, expected, rtol=1e-12)
  mean = np.concatenate([np.log(each) for each in found]).mean()
  perplexity = kneser_ney.perplexity(trained(order), tokens(CONTEXTS))
  assert perplexity == pytest.approx(np.exp(-mean))


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


@pytest.mark.parametrize(
  ("counts", "times", "expected"),
  [
    ([0, 1, 2, 3, 4, 9], [5, 4, 3, 2, 1, 8], [0, 0.4, 1.2, 2.2]),  # Y = 4 / 10
    ([1, 2, 3], [3, 2, 1], [0, 0.5, 1, 1.5]),  # n_4 is 0
    ([0], [3], [0, 0.5, 1, 1.5]),  # all are
    ([1, 2, 3, 4], [10, 1, 10, 1], [0, 0.5, 1, 1.5]),  # D_2 = 2 - 25
  ],
)
def test_discounts(counts, times, expected):
  found = kneser_ney.discounts(np.repeat(counts, times))
  np.testing.assert_allclose(found, expected)


def test_the_command_reads_any_config(corpus, tmp_path, capsys):
  def run(*argv):
    about = {"config": "a config"}
    argv = ["--quick", f"--out={tmp_path}", *argv]
    kn = kneser_ney
    return harness.main("kneser_ney", kn.rows, kn.draw, argv=argv, **about)

  fields = {"kind": "text", "train": corpus, "data_dir": tmp_path}
  changes = [f"--config.data.{name}={x}" for name, x in fields.items()]
  table = run("--config=tiny", *changes)
  assert (tmp_path / "kneser_ney_config.png").stat().st_size > 1000
  # Two splits of two orders, of one text whose words follow each other.
  single, pairs = table[1]["perplexity"], table[3]["perplexity"]
  assert table[0]["ngrams"] < table[3]["ngrams"] and pairs < 0.9 * single
  said = capsys.readouterr().out
  words = int(said.partition("counting ")[2].split()[0].replace(",", ""))
  assert 30_000 < words < 80_000
  with pytest.raises(SystemExit, match="the config translates"):
    run("--config=translate_tiny")
  with pytest.raises(SystemExit, match="nearest is"):
    run("--config=tiny", "--config.data.kin=text")
