"""Slots: how edges are sorted, which get a slot, which are dropped."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moejax import slots
from moejax.routing import Assignment

G, E, A, C = 2, 4, 11, 2
EXPERTS = arrays("int32", (A,), elements=st.integers(0, E))
sort_by_expert = jax.jit(slots.sort_by_expert, static_argnums=1)
assign_slots = jax.jit(slots.assign_slots, static_argnums=(1, 2))


def is_sorted(expert, num_experts):
  """Whether the sort is stable."""
  edges = sort_by_expert(jnp.asarray(expert), num_experts)
  order = np.argsort(expert, kind="stable")
  np.testing.assert_array_equal(edges.order, order)
  np.testing.assert_array_equal(edges.rank, np.argsort(order))
  start = np.searchsorted(expert[order], np.arange(num_experts + 1))
  np.testing.assert_array_equal(edges.start, start)
  assert {array.dtype for array in edges} == {jnp.dtype("int32")}


@pytest.mark.parametrize("num_experts", [2**14 - 2, 2**14 - 1, 2**14])
def test_one_number_for_expert_and_edge_never_overflows(num_experts):
  """Just below 2**31 such numbers, at it, and beyond."""
  random = np.random.default_rng(0)
  expert = random.integers(0, num_experts + 1, 2**17).astype("int32")
  expert[[0, -1]] = num_experts
  is_sorted(expert, num_experts)


@hypothesis.given(expert=EXPERTS)
@hypothesis.example(expert=np.full(A, E, "int32"))
@hypothesis.example(expert=np.full(A, 1, "int32"))
def test_first_come_first_served(expert):
  """Experts have their slots one after the other, filled from the first."""
  is_sorted(expert, E)
  of_expert = [[] for _ in range(E + 1)]
  has_slot = reference.has_slot([(0, int(e), 0.0) for e in expert], C)
  for a in np.flatnonzero(has_slot & (expert < E)):
    of_expert[expert[a]].append(int(a))
  edge = [a for taken in of_expert[:E] for a in (taken + C * [A])[:C]]
  got = assign_slots(jnp.asarray(expert), E, C)
  np.testing.assert_array_equal(got.edge, edge)
  slot = [edge.index(a) if a in edge else E * C for a in range(A)]
  np.testing.assert_array_equal(got.slot, slot)
  assert got.edge.dtype == got.slot.dtype == jnp.int32


def test_edges_without_a_slot_are_dropped():
  random = np.random.default_rng(1)
  expert = random.integers(0, E + 1, (G, A)).astype("int32")
  gate = jnp.asarray(random.random((G, A)), jnp.float32)
  assignment = Assignment(jnp.asarray(expert), gate, jnp.asarray(expert))
  got = slots.drop(assignment, E, C)
  assert got.gate is gate and got.token is assignment.token
  for g in range(G):
    has_slot = reference.has_slot([(0, int(e), 0.0) for e in expert[g]], C)
    assert not all(has_slot)
    np.testing.assert_array_equal(
      got.expert[g], np.where(has_slot, expert[g], E)
    )


@pytest.mark.parametrize(
  "edges, tokens, num_experts, factor, minimum, want",
  [
    (128, 64, 8, 1.0, 4, 16),
    (128, 64, 8, 1.25, 4, 20),
    (128, 64, 7, 1.0, 4, 19),  # 18.3: rounded up
    (128, 64, 64, 1.0, None, 4),  # the mean is 2, the minimum is 4
    (128, 64, 64, 1.0, 1, 2),
    (12, 3, 2, 1.0, 4, 3),  # no expert can get more than every token
    (128, 64, 8, 100.0, 4, 64),
    (128, 64, 8, None, 4, None),
    (100, 100, 10, 1.1, 4, 11),  # not 12, as 100 * 1.1 would say
  ],
)
def test_capacity(edges, tokens, num_experts, factor, minimum, want):
  options = {} if minimum is None else {"minimum": minimum}
  capacity = functools.partial(slots.capacity, **options)
  assert capacity(edges, tokens, num_experts, factor) == want


@pytest.mark.parametrize("factor", [0.0, -1.25, float("nan"), float("inf")])
def test_capacity_must_be_positive(factor):
  with pytest.raises(ValueError, match=rf"{factor}.*\b8 experts"):
    slots.capacity(128, 64, 8, factor)
