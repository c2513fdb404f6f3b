"""Dispatch against the paper's loops: values, gradients, drops, slots."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import strategies as st

from moejax import dispatch, experts, routing
from moejax.routing import Assignment

G, S, D, E, F, K = 2, 5, 3, 4, 6, 2
FEED_FORWARD = experts.FeedForward(E, F)


def draw(seed):
  """Draws x and the weights of feed-forward experts."""
  random = np.random.default_rng(seed)
  x = random.normal(size=(G, S, D))
  w_in = random.normal(size=(E, D, F))
  w_out = random.normal(size=(E, F, D))
  return {
    "x": jnp.asarray(x, jnp.float32),
    "w_in": jnp.asarray(w_in, jnp.float32),
    "w_out": jnp.asarray(w_out, jnp.float32),
  }


def choices(random, unused=0.15):
  """Every token chooses K distinct experts; a few tokens are padding."""
  order = np.argsort(random.random((G, S, E)), -1)
  # Skewed, so that experts overflow: most tokens want expert 0.
  order[random.random((G, S)) < 0.5] = np.arange(E)
  padding = random.random((G, S)) < unused
  expert = np.where(padding[..., None], E, order[..., :K]).astype("int32")
  gate = random.uniform(0.1, 1, (G, S, K)) * ~padding[..., None]
  return routing.from_choices(
    jnp.asarray(expert), jnp.asarray(gate, jnp.float32)
  )


def edge_list(random, num_edges=13):
  """Any edges: tokens repeat, some edges are unused, experts overflow."""
  shape = (G, num_edges)
  expert = random.integers(0, E + 1, shape)
  expert = np.where(random.random(shape) < 0.3, 0, expert).astype("int32")
  gate = random.uniform(0.1, 1, shape) * (expert < E)
  token = random.integers(0, S, shape).astype("int32")
  return Assignment(
    jnp.asarray(expert), jnp.asarray(gate, jnp.float32), jnp.asarray(token)
  )


KINDS = {"choices": choices, "edge_list": edge_list}


def edges(assignment, g, gate=None):
  """All edges of group g for the reference: unused ones too, as gate 0."""
  gate = np.asarray(assignment.gate if gate is None else gate, np.float64)
  listed = zip(
    assignment.tokens(S)[g], assignment.expert[g], gate[g], strict=True
  )
  return [(int(t), int(e), float(w)) for t, e, w in listed]


def expected(at, assignment, capacity, gate=None):
  """The reference's y of all groups."""
  expert = reference.feed_forward(at)

  def skip_unused(e, row):
    return expert(e, row) if e < E else 0 * row

  return np.stack(
    [
      reference.dispatch(
        at["x"][g], edges(assignment, g, gate), skip_unused, capacity
      )
      for g in range(G)
    ]
  )


def seated(assignment, capacity):
  """Which edges are used and win a slot [G, A]."""
  used = np.asarray(assignment.expert) < E
  return used & np.array(
    [reference.seated(edges(assignment, g), capacity) for g in range(G)]
  )


def in_float64(arrays):
  return {name: np.asarray(a, np.float64) for name, a in arrays.items()}


def run(name, at, assignment, capacity, expert_fn=FEED_FORWARD.run):
  weights = {key: at[key] for key in ("w_in", "w_out")}
  return dispatch.DISPATCH[name](
    expert_fn, weights, at["x"], assignment, E, capacity
  )


@functools.cache
def compiled(name, capacity):
  """(arrays, gate, assignment, out) -> y and the gradient of sum(y * out)."""

  def score(at, gate, assignment, out):
    y = run(name, at, assignment._replace(gate=gate), capacity)
    return (y * out).sum(), y

  return jax.jit(jax.value_and_grad(score, (0, 1), has_aux=True))


def value_and_gradient(name, capacity, at, assignment, out):
  (_, y), (to_arrays, to_gate) = compiled(name, capacity)(
    at, assignment.gate, assignment, out
  )
  return y, {**to_arrays, "gate": to_gate}


@pytest.mark.parametrize("capacity", [1, 2, 3, S])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", dispatch.DISPATCH)
def test_matches_the_paper(name, kind, capacity):
  for seed in range(4):
    random = np.random.default_rng(seed)
    at, assignment = draw(seed), KINDS[kind](random)
    out = random.normal(size=(G, S, D))
    y, slopes = value_and_gradient(
      name, capacity, at, assignment, jnp.asarray(out, jnp.float32)
    )
    want = expected(in_float64(at), assignment, capacity)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    if seed:
      continue

    def score(at, assignment=assignment, out=out):
      return (expected(at, assignment, capacity, at["gate"]) * out).sum()

    everything = {**at, "gate": assignment.gate}
    for key, slope in reference.gradient(score, everything).items():
      np.testing.assert_allclose(slopes[key], slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("capacity", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", dispatch.DISPATCH)
@hypothesis.given(seed=st.integers(0, 2**16))
def test_what_has_no_seat_has_no_gradient(name, kind, capacity, seed):
  random = np.random.default_rng(seed)
  at, assignment = draw(seed), KINDS[kind](random)
  # No token at all for the last expert.
  expert = jnp.where(assignment.expert == E - 1, 0, assignment.expert)
  assignment = assignment._replace(expert=expert)
  y, slopes = value_and_gradient(
    name, capacity, at, assignment, jnp.ones((G, S, D))
  )
  y, gate = np.asarray(y), np.asarray(slopes["gate"])
  has_seat = seated(assignment, capacity)
  assert (gate[~has_seat] == 0).all()
  assert (gate[has_seat] != 0).any()
  visited = np.zeros((G, S), bool)
  np.logical_or.at(
    visited, (np.arange(G)[:, None], assignment.tokens(S)), has_seat
  )
  assert (y[~visited] == 0).all()
  assert (np.asarray(slopes["x"])[~visited] == 0).all()
  for key in ("w_in", "w_out"):
    assert (np.asarray(slopes[key])[E - 1] == 0).all()
    assert (np.asarray(slopes[key])[0] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", dispatch.DISPATCH)
def test_unused_edges_are_ignored_whatever_they_hold(name, kind):
  """Not even a gate and a token that nobody cleared do anything."""
  random = np.random.default_rng(3)
  at, assignment = draw(3), KINDS[kind](random)
  unused = assignment.expert == E
  assert unused.any()
  stale = assignment._replace(gate=jnp.where(unused, 7, assignment.gate))
  if assignment.token is not None:
    stale = stale._replace(token=jnp.where(unused, S, assignment.token))
  out = jnp.ones((G, S, D))
  got, slopes = value_and_gradient(name, 2, at, stale, out)
  want, want_slopes = value_and_gradient(name, 2, at, assignment, out)
  np.testing.assert_array_equal(got, want)
  assert (np.asarray(slopes["gate"])[np.asarray(unused)] == 0).all()
  for key in ("x", "w_in", "w_out"):
    np.testing.assert_allclose(slopes[key], want_slopes[key], rtol=1e-6)


@pytest.mark.parametrize("name", dispatch.DISPATCH)
def test_an_expert_sees_at_most_its_capacity(name):
  """And as many slots as promised: E experts of G * C rows."""
  seen = []

  def spy(weights, rows):
    seen.append(np.asarray(rows))
    return rows

  random = np.random.default_rng(0)
  at = {**draw(0), "x": jnp.ones((G, S, D))}
  assignment = edge_list(random)
  run(name, at, assignment, 2, spy)
  assert seen[0].shape == (E, G * 2, D)
  filled = (seen[0][..., 0] != 0).reshape(E, G, 2).sum(-1)
  count = np.stack([(assignment.expert == e).sum(1) for e in range(E)])
  np.testing.assert_array_equal(filled, np.minimum(count, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", dispatch.DISPATCH)
def test_identity_experts_give_x_back(name, kind):
  random = np.random.default_rng(1)
  at, assignment = draw(1), KINDS[kind](random)
  total = np.zeros((G, S))
  where = (np.arange(G)[:, None], np.asarray(assignment.tokens(S)))
  np.add.at(total, where, np.asarray(assignment.gate))
  gate = assignment.gate / np.maximum(total, 1e-9)[where].astype("float32")
  y = run(
    name, at, assignment._replace(gate=gate), 16, lambda weights, rows: rows
  )
  want = np.asarray(at["x"]) * (total > 0)[..., None]
  np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", dispatch.DISPATCH)
def test_order_of_tokens_matters_only_to_who_is_dropped(name):
  random = np.random.default_rng(4)
  at = draw(4)
  assignment = choices(random, unused=0)
  order = np.arange(S)[::-1]

  def turned(a):
    return a.reshape(G, K, S)[..., order].reshape(G, K * S)

  other = assignment._replace(
    expert=turned(assignment.expert), gate=turned(assignment.gate)
  )
  back = {**at, "x": at["x"][:, order]}
  whole = run(name, at, assignment, S)
  np.testing.assert_allclose(
    run(name, back, other, S)[:, order], whole, rtol=1e-5, atol=1e-5
  )
  assert not np.allclose(
    run(name, back, other, 1)[:, order], run(name, at, assignment, 1)
  )


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(seed=st.integers(0, 2**16))
def test_dispatchers_agree(kind, seed):
  random = np.random.default_rng(seed)
  at, assignment = draw(seed), KINDS[kind](random)
  out = jnp.asarray(random.normal(size=(G, S, D)), jnp.float32)
  want = value_and_gradient("einsum", 3, at, assignment, out)
  for name in dispatch.DISPATCH:
    got = value_and_gradient(name, 3, at, assignment, out)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", dispatch.DISPATCH)
def test_bfloat16_activations_stay_bfloat16_and_close(name, kind):
  random = np.random.default_rng(5)
  at, assignment = draw(5), KINDS[kind](random)
  at["x"] = at["x"].astype(jnp.bfloat16)
  y, slopes = value_and_gradient(
    name, 3, at, assignment, jnp.ones((G, S, D), jnp.bfloat16)
  )
  assert y.dtype == slopes["x"].dtype == jnp.bfloat16
  assert slopes["gate"].dtype == slopes["w_in"].dtype == jnp.float32
  want = expected(in_float64(at), assignment, 3)
  scale = np.abs(want).max()
  np.testing.assert_allclose(y.astype(jnp.float32), want, atol=0.02 * scale)


@pytest.mark.parametrize(
  "edges, tokens, num_experts, factor, minimum, want",
  [
    (128, 64, 8, 1.0, 4, 16),
    (128, 64, 8, 1.25, 4, 20),
    (128, 64, 7, 1.0, 4, 19),  # 18.3: rounded up
    (128, 64, 64, 1.0, 4, 4),  # the mean is 2, the minimum is 4
    (128, 64, 64, 1.0, 1, 2),
    (12, 3, 2, 1.0, 4, 3),  # no expert can get more than every token
    (128, 64, 8, 100.0, 4, 64),
    (128, 64, 8, None, 4, 64),
    (100, 100, 10, 1.1, 4, 11),  # not 12, as 100 * 1.1 would say
  ],
)
def test_capacity(edges, tokens, num_experts, factor, minimum, want):
  got = dispatch.capacity(edges, tokens, num_experts, factor, minimum)
  assert got == want


@pytest.mark.parametrize("factor", [0.0, -1.25, float("nan"), float("inf")])
def test_capacity_must_be_positive(factor):
  with pytest.raises(ValueError, match=rf"{factor}.*\b8 experts"):
    dispatch.capacity(128, 64, 8, factor)


def test_capacity_has_a_minimum_of_four():
  assert dispatch.capacity(16, 16, 16, 1.0) == 4
