"""Routing: the edge list, its order and its sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decisions import CASES, drop, edges, make_level, make_mask

from moejax import gating, losses, routing
from moejax.routing import Assignment

G, S, K, E = 2, 3, 2, 4


def choices(seed=0):
  random = np.random.default_rng(seed)
  expert = random.integers(0, E, (G, S, K)).astype("int32")
  return expert, random.random((G, S, K)).astype("float32")


def test_first_choices_come_before_second_choices():
  expert, gate = choices()
  got = routing.from_token_choice(jnp.asarray(expert), jnp.asarray(gate))
  order = [(s, k) for k in range(K) for s in range(S)]
  for g in range(G):
    want = [(s, expert[g, s, k], gate[g, s, k]) for s, k in order]
    found = zip(got.tokens(S)[g], got.expert[g], got.gate[g], strict=True)
    assert list(found) == want


def test_first_picks_come_before_second_picks():
  C = 3
  random = np.random.default_rng(1)
  token = random.integers(0, S, (G, E, C)).astype("int32")
  gate = random.random((G, E, C)).astype("float32")
  used = random.random((G, E, C)) < 0.5
  got = routing.from_expert_choice(*map(jnp.asarray, (token, gate, used)))
  order = [(e, c) for c in range(C) for e in range(E)]
  for g in range(G):
    found = zip(got.expert[g], got.gate[g], got.tokens(S)[g], strict=True)
    for at, (expert, weight, start) in zip(order, found, strict=True):
      if used[g][at]:
        assert (expert, weight, start) == (at[0], gate[g][at], token[g][at])
      else:
        assert (expert, weight) == (E, 0)


def test_merged_groups_keep_first_choices_first():
  random = np.random.default_rng(2)
  expert = random.integers(0, E + 1, (G, K * S)).astype("int32")
  gate = random.random((G, K * S)).astype("float32")
  edges = Assignment(jnp.asarray(expert), jnp.asarray(gate))
  got = routing.flatten_groups(edges, S)
  assert got.token is None
  order = [(g, k * S + s) for k in range(K) for g in range(G) for s in range(S)]
  np.testing.assert_array_equal(got.expert, [expert[at] for at in order])
  np.testing.assert_array_equal(got.gate, [gate[at] for at in order])


def test_merged_groups_keep_their_tokens():
  random = np.random.default_rng(3)
  expert = random.integers(0, E + 1, (G, 11)).astype("int32")
  gate = random.random((G, 11)).astype("float32")
  # The last of each group names no token at all.
  token = random.integers(0, S, (G, 11)).astype("int32")
  token[:, -1] = S
  edges = Assignment(*map(jnp.asarray, (expert, gate, token)))
  want = [t + g * S if t < S else G * S for g in range(G) for t in token[g]]
  flat = expert.reshape(-1), gate.reshape(-1), want
  for found, wanted in zip(routing.flatten_groups(edges, S), flat, strict=True):
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("picks", [False, True])
def test_groups_that_are_together_are_one(picks):
  """With the tokens, edges and sums of all."""
  decision = drop(make_level(5, 4, E, (4, E), make_mask(5, 4, 1), picks))
  got = jax.jit(routing.merge_groups, static_argnums=1)(decision, 2)
  for name in ("importance", "load", "count", "dropped", "dropped_first"):
    before = np.asarray(getattr(decision, name))
    np.testing.assert_allclose(getattr(got, name), before[::2] + before[1::2])
  S = decision.mask.shape[1]
  np.testing.assert_array_equal(got.mask, decision.mask.reshape(2, 2 * S))
  logits = decision.logits.reshape(2, 2 * S, E)
  np.testing.assert_array_equal(got.logits, logits)
  for g in range(2):
    first, second = (edges(decision, at) for at in (2 * g, 2 * g + 1))
    want = first + [(s + S, e, gate) for s, e, gate in second]
    assert sorted(edges(got, g)) == sorted(want)


def concatenate(first, second):
  """One batch of the groups of two."""
  axis = 0 if first.primary is None else 1
  tokens = ("assignment", "logits", "mask")
  sums = ("importance", "load", "count", "dropped", "dropped_first")

  def both(axis, name):
    return jax.tree.map(
      lambda *values: jnp.concatenate(values, axis),
      getattr(first, name),
      getattr(second, name),
    )

  above = first.primary and concatenate(first.primary, second.primary)
  return first._replace(
    **{name: both(axis, name) for name in tokens},
    **{name: both(0, name) for name in sums},
    primary=above,
  )


@pytest.mark.parametrize("case", CASES)
def test_batches_that_are_joined_are_as_one(case):
  """In every loss and report, of the whole and of each group."""

  def report(decision):
    each = {
      (name, scope): loss(decision, scope)
      for name, loss in losses.LOSSES.items()
      for scope in losses.SCOPES
    }
    return each, losses.balance(decision)

  def other(decision):
    return decision._replace(
      logits=decision.logits[..., ::-1] * 2,
      importance=decision.importance[:, ::-1] * 3,
      load=decision.load[:, ::-1],
      count=decision.count * 2,
      primary=decision.primary and other(decision.primary),
    )

  first, second = CASES[case], other(CASES[case])
  stacked = jax.tree.map(lambda *values: jnp.stack(values), first, second)

  @jax.jit
  def both():
    return report(routing.stack_microbatches(stacked)), report(
      concatenate(first, second)
    )

  got, want = both()
  assert want[0]["threshold", "batch"] != 0
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, got, want)


def moved(fn, decision, *axes):
  """What becomes of groups on 8 devices: kinds of moves between these."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("group",))
  spec = jax.sharding.PartitionSpec(*axes)
  decision = jax.device_put(decision, jax.sharding.NamedSharding(mesh, spec))
  text = jax.jit(fn).lower(decision).compile().as_text()
  kinds = ("all-gather", "all-to-all", "collective-permute")
  return [kind for kind in kinds if kind in text]


def test_joined_groups_stay_where_they_lie():
  """What is stacked is joined without a word."""
  decision = make_level(0, 8, E, (8, E))._replace(thresholds=None, bias=None)
  stacked = jax.tree.map(lambda value: jnp.stack([value, value]), decision)
  assert not moved(routing.stack_microbatches, stacked, None, "group")


def test_groups_that_are_together_stay_where_they_lie(number=4):
  """Their losses cost sums."""
  decision = make_level(0, 8, E, (8, E))._replace(thresholds=None, bias=None)

  def report(decision):
    decision = routing.merge_groups(drop(decision), number)
    values = [loss(decision) for loss in losses.LOSSES.values()]
    return values, losses.balance(decision)

  assert not moved(report, decision, "group")


def test_sums_of_a_bfloat16_router_do_not_end_at_256():
  logits = jax.random.normal(jax.random.key(0), (1, 2000, 4), jnp.bfloat16)
  found = gating.top_k(logits, 2)
  assert int(found.count.sum()) == 4000
  np.testing.assert_allclose(found.importance.sum(), 2000, rtol=1e-2)
