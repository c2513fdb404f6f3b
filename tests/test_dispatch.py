"""Dispatch against the paper's loops: values, gradients, drops, slots."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
import reference
from assignments import KINDS, E, G, K, S, choices, each, edges
from hypothesis import strategies as st

from moejax import dispatch, experts, routing, sharding
from moejax.slots import Block

D, F = 3, 6
FEED_FORWARD = experts.FeedForward(E, F)
BLOCKS = (Block(1, 3), Block(2, 1), Block(1, 2))
NAMES = pytest.mark.parametrize("name", dispatch.DISPATCH)


def draw(seed):
  """Draws x and the weights of feed-forward experts."""
  random = np.random.default_rng(seed)
  shapes = {"x": (G, S, D), "w_in": (E, D, F), "w_out": (E, F, D)}
  return {
    name: jnp.asarray(random.normal(size=shape), jnp.float32)
    for name, shape in shapes.items()
  }


def expected(at, assignment, capacity, gate=None):
  """The reference's y of all groups."""
  expert = reference.feed_forward(at)

  def skip_unused(e, row):
    return expert(e, row) if e < E else 0 * row

  return np.stack(
    [
      reference.dispatch(
        at["x"][g], edges(assignment, g, gate), skip_unused, each(capacity)
      )
      for g in range(G)
    ]
  )


def seated(assignment, capacity):
  """Which edges are used and win a slot [G, A]."""
  used = np.asarray(assignment.expert) < E
  return used & np.array(
    [reference.seated(edges(assignment, g), each(capacity)) for g in range(G)]
  )


def feed_forward(weights, rows, real):
  """Runs the experts; blocks of them one after the other."""
  if not isinstance(rows, tuple):
    return FEED_FORWARD.run(weights, rows, real)
  back, first = [], 0
  for part, taken in zip(rows, real, strict=True):
    assert taken.shape == part.shape[:2]
    end = first + part.shape[0]
    own = {key: w[first:end] for key, w in weights.items()}
    back.append(FEED_FORWARD.run(own, part, taken))
    first = end
  return tuple(back)


def run(name, at, assignment, capacity, expert_fn=feed_forward):
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


@pytest.mark.parametrize("capacity", [1, 3, None, BLOCKS])
@pytest.mark.parametrize("kind", KINDS)
@NAMES
def test_matches_the_paper(name, kind, capacity):
  for seed in range(4):
    random = np.random.default_rng(seed)
    at, assignment = draw(seed), KINDS[kind](random)
    out = random.normal(size=(G, S, D))
    y, slopes = value_and_gradient(
      name, capacity, at, assignment, jnp.asarray(out, jnp.float32)
    )
    want = expected(kinds.in_float64(at), assignment, capacity)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    used = np.asarray(assignment.expert) < E
    assert (seated(assignment, capacity) == used).all() == (capacity is None)
    if seed:
      continue

    def score(at, assignment=assignment, out=out):
      return (expected(at, assignment, capacity, at["gate"]) * out).sum()

    everything = {**at, "gate": assignment.gate}
    for key, slope in reference.gradient(score, everything).items():
      np.testing.assert_allclose(slopes[key], slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("capacity", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@NAMES
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
@NAMES
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
  got, slopes = value_and_gradient(name, 3, at, stale, out)
  want, want_slopes = value_and_gradient(name, 3, at, assignment, out)
  np.testing.assert_array_equal(got, want)
  assert (np.asarray(slopes["gate"])[np.asarray(unused)] == 0).all()
  for key in ("x", "w_in", "w_out"):
    np.testing.assert_allclose(slopes[key], want_slopes[key], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@NAMES
def test_an_expert_sees_at_most_its_capacity(name, kind):
  """And all rows that are no token's are zero."""

  @jax.jit
  def spy(assignment):
    seen = []

    def look(weights, rows, real):
      seen.append((rows, real))
      return rows

    at = {**draw(0), "x": jnp.ones((G, S, D))}
    run(name, at, assignment, 2, look)
    return seen[0]

  assignment = KINDS[kind](np.random.default_rng(0))
  rows, real = map(np.asarray, spy(assignment))
  expert = np.asarray(assignment.expert)
  count = np.array([(expert == e).sum(axis=1) for e in range(E)])
  assert (count > 2).any()
  # Groups share the capacity of none.
  seen = np.minimum(count, 2)
  if real.ndim == 1:
    np.testing.assert_array_equal(real, seen.sum(axis=1))
    taken = np.arange(len(rows)) < real.sum()
  else:
    assert rows.shape == (E, G * 2, D)
    np.testing.assert_array_equal(real.reshape(E, G, 2).sum(axis=2), seen)
    taken = real
  np.testing.assert_array_equal(
    rows, np.broadcast_to(taken[..., None], rows.shape)
  )


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@NAMES
def test_identity_experts_give_x_back(name, kind, more):
  """And those that add 1 give x + 1: what they make of no row is lost."""
  random = np.random.default_rng(1)
  at, assignment = draw(1), KINDS[kind](random)
  total = np.zeros((G, S))
  where = (np.arange(G)[:, None], np.asarray(assignment.tokens(S)))
  np.add.at(total, where, np.asarray(assignment.gate))
  gate = assignment.gate / np.maximum(total, 1e-9)[where].astype("float32")
  assert (gate == 0).any()
  stale = assignment._replace(gate=jnp.where(gate == 0, 7, gate))

  def add(weights, rows, real):
    return rows + jnp.float32(more)

  y = jax.jit(lambda at: run(name, at, stale, None, add))(at)
  want = (np.asarray(at["x"]) + more) * (total > 0)[..., None]
  np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)


@NAMES
def test_order_of_tokens_matters_only_to_who_is_dropped(name):
  random = np.random.default_rng(4)
  at, out = draw(4), jnp.ones((G, S, D))
  assignment = choices(random, unused=0)
  order = np.arange(S)[::-1]

  def turned(a):
    return a.reshape(G, K, S)[..., order].reshape(G, K * S)

  other = assignment._replace(
    expert=turned(assignment.expert), gate=turned(assignment.gate)
  )
  back = {**at, "x": at["x"][:, order]}
  for capacity in (None, 1):
    y, _ = value_and_gradient(name, capacity, at, assignment, out)
    turned_y, _ = value_and_gradient(name, capacity, back, other, out)
    same = np.allclose(turned_y[:, order], y, rtol=1e-5, atol=1e-5)
    assert same == (capacity is None)


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
@NAMES
def test_bfloat16_activations_stay_bfloat16_and_close(name, kind):
  random = np.random.default_rng(5)
  at, assignment = draw(5), KINDS[kind](random)
  at["x"] = at["x"].astype(jnp.bfloat16)
  y, slopes = value_and_gradient(
    name, 3, at, assignment, jnp.ones((G, S, D), jnp.bfloat16)
  )
  assert y.dtype == slopes["x"].dtype == jnp.bfloat16
  assert slopes["gate"].dtype == slopes["w_in"].dtype == jnp.float32
  want = expected(kinds.in_float64(at), assignment, 3)
  scale = np.abs(want).max()
  np.testing.assert_allclose(y.astype(jnp.float32), want, atol=0.02 * scale)


@NAMES
def test_bad_capacities_name_both_numbers(name):
  assignment = choices(np.random.default_rng(0))
  with pytest.raises(ValueError, match=f"capacity 0 .* {E} experts"):
    run(name, draw(0), assignment, 0)
  blocks = (Block(2, 3), Block(E, 3))
  with pytest.raises(ValueError, match=rf"\b{E + 2} experts.*\b{E}\b"):
    run(name, draw(0), assignment, blocks)


def arrays(jaxpr):
  """All arrays that are made on the way, also by what is called."""
  for eqn in jaxpr.eqns:
    yield from (v.aval for v in eqn.outvars)
    for value in jax.tree.leaves(eqn.params):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from arrays(inner)


@pytest.mark.parametrize("capacity", [None, 8])
@pytest.mark.parametrize("kind", KINDS)
@NAMES
def test_only_products_make_an_array_of_tokens_by_slots(name, kind, capacity):
  """Neither forward nor backward, though slots alone take far less."""
  tokens, num_experts, slots = 64, 16, capacity or 64
  shape = (1, tokens, K)
  assignment = routing.from_token_choice(
    jnp.zeros(shape, jnp.int32), jnp.ones(shape)
  )
  if kind == "edge_list":
    assignment = assignment._replace(token=assignment.tokens(tokens))
  module = experts.FeedForward(num_experts, 2)

  def score(x, w_in, w_out, gate):
    return dispatch.DISPATCH[name](
      module.run,
      {"w_in": w_in, "w_out": w_out},
      x,
      assignment._replace(gate=gate),
      num_experts,
      capacity,
    ).sum()

  jaxpr = jax.make_jaxpr(jax.grad(score, (0, 1, 2, 3)))(
    jnp.ones((1, tokens, 2)),
    jnp.ones((num_experts, 2, 2)),
    jnp.ones((num_experts, 2, 2)),
    assignment.gate,
  )
  largest = max(aval.size for aval in arrays(jaxpr.jaxpr))
  if name == "einsum":
    assert largest >= tokens * num_experts * slots
  else:
    assert largest <= 4 * max(num_experts * slots, K * tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["einsum", "gather"])
def test_a_trip_there_and_back(name, kind):
  """What stands in each slot, block by block, and where it comes home."""
  random = np.random.default_rng(6)
  x, assignment = draw(6)["x"], KINDS[kind](random)

  @jax.jit
  def there_and_back(x, assignment):
    trip = dispatch.depart(name, x, assignment, E, BLOCKS)
    return trip.rows, trip.real, trip.gate, trip.home(trip.rows)

  rows, real, gate, y = there_and_back(x, assignment)
  first = 0
  for b, block in enumerate(BLOCKS):
    shape = (block.num_experts, G, block.capacity)
    assert rows[b].shape == (*shape, D)
    assert real[b].shape == gate[b].shape == shape
    for e, g in np.ndindex(shape[:2]):
      mine = [edge for edge in edges(assignment, g) if edge[1] == first + e]
      for slot in range(block.capacity):
        taken = slot < len(mine)
        token, _, weight = mine[slot] if taken else (0, 0, 0.0)
        assert real[b][e, g, slot] == taken
        np.testing.assert_allclose(gate[b][e, g, slot], weight, rtol=1e-6)
        np.testing.assert_array_equal(
          rows[b][e, g, slot], x[g, token] if taken else 0 * x[0, 0]
        )
    first += block.num_experts
  at = {"x": np.asarray(x, np.float64)}
  want = [
    reference.dispatch(
      at["x"][g], edges(assignment, g), lambda e, row: row, each(BLOCKS)
    )
    for g in range(G)
  ]
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "platform, capacity, needs_slots, edges, want",
  [
    ("cpu", None, False, 8192, "ragged"),
    ("cpu", None, False, 8, "ragged"),
    ("cpu", 4, False, 8192, "ragged"),
    ("cpu", 4, False, 2048, "gather"),
    ("cpu", None, True, 8192, "gather"),
    ("gpu", None, False, 8192, "ragged"),
    ("tpu", 4, False, 8192, "gather"),
    ("tpu", BLOCKS, True, 8192, "gather"),
  ],
)
def test_auto_is_what_measured_fastest(
  platform, capacity, needs_slots, edges, want, monkeypatch
):
  """Where experts are split over devices, slots, but not S of them each."""
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  split = want if capacity is None else "gather"
  args = capacity, needs_slots, edges
  for name, expected in (("replicated", want), ("expert", split)):
    layout = sharding.LAYOUTS[name]
    with sharding.use(layout, sharding.make_mesh(layout)):
      assert dispatch.fastest(*args) == expected
  assert dispatch.fastest(*args) == want
