"""What sets each kind of gating apart."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gatings import E, G, K, S, case, dense, draw, picks
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moejax import gating


def test_one_threshold_and_one_bias_for_each_expert():
  logits, _, _ = draw(0)
  with pytest.raises(ValueError, match=rf"thresholds has 3 .*\b{E} experts"):
    gating.threshold(logits, jnp.ones(3), K)
  with pytest.raises(ValueError, match=rf"bias has 3 .*\b{E} experts"):
    gating.sigmoid(logits, jnp.ones(3), K)


def test_ties_go_to_the_lowest_experts():
  run = case("top_k").run
  got = run(jnp.zeros((G, S, E)), jnp.zeros((G, S, E)), None, K)
  np.testing.assert_array_equal(got.count[0], [S, S, 0, 0, 0])
  np.testing.assert_array_equal(got.assignment.expert[0], [0] * S + [1] * S)
  tied = jnp.tile(jnp.asarray([0.0, 2, 1, 2, 2]), (G, S, 1))
  for name in ("top_k", "noisy_top_k"):
    got = case(name).run(tied, jnp.zeros_like(tied), None, K)
    np.testing.assert_array_equal(got.assignment.expert[0], [1] * S + [3] * S)


@pytest.mark.parametrize("name", ["balanced", "expert_choice"])
def test_ties_go_to_the_lowest_tokens(name):
  """Exactly m of them survive for every expert, however many are equal."""
  same = jnp.tile(jnp.asarray([0.0, 2, 1, 2, 2]), (G, S, 1))
  mask = jnp.asarray([[False] + [True] * (S - 1)] * G)
  got = case(name).run(same, jnp.zeros_like(same), mask, K)
  np.testing.assert_array_equal(got.count, np.full((G, E), 2))
  np.testing.assert_array_equal(got.assignment.token[0], [1] * E + [2] * E)


@pytest.mark.parametrize("name", ["softmax", "top_k", "noisy_top_k"])
@hypothesis.given(
  logits=arrays("float32", (G, S, E), elements=st.floats(-1e4, 1e4, width=32))
)
def test_better_choices_have_larger_gates(name, logits):
  got = case(name).run(jnp.asarray(logits), jnp.ones((G, S, E)), None, 3)
  gate = np.asarray(got.assignment.gate).reshape(G, -1, S)
  assert (np.diff(gate, axis=1) <= 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_thresholds_between_the_mth_and_the_next_are_balanced(masked):
  """What eq. 20 teaches: then both masks are one."""
  tokens = 20
  logits, std, mask = draw(24, masked, (1, tokens, E))
  want = case("balanced").run(logits, std, mask, K)
  real = tokens if mask is None else int(mask.sum())
  x = np.asarray(jax.nn.softmax(logits))[0]
  x = x if mask is None else x[np.asarray(mask)[0]]
  ranked, m = np.sort(x, axis=0)[::-1], picks(real, E, K)
  between = jnp.asarray((ranked[m - 1] + ranked[m]) / 2)
  got = gating.threshold(logits, between, E, mask)
  np.testing.assert_array_equal(got.count, np.full((1, E), m))
  np.testing.assert_allclose(
    dense(got.assignment, tokens), dense(want.assignment, tokens), atol=1e-6
  )


def test_threshold_keeps_the_largest_of_too_many():
  logits, _, _ = draw(25)
  got = gating.threshold(logits, jnp.zeros(E), K)
  want = gating.top_k(logits, K)
  np.testing.assert_array_equal(got.assignment.expert, want.assignment.expert)
  np.testing.assert_allclose(
    got.assignment.gate, want.assignment.gate, atol=1e-6
  )


def test_thresholds_may_turn_every_expert_away():
  logits, _, _ = draw(25)
  # Not even on the way: a user who looks for NaN should find only his own.
  with jax.debug_nans(True):
    got = gating.threshold(logits, jnp.ones(E), K)
  assert (np.asarray(got.assignment.expert) == E).all()
  assert (np.asarray(got.assignment.gate) == 0).all()


def test_switch_weighs_by_the_softmax_over_all():
  logits, std, _ = draw(26)
  got = case("switch").run(logits, std, None, 1)
  np.testing.assert_allclose(
    got.assignment.gate, jax.nn.softmax(logits).max(axis=-1), rtol=1e-6
  )


def chi_squared(counts):
  """Of the hypothesis that all are equally likely."""
  mean = counts.mean()
  return ((counts - mean) ** 2).sum() / mean


@pytest.mark.parametrize("start, step", [(0, 1), (1000, 1), (0, 16), (-9, 3)])
@pytest.mark.parametrize("experts", [6, 16])
def test_hash_spreads_ids_evenly(experts, start, step):
  """As evenly as chance would, be they consecutive or multiples of E."""
  words = start + step * jnp.arange(4096, dtype=jnp.int32)
  run = jax.jit(gating.hash_ids, static_argnums=(1, 2))
  expert = run(words[None], experts, 2).assignment.expert.reshape(2, -1)
  first, second = np.asarray(expert)
  pairs = np.zeros((experts, experts))
  np.add.at(pairs, (first, second), 1)
  assert (np.diag(pairs) == 0).all()
  off_diagonal = pairs[~np.eye(experts, dtype=bool)]
  for counts in (pairs.sum(0), pairs.sum(1), off_diagonal):
    free = counts.size - 1
    assert chi_squared(counts) < free + 4.5 * np.sqrt(2 * free)


def test_same_ids_visit_the_same_experts():
  words = jnp.asarray([[5, 70000, 5, -1, 3], [3, 3, 70000, 5, -1]], jnp.int32)
  expert = gating.hash_ids(words, E, K).assignment.expert
  chosen = np.asarray(expert).reshape(G, K, S)
  seen = {}
  for g in range(G):
    for s in range(S):
      mine = tuple(chosen[g, :, s])
      assert seen.setdefault(int(words[g, s]), mine) == mine
  assert len(set(seen.values())) > 1


def test_bias_steers_the_choice_and_not_the_gate():
  logits, _, _ = draw(28)
  favour = jnp.asarray([0.0, 0, 0, 2, 1])

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(bias):
    got = gating.sigmoid(logits, bias, K)
    return (got.assignment.gate**2).sum() + got.importance[:, 3].sum(), got

  slopes, got = run(favour)
  np.testing.assert_array_equal(got.assignment.expert, [[3] * S + [4] * S] * G)
  scores = np.asarray(jax.nn.sigmoid(logits))[..., 3:]
  np.testing.assert_allclose(
    got.assignment.gate.reshape(G, K, S),
    (scores / scores.sum(-1, keepdims=True)).swapaxes(1, 2),
    rtol=1e-5,
  )
  assert (np.asarray(slopes) == 0).all()
  np.testing.assert_array_equal(got.bias, favour)
