"""Slots: which edge of a group gets which of its expert's slots.

First come, first served: an expert takes its first `capacity` edges.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.routing import Assignment


class Block(NamedTuple):
  """Experts that follow each other and have the same number of slots."""

  num_experts: int
  capacity: int


# Of every expert alike; of blocks of experts in turn; None seats every edge.
Capacity = int | Sequence[Block] | None


def capacity(
  edges: int,
  tokens: int,
  num_experts: int,
  factor: float | None,
  minimum: int = 4,
) -> int | None:
  """Slots per expert and group.

  Args:
    edges: assignments per group (K * S where tokens choose).
    tokens: tokens per group; no expert needs more slots than that.
    num_experts: E.
    factor: slots over the mean load edges / E; None, as the result, seats every
      edge.
    minimum: least capacity, so that tiny groups do not drop by bad luck: where
      experts get 0.6 edges in the mean, 1 slot turns away a quarter of them,
      4 slots less than one in a thousand. What it costs, larger groups save.

  Raises:
    ValueError: the factor is not positive.
  """
  if factor is None:
    return None
  if not 0 < factor < math.inf:
    raise ValueError(
      f"capacity factor {factor} is no size for the {num_experts} experts;"
      " choose a number above 0 (1.25 is usual), or None to drop nothing."
    )
  # Rounded first, or 100 * 1.1 / 10 would need a twelfth slot.
  slots = math.ceil(round(edges * factor / num_experts, 6))
  return min(tokens, max(minimum, slots))


class Seats(NamedTuple):
  """Where each edge sits and who sits in each slot.

  Attributes:
    slot: the slot of each edge; N for edges without one.
    edge: the edge in each slot; A in empty ones.
  """

  slot: Int[Array, "*G A"]
  edge: Int[Array, "*G N"]


class Line(NamedTuple):
  """The edges of one group, sorted by expert; unused ones stand last.

  Attributes:
    order: the edges in line, those of an expert in their old order.
    start: where each expert's edges begin in it, and where the unused do.
    place: each edge's place in it.
  """

  order: Int[Array, "A"]
  start: Int[Array, "bounds"]
  place: Int[Array, "A"]

  def position(self, expert: Int[Array, "A"]) -> Int[Array, "A"]:
    """Returns how many edges of its expert stand before each edge."""
    return self.place - self.start[expert]


def line_up(expert: Int[Array, "A"], num_experts: int) -> Line:
  """Sorts the edges of one group by expert; E, an unused edge, comes last."""
  num_edges = expert.size
  rank = jnp.arange(num_edges, dtype=jnp.int32)
  # One number for expert and edge sorts five times faster than a pair.
  stride = num_edges if (num_experts + 1) * num_edges < 2**31 else 0
  if stride:
    keys = jnp.sort(expert * stride + rank)
    order = keys % stride
    bounds = jnp.arange(num_experts + 1, dtype=jnp.int32) * stride
    start = num_below(keys, bounds)
  else:
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    bounds = jnp.arange(num_experts + 1, dtype=jnp.int32)
    start = num_below(expert[order], bounds)
  place = jnp.zeros_like(rank).at[order].set(rank, unique_indices=True)
  return Line(order, start, place)


def num_below(
  keys: Int[Array, "A"], bounds: Int[Array, "*bounds"]
) -> Int[Array, "*bounds"]:
  """Returns how many of the sorted keys are below each bound.

  As `jnp.searchsorted`, which fails under `jax.vmap` in a `jax.shard_map` over
  some axes of a mesh. A loop would have to be told what varies over devices.
  """
  found = jnp.zeros_like(bounds, jnp.int32)
  for power in reversed(range(keys.size.bit_length())):
    more = found + (1 << power)
    key = keys[jnp.minimum(more, keys.size) - 1]
    found = jnp.where((more <= keys.size) & (key < bounds), more, found)
  return found


def blocks_of(
  capacity: Capacity, num_experts: int, tokens: int
) -> tuple[Block, ...]:
  """Returns the blocks that a capacity stands for; None is a slot per token.

  Raises:
    ValueError: a block without slots, or blocks of more or fewer than
      num_experts.
  """
  if capacity is None:
    capacity = tokens
  if isinstance(capacity, int):
    capacity = (Block(num_experts, capacity),)
  for block in capacity:
    if block.capacity < 1:
      raise ValueError(
        f"capacity {block.capacity} leaves the {block.num_experts} experts no"
        " slot; give at least 1, or None to seat every edge."
      )
  total = sum(block.num_experts for block in capacity)
  if total != num_experts:
    raise ValueError(
      f"the capacities are those of {total} experts, but there are"
      f" {num_experts}; give every expert one."
    )
  return tuple(capacity)


def _capacity_of(blocks: Sequence[Block]) -> Int[Array, "bounds"]:
  """Slots of each expert, and of none: 0."""
  blocks = *blocks, Block(1, 0)
  # No array from outside: `sharding.manual` may trace without any.
  return jnp.concatenate([jnp.full(*block, jnp.int32) for block in blocks])


def seat(expert: Int[Array, "A"], blocks: Sequence[Block]) -> Seats:
  """Seats the edges of one group in slots, first come, first served."""
  num_experts = sum(block.num_experts for block in blocks)
  line = line_up(expert, num_experts)
  capacity_of = _capacity_of(blocks)
  first_slot = jnp.cumsum(capacity_of) - capacity_of
  position = line.position(expert)
  slot = jnp.where(
    position < capacity_of[expert],
    first_slot[expert] + position,
    first_slot[-1],
  )
  edges, first = [], 0
  for num_experts, slots in blocks:
    start = line.start[first : first + num_experts + 1, None]
    seat = start[:-1] + jnp.arange(slots, dtype=jnp.int32)[None]
    taken = seat < start[1:]
    edge = jnp.where(taken, line.order[jnp.where(taken, seat, 0)], expert.size)
    edges.append(edge.reshape(-1))
    first += num_experts
  return Seats(slot, jnp.concatenate(edges))


def drop(assignment: Assignment, blocks: Sequence[Block]) -> Assignment:
  """Makes the edges that find their expert full unused."""
  capacity_of = _capacity_of(blocks)
  num_experts = capacity_of.size - 1

  def one_group(expert):
    position = line_up(expert, num_experts).position(expert)
    return jnp.where(position < capacity_of[expert], expert, num_experts)

  return assignment._replace(expert=jax.vmap(one_group)(assignment.expert))
