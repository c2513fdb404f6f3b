"""Routing: the edge list, its order and its sums."""

import jax.numpy as jnp
import numpy as np

from moejax import routing
from moejax.routing import Assignment

G, S, K, E = 2, 3, 2, 4


def choices(seed=0):
  random = np.random.default_rng(seed)
  expert = random.integers(0, E, (G, S, K)).astype("int32")
  return expert, random.random((G, S, K)).astype("float32")


def test_first_choices_come_before_second_choices():
  expert, gate = choices()
  assignment = routing.from_choices(jnp.asarray(expert), jnp.asarray(gate))
  for g in range(G):
    order = [(s, k) for k in range(K) for s in range(S)]
    assert [int(e) for e in assignment.expert[g]] == [
      expert[g, s, k] for s, k in order
    ]
    assert [float(w) for w in assignment.gate[g]] == [
      gate[g, s, k] for s, k in order
    ]
    assert [int(t) for t in assignment.tokens(S)[g]] == [s for s, _ in order]


def test_first_picks_come_before_second_picks():
  C = 3
  random = np.random.default_rng(1)
  token = random.integers(0, S, (G, E, C)).astype("int32")
  gate = random.random((G, E, C)).astype("float32")
  used = random.random((G, E, C)) < 0.5
  assignment = routing.from_picks(
    jnp.asarray(token), jnp.asarray(gate), jnp.asarray(used)
  )
  order = [(e, c) for c in range(C) for e in range(E)]
  for g in range(G):
    want = [
      (e, token[g, e, c], gate[g, e, c]) if used[g, e, c] else (E, None, 0)
      for e, c in order
    ]
    assert [int(e) for e in assignment.expert[g]] == [e for e, _, _ in want]
    assert [float(w) for w in assignment.gate[g]] == [w for _, _, w in want]
    tokens = assignment.tokens(S)[g]
    assert all(
      t in (None, s) for s, (_, t, _) in zip(tokens, want, strict=True)
    )


def test_a_decision_sums_up_its_edges():
  assignment = Assignment(
    jnp.asarray([[0, 3, 0, E]], jnp.int32), jnp.asarray([[0.5, 1, 0.25, 0]])
  )
  logits, mask = jnp.ones((1, 2, E)), jnp.asarray([[True, False]])
  got = routing.decision(assignment, logits, mask)
  np.testing.assert_array_equal(got.importance, [[0.75, 0, 0, 1]])
  np.testing.assert_array_equal(got.count, [[2, 0, 0, 1]])
  np.testing.assert_array_equal(got.load, got.count)
  assert got.assignment is assignment and got.logits is logits
  assert got.mask is mask and routing.decision(assignment, logits).mask is None


def test_edges_may_name_their_tokens():
  expert = jnp.asarray([[1, 0, E]], jnp.int32)
  token = jnp.asarray([[2, 2, 0]], jnp.int32)
  assignment = Assignment(expert, jnp.ones((1, 3)), token)
  np.testing.assert_array_equal(assignment.tokens(S), token)


def test_per_expert_sums_edges_and_skips_unused_ones():
  expert = jnp.asarray([[0, 3, 0, E], [E, E, 1, 1]], jnp.int32)
  value = jnp.asarray([[1.0, 2, 4, 8], [16, 32, 64, 128]])
  np.testing.assert_array_equal(
    routing.per_expert(value, expert, E), [[5, 0, 0, 2], [0, 192, 0, 0]]
  )
