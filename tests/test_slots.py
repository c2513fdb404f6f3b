"""Seats: who stands where in line, who gets a slot, who is turned away."""

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
from moejax.slots import Block

G, S, K, E, A = 2, 3, 2, 4, 11
BLOCKS = (Block(1, 3), Block(2, 1), Block(1, 2))
CAPACITY = [3, 1, 1, 2]
EXPERTS = arrays("int32", (A,), elements=st.integers(0, E))


@functools.partial(jax.jit, static_argnums=1)
def line_up(expert, num_experts):
  line = slots.line_up(expert, num_experts)
  return line, line.position(expert)


def is_lined_up(expert, num_experts):
  """Whether the line is a stable sort."""
  line, position = line_up(jnp.asarray(expert), num_experts)
  order = np.argsort(expert, kind="stable")
  np.testing.assert_array_equal(line.order, order)
  np.testing.assert_array_equal(line.place, np.argsort(order))
  start = np.searchsorted(expert[order], np.arange(num_experts + 1))
  np.testing.assert_array_equal(line.start, start)
  np.testing.assert_array_equal(position, np.argsort(order) - start[expert])
  for array in (*line, position):
    assert array.dtype == jnp.int32


@hypothesis.given(expert=EXPERTS)
@hypothesis.example(expert=np.full(A, E, "int32"))
def test_edges_of_an_expert_line_up_in_their_order(expert):
  is_lined_up(expert, E)
  _, position = line_up(jnp.asarray(expert), E)
  before = [(expert[:a] == expert[a]).sum() for a in range(A)]
  np.testing.assert_array_equal(position, before)


@pytest.mark.parametrize("num_experts", [2**14 - 2, 2**14 - 1, 2**14])
def test_one_number_for_expert_and_edge_never_overflows(num_experts):
  """Just below 2**31 such numbers, at it, and beyond."""
  edges = 2**17
  random = np.random.default_rng(0)
  expert = random.integers(0, num_experts + 1, edges).astype("int32")
  expert[[0, -1]] = num_experts
  is_lined_up(expert, num_experts)


@jax.jit
def seat(expert):
  return slots.seat(expert, BLOCKS)


@hypothesis.given(expert=EXPERTS)
@hypothesis.example(expert=np.full(A, E, "int32"))
@hypothesis.example(expert=np.full(A, 1, "int32"))
def test_first_come_first_served(expert):
  """Experts have their slots one after the other, filled from the first."""
  edges = [(0, int(e), 0.0) for e in expert]
  slots = [[] for _ in range(E + 1)]
  for a, has_seat in enumerate(reference.seated(edges, [*CAPACITY, 0])):
    if has_seat:
      slots[expert[a]].append(a)
  edge = [
    a
    for taken, capacity in zip(slots, CAPACITY, strict=False)
    for a in taken + [A] * (capacity - len(taken))
  ]
  got = seat(jnp.asarray(expert))
  np.testing.assert_array_equal(got.edge, edge)
  slot = [edge.index(a) if a in edge else len(edge) for a in range(A)]
  np.testing.assert_array_equal(got.slot, slot)
  assert got.edge.dtype == got.slot.dtype == jnp.int32


def test_drop_turns_away_who_gets_no_seat():
  random = np.random.default_rng(1)
  expert = random.integers(0, E + 1, (G, A)).astype("int32")
  gate = jnp.asarray(random.random((G, A)), jnp.float32)
  assignment = Assignment(jnp.asarray(expert), gate, jnp.asarray(expert))
  got = slots.drop(assignment, BLOCKS)
  assert got.gate is gate and got.token is assignment.token
  for g in range(G):
    edges = [(0, int(e), 0.0) for e in expert[g]]
    has_seat = reference.seated(edges, [*CAPACITY, 0])
    assert not all(has_seat)
    np.testing.assert_array_equal(
      got.expert[g], np.where(has_seat, expert[g], E)
    )


@pytest.mark.parametrize(
  "capacity, want",
  [
    (3, (Block(E, 3),)),
    (None, (Block(E, S),)),
    (BLOCKS, BLOCKS),
    (list(BLOCKS), BLOCKS),
  ],
)
def test_a_capacity_is_that_of_blocks_of_experts(capacity, want):
  assert slots.blocks_of(capacity, E, S) == want


@pytest.mark.parametrize(
  "capacity, message",
  [
    (0, rf"capacity 0 .* {E} experts"),
    (-2, rf"capacity -2 .* {E} experts"),
    ((Block(3, 1), Block(1, 0)), r"capacity 0 .* 1 experts"),
    ((Block(3, 1), Block(2, 1)), rf"\b5 experts.*\b{E}\b"),
    ((Block(2, 1),), rf"\b2 experts.*\b{E}\b"),
  ],
)
def test_bad_capacities_name_both_numbers(capacity, message):
  with pytest.raises(ValueError, match=message):
    slots.blocks_of(capacity, E, S)


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
    (128, 64, 8, None, 4, None),
    (100, 100, 10, 1.1, 4, 11),  # not 12, as 100 * 1.1 would say
  ],
)
def test_capacity(edges, tokens, num_experts, factor, minimum, want):
  got = slots.capacity(edges, tokens, num_experts, factor, minimum)
  assert got == want


@pytest.mark.parametrize("factor", [0.0, -1.25, float("nan"), float("inf")])
def test_capacity_must_be_positive(factor):
  with pytest.raises(ValueError, match=rf"{factor}.*\b8 experts"):
    slots.capacity(128, 64, 8, factor)


def test_capacity_has_a_minimum_of_four():
  assert slots.capacity(16, 16, 16, 1.0) == 4
