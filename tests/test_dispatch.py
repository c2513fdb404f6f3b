"""Dispatch against the paper's loops: values, gradients, drops, slots."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
import reference
from assignments import KINDS, E, G, K, S, choices, edges
from hypothesis import strategies as st

from moejax import dispatch, experts, routing, sharding

D, F = 3, 6
FEED_FORWARD = experts.FeedForward(E, F)
NAMES = pytest.mark.parametrize("name", dispatch.DISPATCH)
BY_KIND = pytest.mark.parametrize("kind", KINDS)


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
        at["x"][g], edges(assignment, g, gate), skip_unused, capacity
      )
      for g in range(G)
    ]
  )


def has_slot(assignment, capacity):
  """Which edges are used and have a slot [G, A]."""
  used = np.asarray(assignment.expert) < E
  return used & np.array(
    [reference.has_slot(edges(assignment, g), capacity) for g in range(G)]
  )


def run(name, at, assignment, capacity, expert_fn=FEED_FORWARD.run):
  weights = {key: at[key] for key in ("w_in", "w_out")}
  return dispatch.DISPATCH[name](
    expert_fn, weights, at["x"], assignment, E, capacity
  )


@functools.cache
def compiled(name, capacity):
  """(arrays, assignment, out) -> y and the gradient of sum(y * out)."""

  def score(at, assignment, out):
    assignment = assignment._replace(gate=at["gate"])
    y = run(name, at, assignment, capacity)
    return (y * out).sum(), y

  return jax.jit(jax.value_and_grad(score, has_aux=True))


def value_and_gradient(name, capacity, at, assignment, out):
  at = {**at, "gate": assignment.gate}
  (_, y), slopes = compiled(name, capacity)(at, assignment, out)
  return y, slopes


@pytest.mark.parametrize("capacity", [1, 3, None])
@BY_KIND
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
    assert (has_slot(assignment, capacity) == used).all() == (capacity is None)
    if seed:
      continue

    def score(at, assignment=assignment, out=out):
      return (expected(at, assignment, capacity, at["gate"]) * out).sum()

    everything = {**at, "gate": assignment.gate}
    for key, slope in reference.gradient(score, everything).items():
      np.testing.assert_allclose(slopes[key], slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("capacity", [1, 3])
@BY_KIND
@hypothesis.given(seed=st.integers(0, 2**16))
def test_all_agree_and_what_has_no_slot_has_no_gradient(kind, capacity, seed):
  random = np.random.default_rng(seed)
  at, assignment = draw(seed), KINDS[kind](random)
  # No token at all for the last expert.
  expert = jnp.where(assignment.expert == E - 1, 0, assignment.expert)
  assignment = assignment._replace(expert=expert)
  out = jnp.asarray(random.normal(size=(G, S, D)), jnp.float32)
  fits = has_slot(assignment, capacity)
  visited = np.zeros((G, S), bool)
  np.logical_or.at(visited, (np.arange(G)[:, None], assignment.tokens(S)), fits)
  want = value_and_gradient("einsum", capacity, at, assignment, out)
  for name in dispatch.DISPATCH:
    got = value_and_gradient(name, capacity, at, assignment, out)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, got, want)
    y, slopes = jax.tree.map(np.asarray, got)
    assert (slopes["gate"][~fits] == 0).all()
    assert (slopes["gate"][fits] != 0).any()
    assert (y[~visited] == 0).all() and (slopes["x"][~visited] == 0).all()
    for key in ("w_in", "w_out"):
      assert (slopes[key][E - 1] == 0).all()


@BY_KIND
@NAMES
def test_unused_edges_are_ignored_whatever_they_hold(name, kind):
  """Not even a gate and a token that nobody cleared do anything."""
  at, assignment = draw(3), KINDS[kind](np.random.default_rng(3))
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


@BY_KIND
@NAMES
def test_an_expert_sees_at_most_its_capacity(name, kind):
  """All rows that are no token's are zero, and what is made of them is lost."""
  at = {**draw(0), "x": jnp.ones((G, S, D))}
  assignment = KINDS[kind](np.random.default_rng(0))

  @jax.jit
  def spy(assignment):
    seen = []

    def add(weights, rows, mask=None, group_sizes=None):
      seen.append((rows, mask, group_sizes))
      return rows + 1

    return run(name, at, assignment, 2, add), *seen

  y, (rows, mask, sizes) = spy(assignment)
  expert = np.asarray(assignment.expert)
  count = np.array([(expert == e).sum(axis=1) for e in range(E)])
  assert (count > 2).any()
  # Groups do not share what another has left.
  seen = np.minimum(count, 2)
  if mask is None:
    np.testing.assert_array_equal(sizes, seen.sum(axis=1))
    mask = np.arange(len(rows)) < seen.sum()
  else:
    assert rows.shape == (E, G * 2, D)
    np.testing.assert_array_equal(mask.reshape(E, G, 2).sum(axis=2), seen)
  np.testing.assert_array_equal(
    rows, np.broadcast_to(np.asarray(mask)[..., None], rows.shape)
  )
  total = np.zeros((G, S))
  gates = np.where(has_slot(assignment, 2), assignment.gate, 0)
  np.add.at(total, (np.arange(G)[:, None], assignment.tokens(S)), gates)
  want = np.broadcast_to(2 * total[..., None], y.shape)
  np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)


@NAMES
def test_order_of_tokens_matters_only_to_who_is_dropped(name):
  at, out = draw(4), jnp.ones((G, S, D))
  assignment = choices(np.random.default_rng(4), unused=0)
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


@BY_KIND
@NAMES
def test_bfloat16_activations_stay_bfloat16_and_close(name, kind):
  at, assignment = draw(5), KINDS[kind](np.random.default_rng(5))
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
def test_bad_arguments_are_named(name):
  assignment = choices(np.random.default_rng(0))
  with pytest.raises(ValueError, match=f"capacity 0 .* {E} experts"):
    run(name, draw(0), assignment, 0)
  at = {**draw(0), "x": jnp.ones((G, S, D), jnp.int32)}
  with pytest.raises(ValueError, match="rows are int32, .* give them as float"):
    run(name, at, assignment, 1)


@pytest.mark.parametrize("capacity", [None, 8])
@BY_KIND
@NAMES
def test_memory_grows_with_the_slots_alone(name, kind, capacity):
  """But for "einsum", whose masks have tokens times slots."""
  tokens, num_experts, slots = 64, 16, capacity or 64
  shape = (1, tokens, K)
  assignment = routing.from_token_choice(
    jnp.zeros(shape, jnp.int32), jnp.ones(shape)
  )
  if kind == "edge_list":
    assignment = assignment._replace(token=assignment.tokens(tokens))
  module = experts.FeedForward(num_experts, 2)

  def score(x, weights, gate):
    return dispatch.DISPATCH[name](
      module.run,
      weights,
      x,
      assignment._replace(gate=gate),
      num_experts,
      capacity,
    ).sum()

  weights = dict.fromkeys(("w_in", "w_out"), jnp.ones((num_experts, 2, 2)))
  args = jnp.ones((1, tokens, 2)), weights, assignment.gate
  compiled = jax.jit(jax.grad(score, (0, 1, 2))).lower(*args).compile()
  entries = compiled.memory_analysis().temp_size_in_bytes / 4
  mask = tokens * num_experts * slots
  assert (entries >= mask) == (name == "einsum")


@BY_KIND
@pytest.mark.parametrize("name", ["einsum", "gather"])
def test_dispatch_and_combine(name, kind):
  """What is in each slot, of two kinds of experts, and where it comes back."""
  x, assignment = draw(6)["x"], KINDS[kind](np.random.default_rng(6))
  C, of_kinds = 2, (1, E - 1)

  @jax.jit
  def there_and_back(x, assignment):
    sent = dispatch.dispatch(name, x, assignment, of_kinds, C)
    return sent[:3], sent.combine(sent.rows)

  parts, y = there_and_back(x, assignment)
  assert [a.shape for a in parts[1]] == [(n, G, C) for n in of_kinds]
  rows, mask, gate = map(np.concatenate, parts)
  for e, g in np.ndindex(E, G):
    mine = [edge for edge in edges(assignment, g) if edge[1] == e]
    for slot in range(C):
      taken = slot < len(mine)
      token, _, weight = mine[slot] if taken else (0, 0, 0.0)
      assert mask[e, g, slot] == taken
      np.testing.assert_allclose(gate[e, g, slot], weight, rtol=1e-6)
      want = x[g, token] if taken else 0 * x[0, 0]
      np.testing.assert_array_equal(rows[e, g, slot], want)
  want = [
    reference.dispatch(
      np.asarray(x[g], np.float64),
      [edge for edge in edges(assignment, g) if edge[1] < E],
      lambda e, row: row,
      C,
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
    ("tpu", 4, True, 8192, "gather"),
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
