"""Dispatch: send tokens to their experts, run them, bring the outputs home.

Functions with one signature and one meaning,

  y[token] += gate * expert(x[token])    for every edge that wins a slot,

where an expert takes its first `capacity` edges of each group. They differ in
how rows travel, never in what is computed.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax import sharding
from moejax.routing import Assignment

# (weights, rows [E, N, D]) -> rows [E, N, O]
ExpertFn = Callable[[Any, Float[Array, "E N D"]], Float[Array, "E N O"]]

_HOME = (None, "group", None, None)
_AWAY = ("expert", "group_away", None, None)


def capacity(
  edges: int,
  tokens: int,
  num_experts: int,
  factor: float | None,
  minimum: int = 4,
) -> int:
  """Slots per expert and group.

  Args:
    edges: assignments per group (K * S where tokens choose).
    tokens: tokens per group; no expert needs more slots than that.
    num_experts: E.
    factor: slots over the mean load edges / E; None seats every edge.
    minimum: least capacity, so that tiny groups do not drop by bad luck.

  Raises:
    ValueError: the factor is not positive.
  """
  if factor is None:
    return tokens
  if not 0 < factor < math.inf:
    raise ValueError(
      f"capacity factor {factor} is no size for the {num_experts} experts;"
      " choose a number above 0 (1.25 is usual), or None to drop nothing."
    )
  # Rounded first, or 100 * 1.1 / 10 would need a twelfth slot.
  slots = math.ceil(round(edges * factor / num_experts, 6))
  return min(tokens, max(minimum, slots))


class _Seats(NamedTuple):
  """Where each edge sits and who sits in each slot, in one group.

  Attributes:
    slot: expert * C + position of each edge; E * C for edges without a slot.
    edge: the edge in each slot; A in empty ones.
  """

  slot: Int[Array, "A"]
  edge: Int[Array, "N"]


def _seat(expert: Int[Array, "A"], num_experts: int, capacity: int) -> _Seats:
  """Seats the edges of one group, first come, first served."""
  num_edges = expert.size
  order = jnp.argsort(expert, stable=True).astype(jnp.int32)
  experts = jnp.arange(num_experts + 1, dtype=expert.dtype)
  start = jnp.searchsorted(expert[order], experts).astype(jnp.int32)
  rank = jnp.arange(num_edges, dtype=jnp.int32)
  place = jnp.zeros_like(rank).at[order].set(rank, unique_indices=True)
  position = place - start[expert]
  seated = (expert < num_experts) & (position < capacity)
  slot = jnp.where(seated, expert * capacity + position, num_experts * capacity)
  seat = start[:-1, None] + jnp.arange(capacity, dtype=jnp.int32)[None]
  taken = seat < start[1:, None]
  edge = jnp.where(taken, order[jnp.where(taken, seat, 0)], num_edges)
  return _Seats(slot, edge.reshape(-1))


def _take(rows: Float[Array, "N ..."], index: Int[Array, "..."]) -> Array:
  """Rows by index; zeros where it is out of range."""
  return rows.at[index].get(mode="fill", fill_value=0)


def _token_of_slot(seats: _Seats, num_tokens: int) -> Int[Array, "N"]:
  empty = seats.edge == seats.slot.size
  return jnp.where(empty, num_tokens, seats.edge % num_tokens)


# Where tokens choose, row s of x feeds the K slots slot[k * S + s], and each
# slot holds at most one row. Both moves and both gradients are then reads by
# index; autodiff would write one of each pair as a scatter-add, slow on a CPU
# and in no fixed order on a GPU.


@jax.custom_vjp
def _send(x: Float[Array, "S D"], seats: _Seats) -> Float[Array, "N D"]:
  """Copies each token into the slots of its edges."""
  return _take(x, _token_of_slot(seats, x.shape[0]))


def _send_forward(x, seats):
  return _send(x, seats), (seats, x.shape[0])


def _send_backward(saved, gradient):
  seats, num_tokens = saved
  slot = seats.slot.reshape(-1, num_tokens)
  return _take(gradient, slot).sum(axis=0), None


_send.defvjp(_send_forward, _send_backward)


@jax.custom_vjp
def _combine(
  rows: Float[Array, "N O"], gate: Float[Array, "K S"], seats: _Seats
) -> Float[Array, "S O"]:
  """Sums each token's rows, weighted by its gates."""
  chosen = _take(rows, seats.slot.reshape(gate.shape))
  return (gate[..., None] * chosen).sum(axis=0)


def _combine_forward(rows, gate, seats):
  return _combine(rows, gate, seats), (rows, gate, seats)


def _combine_backward(saved, gradient):
  rows, gate, seats = saved
  chosen = _take(rows, seats.slot.reshape(gate.shape))
  to_gate = (chosen * gradient[None]).sum(axis=-1)
  gate_of_slot = _take(gate.reshape(-1), seats.edge)
  token = _token_of_slot(seats, gate.shape[1])
  return _take(gradient, token) * gate_of_slot[:, None], to_gate, None


_combine.defvjp(_combine_forward, _combine_backward)


def _run_away(
  expert_fn: ExpertFn, weights: Any, sent: Float[Array, "E G C D"]
) -> Float[Array, "E G C O"]:
  """Carries filled slots to their experts and back.

  On a mesh that splits experts each pair of constraints is one all-to-all.
  """
  E, G, C, D = sent.shape
  sent = sharding.constrain(sharding.constrain(sent, *_HOME), *_AWAY)
  back = expert_fn(weights, sent.reshape(E, G * C, D)).reshape(E, G, C, -1)
  return sharding.constrain(sharding.constrain(back, *_AWAY), *_HOME)


def gather(
  expert_fn: ExpertFn,
  weights: Any,
  x: Float[Array, "G S D"],
  assignment: Assignment,
  num_experts: int,
  capacity: int,
) -> Float[Array, "G S O"]:
  """Moves rows by index: no array is larger than the slots themselves."""
  S = x.shape[1]
  seats = jax.vmap(lambda e: _seat(e, num_experts, capacity))(assignment.expert)
  gate = assignment.gate.astype(x.dtype)

  def to_experts(rows):
    return rows.reshape(num_experts, capacity, -1)

  def home(rows):
    return rows.reshape(num_experts * capacity, -1)

  def send(x, seats, token):
    if token is None:
      return to_experts(_send(x, seats))
    edge_token = jnp.append(token, jnp.full(1, S, token.dtype))
    return to_experts(_take(x, edge_token[seats.edge]))

  def combine(rows, seats, gate, token):
    if token is None:
      return _combine(home(rows), gate.reshape(-1, S), seats)
    of_edge = _take(home(rows), seats.slot) * gate[:, None]
    y = jnp.zeros((S, of_edge.shape[-1]), of_edge.dtype)
    return y.at[token].add(of_edge, mode="drop")

  sent = jax.vmap(send, out_axes=1)(x, seats, assignment.token)
  back = _run_away(expert_fn, weights, sent)
  return jax.vmap(combine, in_axes=(1, 0, 0, 0))(
    back, seats, gate, assignment.token
  )


def einsum(
  expert_fn: ExpertFn,
  weights: Any,
  x: Float[Array, "G S D"],
  assignment: Assignment,
  num_experts: int,
  capacity: int,
) -> Float[Array, "G S O"]:
  """GShard's moves: one-hot masks turn both into matrix products.

  The masks hold G*S*E*C entries. Costs S/F of the experts' own work, so keep
  groups small; a matrix unit may still like it better than reading by index.
  """
  S = x.shape[1]
  shape = (x.shape[0], num_experts, capacity)

  def one_group(expert, gate, token):
    edge = _seat(expert, num_experts, capacity).edge
    empty = edge == expert.size
    edge = jnp.where(empty, 0, edge)
    return jnp.where(empty, S, token[edge]), gate[edge]

  token, gate = jax.vmap(one_group)(
    assignment.expert, assignment.gate, assignment.tokens(S)
  )
  mask = jax.nn.one_hot(token.reshape(shape), S, dtype=x.dtype)
  gate = gate.reshape(shape).astype(x.dtype)
  # A move must not round: a matrix unit would take float32 rows as bfloat16.
  exact = jax.lax.Precision.HIGHEST
  sent = jnp.einsum("GECS,GSD->EGCD", mask, x, precision=exact)
  back = _run_away(expert_fn, weights, sent)
  return jnp.einsum(
    "GECS,EGCO->GSO", mask * gate[..., None], back, precision=exact
  )


DISPATCH = {"einsum": einsum, "gather": gather}
