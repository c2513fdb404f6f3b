"""Dispatch against the paper's loops: values, gradients, drops, slots."""

import functools

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
import reference

from moejax import dispatch, experts, gating, routing, sharding

G, S, D, E, F, K = 2, 6, 3, 4, 6, 2
FEED_FORWARD = experts.FeedForward(E, F)
NAMES = pytest.mark.parametrize("name", dispatch.DISPATCH)
# Tokens choose, or experts.
GATES = {"choices": gating.top_k, "edge_list": gating.expert_choice}
BY_KIND = pytest.mark.parametrize("kind", GATES)


def draw(seed, kind="choices"):
  """Draws x, the weights of experts, and an assignment.

  Most tokens want the first expert, and some are padding.
  """
  random = np.random.default_rng(seed)
  shapes = {"x": (G, S, D), "w_in": (E, D, F), "w_out": (E, F, D)}
  at = {
    name: kinds.to_device(random.normal(size=shape))
    for name, shape in shapes.items()
  }
  logits = random.normal(size=(G, S, E)) + [1, 0, 0, 0]
  mask = jnp.asarray(random.random((G, S)) < 0.8).at[:, 0].set(False)
  found = GATES[kind](jnp.asarray(logits, jnp.float32), K, mask)
  return at, found.assignment


def used_edges(assignment, g):
  """Those of group g for the reference."""
  token, (expert, gate, _) = assignment.tokens(S), assignment
  listed = zip(token[g], expert[g], np.float64(gate[g]), strict=True)
  return [(int(t), int(e), w) for t, e, w in listed if e < E]


def run(name, at, assignment, capacity):
  weights = {key: at[key] for key in ("w_in", "w_out")}
  run = dispatch.DISPATCH[name]
  expert_fn = experts.FeedForward(E, F).run
  return run(expert_fn, weights, at["x"], assignment, E, capacity)


@NAMES
def test_bad_arguments_are_named(name):
  at, assignment = draw(0)
  with pytest.raises(ValueError, match=f"capacity 0 .* {E} experts"):
    run(name, at, assignment, 0)
  at["x"] = jnp.ones((G, S, D), jnp.int32)
  with pytest.raises(ValueError, match="rows are int32, .* give them as float"):
    run(name, at, assignment, 1)


@BY_KIND
@NAMES
def test_memory_grows_with_the_slots_alone(name, kind):
  """But for "einsum", whose masks have tokens times slots."""
  tokens, num_experts, slots = 64, 16, 8
  shape = (1, tokens, K)
  assignment = routing.from_token_choice(
    jnp.zeros(shape, jnp.int32), jnp.ones(shape)
  )
  if kind == "edge_list":
    assignment = assignment._replace(token=assignment.tokens(tokens))
  module = experts.FeedForward(num_experts, 2)
  run = functools.partial(dispatch.DISPATCH[name], module.run)

  def score(x, weights, gate):
    edges = assignment._replace(gate=gate)
    return run(weights, x, edges, num_experts, slots).sum()

  weights = dict.fromkeys(("w_in", "w_out"), jnp.ones((num_experts, 2, 2)))
  args = jnp.ones((1, tokens, 2)), weights, assignment.gate
  compiled = jax.jit(jax.grad(score, (0, 1, 2))).lower(*args).compile()
  entries = compiled.memory_analysis().temp_size_in_bytes / 4
  assert (entries >= tokens * num_experts * slots) == (name == "einsum")


@BY_KIND
@pytest.mark.parametrize("name", ["einsum", "gather"])
def test_dispatch_and_combine(name, kind):
  """What is in each slot, of two kinds of experts, and where it comes back."""
  at, assignment = draw(6, kind)
  x, C, of_kinds = at["x"], 2, (1, E - 1)

  @jax.jit
  def there_and_back(x, assignment):
    sent = dispatch.dispatch(name, x, assignment, of_kinds, C)
    return sent[:4], sent.combine(sent.rows)

  parts, y = there_and_back(x, assignment)
  assert [a.shape for a in parts[1]] == [(n, G, C) for n in of_kinds]
  rows, mask, gate, tokens = map(np.concatenate, parts)
  for e, g in np.ndindex(E, G):
    mine = [edge for edge in used_edges(assignment, g) if edge[1] == e]
    for slot in range(C):
      taken = slot < len(mine)
      token, _, weight = mine[slot] if taken else (0, 0, 0.0)
      assert mask[e, g, slot] == taken and tokens[e, g, slot] == token
      np.testing.assert_allclose(gate[e, g, slot], weight, rtol=1e-6)
      want = x[g, token] if taken else 0 * x[0, 0]
      np.testing.assert_array_equal(rows[e, g, slot], want)
  for g in range(G):
    listed, rows = used_edges(assignment, g), np.float64(x[g])
    want = reference.dispatch(rows, listed, lambda e, row: row, C)
    np.testing.assert_allclose(y[g], want, rtol=1e-5, atol=1e-6)


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
