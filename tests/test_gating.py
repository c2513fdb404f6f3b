"""Gating against the paper's loops: values, gradients, noise, padding."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moejax import gating

G, S, E, K = 2, 5, 5, 2
KEY = jax.random.key(7)

# 1 / noise_std**2 overflows: 0 * inf in the gradient of the quotient.


class Case(NamedTuple):
  """A gating and its loops, with the arguments that other gatings ignore.

  Attributes:
    run: (logits, noise_std, mask) -> Routing, of all groups.
    reference: (logits, noise, noise_std, mask) -> Decision, of one group.
    k: experts per token.
  """

  run: Callable
  reference: Callable
  k: int


CASES = {
  "softmax": Case(
    lambda logits, std, mask: gating.softmax(logits, mask),
    lambda logits, noise, std, mask: reference.softmax_gating(logits, mask),
    E,
  ),
  "top_k": Case(
    lambda logits, std, mask: gating.top_k(logits, K, mask),
    lambda logits, noise, std, mask: reference.top_k(logits, K, mask),
    K,
  ),
  "noisy_top_k": Case(
    lambda logits, std, mask: gating.noisy_top_k(logits, std, K, KEY, mask),
    lambda logits, noise, std, mask: reference.noisy_top_k(
      logits, noise, std, K, mask
    ),
    K,
  ),
}


@functools.cache
def case(name):
  """Returns the case of an entry of GATING, compiled."""
  if name not in CASES:
    pytest.fail(
      f"gating.GATING[{name!r}] has no reference: write its loops into"
      " tests/reference.py and a line into CASES of tests/test_gating.py"
    )
  return CASES[name]._replace(run=jax.jit(CASES[name].run))


def draw(seed, masked=False):
  """Draws logits, noise_std and mask."""
  random = np.random.default_rng(seed)
  logits = random.normal(size=(G, S, E)).astype("float32")
  noise_std = random.uniform(0.2, 1.5, (G, S, E)).astype("float32")
  mask = jnp.asarray(random.random((G, S)) < 0.6) if masked else None
  return jnp.asarray(logits), jnp.asarray(noise_std), mask


def dense(assignment, tokens=S, experts=E):
  """Gates as the matrix G(x) [G, S, E]."""
  token = jax.nn.one_hot(assignment.tokens(tokens), tokens)
  expert = jax.nn.one_hot(assignment.expert, experts)
  return jnp.einsum("GAS,GAE,GA->GSE", token, expert, assignment.gate)


def decide(name, logits, noise, noise_std, mask):
  """The reference's decision for each group."""
  logits, noise, noise_std = (
    np.asarray(a, np.float64) for a in (logits, noise, noise_std)
  )
  return [
    case(name).reference(
      logits[g], noise[g], noise_std[g], None if mask is None else mask[g]
    )
    for g in range(logits.shape[0])
  ]


def noise_of(decision, logits, noise_std):
  return (np.asarray(decision.logits, np.float64) - logits) / noise_std


def edges(assignment, g):
  """The used edges of group g, in order."""
  token = assignment.tokens(S)[g]
  listed = zip(token, assignment.expert[g], assignment.gate[g], strict=True)
  return [(int(t), int(e), float(w)) for t, e, w in listed if e < E]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", gating.GATING)
def test_matches_the_paper(name, masked):
  for seed in range(8):
    logits, noise_std, mask = draw(seed, masked)
    got = case(name).run(logits, noise_std, mask)
    noise = noise_of(got, logits, noise_std)
    for g, want in enumerate(decide(name, logits, noise, noise_std, mask)):
      close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
      close(dense(got.assignment)[g], want.gates)
      close(got.importance[g], want.importance)
      close(got.load[g], want.load)
      np.testing.assert_array_equal(got.count[g], want.count)
      listed = edges(got.assignment, g)
      assert [edge[:2] for edge in listed] == [e[:2] for e in want.edges]
      close([edge[2] for edge in listed], [e[2] for e in want.edges])
      assert got.assignment.expert.shape[1] == S * case(name).k


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", gating.GATING)
def test_gradient_matches_finite_differences(name, masked):
  logits, noise_std, mask = draw(11, masked)
  random = np.random.default_rng(12)
  to_gates, to_importance, to_load = (
    random.normal(size=shape) for shape in [(G, S, E), (G, E), (G, E)]
  )

  @jax.jit
  def score(logits, noise_std):
    got = CASES[name].run(logits, noise_std, mask)
    terms = (
      (dense(got.assignment), to_gates),
      (got.importance, to_importance),
      (got.load, to_load),
    )
    return sum((a * jnp.asarray(b, a.dtype)).sum() for a, b in terms)

  drawn = case(name).run(logits, noise_std, mask)
  noise = noise_of(drawn, logits, noise_std)

  def reference_score(at):
    decisions = decide(name, at["logits"], noise, at["noise_std"], mask)
    return sum(
      (d.gates * to_gates[g]).sum()
      + (d.importance * to_importance[g]).sum()
      + (d.load * to_load[g]).sum()
      for g, d in enumerate(decisions)
    )

  got = jax.grad(score, (0, 1))(logits, noise_std)
  want = reference.gradient(
    reference_score, {"logits": logits, "noise_std": noise_std}
  )
  np.testing.assert_allclose(got[0], want["logits"], rtol=2e-3, atol=2e-4)
  np.testing.assert_allclose(got[1], want["noise_std"], rtol=2e-3, atol=2e-4)
  assert np.abs(want["logits"]).max() > 0.1
  if mask is not None:
    assert (np.asarray(got)[:, ~np.asarray(mask)] == 0).all()


def test_load_of_every_expert_has_gradient_through_the_threshold():
  # Moving another expert's logit moves the threshold that this one must beat.
  logits, noise_std, _ = draw(3)

  @jax.jit
  @jax.jacobian
  def slopes(logits):
    return gating.noisy_top_k(logits, noise_std, K, KEY).load[0]

  for e, slope in enumerate(np.asarray(slopes(logits))[:, 0]):
    assert (slope[:, e] > 0).any()
    others = np.delete(slope, e, axis=1)
    assert (others < 0).any()
    # What raises one expert's chance lowers no other threshold: they balance.
    np.testing.assert_allclose(slope.sum(axis=1), 0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_is_the_expected_count(k):
  """Mean load over noise = frequency of choice, by noise of our own too."""
  draws, tokens = 20000, 2
  random = np.random.default_rng(k)
  logits = random.normal(size=(tokens, E)).astype("float32")
  noise_std = random.uniform(0.3, 1.2, (tokens, E)).astype("float32")

  # One token per group: the load of a group is P(x, i) of one token.
  def per_group(a):
    return jnp.asarray(np.repeat(a[None], draws, 0).reshape(-1, 1, E))

  run = jax.jit(gating.noisy_top_k, static_argnames="k")
  got = run(per_group(logits), per_group(noise_std), k=k, rng=KEY)
  load = np.asarray(got.load, np.float64).reshape(draws, tokens, E)
  count = np.asarray(got.count, np.float64).reshape(draws, tokens, E)
  ours = logits + noise_std * random.normal(size=(draws, tokens, E))
  rank = np.argsort(np.argsort(-ours, axis=-1), axis=-1)
  often = load.mean(0)
  error = np.sqrt((load.var(0) + often * (1 - often)) / draws)
  for other in (count, rank < k):
    assert (np.abs(often - other.mean(0)) < 4.5 * error).all()
  total = load.sum(-1)
  error = total.std(0) / np.sqrt(draws)
  assert (np.abs(total.mean(0) - k) < 4.5 * error).all()
  # An estimate, not a count: one draw's sum is not k.
  assert (total.std(0) > 0.05).all()
  noise = noise_of(got, per_group(logits), per_group(noise_std))
  assert abs(noise.mean()) < 4.5 / np.sqrt(noise.size)
  assert abs(noise.var() - 1) < 4.5 * np.sqrt(2 / noise.size)


def test_without_noise_load_is_the_count():
  logits, noise_std, mask = draw(5, masked=True)
  quiet = jnp.zeros_like(noise_std)

  def total(logits, noise_std):
    got = gating.noisy_top_k(logits, noise_std, K, KEY, mask)
    return (got.load * jnp.arange(E, dtype=jnp.float32)[None]).sum()

  got = gating.noisy_top_k(logits, quiet, K, KEY, mask)
  want = gating.top_k(logits, K, mask)
  np.testing.assert_array_equal(got.load, want.count)
  np.testing.assert_array_equal(got.count, want.count)
  np.testing.assert_array_equal(got.assignment.gate, want.assignment.gate)
  slopes = jax.grad(total, (0, 1))(logits, quiet)
  assert (np.asarray(slopes) == 0).all()


def test_less_noise_makes_load_a_count():
  logits, noise_std, _ = draw(6)
  got = gating.noisy_top_k(logits, noise_std * 1e-5, K, KEY)
  np.testing.assert_allclose(got.load, got.count, atol=1e-4)


@pytest.mark.parametrize(
  "noise_std",
  [
    1e-6,
    1e-12,
    1e-20,
    1e-30,
    1e-38,
  ],
)
def test_gradient_is_finite_however_small_the_noise(noise_std):
  """Softplus(-45) is 3e-20: what noise_epsilon = 0 allows."""
  logits, _, _ = draw(6)

  @jax.jit
  def total(logits, noise_std):
    got = gating.noisy_top_k(logits, noise_std, K, KEY)
    return (got.load * jnp.arange(E, dtype=jnp.float32)[None]).sum()

  small = jnp.full_like(logits, noise_std)
  slopes = jax.grad(total, (0, 1))(logits, small)
  assert np.isfinite(np.asarray(slopes)).all()


def test_all_experts_leave_no_room_for_noise():
  logits, noise_std, mask = draw(8, masked=True)

  def run(logits):
    return gating.noisy_top_k(logits, noise_std, E, KEY, mask)

  got = run(logits)
  np.testing.assert_array_equal(
    got.load, np.repeat(np.asarray(mask).sum(1)[:, None], E, axis=1)
  )
  np.testing.assert_array_equal(got.logits, logits)
  slope = jax.grad(lambda logits: run(logits).load.sum())(logits)
  assert (np.asarray(slope) == 0).all()


@pytest.mark.parametrize("k", [-1, 0, E + 1])
@pytest.mark.parametrize("name", ["top_k", "noisy_top_k"])
def test_k_out_of_range_names_both_numbers(name, k):
  logits, noise_std, _ = draw(0)
  more = (noise_std, k, KEY) if name == "noisy_top_k" else (k,)
  with pytest.raises(ValueError, match=rf"k = {k}\b.*\b{E} experts"):
    gating.GATING[name](logits, *more)


def test_ties_go_to_the_lowest_experts():
  got = gating.top_k(jnp.zeros((G, S, E)), K)
  np.testing.assert_array_equal(got.count[0], [S, S, 0, 0, 0])
  np.testing.assert_array_equal(got.assignment.expert[0], [0] * S + [1] * S)
  tied = jnp.asarray([[[0.0, 2, 1, 2, 2]]])
  np.testing.assert_array_equal(
    gating.top_k(tied, 2).assignment.expert, [[1, 3]]
  )
  quiet = gating.noisy_top_k(tied, jnp.zeros_like(tied), 2, KEY)
  np.testing.assert_array_equal(quiet.assignment.expert, [[1, 3]])


@pytest.mark.parametrize("name", gating.GATING)
def test_padding_changes_nothing(name):
  """Whatever stands in masked places, the rest decides the same."""
  logits, noise_std, mask = draw(9, masked=True)
  other = jnp.where(mask[..., None], logits, 50)
  std = jnp.where(mask[..., None], noise_std, 3)
  got = case(name).run(logits, noise_std, mask)
  want = case(name).run(other, std, mask)
  for field in ("assignment", "importance", "load", "count"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(got, field), getattr(want, field)
    )
  padding = np.tile(~np.asarray(mask), (1, case(name).k))
  assert (np.asarray(got.assignment.expert)[padding] == E).all()
  assert (np.asarray(got.assignment.gate)[padding] == 0).all()


@pytest.mark.parametrize("name", gating.GATING)
def test_a_group_of_padding_decides_nothing(name):
  logits, noise_std, _ = draw(9)
  got = case(name).run(logits, noise_std, jnp.zeros((G, S), bool))
  for value in (got.importance, got.load, got.count, got.assignment.gate):
    assert (np.asarray(value) == 0).all()


def test_noise_depends_on_the_group_alone():
  logits, noise_std = jnp.zeros((6, S, E)), jnp.ones((6, S, E))
  six = gating.noisy_top_k(logits, noise_std, K, KEY).logits
  two = gating.noisy_top_k(logits[:2], noise_std[:2], K, KEY).logits
  np.testing.assert_array_equal(six[:2], two)
  # And no two numbers of it are the same.
  assert len(np.unique(six)) == six.size
  other = gating.noisy_top_k(logits, noise_std, K, jax.random.key(8)).logits
  assert not np.isin(np.asarray(other), np.asarray(six)).any()


@functools.cache
def compiled(name, k):
  run = {"top_k": gating.top_k, "softmax": gating.softmax}.get(name)
  if name == "softmax":
    return jax.jit(run)
  if name == "top_k":
    return jax.jit(lambda logits, mask: run(logits, k, mask))
  return jax.jit(
    lambda logits, mask: gating.noisy_top_k(
      logits, jnp.ones_like(logits), k, KEY, mask
    )
  )


@pytest.mark.parametrize("name", gating.GATING)
@hypothesis.given(
  k=st.sampled_from([1, 3, E]),
  logits=arrays("float32", (G, S, E), elements=st.floats(-1e4, 1e4, width=32)),
  mask=arrays(bool, (G, S)),
)
def test_properties(name, k, logits, mask):
  k = E if name == "softmax" else k
  got = compiled(name, k)(logits, mask)
  gates = np.asarray(dense(got.assignment))
  expert = np.asarray(got.assignment.expert).reshape(G, k, S)
  np.testing.assert_allclose(gates.sum(-1), mask, atol=1e-5)
  assert (gates >= 0).all()
  for g in range(G):
    for s in range(S):
      # Exactly k distinct experts, best first, or none.
      assert len(set(expert[g, :, s])) == (k if mask[g, s] else 1)
  gate = np.asarray(got.assignment.gate).reshape(G, k, S)
  assert (np.diff(gate, axis=1) <= 0).all()
  np.testing.assert_array_equal(got.count.sum(-1), k * mask.sum(-1))
  np.testing.assert_allclose(got.importance.sum(-1), mask.sum(-1), atol=1e-4)
  load = np.asarray(got.load)
  assert (load >= 0).all() and (load <= mask.sum(-1)[:, None] + 1e-4).all()
