"""Slots: which edge gets which, and moving rows to slots and back.

An expert takes its first `capacity` edges of each group. Rows move by index,
where no array is larger than the slots, or by products with masks.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from moejax import sharding
from moejax.routing import Assignment

# (weights, rows, mask) or (weights, rows, group_sizes=...) -> rows, see
# experts.py; of several kinds of experts in slots, a tuple of each.
ExpertFn = Callable[..., Any]


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
    factor: slots over the mean load edges / E; None drops no edge, and the
      capacity is None too.
    minimum: least capacity, so that tiny groups do not drop by bad luck: where
      experts get 0.6 edges in the mean, 1 slot drops a quarter of them, 4 slots
      less than one in a thousand. What it costs, larger groups save.

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


def check(x: Array, num_experts: int, capacity: int | None) -> None:
  """Raises ValueError for rows that are no floats, and a capacity below 1."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"the rows are {x.dtype}, which gates between 0 and 1 cannot weigh; give"
      " them as float32 or bfloat16, as the layers do with whole numbers."
    )
  if capacity is not None and capacity < 1:
    raise ValueError(
      f"capacity {capacity} leaves the {num_experts} experts no slot; give at"
      " least 1, or None to drop no edge."
    )


# -- who gets a slot ----------------------------------------------------------


class SortedEdges(NamedTuple):
  """The edges of one group, sorted by expert; unused ones come last.

  Attributes:
    order: the edges, those of an expert in their old order.
    start: where each expert's edges begin, and where the unused ones do.
    rank: where each edge stands in `order`.
  """

  order: Int[Array, "A"]
  start: Int[Array, "bounds"]
  rank: Int[Array, "A"]


class Slots(NamedTuple):
  """Which slot each edge has, and which edge each slot has.

  Attributes:
    slot: of each edge; N for edges without one.
    edge: in each slot; A in empty ones.
  """

  slot: Int[Array, "*G A"]
  edge: Int[Array, "*G N"]


def sort_by_expert(expert: Int[Array, "A"], num_experts: int) -> SortedEdges:
  """Sorts the edges of one group by expert; E, an unused edge, comes last."""
  num_edges = expert.size
  index = jnp.arange(num_edges, dtype=jnp.int32)
  bounds = jnp.arange(num_experts + 1, dtype=jnp.int32)
  # One number for expert and edge sorts five times faster than a pair.
  if 0 < (num_experts + 1) * num_edges < 2**31:
    keys = jnp.sort(expert * num_edges + index)
    order = keys % num_edges
    start = num_below(keys, bounds * num_edges)
  else:
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    start = num_below(expert[order], bounds)
  rank = jnp.zeros_like(index).at[order].set(index, unique_indices=True)
  return SortedEdges(order, start, rank)


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


def assign_slots(
  expert: Int[Array, "A"], num_experts: int, capacity: int
) -> Slots:
  """Gives the edges of one group the slots of their experts, in order.

  Slot c of expert e is slot e * C + c of N = E * C.
  """
  edges = sort_by_expert(expert, num_experts)
  position = edges.rank - edges.start[expert]
  has_slot = (position < capacity) & (expert < num_experts)
  slot = expert * capacity + position
  begin, end = edges.start[:-1, None], edges.start[1:, None]
  rank = begin + jnp.arange(capacity, dtype=jnp.int32)[None]
  taken = rank < end
  edge = jnp.where(taken, edges.order[jnp.where(taken, rank, 0)], expert.size)
  return Slots(
    jnp.where(has_slot, slot, num_experts * capacity), edge.reshape(-1)
  )


def drop(assignment: Assignment, num_experts: int, capacity: int) -> Assignment:
  """Makes the edges beyond their expert's capacity unused."""

  def of_group(expert):
    slot = assign_slots(expert, num_experts, capacity).slot
    return jnp.where(slot < num_experts * capacity, expert, num_experts)

  return assignment._replace(expert=jax.vmap(of_group)(assignment.expert))


def _token_of_slot(slots, assignment, num_tokens):
  """The token of each slot; S marks an empty one."""
  token = slots.edge % num_tokens
  if assignment.token is not None:
    token = take(assignment.token, slots.edge)
  return jnp.where(slots.edge < slots.slot.size, token, num_tokens)


# -- by index -----------------------------------------------------------------


def take(rows: Num[Array, "N ..."], index: Int[Array, "..."]) -> Array:
  """Rows by index; zeros where it is out of range."""
  return rows.at[index].get(mode="fill", fill_value=0)


# Where tokens choose, row s of x feeds the K slots slot[:, s], and each slot
# holds at most one row. Both moves and both gradients are then reads by index;
# autodiff would write one of each pair as a scatter-add, slow on a CPU and in
# no fixed order on a GPU. A token's K rows are read one choice after the other:
# on a CPU that takes a tenth of the time of one read and a sum over it.


@jax.custom_vjp
def _copy(x, token, slot):
  """Copies tokens of x [S, D] into the slots: slot [K, S] of token [N]."""
  return take(x, token)


def _copy_backward(slot, gradient):
  return sum(take(gradient, of_choice) for of_choice in slot), None, None


_copy.defvjp(
  lambda x, token, slot: (take(x, token), slot),
  _copy_backward,
)


@jax.custom_vjp
def _sum(rows, gate, slot, token, edge):
  """Sums each token's rows [N, O], weighed by its gates [K, S]."""
  of_choice = zip(gate, slot, strict=True)
  return sum(weight[:, None] * take(rows, slot) for weight, slot in of_choice)


def _sum_backward(saved, gradient):
  rows, gate, slot, token, edge = saved
  to_gate = [(take(rows, one) * gradient).sum(axis=-1) for one in slot]
  gate_of_slot = take(gate.reshape(-1), edge)
  to_rows = take(gradient, token) * gate_of_slot[:, None]
  return to_rows, jnp.stack(to_gate), None, None, None


_sum.defvjp(lambda *args: (_sum(*args), args), _sum_backward)


def dispatch_gather(
  x: Float[Array, "S D"], slots: Slots, assignment: Assignment
) -> Float[Array, "N D"]:
  """Returns the token's row in every slot, zeros in empty ones."""
  S = x.shape[0]
  token = _token_of_slot(slots, assignment, S)
  if assignment.token is None:
    return _copy(x, token, slots.slot.reshape(-1, S))
  return take(x, token)


def combine_gather(
  rows: Float[Array, "N O"],
  slots: Slots,
  assignment: Assignment,
  num_tokens: int,
) -> Float[Array, "S O"]:
  """Adds up each token's rows, weighed by their gates (eq. 1).

  A token without a slot gives zeros.
  """
  gate = assignment.gate.astype(rows.dtype)
  if assignment.token is None:
    token = _token_of_slot(slots, assignment, num_tokens)
    by_choice = (a.reshape(-1, num_tokens) for a in (gate, slots.slot))
    return _sum(*sharding.vary_alike(rows, *by_choice, token, slots.edge))
  of_edge = take(rows, slots.slot) * gate[:, None]
  y = jnp.zeros((num_tokens, rows.shape[1]), rows.dtype)
  return y.at[assignment.token].add(of_edge, mode="drop")


# -- by products with masks ---------------------------------------------------


def dispatch_einsum(
  x: Float[Array, "S D"], slots: Slots, assignment: Assignment
) -> Float[Array, "N D"]:
  """Returns what `dispatch_gather` does, by a product with a mask [N, S]."""
  token = _token_of_slot(slots, assignment, x.shape[0])
  return _product(jax.nn.one_hot(token, x.shape[0], dtype=x.dtype), x)


def combine_einsum(
  rows: Float[Array, "N O"],
  slots: Slots,
  assignment: Assignment,
  num_tokens: int,
) -> Float[Array, "S O"]:
  """Returns what `combine_gather` does, by a product with a mask [N, S]."""
  token = _token_of_slot(slots, assignment, num_tokens)
  gate = take(assignment.gate, slots.edge).astype(rows.dtype)
  mask = jax.nn.one_hot(token, num_tokens, dtype=bool)
  # By choice, as a gate that is NaN times 0 would be.
  return _product(jnp.where(mask, gate[:, None], 0).T, rows)


def _product(weights, rows):
  """Multiplies a mask by rows; a row that is not finite reaches its own places.

  In the product itself 0 * NaN would be NaN everywhere. Where such a row
  arrives all is NaN, and no gradient comes back from there.
  """
  finite = jnp.isfinite(rows).all(axis=1)
  clean = jnp.where(finite[:, None], rows, 0)
  # A matrix unit would round float32 rows to bfloat16; a move must not.
  exact = jax.lax.Precision.HIGHEST
  y = jnp.einsum("NS,SD->ND", weights, clean, precision=exact)
  spoilt = ((weights != 0) & ~finite[None]).any(axis=1)
  return jnp.where(spoilt[:, None], jnp.nan, y)
