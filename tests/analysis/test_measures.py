"""What decisions tell, beside loops over tokens and edges."""

import collections
import itertools
import math

import numpy as np
import pytest

from moejax.analysis import measures

E = 5


def draw(seed=0, tokens=40):
  """Decisions of random tokens, some of which no expert reads."""
  rng = np.random.default_rng(seed)
  starts = rng.random(tokens) < 0.2
  starts[0] = True
  position = np.arange(tokens) - np.maximum.accumulate(
    np.where(starts, np.arange(tokens), 0)
  )
  reads = [rng.permutation(E)[: rng.integers(0, 4)] for _ in range(tokens)]
  token = np.repeat(np.arange(tokens), [len(own) for own in reads])
  return measures.Decisions(
    E,
    rng.integers(0, 6, tokens).astype(np.int32),
    position.astype(np.int32),
    rng.normal(size=tokens).astype(np.float32),
    token,
    np.concatenate(reads).astype(np.int32),
    rng.random(token.size).astype(np.float32),
    rng.random(token.size) < 0.3,
    np.concatenate([np.arange(len(own)) for own in reads]),
  )


def edges(decisions):
  return list(zip(decisions.token, decisions.expert, strict=True))


def bits_by_loops(decisions, labels):
  """KL(p(label | e) || p(label)), and the parts of all edges."""
  every = collections.Counter(labels[t] for t, _ in edges(decisions))
  found, share = [], []
  A = len(edges(decisions))
  for e in range(E):
    own = collections.Counter(labels[t] for t, x in edges(decisions) if x == e)
    n = own.total()
    share.append(n / A)
    found.append(
      sum(c / n * math.log2(c / n / (every[v] / A)) for v, c in own.items())
    )
  return np.array(found), np.array(share)


def test_balance_of_some_loads():
  assert measures.balance(np.full(4, 3.0)) == pytest.approx(
    {"cv": 0, "max_over_mean": 1, "entropy": 2, "unused": 0}
  )
  found = measures.balance(np.array([5.0, 1.0, 0.0]))
  assert found["cv"] == pytest.approx(np.sqrt(14 / 3) / 2)
  assert (found["max_over_mean"], found["unused"]) == (2.5, 1)
  assert found["entropy"] == pytest.approx(0.650, abs=1e-3)
  assert measures.balance(np.zeros(3))["unused"] == 3
  assert measures.balance(np.zeros(3))["cv"] == 0


def test_what_experts_tell_of_labels_is_what_loops_count():
  decisions = draw()
  for labels in (decisions.ids, decisions.position, 7 * decisions.ids + 100):
    found = measures.knowledge(decisions, labels, np.random.default_rng(1))
    bits, share = bits_by_loops(decisions, labels)
    np.testing.assert_allclose(found.bits, bits, atol=1e-12)
    np.testing.assert_allclose(found.share, share)
    assert found.total["bits"] == pytest.approx(bits @ share)


def test_labels_that_are_given_tell_nothing_again():
  """I(expert; both labels) - I(expert; the given one), by loops."""
  decisions = draw(1)
  labels, given = decisions.position, decisions.ids
  found = measures.knowledge(decisions, labels, np.random.default_rng(1), given)
  both, share = bits_by_loops(decisions, [*zip(given, labels, strict=True)])
  alone, _ = bits_by_loops(decisions, given)
  np.testing.assert_allclose(found.bits, both - alone, atol=1e-12)
  again = measures.knowledge(decisions, given, np.random.default_rng(1), given)
  np.testing.assert_allclose(again.bits, 0, atol=1e-12)
  np.testing.assert_allclose(again.shuffled, 0, atol=1e-12)


def test_luck_knows_nothing_where_there_is_much_text():
  """Tokens of experts that were drawn without a reason: bits are luck."""
  few, much = draw(2, 60), draw(2, 20_000)
  own = {}
  for decisions in (few, much):
    found = measures.knowledge(
      decisions, decisions.ids, np.random.default_rng(1)
    )
    assert found.total["bits"] == pytest.approx(found.total["shuffled"], rel=1)
    own[decisions.ids.size] = found.total["shuffled"]
  assert own[20_000] < 0.01 * own[60]


def test_the_most_that_choices_tell_is_told_where_they_follow_the_token():
  ids = np.random.default_rng(0).integers(0, E, 500).astype(np.int32)
  ones = np.ones(500, np.float32)
  every = np.arange(500)
  decisions = measures.Decisions(
    E, ids, every, ones, every, ids, ones, ones == 0, 0 * every
  )
  total = measures.knowledge(decisions, ids, np.random.default_rng(1)).total
  assert total["bits"] == pytest.approx(total["most"])
  # Other places would tell next to nothing.
  assert 0 < total["shuffled"] < 0.05 * total["bits"]


def test_some_tokens_alone():
  decisions = draw(3)
  some = decisions.ids % 2 == 0
  found = decisions.of(some)
  numbers = np.flatnonzero(some)
  assert [(numbers[t], e) for t, e in edges(found)] == [
    (t, e) for t, e in edges(decisions) if some[t]
  ]
  np.testing.assert_array_equal(found.ids, decisions.ids[some])


def test_preferred_labels_tell_most():
  decisions = draw(4, 300)
  every = collections.Counter(decisions.ids[t] for t, _ in edges(decisions))
  A = len(edges(decisions))
  for e, found in enumerate(measures.preferred(decisions, decisions.ids, 3)):
    own = collections.Counter(
      decisions.ids[t] for t, x in edges(decisions) if x == e
    )
    want = {v: (c, c / own.total() / (every[v] / A)) for v, c in own.items()}
    want = {v: (c, lift) for v, (c, lift) in want.items() if lift > 1}
    order = sorted(want, key=lambda v: -want[v][0] * math.log(want[v][1]))
    assert [v for v, *_ in found] == order[:3]
    for v, count, lift in found:
      assert (count, lift) == pytest.approx(want[v])


def test_contexts_are_of_the_largest_gates_each_once():
  words = ["the", "cat", "sat", "on", "a", "mat"]
  decisions = draw(5, 400)
  found = measures.contexts(
    decisions, 4, lambda ids: " ".join(words[i] for i in ids), words=2
  )
  starts = np.flatnonzero(decisions.position == 0)
  for e, own in enumerate(found):
    of_expert = [
      i for i in range(decisions.expert.size) if decisions.expert[i] == e
    ]
    of_expert.sort(key=lambda i: -decisions.gate[i])
    want = []
    for i in of_expert:
      t = decisions.token[i]
      begin = max(s for s in starts if s <= t)
      end = min([s for s in starts if s > t], default=400)
      around = (
        " ".join(words[w] for w in decisions.ids[max(begin, t - 2) : t]),
        words[decisions.ids[t]],
        " ".join(words[w] for w in decisions.ids[t + 1 : min(end, t + 3)]),
      )
      if around not in [w[1:] for w in want]:
        want.append((decisions.gate[i], *around))
      if len(want) == 4:
        break
    assert [gate for gate, *_ in own] == pytest.approx([w[0] for w in want])
    for (_, left, piece, right), (_, *around) in zip(own, want, strict=True):
      assert [left.strip(), piece, right.strip()] == around


def test_contexts_by_hand():
  """As the experiment on Table 9 had them: the ends of sentences, and words."""
  words = ["", "", "", "the", "red", "car", "house", "is", "here"]
  first, second = [3, 4, 5, 7, 8, 2], [3, 6, 7, 8, 2]
  ids = np.array([*first, *second, *first])
  position = np.array([*range(6), *range(5), *range(6)])
  token, gate = np.array([2, 5, 7, 13]), np.array([0.4, 0.2, 0.9, 0.3])
  ones = np.ones(17, np.float32)
  decisions = measures.Decisions(
    2, ids, position, ones, token, 0 * token + 1, gate, gate < 0, 0 * token
  )
  none, own = measures.contexts(
    decisions, 4, lambda ids: " ".join(words[i] for i in ids if i > 2)
  )
  assert none == []
  assert own == [
    (0.9, "the ", "house", " is here"),
    (0.4, "the red ", "car", " is here"),
    (0.2, "red car is here ", "</s>", ""),
  ]


def test_pairs_that_read_together():
  decisions = draw(6)
  reads = collections.defaultdict(set)
  for t, e in edges(decisions):
    reads[t].add(e)
  alone = collections.Counter(e for _, e in edges(decisions))
  want = {}
  for a, b in itertools.combinations(range(E), 2):
    if both := sum({a, b} <= own for own in reads.values()):
      want[a, b] = both, both * 40 / (alone[a] * alone[b])
  found = list(measures.together(decisions, 40))
  assert {(a, b): pytest.approx((n, lift)) for a, b, n, lift in found} == want
  excess = [n * math.log(lift) for _, _, n, lift in found]
  assert excess == sorted(excess, reverse=True)


def test_the_pairs_most_alike():
  x = np.random.default_rng(0).normal(size=(4, 8))
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  found = measures.alike(x @ x.T, 3)
  every = sorted(
    ((x[a] @ x[b], a, b) for a, b in itertools.combinations(range(4), 2)),
    reverse=True,
  )
  assert [(a, b) for a, b, _ in found] == [(a, b) for _, a, b in every[:3]]
  assert [c for *_, c in found] == pytest.approx([c for c, *_ in every[:3]])


def test_a_histogram_counts_all_that_is_there():
  values = np.array([0.0, 1.0, 1.0, 2.0, np.nan, -np.inf])
  rows = measures.histogram(values, 4)
  assert sum(row["count"] for row in rows) == 4
  assert [row["count"] for row in rows] == [1, 0, 2, 1]
  assert sum(r["count"] for r in measures.histogram(np.ones(3))) == 3
  assert measures.histogram(np.full(2, np.nan)) == []
